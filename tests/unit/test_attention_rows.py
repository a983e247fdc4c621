"""Attention rows in torch against the kernels' oracle, with all that changes scores; what is planned and kept."""

import numpy as np
import pytest
import torch

from headrift.vllm_plugin.instruments import StepBatch, parse_config, parse_probe
from headrift.vllm_plugin.instruments.attention_rows import RowDistance, attention_rows
from headrift.vllm_plugin.slots import Place, Probe, RecorderConfig, SlotTable
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
    result = attention_rows(query, keys, positions, **options)
    assert result.shape == (2, 3, HEADS, 32)
    for row in range(2):
        for at in range(3):
            n = int(positions[row, at]) + 1
            seen = keys[row, ..., :n].permute(2, 0, 1)
            expected = reference.attend(query[row, at], seen, seen, **options).probabilities
            np.testing.assert_allclose(result[row, at, :, :n], expected, rtol=0, atol=1e-6)
            assert (result[row, at, :, n:] == 0).all()


def rows_of_requests(**fields) -> RowDistance:
    """Of 4 slots, slot 1 keeps its rows as reference 0, and slot 2 is compared with that."""
    config = RecorderConfig(slots=4, steps=2, options={"row_references": 2, "row_keys": 24})
    table = SlotTable(config, 4, torch.device("cpu"))
    table.prompt_lens[:], table.step_limits[:] = 10, 3
    instrument = RowDistance(table, Place(range(1), range(HEADS)))
    compared = {"rows_against": 0, "other_len": 10, "aligned": [(0, 0, 10)], **fields}
    for slot, fields_of_slot in enumerate(({}, {"rows_as": 0}, compared, {})):
        instrument.admit(slot, Probe(slot, slot, prompt_len=10, regions=[], steps=2, fields=fields_of_slot))
    instrument.install(np.arange(4), torch.arange(4))
    return instrument


def test_rows_that_fit_what_is_kept():
    config = parse_config({"slots": 1, "steps": 9, "row_references": 1, "row_keys": 16})
    core = {"slot": 0, "request_id": 0, "regions": []}
    parse_probe({**core, "prompt_len": 12, "steps": 4, "rows_as": 0, "other_len": 10}, config)
    for change, message in (
        ({"steps": 5}, "12 tokens with 5 steps exceeds the 16 keys .* row_keys"),
        ({"steps": 0, "other_len": 17}, "row_keys"),
        ({"rows_as": None, "rows_against": 1}, "rows_against=1: this engine keeps 1, .* set row_references"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_probe({**core, "prompt_len": 12, "steps": 4, "rows_as": 0, "other_len": 10, **change}, config)


def plan(instrument, slots, lengths, seq_lens):
    return instrument.plan(StepBatch(np.array(slots), np.concatenate([[0], np.cumsum(lengths)]), np.array(seq_lens)))


def test_only_queries_at_recorded_steps_of_those_that_ask_are_planned():
    instrument = rows_of_requests()
    assert plan(instrument, [0, 3, -1], [1, 1, 1], [11, 10, 12]) is None  # nobody asks
    assert plan(instrument, [1, 2], [5, 9], [8, 9]) is None  # chunks of prompts that go on
    assert plan(instrument, [1], [1], [13]) is None  # past the last step
    # The last prompt token of a chunk; a decode step; a replayed answer, of whose tokens three are recorded steps.
    result = plan(instrument, [0, 1, 1, 2], [1, 4, 1, 13], [11, 10, 11, 14])
    one, three = result
    assert (one.rows.tolist(), one.tokens.tolist(), one.positions.tolist()) == ([1, 2], [4, 5], [[9], [10]])
    assert one.kept.tolist() == [[0, 1], [0, 0], [0, 1]]
    assert one.compared is None
    assert (three.rows.tolist(), three.tokens.tolist()) == ([3], [14, 15, 16])
    assert three.positions.tolist() == [[9, 10, 11]]
    assert three.compared.tolist() == [[0, 1, 2], [2, 2, 2], [0, 0, 0], [0, 1, 2]]
    assert (one.keys, three.keys) == (11, 12)


def test_many_rows_are_taken_so_many_keys_at_a_time(monkeypatch):
    monkeypatch.setattr("headrift.vllm_plugin.instruments.attention_rows._KEYS_AT_ONCE", 24)
    result = plan(rows_of_requests(), [1] * 5, [1] * 5, [11] * 5)
    assert [queries.rows.tolist() for queries in result] == [[0, 1], [2, 3], [4]]


def test_a_row_is_no_distance_from_itself_and_its_mass_from_nothing():
    torch.manual_seed(0)
    query, keys = torch.randn(2, HEADS, DIM), torch.randn(2, KV_HEADS, DIM, 16)
    query[1], keys[1] = query[0], keys[0]
    for runs, l2_of, tv_of in (([(0, 0, 10)], lambda p: 0, lambda p: 0), ([], lambda p: p.norm(dim=-1), lambda p: 0.5)):
        instrument = rows_of_requests(aligned=runs)
        (both,) = plan(instrument, [1, 2], [1, 1], [10, 10])
        kept = attention_rows(query[:1, None], keys[:1], torch.tensor([[9]]), **PLAIN)[0, 0]
        instrument.take(0, both, query, keys, **PLAIN)
        torch.testing.assert_close(instrument.rows[0, 0, 0, :, :16], kept, rtol=0, atol=1e-7)
        for kind, expected in enumerate((l2_of(kept), tv_of(kept))):
            np.testing.assert_allclose(
                instrument.distance[2, 0, 0, :, kind], np.broadcast_to(expected, HEADS), atol=1e-6
            )
        assert instrument.distance[[0, 1, 3]].isnan().all()
