import pytest
import torch
import torch.nn.functional as F
from random_inputs import random_outputs
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import HintLoss, hint_loss

_LABELS = torch.tensor([3, -1])


def build_loss(loss: HintLoss, student: Outputs, teacher: Outputs) -> HintLoss:
    loss.build(student, teacher)
    return loss


def test_is_zero_at_equality_and_scales_with_the_square() -> None:
    features, other = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert hint_loss(features, features.clone()) == 0
    torch.testing.assert_close(hint_loss(2 * features, 2 * other), 4 * hint_loss(features, other))
    torch.testing.assert_close(hint_loss(features + 3, other + 3), hint_loss(features, other))
    torch.testing.assert_close(hint_loss(other, features), hint_loss(features, other))


def test_a_value_by_hand() -> None:
    assert hint_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]])) == (9 + 16) / 2


def test_refuses_shapes_that_would_be_broadcast() -> None:
    with pytest.raises(
        ValueError,
        match=r"^hint_loss compares features of one shape, got \(2, 1, 4, 4\) of the student and \(2, 3, 4, 4\) of the "
        r"teacher; map one to the other's shape first\.$",
    ):
        hint_loss(torch.randn(2, 1, 4, 4), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(("student_size", "teacher_size"), [((4, 4), (4, 4)), ((8, 8), (4, 4)), ((3, 4), (6, 8))])
def test_the_regressor_maps_channels_and_pooling_equalizes_resolutions(
    student_size: tuple[int, int], teacher_size: tuple[int, int]
) -> None:
    student, teacher = random_outputs(2, layer2=(3, *student_size)), random_outputs(2, layer2=(7, *teacher_size))
    loss = build_loss(HintLoss(), student, teacher)
    s, t = student.features["layer2"], teacher.features["layer2"]
    size = (min(student_size[0], teacher_size[0]), min(student_size[1], teacher_size[1]))
    s, t = F.interpolate(s, size, mode="area"), F.interpolate(t, size, mode="area")
    (conv,) = (p for p in loss.parameters() if p.dim() == 4)
    assert conv.shape == (7, 3, 1, 1)
    mapped = torch.einsum("bchw,dc->bdhw", s, conv[:, :, 0, 0])
    mean, variance = mapped.mean((0, 2, 3), keepdim=True), mapped.var((0, 2, 3), correction=0, keepdim=True)
    expected = (((mapped - mean) / (variance + 1e-5).sqrt()).relu() - t).square().mean()
    torch.testing.assert_close(loss(student, teacher, _LABELS), expected)


def test_learned_parts_are_in_the_state_dict() -> None:
    student, teacher = random_outputs(2, a=(3, 4, 4), b=(6,)), random_outputs(2, c=(5, 4, 4), d=(4,))
    loss = build_loss(HintLoss(student_layers=["a", "b"], teacher_layers=["c", "d"]), student, teacher)
    shapes_learned = {name: tuple(value.shape) for name, value in loss.state_dict().items() if value.dim() == 4}
    assert shapes_learned == {"regressors.0.0.weight": (5, 3, 1, 1), "regressors.1.0.weight": (4, 6, 1, 1)}
    loss.eval()
    copy = build_loss(HintLoss(student_layers=["a", "b"], teacher_layers=["c", "d"]), student, teacher).eval()
    assert copy(student, teacher, _LABELS) != loss(student, teacher, _LABELS)
    copy.load_state_dict(loss.state_dict())
    assert copy(student, teacher, _LABELS) == loss(student, teacher, _LABELS)


def test_terms_of_layers_are_summed() -> None:
    student, teacher = random_outputs(2, a=(3, 8, 8), b=(6,)), random_outputs(2, a=(3, 4, 4), b=(6,))
    terms = [
        build_loss(HintLoss(student_layers=layers, regressor=False), student, teacher)(student, teacher, _LABELS)
        for layers in (["a", "b"], ["a"], ["b"])
    ]
    torch.testing.assert_close(terms[0], terms[1] + terms[2])


def test_without_a_regressor_maps_are_compared_directly() -> None:
    student, teacher = random_outputs(2, layer2=(3, 8, 8)), random_outputs(2, layer2=(3, 4, 4))
    loss = build_loss(HintLoss(regressor=False), student, teacher)
    assert loss.state_dict() == {}
    pooled: Tensor = F.avg_pool2d(student.features["layer2"], 2)
    torch.testing.assert_close(loss(student, teacher, _LABELS), hint_loss(pooled, teacher.features["layer2"]))


def test_without_a_regressor_channels_must_be_equal() -> None:
    with pytest.raises(
        ValueError,
        match=r"^HintLoss without a regressor compares maps of equal channels, but layer 'b' has 3 and the "
        r"teacher's 7; set regressor=True\.$",
    ):
        build_loss(
            HintLoss(student_layers=["a", "b"], regressor=False),
            random_outputs(2, a=(5,), b=(3, 4, 4)),
            random_outputs(2, a=(5,), b=(7, 4, 4)),
        )


def test_defaults_match_the_benchmark() -> None:
    loss = HintLoss()
    assert (loss.weight, loss.warmup_epochs, loss.student_layers) == (100.0, 0, ("layer2",))
    assert not loss.compares_logits
    assert HintLoss(weight=2.0, warmup_epochs=4).weight_at(0) == 0.5
