"""vLLM's description of a step, for tests and benchmarks of what is planned from it."""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata


def describe_step(
    query_lens: Sequence[int], seq_lens: Sequence[int], longest: int, table: torch.Tensor, **other: object
) -> CommonAttentionMetadata:
    """A step with so many tokens of each row, and so many keys. other: fields that are not as usual."""
    starts = torch.tensor([0, *np.cumsum(query_lens).tolist()], dtype=torch.int32)
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    tokens = int(starts[-1])
    fields = {
        "query_start_loc": starts.clone(),
        "query_start_loc_cpu": starts,
        "seq_lens": lengths.clone(),
        "seq_lens_cpu_upper_bound": lengths,
        "num_reqs": len(lengths),
        "num_actual_tokens": tokens,
        "max_query_len": max(query_lens),
        "max_seq_len": longest,
        "block_table_tensor": table,
        "slot_mapping": torch.arange(tokens),
        "req_idx": np.arange(len(lengths)),
    }
    return CommonAttentionMetadata(**{**fields, **other})
