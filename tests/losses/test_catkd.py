"""CAT-KD: the formula written out map by map, and the classifiers of both networks."""

import copy
from collections.abc import Callable
from itertools import product
from math import ceil, floor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from restated import assert_equal_with_gradients
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from unusual_networks import TwoHeads

from kd_lightning import DistillationModule
from kd_lightning.features import FeatureTap, Outputs
from kd_lightning.losses import (
    CATKDLoss,
    DistillationLoss,
    HardTargetLoss,
    catkd_binarized_loss,
    catkd_loss,
    catkd_normalized_loss,
)
from kd_lightning.networks import ResNet

LABELS = torch.tensor([3, -1])


def pooled(fmap: Tensor, resolution: int) -> Tensor:
    height, width = fmap.shape
    cells = []
    for row, column in product(range(resolution), repeat=2):
        rows = slice(floor(row * height / resolution), ceil((row + 1) * height / resolution))
        columns = slice(floor(column * width / resolution), ceil((column + 1) * width / resolution))
        cells.append(fmap[rows, columns].mean())
    return torch.stack(cells)


def restated(student: Tensor, teacher: Tensor, resolution: int, normalize: bool, binarize: bool) -> Tensor:
    total = student.new_zeros(())
    for sample, channel in product(range(len(student)), range(student.shape[1])):
        s, t = student[sample, channel], teacher[sample, channel]
        if binarize:
            t = torch.where(t > t.abs().mean(), 1.0, 0.0).double()
        s, t = pooled(s, resolution), pooled(t, resolution)
        if normalize:
            s, t = s / (s @ s) ** 0.5, t / (t @ t) ** 0.5
        total = total + ((s - t) ** 2).sum()
    return total / (student.shape[0] * student.shape[1] * resolution**2)


@pytest.mark.parametrize("resolution", [1, 2, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_formula(resolution: int, normalize: bool) -> None:
    maps = torch.randn(3, 4, 5, 7, dtype=torch.float64) + 1, torch.randn(3, 4, 6, 4, dtype=torch.float64) + 1
    if normalize and resolution == 1:  # a single number divided by its size has no gradient
        assert catkd_loss(*maps, resolution=1, normalize=True) == restated(*maps, 1, True, False)
        return
    loss = catkd_normalized_loss if normalize else catkd_loss
    assert_equal_with_gradients(
        lambda s, t: loss(s, t, resolution=resolution, normalize=normalize),
        lambda s, t: restated(s, t, resolution, normalize, False),
        maps,
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_the_binarized_form_equals_the_formula(normalize: bool) -> None:
    student, teacher = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert_equal_with_gradients(
        lambda s, t: catkd_binarized_loss(s, t, resolution=2, normalize=normalize, weight=70.0),
        lambda s, t: 70 * restated(s, t, 2, normalize, True),
        [student],
        constant=[teacher],
    )


def test_factors_change_nothing_in_normalized_maps() -> None:
    student, teacher = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    factors = 1 + torch.rand(2, 3, 1, 1)
    torch.testing.assert_close(
        catkd_normalized_loss(factors * student, teacher), catkd_normalized_loss(student, teacher)
    )
    assert catkd_loss(student, student.clone()) == 0
    assert catkd_loss(factors * student, teacher) != catkd_loss(student, teacher)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^catkd_loss compares one map for each class, got \(2, 3, 4, 4\) of the stu"):
        catkd_loss(torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4))


def built(student: nn.Module, teacher: nn.Module, **options: Any) -> tuple[CATKDLoss, Outputs, Outputs]:
    images = torch.rand(2, 1, 8, 8)
    taught, said = (FeatureTap(network, ["layer2"])(images) for network in (student, teacher))
    loss = CATKDLoss(student_layers=["layer2"], **options)
    loss.check(taught, said)
    loss.build(taught, said, student_network=student, teacher_network=teacher)
    return loss, taught, said


@pytest.mark.parametrize("binarize", [False, True])
def test_maps_are_weighted_by_the_networks_own_classifiers(small: Callable[..., ResNet], binarize: bool) -> None:
    student, teacher = small(), small(8)
    loss, taught, said = built(student, teacher, normalize=True, binarize=binarize)
    s, t = (
        torch.einsum("bchw,kc->bkhw", outputs.features["layer2"], network.fc.weight)
        for outputs, network in ((taught, student), (said, teacher))
    )
    compare = catkd_binarized_loss if binarize else catkd_loss
    torch.testing.assert_close(loss(taught, said, LABELS), compare(s, t, resolution=2, normalize=True))
    loss(taught, said, LABELS).backward()
    assert student.fc.weight.grad is not None
    assert student.fc.bias.grad is None
    assert teacher.fc.weight.grad is None
    student.fc = nn.Linear(8, 10)  # a head that was replaced later is the one that is read
    assert not torch.equal(loss(taught, said, LABELS), compare(s, t, resolution=2, normalize=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo reads .grad
def test_it_can_be_compiled(small: Callable[..., ResNet]) -> None:
    loss, taught, said = built(small(), small(8))
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(taught, said, LABELS), loss(taught, said, LABELS))


def test_no_weights_are_stored_twice(small: Callable[..., ResNet]) -> None:
    student, teacher = small(), small(8)
    loss, taught, said = built(student, teacher)
    assert not loss.state_dict()
    assert not list(loss.parameters())
    network, again = copy.deepcopy((student, loss))  # together, as in a module
    network.fc.weight.data.zero_()
    assert again(taught, said, LABELS) != loss(taught, said, LABELS)


def test_it_trains_from_a_checkpoint_too(
    small: Callable[..., ResNet], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    def module(teacher: nn.Module | None) -> DistillationModule:
        losses: dict[str, DistillationLoss] = {"hard": HardTargetLoss(), "cat": CATKDLoss(student_layers=["layer2"])}
        return DistillationModule(small(), teacher, losses=losses, teacher_check="off")

    loader = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8)), batch_size=4)
    teacher = small(8)
    first = make_trainer(max_epochs=1)
    first.fit(module(teacher), loader, loader)
    first.save_checkpoint(tmp_path / "a.ckpt")
    resumed = make_trainer(max_epochs=2)
    resumed.fit(module(teacher), loader, loader, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert resumed.callback_metrics["train/cat"].isfinite()
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("losses.") for name in saved)
    make_trainer().validate(module(None), loader, ckpt_path=tmp_path / "a.ckpt", weights_only=True)


class Wide(nn.Module):
    """Has a linear layer between the last map and the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layer2, self.between, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 7), nn.Linear(7, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.between(self.layer2(images).mean((2, 3))).relu())


def test_networks_without_such_a_classifier_are_refused(small: Callable[..., ResNet]) -> None:
    with pytest.raises(
        ValueError,
        match=r"^CATKDLoss reads the map that the classifier reads after pooling, but layer 'layer2' has 4 channels "
        r"and the classifier 'head' takes 7; name the last map\.$",
    ):
        built(small(), Wide())
    loss = CATKDLoss(student_layers=["second"])
    outputs = FeatureTap(TwoHeads(), ["second"])(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"^CATKDLoss reads the student's classifier, one .* TwoHeads has"):
        loss.build(outputs, outputs, student_network=TwoHeads(), teacher_network=TwoHeads())
    with pytest.raises(RuntimeError, match=r"^CATKDLoss reads both networks' classifiers; call build with"):
        loss(outputs, outputs, LABELS)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^CATKDLoss reads one layer, the last map, got \['a', 'b'\]; name one\.$"):
        CATKDLoss(student_layers=["a", "b"])
    with pytest.raises(ValueError, match=r"^resolution must be >= 1, got 0\.$"):
        CATKDLoss(resolution=0)


def test_defaults_are_the_published_ones() -> None:
    loss = CATKDLoss()
    assert (loss.weight, loss.resolution, loss.normalize, loss.binarize) == (15.0, 2, False, False)
