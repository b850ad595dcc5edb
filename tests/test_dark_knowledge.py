"""The script of the omitted digit shows what it is for."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kd_lightning import DigitsDataModule

SCRIPT = Path(__file__).parents[1] / "scripts/dark_knowledge.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dark_knowledge", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_student_sees_no_image_of_the_digit(script: ModuleType) -> None:
    data = script.WithoutOne()
    data.setup("fit")
    shown = [
        torch.cat([batch.labels for batch in loader]) for loader in (data.train_dataloader(), data.val_dataloader())
    ]
    assert sorted(shown[0].unique().tolist()) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert sorted(shown[1].unique().tolist()) == list(range(10)), "the bias is found on images of all digits"


def test_no_network_is_trained_on_what_the_bias_is_found_on(script: ModuleType) -> None:
    teachers, students = DigitsDataModule(seed=1, split_seed=0), script.WithoutOne(seed=1)
    for data in (teachers, students):
        data.setup("fit")
    seen, shown = set(images_of(teachers.train_dataloader())), images_of(students.train_dataloader())
    assert seen.issuperset(shown)
    validation = images_of(students.val_dataloader())
    assert validation == images_of(teachers.val_dataloader())
    whole = teachers.splits["train"]
    assert len(validation) + len(teachers.train_samples) == len(whole.labels)


def images_of(loader: Any) -> list[bytes]:
    """Every image that a loader has, as it is stored."""
    part = loader.dataset
    return [image.numpy().tobytes() for image in part.images.pixels[part.samples]]


def test_the_bias_is_raised_to_a_tenth(script: ModuleType) -> None:
    torch.manual_seed(0)
    logits = torch.randn(500, 10) * 3
    logits[:, 3] -= 6
    raised = script.with_bias(logits, logits, 3)
    assert float(raised.softmax(1)[:, 3].mean()) == pytest.approx(0.1, abs=1e-3)
    assert torch.equal(raised[:, :3], logits[:, :3])


def test_it_learns_the_digit_from_soft_outputs(script: ModuleType) -> None:
    hard, soft = script.experiment(omitted=3, temperature=8.0, epochs=15, seed=0).values()
    assert hard[0] < 0.2
    assert soft[2] > 0.8
    assert soft[3] > 0.9
