"""`headrift selftest`: the command as a user runs it, on a tiny model, and its checks on real recordings gone wrong."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from headrift.prepare import load_tokenizer
from headrift.selftest import checks
from headrift.selftest.checks import bars_of, gaps_along, same_masses, same_shares, same_tokens, sum_to_one
from headrift.selftest.run import SelfTest, SelfTestConfig, chats, token_prompts

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
BARS = bars_of("float32", "cpu")
SYSTEM, USER, PROMPT, EVERYTHING = range(4)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Llama of 3 layers without tokenizer, whose attention is far from uniform."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=211,
        num_hidden_layers=3,
        hidden_size=192,
        intermediate_size=128,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=1.6 / 192**0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def selftest(model: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    settings = [part for name, value in SETTINGS.items() for part in ("--engine-arg", f"{name}={value}")]
    command = [sys.executable, "-P", "-m", "headrift.cli", "selftest", "--model", str(model), "--out", str(out)]
    command += ["--prompts", "4", "--steps", "5", "--rounds", "1", *settings, *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.nightly
def test_every_check_passes_on_a_sound_engine(model, tmp_path):
    done = selftest(model, tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["passed"] is True
    actual = {check["name"]: check for check in report["checks"]}
    assert [name for name, check in actual.items() if check["passed"] is None] == ["throughput, plain / probed"]
    assert len(actual) == 13
    lines = done.stdout.replace(str(tmp_path), "").splitlines()  # a path is as long as it is
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("PASS  ") for line in lines) == 12
    assert "12 of 12 checks passed; not judged: throughput, plain / probed" in lines
    assert "prompts     4 token ids of" in done.stdout
    assert (report["prompts"]["steps"], report["model"]["heads"], report["model"]["dtype"]) == (5, 6, "float32")
    assert report["machine"]["device"]
    assert report["versions"]["transformers"]
    assert actual["masses as transformers'"]["numbers"]["steps"] == 4 * 6
    assert actual["answers of probed requests as plain vLLM's"]["numbers"]["rows"] == 4
    (seconds,) = actual["throughput, plain / probed"]["numbers"]["rounds"]
    assert min(seconds.values()) > 0


@pytest.mark.slow
def test_a_model_that_computes_something_else_fails(model, tmp_path):
    """vLLM is told of other rotary angles than the model's folder has, which transformers reads: two models."""
    angles = json.dumps({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}})
    done = selftest(model, tmp_path / "out.json", "--engine-arg", f"hf_overrides={angles}")
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [
        check["name"] for check in json.loads((tmp_path / "out.json").read_text())["checks"] if check["passed"] is False
    ]
    assert failed == ["masses as transformers'", "shares as transformers'"]
    assert "FAIL  masses as transformers'" in done.stdout
    assert "failed: masses as transformers'; shares as transformers'" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--engine-arg", "nonsense"], "--engine-arg nonsense is not KEY="),
        (["--engine-arg", "no_such_argument=1"], "vLLM does not take these engine settings"),
        (["--out", "/no/such/folder/out.json"], "name a file in an existing folder"),
        (["--model", "/no/such/model"], "vLLM cannot load /no/such/model"),
    ],
)
def test_what_cannot_be_begun(tmp_path, model, options, says):
    from typer.testing import CliRunner

    from headrift.cli import app

    done = CliRunner().invoke(app, ["selftest", "--model", str(model), *options])
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert done.stdout == ""


# ------------------------------------------------------------------------------------ the checks, when it is wrong


@pytest.fixture(scope="module")
def recorded(model) -> SimpleNamespace:
    """What a real engine recorded: masses and shares by prompt, its answers, and transformers' masses of the same."""
    from headrift.selftest.checks import EagerModel
    from headrift.selftest.run import _by_transformers

    config = SelfTestConfig(str(model), prompts=4, steps=5, rounds=1, engine_args=SETTINGS)
    test = SelfTest(config, lambda line: None, lambda text: contextlib.nullcontext())
    test.start()
    try:
        answers = test._record().probed
    finally:
        test.engine.close()
    eager = EagerModel(str(model))
    return SimpleNamespace(
        masses=[answer.mass for answer in answers],
        shares=[answer.share for answer in answers],
        steps=[answer.done.n_steps for answer in answers],
        tokens=[answer.tokens for answer in answers],
        expected=[_by_transformers(eager, answer.done) for answer in answers],
    )


def changed(arrays: list[np.ndarray], place: tuple, by: float, prompt: int = 1) -> list[np.ndarray]:
    """Copies, one of them changed at `place`."""
    copies = [array.copy() for array in arrays]
    copies[prompt][place] += by
    return copies


def of_regions(masses: list[np.ndarray]) -> list[np.ndarray]:
    return [mass[..., :EVERYTHING] for mass in masses]


def test_one_mass_that_is_off_fails(recorded):
    actual = of_regions(recorded.masses)
    sound = same_masses("masses", actual, recorded.expected, BARS)
    assert sound.passed
    assert sound.numbers["largest"] > 0, "the same arrays are compared"
    check = same_masses("masses", changed(actual, (2, 1, 4, SYSTEM), 2 * BARS.largest), recorded.expected, BARS)
    assert check.passed is False
    assert check.numbers["largest"] > BARS.largest


def test_one_head_that_is_off_by_little_everywhere_fails(recorded):
    """Each mass is within the bar for a single one; the head's mean is not."""
    off = [mass.copy() for mass in of_regions(recorded.masses)]
    for mass in off:
        mass[:, 2, 3] += 2 * BARS.per_head
    check = same_masses("masses", off, recorded.expected, BARS)
    assert check.numbers["largest"] < BARS.largest
    assert (check.passed, check.numbers["worst_head"]) == (False, [2, 3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_heads_in_another_order_fail_whatever_the_type(recorded, dtype):
    off = [mass[:, :, ::-1] for mass in of_regions(recorded.masses)]
    assert same_masses("masses", off, recorded.expected, bars_of(dtype, "cuda")).passed is False


def test_a_step_late_fails(recorded):
    off = [mass[:-1] for mass in of_regions(recorded.masses)]
    assert same_masses("masses", off, [mass[1:] for mass in recorded.expected], BARS).passed is False


def test_a_share_that_is_off_fails(recorded):
    places = {"system": SYSTEM, "prompt": PROMPT}
    sound = same_shares("shares", recorded.shares, recorded.expected, BARS, **places)
    assert sound.passed
    assert sound.numbers["cells"] > 100
    off = changed(recorded.shares, (0, 1, 4), 3 * BARS.largest)  # at step 0, where the prompt's mass is 1
    assert same_shares("shares", off, recorded.expected, BARS, **places).passed is False
    missing = changed(recorded.shares, (0, 1, 4), np.nan)
    assert same_shares("shares", missing, recorded.expected, BARS, **places).passed is False


def test_sums_that_do_not_add_up_fail(recorded):
    tolerance = 2 * checks.SUM_TOLERANCE
    for judge, place in (
        (lambda masses: sum_to_one("prompt", [m[0, ..., PROMPT] for m in masses], "", sinks=False), (0, 1, 2, PROMPT)),
        (
            lambda masses: sum_to_one("all", [m[..., EVERYTHING] for m in masses], "", sinks=False),
            (4, 1, 2, EVERYTHING),
        ),
    ):
        assert judge(recorded.masses).passed
        for by in (tolerance, -tolerance, np.nan):
            assert judge(changed(recorded.masses, place, by)).passed is False
    assert sum_to_one("all", recorded.masses, "", sinks=True).passed is None


def test_masses_out_of_bounds_and_missing_ones_fail(recorded):
    assert checks.within_bounds(recorded.masses).passed
    for by in (1.1, -1.1, np.nan):
        assert checks.within_bounds(changed(recorded.masses, (3, 0, 5, USER), by)).passed is False
    assert checks.every_step(recorded.shares, recorded.steps).passed
    missing = checks.every_step(changed(recorded.shares, (3, 0, 5), np.nan), recorded.steps)
    assert (missing.passed, missing.figure) == (False, "23 of 24 steps")
    assert checks.every_step([share[:-1] for share in recorded.shares], recorded.steps).passed is False


def test_another_token_fails_unless_its_logits_were_as_good_as_equal(recorded):
    wide = [[1.0] * len(answer) for answer in recorded.tokens]
    assert same_tokens("answers", recorded.tokens, recorded.tokens, wide, BARS).passed
    other = [list(answer) for answer in recorded.tokens]
    other[2][3] = (other[2][3] + 1) % 211
    wrong = same_tokens("answers", other, recorded.tokens, wide, BARS)
    assert (wrong.passed, wrong.figure) == (
        False,
        "3 of 4 rows equal, 0 parted at a near-tie, 1 wrong (row 2 at token 3: logits 1 apart)",
    )
    close = [list(gaps) for gaps in wide]
    close[2][3] = BARS.tie / 2
    tied = same_tokens("answers", other, recorded.tokens, close, BARS)
    assert (tied.passed, tied.numbers["equal"], len(tied.numbers["near_ties"])) == (True, 3, 1)
    close[2][3], close[2][4] = 1.0, 0.0  # a tie further on excuses nothing
    assert same_tokens("answers", other, recorded.tokens, close, BARS).passed is False
    shorter = [answer[:-1] for answer in recorded.tokens]
    assert same_tokens("answers", shorter, recorded.tokens, wide, BARS).passed is False
    with pytest.raises(ValueError, match="0 answers"):
        same_tokens("answers", [], [], [], BARS)


def test_gaps_are_unknown_once_a_row_has_parted():
    assert gaps_along([[1, 2, 3], [1, 9, 3]], [[1, 2, 3], [1, 2, 3]], [[5.0, 5.0, 5.0]] * 2) == [
        [5.0, 5.0, 5.0],
        [5.0, 0.0, 0.0],
    ]


# ------------------------------------------------------------------------------------- prompts and the GPU script


def test_chats_are_of_many_lengths_and_all_different(demo_model):
    rendered = chats(load_tokenizer(str(demo_model)), 48)
    lengths = [len(prompt.token_ids) for prompt in rendered]
    assert len({tuple(prompt.token_ids) for prompt in rendered}) == 48
    assert max(lengths) > 5 * min(lengths)
    for prompt in rendered:
        (start, end), user = prompt.regions["system"], prompt.regions["user"]
        assert start < end <= user[0] < user[1] <= len(prompt.token_ids)


@pytest.mark.parametrize(("vocabulary", "longest"), [(211, 8), (50_000, 4000), (5, 40)])
def test_prompts_of_token_ids_fit(vocabulary, longest):
    for prompt in token_prompts(12, vocabulary, longest):
        assert len(prompt.token_ids) <= longest
        assert max(prompt.token_ids) < vocabulary
        assert prompt.regions["system"][1] > 0


def test_gpu_check_without_a_gpu_says_so_and_writes_nothing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-P", str(ROOT / "scripts/gpu_check.py"), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no torch that finds a GPU here; nothing was run" in done.stderr
    assert list(tmp_path.iterdir()) == []
