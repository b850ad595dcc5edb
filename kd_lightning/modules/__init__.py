"""The three Lightning modules."""

from kd_lightning.modules.adaptation import AdaptationModule
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.modules.distillation import DistillationModule
from kd_lightning.modules.teacher import TeacherModule

__all__ = ["AdaptationModule", "ClassificationModule", "DistillationModule", "TeacherModule"]
