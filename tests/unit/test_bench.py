"""What the benchmarks compute with: statistics, orders, bounds, arithmetic, their child processes. No engine runs."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from helpers.scripts import load

BENCH = Path(__file__).resolve().parents[2] / "bench"

overhead = load("bench/overhead")
peers = load("bench/peers")
roofline = load("scripts/roofline")
scaling = load("bench/scaling")
utils = load("bench/utils")

# What the models' own files hold.
PARAMETERS = {"Llama-3-8B": 8_030_261_248, "Mistral-7B v0.3": 7_248_023_552, "Llama-3-70B": 70_553_706_496}
SMOLLM2 = utils.Shapes(30, 576, 9, 3, 64, 1536, 49152, tied=True)


# ------------------------------------------------------------------------------------------------- ratios and orders


def test_a_ratio_is_the_median_of_pairs_not_the_ratio_of_medians():
    result = utils.median_ratio([2.0, 10.0, 30.0], [1.0, 10.0, 10.0])
    assert result["median"] == 2.0  # of 2, 1, 3; the medians' is 1
    assert (result["low"], result["high"], result["pairs"]) == (1.0, 3.0, 3)


def test_the_interval_narrows_with_pairs_covers_what_is_there_and_is_the_same_each_time():
    random = np.random.default_rng(1)
    ratios = random.normal(0.97, 0.02, 200)
    few, many = utils.median_ratio(ratios[:20], np.ones(20)), utils.median_ratio(ratios, np.ones(200))
    assert few == utils.median_ratio(ratios[:20], np.ones(20))
    assert many["half_width"] < few["half_width"] < 0.02
    assert few["low"] < np.median(ratios[:20]) < few["high"]
    # A median of n normal samples has a standard error of 1.25 sigma / sqrt(n): here 1.96 of them.
    assert many["half_width"] == pytest.approx(1.96 * 1.25 * 0.02 / 200**0.5, rel=0.5)


def test_drift_that_falls_to_both_arms_of_a_pair_leaves_no_trace():
    drift = np.linspace(1.0, 3.0, 20)
    result = utils.median_ratio(0.9 * drift, drift)
    assert result["median"] == pytest.approx(0.9)
    assert result["half_width"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("samples", [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_too_few_pairs_have_no_ratio(samples):
    with pytest.raises(ValueError, match="two or more pairs"):
        utils.median_ratio(*samples)


def test_arms_take_turns_as_abba_does_it():
    arms = list(overhead.ALL)
    order = [arm for turn in utils.orders(arms, 4) for arm in turn]
    places = {arm: [i for i, other in enumerate(order) if other == arm] for arm in arms}
    assert {np.mean(at) for at in places.values()} == {(len(order) - 1) / 2}, "what drifts must fall to all arms alike"
    for turn in utils.orders(arms, 2):
        assert abs(turn.index("plain") - turn.index("probing")) == abs(turn.index("plain") - turn.index("idle")) == 1


# ------------------------------------------------------------------------------------------------- overhead


def test_prompts_of_a_case_share_what_they_are_to_share():
    alone, shared = overhead.Case("x", 4, 100), overhead.Case("x", 4, 100, shared=True)
    for case, in_common in ((alone, 0), (shared, 96)):
        request = {name: value for name, value in case.request.items() if name != "tokens"}
        request["seed"] = tuple(request["seed"])
        ids = np.array(overhead.make_prompts(5000, **request))
        assert ids.shape == (4, 100)
        assert ids.min() >= 0
        assert ids.max() < 5000
        same = (ids == ids[0]).all(0)
        assert same[:in_common].all()
        assert not same[in_common:].all()


def test_what_samples_say():
    names = ("seconds", "cpu_seconds", "decode_seconds", "bytes_out")
    plain = dict(zip(names, ([1.0, 1.2, 1.0], [2.0] * 3, [0.5] * 3, [0] * 3)))
    probing = dict(zip(names, ([2.0, 2.4, 2.0], [2.5] * 3, [1.0] * 3, [80, 88, 80])))
    samples = {"plain": plain, "probing": probing}
    case = {"samples": samples, "batch": 8, "tokens": 40, "steps": 4, "peak_bytes": {"plain": 1, "probing": 2}}
    result = overhead.evaluate(case, SMOLLM2)
    assert result["arms"]["plain"]["over"] == {}
    assert result["arms"]["plain"]["tokens_per_second"] == 40.0
    probing = result["arms"]["probing"]
    assert probing["over"]["plain"]["seconds"]["median"] == 0.5, "half of plain's throughput"
    assert probing["over"]["plain"]["cpu_seconds"]["median"] == 0.8
    assert probing["bytes_per_prompt"] == 11.0, "the most of all runs"
    assert result["bytes_bound"] == 5 * 270 * 4 + 270 * 8 + 4 * 16 + 1024


@pytest.mark.parametrize("model", PARAMETERS)
def test_what_the_page_says_leaves_is_within_the_bound_and_what_the_engine_sends(model):
    shapes = roofline.MODELS[model]
    assert roofline.recorded_bytes(shapes, 12) <= utils.recorded_bytes_bound(12, shapes.layers, shapes.heads)
    committed = json.loads((BENCH / "results/overhead.json").read_text(encoding="utf-8"))
    case = next(case for case in committed["cases"] if case["batch"] == 8 and case["steps"] == 10)
    sent = case["arms"]["probing"]["bytes_per_prompt"]
    # Of what is sent beside the numbers (names and shapes), a drain's eight prompts have a part each.
    assert 0 <= sent - roofline.recorded_bytes(SMOLLM2, 10) < 200


def test_rates_over_all_are_of_all():
    result = utils.over_all([10, 30], [1.0, 2.0])
    assert (result["low"], result["high"]) == (10.0, 15.0)
    assert result["all"] == pytest.approx(40 / 3)
    assert utils.cell(result, 2) == "13.33 (10.00 to 15.00)"


def test_the_bound_on_bytes_by_hand():
    assert utils.recorded_bytes_bound(12, 30, 9) == 14_040 + 2_160 + 192 + 1_024
    assert utils.recorded_bytes_bound(12, 30, 9, entropy=True) == 2 * 14_040 + 2_160 + 192 + 1_024


def test_arms_with_other_settings_are_refused():
    def arm(default_settings=False, **other):
        resolved = {"dtype": "float32", "cudagraph_mode": "NONE", **other}
        return {"resolved": resolved, "default_settings": default_settings}

    overhead.check_same({"plain": arm(), "probing": arm(cudagraph_mode="FULL"), "ours": arm(True, ir_op_priority="x")})
    with pytest.raises(SystemExit, match="bfloat16"):
        overhead.check_same({"plain": arm(), "probing": arm(dtype="bfloat16")})


# ------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameters_are_those_of_the_models(model):
    assert roofline.MODELS[model].parameters == PARAMETERS[model]
    assert SMOLLM2.parameters == 134_515_008


def test_shapes_are_read_from_a_model_folder(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "intermediate_size": 16, "vocab_size": 9}'
    )
    assert utils.Shapes.read(tmp_path) == utils.Shapes(2, 8, 4, 4, 2, 16, 9)


def test_flops_by_hand():
    shapes = utils.Shapes(layers=2, hidden=4, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocabulary=7)
    # A layer: 4 x (6 + 2 x 3) + 6 x 4 + 4 x 10 + 5 x 4 weights. A key: 3 products and 3 sums, for scores and values.
    layer = 48 + 24 + 40 + 20
    assert shapes.layer_weights == 2 * layer
    assert shapes.flops(tokens=3, keys=6, logits=1) == 2 * (2 * layer * 3 + 28) + 2 * 2 * 6 * (2 * 3 + 2 * 3)


def test_keys_attended_as_counted_one_by_one():
    for first, tokens in ((0, 1), (0, 5), (7, 1), (7, 4)):
        assert utils.keys_attended(first, tokens) == sum(first + i + 1 for i in range(tokens))


def test_the_keys_of_a_long_prompt_are_128_mib():
    assert roofline.MODELS["Llama-3-8B"].kv_bytes(2048, 2) // 2 == 128 << 20


def test_a_decode_step_of_an_8b_by_hand():
    shapes, device = roofline.MODELS["Llama-3-8B"], roofline.DEVICES["H100 SXM"]
    work = roofline.forward(shapes, 8, 2047, 1)
    weights = 2 * (PARAMETERS["Llama-3-8B"] - 4096 * 128256 - 65 * 4096)  # no embedding, no norms
    assert work.bytes == weights + 8 * 2048 * 131072  # 128 KiB of K and V a token
    assert work.flops == 8 * weights + 8 * 4 * 32 * 32 * 128 * 2048
    assert work.bound(device) == "memory"
    assert work.seconds(device, 2) == work.bytes / 3.35e12 / 2


def test_as_many_devices_as_hold_the_model():
    shapes = roofline.MODELS["Llama-3-70B"]  # 141.1 GB, and 0.67 GB for 2,048 tokens of context
    h100, mi300x = roofline.DEVICES.values()
    assert roofline.devices_needed(shapes, h100, 1, 2048) == 2  # 144 GB of 2 x 80
    assert roofline.devices_needed(shapes, h100, 8, 2048) == 4
    assert roofline.devices_needed(shapes, mi300x, 8, 2048) == 1  # 172.8 GB of 192


# ------------------------------------------------------------------------------------------------- peers and phases


def test_agreement_goes_to_where_answers_part():
    random = np.random.default_rng(0)
    masses = [random.random((3, 2, 2, 3)) for _ in range(4)]
    rows = [{"label": label} for label in ("attack", "attack", "benign", "benign")]
    expected = {"masses": masses, "answers": [[1, 2, 3]] * 4, "scores": [0.4, 0.3, 0.2, None]}
    ours = [mass.copy() for mass in masses]
    ours[0][0, 0, 0, 0] += 0.125
    ours[1][2] += 1.0  # after another token was fed: nothing to compare
    changed = {"masses": ours, "answers": [[1, 2, 3], [1, 5, 3], [1, 2, 3], [1, 2, 3]], "scores": [0.4, 0.1, 0.2, None]}
    agreed = peers.agreement(changed, expected, rows, steps=12)
    assert agreed["same_answers"] == 3
    assert agreed["masses_compared"] == (3 + 2 + 3 + 3) * 12
    assert agreed["largest_difference"] == pytest.approx(0.125)
    assert agreed["mean_difference"] == pytest.approx(0.125 / agreed["masses_compared"])
    assert agreed["spearman_of_scores"] == pytest.approx(0.8)  # ranks 4 3 2 1 and 4 2 3 1
    assert (agreed["auroc"], agreed["auroc_expected"]) == (0.75, 1.0)


def test_time_inside_another_phase_counts_once(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0, 10.0, 14.0])
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(now))
    clock = scaling.Clock()
    with clock.phase(lambda: "outer"), clock.phase(lambda: "inner"):
        pass
    with clock.phase(lambda: "outer"):
        pass
    assert clock.seconds == {"inner": 2.0, "outer": 8.0 + 4.0}


def test_a_wrapped_method_still_answers_and_names_its_phase_at_the_end():
    class Thing:
        state = "before"

        def work(self, n, *, output=None):
            self.state = "after"
            return n + 1

    thing, clock = Thing(), scaling.Clock()
    clock.wrap(thing, "work", lambda n, *, output=None: f"{thing.state} {output}")
    assert thing.work(1, output="x") == 2
    assert list(clock.seconds) == ["after x"]


# ------------------------------------------------------------------------------------------------- child processes


@pytest.fixture
def child(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from utils import run_script\n"
        "class Adder:\n"
        "    def add(self, a, b):\n"
        "        print('not for the parent')\n"
        "        return {'sum': a + b}\n"
        "    def fail(self):\n"
        "        1 / 0\n"
        "    def end(self):\n"
        "        print('last words', file=sys.stderr, flush=True)\n"
        "        os._exit(3)\n"
        "run_script(None, adder=Adder)\n"
    )
    with utils.Child(str(script), "adder") as made:
        yield made


def test_a_child_answers_whatever_else_it_prints(child):
    assert child.call("add", a=1, b=2)["sum"] == 3
    answer = child.call("add", a=20, b=2)
    assert answer["sum"] == 22
    assert answer["peak_bytes"] > 1 << 20


def test_a_child_is_stopped_between_its_turns(child):
    child.call("add", a=1, b=2)
    seen = os.waitid(os.P_PID, child._process.pid, os.WSTOPPED | os.WNOWAIT)  # waits for it
    assert seen is not None
    assert seen.si_status == signal.SIGSTOP
    assert child.call("add", a=1, b=2)["sum"] == 3


def test_what_a_child_cannot_do_is_an_error_here_and_it_goes_on(child):
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        child.call("fail")
    assert child.call("add", a=1, b=1)["sum"] == 2


def test_a_child_that_ends_is_an_error_with_its_last_words(child):
    with pytest.raises(RuntimeError, match="last words"):
        child.call("end")
