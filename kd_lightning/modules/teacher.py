"""Training on labels, without a teacher."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.data.read_batch import read_batch
from kd_lightning.losses import binary_target_loss, hard_target_loss
from kd_lightning.losses._checks import check_fraction
from kd_lightning.losses.hard_target import row_weights
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.networks.dry_run import to_input_dtype
from kd_lightning.teacher.feature_cache import FeatureCache
from kd_lightning.teacher.view_cache import check_cacheable


class TeacherModule(ClassificationModule):
    """Trains a network on labels: a teacher, or a student without one.

    Args:
        network: Any classifier, images ``(B, channels, H, W)`` to logits ``(B, C)``.
        label_smoothing: Fraction of the target that is spread over all classes, in [0, 1]; where an image may have
            several classes, the fraction by which the label of each moves towards 1/2.
        feature_cache: Compute the input of the last linear layer once for each of the data module's V ``views`` of a
            training image, where no other layer is trained (``FreezeLayers``): ``True`` to keep it in memory, or the
            path of a folder.
        layer_decay: Factor between the learning rates of each direct child of the network and the child after it, in
            (0, 1], so that the first layers of a pretrained network change least.
        **options: Arguments of :class:`ClassificationModule`.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from kd_lightning.networks import resnet20
        >>> TeacherModule(resnet20())(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        label_smoothing: float = 0.0,
        feature_cache: bool | str = False,
        layer_decay: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(network, **options)
        self.optimization = replace(self.optimization, layer_decay=layer_decay)
        check_fraction(label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing
        self.feature_cache = feature_cache
        self._features: FeatureCache | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy with the labels, of several classes an image the sum of the binary ones."""
        images, labels, ids, _ = read_batch(batch, multi_label=self.multi_label)
        if self._features is None:
            logits = self(images)
        else:
            assert ids is not None
            logits = self._features.head(self._features(ids))
        weights, options = self.class_weights, {"label_smoothing": self.label_smoothing}
        if self.multi_label:
            loss = binary_target_loss(
                logits, labels, positive_weights=weights, all_labelled=self.all_labelled, **options
            )
        else:
            rows = None if weights is None else row_weights(labels, weights)
            loss = hard_target_loss(logits, labels, weights=rows, all_labelled=self.all_labelled, **options)
        self.log_step(loss, {}, logits, labels, {"images": images})
        return loss

    def on_train_start(self) -> None:
        """Open the cache of features, if there is one."""
        self._features = None
        if self.feature_cache is not False:
            data = check_cacheable(self.data_module, "Features", "feature_cache")
            images = torch.randn(4, *data.image_shape, generator=torch.Generator().manual_seed(0))
            self._features = FeatureCache(self.network, self.network_input(to_input_dtype(images, self.network)))
            self._features.enable_cache(data, self.feature_cache, str(self.trainer.precision))
        super().on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Load the view of this epoch from the cache."""
        if self._features is not None:
            with self.epoch_metrics.paused():
                self._features.load_view(self.current_epoch, self.trainer, self.network_input)

    def describe_speed(self) -> list[str]:
        """Return what makes the network fast, and what else could: the cache too."""
        cached = [] if self.feature_cache is False else ["the frozen layers run once for each view of an image"]
        return [*super().describe_speed(), *cached]
