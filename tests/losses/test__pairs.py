"""Properties of all losses on features, and the pairs that they read."""

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from random_inputs import random_outputs
from torch import Tensor, nn

from kd_lightning.features import Outputs
from kd_lightning.losses import (
    AttentionLoss,
    ContrastiveLoss,
    CorrelationLoss,
    DistillationLoss,
    DistLoss,
    HintLoss,
    NeuronSelectivityLoss,
    OFALoss,
    ProbabilisticLoss,
    RelationalLoss,
    ReviewLoss,
    RSDLoss,
    SimilarityLoss,
    SRDLoss,
    VariationalLoss,
    VkDLoss,
)
from kd_lightning.losses._pairs import (
    SafeBatchNorm1d,
    SafeBatchNorm2d,
    feature_pairs,
    map_pairs,
    match_dtype,
    require_built,
    resized,
    same_size,
    vector_pairs,
)

_LABELS = torch.tensor([3, -1])


def test_features_are_paired_and_teacher_features_detached() -> None:
    loss = SimilarityLoss(student_layers=["a", "b"], teacher_layers=["d", "c"])
    student, teacher = random_outputs(2, a=(3, 4, 4), b=(3,)), random_outputs(2, c=(5,), d=(6, 4, 4))
    for features in (*student.features.values(), *teacher.features.values()):
        features.requires_grad_()
    pairs = feature_pairs(loss, student, teacher)
    for (s, t), a, b in zip(pairs, ["a", "b"], ["d", "c"], strict=True):
        assert s is student.features[a]
        assert t.equal(teacher.features[b])
    for get in (feature_pairs, map_pairs, vector_pairs):
        assert [(s.requires_grad, t.requires_grad) for s, t in get(loss, student, teacher)] == [(True, False)] * 2


def test_vectors_are_means_over_pixels_or_tokens() -> None:
    loss = SimilarityLoss(student_layers=["a"])
    student, teacher = random_outputs(2, a=(3, 4, 5)), random_outputs(2, a=(7, 2))
    ((s, t),) = vector_pairs(loss, student, teacher)
    torch.testing.assert_close(s, student.features["a"].flatten(2).mean(2))
    torch.testing.assert_close(t, teacher.features["a"].mean(1))


def test_the_mean_over_pixels_is_computed_in_float32() -> None:
    large = torch.full((2, 1, 8, 8), 3e4, dtype=torch.float16)
    large[:, :, ::2] = 2e4
    ((s, _),) = vector_pairs(SimilarityLoss(student_layers=["a"]), *[Outputs(torch.randn(2, 5), {"a": large})] * 2)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s, large.float().mean((2, 3)))


def test_vectors_become_maps_of_one_pixel() -> None:
    loss = HintLoss(student_layers=["a"])
    student, teacher = random_outputs(2, a=(3,)), random_outputs(2, a=(7, 2, 2))
    ((s, t),) = map_pairs(loss, student, teacher)
    assert (s.shape, t.shape) == ((2, 3, 1, 1), (2, 7, 2, 2))
    torch.testing.assert_close(s.flatten(), student.features["a"].flatten())


@pytest.mark.parametrize("loss", [HintLoss, VariationalLoss, ReviewLoss])
def test_features_that_are_neither_maps_nor_vectors_are_refused(loss: Callable[..., DistillationLoss]) -> None:
    term = loss(student_layers=["a"], teacher_layers=["b"])
    with pytest.raises(
        ValueError,
        match=rf"^{type(term).__name__} compares maps \(B, C, H, W\) or \(B, H, W, C\), tokens \(B, N, C\) or vectors "
        r"\(B, C\), but the student's layer 'a' returns \(2, 2, 3, 4, 4\); name a layer that does\.$",
    ):
        term.build(random_outputs(2, a=(2, 3, 4, 4)), random_outputs(2, b=(7,)))


@pytest.mark.parametrize("loss", [AttentionLoss, NeuronSelectivityLoss])
def test_losses_on_maps_refuse_vectors(loss: Callable[..., DistillationLoss]) -> None:
    term = loss(student_layers=["a"], teacher_layers=["b"])
    student, teacher = random_outputs(2, a=(3, 4, 4)), random_outputs(2, b=(7,))
    for call in (lambda: term.check(student, teacher), lambda: term(student, teacher, _LABELS)):
        with pytest.raises(
            ValueError,
            match=rf"^{type(term).__name__} compares maps \(B, C, H, W\) or \(B, H, W, C\), or tokens \(B, N, C\), but "
            r"the teacher's layer 'b' returns \(2, 7\); name a layer that does\.$",
        ):
            call()


@pytest.mark.parametrize(
    ("student_size", "teacher_size", "size"),
    [((4, 4), (4, 4), (4, 4)), ((8, 8), (4, 4), (4, 4)), ((2, 3), (4, 9), (2, 3)), ((8, 2), (4, 4), (4, 2))],
)
def test_the_larger_map_is_average_pooled_to_the_smaller_size(
    student_size: tuple[int, int], teacher_size: tuple[int, int], size: tuple[int, int]
) -> None:
    student, teacher = torch.randn(2, 3, *student_size), torch.randn(2, 5, *teacher_size)
    s, t = same_size(student, teacher)
    for pooled, features in ((s, student), (t, teacher)):
        windows = features.unflatten(3, (size[1], -1)).unflatten(2, (size[0], -1))
        torch.testing.assert_close(pooled, windows.mean((3, 5)))
        assert (pooled is features) == (features.shape[2:] == size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pooling_is_computed_in_float32(dtype: torch.dtype) -> None:
    features = (1000 * torch.randn(2, 3, 8, 8)).to(dtype)
    pooled, _ = same_size(features, torch.randn(2, 3, 2, 2))
    torch.testing.assert_close(pooled, F.avg_pool2d(features.float(), 4))


def test_features_are_cast_to_the_dtype_of_the_weights() -> None:
    assert match_dtype(nn.Linear(2, 2), torch.randn(2, 2, dtype=torch.float64)).dtype == torch.float32
    assert match_dtype(nn.Linear(2, 2).bfloat16(), torch.randn(2, 2)).dtype == torch.bfloat16


BUILT = [HintLoss, VariationalLoss, ReviewLoss, CorrelationLoss, ContrastiveLoss]
BUILT += [RSDLoss, OFALoss, VkDLoss, SRDLoss]


@pytest.mark.parametrize("loss", BUILT)
def test_losses_with_learned_parts_must_be_built_before_the_first_step(loss: Callable[..., DistillationLoss]) -> None:
    term = loss(student_layers=["a", "b"])
    student = random_outputs(2, a=(3,), b=(4,))
    message = (
        rf"^The learned parts of {type(term).__name__} are not built yet; call build with the "
        r"outputs of a dry run before the first step\.$"
    )
    with pytest.raises(RuntimeError, match=message):
        term(student, student, _LABELS)
    term.build(student, student)
    assert term(student, student, _LABELS).isfinite()


def test_require_built_returns_built_parts() -> None:
    loss, parts = HintLoss(student_layers=["a"]), nn.ModuleList([nn.Linear(1, 1)])
    assert require_built(loss, parts) is parts
    with pytest.raises(RuntimeError, match=r"^The learned parts of HintLoss are not built yet"):
        require_built(loss, nn.ModuleList())


@pytest.mark.parametrize(
    "loss", [AttentionLoss, NeuronSelectivityLoss, SimilarityLoss, ProbabilisticLoss, RelationalLoss]
)
def test_terms_of_layers_are_summed(loss: Callable[..., DistillationLoss]) -> None:
    student, teacher = random_outputs(4, a=(3, 4, 4), b=(5, 2, 2)), random_outputs(4, c=(6, 8, 8), d=(4, 2, 2))
    layers = [(["a", "b"], ["c", "d"]), (["a"], ["c"]), (["b"], ["d"])]
    both, first, second = (loss(student_layers=s, teacher_layers=t)(student, teacher, _LABELS) for s, t in layers)
    assert min(first, second) > 0
    torch.testing.assert_close(both, first + second)


GATHERED = [DistLoss, SimilarityLoss, ProbabilisticLoss, RelationalLoss, CorrelationLoss, RSDLoss, SRDLoss]


@pytest.mark.parametrize("loss", GATHERED)
def test_batches_are_gathered_only_in_training_and_with_gather(
    loss: Callable[..., DistillationLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def doubled(*tensors: Tensor, active: bool) -> tuple[Tensor, ...]:
        calls.append(active)
        return tuple(torch.cat([x, x.flip(0) + 1]) for x in tensors) if active else tensors

    student, teacher = random_outputs(2, a=(3,)), random_outputs(2, a=(6,))
    layers = {} if loss is DistLoss else {"student_layers": ["a"]}
    monkeypatch.setattr(sys.modules[loss.__module__], "all_gather_grad", doubled)
    terms = []
    for gather, training in ((True, True), (True, False), (False, True)):
        term = loss(gather=gather, **layers).train(training)
        torch.manual_seed(1)
        term.build(student, teacher)
        terms.append(term(student, teacher, _LABELS))
    assert calls == [True, False, False]
    assert terms[0] != terms[1] == terms[2]


def test_safe_batch_norm_equals_batch_norm() -> None:
    norm, usual = SafeBatchNorm2d(3), nn.BatchNorm2d(3)
    for shape in ((2, 3, 1, 1), (1, 3, 2, 2), (4, 3, 5, 5)):
        features = torch.randn(shape)
        torch.testing.assert_close(norm(features), usual(features))
    torch.testing.assert_close(norm.norm.state_dict(), usual.state_dict())
    norm.eval()
    usual.eval()
    for shape in ((1, 3, 1, 1), (2, 3, 4, 4)):
        torch.testing.assert_close(norm(torch.ones(shape)), usual(torch.ones(shape)))


def test_safe_batch_norm_of_vectors() -> None:
    norm, usual = SafeBatchNorm1d(3), nn.BatchNorm1d(3)
    rows = torch.randn(4, 3)
    torch.testing.assert_close(norm(rows), usual(rows))
    single = norm(rows[:1])
    torch.testing.assert_close(single, usual.eval()(rows[:1]))


def test_maps_are_resized_by_pooling_or_interpolation() -> None:
    maps = torch.randn(2, 3, 8, 6)
    assert resized(maps, (8, 6)) is maps
    torch.testing.assert_close(resized(maps, (4, 3)), F.avg_pool2d(maps, 2))
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    torch.testing.assert_close(resized(ramp, (8, 8))[0, 0, 0, 1:-1], torch.arange(0.25, 3.0, 0.5))
    assert resized(maps.bfloat16(), (16, 3)).dtype == torch.float32


def test_safe_batch_norm_of_a_single_value_uses_and_keeps_the_running_statistics() -> None:
    norm = SafeBatchNorm2d(3)
    norm(2 + torch.randn(4, 3, 5, 5))
    nn.init.normal_(norm.norm.weight)
    nn.init.normal_(norm.norm.bias)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    features = torch.randn(1, 3, 1, 1, requires_grad=True)
    mean, variance = (before[f"norm.running_{name}"][None, :, None, None] for name in ("mean", "var"))
    weight, bias = (before[f"norm.{name}"][None, :, None, None] for name in ("weight", "bias"))
    torch.testing.assert_close(norm(features), (features - mean) / (variance + 1e-5).sqrt() * weight + bias)
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    norm(features).sum().backward()
    assert features.grad is not None
    assert norm.norm.weight.grad is not None


@pytest.mark.parametrize("loss", [HintLoss, ReviewLoss, VariationalLoss])
def test_a_batch_of_one_image_with_one_pixel_trains(loss: Callable[..., DistillationLoss]) -> None:
    term = loss(student_layers=["a"])
    student, teacher = random_outputs(2, a=(3, 1, 1)), random_outputs(2, a=(6, 1, 1))
    term.build(student, teacher)
    term(student, teacher, _LABELS).backward()
    last, other = random_outputs(1, a=(3, 1, 1)), random_outputs(1, a=(6, 1, 1))
    value = term(last, other, _LABELS[:1])
    value.backward()
    assert value.isfinite()


def test_missing_layers_and_scalar_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^SimilarityLoss compares features; name at least one layer"):
        feature_pairs(SimilarityLoss(student_layers=[]), random_outputs(2), random_outputs(2))
    one_number = Outputs(torch.randn(2, 5), {"a": torch.randn(2)})
    with pytest.raises(ValueError, match=r"needs more than one number \(B,\) of layer 'a'"):
        vector_pairs(SimilarityLoss(student_layers=["a"]), one_number, one_number)
