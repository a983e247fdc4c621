"""Make every Python process of a test run take the processor for one with AVX2 and no more: `make test-avx2`.

With this folder on PYTHONPATH, Python runs this file at its start. PyTorch's own kernels, oneDNN, MKL and numba go by
the variables that the Makefile sets; vLLM asks PyTorch which of its libraries to load, so what PyTorch answers is
changed here, once it is imported.
"""

import importlib.util
import sys

WIDER = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported")


class AVX2:
    """Finds `torch.cpu` as Python would, and changes it after it has run."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_change(module):
            run(module)
            for question in WIDER:
                assert hasattr(module, question), f"torch.cpu.{question} is gone: what does vLLM ask now?"
                setattr(module, question, lambda: False)

        spec.loader.exec_module = run_and_change
        return spec


sys.meta_path.insert(0, AVX2)
