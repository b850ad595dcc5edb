"""The names that published benchmarks give to the layers of the same networks."""

import re
from collections.abc import Iterable

_MOBILENET = {0: "1.0", 1: "1.1", 2: "2.0", 3: "3.0", 4: "3.1", 5: "4.0", 6: "4.1"}
"""Groups of equal blocks in MobileNetV2, which are parts of our four layers."""


def published_names(keys: Iterable[str], wanted: set[str]) -> dict[str, str]:
    """Return our names of published keys, where these are all of a network's; else the keys themselves.

    They are those of RepDistiller (https://github.com/HobbitLong/RepDistiller) and mdistiller
    (https://github.com/megvii-research/mdistiller), whose teachers for CIFAR-100 are published.

    Args:
        keys: Keys of a state dict.
        wanted: Keys of the network's own state dict.

    Example:
        >>> published_names(["block2.layer.0.convShortcut.weight"], {"layer2.0.downsample.weight"})
        {'block2.layer.0.convShortcut.weight': 'layer2.0.downsample.weight'}
        >>> published_names(["linear.weight"], {"head.weight"})
        {'linear.weight': 'linear.weight'}
    """
    names = {key: _our_name(key) for key in keys}
    absent = {key for key in wanted - set(names.values()) if not key.endswith("num_batches_tracked")}
    fits = len(set(names.values())) == len(names) and set(names.values()) <= wanted and not absent
    return names if fits else {key: key for key in names}


def _our_name(key: str) -> str:
    key = re.sub(r"^block(\d)\.layer\.", r"layer\1.", key)  # wide ResNets
    key = re.sub(r"^block(\d)\.", lambda found: f"layer{int(found[1]) + 1}.", key)  # VGG
    key = re.sub(r"^blocks\.([0-6])\.", lambda found: f"layer{_MOBILENET[int(found[1])]}.", key)
    key = re.sub(r"\.(convShortcut|shortcut)\.", ".downsample.", key)
    return re.sub(r"^(linear|classifier\.0|classifier)\.", "fc.", key)
