import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from resume_check import SaveAfterBatchesAndEpochs
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from unusual_networks import ConvHead, HeadFirst, TwoHeads, with_group_norms

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks import FreezeLayers
from kd_lightning.losses import HardTargetLoss, HintLoss
from kd_lightning.networks import ResNet, reuse_teacher_classifier

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]
Until = int | dict[str, int | None] | None

OPTIMIZERS: dict[str, Any] = {
    "fused SGD with momentum and decay": None,
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "fused AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
}


class RecordEpochs(pl.Callback):
    """Records the weights before each epoch and after the last, and which parameters have a state in the optimizer."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.in_optimizer: list[set[str]] = []
        self.modes: list[dict[str, bool]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.states.append(copy.deepcopy(pl_module.network.state_dict()))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.modes.append({name: layer.training for name, layer in pl_module.network.named_modules()})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        names = {weight: name for name, weight in pl_module.network.named_parameters()}
        self.in_optimizer.append({names[weight] for weight in trainer.optimizers[0].state})

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.on_train_epoch_start(trainer, pl_module)

    def changed(self, epoch: int) -> set[str]:
        before, after = self.states[epoch : epoch + 2]
        return {name for name, value in before.items() if not torch.equal(value, after[name])}


def _of_layers(names: set[str], *layers: str) -> set[str]:
    return {name for name in names if name.startswith(layers)}


def _fit(make_trainer: Trainers, module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = make_trainer(**{"max_epochs": 2, "callbacks": list(callbacks), **options})
    trainer.fit(module, DigitsDataModule(batch_size=256))
    return trainer


# --- what is frozen by default


@pytest.mark.parametrize(
    ("build", "trained"),
    [(HeadFirst, ("head",)), (TwoHeads, ("head", "second_head")), (ConvHead, ("classifier",))],
)
def test_by_default_only_the_layers_that_compute_the_logits_train(
    build: Callable[[], nn.Module], trained: tuple[str, ...], make_trainer: Trainers
) -> None:
    record = RecordEpochs()
    _fit(make_trainer, TeacherModule(build()), FreezeLayers(), record, max_epochs=1, limit_train_batches=2)
    assert record.changed(0) == {f"{layer}.{kind}" for layer in trained for kind in ("weight", "bias")}


# --- frozen for the whole training


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_layers_do_not_change(optimizer: str, small: Networks, make_trainer: Trainers) -> None:
    record = RecordEpochs()
    module = TeacherModule(small(), optimizer=OPTIMIZERS[optimizer])
    _fit(make_trainer, module, FreezeLayers(["conv1", "bn1", "layer1"]), record)
    frozen = _of_layers(set(module.network.state_dict()), "conv1", "bn1", "layer1")
    weights = {name for name, _ in module.network.named_parameters()}
    assert len(frozen) > 12
    for epoch in range(2):
        changed = record.changed(epoch)
        assert not changed & frozen
        assert changed >= weights - frozen
        assert record.in_optimizer[epoch] == weights - frozen


def test_by_default_everything_but_the_head_is_frozen(small: Networks, make_trainer: Trainers) -> None:
    record = RecordEpochs()
    _fit(make_trainer, TeacherModule(small()), FreezeLayers(), record)
    assert record.changed(0) == record.changed(1) == record.in_optimizer[0] == {"fc.weight", "fc.bias"}
    for modes in record.modes:
        assert {name for name, training in modes.items() if training} == {"", "fc"}


class CallsTrain(TeacherModule):
    """Calls ``train()`` in its hooks."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.train()

    def on_validation_model_train(self) -> None:
        self.train()


def test_frozen_layers_stay_in_eval_mode_when_train_is_called(small: Networks, make_trainer: Trainers) -> None:
    record = RecordEpochs()
    module = CallsTrain(small())
    _fit(make_trainer, module, FreezeLayers(["bn1", "layer1"]), record, val_check_interval=2)
    for modes in record.modes:
        assert {name for name, training in modes.items() if not training} == _of_layers(set(modes), "bn1", "layer1")
    assert not _of_layers(record.changed(0) | record.changed(1), "bn1", "layer1")
    assert "layer2.0.bn1.running_mean" in record.changed(0)


def test_a_single_parameter_can_be_frozen(small: Networks, make_trainer: Trainers) -> None:
    record = RecordEpochs()
    _fit(make_trainer, TeacherModule(small()), FreezeLayers(["fc.bias"]), record)
    assert "fc.weight" in record.changed(0)
    assert "fc.bias" not in record.changed(0)


def test_a_layer_name_is_not_a_prefix(make_trainer: Trainers) -> None:
    network = nn.Sequential()
    for name in ("flat", "layer1", "layer10"):
        network.add_module(name, nn.Flatten() if name == "flat" else nn.Linear(64, 64))
    network.add_module("head", nn.Linear(64, 10))
    record = RecordEpochs()
    _fit(make_trainer, TeacherModule(network), FreezeLayers(["layer1"]), record)
    assert not _of_layers(record.changed(0), "layer1.")
    assert _of_layers(record.changed(0), "layer10.")


def test_learned_parts_of_losses_are_not_frozen(small: Networks, make_trainer: Trainers) -> None:
    losses = {"hard": HardTargetLoss(), "hint": HintLoss(student_layers=["layer1"], teacher_layers=["layer1"])}
    module = DistillationModule(small(), small(8), losses=losses, teacher_check="off")
    before = copy.deepcopy(module.student.state_dict())
    trainer = _fit(make_trainer, module, FreezeLayers())
    assert {name for name, value in before.items() if not torch.equal(value, module.student.state_dict()[name])} == {
        "fc.weight",
        "fc.bias",
    }
    learned = list(module.losses.parameters())
    assert learned
    assert all(weight in trainer.optimizers[0].state for weight in learned)


def test_weight_averaging_does_not_change_frozen_layers(small: Networks, make_trainer: Trainers) -> None:
    module = TeacherModule(small())
    before = copy.deepcopy(module.network.state_dict())
    _fit(make_trainer, module, FreezeLayers(), WeightAveraging())
    changed = {name for name, value in module.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


# --- unfrozen


def test_each_layer_is_unfrozen_in_its_epoch(small: Networks, make_trainer: Trainers) -> None:
    record = RecordEpochs()
    until: Until = {"conv1": None, "bn1": None, "layer1": 2, "layer1.0.bn2": 3, "layer2": 1}
    _fit(make_trainer, TeacherModule(small()), FreezeLayers(until_epoch=until), record, max_epochs=4)
    every = set(record.states[0])
    late = _of_layers(every, "layer1.0.bn2")
    middle = _of_layers(every, "layer1") - late
    starts = {1: _of_layers(every, "layer2"), 2: middle, 3: late}
    for epoch in range(4):
        moving = set().union(_of_layers(every, "fc"), *(group for start, group in starts.items() if start <= epoch))
        assert record.changed(epoch) == moving
        assert record.in_optimizer[epoch] == {name for name in moving if name.endswith(("weight", "bias"))}
        modes = record.modes[epoch * 4]
        assert modes["layer2.0.bn1"] == (epoch >= 1)
        assert modes["layer1.0.bn1"] == (epoch >= 2)
        assert modes["layer1.0.bn2"] == (epoch >= 3)
        assert not modes["bn1"]
        assert modes[""]
        assert modes["fc"]


class RecordUpdateSizes(pl.Callback):
    """Records the norm of each update of a parameter, divided by that of its gradient."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.found: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        weight = pl_module.network.get_parameter(self.name)
        self.before, self.gradient = weight.detach().clone(), None if weight.grad is None else weight.grad.clone()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        changed = (self.before - pl_module.network.get_parameter(self.name).detach()).norm()
        self.found.append(0.0 if self.gradient is None else float(changed / self.gradient.norm()))


def test_unfrozen_layers_follow_the_learning_rate_schedule(small: Networks, make_trainer: Trainers) -> None:
    """An update of plain SGD is the learning rate times the gradient."""
    head, layer = RecordUpdateSizes("fc.weight"), RecordUpdateSizes("layer1.0.conv1.weight")
    module = TeacherModule(
        small(),
        optimizer=partial(torch.optim.SGD, lr=0.4),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5),
        lr_interval="step",
    )
    _fit(make_trainer, module, FreezeLayers(until_epoch=1), head, layer, max_epochs=3)
    rates = [0.4 * 0.5 ** (step // 3) for step in range(12)]
    assert head.found == pytest.approx(rates, rel=1e-3)
    assert layer.found == pytest.approx([0.0] * 4 + rates[4:], rel=1e-3)


def test_fused_and_plain_sgd_agree_after_unfreezing(small: Networks, make_trainer: Trainers) -> None:
    network, found = small(), []
    for fused in (True, False):
        sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4, fused=fused, foreach=False)
        module = TeacherModule(copy.deepcopy(network), optimizer=sgd)
        torch.manual_seed(3)
        _fit(make_trainer, module, FreezeLayers(until_epoch=1))
        found.append(module.network.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


def test_until_epoch_0_freezes_nothing(small: Networks, make_trainer: Trainers) -> None:
    network = small()
    found = []
    for callbacks in ([], [FreezeLayers(until_epoch=0)]):
        module = TeacherModule(copy.deepcopy(network))
        torch.manual_seed(3)
        _fit(make_trainer, module, *callbacks)
        found.append(module.network.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


# --- resumed


def _weights_and_optimizer_state(trainer: pl.Trainer) -> dict[str, Any]:
    found: dict[str, Any] = dict(trainer.lightning_module.state_dict())
    for number, values in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"optimizer {number} {name}": value for name, value in values.items()}
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_interrupted_run_resumes_to_identical_state(
    optimizer: str, small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    """From before and after unfreezing, within an epoch and between two."""
    network = small()

    def run(*callbacks: pl.Callback, path: Path | None = None) -> dict[str, Any]:
        freeze = FreezeLayers(until_epoch={"conv1": None, "bn1": None, "layer1": 2, "layer2": 1})
        module = TeacherModule(copy.deepcopy(network), optimizer=OPTIMIZERS[optimizer])
        trainer = make_trainer(max_epochs=3, callbacks=[freeze, *callbacks])
        torch.manual_seed(1 if path is None else 99)
        trainer.fit(module, DigitsDataModule(batch_size=512), ckpt_path=path, weights_only=True)
        return _weights_and_optimizer_state(trainer)

    save = SaveAfterBatchesAndEpochs(tmp_path)
    expected = run(save)
    assert len(save.paths) == 3 * (2 + 1)
    for path in save.paths:
        found = run(path=path)
        assert set(found) == set(expected), path.stem
        for name, value in found.items():
            assert torch.equal(value, expected[name]), f"{name} differs after {path.stem}"


def test_after_a_fit_the_network_has_its_own_modes_and_requires_grad(small: Networks, make_trainer: Trainers) -> None:
    freeze, network = FreezeLayers(until_epoch=1), small()
    network.bn1.eval()  # set by the user
    network.conv1.weight.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    for epochs, changes in ((1, False), (3, True)):  # the second fit continues the first
        with pytest.warns(UserWarning, match="Found 1 module"):
            _fit(make_trainer, TeacherModule(network), freeze, max_epochs=epochs)
        assert {name for name, weight in network.named_parameters() if not weight.requires_grad} == {"conv1.weight"}
        assert [name for name, layer in network.named_modules() if not layer.training] == ["bn1"]
        assert torch.equal(network.conv1.weight, before["conv1.weight"])
        assert torch.equal(network.get_buffer("bn1.running_mean"), before["bn1.running_mean"])
        assert torch.equal(network.get_parameter("layer1.0.conv1.weight"), before["layer1.0.conv1.weight"]) != changes


class FailingCallback(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("in the middle")


def test_a_failed_fit_unfreezes_the_network(small: Networks, make_trainer: Trainers) -> None:
    network = small()
    with pytest.raises(RuntimeError, match="in the middle"):
        _fit(make_trainer, TeacherModule(network), FreezeLayers(), FailingCallback())
    assert all(weight.requires_grad for weight in network.parameters())
    assert all(layer.training for layer in network.modules())


def test_a_reused_classifier_is_never_unfrozen(small: Networks, make_trainer: Trainers) -> None:
    teacher = small(8)
    record = RecordEpochs()
    student = reuse_teacher_classifier(small(), teacher)
    _fit(make_trainer, TeacherModule(student), FreezeLayers(["layer1", "fc"], until_epoch=1), record, max_epochs=3)
    assert not _of_layers(record.changed(1) | record.changed(2), "fc")
    assert _of_layers(record.changed(1), "layer1")


# --- two processes

several_processes = pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*")


class WriteRankWeights(pl.Callback):
    """Writes the weights of each rank after each step to a file that the parent process can read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, Tensor]] = []
        self.options: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps.append({name: weight.detach().clone() for name, weight in pl_module.named_parameters()})
        if trainer.world_size > 1:
            assert isinstance(trainer.model, DistributedDataParallel)
            self.options.append(trainer.model.find_unused_parameters)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        state = {"steps": self.steps, "weights": pl_module.state_dict(), "options": self.options}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


@several_processes
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ddp_fork", {}),
        ("ddp_fork_find_unused_parameters_true", {}),
        ("ddp_fork", {"accumulate_grad_batches": 2}),
    ],
)
def test_two_processes_equal_one_after_unfreezing(
    strategy: str, options: dict[str, Any], small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    network = with_group_norms(small())
    found = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        trainer = make_trainer(
            max_epochs=3,
            callbacks=[FreezeLayers(until_epoch={"conv1": 2, "layer1": 1, "layer2": 1}), WriteRankWeights(folder)],
            devices=world,
            **({"strategy": strategy} if world == 2 else {}),
            **options,
        )
        trainer.fit(TeacherModule(copy.deepcopy(network)), DigitsDataModule(batch_size=256 // world))
        found.append([torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)])
    (one,), (first, second) = found
    assert set(first["options"]) == {strategy.endswith("true")}
    assert len(one["steps"]) == len(first["steps"]) == 12
    for step, (weights, others, expected) in enumerate(zip(first["steps"], second["steps"], one["steps"], strict=True)):
        for name, weight in weights.items():
            assert torch.equal(weight, others[name]), f"the ranks differ in {name} after step {step}"
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(first["steps"][-1]["network.conv1.weight"], network.get_parameter("conv1.weight"))


@several_processes
def test_a_run_of_two_processes_resumes_to_identical_weights(
    small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    """From before, between and after the epochs in which layers are unfrozen."""
    network = small()

    def run(*callbacks: pl.Callback, path: Path | None = None) -> list[dict[str, Any]]:
        freeze = FreezeLayers(until_epoch={"conv1": None, "layer1": 2, "layer2": 1})
        trainer = make_trainer(
            max_epochs=3, callbacks=[freeze, WriteRankWeights(tmp_path), *callbacks], strategy="ddp_fork", devices=2
        )
        module = TeacherModule(copy.deepcopy(network))
        torch.manual_seed(1 if path is None else 99)
        trainer.fit(module, DigitsDataModule(batch_size=256), ckpt_path=path, weights_only=True)
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=True)["weights"] for rank in range(2)]

    uninterrupted = run(SaveAfterBatchesAndEpochs(tmp_path))
    for path in ("epoch 0 ended", "epoch 1 batch 0", "epoch 2 batch 0"):
        for found, expected in zip(run(path=tmp_path / f"{path}.ckpt"), uninterrupted, strict=True):
            for name, value in found.items():
                assert torch.equal(value, expected[name]), f"{name} differs after {path}"


class CompressingDDP(DDPStrategy):
    """Registers the communication hook on the CPU too, which Lightning does not."""

    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        assert self._ddp_comm_hook is not None
        self.model.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)


@several_processes
def test_a_communication_hook_works_after_unfreezing(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    """PowerSGD keeps an error for each bucket; the hook counts its steps."""
    state = PowerSGDState(process_group=None, start_powerSGD_iter=2, min_compression_rate=1)
    strategy = CompressingDDP(
        start_method="fork", process_group_backend="gloo", ddp_comm_state=state, ddp_comm_hook=powerSGD_hook
    )
    writer = WriteRankWeights(tmp_path)
    freeze = FreezeLayers(until_epoch={"layer1": 2, "layer2": 1})
    _fit(make_trainer, TeacherModule(small()), freeze, writer, strategy=strategy, devices=2, max_epochs=3)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["steps"]) == 6
    for name, weight in first["steps"][-1].items():
        assert torch.equal(weight, second["steps"][-1][name])


@several_processes
def test_batch_norms_are_unfrozen_on_all_ranks(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    writer = WriteRankWeights(tmp_path)
    _fit(
        make_trainer,
        TeacherModule(small()),
        FreezeLayers(until_epoch=1),
        writer,
        strategy="ddp_fork",
        devices=2,
        max_epochs=3,
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, weight in first["steps"][-1].items():
        assert torch.equal(weight, second["steps"][-1][name])
    assert not torch.equal(first["steps"][-1]["network.bn1.weight"], torch.ones(4))


# --- refused


@pytest.mark.parametrize(
    ("layers", "until", "message"),
    [
        (["layer1"], {"layer2": 1}, r"^Give either layers and one until_epoch, or until_epoch with .*; not both\.$"),
        ([], None, r"^FreezeLayers got no layer to freeze; name one, or omit layers to freeze all but the head\.$"),
        (None, {}, r"^FreezeLayers got no layer to freeze; name one, or omit layers to freeze all but the head\.$"),
        (None, -1, r"^until_epoch must be >= 0, or null for the whole training, got -1\.$"),
        (None, {"layer1": -2}, r"^until_epoch must be >= 0, or null for the whole training, got {'layer1': -2}\.$"),
    ],
)
def test_wrong_arguments_are_refused(layers: list[str] | None, until: Until, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreezeLayers(layers, until_epoch=until)


class NoHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 10, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).flatten(1)


@pytest.mark.parametrize(
    ("freeze", "network", "message"),
    [
        (FreezeLayers(["layer"]), None, r"^ResNet has no layer 'layer' to freeze; choose from: conv1, bn1, .*, fc\.$"),
        (FreezeLayers(until_epoch={"fc": 1, "a": 2, "": 3}), None, r"^ResNet has no layer 'a', '' to freeze; choose"),
        (
            FreezeLayers(["conv1", "bn1", "layer1", "layer2", "fc"]),
            None,
            r"^FreezeLayers leaves nothing of ResNet to t",
        ),
        (
            FreezeLayers(["body"], until_epoch=2),
            NoHead(),
            r"^FreezeLayers leaves nothing of NoHead to train in epoch 0; freeze ",
        ),
        (FreezeLayers(), NoHead(), r"^All weights of NoHead compute its logits, so no"),
    ],
)
def test_layers_that_cannot_be_frozen_are_refused_before_the_first_step(
    freeze: FreezeLayers, network: nn.Module | None, message: str, small: Networks, make_trainer: Trainers
) -> None:
    record = RecordEpochs()
    with pytest.raises(ValueError, match=message):
        _fit(make_trainer, TeacherModule(network or small()), freeze, record)
    assert not record.states


# --- the command line


def test_layers_and_epochs_are_read_from_yaml(kd: Callable[..., str], tmp_path: Path) -> None:
    callback = {"class_path": "FreezeLayers", "init_args": {"until_epoch": {"layer1": None, "layer2": 1}}}
    (tmp_path / "freeze.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    quick = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
    kd("fit", "-c", "digits/student", "-c", "freeze.yaml", *quick)
    run = tmp_path / "lightning_logs/digits/student/version_0"
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    changed = {name for name, value in state.items() if name.endswith("bn1.weight") and (value != 1).any()}
    assert changed == {"network.bn1.weight", "network.layer3.0.bn1.weight"}
