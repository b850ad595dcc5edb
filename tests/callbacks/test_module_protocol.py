"""Callbacks that change the trained network work with any LightningModule that keeps it under ``network``."""

from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.callbacks import FreezeLayers, MaskWeights, QuantizationAwareTraining, TSNEPlot
from kd_lightning.errors import UserError


class UserModule(pl.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.get_submodule(self.name)(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


LOADER = DataLoader(TensorDataset(torch.rand(8, 4), torch.arange(8) % 2), batch_size=4)
CALLBACKS: list[Callable[[], pl.Callback]] = [
    lambda: FreezeLayers(["0"]),
    lambda: MaskWeights(0.5),
    QuantizationAwareTraining,
    lambda: TSNEPlot("0"),
]


@pytest.mark.parametrize("build", CALLBACKS)
def test_a_module_without_the_attribute_network_is_refused(
    build: Callable[[], pl.Callback], make_trainer: Callable[..., pl.Trainer]
) -> None:
    with pytest.raises(UserError, match=r"^UserModule has no attribute `network`, which the callbacks"):
        make_trainer(callbacks=[build()]).fit(UserModule("net"), LOADER)


def test_layers_of_a_user_s_module_are_frozen(make_trainer: Callable[..., pl.Trainer]) -> None:
    module = UserModule("network")
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    make_trainer(max_epochs=1, callbacks=[FreezeLayers(["0"])]).fit(module, LOADER)
    changed = {name for name, weight in module.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {"network.1.weight", "network.1.bias"}
