"""Kernels for x86 CPUs, compiled by numba at first use and cached beside the source."""
