"""Waiting for batches is measured as the time in which the device has nothing to do, and nothing waits for it."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks import fetch_timer
from kd_lightning.callbacks.fetch_timer import FetchTimer, timer_of
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]

FETCH, TRANSFER = "[_TrainingEpochLoop].train_dataloader_next", "[Strategy]SingleDeviceStrategy.batch_to_device"


class Clock:
    """The time of the host, and until when the work in a device's queue takes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy_until = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, timer: FetchTimer, *, host: float, action: str = FETCH) -> None:
        timer.start(action)
        self.now += host
        timer.stop(action)

    def queue(self, seconds: float) -> None:
        self.busy_until = max(self.now, self.busy_until) + seconds


class Point:
    """A mark in the queue of that device."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def record(self) -> None:
        self.reached = max(self.clock.now, self.clock.busy_until)

    def query(self) -> bool:
        return self.reached <= self.clock.now

    def synchronize(self) -> None:
        self.clock.now = max(self.clock.now, self.reached)

    def elapsed_time(self, end: "Point") -> float:
        assert self.query()
        assert end.query()
        return 1000 * (end.reached - self.reached)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(fetch_timer, "perf_counter", clock)
    return clock


@pytest.mark.parametrize(("work", "wait", "expected"), [(10.0, 4.0, 0.0), (10.0, 15.0, 5.0), (0.0, 3.0, 3.0)])
def test_only_an_idle_device_waits(clock: Clock, work: float, wait: float, expected: float) -> None:
    timer = FetchTimer(PassThroughProfiler(), lambda: Point(clock))
    for _ in range(5):
        clock.queue(work)  # the host is not held up by the step
        clock.run(timer, host=wait)
    assert timer.waiting(wait=True) == pytest.approx(5 * expected)


def test_without_marks_all_time_of_the_host_counts(clock: Clock) -> None:
    timer = FetchTimer(PassThroughProfiler())
    clock.queue(100.0)
    clock.run(timer, host=2.0)
    clock.run(timer, host=3.0)
    assert timer.waiting() == 5.0
    assert timer.waiting_for_first == 2.0


def test_unfinished_steps_are_not_waited_for_unless_asked(clock: Clock) -> None:
    timer = FetchTimer(PassThroughProfiler(), lambda: Point(clock))
    clock.run(timer, host=3.0)
    clock.queue(10.0)
    clock.run(timer, host=11.0)
    clock.queue(10.0)
    clock.run(timer, host=1.0)
    assert clock.now == 15.0
    assert timer.waiting() == 4.0
    assert clock.now == 15.0
    assert timer.waiting(wait=True) == 4.0
    assert clock.now == 24.0
    assert timer.waiting_for_first == 3.0


def test_the_first_wait_is_known_though_the_device_reaches_it_late(clock: Clock) -> None:
    timer = FetchTimer(PassThroughProfiler(), lambda: Point(clock))
    clock.queue(1.0)
    timer.restart(7.0)
    clock.queue(4.0)
    clock.run(timer, host=3.0)
    clock.run(timer, host=10.0)
    assert timer.waiting(wait=True) == 7.0 + 0.0 + 8.0
    assert timer.waiting_for_first == 7.0


def test_augmenting_is_measured_on_the_cpu_and_for_training_batches_only(clock: Clock) -> None:
    for marks, expected in ((None, 2.0), (lambda: Point(clock), 0.0)):
        timer = FetchTimer(PassThroughProfiler(), marks)
        clock.run(timer, host=1.0)
        clock.run(timer, host=2.0, action=TRANSFER)
        clock.run(timer, host=40.0, action="[_EvaluationLoop].val_next")
        clock.run(timer, host=50.0, action=TRANSFER)
        assert timer.preparing == expected
        assert timer.waiting() == 1.0
        timer.restart()
        assert (timer.preparing, timer.waiting()) == (0.0, 0.0)


def test_the_trainers_own_profiler_sees_every_action(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    profiler = SimpleProfiler()
    trainer = make_trainer(profiler=profiler, limit_train_batches=3)
    trainer.fit(TeacherModule(small()), digits)
    assert trainer.profiler is profiler  # type: ignore[attr-defined]
    assert [len(profiler.recorded_durations[name]) for name in (FETCH, "run_training_batch")] == [3, 3]
    assert not profiler.current_actions
    assert "train_dataloader_next" in profiler.summary()


def test_a_trainer_has_one_timer_while_it_fits_and_none_afterwards(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            timer = timer_of(trainer)
            assert timer is not None
            profilers.append(timer.profiler)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if len(profilers) == 1:
                raise RuntimeError("interrupted")

    profilers: list[Any] = []
    trainer, module = make_trainer(callbacks=[Look()], limit_train_batches=1), TeacherModule(small())
    own = trainer.profiler  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.fit(module, digits)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, digits)
    assert profilers == [own, own]
    assert trainer.profiler is own  # type: ignore[attr-defined]


def test_a_barebones_trainer_is_not_measured(small: Networks, digits: DigitsDataModule) -> None:
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            timers.append(timer_of(trainer))

    timers: list[Any] = []
    trainer = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=1, limit_train_batches=2, callbacks=[Look()])
    trainer.fit(TeacherModule(small()), digits)
    assert timers == [None, None]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_a_gpu_that_is_busy_does_not_wait_and_is_not_waited_for() -> None:
    timer = FetchTimer(PassThroughProfiler(), fetch_timer._new_cuda_mark)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            torch.cuda._sleep(100_000_000)  # about 50 ms
            timer.start(FETCH)
            timer.stop(FETCH)
            timer.waiting()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert timer.waiting(wait=True) < 0.01
