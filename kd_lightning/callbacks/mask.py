"""Unstructured pruning: single weights are set to zero and stay there while a network trains."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.hooks import RemovableHandle

from kd_lightning.callbacks.network_change import check_epoch, reset_best
from kd_lightning.callbacks.protocol import trained_module
from kd_lightning.callbacks.prune import PruneNetwork
from kd_lightning.errors import UserError
from kd_lightning.networks.copying import copy_network


def magnitude_masks(network: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Return masks that keep the largest weights of all convolutions and linear layers together.

    S. Han et al.: Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015

    Args:
        network: The network, which is not changed.
        sparsity: The fraction of weights that become zero.

    Returns:
        For each weight by name a boolean mask of its shape, true where the weight is kept.
    """
    masked = copy_network(network).to(memory_format=torch.contiguous_format)  # torch creates its masks with views
    layers = [(name, module) for name, module in masked.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    weights = [(module, "weight") for _, module in layers]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=sparsity)
    return {f"{name}.weight": module.get_buffer("weight_mask").bool() for name, module in layers}


def semi_structured_masks(network: nn.Module) -> dict[str, Tensor]:
    """Return masks that keep the two largest weights of every four neighbouring input channels.

    A. Mishra et al.: Accelerating Sparse Deep Neural Networks, 2021, https://arxiv.org/abs/2104.08378

    Returns:
        For each weight by name a boolean mask of its shape, true where the weight is kept; layers whose number of input
        channels is not a multiple of four are left out.

    Example:
        >>> layer = nn.Sequential(nn.Linear(4, 1))
        >>> layer[0].weight.data = torch.tensor([[1.0, -3.0, 0.5, 2.0]])
        >>> semi_structured_masks(layer)["0.weight"]
        tensor([[False,  True, False,  True]])
    """
    masks = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape[1] % 4 == 0:
            groups = module.weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, 4))
            kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2).indices, True)
            masks[f"{name}.weight"] = kept.flatten(-2).movedim(-1, 1)
    return masks


class MaskWeights(pl.Callback):
    """Sets the smallest weights of the trained network to zero at the start of epochs, and keeps them there.

    Only weights of convolutions and linear layers are masked. They are plain zeros in checkpoints and exports: they
    make a file smaller only if it is compressed, and inference is not faster on ordinary hardware, for which
    :class:`PruneNetwork` exists. The best checkpoint is taken from the epochs after the last masking.

    Args:
        sparsity: The final fraction of zeros, in (0, 1), for the pattern ``"unstructured"``.
        pattern: ``"unstructured"`` keeps the largest weights of all layers together; ``"2:4"`` keeps two of every four
            input channels, which some GPUs multiply faster with special kernels.
        epochs: The epochs in which weights are masked, counted from 0; each masks an equal part.

    Raises:
        UserError: If an argument is outside its range or does not fit the pattern; in ``fit``, before the first step,
            if the run also has a :class:`PruneNetwork` or ends before the last of ``epochs``.

    Example:
        >>> mask = MaskWeights(0.8, epochs=[0, 2, 4])
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        pattern: Literal["unstructured", "2:4"] = "unstructured",
        epochs: Sequence[int] = (0,),
    ) -> None:
        if (sparsity is None) == (pattern == "unstructured"):
            raise UserError(
                "The pattern 'unstructured' needs a sparsity, and '2:4' must not have one because it is 0.5; change "
                "sparsity or pattern."
            )
        if sparsity is not None and not 0 < sparsity < 1:
            raise UserError(f"sparsity must be between 0 and 1, got {sparsity}.")
        if not epochs or min(epochs) < 0 or len(set(epochs)) < len(epochs):
            raise UserError(f"epochs must be one or several different numbers >= 0, got {list(epochs)}.")
        if pattern == "2:4" and len(epochs) > 1:
            raise UserError(f"The pattern '2:4' is applied in a single epoch, got {list(epochs)}; name one epoch.")
        self.sparsity = sparsity
        self.epochs = sorted(epochs)
        self._masks: dict[str, Tensor] = {}
        self._done: list[int] = []
        self._hook: RemovableHandle | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise if the network is pruned as well, or if the training ends too early."""
        if stage != "fit":
            return
        check_epoch(trainer, "MaskWeights masks", self.epochs[-1])
        if any(isinstance(callback, PruneNetwork) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError("MaskWeights and PruneNetwork change the same weights; use only one of them in a run.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply the masks after each step of the optimizer."""
        self._masks = {name: mask.to(pl_module.device) for name, mask in self._masks.items()}
        (optimizer,) = trainer.optimizers
        network = trained_module(pl_module).network
        self._hook = optimizer.register_step_post_hook(lambda *_: self._apply(network))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compute the masks at the start of an epoch of ``epochs``."""
        epoch = trainer.current_epoch
        if epoch not in self.epochs or epoch in self._done:
            return
        self._done.append(epoch)
        network = trained_module(pl_module).network
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

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the optimizer's hook."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, to resume an interrupted run."""
        return {"masks": dict(self._masks), "done": list(self._done)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the masks."""
        self._masks, self._done = dict(state_dict["masks"]), list(state_dict["done"])

    @torch.no_grad()
    def _apply(self, network: nn.Module) -> None:
        for name, mask in self._masks.items():
            network.get_parameter(name).mul_(mask)
