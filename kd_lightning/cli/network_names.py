"""Short names of networks, ``timm/NAME`` and ``torchvision/NAME``, written out as a configuration names them."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from kd_lightning.errors import UserError
from kd_lightning.export.extra import require_extra
from kd_lightning.networks.data_config import truncate

Node = dict[str, Any]
"""A network in a configuration: ``class_path``, ``init_args`` and ``dict_kwargs``."""
_SHORT = re.compile(r"(timm|torchvision)/([^\s/@]+)(?:@([^\s/@]+))?")
_ANY_WEIGHTS = "pretrained"


def is_short_name(value: object) -> bool:
    """Return whether a value of a configuration is the short name of a network.

    Example:
        >>> is_short_name("timm/resnet10t@pretrained"), is_short_name("torchvision.models.resnet18")
        (True, False)
    """
    return isinstance(value, str) and bool(_SHORT.fullmatch(value))


def has_weights(name: str) -> bool:
    """Return whether a short name asks for published weights.

    Example:
        >>> has_weights("torchvision/resnet18@IMAGENET1K_V1"), has_weights("torchvision/resnet18")
        (True, False)
    """
    return "@" in name


def long_form(name: str, num_classes: int | None = None, *, keep_head: bool = False) -> Node:
    """Return a network of timm or torchvision as a configuration names it, with random or published weights.

    Args:
        name: ``timm/NAME`` or ``torchvision/NAME`` for random weights; ``NAME@pretrained``, or the name of published
            weights in its place: a tag of timm, a member of torchvision's enumeration.
        num_classes: Number of classes of its head; ``None`` for its own.
        keep_head: Leave the head of published weights as it is, where another function replaces it.

    Raises:
        UserError: If there is no such network or no such weights, which names near ones; or timm is not installed.

    Example:
        >>> long_form("torchvision/resnet18", 5)["dict_kwargs"]
        {'num_classes': 5}
        >>> long_form("torchvision/resnet18@pretrained", 5)["init_args"]["network"]["dict_kwargs"]
        {'weights': 'IMAGENET1K_V1'}
    """
    found = _SHORT.fullmatch(name)
    assert found is not None
    library, network, weights = found.groups()
    if library == "timm":
        return _timm(network, weights, num_classes)
    return _torchvision(network, weights, num_classes, keep_head)


def _timm(network: str, weights: str | None, num_classes: int | None) -> Node:
    timm = require_extra("timm", extra="timm")
    base, _, tag = network.partition(".")
    if not timm.is_model(base):
        raise UserError(f"timm has no network {base!r}{_near(base, timm.list_models())}.")
    tag = tag if weights in (None, _ANY_WEIGHTS) else str(weights)
    published = [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in published:
        raise UserError(f"timm publishes no weights {tag!r} for {base}{_choices(published)}.")
    if weights is not None and not (published or timm.list_pretrained(base)):
        raise UserError(f"timm publishes no weights for {base}; leave out @{weights} for random ones.")
    arguments = {"model_name": f"{base}.{tag}" if tag else base, "pretrained": weights is not None}
    further = {} if num_classes is None else {"dict_kwargs": {"num_classes": num_classes}}
    return {"class_path": "timm.create_model", "init_args": arguments, **further}


def _torchvision(network: str, weights: str | None, num_classes: int | None, keep_head: bool) -> Node:
    from torchvision import models

    names = models.list_models(module=models)
    if network not in names:
        raise UserError(f"torchvision has no classifier {network!r}{_near(network, names)}.")
    if weights is None:
        return _torchvision_node(network, {} if num_classes is None else {"num_classes": num_classes})
    published = models.get_model_weights(network)
    if weights == _ANY_WEIGHTS:
        weights = "DEFAULT"
    if weights not in published.__members__:
        raise UserError(f"torchvision publishes no weights {weights!r} for {network}{_choices(published.__members__)}.")
    chosen = published[weights]
    node = _torchvision_node(network, {"weights": chosen.name})
    if keep_head or num_classes in (None, len(chosen.meta["categories"])):
        return node
    return {
        "class_path": "kd_lightning.networks.replace_head",
        "init_args": {"network": node, "num_classes": num_classes},
    }


def _torchvision_node(network: str, arguments: dict[str, Any]) -> Node:
    # not the builder itself: defaults that are functions, as norm_layer of a ViT, cannot be written into a YAML file
    further = {"dict_kwargs": arguments} if arguments else {}
    return {"class_path": "torchvision.models.get_model", "init_args": {"name": network}, **further}


def published_classes(name: str) -> int | None:
    """Return the number of classes of the published weights that a short name asks for, ``None`` if not known.

    Example:
        >>> published_classes("torchvision/resnet18@pretrained")
        1000
    """
    node = long_form(name)
    if node["class_path"] == "timm.create_model":
        published = require_extra("timm", extra="timm").get_pretrained_cfg(node["init_args"]["model_name"])
        return None if published is None else int(published.num_classes)
    from torchvision.models import get_model_weights

    return len(get_model_weights(node["init_args"]["name"])[node["dict_kwargs"]["weights"]].meta["categories"])


def _near(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; near ones are {', '.join(near)}" if near else ""


def _choices(names: Iterable[str]) -> str:
    found = list(names)
    return f"; choose from: {truncate(found)}" if found else ""
