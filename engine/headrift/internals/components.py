"""What a model's layers compute at chosen tokens: residual stream, attention output, MLP output; and what it says next.

Read with forward hooks on the modules of a transformers model, so the numbers are what the model's own code hands on.
Tokens that all rows begin with run once; the rest is padded on the right, where by causality nothing can look at it,
and positions are each token's own: neither padding nor the size of a batch changes a number beyond rounding.
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
# Tokens of a batch, padding included; below so many in common, rows are not worth a pass of their own.
_BATCH_TOKENS, _LEAST_PREFIX = 2048, 8

Floats = NDArray[np.float32]


class UnsupportedModelError(ValueError):
    """The model's layers, or their parts, are not where this looks for them; the message names what is there."""


@dataclass(frozen=True, slots=True)
class Row:
    """What goes in: token ids; points: at which of them states are wanted; said: at which the next token's
    distribution is."""

    token_ids: Sequence[int] = field(repr=False)
    said: Sequence[int]
    points: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What comes out. states: [points, layers, COMPONENTS, hidden]; log_probs: [said, vocabulary], in nats."""

    states: Floats = field(repr=False)
    log_probs: Floats = field(repr=False)


class Model:
    """A causal language model of transformers, on a GPU where there is one. dtype: auto is float32, which is what the
    numbers' last digits need. UnsupportedModelError where its layers are not found. A context manager, whose end gives
    the memory back."""

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
        self._modules = parts_of(self.model)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        del self.model, self._modules

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and components of each."""
        return len(self._modules), len(COMPONENTS)

    def read(
        self,
        rows: Sequence[Row],
        on_rows: Callable[[int], None] | None = None,
        batch_tokens: int = _BATCH_TOKENS,
        share: bool = True,
    ) -> list[Reading]:
        """A reading of each row, in order. on_rows: told how many more are done. share: let tokens that all rows begin
        with run once."""
        import torch

        found: dict[int, Reading] = {}
        with torch.inference_mode():
            n_shared = _n_shared(rows) if share and len(rows) > 1 else 0
            shared = self._prefix(rows[0].token_ids[:n_shared]) if n_shared >= _LEAST_PREFIX else None
            n_shared = n_shared if shared is not None else 0
            for batch in _batches([len(row.token_ids) - n_shared for row in rows], batch_tokens):
                readings = self._batch([rows[i] for i in batch], shared, n_shared)
                found.update(zip(batch, readings))
                if on_rows:
                    on_rows(len(batch))
        return [found[i] for i in range(len(rows))]

    def _prefix(self, ids: Sequence[int]) -> Any:
        from transformers import DynamicCache

        # Without the model's config every layer keeps all its keys: which of them a query sees is the mask's business.
        cache = DynamicCache()
        tokens = torch_tensor([list(ids)], self.model.device)
        self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _batch(self, rows: Sequence[Row], shared: Any, n_shared: int) -> list[Reading]:
        import torch

        device = self.model.device
        lengths = [len(row.token_ids) - n_shared for row in rows]
        longest = max(lengths)
        ids = torch_tensor([[*row.token_ids[n_shared:], *[0] * (longest - n)] for row, n in zip(rows, lengths)], device)
        mask = torch_tensor([[1] * (n_shared + n) + [0] * (longest - n) for n in lengths], device)
        positions = torch.arange(n_shared, n_shared + longest, device=device).expand(len(rows), -1)
        cache = None
        if shared is not None:
            cache = copy.deepcopy(shared)
            cache.batch_repeat_interleave(len(rows))
        at = [(i, point - n_shared) for i, row in enumerate(rows) for point in row.points]
        kept = sorted({place - n_shared for row in rows for place in row.said})
        with self._hooked(torch_tensor(at, device).reshape(-1, 2)) as states:
            logits = self.model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=torch_tensor(kept, device),
            ).logits
        every = torch.stack([torch.stack(parts) for parts in states]) if at else None
        found, first = [], 0
        for i, row in enumerate(rows):
            said = logits[i, [kept.index(place - n_shared) for place in row.said]].float()
            mine = np.zeros((0, *self.shape, 0), np.float32)
            if every is not None:
                mine = every[:, :, first : first + len(row.points)].permute(2, 0, 1, 3).cpu().numpy()
            found.append(Reading(mine, torch.log_softmax(said, -1).cpu().numpy()))
            first += len(row.points)
        return found

    @contextmanager
    def _hooked(self, at: torch.Tensor) -> Iterator[list[list[torch.Tensor]]]:
        """What the modules hand on at these (row, place) [n, 2]: by layer and component [n, hidden], float32."""
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


def parts_of(model: Any) -> list[tuple[Any, Any, Any]]:
    """The modules whose outputs are COMPONENTS, by layer: the layer itself (the residual stream behind it), its
    attention and its MLP. UnsupportedModelError where they are not found."""
    n = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if type(m).__name__ == "ModuleList" and len(m) == n]
    layers = next((each for each in lists if _child(each[0], _ATTENTION_NAMES) is not None), None)
    if layers is None:
        raise UnsupportedModelError(
            f"the model ({type(model).__name__}) has no list of {n} layers with an attention module called "
            f"{', '.join(_ATTENTION_NAMES)}: it is no decoder of attention layers that can be read here"
        )
    found = []
    for i, layer in enumerate(layers):
        attention, mlp = _child(layer, _ATTENTION_NAMES), _child(layer, _MLP_NAMES)
        if attention is None or mlp is None:
            names = ", ".join(name for name, _ in layer.named_children())
            raise UnsupportedModelError(f"layer {i} has no attention or no MLP that is known here; it has: {names}")
        found.append((layer, attention, mlp))
    return found


def torch_tensor(values: Any, device: Any) -> torch.Tensor:
    """Whole numbers as a tensor."""
    import torch

    return torch.tensor(values, dtype=torch.long, device=device)


def _child(module: Any, names: Sequence[str]) -> Any:
    children = dict(module.named_children())
    return next((children[name] for name in names if name in children), None)


def _n_shared(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with, up to the first that something is wanted of."""
    most = min(min((*row.points, *row.said)) for row in rows)
    columns = zip(*(row.token_ids[:most] for row in rows))
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), most)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Which rows run together, rows of like length so that there is little padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
