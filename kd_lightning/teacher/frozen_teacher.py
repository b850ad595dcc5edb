"""How a teacher is asked: as it is, as a faster copy of it, or through its cached logits."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.fx import symbolic_trace
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd_lightning.features import FeatureTap, Outputs
from kd_lightning.networks.dry_run import check_initialized
from kd_lightning.teacher.fingerprint import arithmetic, digest
from kd_lightning.teacher.output_cache import OutputCache, halved
from kd_lightning.teacher.view_cache import load_view


class FrozenTeacher:
    """A frozen copy of a network, and the quickest way to its logits.

    Not an ``nn.Module``, so that nothing that walks over a module's parts meets the teacher: train(), the optimizer,
    DDP, checkpoints, averages of the weights, pruning.

    Args:
        network: The teacher. It stays as it is.
        layers: Names of its layers that are read.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        check_initialized(network)
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.tap = FeatureTap(self.network, layers, "teacher")
        self.convert_input: nn.Module = nn.Identity()
        self.quick: nn.Module | None = None
        self.folded = False
        self.cache: OutputCache | None = None
        self._validated: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, ids: Tensor | None = None) -> Outputs:
        """What it says of images as the data module gives them; of training images, by their ids, from the cache."""
        if self.cache is not None and ids is not None:
            return Outputs(self.cache(ids))
        images = self.convert_input(images)
        if self.quick is None:
            return self.tap(images)
        return Outputs(self.quick(images.to(_dtype(self.quick))).float())

    def cached_val_logits(self, batch_idx: int, images: Tensor) -> Tensor:
        """What it says of a batch that is the same in each epoch: asked once, where logits are cached."""
        if self.cache is None:
            return self(images).logits
        if batch_idx not in self._validated:
            self._validated[batch_idx] = halved(self(images).logits)
        return self._validated[batch_idx].float()

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply what moves a module to a device or a type."""
        for part in (self.network, self.convert_input, self.quick):
            if part is not None:
                part._apply(function)

    def optimize_for_inference(self, images: Tensor, dtype: torch.dtype | None, compile: bool) -> None:
        """Make a copy with batch norms folded into the convolutions before them, in a type, where no layer is read.

        Args:
            images: On which the copy must say what the network says.
            dtype: ``None`` for the network's own.
            compile: Whether the copy is compiled.
        """
        # of weights that lie in pieces on several devices there is no copy
        if self.tap.layers or any(isinstance(weight, DTensor) for weight in self.network.parameters()):
            return
        folded = _folded(self.network, images)
        self.folded = folded is not None
        self.quick = (folded or copy.deepcopy(self.network)).to(memory_format=torch.channels_last)
        if dtype is not None:
            self.quick.to(dtype)
        if compile:
            self.quick.compile()

    def speed(self) -> list[str]:
        """How it is asked, and how it could be."""
        if self.cache is not None:
            place = "memory" if self.cache.folder is None else str(self.cache.folder)
            return [f"the teacher is asked once about each of {self.cache.views} views of an image (logits in {place})"]
        if self.tap.layers:
            return [f"the teacher is asked in each step as it is, since losses read {', '.join(self.tap.layers)}"]
        folded = "batch norms folded" if self.folded else "no batch norm folded"
        return [
            f"the teacher is asked in each step, in {_dtype(self.quick or self.network)}, {folded}".replace(
                "torch.", ""
            ),
            "its logits are not cached (views=V on the data module and teacher_cache=true ask it once a view)",
        ]

    def enable_cache(self, data: Any, classes: int, where: bool | str, precision: str) -> None:
        """Cache the logits of the training images.

        Args:
            data: A data module with ``views``.
            classes: C.
            where: The path of a folder; ``True`` for memory.
            precision: The trainer's.
        """
        made_by = {"teacher": digest(self.network), **arithmetic(self.quick or self.network, precision)}
        fingerprint = {**made_by, **data.fingerprint()}
        folder = None if where is True else Path(str(where))
        self._validated = {}
        self.cache = OutputCache(len(data.splits["train"].labels), classes, data.views, fingerprint, folder)

    def load_view(self, epoch: int, trainer: Any) -> bool:
        """Have the view of an epoch in the cache, asking the teacher about each training image if it is not there."""
        assert self.cache is not None
        return load_view(self.cache, epoch, trainer, lambda images: self(images).logits)


@torch.no_grad()
def _folded(network: nn.Module, images: Tensor) -> nn.Module | None:
    with suppress(Exception):  # whatever a network's code does that cannot be traced: it is used as it is
        folded = _fused(copy.deepcopy(network))
        expected = network(images)
        if folded is not None and torch.allclose(
            folded(images), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        ):
            return folded
    return None


def _fused(network: nn.Module) -> nn.Module | None:
    """Each batch norm that alone reads a convolution, which runs once, goes into it; nothing if there is none."""
    traced = symbolic_trace(network)
    found = False
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        before: Any = node.args[0] if node.op == "call_module" and node.args else None
        if getattr(before, "op", None) != "call_module" or len(before.users) > 1 or calls[before.target] > 1:
            continue
        conv, norm = traced.get_submodule(before.target), traced.get_submodule(node.target)
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            traced.set_submodule(before.target, fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
            found = True
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval() if found else None


def _dtype(network: nn.Module) -> torch.dtype:
    return next((weight.dtype for weight in network.parameters()), torch.float32)
