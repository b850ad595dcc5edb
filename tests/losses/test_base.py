"""The two interfaces of losses: what they share, and what each adds."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kd_lightning import losses
from kd_lightning.features import Outputs
from kd_lightning.losses import AlignmentLoss, DistillationLoss, HardTargetLoss, SoftTargetLoss, Term


class Difference(DistillationLoss):
    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        return (student.logits - teacher.logits).square().mean()


class Shift(AlignmentLoss):
    def forward(self, source: Outputs, target: Outputs, labels: Tensor) -> Tensor:
        return (source.logits.mean(0) - target.logits.mean(0)).square().mean()


@pytest.mark.parametrize("kind", [Term, DistillationLoss, AlignmentLoss])
def test_base_classes_are_abstract(kind: type[Term]) -> None:
    with pytest.raises(TypeError, match="abstract"):
        kind()


@pytest.mark.parametrize("name", [name for name in losses.__all__ if name.endswith("Loss") and name != "HeadLoss"])
def test_arguments_are_keyword_only_with_the_weight_first_and_the_warm_up_last(name: str) -> None:
    parameters = list(inspect.signature(getattr(losses, name)).parameters.values())
    main = "temperature" if name in ("SoftTargetLoss", "BinarySoftTargetLoss", "DistLoss") else None
    assert [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY] == ([main] if main else [])
    assert parameters[1 if main else 0].name == "weight"
    assert parameters[-1].name == "warmup_epochs"


@pytest.mark.parametrize("name", [name for name in losses.__all__ if name.endswith("_loss")])
def test_options_of_functions_are_keyword_only(name: str) -> None:
    parameters = inspect.signature(getattr(losses, name)).parameters.values()
    tensors = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert all(p.annotation in (Tensor, Tensor | None) for p in parameters if p.name in tensors)
    assert len(tensors) >= 2


def test_a_subclass_is_a_module_with_a_constant_weight() -> None:
    loss, shift = Difference(), Shift()
    assert loss.weight == shift.weight == 1.0
    assert loss.student_layers == loss.teacher_layers == shift.layers == ()
    assert loss.compares_logits is False
    assert (loss.views, loss.needs_teacher, shift.needs_teacher) == (1, True, False)
    assert [loss.weight_at(epoch) for epoch in (0, 1, 100)] == [1.0, 1.0, 1.0]
    ones, zeros = Outputs(torch.ones(2, 3)), Outputs(torch.zeros(2, 3))
    assert loss(ones, zeros, torch.tensor([0, 1])) == shift(ones, zeros, torch.tensor([0, 1])) == 1


@pytest.mark.parametrize("kind", [Difference, Shift])
@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_the_weight_rises_linearly_during_warmup(kind: type[Term], weight: float, epochs: int) -> None:
    loss = kind(weight=weight, warmup_epochs=epochs)
    rising = [weight * (epoch + 1) / epochs for epoch in range(epochs)]
    assert [loss.weight_at(epoch) for epoch in range(epochs)] == pytest.approx(rising)
    assert loss.weight_at(epochs - 1) == loss.weight_at(epochs) == loss.weight_at(1000) == weight


def test_teacher_layers_default_to_the_students() -> None:
    same = Difference(student_layers=["layer1", "layer2"])
    assert same.teacher_layers == same.student_layers == ("layer1", "layer2")
    pair = Difference(student_layers=["layer1"], teacher_layers=["stage1.0"])
    assert (pair.student_layers, pair.teacher_layers) == (("layer1",), ("stage1.0",))
    assert Shift(layers=["layer1", "layer2"]).layers == ("layer1", "layer2")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Difference, {"weight": -0.5}, r"^A loss's weight must be >= 0, got -0\.5\.$"),
        (Shift, {"weight": float("nan")}, r"must be >= 0, got nan"),
        (Shift, {"warmup_epochs": -1}, r"^warmup_epochs must be >= 0, got -1\.$"),
        (
            Difference,
            {"student_layers": ["a", "b"], "teacher_layers": ["c"]},
            "in pairs, got 2 of the student and 1 of the teacher",
        ),
        (Difference, {"student_layers": ["a"], "teacher_layers": []}, "got 1 of the student and 0 of the teacher"),
        (Difference, {"student_layers": "layer3"}, r"list of names and not one string, got 'layer3'; write \['layer3'"),
        (Difference, {"student_layers": ["a"], "teacher_layers": "b"}, "not one string, got 'b'"),
        (Shift, {"layers": "layer3"}, "not one string, got 'layer3'"),
    ],
)
def test_invalid_arguments_are_refused(kind: type[Term], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("loss", [Difference(), Shift()])
def test_nothing_is_checked_or_built_by_default(loss: Any) -> None:
    outputs = Outputs(torch.zeros(2, 3))
    loss.check(outputs, outputs)
    loss.build(outputs, outputs)
    assert loss.state_dict() == {}


def test_which_losses_compare_logits_and_need_a_teacher() -> None:
    assert SoftTargetLoss().compares_logits
    assert SoftTargetLoss().needs_teacher
    assert not HardTargetLoss().compares_logits
    assert not HardTargetLoss().needs_teacher


def test_losses_pass_on_weight_and_warmup() -> None:
    assert SoftTargetLoss(weight=0.8, warmup_epochs=4).weight_at(0) == pytest.approx(0.2)
    assert HardTargetLoss(weight=0.8, warmup_epochs=4).weight_at(1) == pytest.approx(0.4)


def test_progress_and_epoch_start_at_zero_and_are_not_saved() -> None:
    loss, other = Difference(), Difference()
    assert (loss.progress, loss.epoch) == (0, 0)
    loss.progress = torch.tensor(0.25)
    assert (loss.progress, other.progress) == (0.25, 0)
    assert loss.state_dict() == {}


def test_metrics_belong_to_one_loss_are_copied_and_not_saved() -> None:
    loss, other = Difference(), Difference()
    assert loss.metrics == {}
    loss.metrics["fraction"] = torch.tensor(0.5)
    assert other.metrics == {}
    assert loss.state_dict() == {}
    owner = nn.ModuleDict({"loss": loss})
    for copied in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner)), AveragedModel(owner).module):
        copied_loss = copied.get_submodule("loss")
        assert isinstance(copied_loss, Difference)
        assert copied_loss.metrics["fraction"] == 0.5
        assert copied_loss.metrics is not loss.metrics
