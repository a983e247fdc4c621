"""What decoding moves and computes on GPUs, what the masses add, what leaves the device: arithmetic, no measurement.

    python scripts/roofline.py

writes the tables of docs/performance.md, from the models' shapes, the data sheets' figures, and what traffic.json,
aot.json and host_cost.json in bench/results say of headrift's kernels.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import utils
from utils import Shapes, keys_attended, recorded_bytes_bound

ITEM = 2  # bytes of a bfloat16
REGIONS = 3
WITH_MASS = 5  # regions of an engine for `--save mass`
STEPS = 12
CONTEXT = 2048
BATCHES = (1, 8, 64, 256)
USED = 0.9  # of a device's memory, vLLM's default
UNSPLIT_KEYS = 2048  # of a row in a mixed step: see vllm_plugin/backends/triton.py
STEP_TOKENS = 8192  # that an engine computes in a step, of all its rows
PCIE = 64e9  # bytes a second, PCIe 5.0 x16, one direction


@dataclass(frozen=True, slots=True)
class Device:
    """A data sheet's figures: bytes a second, dense bfloat16 FLOP a second, bytes of memory."""

    bandwidth: float
    flops: float
    memory: float


MODELS = {
    "Llama-3-8B": Shapes(32, 4096, 32, 8, 128, 14336, 128256),
    "Mistral-7B v0.3": Shapes(32, 4096, 32, 8, 128, 14336, 32768),
    "Llama-3-70B": Shapes(80, 8192, 64, 8, 128, 28672, 128256),
}
DEVICES = {"H100 SXM": Device(3.35e12, 989e12, 80e9), "MI300X": Device(5.3e12, 1307e12, 192e9)}
H200 = Device(4.8e12, 989e12, 141e9)


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes moved and floating point operations."""

    bytes: float
    flops: float

    def seconds(self, device: Device, devices: int) -> float:
        """At the device's limits, divided among so many of them; what they tell each other takes no time."""
        return max(self.bytes / device.bandwidth, self.flops / device.flops) / devices

    def bound(self, device: Device) -> str:
        return "memory" if self.bytes / device.bandwidth >= self.flops / device.flops else "arithmetic"


def forward(shapes: Shapes, rows: int, cached: int, tokens: int) -> Work:
    """A pass over `tokens` tokens of each of so many rows with `cached` tokens before them; one row of logits each."""
    weights = ITEM * (shapes.layer_weights + shapes.vocabulary_weights)
    kv = rows * shapes.kv_bytes(cached + tokens, ITEM)
    return Work(weights + kv, shapes.flops(rows * tokens, rows * keys_attended(cached, tokens), rows))


def devices_needed(shapes: Shapes, device: Device, batch: int, context: int) -> int:
    """The least power of two of devices that holds weights, and K and V of the batch."""
    need, n = ITEM * shapes.parameters + batch * shapes.kv_bytes(context, ITEM), 1
    while need > n * USED * device.memory:
        n *= 2
    return n


class Added:
    """What masses add to decode attention: bytes by row, layer and query head; instructions; seconds of the host."""

    def __init__(self):
        traffic, aot, host = (utils.read_json(utils.RESULTS / f"{x}.json") for x in ("traffic", "aot", "host_cost"))
        (counted,) = [
            row
            for row in traffic["decode"]
            if row["shape"].startswith("Llama-3-8B") and row["context"] == CONTEXT and row["splits"] > 1
        ]
        # Counted at 2,048 keys, split; of 2 rows and 32 heads.
        self.bytes = counted["all_bytes"] * (1 - 1 / counted["all_ratio"]) / 2 / 32
        # In the loop over K and V, of those without masses.
        selected = {"kernel": "decode", "head_dim": 128, "dtype": "bf16", "regions": REGIONS, "flags": ["MASS"]}
        (compiled,) = [
            entry
            for entry in aot["compiled"]
            if entry["target"] == "sm_90"
            and selected.items() <= entry["shape"].items()
            and entry["shape"]["splits"] > 1
            and not entry["shape"]["cache"]
        ]
        self.instructions = compiled["ratios"][str(CONTEXT)] - 1
        self.host = {}
        for row in host["rows"]:
            self.host[row["step"]] = max(self.host.get(row["step"], 0.0), row["added"] * 1e-6)


def recorded_bytes(shapes: Shapes, steps: int, regions: int = REGIONS) -> int:
    """What leaves the device for a prompt: shares, masses of step 0 but the whole prompt's, next-token statistics."""
    heads = shapes.layers * shapes.heads
    return (steps + 1) * heads * 4 + heads * (regions - 1) * 4 + (steps + 1) * 12


def size(n: float) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if n >= unit:
            return f"{n / unit:,.1f} {name}"
    return f"{n:,.0f} B"


# Each model on each device, with their names.
PAIRS = [(model, shapes, name, device) for model, shapes in MODELS.items() for name, device in DEVICES.items()]


def decode_tables(counted: Added) -> dict[str, str]:
    """Return what a decode step moves and computes, and what masses add to it."""
    steps, added = [], []
    for model, shapes, name, device in PAIRS:
        for batch in BATCHES:
            work, n = forward(shapes, batch, CONTEXT - 1, 1), devices_needed(shapes, device, batch, CONTEXT)
            step, keys = work.seconds(device, n), batch * shapes.kv_bytes(CONTEXT, ITEM)
            first = [model, f"{n} x {name}", batch]
            moved = [f"{work.bytes / 1e9:.1f}", f"{keys / work.bytes:.0%}", f"{work.flops / 1e9:,.0f}"]
            steps.append([*first, *moved, f"{1e3 * step:.2f}", work.bound(device), f"{batch / step:,.0f}"])
            extra = batch * shapes.layers * shapes.heads * counted.bytes
            by_bytes = extra / device.bandwidth / n / step
            by_instructions = keys / device.bandwidth / n * counted.instructions / step
            both = f"{by_instructions + counted.host['decode'] / step:.2%}"
            added.append([*first, size(extra), f"{by_bytes:.3%}", f"{by_instructions:.2%}", both])
    head = ["model", "devices", "batch"]
    return {
        "decode": utils.markdown([*head, "GB", "of it K, V", "GFLOP", "ms", "bound by", "tokens/s"], steps),
        "added": utils.markdown([*head, "bytes added", "by bytes", "by instructions", "and the host's time"], added),
    }


def streaming_table(counted: Added) -> str:
    """What measuring adds to the steps of a job that streams prompts through a Llama-3-8B on an H200."""
    shapes, device, lines, hidden, unhidden = MODELS["Llama-3-8B"], H200, [], [], []
    for batch in (64, 256):
        for prompt, cached in ((300, 100), (1000, 100), (4000, 500)):
            # As many prompts end in a step as answers do, within the tokens of a step.
            prompts = min(batch / (STEPS + 1), STEP_TOKENS / (STEPS + prompt - cached))
            decoding, kv = STEPS * prompts, shapes.kv_bytes(prompt, ITEM)
            weights = ITEM * (shapes.layer_weights + shapes.vocabulary_weights)
            flops = prompts * forward(shapes, 1, cached, prompt - cached).flops
            flops += decoding * shapes.flops(1, keys_attended(prompt, 1), 1)
            step = Work(weights + (decoding + prompts) * kv, flops).seconds(device, 1)
            rows = (decoding + prompts) * shapes.layers * shapes.heads
            by_bytes = (prompts * kv + rows * counted.bytes) / device.bandwidth
            by_instructions = (decoding + prompts) * kv / device.bandwidth * counted.instructions
            host = counted.host["streaming" if prompt <= UNSPLIT_KEYS else "streaming, long rows"]
            hidden.append((by_bytes + by_instructions) / step)
            unhidden.append(hidden[-1] + host / step)
            parts = (by_bytes / step, by_instructions / step, hidden[-1], unhidden[-1])
            row = [batch, f"{prompt:,}", cached, f"{prompts:.1f}", f"{1e3 * step:.1f}"]
            lines.append([*row, *(f"{part:.2%}" for part in parts)])
    head = ["rows", "prompt tokens", "of them cached", "prompts a step", "step, ms", "last tokens and parts, by bytes"]
    return utils.page(
        utils.markdown([*head, "masses, by instructions", "both", "and the host, if nothing hid it"], lines),
        f"At most {max(hidden):.2%} while the host is hidden (the bar is 1%), and {max(unhidden):.1%} if nothing hid "
        "it.",
    )


def leaving_table() -> str:
    lines = []
    for model, shapes in MODELS.items():
        heads, rows = shapes.layers * shapes.heads, STEPS + 1
        ours, keys = recorded_bytes(shapes, STEPS), shapes.kv_bytes(CONTEXT, ITEM) // 2
        masses = recorded_bytes(shapes, STEPS, WITH_MASS) + rows * heads * WITH_MASS * 4
        ways = {
            "headrift: shares of all heads, masses of step 0": ours,
            "the bound it is held to (`bench/overhead.py`)": recorded_bytes_bound(STEPS, shapes.layers, shapes.heads),
            f"headrift with `--save mass`, {WITH_MASS} regions": masses,
            "K of the prompt, all layers, bfloat16": keys,
            f"K, and the queries of {rows} steps": keys + rows * heads * shapes.head_dim * ITEM,
            f"whole rows of attention, {rows} steps, float32": rows * heads * CONTEXT * 4,
            "whole maps of the prompt, float16": heads * CONTEXT**2 * 2,
        }
        lines += [[model, way, size(n), f"{n / ours:,.1f}", f"{1e3 * n / PCIE:,.3f}"] for way, n in ways.items()]
    head = ["model", f"for a prompt of {CONTEXT:,} tokens", "bytes", "times headrift's", "ms over PCIe"]
    shapes = MODELS["Llama-3-8B"]
    shares, keys = (1e3 * n for n in (recorded_bytes(shapes, STEPS), shapes.kv_bytes(CONTEXT, ITEM) // 2))
    return utils.page(
        utils.markdown(head, lines),
        f"At 1,000 prompts/s those of an 8B model are {shares / 1e6:.0f} MB/s; its K alone would be "
        f"{keys / 1e9:.0f} GB/s, {keys / PCIE:.1f} times what the bus carries.",
    )


def replay_table() -> str:
    prompt, cached, batch, lines = 300, 100, 64, []
    for model, shapes, name, device in PAIRS:
        n = devices_needed(shapes, device, batch, prompt + 160)
        for answer in (12, 160):
            prefill = forward(shapes, batch, cached, prompt - cached).seconds(device, n)
            decoding = sum(forward(shapes, batch, prompt + t, 1).seconds(device, n) for t in range(answer))
            replay = forward(shapes, batch, cached, prompt - cached + answer).seconds(device, n)
            times = prefill + decoding
            cells = [f"{1e3 * times:,.0f}", f"{1e3 * replay:,.0f}", f"{times / replay:.1f}"]
            lines.append([model, f"{n} x {name}", answer, *cells])
    head = ["model", "devices", "answer tokens", "generate, ms", "replay, ms", "times"]
    return utils.markdown(head, lines)


def ships_table() -> str:
    """All heads of a query ablated in turn, one clean pass beside them: one at a time, and as rows of batches."""
    lines = []
    for model, shapes, name, device in PAIRS:
        for prompt in (40, 200):
            passes, rows = shapes.layers * shapes.heads + 1, STEP_TOKENS // prompt
            n = devices_needed(shapes, device, rows, prompt)
            loop = passes * forward(shapes, 1, 0, prompt).seconds(device, n)
            full, left = divmod(passes, rows)
            batched = full * forward(shapes, rows, 0, prompt).seconds(device, n)
            batched += forward(shapes, left, 0, prompt).seconds(device, n) if left else 0.0
            cells = [f"{passes:,}", f"{loop:.2f}", f"{batched:.2f}", f"{loop / batched:.1f}"]
            lines.append([model, f"{n} x {name}", prompt, *cells])
    head = ["model", "devices", "prompt tokens", "passes", "one at a time, s", "as rows of batches, s", "times"]
    return utils.markdown(head, lines)


def parts() -> dict[str, str]:
    """Return the tables of docs/performance.md."""
    counted = Added()
    tables = {"leaving": leaving_table(), "replay": replay_table(), "ships": ships_table()}
    return decode_tables(counted) | {"streaming": streaming_table(counted)} | tables


if __name__ == "__main__":
    utils.fill_file(utils.ROOT / "docs/performance.md", "scripts/roofline.py", parts())
