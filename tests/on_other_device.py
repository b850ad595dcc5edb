"""Runs a test in a process that has the device of ``other_device.py``; many tests share one process."""

import contextlib
import functools
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from faults import FORKS

OTHER_DEVICE = ["--trainer.strategy.class_path=other_device.OtherDevice"]
"""Flags by which a `kd-lightning` command runs on the device."""
_SECONDS = 240


def call(folder: Path, *arguments: str) -> str:
    """Run a `kd-lightning` command in this process and return what it printed."""
    from kd_lightning.__main__ import main

    printed = io.StringIO()
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("sys.argv", ["kd-lightning", *arguments])
        main()
    return printed.getvalue()


def on_other_device(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test where ``other:0`` exists.

    The test is a function of a module; its arguments (``tmp_path``, parameters) travel to the other process.
    """

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        failure = _worker().run(test.__module__, test.__name__, arguments)
        if failure is not None:
            pytest.fail(failure, pytrace=False)

    return run


class _Worker:
    def __init__(self) -> None:
        self.connection, there = FORKS.Pipe()
        self.process = FORKS.Process(target=_serve, args=(there, sys.path), daemon=True)
        self.process.start()
        there.close()

    def run(self, *work: Any) -> str | None:
        """What went wrong in a test, with what it printed; ``None`` if it passed."""
        self.connection.send(work)
        try:
            if not self.connection.poll(_SECONDS):
                raise EOFError
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.kill()
            _worker.cache_clear()
            return f"The process of the other device ended, or took more than {_SECONDS} seconds."


@functools.cache
def _worker() -> _Worker:
    return _Worker()


def _serve(connection: Connection, path: list[str]) -> None:
    sys.path[:] = path
    import other_device  # noqa: F401 - registers the device
    import torch

    torch.set_num_threads(1)
    while True:
        module, name, arguments = connection.recv()
        printed = io.StringIO()
        os.environ.pop("PL_GLOBAL_SEED", None)
        torch.manual_seed(0)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                getattr(importlib.import_module(module), name).__wrapped__(**arguments)
            connection.send(None)
        except BaseException:  # a command ends with SystemExit
            connection.send(f"{printed.getvalue()[-4000:]}\n{traceback.format_exc()}")
