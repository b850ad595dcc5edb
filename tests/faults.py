"""Faults that tests inflict on runs of the command line: real processes, forked from one that has imported torch."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from torch import Tensor

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["kd_lightning.cli.lightning_cli", "torch.utils.tensorboard", "sklearn.datasets"])
_PLAN = "KD_LIGHTNING_FAULTS"


class Faults(pl.Callback):
    """Writes down the batches that are begun, and harms its own process where the environment says so.

    A plan is a list of ``{"hook", "batch", "rank", "signal" | "error" | "sleep"}``; without ``batch`` it is the first.
    """

    def __init__(self) -> None:
        self.plan: list[dict[str, Any]] = json.loads(os.environ.get(_PLAN, "[]"))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            with Path("batches.txt").open("a") as file:
                file.write(f"{trainer.fit_loop.total_batch_idx}\n")
        self._reach("on_train_batch_start", trainer)

    def on_after_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reach("on_after_backward", trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reach("on_train_batch_end", trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reach("sanity check" if trainer.sanity_checking else "on_validation_batch_start", trainer)

    def on_test_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reach("on_test_batch_start", trainer)

    def on_predict_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reach("on_predict_batch_start", trainer)

    def _reach(self, hook: str, trainer: pl.Trainer) -> None:
        for fault in list(self.plan):
            here = fault["hook"] == hook and fault.get("rank", 0) == trainer.global_rank
            if here and trainer.fit_loop.total_batch_idx >= fault.get("batch", -1):
                self.plan.remove(fault)
                _inflict(fault)


def _inflict(fault: dict[str, Any]) -> None:
    if fault.get("once") and Path("inflicted.txt").is_file():  # by the process that was here before
        return
    with Path("inflicted.txt").open("a") as file:
        file.write(f"{time.time()}\n")
    if "signal" in fault:
        os.kill(os.getpid(), fault["signal"])
    if "sleep" in fault:
        time.sleep(fault["sleep"])
    if "error" in fault:
        raise ValueError(fault["error"])


def kill_in_a_save(name: str, number: int, place: int | str) -> None:
    """Be killed while a file is written for the ``number``-th time: at a byte, or by ``"before fsync"`` and the like.

    At a byte it is the system that kills, with SIGXFSZ.
    """
    opened, replaced, synced = Path.open, Path.replace, os.fsync
    count = 0

    def opens(path: Path, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += path.name.startswith(f"{name}.")
        if count == number and isinstance(place, int):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (place, place))
        return opened(path, *arguments, **options)

    def die(when: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if count == number and place == f"before {when}":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments)
        if count == number and place == f"after {when}":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.open = opens  # type: ignore[method-assign, assignment]
    Path.replace = lambda path, target: die("replace", replaced, path, target)  # type: ignore[method-assign, assignment]
    os.fsync = lambda descriptor: die("fsync", synced, descriptor)  # type: ignore[assignment]


def signal_in_a_cache(number: int) -> None:
    """Be sent a signal while the teacher runs on all images."""
    from kd_lightning.teacher import view_cache

    compute = view_cache.compute_view

    def interrupted(*arguments: Any) -> Tensor:
        os.kill(os.getpid(), number)
        return compute(*arguments)

    view_cache.compute_view = interrupted  # type: ignore[assignment]


def full_disk(size: int) -> None:
    """No file becomes longer."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def environment(plan: list[dict[str, Any]]) -> dict[str, str]:
    """In which a command finds this file, the package, and what shall happen to it."""
    here = Path(__file__).parent
    paths = [str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", _PLAN: json.dumps(plan)}


def _command(folder: Path, arguments: list[str], variables: dict[str, str], before: Callable[[], None] | None) -> None:
    os.setsid()  # a group of its own, as a shell gives to a command
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.pop("PL_GLOBAL_SEED", None)
    os.environ.update(variables)
    multiprocessing.set_start_method("fork", force=True)  # of the workers that read images, as it is in a shell
    torch.set_num_threads(1)
    main = sys.modules["__main__"]
    main.__spec__ = find_spec("kd_lightning.__main__")  # by which Lightning starts the other ranks
    sys.argv = ["kd-lightning", *arguments]
    if before is not None:
        before()
    from kd_lightning.__main__ import main as call

    call()


class Command:
    """A `kd-lightning` command in a process of its own.

    Args:
        folder: In which it runs.
        arguments: Of the command.
        plan: See :class:`Faults`.
        variables: Of the environment, beside this one's.
        before: What it does first.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        plan: list[dict[str, Any]] | None = None,
        variables: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("output.txt", "batches.txt", "inflicted.txt"):
            (folder / name).unlink(missing_ok=True)
        full = {**environment(plan or []), **(variables or {})}
        self.process: ForkServerProcess = FORKS.Process(target=_command, args=(folder, [*arguments], full, before))
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """Its exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"It is still there:\n{self.output}"
        return self.process.exitcode

    def refuse_survivors(self, within: float = 5) -> None:
        """Fail if a process that it has started is still there."""
        deadline = time.time() + within
        while (alive := self._group()) and time.time() < deadline:
            time.sleep(0.1)
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        assert not alive, f"{len(alive)} processes outlived the command."

    def _group(self) -> list[int]:
        alive = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process.pid)
        return alive

    @property
    def output(self) -> str:
        """What it has printed."""
        return (self.folder / "output.txt").read_text()

    @property
    def batches(self) -> list[int]:
        """The numbers of the batches that it has begun."""
        file = self.folder / "batches.txt"
        return [int(line) for line in file.read_text().split()] if file.is_file() else []

    @property
    def inflicted(self) -> list[float]:
        """When faults were inflicted."""
        file = self.folder / "inflicted.txt"
        return [float(line) for line in file.read_text().split()] if file.is_file() else []

    def signal(self, number: int) -> None:
        """As `kill` does, to its first process alone."""
        os.kill(self.process.pid, number)  # type: ignore[arg-type]


def run_command(folder: Path, *arguments: str) -> str:
    """Run a `kd-lightning` command in a process of its own that must succeed, and return what it printed."""
    command = Command(folder, *arguments)
    code = command.wait()
    assert code == 0, command.output
    return command.output
