"""Work of more than two seconds shows how far it is."""

import io
import re
import sys
import time

import pytest
from rich.console import Console
from rich.file_proxy import FileProxy

from kd_lightning.files import progress as module
from kd_lightning.files.progress import progress


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    return clock


def work(clock: Clock, seconds: float, total: int = 40, at_once: int = 1, *, visible: bool = True) -> None:
    with progress("Decoding images", total, visible=visible) as advance:
        for start in range(0, total, at_once):
            count = min(at_once, total - start)
            clock.seconds += seconds / total * count
            advance(count)


def test_a_line_every_ten_per_cent_says_how_much_time_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 400)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert lines[0] == "Decoding images: 10 % of 40 images, 6 min left"
    assert lines[-1] == "Decoding images: 90 % of 40 images, 40 s left"


def test_short_work_shows_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 1.9)
    work(clock, 900, visible=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("total", "at_once", "shown"), [(3, 1, [30, 60]), (1, 1, []), (0, 1, []), (100, 35, [30, 70])])
def test_few_or_large_steps(
    total: int, at_once: int, shown: list[int], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    work(clock, 30, total, at_once)
    assert [int(found) for found in re.findall(r"(\d+) %", capsys.readouterr().err)] == shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "DELAY", 1e-9)
    with progress("Decoding images", 4, unit="pictures") as advance:
        for _ in range(4):
            time.sleep(0.11)  # more often it is not drawn
            advance(1)
    shown = terminal.getvalue()
    assert "Decoding images: " in shown
    assert "/4 [" in shown
    assert "pictures/s" in shown
    assert "\n" not in shown


def test_above_another_bar_there_are_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=80)
    monkeypatch.setattr(sys, "stderr", FileProxy(console, terminal))
    work(clock, 400)
    shown = terminal.getvalue().splitlines()
    assert len(shown) == 9
    assert "90 % of 40 images" in re.sub(r"\x1b\[[0-9;]*m", "", shown[-1])


def test_on_a_terminal_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("Decoding images", 4) as advance:
        advance(4)
    assert terminal.getvalue().strip() == ""
