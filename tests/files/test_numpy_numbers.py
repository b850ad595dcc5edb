"""Numbers of NumPy beside the weights of published checkpoints."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_lightning.files.numpy_numbers import _Kind, numpy_numbers
from kd_lightning.networks import read_checkpoint

NUMBERS = [
    np.float64(0.05 * 0.1**3),
    np.float32(-2.5),
    np.float16(0.125),
    np.int64(-(2**40)),
    np.int8(-3),
    np.uint8(200),
    np.uint16(60000),
    np.bool_(True),
    np.float64("inf"),
    np.dtype(">f8").type(1.5),
]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_a_number_is_read_as_one_of_python(number: Any, zipped: bool, tmp_path: Path) -> None:
    content = {"model": {"weight": torch.ones(2)}, "optimizer": {"param_groups": [{"lr": number}]}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "a.pth")
    assert read["optimizer"] == {"param_groups": [{"lr": number.item()}]}
    assert type(read["optimizer"]["param_groups"][0]["lr"]) is type(number.item())
    assert read["model"]["weight"].equal(torch.ones(2))


def test_files_from_before_numpy_2_are_read(tmp_path: Path) -> None:
    torch.save({"lr": np.float64(5e-5)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pth").read_bytes()
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        named = content.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module)
        assert module + b"\nscalar" in named
        (tmp_path / "b.pth").write_bytes(named)
        assert read_checkpoint(tmp_path / "b.pth") == {"lr": 5e-5}


class Made:
    """Pickles as a call with any arguments."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


SCALAR = np.float64(1).__reduce__()[0]  # type: ignore[no-untyped-call]
STATE = (3, "<", None, None, None, -1, -1, 0)
EIGHT = Made(np.dtype, "f8", False, True, state=STATE)


@pytest.mark.parametrize(
    "made",
    [
        np.complex128(1j),
        np.str_("text"),
        np.datetime64("2020-01-01"),
        np.array([1, 2], dtype=object),
        Made(SCALAR, EIGHT, b"1234"),
        Made(SCALAR, EIGHT),
        Made(SCALAR, EIGHT, "12345678"),
        Made(SCALAR, EIGHT, b"12345678", 1),
        Made(SCALAR, "f8", b"12345678"),
        Made(SCALAR, Made(np.dtype, "f8", False, True, state=(3, "!")), b"12345678"),
        Made(SCALAR, Made(np.dtype, "f8", False, True, state="<<"), b"12345678"),
        Made(SCALAR, Made(np.dtype, "O", False, True, state=STATE), Made(np.dtype, "f8")),
        Made(SCALAR, Made(np.dtype), b""),
    ],
    ids=lambda made: type(made).__name__,
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_number_is_refused_in_one_sentence(made: Any, zipped: bool, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2), "made": made}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"^'.*a\.pth' (is not a checkpoint of tensors|cannot be read)[^\n]*$"):
        read_checkpoint(tmp_path / "a.pth")


def test_a_kind_alone_is_nothing_of_numpy(tmp_path: Path) -> None:
    torch.save({"made": np.dtype("f8")}, tmp_path / "a.pth")
    assert type(read_checkpoint(tmp_path / "a.pth")["made"]) is _Kind


def test_nothing_is_allowed_afterwards() -> None:
    before = set(torch.serialization.get_safe_globals())  # torch keeps a set, whose order changes
    with numpy_numbers():
        assert (_Kind, "numpy.dtype") in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == before
    file = io.BytesIO()
    torch.save(np.float64(1), file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
