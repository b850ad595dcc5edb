"""Knowledge distillation for PyTorch Lightning.

The public names are imported when they are first used, so that ``kd_lightning.losses`` and ``kd_lightning.networks``
stay free of Lightning and the command line starts at once.
"""

from typing import TYPE_CHECKING

from kd_lightning.lazy_names import lazy_names

if TYPE_CHECKING:
    from kd_lightning.checkpoints.checkpoint import Checkpoint as Checkpoint
    from kd_lightning.data.augmentation.settings import Augmentation as Augmentation
    from kd_lightning.data.cifar import CIFAR10DataModule as CIFAR10DataModule
    from kd_lightning.data.cifar import CIFAR100DataModule as CIFAR100DataModule
    from kd_lightning.data.dataset import DatasetDataModule as DatasetDataModule
    from kd_lightning.data.digits import DigitsDataModule as DigitsDataModule
    from kd_lightning.data.domain_pair import DomainPairDataModule as DomainPairDataModule
    from kd_lightning.data.image_folder import ImageFolderDataModule as ImageFolderDataModule
    from kd_lightning.data.mnist import MNISTDataModule as MNISTDataModule
    from kd_lightning.data.svhn import SVHNDataModule as SVHNDataModule
    from kd_lightning.data.usps import USPSDataModule as USPSDataModule
    from kd_lightning.modules.adaptation import AdaptationModule as AdaptationModule
    from kd_lightning.modules.distillation import DistillationModule as DistillationModule
    from kd_lightning.modules.teacher import TeacherModule as TeacherModule
    from kd_lightning.runs.distill import distill as distill
    from kd_lightning.runs.run import Run as Run

_LAZY = {
    "Augmentation": "data.augmentation.settings",
    "CIFAR10DataModule": "data.cifar",
    "CIFAR100DataModule": "data.cifar",
    "DatasetDataModule": "data.dataset",
    "DigitsDataModule": "data.digits",
    "DomainPairDataModule": "data.domain_pair",
    "ImageFolderDataModule": "data.image_folder",
    "MNISTDataModule": "data.mnist",
    "SVHNDataModule": "data.svhn",
    "USPSDataModule": "data.usps",
    "AdaptationModule": "modules.adaptation",
    "DistillationModule": "modules.distillation",
    "TeacherModule": "modules.teacher",
    "Checkpoint": "checkpoints.checkpoint",
    "Run": "runs.run",
    "distill": "runs.distill",
}

__version__ = "0.1.0"
__all__ = [
    "AdaptationModule",
    "Augmentation",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "Checkpoint",
    "DatasetDataModule",
    "DigitsDataModule",
    "DistillationModule",
    "DomainPairDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "Run",
    "SVHNDataModule",
    "TeacherModule",
    "USPSDataModule",
    "distill",
]


__getattr__ = lazy_names(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
