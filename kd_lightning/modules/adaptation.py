"""Domain adaptation: from a labelled source to an unlabelled target."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_lightning.checkpoints.trust import unserializable
from kd_lightning.features import FeatureTap, Outputs
from kd_lightning.losses import AlignmentLoss, HardTargetLoss, Objective
from kd_lightning.modules.classification import ClassificationModule, OptimizerFactory, SchedulerFactory
from kd_lightning.modules.evaluation import Evaluation
from kd_lightning.networks.dry_run import try_forward
from kd_lightning.networks.placement import weight_device


class AdaptationModule(ClassificationModule):
    """Trains a network on a labelled source and makes it fit an unlabelled target.

    Both domains pass through the network as one batch, so that its batch norms see both. Each term of the objective
    compares what the network says of the source with what it says of the target; labels are the source's.

    Batches are ``{"source": (images, labels, ...), "target": (images, ...)}``, as ``DomainPairDataModule`` gives them.
    The target's labels are read by nothing but the figures under ``oracle/``, which choose nothing. A checkpoint is
    chosen by ``val/criterion``: the accuracy on the source's validation images plus the mutual information of images
    and predictions on the target's (how sure it is of each, and how evenly it uses the classes), as a share of the
    logarithm of the number of classes.

    Args:
        network: The network that is trained.
        losses: Terms by name; the cross-entropy with the source's labels alone if there are none.
        learning_rate: Peak of the default schedule.
        weight_decay: Of the default optimizer; norms and biases are left out.
        optimizer: See :class:`TeacherModule`.
        lr_scheduler: See :class:`TeacherModule`.
        lr_interval: See :class:`TeacherModule`.
        compile: See :class:`TeacherModule`.
        on_nonfinite: See :class:`TeacherModule`.

    Raises:
        ValueError: If an argument lies outside its range, or a loss reads a layer that the network does not have.

    Example:
        >>> from kd_lightning.losses import CoralLoss, HardTargetLoss
        >>> from kd_lightning.networks import resnet20
        >>> losses = {"hard": HardTargetLoss(), "coral": CoralLoss(layers=["avgpool"])}
        >>> list(AdaptationModule(resnet20(), losses).losses)
        ['hard', 'coral']
    """

    takes_pairs = True

    def __init__(
        self,
        network: nn.Module,
        losses: dict[str, AlignmentLoss | HardTargetLoss] | None = None,
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
        losses = {"hard": HardTargetLoss()} if losses is None else losses
        self.losses = Objective(losses, accepts=(AlignmentLoss, HardTargetLoss))
        self._tap = FeatureTap(network, self.losses.layers)
        self._total_steps = math.inf
        self.target_evaluation: Evaluation | None = None
        self._information: list[Tensor] = []
        self.save_hyperparameters(ignore=unserializable("network", "losses", "optimizer", "lr_scheduler"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the weighted sum of the terms."""
        (source_images, labels, *_), (target_images, *_) = batch["source"], batch["target"]
        progress = self.trainer.global_step / self._total_steps
        self.losses.begin_step(progress=progress, epoch=self.current_epoch, device=source_images.device)
        both = self._tap(self.convert_input(torch.cat([source_images, target_images])))
        source, target = _split(both, len(source_images))
        loss, values = self.losses(source, target, labels)
        seen = {"the source's images": source_images, "the target's images": target_images}
        self.record(loss, values, source.logits, labels, seen)
        return loss

    def on_train_start(self) -> None:
        """Learn how long the training is, for terms that grow with it."""
        steps = float(self.trainer.estimated_stepping_batches)
        self._total_steps = steps if steps > 0 else math.inf  # a stream has no length
        super().on_train_start()

    def dry_run(self, images: Tensor) -> None:
        """Run the network once; build the learned parts of the losses.

        Args:
            images: ``(2, channels, H, W)``.
        """
        super().dry_run(images)
        images = self._to_input_dtype(images)
        said = try_forward(self, lambda: self._tap(self.convert_input(images)), "The network", images)
        if self._tap.layers:
            self._tap.check_not_overwritten(self.convert_input(images))
        self.losses.build(said, said, network=self.network, device=weight_device(self.network))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count a batch of the source's validation images, or (the second loader) of the target's."""
        if dataloader_idx == 0:
            super().validation_step(batch, batch_idx)
            return
        images, labels, *_ = batch
        logits = self(images)
        if self.target_evaluation is None:
            self.target_evaluation = Evaluation(logits.shape[1]).to(logits.device)
        self.target_evaluation.update(logits, labels)
        self._information.append(logits.float().log_softmax(1))

    def on_validation_epoch_end(self) -> None:
        """Log the source's figures, the criterion, and the oracle's figures beside it."""
        accuracy = None if self.evaluation is None else self.evaluation.compute().get("accuracy")
        super().on_validation_epoch_end()
        if self.target_evaluation is None:
            return
        oracle = self.target_evaluation.compute()
        oracle.pop("confusion", None)
        self._log_figures("oracle", oracle)
        self.target_evaluation = None
        information = self._mutual_information()
        figures = {"information": information}
        if accuracy is not None:
            figures["criterion"] = accuracy + information
        self._log_figures("val", figures)

    def _mutual_information(self) -> Tensor:
        logarithms, self._information = torch.cat(self._information), []
        probabilities = logarithms.exp()
        sums = torch.cat([probabilities.sum(0), (probabilities * logarithms).sum().view(1)])
        count = torch.tensor(float(len(logarithms)), device=sums.device)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        count = self.trainer.strategy.reduce(count, reduce_op="sum")
        mean = sums[:-1] / count
        evenness, doubt = -(mean * mean.clamp(min=1e-12).log()).sum(), -sums[-1] / count
        return (evenness - doubt) / torch.log(torch.tensor(float(len(mean)), device=mean.device))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the shapes from which the learned parts of the losses are rebuilt."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["loss_shapes"] = self.losses.shapes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the learned parts of the losses, so that their weights can be loaded."""
        super().on_load_checkpoint(checkpoint)
        device = weight_device(self.network)
        self.losses.load_shapes(checkpoint.get("loss_shapes"), network=self.network, device=device)


def _split(both: Outputs, first: int) -> tuple[Outputs, Outputs]:
    """Of a batch, the rows before and from a number on."""
    return (
        Outputs(both.logits[:first], {name: value[:first] for name, value in both.features.items()}),
        Outputs(both.logits[first:], {name: value[first:] for name, value in both.features.items()}),
    )
