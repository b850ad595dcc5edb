"""Losses launch nothing that waits for the device: no number is read from a tensor, no shape depends on values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_inputs import random_outputs
from refuse_waiting import RefuseWaiting
from torch import Tensor, nn

from kd_lightning.features import FeatureTap, Outputs
from kd_lightning.losses import (
    CATKDLoss,
    DistillationLoss,
    HardDistillationLoss,
    HeadLoss,
    OFALoss,
    RSDLoss,
    SRDLoss,
    ViTKDLoss,
    VkDLoss,
    WKDFeatureLoss,
)
from kd_lightning.networks import ResNet


@pytest.mark.parametrize("wait", [lambda x: x[x > 0], lambda x: x.sum().item(), lambda x: torch.matrix_exp(x)])
def test_waiting_is_noticed(wait: Callable[[Tensor], Any]) -> None:
    with RefuseWaiting(), pytest.raises(RuntimeError, match="waits for the device"):
        wait(torch.rand(3, 3))


LOSSES: dict[str, Callable[[], DistillationLoss]] = {
    "wkd_f": lambda: WKDFeatureLoss(student_layers=["a", "b"], grid=2),
    "rsd": lambda: RSDLoss(student_layers=["a", "b"]),
    "ofa": lambda: OFALoss(student_layers=["a", "b"], eps=1.5),
    "vkd": lambda: VkDLoss(student_layers=["a", "b"]),
    "vkd square": lambda: VkDLoss(student_layers=["square"]),
    "vitkd": lambda: ViTKDLoss(student_layers=["a", "b"]),
    "srd": lambda: SRDLoss(student_layers=["a", "b"]),
    "srd correlation": lambda: SRDLoss(student_layers=["a", "b"], correlation=True),
    "head": lambda: HeadLoss(HardDistillationLoss(), student_head="head"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_wait(name: str) -> None:
    student = random_outputs(4, a=(3, 4, 4), b=(17, 3), square=(5, 2, 2), head=(5,), requires_grad=True)
    teacher = random_outputs(4, a=(5, 8, 8), b=(5, 4, 4), square=(5, 4, 4))
    loss = LOSSES[name]()
    loss.check(student, teacher)
    loss.build(student, teacher)
    with RefuseWaiting():
        loss(student, teacher, torch.tensor([3, -1, 0, 2])).backward()


def test_class_activation_maps_do_not_wait() -> None:
    networks = [ResNet([1, 1], [width, 2 * width]) for width in (4, 8)]
    student, teacher = (FeatureTap(network, ["layer2"])(torch.rand(4, 3, 8, 8)) for network in networks)
    forms: list[dict[str, Any]] = [{}, {"normalize": True}, {"binarize": True}]
    for options in forms:
        loss = CATKDLoss(student_layers=["layer2"], **options)
        loss.build(student, teacher, student_network=networks[0], teacher_network=networks[1])
        with RefuseWaiting():
            loss(student, teacher, torch.tensor([3, -1, 0, 2])).backward(retain_graph=True)


class Tokens(nn.Module):
    """Returns logits of the mean of five tokens, of which one is a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.norm(torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1))
        return self.head(tokens.mean(1))


def test_reading_tokens_as_maps_does_not_wait() -> None:
    network = Tokens()
    tap, loss = FeatureTap(network, ["norm"]), WKDFeatureLoss(student_layers=["norm"])
    images = torch.rand(4, 3, 8, 8)
    teacher = Outputs(torch.rand(4, 10), {"norm": torch.rand(4, 6, 4, 4)})
    loss.build(tap(images), teacher)
    with RefuseWaiting():
        loss(tap(images), teacher, torch.tensor([3, -1, 0, 2])).backward()
