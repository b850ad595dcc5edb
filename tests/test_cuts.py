"""Runs that are cut: real processes of the command line, killed, stopped and starved, that go on to the same bits."""

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Command
from torch import Tensor

from kd_lightning.networks import ResNet

HOOKS = ["on_train_batch_start", "on_after_backward", "on_train_batch_end"]
STEPS_OF_EPOCH = 8
EVERY = 3
QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=3",
    "--trainer.log_every_n_steps=3",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks+=faults.Faults",
    f"--progress.every_n_train_steps={EVERY}",
    "--data.batch_size=128",
]
TAUGHT = ["--teacher=teacher.pt", "--model.teacher_check=off"]
TWO = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=64"]
CACHED = [*TAUGHT, "--data.views=2"]
CONFIGURATIONS = {
    "teacher": ["digits/teacher", "--model.network.widths=[4,8,16]"],
    "distillation": ["digits/distill", *TAUGHT],
    "queue": ["digits/crd", *TAUGHT],
    "cache in memory": ["digits/distill", *CACHED, "--model.teacher_cache=true"],
    "cache in a folder": ["digits/distill", *CACHED, "--model.teacher_cache=logits"],
    "dropout": ["digits/teacher", "--model.network=faults.Dropping"],
    "accumulation": ["digits/distill", *TAUGHT, "--trainer.accumulate_grad_batches=2", "--progress.every_n_train_steps=1"],
    "workers": ["digits/distill", *TAUGHT, "--data.num_workers=2"],
    "two processes": ["digits/distill", *TAUGHT, *TWO],
    "two processes with a queue": ["digits/crd", *TAUGHT, *TWO],
}


def fit(folder: Path, configuration: list[str], *more: str, **options: Any) -> Command:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    if not (folder / "teacher.pt").is_file():
        torch.save(ResNet([2, 2, 2], [16, 32, 64], in_channels=1).state_dict(), folder / "teacher.pt")
    return Command(folder, "fit", "-c", configuration[0], *QUICK, *configuration[1:], *more, **options)


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    (path,) = folder.glob(f"lightning_logs/digits/*/version_0/checkpoints/{name}.ckpt")
    return torch.load(path, weights_only=True)


def refuse_a_difference(found: Any, expected: Any, place: str = "") -> None:
    """All that two checkpoints hold is equal, but for what is no part of the result."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            if key not in ("seconds", "current_score"):  # Lightning saves the latter and does not load it
                refuse_a_difference(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for number, pair in enumerate(zip(found, expected, strict=True)):
            refuse_a_difference(*pair, f"{place}/{number}")
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected), f"{place}: {found} and {expected}"
    else:
        assert found == expected, f"{place}: {found} and {expected}"


CUTS = [("last-step", 3, 7), ("last", 8, 8), ("last-step", 13, 15), ("last", 16, 16)]
"""The checkpoint from which the run goes on, and between which batches it is killed."""
QUICKEST = ("queue", "accumulation")


@pytest.mark.parametrize("name", [n if n in QUICKEST else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGURATIONS])
def test_killed_again_and_again(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    draw = random.Random(name)
    whole = fit(tmp_path / "whole", CONFIGURATIONS[name])
    assert whole.wait() == 0, whole.output
    folder = tmp_path / "cut"
    more: list[str] = []
    repeated = []
    for number, (_, low, high) in enumerate([*CUTS, ("", 99, 99)]):
        fault = {"hook": draw.choice(HOOKS), "batch": draw.randint(low, high), "signal": signal.SIGKILL}
        run = fit(folder, CONFIGURATIONS[name], *more, plan=[fault])
        assert run.wait() == (-signal.SIGKILL if number < len(CUTS) else 0), run.output
        if number > 0:
            assert f"The checkpoint is lightning_logs/{CONFIGURATIONS[name][0]}/version_0/checkpoints/" in run.output
            assert f"checkpoints/{CUTS[number - 1][0]}.ckpt." in run.output
            repeated.append(reached - run.batches[0] + 1)
        reached, more = run.batches[-1], ["--ckpt_path=last"]
    assert max(repeated) <= EVERY
    record_property("repeated", repeated)
    refuse_a_difference(checkpoint(folder), checkpoint(tmp_path / "whole"))


def test_the_last_checkpoint_is_that_of_the_last_epoch(tmp_path: Path) -> None:
    run = fit(tmp_path, CONFIGURATIONS["teacher"], "--model.learning_rate=1e-9")  # nothing gets better
    assert run.wait() == 0, run.output
    assert checkpoint(tmp_path)["global_step"] == 3 * STEPS_OF_EPOCH
    assert checkpoint(tmp_path, "best")["global_step"] == STEPS_OF_EPOCH
