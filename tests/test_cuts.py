"""Interrupted runs: real processes of the command line, killed, stopped and starved, that resume to the same bits."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Command, environment, full_disk, kill_in_a_save, signal_in_a_cache
from torch import Tensor

from kd_lightning.networks import ResNet

Whole = Callable[[str], dict[str, Any]]

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
    "dropout": ["digits/teacher", "--model.network=unusual_networks.WithDropout"],
    "accumulation": [
        "digits/distill",
        *TAUGHT,
        "--trainer.accumulate_grad_batches=2",
        "--progress.every_n_train_steps=1",
    ],
    "workers": ["digits/distill", *TAUGHT, "--data.num_workers=2"],
    "two processes": ["digits/distill", *TAUGHT, *TWO],
    "two processes with a queue": ["digits/crd", *TAUGHT, *TWO],
}


def save_teacher(folder: Path) -> None:
    torch.manual_seed(5)
    torch.save(ResNet([2, 2, 2], [16, 32, 64], in_channels=1).state_dict(), folder / "teacher.pt")


def fit(folder: Path, configuration: list[str], *more: str, **options: Any) -> Command:
    save_teacher(folder)
    return Command(folder, "fit", "-c", configuration[0], *QUICK, *configuration[1:], *more, **options)


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    (path,) = folder.glob(f"lightning_logs/digits/*/version_0/checkpoints/{name}.ckpt")
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a teacher was trained."""
    folder = tmp_path_factory.mktemp("trained")
    assert fit(folder, CONFIGURATIONS["teacher"], "--trainer.max_epochs=1").wait() == 0
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The last checkpoint of a run that was not cut."""

    @cache
    def of(name: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("whole")
        run = fit(folder, CONFIGURATIONS[name])
        assert run.wait() == 0, run.output
        return checkpoint(folder)

    return of


def refuse_a_difference(found: Any, expected: Any, place: str = "") -> None:
    """All that two checkpoints hold is equal, but for what is no part of the result."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            if key not in ("seconds", "waiting", "current_score"):  # Lightning saves the last and does not load it
                refuse_a_difference(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for number, pair in enumerate(zip(found, expected, strict=True)):
            refuse_a_difference(*pair, f"{place}/{number}")
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected), f"{place}: {found} and {expected}"
    else:
        assert found == expected, f"{place}: {found} and {expected}"


CUTS = [("last", 8, 8), ("last-step", 12, 15), ("last", 16, 16), ("last-step", 19, 23)]
"""The checkpoint from which the run resumes, and between which batches it is killed."""
QUICKEST = ("queue",)


@pytest.mark.parametrize(
    "name", [n if n in QUICKEST else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGURATIONS]
)
def test_killed_again_and_again(name: str, tmp_path: Path, whole: Whole) -> None:
    draw = random.Random(name)
    more: list[str] = []
    reached, repeated = 0, []
    for number, (_, low, high) in enumerate([*CUTS, ("", 99, 99)]):
        fault = {"hook": draw.choice(HOOKS), "batch": draw.randint(low, high), "signal": signal.SIGKILL}
        run = fit(tmp_path, CONFIGURATIONS[name], *more, plan=[fault])
        assert run.wait() == (-signal.SIGKILL if number < len(CUTS) else 0), run.output
        if number > 0:
            assert f"The checkpoint is lightning_logs/{CONFIGURATIONS[name][0]}/version_0/checkpoints/" in run.output
            assert f"checkpoints/{CUTS[number - 1][0]}.ckpt." in run.output
            assert run.batches == sorted(set(run.batches))  # by one callback, though the command adds it again
            repeated.append(reached - run.batches[0] + 1)
        reached, more = run.batches[-1], ["--ckpt_path=last"]
    assert max(repeated) <= EVERY
    print("repeated", repeated)
    refuse_a_difference(checkpoint(tmp_path), whole(name))


def test_the_last_checkpoint_is_that_of_the_last_epoch(tmp_path: Path) -> None:
    run = fit(tmp_path, CONFIGURATIONS["teacher"], "--model.learning_rate=1e-9")  # nothing gets better
    assert run.wait() == 0, run.output
    assert checkpoint(tmp_path)["global_step"] == 3 * STEPS_OF_EPOCH
    assert checkpoint(tmp_path, "best")["global_step"] == STEPS_OF_EPOCH


# --- a save that is cut, and a full disk


@pytest.mark.parametrize(
    "place",
    [
        5000,
        "before replace",
        *(pytest.param(p, marks=pytest.mark.slow) for p in (0, 40_000, "before fsync", "after replace")),
    ],
)
def test_killed_in_a_save(place: int | str, tmp_path: Path, whole: Whole) -> None:
    name = CONFIGURATIONS["teacher"]
    before = partial(kill_in_a_save, "last-step.ckpt", 3, place)
    run = fit(tmp_path, name, before=before)
    assert run.wait() in (-signal.SIGKILL, -signal.SIGXFSZ), run.output
    folder = next(tmp_path.glob("lightning_logs/*/*/version_0/checkpoints"))
    assert len(list(folder.glob("*.tmp"))) == (place != "after replace")
    assert checkpoint(tmp_path, "last-step")["global_step"] == (9 if place == "after replace" else 6)
    run = fit(tmp_path, name, "--ckpt_path=last")
    assert run.wait() == 0, run.output
    assert not list(folder.glob("*.tmp"))
    refuse_a_difference(checkpoint(tmp_path), whole("teacher"))


def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(tmp_path: Path) -> None:
    assert fit(tmp_path, CONFIGURATIONS["teacher"], "--trainer.max_epochs=1").wait() == 0
    before = checkpoint(tmp_path)
    full = partial(full_disk, 20_000)
    run = fit(tmp_path, CONFIGURATIONS["teacher"], "--ckpt_path=last", "--trainer.max_epochs=3", before=full)
    assert run.wait() == 1
    last = run.output.strip().splitlines()[-1]
    assert last.startswith("kd-lightning fit: 'lightning_logs/")
    assert "cannot be written (File too large); what was there before is as it was; make room" in last
    assert "Traceback" not in run.output
    refuse_a_difference(checkpoint(tmp_path), before)
    assert not list(tmp_path.rglob("*.tmp"))


# --- signals


@pytest.mark.parametrize(
    ("number", "hook", "batch", "name"),
    [
        (signal.SIGTERM, "on_after_backward", 4, "accumulation"),
        pytest.param(signal.SIGINT, "on_train_batch_start", 5, "accumulation", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "on_validation_batch_start", 7, "teacher", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "sanity check", -1, "teacher", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_goes_on(
    number: int, hook: str, batch: int, name: str, tmp_path: Path, whole: Whole
) -> None:
    run = fit(tmp_path, CONFIGURATIONS[name], plan=[{"hook": hook, "batch": batch, "signal": number}])
    assert run.wait() == 128 + number, run.output
    assert f"Stopped by {signal.Signals(number).name} in epoch" in run.output
    (folder,) = (path.relative_to(tmp_path) for path in tmp_path.glob("lightning_logs/digits/*/version_0"))
    resume = f"resume it with `kd-lightning fit -c {folder} --ckpt_path last`."
    assert f"checkpoints/last-step.ckpt, {resume}" in run.output
    if number == signal.SIGINT:
        assert "Stopping after this step, with a checkpoint; Ctrl-C again stops at once." in run.output
    assert "Traceback" not in run.output
    reached = run.batches[-1]
    run = fit(tmp_path, CONFIGURATIONS[name], "--ckpt_path=last")
    assert run.wait() == 0, run.output
    assert run.batches[0] == reached + 1
    refuse_a_difference(checkpoint(tmp_path), whole(name))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(number: int, tmp_path: Path) -> None:
    fault = {"hook": "on_train_batch_start", "batch": 4}
    plan = [{**fault, "signal": number}, {**fault, "signal": number}, {**fault, "sleep": 60}]
    run = fit(tmp_path, CONFIGURATIONS["teacher"], plan=plan)
    assert run.wait(50) == 128 + number, run.output
    assert "Stopped by" not in run.output
    assert "Traceback" not in run.output
    assert checkpoint(tmp_path, "last-step")["global_step"] == 3


def test_a_signal_while_a_cache_is_filled(tmp_path: Path) -> None:
    before = partial(signal_in_a_cache, signal.SIGTERM)
    run = fit(tmp_path, CONFIGURATIONS["cache in memory"], before=before)
    assert run.wait() == 128 + signal.SIGTERM, run.output
    assert "Stopped by SIGTERM in epoch 0 after step 1;" in run.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_signal_ends_a_test(number: int, command: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    fault = {"hook": f"on_{command}_batch_start", "signal": number}
    run = Command(tmp_path, command, "-c", "digits/teacher", "--trainer.enable_progress_bar=false", plan=[fault])
    assert run.wait() == 128 + number, run.output
    assert "Traceback" not in run.output
    assert not list(tmp_path.rglob("test.json"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_anything_is_imported(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kd_lightning", "fit", "-c", "digits/teacher"]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, **environment([])}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        time.sleep(1.5)
        run.send_signal(number)
        _, errors = run.communicate(timeout=60)
    assert run.returncode in (128 + number, -number)  # the shell says 143 of both
    assert b"Traceback" not in errors


# --- several processes


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two(number: int, rank: int, tmp_path: Path, whole: Whole) -> None:
    name = CONFIGURATIONS["two processes"]
    fault = {"hook": "on_train_batch_start", "batch": 4, "rank": rank, "signal": number}
    run = fit(tmp_path, name, plan=[fault])
    assert run.wait() == 128 + number, run.output
    left = time.time()
    assert f"Stopped by {signal.Signals(number).name} in epoch 0 after step 5;" in run.output
    print("seconds to leave", left - run.inflicted[0])
    run.refuse_survivors(within=30)
    again = fit(tmp_path, name, "--ckpt_path=last")
    assert again.wait() == 0, again.output
    refuse_a_difference(checkpoint(tmp_path), whole("two processes"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", [{"signal": signal.SIGKILL}, {"error": "A loss of mine."}])
def test_one_of_two_dies(rank: int, what: dict[str, Any], tmp_path: Path) -> None:
    fault = {"hook": "on_train_batch_start", "batch": 4, "rank": rank, **what}
    run = fit(tmp_path, CONFIGURATIONS["two processes"], plan=[fault])
    code = run.wait()
    run.refuse_survivors(within=30 - (time.time() - run.inflicted[0]))
    print("code", code, "seconds", time.time() - run.inflicted[0], run.output[-3000:])
    assert code != 0
    if "signal" in what or rank == 1:
        assert f"The process of rank {rank} (PID " in run.output
        assert "so the run has ended; resume it with --ckpt_path last." in run.output
    if "error" in what:
        assert "A loss of mine." in run.output


@pytest.mark.slow
def test_torchrun_starts_a_run_again(tmp_path: Path, whole: Whole) -> None:
    name = CONFIGURATIONS["two processes"]
    save_teacher(tmp_path)
    fault = {"hook": "on_train_batch_start", "batch": 13, "rank": 1, "signal": signal.SIGKILL, "once": True}
    launch = ["torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--standalone"]
    command = [*launch, "-m", "kd_lightning", "fit", "-c", name[0], *QUICK, *name[1:], "--ckpt_path=auto"]
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else addresses of the processes before are in the store
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env={**os.environ, **environment([fault]), **fresh},
        timeout=200, capture_output=True, text=True,
    )  # fmt: skip
    print(result.stdout[-3000:], result.stderr[-3000:])
    assert result.returncode == 0
    assert "There is no checkpoint to resume from, so the run starts from the beginning." in result.stdout
    assert "checkpoints/last-step.ckpt." in result.stdout
    refuse_a_difference(checkpoint(tmp_path), whole("two processes"))


# --- the newest that can be read


def test_auto_begins_anew_goes_on_and_passes_over_what_is_damaged(tmp_path: Path) -> None:
    name = CONFIGURATIONS["teacher"]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0",
             "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}  # fmt: skip
    fault = {"hook": "on_train_batch_start", "batch": 14, "signal": signal.SIGKILL}
    run = fit(tmp_path, name, "--ckpt_path=auto", plan=[fault], variables=slurm)
    assert run.wait() == -signal.SIGKILL, run.output
    assert "There is no checkpoint to resume from, so the run starts from the beginning." in run.output
    damaged = next(tmp_path.rglob("last-step.ckpt"))
    damaged.write_bytes(damaged.read_bytes()[:3000])
    run = fit(tmp_path, name, "--ckpt_path=auto", variables=slurm)
    assert run.wait() == 0, run.output
    assert f"Skipped: '{damaged.relative_to(tmp_path)}' cannot be read as a checkpoint" in run.output
    assert "version_0/checkpoints/last.ckpt." in run.output
    assert run.batches == list(range(STEPS_OF_EPOCH, 3 * STEPS_OF_EPOCH))
    assert len(list(tmp_path.glob("lightning_logs/*/*/version_*"))) == 1
