"""Training on labels alone."""

from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_lightning.checkpoints.trust import unserializable
from kd_lightning.errors import UserError
from kd_lightning.losses import hard_target_loss
from kd_lightning.modules.classification import ClassificationModule, OptimizerFactory, SchedulerFactory
from kd_lightning.teacher.feature_cache import FeatureCache
from kd_lightning.teacher.view_cache import uncacheable_reason


class TeacherModule(ClassificationModule):
    """Trains a network on labels alone: a teacher, or a student without one.

    Args:
        network: Any classifier, images ``(B, channels, H, W)`` to logits ``(B, C)``.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1].
        learning_rate: Peak of the default schedule.
        weight_decay: Of the default optimizer; norms and biases are left out.
        optimizer: Makes an optimizer from parameter groups, for example ``torch.optim.AdamW``; by default SGD with
            Nesterov momentum 0.9. With one of one's own the rate stays constant unless ``lr_scheduler`` is given.
        lr_scheduler: Makes a scheduler from the optimizer; by default one cycle over the steps of ``max_epochs``.
        lr_interval: Whether ``lr_scheduler`` moves after each step or each epoch.
        compile: Whether ``fit`` compiles the network in place (``network.compile()``, no key of its state changes): it
            costs up to half a minute at the start, and what a step gains depends on the hardware.
        on_nonfinite: What happens where a loss or a gradient is not finite, before the weights are touched: ``"stop"``
            ends the training with the step, the term and the ranges named, ``"skip"`` leaves the update out and counts
            it.
        feature_cache: Where nothing trains but the last linear layer (``FreezeLayers``), compute what it gets once for
            each of the data module's V ``views`` of a training image: ``True`` in memory, or the path of a folder.
        layer_decay: In (0, 1]: the learning rate of each direct child of the network, as a share of that of the child
            after it, so that what a pretrained network learned first changes least.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> import torch
        >>> from kd_lightning.networks import resnet20
        >>> TeacherModule(resnet20())(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        label_smoothing: float = 0.0,
        learning_rate: float = 0.1,
        weight_decay: float = 5e-4,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Literal["step", "epoch"] = "epoch",
        compile: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        feature_cache: bool | str = False,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__(
            network, learning_rate, weight_decay, optimizer, lr_scheduler, lr_interval, compile, on_nonfinite
        )
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"label_smoothing must lie in [0, 1], got {label_smoothing}.")
        if not 0 < layer_decay <= 1:
            raise UserError(f"layer_decay must lie in (0, 1], got {layer_decay}; 1 is the same rate for all layers.")
        self.label_smoothing = label_smoothing
        self.layer_decay = layer_decay
        self.feature_cache = feature_cache
        self._features: FeatureCache | None = None
        self.save_hyperparameters(ignore=unserializable("network", "optimizer", "lr_scheduler"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy with the labels."""
        images, labels, *ids = batch
        logits = self(images) if self._features is None else self._features.head(self._features(*ids))
        loss = hard_target_loss(logits, labels, label_smoothing=self.label_smoothing)
        self.record(loss, {}, logits, labels, {"images": images})
        return loss

    def on_train_start(self) -> None:
        """Keep the features, if they are to be kept."""
        self._features = None
        if self.feature_cache is not False:
            reason = uncacheable_reason(self._datamodule)
            if reason is not None:
                raise UserError(f"Features cannot be cached: {reason}, or set feature_cache=False.")
            images = self._to_input_dtype(
                torch.randn(4, *self._datamodule.image_shape, generator=torch.Generator().manual_seed(0))
            )
            self._features = FeatureCache(self.network, self.convert_input(images))
            self._features.keep(self._datamodule, self.feature_cache, str(self.trainer.precision))
        super().on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Show the view of this epoch, once its features are there."""
        super().on_train_batch_start(batch, batch_idx)
        if self._features is not None and self._features.load_view(
            self.current_epoch, self.trainer, self.convert_input
        ):
            self._since = perf_counter()

    def speed(self) -> list[str]:
        """What makes the training quick, and what would."""
        kept = [] if self._features is None else ["the frozen part is asked once about each view of an image"]
        return [*super().speed(), *kept]
