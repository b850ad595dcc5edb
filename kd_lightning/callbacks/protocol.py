"""The parts of a module that callbacks may use."""

from typing import Protocol, cast

import lightning.pytorch as pl
from torch import Tensor, nn

from kd_lightning.errors import UserError


class TrainedModule(Protocol):
    """A module that trains one network; :class:`~kd_lightning.modules.classification.ClassificationModule` is one."""

    network: nn.Module
    """The network that is trained."""

    compiles: bool
    """Whether the network is compiled in ``fit``."""

    def network_input(self, images: Tensor) -> Tensor:
        """Return images of the data module as the network takes them."""


def trained_module(pl_module: pl.LightningModule) -> TrainedModule:
    """Return a module as one that trains the network under its attribute ``network``.

    Only that attribute is tested: callbacks that need no more work with other modules as well.

    Raises:
        UserError: If there is no such network.

    Example:
        >>> from kd_lightning import TeacherModule
        >>> trained_module(TeacherModule(nn.Linear(2, 3))).network
        Linear(in_features=2, out_features=3, bias=True)
    """
    if not isinstance(getattr(pl_module, "network", None), nn.Module):
        raise UserError(
            f"{type(pl_module).__name__} has no attribute `network`, which the callbacks of kd_lightning change and "
            "read; keep the trained network there."
        )
    return cast("TrainedModule", pl_module)
