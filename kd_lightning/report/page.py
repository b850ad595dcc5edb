"""The report as one HTML page and as Markdown."""

from collections.abc import Mapping, Sequence
from html import escape
from string import Template

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.5rem; font-size: 1.25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
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
    sections = "\n".join(
        f"<h2>{escape(section)}</h2>\n"
        + "\n".join(f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for text, svg in drawn.items())
        for section, drawn in pictures.items()
    )
    return _PAGE.substitute(title=escape(title), preface=escape(preface), table=table, sections=sections)


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
    lines = [f"# {title}", "", preface, "", f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(_one_line(cell) for cell in row)} |" for row in rows]
    for section, drawn in pictures.items():
        lines += ["", f"## {section}", "", *(f"![{text}]({files[text]})" for text in drawn)]
    return "\n".join([*lines, ""])


def _one_line(cell: str) -> str:
    first, _, second = cell.replace("|", "&#124;").partition("\n")
    return f"{first} ({second})" if second else first
