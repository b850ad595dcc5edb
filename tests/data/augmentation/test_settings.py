"""Settings of the augmentation: partly given, given as plain data, from the command line, out of range."""

import json
import re
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from kd_lightning import Augmentation, CIFAR10DataModule, DigitsDataModule, DomainPairDataModule
from kd_lightning.data.augmentation.settings import PRESETS
from kd_lightning.errors import UserError

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


def test_the_table_of_the_presets_has_their_numbers() -> None:
    _, heading, _, *rows, _ = re.findall(
        r"^    \S.*", (Augmentation.__doc__ or "").split("The presets:")[1].split("``none``")[0], re.M
    )
    names = ("light", "standard", "strong")
    starts = [*map(heading.index, names), None]
    written: dict[str, dict[str, Any]] = {"none": {}, **{name: {} for name in names}}
    for row in rows:
        for name, start, end in zip(names, starts, starts[1:], strict=False):
            cell = row[start:end].strip()
            if cell:
                written[name][row.split()[0]] = read(cell)
    assert written == PRESETS


def read(cell: str) -> bool | float | tuple[float, ...]:
    """Return the value that is written in a cell of the table."""
    if cell == "yes":
        return True
    numbers = tuple(float(Fraction(number)) for number in cell.split(" to "))
    return numbers if len(numbers) > 1 else numbers[0]


parts = st.fixed_dictionaries(
    {},
    optional={
        "preset": st.sampled_from(sorted(PRESETS)),
        "padding": st.integers(0, 3),
        "resized_crop": st.booleans(),
        "crop_scale": st.sampled_from([(0.1, 0.5), (1.0, 1.0)]),
        "flip": st.booleans(),
        "trivial_augment": st.booleans(),
        "rand_augment": st.integers(0, 2),
        "magnitude": st.integers(0, 30),
        "erasing": st.sampled_from([0.0, 0.2]),
        "mixup": st.sampled_from([0.0, 0.3]),
    },
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(given=parts, defaults=parts, others=parts)
def test_any_settings_resolve_once_or_are_refused(given: Any, defaults: Any, others: Any) -> None:
    try:
        own, below, other = (Augmentation(**options) for options in (given, defaults, others))
        resolved = Augmentation.resolve(own, below)
    except UserError:  # of two parts that exclude each other, or one that is off
        return
    assert all(getattr(resolved, name) == value for name, value in own.given().items())
    assert not (resolved.padding and resolved.resized_crop)
    assert not (resolved.trivial_augment and resolved.rand_augment)
    assert bool(resolved.resized_crop) == (resolved.crop_scale is not None) == (resolved.crop_ratio is not None)
    assert bool(resolved.rand_augment) == (resolved.magnitude is not None)
    for kept in (resolved, json.loads(json.dumps(asdict(resolved)))):
        again = Augmentation.resolve(kept, other)
        assert replace(again, preset=resolved.preset) == resolved  # the name of a preset has no effect by then


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
        ("standard", "augmentation is a group of settings, got 'standard'; give Augmentation"),
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
        ({"erasing": "0.1"}, r"erasing must be in \[0, 1\], got '0.1'"),
        ({"mixup": float("inf")}, "mixup must be >= 0, got inf"),
        ({"rand_augment": 2.5}, "rand_augment must be an integer >= 0, got 2.5"),
        ({"magnitude": 31}, r"magnitude must be an integer in \[0, 30\], got 31"),
        ({"flip": "no"}, "flip must be true or false, got 'no'"),
        ({"preset": ["light"]}, r"preset must be none or light or standard or strong, got \['light'\]"),
        ({"crop_scale": 0.5}, "crop_scale must be a smallest and a largest number above 0, up to 1, got 0.5"),
        ({"crop_scale": ("0.5", 1.0)}, r"crop_scale must be a smallest .*, got \['0.5', 1.0\]"),
        ({"crop_ratio": (1.0, float("inf"))}, r"crop_ratio must be a smallest .*, got \[1.0, inf\]"),
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


def test_numbers_of_numpy_become_plain_data() -> None:
    given: dict[str, Any] = {"erasing": np.float32(0.5), "padding": np.int64(3), "flip": np.bool_(True), "mixup": 1}
    kept = asdict(Augmentation(**given))
    assert {type(kept[name]) for name in ("erasing", "mixup")} == {float}
    assert (kept["padding"], type(kept["padding"]), kept["flip"]) == (3, int, True)
    assert type(kept["flip"]) is bool


def test_hyper_parameters_are_plain_data_that_rebuild_the_module() -> None:
    data = DigitsDataModule(margin=1, augmentation=Augmentation(mixup=0.2), split_seed=3)
    saved = dict(data.hparams)
    assert isinstance(saved["augmentation"], dict)
    again = DigitsDataModule(**saved)
    assert dict(again.hparams) == saved
    assert (again.margin, again.augmentation, again.split_seed) == (1, data.augmentation, 3)
