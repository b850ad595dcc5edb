import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kd_lightning.features import Outputs
from kd_lightning.losses import DistillationLoss, HardTargetLoss, SoftTargetLoss


class Difference(DistillationLoss):
    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        return (student.logits - teacher.logits).square().mean()


def test_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        DistillationLoss()  # type: ignore[abstract]


def test_a_subclass_is_a_module_with_a_constant_weight() -> None:
    loss = Difference()
    assert loss.weight == 1.0
    assert loss.student_layers == loss.teacher_layers == ()
    assert loss.reads_teacher_logits is False
    assert [loss.weight_in(epoch) for epoch in (0, 1, 100)] == [1.0, 1.0, 1.0]
    assert loss(Outputs(torch.ones(2, 3)), Outputs(torch.zeros(2, 3)), torch.tensor([0, 1])) == 1


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_the_weight_rises_linearly_to_its_value(weight: float, epochs: int) -> None:
    loss = Difference(weight, warmup_epochs=epochs)
    rising = [weight * (epoch + 1) / epochs for epoch in range(epochs)]
    assert [loss.weight_in(epoch) for epoch in range(epochs)] == pytest.approx(rising)
    assert loss.weight_in(epochs - 1) == loss.weight_in(epochs) == loss.weight_in(1000) == weight


def test_layers_are_pairs_and_the_teachers_default_to_the_students() -> None:
    same = Difference(student_layers=["layer1", "layer2"])
    assert same.teacher_layers == same.student_layers == ("layer1", "layer2")
    pair = Difference(student_layers=["layer1"], teacher_layers=["stage1.0"])
    assert (pair.student_layers, pair.teacher_layers) == (("layer1",), ("stage1.0",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.5}, r"^A loss's weight must be >= 0, got -0\.5\.$"),
        ({"weight": float("nan")}, r"must be >= 0, got nan"),
        ({"warmup_epochs": -1}, r"^warmup_epochs must be >= 0, got -1\.$"),
        (
            {"student_layers": ["a", "b"], "teacher_layers": ["c"]},
            "in pairs, got 2 of the student and 1 of the teacher",
        ),
        ({"student_layers": ["a"], "teacher_layers": []}, "got 1 of the student and 0 of the teacher"),
        ({"student_layers": "layer3"}, r"list of names, for example \['layer3'\], and not as one string"),
        ({"student_layers": ["a"], "teacher_layers": "b"}, "not as one string"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Difference(**options)


def test_build_makes_nothing_by_default() -> None:
    loss = Difference()
    loss.build(Outputs(torch.zeros(2, 3)), Outputs(torch.zeros(2, 3)))
    assert loss.state_dict() == {}


def test_which_losses_compare_logits() -> None:
    assert SoftTargetLoss().reads_teacher_logits
    assert not HardTargetLoss().reads_teacher_logits


def test_a_warm_up_reaches_the_losses() -> None:
    assert SoftTargetLoss(weight=0.8, warmup_epochs=4).weight_in(0) == pytest.approx(0.2)
    assert HardTargetLoss(weight=0.8, warmup_epochs=4).weight_in(1) == pytest.approx(0.4)


def test_progress_is_told_and_begins_at_zero() -> None:
    loss, other = Difference(), Difference()
    assert loss.progress == 0
    loss.progress = 0.25
    assert (loss.progress, other.progress, Difference.progress) == (0.25, 0, 0)
    assert loss.state_dict() == {}


def test_figures_are_empty_each_losses_own_and_no_part_of_its_state() -> None:
    loss, other = Difference(), Difference()
    assert loss.figures == {}
    loss.figures["share"] = torch.tensor(0.5)
    assert other.figures == {}
    assert loss.state_dict() == {}
    owner = nn.ModuleDict({"loss": loss})
    for copied in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner)), AveragedModel(owner).module):
        assert copied["loss"].figures["share"] == 0.5
        assert copied["loss"].figures is not loss.figures
