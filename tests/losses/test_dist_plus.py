from typing import Any

import pytest
import torch
from random_inputs import random_logits
from scipy.special import softmax
from scipy.stats import pearsonr
from torch import Tensor, nn

from kd_lightning.features import Outputs
from kd_lightning.losses import DistPlusLoss, dist_plus_torchdistill_loss

OPTIONS: dict[str, Any] = {"beta": 0.5, "gamma": 3.0, "iota": 0.7, "kappa": 1.3, "tau": 2.0}


def random_pairs(rows: int, classes: int, *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    maps = torch.randn(2, rows, *shape, dtype=torch.float64)
    return *random_logits(rows, classes), maps[0], maps[1]


def mean_pearson(a: Any, b: Any) -> float:
    return sum(float(pearsonr(x, y).statistic) for x, y in zip(a, b, strict=True)) / len(a)


def plain_dist_plus(s: Tensor, t: Tensor, f: Tensor, g: Tensor, corrected: bool) -> float:
    p, q = (softmax(z.numpy() / 2.0, axis=1) for z in (s, t))
    logits = 4 * (0.5 * (1 - mean_pearson(p, q)) + 3 * (1 - mean_pearson(p.T, q.T)))
    of_pixels = [[m[b, :, i, j].numpy() for b in range(m.shape[0]) for i, j in pixels(m)] for m in (f, g)]
    of_samples = [[m[:, :, i, j].sum(1).numpy() for i, j in pixels(m)] for m in (f, g)]
    channels = mean_pearson(*of_pixels)
    return logits + 0.7 * (1 - channels if corrected else channels) + 1.3 * (1 - mean_pearson(*of_samples))


def pixels(maps: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(maps.shape[2]) for j in range(maps.shape[3])]


@pytest.mark.parametrize(("rows", "classes", "shape"), [(3, 4, (5, 2, 3)), (6, 12, (3, 1, 1)), (4, 3, (8, 4, 4))])
@pytest.mark.parametrize("corrected", [False, True])
def test_matches_scipys_correlations(rows: int, classes: int, shape: tuple[int, ...], corrected: bool) -> None:
    tensors = random_pairs(rows, classes, *shape)
    value = dist_plus_torchdistill_loss(*tensors, **OPTIONS, corrected=corrected)
    assert value.item() == pytest.approx(plain_dist_plus(*tensors, corrected), rel=1e-7)


def test_gradients_pass_gradcheck() -> None:
    student, teacher, own, taught = random_pairs(3, 4, 3, 2, 1)

    def of_student(student: Tensor, own: Tensor) -> Tensor:
        return dist_plus_torchdistill_loss(student, teacher, own, taught, **OPTIONS)

    assert torch.autograd.gradcheck(of_student, (student.requires_grad_(), own.requires_grad_()))


def test_as_released_equal_maps_are_the_worst_and_corrected_the_best() -> None:
    student, teacher, own, taught = random_pairs(4, 5, 6, 2, 2)
    released, corrected = (
        [dist_plus_torchdistill_loss(student, teacher, f, taught, corrected=c).item() for f in (taught, -taught, own)]
        for c in (False, True)
    )
    assert corrected[0] < corrected[2] < corrected[1]
    channels = [a - b for a, b in zip(released, corrected, strict=True)]  # twice the correlation, minus 1
    assert channels[:2] == pytest.approx([1, -3], rel=1e-6)


def test_invariant_to_a_shift_and_a_positive_factor_of_a_map() -> None:
    student, teacher, own, taught = random_pairs(4, 5, 6, 2, 2)
    value = dist_plus_torchdistill_loss(student, teacher, own, taught)
    torch.testing.assert_close(dist_plus_torchdistill_loss(student, teacher, 3 * own + 2, taught), value)


def test_maps_of_other_shapes_are_refused() -> None:
    student, teacher, own, taught = random_pairs(4, 5, 6, 2, 2)
    with pytest.raises(ValueError, match=r"maps of one shape, got \(4, 3, 2, 2\) of the student and \(4, 6, 2, 2\) of"):
        dist_plus_torchdistill_loss(student, teacher, own[:, :3], taught)


def _outputs(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> tuple[Outputs, Outputs]:
    logits = random_logits(4, 5)
    maps = (torch.randn(4, *shape, dtype=torch.float64) for shape in (student_shape, teacher_shape))
    student, teacher = (Outputs(z, {"last": m}) for z, m in zip(logits, maps, strict=True))
    return student, teacher


def test_the_module_passes_its_options_and_ignores_labels() -> None:
    student, teacher = _outputs((6, 2, 2), (6, 2, 2))
    loss = DistPlusLoss(student_layers=["last"], corrected=False, weight=0.7, warmup_epochs=2, **OPTIONS)
    loss.build(student, teacher)
    assert list(loss.parameters()) == []
    expected = dist_plus_torchdistill_loss(
        student.logits, teacher.logits, student.features["last"], teacher.features["last"], **OPTIONS
    )
    torch.testing.assert_close(loss(student, teacher, torch.full((4,), -1)), expected)
    assert (loss.weight, loss.weight_at(0)) == (0.7, 0.35)


def test_other_widths_are_mapped_by_a_learned_convolution_and_other_resolutions_pooled() -> None:
    student, teacher = _outputs((3, 2, 2), (6, 4, 4))
    loss = DistPlusLoss(student_layers=["last"])
    loss.build(student, teacher)
    assert {name: tuple(weight.shape) for name, weight in loss.state_dict().items()} == {
        "regressor.weight": (6, 3, 1, 1)
    }
    loss.double()
    regressor = loss.regressor
    assert isinstance(regressor, nn.Conv2d)
    pooled = nn.functional.adaptive_avg_pool2d(teacher.features["last"], 2)
    mapped = regressor(student.features["last"])
    expected = dist_plus_torchdistill_loss(student.logits, teacher.logits, mapped, pooled, corrected=True)
    torch.testing.assert_close(loss(student, teacher, torch.full((4,), -1)), expected)


def test_defaults_match_the_released_code_corrected() -> None:
    loss = DistPlusLoss()
    assert (loss.weight, loss.beta, loss.gamma, loss.iota, loss.kappa, loss.tau) == (2.0, 2.0, 2.0, 1.0, 1.0, 1.0)
    assert (loss.student_layers, loss.corrected, loss.gather, loss.warmup_epochs) == (("layer3",), True, True, 0)
    assert loss.compares_logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, r"^tau must be above 0, got 0\.0\.$"),
        ({"iota": -1.0}, r"^beta, gamma, iota and kappa must be >= 0, got 2\.0, 2\.0, -1\.0 and 1\.0\.$"),
        ({"student_layers": ["a", "b"]}, r"compares one pair of maps, got the layers \['a', 'b'\]; name one"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistPlusLoss(**options)
