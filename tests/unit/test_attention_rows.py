"""Attention rows in torch against the kernels' oracle, with all that a layer can do to its scores; and what the bank
plans and keeps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from headrift.vllm_plugin.attention_rows import RowBank, attention_rows
from headrift_kernels import reference

HEADS, KV_HEADS, DIM = 6, 2, 16
PLAIN = {"scale": 0.3, "window": None, "softcap": 0.0, "alibi_slopes": None, "sinks": None}
OPTIONS = {
    "plain": {},
    "window": {"window": 7},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.linspace(0.01, 0.4, HEADS)},
    "sinks": {"sinks": torch.linspace(-2, 3, HEADS)},
    "all": {"window": 9, "softcap": 3.0, "alibi_slopes": torch.full((HEADS,), 0.1), "sinks": torch.ones(HEADS)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_the_oracles(name):
    torch.manual_seed(0)
    options = {**PLAIN, **OPTIONS[name]}
    query, keys = torch.randn(2, 3, HEADS, DIM), torch.randn(2, KV_HEADS, DIM, 32)
    positions = torch.tensor([[17, 18, 19], [4, 5, 6]])
    # What lies past a query's own key is anything at all.
    for row, last in enumerate(positions[:, -1].tolist()):
        keys[row, ..., last + 1 :] = torch.nan
    found = attention_rows(query, keys, positions, **options)
    assert found.shape == (2, 3, HEADS, 32)
    for row in range(2):
        for at in range(3):
            n = int(positions[row, at]) + 1
            seen = keys[row, ..., :n].permute(2, 0, 1)
            expected = reference.attend(query[row, at], seen, seen, **options).probabilities
            np.testing.assert_allclose(found[row, at, :, :n], expected, rtol=0, atol=1e-6)
            assert (found[row, at, :, n:] == 0).all()


def bank_of(**asked) -> RowBank:
    """A bank of 4 slots whose slot 1 keeps, and slot 2 compares with, reference 0."""
    sizes = {"slots": 4, "references": 2, "steps": 2, "layers": 1, "heads": HEADS, "keys": 24}
    bank = RowBank(**sizes, device=torch.device("cpu"))
    none = {"rows_as": None, "rows_against": None, "aligned": (), "other_len": 0, "prompt_len": 10, "steps": 2}
    bank.admit(0, SimpleNamespace(**none))
    bank.admit(1, SimpleNamespace(**none | {"rows_as": 0}))
    bank.admit(2, SimpleNamespace(**none | {"rows_against": 0, "other_len": 10, "aligned": [(0, 0, 10)], **asked}))
    bank.admit(3, SimpleNamespace(**none))
    bank.install(np.arange(4), torch.arange(4), torch.from_numpy)
    return bank


def planned(bank, slots, lengths, seq_lens):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    prompt_lens, wanted = np.full(4, 10), np.full(4, 3)
    return bank.plan(np.array(slots), starts, np.array(seq_lens), prompt_lens, wanted, torch.from_numpy)


def test_only_queries_at_recorded_steps_of_those_that_ask_are_planned():
    bank = bank_of()
    assert planned(bank, [0, 3, -1], [1, 1, 1], [11, 10, 12]) is None  # nobody asks
    assert planned(bank, [1, 2], [5, 9], [8, 9]) is None  # chunks of prompts that go on
    assert planned(bank, [1], [1], [13]) is None  # past the last step
    # The last prompt token of a chunk; a decode step; a replayed answer, of whose tokens three are recorded steps.
    found = planned(bank, [0, 1, 1, 2], [1, 4, 1, 13], [11, 10, 11, 14])
    one, three = found
    assert (one.rows.tolist(), one.tokens.tolist(), one.positions.tolist()) == ([1, 2], [4, 5], [[9], [10]])
    assert one.kept.tolist() == [[0, 1], [0, 0], [0, 1]]
    assert one.compared is None
    assert (three.rows.tolist(), three.tokens.tolist()) == ([3], [14, 15, 16])
    assert three.positions.tolist() == [[9, 10, 11]]
    assert three.compared.tolist() == [[0, 1, 2], [2, 2, 2], [0, 0, 0], [0, 1, 2]]
    assert (one.keys, three.keys) == (11, 12)


def test_many_rows_are_taken_so_many_keys_at_a_time(monkeypatch):
    monkeypatch.setattr("headrift.vllm_plugin.attention_rows._KEYS_AT_ONCE", 24)
    found = planned(bank_of(), [1] * 5, [1] * 5, [11] * 5)
    assert [queries.rows.tolist() for queries in found] == [[0, 1], [2, 3], [4]]


def test_a_row_is_no_distance_from_itself_and_its_mass_from_nothing():
    torch.manual_seed(0)
    query, keys = torch.randn(2, HEADS, DIM), torch.randn(2, KV_HEADS, DIM, 16)
    query[1], keys[1] = query[0], keys[0]
    for runs, l2_of, tv_of in (([(0, 0, 10)], lambda p: 0, lambda p: 0), ([], lambda p: p.norm(dim=-1), lambda p: 0.5)):
        bank = bank_of(aligned=runs)
        (both,) = planned(bank, [1, 2], [1, 1], [10, 10])
        kept = attention_rows(query[:1, None], keys[:1], torch.tensor([[9]]), **PLAIN)[0, 0]
        bank.take(0, both, query, keys, **PLAIN)
        torch.testing.assert_close(bank.rows[0, 0, 0, :, :16], kept, rtol=0, atol=1e-7)
        for kind, expected in enumerate((l2_of(kept), tv_of(kept))):
            np.testing.assert_allclose(bank.distance[2, 0, 0, :, kind], np.broadcast_to(expected, HEADS), atol=1e-6)
        assert bank.distance[[0, 1, 3]].isnan().all()
