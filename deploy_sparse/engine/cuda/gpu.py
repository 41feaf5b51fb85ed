"""The NVIDIA GPU of this machine, found without importing torch."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


@dataclass(frozen=True)
class Gpu:
    """The GPU of this machine; ``capability`` is for example ``"SM89"``."""

    name: str
    capability: str


def local_gpu() -> Gpu | None:
    """The first NVIDIA GPU of this machine, or None; ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` count.

    Asked of torch where it is imported already and has support for CUDA, otherwise of the driver itself, which needs
    no Python library.
    """
    torch = sys.modules.get("torch")
    if torch is None or torch.version.cuda is None:
        return _gpu_of_the_driver(_driver())
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return Gpu(torch.cuda.get_device_name(0), f"SM{major}{minor}")


def gpu_of_address(address: int) -> int | None:
    """Number of the GPU on which the memory at an address was allocated; None where the driver does not know.

    Asked of the driver, so that every library's memory is told alike. A context has to be current in some thread, which
    it is where there is memory.
    """
    driver = _driver() if address else None
    found = ctypes.c_int()
    if driver is None or driver.cuPointerGetAttribute(ctypes.byref(found), _DEVICE_ORDINAL, ctypes.c_uint64(address)):
        return None
    return found.value


@cache
def _driver() -> Any:
    """The driver's library, or None."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _gpu_of_the_driver(driver: Any) -> Gpu | None:
    device, major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    found = (
        driver is not None
        and driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
        and driver.cuDeviceGetName(name, len(name), device) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device) == 0
    )
    return Gpu(name.value.decode(errors="replace"), f"SM{major.value}{minor.value}") if found else None
