"""The last linear layer of a network: a new one for other classes, or another network's."""

import copy
from collections import OrderedDict

from torch import nn

from kd_lightning.errors import UserError
from kd_lightning.networks.data_config import data_config, set_data_config


def replace_head(network: nn.Module, num_classes: int) -> nn.Module:
    """Give a network a new last linear layer for another number of classes, and return it.

    Args:
        network: Any network whose last ``nn.Linear`` (in the order of ``named_modules``) computes the logits. It
            is changed in place.
        num_classes: Number of columns of the new logits.

    Raises:
        UserError: If the network has no linear layer, or ``num_classes`` is below 1.

    Example:
        >>> from kd_lightning.networks import resnet20
        >>> replace_head(resnet20(num_classes=10), num_classes=100).fc
        Linear(in_features=64, out_features=100, bias=True)
    """
    if num_classes < 1:
        raise UserError(f"num_classes must be >= 1, got {num_classes}.")
    name, head = _head(network)
    new = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
    network.set_submodule(name, new.to(head.weight))
    known = data_config(network)
    set_data_config(network, known._replace(classes=None))
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
    set_data_config(backbone, known._replace(classes=data_config(classifier).classes))
    return backbone


def head_of(network: nn.Module) -> tuple[str, nn.Linear] | None:
    """Return the name of the last linear layer inside a network and the layer, or ``None`` if there is none."""
    heads = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear) and name]
    return heads[-1] if heads else None


def _head(network: nn.Module) -> tuple[str, nn.Linear]:
    head = head_of(network)
    if head is None:
        raise UserError(f"{type(network).__name__} has no linear layer to replace; write its head yourself.")
    return head


def _projector(channels: int, teacher_channels: int, reduction: int) -> nn.Sequential:
    width = max(1, teacher_channels // reduction)
    sizes = [(channels, width, 1), (width, width, 3), (width, teacher_channels, 1)]
    layers: list[nn.Module] = []
    for inputs, outputs, size in sizes:
        conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
