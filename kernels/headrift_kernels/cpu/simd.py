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

from headrift_kernels.cpu.math import EXP2_SERIES

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


def _at(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(_at(builder, address, kind), align=4)


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, _at(builder, address, value.type), align=4)


def _skip(builder: ir.IRBuilder, address: ir.Value, step: ir.Value, times: ir.Value) -> ir.Value:
    return builder.add(address, builder.mul(step, times))


def _load_row(builder: ir.IRBuilder, address: ir.Value, width: int, bfloat16: bool) -> ir.Value:
    if not bfloat16:
        return _load(builder, address, _vector(width))
    bits = builder.load(_at(builder, address, _vector(width, ir.IntType(16))), align=2)
    wide = builder.zext(bits, _vector(width, _INT32))
    shifted = builder.shl(wide, ir.Constant(_vector(width, _INT32), [16] * width))
    return builder.bitcast(shifted, _vector(width))


def _repeated(builder: ir.IRBuilder, scalar: ir.Value, width: int) -> ir.Value:
    """A vector that holds the scalar everywhere."""
    undefined = ir.Constant(_vector(width, scalar.type), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_vector(width, _INT32), [0] * width))


def _folded(builder: ir.IRBuilder, vector: ir.Value, operation: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """The operation over all elements of a vector, by halves."""
    while (width := vector.type.count) > 1:
        half = _vector(width // 2, _INT32)
        low, high = (
            builder.shuffle_vector(vector, vector, ir.Constant(half, list(range(start, start + width // 2))))
            for start in (0, width // 2)
        )
        vector = operation(low, high)
    return builder.extract_element(vector, ir.Constant(_INT32, 0))


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fmuladd.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def _prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Fetch a cache line into the second-level cache: the first is too small to hold a block that is not yet due."""
    byte = ir.IntType(8)
    kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), _INT32, _INT32, _INT32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    to_read, second_level, data = (ir.Constant(_INT32, flag) for flag in (0, 2, 1))
    builder.call(prefetch, [_at(builder, address, byte), to_read, second_level, data])


def sum_of_rows(width: int) -> Callable[..., Any]:
    """A compiled function (element, heads, x, x_head, rows, row_step, n, out, out_head, onto, ahead) -> None.

    element: the numpy type of the rows, float32, or uint16 for the bits of bfloat16; all others are int64. For each
    head g < heads <= MOST_HEADS: out[g] (+)= sum over i < n of x[g, i] * rows[i], `width` columns; added to what is
    there where `onto` is not 0, else written over it. x, rows and out are addresses, x and out of float32; a head's x
    is contiguous; x_head, row_step and out_head are distances in bytes. ahead: what lies this far behind each row is
    fetched into the cache; 0 for nothing.
    """

    @intrinsic
    def function(typing_context, element, heads, x, x_head, rows, row_step, n, out, out_head, onto, ahead):
        bfloat16 = element.instance_type == types.uint16

        def generate(context, builder, _signature, arguments):
            done = builder.append_basic_block()
            cases = [builder.append_basic_block() for _ in range(MOST_HEADS)]
            switch = builder.switch(arguments[1], done)
            for count, block in enumerate(cases, 1):
                switch.add_case(ir.Constant(_INT64, count), block)
                builder.position_at_end(block)
                _loop_over_rows(builder, count, width, bfloat16, *arguments[2:])
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return typing.signature(types.void, element, *[types.int64] * 10), generate

    return function


def _loop_over_rows(builder, heads, width, bfloat16, x, x_head, rows, row_step, n, out, out_head, onto, ahead):
    """The loop for a fixed number of heads; leaves the builder at its end."""
    vector = _vector(width)
    numbers = [ir.Constant(_INT64, g) for g in range(heads)]
    targets = [_skip(builder, out, out_head, g) for g in numbers]
    sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * width)) for _ in numbers]
    with builder.if_then(cgutils.is_not_null(builder, onto)):
        for total, target in zip(sums, targets, strict=True):
            builder.store(_load(builder, target, vector), total)
    x_now, row_now = (cgutils.alloca_once_value(builder, start) for start in (x, rows))
    with cgutils.for_range(builder, n):
        x_at, row_at = builder.load(x_now), builder.load(row_now)
        row = _load_row(builder, row_at, width, bfloat16)
        for line in range(0, width * (2 if bfloat16 else 4), 64):
            _prefetch(builder, builder.add(builder.add(row_at, ahead), ir.Constant(_INT64, line)))
        for total, g in zip(sums, numbers, strict=True):
            factor = _repeated(builder, _load(builder, _skip(builder, x_at, x_head, g), _FLOAT), width)
            builder.store(_multiply_add(builder, row, factor, builder.load(total)), total)
        builder.store(builder.add(x_at, ir.Constant(_INT64, 4)), x_now)
        builder.store(builder.add(row_at, row_step), row_now)
    for total, target in zip(sums, targets, strict=True):
        _store(builder, builder.load(total), target)


def _exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """`headrift_kernels.cpu.math.exp2` of a vector."""

    def same(value: float) -> ir.Value:
        return ir.Constant(x.type, [value] * x.type.count)

    def whole_number(value: int) -> ir.Value:
        return ir.Constant(whole.type, [value] * x.type.count)

    low_end = builder.select(builder.fcmp_ordered(">", x, same(-126.5)), x, same(-126.5))
    whole = builder.fptosi(builder.fsub(low_end, same(0.5)), _vector(x.type.count, _INT32))
    fraction = builder.fsub(x, builder.sitofp(whole, x.type))
    result = same(EXP2_SERIES[-1])
    for coefficient in EXP2_SERIES[-2::-1]:
        result = _multiply_add(builder, result, fraction, same(coefficient))
    exponent = builder.shl(builder.add(whole, whole_number(127)), whole_number(23))
    scaled = builder.fmul(result, builder.bitcast(exponent, x.type))
    return builder.select(builder.fcmp_ordered("<", x, same(-126.0)), same(0.0), scaled)


@intrinsic
def exponentials(typing_context, heads, scores, score_head, n, tops, totals, moments):
    """Of each head g < heads: tops[g] = the largest of scores[g, :n], then scores[g, j] = 2**(scores[g, j] - tops[g])
    in place, and totals[g] = their sum; a function of seven int64.

    moments: 0, or where to write sum over j of 2**(s_j - tops[g]) * (s_j - tops[g]), to which a masked score (-inf)
    adds 0. scores, tops, totals, moments: addresses of float32; score_head: distance in bytes. n: a positive multiple
    of LEAST_TILE. A NaN is not the largest, but shows in the sums.
    """

    def generate(context, builder, _signature, arguments):
        heads, scores, score_head, n, tops, totals, moments = arguments
        vector, four = _vector(LEAST_TILE), ir.Constant(_INT64, 4)
        zero = ir.Constant(vector, [0.0] * LEAST_TILE)
        tiles = _INT64(0), n, _INT64(LEAST_TILE)

        def larger(a: ir.Value, b: ir.Value) -> ir.Value:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def powers(row: ir.Value, top: ir.Value, head: ir.Value, with_moment: bool) -> None:
            """Scores above their largest made powers, their sum, and where wanted the moment."""
            everywhere = _repeated(builder, top, LEAST_TILE)
            sums = [cgutils.alloca_once_value(builder, zero) for _ in range(1 + with_moment)]
            with cgutils.for_range_slice(builder, *tiles) as (j, _):
                place = _skip(builder, row, four, j)
                score = builder.fsub(_load(builder, place, vector), everywhere)
                power = _exp2(builder, score)
                _store(builder, power, place)
                terms = [power]
                if with_moment:
                    # Where the power is 0 the score may be -inf, and their product NaN.
                    none = builder.fcmp_ordered("==", power, zero)
                    terms.append(builder.select(none, zero, builder.fmul(power, score)))
                for total, term in zip(sums, terms, strict=True):
                    builder.store(builder.fadd(builder.load(total), term), total)
            for total, out in zip(sums, (totals, moments)):
                value = _folded(builder, builder.load(total), builder.fadd)
                _store(builder, value, _skip(builder, out, four, head))

        with cgutils.for_range(builder, heads) as head:
            row = _skip(builder, scores, score_head, head.index)
            largest = cgutils.alloca_once_value(builder, ir.Constant(vector, [float("-inf")] * LEAST_TILE))
            with cgutils.for_range_slice(builder, *tiles) as (j, _):
                score = _load(builder, _skip(builder, row, four, j), vector)
                builder.store(larger(score, builder.load(largest)), largest)
            top = _folded(builder, builder.load(largest), larger)
            _store(builder, top, _skip(builder, tops, four, head.index))
            with builder.if_else(cgutils.is_not_null(builder, moments)) as (then, otherwise):
                with then:
                    powers(row, top, head.index, True)
                with otherwise:
                    powers(row, top, head.index, False)
        return context.get_dummy_value()

    return typing.signature(types.void, *[types.int64] * 7), generate


@intrinsic
def sums_between(typing_context, heads, values, value_head, start, end, out, out_head):
    """For each head g < heads: out[g] = sum of values[g, start:end], as a function of seven int64.

    values, out: addresses of float32; value_head, out_head: distances in bytes. LEAST_TILE values past `end` must be
    there to be read, whatever they hold.
    """

    def generate(context, builder, _signature, arguments):
        heads, values, value_head, start, end, out, out_head = arguments
        vector, four = _vector(LEAST_TILE), ir.Constant(_INT64, 4)
        zero = ir.Constant(vector, [0.0] * LEAST_TILE)
        none = builder.icmp_signed(">=", start, end)
        start = builder.select(none, _INT64(0), start)
        length = builder.select(none, _INT64(0), builder.sub(end, start))
        whole = builder.add(start, builder.and_(length, _INT64(-LEAST_TILE)))
        left = builder.trunc(builder.and_(length, _INT64(LEAST_TILE - 1)), _INT32)
        lanes = ir.Constant(_vector(LEAST_TILE, _INT32), list(range(LEAST_TILE)))
        in_tail = builder.icmp_signed("<", lanes, _repeated(builder, left, LEAST_TILE))
        with cgutils.for_range(builder, heads) as head:
            row = _skip(builder, values, value_head, head.index)
            total = cgutils.alloca_once_value(builder, zero)
            with cgutils.for_range_slice(builder, start, whole, _INT64(LEAST_TILE)) as (j, _):
                loaded = _load(builder, _skip(builder, row, four, j), vector)
                builder.store(builder.fadd(builder.load(total), loaded), total)
            tail = builder.select(in_tail, _load(builder, _skip(builder, row, four, whole), vector), zero)
            result = _folded(builder, builder.fadd(builder.load(total), tail), builder.fadd)
            _store(builder, result, _skip(builder, out, out_head, head.index))
        return context.get_dummy_value()

    return typing.signature(types.void, *[types.int64] * 7), generate
