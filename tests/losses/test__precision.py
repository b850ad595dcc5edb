from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from kd_lightning.losses._precision import in_full_precision


@in_full_precision
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """A product, which autocast would compute in half precision."""
    return a @ b


@in_full_precision
def sum_of_powers(features: list[Tensor], offset: Tensor | None = None, power: float = 1.0) -> Tensor:
    result = torch.stack([item.sum() ** power for item in features]).sum()
    return result if offset is None else result + offset


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_arguments_become_float32(dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 4).to(dtype), torch.randn(4, 2).to(dtype)
    assert matmul(a, b).dtype == torch.float32
    torch.testing.assert_close(matmul(a, b), a.float() @ b.float())
    assert matmul(a, b=b.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_and_float64_are_kept(dtype: torch.dtype) -> None:
    assert matmul(torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype)).dtype == dtype


def test_results_may_exceed_the_range_of_half_precision() -> None:
    large = torch.full((2, 2), 300.0, dtype=torch.float16)
    assert matmul(large, large)[0, 0] == 180_000
    assert torch.isinf(large @ large).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lists_and_keyword_arguments_become_float32(dtype: torch.dtype) -> None:
    features = [torch.full((2,), 3.0, dtype=dtype), torch.full((3,), 1.0, dtype=dtype)]
    result = sum_of_powers(features, offset=torch.tensor(1.0, dtype=dtype), power=2.0)
    assert result.dtype == torch.float32
    assert result == 36 + 9 + 1
    assert sum_of_powers(features=tuple(features)).dtype == torch.float32  # type: ignore[arg-type]


def test_other_arguments_are_not_changed() -> None:
    @in_full_precision
    def typed(count: int, labels: Tensor, names: list[str], none: Tensor | None = None) -> Tensor:
        assert (count, names, none, labels.dtype) == (3, ["a"], None, torch.int64)
        return labels

    assert typed(3, torch.tensor([1]), ["a"], none=None).dtype == torch.int64


def test_autocast_is_disabled_inside_and_restored_after() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        assert matmul(a, b).dtype == torch.float32
        assert matmul(a.bfloat16(), b.bfloat16()).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_the_inputs(dtype: torch.dtype) -> None:
    a = torch.randn(3, 4).to(dtype).requires_grad_()
    matmul(a, torch.ones(4, 2)).sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == dtype
    assert (a.grad == 2).all()


def test_name_and_documentation_are_kept() -> None:
    assert matmul.__name__ == "matmul"
    assert str(matmul.__doc__).startswith("A product")


@pytest.mark.gpu
def test_cuda_autocast_is_disabled_inside() -> None:
    a = torch.randn(8, 8, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        assert matmul(a, a).dtype == torch.float32


def test_the_device_is_found_in_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def autocast(device: str, enabled: bool) -> AbstractContextManager[None]:
        devices.append(device)
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    sum_of_powers([torch.ones(2, device="meta")])
    assert devices == ["meta"]
