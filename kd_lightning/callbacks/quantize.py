"""Quantization-aware training: a network trains with the rounding errors that its int8 export will have."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd_lightning.callbacks.network_change import check_epoch, reset_best
from kd_lightning.callbacks.protocol import trained_module
from kd_lightning.callbacks.prune import PruneNetwork
from kd_lightning.errors import UserError


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """Round a weight to 8 bits, symmetrically and with one scale per output channel; its gradient passes through.

    Folding a batch norm multiplies output channels, so it does not change which values these scales can represent.

    Example:
        >>> fake_quantize_weight(torch.tensor([[1.27, 0.004], [0.0, 254.0]]))
        tensor([[  1.2700,   0.0000],
                [  0.0000, 254.0000]])
    """
    scales = weight.detach().abs().flatten(1).amax(1).clamp(min=1e-12) / 127
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -128, 127)


def fake_quantize_activation(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round activations to 256 values of a range, extended to include zero, and clip what is outside.

    Args:
        images: Activations of any shape.
        low: The lower end of the range, a scalar.
        high: The upper end of the range, a scalar.

    Example:
        >>> fake_quantize_activation(torch.tensor([-3.0, 0.1, 0.5, 9.0]), torch.tensor(-1.0), torch.tensor(1.55))
        tensor([-1.0000,  0.1000,  0.5000,  1.5500])
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round().clamp(0, 255).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(images, scale, zero, 0, 255)


class FakeQuantize:
    """A pair of hooks that fake-quantizes the input and the weight of a layer and tracks the range of its input.

    For the time of ``forward`` an instance attribute hides the parameter ``weight``; parameters, state dict, optimizer
    and DDP never see the rounded weight.

    Args:
        range: The smallest and largest input, shape ``(2,)``, smoothed over batches; empty before the first batch.
    """

    smoothing = 0.05

    def __init__(self, range: Tensor) -> None:
        self.range = range

    def attach(self, layer: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Register both hooks on a convolution or a linear layer and return their handles."""
        # `always_call`: the parameter is visible again after an error in `forward`, too
        return layer.register_forward_pre_hook(self.quantize), layer.register_forward_hook(restore, always_call=True)

    def quantize(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the rounded input, and set the rounded weight."""
        images, *others = inputs
        images = images.float()
        if layer.training:
            batch_range = torch.stack(images.detach().aminmax())
            self.range = batch_range if not len(self.range) else self.range.lerp(batch_range, self.smoothing)
        if len(self.range):
            images = fake_quantize_activation(images, *self.range)
        vars(layer)["weight"] = fake_quantize_weight(layer.get_parameter("weight"))
        return images, *others


def restore(layer: nn.Module, inputs: object, output: object) -> None:
    """Make a layer's parameter ``weight`` visible again."""
    vars(layer).pop("weight", None)


class QuantizationAwareTraining(pl.Callback):
    """Trains and validates the network with int8 rounding errors from an epoch on.

    Weights of convolutions and linear layers are rounded per output channel, and their inputs over their recent range.
    Names and weights stay those of the float network, in checkpoints, too: `kd-lightning export --int8` quantizes them
    as usual. The teacher is not changed, and the best checkpoint is taken from the epochs with rounding. Useful for
    students that lose accuracy in int8 otherwise.

    B. Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    CVPR 2018, https://arxiv.org/abs/1712.05877

    Args:
        from_epoch: The first epoch with rounding, counted from 0; the last third of a training is usually enough.

    Raises:
        UserError: If the epoch is negative; in ``fit``, before the first step, if the network is compiled, if it is
            pruned in an epoch with rounding, or if the training ends before ``from_epoch``.

    Example:
        >>> quantization = QuantizationAwareTraining(from_epoch=20)
    """

    def __init__(self, from_epoch: int = 0) -> None:
        if from_epoch < 0:
            raise UserError(f"from_epoch must be >= 0, got {from_epoch}.")
        self.from_epoch = from_epoch
        self._active: dict[str, FakeQuantize] = {}
        self._handles: list[RemovableHandle] = []
        self._ranges: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise if the network is compiled, or pruned too late."""
        if stage != "fit":
            return
        check_epoch(trainer, "QuantizationAwareTraining starts", self.from_epoch)
        if trained_module(pl_module).compiles:
            raise UserError("QuantizationAwareTraining does not support a compiled network; set compile=false.")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        pruned = [epoch for callback in callbacks if isinstance(callback, PruneNetwork) for epoch in callback.epochs]
        if pruned and max(pruned) >= self.from_epoch:
            raise UserError(
                f"PruneNetwork prunes in epoch {max(pruned)}, but a fake-quantized network cannot be traced; start "
                f"QuantizationAwareTraining later, with from_epoch={max(pruned) + 1}."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Attach the hooks in the first epoch with rounding."""
        if self._active or trainer.current_epoch < self.from_epoch:
            return
        if not self._ranges:
            reset_best(trainer)
        for name, layer in _quantizable(trained_module(pl_module).network):
            self._active[name] = FakeQuantize(self._ranges.get(name, torch.empty(0)).to(layer.weight.device))
            self._handles += self._active[name].attach(layer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the ranges of all processes with those of rank 0."""
        for hooks in self._active.values():
            hooks.range = trainer.strategy.broadcast(hooks.range.cpu()).to(hooks.range.device)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._ranges = {name: hooks.range for name, hooks in self._active.items()}
        for handle in self._handles:
            handle.remove()
        self._active, self._handles = {}, []

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Return the ranges, to resume an interrupted run."""
        return {"ranges": {name: hooks.range for name, hooks in self._active.items()} or dict(self._ranges)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the ranges."""
        self._ranges = dict(state_dict["ranges"])


def _quantizable(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    """Yield the layers whose weights and inputs are quantized, by name."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            yield name, layer
