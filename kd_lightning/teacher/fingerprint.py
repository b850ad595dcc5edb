"""Digests of everything that decides the outputs of a network."""

import hashlib
import re

import torch
from torch import nn

from kd_lightning.networks import data_config
from kd_lightning.networks.placement import weight_device


def digest(network: nn.Module, without: str | None = None) -> str:
    """Return the SHA-256 of a network's architecture, settings, weights, buffers and expected input statistics.

    Args:
        network: Any network.
        without: Name of a submodule to leave out.
    """
    left_out = None if without is None else network.get_submodule(without)
    parts = [(data_config(part), *_settings(part)) for part in network.modules() if part is not left_out]
    text = str(network).replace(str(left_out), "") if left_out is not None else str(network)
    found = hashlib.sha256(re.sub(r" at 0x\w+", "", f"{text} {parts}").encode())
    for name, value in {**network.state_dict(), **dict(network.named_buffers())}.items():
        if without is None or not name.startswith(f"{without}."):
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def arithmetic(network: nn.Module, precision: str) -> dict[str, str]:
    """Return what decides how a network's outputs are rounded: the kind of device and the precision.

    Args:
        network: Network on the device where it runs.
        precision: Precision of the trainer.

    Example:
        >>> arithmetic(nn.Linear(2, 3), "32-true")
        {'device': 'cpu', 'precision': 'torch.float32 under 32-true'}
    """
    device = weight_device(network).type
    dtype = next((weight.dtype for weight in network.parameters()), torch.float32)
    products = f", {torch.get_float32_matmul_precision()} matrix products" if device == "cuda" else ""
    return {"device": device, "precision": f"{dtype} under {precision}{products}"}


def _settings(part: nn.Module) -> list[tuple[str, bool | int | float | str]]:
    plain = (bool, int, float, str)
    return [
        (name, value) for name, value in sorted(vars(part).items()) if isinstance(value, plain) and name != "training"
    ]
