"""Settings of the augmentation: partly given, given as plain data, from the command line, out of range."""

from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from kd_lightning import Augmentation, CIFAR10DataModule, DigitsDataModule, DomainPairDataModule

DEFAULTS = Augmentation(padding=4, flip=True)


@pytest.mark.parametrize("given", [Augmentation(padding=2), {"padding": 2}, {"padding": 2, "flip": None}])
def test_unset_fields_take_the_defaults_or_are_off(given: Any) -> None:
    assert Augmentation.resolve(given, DEFAULTS) == Augmentation(2, True, 0.0, 0.0, 0.0, 0.0)


def test_fields_set_to_off_override_the_defaults() -> None:
    assert Augmentation.resolve(Augmentation(padding=0, flip=False), DEFAULTS) == Augmentation(
        0, False, 0.0, 0.0, 0.0, 0.0
    )


@pytest.mark.parametrize(
    "options", [{"padding": -1}, {"mixup": -0.1}, {"cutmix": float("nan")}, {"rotation": 181.0}, {"scaling": 1.0}]
)
def test_values_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=rf"^augmentation\.{name} must be "):
        Augmentation(**options)


def test_settings_that_a_data_module_does_not_apply_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^DigitsDataModule does not apply augmentation\.rotation; set it in"):
        DigitsDataModule(augmentation=Augmentation(rotation=5.0))
    with pytest.raises(ValueError, match=r"^DomainPairDataModule does not apply augmentation\.padding; set it for"):
        DomainPairDataModule(DigitsDataModule(), DigitsDataModule(), augmentation=Augmentation(padding=1))


def test_flags_and_yaml_change_single_fields() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    parser.add_argument("--config", action="config")
    yaml = '{"data": {"class_path": "kd_lightning.CIFAR10DataModule", "init_args": {"augmentation": {"padding": 2}}}}'
    flags = ["--data.augmentation.mixup=0.2", "--data.batch_size=7", "--data.views=3"]
    config = parser.parse_args([f"--config={yaml}", *flags])
    assert config.data.init_args.augmentation.as_dict() == {
        "padding": 2,
        "flip": True,
        "mixup": 0.2,
        "cutmix": 0.0,
        "rotation": None,
        "scaling": None,
    }
    data = parser.instantiate_classes(config).data
    assert isinstance(data, CIFAR10DataModule)
    assert (data.batch_size, data.views, data.seed) == (7, 3, 0)
    assert data.augmentation == Augmentation(2, True, 0.2, 0.0, 0.0, 0.0)


def test_hyper_parameters_are_plain_data_that_rebuild_the_module() -> None:
    data = DigitsDataModule(margin=1, augmentation=Augmentation(mixup=0.2), split_seed=3)
    saved = dict(data.hparams)
    assert isinstance(saved["augmentation"], dict)
    again = DigitsDataModule(**saved)
    assert dict(again.hparams) == saved
    assert (again.margin, again.augmentation, again.split_seed) == (1, data.augmentation, 3)
