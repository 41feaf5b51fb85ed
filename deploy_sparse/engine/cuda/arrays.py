"""Arrays on the GPU that others own: torch tensors, ``__cuda_array_interface__`` (CuPy, Numba, pycuda), DLPack.

Nothing is copied: what is read are an address, a type and a shape.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import EngineError
from ..tensors import Form
from .gpu import gpu_of_address
from .runtime import Buffer, Cuda, Stream, out_of_memory

_LEGACY_STREAM = 1  # the default stream, as both protocols number it
_ON_CUDA = (2, 13)  # DLPack's kDLCUDA and kDLCUDAManaged
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}


@dataclass(frozen=True)
class DeviceView:
    """An array on the GPU.

    Attributes:
        form: type, shape, order and address.
        stream: another stream that must have finished with it first; None where the caller's has.
        owner: what was given.
        keep: what must live as long as the address is used.
        device: number of the GPU; None where nobody tells.
    """

    form: Form
    stream: int | None
    owner: Any
    keep: Any = None
    device: int | None = None


class DeviceArray:
    """A result on the GPU where torch is not imported; whatever reads ``__cuda_array_interface__`` takes it.

    Attributes:
        shape, dtype: as of a NumPy array.
    """

    def __init__(self, cuda: Cuda, stream: Stream, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype, self._cuda = shape, dtype, cuda
        self._buffer = cuda.alloc(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, stream)
        weakref.finalize(self, _free, cuda, self._buffer).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._buffer.pointer, False),
            "strides": None,
            "stream": None,  # complete: whoever made it has waited
            "version": 3,
        }

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        array = np.empty(self.shape, self.dtype)
        with self._cuda.active():
            stream = self._cuda.stream()
            try:
                self._cuda.copy_out(array, self._buffer, stream)
                stream.synchronize()
            finally:
                stream.close()
        return array


def callers_stream() -> int:
    """The stream on which the caller's work is: torch's current one where torch is imported, else the default one."""
    torch = torch_with_cuda()
    return _LEGACY_STREAM if torch is None else int(torch.cuda.current_stream().cuda_stream)


def torch_with_cuda() -> Any:
    """The module torch if it is imported and has a GPU, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def new_tensor(torch: Any, shape: tuple[int, ...], dtype: str, device: int) -> Any:
    """A torch tensor on a GPU, with nothing in it yet.

    Raises:
        EngineError: no memory for it.
    """
    try:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=f"cuda:{device}")
    except torch.cuda.OutOfMemoryError as problem:
        raise out_of_memory(f"making a tensor {dtype} {list(shape)}") from problem


def device_views(arrays: Mapping[str, Any], stream: int) -> dict[str, DeviceView]:
    """Where each array lies.

    Args:
        stream: the caller's, on which DLPack's producers are asked to be done with theirs.

    Raises:
        EngineError: an array that is not on a GPU, or that says nothing of where it is.
    """
    if not isinstance(arrays, Mapping):
        raise EngineError(
            f"a {type(arrays).__name__} was given",
            expected="a dictionary from name to array on the GPU",
            fix="pass {name: tensor}",
        )
    return {name: _view(name, value, stream) for name, value in arrays.items()}


def check_device(views: Mapping[str, DeviceView], device: int) -> None:
    """Refuse arrays on another GPU than the engine's, whose addresses mean nothing there.

    Raises:
        EngineError: there is one.
    """
    for name, view in views.items():
        if view.device not in (None, device):
            raise EngineError(
                f"{name!r} is on GPU {view.device}, and the engine on GPU {device}",
                expected="arrays on the engine's GPU",
                fix=f"move it: tensor.to('cuda:{device}')",
            )


def _view(name: str, value: Any, stream: int) -> DeviceView:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_torch(name, value)
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is not None:
        try:
            return _of_interface(value, interface)
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise EngineError(
                f"{name!r} is a {type(value).__name__} whose __cuda_array_interface__ cannot be read: {problem!r}",
                expected="an array without a mask, as version 3 of that protocol describes one",
                fix="copy it with its own library, or pass a torch tensor",
            ) from problem
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__") and not isinstance(value, np.ndarray):
        if value.__dlpack_device__()[0] not in _ON_CUDA:
            raise _not_there(name, value)
        try:
            capsule = value.__dlpack__(stream=stream or _LEGACY_STREAM)
            if (kind := _tensor_of(capsule).device_type) not in _ON_CUDA:
                raise BufferError(f"the memory is of DLPack's device type {kind}, which is not CUDA's")
            return view_of_capsule(value, capsule)
        except Exception as problem:  # a producer raises whatever it likes
            raise EngineError(
                f"{name!r} is a {type(value).__name__}, which does not give its memory away: {problem}",
                expected="an array that DLPack can describe, without gradients",
                fix="detach or copy it with its own library",
            ) from problem
    raise _not_there(name, value)


def _not_there(name: str, value: Any) -> EngineError:
    return EngineError(
        f"{name!r} is a {type(value).__name__}, which is not on the GPU",
        expected="a torch CUDA tensor, or an array with __cuda_array_interface__ or __dlpack__",
        fix="move it: tensor.cuda(); or call run, which takes NumPy arrays",
    )


def _of_torch(name: str, tensor: Any) -> DeviceView:
    if not tensor.is_cuda:
        raise _not_there(name, tensor)
    dtype = str(tensor.dtype).removeprefix("torch.")
    form = Form(
        dtype,
        tuple(tensor.shape),
        bool(tensor.is_contiguous()),
        int(tensor.data_ptr()),
        tensor.numel() * tensor.element_size(),
    )
    return DeviceView(_with_torchs_advice(form), None, tensor, device=tensor.device.index)


def _of_interface(value: Any, interface: Mapping[str, Any]) -> DeviceView:
    dtype, shape = np.dtype(interface["typestr"]), tuple(int(extent) for extent in interface["shape"])
    if interface.get("mask") is not None:
        raise ValueError("it has a mask")
    strides = interface.get("strides")
    dense = strides is None or _is_dense(shape, tuple(stride // dtype.itemsize for stride in strides))
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    pointer, read_only = interface["data"]
    form = Form(str(dtype), shape, dense, int(pointer), nbytes, writeable=not read_only)
    device = gpu_of_address(int(pointer))  # the protocol does not tell
    return DeviceView(_with_torchs_advice(form), interface.get("stream"), value, device=device)


def _with_torchs_advice(form: Form) -> Form:
    return form._replace(cast=".to(torch.{})", copy="tensor.contiguous()")


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether these strides, in elements, are those of a C-contiguous array."""
    if 0 in shape:
        return True
    wanted = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent > 1 and stride != wanted:
            return False
        wanted *= extent
    return True


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    """``DLTensor`` of DLPack's C header, which an unversioned capsule's ``DLManagedTensor`` begins with."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def view_of_capsule(value: Any, capsule: Any) -> DeviceView:
    """What a DLPack capsule says; it is not consumed, so its producer frees the memory with the capsule."""
    found = _tensor_of(capsule)
    shape = tuple(found.shape[: found.ndim])
    kind, bits = _KINDS.get(found.dtype.code, "unknown"), found.dtype.bits
    dtype = "bool" if kind == "bool" else f"{kind}{bits}" + (f"x{found.dtype.lanes}" if found.dtype.lanes > 1 else "")
    dense = not found.strides or _is_dense(shape, tuple(found.strides[: found.ndim]))
    nbytes = int(np.prod(shape, dtype=np.int64)) * bits * found.dtype.lanes // 8
    form = Form(dtype, shape, dense, (found.data or 0) + found.byte_offset, nbytes)
    return DeviceView(_with_torchs_advice(form), None, value, capsule, found.device_id)


def _tensor_of(capsule: Any) -> _Tensor:
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.cast(address(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents


def _free(cuda: Cuda, buffer: Buffer) -> None:
    with cuda.active():
        buffer.free()
