"""What a Llama-like decoder computes and moves, from its shapes: floating point operations and bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Shapes:
    """A decoder with gated MLPs and grouped-query attention. tied: the output layer is the embedding."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def of(cls, model: Path) -> Shapes:
        """Of a model's folder."""
        return cls.from_config(json.loads((model / "config.json").read_text(encoding="utf-8")))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shapes:
        """Of the content of a model's config.json."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The matrix products of a layer, and the output layer, as (inputs, outputs), as vLLM makes them."""
        attention = self.heads * self.head_dim
        return {
            "qkv": (self.hidden, attention + 2 * self.kv_heads * self.head_dim),
            "attention output": (attention, self.hidden),
            "gate and up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
            "vocabulary": (self.hidden, self.vocabulary),
        }

    @property
    def layer_weights(self) -> int:
        """Parameters in the matrices of all layers."""
        return self.layers * sum(a * b for name, (a, b) in self.matrices.items() if name != "vocabulary")

    @property
    def vocabulary_weights(self) -> int:
        """Parameters in the output layer."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All parameters: matrices, embedding, norms."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layer_weights + self.vocabulary_weights * (1 if self.tied else 2) + norms

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of K and V of so many tokens, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize * tokens

    def flops(self, tokens: int, keys: int, logits: int) -> int:
        """Multiplications and additions of a forward pass.

        tokens: that are computed. keys: (query, key) pairs that are attended, of one head and layer. logits: rows that
        go through the output layer.
        """
        dense = 2 * (self.layer_weights * tokens + self.vocabulary_weights * logits)
        return dense + 4 * self.layers * self.heads * self.head_dim * keys


def keys_attended(first: int, tokens: int) -> int:
    """(query, key) pairs of causal attention: `tokens` queries, the first of them at position `first`."""
    return tokens * first + tokens * (tokens + 1) // 2


def recorded_bytes_bound(steps: int, layers: int, heads: int, entropy: bool = False) -> int:
    """The most that may leave the device for a prompt, of steps 0..N: shares of all heads at each, the masses of two
    regions at step 0, 16 bytes a step (its next-token statistics), and 1 KiB. entropy: and as many entropies as
    shares."""
    shares = (steps + 1) * layers * heads * 4
    return shares * (2 if entropy else 1) + layers * heads * 8 + 16 * steps + 1024
