"""Bytes moved with and without masses, counted in the interpreter: what `tests/kernels/tools/traffic.py` prints."""

import pytest
import torch

from tools.traffic import KV, chat, decode_traffic, failures, measure_replay


@pytest.mark.parametrize("splits", [1, 2])
def test_masses_move_no_key_and_hardly_a_byte(splits):
    case = chat(512, kv_heads=1, group=4, head_dim=64, dtype=torch.bfloat16)
    plain, probed = (decode_traffic(case, splits, with_mass) for with_mass in (False, True))
    once = 2 * 512 * 64 * 2  # rows x keys x head_dim x bytes, each key and value once
    assert plain.loaded["key_cache"] == plain.loaded["value_cache"] == once
    assert probed.total(*KV) == plain.total(*KV)
    assert probed.total() <= 1.01 * plain.total()
    assert probed.stored["mass"] == 2 * 4 * 3 * 4
    assert probed.stored["output"] == plain.stored["output"] == 2 * 4 * 64 * 2
    case.row_slot[:] = -1
    unprobed = decode_traffic(case, splits, True)
    assert unprobed.total("mass", "bounds", "prompt_len", "n_rows") == 0


def test_a_replay_reads_each_key_once_and_little_besides():
    replay = measure_replay()
    assert failures([], replay) == []
    for moved in replay:
        assert moved["most_reads_of_a_key"] == 1
        assert sum(moved["other_bytes"].values()) < 0.2 * moved["needed_key_bytes"]


@pytest.mark.parametrize("splits", [1, 2])
def test_a_sliding_window_reads_its_own_keys_only(splits):
    case = chat(512, kv_heads=1, group=4, head_dim=64, dtype=torch.bfloat16, window=100)
    assert decode_traffic(case, splits, True).loaded["key_cache"] == 2 * 100 * 64 * 2
