"""Steps that a graph replays: on a CPU a stand-in for the graph runs the captured function."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from mostly_slow import mostly_slow
from on_other_device import on_other_device
from recorded_step import ReplayStep
from resume_check import SaveAfterBatchesAndEpochs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from unusual_networks import WithDropout

from kd_lightning import AdaptationModule, Augmentation, DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks import FreezeLayers, MaskWeights
from kd_lightning.errors import UserError
from kd_lightning.losses import CoralLoss, HardTargetLoss, HintLoss, SoftTargetLoss
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.modules.graph_choice import reasons_against_graph
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]
pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|no `val_dataloader`).*")

HALVED: dict[str, Any] = {
    "learning_rate": 0.125,  # rates that float32 represents exactly, as the tensors of a graph hold them
    "lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5),
    "lr_interval": "step",
}


def network(width: int = 4) -> ResNet:
    return ResNet([1, 1], [width, 2 * width], in_channels=1)


def teacher(build: Callable[[], nn.Module] = network, **options: Any) -> TeacherModule:
    torch.manual_seed(1)
    return TeacherModule(build(), **{**HALVED, **options})


def distillation(losses: dict[str, Any] | None = None, **options: Any) -> DistillationModule:
    torch.manual_seed(5)
    large = network(8)
    torch.manual_seed(1)
    return DistillationModule(network(), large, losses=losses, teacher_check="off", **{**HALVED, **options})


def with_rising_hint() -> DistillationModule:
    hint = HintLoss(student_layers=["layer1"], teacher_layers=["layer1"], weight=2.0, warmup_epochs=3)
    return distillation({"hard": HardTargetLoss(), "hint": hint})


adamw = partial(torch.optim.AdamW, fused=True)
CONFIGURATIONS: dict[str, tuple[Callable[[], ClassificationModule], dict[str, Any], dict[str, Any]]] = {
    "teacher": (teacher, {}, {}),
    "distillation": (distillation, {}, {}),
    "a weight that rises with the epochs": (with_rising_hint, {}, {}),
    "cached teacher": (partial(distillation, teacher_cache=True), {"views": 2}, {}),
    "dropout": (partial(teacher, WithDropout), {}, {}),
    "mixup, which is drawn on the host": (teacher, {"augmentation": Augmentation(mixup=0.2)}, {}),
    "bfloat16": (distillation, {}, {"precision": "bf16-mixed"}),
    "clipped gradients": (teacher, {}, {"gradient_clip_val": 0.1}),
    "AdamW": (partial(teacher, optimizer=adamw, learning_rate=2**-8), {}, {}),
    "validation within an epoch": (distillation, {}, {"val_check_interval": 2}),
}


def final_state(trainer: pl.Trainer) -> dict[str, Any]:
    """Return weights, optimizer state, learning rates, counters, and all metrics but the speed."""
    found: dict[str, Any] = dict(trainer.lightning_module.state_dict())
    for number, state in enumerate(trainer.optimizers[0].state_dict()["state"].values()):
        found |= {f"optimizer {number} {name}": value for name, value in state.items()}
    speed = ("train/images_per_second", "train/waiting_for_data")
    metrics = {name: value for name, value in trainer.callback_metrics.items() if name not in speed}
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    return {**found, **metrics, "rates": rates, "steps": trainer.global_step}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        same = torch.equal(value, expected[name]) if isinstance(value, Tensor) else value == expected[name]
        assert same, f"{name}: {value} and {expected[name]}"


# --- the same run


def make_trainer_there(**options: Any) -> pl.Trainer:
    """A quiet trainer on the device of ``other_device.py``, from and to which a captured step may not copy."""
    from other_device import OtherDevice

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(strategy=OtherDevice(), **{**quiet, "log_every_n_steps": 1, **options})


def check_replayed(name: str, make_trainer: Trainers) -> None:
    build, options, trainer_options = CONFIGURATIONS[name]
    states = []
    for callbacks in ([], [replay := ReplayStep()]):
        trainer = make_trainer(max_epochs=3, callbacks=callbacks, **trainer_options)
        trainer.fit(build(), DigitsDataModule(batch_size=256, **options))
        states.append(final_state(trainer))
    assert_equal(states[1], states[0])
    assert (replay.captures, replay.replays) == (1, trainer.global_step)


def test_replayed_steps_in_bfloat16_equal_ordinary_ones_to_the_bit(make_trainer: Trainers) -> None:
    check_replayed("bfloat16", partial(make_trainer, log_every_n_steps=2))


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name != "bfloat16"])
@on_other_device
def test_replayed_steps_equal_ordinary_ones_to_the_bit(name: str) -> None:
    check_replayed(name, partial(make_trainer_there, log_every_n_steps=2))


def test_pairs_of_domains_are_replayed_too(make_trainer: Trainers) -> None:
    images, labels = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 10
    states = []
    for callbacks in ([], [replay := ReplayStep()]):
        loaders = {
            "source": DataLoader(TensorDataset(images, labels), 8),
            "target": DataLoader(TensorDataset(images.flip(0)), 8),
        }
        torch.manual_seed(1)
        module = AdaptationModule(
            network(), {"hard": HardTargetLoss(), "coral": CoralLoss(layers=["avgpool"])}, **HALVED
        )
        trainer = make_trainer(max_epochs=2, callbacks=callbacks, limit_val_batches=0)
        trainer.fit(module, loaders)
        states.append(final_state(trainer))
    assert_equal(states[1], states[0])
    assert replay.replays == 6


def test_a_batch_of_another_size_takes_an_ordinary_step(make_trainer: Trainers) -> None:
    images, labels = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 10
    states = []
    for callbacks in ([], [replay := ReplayStep()]):
        trainer = make_trainer(max_epochs=3, callbacks=callbacks, limit_val_batches=0)
        trainer.fit(teacher(), DataLoader(TensorDataset(images, labels), 8))
        states.append(final_state(trainer))
    assert_equal(states[1], states[0])
    assert (replay.captures, replay.replays) == (1, 6)


def test_a_step_is_captured_again_when_layers_are_thawed(make_trainer: Trainers) -> None:
    states = []
    for callbacks in ([], [replay := ReplayStep()]):
        frozen = FreezeLayers(["layer1"], until_epoch=1)
        trainer = make_trainer(max_epochs=2, callbacks=[frozen, *callbacks])
        trainer.fit(teacher(), DigitsDataModule(batch_size=256))
        states.append(final_state(trainer))
    assert_equal(states[1], states[0])
    assert replay.captures == 2


@pytest.mark.parametrize("name", mostly_slow(["distillation", "dropout", "cached teacher"], "distillation"))
@on_other_device
def test_a_replayed_run_resumes_from_every_checkpoint_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Also with rates that a tensor rounds: those of the default schedule."""
    build, options, trainer_options = CONFIGURATIONS[name]

    def run(callbacks: list[pl.Callback], path: Path | None = None) -> dict[str, Any]:
        trainer = make_trainer_there(max_epochs=2, callbacks=[ReplayStep(), *callbacks], **trainer_options)
        module = build()
        module.optimization = TeacherModule(network()).optimization
        trainer.fit(module, DigitsDataModule(batch_size=256, **options), ckpt_path=path, weights_only=True)
        state = final_state(trainer)
        return {name: value for name, value in state.items() if name not in ("train/loss_step", "learning_rate")}

    saver = SaveAfterBatchesAndEpochs(tmp_path)
    expected = run([saver])
    for path in saver.paths:
        if not path.stem.startswith("epoch 1 ended"):
            assert_equal(run([], path), expected)


def test_a_module_trains_as_ever_after_a_replayed_run(make_trainer: Trainers) -> None:
    module, data = teacher(), DigitsDataModule(batch_size=256)
    make_trainer(max_epochs=1, callbacks=[ReplayStep()]).fit(module, data)
    assert "training_step" not in vars(module)
    assert not data.augments_in_step
    make_trainer(max_epochs=1).fit(module, data)


# --- what cannot be replayed


class ChangesMomentum(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["momentum"] *= 0.99


class ReplacesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.network(images)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_weights(make_trainer: Trainers) -> None:
    images, labels = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 10
    images[17] = torch.nan
    module, kept = teacher(), {}

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            kept.update({name: weight.detach().clone() for name, weight in pl_module.named_parameters()})

    trainer = make_trainer(callbacks=[ReplayStep(), Keep()], limit_val_batches=0)
    with pytest.raises(UserError, match="Epoch 0, step 2: the term 'loss' is nan"):
        trainer.fit(module, DataLoader(TensorDataset(images, labels), 8))
    assert all(torch.equal(weight, kept[name]) for name, weight in module.named_parameters())


def test_settings_that_change_in_each_step_are_an_error(make_trainer: Trainers) -> None:
    trainer = make_trainer(callbacks=[ReplayStep(), ChangesMomentum()])
    with pytest.raises(UserError, match=r"changes from step to step .* change learning rates only"):
        trainer.fit(teacher(), DigitsDataModule(batch_size=256))


def test_a_buffer_that_is_replaced_is_an_error(make_trainer: Trainers) -> None:
    with pytest.raises(UserError, match="replaces its buffers in the forward pass"):
        make_trainer(callbacks=[ReplayStep()]).fit(teacher(ReplacesBuffer), DigitsDataModule(batch_size=256))


def test_an_error_of_the_capture_is_one_sentence(make_trainer: Trainers) -> None:
    class Fails(ReplayStep):
        def capture(self, step: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(UserError, match=r"cannot be captured as a CUDA graph \(operation not permitted"):
        make_trainer(callbacks=[Fails()]).fit(teacher(), DigitsDataModule(batch_size=256))


def test_a_graph_is_refused_on_a_cpu_before_the_first_step(make_trainer: Trainers) -> None:
    with pytest.raises(UserError, match="cannot be a CUDA graph, since it runs on the device 'cpu'"):
        make_trainer().fit(teacher(cuda_graph=True), DigitsDataModule(batch_size=256))


def test_another_value_is_refused() -> None:
    with pytest.raises(UserError, match="cuda_graph must be true, false or 'auto', got 'on'"):
        teacher(cuda_graph="on")
    with pytest.raises(UserError, match="captures graphs of its own"):
        teacher(cuda_graph=True, compile=True, compile_mode="reduce-overhead")


class ReadsNumbers(SoftTargetLoss):
    capturable = False


def with_waiting_loss() -> DistillationModule:
    return distillation({"soft": ReadsNumbers()})


one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=99)


class Watches(pl.Callback):
    def on_after_backward(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        (teacher, {"accumulate_grad_batches": 2}, "accumulated"),
        (teacher, {"detect_anomaly": True}, "anomalies"),
        (teacher, {"precision": "bf16-mixed", "gradient_clip_val": 1.0}, "not fused"),
        (partial(teacher, optimizer=torch.optim.AdamW, learning_rate=0.01), {}, "AdamW is not fused"),
        (partial(teacher, on_nonfinite="skip"), {}, "set on_nonfinite to stop"),
        (partial(teacher, lr_scheduler=one_cycle), {}, "momentum in each step"),
        (teacher, {"callbacks": [MaskWeights(sparsity=0.5, epochs=[0])]}, "MaskWeights changes"),
        (teacher, {"callbacks": [Watches()]}, "Watches has the hook on_after_backward"),
        (with_waiting_loss, {}, "'soft' (ReadsNumbers) cannot be captured"),
        (teacher, {}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(detect_anomaly|Anomaly Detection).*")
def test_each_obstacle_is_named(
    build: Callable[[], ClassificationModule], options: dict[str, Any], reason: str | None, make_trainer: Trainers
) -> None:
    found: list[str] = []

    class Ask(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found.extend(reasons_against_graph(pl_module))
            trainer.should_stop = True

    trainer = make_trainer(
        max_steps=1, max_epochs=1, **{**options, "callbacks": [*options.get("callbacks", []), Ask()]}
    )
    trainer.fit(build(), DigitsDataModule(batch_size=256))
    on_cpu, *others = found
    assert "it runs on the device 'cpu'" in on_cpu
    assert [reason] == [reason for text in others if reason in text] if reason else others == []


# --- a graph


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_cuda_graph_equals_its_function_and_resumes_to_the_same_bits(
    name: str, make_trainer: Trainers, tmp_path: Path
) -> None:
    build, options, trainer_options = CONFIGURATIONS[name]

    def run(callbacks: list[pl.Callback], path: Path | None = None, **module_options: Any) -> dict[str, Any]:
        trainer = make_trainer(
            max_epochs=2, accelerator="gpu", devices=1, callbacks=callbacks, deterministic=True, **trainer_options
        )
        module = build()
        module.acceleration.cuda_graph = module_options.get("cuda_graph", "auto")
        trainer.fit(module, DigitsDataModule(batch_size=256, **options), ckpt_path=path, weights_only=True)
        state = final_state(trainer)
        return {name: value for name, value in state.items() if name not in ("train/loss_step", "learning_rate")}

    saver = SaveAfterBatchesAndEpochs(tmp_path)
    graphed, plain = run([saver], cuda_graph=True), run([])
    for key, value in graphed.items():
        torch.testing.assert_close(value, plain[key], rtol=2e-2, atol=2e-3, msg=f"{key}: {{}}".format)
    for path in saver.paths[:4]:
        assert_equal(run([], path, cuda_graph=True), graphed)
