"""A frozen teacher, run as it is, as a faster copy, or through its cached logits."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kd_lightning.features import FeatureTap, Outputs
from kd_lightning.networks.dry_run import check_initialized
from kd_lightning.teacher.fingerprint import arithmetic, digest
from kd_lightning.teacher.folding import fold_batch_norms
from kd_lightning.teacher.output_cache import OutputCache, to_float16
from kd_lightning.teacher.view_cache import load_view


class FrozenTeacher:
    """A frozen copy of a network, and the fastest way to its logits.

    It is not an ``nn.Module``, so that nothing that walks through a module finds the teacher: ``train()``, the
    optimizer, DDP, checkpoints, averages of the weights, pruning.

    Args:
        network: The teacher. It is not changed.
        layers: Names of the layers whose features are read.

    Attributes:
        network: The frozen copy.
        tap: Runs the copy and reads its layers.
        convert_input: Converts images of the data module to the statistics that the teacher expects.
        inference_network: The faster copy, after :meth:`optimize_for_inference`.
        folded: Whether that copy has folded batch norms.
        cache: The cached logits, after :meth:`enable_cache`.

    Example:
        >>> from kd_lightning.networks import resnet20
        >>> FrozenTeacher(resnet20(), ["layer3"])(torch.rand(2, 3, 32, 32)).features["layer3"].shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        check_initialized(network)
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.tap = FeatureTap(self.network, layers, role="teacher")
        self.convert_input: nn.Module = nn.Identity()
        self.inference_network: nn.Module | None = None
        self.folded = False
        self.cache: OutputCache | None = None
        self._val_logits: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, ids: Tensor | None = None) -> Outputs:
        """Return the teacher's outputs.

        Args:
            images: Images as the data module yields them, ``(B, channels, H, W)``.
            ids: Ids ``(B,)`` of training images, whose logits are read from the cache if there is one.
        """
        if self.cache is not None and ids is not None:
            return Outputs(self.cache(ids))
        images = self.convert_input(images)
        if self.inference_network is None:
            return self.tap(images)
        return Outputs(self.inference_network(images.to(_dtype(self.inference_network))).float())

    def cached_val_logits(self, batch_idx: int, images: Tensor) -> Tensor:
        """Return the logits ``(B, C)`` of a validation batch, which is the same in each epoch.

        Where logits are cached, the teacher runs in the first epoch only.

        Args:
            batch_idx: Number of the batch.
            images: Images of the batch, ``(B, channels, H, W)``.
        """
        if self.cache is None:
            return self(images).logits
        if batch_idx not in self._val_logits:
            self._val_logits[batch_idx] = to_float16(self(images).logits)
        return self._val_logits[batch_idx].float()

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function that moves or casts tensors to all weights and buffers, as ``nn.Module._apply`` does."""
        for part in (self.network, self.convert_input, self.inference_network):
            if part is not None:
                part._apply(function)

    def optimize_for_inference(self, images: Tensor, dtype: torch.dtype | None, compile: bool) -> None:
        """Create a faster copy with folded batch norms, unless layers are read or weights are sharded.

        Args:
            images: Images on which the folded copy must agree with the network, ``(B, channels, H, W)``.
            dtype: Type of the copy's weights; ``None`` for the network's own.
            compile: Compile the copy.
        """
        if self.tap.layers or any(isinstance(weight, DTensor) for weight in self.network.parameters()):
            return
        folded = self._fold(images)
        self.folded = folded is not None
        self.inference_network = (folded or copy.deepcopy(self.network)).to(memory_format=torch.channels_last)
        if dtype is not None:
            self.inference_network.to(dtype)
        if compile:
            self.inference_network.compile()

    @torch.no_grad()
    def _fold(self, images: Tensor) -> nn.Module | None:
        folded = fold_batch_norms(self.network)
        if folded is None:
            return None
        expected = self.network(images)
        close = torch.allclose(folded(images), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        return folded if close else None

    def speed(self) -> list[str]:
        """Return how the teacher runs, and what would be faster."""
        if self.cache is not None:
            place = "memory" if self.cache.folder is None else str(self.cache.folder)
            return [f"the teacher runs once for each of {self.cache.views} views of an image (logits in {place})"]
        if self.tap.layers:
            return [f"the teacher runs in each step and unchanged, since losses read {', '.join(self.tap.layers)}"]
        dtype = str(_dtype(self.inference_network or self.network)).removeprefix("torch.")
        return [
            f"the teacher runs in each step, in {dtype}, {'batch' if self.folded else 'no batch'} norms folded",
            "its logits are not cached (with views=V on the data module and teacher_cache=true it runs once a view)",
        ]

    def enable_cache(self, data: Any, classes: int, where: bool | str, precision: str) -> None:
        """Cache the logits of the training images.

        Args:
            data: Data module with ``views``.
            classes: Number of classes, C.
            where: Path of a folder; ``True`` for memory.
            precision: Precision of the trainer.

        Raises:
            UserError: If the folder contains other files, or logits that were computed with other settings.
        """
        network = self.inference_network or self.network
        fingerprint = {"teacher": digest(self.network), **arithmetic(network, precision), **data.fingerprint()}
        folder = None if where is True else Path(str(where))
        self._val_logits = {}
        self.cache = OutputCache(len(data.splits["train"].labels), classes, data.views, fingerprint, folder)

    def load_view(self, epoch: int, trainer: Any) -> None:
        """Load the view of an epoch into the cache; see :func:`load_view`."""
        assert self.cache is not None
        load_view(self.cache, epoch, trainer, lambda images: self(images).logits)


def _dtype(network: nn.Module) -> torch.dtype:
    return next((weight.dtype for weight in network.parameters()), torch.float32)
