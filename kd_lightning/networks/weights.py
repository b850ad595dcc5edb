"""Loading of weights from our checkpoints and from published files."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.files.format import check_format
from kd_lightning.files.read import read_checkpoint
from kd_lightning.networks.channel_slicing import slice_to
from kd_lightning.networks.data_config import DataConfig, set_data_config, truncate
from kd_lightning.networks.output_layers import output_layers
from kd_lightning.networks.published_config import torchvision_config_of_file
from kd_lightning.networks.published_names import published_names


def from_checkpoint(
    network: nn.Module,
    path: str | Path,
    *,
    rename: Mapping[str, str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layers: Mapping[str, str] | None = None,
    entry: str | None = None,
    data_config: DataConfig | None = None,
) -> nn.Module:
    """Load the weights of a file into a network, in place, and return it.

    What the file says of the network's input, or torchvision of a published file of this name, is attached to the
    network (see :func:`data_config`): statistics, class names, size and crop. A module that contains the network
    converts its input accordingly.

    Args:
        network: Network of the saved architecture.
        path: Path of a checkpoint of this package, or of any published state dict (``.ckpt .pt .pth .th
            .safetensors``), bare or in one of its entries (``state_dict`` or ``model``, usually); the prefixes
            ``module.`` and ``network.`` are dropped, and the layer names of RepDistiller and mdistiller are known.
        rename: Spellings to replace at the start of the file's keys, for example ``{"linear.": "fc."}``.
        mean: Mean per channel that the network was trained with, for files that do not contain it.
        std: Standard deviation per channel, likewise.
        layers: For a student that starts from some layers of a deeper teacher: names of parts of the network, and of
            the parts of the saved network that provide their weights, as ``{"layer1.1": "layer1.4"}``. Other parts get
            those of the same name; all other weights of the file are ignored.
            V. Sanh et al.: DistilBERT, 2019, https://arxiv.org/abs/1910.01108, section 3
        entry: Name of the entry of the file that holds the weights, for files with several, for example
            ``"state_dict_ema"``.
        data_config: Statistics, class names, size and crop in place of those that the file contains; see
            :func:`torchvision_config`.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If statistics are given twice, or the file is damaged, contains code, or does not fit the network
            (one message lists the missing, unexpected and mis-shaped keys).

    Example:
        >>> import tempfile, torch
        >>> from kd_lightning.networks import resnet20
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(resnet20().state_dict(), f"{folder}/weights.pt")
        ...     network = from_checkpoint(resnet20(), f"{folder}/weights.pt")
    """
    declared = DataConfig() if data_config is None else data_config
    if mean is not None or std is not None:
        if declared.mean is not None:
            raise UserError("Give mean and std, or a data_config that contains them; not both.")
        declared = DataConfig.of(mean, std, *declared[2:])
    content = read_checkpoint(path)
    check_format(content, path)
    if isinstance(content.get("sliced_shapes"), dict):
        slice_to(network, content["sliced_shapes"])
    weights = _rename(_find_weights(content, path, entry), rename or {}, path, wanted=set(network.state_dict()))
    if layers is not None:
        weights = _select_layers(weights, layers, network)
    known = _saved_data_config(content, path)
    if differing := state_dict_mismatch(network, weights):
        if counts := _other_classes(network, weights):
            raise UserError(
                f"{str(path)!r} has weights for {counts[0]} classes and {type(network).__name__} was built for "
                f"{counts[1]}; name a file that was trained on these classes, or load it into a network of {counts[0]} "
                "and give that a new head with replace_head."
            )
        raise UserError(
            f"{str(path)!r} does not fit {type(network).__name__} ({differing}); build the network that was saved, "
            "or map spellings with rename={'old.': 'new.'}."
        )
    network.load_state_dict(weights)
    if known == DataConfig():
        known = torchvision_config_of_file(path)
    given = {name: value for name, value in declared._asdict().items() if value is not None}
    if declared.preparation is not None:
        given["train_size"] = declared.train_size  # both sizes are of one configuration
    set_data_config(network, known._replace(**given))
    return network


def _find_weights(content: dict[str, Any], path: str | Path, entry: str | None) -> dict[str, Tensor]:
    """Return the tensors of a state dict, wherever the file keeps it."""
    weights = _tensors(content)
    entries = {key: _tensors(value) for key, value in content.items() if isinstance(value, dict)}
    if "pytorch-lightning_version" in content and "state_dict" in entries:
        entries.pop("current_model_state", None)  # beside an average of the weights, which is what was validated
    names = [name for name, tensors in entries.items() if tensors]
    if entry is not None and entry not in names:
        listed = ", ".join(map(repr, names)) or "nothing"
        raise UserError(f"{str(path)!r} has no weights under {entry!r}; choose from: {listed}.")
    if entry is not None or not weights or {"state_dict", "model"} & set(names):
        weights = entries[entry or _choose_entry(entries, names, path)]
    if "pytorch-lightning_version" in content:  # other keys are the learned parts of losses
        return {key: value for key, value in weights.items() if key.startswith("network.")} or weights
    return weights


def _tensors(values: Mapping[str, object]) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _choose_entry(entries: Mapping[str, dict[str, Tensor]], names: list[str], path: str | Path) -> str:
    """Return the usual entry of a file for its weights, and warn if others have weights of the same network."""
    if not names:
        raise UserError(f"{str(path)!r} does not contain weights, neither bare nor under 'state_dict' or 'model'.")
    usual = [name for name in ("state_dict", "model") if name in names]
    if len(names) > 1 and not usual:
        listed = ", ".join(map(repr, names))
        raise UserError(f"{str(path)!r} has weights under {listed}; choose one of them with entry=.")
    chosen = usual[0] if usual else names[0]
    keys = {name: {_spelling(key, {}) for key in entries[name]} for name in names}
    others = ", ".join(repr(name) for name in names if name != chosen and keys[name] & keys[chosen])
    if others:
        warnings.warn(
            f"{str(path)!r} has weights under {chosen!r}, which are loaded, and under {others}; choose with entry=.",
            stacklevel=4,
        )
    return chosen


def _rename(
    weights: dict[str, Tensor], rename: Mapping[str, str], path: str | Path, wanted: set[str]
) -> dict[str, Tensor]:
    """Return the weights under the names of the network."""
    if set(weights) == wanted:  # a network may have a part of its own that is called network or module
        return weights
    renamed = {_spelling(key, rename): value for key, value in weights.items()}
    if len(renamed) < len(weights):
        raise UserError(f"Two keys of {str(path)!r} become the same without their prefix; fix `rename`.")
    names = published_names(renamed, wanted)
    return {names[key]: value for key, value in renamed.items()}


def _spelling(key: str, rename: Mapping[str, str]) -> str:
    for prefix in ("network.", "_orig_mod.", "module."):
        key = key.removeprefix(prefix)
    for old, new in rename.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _select_layers(weights: dict[str, Tensor], layers: Mapping[str, str], network: nn.Module) -> dict[str, Tensor]:
    """Return the weights for a network of fewer layers, under its names."""
    unknown = [name for name in layers if name not in dict(network.named_modules())]
    if unknown:
        raise UserError(f"layers names {unknown[0]!r}, which {type(network).__name__} does not have.")

    def source(key: str) -> str:
        part = max((name for name in layers if key.startswith(f"{name}.")), key=len, default=None)
        return key if part is None else layers[part] + key.removeprefix(part)

    return {key: weights[source(key)] for key in network.state_dict() if source(key) in weights}


def _saved_data_config(content: dict[str, Any], path: str | Path) -> DataConfig:
    try:
        return DataConfig.of(**(_exported_data_config(path) or content.get("data_config", {})))
    except TypeError as error:
        raise UserError(
            f"'data_config' in {str(path)!r} must contain only mean, std, classes, preparation, train_size and "
            "thresholds."
        ) from error


def _exported_data_config(path: str | Path) -> dict[str, Any]:
    """Return the configuration in the metadata of an exported ``.safetensors`` file, empty for other files."""
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    known: dict[str, Any] = json.loads(metadata.get("data_config", "{}")) if "kd_lightning" in metadata else {}
    return known


def _other_classes(network: nn.Module, weights: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the classes of a file and of the network, if they differ in nothing but the rows of the head."""
    wanted = network.state_dict()
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}
    if set(wanted) - set(weights) - counters or set(weights) - set(wanted):
        return None
    shapes = {key: (weights[key].shape, value.shape) for key, value in wanted.items() if key in weights}
    differing = {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}
    rows = {(saved[:1], built[:1]) for saved, built in differing.values()}
    rest_is_equal = all(saved[1:] == built[1:] for saved, built in differing.values())
    if (
        not rest_is_equal
        or len(rows) != 1
        or not {key.rpartition(".")[0] for key in differing} <= set(output_layers(network))
    ):
        return None
    ((saved, built),) = rows
    return (saved[0], built[0]) if saved and built else None


def state_dict_mismatch(network: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Return which keys of a state dict are missing, unexpected, of another shape or kind; empty if none."""
    wanted = network.state_dict()
    shapes = [
        f"{key} is {tuple(weights[key].shape)} in the file and {tuple(wanted[key].shape)} in the network"
        for key in wanted
        if key in weights and wanted[key].shape != weights[key].shape
    ]
    # a file from before PyTorch 0.4.1 has no batch counters; they do not change a network's output
    missing = [key for key in wanted if key not in weights and not key.endswith("num_batches_tracked")]
    problems = {
        "missing": missing,
        "unexpected": [key for key in weights if key not in wanted],
        "of another shape": shapes,
        "of another kind": [key for key in wanted if key in weights and _other_kind(weights[key], wanted[key])],
    }
    return "; ".join(f"{what}: {truncate(keys)}" for what, keys in problems.items() if keys)


def _other_kind(value: Tensor, wanted: Tensor) -> bool:
    """Return whether a tensor cannot be copied: complex numbers would lose a part, the others fail half-way."""
    lost = value.is_complex() and not wanted.is_complex()
    return lost or value.is_meta or value.is_quantized != wanted.is_quantized or value.layout != wanted.layout


@contextmanager
def check_fits(module: nn.Module, state_dict: Mapping[str, Tensor]) -> Iterator[None]:
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
