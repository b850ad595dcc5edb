"""Weights from files: ours and those that others publish; a file is data and never code."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.files.format import check_format
from kd_lightning.files.read import read_checkpoint
from kd_lightning.networks.channel_slicing import slice_to
from kd_lightning.networks.data_config import DataConfig, truncate


def from_checkpoint(
    network: nn.Module,
    path: str | Path,
    rename: Mapping[str, str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layers: Mapping[str, str] | None = None,
) -> nn.Module:
    """Fill a network with the weights of a file and return it.

    The network is filled in place. What the file says of the training data (input statistics, class names) is kept
    as ``network.data_config``; a module that holds the network re-normalises its input by it.

    Args:
        network: A network of the architecture that was saved.
        path: A checkpoint of this package, or any published state dict (``.ckpt .pt .pth .th .safetensors``), bare or
            under ``state_dict`` or ``model``; the prefixes ``module.`` and ``network.`` are dropped.
        rename: Spellings to replace at the start of the file's keys, for example ``{"linear.": "fc."}``.
        mean: Of a file that does not say it: the mean per channel that the network was trained with.
        std: The same for the standard deviation.
        layers: For a student that begins with some of the layers of a deeper teacher: parts of the network by name,
            with the parts of the file's network that they take their weights from, as ``{"layer1.1": "layer1.4"}``.
            Other parts take those of their own name; what none takes is left in the file.
            V. Sanh et al.: DistilBERT, 2019, https://arxiv.org/abs/1910.01108, section 3

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, carries code, or does not fit the network (one message lists the missing,
            unexpected and mis-shaped keys).

    Example:
        >>> import tempfile, torch
        >>> from kd_lightning.networks import resnet20
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(resnet20().state_dict(), f"{folder}/weights.pt")
        ...     network = from_checkpoint(resnet20(), f"{folder}/weights.pt")
    """
    declared = DataConfig.of(mean, std)
    content = read_checkpoint(path)
    check_format(content, path)
    if isinstance(content.get("sliced_shapes"), dict):  # a pruned network's
        slice_to(network, content["sliced_shapes"])
    weights = _state_dict(content, rename or {}, path, wanted=set(network.state_dict()))
    if layers is not None:
        weights = _taken_from(weights, layers, network)
    known = _declared_in(content, path)
    if differing := state_dict_mismatch(network, weights):
        raise UserError(
            f"{str(path)!r} does not fit {type(network).__name__} ({differing}); build the network that was saved, "
            "or map spellings with rename={'old.': 'new.'}."
        )
    network.load_state_dict(weights)
    # a plain attribute, so that it is copied along and stays out of the state dict
    network.data_config = known if declared.mean is None else declared._replace(classes=known.classes)  # type: ignore[assignment]
    return network


def _taken_from(weights: dict[str, Tensor], layers: Mapping[str, str], network: nn.Module) -> dict[str, Tensor]:
    """Those that a network of fewer layers takes, under its own names."""
    unknown = [name for name in layers if name not in dict(network.named_modules())]
    if unknown:
        raise UserError(f"layers names {unknown[0]!r}, which {type(network).__name__} has not.")

    def source(key: str) -> str:
        part = max((name for name in layers if key.startswith(f"{name}.")), key=len, default=None)
        return key if part is None else layers[part] + key.removeprefix(part)

    return {key: weights[source(key)] for key in network.state_dict() if source(key) in weights}


def _declared_in(content: dict[str, Any], path: str | Path) -> DataConfig:
    try:
        return DataConfig.of(**content.get("data_config", {}))
    except TypeError as error:
        raise UserError(f"'data_config' in {str(path)!r} must hold mean, std and classes alone.") from error


def _state_dict(
    content: dict[str, Any], rename: Mapping[str, str], path: str | Path, wanted: set[str]
) -> dict[str, Tensor]:
    ours = "pytorch-lightning_version" in content
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not weights:
        raise UserError(f"{str(path)!r} holds no weights, neither bare nor under 'state_dict' or 'model'.")
    if ours and any(key.startswith("network.") for key in weights):  # beside it: the learned parts of losses
        weights = {key: value for key, value in weights.items() if key.startswith("network.")}
    if set(weights) == wanted:  # a network may have a part of its own that is called network or module
        return weights
    spelled = {_spelling(key, rename): value for key, value in weights.items()}
    if len(spelled) < len(weights):
        raise UserError(f"Two keys of {str(path)!r} become the same without their prefix; mend `rename`.")
    return spelled


def _spelling(key: str, rename: Mapping[str, str]) -> str:
    for prefix in ("network.", "_orig_mod.", "module."):
        key = key.removeprefix(prefix)
    for old, new in rename.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def state_dict_mismatch(network: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Which keys of a state dict are missing, unexpected, of another shape or kind; empty if none."""
    wanted = network.state_dict()
    shapes = [
        f"{key} is {tuple(weights[key].shape)} in the file and {tuple(wanted[key].shape)} in the network"
        for key in wanted
        if key in weights and wanted[key].shape != weights[key].shape
    ]
    # a file from before PyTorch 0.4.1 has no batch counters; they do not change what a network says
    missing = [key for key in wanted if key not in weights and not key.endswith("num_batches_tracked")]
    problems = {
        "missing": missing,
        "unexpected": [key for key in weights if key not in wanted],
        "of another shape": shapes,
        "of another kind": [key for key in wanted if key in weights and _other_kind(weights[key], wanted[key])],
    }
    return "; ".join(f"{what}: {truncate(keys)}" for what, keys in problems.items() if keys)


def _other_kind(value: Tensor, wanted: Tensor) -> bool:
    """Whether it cannot be copied as it is: complex numbers would lose a part, the others be refused half-way."""
    lost = value.is_complex() and not wanted.is_complex()
    return lost or value.is_meta or value.is_quantized != wanted.is_quantized or value.layout != wanted.layout


@contextmanager
def check_fits(module: nn.Module, state_dict: Mapping[str, Any]) -> Iterator[None]:
    """Turn torch's error on a state dict of another module into one sentence.

    Raises:
        UserError: If keys are missing or unexpected, or shapes differ.
    """
    try:
        yield
    except RuntimeError as error:
        if differing := state_dict_mismatch(module, state_dict):
            raise UserError(
                f"The checkpoint does not fit this {type(module).__name__} ({differing}); build the network and the "
                "losses that were saved."
            ) from error
        raise
