"""Attention kernels that also sum each head's attention mass over named token ranges.

They need torch, triton and numba, and can be used without vLLM:

- ``reference``: a float64 oracle in torch, the definition in code;
- ``cpu``: kernels compiled by numba;
- ``triton``: kernels for GPUs.
"""
