"""Which augmentation a data module applies."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kd_lightning.errors import UserError


@dataclass(frozen=True)
class Augmentation:
    """Settings of the random changes to training images; what is ``None`` is left to the data module's default.

    Args:
        padding: Pixels of zeros added on each side before a random crop of the original size; 0 for no crop.
        flip: Mirror half of the images.
        mixup: alpha of mixup's Beta distribution; 0 for no mixup.
        cutmix: alpha of CutMix's Beta distribution; 0 for no CutMix. With both, each image gets one of them.
        rotation: Largest angle of a random rotation, in degrees; used by ``DomainPairDataModule`` only.
        scaling: Largest relative stretch along either axis, and shear; used by ``DomainPairDataModule`` only.

    Raises:
        UserError: If a value is outside its range.

    Example:
        >>> Augmentation.resolve(Augmentation(flip=False), Augmentation(padding=4, flip=True)).padding
        4
    """

    padding: int | None = None
    flip: bool | None = None
    mixup: float | None = None
    cutmix: float | None = None
    rotation: float | None = None
    scaling: float | None = None

    def __post_init__(self) -> None:
        for name in ("padding", "mixup", "cutmix"):
            if not (getattr(self, name) or 0) >= 0:
                raise UserError(f"augmentation.{name} must be >= 0, got {getattr(self, name)}.")
        if not 0 <= (self.rotation or 0) <= 180:
            raise UserError(f"augmentation.rotation must be in [0, 180] degrees, got {self.rotation}.")
        if not 0 <= (self.scaling or 0) < 1:
            raise UserError(f"augmentation.scaling must be in [0, 1), got {self.scaling}.")

    @classmethod
    def resolve(cls, given: "Augmentation | Mapping[str, Any]", defaults: "Augmentation") -> "Augmentation":
        """Return settings without ``None``: given values first, then defaults, then off.

        Args:
            given: The user's settings, or the plain data that a checkpoint holds of them.
            defaults: The data module's defaults.
        """
        chosen = given if isinstance(given, Augmentation) else cls(**given)
        return cls(**{**_OFF, **defaults.given(), **chosen.given()})

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


_OFF = {
    field.name: 0 if field.name == "padding" else False if field.name == "flip" else 0.0
    for field in fields(Augmentation)
}
