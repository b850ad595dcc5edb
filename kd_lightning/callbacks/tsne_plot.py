"""Plots two domains in a network's features, before and after adaptation."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from kd_lightning.callbacks.protocol import TrainedModule, trained_module
from kd_lightning.data.loader_checks import flattened
from kd_lightning.data.read_batch import read_batch
from kd_lightning.errors import UserError
from kd_lightning.features import FeatureTap, evaluating
from kd_lightning.losses._labels import class_indices
from kd_lightning.networks.placement import weight_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOMAINS = "source", "target"


class TSNEPlot(pl.Callback):
    """Plots the validation images of source and target in two dimensions by t-SNE, before and after ``fit``.

    The plot, ``embedding.png`` in the run's folder and under ``embedding`` in TensorBoard, shows the domains on the
    left and the source's classes on the right; the target's labels are not read. Where features are aligned, the two
    colours on the left mix. With several processes, rank 0 plots its own part.

    L. van der Maaten, G. Hinton: Visualizing Data using t-SNE, JMLR 2008

    Args:
        layer: Dotted name of the layer, as in ``named_modules()`` of the network.
        images: Number of images of each domain.

    Raises:
        UserError: If the network does not have the layer, or ``images`` is below 10.

    Example:
        >>> plot = TSNEPlot(layer="avgpool", images=500)
    """

    def __init__(self, layer: str = "avgpool", images: int = 400) -> None:
        if images < 10:
            raise UserError(f"images must be >= 10, got {images}.")
        self.layer = layer
        self.images = images
        self._embedded: dict[str, Tensor] = {}
        self._labels = torch.empty(0, dtype=torch.long)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the layer exists before anything is computed."""
        if stage == "fit":
            FeatureTap(trained_module(pl_module).network, [self.layer]).remove()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the features before training."""
        if trainer.global_step == 0:
            self._embed(trainer, pl_module, "before")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the features after training, and plot both."""
        self._embed(trainer, pl_module, "after")
        folder = trainer.log_dir or trainer.default_root_dir  # on all ranks, since Lightning broadcasts it
        if not trainer.is_global_zero or "after" not in self._embedded:
            return
        figure = _draw(self._embedded, self._labels)
        figure.savefig(Path(folder, "embedding.png"), dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("embedding", figure, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the features from before training, for a resumed run."""
        return {"embedded": dict(self._embedded)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the features from before training."""
        self._embedded = dict(state_dict["embedded"])

    def _embed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str) -> None:
        loaders = flattened(trainer.val_dataloaders)
        if len(loaders) != len(DOMAINS) or not trainer.is_global_zero:
            return
        module = trained_module(pl_module)
        tap = FeatureTap(module.network, [self.layer])
        (source, self._labels), (target, _) = (self._rows(trainer, module, tap, loader) for loader in loaders)
        tap.remove()
        features = source, target
        rows = torch.cat(features).numpy()
        perplexity = min(30.0, (len(rows) - 1) / 3)
        from sklearn.manifold import TSNE  # slow to import

        embedded = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(rows)
        domains = np.repeat([0.0, 1.0], [len(part) for part in features])
        self._embedded[when] = torch.from_numpy(np.column_stack([embedded, domains]))

    def _rows(
        self, trainer: pl.Trainer, module: TrainedModule, tap: FeatureTap, loader: Iterable[Sequence[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        rows: list[Tensor] = []
        labels: list[Tensor] = []
        # a loader draws a seed when it is iterated
        with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(module.network):
            for batch in loader:
                images, own, *_ = read_batch(trainer.strategy.batch_to_device(batch), labelled=False)
                images = images.to(weight_device(module.network))  # after a fit Lightning has moved it to the CPU
                images = module.network_input(images)
                if not rows:
                    tap.find_channels_last(images[:2])
                rows.append(_pooled(tap(images).features[self.layer]).float().cpu())
                labels.append(class_indices(own).cpu())
                if sum(map(len, rows)) >= self.images:
                    break
        return torch.cat(rows)[: self.images], torch.cat(labels)[: self.images]


def _pooled(features: Tensor) -> Tensor:
    """Return the mean of maps ``(B, C, H, W)`` or of tokens ``(B, N, C)``, and vectors as they are."""
    return features.mean((2, 3)) if features.dim() == 4 else features.mean(1) if features.dim() == 3 else features


def _draw(embedded: dict[str, Tensor], labels: Tensor) -> "Figure":
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 4.6 * len(embedded)), layout="constrained")
    panels = figure.subplots(len(embedded), 2, squeeze=False)
    for (when, points_of), (domains, classes) in zip(embedded.items(), panels, strict=True):
        source, target = (points_of[points_of[:, 2] == number].numpy() for number in (0, 1))
        for points, colour, name in ((source, "#0072b2", DOMAINS[0]), (target, "#e69f00", DOMAINS[1])):
            domains.scatter(points[:, 0], points[:, 1], s=8, c=colour, label=name)
        domains.legend()
        classes.scatter(target[:, 0], target[:, 1], s=6, c="#d0d0d0")
        shown = classes.scatter(source[:, 0], source[:, 1], s=8, c=labels[: len(source)].numpy(), cmap="tab10")
        figure.colorbar(shown, ax=classes, label="class of the source's image (target grey)")
        for axes, what in ((domains, "domains"), (classes, "classes of the source")):
            axes.set_title(f"{when} training: {what}")
            axes.set_xticks([])
            axes.set_yticks([])
    return figure
