"""What headrift changes in vLLM's CPU build, for speed alone: RMS norms by vLLM's own kernels, and finer prefix hits.

Norms: uncompiled, torch takes five passes over memory for each norm, an eighth of a small model's decode step; vLLM's
CPU build has a kernel that takes one, and leaves it unused.

Prefix hits: vLLM shares whole KV blocks, of 32 tokens on a CPU, so of a prefix of 111 tokens 15 would be computed again
for each prompt. It can share a block's first tokens too (a request that continues there gets a copy of the block), but
does so only for models with Mamba layers. Here those parts serve full attention: a hit is a multiple of the engine
argument `prefix_match_unit`. A request leaves an entry for all of its prompt but the last token, so a common prefix is
best computed by a request of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm import ir
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_manager
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator, UnitaryKVCacheCoordinator, get_kv_cache_coordinator
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, resolve_kv_cache_block_sizes
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

PROVIDER = "headrift"
_VECTOR = 16  # numbers that the norm kernel takes at a time; rows are whole vectors


def register() -> None:
    """Put the patches in place in this process; engines ask for them by `plugin.CPU_ARGS`."""
    core.resolve_kv_cache_block_sizes = _block_sizes
    kv_cache_manager.get_kv_cache_coordinator = _coordinator
    if PROVIDER not in ir.ops.rms_norm.impls:
        current_platform.import_kernels()
        ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes_norm)(_rms_norm)
        register_fused = ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_fused, inplace=True)
        register_fused(_fused_add_rms_norm)


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _takes_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """Whether the kernel takes these: it goes over whole rows of contiguous memory."""
    fits = x.shape[-1] % _VECTOR == 0 and x.is_contiguous()
    return fits and variance_size is None and weight is not None and weight.dtype == x.dtype


def _takes_fused(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _takes_norm(x, weight, epsilon, variance_size) and x_residual.is_contiguous() and x_residual.dtype == x.dtype


class TailCoordinator(UnitaryKVCacheCoordinator):
    """vLLM's coordinator of a single KV cache group, with hits that end at multiples of `hash_block_size`.

    Entries are made when a request is scheduled. A whole block is shared by reference, and may be written in the very
    step that shares it; but the copy of a block is made before the step, so a block whose prompt tokens are written in
    this step must not be copied yet.
    """

    enable_partial_hash_hits = True

    def __init__(self, kv_cache_config: KVCacheConfig, *, hash_block_size: int, **options: Any) -> None:
        # The parent's own would insist on hashes of whole blocks.
        KVCacheCoordinator.__init__(self, kv_cache_config, hash_block_size=hash_block_size, **options)
        self.kv_cache_spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        manager = self.single_type_managers[0]
        self.dcp_world_size, self.pcp_world_size = manager.dcp_world_size, options["pcp_world_size"]
        self.block_size = manager.block_size
        self.hash_block_size = manager.cache_hit_alignment_tokens = hash_block_size
        self._written_in_this_step: set[int] = set()

    def new_step_starts(self) -> None:
        super().new_step_starts()
        self._written_in_this_step.clear()

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        super().cache_blocks(request, num_computed_tokens)
        end = (request.num_prompt_tokens - 1) // self.hash_block_size * self.hash_block_size
        if end % self.block_size and request.num_computed_tokens < end <= num_computed_tokens:
            block = self.single_type_managers[0].req_to_blocks[request.request_id][end // self.block_size]
            self._written_in_this_step.add(block.block_id)

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        blocks, length = FullAttentionManager.find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=max_cache_hit_length,
            kv_cache_group_ids=[0],
            block_pool=self.block_pool,
            kv_cache_spec=self.kv_cache_spec,
            drop_eagle_block=False,
            alignment_tokens=self.hash_block_size,
        )
        whole = length - length % self.block_size
        if length > whole and blocks[0][-1].block_id in self._written_in_this_step:
            return (blocks[0][:-1],), whole, 0
        return blocks, length, 0


def _block_sizes(kv_cache_config: KVCacheConfig, vllm_config: VllmConfig) -> tuple[int, int]:
    """The scheduler's block size, and how many tokens a hash covers."""
    cache = vllm_config.cache_config
    unit, cache.prefix_match_unit = cache.prefix_match_unit, None
    try:
        block, own = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    finally:
        cache.prefix_match_unit = unit
    finer = unit is not None and block % unit == 0 and cache.enable_prefix_caching
    return block, unit if finer and _all_full_attention(kv_cache_config) else own


def _coordinator(kv_cache_config: KVCacheConfig, **options: Any) -> KVCacheCoordinator:
    finer = options["enable_caching"] and options["hash_block_size"] < options["scheduler_block_size"]
    kind = TailCoordinator if finer and _all_full_attention(kv_cache_config) else get_kv_cache_coordinator
    return kind(kv_cache_config, **options)


def _all_full_attention(kv_cache_config: KVCacheConfig) -> bool:
    return [type(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups] == [FullAttentionSpec]
