"""Take the README's picture of TensorBoard: the runs of a quickstart in a real browser.

python scripts/quickstart.py --folder lightning_logs/quickstart
python scripts/tensorboard_picture.py lightning_logs/quickstart

It needs Debian's packages chromium and chromium-driver, and the extra `test`.
"""

import argparse
import io
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from urllib.parse import quote, urlencode
from urllib.request import urlopen

from PIL import Image

ROOT = Path(__file__).parents[1]

PICTURE = ROOT / "lightning_logs" / "published" / "quickstart" / "tensorboard.png"
NAMES = {"teacher": "teacher", "alone": "student alone", "distilled": "student distilled"}
CARDS: list[dict[str, object]] = [
    {"plugin": "scalars", "tag": "val/accuracy"},
    {"plugin": "scalars", "tag": "val/gap_closed"},
    {"plugin": "images", "tag": "train/views", "runId": "defaultExperimentId/student distilled", "sample": 0},
    {"plugin": "images", "tag": "test/per_class", "runId": "defaultExperimentId/student distilled", "sample": 0},
]
SETTINGS = {"timeSeriesSettingsPaneOpened": False, "sideBarWidthInPercent": 20, "timeSeriesCardMinWidth": 380}


def main() -> None:
    """Start TensorBoard on one run of each network, and keep a small picture of what it shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="folder of a quickstart")
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        runs = link_runs(options.quickstart, Path(folder) / "runs")
        with tensorboard(runs) as address:
            taken = take(address, Path(folder) / "browser")
    save_small(taken, options.output)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")


def link_runs(quickstart: Path, folder: Path) -> Path:
    """Link the first run of each network under the name that the picture shows."""
    folder.mkdir()
    for name, shown in NAMES.items():
        (folder / shown).symlink_to(sorted((quickstart / name).iterdir())[0].resolve())
    return folder


@contextmanager
def tensorboard(runs: Path) -> Iterator[str]:
    """Serve a folder of runs; yields the address when all of them have been read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(port)]
    server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: set(NAMES.values()) <= set(_read(f"{address}/data/runs")))
        yield address
    finally:
        server.terminate()
        server.wait()


def _read(address: str) -> list[str]:
    try:
        with urlopen(address) as answer:
            found: list[str] = json.load(answer)
            return found
    except OSError:
        return []


def take(address: str, profile: Path) -> Image.Image:
    """Return the window of a browser that shows the cards."""
    sys.path.append(str(ROOT / "tests"))
    from browser import Browser

    profile.mkdir()
    browser = Browser(profile)
    try:
        browser.before_pages(f"localStorage.setItem('_tb_global_settings', {json.dumps(json.dumps(SETTINGS))})")
        shown = {"pinnedCards": json.dumps(CARDS), "smoothing": "0", "darkMode": "false"}
        browser.open(f"{address}/?{urlencode(shown, quote_via=quote)}#timeseries", width=1240, height=930)
        pinned = "return document.querySelectorAll('metrics-pinned-view card-view').length"
        wait_for(lambda: browser.ask(pinned) >= len(CARDS))
        sleep(5)  # until lines and images are drawn
        return Image.open(io.BytesIO(browser.picture()))
    finally:
        browser.close()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so."""
    end = monotonic() + seconds
    while not condition():
        if monotonic() > end:
            raise TimeoutError("TensorBoard did not show the runs.")
        sleep(0.5)


def save_small(picture: Image.Image, path: Path) -> None:
    """Save a picture 800 pixels wide with 64 colours, a third of the bytes."""
    height = round(picture.height * 800 / picture.width)
    small = picture.convert("RGB").resize((800, height), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    small.quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main()
