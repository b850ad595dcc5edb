"""Networks for small images and the reading of their weights; plain PyTorch."""

from kd_lightning.networks.checkpoint import from_checkpoint, read_checkpoint
from kd_lightning.networks.ensemble import EnsembleTeacher
from kd_lightning.networks.head import graft_classifier, replace_head
from kd_lightning.networks.lenet import LeNet
from kd_lightning.networks.resnet import (
    ResNet,
    resnet8x4,
    resnet18,
    resnet20,
    resnet32,
    resnet32x4,
    resnet34,
    resnet44,
    resnet56,
    resnet110,
)
from kd_lightning.networks.trained_on import TrainedOn, trained_on
from kd_lightning.networks.wide_resnet import WideResNet, wrn_16_2, wrn_28_10, wrn_40_1, wrn_40_2

__all__ = [
    "EnsembleTeacher",
    "LeNet",
    "ResNet",
    "TrainedOn",
    "WideResNet",
    "from_checkpoint",
    "graft_classifier",
    "read_checkpoint",
    "replace_head",
    "resnet8x4",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet34",
    "resnet44",
    "resnet56",
    "resnet110",
    "trained_on",
    "wrn_16_2",
    "wrn_28_10",
    "wrn_40_1",
    "wrn_40_2",
]
