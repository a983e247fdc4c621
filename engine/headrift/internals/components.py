"""States of a model's layers at chosen tokens (residual stream, attention output, MLP output), and next-token
distributions.

Read with forward hooks on the modules of a transformers model, so the numbers are the model's own. Tokens that all rows
start with run once; the rest is padded on the right, where by causality nothing attends to it, and positions are each
token's own: neither padding nor batch size changes a number beyond rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

RESIDUAL, ATTENTION, MLP = COMPONENTS = ("residual", "attention", "mlp")
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_BATCH_TOKENS = 2048  # padding included
_LEAST_PREFIX = 8  # with fewer tokens in common, a pass of their own is not worth it

States = NDArray[np.float32]


class UnsupportedModelError(ValueError):
    """The model's layers, or their parts, are not found. The message names what the model has."""


@dataclass(frozen=True, slots=True)
class ForwardRow:
    """What goes in."""

    token_ids: Sequence[int] = field(repr=False)
    predict_at: Sequence[int]  # tokens at which the next token's distribution is read
    points: Sequence[int] = ()  # tokens at which states are read


@dataclass(frozen=True, slots=True)
class Reading:
    """What comes out."""

    states: States = field(repr=False)  # [points, layers, COMPONENTS, hidden]
    log_probs: States = field(repr=False)  # nats [predict_at, vocabulary]


class StateReader:
    """A causal language model of transformers, on a GPU if there is one. As a context manager it frees its memory.

    Args:
        dtype: auto is float32, which the numbers' last digits need.

    Raises:
        UnsupportedModelError: If the model's layers are not found.
    """

    def __init__(self, folder: Any, dtype: str = "auto") -> None:
        import torch
        import transformers

        shows = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        try:
            self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype)
            ).eval()
        finally:
            if shows:
                transformers.utils.logging.enable_progress_bar()
        if torch.cuda.is_available():
            self.model.to("cuda")
        self._modules = find_components(self.model)

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *exc: object) -> None:
        del self.model, self._modules

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers, and of components of each."""
        return len(self._modules), len(COMPONENTS)

    def read(
        self,
        rows: Sequence[ForwardRow],
        on_rows: Callable[[int], None] | None = None,
        batch_tokens: int = _BATCH_TOKENS,
        share: bool = True,
    ) -> list[Reading]:
        """Read each row, in order.

        Args:
            on_rows: Called with the number of rows that are done since the last call.
            share: Run tokens that all rows start with once.
        """
        import torch

        readings: dict[int, Reading] = {}
        with torch.inference_mode():
            n_shared = _n_shared(rows) if share and len(rows) > 1 else 0
            shared = self._run_prefix(rows[0].token_ids[:n_shared]) if n_shared >= _LEAST_PREFIX else None
            n_shared = n_shared if shared is not None else 0
            for batch in _batches([len(row.token_ids) - n_shared for row in rows], batch_tokens):
                readings.update(zip(batch, self._read_batch([rows[i] for i in batch], shared, n_shared)))
                if on_rows:
                    on_rows(len(batch))
        return [readings[i] for i in range(len(rows))]

    def _run_prefix(self, ids: Sequence[int]) -> Any:
        from transformers import DynamicCache

        # Without the model's config every layer keeps all its keys; the mask decides which a query sees.
        cache = DynamicCache()
        tokens = _tensor([list(ids)], self.model.device)
        self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _read_batch(self, rows: Sequence[ForwardRow], shared: Any, n_shared: int) -> list[Reading]:
        import torch

        device = self.model.device
        lengths = [len(row.token_ids) - n_shared for row in rows]
        longest = max(lengths)
        ids = _tensor([[*row.token_ids[n_shared:], *[0] * (longest - n)] for row, n in zip(rows, lengths)], device)
        mask = _tensor([[1] * (n_shared + n) + [0] * (longest - n) for n in lengths], device)
        positions = torch.arange(n_shared, n_shared + longest, device=device).expand(len(rows), -1)
        cache = None
        if shared is not None:
            cache = copy.deepcopy(shared)
            cache.batch_repeat_interleave(len(rows))
        at = [(i, point - n_shared) for i, row in enumerate(rows) for point in row.points]
        kept = sorted({place - n_shared for row in rows for place in row.predict_at})
        with self._hooked(_tensor(at, device).reshape(-1, 2)) as states:
            logits = self.model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=_tensor(kept, device),
            ).logits
        stacked = torch.stack([torch.stack(parts) for parts in states]) if at else None
        readings, first = [], 0
        for i, row in enumerate(rows):
            own_logits = logits[i, [kept.index(place - n_shared) for place in row.predict_at]].float()
            own_states = np.zeros((0, *self.shape, 0), np.float32)
            if stacked is not None:
                own_states = stacked[:, :, first : first + len(row.points)].permute(2, 0, 1, 3).cpu().numpy()
            readings.append(Reading(own_states, torch.log_softmax(own_logits, -1).cpu().numpy()))
            first += len(row.points)
        return readings

    @contextmanager
    def _hooked(self, at: torch.Tensor) -> Iterator[list[list[torch.Tensor]]]:
        """The modules' outputs at (row, place) pairs [n, 2]: by layer and component [n, hidden], float32."""
        states: list[list[Any]] = [[None] * len(COMPONENTS) for _ in self._modules]

        def keeper(layer: int, component: int) -> Callable[..., None]:
            def keep(module: Any, given: Any, out: Any) -> None:
                out = out[0] if isinstance(out, tuple) else out
                states[layer][component] = out[at[:, 0], at[:, 1]].float()

            return keep

        hooks = []
        try:
            if len(at):
                for layer, parts in enumerate(self._modules):
                    hooks += [part.register_forward_hook(keeper(layer, i)) for i, part in enumerate(parts)]
            yield states
        finally:
            for hook in hooks:
                hook.remove()


def find_components(model: Any) -> list[tuple[Any, Any, Any]]:
    """Find each layer's modules whose outputs are COMPONENTS: the layer itself (residual stream), attention and MLP.

    Raises:
        UnsupportedModelError: If they are not found.
    """
    n = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if type(m).__name__ == "ModuleList" and len(m) == n]
    layers = next((each for each in lists if _child(each[0], _ATTENTION_NAMES) is not None), None)
    if layers is None:
        raise UnsupportedModelError(
            f"the model ({type(model).__name__}) has no list of {n} layers with an attention module named "
            f"{', '.join(_ATTENTION_NAMES)}: it is not a decoder whose layers can be read"
        )
    components = []
    for i, layer in enumerate(layers):
        attention, mlp = _child(layer, _ATTENTION_NAMES), _child(layer, _MLP_NAMES)
        if attention is None or mlp is None:
            names = ", ".join(name for name, _ in layer.named_children())
            raise UnsupportedModelError(f"layer {i} has no attention or MLP with a known name; it has: {names}")
        components.append((layer, attention, mlp))
    return components


def _tensor(values: Any, device: Any) -> torch.Tensor:
    import torch

    return torch.tensor(values, dtype=torch.long, device=device)


def _child(module: Any, names: Sequence[str]) -> Any:
    children = dict(module.named_children())
    return next((children[name] for name in names if name in children), None)


def _n_shared(rows: Sequence[ForwardRow]) -> int:
    """How many tokens all rows start with, up to the first at which anything is read."""
    most = min(min((*row.points, *row.predict_at)) for row in rows)
    columns = zip(*(row.token_ids[:most] for row in rows))
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), most)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group rows of similar length, so that there is little padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
