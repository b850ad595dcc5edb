"""Augmentation of a whole batch on the device; that of each sample is a function of (seed, sample, epoch)."""

from kd_lightning.data.augmentation.settings import Augmentation

__all__ = ["Augmentation"]
