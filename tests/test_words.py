"""Docstrings, comments, messages and pages are written in plain modern English."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITTEN = [".py", ".md", ".yaml", ".sh", ".toml"]
# what a reader would have to translate, and what to write in its place
INSTEAD = {
    r"mends?|mended|mending": "fix",
    r"goes on|go on|going on|went on": "resume, continue",
    r"(begins?|began) anew|anew": "restart, again",
    r"spoils?|spoiled|spoilt": "corrupt, change",
    r"in the midst": "during",
    r"own affair": "handled by",
    r"takes? (it|them) away|taken away": "remove",
    r"tells? [\w{}.]+ classes apart": "has N classes",
    r"knows? (no|other)|known? of no": "does not have",
    r"has not(?! (been|yet|changed|started|finished|seen))": "does not have",
    r"is told|was told|are told|be told|tells?|telling": "is given, reports",
    r"dearest": "slowest, most expensive",
    r"hasten\w*": "optimize for inference",
    r"besides": "also, apart from",
    r"will do|as ever": "works, as always",
    r"of one's own|one's own": "your own",
    r"need be": "if needed",
    r"thrice|whence|whither|hither|thereof|therein|hereof|lest": "(plain words)",
}


def _pages() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in listed if Path(name).suffix in WRITTEN and name != "tests/test_words.py"]


@pytest.mark.parametrize("words", INSTEAD)
def test_plain_words(words: str) -> None:
    pattern = re.compile(rf"\b({words})\b", re.IGNORECASE)
    found = [
        f"{page.relative_to(ROOT)}:{number}: {line.strip()}"
        for page in _pages()
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"write {INSTEAD[words]!r}:\n" + "\n".join(found)


ODD_BEGINNINGS = {"What", "Whether", "Where", "Of", "How", "Those", "Tell", "To", "As", "That"}


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = []
    for page in _pages():
        if page.suffix != ".py" or page.is_relative_to(ROOT / "tests"):
            continue
        for node in ast.walk(ast.parse(page.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                if docstring.partition(" ")[0] in ODD_BEGINNINGS:
                    found.append(f"{page.relative_to(ROOT)}: {docstring.splitlines()[0]}")
                arguments = re.findall(r"(?m)^ {4}\w+: (?:Of|What|Where|How|That|To) .*", docstring)
                found += [f"{page.relative_to(ROOT)}: {line.strip()}" for line in arguments]
    assert not found, "\n".join(found)
