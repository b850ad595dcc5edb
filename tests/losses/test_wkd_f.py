"""WKD-F: the formula written out window by window, and its properties."""

from itertools import product
from math import ceil, floor
from typing import Any

import pytest
import torch
from random_inputs import random_outputs
from restated import assert_equal_with_gradients, random_norm
from torch import Tensor, nn

from kd_lightning.losses import WKDFeatureLoss, wkd_f_bottleneck_loss, wkd_f_conv1x1_loss, wkd_f_loss

LABELS = torch.tensor([3, -1])


def restated(student: Tensor, teacher: Tensor, ratio: float, eps: float, grid: int) -> Tensor:
    def gaussian(fmap: Tensor, row: int, column: int) -> tuple[Tensor, Tensor]:
        height, width = fmap.shape
        rows = slice(floor(row * height / grid), ceil((row + 1) * height / grid))
        columns = slice(floor(column * width / grid), ceil((column + 1) * width / grid))
        pixels = fmap[rows, columns].flatten()
        mean = pixels.sum() / len(pixels)
        return mean, (((pixels - mean) ** 2).sum() / (len(pixels) - 1) + eps) ** 0.5

    terms = []
    for sample, channel in product(range(len(student)), range(student.shape[1])):
        for row, column in product(range(grid), repeat=2):
            (m, sd), (n, se) = (gaussian(fmap[sample, channel], row, column) for fmap in (student, teacher))
            terms.append(ratio * (m - n) ** 2 + (sd - se) ** 2)
    return torch.stack(terms).sum() / (grid**2 * len(student))


@pytest.mark.parametrize(
    ("size", "teacher_size", "ratio", "eps", "grid"),
    [
        ((6, 4), (6, 4), 1.5, 1e-3, 1),
        ((6, 4), (6, 4), 4.0, 1e-5, 2),
        ((7, 5), (7, 5), 3.0, 1e-5, 3),  # overlapping windows
        ((8, 8), (5, 7), 0.5, 1e-5, 2),  # of maps of two sizes
        ((1, 4), (2, 3), 2.0, 1e-5, 1),
    ],
)
def test_equals_the_formula(
    size: tuple[int, int], teacher_size: tuple[int, int], ratio: float, eps: float, grid: int
) -> None:
    maps = torch.randn(3, 2, *size, dtype=torch.float64), torch.randn(3, 2, *teacher_size, dtype=torch.float64)
    assert_equal_with_gradients(
        lambda s, t: wkd_f_loss(s, t, mean_cov_ratio=ratio, eps=eps, grid=grid),
        lambda s, t: restated(s, t, ratio, eps, grid),
        maps,
    )


def batch_normalised(fmap: Tensor, norm: nn.Module) -> Tensor:
    mean = fmap.mean((0, 2, 3), keepdim=True)
    variance = ((fmap - mean) ** 2).mean((0, 2, 3), keepdim=True)
    scale, shift = (value[None, :, None, None] for value in norm.parameters())
    return ((fmap - mean) / (variance + 1e-5) ** 0.5 * scale + shift).relu()


def test_the_student_is_projected_by_a_convolution() -> None:
    conv, bn = nn.Conv2d(2, 4, 1).double(), random_norm(nn.BatchNorm2d(4))
    maps = torch.randn(3, 2, 5, 6, dtype=torch.float64), torch.randn(3, 4, 5, 6, dtype=torch.float64)

    def projected(s: Tensor, t: Tensor) -> Tensor:
        linear = torch.einsum("bchw,dc->bdhw", s, conv.weight[:, :, 0, 0])
        return restated(batch_normalised(linear, bn), t, 3.0, 1e-5, 2)

    options: dict[str, Any] = {"mean_cov_ratio": 3.0, "eps": 1e-5, "grid": 2}
    assert_equal_with_gradients(
        lambda s, t: wkd_f_conv1x1_loss(s, t, conv=conv, bn=bn, **options),
        projected,
        maps,
        [conv.weight, *bn.parameters()],
    )


def test_the_student_is_projected_by_a_bottleneck_without_activations() -> None:
    convs = [nn.Conv2d(2, 3, 1).double(), nn.Conv2d(3, 3, 3, padding=1).double(), nn.Conv2d(3, 4, 1).double()]
    bn = random_norm(nn.BatchNorm2d(4))
    maps = torch.randn(3, 2, 5, 6, dtype=torch.float64), torch.randn(3, 4, 5, 6, dtype=torch.float64)

    def projected(s: Tensor, t: Tensor) -> Tensor:
        assert convs[0].bias is not None
        first = torch.einsum("bchw,dc->bdhw", s, convs[0].weight[:, :, 0, 0]) + convs[0].bias[None, :, None, None]
        padded = nn.functional.pad(first, (1, 1, 1, 1))
        weight = convs[1].weight
        shifted = [
            torch.einsum("bchw,dc->bdhw", padded[:, :, i : i + 5, j : j + 6], weight[:, :, i, j])
            for i, j in product(range(3), repeat=2)
        ]
        last = torch.einsum("bchw,dc->bdhw", torch.stack(shifted).sum(0), convs[2].weight[:, :, 0, 0])
        return restated(batch_normalised(last, bn), t, 2.0, 1e-4, 1)

    parameters = [convs[0].weight, convs[0].bias, convs[1].weight, convs[2].weight, *bn.parameters()]
    names = dict(zip(["conv1", "conv2", "conv3"], convs, strict=True))
    assert_equal_with_gradients(
        lambda s, t: wkd_f_bottleneck_loss(s, t, bn=bn, mean_cov_ratio=2.0, eps=1e-4, grid=1, **names),
        projected,
        maps,
        [parameter for parameter in parameters if parameter is not None],
    )


def test_is_zero_at_equality_and_the_order_of_the_pixels_changes_nothing() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert wkd_f_loss(student, student.clone()) == 0
    shuffled = student.flatten(2)[:, :, torch.randperm(16)].unflatten(2, (4, 4))
    torch.testing.assert_close(wkd_f_loss(shuffled, teacher), wkd_f_loss(student, teacher))
    assert wkd_f_loss(shuffled, teacher, grid=2) != wkd_f_loss(student, teacher, grid=2)
    torch.testing.assert_close(wkd_f_loss(student + 3, student, mean_cov_ratio=2.0), torch.tensor(2.0 * 9 * 3))


def test_windows_of_one_pixel_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^wkd_f_loss needs windows of more than one pixel, since a pixel has no var"):
        wkd_f_loss(torch.randn(2, 3, 3, 3), torch.randn(2, 3, 8, 8), grid=3)
    loss = WKDFeatureLoss(student_layers=["a"], teacher_layers=["b"], grid=2)
    with pytest.raises(
        ValueError,
        match=r"^WKDFeatureLoss on layer 'a' needs windows of more than one pixel, since a pixel has no variance, got "
        r"maps \(2, 5, 2, 2\) and grid=2; choose a smaller grid, or a layer with larger maps\.$",
    ):
        loss.check(random_outputs(2, a=(3, 4, 4)), random_outputs(2, b=(5, 2, 2)))
    with pytest.raises(ValueError, match=r"^WKDFeatureLoss compares maps .* layer 'b' returns \(2, 5\); name"):
        loss.check(random_outputs(2, a=(3, 4, 4)), random_outputs(2, b=(5,)))


@pytest.mark.parametrize("projector", ["conv1x1", "bottleneck"])
def test_the_class_projects_each_layer_and_is_saved_and_rebuilt(projector: Any) -> None:
    def loss() -> WKDFeatureLoss:
        made = WKDFeatureLoss(student_layers=["a", "b"], projector=projector, width=4, grid=2)
        made.build(student, teacher)
        return made

    student, teacher = random_outputs(2, a=(3, 4, 4), b=(2, 8, 8)), random_outputs(2, a=(5, 6, 6), b=(3, 8, 8))
    first, second = loss(), loss()
    assert first(student, teacher, LABELS) != second(student, teacher, LABELS)
    second.load_state_dict(first.state_dict())
    assert first.eval()(student, teacher, LABELS) == second.eval()(student, teacher, LABELS)
    first.train()
    parts = zip(first.projectors, ("a", "b"), strict=True)
    terms = [
        wkd_f_loss(part(student.features[n]), teacher.features[n], mean_cov_ratio=4.0, grid=2) for part, n in parts
    ]
    torch.testing.assert_close(first(student, teacher, LABELS), torch.stack(terms).sum())
    widths = [len(part.state_dict()["0.weight"]) for part in first.projectors]
    assert widths == ([5, 3] if projector == "conv1x1" else [4, 4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean_cov_ratio": -1.0}, r"mean_cov_ratio must be >= 0 and eps above 0, got -1\.0 and 1e-05\."),
        ({"grid": 0}, r"grid and width must be >= 1, got 0 and 256\."),
        ({"projector": "linear"}, r"projector must be 'conv1x1' or 'bottleneck', got 'linear'\."),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        WKDFeatureLoss(**options)


def test_defaults_are_the_published_ones() -> None:
    loss = WKDFeatureLoss()
    assert (loss.weight, loss.mean_cov_ratio, loss.grid, loss.width, loss.warmup_epochs) == (0.08, 4.0, 1, 256, 0)
