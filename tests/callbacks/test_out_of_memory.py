from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks.out_of_memory import is_out_of_memory

ADVICE = r"The memory of cpu is full; lower batch_size \(32 now\) and raise accumulate_grad_batches to keep"


class OutOfMemoryInTraining(nn.Module):
    """A network that runs out of memory in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")
        return self.fc(images.flatten(1))


def test_the_error_has_a_note_with_advice(make_trainer: Callable[..., pl.Trainer]) -> None:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        make_trainer().fit(TeacherModule(OutOfMemoryInTraining()), DigitsDataModule(batch_size=32))
    (note,) = raised.value.__notes__
    assert note.startswith("The memory of cpu is full; lower batch_size (32 now)")


def test_a_command_reports_it_in_one_sentence(kd: Callable[..., str]) -> None:
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.batch_size=32"]
    with pytest.raises(SystemExit, match=ADVICE) as raised:
        kd("fit", "-c", "digits/teacher", f"--model.network={__name__}.OutOfMemoryInTraining", *quiet)
    assert len(str(raised.value.code).splitlines()) == 1


def allocate(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        (lambda: allocate(2**62), True),  # a real allocation that fails
        (lambda: allocate(-1), False),
        (lambda: nn.Linear(2, 3)(torch.rand(3)), False),
    ],
)
def test_is_out_of_memory(fail: Callable[[], Any], expected: bool) -> None:
    with pytest.raises(RuntimeError) as raised:
        fail()
    assert is_out_of_memory(raised.value) == expected
