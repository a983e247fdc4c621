import gc

import psutil
import pytest
import torch

from headrift.vllm_engine import lazy_zeros, paused_garbage_collection


@pytest.mark.skipif(torch.version.cuda is not None, reason="of vLLM's build for CPUs")
def test_memory_of_the_cache_is_taken_when_it_is_written():
    process, size = psutil.Process(), 1 << 30
    with lazy_zeros():
        before = process.memory_info().rss
        cache = torch.zeros(size, dtype=torch.int8, device=torch.device("cpu"))
        others = torch.zeros((3, 5)), torch.zeros(4, dtype=torch.int32)
    # Some megabytes may come and go; a gigabyte of zeros would be there.
    assert process.memory_info().rss - before < size / 8
    assert [tuple(other.shape) for other in others] == [(3, 5), (4,)]
    cache[-64 << 20 :] = 7
    assert process.memory_info().rss - before > 32 << 20
    assert cache[:1000].sum() == 0
    assert cache[-1] == 7
    # vLLM's kernels load whole vectors of 64 bytes.
    assert cache.data_ptr() % 64 == 0


def test_an_engine_starts_without_the_garbage_collector():
    assert gc.isenabled()
    with paused_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_garbage_collection():
            pass
        assert not gc.isenabled(), "a user who has turned it off finds it off"
    finally:
        gc.enable()
