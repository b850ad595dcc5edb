"""Every loss on extreme inputs: half precision, saturation, collapsed and zero features, batches of one."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from mostly_slow import mostly_slow
from random_inputs import autocast_if, random_outputs
from torch import Tensor, nn

from kd_lightning.features import Outputs
from kd_lightning.losses import (
    AttentionLoss,
    BinarySoftTargetLoss,
    ContrastiveLoss,
    CorrelationLoss,
    CTKDLoss,
    DecoupledLoss,
    DistillationLoss,
    DistLoss,
    DistPlusLoss,
    HardTargetLoss,
    HintLoss,
    MLLDLoss,
    NeuronSelectivityLoss,
    NKDLoss,
    Objective,
    OFALoss,
    ProbabilisticLoss,
    QueueKLLoss,
    RelationalLoss,
    ReviewLoss,
    RLDLoss,
    RSDLoss,
    SDDDKDLoss,
    SDDKDLoss,
    SimilarityLoss,
    SKDLoss,
    SoftTargetLoss,
    SRDLoss,
    TTMLoss,
    USKDLoss,
    VariationalLoss,
    ViTKDLoss,
    VkDLoss,
    WKDFeatureLoss,
    WKDLogitLoss,
    WTTMLoss,
    attention_loss,
    binary_soft_target_loss,
    catkd_binarized_loss,
    catkd_loss,
    contrastive_loss,
    coral_loss,
    correlation_loss,
    ctkd_loss,
    decoupled_loss,
    dist_loss,
    dist_plus_torchdistill_loss,
    hard_distillation_loss,
    hierarchical_context_loss,
    hint_loss,
    mlld_batch_loss,
    mlld_class_loss,
    mlld_instance_loss,
    mlld_loss,
    mmd_loss,
    neuron_selectivity_loss,
    nkd_loss,
    ofa_loss,
    probabilistic_loss,
    queue_kl_loss,
    queue_kl_v3_local_loss,
    relational_loss,
    rld_loss,
    rsd_loss,
    sdd_dkd_loss,
    sdd_kd_loss,
    sdd_nkd_loss,
    similarity_loss,
    skd_direction_torchdistill_loss,
    skd_instance_masked_loss,
    skd_loss,
    soft_target_loss,
    srd_deit_loss,
    srd_loss,
    srd_torchdistill_loss,
    ttm_loss,
    uskd_loss,
    uskd_mixed_labels_loss,
    variational_loss,
    vitkd_loss,
    vkd_loss,
    wkd_f_loss,
    wkd_l_all_classes_loss,
    wkd_l_loss,
    wttm_loss,
)

Loss = Callable[[Tensor, Tensor], Tensor]


def _labels(student: Tensor) -> Tensor:
    """Return labels without the last class."""
    return torch.arange(len(student)) % (student.shape[1] - 1)


def _mixed(student: Tensor) -> Tensor:
    """Return probabilities of the label and of the last class."""
    classes = student.shape[1]
    return 0.7 * F.one_hot(_labels(student), classes) + 0.3 * F.one_hot(torch.tensor(classes - 1), classes)


def _classifier(student: Tensor) -> nn.Module:
    """Return a linear layer whose weights are fixed, of the type in which the loss is computed."""
    classes = student.shape[1]
    layer = nn.Linear(classes, classes, bias=False).to(torch.promote_types(student.dtype, torch.float32))
    layer.weight.data.copy_(torch.eye(classes).flip(0))
    return layer


def _costs(student: Tensor) -> Tensor:
    """Return costs of confusing two classes, by which those with near numbers are similar."""
    place = torch.arange(student.shape[1]) / student.shape[1]
    return (place[:, None] - place).abs()


def _variational(student: Tensor, teacher: Tensor) -> Tensor:
    return variational_loss(student, teacher, torch.linspace(-2, 5, student.shape[1], dtype=student.dtype))


def _contrastive(student: Tensor, teacher: Tensor) -> Tensor:
    return contrastive_loss(student, teacher, teacher.flip(0), torch.eye(len(student)).flip(0).bool())


def _srd(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the loss with the vectors as logits, too."""
    return srd_loss(student, student, teacher, teacher, embed=nn.Identity())


def _vkd(student: Tensor, teacher: Tensor) -> Tensor:
    return vkd_loss(student.flatten(2).transpose(1, 2), teacher, torch.eye(3, dtype=student.dtype))


def _vitkd(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.flatten(2).transpose(1, 2), teacher.flatten(2).transpose(1, 2)
    noise = torch.arange(16).expand(len(student), 16)
    token = torch.zeros(1, 1, 3, dtype=student.dtype)
    return vitkd_loss(s[:, None], s, t[:, None], t, noise, mask_token=token, generation=nn.Identity())


_LOGITS, _REGIONS, _VECTORS, _MAPS = (6, 5), (6, 5, 3), (6, 7), (6, 3, 4, 4)
_LOSSES: dict[str, tuple[Loss, tuple[int, ...]]] = {
    "soft_target": (lambda s, t: soft_target_loss(s, t, temperature=4.0), _LOGITS),
    "standardized": (lambda s, t: soft_target_loss(s, t, temperature=2.0, standardize=True), _LOGITS),
    "binary_soft_target": (lambda s, t: binary_soft_target_loss(s, t, temperature=4.0), _LOGITS),
    "decoupled": (lambda s, t: decoupled_loss(s, t, _labels(s)), _LOGITS),
    "nkd": (lambda s, t: nkd_loss(s, t, _labels(s), temperature=3.0, gamma=3.5), _LOGITS),
    "ttm": (ttm_loss, _LOGITS),
    "wttm": (wttm_loss, _LOGITS),
    "rld": (lambda s, t: rld_loss(s, t, _labels(s)), _LOGITS),
    "rld, standardized": (
        lambda s, t: rld_loss(s, t, _labels(s), beta=1.0, temperature=2.0, logit_stand=True),
        _LOGITS,
    ),
    "dist": (dist_loss, _LOGITS),
    "wkd_l": (lambda s, t: wkd_l_loss(s, t, _labels(s), _costs(s)), _LOGITS),
    "wkd_l_all_classes": (lambda s, t: wkd_l_all_classes_loss(s, t, _costs(s)), _LOGITS),
    "sdd_kd": (lambda s, t: sdd_kd_loss(s, t, _labels(s)), _REGIONS),
    "sdd_dkd": (lambda s, t: sdd_dkd_loss(s, t, _labels(s)), _REGIONS),
    "sdd_nkd": (lambda s, t: sdd_nkd_loss(s, t, _labels(s)), _REGIONS),
    "mlld_instance": (lambda s, t: mlld_instance_loss(s, s.flip(0), t, t.flip(0)), _LOGITS),
    "mlld_class": (lambda s, t: mlld_class_loss(s, None, t, None), _LOGITS),
    "mlld_batch": (lambda s, t: mlld_batch_loss(s, None, t, None), _LOGITS),
    "mlld, corrected": (lambda s, t: mlld_loss(s, s, t, t, _labels(s), corrected=True), _LOGITS),
    "dist_plus": (lambda s, t: dist_plus_torchdistill_loss(s, t, s[..., None, None], t[..., None, None]), _LOGITS),
    "ctkd": (lambda s, t: ctkd_loss(s, t, global_T=torch.ones(1, dtype=s.dtype), lambda_=-1.0), _LOGITS),
    "skd": (lambda s, t: skd_loss(s, t, _labels(s)), _LOGITS),
    "skd, corrected": (lambda s, t: skd_instance_masked_loss(s, t, corrected=True), _LOGITS),
    "skd_direction_torchdistill": (skd_direction_torchdistill_loss, _LOGITS),
    "uskd": (lambda s, t: uskd_loss(s, t, _labels(s), fc=_classifier(s)), _LOGITS),
    "uskd, mixed": (lambda s, t: uskd_mixed_labels_loss(s, t, _mixed(s), fc=_classifier(s)), _LOGITS),
    "queue_kl": (lambda s, t: queue_kl_loss(s, t, t.flip(0)), _VECTORS),
    "queue_kl_v3_local": (lambda s, t: queue_kl_v3_local_loss(s[:, None], t[:, None].expand(-1, 1, -1)), _VECTORS),
    "hint": (hint_loss, _MAPS),
    "hierarchical_context": (hierarchical_context_loss, _MAPS),
    "attention": (attention_loss, _MAPS),
    "neuron_selectivity": (neuron_selectivity_loss, _MAPS),
    "similarity": (similarity_loss, _MAPS),
    "probabilistic": (probabilistic_loss, _VECTORS),
    "relational": (relational_loss, _VECTORS),
    "correlation": (correlation_loss, _VECTORS),
    "variational": (_variational, _MAPS),
    "contrastive": (_contrastive, _VECTORS),
    "hard_distillation": (hard_distillation_loss, _LOGITS),
    "wkd_f": (lambda s, t: wkd_f_loss(s, t, grid=2), _MAPS),
    "catkd": (catkd_loss, _MAPS),
    "catkd normalized": (lambda s, t: catkd_loss(s, t, normalize=True), _MAPS),
    "catkd binarized": (catkd_binarized_loss, _MAPS),
    "ofa": (lambda s, t: ofa_loss(s, t, torch.arange(len(s)) % 5 - 1, eps=1.5), _LOGITS),
    "rsd": (rsd_loss, _VECTORS),
    "vkd": (_vkd, _MAPS),
    "vitkd": (_vitkd, _MAPS),
    "srd": (_srd, _VECTORS),
    "srd_deit": (lambda s, t: srd_deit_loss(s, t, embed=nn.Identity()), _VECTORS),
    "srd_torchdistill": (lambda s, t: srd_torchdistill_loss(s, t, s, t), _VECTORS),
    "mmd": (mmd_loss, _VECTORS),
    "biased mmd": (lambda s, t: mmd_loss(s, t, unbiased=False), _VECTORS),
    "coral": (coral_loss, _VECTORS),
}


def _without_a_class(values: Tensor) -> Tensor:
    values[:, -1] = -1e4
    return values


def _one_row_zero(values: Tensor) -> Tensor:
    values[1] = 0
    return values


_INPUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "usual": lambda x: (x, torch.randn_like(x)),
    "of 300": lambda x: (300 * x, 300 * torch.randn_like(x)),
    "of 10000": lambda x: (1e4 * x, 1e4 * torch.randn_like(x)),
    "saturated": lambda x: (1e4 * x.sign(), 1e4 * torch.randn_like(x).sign()),
    "saturated and opposite": lambda x: (1e4 * x.sign(), -1e4 * x.sign()),
    "rows are opposite": lambda x: (x * (-1) ** torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1)), x),
    "rows are identical": lambda x: (x[:1].expand_as(x), torch.randn_like(x)),
    "teacher's rows are identical": lambda x: (x, torch.randn_like(x[:1]).expand_as(x)),
    "all rows are identical": lambda x: (x[:1].expand_as(x), torch.randn_like(x[:1]).expand_as(x)),
    "student is teacher": lambda x: (x, x.clone()),
    "a class is missing": lambda x: (_without_a_class(x), _without_a_class(torch.randn_like(x))),
    "constant": lambda x: (torch.full_like(x, 3.0), torch.randn_like(x)),
    "teacher is constant": lambda x: (x, torch.full_like(x, 3.0)),
    "both are constant": lambda x: (torch.full_like(x, 3.0), torch.full_like(x, 3.0)),
    "zero": lambda x: (torch.zeros_like(x), torch.randn_like(x)),
    "teacher is zero": lambda x: (x, torch.zeros_like(x)),
    "both are zero": lambda x: (torch.zeros_like(x), torch.zeros_like(x)),
    "one row is zero": lambda x: (_one_row_zero(x), torch.randn_like(x)),
    "batch of one": lambda x: (x[:1], torch.randn_like(x[:1])),
    "batch of one, zero": lambda x: (torch.zeros_like(x[:1]), torch.randn_like(x[:1])),
    "batch of two": lambda x: (x[:2], torch.randn_like(x[:2])),
}


def _case(name: str, inputs: str) -> tuple[Loss, Tensor, Tensor]:
    loss, shape = _LOSSES[name]
    student, teacher = _INPUTS[inputs](torch.randn(shape))
    if name in ("contrastive", "queue_kl", "queue_kl_v3_local"):  # take unit vectors
        return loss, F.normalize(student), F.normalize(teacher)
    return loss, student, teacher


_BEYOND_FLOAT16 = [(torch.float16, "coral", inputs) for inputs in ("of 300", "of 10000", "saturated")]
"""The gradient grows with the cube of the features, beyond the range of float16."""


@pytest.mark.parametrize(
    ("dtype", "name", "inputs"),
    [
        case
        for case in product([torch.float32, torch.float16, torch.bfloat16], _LOSSES, _INPUTS)
        if case not in _BEYOND_FLOAT16
    ],
)
def test_value_and_gradient_stay_finite_and_are_computed_in_float32(dtype: torch.dtype, name: str, inputs: str) -> None:
    loss, student, teacher = _case(name, inputs)
    student, teacher = student.to(dtype), teacher.to(dtype)
    expected = loss(student.float(), teacher.float())
    for autocast in (False, True):
        leaf = student.clone().requires_grad_()
        with autocast_if(autocast):
            value = loss(leaf, teacher)
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("inputs", ["usual", "of 300", "of 10000", "a class is missing", "batch of two"])
@pytest.mark.parametrize("name", list(_LOSSES))
def test_float32_is_close_to_float64(name: str, inputs: str) -> None:
    loss, student, teacher = _case(name, inputs)
    value = loss(student, teacher)
    exact = loss(student.double(), teacher.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)


_MODULES: dict[str, Callable[[], DistillationLoss]] = {
    "soft_target": SoftTargetLoss,
    "standardized": lambda: SoftTargetLoss(standardize=True),
    "binary_soft_target": BinarySoftTargetLoss,
    "decoupled": DecoupledLoss,
    "dist": DistLoss,
    "nkd": NKDLoss,
    "ttm": TTMLoss,
    "wttm": WTTMLoss,
    "wkd_l": lambda: WKDLogitLoss(gamma=1.0),
    "sdd_kd": lambda: SDDKDLoss(student_layers=["deep"]),
    "sdd_dkd": lambda: SDDDKDLoss(student_layers=["deep"]),
    "rld": RLDLoss,
    "mlld": MLLDLoss,
    "dist_plus": lambda: DistPlusLoss(student_layers=["deep"]),
    "ctkd": CTKDLoss,
    "skd": SKDLoss,
    "uskd": lambda: USKDLoss(student_layers=["deep"]),
    "queue_kl": lambda: QueueKLLoss(student_layers=["vector", "deep"], queue_size=8),
    "hint": lambda: HintLoss(student_layers=["shallow", "deep", "vector"]),
    "attention": lambda: AttentionLoss(student_layers=["shallow", "deep"]),
    "neuron_selectivity": lambda: NeuronSelectivityLoss(student_layers=["shallow", "deep"]),
    "similarity": lambda: SimilarityLoss(student_layers=["deep", "vector"]),
    "probabilistic": lambda: ProbabilisticLoss(student_layers=["deep", "vector"]),
    "relational": lambda: RelationalLoss(student_layers=["deep", "vector"]),
    "correlation": lambda: CorrelationLoss(student_layers=["deep", "vector"], dimensions=4),
    "variational": lambda: VariationalLoss(student_layers=["shallow", "deep", "vector"]),
    "review": lambda: ReviewLoss(student_layers=["shallow", "deep", "vector"]),
    "contrastive": lambda: ContrastiveLoss(student_layers=["deep", "vector"], dimensions=4, queue_size=8),
    "wkd_f": lambda: WKDFeatureLoss(student_layers=["shallow", "deep"]),
    "wkd_f bottleneck": lambda: WKDFeatureLoss(student_layers=["deep"], projector="bottleneck", width=4),
    "rsd": lambda: RSDLoss(student_layers=["deep", "vector"]),
    "ofa": lambda: OFALoss(student_layers=["shallow", "deep", "vector"], eps=1.5),
    "vkd": lambda: VkDLoss(student_layers=["deep", "vector"]),
    "vitkd": lambda: ViTKDLoss(student_layers=["shallow", "deep"]),
    "srd": lambda: SRDLoss(student_layers=["deep", "vector"]),
}
_LABELS = torch.tensor([0, 3, -1, 1])


def _outputs(width: int, size: int, dtype: torch.dtype = torch.float32, rows: int = 4) -> Outputs:
    shallow, deep, vector = (width, 2 * size, 2 * size), (2 * width, size, size), (2 * width,)
    return random_outputs(rows, dtype=dtype, requires_grad=True, shallow=shallow, deep=deep, vector=vector)


def _networks(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """Return networks whose classifiers take the last map of the outputs, student and teacher."""
    heads = (nn.Sequential(nn.Linear(2 * width, 5)).to(dtype) for width in (3, 5))
    return dict(zip(("student_network", "teacher_network"), heads, strict=True))


def _second_step(loss: DistillationLoss, student: Outputs, teacher: Outputs) -> Tensor:
    """Compute the term after a first step, which fills the queue."""
    loss(_outputs(3, 4), _outputs(5, 2), _LABELS)
    return loss(student, teacher, _LABELS[: len(student.logits)])


@pytest.mark.parametrize("name", list(_MODULES))
def test_the_student_and_the_learned_parts_get_gradients_and_the_teacher_none(name: str) -> None:
    loss, student, teacher = _MODULES[name](), _outputs(3, 4), _outputs(5, 2)
    reads_features = bool(loss.student_layers)
    if not reads_features:  # DistillationModule detaches the teacher's logits
        teacher = Outputs(teacher.logits.detach())
    loss.build(student, teacher, **_networks())
    _second_step(loss, student, teacher).backward()
    read = [student.features[layer] for layer in loss.student_layers] if reads_features else [student.logits]
    for tensor in (*read, *loss.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0
    assert teacher.logits.grad is None
    assert all(feature.grad is None for feature in teacher.features.values())
    assert student.logits.grad is None or not reads_features or loss.compares_logits or not loss.needs_teacher


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", list(_MODULES))
@pytest.mark.parametrize(
    ("features", "weights", "autocast"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.float32, False),
        (torch.float16, torch.float32, False),
        (torch.float64, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float64, torch.float64, False),
    ],
)
def test_all_precisions_of_features_and_weights_give_finite_values(
    name: str, features: torch.dtype, weights: torch.dtype, autocast: bool, rows: int
) -> None:
    loss = _MODULES[name]()
    student, teacher = _outputs(3, 4, features, rows), _outputs(5, 2, features, rows)
    teacher = Outputs(teacher.logits.detach(), teacher.features)
    loss.build(student, teacher, **_networks(weights))
    loss.to(weights)
    with autocast_if(autocast):
        term = _second_step(loss, student, teacher)
    if features == weights or features != torch.float64:
        assert term.dtype == (torch.float64 if features == torch.float64 else torch.float32)
    assert term.isfinite()
    term.backward()
    read = [student.features[layer] for layer in loss.student_layers] or [student.logits]
    for tensor in (*read, *loss.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(
    "name",
    mostly_slow([name for name, build in _MODULES.items() if build().capturable], "soft_target", "hint", "rld"),
)
def test_a_compiled_objective_equals_an_ordinary_one(name: str) -> None:
    """Traced, and run by the backend without kernels of its own, which would take minutes for all losses."""
    torch.compiler.reset()
    student, teacher, found = _outputs(3, 4), _outputs(5, 2), []
    objective = Objective({"hard": HardTargetLoss(), "mine": _MODULES[name]()}, accepts=(DistillationLoss,))
    networks = _networks()
    objective.build(student, teacher, network=networks["student_network"], teacher=networks["teacher_network"])
    for compiled in (False, True):
        if compiled:
            objective.compile(backend="aot_eager", dynamic=False)
        for epoch in range(2):  # what changes between steps is not compiled in
            objective.begin_step(progress=epoch / 2, epoch=epoch, device=torch.device("cpu"))
            total, _ = objective(student, Outputs(teacher.logits.detach(), teacher.features), _LABELS)
        gradients = torch.autograd.grad(total, [student.logits, *student.features.values()], allow_unused=True)
        found.append([total, *(gradient for gradient in gradients if gradient is not None)])
    for ordinary, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, ordinary, rtol=1e-5, atol=1e-6)
