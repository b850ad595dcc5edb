"""The report as one HTML page and as Markdown."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

MARKS = {
    ".html": '<meta name="generator" content="kd-lightning report">',
    ".md": "<!-- generator: kd-lightning report -->",
    ".svg": "<dc:title>kd-lightning report</dc:title>",
}
"""Text in every file of a report, by its suffix; other files are not overwritten."""


@dataclass(frozen=True)
class Table:
    """The table of a report.

    Attributes:
        columns: Names of the columns.
        rows: Cells by column, plain text; a second line is shown smaller.
        best: Numbers of the best rows, by column.
    """

    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    best: Mapping[str, Sequence[int]]


def render_html(
    title: str,
    preface: str,
    table: Table,
    pictures: Mapping[str, Mapping[str, str]],
    tables: Mapping[str, Table],
    *,
    photographs: Sequence[str] = (),
) -> str:
    """Return the HTML page.

    Args:
        title: Plain text.
        preface: Plain text.
        table: The table.
        pictures: SVG by caption, by section.
        tables: Further tables by section.
        photographs: Sections of pictures that are photographs, which are shown side by side.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    numbers = count(1)
    return environment.get_template("page.html").render(
        mark=MARKS[".html"],
        title=title,
        preface=preface,
        table=table,
        pictures=pictures,
        tables=tables,
        photographs=photographs,
        unique_ids=lambda svg: _unique_ids(svg, next(numbers)),
    )


def _unique_ids(svg: str, number: int) -> str:
    """Return a picture whose ids differ from those of the page's other pictures."""
    named = re.compile(r'(\sid="|href="#|url\(#)')
    return re.sub(r"<[^>]+>", lambda tag: named.sub(rf"\1picture-{number}-", tag[0]), svg)


def render_markdown(
    title: str,
    preface: str,
    table: Table,
    pictures: Mapping[str, Mapping[str, str]],
    files: Mapping[str, str],
    tables: Mapping[str, Table],
) -> str:
    """Return the same as Markdown.

    Args:
        title: Plain text.
        preface: Plain text.
        table: The table.
        pictures: SVG by caption, by section.
        files: Name of the file of each picture, by caption.
        tables: Further tables by section.
    """
    lines = [MARKS[".md"], f"# {_plain(title)}", "", _plain(preface), "", *_table_lines(table)]
    for section, further in tables.items():
        lines += ["", f"## {_plain(section)}", "", *_table_lines(further)]
    for section, drawn in pictures.items():
        lines += ["", f"## {section}", "", *(f"![{_plain(text)}]({files[text]})" for text in drawn)]
    return "\n".join([*lines, ""])


def _table_lines(table: Table) -> list[str]:
    lines = [f"| {' | '.join(map(_plain, table.columns))} |", f"| --- |{' ---: |' * (len(table.columns) - 1)}"]
    return lines + [f"| {' | '.join(_one_line(_plain(row[name])) for name in table.columns)} |" for row in table.rows]


def _one_line(cell: str) -> str:
    first, _, second = cell.partition("\n")
    return f"{first} ({second})" if second else first


def _plain(text: str) -> str:
    """Return text that Markdown shows literally."""
    return re.sub(r"([\\`*_\[\]|$])", r"\\\1", escape(text, quote=False))
