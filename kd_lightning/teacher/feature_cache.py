"""The features of a network of which the last layer alone trains, computed once a view."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import evaluating
from kd_lightning.networks.head import head_of
from kd_lightning.teacher.fingerprint import arithmetic, digest
from kd_lightning.teacher.output_cache import OutputCache
from kd_lightning.teacher.view_cache import load_view


class FeatureCache:
    """What the last linear layer of a network gets of each training image, by ``ids``.

    Args:
        network: Of which nothing trains but its last ``nn.Linear``, which makes the logits.
        images: ``(B, channels, H, W)`` to try it on.

    Raises:
        ValueError: If another weight trains, or the logits are not what the last linear layer makes.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.network = network
        head = head_of(network)
        if head is None:
            raise UserError(f"{type(network).__name__} has no linear layer on top of features that could be kept.")
        self.name, self.head = head
        own = set(self.head.parameters())
        trained = [name for name, weight in network.named_parameters() if weight.requires_grad and weight not in own]
        if trained:
            raise UserError(
                f"Features change while {trained[0]!r} trains; add the callback FreezeLayers, or set "
                "feature_cache=False."
            )
        with torch.no_grad(), evaluating(network):
            logits = network(images)
            if not torch.allclose(self.head(self.of(images)), logits, rtol=1e-4, atol=1e-4):
                raise UserError(
                    f"What {type(network).__name__} says is not what its last linear layer {self.name!r} makes, so "
                    "its features cannot be kept; set feature_cache=False."
                )
        self.cache: OutputCache | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """The features ``(B, D)`` of training images in the view that is shown."""
        assert self.cache is not None
        return self.cache(ids)

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        """The features ``(B, D)`` of images."""
        found: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            with evaluating(self.network):
                self.network(images)
        finally:
            hook.remove()
        return found[-1].float()

    def keep(self, data: Any, where: bool | str, precision: str) -> None:
        """Keep them in memory, or in a folder that serves other heads."""
        made_by = {"network": digest(self.network, without=self.name), **arithmetic(self.network, precision)}
        fingerprint = {**made_by, **data.fingerprint()}
        folder = None if where is True else Path(str(where))
        count, width = len(data.splits["train"].labels), self.head.in_features
        self.cache = OutputCache(count, width, data.views, fingerprint, folder)

    def load_view(self, epoch: int, trainer: Any, convert_input: Callable[[Tensor], Tensor]) -> bool:
        """Show the view of an epoch, which is computed if it is not there."""
        assert self.cache is not None
        return load_view(self.cache, epoch, trainer, lambda images: self.of(convert_input(images)))
