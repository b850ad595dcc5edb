"""Losses for distillation and domain adaptation: one method, one file; plain PyTorch."""

from kd_lightning.losses.adversarial import AdversarialLoss, adversarial_loss, reverse_gradient
from kd_lightning.losses.attention import AttentionLoss, attention_loss
from kd_lightning.losses.base import AlignmentLoss, DistillationLoss, Term
from kd_lightning.losses.catkd import CATKDLoss, catkd_binarized_loss, catkd_loss, catkd_normalized_loss
from kd_lightning.losses.contrastive import ContrastiveLoss, contrastive_loss
from kd_lightning.losses.coral import CoralLoss, coral_loss
from kd_lightning.losses.correlation import CorrelationLoss, correlation_loss
from kd_lightning.losses.decoupled import DecoupledLoss, decoupled_loss
from kd_lightning.losses.dist import DistLoss, dist_loss
from kd_lightning.losses.hard_distillation import HardDistillationLoss, hard_distillation_loss
from kd_lightning.losses.hard_target import HardTargetLoss, hard_target_loss
from kd_lightning.losses.head import HeadLoss
from kd_lightning.losses.hint import HintLoss, hint_loss
from kd_lightning.losses.kernel_matching import KernelMeanMatchingLoss, kernel_mean_matching
from kd_lightning.losses.mmd import MMDLoss, mmd_loss
from kd_lightning.losses.neuron_selectivity import NeuronSelectivityLoss, neuron_selectivity_loss
from kd_lightning.losses.objective import Objective
from kd_lightning.losses.ofa import OFALoss, ofa_loss
from kd_lightning.losses.probabilistic import ProbabilisticLoss, probabilistic_loss
from kd_lightning.losses.relational import RelationalLoss, relational_loss
from kd_lightning.losses.review import ReviewLoss, hierarchical_context_loss
from kd_lightning.losses.reweighting import ReweightedLoss, density_ratio, effective_sample_size
from kd_lightning.losses.rsd import RSDLoss, rsd_loss, rsd_projector_loss
from kd_lightning.losses.similarity import SimilarityLoss, similarity_loss
from kd_lightning.losses.soft_target import SoftTargetLoss, soft_target_loss
from kd_lightning.losses.srd import SRDLoss, srd_deit_loss, srd_loss, srd_torchdistill_loss
from kd_lightning.losses.variational import VariationalLoss, variational_loss
from kd_lightning.losses.vitkd import ViTKDLoss, vitkd_loss
from kd_lightning.losses.vkd import VkDLoss, vkd_loss, vkd_orthogonal_loss, vkd_orthogonal_square_loss
from kd_lightning.losses.wkd_f import WKDFeatureLoss, wkd_f_bottleneck_loss, wkd_f_conv1x1_loss, wkd_f_loss

__all__ = [
    "AdversarialLoss",
    "AlignmentLoss",
    "AttentionLoss",
    "CATKDLoss",
    "ContrastiveLoss",
    "CoralLoss",
    "CorrelationLoss",
    "DecoupledLoss",
    "DistLoss",
    "DistillationLoss",
    "HardDistillationLoss",
    "HardTargetLoss",
    "HeadLoss",
    "HintLoss",
    "KernelMeanMatchingLoss",
    "MMDLoss",
    "NeuronSelectivityLoss",
    "OFALoss",
    "Objective",
    "ProbabilisticLoss",
    "RSDLoss",
    "RelationalLoss",
    "ReviewLoss",
    "ReweightedLoss",
    "SRDLoss",
    "SimilarityLoss",
    "SoftTargetLoss",
    "Term",
    "VariationalLoss",
    "ViTKDLoss",
    "VkDLoss",
    "WKDFeatureLoss",
    "adversarial_loss",
    "attention_loss",
    "catkd_binarized_loss",
    "catkd_loss",
    "catkd_normalized_loss",
    "contrastive_loss",
    "coral_loss",
    "correlation_loss",
    "decoupled_loss",
    "density_ratio",
    "dist_loss",
    "effective_sample_size",
    "hard_distillation_loss",
    "hard_target_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "kernel_mean_matching",
    "mmd_loss",
    "neuron_selectivity_loss",
    "ofa_loss",
    "probabilistic_loss",
    "relational_loss",
    "reverse_gradient",
    "rsd_loss",
    "rsd_projector_loss",
    "similarity_loss",
    "soft_target_loss",
    "srd_deit_loss",
    "srd_loss",
    "srd_torchdistill_loss",
    "variational_loss",
    "vitkd_loss",
    "vkd_loss",
    "vkd_orthogonal_loss",
    "vkd_orthogonal_square_loss",
    "wkd_f_bottleneck_loss",
    "wkd_f_conv1x1_loss",
    "wkd_f_loss",
]
