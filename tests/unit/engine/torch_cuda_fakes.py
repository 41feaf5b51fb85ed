"""A stand-in for what torch offers of CUDA."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace

from cuda_fakes import FakeGpu, own


def fake_torch(gpu: FakeGpu) -> ModuleType:
    """The parts of ``torch`` and ``torch.cuda`` that manage memory and streams; tensors are real ones on the CPU."""
    import torch

    module = ModuleType("torch")
    module.uint8, module.from_numpy, module.Tensor = torch.uint8, torch.from_numpy, torch.Tensor
    module.float32 = torch.float32
    current = [SimpleNamespace(cuda_stream=0)]
    gpu.streams.add(0)

    def checked(name: str, *arguments: object) -> None:
        if (problem := gpu.fails(name, *arguments)) is not None:
            raise problem

    def empty(shape, dtype, device):
        assert device.startswith("cuda")
        checked("empty", shape)
        tensor = torch.empty(shape, dtype=dtype)
        nbytes = tensor.numel() * tensor.element_size()
        address = own(gpu.foreign, nbytes)
        return torch.from_numpy(gpu.foreign[address]).view(dtype).reshape(shape)

    class Stream:
        def __init__(self) -> None:
            checked("Stream")
            self.cuda_stream = gpu.number()
            gpu.streams.add(self.cuda_stream)

        def synchronize(self) -> None:
            checked("synchronize")

        def wait_stream(self, other) -> None:
            checked("wait_stream", self.cuda_stream, other.cuda_stream)

        def __del__(self) -> None:
            gpu.streams.discard(self.__dict__.get("cuda_stream"))

    class ExternalStream(Stream):
        def __init__(self, handle: int) -> None:
            self.cuda_stream = handle

        def __del__(self) -> None: ...

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream) -> None:
            checked("record")

        def synchronize(self) -> None: ...

        def elapsed_time(self, other) -> float:
            return 0.25

    class CUDAGraph:
        def replay(self) -> None:
            checked("replay")
            assert current[-1] is self.stream, "a graph replayed in another stream"
            gpu.launches += 1
            for work in self.work:
                work()

    @contextmanager
    def graph(made, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        gpu.capturing[stream.cuda_stream], made.stream = [], stream
        try:
            yield
            checked("capture_end")
        finally:
            made.work = gpu.capturing.pop(stream.cuda_stream)

    @contextmanager
    def stream(new):
        checked("on", new.cuda_stream)
        current.append(new)
        try:
            yield
        finally:
            current.pop()

    module.empty = empty
    module.cuda = SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        device=lambda index: nullcontext(),
        current_stream=lambda: current[-1],
        OutOfMemoryError=type("OutOfMemoryError", (RuntimeError,), {}),
        Stream=Stream,
        ExternalStream=ExternalStream,
        Event=Event,
        CUDAGraph=CUDAGraph,
        graph=graph,
        stream=stream,
    )
    current[0] = ExternalStream(0)
    return module
