"""Tools for the kernels: compile them for absent GPUs, count their bytes, make batches, stand in for a GPU.

`tests/kernels` is on sys.path in tests (pyproject.toml), and bench/utils.py puts it there for the benchmarks.
"""
