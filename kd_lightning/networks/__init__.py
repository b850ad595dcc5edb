"""Networks for small images, and loading of weights; plain PyTorch."""

from kd_lightning.files.read import read_checkpoint
from kd_lightning.networks.data_config import DataConfig, data_config, set_data_config
from kd_lightning.networks.ensemble import EnsembleTeacher
from kd_lightning.networks.head import replace_head, reuse_teacher_classifier
from kd_lightning.networks.lenet import LeNet
from kd_lightning.networks.mobilenet import MobileNetV2, mobilenet_v2_half
from kd_lightning.networks.published_config import torchvision_config
from kd_lightning.networks.resnet import (
    ResNet,
    resnet8x4,
    resnet18,
    resnet20,
    resnet32,
    resnet32x4,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet110,
)
from kd_lightning.networks.shufflenet import ShuffleNetV1, ShuffleNetV2, shufflenet_v1, shufflenet_v2
from kd_lightning.networks.vgg import VGG, vgg8, vgg13
from kd_lightning.networks.weights import from_checkpoint
from kd_lightning.networks.wide_resnet import WideResNet, wrn_16_2, wrn_28_10, wrn_40_1, wrn_40_2

__all__ = [
    "VGG",
    "DataConfig",
    "EnsembleTeacher",
    "LeNet",
    "MobileNetV2",
    "ResNet",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "WideResNet",
    "data_config",
    "from_checkpoint",
    "mobilenet_v2_half",
    "read_checkpoint",
    "replace_head",
    "resnet8x4",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "reuse_teacher_classifier",
    "set_data_config",
    "shufflenet_v1",
    "shufflenet_v2",
    "torchvision_config",
    "vgg8",
    "vgg13",
    "wrn_16_2",
    "wrn_28_10",
    "wrn_40_1",
    "wrn_40_2",
]
