"""Outputs of named layers of an unchanged network, and tokens as maps; plain PyTorch."""

from kd_lightning.features.tap import FeatureTap, Outputs, evaluating, layer_shapes, logits_of
from kd_lightning.features.tokens import Features, Grid, find_grid, grid_of, maps_to_tokens, tokens_to_maps

__all__ = [
    "FeatureTap",
    "Features",
    "Grid",
    "Outputs",
    "evaluating",
    "find_grid",
    "grid_of",
    "layer_shapes",
    "logits_of",
    "maps_to_tokens",
    "tokens_to_maps",
]
