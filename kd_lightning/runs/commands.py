"""The commands that train and test a run, as far as they are still to be run."""

import sys
from collections.abc import Sequence

from kd_lightning.runs.run import Run


def commands_left(run: Run, fit: Sequence[str], *, test: bool = True) -> list[list[str]]:
    """Return the commands that a run still needs: its training, resumed if it was interrupted, and its test.

    Args:
        run: The run, in the folder that ``fit`` writes to.
        fit: Words of the command that trains it, after ``kd-lightning``.
        test: Test it as well, which is when the run is complete.

    Example:
        >>> commands_left(Run("nowhere"), ["fit", "-c", "digits/student"])
        [['fit', '-c', 'digits/student'], ['test', '-c', 'nowhere/config.yaml']]
    """
    if run.test_file.is_file():
        return []
    config = str(run.config_file)
    training = ["fit", "-c", config, "--ckpt_path=auto"] if run.config_file.is_file() else list(fit)
    return [training, ["test", "-c", config]] if test else [training]


def process_words(command: Sequence[str]) -> list[str]:
    """Return the words that start a command of this package in a process of its own, with this Python."""
    return [sys.executable, "-m", "kd_lightning", *command]
