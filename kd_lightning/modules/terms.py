"""The named terms of an objective: what names they may have, and how their learned parts come about."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from kd_lightning.features import Outputs
from kd_lightning.losses import DistillationLoss

_LOGGED = {"loss", "loss_step", "accuracy", "images_per_second", "skipped_steps"}


def refuse_unfit_terms(losses: Mapping[str, DistillationLoss]) -> None:
    """Make sure that there is something to minimize, under names that can be logged.

    Raises:
        ValueError: If no term has a weight, or a name is none or taken.
    """
    if not losses or not math.fsum(loss.weight for loss in losses.values()) > 0:
        raise ValueError("losses must name at least one term with a weight above 0.")
    unfit = [name for name in losses if not name.isidentifier() or hasattr(torch.nn.ModuleDict, name)]
    if unfit:
        raise ValueError(f"A loss cannot be called {unfit[0]!r}; choose a plain word that torch does not use.")
    taken = _LOGGED & set(losses)
    if taken:
        raise ValueError(f"A loss cannot be called {taken.pop()!r}, which is logged already; choose another name.")


def shapes_of(outputs: Outputs) -> dict[str, Any]:
    """The shapes of what a network says of a dry run, plain."""
    return {"logits": list(outputs.logits.shape), "features": {n: list(f.shape) for n, f in outputs.features.items()}}


def build_terms(
    losses: Mapping[str, DistillationLoss], first: dict[str, Any], second: dict[str, Any], device: torch.device
) -> None:
    """Build the learned parts of terms for two networks (or domains) whose outputs have these shapes."""
    for loss in losses.values():
        loss.build(_zeros(first), _zeros(second))
        loss.to(device)


def _zeros(shapes: dict[str, Any]) -> Outputs:
    features = {name: torch.zeros(shape) for name, shape in shapes["features"].items()}
    return Outputs(torch.zeros(shapes["logits"]), features)
