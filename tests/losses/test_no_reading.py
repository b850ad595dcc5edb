"""No loss reads a value back from the device in a training step: on tensors without data each read is an error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kd_lightning import losses as kd_losses
from kd_lightning.features import Outputs
from kd_lightning.losses import DistillationLoss

KINDS: dict[str, Callable[[], DistillationLoss]] = {
    name: getattr(kd_losses, name)
    for name in kd_losses.__all__
    if isinstance(getattr(kd_losses, name), type)
    and issubclass(getattr(kd_losses, name), DistillationLoss)
    and name not in ("DistillationLoss", "HeadLoss", "ViTKDLoss")  # whose layers must be named: test_no_waiting.py
}
MORE: dict[str, Callable[[], DistillationLoss]] = {
    "SoftTargetLoss, standardized": lambda: kd_losses.SoftTargetLoss(standardize=True),
    "RLDLoss, standardized": lambda: kd_losses.RLDLoss(logit_stand=True),
    "MLLDLoss, two views": lambda: kd_losses.MLLDLoss(two_views=True, corrected=True),
    "SKDLoss, corrected": lambda: kd_losses.SKDLoss(corrected=True),
    "USKDLoss, corrected": lambda: kd_losses.USKDLoss(corrected=True),
    "QueueKLLoss, local": lambda: kd_losses.QueueKLLoss(student_layers=["avgpool", "layer3"]),
}


class Reading(DistillationLoss):
    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        return student.logits.sum() if student.logits.max() > 0 else student.logits.mean()


def _step(make: Callable[[], DistillationLoss], labels: Callable[[], Tensor]) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        widths = {"layer1": (4, 8, 8), "layer2": (8, 4, 4), "layer3": (16, 2, 2), "avgpool": (16,)}
        student, teacher = (
            Outputs(
                torch.randn(6, 10, requires_grad=student),
                {name: torch.randn(6, *shape, requires_grad=student) for name, shape in widths.items()},
            )
            for student in (True, False)
        )
        loss = make()
        networks = (nn.Sequential(nn.Linear(16, 10)) for _ in range(2))
        loss.build(student, teacher, student_network=next(networks), teacher_network=next(networks))
        for _ in range(2):
            value = loss(student, teacher, labels())
            value.backward()
        return value


@pytest.mark.parametrize("name", [*KINDS, *MORE])
@pytest.mark.parametrize("labels", ["indices", "probabilities"])
def test_a_step_reads_nothing(name: str, labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.init, "trunc_normal_", nn.init.normal_)  # which reads, but before training
    indices = labels == "indices" and not getattr(KINDS.get(name), "multi_label", False)
    value = _step({**KINDS, **MORE}[name], lambda: torch.randint(10, (6,)) if indices else torch.rand(6, 10))
    assert value.shape == ()


def test_a_loss_that_reads_a_value_is_found() -> None:
    with pytest.raises(DataDependentOutputException):
        _step(Reading, lambda: torch.randint(10, (6,)))
