"""The table of the classes that `validate` and `test` print."""

from collections.abc import Callable

import pytest
import torch
from command_options import QUIET

from kd_lightning.cli.class_table import print_class_table


def test_all_classes_are_printed_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    print_class_table(torch.tensor([[3, 1], [0, 4]]), ["[bold]cat", "dog"])
    printed = capsys.readouterr().out
    assert "Each class" in printed
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert rows == [["[bold]cat", "4", "75.0%", "100.0%", "dog"], ["dog", "4", "100.0%", "80.0%", ""]]


def test_of_many_classes_those_of_the_lowest_accuracy_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    counts = 10 * torch.eye(30, dtype=torch.int64)
    counts[17, 17], counts[17, 3] = 4, 6
    counts[2] = 0  # of which there are no images
    print_class_table(counts, [f"class {label}" for label in range(30)])
    printed = capsys.readouterr().out
    assert "The 10 of 30 classes with the lowest accuracy" in printed
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")]
    assert rows[0] == "class 17"
    assert len(rows) == 10
    assert "class 2" not in rows


def test_validate_and_test_print_it(kd: Callable[..., str]) -> None:
    quick = [*QUIET, "--trainer.max_epochs=1", "--trainer.enable_model_summary=false"]
    kd("fit", "-c", "digits/student", *quick)
    for command in ("validate", "test"):
        printed = kd(command, "-c", "digits/student", *QUIET)
        assert "Each class" in printed
        assert "mostly taken for" in printed
