"""Domain adaptation: from a labelled source to an unlabelled target."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.data.read_batch import read_batch, read_training_batch
from kd_lightning.errors import UserError
from kd_lightning.features import FeatureTap, Outputs
from kd_lightning.losses import AlignmentLoss, HardTargetLoss, Objective
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.modules.evaluation import LoaderEvaluations
from kd_lightning.networks.dry_run import to_input_dtype, try_forward


class AdaptationModule(ClassificationModule):
    """Trains a network on a labelled source and adapts it to an unlabelled target.

    Both domains pass through the network as one batch, so that its batch norms see both. Each term of the objective
    compares the network's outputs on the source with those on the target; labels are the source's.

    Batches are ``{"source": (images, labels, ...), "target": (images, ...)}``, as ``DomainPairDataModule`` or a dict of
    two loaders yields them; validation loaders are the source's, then the target's. The target's labels, if there are
    any, are only used for the metrics under ``oracle/``, which select nothing. The best checkpoint is selected by
    ``val/criterion``: the accuracy on the source's validation images plus the mutual information of images and
    predictions on the target's, as a fraction of the logarithm of the number of classes.

    Args:
        network: Network to train.
        losses: Terms by name; by default the cross-entropy with the source's labels.
        **options: Arguments of :class:`ClassificationModule`.

    Raises:
        UserError: If an argument is out of range, or a loss reads a layer that the network does not have.

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
        **options: Any,
    ) -> None:
        super().__init__(network, **options)
        losses = {"hard": HardTargetLoss()} if losses is None else losses
        self.losses = Objective(losses, accepts=(AlignmentLoss, HardTargetLoss), views=1)
        self._tap = FeatureTap(network, self.losses.layers)
        self._total_steps = math.inf
        self.target_evaluations = LoaderEvaluations()
        self._target_log_probabilities: list[Tensor] = []

    def setup(self, stage: str) -> None:
        """Check network and data against each other before the first step.

        Raises:
            UserError: If an image may have several classes.
        """
        if self.multi_label:
            raise UserError(
                "AdaptationModule adapts classifiers of one class an image, and the data declare several; train on the "
                "source alone with TeacherModule."
            )
        super().setup(stage)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the weighted sum of the terms."""
        (source_images, labels, *_), target_images = read_training_batch(batch, pairs=True)
        assert target_images is not None
        both = self._tap(self.network_input(torch.cat([source_images, target_images])))
        source, target = _split(both, len(source_images))
        loss: Tensor
        loss, terms = self.losses(source, target, labels)
        inputs = {"the source's images": source_images, "the target's images": target_images}
        self.log_step(loss, terms, source.logits, labels, inputs)
        return loss

    def on_train_start(self) -> None:
        """Determine the number of steps, for terms that depend on the progress."""
        self._total_steps = max(float(self.trainer.estimated_stepping_batches), 1.0)
        super().on_train_start()
        self.losses.begin_training(all_labelled=self.all_labelled, class_weights=self.class_weights)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the progress of the losses."""
        progress = self.trainer.global_step / self._total_steps
        self.losses.begin_step(progress=progress, epoch=self.current_epoch, device=self.device)

    def dry_run(self, images: Tensor) -> None:
        """Run the network once; build the learned parts of the losses.

        Args:
            images: ``(2, channels, H, W)``.
        """
        super().dry_run(images)
        inputs = self.network_input(to_input_dtype(images, self.network))
        if self._tap.layers:
            self._tap.find_channels_last(inputs)
        outputs = try_forward(self, lambda: self._tap(inputs), "The network", images)
        if self._tap.layers:
            self._tap.check_not_overwritten(inputs)
        self.losses.build(outputs, outputs, network=self.network)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate a batch of the source's validation images, or (the second loader) of the target's."""
        if dataloader_idx == 0:
            self.evaluate(batch, batch_idx)
            return
        if dataloader_idx > 1:
            raise UserError(
                "AdaptationModule validates on two loaders, the source's and the target's; leave out the others."
            )
        images, labels, *_ = read_batch(batch, labelled=False)
        logits = self(images)
        self.target_evaluations.update(0, logits, labels)
        self._target_log_probabilities.append(logits.float().log_softmax(1))

    def on_validation_epoch_end(self) -> None:
        """Log the source's metrics, the criterion, and the target's metrics under ``oracle/``."""
        source = self.finish_evaluation("val")
        if not self._target_log_probabilities:
            return
        self.log_metrics("oracle", self.target_evaluations.finish().values)
        information = self._mutual_information()
        metrics = {"mutual_information": information}
        if "accuracy" in source:
            metrics["criterion"] = source["accuracy"] + information
        self.log_metrics("val", metrics)

    def _mutual_information(self) -> Tensor:
        """Return the mutual information of the target's images and predictions, over log C; over all ranks."""
        log_probabilities, self._target_log_probabilities = torch.cat(self._target_log_probabilities), []
        probabilities = log_probabilities.exp()
        sums = torch.cat([probabilities.sum(0), (probabilities * log_probabilities).sum().view(1)])
        count = torch.tensor(float(len(log_probabilities)), device=sums.device)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        count = self.trainer.strategy.reduce(count, reduce_op="sum")
        mean = sums[:-1] / count
        marginal_entropy = -(mean * mean.clamp(min=1e-12).log()).sum()
        conditional_entropy = -sums[-1] / count
        return (marginal_entropy - conditional_entropy) / math.log(len(mean))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the shapes from which the learned parts of the losses are rebuilt."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["loss_shapes"] = self.losses.shapes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the learned parts of the losses, so that their weights can be loaded."""
        super().on_load_checkpoint(checkpoint)
        self.losses.load_shapes(checkpoint.get("loss_shapes"), network=self.network)


def _split(both: Outputs, first: int) -> tuple[Outputs, Outputs]:
    """Return the outputs for the first rows of a batch, and for the others."""
    return (
        Outputs(both.logits[:first], {name: value[:first] for name, value in both.features.items()}),
        Outputs(both.logits[first:], {name: value[first:] for name, value in both.features.items()}),
    )
