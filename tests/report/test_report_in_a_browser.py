"""The report in a real browser: on a phone, on a wide screen, in the dark and on paper."""

import io
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import REQUIRED, Browser, require_browser
from faults import run_command
from made_photographs import photograph
from PIL import Image
from recipe_runs import QUICK, save_network

from kd_lightning.networks import ResNet

CLASSES = {
    2: ["ants & <bees>", "wasps"],
    10: [],  # the digits
    100: [
        f"{'Donaudampfschifffahrtsgesellschaftskapitän' if number % 7 == 0 else 'a great spotted bird'} {number:02}"
        for number in range(100)
    ],
}
WIDTHS = (360, 768, 1280)
A4 = (703, 1032)
"""Pixels of the printed part, 12 mm less on each side."""

CONTRAST = """
const pixel = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
function rgba(colour) {
  pixel.clearRect(0, 0, 1, 1); pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1);
  return [...pixel.getImageData(0, 0, 1, 1).data].map(value => value / 255);
}
function behind(element) {
  let colour = [0, 0, 0, 0];
  for (; element; element = element.parentElement) {
    const below = rgba(getComputedStyle(element).backgroundColor);
    colour = [0, 1, 2].map(i => colour[i] + (1 - colour[3]) * below[3] * below[i])
      .concat(colour[3] + (1 - colour[3]) * below[3]);
  }
  return colour.map(value => value + 1 - colour[3]);
}
function luminance(colour) {
  const [r, g, b] = colour.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = {};
while (texts.nextNode()) {
  const text = texts.currentNode.data.trim(), element = texts.currentNode.parentElement;
  if (!text || !element.getClientRects().length || element.closest('title, metadata, style')) continue;
  const style = getComputedStyle(element);
  const both = [rgba(element.closest('svg') ? style.fill : style.color), behind(element)].map(luminance).sort();
  found[text] = Math.min(found[text] ?? 21, (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05));
}
return found;
"""


@pytest.fixture(scope="module", params=CLASSES)
def report(request: pytest.FixtureRequest, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a student and its teacher by the number of classes, of the digits with two files too."""
    folder = tmp_path_factory.mktemp("shown")
    names: list[str] = CLASSES[request.param]
    torch.manual_seed(0)
    teacher = save_network("digits", "teacher", folder)
    data = []
    if names:
        data = ["--data=ImageFolderDataModule", f"--data.root={_write_images(folder / 'images', names)}"]
        data += ["--data.image_size=16", *_networks(folder, len(names))]
    check = ["--teacher", str(teacher), "--model.teacher_check=off", "--trainer.accelerator=cpu"]
    run_command(folder, "fit", "-c", "digits/distill", *QUICK, *data, *check)
    if not names:
        run_command(folder, "export", "digits/distill", "-o", "student.onnx")
        shutil.copy(folder / "student.onnx", folder / "a_copy_with_a_very_long_name_of_its_own.onnx")
    run_command(folder, "report", "digits/distill", *(file.name for file in sorted(folder.glob("*.onnx"))), "-o", "out")
    return folder / "out/index.html"


def _write_images(folder: Path, classes: list[str]) -> Path:
    """Write images, a tenth of which become those of the test."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(60 if len(classes) == 2 else 10):
            photograph(20, 24, seed=1000 * label + number).save(folder / name / f"{number}.png")
    return folder


def _networks(folder: Path, classes: int) -> list[str]:
    """Replace the teacher's file by one of so many classes, and list the arguments that name such networks."""
    sizes = {"blocks": [1], "widths": [16], "num_classes": classes, "in_channels": 3}
    teacher = ResNet(**sizes)  # type: ignore[arg-type]
    images = np.stack([np.asarray(photograph(16, 16, seed=seed)) for seed in range(64)])
    with torch.no_grad():  # so that its answers depend on the image, which those of random weights hardly do
        logits = teacher.eval()((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.45) / 0.225)
        teacher.fc.bias.sub_(logits.mean(0)).mul_(100)
        teacher.fc.weight.mul_(100)
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    return [
        f"--model.{place}.{name}={value}" for place in ("student", "teacher.network") for name, value in sizes.items()
    ]


def test_a_page_has_no_errors_and_asks_for_nothing(report: Path, browser: Browser) -> None:
    browser.open(report.as_uri())
    assert browser.messages() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [report.as_uri()]


def test_no_width_needs_scrolling_to_the_side(report: Path, browser: Browser) -> None:
    for width in WIDTHS:
        browser.open(report.as_uri(), width=width)
        assert browser.ask("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
        too_wide = "return [...document.querySelectorAll('dl div, h1, h2, p, figure, svg')]"
        too_wide += ".filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.textContent)"
        assert browser.ask(too_wide) == []
    browser.set(width=360)
    cards = "const s = document.querySelector('.cards').parentElement; return s.scrollWidth - s.clientWidth"
    assert browser.ask(cards) == 0, "the table of models needs no scrolling on a phone"
    scrolled = "return document.querySelector('.heat') && [...document.querySelectorAll('.scroll')]"
    scrolled += ".filter(e => e.scrollWidth > e.clientWidth).map(e => e.ariaLabel)"
    assert browser.ask(scrolled) in (None, []), "no other table does, up to ten classes with short names"


def test_the_three_numbers_come_first_and_then_one_picture(report: Path, browser: Browser) -> None:
    browser.open(report.as_uri(), width=360, height=740)
    order = "return [...document.querySelectorAll('h1, dd.value, svg, table, h2')].map(e => e.className.baseVal ?? "
    order += "(e.className || e.localName))"
    assert browser.ask(order)[:6] == ["h1", "value", "value", "value", "h2", ""]
    values = browser.ask("return [...document.querySelectorAll('dd.value')].map(e => e.textContent)")
    assert [re.sub(r"[\d.,]+", "0", value) for value in values] == ["0%", "0 kB", "0 ms"]
    bottoms = browser.ask("return [...document.querySelectorAll('dl div')].map(e => e.getBoundingClientRect().bottom)")
    assert max(bottoms) < 740, "they are seen without scrolling"
    assert all(low < high for low, high in pairwise(bottoms)), "below each other"


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_can_be_read(dark: bool, report: Path, browser: Browser) -> None:
    for width in (360, 1280):
        browser.open(report.as_uri(), dark=dark, width=width)
        contrasts = browser.ask(CONTRAST)
        assert len(contrasts) > 80
        assert {text: value for text, value in contrasts.items() if value < 4.5} == {}
    page = np.asarray(Image.open(io.BytesIO(browser.picture())).convert("L"))
    plots = "return [...document.querySelectorAll('.plot svg')].map(e => {const r = e.getBoundingClientRect(); "
    plots += "return {x: r.x, y: r.y + scrollY, width: r.width, height: r.height}})"
    shades = [np.asarray(Image.open(io.BytesIO(browser.picture(plot))).convert("L")) for plot in browser.ask(plots)]
    assert len(shades) >= 3
    for shown in (page, *shades):  # a picture is no white box in the dark
        assert (np.median(shown) < 40) if dark else (np.median(shown) > 240)


def test_paper_is_white_and_nothing_is_cut(report: Path, browser: Browser) -> None:
    browser.open(report.as_uri(), dark=True, media="print", width=A4[0], height=A4[1])
    assert browser.ask("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert {text: value for text, value in browser.ask(CONTRAST).items() if value < 4.5} == {}
    assert browser.ask("return document.documentElement.scrollWidth") <= A4[0]
    cut = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
    assert browser.ask(f"{cut}.map(e => e.ariaLabel)") == []
    heights = browser.ask("return [...document.querySelectorAll('figure')].map(e => e.getBoundingClientRect().height)")
    assert max(heights) < A4[1], "no picture is longer than a page"
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 15


def test_each_photograph_is_shown_once_and_everything_has_a_name(report: Path, browser: Browser) -> None:
    browser.open(report.as_uri())
    photographs = browser.ask("return [...document.querySelectorAll('.photograph image')].map(e => e.href.baseVal)")
    captions = browser.ask("return [...document.querySelectorAll('.photograph figcaption')].map(e => e.textContent)")
    numbers = [re.findall(r"Test image (\d+)", caption)[0] for caption in captions]
    assert len(numbers) == len(set(numbers)) == len(photographs) == len(set(photographs)) > 0
    nameless = "return [...document.querySelectorAll('svg, .scroll')].filter(e => !e.role || "
    nameless += "!(e.ariaLabel || e.querySelector('title')?.textContent)).length"
    assert browser.ask(nameless) == 0
    assert browser.ask("return [...document.querySelectorAll('.scroll')].every(e => e.tabIndex == 0)"), (
        "a table can be scrolled by the keyboard"
    )


def test_a_missing_browser_is_a_failure_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="install Debian's packages chromium and chromium-driver"):
        require_browser()
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="install"):
        require_browser()
