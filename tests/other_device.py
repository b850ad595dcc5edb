"""A second device for machines that have none: CPU tensors that report the device ``other:0``.

A tensor on this device cannot be mixed with a CPU tensor, as on CUDA. So a test on a CPU finds a tensor that was
created in, or left in, the wrong place. It proves placement and nothing about CUDA's own paths: there is one device, of
index 0, in float32, without streams, events, pinned memory or autocast, and random numbers come from the CPU's
generator.

Importing this module registers the device for as long as the process lives, and breaks ``fork`` in it. Tests import it
in a process of their own; see ``on_other_device.py``.
"""

import warnings
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration


class _Backend(backend_registration._DummyBackendModule):
    """What ``torch.other`` offers: one device, whose random numbers are the CPU's."""

    def is_autocast_enabled(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        pass  # torch restores the CPU's state as well


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    backend_registration._setup_privateuseone_for_python_backend("other", backend_module=_Backend())

DEVICE = torch.device("other", 0)


class OtherTensor(Tensor):
    """A tensor whose values are those of the CPU tensor ``held``, and whose device is ``other:0``."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "OtherTensor":
        tensor: OtherTensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(operator, args, kwargs or {})

    # these read a tensor's memory without an operator; here there is one, which a mode sees

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def item(self) -> Any:
        return torch.ops.aten._local_scalar_dense.default(self)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    __index__ = __int__

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, OtherTensor)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"A tensor on {DEVICE} was pickled, which a machine without that device cannot load.")

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")

    def new_tensor(  # type: ignore[override]
        self, data: Any, dtype: Any = None, device: Any = None, **options: Any
    ) -> Tensor:
        return _make_tensor(data, dtype=dtype or self.dtype, device=device or DEVICE, **options)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()


_COPIES = {"copy_", "_to_copy", "_copy_from", "set_", "fill_"}
"""Operators that take CPU tensors beside those of another device."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operators whose indices may lie on the CPU."""


def _check_devices(operator: Any, tensors: list[Tensor], first: Any) -> None:
    """Refuse what CUDA refuses: CPU tensors beside others, but for scalars in pointwise operators, and copies."""
    name = operator._schema.name.partition("::")[2]
    ours = [tensor for tensor in tensors if isinstance(tensor, OtherTensor)]
    cpu = [tensor for tensor in tensors if not isinstance(tensor, OtherTensor)]
    if name in _INDEXING and isinstance(first, OtherTensor):
        cpu = [tensor for tensor in cpu if tensor.dtype not in (torch.int64, torch.bool, torch.uint8)]
    if not ours or not cpu or name in _COPIES:
        return
    scalars_pass = torch.Tag.pointwise in operator.tags or name.startswith(("_foreach", "_fused"))
    if scalars_pass and all(tensor.dim() == 0 for tensor in cpu):
        return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! ({operator})"
    )


def _run(operator: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the held CPU tensors, and have the result report the device that it would be on."""
    flat, structure = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    _check_devices(operator, tensors, args[0] if args else None)
    devices = [value for value in flat if isinstance(value, torch.device)]
    wrapped = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OtherTensor)}
    if any(isinstance(value, torch.Generator) for value in flat) and (wrapped or any(map(_is_other, devices))):
        raise RuntimeError(f"Expected a {DEVICE.type!r} device type for generator but found 'cpu'")
    passed = {id(tensor): tensor for tensor in tensors if not isinstance(tensor, OtherTensor)}
    plain = [
        value.held
        if isinstance(value, OtherTensor)
        else torch.device("cpu")
        if isinstance(value, torch.device)
        else value
        for value in flat
    ]
    plain_args, plain_kwargs = pytree.tree_unflatten(plain, structure)
    if "pin_memory" in plain_kwargs:
        plain_kwargs["pin_memory"] = False
    result = operator(*plain_args, **plain_kwargs)
    for tensor in wrapped.values():
        if tensor.shape != tensor.held.shape or tensor.stride() != tensor.held.stride():  # resized in place
            tensor.data = OtherTensor(tensor.held)
    to_cpu = bool(devices) and all(device.type == "cpu" for device in devices)

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor) or to_cpu or id(value) in passed:
            return value
        return wrapped[id(value)] if id(value) in wrapped else OtherTensor(value)

    return pytree.tree_map(place, result)


_fallback = torch.library.Library("_", "IMPL", "PrivateUse1")  # is undone where it is deleted
_fallback.fallback(lambda operator, *args, **kwargs: _run(operator, args, kwargs))

_tensor, _as_tensor = torch.tensor, torch.as_tensor


def _is_other(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _make_tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> Tensor:
    """Create a tensor on the CPU and move it; torch's own constructor writes into memory that is not there."""
    if not _is_other(device):
        return _tensor(data, device=device, requires_grad=requires_grad, **options)
    return _tensor(data, **options).to(DEVICE).requires_grad_(requires_grad)


def _make_as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    if isinstance(data, Tensor) or not _is_other(device):
        return _as_tensor(data, dtype=dtype, device=device)
    return _make_tensor(data, dtype=dtype, device=device)


torch.tensor, torch.as_tensor = _make_tensor, _make_as_tensor  # type: ignore[assignment]


class _OtherAccelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Do nothing; Lightning's own refuses every device but the CPU."""


class OtherDevice(SingleDeviceStrategy):
    """Trains on ``other:0``: ``Trainer(strategy=OtherDevice())``, or ``--trainer.strategy.class_path``."""

    def __init__(self) -> None:
        super().__init__(DEVICE, _OtherAccelerator())
