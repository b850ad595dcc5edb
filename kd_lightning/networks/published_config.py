"""The input that published weights expect, as timm and torchvision describe it."""

import math
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd_lightning.files.prepare import RESAMPLING, Preparation
from kd_lightning.networks.data_config import DataConfig

_IMAGENETS = {"in1k", "in12k", "in21k", "in22k"}
"""Parts of the tags with which timm names ImageNet and its larger versions."""


def timm_config(network: nn.Module) -> DataConfig:
    """Return what a trained network of timm expects, by its ``pretrained_cfg``; ``None`` in all fields for others.

    Images are prepared as by ``create_transform(**resolve_data_config(model=network, use_test_size=True))``.
    timm is not imported for that: a network of its can only exist where it is.
    """
    data = sys.modules.get("timm.data")
    published = getattr(network, "pretrained_cfg", None)
    if data is None or not isinstance(published, dict) or not is_trained(network):
        return DataConfig()
    found = read_timm_config(published)
    if found.mean is None or not _takes_channels(network, published, len(found.mean)):
        return DataConfig()  # built for other channels
    embedding: Any = getattr(network, "patch_embed", None)
    if getattr(embedding, "strict_img_size", False) and found.preparation is not None:
        size = embedding.img_size or found.preparation.size
        found = found._replace(preparation=found.preparation.at(size), train_size=None)
    return found._replace(classes=_timm_classes(published, getattr(network, "num_classes", None)))


def read_timm_config(pretrained_cfg: dict[str, Any]) -> DataConfig:
    """Return the statistics and the sizes of one of timm's pretrained configurations.

    Args:
        pretrained_cfg: The configuration as plain data, ``network.pretrained_cfg``.
    """
    resolve = sys.modules["timm.data"].resolve_data_config
    trained, resolved = (resolve(pretrained_cfg=pretrained_cfg, use_test_size=test) for test in (False, True))
    _, height, width = resolved["input_size"]
    resize = tuple(math.floor(side / resolved["crop_pct"]) for side in (height, width))
    mode = resolved["crop_mode"] if resolved["crop_mode"] in ("squash", "border") else "center"
    preparation = Preparation.of(
        (height, width),
        (resize[0], resize[1]),
        mode=mode,
        interpolation=resolved["interpolation"] if resolved["interpolation"] in RESAMPLING else "bicubic",
        fill=tuple(round(255 * value) for value in resolved["mean"]),
    )
    train_size = tuple(trained["input_size"][1:])
    other = None if train_size == preparation.size else train_size
    return DataConfig.of(resolved["mean"], resolved["std"], preparation=preparation, train_size=other)


def torchvision_config(weights: Any) -> DataConfig:
    """Return what published weights of torchvision expect, ``None`` in all fields for other than classifiers.

    Args:
        weights: A member of one of torchvision's enumerations of weights, such as ``ResNet50_Weights.DEFAULT``.

    Example:
        >>> from torchvision.models import ResNet50_Weights
        >>> torchvision_config(ResNet50_Weights.IMAGENET1K_V2).preparation[:2]
        ((224, 224), (232, 232))
    """
    from torchvision.transforms._presets import ImageClassification

    if getattr(weights.transforms, "func", None) is not ImageClassification:
        return DataConfig()
    transform = weights.transforms()
    preparation = Preparation.of(
        transform.crop_size[0], transform.resize_size[0], interpolation=transform.interpolation.value
    )
    return DataConfig.of(transform.mean, transform.std, weights.meta.get("categories"), preparation)


def torchvision_config_of_file(path: str | Path) -> DataConfig:
    """Return what the published file of this name expects, ``None`` in all fields if torchvision publishes none.

    Example:
        >>> torchvision_config_of_file("downloads/resnet50-11ad3fa6.pth").mean
        (0.485, 0.456, 0.406)
    """
    name = Path(path).name
    if not re.search(r"[-_][0-9a-f]{8,}\.pth$", name):
        return DataConfig()
    from torchvision.models import get_model_weights, list_models

    published = (weights for model in list_models() for weights in get_model_weights(model))
    found = next((weights for weights in published if weights.url.rpartition("/")[2] == name), None)
    return DataConfig() if found is None else torchvision_config(found)


def named_weights(node: Any) -> DataConfig:
    """Return what the weights expect that a network's configuration names, ``None`` in all fields if it names none.

    Args:
        node: ``{"class_path": ..., "init_args": ...}`` of a network, or of a function around one.

    Example:
        >>> resnet = {"class_path": "torchvision.models.resnet18", "init_args": {"weights": "DEFAULT"}}
        >>> named_weights({"class_path": "kd_lightning.networks.replace_head", "init_args": {"network": resnet}}).std
        (0.229, 0.224, 0.225)
    """
    if not hasattr(node, "get"):
        return DataConfig()
    arguments, further = node.get("init_args") or {}, node.get("dict_kwargs") or {}
    module, _, function = str(node.get("class_path")).rpartition(".")
    weights = arguments.get("weights", further.get("weights"))
    if module.startswith("torchvision.models") and weights is not None:
        from torchvision.models import get_model_weights

        if isinstance(weights, str):
            builder = arguments.get("name") or getattr(import_module(module), function)
            weights = get_model_weights(builder)[weights.rpartition(".")[2]]
        return torchvision_config(weights)
    replaced = function == "from_checkpoint"  # by those of a file
    inner = arguments.get("network")
    return DataConfig() if inner is None or replaced else named_weights(inner)


def is_trained(network: nn.Module) -> bool:
    """Return whether the weights of a network are other than random: a normalization is not in its initial state.

    A network without normalizations counts as trained if it has a bias other than 0, or no bias.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> before = is_trained(network)
        >>> _ = network(torch.rand(2, 3, 8, 8))
        >>> before, is_trained(network)
        (False, True)
    """
    values = [value for module in network.modules() if _is_normalization(module) for value in _state(module)]
    if values:
        return any(bool(((value != 0) & (value != 1)).any()) for value in values)
    biases = [value for name, value in network.named_parameters() if name.endswith("bias") and not value.is_meta]
    return not biases or any(bool((value != 0).any()) for value in biases)


def _is_normalization(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "norm" in name or name == "affine"  # which ResMLP has in place of normalizations


def _state(normalization: nn.Module) -> list[Tensor]:
    """Return the running statistics of a normalization, or else its weights."""
    own = dict(normalization.named_parameters(recurse=False)) | dict(normalization.named_buffers(recurse=False))
    names = ("running_mean", "running_var") if "running_mean" in own else ("weight", "bias", "alpha", "beta")
    return [own[name] for name in names if name in own and not own[name].is_meta]


def _takes_channels(network: nn.Module, published: dict[str, Any], channels: int) -> bool:
    """Return whether the first layer of a network of timm takes images of so many channels, or squares of pixels."""
    names = published.get("first_conv") or ()
    modules = dict(network.named_modules())
    first = modules.get(names if isinstance(names, str) else next(iter(names), ""))
    inputs = getattr(first, "in_channels", getattr(first, "in_features", getattr(network, "in_chans", channels)))
    return inputs % channels == 0 and math.isqrt(inputs // channels) ** 2 == inputs // channels


def _timm_classes(published: dict[str, Any], num_classes: int | None) -> tuple[str, ...] | None:
    """Return the class names that a network of timm was published with, or those of its subset of ImageNet."""
    if not num_classes or num_classes != published.get("num_classes"):
        return None
    labels, described = published.get("label_names") or (), published.get("label_descriptions") or {}
    if len(labels) == num_classes:
        return tuple(str(described.get(label, label)) for label in labels)
    subset = sys.modules["timm.data"].infer_imagenet_subset(published)
    trained_on = _IMAGENETS.intersection(str(published.get("tag") or "").split("_"))
    return _imagenet_classes(subset) if subset is not None and trained_on else None


@cache
def _imagenet_classes(subset: str) -> tuple[str, ...]:
    """Return the names of timm, or those of torchvision for the 1,000 classes, where timm has two called crane."""
    if subset == "imagenet-1k":
        from torchvision.models import ResNet18_Weights

        return tuple(ResNet18_Weights.DEFAULT.meta["categories"])
    return tuple(sys.modules["timm.data"].ImageNetInfo(subset).label_descriptions())
