"""Which queries of a batch the CPU attention kernel is called for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrift_kernels.cpu.compile import kernel

# Columns of a query: batch row, token in the batch, recorder slot (-1: not measured), step, keys up to its position.
ROW, TOKEN, SLOT, STEP, KEYS = range(5)


@kernel()
def measured_queries(query_start_loc, seq_lens, row_slot, prompt_len, n_rows, steps, decode_rows):
    """[n, 5] int32 (ROW, TOKEN, SLOT, STEP, KEYS) of every query of a batch whose step is recorded, in batch order.

    query_start_loc: [batch+1], seq_lens: [batch] with this step's tokens, row_slot: [batch] (-1: not probed),
    prompt_len and n_rows: [slots], all int32; steps: the buffer's. A query at position p has step p - (prompt_len - 1).
    decode_rows: list the query of every row with a single one too, measured or not (SLOT -1).
    """
    table = np.empty((query_start_loc[row_slot.shape[0]], 5), np.int32)
    n = 0
    for row in range(row_slot.shape[0]):
        slot = row_slot[row]
        start, end = query_start_loc[row], query_start_loc[row + 1]
        alone = decode_rows and end - start == 1
        if slot < 0 and not alone:
            continue
        for token in range(start, end):
            keys = seq_lens[row] - (end - token) + 1
            step = keys - prompt_len[slot] if slot >= 0 else -1
            measured = slot >= 0 and 0 <= step < min(n_rows[slot], steps)
            if measured or alone:
                table[n, ROW] = row
                table[n, TOKEN] = token
                table[n, SLOT] = slot if measured else -1
                table[n, STEP] = step
                table[n, KEYS] = keys
                n += 1
    return table[:n]


@dataclass(frozen=True, slots=True)
class Queries:
    """The queries of one step, worked out once for all layers.

    table: [n, 5] int32 (ROW, TOKEN, SLOT, STEP, KEYS). work: [n + 1] int64 running number of the cache blocks they
    attend, by which the work is shared out. blocks: how many in all. longest: keys in the blocks of the longest one.
    addresses: of table, their number, and of work, as the kernel takes them.
    """

    table: np.ndarray
    work: np.ndarray
    blocks: int
    longest: int
    addresses: tuple[int, int, int]

    @classmethod
    def from_table(cls, table: np.ndarray, page: int) -> Queries:
        """From `measured_queries`, at least one, and the size of a cache block."""
        blocks = (table[:, KEYS].astype(np.int64) + page - 1) // page
        work = np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])
        addresses = (table.ctypes.data, len(table), work.ctypes.data)
        return cls(table, work, int(work[-1]), int(blocks.max()) * page, addresses)

    def __len__(self) -> int:
        return len(self.table)
