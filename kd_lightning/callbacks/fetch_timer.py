"""The time for which training waits for batches."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, NamedTuple, Protocol, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import PassThroughProfiler, Profiler

_FETCH = "[_TrainingEpochLoop].train_dataloader_next"
_TRANSFER = ".batch_to_device"
TEACHER, CACHING = "kd_lightning.teacher", "kd_lightning.teacher_cache"
"""Actions in which a module runs its teacher: for a step, and to cache its outputs."""
_UNMEASURED = nullcontext()


class Mark(Protocol):
    """A point in the queue of a device, as ``torch.cuda.Event`` is."""

    def record(self) -> object:
        """Enter the point into the queue."""

    def query(self) -> bool:
        """Return whether the device has reached it."""

    def synchronize(self) -> object:
        """Wait until it has."""

    def elapsed_time(self, end: Any) -> float:
        """Return the milliseconds between this point and a later one, both reached."""


class _Wait(NamedTuple):
    """A wait for a batch, or an action: the points in the queue before and after it, and its seconds on the host."""

    begin: Mark
    end: Mark
    seconds: float


class FetchTimer(Profiler):
    """Measures what Lightning reports to a trainer's profiler about training batches, and passes everything on.

    Only while the device has nothing to do does a wait cost time: with marks it is measured from the moment at which
    the device has finished what was queued before. Nothing waits for the device until the waits are summed.

    Args:
        profiler: The trainer's own profiler.
        new_mark: Creates a point in the device's queue; ``None`` for a device without one, the CPU.

    Attributes:
        preparing: Seconds in which batches were moved and augmented, as far as that takes place on the CPU.
        waiting_for_first: Seconds of waiting up to the first batch since :meth:`restart`.
    """

    def __init__(self, profiler: Profiler, new_mark: Callable[[], Mark] | None = None) -> None:
        super().__init__(profiler.dirpath, profiler.filename)
        self.profiler = profiler
        self.preparing = 0.0
        self.waiting_for_first = 0.0
        self._new_mark = new_mark
        self._waiting = 0.0
        self._is_first = True
        self._pending: deque[_Wait] = deque()
        self._started = 0.0
        self._begin: Mark | None = None
        self._is_fetched = False
        self._waited = 0.0
        self._actions = {TEACHER: 0.0, CACHING: 0.0}
        self._running: deque[tuple[str, _Wait]] = deque()

    def restart(self, waiting: float = 0.0) -> None:
        """Begin an epoch, or continue one in which there were so many seconds of waiting."""
        self._waited += self._waiting - waiting
        self._waiting = self.waiting_for_first = waiting
        self._is_first, self.preparing = True, 0.0
        self._pending.clear()

    def waiting(self, *, wait: bool = False) -> float:
        """Return the seconds of waiting since the epoch began.

        Args:
            wait: Wait for the device, to include the waits of steps that it has not finished.
        """
        if wait and self._pending:
            self._pending[-1].end.synchronize()
        while self._pending and self._pending[0].end.query():
            begin, end, seconds = self._pending.popleft()
            self._add(min(seconds, begin.elapsed_time(end) / 1000))
        return self._waiting

    def totals(self) -> tuple[float, float, float]:
        """Return the seconds of waiting, of the teacher in steps and of caching its outputs in all epochs so far.

        It waits for the device.
        """
        if self._running:
            self._running[-1][1].end.synchronize()
        self._add_finished()
        return self._waited + self.waiting(wait=True), self._actions[TEACHER], self._actions[CACHING]

    def profile(self, action_name: str) -> AbstractContextManager[str | None]:  # type: ignore[override]
        """Return the context in which an action runs, an empty one if nobody measures it, which costs nothing."""
        measured = action_name == _FETCH or action_name in self._actions or action_name.endswith(_TRANSFER)
        if measured or not isinstance(self.profiler, PassThroughProfiler):
            return super().profile(action_name)
        return _UNMEASURED

    def start(self, action_name: str) -> None:
        """Start an action."""
        self.profiler.start(action_name)
        if action_name == _FETCH or action_name in self._actions:
            self._begin = self._mark()
            self._started = perf_counter()
        elif self._is_fetched and action_name.endswith(_TRANSFER):
            self._started = perf_counter()

    def stop(self, action_name: str) -> None:
        """Stop it."""
        if action_name == _FETCH:
            self._stop_fetch(perf_counter() - self._started)
        elif action_name in self._actions:
            self._stop_action(action_name, perf_counter() - self._started)
        elif self._is_fetched and action_name.endswith(_TRANSFER):
            self.preparing += perf_counter() - self._started if self._new_mark is None else 0.0
            self._is_fetched = False  # further batches are those of a validation
        self.profiler.stop(action_name)

    def _stop_fetch(self, seconds: float) -> None:
        self._is_fetched = True
        begin, end = self._begin, self._mark()
        if begin is None or end is None:
            self._add(seconds)
        else:
            self._pending.append(_Wait(begin, end, seconds))
            self.waiting()

    def _stop_action(self, action: str, seconds: float) -> None:
        begin, end = self._begin, self._mark()
        if begin is None or end is None:
            self._actions[action] += seconds
            return
        self._running.append((action, _Wait(begin, end, seconds)))
        self._add_finished()

    def _add_finished(self) -> None:
        """Add the actions that the device has finished."""
        while self._running and self._running[0][1].end.query():
            action, (begin, end, _) = self._running.popleft()
            self._actions[action] += begin.elapsed_time(end) / 1000

    def _add(self, seconds: float) -> None:
        self._waiting += seconds
        if self._is_first:
            self.waiting_for_first, self._is_first = self._waiting, False

    def _mark(self) -> Mark | None:
        if self._new_mark is None:
            return None
        mark = self._new_mark()
        mark.record()
        return mark

    def summary(self) -> str:
        """Return the summary of the trainer's own profiler."""
        return self.profiler.summary()

    def describe(self) -> None:
        """Let the trainer's own profiler report."""
        self.profiler.describe()

    def setup(self, *args: Any, **options: Any) -> None:
        """Set the trainer's own profiler up."""
        self.profiler.setup(*args, **options)

    def teardown(self, *args: Any, **options: Any) -> None:
        """Tear the trainer's own profiler down."""
        self.profiler.teardown(*args, **options)


def attach_timer(trainer: pl.Trainer) -> None:
    """Put a new timer in front of a trainer's profiler."""
    detach_timer(trainer)
    cuda = trainer.strategy.root_device.type == "cuda"
    _profiled(trainer).profiler = FetchTimer(_profiled(trainer).profiler, _new_cuda_mark if cuda else None)


def detach_timer(trainer: pl.Trainer) -> None:
    """Give a trainer its own profiler back."""
    if (timer := timer_of(trainer)) is not None:
        _profiled(trainer).profiler = timer.profiler


def timer_of(trainer: pl.Trainer) -> FetchTimer | None:
    """Return the timer of a trainer, if there is one."""
    profiler = _profiled(trainer).profiler
    return profiler if isinstance(profiler, FetchTimer) else None


def measured(trainer: pl.Trainer, action: str) -> AbstractContextManager[object]:
    """Return the context in which an action runs that is reported to a trainer's profiler.

    In a step that is compiled as a whole (``torch.compile(module)``) nothing is: a compiler cannot hold a clock.
    """
    return _UNMEASURED if torch.compiler.is_compiling() else _profiled(trainer).profiler.profile(action)


class _Profiled(Protocol):
    profiler: Profiler


def _profiled(trainer: pl.Trainer) -> _Profiled:
    return cast("_Profiled", trainer)  # Lightning sets the attribute in a function, where no type checker finds it


def _new_cuda_mark() -> Mark:
    return torch.cuda.Event(enable_timing=True)
