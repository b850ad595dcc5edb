"""Networks in 8 and 16 bits: normalizations stay in float32, and what ONNX Runtime cannot run is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from kd_lightning.export import export_network, onnx_precision
from kd_lightning.networks import DataConfig, set_data_config

IMAGES = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(4, 8),
    "layer": lambda: nn.LayerNorm([8, 16, 16]),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
}


def network_with(norm: nn.Module) -> nn.Module:
    """Two convolutions that share the constants into which a norm is decomposed."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), norm, nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    set_data_config(network, DataConfig.of([0.5] * 3, [0.25] * 3))
    return network


@pytest.mark.parametrize("norm", NORMS)
def test_networks_with_any_normalization_are_quantized(norm: str, tmp_path: Path) -> None:
    result = export_network(network_with(NORMS[norm]()), tmp_path / "a.onnx", IMAGES, calibration=IMAGES)
    assert result.agreement >= 0.9


def test_what_cannot_be_quantized_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_precision, "_NORMS", set())
    with pytest.raises(ValueError, match=r"^ONNX Runtime cannot quantize this network \(.*\); export it without int8"):
        export_network(network_with(NORMS["layer"]()), tmp_path / "a.onnx", IMAGES, calibration=IMAGES)
    assert not list(tmp_path.iterdir())


def test_a_network_on_which_onnx_runtime_crashes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_precision, "_LOAD", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ValueError, match=r"^ONNX Runtime [\d.]+ crashes on this network in float16; export it without"):
        export_network(network_with(nn.ReLU()), tmp_path / "a.onnx", IMAGES, fp16=True)
    assert not list(tmp_path.iterdir())


def test_a_vision_transformer_in_float16_does_not_end_the_process(tmp_path: Path) -> None:
    """ONNX Runtime 1.32 dies of it; another version may run it."""
    vit = VisionTransformer(16, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5).eval()
    set_data_config(vit, DataConfig.of([0.5] * 3, [0.25] * 3))
    refusal = ""
    try:
        export_network(vit, tmp_path / "vit.onnx", IMAGES, fp16=True)
    except ValueError as error:
        refusal = str(error)
    assert (tmp_path / "vit.onnx").is_file() or "crashes on this network in float16" in refusal
