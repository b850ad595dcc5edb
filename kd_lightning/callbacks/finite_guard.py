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
from kd_lightning.callbacks.nonfinite import mark_nonfinite_
from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.errors import UserError


class StepRecord(NamedTuple):
    """A batch: epoch and step, the loss and its terms, and the tensors that they were computed from."""

    epoch: int
    step: int
    terms: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]


class _State(TypedDict):
    """The number of skipped updates of the epoch, and, within a step, the buffers before it."""

    skipped: int | None
    buffers: dict[str, Tensor]


class FiniteGuard(CallbackWithoutIdleHooks):
    """Checks the loss and the gradients of each step, in all processes alike, before the weights are updated.

    On a CPU the verdict is read at once. On a CUDA device it stays there, so that nothing waits: a fused optimizer
    skips the update where ``found_inf`` is set, and the verdict is read one step later, and before anything is saved;
    until then it stays set, so that no later update changes the weights either. A
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
        self.captured = False
        """Whether the step was part of a CUDA graph, which has checked it: see :meth:`check_in_graph`."""
        self._record: StepRecord | None = None
        self._snapshot: BufferSnapshot | None = None
        self._pending: PendingCheck | None = None
        self._found: Tensor | None = None
        self._found_in_loss: Tensor | None = None
        self._stopped: UserError | None = None
        self._loaded: _State | None = None

    def observe(self, record: StepRecord) -> None:
        """Remember a batch of the step: the first one that is known not to be finite, otherwise the last."""
        last = self._record
        if last is None or self.captured or last.terms["loss"].is_cuda or _is_finite(last.terms["loss"]):
            detached = ({name: value.detach() for name, value in part.items()} for part in record[2:])
            self._record = StepRecord(record.epoch, record.step, *detached)

    @property
    def record(self) -> StepRecord | None:
        """The batch of the step that would be reported."""
        return self._record

    @property
    def flags(self) -> list[Tensor]:
        """The tensors on the device that a check changes."""
        return [flag for flag in (self._found, self._found_in_loss) if flag is not None]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier run."""
        self.captured = False
        self._record = self._snapshot = self._pending = self._stopped = self._found = self._found_in_loss = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue a loaded epoch, within a step if its gradients wait for more batches."""
        state, self._loaded = self._loaded, None
        if state is None:
            return
        if state["skipped"] is not None:
            self.skipped = torch.tensor(float(state["skipped"]), device=pl_module.device)
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
        if self.captured:
            assert self._found is not None
            found = bad = self._found
        else:
            found, bad = self._find(_weights_with_gradients(optimizer), scaled=scaled)
        if scaled or self.mode == "skip":
            self.skipped = found.clone() if self.skipped is None else self.skipped.add_(found)
        if snapshot is not None:
            snapshot.restore(module, bad > 0)
            self.metrics.means.undo_step(bad > 0)

        if _stays_on_device(bad) and (scaled or supports_found_inf(optimizer)):
            if not scaled:
                optimizer.found_inf = bad  # type: ignore[attr-defined]
            if self.mode == "stop":
                self._pending = PendingCheck(AsyncCopy(bad), record)
        elif bool(bad):
            if self.mode == "stop":
                self._stop(_message(record, self._rank_with_bad_loss(), module))
            for weight in [] if scaled else _weights_with_gradients(optimizer):
                weight.grad = None  # every optimizer skips such weights

    def check_in_graph(self, optimizer: Optimizer) -> None:
        """Do what :meth:`check` does on the device, in a step that is captured; the host reads the verdict afterwards.

        Args:
            optimizer: A fused optimizer, which skips its update where ``found_inf`` is set.
        """
        _, optimizer.found_inf = self._find(_weights_with_gradients(optimizer), scaled=False)  # type: ignore[attr-defined]

    def _find(self, weights: list[Tensor], *, scaled: bool) -> tuple[Tensor, Tensor]:
        """Return, for all processes, whether anything is not finite, and whether the update must not be made for it.

        Both are float32 scalars on the device, 0 or 1. They differ under a gradient scaler, which treats gradients
        itself, so that only the loss counts for the second.
        """
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        sums = self.metrics.means.sums
        losses = [] if sums is None else [sums]
        device = next((tensor.device for tensor in (*gradients, *losses)), torch.device("cpu"))
        if self._found is None or self._found.device != device:
            self._found, self._found_in_loss = (torch.zeros((), device=device) for _ in range(2))
        assert self._found_in_loss is not None
        flags = {self._found: [*gradients, *losses], **({self._found_in_loss: losses} if scaled else {})}
        *_, bad = flags
        for flag, tensors in flags.items():
            if self.mode == "skip" or flag is not bad:
                flag.zero_()
            mark_nonfinite_(flag, tensors)
            if _is_distributed():
                dist.all_reduce(flag, dist.ReduceOp.MAX)  # Lightning's reduce would first wait for all processes
        return self._found, bad

    def _rank_with_bad_loss(self) -> int:
        """Return the last rank whose loss is not finite, or -1; all processes call it."""
        sums = self.metrics.means.sums
        rank = torch.tensor(-1 if sums is None or _is_finite(sums) else _rank())
        if _is_distributed():
            rank = rank.to(rank.device if sums is None else sums.device)
            dist.all_reduce(rank, dist.ReduceOp.MAX)
        return int(rank)

    def synchronize(self) -> None:
        """Read the verdict on the last step, if it was left on the device.

        Raises:
            UserError: If something was not finite.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.verdict.read():
            self._stop(_message(pending.record, self._rank_with_bad_loss()))

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


def supports_found_inf(optimizer: Optimizer) -> bool:
    """Return whether an optimizer skips an update by itself where ``found_inf`` is set, as torch's scaler asks it."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _weights_with_gradients(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def _stays_on_device(verdict: Tensor) -> bool:
    return verdict.is_cuda


def _message(record: StepRecord | None, rank: int, module: nn.Module | None = None) -> str:
    """Return the error's sentence, written by the rank whose loss is not finite (if any: from 0 on) for all ranks."""
    place = "A step" if record is None else f"Epoch {record.epoch}, step {record.step}"
    terms, tensors = ({}, {}) if record is None else record[2:]
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
