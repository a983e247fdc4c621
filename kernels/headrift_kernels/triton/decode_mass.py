"""Paged decode attention with masses: how `decode_kernels` is launched."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from headrift_kernels.triton.common import next_power_of_2
from headrift_kernels.triton.decode_kernels import combine_kernel, decode_kernel
from headrift_kernels.triton.launch import DirectLaunch, launch

# The fewest keys of a split. Those of a 16-bit KV head of 128 are 262 kB of K and V; the parts of 4 heads are 2 kB.
CHUNK = 512
# Of a row: the combine kernel is compiled for as many.
MOST_SPLITS = 32
# Programs a multiprocessor up to which a launch is divided, though most of them return at once: see `splits_for`.
MOST_PROGRAMS = 128


@dataclass(frozen=True)
class Tiles:
    """How a kernel is launched: keys per tile, warps, stages, and the fewest keys of a split."""

    block_n: int
    num_warps: int
    num_stages: int
    chunk: int = CHUNK


@functools.cache
def tiles_for(head_dim: int, element_size: int, cache_size: int, hip: bool = torch.version.hip is not None) -> Tiles:
    """Keys per tile and stages, by the bytes of an element of the query and of the caches.

    Shared memory, not registers, is what limits the programs per multiprocessor: so the registers that the masses take
    cost no occupancy (see bench/results/aot.md). A load of page numbers comes before each of K and V, which is why two
    stages more make one more tile in flight.
    """
    if element_size == 4:
        tiles = Tiles(32 if head_dim <= 64 else 16, 4, 5)
    elif head_dim > 128:
        tiles = Tiles(16 if cache_size > 1 else 32, 4, 7)
    elif head_dim > 64:
        tiles = Tiles(64, 4, 5)
    else:
        tiles = Tiles(64, 4, 7)
    return Tiles(max(tiles.block_n, 32), tiles.num_warps, 2) if hip else tiles


@dataclass(frozen=True)
class SplitScratch:
    """Where the splits of up to `rows` rows leave their parts: allocated once, kept between calls.

    acc: [rows, heads, splits, head_dim]; stat: [rows, heads, splits, 3]; mass: [rows, heads, splits, regions].
    """

    acc: torch.Tensor
    stat: torch.Tensor
    mass: torch.Tensor

    @property
    def splits(self) -> int:
        return self.acc.shape[2]

    @classmethod
    def allocate(
        cls, rows: int, heads: int, head_dim: int, regions: int, splits: int, device: torch.device | str
    ) -> SplitScratch:
        like = {"dtype": torch.float32, "device": device}
        return cls(*(torch.empty(rows, heads, splits, last, **like) for last in (head_dim, 3, max(regions, 1))))


def splits_for(rows: int, kv_heads: int, longest: int, processors: int, most: int = MOST_SPLITS) -> int:
    """Return how many splits the longest row of a batch needs.

    As many as it has chunks: the batch's shorter rows then use one split each and return at once in the others, while
    no program serves more than a chunk of the long one. A program that returns at once must be launched all the same,
    so there are at most 128 for each multiprocessor, some 16,000 on a large GPU: a batch of many rows gets fewer
    splits, but never under 4 if the longest row has as many chunks. A multiprocessor holds a few programs at a time, so
    128 for each leave none idle.

    Args:
        rows: of the batch.
        longest: keys of its longest row, or of the model's longest if the host does not know it.
        processors: multiprocessors of the GPU.
        most: limit of the result.

    Returns:
        A power of two.
    """
    chunks = next_power_of_2(max(-(-longest // CHUNK), 1))
    affordable = MOST_PROGRAMS * processors // max(rows * kv_heads, 1)
    return min(chunks, most, max(4, 1 << max(affordable, 1).bit_length() - 1))


# What may change from one call of a layer to the next: of both kernels, and of the decode kernel besides.
_VARYING = ("output_ptr", "part_acc_ptr", "part_stat_ptr", "part_mass_ptr", "query_start_ptr", "seq_lens_ptr")
_VARYING_OF_DECODE = ("query_ptr", "block_table_ptr", "stride_table")


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a step, the same for all layers: what `decode_mass` says of its arguments of these names."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor | None = None
    scratch: SplitScratch | None = None
    shared_values: tuple[int, ...] = field(init=False, repr=False)
    table_values: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scratch, start = self.scratch, self.query_start_loc
        parts = (None, None, None) if scratch is None else (scratch.acc, scratch.stat, scratch.mass)
        shared = tuple(0 if tensor is None else tensor.data_ptr() for tensor in (*parts, start, self.seq_lens))
        object.__setattr__(self, "shared_values", shared)
        object.__setattr__(self, "table_values", (self.block_table.data_ptr(), self.block_table.stride(0)))

    @property
    def splits(self) -> int:
        return 1 if self.scratch is None else self.scratch.splits


class DecodeAgain:
    """A call of `decode_mass` that can be repeated with other output, query and batch, in few microseconds.

    The batch has as many splits as the first one; the types and devices of what changes do not change.
    """

    def __init__(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        kv_heads: int,
        splits: int,
        decode: DirectLaunch,
        combine: DirectLaunch | None,
    ):
        self._strides = output.stride(), query.stride()
        self._heads, self._kv_heads, self._splits = query.shape[1], kv_heads, splits
        self._decode, self._combine = decode, combine

    def __call__(self, output: torch.Tensor, query: torch.Tensor, batch: Batch) -> bool:
        """Return whether the kernels were launched; if not, call `decode_mass`, which can be done in any case."""
        if (output.stride(), query.stride()) != self._strides:
            return False
        rows, shared = batch.seq_lens.shape[0], (output.data_ptr(), *batch.shared_values)
        grid = (rows, self._kv_heads, self._splits)
        return self._decode(grid, *shared, query.data_ptr(), *batch.table_values) and (
            self._combine is None or self._combine((rows, self._heads, 1), *shared)
        )


def decode_mass(
    output: torch.Tensor,
    mass: torch.Tensor | None,
    layer: int,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    row_slot: torch.Tensor | None = None,
    prompt_len: torch.Tensor | None = None,
    n_rows: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
    *,
    query_start_loc: torch.Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    scratch: SplitScratch | None = None,
    tiles: Tiles | None = None,
) -> DecodeAgain | None:
    """Write the attention output of one query per row, and the masses of the rows that are probed, in place.

    With `query_start_loc` a batch may mix decode rows and prefill chunks. The query of a row is then its last token.
    A row of one token is attended. Of a row of several tokens only the masses and the entropy are written, and only if
    its last token is at a recorded step: its output is another kernel's and is left as it is. A row of no tokens is
    skipped. Nothing is read on the host, and the grid depends on shapes alone: a CUDA graph may hold the call.

    Args:
        output: [rows or tokens, heads, head_dim], any strides but a last one of 1.
        mass: [slots, steps, layers, heads, regions] float32, contiguous. None: plain attention, without row_slot,
            prompt_len, n_rows, bounds and entropy.
        layer: index in `mass`.
        query: as output.
        key_cache: [blocks, page, kv_heads, head_dim] in the query's type or an fp8, any strides but a last one of 1.
        value_cache: as key_cache.
        block_table: [rows, pages] int32.
        seq_lens: [rows] int32, this step's tokens included; without query_start_loc a row of length 0 gives zeros.
        row_slot: [rows] int32, -1 if the row is not probed.
        prompt_len: [slots] int32. The step of a row's query is seq_len - prompt_len.
        n_rows: [slots] int32. Steps outside 0..min(n_rows, steps)-1 are not written.
        bounds: [slots, regions, 2] int32, half-open key positions.
        query_start_loc: [rows + 1] int32, the first token of each row. None: one query a row.
        window: a query attends the keys at distance < window (None: all).
        softcap: 0 for none.
        alibi_slopes: [heads] float32.
        sinks: [heads] float32 logits.
        k_scale: [1] float32, of an fp8 cache.
        v_scale: as k_scale.
        entropy: [slots, steps, layers, heads] float32, attention entropy in nats over the keys.
        scratch: splits each row's keys among several programs.
        tiles: how the kernel is launched (default: `tiles_for`).

    Returns:
        What repeats the call for other rows of the layer; None in Triton's interpreter and of a batch without rows.

    Raises:
        ValueError: `scratch` is for fewer rows or regions.
    """
    rows = query.shape[0] if query_start_loc is None else seq_lens.shape[0]
    heads, head_dim = query.shape[1:]
    page, kv_heads = key_cache.shape[1], key_cache.shape[2]
    if rows == 0:
        return None
    splits = 1 if scratch is None else scratch.splits
    tiles = tiles or tiles_for(head_dim, query.element_size(), key_cache.element_size())
    regions = 1 if mass is None else mass.shape[4]
    if scratch is not None and (scratch.acc.shape[0] < rows or scratch.mass.shape[3] < regions):
        raise ValueError(
            f"the scratch of decode_mass is for {scratch.acc.shape[0]} rows and {scratch.mass.shape[3]} regions, and "
            f"the batch has {rows} rows and {regions} regions: allocate it for the largest batch, with "
            "SplitScratch.allocate"
        )
    fp8 = key_cache.element_size() == 1
    group = heads // kv_heads
    parts = (None, None, None) if scratch is None else (scratch.acc, scratch.stat, scratch.mass)
    steps, layers = (0, 0) if mass is None else (mass.shape[1], mass.shape[2])
    shared: dict[str, Any] = {
        "output_ptr": output,
        "mass_ptr": mass,
        "entropy_ptr": entropy,
        **dict(zip(("part_acc_ptr", "part_stat_ptr", "part_mass_ptr"), parts)),
        "query_start_ptr": query_start_loc,
        "seq_lens_ptr": seq_lens,
        "row_slot_ptr": row_slot,
        "prompt_len_ptr": prompt_len,
        "n_rows_ptr": n_rows,
        "sinks_ptr": sinks,
        "v_scale_ptr": v_scale,
        "window": window or 0,
        "layer": layer,
        "steps": steps,
        "layers": layers,
        "splits": splits,
        **dict(zip(("stride_ot", "stride_oh"), output.stride())),
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "BLOCK_N": tiles.block_n,
        "SPLIT": splits > 1,
        "CHUNK": max(tiles.chunk, tiles.block_n),
        "REGIONS": regions,
        "WIDTH": next_power_of_2(regions),
        "MASS": mass is not None,
        "LAST_TOKENS": query_start_loc is not None,
        "ENTROPY": mass is not None and entropy is not None,
        "WINDOW": window is not None,
        "SINKS": sinks is not None,
        "FP8": fp8,
    }
    of_decode = {
        "query_ptr": query,
        "key_ptr": key_cache,
        "value_ptr": value_cache,
        "block_table_ptr": block_table,
        "bounds_ptr": bounds,
        "slopes_ptr": alibi_slopes,
        "k_scale_ptr": k_scale,
        "scale": scale,
        "softcap": softcap,
        **dict(zip(("stride_qt", "stride_qh"), query.stride())),
        **dict(zip(("stride_kb", "stride_kt", "stride_kh"), key_cache.stride())),
        **dict(zip(("stride_vb", "stride_vt", "stride_vh"), value_cache.stride())),
        "stride_table": block_table.stride(0),
        "GROUP": group,
        "PAGE": page,
        "BLOCK_M": max(16, next_power_of_2(group)),
        "SOFTCAP": softcap > 0.0,
        "ALIBI": alibi_slopes is not None,
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    grid = (rows, kv_heads, splits)
    decode = launch(decode_kernel, grid, {**shared, **of_decode}, (*_VARYING, *_VARYING_OF_DECODE), **options)
    combine = None
    if splits > 1:
        of_combine = {"BLOCK_S": max(MOST_SPLITS, next_power_of_2(splits))}
        combine = launch(combine_kernel, (rows, heads, 1), {**shared, **of_combine}, _VARYING, num_warps=4)
    return None if decode is None else DecodeAgain(output, query, kv_heads, splits, decode, combine)
