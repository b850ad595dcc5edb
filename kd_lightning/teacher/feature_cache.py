"""Cached features of a network of which only the last layer trains."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from kd_lightning.data.protocol import ViewData
from kd_lightning.errors import UserError
from kd_lightning.features import evaluating
from kd_lightning.networks.output_layers import output_layers
from kd_lightning.teacher.fingerprint import arithmetic, digest
from kd_lightning.teacher.output_cache import OutputCache
from kd_lightning.teacher.view_cache import load_view


class FeatureCache:
    """The input of a network's last linear layer for each training image, by ``ids``.

    Args:
        network: Network of which only the last ``nn.Linear``, which computes the logits, trains.
        images: Images for a trial run, ``(B, channels, H, W)``.

    Raises:
        UserError: If another weight trains, or the last linear layer does not compute the logits.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> FeatureCache(network, torch.rand(3, 1, 2, 2)).compute(torch.rand(5, 1, 2, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.network = network
        heads = [(name, network.get_submodule(name)) for name in output_layers(network, images.shape[1:])]
        if len(heads) != 1 or not isinstance(heads[0][1], nn.Linear):
            raise UserError(
                f"{type(network).__name__} does not have one linear layer that computes the logits and whose input "
                "could be cached; set feature_cache=False."
            )
        self.name, self.head = heads[0][0], heads[0][1]
        own = set(self.head.parameters())
        trained = [name for name, weight in network.named_parameters() if weight.requires_grad and weight not in own]
        if trained:
            raise UserError(
                f"Features change while {trained[0]!r} trains; add the callback FreezeLayers, or set "
                "feature_cache=False."
            )
        with torch.no_grad(), evaluating(network):
            logits = network(images)
            if not torch.allclose(self.head(self.compute(images)), logits, rtol=1e-4, atol=1e-4):
                raise UserError(
                    f"The output of {type(network).__name__} is not that of its last linear layer {self.name!r}, so "
                    "its features cannot be cached; set feature_cache=False."
                )
        self.cache: OutputCache | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the features ``(B, D)`` of training images in the current view."""
        assert self.cache is not None
        return self.cache(ids)

    @torch.no_grad()
    def compute(self, images: Tensor) -> Tensor:
        """Return the features ``(B, D)`` of images ``(B, channels, H, W)``."""
        found: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            with evaluating(self.network):
                self.network(images)
        finally:
            hook.remove()
        return found[-1].float()

    def enable_cache(self, data: ViewData, where: bool | str, precision: str) -> None:
        """Cache the features of the training images; other heads can use a folder of them as well.

        Args:
            data: Data module with ``views``.
            where: Path of a folder; ``True`` for memory.
            precision: Precision of the trainer.

        Raises:
            UserError: If the folder contains other files, or features that were computed with other settings.
        """
        backbone = digest(self.network, without=self.name)
        fingerprint = {"network": backbone, **arithmetic(self.network, precision), **data.fingerprint()}
        folder = None if where is True else Path(str(where)).expanduser()
        rows, width = len(data.splits["train"].labels) * data.views_in_batch, self.head.in_features
        self.cache = OutputCache(rows, width, data.views, fingerprint, folder)

    def load_view(self, epoch: int, trainer: pl.Trainer, convert_input: Callable[[Tensor], Tensor]) -> None:
        """Load the view of an epoch into the cache; see :func:`load_view`."""
        assert self.cache is not None
        load_view(self.cache, epoch, trainer, lambda batch: self.compute(convert_input(batch.images)))
