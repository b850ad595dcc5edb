"""The report as one HTML page and as Markdown."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import count
from string import Template

MARKS = {
    ".html": '<meta name="generator" content="kd-lightning report">',
    ".md": "<!-- generator: kd-lightning report -->",
    ".svg": "<dc:title>kd-lightning report</dc:title>",
}
"""What every file of a report carries, by its suffix; another file is not ours to write over."""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
$mark
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.5rem; font-size: 1.25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
td.best { font-weight: 700; } small { color: #666; font-weight: 400; } td { vertical-align: top; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; max-width: 100%; vertical-align: top; }
figure svg { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$preface</p>
<div class="scroll">$table</div>
$sections
</body>
</html>
""")
_BEST = ' class="best"'


def html(
    title: str,
    preface: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    best: Mapping[int, int],
    pictures: Mapping[str, Mapping[str, str]],
) -> str:
    """The page.

    Args:
        title: Plain text.
        preface: Plain text.
        head: The table's columns.
        rows: Its cells, plain text; a second line is smaller.
        best: For a column the row that is best.
        pictures: SVG by caption, by section.
    """
    cells = [
        "".join(
            f"<td{_BEST if best.get(column) == i else ''}>{_two_lines(cell)}</td>" for column, cell in enumerate(row)
        )
        for i, row in enumerate(rows)
    ]
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    table = f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(f'<tr>{c}</tr>' for c in cells)}</tbody></table>"
    number = count(1)
    sections = "\n".join(
        f"<h2>{escape(section)}</h2>\n"
        + "\n".join(
            f"<figure>{_own_ids(svg, next(number))}<figcaption>{escape(text)}</figcaption></figure>"
            for text, svg in drawn.items()
        )
        for section, drawn in pictures.items()
    )
    return _PAGE.substitute(
        title=escape(title), mark=MARKS[".html"], preface=escape(preface), table=table, sections=sections
    )


def _own_ids(svg: str, number: int) -> str:
    """A picture whose ids are no other picture's of the page."""
    named = re.compile(r'(\sid="|href="#|url\(#)')
    return re.sub(r"<[^>]+>", lambda tag: named.sub(rf"\1picture-{number}-", tag[0]), svg)


def _two_lines(cell: str) -> str:
    first, _, second = escape(cell).partition("\n")
    return f"{first}<br><small>{second}</small>" if second else first


def markdown(
    title: str,
    preface: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    pictures: Mapping[str, Mapping[str, str]],
    files: Mapping[str, str],
) -> str:
    """The same as Markdown.

    Args:
        title: See :func:`html`.
        preface: See :func:`html`.
        head: See :func:`html`.
        rows: See :func:`html`.
        pictures: See :func:`html`.
        files: Where the picture of each caption is.
    """
    lines = [MARKS[".md"], f"# {_plain(title)}", "", _plain(preface), ""]
    lines += [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(_one_line(_plain(cell)) for cell in row)} |" for row in rows]
    for section, drawn in pictures.items():
        lines += ["", f"## {section}", "", *(f"![{_plain(text)}]({files[text]})" for text in drawn)]
    return "\n".join([*lines, ""])


def _one_line(cell: str) -> str:
    first, _, second = cell.partition("\n")
    return f"{first} ({second})" if second else first


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]|$])", r"\\\1", escape(text, quote=False))
