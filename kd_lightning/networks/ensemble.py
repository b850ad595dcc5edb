"""An ensemble of networks as one teacher."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.networks.data_config import DEFAULT_THRESHOLD, check_same_classes, data_config
from kd_lightning.networks.normalization import normalization_between
from kd_lightning.networks.placement import weight_device


class EnsembleTeacher(nn.Module):
    r"""The weighted average of the outputs of several networks.

    With ``average="logits"`` it is :math:`\sum_k w_k z_k`; with ``"probabilities"`` the logarithm of
    :math:`\sum_k w_k \, \mathrm{softmax}(z_k)`, whose softmax is that average (of networks for several classes an image
    the logits whose sigmoid is the average of theirs). Each network gets its input with the
    statistics that it was trained with. A loss on features reads a layer as ``"networks.0.layer3"``; a term for each
    network, with a weight of its own, balances them.

    S. You et al.: Learning from Multiple Teacher Networks, KDD 2017, https://doi.org/10.1145/3097983.3098135

    Args:
        networks: Trained networks of the same classes.
        average: Quantity to average.
        weights: Weight of each network, >= 0; they are divided by their sum. ``None`` for equal weights.

    Shapes:
        Images ``(B, channels, H, W)`` to logits ``(B, C)``.

    Raises:
        UserError: If there is no network, the weights do not fit, or the networks name different classes.

    Example:
        >>> from kd_lightning.networks import resnet20, resnet56
        >>> EnsembleTeacher([resnet20(), resnet56()], weights=[1.0, 3.0])(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    fractions: Tensor

    def __init__(
        self,
        networks: Sequence[nn.Module],
        average: Literal["logits", "probabilities"] = "logits",
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        weights = [1.0] * len(networks) if weights is None else list(weights)
        if not networks or len(weights) != len(networks):
            raise UserError(f"Give one weight for each network, got {len(networks)} networks, {len(weights)} weights.")
        if not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
            raise UserError(f"The weights of an ensemble must be >= 0 and not all 0, got {weights}.")
        if average not in ("logits", "probabilities"):
            raise UserError(f"average must be 'logits' or 'probabilities', got {average!r}.")
        known = [data_config(network) for network in networks]
        classes = next((one.classes for one in known if one.classes), None)
        statistics = next((one for one in known if one.mean is not None), known[0])
        chosen = next((one.thresholds for one in known if one.thresholds), None)  # for a network, not their average
        thresholds = None if chosen is None else (DEFAULT_THRESHOLD,) * len(chosen)
        self.data_config = statistics._replace(classes=classes, thresholds=thresholds)
        for number, one in enumerate(known):
            check_same_classes(f"Network {number} of the ensemble", one, self.data_config)
        self.networks = nn.ModuleList(networks)
        device = weight_device(self.networks)
        self.convert_input = nn.ModuleList(normalization_between(self.data_config, one) for one in known).to(device)
        self.average = average
        self.register_buffer("fractions", torch.tensor(weights, device=device) / sum(weights), persistent=False)

    def extra_repr(self) -> str:
        """Return the averaged quantity for the module's representation."""
        return self.average

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of images ``(B, channels, H, W)``."""
        members = zip(self.convert_input, self.networks, strict=True)
        logits = torch.stack([network(convert_input(images)).float() for convert_input, network in members])
        fractions = self.fractions[:, None, None]
        if self.average == "logits":
            return (fractions * logits).sum(0)
        if self.data_config.thresholds is not None:
            present, absent = ((F.logsigmoid(z) + fractions.log()).logsumexp(0) for z in (logits, -logits))
            return present - absent
        return (logits.log_softmax(2) + fractions.log()).logsumexp(0)
