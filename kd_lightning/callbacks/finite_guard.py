"""Numbers that are not finite never reach the weights."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_lightning.callbacks.running_means import RunningMeans
from kd_lightning.errors import UserError

Buffers = dict[str, Tensor]


class Seen(NamedTuple):
    """A batch: epoch and step in words, the loss and its terms, and what they were computed from."""

    place: str
    terms: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]


class FiniteGuard:
    """Looks at the losses and the gradients of each step, and leaves out an update that would spoil the weights.

    Buffers (the statistics of batch norms, the queue of a loss) and the means over the epoch are then put back to what
    they were before the step. All processes do the same.

    The verdict is read at once where that is cheap, on a CPU. On a CUDA device it stays there: a fused optimizer leaves
    weights and state alone where ``found_inf`` says so, and it is read a step later, and before anything is saved.

    A gradient scaler (``16-mixed``) leaves out updates by itself, and lowers its scale: gradients that are not finite
    are then none of the guard's business, but counted. A loss is not scaled, and looked at as ever.

    Args:
        mode: ``"stop"`` raises a sentence that names the step, the term and the ranges; ``"skip"`` counts the step and
            goes on.

    Raises:
        ValueError: If ``mode`` is neither.
    """

    def __init__(self, mode: Literal["stop", "skip"]) -> None:
        if mode not in ("stop", "skip"):
            raise UserError(f"on_nonfinite must be 'stop' or 'skip', got {mode!r}.")
        self.mode = mode
        self.skipped: Tensor | None = None
        """The number of updates that were left out; nothing where none can be."""
        self.buffers: Buffers = {}
        """The module's, before the step under way."""
        self._seen: Seen | None = None
        self._unread: _Unread | None = None

    def begin(self, module: nn.Module, means: RunningMeans) -> None:
        """Before the first batch of a step: remember what a bad one would spoil."""
        self._seen = None
        self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        means.begin_step()

    def look(self, seen: Seen) -> None:
        """A batch of the step: the last is named if the step is bad, or the first bad one where that is known."""
        last = self._seen
        if last is None or last.terms["loss"].is_cuda or _finite(last.terms["loss"]):
            detached = ({name: value.detach() for name, value in part.items()} for part in seen[1:])
            self._seen = Seen(seen.place, *detached)

    def decide(self, module: nn.Module, means: RunningMeans, optimizer: Optimizer, scaled: bool) -> None:
        """Before an update, when the gradients of all processes are one.

        Args:
            module: Whose weights are updated.
            means: Sums over the epoch that are not finite if a loss of the step is not.
            optimizer: That updates them.
            scaled: Whether a gradient scaler decides on gradients.

        Raises:
            ValueError: In the mode ``"stop"``, where something is not finite.
        """
        self.settle(module)
        (seen, self._seen), (buffers, self.buffers) = (self._seen, None), (self.buffers, {})
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        verdict = _verdict(means, weights)
        bad = verdict.loss > 0 if scaled else verdict.update
        means.undo_step(bad)
        if scaled or self.mode == "skip":
            self.skipped = verdict.update + (0 if self.skipped is None else self.skipped)

        obeys = getattr(optimizer, "_step_supports_amp_scaling", False)  # the mark by which torch's scaler knows it
        later = _stays_on_device(bad) and (obeys or scaled)
        if later and not scaled:
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        if later and self.mode == "stop":
            self._unread = _Unread(_Sent(torch.stack([bad, verdict.loss])), buffers, seen)
        elif later:
            _put_back(module, buffers, bad)
        elif bool(bad):
            _put_back(module, buffers, bad)
            if self.mode == "stop":
                raise UserError(_sentence(seen, int(verdict.loss) - 1, module))
            for weight in [] if scaled else weights:
                weight.grad = None  # every optimizer passes over it

    def settle(self, module: nn.Module) -> None:
        """Read the verdict on the last step, if it was left on the device.

        Raises:
            ValueError: If something was not finite.
        """
        if self._unread is None:
            return
        unread, self._unread = self._unread, None
        bad, loss = unread.verdict.read()
        if bad:
            _put_back(module, unread.buffers, bad > 0)
            raise UserError(_sentence(unread.seen, int(loss) - 1))


class _Sent:
    """A tensor on its way from the device; nothing waits before it is read."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = torch.empty(tensor.shape, pin_memory=True).copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> Tensor:
        self._arrived.synchronize()
        return self._copy


class _Unread(NamedTuple):
    verdict: _Sent
    buffers: Buffers
    seen: Seen | None


class _Verdict(NamedTuple):
    """Of all processes."""

    loss: Tensor
    """1 + the (last) rank that had a bad loss, or 0."""
    update: Tensor
    """Whether a loss or a gradient is bad."""


def _verdict(means: RunningMeans, weights: list[Tensor]) -> _Verdict:
    grad_norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None], torch.inf)
    gradient = ~grad_norm.isfinite()
    loss = torch.zeros_like(gradient) if means.sums is None else ~means.sums.isfinite().all()
    both = torch.stack([loss * (1 + _rank()), loss | gradient]).float()
    if _shared():
        dist.all_reduce(both, dist.ReduceOp.MAX)  # Lightning's reduce has all processes wait for each other before
    return _Verdict(both[0], both[1] > 0)


def _shared() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _shared() else 0


def _stays_on_device(verdict: Tensor) -> bool:
    return verdict.is_cuda


@torch.no_grad()
def _put_back(module: nn.Module, before: Buffers, bad: Tensor) -> None:
    for name, buffer in module.named_buffers():
        if name in before:
            buffer.copy_(torch.where(bad.to(buffer.device), before[name], buffer))


def _sentence(seen: Seen | None, rank: int, module: nn.Module | None = None) -> str:
    """Of the rank that had a bad loss, if one had (from -1 on), said by all."""
    place, terms, tensors = seen or Seen("A step", {}, {})
    sentence = (
        f"{place}{f', rank {_rank()}' if _shared() else ''}: {_culprit(terms, rank, module)}"
        f" ({'; '.join(f'{name} in {_range(tensor)}' for name, tensor in tensors.items())}), so the weights "
        "were left as they were; mend the images or the teacher, lower learning_rate or clip the gradients "
        "(trainer.gradient_clip_val), or set on_nonfinite='skip'."
    )
    if rank < 0 or not _shared():
        return sentence
    said = [sentence]
    dist.broadcast_object_list(said, rank)
    return said[0]


def _culprit(terms: Mapping[str, Tensor], rank: int, module: nn.Module | None) -> str:
    for name, term in terms.items():
        if not _finite(term):
            return f"the term {name!r} is {float(term)}"
    if rank >= 0:
        return "the loss of an earlier batch of the step is not finite"
    for name, weight in [] if module is None else module.named_parameters():
        if weight.grad is not None and not _finite(weight.grad):
            return f"the gradient of {name!r} lies in {_range(weight.grad)}"
    return "a gradient is not finite"


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _range(tensor: Tensor) -> str:
    finite = tensor.detach()[tensor.isfinite()]
    ends = "[{:.4g}, {:.4g}]".format(*map(float, finite.aminmax())) if len(finite) else "[]"
    lost = tensor.numel() - len(finite)
    return ends + (f" but for {lost} of {tensor.numel()} values" if lost else "")
