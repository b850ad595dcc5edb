"""Which augmentation a data module applies."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from math import inf
from typing import Any

from kd_lightning.data.augmentation.allowed import Allowed
from kd_lightning.errors import UserError


@dataclass(frozen=True)
class Augmentation:
    """Settings of the random changes to training images.

    What is ``None`` is taken from the ``preset``, then from the data module's defaults; 0 or false switches a part off.
    The presets:

    ================  ======  ==========  ==========
    field             light   standard    strong
    ================  ======  ==========  ==========
    padding           4
    resized_crop              yes         yes
    crop_scale                0.35 to 1   0.2 to 1
    crop_ratio                3/4 to 4/3  3/4 to 4/3
    flip              yes     yes         yes
    trivial_augment           yes
    rand_augment                          2
    magnitude                             9
    brightness                            0.2
    contrast                              0.2
    saturation                            0.2
    erasing                   0.1         0.1
    mixup                                 0.2
    cutmix                                1
    ================  ======  ==========  ==========

    ``none`` switches everything off. Padded and resized crops exclude each other, as TrivialAugment and RandAugment do:
    to give one switches the other off where a preset or a data module has it.

    Args:
        preset: ``"none"``, ``"light"``, ``"standard"`` or ``"strong"``.
        padding: Pixels of zeros added on each side before a random crop of the original size.
        resized_crop: Cut out a random box, of ``crop_scale`` and ``crop_ratio``, and resize it.
        crop_scale: Smallest and largest area of that box, relative to the image; (0.35, 1) by default.
        crop_ratio: Smallest and largest width by height of that box; (3/4, 4/3) by default.
        flip: Mirror half of the images left to right.
        vertical_flip: Mirror half of the images top to bottom.
        trivial_augment: Apply one random operation of random strength to each image (TrivialAugment).
        rand_augment: Number of random operations on each image (RandAugment).
        magnitude: Strength of RandAugment's operations, from 0 to 30; 9 by default.
        brightness: Largest relative change of the brightness.
        contrast: Largest relative change of the contrast.
        saturation: Largest relative change of the saturation.
        hue: Largest shift of the hue, from 0 to 0.5 (half of the circle of colours).
        grey: Probability that an image becomes grey.
        blur: Probability that an image is blurred.
        erasing: Probability that a random box of the image is erased.
        mixup: alpha of mixup's Beta distribution.
        cutmix: alpha of CutMix's Beta distribution. With both, each image gets one of them.
        rotation: Largest angle of a random rotation, in degrees; used by ``DomainPairDataModule`` only.
        scaling: Largest relative stretch along either axis, and shear; used by ``DomainPairDataModule`` only.

    Raises:
        UserError: If a value is outside its range, or two exclude each other.

    Example:
        >>> settings = Augmentation.resolve(Augmentation(preset="standard", erasing=0.0), Augmentation(padding=4))
        >>> settings.padding, settings.crop_scale, settings.flip, settings.erasing
        (0, (0.35, 1.0), True, 0.0)
    """

    preset: str | None = None
    padding: int | None = None
    resized_crop: bool | None = None
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] | None = None
    flip: bool | None = None
    vertical_flip: bool | None = None
    trivial_augment: bool | None = None
    rand_augment: int | None = None
    magnitude: int | None = None
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    grey: float | None = None
    blur: float | None = None
    erasing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    rotation: float | None = None
    scaling: float | None = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in list(PRESETS):
            nearest = get_close_matches(str(self.preset), PRESETS, n=1)
            advice = f"; the nearest is {nearest[0]!r}" if nearest else ""
            raise UserError(f"augmentation.preset must be {' or '.join(PRESETS)}, got {self.preset!r}{advice}.")
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value is None:
                continue
            if value not in allowed:
                raise UserError(f"augmentation.{name} must be {allowed}, got {value!r}.")
            object.__setattr__(self, name, allowed.kind(value))  # as the dataclass itself does where it is frozen
        self._read_interval("crop_scale", highest=1.0)
        self._read_interval("crop_ratio", highest=inf)
        box = [name for name in ("crop_scale", "crop_ratio") if getattr(self, name) is not None]
        if box and self.resized_crop is False:
            raise UserError(f"augmentation.{box[0]} is of resized crops; set augmentation.resized_crop to true.")
        if self.padding and (box or self.resized_crop):
            raise UserError("augmentation.padding and resized_crop are two kinds of random crops; give one of them.")
        if self.trivial_augment and self.rand_augment:
            raise UserError("augmentation.trivial_augment and rand_augment exclude each other; give one of them.")

    def _read_interval(self, name: str, *, highest: float) -> None:
        """Keep an interval as a tuple of floats, after checking it."""
        value = getattr(self, name)
        if value is None:
            return
        ends, allowed = value if isinstance(value, tuple | list) else [], Allowed(float, high=highest)
        if len(ends) != 2 or not all(end in allowed and end > 0 for end in ends) or ends[0] > ends[1]:
            limits = "" if highest == inf else f", up to {highest:g}"
            got = list(ends) or repr(value)
            raise UserError(f"augmentation.{name} must be a smallest and a largest number above 0{limits}, got {got}.")
        object.__setattr__(self, name, tuple(map(float, ends)))

    @classmethod
    def resolve(cls, given: "Augmentation | Mapping[str, Any]", defaults: "Augmentation") -> "Augmentation":
        """Return settings without ``None``: given values first, then the preset, then defaults, then off.

        The box of resized crops and the magnitude of RandAugment stay ``None`` where those are off.

        Args:
            given: The user's settings, or the plain data that a checkpoint holds of them.
            defaults: The data module's defaults.

        Raises:
            UserError: If a value is outside its range, or belongs to a part that is off.
        """
        chosen = as_settings(given)
        values = {field.name: _OFF.get(field.name, 0.0) for field in fields(cls)}
        for settings in (defaults, chosen):
            for layer in (PRESETS.get(settings.preset or "", {}), settings.given()):
                values = _laid_over(values, layer)
        if chosen.preset == "none":
            values = _laid_over({name: _OFF.get(name, 0.0) for name in values}, chosen.given())
        if chosen.magnitude is not None and not values["rand_augment"]:
            raise UserError("augmentation.magnitude is that of RandAugment; set augmentation.rand_augment.")
        box = {name: (values[name] or value) if values["resized_crop"] else None for name, value in _BOX.items()}
        magnitude = _MAGNITUDE if values["magnitude"] is None else values["magnitude"]
        return cls(**{**values, **box, "magnitude": magnitude if values["rand_augment"] else None})

    def given(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check_unused(self, *names: str, by: str, instead: str) -> None:
        """Raise an error if a field is switched on that a data module does not apply.

        Args:
            *names: Fields that are not applied.
            by: Class of the data module.
            instead: Advice for the message.
        """
        for name in names:
            if getattr(self, name):
                raise UserError(f"{by} does not apply augmentation.{name}; {instead}.")


_MAGNITUDE = 9
_BOX = {"crop_scale": (0.35, 1.0), "crop_ratio": (3 / 4, 4 / 3)}
_STANDARD = {"resized_crop": True, **_BOX, "flip": True, "trivial_augment": True, "erasing": 0.1}
_STRONG = {
    "resized_crop": True,
    "crop_scale": (0.2, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "flip": True,
    "rand_augment": 2,
    "magnitude": _MAGNITUDE,
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.2,
    "erasing": 0.1,
    "mixup": 0.2,
    "cutmix": 1.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "light": {"padding": 4, "flip": True},
    "standard": _STANDARD,
    "strong": _STRONG,
}
_OFF: dict[str, Any] = {
    "preset": None,
    "padding": 0,
    "resized_crop": False,
    "crop_scale": None,
    "crop_ratio": None,
    "flip": False,
    "vertical_flip": False,
    "trivial_augment": False,
    "rand_augment": 0,
    "magnitude": None,
}
"""Values that are off, where they are not 0.0."""
_PROBABILITY = Allowed(float, 0, 1)
_ALLOWED = {
    "padding": Allowed(int),
    "resized_crop": Allowed(bool),
    "flip": Allowed(bool),
    "vertical_flip": Allowed(bool),
    "trivial_augment": Allowed(bool),
    "rand_augment": Allowed(int),
    "magnitude": Allowed(int, 0, 30),
    "brightness": Allowed(float),
    "contrast": Allowed(float),
    "saturation": Allowed(float),
    "hue": Allowed(float, 0, 0.5),
    "grey": _PROBABILITY,
    "blur": _PROBABILITY,
    "erasing": _PROBABILITY,
    "mixup": Allowed(float),
    "cutmix": Allowed(float),
    "rotation": Allowed(float, 0, 180),
    "scaling": Allowed(float, 0, 1, below=True),
}


def _laid_over(values: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with those of a layer above them, which switches off what it excludes."""
    merged = {**values, **layer}
    crops = layer.get("resized_crop") or layer.get("crop_scale") or layer.get("crop_ratio")
    if crops:
        merged.update(resized_crop=True, padding=0)
    elif layer.get("padding") or layer.get("resized_crop") is False:
        merged.update(resized_crop=False, crop_scale=None, crop_ratio=None)
    if layer.get("trivial_augment"):
        merged.update(rand_augment=0, magnitude=None)
    elif layer.get("rand_augment"):
        merged["trivial_augment"] = False
    elif layer.get("rand_augment") == 0:
        merged["magnitude"] = None
    return merged


def as_settings(given: Augmentation | Mapping[str, Any]) -> Augmentation:
    """Return settings, or those that plain data describes.

    Raises:
        UserError: If there is no field of a name, or they are something else.
    """
    if isinstance(given, Augmentation):
        return given
    if not isinstance(given, Mapping):
        raise UserError(
            f"augmentation is a group of settings, got {given!r}; give Augmentation(preset=...) or a dictionary."
        )
    names = [field.name for field in fields(Augmentation)]
    for name in given:
        if name not in names:
            nearest = get_close_matches(str(name), names, n=1)
            advice = f"; the nearest is {nearest[0]!r}" if nearest else ""
            raise UserError(f"There is no augmentation {name!r}{advice}.")
    return Augmentation(**given)
