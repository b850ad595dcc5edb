"""The student that a report shows first, and its three numbers."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kd_lightning.report.headline import choose_student, headline
from kd_lightning.report.metrics import Metrics
from kd_lightning.report.model import Model


def model(name: str, size: int, *, of: str = "") -> Model:
    """A model of so many bytes; files of one checkpoint are the same network."""
    runtime = "ONNX Runtime 1" if name.endswith(".onnx") else "PyTorch 2"
    source: Any = SimpleNamespace(path=Path(of or name))
    return Model(name, Path(name), None, 1, None, size, (), None, runtime, np.asarray, source)


def measured(accuracy: float, seconds: float = 1e-3, half: float = 0.01) -> Metrics:
    times = (seconds, seconds, seconds)
    interval = (accuracy - half, accuracy + half)
    return Metrics(torch.zeros(4, 2), accuracy, interval, 0.1, 1.0, times, (1, 1, 1), torch.eye(2))


def test_the_smallest_student_that_is_as_good_as_the_best_is_chosen() -> None:
    models = [model("teacher", 900), model("large", 300), model("small", 200), model("poor", 10)]
    values = [measured(0.95), measured(0.9), measured(0.895), measured(0.8)]
    assert choose_student(models, values) == (2, 0), "poor is below chance, the teacher is no student"
    assert choose_student(models, [*values[:2], measured(0.88), values[3]]) == (1, 0)


def test_equally_small_students_differ_by_accuracy() -> None:
    models = [model("teacher", 900), model("alone", 100), model("distilled", 100)]
    assert choose_student(models, [measured(0.95), measured(0.9), measured(0.905)])[0] == 2


def test_a_file_is_compared_with_that_of_the_teacher_in_its_runtime() -> None:
    models = [
        model("teacher", 900_000),
        model("student", 100),
        model("student.onnx", 20_000, of="student"),
        model("teacher.onnx", 1_000_000, of="teacher"),
    ]
    values = [measured(0.95, 1.0), measured(0.9, 0.5), measured(0.9, 0.001), measured(0.95, 0.002)]
    assert choose_student(models, values) == (2, 3), "a file is what is shipped"
    lead, numbers = headline(models, values, 1200)
    assert lead.startswith(
        "student.onnx compared with teacher.onnx, the large model (teacher) that it replaces, on 1,200 test"
    )
    assert [(number.value, number.note) for number in numbers] == [
        ("90.0%", "teacher 95.0%; 95% interval 89.0 to 91.0%"),
        ("20 kB", "teacher 1 MB: 50.0 times smaller"),
        ("1 ms", "teacher 2 ms: 2.0 times faster"),
    ]
    lead, numbers = headline(models[:3], values[:3], 1200)
    assert "compared with teacher, the" in lead
    assert numbers[2].note == "in ONNX Runtime 1", "times of two runtimes are not compared"


@pytest.mark.parametrize("known", [True, False])
def test_a_model_alone_is_compared_with_nothing(known: bool) -> None:
    alone = model("alone.onnx", 200) if known else replace(model("alone.onnx", 200), source=None)
    lead, numbers = headline([alone], [measured(0.5)], 10)
    assert lead == "alone.onnx on 10 test images."
    assert [number.note for number in numbers] == ["95% interval 49.0 to 51.0%", "", "in ONNX Runtime 1"]
