"""The format number that every file of kd_lightning carries."""

from collections.abc import Mapping
from pathlib import Path

from kd_lightning.errors import UserError

KEY = "kd_lightning_format"
FORMAT = 1
_LIGHTNING = "pytorch-lightning_version"
_OWN_KEYS = {"data_config", "sliced_shapes", "trained_on", "narrowed"}
"""Keys that only modules of kd_lightning add to Lightning's checkpoints; the last two are from before format 1."""


def check_format(content: Mapping[str, object], path: str | Path) -> None:
    """Make sure that a checkpoint has the current format, unless another program wrote it.

    Args:
        content: Content of the file.
        path: Path of the file, for the message.

    Raises:
        UserError: If another version of kd_lightning wrote the file.

    Example:
        >>> check_format({KEY: FORMAT}, "best.ckpt")
        >>> check_format({"fc.weight": None}, "published.pth")
    """
    ours = KEY in content or (_LIGHTNING in content and not _OWN_KEYS.isdisjoint(content))
    if ours and content.get(KEY) != FORMAT:
        raise UserError(
            f"{str(path)!r} was written by another version of kd_lightning (its format is {content.get(KEY)} and not "
            f"{FORMAT}); train again with this version, or use the version that wrote it."
        )
