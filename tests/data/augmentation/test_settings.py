"""Settings of the augmentation: partly given, given as plain data, from the command line, out of range."""

from dataclasses import asdict
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from kd_lightning import Augmentation, CIFAR10DataModule, DigitsDataModule, DomainPairDataModule

DEFAULTS = Augmentation(padding=4, flip=True)


@pytest.mark.parametrize("given", [Augmentation(padding=2), {"padding": 2}, {"padding": 2, "flip": None}])
def test_unset_fields_take_the_defaults_or_are_off(given: Any) -> None:
    settings = Augmentation.resolve(given, DEFAULTS)
    assert (settings.padding, settings.flip, settings.mixup, settings.resized_crop) == (2, True, 0.0, False)


def test_fields_set_to_off_override_the_defaults() -> None:
    settings = Augmentation.resolve(Augmentation(padding=0, flip=False), DEFAULTS)
    assert (settings.padding, settings.flip) == (0, False)


def test_a_preset_is_above_the_defaults_and_below_explicit_fields() -> None:
    settings = Augmentation.resolve(Augmentation(preset="standard", erasing=0.0, flip=False), DEFAULTS)
    assert (settings.padding, settings.resized_crop, settings.trivial_augment) == (0, True, True)
    assert (settings.crop_scale, settings.erasing, settings.flip) == ((0.35, 1.0), 0.0, False)
    off = Augmentation.resolve(Augmentation(preset="none"), DEFAULTS)
    assert not any(value for name, value in off.given().items() if name != "preset")
    only = Augmentation.resolve(Augmentation(preset="none", blur=0.5), DEFAULTS)
    assert (only.blur, only.padding, only.flip) == (0.5, 0, False)


@pytest.mark.parametrize("preset", [None, "none", "light", "standard", "strong"])
def test_resolved_settings_stay_what_they_are(preset: str | None) -> None:
    settings = Augmentation.resolve(Augmentation(preset=preset), DEFAULTS)
    assert Augmentation.resolve(settings, Augmentation(resized_crop=True, blur=0.5)) == settings
    assert Augmentation.resolve(asdict(settings), Augmentation(resized_crop=True)) == settings


@pytest.mark.parametrize(
    ("options", "on", "off"),
    [
        ({"preset": "standard", "padding": 8}, "padding", "resized_crop"),
        ({"preset": "light", "resized_crop": True}, "resized_crop", "padding"),
        ({"preset": "light", "crop_scale": (0.5, 1.0)}, "resized_crop", "padding"),
        ({"crop_ratio": (1.0, 1.0)}, "resized_crop", "padding"),
        ({"preset": "standard", "rand_augment": 1}, "rand_augment", "trivial_augment"),
        ({"preset": "strong", "trivial_augment": True}, "trivial_augment", "rand_augment"),
        ({"preset": "standard", "resized_crop": False}, "flip", "resized_crop"),
        ({"preset": "strong", "rand_augment": 0}, "flip", "rand_augment"),
    ],
)
def test_a_part_that_is_given_switches_off_what_it_excludes(options: dict[str, Any], on: str, off: str) -> None:
    settings = Augmentation.resolve(options, DEFAULTS)
    assert getattr(settings, on)
    assert not getattr(settings, off)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "standart"}, "preset must be none or light .* got 'standart'; the nearest is 'standard'"),
        ({"erazing": 0.1}, "There is no augmentation 'erazing'; the nearest is 'erasing'"),
        ({"crop_scale": (1.0, 0.3)}, "crop_scale must be a smallest and a largest number above 0, up to 1, got"),
        ({"crop_scale": (0.5, 1.2)}, "crop_scale must be a smallest and a largest number above 0, up to 1, got"),
        ({"crop_ratio": (2.0, 0.5)}, "crop_ratio must be a smallest and a largest number above 0, got"),
        ({"padding": 2, "resized_crop": True}, "padding and resized_crop are two kinds of random crops"),
        ({"crop_scale": (0.5, 1.0), "resized_crop": False}, "crop_scale is of resized crops"),
        ({"trivial_augment": True, "rand_augment": 2}, "trivial_augment and rand_augment exclude each other"),
        ({"magnitude": 5}, "magnitude is that of RandAugment"),
        ({"hue": 0.6}, r"hue must be in \[0, 0.5\], got 0.6"),
        ({"erasing": 1.5}, r"erasing must be in \[0, 1\], got 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation.resolve(options, DEFAULTS)


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
    given = {name: value for name, value in config.data.init_args.augmentation.items() if value is not None}
    assert given == {"padding": 2, "mixup": 0.2}
    data = parser.instantiate_classes(config).data
    assert isinstance(data, CIFAR10DataModule)
    assert (data.batch_size, data.views, data.seed) == (7, 3, 0)
    assert (data.augmentation.padding, data.augmentation.flip, data.augmentation.mixup) == (2, True, 0.2)
    flags = ["--data.augmentation.preset=standard", "--data.augmentation.crop_scale=[0.5, 1]"]
    preset = parser.instantiate_classes(parser.parse_args(["--data=kd_lightning.CIFAR10DataModule", *flags])).data
    assert (preset.augmentation.trivial_augment, preset.augmentation.crop_scale) == (True, (0.5, 1.0))


def test_hyper_parameters_are_plain_data_that_rebuild_the_module() -> None:
    data = DigitsDataModule(margin=1, augmentation=Augmentation(mixup=0.2), split_seed=3)
    saved = dict(data.hparams)
    assert isinstance(saved["augmentation"], dict)
    again = DigitsDataModule(**saved)
    assert dict(again.hparams) == saved
    assert (again.margin, again.augmentation, again.split_seed) == (1, data.augmentation, 3)
