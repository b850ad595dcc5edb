"""Unstructured pruning: single weights stay at zero while a network trains."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.utils import prune

from kd_lightning.callbacks.network_change import check_epoch, reset_best
from kd_lightning.callbacks.prune import PruneNetwork
from kd_lightning.errors import UserError


def magnitude_masks(network: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Which weights of convolutions and linear layers remain: the largest of all layers together.

    S. Han et al.: Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015

    Args:
        network: Is not changed.
        sparsity: The share of weights that go.

    Returns:
        bool, of the shape of each weight, by name.
    """
    masked = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # torch's masks are made by views
    layers = [(name, module) for name, module in masked.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    weights = [(module, "weight") for _, module in layers]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=sparsity)
    return {f"{name}.weight": module.get_buffer("weight_mask").bool() for name, module in layers}


def semi_structured_masks(network: nn.Module) -> dict[str, Tensor]:
    """Which weights remain where of each four neighbouring input channels the two largest do.

    A. Mishra et al.: Accelerating Sparse Deep Neural Networks, 2021, https://arxiv.org/abs/2104.08378

    Returns:
        bool, of the shape of each weight, by name; layers whose input channels are no multiple of four are left out.

    Example:
        >>> layer = nn.Sequential(nn.Linear(4, 1))
        >>> layer[0].weight.data = torch.tensor([[1.0, -3.0, 0.5, 2.0]])
        >>> semi_structured_masks(layer)["0.weight"]
        tensor([[False,  True, False,  True]])
    """
    masks = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape[1] % 4 == 0:
            fours = module.weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, 4))
            kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.topk(2).indices, True)
            masks[f"{name}.weight"] = kept.flatten(-2).movedim(-1, 1)
    return masks


class MaskWeights(pl.Callback):
    """Sets the smallest weights of the trained network to zero at the start of epochs, and keeps them there.

    Weights of convolutions and linear layers count. The zeros are plain zeros in checkpoints and exports. They make a
    file smaller only where it is compressed, and nothing faster on ordinary hardware: :class:`PruneNetwork` does that.
    The best checkpoint is of an epoch after the last masking.
    ``"2:4"`` is a pattern that some GPUs multiply faster, with kernels of their own.

    Args:
        sparsity: The share of weights that is zero in the end, in (0, 1), for the pattern ``"free"``.
        pattern: ``"free"``: the largest of all layers together remain; ``"2:4"``: two of four in each layer.
        epochs: In which epochs, counted from 0; of n, each takes an n-th of what goes.

    Raises:
        ValueError: If an argument lies outside its range or does not fit the pattern; in ``fit``, before the first
            step, if :class:`PruneNetwork` works on the same network or the training ends before the last of epochs.

    Example:
        >>> mask = MaskWeights(sparsity=0.8, epochs=[0, 2, 4])
    """

    def __init__(
        self, sparsity: float | None = None, pattern: Literal["free", "2:4"] = "free", epochs: Sequence[int] = (0,)
    ) -> None:
        if (sparsity is None) == (pattern == "free"):
            raise UserError("Give a sparsity for the pattern 'free', and none for '2:4', which is half.")
        if sparsity is not None and not 0 < sparsity < 1:
            raise UserError(f"sparsity must lie between 0 and 1, got {sparsity}.")
        if not epochs or min(epochs) < 0 or len(set(epochs)) < len(epochs):
            raise UserError(f"epochs must be one or several different numbers >= 0, got {list(epochs)}.")
        if pattern == "2:4" and len(epochs) > 1:
            raise UserError("2:4 comes at once; give one epoch.")
        self.sparsity = sparsity
        self.epochs = sorted(epochs)
        self._masks: dict[str, Tensor] = {}
        self._done: list[int] = []
        self._hook: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what does not go together."""
        if stage != "fit":
            return
        check_epoch(trainer, "MaskWeights masks", self.epochs[-1])
        if any(isinstance(callback, PruneNetwork) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError("MaskWeights and PruneNetwork work on the same weights; use one of them in a run.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Have zeros stay after each step of the optimizer."""
        self._masks = {name: mask.to(pl_module.device) for name, mask in self._masks.items()}
        (optimizer,) = trainer.optimizers
        self._hook = optimizer.register_step_post_hook(lambda *_: self._apply(pl_module.network))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Mask, if it is time."""
        epoch = trainer.current_epoch
        if epoch not in self.epochs or epoch in self._done:
            return
        self._done.append(epoch)
        network = pl_module.network
        if self.sparsity is None:
            self._masks = semi_structured_masks(network)
        else:
            self._masks = magnitude_masks(network, self.sparsity * len(self._done) / len(self.epochs))
        self._apply(network)
        reset_best(trainer)
        zeros = sum(int((~mask).sum()) for mask in self._masks.values())
        weights = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        rank_zero_info(f"Masked in epoch {epoch}: {zeros:,} of {weights:,} weights ({zeros / weights:.1%}) are zero.")
        for logger in trainer.loggers:
            logger.log_metrics({"prune/sparsity": zeros / weights}, step=trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Let go of the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """The masks, for a run that is cut."""
        return {"masks": dict(self._masks), "done": list(self._done)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self._masks, self._done = dict(state_dict["masks"]), list(state_dict["done"])

    @torch.no_grad()
    def _apply(self, network: nn.Module) -> None:
        for name, mask in self._masks.items():
            weight = network.get_parameter(name)
            weight.mul_(mask)
