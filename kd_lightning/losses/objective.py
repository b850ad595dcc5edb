"""The named terms of an objective: what names they may have, and how their learned parts come about."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses import DistillationLoss

_LOGGED = {"loss", "loss_step", "accuracy", "images_per_second", "skipped_steps"}


def refuse_unfit_terms(losses: Mapping[str, DistillationLoss], between_domains: bool = False) -> None:
    """Make sure that there is something to minimize, between what is compared, under names that can be logged.

    Raises:
        ValueError: If no term has a weight, a name is none or taken, or a term compares networks and not domains or
            the other way round.
    """
    if not losses or not math.fsum(loss.weight for loss in losses.values()) > 0:
        raise UserError("losses must name at least one term with a weight above 0.")
    unfit = [name for name in losses if not name.isidentifier() or hasattr(torch.nn.ModuleDict, name)]
    if unfit:
        raise UserError(f"A loss cannot be called {unfit[0]!r}; choose a plain word that torch does not use.")
    taken = _LOGGED & set(losses)
    if taken:
        raise UserError(f"A loss cannot be called {taken.pop()!r}, which is logged already; choose another name.")
    for name, loss in losses.items():
        if loss.between_domains and not between_domains:
            raise UserError(
                f"The loss {name!r} ({type(loss).__name__}) compares two domains, not two networks; "
                "use it in AdaptationModule."
            )
        if between_domains and not loss.between_domains and (loss.reads_teacher_logits or loss.teacher_layers):
            raise UserError(
                f"The loss {name!r} ({type(loss).__name__}) compares two networks, not two domains; "
                "use it in DistillationModule."
            )


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
