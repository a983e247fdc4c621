"""What makes vLLM take its Triton code on a CPU, and what that code asks of a GPU (see conftest.py).

To be run before vLLM is imported: by conftest.py, and, as `sitecustomize`, at the start of each process of an engine.
"""

import torch
import triton.backends


class NoDriver:
    @staticmethod
    def is_active() -> bool:
        return False


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=NoDriver)
torch.cuda.get_device_capability = lambda *_, **__: (9, 0)
