"""A frozen teacher, run as it is, as a faster copy, or through its cached logits."""

from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kd_lightning.data.batch import images_for_teacher
from kd_lightning.data.protocol import ViewData
from kd_lightning.features import FeatureTap, Outputs, logits_of
from kd_lightning.networks.compiled import CompileMode, compile_in_place, unwrap_compiled
from kd_lightning.networks.copying import copy_network
from kd_lightning.networks.dry_run import check_initialized, input_dtype
from kd_lightning.networks.input_conversion import InputConversion
from kd_lightning.teacher.fingerprint import arithmetic, digest
from kd_lightning.teacher.folding import fold_batch_norms
from kd_lightning.teacher.output_cache import OutputCache, to_float16
from kd_lightning.teacher.unmoved_buffers import UnmovedBuffers
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
        compiled: Whether the network was wrapped by ``torch.compile``.
        convert_input: Converts images of the data module to the statistics that the teacher expects, and to the memory
            format that :meth:`prepare` has chosen.
        inference_network: The faster copy, after :meth:`optimize_for_inference`.
        folded: Whether that copy has folded batch norms.
        cache: The cached logits, after :meth:`enable_cache`.

    Example:
        >>> from kd_lightning.networks import resnet20
        >>> FrozenTeacher(resnet20(), ["layer3"])(torch.rand(2, 3, 32, 32)).features["layer3"].shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        network, self.compiled = unwrap_compiled(network)
        check_initialized(network)
        self.network = copy_network(network).eval()
        for weight in self.network.parameters():  # requires_grad_ is not there for TorchScript
            weight.requires_grad_(False)
        self.tap = FeatureTap(self.network, layers, role="teacher")
        self.convert_input = InputConversion()
        self.inference_network: nn.Module | None = None
        self.folded = False
        self.cache: OutputCache | None = None
        self._val_logits: dict[int, Tensor] = {}
        self._unmoved: list[UnmovedBuffers] = []

    @torch.no_grad()
    def __call__(self, images: Tensor, ids: Tensor | None = None) -> Outputs:
        """Return the teacher's outputs.

        Args:
            images: Images as the data module yields them, ``(B, channels, H, W)``.
            ids: Ids ``(B,)`` of training images, whose logits are read from the cache if there is one.
        """
        if self.cache is not None and ids is not None:
            return Outputs(self.cache(ids))
        network = self.network if self.inference_network is None else self.inference_network
        images = self.convert_input(images).to(input_dtype(network))
        try:
            if self.inference_network is None:
                return self.tap(images)
            return Outputs(logits_of(network(images), network).float())
        finally:
            for unmoved in self._unmoved:
                unmoved.restore()

    @torch.no_grad()
    def prepare(self, images: Tensor) -> None:
        """Choose the memory format, and find channels-last maps and buffers that would change, in a trial run.

        Args:
            images: Images as the data module yields them, ``(B, channels, H, W)``.
        """

        def forward() -> Outputs:
            return self.tap(self.convert_input(images).to(input_dtype(self.network)))

        def trial() -> None:
            self.convert_input.choose_memory_format(self.network, forward)
            if self.tap.layers:
                self.tap.find_channels_last(self.convert_input(images).to(input_dtype(self.network)))

        self._unmoved = []
        unmoved = UnmovedBuffers(self.network, trial)
        if unmoved:
            self._unmoved.append(unmoved)

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
        for unmoved in self._unmoved:
            unmoved.apply(function)

    def optimize_for_inference(
        self, images: Tensor, dtype: torch.dtype | None, compile: CompileMode | None, *, fixed_shapes: bool = False
    ) -> None:
        """Create a faster copy with folded batch norms, unless layers are read or weights are sharded.

        Args:
            images: Images on which the folded copy must agree with the network, ``(B, channels, H, W)``.
            dtype: Type of the copy's weights; ``None`` for the network's own.
            compile: Mode in which the copy is compiled; ``None`` for only if the network was.
            fixed_shapes: See :func:`compile_in_place`.
        """
        if self.tap.layers or any(isinstance(weight, DTensor) for weight in self.network.parameters()):
            return
        folded = self._fold(images)
        self.folded = folded is not None
        network = folded or copy_network(self.network)
        if self.convert_input.channels_last:
            network.to(memory_format=torch.channels_last)
        if dtype is not None and _can_be_cast(network):
            network.to(dtype)
        if (compile or self.compiled) and not isinstance(network, torch.jit.ScriptModule):
            compile_in_place(network, compile or "default", fixed_shapes=fixed_shapes)
        self.inference_network = network

    @torch.no_grad()
    def _fold(self, images: Tensor) -> nn.Module | None:
        folded = fold_batch_norms(self.network)
        if folded is None:
            return None
        images = self.convert_input.in_memory_format(images.to(input_dtype(self.network)))
        expected = logits_of(self.network(images), self.network)
        close = torch.allclose(folded(images), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        return folded if close else None

    def speed(self) -> list[str]:
        """Return how the teacher runs, and what would be faster."""
        if self.cache is not None:
            place = "memory" if self.cache.folder is None else str(self.cache.folder)
            return [f"the teacher runs once for each of {self.cache.views} views of an image (logits in {place})"]
        if self.tap.layers:
            return [f"the teacher runs in each step and unchanged, since losses read {', '.join(self.tap.layers)}"]
        dtype = str(input_dtype(self.inference_network or self.network)).removeprefix("torch.")
        return [
            f"the teacher runs in each step, in {dtype}, {'batch' if self.folded else 'no batch'} norms folded",
            "its logits are not cached (with views=V on the data module and teacher_cache=true it runs once a view)",
        ]

    def enable_cache(self, data: ViewData, classes: int, where: bool | str, precision: str) -> None:
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
        folder = None if where is True else Path(str(where)).expanduser()
        self._val_logits = {}
        rows = len(data.splits["train"].labels) * data.views_in_batch
        self.cache = OutputCache(rows, classes, data.views, fingerprint, folder)

    def load_view(self, epoch: int, trainer: pl.Trainer) -> None:
        """Load the view of an epoch into the cache; see :func:`load_view`."""
        assert self.cache is not None
        load_view(self.cache, epoch, trainer, lambda batch: self(images_for_teacher(batch)).logits)


def _can_be_cast(network: nn.Module) -> bool:
    """Return whether all of a network computes with real numbers: not int8 layers, nor complex weights."""
    quantized = any("quantized" in type(module).__module__ for module in network.modules())
    return not quantized and not any(weight.is_complex() for weight in network.parameters())
