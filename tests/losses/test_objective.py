"""Named terms and their weighted sum."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from random_inputs import random_outputs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_lightning import losses as kd_losses
from kd_lightning.features import Outputs
from kd_lightning.losses import (
    AlignmentLoss,
    AttentionLoss,
    BinarySoftTargetLoss,
    BinaryTargetLoss,
    CoralLoss,
    DistillationLoss,
    HardTargetLoss,
    HintLoss,
    MMDLoss,
    Objective,
    SoftTargetLoss,
)

CPU = torch.device("cpu")


class Square(DistillationLoss):
    """The mean square of the student's logits, with its root and the progress and epoch as metrics."""

    views = 2

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        value = student.logits.square().mean()
        self.metrics = {"root": value.sqrt(), "epoch": self.epoch.clone(), "progress": self.progress.clone()}
        return value


class RecordOperations(TorchDispatchMode):
    """Records the names of dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


outputs = partial(random_outputs, 4, classes=3)


def distillation(**losses: DistillationLoss) -> Objective:
    return Objective(losses, accepts=(DistillationLoss,))


def alignment(**losses: AlignmentLoss | HardTargetLoss) -> Objective:
    return Objective(losses, accepts=(AlignmentLoss, HardTargetLoss))


# --- the sum


@pytest.mark.parametrize("epoch", [0, 1, 2, 5])
def test_the_total_equals_the_weighted_sum_exactly(epoch: int) -> None:
    losses = {
        "hard": HardTargetLoss(weight=0.1),
        "soft": SoftTargetLoss(4.0, weight=0.9, warmup_epochs=3),
        "mine": Square(weight=1 / 3, warmup_epochs=7),
    }
    objective = distillation(**losses)
    for _ in range(20):
        student, teacher, labels = outputs(), outputs(), torch.randint(3, (4,))
        objective.begin_step(progress=0.5, epoch=epoch, device=CPU)
        total, logged = objective(student, teacher, labels)
        weighted = [loss.weight_at(epoch) * loss(student, teacher, labels) for loss in losses.values()]
        assert torch.equal(total, torch.stack(weighted).sum())
        for name, loss in losses.items():
            assert torch.equal(logged[name], loss(student, teacher, labels))


def test_double_precision_is_kept() -> None:
    student, teacher = outputs(dtype=torch.float64), outputs(dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, -1])
    objective = distillation(hard=HardTargetLoss(weight=0.1), soft=SoftTargetLoss(4.0, weight=0.9)).bfloat16()
    single, _ = objective(*(Outputs(o.logits.float()) for o in (student, teacher)), labels)
    total, logged = objective(student, teacher, labels)
    torch.testing.assert_close(total, 0.1 * logged["hard"] + 0.9 * logged["soft"], rtol=1e-15, atol=0)
    assert (single.dtype, total.dtype) == (torch.float32, torch.float64)


def test_changes_of_a_weight_take_effect() -> None:
    loss = Square(weight=1.0)
    objective, student = distillation(mine=loss), outputs()
    first, _ = objective(student, None, torch.zeros(4))
    loss.weight = 3.0
    objective.begin_step(progress=0.5, epoch=0, device=CPU)
    second, _ = objective(student, None, torch.zeros(4))
    torch.testing.assert_close(second, 3 * first)


def test_gradients_reach_the_terms() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    total, logged = distillation(mine=Square(weight=2.0))(Outputs(logits), None, torch.zeros(4))
    total.backward()
    torch.testing.assert_close(logits.grad, 2 * 2 * logits.detach() / 12)
    assert not logged["mine_root"].requires_grad


def test_the_sum_takes_three_operations_for_any_number_of_terms() -> None:
    """No weight is sent to the device in a step, and the sum is one stack, one product and one sum."""
    objective = distillation(a=Square(), b=Square(weight=0.5), c=Square(weight=2.0))
    student, labels = outputs(), torch.zeros(4)

    def step() -> list[str]:
        with RecordOperations() as count:
            objective.begin_step(progress=0.5, epoch=1, device=CPU)
            objective(student, None, labels)
        return count.names

    step()
    own = {"aten.promote_types", "aten.square", "aten.pow", "aten.mean", "aten.sqrt", "aten.clone", "aten.detach"}
    assert [name for name in step() if name not in own] == ["aten.fill_", "aten.stack", "aten.mul", "aten.sum"]


# --- progress and epoch


def test_terms_receive_progress_and_epoch() -> None:
    objective, student = distillation(mine=Square(), other=Square()), outputs()
    for progress, epoch in ((0.0, 0), (0.25, 0), (0.5, 1), (0.75, 1)):
        objective.begin_step(progress=progress, epoch=epoch, device=CPU)
        _, logged = objective(student, None, torch.zeros(4))
        for name in ("mine", "other"):
            assert logged[f"{name}_progress"] == progress
            assert logged[f"{name}_epoch"] == epoch


def test_progress_and_epoch_keep_their_memory_and_dtype_and_are_not_saved() -> None:
    objective = distillation(mine=Square())
    objective.begin_step(progress=0.1, epoch=1, device=CPU)
    place = objective.terms["mine"].progress.data_ptr()
    objective.bfloat16()
    objective.begin_step(progress=0.2, epoch=2, device=CPU)
    term = objective.terms["mine"]
    assert term.progress.data_ptr() == place
    assert (term.progress.dtype, term.epoch.dtype) == (torch.float32, torch.int64)
    assert objective.state_dict() == {}
    assert list(objective.buffers()) == []
    for copied in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        copied.begin_step(progress=0.9, epoch=3, device=CPU)
        assert copied.terms["mine"].progress == pytest.approx(0.9)
        assert term.progress == pytest.approx(0.2)


# --- requirements of the terms


def test_layers_teacher_and_views_are_collected_from_the_terms() -> None:
    hint = HintLoss(student_layers=["a", "b"], teacher_layers=["c", "d"])
    objective = distillation(hard=HardTargetLoss(), hint=hint, at=AttentionLoss(student_layers=["b", "c"]))
    assert objective.layers == ["a", "b", "c"]
    assert objective.teacher_layers == ["c", "d", "b"]
    assert objective.needs_teacher
    assert not objective.compares_logits
    assert objective.views == 1
    assert distillation(hard=HardTargetLoss(), soft=SoftTargetLoss()).compares_logits
    assert not distillation(hard=HardTargetLoss()).needs_teacher
    assert distillation(hard=HardTargetLoss(), mine=Square()).views == 2
    aligned = alignment(hard=HardTargetLoss(), mmd=MMDLoss(layers=["a"]), coral=CoralLoss(layers=["b", "a"]))
    assert (aligned.layers, aligned.teacher_layers, aligned.needs_teacher) == (["a", "b"], [], False)


# --- learned parts


def test_learned_parts_are_built_once_and_rebuilt_from_shapes() -> None:
    student, teacher = outputs(a=(4, 2, 2)), outputs(a=(6, 2, 2))
    objective = distillation(hard=HardTargetLoss(), hint=HintLoss(student_layers=["a"]))
    assert objective.shapes is None
    objective.build(student, teacher, network=nn.Identity())
    assert objective.shapes == [
        {"logits": [4, 3], "features": {"a": [4, 4, 2, 2]}},
        {"logits": [4, 3], "features": {"a": [4, 6, 2, 2]}},
    ]
    state = copy.deepcopy(objective.state_dict())
    assert state
    assert all(key.startswith("hint.") for key in state)
    objective.build(student, teacher, network=nn.Identity())
    for key, value in objective.state_dict().items():
        assert torch.equal(value, state[key])
    other = distillation(hard=HardTargetLoss(), hint=HintLoss(student_layers=["a"]))
    other.load_shapes(None, network=nn.Identity())
    assert other.state_dict() == {}
    other.load_shapes(objective.shapes, network=nn.Identity())
    other.load_state_dict(state)
    labels = torch.tensor([0, 1, 2, 0])
    assert torch.equal(other(student, teacher, labels)[0], objective(student, teacher, labels)[0])


def test_terms_receive_the_networks_in_build() -> None:
    given: dict[str, Any] = {}

    class Pair(Square):
        def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
            given["pair"] = networks

    class One(CoralLoss):
        def build(self, source: Outputs, target: Outputs, **networks: nn.Module | None) -> None:
            given["one"] = networks

    network, teacher = nn.Identity(), nn.Flatten()
    distillation(pair=Pair()).build(outputs(), outputs(), network=network, teacher=teacher)
    alignment(one=One(layers=["a"])).build(outputs(a=(2,)), outputs(a=(2,)), network=network)
    assert given == {"pair": {"student_network": network, "teacher_network": teacher}, "one": {"network": network}}


def test_terms_are_built_from_outputs_of_zeros() -> None:
    class Look(Square):
        def check(self, student: Outputs, teacher: Outputs) -> None:
            assert not student.logits.any()

        def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
            assert not student.logits.any()

    distillation(mine=Look()).build(outputs(), outputs(), network=nn.Identity())


def test_incompatible_layers_are_refused_before_anything_is_built() -> None:
    objective = distillation(hint=HintLoss(student_layers=["b"]), at=AttentionLoss(student_layers=["a"]))
    both = outputs(a=(4,), b=(4, 2, 2))
    with pytest.raises(ValueError, match="AttentionLoss compares maps"):
        objective.build(both, both, network=nn.Identity())
    assert objective.state_dict() == {}


def test_different_classes_are_refused_if_logits_are_compared() -> None:
    other = Outputs(torch.randn(4, 7))
    with pytest.raises(ValueError, match="teacher has 7 classes and the student 3, but the loss 'soft' compares"):
        distillation(hard=HardTargetLoss(), soft=SoftTargetLoss()).build(outputs(), other, network=nn.Identity())
    distillation(hard=HardTargetLoss()).build(outputs(), other, network=nn.Identity())


def test_a_hard_target_loss_needs_no_teacher() -> None:
    objective = distillation(hard=HardTargetLoss())
    objective.build(outputs(), None, network=nn.Identity())
    assert objective.shapes == [{"logits": [4, 3], "features": {}}, None]
    total, _ = objective(Outputs(torch.zeros(2, 4)), None, torch.tensor([3, -1]))
    assert total.item() == pytest.approx(1.3863, abs=1e-4)


# --- errors


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, r"^losses must name at least one term with a weight above 0\.$"),
        ({"hard": HardTargetLoss(weight=0.0)}, "at least one term with a weight above 0"),
        ({"accuracy": HardTargetLoss()}, r"^A loss cannot be called 'accuracy', which is logged already"),
        ({"type": HardTargetLoss()}, r"^A loss cannot be called 'type'; choose a plain word"),
        ({"terms": HardTargetLoss()}, "cannot be called 'terms'"),
        ({"a.b": HardTargetLoss()}, "cannot be called 'a.b'"),
        ({"": HardTargetLoss()}, "cannot be called ''"),
        (
            {"mmd": MMDLoss()},
            r"'mmd' \(MMDLoss\) compares two domains, not two networks; use it in AdaptationModule\.$",
        ),
    ],
)
def test_invalid_terms_are_refused(losses: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(losses, accepts=(DistillationLoss,))


def test_a_loss_between_networks_is_rejected_between_domains() -> None:
    with pytest.raises(
        ValueError, match=r"'soft' \(SoftTargetLoss\) compares two networks, not two domains; use it in"
    ):
        Objective({"soft": SoftTargetLoss()}, accepts=(AlignmentLoss, HardTargetLoss))


# --- images of one class and of several


def test_a_loss_for_one_class_an_image_is_refused_on_multi_label_data_and_the_reverse() -> None:
    softmax = distillation(hard=HardTargetLoss())
    softmax.check_labels(multi_label=False)
    with pytest.raises(
        ValueError,
        match=r"^The loss 'hard' \(HardTargetLoss\) is for images of one class, but the data have several classes an "
        r"image; use BinaryTargetLoss in its place \(--model\.losses\.hard=BinaryTargetLoss\)\.$",
    ):
        softmax.check_labels(multi_label=True)
    with pytest.raises(ValueError, match=r"'soft' \(SoftTargetLoss\).*use BinarySoftTargetLoss in its place \(--model"):
        distillation(soft=SoftTargetLoss()).check_labels(multi_label=True)
    with pytest.raises(
        ValueError,
        match=r"^The losses 'hard' \(HardTargetLoss\) and 'soft' \(SoftTargetLoss\) are for images of one class, but "
        r"the data have several classes an image; use BinaryTargetLoss and BinarySoftTargetLoss in their place "
        r"\(--model\.losses\.hard=BinaryTargetLoss --model\.losses\.soft=BinarySoftTargetLoss\)\.$",
    ):
        distillation(hard=HardTargetLoss(), soft=SoftTargetLoss()).check_labels(multi_label=True)
    distillation(hard=BinaryTargetLoss(), soft=BinarySoftTargetLoss()).check_labels(multi_label=True)
    with pytest.raises(
        ValueError,
        match=r"several classes, but the data have one class an image; use HardTargetLoss in its place "
        r"\(--model\.losses\.hard=HardTargetLoss\), or let the data declare multi_label if they have several\.$",
    ):
        distillation(hard=BinaryTargetLoss()).check_labels(multi_label=False)


def test_losses_on_features_are_for_both() -> None:
    objective = distillation(hint=HintLoss(student_layers=["a"]), at=AttentionLoss(student_layers=["a"]))
    for multi_label in (False, True):
        objective.check_labels(multi_label=multi_label)


def test_every_loss_that_compares_logits_says_which_data_it_is_for() -> None:
    kinds = [getattr(kd_losses, name) for name in kd_losses.__all__ if name.endswith("Loss")]
    comparing = {kind.__name__ for kind in kinds if kind.compares_logits and kind.multi_label is None}
    assert comparing == {"CATKDLoss"}  # which compares maps of classes
