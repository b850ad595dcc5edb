"""The layer that computes a network's logits: a new one for other classes, or another network's."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

from torch import nn

from kd_lightning.errors import UserError
from kd_lightning.networks.data_config import data_config, set_data_config
from kd_lightning.networks.output_layers import output_layers


def replace_head(
    network: nn.Module, num_classes: int, *, image_shape: Sequence[int] | None = None, layer: str | None = None
) -> nn.Module:
    """Give a network a new head for another number of classes, and return it.

    Args:
        network: Any network whose logits are computed by an ``nn.Linear`` or an ``nn.Conv2d``, or by several of them
            (each is replaced). It is changed in place.
        num_classes: Number of columns of the new logits.
        image_shape: ``(channels, H, W)`` of its images, by which that layer is found; ``None`` to try usual sizes.
        layer: Name of that layer as in ``named_modules()``, for networks in which it cannot be found.

    Raises:
        UserError: If the network has no such layer, or ``num_classes`` is below 1.

    Example:
        >>> from kd_lightning.networks import resnet20
        >>> replace_head(resnet20(num_classes=10), num_classes=100).fc
        Linear(in_features=64, out_features=100, bias=True)
    """
    if num_classes < 1:
        raise UserError(f"num_classes must be >= 1, got {num_classes}.")
    for name in _replaced_layers(network, image_shape, layer):
        network.set_submodule(name, _with_outputs(network.get_submodule(name), num_classes))
    known = data_config(network)
    set_data_config(network, known._replace(classes=None, thresholds=None))
    return network


def reuse_teacher_classifier(
    backbone: nn.Module, classifier: nn.Module, pool: str = "avgpool", reduction: int = 2
) -> nn.Module:
    """Give a network a projector and the frozen classifier of another one, and return it (SimKD's student).

    The last map is projected to the channels that the classifier was trained on by a bottleneck of 1x1, 3x3 and 1x1
    convolutions. Projector and classifier are part of the network: they are saved, counted and exported with it, and
    only the classifier does not train. Train it with ``HintLoss(weight=1, student_layers=["avgpool.projector"],
    teacher_layers=["layer4"], regressor=False)``, the teacher's layer being its last map.

    D. Chen et al.: Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022,
    https://arxiv.org/abs/2203.14001; authors' code: https://github.com/DefangChen/SimKD

    Args:
        backbone: Network that pools its last map ``(B, C, H, W)`` in a layer and computes the logits from the C
            values by its last ``nn.Linear``. It is changed in place.
        classifier: Trained network, whose last ``nn.Linear`` is copied, or such a layer.
        pool: Dotted name of the backbone's pooling layer.
        reduction: Factor by which the bottleneck is narrower than the teacher's map; 2 as released.

    Raises:
        UserError: If a network does not have a linear layer, or the backbone such a pooling layer.

    Example:
        >>> from kd_lightning.networks import resnet20, resnet32x4
        >>> student = reuse_teacher_classifier(resnet20(), resnet32x4())
        >>> student.fc
        Linear(in_features=256, out_features=10, bias=True)
    """
    modules = dict(backbone.named_modules())
    if not pool or pool not in modules:
        raise UserError(
            f"{type(backbone).__name__} has no layer {pool!r}; name the layer that pools its last map, one of: "
            f"{', '.join(name for name in modules if name)}."
        )
    name, head = _head(backbone)
    reused = copy.deepcopy(classifier if isinstance(classifier, nn.Linear) else _head(classifier)[1])
    projector = _projector(head.in_features, reused.in_features, reduction).to(head.weight)
    backbone.set_submodule(pool, nn.Sequential(OrderedDict(projector=projector, pool=modules[pool])))
    backbone.set_submodule(name, reused.to(head.weight).requires_grad_(False))
    known = data_config(backbone)
    reused_from = data_config(classifier)
    set_data_config(backbone, known._replace(classes=reused_from.classes, thresholds=reused_from.thresholds))
    return backbone


def _replaced_layers(network: nn.Module, image_shape: Sequence[int] | None, layer: str | None) -> list[str]:
    kind, modules = type(network).__name__, dict(network.named_modules())
    if layer in modules and layer:
        return [layer]
    linear = [name for name, module in modules.items() if name and isinstance(module, nn.Linear | nn.Conv2d)]
    if layer is not None:
        raise UserError(f"{kind} has no layer {layer!r} to replace; choose from: {', '.join(linear) or 'none'}.")
    names = output_layers(network, image_shape)
    if names and "" not in names:
        return names
    if not linear:
        raise UserError(f"{kind} has no linear layer to replace; build it with the number of classes yourself.")
    raise UserError(
        f"The layer that computes the logits of {kind} was not found; name it with layer= if it is a linear one (the "
        f"last are {', '.join(linear[-3:])}), or build the network with the number of classes yourself."
    )


def _with_outputs(head: nn.Module, outputs: int) -> nn.Module:
    """Return a new layer like a head, with another number of outputs."""
    if isinstance(head, nn.Linear):
        return nn.Linear(head.in_features, outputs, bias=head.bias is not None).to(head.weight)
    if isinstance(head, nn.Conv2d) and head.groups == 1:
        pairs = (head.kernel_size, head.stride, head.padding, head.dilation)
        size, stride, padding, dilation = cast("list[tuple[int, int]]", pairs)
        conv = nn.Conv2d(head.in_channels, outputs, size, stride, padding, dilation, bias=head.bias is not None)
        return conv.to(head.weight)
    raise UserError(
        f"The logits are computed by a {type(head).__name__}, which replace_head cannot build; replace it yourself."
    )


def _head(network: nn.Module) -> tuple[str, nn.Linear]:
    names = output_layers(network)
    if not names or "" in names:
        raise UserError(f"{type(network).__name__} has no linear layer to replace; write its head yourself.")
    head = network.get_submodule(names[0])
    if len(names) != 1 or not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(network).__name__} does not have one linear layer that computes the logits; write its head "
            "yourself."
        )
    return names[0], head


def _projector(channels: int, teacher_channels: int, reduction: int) -> nn.Sequential:
    width = max(1, teacher_channels // reduction)
    sizes = [(channels, width, 1), (width, width, 3), (width, teacher_channels, 1)]
    layers: list[nn.Module] = []
    for inputs, outputs, size in sizes:
        conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
