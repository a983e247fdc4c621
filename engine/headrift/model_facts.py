"""What a model's files say about it without loading it: shape, context length, and files that are missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


class ModelError(ValueError):
    """The folder does not contain a usable model; the message has every reason and what to do."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts from config.json; None if it does not have one."""

    architecture: str | None
    layers: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    context: int | None  # tokens
    sliding_window: int | None  # tokens; some layers may have none
    dtype: str | None  # of the weights

    def kv_bytes_per_token(self, dtype: str) -> int | None:
        """Bytes of one token's keys and values in all layers, at float32, float16 or bfloat16."""
        if self.layers is None or self.kv_heads is None or self.head_dim is None:
            return None
        return 2 * self.layers * self.kv_heads * self.head_dim * _WIDTHS[dtype]

    def widening(self, dtype: str) -> float:
        """How many times larger the weights are in memory as float32, float16 or bfloat16 than in their files."""
        return _WIDTHS[dtype] / _WIDTHS.get(self.dtype or dtype, _WIDTHS[dtype])

    def recorder_bytes(self, slots: int, steps: int, regions: int) -> int | None:
        """Bytes of the recorder's masses for `slots` requests in flight, steps 0..`steps` and `regions` key ranges."""
        if self.layers is None or self.heads is None:
            return None
        return slots * (steps + 1) * self.layers * self.heads * regions * 4


def read_model(folder: Path) -> ModelFacts:
    """Read the facts of a model's folder; ModelError, with everything that is wrong, if it cannot be used."""
    if not (folder / "config.json").is_file():
        what = "does not contain a model (no config.json)" if folder.is_dir() else "is not a folder"
        raise ModelError(f"--model {folder} {what}: give a model's folder; `headrift demo-model DIR` makes a small one")
    config = _json(folder / "config.json")
    if config is None:
        raise ModelError(f"--model {folder}: its config.json is not a JSON object; copy the model again")
    if problems := _missing_files(folder):
        raise ModelError("".join([f"--model {folder} cannot be used:", *(f"\n  - {problem}" for problem in problems)]))
    return _facts(config)


def read_shape(folder: Path) -> tuple[ModelFacts, int, int]:
    """A model's facts, its number of layers and its number of heads; ModelError if it cannot be used or lacks these."""
    facts = read_model(folder)
    if facts.layers is None or facts.heads is None:
        raise ModelError(f"--model {folder}: its config.json does not say how many layers and heads it has")
    return facts, facts.layers, facts.heads


def _missing_files(folder: Path) -> list[str]:
    """What the folder lacks, each with what to do."""
    names, problems = {path.name for path in folder.iterdir()}, []
    if not any(name.endswith(WEIGHTS) for name in names):
        problems.append("it has no weights (*.safetensors): copy all files of the model into the folder")
    for index in _INDEXES:
        missing = sorted(set(map(str, ((_json(folder / index) or {}).get("weight_map") or {}).values())) - names)
        if missing:
            problems.append(f"{len(missing)} of its weight files are missing, {missing[0]} the first: copy them too")
    if names.isdisjoint(_TOKENIZERS):
        problems.append("it has no tokenizer (tokenizer.json): copy all files of the model into the folder")
    template = (_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    if not template and names.isdisjoint(("chat_template.jinja", "chat_template.json")):
        why = "so headrift does not know how it is given a system prompt"
        problems.append(f"it has no chat template, {why}: take its instruction-tuned version")
    return problems


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _facts(config: dict[str, Any]) -> ModelFacts:
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config

    def number(*names: str) -> int | None:
        values = (text.get(name) for name in names)
        return next((n for n in values if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)

    heads, width = number("num_attention_heads", "n_head"), number("hidden_size", "n_embd")
    architectures = config.get("architectures")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    scaled = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) != "default"
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    return ModelFacts(
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        layers=number("num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=number("num_key_value_heads") or heads,
        head_dim=number("head_dim") or (width // heads if width and heads else None),
        # A scaled rotary embedding reaches further than this by a factor that vLLM knows how to read.
        context=None if scaled else number("max_position_embeddings", "n_positions"),
        sliding_window=number("sliding_window") if text.get("use_sliding_window", True) else None,
        dtype=dtype if isinstance(dtype, str) else None,
    )
