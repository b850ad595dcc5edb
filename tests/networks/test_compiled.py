"""Networks, teachers and losses that are compiled, and kernels that are kept."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.errors import UserError
from kd_lightning.networks import ResNet
from kd_lightning.networks.compiled import keep_kernels, kernel_folder

Trainers = Callable[..., pl.Trainer]
pytestmark = pytest.mark.filterwarnings("ignore:.*(no `val_dataloader`|does not have many workers).*")


class RecordsCompilation:
    """Takes the place of ``nn.Module.compile``, which would take half a minute for each network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled: list[tuple[nn.Module, dict[str, Any]]] = []
        calls = self.compiled
        monkeypatch.setattr(nn.Module, "compile", lambda module, **options: calls.append((module, options)))


def small() -> ResNet:
    return ResNet([1, 1], [4, 8], in_channels=1)


def test_networks_and_losses_are_compiled_in_one_mode_for_fixed_shapes(
    make_trainer: Trainers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    record = RecordsCompilation(monkeypatch)
    module = DistillationModule(small(), small(), teacher_check="off", compile=True, compile_mode="max-autotune")
    with caplog.at_level("INFO"):
        make_trainer(limit_train_batches=2).fit(module, DigitsDataModule(batch_size=256))
    assert module.frozen_teacher is not None
    compiled = [part for part, _ in record.compiled]
    assert compiled == [module.network, module.losses, module.frozen_teacher.inference_network]
    assert [options for _, options in record.compiled] == [{"mode": "max-autotune", "dynamic": False}] * 3
    messages = " ".join(entry.message for entry in caplog.records)
    assert f"a later run finds the kernels in {tmp_path / 'kernels'}" in messages
    assert "the network is compiled, mode max-autotune" in messages
    assert "Compiled: the first training step took" in messages


def test_a_mode_without_compilation_is_refused() -> None:
    with pytest.raises(UserError, match="compile_mode='max-autotune' has no effect without compile"):
        TeacherModule(small(), compile_mode="max-autotune")


def test_shapes_of_a_loader_of_ones_own_are_left_to_torch(
    make_trainer: Trainers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    record = RecordsCompilation(monkeypatch)
    batches: DataLoader[Any] = DataLoader([(torch.randn(8, 1, 8, 8), torch.arange(8))], batch_size=None)  # type: ignore[arg-type]
    make_trainer(limit_val_batches=0).fit(TeacherModule(small(), compile=True), batches)
    ((_, options),) = record.compiled
    assert options == {"mode": None, "dynamic": None}


# --- kept kernels


def test_kernels_are_kept_in_the_folder_of_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_folder() == tmp_path / "kd_lightning" / "kernels"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    assert keep_kernels() == kernel_folder() == tmp_path / "own"


def test_a_folder_that_cannot_be_written_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_kernels() is None


@pytest.mark.slow
def test_a_second_process_reuses_the_kernels_of_the_first(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(
        "import logging, sys, warnings\nimport lightning.pytorch as pl, torch\n"
        "from torch._dynamo.utils import counters\n"
        "from kd_lightning import DigitsDataModule, DistillationModule\nfrom kd_lightning.networks import ResNet\n"
        "warnings.simplefilter('ignore')\n"
        "networks = [ResNet([1, 1], [4, 8], in_channels=1) for _ in range(2)]\n"
        "module = DistillationModule(*networks, teacher_check='off', compile=True)\n"
        "trainer = pl.Trainer(max_steps=2, limit_val_batches=0, logger=False, enable_checkpointing=False,\n"
        "                     enable_progress_bar=False, accelerator='cpu')\n"
        "trainer.fit(module, DigitsDataModule(batch_size=256))\n"
        "print('misses', counters['inductor']['fxgraph_cache_miss'])\n"
    )
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    misses = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, script], env={**os.environ, **environment}, capture_output=True, text=True, check=True
        )
        misses.append(int(run.stdout.split()[-1]))
    assert misses[0] > 0
    assert misses[1] == 0
