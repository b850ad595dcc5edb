"""Networks that are wrapped by ``torch.compile``."""

from typing import cast

from torch import nn


def unwrap_compiled(network: nn.Module) -> tuple[nn.Module, bool]:
    """Return the network inside of ``torch.compile``'s wrapper, and whether there was one.

    The wrapper prefixes all names of weights, which checkpoints must not depend on.

    Example:
        >>> inner = nn.Linear(2, 2)
        >>> unwrap_compiled(inner) == (inner, False)
        True
    """
    inner = getattr(network, "_orig_mod", None)
    return (network, False) if inner is None else (cast("nn.Module", inner), True)
