from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.networks import DataConfig, ResNet, data_config, set_data_config

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]


def test_a_teacher_learns_the_digits(small: Networks, make_trainer: Trainers) -> None:
    trainer = make_trainer(max_epochs=10)
    module = TeacherModule(small(8))
    trainer.fit(module, DigitsDataModule(batch_size=32))
    figures = trainer.callback_metrics
    assert figures["val/accuracy"] > 0.9
    assert {"val/loss", "val/top5", "val/ece", "train/loss", "train/accuracy", "train/images_per_second"} <= set(
        figures
    )


def test_the_data_config_is_set_on_the_network(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    network = small()
    make_trainer(fast_dev_run=True).fit(TeacherModule(network), digits)
    assert data_config(network) == DataConfig(digits.mean, digits.std, digits.classes)


def test_images_are_converted_to_the_statistics_of_the_network(small: Networks, make_trainer: Trainers) -> None:
    network = small().eval()
    plain, other = DigitsDataModule(mean=(0.0,), std=(1.0,)), DigitsDataModule(mean=(0.5,), std=(0.25,))
    set_data_config(network, DataConfig.of([0.0], [1.0]))
    first, second = (make_trainer().predict(TeacherModule(network), data) for data in (plain, other))
    assert first is not None
    assert second is not None
    for (_, labels, probabilities), (_, other_labels, other_probabilities) in zip(first, second, strict=True):
        assert torch.equal(labels, other_labels)
        torch.testing.assert_close(probabilities, other_probabilities, rtol=1e-4, atol=1e-5)


def test_a_fine_tuned_network_keeps_its_statistics_and_gets_new_classes(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    network = small()
    set_data_config(network, DataConfig.of([0.1], [0.2], ["a"] * 10))
    make_trainer(fast_dev_run=True).fit(TeacherModule(network), digits)
    assert data_config(network) == DataConfig((0.1,), (0.2,), digits.classes)


def test_class_names_that_differ_from_the_data_are_refused(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    network = small()
    set_data_config(network, DataConfig.of(classes=list("9876543210")))
    with pytest.raises(ValueError, match="trained on the classes 9, 8, 7, 6, 5 and 5 more"):
        make_trainer().test(TeacherModule(network), digits)


def test_another_number_of_classes_than_the_data_have_is_refused(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    with pytest.raises(ValueError, match=r"has 7 classes but the data have 10; .*num_classes=10"):
        make_trainer().fit(TeacherModule(small(num_classes=7)), digits)


def test_a_network_of_lazy_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no shape yet \('1.weight'\); show it a batch first"):
        TeacherModule(nn.Sequential(nn.Flatten(), nn.LazyLinear(10)))


def _loader(labels: list[int], batch_size: int = 4) -> DataLoader:
    images = torch.randn(len(labels), 1, 8, 8)
    return DataLoader(TensorDataset(images, torch.tensor(labels)), batch_size=batch_size)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("bad", [-2, 10])
def test_labels_out_of_range_are_refused_with_plain_loaders(small: Networks, make_trainer: Trainers, bad: int) -> None:
    with pytest.raises(ValueError, match=rf"Label {bad} is outside \[0, 10\)"):
        make_trainer(num_sanity_val_steps=0).fit(TeacherModule(small()), _loader([0, 1, bad, -1]), _loader([0, 1]))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_unlabelled_rows_of_plain_loaders_are_accepted(small: Networks, make_trainer: Trainers) -> None:
    trainer = make_trainer()
    trainer.fit(TeacherModule(small()), _loader([0, 1, -1, -1, -1, -1, -1, -1]), _loader([3, -1]))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_batch_of_one_with_batch_norm_is_refused(small: Networks, make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match=r"more than one image in a batch; set batch_size to 2"):
        make_trainer().fit(TeacherModule(small()), _loader([0, 1], batch_size=1), _loader([0, 1]))


def test_train_metrics_are_right_under_accumulation_and_uneven_batches(
    small: Networks, make_trainer: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They equal the metrics of all batches at once."""
    data = DigitsDataModule(batch_size=100)
    module = TeacherModule(small(), learning_rate=1e-12, weight_decay=0.0)
    batches = []
    log_step = module.log_step

    def recorded(loss: Tensor, terms: dict[str, Tensor], logits: Tensor, labels: Tensor, *rest: Any) -> None:
        batches.append((logits.detach(), labels))
        log_step(loss, terms, logits, labels, *rest)

    monkeypatch.setattr(module, "log_step", recorded)
    trainer = make_trainer(accumulate_grad_batches=3)
    trainer.fit(module, data)
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    torch.testing.assert_close(
        trainer.callback_metrics["train/loss"], torch.nn.functional.cross_entropy(logits, labels)
    )
    torch.testing.assert_close(trainer.callback_metrics["train/accuracy"], (logits.argmax(1) == labels).float().mean())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precision_clipping_and_accumulation_work_with_any_optimizer(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, precision: str
) -> None:
    trainer = make_trainer(precision=precision, gradient_clip_val=1.0, accumulate_grad_batches=2)
    module = TeacherModule(
        small(),
        optimizer=torch.optim.AdamW,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    )
    trainer.fit(module, digits)
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_norms_and_biases_do_not_decay(small: Networks, digits: DigitsDataModule, make_trainer: Trainers) -> None:
    trainer = make_trainer(fast_dev_run=True)
    trainer.fit(TeacherModule(small(), weight_decay=0.5), digits)
    decay_of_matrices = {w.ndim > 1: g["weight_decay"] for g in trainer.optimizers[0].param_groups for w in g["params"]}
    assert decay_of_matrices == {True: 0.5, False: 0.0}


def test_the_default_schedule_ends_with_the_run(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    trainer = make_trainer(max_epochs=2)
    trainer.fit(TeacherModule(small(), learning_rate=0.1), digits)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ],
)
def test_invalid_arguments_are_refused(small: Networks, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherModule(small(), **options)


def test_loading_a_checkpoint_from_python_asks_for_the_network(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    trainer = make_trainer(fast_dev_run=True)
    network = small()
    trainer.fit(TeacherModule(network, label_smoothing=0.1), digits)
    path = tmp_path / "teacher.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"pass the network again: TeacherModule.load_from_checkpoint\(path, network="):
        TeacherModule.load_from_checkpoint(path)
    loaded = TeacherModule.load_from_checkpoint(path, network=small())
    assert loaded.label_smoothing == 0.1
    assert data_config(loaded.network) == data_config(network)
    for key, value in network.state_dict().items():
        assert torch.equal(value, loaded.network.state_dict()[key])


@pytest.mark.parametrize("optimizer", [None, lambda groups: torch.optim.AdamW(groups, lr=0.1)])
def test_layer_decay_lowers_the_rate_of_earlier_layers(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, optimizer: Any
) -> None:
    trainer = make_trainer(max_steps=1)
    network = small()
    trainer.fit(TeacherModule(network, layer_decay=0.5, optimizer=optimizer), digits)
    rates = {weight: group["lr"] for group in trainer.optimizers[0].param_groups for weight in group["params"]}
    head = rates[network.fc.weight]
    parts = ["layer2", "layer1", "bn1", "conv1"]
    for steps, part in enumerate(parts, start=1):
        assert {rates[weight] / head for weight in network.get_submodule(part).parameters()} == {0.5**steps}


def test_layer_decay_out_of_range_is_refused(small: Networks) -> None:
    for wrong in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\]"):
            TeacherModule(small(), layer_decay=wrong)
