"""Tables on the screen and in files."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_WIDEST = 10_000


def print_table(table: "Table") -> None:
    """Print a table; into a file or a pipe in its whole width, so that no name is cut."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, Console(width=_WIDEST).measure(table).maximum))
    console.print(table)
