"""Folds batch norms into the convolutions before them."""

from collections import Counter

from torch import nn
from torch.fx import GraphModule, Node, symbolic_trace
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd_lightning.networks.copying import copy_network


def fold_batch_norms(network: nn.Module) -> nn.Module | None:
    """Return a copy in which each batch norm that is the only reader of a convolution is part of it.

    Args:
        network: Any network in eval mode. It is not changed.

    Returns:
        The copy in eval mode, or ``None`` if torch.fx cannot trace the network or there is nothing to fold.

    Example:
        >>> list(fold_batch_norms(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()).children())
        [Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))]
    """
    traced = _trace(copy_network(network))
    if traced is None:
        return None
    found = False
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, Node) or before.op != "call_module":
            continue
        name = str(before.target)
        if len(before.users) > 1 or calls[name] > 1:
            continue
        conv, norm = traced.get_submodule(name), traced.get_submodule(node.target)
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_mean is not None:
            traced.set_submodule(name, fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
            found = True
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval() if found else None


def _trace(network: nn.Module) -> GraphModule | None:
    try:
        return symbolic_trace(network)
    except Exception:  # code that cannot take a symbol for a tensor raises anything: TraceError, TypeError, KeyError
        return None
