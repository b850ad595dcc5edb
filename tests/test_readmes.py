"""The READMEs: short, linked both ways, and their commands are those of the command line."""

import re
from pathlib import Path

import pytest

from kd_lightning.recipes import recipe_names

ROOT = Path(__file__).parents[1]
FOLDERS = [*sorted((ROOT / "kd_lightning").glob("*/README.md")), ROOT / "scripts/README.md"]
PAGES = [ROOT / "README.md", ROOT / "lightning_logs/published/README.md", *FOLDERS]
COMMANDS = [
    *("fit", "validate", "test", "predict", "layers", "recipes", "compare", "compress", "classify", "export", "report"),
    *("init", "runs", "doctor", "completion"),
]


def identify(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_a_page_has_at_most_150_lines(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES[1:], ids=identify)
def test_pages_are_linked_both_ways(page: Path) -> None:
    assert f"({page.relative_to(ROOT)}" in (ROOT / "README.md").read_text()
    assert re.search(r"\]\((\.\./)+README\.md\)", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_commands_and_recipes_exist(page: Path) -> None:
    text = page.read_text()
    for command in re.findall(r"(?m)^(?:\$ )?kd-lightning (\S+)", text):
        assert command in COMMANDS, command
    names = recipe_names()
    for recipe in re.findall(r"kd-lightning (?:fit|test) +-c ([a-z0-9_]+/[a-z0-9_]+)", text):
        assert recipe in names, recipe


def test_the_python_of_the_first_page_can_be_read() -> None:
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        compile(code, "README.md", "exec")
