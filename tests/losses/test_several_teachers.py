"""Every loss learns from several teachers as from one: their average, or the maps of one of them."""

import copy
from collections.abc import Callable
from inspect import isabstract
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, DistillationModule
from kd_lightning import losses as kd_losses
from kd_lightning.features import FeatureTap
from kd_lightning.losses import CATKDLoss, DistillationLoss, HardTargetLoss, SDDKDLoss
from kd_lightning.networks import EnsembleTeacher, ResNet

KINDS: dict[str, Any] = {
    name: kind
    for name, kind in vars(kd_losses).items()
    if isinstance(kind, type) and issubclass(kind, DistillationLoss) and not isabstract(kind)
}
VECTORS = ("RelationalLoss", "ProbabilisticLoss", "CorrelationLoss", "ContrastiveLoss", "RSDLoss", "QueueKLLoss")
LAST = ("CATKDLoss", "SDDKDLoss", "SDDDKDLoss", "DistPlusLoss")
READS = {name: ["avgpool"] for name in VECTORS} | {name: ["layer3"] for name in LAST} | {"USKDLoss": ["layer2"]}


def network(width: int = 4) -> ResNet:
    return ResNet([1, 1, 1], [width, 2 * width, 4 * width], 6, in_channels=1)


def taught(name: str, teacher: nn.Module, prefix: str, costs: Path) -> tuple[Tensor, Tensor]:
    """Return the value of a loss and the gradient of the student's first layer, all drawn alike."""
    torch.manual_seed(0)
    kind, student, options = KINDS[name], network(), dict[str, Any]()
    if "student_layers" in kind.__init__.__annotations__:
        layers = READS.get(name, ["layer1", "layer2"])
        options = {"student_layers": layers, "teacher_layers": [prefix + layer for layer in layers]}
    if "teacher_layers" not in kind.__init__.__annotations__:
        options.pop("teacher_layers", None)
    if name == "HeadLoss":
        options = {"loss": kd_losses.SoftTargetLoss(), "student_head": "fc"}
    if name == "WKDLogitLoss":
        options = {"cost_matrix": str(costs)}
    loss = kind(**options)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 6
    if kind.multi_label:
        labels = nn.functional.one_hot(labels, 6).float()
    with torch.no_grad():
        said = FeatureTap(teacher.eval(), loss.teacher_layers)(images)
    own = FeatureTap(student, loss.student_layers)(images)
    loss.build(own, said, student_network=student, teacher_network=teacher)
    loss.progress = torch.tensor(0.5)
    loss(own, said, labels)  # the second time with a full queue
    value = loss(own, said, labels)
    value.backward()
    return value.detach(), student.conv1.weight.grad  # type: ignore[return-value]


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    distances = torch.rand(6, 6)
    torch.save({"cost_matrix": distances + distances.T}, tmp_path / "costs.pt")
    return tmp_path / "costs.pt"


def assert_taught_alike(name: str, costs: Path, *teachers: tuple[nn.Module, str]) -> None:
    first, second = (taught(name, teacher, prefix, costs) for teacher, prefix in teachers)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-7)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("name", KINDS)
def test_equal_teachers_teach_as_one(name: str, average: Literal["logits", "probabilities"], costs: Path) -> None:
    """With averaged probabilities as one that says their logarithms: SKD compares cosines, to which a shift matters."""
    torch.manual_seed(1)
    one = network(8)
    several = EnsembleTeacher([one, copy.deepcopy(one), copy.deepcopy(one)], average, weights=[3.0, 1.0, 2.0])
    alone = (one, "") if average == "logits" else (EnsembleTeacher([one], average), "networks.0.")
    assert_taught_alike(name, costs, (several, "networks.1."), alone)


@pytest.mark.parametrize("name", KINDS)
def test_a_teacher_without_weight_says_nothing(name: str, costs: Path) -> None:
    torch.manual_seed(2)
    heard, silent = network(8), network(6)
    several = EnsembleTeacher([silent, heard], weights=[0.0, 1.0])
    assert_taught_alike(name, costs, (several, "networks.1."), (heard, ""))


@pytest.mark.parametrize("name", KINDS)
def test_only_the_shares_of_teachers_matter(name: str, costs: Path) -> None:
    torch.manual_seed(3)
    first, second = network(8), network(6)
    one = EnsembleTeacher([first, second], "probabilities", weights=[1.0, 3.0])
    other = EnsembleTeacher([second, first], "probabilities", weights=[6.0, 2.0])
    assert_taught_alike(name, costs, (one, "networks.0."), (other, "networks.1."))


def test_the_costs_of_several_classifiers_are_not_guessed() -> None:
    several = EnsembleTeacher([network(), network()])
    said = FeatureTap(several)(torch.rand(8, 1, 8, 8))
    message = r"EnsembleTeacher has 'networks\.0\.fc', 'networks\.1\.fc'; use another loss\.$"
    with pytest.raises(ValueError, match=message):
        kd_losses.WKDLogitLoss().build(said, said, student_network=network(), teacher_network=several)


@pytest.mark.parametrize("kind", [CATKDLoss, SDDKDLoss])
def test_a_term_for_each_teacher_reads_its_own_classifier(
    kind: Any, small: Callable[..., ResNet], make_trainer: Callable[..., pl.Trainer]
) -> None:
    teacher = EnsembleTeacher([small(8), small(6)])
    layers = [{"student_layers": ["layer2"], "teacher_layers": [f"networks.{i}.layer2"]} for i in range(2)]
    terms: dict[str, DistillationLoss] = {"first": kind(**layers[0]), "second": kind(**layers[1])}
    module = DistillationModule(small(), teacher, losses={"hard": HardTargetLoss(), **terms}, teacher_check="off")
    trainer = make_trainer(limit_train_batches=3)
    trainer.fit(module, DigitsDataModule(batch_size=32))
    assert {"train/first", "train/second"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["train/first"] != trainer.callback_metrics["train/second"]
    assert not [name for name in module.state_dict() if "networks." in name]
