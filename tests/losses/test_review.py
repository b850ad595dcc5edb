import pytest
import torch
import torch.nn.functional as F
from random_inputs import random_outputs
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import ReviewLoss, hierarchical_context_loss

_LAYERS = ["a", "b", "c"]
_LABELS = torch.tensor([3, -1])


@pytest.fixture
def student() -> Outputs:
    return random_outputs(2, a=(3, 8, 8), b=(5, 4, 4), c=(6,))


@pytest.fixture
def teacher() -> Outputs:
    return random_outputs(2, a=(4, 16, 16), b=(7, 2, 2), c=(9,))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 16])
def test_a_constant_difference_gives_its_square(size: int) -> None:
    features = torch.randn(2, 3, size, size, dtype=torch.float64)
    assert hierarchical_context_loss(features + 3, features).item() == pytest.approx(9)
    assert hierarchical_context_loss(features, features.clone()) == 0


@pytest.mark.parametrize(("size", "weights"), [(2, 1 + 1 / 2), (4, 1 + 1 / 2 + 1 / 4), (8, 1 + 1 / 2 + 1 / 4 + 1 / 8)])
def test_a_checkerboard_difference_counts_only_at_full_size(size: int, weights: float) -> None:
    checkerboard = (torch.arange(size)[:, None] + torch.arange(size)) % 2 * 2.0 - 1
    loss = hierarchical_context_loss(checkerboard.expand(2, 3, size, size), torch.zeros(2, 3, size, size))
    assert loss.item() == pytest.approx(1 / weights)


def test_levels_match_a_value_by_hand() -> None:
    """Halves of 1 and -1: pooling to 2x2 keeps the difference, to 1x1 removes it."""
    halves = torch.ones(1, 1, 8, 8)
    halves[:, :, :4] = -1
    assert hierarchical_context_loss(halves, torch.zeros_like(halves)).item() == pytest.approx(1.75 / 1.875)


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape"), [((2, 1, 4, 4), (2, 3, 4, 4)), ((2, 3, 4, 4), (2, 3, 2, 2)), ((2, 3), (2, 3))]
)
def test_refuses_different_shapes(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^hierarchical_context_loss compares maps \(B, C, H, W\) of one shape, got"):
        hierarchical_context_loss(torch.randn(student_shape), torch.randn(teacher_shape))


def test_layers_are_fused_from_the_deepest_to_the_shallowest(student: Outputs, teacher: Outputs) -> None:
    loss = ReviewLoss(student_layers=_LAYERS)
    loss.build(student, teacher)
    loss.eval()  # where batch norm with its initial statistics divides by sqrt(1 + 1e-5)
    weights = loss.state_dict()
    scale = (1 + 1e-5) ** -0.5

    def conv(name: str, x: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(x, weights[f"fusions.{name}.weight"], weights.get(f"fusions.{name}.bias"), padding=padding)

    def upscale(x: Tensor, size: int) -> Tensor:
        rows = torch.arange(size) * x.shape[2] // size
        return x[:, :, rows][:, :, :, rows]

    expected = torch.zeros(())
    deeper = None
    for i, size in ((2, 1), (1, 4), (0, 8)):
        s, t = (o.features[_LAYERS[i]] for o in (student, teacher))
        s, t = (x[:, :, None, None] if x.dim() == 2 else x for x in (s, t))
        fused = conv(f"{i}.reduce.0", s) * scale
        if deeper is not None:
            deeper = upscale(deeper, size)
            gates = torch.sigmoid(conv(f"{i}.attend", torch.cat([fused, deeper], 1)))
            fused = fused * gates[:, :1] + deeper * gates[:, 1:]
        deeper = upscale(fused, t.shape[2])
        expected += hierarchical_context_loss(conv(f"{i}.expand.0", deeper, padding=1) * scale, t)
    torch.testing.assert_close(loss(student, teacher, _LABELS), expected)


def test_gradients_of_shallow_terms_reach_deeper_layers(student: Outputs, teacher: Outputs) -> None:
    loss = ReviewLoss(student_layers=_LAYERS)
    loss.build(student, teacher)
    for value in student.features.values():
        value.requires_grad_()
    (deepest,) = torch.autograd.grad(loss(student, teacher, _LABELS), student.features["c"], retain_graph=True)
    single = ReviewLoss(student_layers=["c"])
    single.build(student, teacher)
    single.fusions[0].load_state_dict(loss.fusions[2].state_dict())
    (without,) = torch.autograd.grad(single(student, teacher, _LABELS), student.features["c"])
    assert not torch.allclose(deepest, without)


@pytest.mark.parametrize(("channels", "width"), [(6, 6), (700, 512)])
def test_learned_parts_are_in_the_state_dict(channels: int, width: int) -> None:
    student, teacher = random_outputs(2, a=(3, 4, 4), b=(channels,)), random_outputs(2, a=(4, 4, 4), b=(9,))
    loss, copy = (ReviewLoss(student_layers=["a", "b"]) for _ in range(2))
    loss.build(student, teacher)
    copy.build(student, teacher)
    assert {name: tuple(value.shape) for name, value in loss.state_dict().items() if value.dim() == 4} == {
        "fusions.0.reduce.0.weight": (width, 3, 1, 1),
        "fusions.0.attend.weight": (2, 2 * width, 1, 1),
        "fusions.0.expand.0.weight": (4, width, 3, 3),
        "fusions.1.reduce.0.weight": (width, channels, 1, 1),
        "fusions.1.expand.0.weight": (9, width, 3, 3),
    }
    assert loss(student, teacher, _LABELS) != copy(student, teacher, _LABELS)
    copy.load_state_dict(loss.state_dict())
    assert loss(student, teacher, _LABELS) == copy(student, teacher, _LABELS)


def test_defaults_match_the_released_code() -> None:
    loss = ReviewLoss()
    assert (loss.weight, loss.warmup_epochs) == (5.0, 20)
    assert loss.student_layers == loss.teacher_layers == ("layer1", "layer2", "layer3", "avgpool")
    assert ReviewLoss(weight=2.0, warmup_epochs=4).weight_at(0) == 0.5
