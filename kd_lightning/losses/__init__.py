"""Losses for distillation and domain adaptation: one method, one file; plain PyTorch."""

from kd_lightning.losses._regions import sdd_pool
from kd_lightning.losses._regions import sdd_pool_1_2_4_loss as sdd_pool_1_2_4_loss
from kd_lightning.losses._regions import sdd_pool_1_2_loss as sdd_pool_1_2_loss
from kd_lightning.losses.adversarial import AdversarialLoss, adversarial_loss, reverse_gradient
from kd_lightning.losses.attention import AttentionLoss, attention_loss
from kd_lightning.losses.base import AlignmentLoss, DistillationLoss, Term
from kd_lightning.losses.binary_soft_target import BinarySoftTargetLoss, binary_soft_target_loss
from kd_lightning.losses.binary_target import BinaryTargetLoss, binary_target_loss
from kd_lightning.losses.catkd import CATKDLoss, catkd_binarized_loss, catkd_loss, catkd_normalized_loss
from kd_lightning.losses.contrastive import ContrastiveLoss, contrastive_loss
from kd_lightning.losses.coral import CoralLoss, coral_loss
from kd_lightning.losses.correlation import CorrelationLoss, correlation_loss
from kd_lightning.losses.ctkd import CTKDLoss, ctkd_lambda, ctkd_loss
from kd_lightning.losses.decoupled import DecoupledLoss, decoupled_loss
from kd_lightning.losses.dist import DistLoss, dist_loss
from kd_lightning.losses.dist_plus import DistPlusLoss, dist_plus_torchdistill_loss
from kd_lightning.losses.hard_distillation import HardDistillationLoss, hard_distillation_loss
from kd_lightning.losses.hard_target import HardTargetLoss, hard_target_loss
from kd_lightning.losses.head import HeadLoss
from kd_lightning.losses.hint import HintLoss, hint_loss
from kd_lightning.losses.kernel_matching import KernelMeanMatchingLoss, kernel_mean_matching
from kd_lightning.losses.mlld import (
    MLLDLoss,
    mlld_batch_loss,
    mlld_batch_term_loss,
    mlld_class_loss,
    mlld_class_term_loss,
    mlld_instance_loss,
    mlld_loss,
)
from kd_lightning.losses.mmd import MMDLoss, mmd_loss
from kd_lightning.losses.neuron_selectivity import NeuronSelectivityLoss, neuron_selectivity_loss
from kd_lightning.losses.nkd import NKDLoss, nkd_loss
from kd_lightning.losses.objective import Objective
from kd_lightning.losses.ofa import OFALoss, ofa_loss
from kd_lightning.losses.probabilistic import ProbabilisticLoss, probabilistic_loss
from kd_lightning.losses.queue_kl import (
    QueueKLLoss,
    push_to_queue,
    queue_kl_loss,
    queue_kl_step_loss,
    queue_kl_v3_local_loss,
    queue_kl_v3_loss,
)
from kd_lightning.losses.relational import RelationalLoss, relational_loss
from kd_lightning.losses.review import ReviewLoss, hierarchical_context_loss
from kd_lightning.losses.reweighting import ReweightedLoss, density_ratio, effective_sample_size
from kd_lightning.losses.rld import RLDLoss, rld_loss
from kd_lightning.losses.rsd import RSDLoss, rsd_loss, rsd_projector_loss
from kd_lightning.losses.sdd import SDDDKDLoss, SDDKDLoss, sdd_dkd_loss, sdd_kd_loss, sdd_nkd_loss
from kd_lightning.losses.similarity import SimilarityLoss, similarity_loss
from kd_lightning.losses.skd import (
    SKDLoss,
    skd_direction_loss,
    skd_direction_masked_loss,
    skd_direction_torchdistill_loss,
    skd_instance_loss,
    skd_instance_masked_loss,
    skd_instance_torchdistill_loss,
    skd_loss,
)
from kd_lightning.losses.soft_target import SoftTargetLoss, soft_target_loss
from kd_lightning.losses.srd import SRDLoss, srd_deit_loss, srd_loss, srd_torchdistill_loss
from kd_lightning.losses.ttm import TTMLoss, WTTMLoss, ttm_loss, wttm_loss
from kd_lightning.losses.uskd import USKDLoss, uskd_loss, uskd_mixed_labels_loss
from kd_lightning.losses.variational import VariationalLoss, variational_loss
from kd_lightning.losses.vitkd import ViTKDLoss, vitkd_loss
from kd_lightning.losses.vkd import VkDLoss, vkd_loss, vkd_orthogonal_loss, vkd_orthogonal_square_loss
from kd_lightning.losses.wkd_cost import group_by_class, wkd_cost_cka, wkd_cost_fc
from kd_lightning.losses.wkd_cost import wkd_cost_cka_loss as wkd_cost_cka_loss
from kd_lightning.losses.wkd_cost import wkd_cost_fc_loss as wkd_cost_fc_loss
from kd_lightning.losses.wkd_f import WKDFeatureLoss, wkd_f_bottleneck_loss, wkd_f_conv1x1_loss, wkd_f_loss
from kd_lightning.losses.wkd_l import WKDLogitLoss, wkd_l_all_classes_loss, wkd_l_loss

__all__ = [
    "AdversarialLoss",
    "AlignmentLoss",
    "AttentionLoss",
    "BinarySoftTargetLoss",
    "BinaryTargetLoss",
    "CATKDLoss",
    "CTKDLoss",
    "ContrastiveLoss",
    "CoralLoss",
    "CorrelationLoss",
    "DecoupledLoss",
    "DistLoss",
    "DistPlusLoss",
    "DistillationLoss",
    "HardDistillationLoss",
    "HardTargetLoss",
    "HeadLoss",
    "HintLoss",
    "KernelMeanMatchingLoss",
    "MLLDLoss",
    "MMDLoss",
    "NKDLoss",
    "NeuronSelectivityLoss",
    "OFALoss",
    "Objective",
    "ProbabilisticLoss",
    "QueueKLLoss",
    "RLDLoss",
    "RSDLoss",
    "RelationalLoss",
    "ReviewLoss",
    "ReweightedLoss",
    "SDDDKDLoss",
    "SDDKDLoss",
    "SKDLoss",
    "SRDLoss",
    "SimilarityLoss",
    "SoftTargetLoss",
    "TTMLoss",
    "Term",
    "USKDLoss",
    "VariationalLoss",
    "ViTKDLoss",
    "VkDLoss",
    "WKDFeatureLoss",
    "WKDLogitLoss",
    "WTTMLoss",
    "adversarial_loss",
    "attention_loss",
    "binary_soft_target_loss",
    "binary_target_loss",
    "catkd_binarized_loss",
    "catkd_loss",
    "catkd_normalized_loss",
    "contrastive_loss",
    "coral_loss",
    "correlation_loss",
    "ctkd_lambda",
    "ctkd_loss",
    "decoupled_loss",
    "density_ratio",
    "dist_loss",
    "dist_plus_torchdistill_loss",
    "effective_sample_size",
    "group_by_class",
    "hard_distillation_loss",
    "hard_target_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "kernel_mean_matching",
    "mlld_batch_loss",
    "mlld_batch_term_loss",
    "mlld_class_loss",
    "mlld_class_term_loss",
    "mlld_instance_loss",
    "mlld_loss",
    "mmd_loss",
    "neuron_selectivity_loss",
    "nkd_loss",
    "ofa_loss",
    "probabilistic_loss",
    "push_to_queue",
    "queue_kl_loss",
    "queue_kl_step_loss",
    "queue_kl_v3_local_loss",
    "queue_kl_v3_loss",
    "relational_loss",
    "reverse_gradient",
    "rld_loss",
    "rsd_loss",
    "rsd_projector_loss",
    "sdd_dkd_loss",
    "sdd_kd_loss",
    "sdd_nkd_loss",
    "sdd_pool",
    "similarity_loss",
    "skd_direction_loss",
    "skd_direction_masked_loss",
    "skd_direction_torchdistill_loss",
    "skd_instance_loss",
    "skd_instance_masked_loss",
    "skd_instance_torchdistill_loss",
    "skd_loss",
    "soft_target_loss",
    "srd_deit_loss",
    "srd_loss",
    "srd_torchdistill_loss",
    "ttm_loss",
    "uskd_loss",
    "uskd_mixed_labels_loss",
    "variational_loss",
    "vitkd_loss",
    "vkd_loss",
    "vkd_orthogonal_loss",
    "vkd_orthogonal_square_loss",
    "wkd_cost_cka",
    "wkd_cost_fc",
    "wkd_f_bottleneck_loss",
    "wkd_f_conv1x1_loss",
    "wkd_f_loss",
    "wkd_l_all_classes_loss",
    "wkd_l_loss",
    "wttm_loss",
]
