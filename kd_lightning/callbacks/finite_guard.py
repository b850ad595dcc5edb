"""Keeps values that are not finite away from the weights."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypedDict

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_lightning.callbacks.buffer_snapshot import BufferSnapshot
from kd_lightning.callbacks.epoch_metrics import EpochMetrics
from kd_lightning.callbacks.running_means import RunningMeans
from kd_lightning.errors import UserError


class StepRecord(NamedTuple):
    """A batch: epoch and step in words, the loss and its terms, and the tensors that they were computed from."""

    place: str
    terms: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]


class _State(TypedDict):
    """The number of skipped updates of the epoch, and, within a step, the buffers before it."""

    skipped: int | None
    buffers: dict[str, Tensor]


class FiniteGuard(pl.Callback):
    """Checks the loss and the gradients of each step, in all processes alike, before the weights are updated.

    On a CPU the verdict is read at once. On a CUDA device it stays there, so that nothing waits: a fused optimizer
    skips the update where ``found_inf`` is set, and the verdict is read one step later, and before anything is saved. A
    gradient scaler (``16-mixed``) skips updates by itself and lowers its scale: gradients that are not finite are then
    counted and otherwise left to it. The modules of this package own a guard and attach it.

    Args:
        mode: ``"stop"`` raises an error that names the step, the term and the ranges; the weights are unchanged, and no
            checkpoint can be saved afterwards, since batch norms have seen the batch. ``"skip"`` skips the update,
            restores buffers (batch norm statistics, queues) and the epoch's means, and counts the step.
        metrics: The epoch's means, which are not finite once a loss is not.

    Raises:
        UserError: If ``mode`` is neither.
    """

    def __init__(self, mode: Literal["stop", "skip"], metrics: EpochMetrics) -> None:
        if mode not in ("stop", "skip"):
            raise UserError(f"on_nonfinite must be 'stop' or 'skip', got {mode!r}.")
        self.mode = mode
        self.metrics = metrics
        self.skipped: Tensor | None = None
        """Number of skipped updates of the epoch, a scalar on the device; ``None`` where none can be skipped."""
        self._record: StepRecord | None = None
        self._snapshot: BufferSnapshot | None = None
        self._pending: PendingCheck | None = None
        self._stopped: UserError | None = None
        self._loaded: _State | None = None

    def observe(self, record: StepRecord) -> None:
        """Remember a batch of the step: the first one that is known not to be finite, otherwise the last."""
        last = self._record
        if last is None or last.terms["loss"].is_cuda or _is_finite(last.terms["loss"]):
            detached = ({name: value.detach() for name, value in part.items()} for part in record[1:])
            self._record = StepRecord(record.place, *detached)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier run."""
        self._record = self._snapshot = self._pending = self._stopped = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue a loaded epoch, within a step if its gradients wait for more batches."""
        state, self._loaded = self._loaded, None
        if state is None:
            return
        if state["skipped"] is not None:
            self.skipped = torch.tensor(state["skipped"], device=pl_module.device)
        if state["buffers"]:
            buffers = {name: buffer.to(pl_module.device) for name, buffer in state["buffers"].items()}
            self._snapshot = BufferSnapshot(buffers)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the count."""
        self.skipped = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step with the first of its accumulated batches."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.begin(pl_module)

    def begin(self, module: nn.Module) -> None:
        """Remember what a skipped step must not change."""
        self._record = None
        if self.mode == "skip":
            self._snapshot = BufferSnapshot(dict(module.named_buffers()))
            self.metrics.means.begin_step()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the step, whose gradients are now those of all processes."""
        self.check(pl_module, optimizer, scaled=getattr(trainer.precision_plugin, "scaler", None) is not None)

    def check(self, module: nn.Module, optimizer: Optimizer, *, scaled: bool) -> None:
        """Decide on an update.

        Args:
            module: Module whose weights are updated.
            optimizer: Optimizer of the update.
            scaled: Whether a gradient scaler decides on gradients.

        Raises:
            UserError: If something is not finite and the mode is ``"stop"``.
        """
        self.synchronize()
        (record, self._record), (snapshot, self._snapshot) = (self._record, None), (self._snapshot, None)
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        verdict = _verdict(self.metrics.means, weights)
        bad = verdict.loss > 0 if scaled else verdict.update
        if scaled or self.mode == "skip":
            self.skipped = verdict.update + (0 if self.skipped is None else self.skipped)
        if snapshot is not None:
            snapshot.restore(module, bad)
            self.metrics.means.undo_step(bad)

        asynchronous = _stays_on_device(bad) and (scaled or supports_found_inf(optimizer))
        if asynchronous:
            if not scaled:
                optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            if self.mode == "stop":
                self._pending = PendingCheck(AsyncCopy(torch.stack([bad, verdict.loss])), record)
        elif bool(bad):
            if self.mode == "stop":
                self._stop(_message(record, int(verdict.loss) - 1, module))
            for weight in [] if scaled else weights:
                weight.grad = None  # every optimizer skips such weights

    def synchronize(self) -> None:
        """Read the verdict on the last step, if it was left on the device.

        Raises:
            UserError: If something was not finite.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        bad, loss = pending.verdict.read()
        if bad:
            self._stop(_message(pending.record, int(loss) - 1))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the last step, and log the number of skipped ones."""
        self.synchronize()
        if self.skipped is not None:
            pl_module.log("train/skipped_steps", self.skipped.float(), sync_dist=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save nothing that was not checked; add the count and, within a step, the buffers before it.

        Raises:
            UserError: If a step was not finite, the error that stopped the run.
        """
        self.synchronize()
        if self._stopped is not None:
            raise self._stopped
        skipped = None if self.skipped is None else int(self.skipped)
        state: _State = {"skipped": skipped, "buffers": {} if self._snapshot is None else self._snapshot.tensors()}
        checkpoint["finite_guard"] = state

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the saved state until training starts."""
        self._loaded = checkpoint.get("finite_guard") if trainer.state.fn == "fit" else None

    def _stop(self, message: str) -> None:
        self._stopped = UserError(message)
        raise self._stopped


class AsyncCopy:
    """A tensor that is copied from the device; the host does not wait before it is read."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = torch.empty(tensor.shape, pin_memory=True).copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> Tensor:
        """Wait for the copy and return it."""
        self._arrived.synchronize()
        return self._copy


class PendingCheck(NamedTuple):
    """A verdict that was not read yet, and the step that it is about."""

    verdict: AsyncCopy
    record: StepRecord | None


class Verdict(NamedTuple):
    """The result of a check, the same in all processes: scalars on the device."""

    loss: Tensor
    """1 + the (last) rank whose loss is not finite, or 0."""
    update: Tensor
    """Whether a loss or a gradient is not finite."""


def _verdict(means: RunningMeans, weights: list[Tensor]) -> Verdict:
    grad_norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None], torch.inf)
    gradient = ~grad_norm.isfinite()
    loss = torch.zeros_like(gradient) if means.sums is None else ~means.sums.isfinite().all()
    both = torch.stack([loss * (1 + _rank()), loss | gradient]).float()
    if _is_distributed():
        dist.all_reduce(both, dist.ReduceOp.MAX)  # Lightning's reduce would first wait for all processes
    return Verdict(both[0], both[1] > 0)


def supports_found_inf(optimizer: Optimizer) -> bool:
    """Return whether an optimizer skips an update by itself where ``found_inf`` is set, as torch's scaler asks it."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def _stays_on_device(verdict: Tensor) -> bool:
    return verdict.is_cuda


def _message(record: StepRecord | None, rank: int, module: nn.Module | None = None) -> str:
    """Return the error's sentence, written by the rank whose loss is not finite (if any: from 0 on) for all ranks."""
    place, terms, tensors = record or StepRecord("A step", {}, {})
    sentence = (
        f"{place}{f', rank {_rank()}' if _is_distributed() else ''}: {_first_nonfinite(terms, rank, module)}"
        f" ({'; '.join(f'{name} in {_range(tensor)}' for name, tensor in tensors.items())}), so the weights "
        "were not updated; correct the images or the teacher, lower learning_rate or clip the gradients "
        "(trainer.gradient_clip_val), or set on_nonfinite='skip'."
    )
    if rank < 0 or not _is_distributed():
        return sentence
    sentences = [sentence]
    dist.broadcast_object_list(sentences, rank)
    return sentences[0]


def _first_nonfinite(terms: Mapping[str, Tensor], rank: int, module: nn.Module | None) -> str:
    for name, term in terms.items():
        if not _is_finite(term):
            return f"the term {name!r} is {float(term)}"
    if rank >= 0:
        return "the loss of an earlier batch of the step is not finite"
    for name, weight in [] if module is None else module.named_parameters():
        if weight.grad is not None and not _is_finite(weight.grad):
            return f"the gradient of {name!r} is in {_range(weight.grad)}"
    return "a gradient is not finite"


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _range(tensor: Tensor) -> str:
    finite = tensor.detach()[tensor.isfinite()]
    ends = "[{:.4g}, {:.4g}]".format(*map(float, finite.aminmax())) if len(finite) else "[]"
    lost = tensor.numel() - len(finite)
    return ends + (f" but for {lost} of {tensor.numel()} values" if lost else "")
