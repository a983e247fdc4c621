"""Triton compiles for a GPU that is not there and "launches" on it: what would reach the GPU is kept.

tests/kernels/test_triton_launch.py runs this folder in a process of its own; any other pytest process passes it by.
"""

import os
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

if os.environ.get("HEADRIFT_FAKE_GPU") != "1":
    collect_ignore_glob = ["test_*.py"]


@dataclass
class Launched:
    """What the GPU's driver would be called with: of arguments what the kernel takes, tensors as addresses."""

    code: str
    grid: tuple
    stream: int
    function: object
    packed_metadata: tuple
    arguments: list


@dataclass
class FakeGPU:
    """A driver for Triton, with the methods that compiling and launching call."""

    target: object
    stream: int = 0
    launched: list = field(default_factory=list)
    attributes: dict = field(default_factory=dict)  # what the last compiled kernel assumes of each argument

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream

    @property
    def utils(self):
        return SimpleNamespace(
            load_binary=lambda name, code, shared, device: (object(), object(), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
        )

    def launcher_cls(self, source, metadata):
        self.attributes = {source.fn.arg_names[place]: dict(pairs) for (place,), pairs in source.attrs.items()}
        types = list(source.signature.values())

        def run(x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
            for hook in (enter_hook, exit_hook):
                if hook is not None:
                    hook(launch_metadata)
            taken = [a for a, kind in zip(arguments, types, strict=True) if kind != "constexpr"]
            values = [a.data_ptr() if hasattr(a, "data_ptr") else a for a in taken]
            self.launched.append(Launched(metadata.hash, (x, y, z), stream, function, packed_metadata, values))

        return run


@pytest.fixture
def fake_gpu(request):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    gpu = FakeGPU(GPUTarget(*getattr(request, "param", ("cuda", 90, 32))))
    driver.set_active(gpu)
    return gpu
