"""Lightning data modules over uint8 images, augmented batch by batch."""

from kd_lightning.data.augmentation import Augmentation
from kd_lightning.data.batch import Batch
from kd_lightning.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from kd_lightning.data.dataset import DatasetDataModule
from kd_lightning.data.digits import DigitsDataModule
from kd_lightning.data.domain_pair import DomainPairDataModule
from kd_lightning.data.image_folder import ImageFolderDataModule
from kd_lightning.data.mnist import MNISTDataModule
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.svhn import SVHNDataModule
from kd_lightning.data.usps import USPSDataModule

__all__ = [
    "Augmentation",
    "Batch",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DatasetDataModule",
    "DigitsDataModule",
    "DomainPairDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "SVHNDataModule",
    "USPSDataModule",
]
