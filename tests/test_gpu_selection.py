import os

import pytest
import torch
from gpu_selection import selects_gpu_tests


@pytest.mark.parametrize("expression", ["gpu", "gpu and slow", "gpu and not slow", "slow", "gpu or slow", ""])
def test_expressions_that_select_gpu_tests(expression: str) -> None:
    assert selects_gpu_tests(expression)


@pytest.mark.parametrize("expression", ["not slow and not gpu", "not gpu", "slow and not gpu"])
def test_expressions_that_select_none(expression: str) -> None:
    assert not selects_gpu_tests(expression)


def test_all_other_tests_see_no_gpu(request: pytest.FixtureRequest) -> None:
    if selects_gpu_tests(request.config.option.markexpr):
        pytest.skip("this run has GPU tests")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()
