"""Lines that a command prints."""

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def echo(text: str) -> None:
    """Print a line at once, in the first of several processes only."""
    print(text, flush=True)
