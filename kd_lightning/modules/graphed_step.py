"""A whole training step as one CUDA graph, which is replayed inside Lightning's automatic optimization."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from kd_lightning.callbacks.epoch_metrics import EpochMetrics
from kd_lightning.callbacks.finite_guard import FiniteGuard, StepRecord
from kd_lightning.data.batch import finished
from kd_lightning.errors import UserError, first_line
from kd_lightning.modules.optim import init_momentum_buffers

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Captures a function, after it has run a few times, and returns what replays it."""

_WARM_UP = 11
"""Runs before a capture, the number that torch's notes on CUDA graphs give for DDP and that serves others too."""


def capture_cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Run a function a few times on a stream of its own, capture it as a CUDA graph, and return what replays it.

    Capturing runs nothing on the device. Other threads, such as those that pin memory, may use it meanwhile.

    Args:
        step: Reads and writes tensors that stay where they are, and never waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class _Module(Protocol):
    """The parts of a :class:`ClassificationModule` that are used."""

    trainer: pl.Trainer
    finite_guard: FiniteGuard
    epoch_metrics: EpochMetrics

    def training_step(self, batch: Any, batch_idx: int) -> Tensor: ...

    def log_progress(self, loss: Tensor) -> None: ...

    def configure_gradient_clipping(self, *arguments: Any) -> None: ...

    def parameters(self) -> Iterator[Tensor]: ...

    def buffers(self) -> Iterator[Tensor]: ...


class GraphedStep:
    """Takes the training steps of a module by replaying one that was captured.

    A captured step is everything that happens on the device: the batch is gathered and augmented, the networks and the
    losses run, the gradients are computed, checked and clipped, the optimizer updates the weights, and the epoch's
    means grow. It reads the batch and the learning rates from tensors that are filled before each replay, and leaves
    the loss in a tensor. All of it happens in Lightning's call of ``training_step``; the hooks that follow, for the
    backward pass, the clipping and the update, find nothing left to do, while Lightning counts, logs, schedules and
    saves as always. A batch of another form, such as a shorter last one, takes an ordinary step.

    On a GPU the verdict on a step is read after the next replay: an error names the right step, but the ranges that it
    shows are then those of the step after it.

    Before a capture the step runs a few times. Weights, buffers, the optimizer's state and the means are restored
    afterwards, so that the first step, also that of a resumed run, is a replay like all others. A step is captured
    again when other weights are trained, or the optimizer's settings (but for learning rates) have changed.

    Args:
        module: The module, in ``fit``.
        optimizer: Its optimizer, whose update must be one fused kernel that heeds ``found_inf``.
        capture: Captures a function and returns what replays it.

    Attributes:
        replayed: Whether the last step was a replay.
        capturing: Whether the function runs that is captured, so that nothing may be logged.
    """

    def __init__(self, module: pl.LightningModule, optimizer: Optimizer, capture: Capture = capture_cuda_graph) -> None:
        self.module = cast("_Module", module)
        self.optimizer = optimizer
        self.capture = capture
        self.replayed = self.capturing = False
        self._device = module.device
        self._ordinary_step = self.module.training_step
        self._update = optimizer.step
        self._captured: _Captured | None = None

    def attach(self) -> None:
        """Take the place of the module's ``training_step`` and of the optimizer's ``step``."""

        def training_step(batch: Any, batch_idx: int) -> Tensor:
            return self(batch, batch_idx)

        def step(closure: Callable[[], Any] | None = None) -> Any:
            return self._finish(closure)

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # schedulers warn of other functions
        self.module.training_step = training_step  # type: ignore[method-assign]
        self.optimizer.step = step  # type: ignore[method-assign]

    def detach(self) -> None:
        """Give both back, and free the graph with the gradients in its memory."""
        vars(self.module).pop("training_step", None)
        self.optimizer.step = self._update  # type: ignore[method-assign]
        self.optimizer.zero_grad()
        self.module.finite_guard.captured = self.replayed = False
        self._captured = None

    def __call__(self, batch: Any, batch_idx: int) -> Tensor:
        """Take a step; of a batch of another form only return the loss, and Lightning does what remains."""
        tensors, form = _flatten(batch)
        captured, trainer = self._captured, self.module.trainer
        self.replayed = captured is None or form == captured.form
        self.module.finite_guard.captured = self.replayed
        if not self.replayed:
            return self._ordinary_step(finished(batch, self._data), batch_idx)
        if captured is None or self._has_changed(captured, batch_idx):
            captured = self._captured = self._capture_step(batch, form)
        else:
            _copy_all_(captured.inputs, tensors)
        captured.fill_rates(self.optimizer)
        captured.replay()
        self.module.epoch_metrics.means.count_replay()
        record = captured.record._replace(epoch=trainer.current_epoch, step=trainer.global_step)
        self.module.finite_guard.observe(record)
        self.module.log_progress(captured.loss)
        return captured.loss

    def _finish(self, closure: Callable[[], Any] | None) -> Any:
        """Run Lightning's closure, and the update unless it was part of a replay."""
        result = None if closure is None else closure()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask for it
        if not self.replayed:
            self._update()
        return result

    def _take(self, batch: Any, rates: list[Tensor], loss_of_step: Tensor) -> None:
        """Take a step whose inputs and results are tensors that stay where they are."""
        module, trainer, optimizer = self.module, self.module.trainer, self.optimizer
        torch.clear_autocast_cache()  # a weight that was cast before must be cast by the graph
        with trainer.precision_plugin.train_step_context():
            loss = self._ordinary_step(finished(batch, self._data), 0)
        torch.clear_autocast_cache()
        optimizer.zero_grad()
        loss.backward()
        module.finite_guard.check_in_graph(optimizer)
        init_momentum_buffers(optimizer)
        module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        with _rates_on_device(optimizer, rates):
            self._update()
        loss_of_step.copy_(loss.detach())

    def _run(self, batch: Any, rates: list[Tensor], loss: Tensor) -> None:
        self.capturing = True
        try:
            self._take(batch, rates, loss)
        finally:
            self.capturing = False

    def _random_state_kept(self) -> AbstractContextManager[None]:
        """Return a context after which the generators are as before it, since captured steps draw from them."""
        cuda = self._device.type == "cuda"
        return torch.random.fork_rng([self._device.index or 0] if cuda else [])

    def _capture_step(self, batch: Any, form: list[object]) -> "_Captured":
        settings, tensors, buffers = self._settings(), self._tensors(), list(self.module.buffers())
        own_batch = pytree.tree_map_only(Tensor, torch.clone, batch)
        inputs, _ = _flatten(own_batch)
        loss, *rates = (torch.zeros((), device=self._device) for _ in range(1 + len(self.optimizer.param_groups)))
        before = {id(tensor): (tensor, tensor.detach().clone()) for tensor in self._changed_tensors()}
        try:
            outside = torch.autocast(self._device.type, enabled=False)  # Lightning calls within the forward's context
            with self._random_state_kept(), outside:
                replay = self.capture(lambda: self._run(own_batch, rates, loss))
        except RuntimeError as error:
            raise UserError(
                f"The training step cannot be captured as a CUDA graph ({first_line(error)}); set cuda_graph to false."
            ) from error
        if any(now is not then for now, then in zip(self.module.buffers(), buffers, strict=True)):
            raise UserError(
                "A layer or a loss replaces its buffers in the forward pass, which a CUDA graph cannot replay; change "
                "them in place, or set cuda_graph to false."
            )
        with torch.no_grad():
            for tensor in self._changed_tensors():
                _, saved = before.get(id(tensor), (None, None))
                tensor.zero_() if saved is None else tensor.copy_(saved)  # new ones began as zeros
        record, step = self.module.finite_guard.record, self.module.trainer.global_step
        assert record is not None
        return _Captured(form, settings, tensors, inputs, rates, loss, record, replay, step)

    def _has_changed(self, captured: "_Captured", batch_idx: int) -> bool:
        """Return whether a step must be captured again.

        Raises:
            UserError: If a setting of the optimizer changes in each step.
        """
        settings = self._settings()
        if settings != captured.settings and captured.step == self.module.trainer.global_step - 1:
            before, now = next(pair for pair in zip(captured.settings, settings, strict=True) if pair[0] != pair[1])
            raise UserError(
                f"A setting of the optimizer changes from step to step ({before} to {now}), which a CUDA graph cannot "
                "replay; change learning rates only, or set cuda_graph to false."
            )
        return settings != captured.settings or (batch_idx == 0 and self._tensors() != captured.tensors)

    def _settings(self) -> list[object]:
        """Return what a captured step contains as numbers."""
        groups = self.optimizer.param_groups
        return [value for group in groups for name, value in group.items() if name not in _READ_ANEW]

    def _tensors(self) -> list[object]:
        """Return the identities of weights and buffers, and which weights are trained."""
        weights = [(id(weight), weight.requires_grad) for weight in self.module.parameters()]
        return [*weights, *(id(buffer) for buffer in self.module.buffers())]

    def _changed_tensors(self) -> list[Tensor]:
        """Return all tensors that a step changes."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        sums = self.module.epoch_metrics.means.sums
        own = [*self.module.parameters(), *self.module.buffers(), *self.module.finite_guard.flags]
        return [*own, *([] if sums is None else [sums]), *(value for value in states if isinstance(value, Tensor))]

    @property
    def _data(self) -> object:
        return self.module.trainer.datamodule  # type: ignore[attr-defined]


class _Captured(NamedTuple):
    """A captured step: the form of its batches, what else it depends on, its inputs and its results."""

    form: list[object]
    settings: list[object]
    tensors: list[object]
    inputs: list[Tensor]
    rates: list[Tensor]
    loss: Tensor
    record: StepRecord
    replay: Callable[[], None]
    step: int

    def fill_rates(self, optimizer: Optimizer) -> None:
        """Copy the learning rates to the device."""
        for rate, group in zip(self.rates, optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])


_READ_ANEW = frozenset({"params", "lr", "initial_lr"})
"""Entries of a parameter group that may differ between replays."""


@contextmanager
def _rates_on_device(optimizer: Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """Let an optimizer read its learning rates from tensors; schedules and checkpoints keep numbers."""
    groups = optimizer.param_groups
    numbers: list[dict[str, Any]] = [
        {name: group[name] for name in ("lr", "capturable") if name in group} for group in groups
    ]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = rate.is_cuda and torch.cuda.is_current_stream_capturing()  # else torch warns
    try:
        yield
    finally:
        for group, before in zip(groups, numbers, strict=True):
            group.update(before)


def _flatten(batch: Any) -> tuple[list[Tensor], list[object]]:
    """Return the tensors of a batch, and its form: all else that a captured step depends on."""
    tensors: list[Tensor] = []
    form: list[object] = []
    _collect(batch, tensors, form)
    return tensors, form


def _collect(part: Any, tensors: list[Tensor], form: list[object]) -> None:
    """Walk a batch in the order of its parts; it runs in each step, where ``tree_flatten`` takes five times as long."""
    if isinstance(part, Tensor):
        tensors.append(part)
        form.append((part.shape, part.dtype))
    elif isinstance(part, tuple | list | dict):
        form.append((type(part), tuple(part) if isinstance(part, dict) else len(part)))
        for inner in part.values() if isinstance(part, dict) else part:
            _collect(inner, tensors, form)
    else:
        form.append(part)


def _copy_all_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors, by one kernel for all of a type."""
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        for same, tensor in zip(by_type[target.dtype], (target, source), strict=True):
            same.append(tensor)
    for of_type in by_type.values():
        torch._foreach_copy_(*of_type)
