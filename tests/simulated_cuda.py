"""A CUDA device for machines without one: its tensors say that they are on «cuda:0», and the CPU computes them.

Results can so be compared with those on the CPU, and two kinds of faults are found that a CPU hides:

- An operation on tensors of two devices raises an error, as on a GPU.
- `Simulation.waits` lists each operation for which the host would wait until the GPU has done all its work: a number
  read from the GPU, a copy to the host, and a copy from the host that is not asynchronous (or from memory that is not
  pinned: the driver may wait until it has copied that memory itself).

An asynchronous copy to the host arrives here only at the next wait. Until then its target holds NaN, so a read that
comes too early is found too. CUDA's own kernels, streams and allocator are not simulated.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PACKAGE = str(Path(__file__).parents[1] / "sdvae") + os.sep
FOREACH_TYPES = [*_foreach_utils._foreach_supported_types]  # of tensors that optimizers update together on CUDA
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

# Operations whose result has a size that depends on values, or that return a number: CUDA's versions wait.
READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
    aten._linalg_eigh,
    aten._linalg_svd,
}
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
COPIES = {aten._to_copy, aten.copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Wait(NamedTuple):
    """An operation that waits, and the innermost line of the package that asked for it."""

    operation: str
    where: str  # file:function


class OnGPU(Tensor):
    """A tensor that is on «cuda:0». `host` holds its values on the CPU."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGPU:
        # Below Python it is a tensor of the «meta» device, for which torch needs no driver.
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="meta",
            requires_grad=False,
        )
        self.host = host
        return self

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return simulation().run(function, args, kwargs or {})  # in threads, which do not have the mode

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        dtype, device = dtype or self.dtype, device or CUDA
        return torch.tensor(data, dtype=dtype, device=device, requires_grad=requires_grad)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    # torch itself would put a list of indices on the device that it sees below Python, «meta», without values
    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_with_tensors(index), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGPU:
        copied = OnGPU(self.host.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)


FOREACH_TYPES.append(OnGPU)


class Event:
    """torch.cuda.Event."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        simulation().wait("event")


class Simulation(TorchDispatchMode):
    """The device.

    Attributes:
        waits: the waits since the last `clear`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self._pinned: dict[int, Tensor] = {}  # by address; kept, so that no other tensor gets the address
        self._arriving: list[tuple[Tensor, Tensor]] = []  # asynchronous copies to the host: target, source

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would take longer than most operations, and nothing is compiled here

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(function, args, kwargs or {})

    def wait(self, operation: str) -> None:
        self.waits.append(Wait(operation, _caller()))
        with torch.inference_mode():
            for target, source in self._arriving:
                target.copy_(source)
        self._arriving.clear()

    def pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self._pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, OnGPU) and tensor.untyped_storage().data_ptr() in self._pinned

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation on tensors of either device."""
        if torch.is_inference_mode_enabled():  # in which torch does not take composed operations apart before
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        packet = function.overloadpacket
        tensors: list[Tensor] = []
        hosts = _each(args, lambda x: tensors.append(x) or _host(x))
        host_kwargs = {key: _each(x, lambda x: tensors.append(x) or _host(x)) for key, x in kwargs.items()}
        of_gpu = [x for x in tensors if isinstance(x, OnGPU)]
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if packet in COPIES:
            return self._copy(function, args, hosts, host_kwargs, target)
        if packet is aten.is_pinned:
            return self.is_pinned(args[0])
        if packet is aten._pin_memory:
            return self.pin(args[0])
        if packet is aten._fused_sdp_choice and of_gpu:
            return 0  # the plain product, the only kernel that both devices have
        if of_gpu:
            self._check(function, tensors, kwargs.get("generator"))
            indexed_by_values = packet in INDEXED and any(
                isinstance(x, Tensor) and (x.dtype == torch.bool or not isinstance(x, OnGPU)) for x in args[1]
            )
            if packet in READS or indexed_by_values:
                self.wait(str(packet))
        gpu = target.type != "cpu" if target is not None else bool(of_gpu)  # «meta» where torch itself asks for it
        if gpu and getattr(kwargs.get("generator"), "device", CUDA).type != "cuda":
            raise RuntimeError(f"{function}: expected a 'cuda' device type for generator")
        if target is not None:
            host_kwargs["device"] = CPU
        pinned = host_kwargs.pop("pin_memory", False)
        result = function(*hosts, **host_kwargs)
        if gpu and packet in EMPTY:
            result.fill_(float("nan") if result.is_floating_point() or result.is_complex() else 1)  # never by luck zero
        if pinned and isinstance(result, Tensor):
            return self.pin(result)
        return _wrapped(result, of_gpu) if gpu else result

    def _check(self, function: Any, tensors: list[Tensor], generator: Any) -> None:
        """Refuse tensors of two devices. A CPU tensor without dimensions is allowed, and so are indices on the CPU."""
        strangers = [x for x in tensors if not isinstance(x, OnGPU) and x.dim() > 0]
        if strangers and function.overloadpacket not in INDEXED:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, found cuda:0 and cpu")

    def _copy(self, function: Any, args: Any, hosts: Any, kwargs: dict[str, Any], target: torch.device | None) -> Any:
        """`_to_copy(source, device=…)` or `copy_(target, source)`."""
        in_place = function.overloadpacket is aten.copy_
        source = args[1] if in_place else args[0]
        before = isinstance(source, OnGPU)
        after = isinstance(args[0], OnGPU) if in_place or target is None else target.type != "cpu"
        asynchronous = args[2] if in_place and len(args) > 2 else kwargs.get("non_blocking", False)
        if before and not after:
            if not asynchronous:
                self.wait("to the host")
        elif after and not before and source.numel():
            if not asynchronous:
                self.wait("from the host")
            elif not self.is_pinned(source):
                self.wait("from the host, not pinned")
        if target is not None:
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        if before and not after and asynchronous:
            result = args[0] if in_place else self.pin(function(*hosts, **kwargs))
            if in_place and not self.is_pinned(result):
                self.wait("to the host, not pinned")
            result.fill_(float("nan") if result.is_floating_point() else -1)
            self._arriving.append((result, hosts[-1 if not in_place else 1].clone()))
            return result
        result = function(*hosts, **kwargs)
        if in_place:
            return args[0]
        return OnGPU(result) if after else result


class Autocast(TorchFunctionMode):
    """CUDA's autocast, whose own implementation looks at devices below Python.

    https://docs.pytorch.org/docs/stable/amp.html lists its operations. These are the ones that this project uses.
    """

    HALF = {"conv2d", "conv_transpose2d", "linear", "matmul", "addmm", "baddbmm", "bmm", "scaled_dot_product_attention"}
    FULL = {"group_norm", "layer_norm", "softmax", "log_softmax", "exp", "log", "log1p", "pow", "rsqrt", "norm", "sum"}
    FULL |= {
        "prod",
        "cumsum",
        "softplus",
        "l1_loss",
        "mse_loss",
        "binary_cross_entropy_with_logits",
        "cosine_similarity",
    }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        kwargs = kwargs or {}
        if (name in self.HALF or name in self.FULL) and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda") if name in self.HALF else torch.float32

            def cast(x: Tensor) -> Tensor:
                return x.to(dtype) if isinstance(x, OnGPU) and x.is_floating_point() and x.dtype != dtype else x

            args, kwargs = _each(args, cast), {key: _each(x, cast) for key, x in kwargs.items()}
        return function(*args, **kwargs)


def _with_tensors(index: Any) -> Any:
    """An index in which each list is a tensor on the GPU, where CUDA's indexing copies it."""
    if isinstance(index, tuple):
        return tuple(_with_tensors(part) for part in index)
    return torch.tensor(index, device=CUDA) if isinstance(index, list) else index


def _host(x: Tensor) -> Tensor:
    return x.host if isinstance(x, OnGPU) else x


def _each(x: Any, change: Callable[[Tensor], Any]) -> Any:
    """A tensor, or lists and tuples of tensors and other values, with `change` applied to every tensor."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple | list):
        return type(x)(_each(part, change) for part in x)
    return x


def _wrapped(result: Any, inputs: list[OnGPU]) -> Any:
    """Results of an operation as tensors of the GPU; what was changed in place stays the same object."""
    known = {id(x.host): x for x in inputs}

    def wrap(x: Tensor) -> Tensor:
        same = known.get(id(x))
        if same is None:
            return OnGPU(x)
        assert same.shape == x.shape, "an operation that changes a tensor's shape in place is not simulated"
        return same

    return _each(result, wrap)


def _caller() -> str:
    frame: Any = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "outside of the package"
    return f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_code.co_name}"


_simulation: Simulation | None = None


def simulation() -> Simulation:
    assert _simulation is not None, "no device is simulated"
    return _simulation


@contextmanager
def simulated_cuda(free_bytes: int = 2**40) -> Iterator[Simulation]:
    """A context in which the process has the device."""
    global _simulation
    assert not torch.cuda.is_available(), "this machine has the device"
    replaced: dict[tuple[Any, str], Any] = {
        (torch.cuda, "is_available"): lambda: True,
        (torch.cuda, "is_initialized"): lambda: True,
        (torch.cuda, "_lazy_init"): lambda: None,
        (torch.cuda, "is_bf16_supported"): lambda *_, **__: True,
        (torch.cuda, "device_count"): lambda: 1,
        (torch.cuda, "current_device"): lambda: 0,
        (torch.cuda, "set_device"): lambda _: None,
        (torch.cuda, "get_device_capability"): lambda *_: (9, 0),
        (torch.cuda, "get_device_name"): lambda *_: "simulated",
        (torch.cuda, "synchronize"): lambda *_: simulation().wait("synchronize"),
        (torch.cuda, "mem_get_info"): lambda *_: (free_bytes, 2**40),
        (torch.cuda, "memory_allocated"): lambda *_: 0,
        (torch.cuda, "max_memory_allocated"): lambda *_: 0,
        (torch.cuda, "memory_reserved"): lambda *_: 0,
        (torch.cuda, "reset_peak_memory_stats"): lambda *_: None,
        (torch.cuda, "empty_cache"): lambda: None,
        (torch.cuda, "Event"): Event,
        (torch.backends.cuda, "can_use_efficient_attention"): lambda *_: True,  # though the plain product is computed
        (torch.accelerator, "is_available"): lambda: True,
        (torch.accelerator, "device_count"): lambda: 1,
        (torch.accelerator, "current_accelerator"): lambda *_, **__: torch.device("cuda"),
        (torch.accelerator, "synchronize"): lambda *_: simulation().wait("synchronize"),
        (Tensor, "pin_memory"): lambda self, *_: simulation().pin(self),
        (Tensor, "is_pinned"): lambda self, *_: simulation().is_pinned(self),
    }
    torch._C._ensureCUDADeviceGuardSet()  # instead of CUDA's, which needs a driver; FakeTensorMode does the same
    with ExitStack() as undo:
        for (place, name), value in replaced.items():
            undo.enter_context(mock.patch.object(place, name, value))
        undo.enter_context(mock.patch.object(_foreach_utils, "_foreach_supported_types", FOREACH_TYPES))
        swap = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # otherwise `OnGPU.host` would stay behind
        undo.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) makes its copy where the mode sees it
        undo.callback(torch._C._set_only_lift_cpu_tensors, False)
        undo.enter_context(Autocast())
        _simulation = undo.enter_context(Simulation())
        yield _simulation
    _simulation = None
