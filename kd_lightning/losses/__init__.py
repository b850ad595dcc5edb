"""Distillation losses: one method, one file; plain PyTorch."""

from kd_lightning.losses.base import DistillationLoss
from kd_lightning.losses.hard_target import HardTargetLoss, hard_target_loss
from kd_lightning.losses.soft_target import SoftTargetLoss, soft_target_loss

__all__ = ["DistillationLoss", "HardTargetLoss", "SoftTargetLoss", "hard_target_loss", "soft_target_loss"]
