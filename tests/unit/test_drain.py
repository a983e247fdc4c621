"""The drain: what each rank sends, without waiting, and the ranks' answers put together."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import SamplingParams

from headrift import signal
from headrift.vllm_engine import RanksError, merge_descriptions, merge_recordings
from headrift.vllm_plugin.instruments import parse_config
from headrift.vllm_plugin.recorder import Recorder
from headrift.vllm_plugin.slots import Place

SYSTEM, PROMPT = 0, 2
CONFIG = parse_config(
    {"slots": 3, "steps": 4, "regions": 3, "system_region": SYSTEM, "prompt_region": PROMPT, "logit_stats": True}
)
LAYERS, HEADS = 5, 6
# Slots and ids of the requests that are drained, and how many steps of each.
REQUESTS, STEPS = [(2, 21), (0, 20)], 4


def admit(recorder: Recorder, slot: int, request_id: int) -> None:
    extra = {"slot": slot, "request_id": request_id, "prompt_len": 7, "regions": [[0, 3], [3, 5], [0, 7]], "steps": 4}
    recorder.admit(SamplingParams(extra_args={"headrift": extra}))


@pytest.fixture
def masses() -> torch.Tensor:
    """What a rank with the whole model would have recorded; one step of one request was never computed."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand((CONFIG.slots, CONFIG.steps + 1, LAYERS, HEADS, CONFIG.regions), generator=generator)
    values[0, 1] = torch.nan
    values[2, 2, 3, 4] = 0.0
    return values


def rank(masses: torch.Tensor, layers: range, heads: range, *, logits: bool = False, device: str = "cpu") -> Recorder:
    """The recorder of a rank that holds these layers and heads; both requests have run."""
    recorder = Recorder(CONFIG, Place(layers, heads, logits), 4, torch.device(device))
    for slot, request_id in REQUESTS:
        admit(recorder, slot, request_id)
    recorder.mass.copy_(masses[:, :, layers.start : layers.stop, heads.start : heads.stop])
    # Only a rank with the logits has anything here; what the others hold must not be taken.
    recorder.instrument("LogitStatistics").stats.fill_(0.5 if logits else -1.0)
    return recorder


def answer(recorder: Recorder, *, requests=REQUESTS, n_steps: int = STEPS, want_mass: bool = True) -> bytes:
    recorder.collect(0, requests, n_steps, want_mass)
    return recorder.fetch(0)


def grid(masses: torch.Tensor, stages: list[range], shares: list[range]) -> list[Recorder]:
    """A rank for each pipeline stage's layers and each share of the heads; the last stage's first rank has logits."""
    return [
        rank(masses, layers, heads, logits=layers == stages[-1] and heads == shares[0])
        for layers in stages
        for heads in shares
    ]


def test_shares_on_the_device_are_the_signals(masses):
    """Of masses of all sizes, missing ones among them: equal to the last bit of float32, zeros and NaN in their places.

    float32(a) / float32(b) is rounded once, and the signal's float64 quotient twice when it becomes a float32.
    """
    sizes = 10.0 ** torch.linspace(-14, 0, masses[..., 0].numel()).reshape(masses[..., 0].shape)
    masses[..., SYSTEM] *= sizes
    masses[..., PROMPT] = sizes * (1 + masses[..., PROMPT]) / 2
    whole = merge_recordings([answer(rank(masses, range(LAYERS), range(HEADS), logits=True))], LAYERS, HEADS)
    expected = signal.share(whole["mass"][..., SYSTEM], whole["mass"][..., PROMPT])
    np.testing.assert_allclose(whole["share"], expected.astype(np.float32), rtol=2**-23, atol=0)
    assert np.isnan(expected).any()
    assert 0 < (expected == 0).mean() < 0.9


ALL_LAYERS, ALL_HEADS = [range(LAYERS)], [range(HEADS)]
TWO_STAGES, THREE_SHARES = [range(2), range(2, LAYERS)], [range(2), range(2, 4), range(4, 6)]


@pytest.mark.parametrize(
    ("stages", "shares"),
    [(ALL_LAYERS, ALL_HEADS), (ALL_LAYERS, THREE_SHARES), (TWO_STAGES, ALL_HEADS), (TWO_STAGES, THREE_SHARES)],
)
@pytest.mark.parametrize("order", [1, -1])
def test_ranks_make_up_the_model_in_its_own_order(masses, stages, shares, order):
    answers = [answer(recorder) for recorder in grid(masses, stages, shares)][::order]
    whole = merge_recordings(answers, LAYERS, HEADS)
    expected = masses[[slot for slot, _ in REQUESTS], :STEPS].numpy()
    np.testing.assert_array_equal(whole["mass"], expected)
    np.testing.assert_array_equal(whole["first"], expected[:, 0])
    with np.errstate(invalid="ignore"):
        share = np.where(expected[..., PROMPT] == 0, 0, expected[..., SYSTEM] / expected[..., PROMPT])
    np.testing.assert_array_equal(whole["share"], share)
    assert np.isnan(whole["share"][1, 1]).all()
    np.testing.assert_array_equal(whole["stats"], np.full((2, STEPS, 3), 0.5, np.float32))


def test_masses_leave_only_when_asked_for(masses):
    ranks = grid(masses, ALL_LAYERS, THREE_SHARES)
    whole = merge_recordings([answer(recorder, want_mass=False) for recorder in ranks], LAYERS, HEADS)
    assert set(whole) == {"share", "first", "stats"}


def without_logits(part: bytes) -> bytes:
    return save({**load(part), "logits": np.array([False])})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda first, second, _: [first, answer(second, requests=REQUESTS[::-1])], "different requests"),
        (lambda first, second, _: [first, answer(second, n_steps=STEPS - 1)], "different requests, steps"),
        (lambda first, second, _: [first, answer(second, want_mass=False)], "arrays"),
        (lambda first, second, _: [without_logits(first), answer(second)], "0 ranks"),
        (lambda first, _, stranger: [first, answer(stranger(range(2, 6), True))], "2 ranks"),
        (lambda first, *_: [first], "do not make up 5 layers of 6 heads"),
        (lambda first, second, _: [first, answer(second), answer(second)], "do not make up"),
        (lambda first, _, stranger: [first, answer(stranger(range(1, 6), False))], "do not make up"),
        (lambda first, _, stranger: [first, answer(stranger(range(2, 5), False))], "do not make up"),
    ],
)
def test_answers_that_do_not_fit_together_are_an_error(masses, spoil, message):
    first, second = grid(masses, ALL_LAYERS, [range(2), range(2, 6)])
    with pytest.raises(RanksError, match=message):
        merge_recordings(
            spoil(answer(first), second, lambda heads, logits: rank(masses, range(LAYERS), heads, logits=logits)),
            LAYERS,
            HEADS,
        )


def description(layers: range, heads: range) -> dict:
    """What `Recorder.describe` says of a rank; odd layers have a sliding window."""
    windows = [24 if layer % 2 else None for layer in layers]
    return {"layers": list(layers), "heads": list(heads), "windows": windows, "sinks": False, "recorder_bytes": 100}


def test_descriptions_add_up():
    descriptions = [description(layers, heads) for layers in TWO_STAGES for heads in THREE_SHARES]
    descriptions[4]["sinks"] = True
    assert merge_descriptions(descriptions[::-1]) == {
        "layers": LAYERS,
        "heads": HEADS,
        "windows": [None, 24, None, 24, None],
        "sinks": True,
        "recorder_bytes": 600,
    }


@pytest.mark.parametrize("second", [(range(LAYERS), range(4, 6)), (range(4), range(3, 6))])
def test_descriptions_that_do_not_fit_together_are_an_error(second):
    with pytest.raises(RanksError, match="do not make up"):
        merge_descriptions([description(range(LAYERS), range(3)), description(*second)])


def test_a_slot_is_free_once_it_is_collected(masses):
    recorder = rank(masses, range(LAYERS), range(HEADS), logits=True)
    expected = answer(recorder)
    recorder.collect(7, REQUESTS, STEPS, True)
    for slot, _ in REQUESTS:
        admit(recorder, slot, 100 + slot)
    recorder.begin_step()
    recorder.publish(np.arange(2), torch.tensor([7, 7], dtype=torch.int32))
    assert torch.isnan(recorder.mass[[slot for slot, _ in REQUESTS]]).all()
    assert recorder.fetch(7) == expected


def test_a_slot_that_was_given_away_before_it_was_collected_is_an_error(masses):
    recorder = rank(masses, range(LAYERS), range(HEADS))
    admit(recorder, 0, 99)
    with pytest.raises(KeyError, match="other requests"):
        recorder.collect(0, REQUESTS, STEPS, False)


def test_a_ticket_is_good_for_one_fetch(masses):
    recorder = rank(masses, range(LAYERS), range(HEADS))
    answer(recorder)
    with pytest.raises(KeyError):
        recorder.fetch(0)
    recorder.collect(1, REQUESTS, STEPS, False)
    recorder.forget()
    with pytest.raises(KeyError):
        recorder.fetch(1)


def test_share_is_divided_where_the_prompt_has_mass(masses):
    recorder = rank(masses, range(2), range(2), logits=True)
    recorder.mass[0, 0] = torch.tensor([[[0.2, 0.0, 0.8], [0.0, 0.0, 1e-12]], [[0.0, 0.0, 0.5], [0.5, 0.0, 0.5]]])
    recorder.mass[0, 1] = torch.nan
    share = load(answer(recorder, requests=[(0, 20)], n_steps=2))["share"]
    np.testing.assert_allclose(share[0, 0], [[0.25, 0.0], [0.0, 1.0]], rtol=1e-6)
    assert np.isnan(share[0, 1]).all()


class _Device(TorchDispatchMode):
    """The tensors that torch's operations make, by the kind of device they are on."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.made.add(out.device.type)
        return out


def test_gathering_neither_waits_for_the_device_nor_sends_it_anything():
    """On torch's device without memory: what wants a value raises, and what starts on the host shows."""
    recorder = Recorder(CONFIG, Place(range(LAYERS), range(HEADS)), 4, torch.device("meta"))
    for slot, request_id in REQUESTS:
        admit(recorder, slot, request_id)
    with _Device() as device:
        gathered = recorder.gather(REQUESTS, STEPS, True)
    assert device.made == {"meta"}
    assert gathered["mass"].shape == (len(REQUESTS), STEPS, LAYERS, HEADS, CONFIG.regions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_copy_runs_while_the_host_goes_on_and_is_in_order_on_a_gpu(masses):
    recorder = rank(masses, range(LAYERS), range(HEADS), logits=True, device="cuda")
    expected = answer(recorder)
    torch.cuda.synchronize()
    # The device is busy for some tens of milliseconds; what follows must be queued behind that without waiting.
    torch.cuda._sleep(100_000_000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        recorder.collect(1, REQUESTS, STEPS, True)
        recorder.mass.fill_(torch.nan)
        recorder.instrument("LogitStatistics").stats.fill_(torch.nan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _, copied = recorder._in_flight[1]
    assert not copied.query(), "collecting waited for the device"
    assert recorder.fetch(1) == expected
    assert torch.isnan(recorder.mass).all()
