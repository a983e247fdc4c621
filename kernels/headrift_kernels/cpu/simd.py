"""The two inner loops of attention in vector instructions, written as LLVM IR for numba to inline.

numba has no vector types, and what LLVM makes of scalar loops over short rows is several times slower: it keeps the
sums in memory and checks for overlap before every row. Both products of attention are sums of a scalar times a row,

    out[g, :] += sum_i x[g, i] * row[i, :]

with x the query and rows of packed keys for the scores, x the probabilities and rows of values for the output; the sums
of up to four heads stay in registers and share each row they read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils, typing
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

_FLOAT = ir.FloatType()
_INT64 = ir.IntType(64)
_INT32 = ir.IntType(32)

# What numba compiles for: NUMBA_CPU_FEATURES where it is set.
_AVX512 = "+avx512f" in (numba.config.CPU_FEATURES or get_host_cpu_features()).split(",")
# Most heads whose sums are kept at once, and columns of a row taken at a time: what the registers hold.
MOST_HEADS = 4
KEY_TILE = 32 if _AVX512 else 16
VALUE_TILE = 64 if _AVX512 else 16
LEAST_TILE = 16


def _vector(width: int, element: ir.Type = _FLOAT) -> ir.VectorType:
    return ir.VectorType(element, width)


def _load_row(builder: ir.IRBuilder, address: ir.Value, width: int, bfloat16: bool) -> ir.Value:
    if not bfloat16:
        return builder.load(builder.inttoptr(address, _vector(width).as_pointer()), align=4)
    bits = builder.load(builder.inttoptr(address, _vector(width, ir.IntType(16)).as_pointer()), align=2)
    wide = builder.zext(bits, _vector(width, _INT32))
    shifted = builder.shl(wide, ir.Constant(_vector(width, _INT32), [16] * width))
    return builder.bitcast(shifted, _vector(width))


def _broadcast(builder: ir.IRBuilder, address: ir.Value, width: int) -> ir.Value:
    scalar = builder.load(builder.inttoptr(address, _FLOAT.as_pointer()), align=4)
    undefined = ir.Constant(_vector(width), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_vector(width, _INT32), [0] * width))


def sum_of_rows(width: int, onto: bool) -> Callable[..., Any]:
    """A compiled function (element, heads, x, x_head, rows, row_step, n, out, out_head, ahead) -> None.

    element: the numpy type of the rows, float32, or uint16 for the bits of bfloat16; all others are int64. For each
    head g < heads <= MOST_HEADS: out[g] (+)= sum over i < n of x[g, i] * rows[i], `width` columns; added to what is
    there with `onto`, else written over it. x, rows and out are addresses, x and out of float32; a head's x is
    contiguous; x_head, row_step and out_head are distances in bytes. ahead: what lies this far behind each row is
    fetched into the cache; 0 for nothing.
    """

    @intrinsic
    def function(typing_context, element, heads, x, x_head, rows, row_step, n, out, out_head, ahead):
        bfloat16 = element.instance_type == types.uint16

        def generate(context, builder, _signature, arguments):
            done = builder.append_basic_block()
            cases = [builder.append_basic_block() for _ in range(MOST_HEADS)]
            switch = builder.switch(arguments[1], done)
            for count, block in enumerate(cases, 1):
                switch.add_case(ir.Constant(_INT64, count), block)
                builder.position_at_end(block)
                _loop_over_rows(builder, count, width, bfloat16, onto, *arguments[2:])
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return typing.signature(types.void, element, *[types.int64] * 9), generate

    return function


def _loop_over_rows(builder, heads, width, bfloat16, onto, x, x_head, rows, row_step, n, out, out_head, ahead):
    """The loop for a fixed number of heads; leaves the builder at its end."""
    vector = _vector(width)
    multiply_add = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{width}f32"
    )
    byte = ir.IntType(8).as_pointer()
    prefetch = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32]), "llvm.prefetch.p0"
    )
    prefetch_to_read = [ir.Constant(_INT32, flag) for flag in (0, 3, 1)]

    def of_head(base: ir.Value, step: ir.Value, head: int) -> ir.Value:
        return builder.add(base, builder.mul(step, ir.Constant(_INT64, head)))

    targets = [builder.inttoptr(of_head(out, out_head, g), vector.as_pointer()) for g in range(heads)]
    zero = ir.Constant(vector, [0.0] * width)
    start = [builder.load(target, align=4) if onto else zero for target in targets]
    entry, loop, done = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed(">", n, ir.Constant(_INT64, 0)), loop, done)

    builder.position_at_end(loop)
    i, x_now, row_now = (builder.phi(_INT64) for _ in range(3))
    sums = [builder.phi(vector) for _ in range(heads)]
    row = _load_row(builder, row_now, width, bfloat16)
    for line in range(0, width * (2 if bfloat16 else 4), 64):
        address = builder.add(builder.add(row_now, ahead), ir.Constant(_INT64, line))
        builder.call(prefetch, [builder.inttoptr(address, byte), *prefetch_to_read])
    more = [
        builder.call(multiply_add, [row, _broadcast(builder, of_head(x_now, x_head, g), width), sums[g]])
        for g in range(heads)
    ]
    i_next = builder.add(i, ir.Constant(_INT64, 1))
    for phi, before, after in [
        (i, ir.Constant(_INT64, 0), i_next),
        (x_now, x, builder.add(x_now, ir.Constant(_INT64, 4))),
        (row_now, rows, builder.add(row_now, row_step)),
        *zip(sums, start, more, strict=True),
    ]:
        phi.add_incoming(before, entry)
        phi.add_incoming(after, loop)
    builder.cbranch(builder.icmp_signed("<", i_next, n), loop, done)

    builder.position_at_end(done)
    results = [builder.phi(vector) for _ in range(heads)]
    for result, before, after in zip(results, start, more, strict=True):
        result.add_incoming(before, entry)
        result.add_incoming(after, loop)
    for target, result in zip(targets, results, strict=True):
        builder.store(result, target, align=4)


@intrinsic
def largest_of(typing_context, values, n):
    """The largest of n > 0 float32 from the address `values` on, as a function of two int64; NaN is passed over."""

    def generate(context, builder, _signature, arguments):
        values, n = arguments
        vector = _vector(LEAST_TILE)
        # Whole vectors from the front, and one more that ends at the end (it may overlap the last); fewer: one by one.
        width = ir.Constant(_INT64, LEAST_TILE)
        entry, short, wide, loop, done = (builder.block, *(builder.append_basic_block() for _ in range(4)))
        builder.cbranch(builder.icmp_signed("<", n, width), short, wide)

        def load(index: ir.Value, kind: ir.Type) -> ir.Value:
            address = builder.add(values, builder.mul(index, ir.Constant(_INT64, 4)))
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)

        def larger(a: ir.Value, b: ir.Value) -> ir.Value:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        builder.position_at_end(short)
        i, top = builder.phi(_INT64), builder.phi(_FLOAT)
        best = larger(load(i, _FLOAT), top)
        i_next = builder.add(i, ir.Constant(_INT64, 1))
        for phi, before, after in [
            (i, ir.Constant(_INT64, 0), i_next),
            (top, ir.Constant(_FLOAT, float("-inf")), best),
        ]:
            phi.add_incoming(before, entry)
            phi.add_incoming(after, short)
        builder.cbranch(builder.icmp_signed("<", i_next, n), short, done)

        builder.position_at_end(wide)
        last = builder.sub(n, width)
        at_end = load(last, vector)
        builder.branch(loop)

        builder.position_at_end(loop)
        j, tops = builder.phi(_INT64), builder.phi(vector)
        bests = larger(load(j, vector), tops)
        j_next = builder.add(j, width)
        for phi, before, after in [(j, ir.Constant(_INT64, 0), j_next), (tops, at_end, bests)]:
            phi.add_incoming(before, wide)
            phi.add_incoming(after, loop)
        after_loop = builder.append_basic_block()
        builder.cbranch(builder.icmp_signed("<=", j_next, last), loop, after_loop)
        builder.position_at_end(after_loop)
        lanes = [builder.extract_element(bests, ir.Constant(_INT32, lane)) for lane in range(LEAST_TILE)]
        while len(lanes) > 1:
            lanes = [larger(a, b) for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
        builder.branch(done)

        builder.position_at_end(done)
        result = builder.phi(_FLOAT)
        result.add_incoming(best, short)
        result.add_incoming(lanes[0], after_loop)
        return result

    return typing.signature(types.float32, types.int64, types.int64), generate


@intrinsic
def sums_between(typing_context, heads, values, value_head, start, end, out, out_head):
    """For each head g < heads: out[g] = sum of values[g, start:end], as a function of seven int64.

    values, out: addresses of float32; value_head, out_head: distances in bytes. LEAST_TILE values past `end` must be
    there to be read, whatever they hold.
    """

    def generate(context, builder, _signature, arguments):
        heads, values, value_head, start, end, out, out_head = arguments
        vector = _vector(LEAST_TILE)
        zero = ir.Constant(vector, [0.0] * LEAST_TILE)
        step, four = ir.Constant(_INT64, LEAST_TILE), ir.Constant(_INT64, 4)
        lanes = ir.Constant(_vector(LEAST_TILE, _INT64), list(range(LEAST_TILE)))
        entry, head, loop, tail, done = (builder.block, *(builder.append_basic_block() for _ in range(4)))
        whole = builder.add(start, builder.and_(builder.sub(end, start), ir.Constant(_INT64, -LEAST_TILE)))
        left = builder.sub(end, whole)
        undefined = ir.Constant(_vector(LEAST_TILE, _INT64), ir.Undefined)
        left_everywhere = builder.shuffle_vector(
            builder.insert_element(undefined, left, ir.Constant(_INT32, 0)),
            undefined,
            ir.Constant(_vector(LEAST_TILE, _INT32), [0] * LEAST_TILE),
        )
        in_tail = builder.icmp_signed("<", lanes, left_everywhere)
        builder.cbranch(builder.icmp_signed("<", start, end), head, done)

        builder.position_at_end(head)
        g, row, target = (builder.phi(_INT64) for _ in range(3))
        builder.cbranch(builder.icmp_signed("<", start, whole), loop, tail)

        def load(index: ir.Value) -> ir.Value:
            address = builder.add(row, builder.mul(index, four))
            return builder.load(builder.inttoptr(address, vector.as_pointer()), align=4)

        builder.position_at_end(loop)
        j, total = builder.phi(_INT64), builder.phi(vector)
        more = builder.fadd(total, load(j))
        j_next = builder.add(j, step)
        for phi, before, after in [(j, start, j_next), (total, zero, more)]:
            phi.add_incoming(before, head)
            phi.add_incoming(after, loop)
        builder.cbranch(builder.icmp_signed("<", j_next, whole), loop, tail)

        builder.position_at_end(tail)
        so_far = builder.phi(vector)
        so_far.add_incoming(zero, head)
        so_far.add_incoming(more, loop)
        last = builder.fadd(so_far, builder.select(in_tail, load(whole), zero))
        parts = [builder.extract_element(last, ir.Constant(_INT32, lane)) for lane in range(LEAST_TILE)]
        while len(parts) > 1:
            parts = [builder.fadd(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        builder.store(parts[0], builder.inttoptr(target, _FLOAT.as_pointer()), align=4)
        g_next = builder.add(g, ir.Constant(_INT64, 1))
        for phi, before, after in [
            (g, ir.Constant(_INT64, 0), g_next),
            (row, values, builder.add(row, value_head)),
            (target, out, builder.add(target, out_head)),
        ]:
            phi.add_incoming(before, entry)
            phi.add_incoming(after, tail)
        builder.cbranch(builder.icmp_signed("<", g_next, heads), head, done)

        builder.position_at_end(done)
        return context.get_dummy_value()

    return typing.signature(types.void, *[types.int64] * 7), generate
