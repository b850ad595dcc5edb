"""The steps of recipes are replayed to the bits of ordinary ones, or the reason why they cannot be is known."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from mostly_slow import mostly_slow
from on_other_device import OTHER_DEVICE, call, on_other_device
from recipe_runs import DEVICE_RECIPES, fit_arguments
from recorded_step import ReplayStep

from kd_lightning.modules.graph_choice import reasons_against_graph

CANNOT_BE_REPLAYED = {
    "adapt/kmm": "the loss 'hard' (KernelMeanMatchingLoss) cannot be captured; leave it out",
    "digits/prune": "the callback PruneNetwork changes what a step computes; leave it out",
    "digits/qat": "the callback QuantizationAwareTraining changes what a step computes; leave it out",
}


class RoundRates(pl.Callback):
    """Rounds learning rates to float32, as the tensors of a graph hold them."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = float(torch.tensor(group["lr"]))


class ReplayUnlessRefused(ReplayStep):
    """Replays the steps of a run, or says why they would be no graph on a CUDA device."""

    refused: list[str]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        on_cpu, *type(self).refused = reasons_against_graph(pl_module)
        assert "it runs on the device" in on_cpu
        if not self.refused:
            super().on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        assert bool(self.replays) != bool(self.refused)


@pytest.mark.parametrize(
    "name", mostly_slow(DEVICE_RECIPES, "digits/distill", "digits/crd", "digits/qat", "adapt/cdan")
)
@on_other_device
def test_a_recipe_is_replayed(name: str, tmp_path: Path) -> None:
    own = "--trainer.callbacks+=test_replayed_recipes."
    arguments = [*fit_arguments(name, tmp_path), *OTHER_DEVICE, "--trainer.max_epochs=2", f"{own}RoundRates"]
    weights = []
    for folder, more in (("ordinary", []), ("replayed", [f"{own}ReplayUnlessRefused"])):
        (tmp_path / folder).mkdir()
        call(tmp_path / folder, *arguments, *more)
        (path,) = (tmp_path / folder).rglob("last.ckpt")
        weights.append(torch.load(path, weights_only=True)["state_dict"])
    assert ReplayUnlessRefused.refused == ([CANNOT_BE_REPLAYED[name]] if name in CANNOT_BE_REPLAYED else [])
    assert weights[0].keys() == weights[1].keys()
    assert [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])] == []
