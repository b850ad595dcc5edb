"""Training on labels alone."""

from typing import Any, Literal

from torch import Tensor, nn

from kd_lightning.losses import hard_target_loss
from kd_lightning.modules.classification import ClassificationModule, OptimizerFactory, SchedulerFactory
from kd_lightning.modules.hyper_parameters import unsaved


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
    ) -> None:
        super().__init__(
            network, learning_rate, weight_decay, optimizer, lr_scheduler, lr_interval, compile, on_nonfinite
        )
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}.")
        self.label_smoothing = label_smoothing
        self.save_hyperparameters(ignore=unsaved("network", "optimizer", "lr_scheduler"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy with the labels."""
        images, labels, *_ = batch
        logits = self(images)
        loss = hard_target_loss(logits, labels, self.label_smoothing)
        self.record(loss, {}, logits, labels, {"images": images})
        return loss
