"""One process at a time holds a lock."""

import threading
import time
from pathlib import Path

import pytest

from kd_lightning.files import lock as module
from kd_lightning.files.lock import hold_lock

pytestmark = pytest.mark.skipif(module.fcntl is None, reason="there are no such locks on Windows")


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with hold_lock(tmp_path / "lock", on_wait=lambda: order.append("waits")) as held:
            assert held
            order.append("second")

    with hold_lock(tmp_path / "lock") as held:
        assert held
        thread = threading.Thread(target=second)
        thread.start()
        while not order:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["waits", "first", "second"]


def test_an_error_frees_it(tmp_path: Path) -> None:
    def fail() -> None:
        with hold_lock(tmp_path / "lock"):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    with hold_lock(tmp_path / "lock", on_wait=lambda: pytest.fail("it is held")) as held:
        assert held


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with hold_lock(tmp_path / "lock") as held:
        assert not held
