"""Callbacks: which weights may move, or exist; what is drawn and written."""

from kd_lightning.callbacks.average_weights import AverageWeights
from kd_lightning.callbacks.exact_resume import ExactResume
from kd_lightning.callbacks.feature_writer import FeatureWriter
from kd_lightning.callbacks.fit_summary import FitSummary
from kd_lightning.callbacks.freeze import FreezeLayers
from kd_lightning.callbacks.gap_closed import GapClosed
from kd_lightning.callbacks.line_progress import LineProgress
from kd_lightning.callbacks.mask import MaskWeights
from kd_lightning.callbacks.prediction_writer import PredictionWriter
from kd_lightning.callbacks.prune import PruneNetwork
from kd_lightning.callbacks.quantize import QuantizationAwareTraining
from kd_lightning.callbacks.run_summary import RunSummary
from kd_lightning.callbacks.step_checkpoint import StepCheckpoint
from kd_lightning.callbacks.tensorboard_images import TensorBoardImages
from kd_lightning.callbacks.tsne_plot import TSNEPlot

__all__ = [
    "AverageWeights",
    "ExactResume",
    "FeatureWriter",
    "FitSummary",
    "FreezeLayers",
    "GapClosed",
    "LineProgress",
    "MaskWeights",
    "PredictionWriter",
    "PruneNetwork",
    "QuantizationAwareTraining",
    "RunSummary",
    "StepCheckpoint",
    "TSNEPlot",
    "TensorBoardImages",
]
