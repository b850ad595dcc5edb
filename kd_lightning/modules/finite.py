"""Numbers that are not finite never reach the weights."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer


class Seen(NamedTuple):
    """A batch: epoch and step in words, the terms of its loss, and what they were computed from."""

    place: str
    terms: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]


class FiniteGuard:
    """Looks at the loss and the gradients of each step, and leaves out an update that would spoil the weights.

    On a CPU the verdict is there at once. On another device it stays there: a fused optimizer leaves weights and state
    alone where it says so, and it is read a step later, and before anything is saved.

    Args:
        mode: ``"stop"`` raises a sentence that names the step, the term and the ranges; ``"skip"`` counts the step,
            puts buffers (the statistics of batch norms) back, and goes on.
    """

    def __init__(self, mode: Literal["stop", "skip"]) -> None:
        self.mode = mode
        self.steps = 0
        self.skipped: Tensor | int = 0
        self._good: Tensor | None = None
        self._seen: Seen | None = None
        self._caught = False
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._unread: tuple[Tensor, torch.cuda.Event, Seen | None] | None = None

    def begin(self, module: nn.Module) -> None:
        """Before the first batch of a step."""
        self._good, self._caught = None, False
        if self.mode == "skip":
            self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def look(self, loss: Tensor, seen: Seen) -> Tensor:
        """Whether the loss of a batch is finite, on the device."""
        good = loss.detach().isfinite()
        self._good = good if self._good is None else self._good & good
        if not self._caught:
            self._seen = seen
            self._caught = good.device.type == "cpu" and not bool(good)
        return good

    def decide(self, module: nn.Module, optimizer: Optimizer, strategy: Strategy, scaled: bool) -> None:
        """Before an update, when the gradients of all processes are one.

        Args:
            module: Whose weights are updated.
            optimizer: That updates them.
            strategy: The processes agree by it.
            scaled: Whether a gradient scaler leaves such updates out by itself; then they are counted.

        Raises:
            ValueError: In the mode ``"stop"``, where something is not finite.
        """
        self.settle()
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        good = torch.nn.utils.get_total_norm([weight.grad for weight in weights], float("inf")).isfinite()
        good = good if self._good is None else good & self._good
        good = strategy.reduce(good.float(), reduce_op="mean") == 1
        self.steps += 1
        if self.mode == "skip":
            for buffer, before in self._buffers:
                buffer.copy_(torch.where(good, buffer, before))
        if scaled:
            self.skipped = self.skipped + ~good
        elif good.device.type == "cpu" or not optimizer.defaults.get("fused"):
            if not bool(good):
                sentence = self._sentence(self._seen, module)
                for weight in weights:
                    weight.grad = None  # every optimizer passes over it
                self._refuse(sentence)
        else:
            self._leave_to_the_device(optimizer, good)

    def _leave_to_the_device(self, optimizer: Optimizer, good: Tensor) -> None:
        optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        if self.mode == "skip":
            self.skipped = self.skipped + ~good
            return
        flag, event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
        flag.copy_(good, non_blocking=True)
        event.record()
        self._unread = flag, event, self._seen

    def settle(self) -> None:
        """Read the verdict on the last step, if it was left on the device.

        Raises:
            ValueError: If something was not finite.
        """
        if self._unread is None:
            return
        (good, event, seen), self._unread = self._unread, None
        event.synchronize()
        if not bool(good):
            self._refuse(self._sentence(seen, None))

    def _refuse(self, sentence: str) -> None:
        if self.mode == "stop":
            raise ValueError(sentence)
        self.skipped = self.skipped + 1

    def _sentence(self, seen: Seen | None, module: nn.Module | None) -> str:
        place, terms, tensors = seen or Seen("A step", {}, {})
        culprits = [f"the term {name!r} is {float(term)}" for name, term in terms.items() if not _finite(term)]
        if module is not None:
            culprits += [
                f"the gradient of {name!r} lies in {_range(weight.grad)}"
                for name, weight in module.named_parameters()
                if weight.grad is not None and not _finite(weight.grad)
            ]
        ranges = "; ".join(f"{name} in {_range(tensor)}" for name, tensor in tensors.items())
        return (
            f"{place}: {[*culprits, 'another process met a number that is not finite'][0]} ({ranges}), so the weights "
            "were left as they were; mend the images or the teacher, lower learning_rate or clip the gradients "
            "(trainer.gradient_clip_val), or set on_nonfinite='skip'."
        )


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _range(tensor: Tensor) -> str:
    finite = tensor.detach()[tensor.isfinite()]
    ends = "[{:.4g}, {:.4g}]".format(*map(float, finite.aminmax())) if len(finite) else "[]"
    lost = tensor.numel() - len(finite)
    return ends + (f" but for {lost} of {tensor.numel()} values" if lost else "")
