"""ViTKD: the formula written out token by token, its mask, and grids of other sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_inputs import random_outputs
from restated import assert_equal_with_gradients
from torch import Tensor, nn

from kd_lightning.losses import ViTKDLoss, vitkd_loss
from kd_lightning.losses.vitkd import masked_places

LABELS = torch.tensor([3, -1])


def linear(layer: nn.Linear | None, token: Tensor) -> Tensor:
    return token if layer is None else layer.weight @ token + layer.bias


def convolved(conv: nn.Conv2d, maps: Tensor) -> Tensor:
    """Convolve a map ``(C, H, W)`` with a 3x3 filter, pixel by pixel."""
    padded = F.pad(maps, (1, 1, 1, 1))
    height, width = maps.shape[1:]
    rows = [
        torch.stack(
            [torch.einsum("dchw,chw->d", conv.weight, padded[:, i : i + 3, j : j + 3]) for j in range(width)], dim=1
        )
        for i in range(height)
    ]
    assert conv.bias is not None
    return torch.stack(rows, dim=1) + conv.bias[:, None, None]


def restated(
    low_s: Tensor,
    high_s: Tensor,
    low_t: Tensor,
    high_t: Tensor,
    hidden: list[set[int]],
    aligns: list[nn.Linear | None],
    mask_token: Tensor,
    generation: nn.Sequential,
    alpha: float,
    beta: float,
    ratio: float,
) -> Tensor:
    batch, layers, count = low_s.shape[:3]
    mimicked = low_s.new_zeros(())
    for b in range(batch):
        for layer in range(layers):
            for n in range(count):
                difference = linear(aligns[layer], low_s[b, layer, n]) - low_t[b, layer, n]
                mimicked = mimicked + (difference**2).sum()
    side = int(count**0.5)
    generated = low_s.new_zeros(())
    for b in range(batch):
        tokens = [mask_token[0, 0] if n in hidden[b] else linear(aligns[-1], high_s[b, n]) for n in range(count)]
        maps = torch.stack(tokens, dim=1).unflatten(1, (side, side))
        maps = convolved(generation[2], convolved(generation[0], maps).clamp(min=0))  # type: ignore[arg-type]
        for n in hidden[b]:
            generated = generated + ((maps[:, n // side, n % side] - high_t[b, n]) ** 2).sum()
    return alpha / batch * mimicked + beta / (ratio * batch) * generated


@pytest.mark.parametrize(("width", "ratio", "layers"), [(3, 0.5, 2), (4, 0.5, 2), (3, 0.3, 1), (4, 0.75, 3)])
def test_equals_the_formula(width: int, ratio: float, layers: int) -> None:
    """Also without aligning layers, where both widths are 4."""
    tokens = [torch.randn(2, layers, 9, width), torch.randn(2, 9, width), torch.randn(2, layers, 9, 4)]
    inputs = [each.double() for each in (*tokens, torch.randn(2, 9, 4))]
    noise = torch.rand(2, 9)
    stay = int(9 * (1 - ratio))
    hidden = [set(row.argsort().tolist()[stay:]) for row in noise]
    aligned = width != 4
    aligns = [nn.Linear(width, 4).double() if aligned else None for _ in range(layers + 1)]
    mask_token = torch.randn(1, 1, 4, dtype=torch.float64, requires_grad=True)
    convs = [nn.Conv2d(4, 4, 3, padding=1).double() for _ in range(2)]
    generation = nn.Sequential(convs[0], nn.ReLU(), convs[1])
    options: dict[str, Any] = {"alpha": 0.02, "beta": 0.03, "mask_ratio": ratio}
    learned = [layer for layer in aligns if layer is not None]
    parts: dict[str, Any] = {"mask_token": mask_token, "generation": generation}
    if aligned:
        parts |= {"align2": nn.ModuleList(learned[:-1]), "align": learned[-1]}
    assert_equal_with_gradients(
        lambda a, b, c, d: vitkd_loss(a, b, c, d, noise, **parts, **options),
        lambda a, b, c, d: restated(a, b, c, d, hidden, aligns, mask_token, generation, 0.02, 0.03, ratio),
        inputs,
        [mask_token, *generation.parameters(), *(p for layer in learned for p in layer.parameters())],
    )


def test_a_given_mask_takes_the_place_of_the_noise() -> None:
    tokens, shallow = torch.randn(2, 4, 3), torch.randn(2, 2, 4, 3)
    parts: dict[str, Any] = {"mask_token": torch.zeros(1, 1, 3), "generation": nn.Conv2d(3, 3, 3, padding=1)}
    noise = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.9, 0.8, 0.7, 0.6]])
    mask = torch.tensor([[False, True, True, False], [True, True, False, False]])
    assert masked_places(noise, 0.5).equal(mask)
    by_noise = vitkd_loss(shallow, tokens, shallow, tokens, noise, **parts)
    assert vitkd_loss(shallow, tokens, shallow, tokens, noise.flip(1), mask, **parts) == by_noise
    assert vitkd_loss(shallow, tokens, shallow, tokens, noise.flip(1), **parts) != by_noise


def test_tokens_that_are_no_square_are_refused() -> None:
    tokens, shallow = torch.randn(2, 5, 3), torch.randn(2, 2, 5, 3)
    with pytest.raises(ValueError, match=r"^vitkd_loss lays tokens out on a square grid, got 5; leave out class"):
        vitkd_loss(
            shallow, tokens, shallow, tokens, torch.rand(2, 5), mask_token=torch.zeros(1, 1, 3), generation=nn.ReLU()
        )


LAYERS = ["low", "middle", "high"]


def built(student: Any, teacher: Any, **options: Any) -> ViTKDLoss:
    loss = ViTKDLoss(student_layers=LAYERS, **options)
    loss.build(student, teacher)
    return loss


@pytest.mark.parametrize("width", [6, 4])
def test_the_class_leaves_out_prefix_tokens_and_draws_a_mask_in_each_step(width: int) -> None:
    student = random_outputs(2, low=(17, width), middle=(17, width), high=(17, width))
    teacher = random_outputs(2, low=(18, 4), middle=(18, 4), high=(18, 4))
    loss = built(student, teacher, alpha=0.02, beta=0.03)
    assert loss(student, teacher, LABELS) != loss(student, teacher, LABELS)
    assert loss.mask_token is not None
    torch.manual_seed(5)
    found = loss(student, teacher, LABELS)
    torch.manual_seed(5)
    s = {name: tokens[:, 1:] for name, tokens in student.features.items()}
    t = {name: tokens[:, 2:] for name, tokens in teacher.features.items()}
    aligned: dict[str, Any] = {"align2": loss.aligns[:2], "align": loss.aligns[2]} if width != 4 else {}
    expected = vitkd_loss(
        torch.stack([s["low"], s["middle"]], dim=1),
        s["high"],
        torch.stack([t["low"], t["middle"]], dim=1),
        t["high"],
        torch.rand(2, 16),
        mask_token=loss.mask_token,
        generation=loss.generation,
        alpha=0.02,
        beta=0.03,
        **aligned,
    )
    torch.testing.assert_close(found, expected)


def test_other_grids_are_resized_and_maps_are_read_as_tokens() -> None:
    """Of a CNN, with maps that are smaller and larger than the teacher's 4 x 4 tokens."""
    student = random_outputs(2, low=(3, 8, 8), middle=(5, 4, 4), high=(7, 2, 2))
    teacher = random_outputs(2, low=(17, 4), middle=(17, 4), high=(17, 4))
    loss = built(student, teacher, alpha=1.0, beta=0.0)
    low, middle = F.avg_pool2d(student.features["low"], 2), student.features["middle"]
    terms = [
        (align(maps.flatten(2).transpose(1, 2)) - teacher.features[name][:, 1:]).square().sum() / 2
        for align, maps, name in zip(loss.aligns, (low, middle), LAYERS, strict=False)
    ]
    torch.testing.assert_close(loss(student, teacher, LABELS), torch.stack(terms).sum())
    both = built(student, teacher, alpha=0.0, beta=1.0)
    both(student, teacher, LABELS).backward()
    assert all(parameter.grad is not None for parameter in both.generation.parameters())
    assert both(student, teacher, LABELS).isfinite()


def test_it_is_saved_and_rebuilt() -> None:
    student = random_outputs(2, low=(3, 4, 4), middle=(4, 4, 4), high=(7, 4, 4))
    teacher = random_outputs(2, low=(17, 4), middle=(17, 4), high=(17, 4))
    first, second = built(student, teacher), built(student, teacher)
    second.load_state_dict(first.state_dict())
    values = []
    for loss in (first, second):
        torch.manual_seed(3)
        values.append(loss(student, teacher, LABELS))
    assert values[0] == values[1]
    with pytest.raises(RuntimeError, match=r"^The learned parts of ViTKDLoss are not built yet; call build before"):
        ViTKDLoss(student_layers=LAYERS)(student, teacher, LABELS)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^ViTKDLoss reads shallow layers and a last one, got \['a'\]\.$"):
        ViTKDLoss(student_layers=["a"])
    wrong: list[dict[str, Any]] = [{"alpha": -1.0}, {"beta": -1.0}, {"mask_ratio": 0.0}, {"mask_ratio": 1.0}]
    for options in wrong:
        with pytest.raises(ValueError, match=r"^alpha and beta must be >= 0 and mask_ratio in \(0, 1\), got "):
            ViTKDLoss(**options)


def test_defaults_are_the_published_ones() -> None:
    loss = ViTKDLoss()
    assert (loss.weight, loss.alpha, loss.beta, loss.mask_ratio) == (1.0, 3e-5, 3e-6, 0.5)
    assert loss.student_layers == ("blocks.0", "blocks.1", "norm")
