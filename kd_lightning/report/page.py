"""The report as one HTML page and as Markdown."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import count
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kd_lightning.files.atomic import atomic_write

MARKS = {
    ".html": '<meta name="generator" content="kd-lightning report">',
    ".md": "<!-- generator: kd-lightning report -->",
    ".svg": "<dc:title>kd-lightning report</dc:title>",
}
"""Text in every file of a report, by its suffix; other files are not overwritten."""


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        columns: Names of the columns; the first names the row.
        rows: Cells by column, plain text; a second line is shown smaller.
        best: Numbers of the best rows, by column.
        texts: Number of columns that contain words, the first ones.
    """

    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    best: Mapping[str, Sequence[int]] = field(default_factory=dict)
    texts: int = 1


@dataclass(frozen=True)
class Number:
    """A number that is shown large.

    Attributes:
        name: Plain text.
        value: The number with its unit.
        note: Comparison with another one.
    """

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Section:
    """A section with tables or pictures.

    Attributes:
        title: Plain text, unique in a report.
        note: A sentence or two for those who see such a thing for the first time.
        tables: Tables by caption.
        pictures: SVG by caption, unique in a report.
        kind: Kind of its tables and pictures: ``"cards"`` is a table that becomes a card for each row on a phone,
            ``"heat"`` one of percentages that are shown as colours, too, ``"photograph"`` a picture that is not drawn.
    """

    title: str
    note: str = ""
    tables: Mapping[str, Table] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    kind: Literal["plain", "cards", "heat", "plot", "photograph"] = "plain"


@dataclass(frozen=True)
class Page:
    """All that a report shows, in its order.

    Attributes:
        title: Plain text.
        lead: A sentence or two before the numbers.
        numbers: The numbers that are seen first.
        sections: The rest.
    """

    title: str
    lead: str
    numbers: Sequence[Number]
    sections: Sequence[Section]


def write(folder: Path, page: Page) -> None:
    """Write the page, its Markdown and its pictures into a folder, in place of an earlier report's.

    Args:
        folder: Folder to write to; it is created if necessary.
        page: Contents of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {text: svg for section in page.sections for text, svg in section.pictures.items()}
    files = {text: f"picture-{number}.svg" for number, text in enumerate(drawn, 1)}
    contents = {files[text]: svg for text, svg in drawn.items()}
    contents |= {"report.md": render_markdown(page, files), "index.html": render_html(page)}
    for old in folder.glob("picture-*.svg"):
        old.unlink()
    for name, content in contents.items():
        with atomic_write(folder / name) as file:
            file.write(content.encode())


def render_html(page: Page) -> str:
    """Return a page as HTML that needs no other file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    numbers = count(1)
    return environment.get_template("page.html").render(
        mark=MARKS[".html"], page=page, embed=lambda svg, caption: _embed(svg, caption, next(numbers))
    )


_PAGE_COLOURS = {"#000000": "var(--ink)", "#ffffff": "var(--paper)", "#b0b0b0": "var(--grid)"}
"""Colours of a drawing that change in dark mode: lines, background and grid."""


def _embed(svg: str, caption: str, number: int) -> str:
    """Return a picture for the page: with ids of its own, the page's colours, and its caption as its text."""
    named = re.compile(r'(\sid="|href="#|url\(#)')
    svg = re.sub(r"<[^>]+>", lambda tag: named.sub(rf"\1picture-{number}-", tag[0]), svg)
    colours = re.compile("(?<=[:] )(" + "|".join(_PAGE_COLOURS) + ')(?=[;"])')
    svg = re.sub(r'\sstyle="[^"]*"', lambda style: colours.sub(lambda c: _PAGE_COLOURS[c[0]], style[0]), svg)
    return svg if ' role="img"' in svg else svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)


def render_markdown(page: Page, files: Mapping[str, str]) -> str:
    """Return the same as Markdown.

    Args:
        page: Contents of the page.
        files: Name of the file of each picture, by caption.
    """
    lines = [MARKS[".md"], f"# {_plain(page.title)}", "", _plain(page.lead), ""]
    lines += [f"- {_plain(number.name)}: **{_plain(number.value)}** ({_plain(number.note)})" for number in page.numbers]
    for section in page.sections:
        lines += ["", f"## {_plain(section.title)}", *(["", _plain(section.note)] if section.note else [])]
        for name, table in section.tables.items():
            lines += ["", *([f"### {_plain(name)}", ""] if len(section.tables) > 1 else []), *_table_lines(table)]
        lines += ["", *(f"![{_plain(text)}]({files[text]})" for text in section.pictures)]
    return "\n".join([*lines, ""])


def _table_lines(table: Table) -> list[str]:
    aligned = [*[" --- "] * table.texts, *[" ---: "] * (len(table.columns) - table.texts)]
    lines = [f"| {' | '.join(map(_plain, table.columns))} |", f"|{'|'.join(aligned)}|"]
    return lines + [f"| {' | '.join(_plain(_one_line(row[name])) for name in table.columns)} |" for row in table.rows]


def _one_line(cell: str) -> str:
    first, _, second = cell.partition("\n")
    return f"{first} ({second})" if second else first


def _plain(text: str) -> str:
    """Return text that Markdown shows literally, in one line."""
    return re.sub(r"([\\`*_\[\]|$])", r"\\\1", escape(text.replace("\n", "; "), quote=False))
