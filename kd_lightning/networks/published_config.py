"""The input that published weights expect, as timm and torchvision describe it."""

import math
import sys
from pathlib import Path
from typing import Any

from torch import nn

from kd_lightning.files.prepare import RESAMPLING, Preparation
from kd_lightning.networks.data_config import DataConfig


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
    first = next((weight for weight in network.parameters() if weight.dim() == 4), None)
    if first is not None and found.mean is not None and first.shape[1] != len(found.mean):
        return DataConfig()  # built for other channels
    return found._replace(classes=_imagenet_classes(published, getattr(network, "num_classes", None)))


def read_timm_config(pretrained_cfg: dict[str, Any]) -> DataConfig:
    """Return the statistics and the preparation of one of timm's pretrained configurations.

    Args:
        pretrained_cfg: The configuration as plain data, ``network.pretrained_cfg``.
    """
    resolved = sys.modules["timm.data"].resolve_data_config(pretrained_cfg=pretrained_cfg, use_test_size=True)
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
    return DataConfig.of(resolved["mean"], resolved["std"], preparation=preparation)


def torchvision_config(weights: Any) -> DataConfig:
    """Return what published weights of torchvision expect.

    Args:
        weights: A member of one of torchvision's enumerations of classification weights.

    Example:
        >>> from torchvision.models import ResNet50_Weights
        >>> torchvision_config(ResNet50_Weights.IMAGENET1K_V2).preparation[:2]
        ((224, 224), (232, 232))
    """
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
    if not name.endswith(".pth") or "-" not in name:
        return DataConfig()
    from torchvision.models import get_model_weights, list_models
    from torchvision.transforms._presets import ImageClassification

    for model in list_models():
        for weights in get_model_weights(model):
            is_classifier = getattr(weights.transforms, "func", None) is ImageClassification
            if is_classifier and weights.url.rpartition("/")[2] == name:
                return torchvision_config(weights)
    return DataConfig()


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
    arguments = node.get("init_args") or {}
    module, _, name = str(node.get("class_path")).rpartition(".")
    weights = arguments.get("weights")
    if module.startswith("torchvision.models") and weights is not None:
        from torchvision.models import get_model_weights

        member = weights if not isinstance(weights, str) else get_model_weights(name)[weights.rpartition(".")[2]]
        return torchvision_config(member)
    inner = arguments.get("network")
    return DataConfig() if inner is None else named_weights(inner)


def is_trained(network: nn.Module) -> bool:
    """Return whether the weights of a network are other than random: a normalization is not in its initial state.

    Of a network without normalizations that is not known, and it counts as trained.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> before = is_trained(network)
        >>> _ = network(torch.rand(2, 3, 8, 8))
        >>> before, is_trained(network)
        (False, True)
    """
    normalizations = [module for module in network.modules() if "norm" in type(module).__name__.lower()]
    values = [
        value
        for module in normalizations
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if name in ("weight", "bias", "running_mean", "running_var") and not value.is_meta
    ]
    return not values or any(bool(((value != 0) & (value != 1)).any()) for value in values)


def _imagenet_classes(published: dict[str, Any], num_classes: int | None) -> tuple[str, ...] | None:
    """Return the class names of a network of timm that was published for a subset of ImageNet."""
    data = sys.modules["timm.data"]
    tag = str(published.get("tag") or "")
    subset = data.infer_imagenet_subset(published)
    if subset is None or num_classes != published.get("num_classes"):
        return None
    if not tag.rpartition("_")[2].startswith("in"):
        return None
    return tuple(data.ImageNetInfo(subset).label_descriptions())
