"""Lightning's errors about arguments of the Trainer, in one sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from kd_lightning.cli.errors import innermost_cause, one_line
from kd_lightning.errors import UserError


@contextmanager
def explain_trainer_errors() -> Iterator[None]:
    """Turn into a user's error what Lightning raises for arguments that it can check only once the data are loaded.

    It raises a plain ``ValueError`` for them, so they are recognized by the argument that begins the message.

    Raises:
        ValueError: If ``val_check_interval`` does not fit the number of batches.
    """
    try:
        yield
    except ValueError as error:
        cause = innermost_cause(error)
        if not isinstance(cause, UserError) and one_line(cause).startswith("`val_check_interval`"):
            raise UserError(one_line(cause)) from error
        raise


def explain_device_error(message: str) -> str | None:
    r"""Return one sentence for Lightning's message about a device that does not exist; ``None`` for other messages.

    Example:
        >>> explain_device_error("You requested gpu: [7]\n But your machine only has: [0]")
        'trainer.devices names the GPUs [7], and this machine has [0]; choose among those.'
    """
    found = re.search(r"You requested gpu: (\[.*\])\s+But your machine only has: (\[.*\])", message)
    if found is not None:
        return f"trainer.devices names the GPUs {found[1]}, and this machine has {found[2]}; choose among those."
    if "No supported gpu backend found" in message or "CUDAAccelerator` can not run" in message:
        return (
            "There is no GPU that torch can use on this machine; leave out trainer.accelerator, or install a GPU "
            "driver and a build of torch for it."
        )
    return None
