"""
Devices that do not exist, for machines without a GPU: tensors that hold values on the CPU, say that they are on
`pretended:0` or `pretended:1`, and raise where a real device would, when an operation mixes devices.

    python -m hydrahead.tests.pretended FILE    # `placements.everything` of a teacher on two of them, for torch.load

PyTorch knows such devices once in a process and for good, hence a process of its own.
"""

import contextlib
import sys
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from hydrahead.tests.families import make_teacher
from hydrahead.tests.placements import everything, split
from hydrahead.tests.test_scoring import usable_pairs

CPU, aten = torch.device("cpu"), torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)  # indices may be on the CPU


class Pretended(torch.Tensor):
    """A tensor on the CPU that is seen on another device."""

    @staticmethod
    def __new__(cls, value: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False):
        if isinstance(value, Pretended):
            value, device = value.value, value.device
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        self = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, device=device, requires_grad=requires_grad, **layout
        )
        self.value = value
        return self

    def __init__(self, *_, **__):
        pass  # `__new__` takes the arguments

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args: tuple, kwargs: dict):
    """Run an operation on the CPU and put what it gives where a real device would, or raise."""
    if operation is aten._fused_sdp_choice.default:
        return 0  # the kernel that is written in other operations
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.ndim or tensor.device != CPU}
    if operation in INDEXING and args[0].device != CPU:
        devices -= {CPU}
    if len(devices) > 1 and operation not in MOVES:
        raise RuntimeError(f"{operation}: tensors on {', '.join(sorted(map(str, devices)))}")
    device = torch.device(kwargs.get("device") or next((t.device for t in tensors if t.device in devices), CPU))
    wrapped = {id(tensor.value): tensor for tensor in tensors if isinstance(tensor, Pretended)}
    args, kwargs = tree_map_only(Pretended, lambda tensor: tensor.value, (args, kwargs))
    output = operation(*args, **kwargs | ({"device": CPU} if kwargs.get("device") else {}))

    def wrap(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in wrapped:  # changed in place
            return wrapped[id(tensor)]
        return tensor if device == CPU else Pretended(tensor, device)

    return tree_map_only(torch.Tensor, wrap, output)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What PyTorch does below the level at which operations can be seen."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device"):
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(part) if isinstance(part, list) else part for part in index))
        return function(*args, **kwargs)


class _Backend(_DummyBackendModule):
    def device_count(self) -> int:
        return 2

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@contextlib.contextmanager
def pretended_devices() -> Iterator[None]:
    """Within the block there are two more devices, which stay known to the process."""
    _setup_privateuseone_for_python_backend("pretended", _Backend())
    generator = torch.Generator
    torch.Generator = lambda device=None: generator()
    torch.autograd.set_multithreading_enabled(False)  # its threads belong to real devices
    with _Operations(), _Functions():
        yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    teacher = make_teacher("qwen3-untied", initializer_range=0.4)
    pairs = usable_pairs(teacher, 4)
    with pretended_devices():
        teacher = split(teacher, "pretended:0", "pretended:1")
        torch.save(everything(teacher, pairs, Accelerator(cpu=True)), sys.argv[1])
