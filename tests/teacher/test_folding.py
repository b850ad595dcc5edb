"""Folding of batch norms where a network can be traced; errors after tracing are raised."""

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.networks import resnet20
from kd_lightning.teacher import folding
from kd_lightning.teacher.folding import fold_batch_norms


class DataDependentBranch(nn.Module):
    """Branches on the values of its input, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images if images.sum() > 0 else -images))


def test_batch_norms_are_folded_and_outputs_are_kept() -> None:
    network, images = resnet20().eval(), torch.rand(4, 3, 32, 32)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean = torch.randn_like(norm.bias)
        norm.running_var = torch.rand_like(norm.bias) + 0.5
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded = fold_batch_norms(network)
    assert folded is not None
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not folded.training
    torch.testing.assert_close(folded(images), network(images), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "network",
    [
        DataDependentBranch(),
        nn.Conv2d(3, 4, 1),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    ],
)
def test_networks_without_foldable_batch_norms_give_none(network: nn.Module) -> None:
    assert fold_batch_norms(network.eval()) is None


def test_an_error_after_tracing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(conv: nn.Module, norm: nn.Module) -> nn.Module:
        raise RuntimeError("in folding")

    monkeypatch.setattr(folding, "fuse_conv_bn_eval", fail)
    with pytest.raises(RuntimeError, match="in folding"):
        fold_batch_norms(resnet20().eval())
