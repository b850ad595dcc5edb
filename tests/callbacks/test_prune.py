"""Pruning of channels during training: how many, which ones, and what is kept."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from mostly_slow import mostly_slow
from resume_check import SaveAfterEachBatch
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.flop_counter import FlopCounterMode
from unusual_networks import ConvHead, HeadFirst, SharedLayer, SharedWeights

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks import PruneNetwork, channel_selection
from kd_lightning.callbacks.channel_selection import channels_to_keep, cost
from kd_lightning.errors import UserError
from kd_lightning.losses import AttentionLoss, HardTargetLoss, SoftTargetLoss
from kd_lightning.networks import ResNet, ShuffleNetV1, ShuffleNetV2, from_checkpoint, resnet20
from kd_lightning.networks.channel_slicing import select

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]


def macs(network: nn.Module, shape: tuple[int, ...] = (1, 1, 8, 8)) -> int:
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(network).eval()(torch.zeros(shape))
    return counter.get_total_flops() // 2


def fit(make_trainer: Trainers, module: pl.LightningModule, prune: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = make_trainer(**{"max_epochs": 2, "callbacks": [prune], **options})
    trainer.fit(module, DigitsDataModule(batch_size=256))
    return trainer


@pytest.mark.parametrize("keep", [0.3, 0.6])
@pytest.mark.parametrize("importance", ["magnitude", "bn_scale", "taylor"])
def test_the_budget_is_met_and_weights_stay_finite(
    keep: float, importance: Any, small: Networks, make_trainer: Trainers
) -> None:
    module = TeacherModule(small(8))
    whole = macs(module.network)
    fit(make_trainer, module, PruneNetwork(keep, importance=importance, epochs=[1]), max_epochs=3)
    fraction = macs(module.network) / whole
    assert keep - 0.15 < fraction < keep + 0.02
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("build", [HeadFirst, ConvHead, SharedLayer])
def test_the_number_of_classes_is_kept_wherever_the_classifier_is_declared(
    build: Callable[[], nn.Module], make_trainer: Trainers
) -> None:
    module = TeacherModule(build())
    whole = macs(module.network)
    fit(make_trainer, module, PruneNetwork(0.5), max_epochs=1, limit_train_batches=2)
    assert macs(module.network) < 0.52 * whole
    assert module.network(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_shared_weights_are_refused_unless_both_keep_the_same_entries(make_trainer: Trainers) -> None:
    with pytest.raises(UserError, match=r"'second.weight' and 'third.weight' of SharedWeights are one weight and wou"):
        fit(make_trainer, TeacherModule(SharedWeights()), PruneNetwork(0.5), max_epochs=1)
    network = SharedWeights()
    kept = torch.arange(16 * 16 * 9).view(16, 16, 3, 3)[:4, :4]
    select(network, {"second.weight": kept, "third.weight": kept})
    assert network.second.weight is network.third.weight
    assert network.third.weight.shape == (4, 4, 3, 3)


def test_the_budget_may_be_in_parameters(small: Networks, make_trainer: Trainers) -> None:
    module = TeacherModule(small(8))
    whole = sum(weight.numel() for weight in module.network.parameters())
    fit(make_trainer, module, PruneNetwork(0.5, measure="parameters"))
    assert 0.35 < sum(weight.numel() for weight in module.network.parameters()) / whole <= 0.5


def test_the_budget_may_be_in_latency(make_trainer: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    module = TeacherModule(ResNet([1, 1], [8, 16], in_channels=1))
    prune = PruneNetwork(0.5, measure="latency")
    assert cost(copy.deepcopy(module.network).eval(), torch.zeros(1, 1, 8, 8), "latency") > 0
    for place in (channel_selection, sys.modules[PruneNetwork.__module__]):  # take parameters for the latency
        monkeypatch.setattr(place, "cost", lambda n, x, m: cost(n, x, "parameters" if m == "latency" else m))
    fit(make_trainer, module, prune)
    assert prune.state_dict()["done"] == [0]
    assert sum(w.numel() for w in module.network.parameters()) < 0.5 * prune.state_dict()["whole"] + 1


def test_pruning_is_divided_over_the_epochs(small: Networks, make_trainer: Trainers) -> None:
    seen: list[int] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            seen.append(macs(copy.deepcopy(pl_module.network)))

    module = TeacherModule(small(8))
    whole = macs(module.network)
    callbacks = [PruneNetwork(0.4, epochs=[3, 1]), Watch()]
    fit(make_trainer, module, callbacks[0], callbacks=callbacks, max_epochs=4)
    assert seen[0] == whole
    assert 0.55 < seen[1] / whole <= 0.7
    assert seen[2] == seen[1]
    assert 0.25 < seen[3] / whole <= 0.4


def test_the_channels_with_the_smallest_weights_are_pruned() -> None:
    torch.manual_seed(0)
    network, strong = ResNet([1], [8], in_channels=1).eval(), [1, 4, 6]
    first, norm, second = (network.get_parameter(f"layer1.0.{name}.weight") for name in ("conv1", "bn1", "conv2"))
    with torch.no_grad():
        for weights in (first, norm, second.transpose(0, 1)):
            weights.mul_(0.01)
            weights[strong] *= 1000
    image = torch.zeros(1, 1, 8, 8)
    kept = channels_to_keep(
        network, image, budget=0.8 * cost(network, image, "macs"), measure="macs", importance="magnitude"
    )
    assert set(strong) <= set(kept["layer1.0.bn1.weight"].tolist()) < set(range(8))
    assert torch.equal(kept["layer1.0.bn1.weight"], kept["layer1.0.bn1.running_var"])


def test_the_teacher_and_the_width_of_layers_read_by_losses_are_kept(small: Networks, make_trainer: Trainers) -> None:
    teacher = small(8)
    before = copy.deepcopy(teacher.state_dict())
    losses = {"hard": HardTargetLoss(), "soft": SoftTargetLoss(), "at": AttentionLoss(student_layers=["layer1"])}
    module = DistillationModule(small(8), teacher, losses=losses, teacher_check="off")
    fit(make_trainer, module, PruneNetwork(0.6))
    assert module.teacher is not None
    for name, value in before.items():
        assert torch.equal(value, module.teacher.state_dict()[name])
    weights = dict(module.network.named_parameters())
    assert len(weights["layer1.0.conv2.weight"]) == 8
    assert len(weights["layer1.0.conv1.weight"]) < 8 or len(weights["layer2.0.conv1.weight"]) < 16
    assert len(weights["fc.weight"]) == 10


OPTIMIZERS: dict[str, Any] = {"SGD": None, "AdamW": partial(torch.optim.AdamW, lr=0.01)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_keeps_its_state_for_the_channels_that_remain(
    optimizer: str, small: Networks, make_trainer: Trainers
) -> None:
    seen: dict[str, Any] = {}

    class RecordOptimizer(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            when = "after" if self is last else "before"
            if trainer.current_epoch == 1 and when not in seen:
                state = trainer.optimizers[0].state
                names = {weight: name for name, weight in pl_module.network.named_parameters()}
                assert set(state) == set(names)
                seen[when] = {names[w]: {k: v.clone() for k, v in s.items() if v is not None} for w, s in state.items()}
                seen[f"{when} weights"] = {n: w.detach().clone() for w, n in names.items()}

    first, last = RecordOptimizer(), RecordOptimizer()
    prune = PruneNetwork(0.5, epochs=[1])
    module = TeacherModule(small(8), optimizer=OPTIMIZERS[optimizer])
    fit(make_trainer, module, prune, callbacks=[first, prune, last])
    moments = {"SGD": ["momentum_buffer"], "AdamW": ["exp_avg", "exp_avg_sq"]}[optimizer]
    for name, weights in seen["after weights"].items():
        whole = seen["before weights"][name].flatten().tolist()
        if len(set(whole)) < len(whole):
            continue  # norms start with equal entries, which do not show which ones were kept
        places = [whole.index(value) for value in weights.flatten().tolist()]
        for moment in moments:
            assert torch.equal(seen["after"][name][moment].flatten(), seen["before"][name][moment].flatten()[places]), (
                name
            )


def test_a_pruned_checkpoint_can_be_tested_loaded_and_exported(
    kd: Callable[..., str], tmp_path: Path, make_trainer: Trainers
) -> None:
    prune = ["--trainer.callbacks+=kd_lightning.callbacks.PruneNetwork", "--trainer.callbacks.keep=0.4"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    kd("fit", "-c", "digits/teacher", "--trainer.max_epochs=2", *quiet, *prune)
    printed = kd("test", "-c", "digits/teacher")
    best = tmp_path / "lightning_logs/digits/teacher/version_0/checkpoints/best.ckpt"
    content = torch.load(best, weights_only=True)
    loaded = TeacherModule.load_from_checkpoint(best).network
    wide = ResNet([2, 2, 2], [16, 32, 64], in_channels=1)
    whole = macs(wide)
    filled = from_checkpoint(wide, best)
    for network in (loaded, filled):
        assert macs(network) < 0.42 * whole
        assert torch.equal(network.state_dict()["fc.weight"], content["state_dict"]["network.fc.weight"])
    assert "test/accuracy" in printed
    assert "agrees in 100.00%" in kd("export", str(best), "-o", "small.onnx")
    kd("fit", "-c", "digits/student", "--trainer.max_epochs=1", *quiet)  # another run is not pruned


@pytest.mark.parametrize("step", [2, 5, 8, 11])
def test_an_interrupted_run_resumes_to_identical_weights(
    step: int, small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    network = small(8)

    def run(*callbacks: pl.Callback, path: Path | None = None) -> dict[str, Tensor]:
        module = TeacherModule(copy.deepcopy(network), optimizer=OPTIMIZERS["AdamW"])
        prune = PruneNetwork(0.5, importance="taylor", epochs=[1, 2])
        trainer = make_trainer(max_epochs=3, callbacks=[prune, *callbacks])
        trainer.fit(module, DigitsDataModule(batch_size=256), ckpt_path=path, weights_only=True)
        return module.state_dict()

    whole = run(SaveAfterEachBatch(tmp_path))
    resumed = run(path=tmp_path / f"{step}.ckpt")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


class WriteWeights(pl.Callback):
    """Writes the weights of each rank after each step."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        torch.save(pl_module.state_dict(), f"{trainer.global_rank}-{trainer.global_step}.pt")


@pytest.mark.parametrize("importance", mostly_slow(["magnitude", "taylor"], "taylor"))
def test_two_processes_have_equal_weights(importance: str, tmp_path: Path) -> None:
    prune = "kd_lightning.callbacks.PruneNetwork"
    callbacks = [f"--trainer.callbacks+={name}" for name in (f"{__name__}.WriteWeights", prune)]
    options = [f"--trainer.callbacks.importance={importance}", "--trainer.callbacks.epochs=[1]"]
    small = ["--model.network.blocks=[1,1]", "--model.network.widths=[8,16]", "--data.batch_size=256"]
    two = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.max_epochs=3"]
    command = [sys.executable, "-m", "kd_lightning", "fit", "-c", "digits/teacher", *callbacks, *options, *small, *two]
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": path})
    steps = len(list(tmp_path.glob("0-*.pt")))
    assert steps > 4
    first, second = (torch.load(tmp_path / f"{rank}-{steps}.pt", weights_only=True) for rank in (0, 1))
    assert first["network.layer2.0.conv1.weight"].numel() < 16 * 8 * 9
    for name, value in first.items():
        if "running" not in name:  # the statistics of batch norms differ between ranks
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "must be between 0 and 1"),
        ({"keep": 1.0}, "must be between 0 and 1"),
        ({"epochs": []}, "one or several different numbers"),
        ({"epochs": [1, 1]}, "one or several different numbers"),
        ({"round_to": 0}, "round_to must be >= 1"),
        ({"importance": "taylor"}, "gradients of the previous epoch"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneNetwork(**options)


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier).*")
def test_unsupported_options_are_refused_before_the_first_step(small: Networks, make_trainer: Trainers) -> None:
    cases: list[tuple[pl.LightningModule, list[pl.Callback], str]] = [
        (TeacherModule(small(4)), [PruneNetwork(0.0001)], r"ResNet cannot be reduced to 0% of its macs"),
        (TeacherModule(small()), [PruneNetwork(), EMAWeightAveraging()], "does not support averaged weights"),
        (TeacherModule(small(), compile=True), [PruneNetwork()], "does not support a compiled network"),
    ]
    with pytest.raises(ProcessRaisedException, match=r"set trainer\.strategy=ddp"):
        fit(make_trainer, TeacherModule(small()), PruneNetwork(), strategy="ddp_fork", devices=1)
    for module, callbacks, message in cases:
        trainer = make_trainer(callbacks=callbacks)
        with pytest.raises(ValueError, match=message):
            trainer.fit(module, DigitsDataModule(batch_size=256))
        assert trainer.global_step == 0


def test_parameter_free_shortcuts_are_refused(make_trainer: Trainers) -> None:
    module = TeacherModule(ResNet([1, 1], [8, 16], in_channels=1, shortcut="A"))
    with pytest.raises(ValueError, match="ResNet cannot be pruned"):
        fit(make_trainer, module, PruneNetwork(0.5))


class Shuffle(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.ChannelShuffle(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        )


@pytest.mark.parametrize("build", [Shuffle, ShuffleNetV1, ShuffleNetV2])
def test_shuffled_channels_are_refused(build: Callable[[], nn.Module]) -> None:
    network, image = build(), torch.zeros(1, 3, 32, 32)
    with pytest.raises(UserError, match=f"^{build.__name__} cannot be pruned, since it shuffles its channels"):
        channels_to_keep(network, image, budget=1.0, measure="macs", importance="magnitude")


def test_a_missing_library_is_reported_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ValueError, match=r'extra `prune` is not installed; run `pip install "\.\[prune\]"` in a'):
        PruneNetwork()


def test_resnet20_is_pruned_to_half_its_macs() -> None:
    network, image = resnet20().eval(), torch.zeros(1, 3, 32, 32)
    whole = cost(network, image, "macs")
    pruned = select(
        copy.deepcopy(network),
        channels_to_keep(network, image, budget=whole / 2, measure="macs", importance="magnitude"),
    )
    assert 0.4 < macs(pruned, (1, 3, 32, 32)) / macs(network, (1, 3, 32, 32)) <= 0.51
    assert pruned(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_accumulated_gradients_are_not_changed_by_clipping() -> None:
    prune = PruneNetwork(importance="taylor", epochs=[1])
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    module: Any = SimpleNamespace(network=layer)
    trainer: Any = SimpleNamespace(current_epoch=0)
    prune.on_before_optimizer_step(trainer, module, torch.optim.SGD(layer.parameters()))
    assert layer.weight.grad is not None
    layer.weight.grad.mul_(0)
    assert torch.equal(prune.state_dict()["gradients"]["weight"], torch.ones(2, 2))
