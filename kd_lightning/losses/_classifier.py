"""The linear layer that computes a network's logits, which some losses read or apply elsewhere."""

from typing import cast

from torch import nn

from kd_lightning.errors import UserError
from kd_lightning.networks.output_layers import output_layers


class ClassifierReference:
    """A reference to a network's classifier, which is looked up in each call, since a callback may replace it.

    It is not an ``nn.Module``: a loss that has one does not own the classifier's weights, which are neither in its
    state nor trained by it.

    Args:
        network: A network whose logits are computed by one ``nn.Linear``.
        owner: ``"student"`` or ``"teacher"``, for errors.
        loss: Name of the loss that reads it, for errors.
        layer: Name of the layer whose map it reads; of the members of an ensemble, the one that has it counts.

    Raises:
        ValueError: If the logits are computed in another way.

    Example:
        >>> from kd_lightning.networks import resnet20
        >>> ClassifierReference(resnet20(), "student", "MyLoss")()
        Linear(in_features=64, out_features=10, bias=True)
    """

    def __init__(self, network: nn.Module, owner: str, loss: str, layer: str = "") -> None:
        names = output_layers(network)
        if len(names) > 1:
            names = [name for name in names if layer.startswith(name.rpartition(".")[0] + ".")] or names
        if len(names) != 1 or not isinstance(network.get_submodule(names[0]), nn.Linear):
            found = ", ".join(map(repr, names)) or "no such layer"
            raise UserError(
                f"{loss} reads the {owner}'s classifier, one linear layer that computes the logits, but "
                f"{type(network).__name__} has {found}; use another loss."
            )
        self.network, self.name = network, names[0]

    def __call__(self) -> nn.Linear:
        """Return the classifier."""
        return cast("nn.Linear", self.network.get_submodule(self.name))
