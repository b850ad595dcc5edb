"""Quantization-aware training: a network learns with the rounding that its int8 export will have."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.callbacks.network_change import check_epoch, reset_best
from kd_lightning.callbacks.prune import PruneNetwork
from kd_lightning.errors import UserError


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """A weight as 8 bits hold it: symmetric, a scale for each output channel; its gradient passes through.

    Folding a batch norm multiplies output channels, so that it does not change which values these scales can hold.

    Example:
        >>> fake_quantize_weight(torch.tensor([[1.27, 0.004], [0.0, 254.0]]))
        tensor([[  1.2700,   0.0000],
                [  0.0000, 254.0000]])
    """
    scales = weight.detach().abs().flatten(1).amax(1).clamp(min=1e-12) / 127
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -128, 127)


def fake_quantize_activation(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Activations as bytes hold a range that includes zero; what lies beyond is cut off.

    Args:
        images: Any shape.
        low: The least value, a scalar.
        high: The greatest.

    Example:
        >>> fake_quantize_activation(torch.tensor([-3.0, 0.1, 0.5, 9.0]), torch.tensor(-1.0), torch.tensor(1.55))
        tensor([-1.0000,  0.1000,  0.5000,  1.5500])
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round().clamp(0, 255).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(images, scale, zero, 0, 255)


class FakeQuantize:
    """Runs a convolution or a linear layer with a rounded weight and a rounded input, and follows the input's range.

    Args:
        range: The least and the greatest input, ``(2,)``, smoothed over batches; empty before the first.
    """

    smoothing = 0.05

    def __init__(self, range: Tensor) -> None:
        self.range = range

    def __call__(self, layer: nn.Module, images: Tensor) -> Tensor:
        """What the layer says of its input."""
        images = images.float()
        if layer.training:
            seen = torch.stack(images.detach().aminmax())
            self.range = seen if not len(self.range) else self.range.lerp(seen, self.smoothing)
        if len(self.range):
            images = fake_quantize_activation(images, *self.range)
        weight = fake_quantize_weight(layer.weight)  # type: ignore[arg-type]
        if isinstance(layer, nn.Conv2d):
            output: Tensor = layer._conv_forward(images, weight, layer.bias)
            return output
        return F.linear(images, weight, layer.bias)  # type: ignore[arg-type]


class QuantizationAwareTraining(pl.Callback):
    """From an epoch on the trained network computes as it will in 8 bits, in training and in validation.

    Convolutions and linear layers get weights rounded for each output channel and inputs rounded over the range that
    they had lately. Names and weights stay those of the float network, and so does a checkpoint; `kd-lightning export
    --int8` quantizes it as any other. The teacher stays as it is, and the best checkpoint is of an epoch that rounded.
    For students that lose accuracy without it.

    B. Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    CVPR 2018, https://arxiv.org/abs/1712.05877

    Args:
        from_epoch: The first epoch, counted from 0; rather the last third of a training.

    Raises:
        ValueError: If the epoch is negative; in ``fit``, before the first step, if the network is compiled, or pruned
            after it began to round, or if the training ends before that epoch.

    Example:
        >>> aware = QuantizationAwareTraining(from_epoch=20)
    """

    def __init__(self, from_epoch: int = 0) -> None:
        if from_epoch < 0:
            raise UserError(f"from_epoch must be >= 0, got {from_epoch}.")
        self.from_epoch = from_epoch
        self._rounding: dict[str, FakeQuantize] = {}
        self._ranges: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a compiled network, and one that is pruned later."""
        if stage != "fit":
            return
        check_epoch(trainer, "QuantizationAwareTraining begins", self.from_epoch)
        if pl_module.compiles:
            raise UserError("The forward of a compiled network cannot be changed; set compile=false.")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        pruned = [epoch for callback in callbacks if isinstance(callback, PruneNetwork) for epoch in callback.epochs]
        if pruned and max(pruned) >= self.from_epoch:
            raise UserError(
                f"PruneNetwork prunes in epoch {max(pruned)}, but a network that is rounded cannot be traced; let "
                f"QuantizationAwareTraining begin after it, from_epoch={max(pruned) + 1}."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to round, if it is time."""
        if self._rounding or trainer.current_epoch < self.from_epoch:
            return
        if not self._ranges:
            reset_best(trainer)
        for name, layer in pl_module.network.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                self._rounding[name] = FakeQuantize(self._ranges.get(name, torch.empty(0)).to(layer.weight.device))
                layer.forward = partial(self._rounding[name], layer)  # type: ignore[method-assign]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Several processes go on with the ranges of the first."""
        for rounding in self._rounding.values():
            rounding.range = trainer.strategy.broadcast(rounding.range.cpu()).to(rounding.range.device)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Leave the network as it was."""
        self._ranges = {name: rounding.range for name, rounding in self._rounding.items()}
        for name in self._rounding:
            del pl_module.network.get_submodule(name).forward
        self._rounding = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the network as it was."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The ranges, for a run that is cut."""
        return {"ranges": {name: rounding.range for name, rounding in self._rounding.items()} or dict(self._ranges)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self._ranges = dict(state_dict["ranges"])
