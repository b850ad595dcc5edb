"""Two machines: a run of `torchrun` on each, of which loopback sees no more than a network would."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kd_lightning

FIT = [
    "-m",
    "kd_lightning",
    "fit",
    "-c",
    "digits/student",
    "--trainer.accelerator=cpu",
    "--trainer.strategy=ddp",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=3",
    "--trainer.enable_progress_bar=false",
]
RUN = Path("lightning_logs/digits/student/version_0")


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(kd_lightning.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finished(*processes: subprocess.Popen[str]) -> list[str]:
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text
    return printed


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


def _curves(run: Path) -> dict[str, list[Any]]:
    events = EventAccumulator(str(run)).Reload()
    names = set(events.Tags()["scalars"]) - {"train/images_per_second", "train/waiting_for_data"}
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


@pytest.mark.slow
def test_two_nodes_are_one_run_and_equal_two_processes_of_one_node(tmp_path: Path) -> None:
    (nodes := tmp_path / "nodes").mkdir()
    (node := tmp_path / "node").mkdir()
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{_free_port()}", "--rdzv-id=test"]
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meeting, *FIT]
    two = ["--trainer.num_nodes=2", "--trainer.devices=1"]
    printed = _finished(*(_start(nodes, *torchrun, *two) for _ in range(2)))
    assert sum("The best checkpoint is" in text for text in printed) == 1
    assert "Starting with 2 processes" in "".join(printed)
    assert [run.name for run in (nodes / RUN.parent).iterdir()] == [RUN.name]
    assert sorted(file.name for file in (nodes / RUN / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert len(list((nodes / RUN).glob("events.*"))) == 1

    _finished(_start(node, *FIT, "--trainer.devices=2"))
    for name in ("best", "last"):
        found, expected = (
            torch.load(folder / RUN / "checkpoints" / f"{name}.ckpt", weights_only=True) for folder in (nodes, node)
        )
        for key, value in expected["state_dict"].items():
            assert torch.equal(found["state_dict"][key], value), key
    curves = _curves(node / RUN)
    assert {"train/loss", "train/loss_step", "val/accuracy", "learning_rate"} <= set(curves)
    assert _curves(nodes / RUN) == curves
