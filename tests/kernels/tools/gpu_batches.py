"""Decode, prefill and replay batches made on a GPU, at the sizes of large models: for benchmarks of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headrift_kernels.triton.decode_mass import SplitScratch, splits_for

DEVICE = "cuda"
PAGE = 16  # vLLM's default on GPUs
STEPS = 16
ANSWER = 64
# heads per KV head, KV heads, head_dim
MODELS = {"Llama-3-8B": (4, 8, 128), "Qwen2.5-7B": (7, 4, 128), "SmolLM2-135M": (3, 3, 64), "tiny": (2, 2, 32)}


@dataclass(frozen=True)
class Case:
    """A batch to attend: context lengths of decode rows, and of rows that compute a chunk of several tokens."""

    kind: str  # uniform, ragged, shared, streaming or replay
    decode: tuple[int, ...]
    prefill: tuple[int, ...] = ()
    chunk: int = 512  # tokens of each of the `prefill` rows
    shared: int = 0  # first keys that all rows have in common

    @property
    def name(self) -> str:
        return f"{self.kind} {len(self.contexts)} x {max(self.contexts)}"

    @property
    def contexts(self) -> tuple[int, ...]:
        return self.decode + self.prefill

    @property
    def answer(self) -> int:
        """Answer tokens at the end of a chunk."""
        return min(ANSWER, self.chunk - 1) if self.kind == "replay" else 0

    def kv_bytes(self, model: str) -> int:
        """Bytes of K and V in 16 bits, of one layer."""
        _, kv_heads, head_dim = MODELS[model]
        return (self.shared + sum(n - self.shared for n in self.contexts)) * kv_heads * head_dim * 4


class Batch:
    """A case's tensors on the device, in vLLM 0.32's layouts; each row is measured at one token, or at its answer's.

    Caches: [blocks, page, KV heads, head_dim]; query: [tokens, heads, head_dim]; starts: [rows + 1] int32.
    """

    def __init__(self, case: Case, model: str, seed: int, dtype: torch.dtype):
        group, kv_heads, head_dim = MODELS[model]
        self.case, self.kv_heads, self.scale = case, kv_heads, head_dim**-0.5
        torch.manual_seed(seed)
        rows, longest = len(case.contexts), max(case.contexts)
        lengths = [1] * len(case.decode) + [case.chunk] * len(case.prefill)
        tokens, heads, pages = sum(lengths), group * kv_heads, -(-longest // PAGE)
        own = [-(-context // PAGE) - case.shared // PAGE for context in case.contexts]
        blocks = case.shared // PAGE + sum(own)
        free = torch.randperm(blocks, device=DEVICE).int()
        prefix, free = free[: case.shared // PAGE], free[case.shared // PAGE :]
        self.table = torch.zeros(rows, pages, dtype=torch.int32, device=DEVICE)
        self.table[:, : len(prefix)] = prefix
        for row, blocks_of_row in enumerate(free.split(own)):
            self.table[row, len(prefix) : len(prefix) + own[row]] = blocks_of_row
        cache = torch.randn(blocks, kv_heads, PAGE, 2 * head_dim, dtype=dtype, device=DEVICE)
        self.keys, self.values = cache.transpose(1, 2).split(head_dim, dim=-1)
        qkv = 2 * torch.randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device=DEVICE)
        self.query = qkv[:, :heads]
        self.output = torch.empty_like(self.query, memory_format=torch.contiguous_format)
        integers = {"dtype": torch.int32, "device": DEVICE}
        self.starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], **integers)
        self.seq_lens = torch.tensor(case.contexts, **integers)
        slots = torch.randperm(rows, device=DEVICE).int()
        steps = case.chunk if case.kind == "replay" else STEPS
        behind = [12] * len(case.decode) + [case.answer] * len(case.prefill)
        prompt_len = [context - n for context, n in zip(case.contexts, behind)]
        of_slot = torch.empty(rows, **integers)
        of_slot[slots.long()] = torch.tensor(prompt_len, **integers)
        regions = torch.tensor([[[5, n // 3], [n // 3 + 5, n - 4], [0, n]] for n in of_slot.tolist()], **integers)
        self.rows = slots, of_slot, torch.full((rows,), steps, **integers), regions  # as the kernels take them
        self.mass = torch.full((rows, steps, 2, heads, 3), torch.nan, device=DEVICE)
        self.longest, self.kv_bytes = longest, sum(case.contexts) * kv_heads * 2 * head_dim * cache.element_size()

    def scratch(self, rows: int) -> SplitScratch | None:
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        splits = splits_for(rows, self.kv_heads, self.longest, processors)
        _, heads, head_dim = self.query.shape
        return SplitScratch.allocate(rows, heads, head_dim, 3, splits, DEVICE) if splits > 1 else None
