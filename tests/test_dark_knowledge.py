"""The script of the omitted digit shows what it is for."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

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
    shown = torch.cat([batch.labels for batch in [*data.train_dataloader(), *data.val_dataloader()]])
    assert sorted(shown.unique().tolist()) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


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
