"""`kd-lightning runs`: the runs of a folder with their figures, and their deletion."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_options import QUICK, QUIET

from kd_lightning import Run

Command = Callable[..., str]

LOGS = Path("lightning_logs")
TEACHER = "digits/teacher/version_0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a student was trained and tested."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from kd_lightning.__main__ import main

        for words in (["fit", *QUICK], ["test", *QUIET]):
            patch.setattr("sys.argv", ["kd-lightning", words[0], "-c", "digits/student", *words[1:]])
            main()
    return folder


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def made_run(folder: Path, *, epochs: int = 3, **fit: object) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/best.ckpt").write_bytes(b"1234")
    (folder / "config.yaml").write_text("model: {}\ndata: {}\n")
    content = {"epochs": epochs, "finished": True, "val": {"accuracy": 0.5}, **fit}
    (folder / "fit.json").write_text(json.dumps(content))
    return folder


def refusal(kd: Command, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        kd("runs", *arguments)
    message = str(ended.value.code)
    assert "\n" not in message
    return message


def row(printed: str, run: str) -> list[str]:
    [line] = [line for line in printed.splitlines() if f" {run} " in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.mark.usefixtures("wide")
def test_a_trained_run_has_its_figures(kd: Command, here: Path) -> None:
    run = Run.find("digits/student")
    assert run.fit is not None
    assert run.test is not None
    name, date, epochs, val, test, size = row(kd("runs"), "digits/student/version_0")
    assert (name, epochs) == ("digits/student/version_0", "2")
    assert len(date) == len("2026-11-27 07:00")
    assert val == f"{run.fit['val']['accuracy']:.2%}"
    assert test == f"{run.test['accuracy']:.2%}"
    assert size.endswith("KiB")


@pytest.mark.usefixtures("wide")
def test_the_figure_is_that_of_the_best_checkpoint(kd: Command, here: Path) -> None:
    best = Run.find("digits/student").best
    fit = Run.find("digits/student").fit
    assert fit is not None
    [score] = [
        float(state["best_model_score"])
        for name, state in best.content["callbacks"].items()
        if name.startswith("ModelCheckpoint") and state["monitor"]
    ]
    assert fit["score"] == pytest.approx(score)
    assert fit["val"]["accuracy"] == pytest.approx(score, abs=1e-6)


@pytest.mark.usefixtures("wide")
def test_runs_are_listed_in_the_order_of_their_numbers_with_those_of_chains(kd: Command) -> None:
    for number in (10, 9):
        made_run(LOGS / f"digits/teacher/version_{number}")
    made_run(LOGS / "compress/digits/student", finished=False, epochs=1, planned_epochs=5)
    printed = kd("runs")
    assert printed.index("version_9") < printed.index("version_10")
    assert row(printed, "compress/digits/student")[2] == "1 of 5"
    assert row(kd("runs", "lightning_logs/digits"), "teacher/version_9")[3] == "50.00%"


@pytest.mark.usefixtures("wide")
def test_a_run_that_is_cut_in_half_is_listed_and_described(kd: Command) -> None:
    cut = made_run(LOGS / TEACHER)
    (cut / "fit.json").write_text('{"epochs": 3, "fin')
    assert "fit.json' is damaged; delete it, or resume the run" in kd("runs")
    (cut / "fit.json").unlink()
    (cut / "config.yaml").rename("config.yaml")
    assert "has no config.yaml; restore it" in kd("runs")
    Path("config.yaml").rename(cut / "config.yaml")
    shutil.rmtree(cut / "checkpoints")
    printed = kd("runs")
    assert row(printed, TEACHER)[2:5] == ["-", "-", "-"]
    assert "has no checkpoints; train it again, or delete it" in printed


def test_where_there_are_none_it_says_so(kd: Command) -> None:
    assert refusal(kd) == (
        "kd-lightning runs: There is no folder 'lightning_logs'; name the folder of your runs, or train one first."
    )
    LOGS.mkdir()
    assert "There are no runs in lightning_logs" in kd("runs")


def test_named_runs_are_deleted_and_no_others(kd: Command) -> None:
    for number in range(3):
        made_run(LOGS / f"digits/teacher/version_{number}")
    printed = kd("runs", "--delete", TEACHER, "lightning_logs/digits/teacher/version_2")
    assert printed.splitlines()[0] == f"Deleted lightning_logs/{TEACHER} (80 bytes)."
    assert [run.name for run in (LOGS / "digits/teacher").iterdir()] == ["version_1"]


def test_a_link_to_a_run_is_deleted_and_not_the_run(kd: Command, tmp_path: Path) -> None:
    run = made_run(tmp_path / "elsewhere")
    LOGS.mkdir()
    (LOGS / "linked").symlink_to(run)
    kd("runs", "--delete", "linked")
    assert not (LOGS / "linked").exists()
    assert (run / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("digits/teacher/version_7", "There is no run 'digits/teacher/version_7'; `kd-lightning runs` lists those"),
        ("digits/teacher", "is not a run; name one of its 1 runs, as 'lightning_logs/digits/teacher/version_0'"),
        ("images", "'images' is not a run; check the name"),
        ("published/kd_10/seed=0", "is published with the README, so it is kept; use git to remove it"),
        ("kept", "'lightning_logs/kept' also holds 'photographs', which no run has written"),
        (".", "is the folder that you are in"),
        ("..", "'..' is not a run"),
    ],
)
def test_nothing_is_deleted_where_one_of_the_names_is_wrong(kd: Command, name: str, reason: str) -> None:
    run = made_run(LOGS / TEACHER)
    made_run(LOGS / "published/kd_10/seed=0")
    (made_run(LOGS / "kept") / "photographs").mkdir()
    Path("images").mkdir()
    Path("config.yaml").touch()  # of a run without a logger, in the working folder
    folder = ["."] if name in (".", "..") else []
    assert reason in refusal(kd, *folder, "--delete", *([str(run)] if not folder else []), name)
    assert run.is_dir()
    assert (LOGS / "published/kd_10/seed=0/config.yaml").is_file()


@pytest.mark.usefixtures("wide")
def test_published_runs_are_counted_and_not_listed(kd: Command) -> None:
    made_run(LOGS / "published/kd_10/seed=0")
    printed = kd("runs")
    assert "1 published runs are in lightning_logs/published" in printed
    assert "kd_10" not in printed


def test_a_table_in_a_file_shows_whole_names(tmp_path: Path) -> None:
    name = "a_recipe_of_a_long_name/" + 90 * "x" + "/version_0"
    (tmp_path / "lightning_logs" / name).mkdir(parents=True)
    (tmp_path / "lightning_logs" / name / "config.yaml").write_text("seed_everything: 0\n")
    (tmp_path / "lightning_logs" / name / "test.json").write_text('{"accuracy": 0.5}')
    command = [sys.executable, "-m", "kd_lightning", "runs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert name in done.stdout
