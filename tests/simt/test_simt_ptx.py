"""The emulated twins of ptx.cuh against plain matrix products and bit operations.

The fragment layouts are written out below as the PTX ISA gives them, once more and in another form than in the shim:
as tables from (lane, register, position) to (row, column). That a GPU has the same ones is what tests/gpu proves.
"""

from __future__ import annotations

import numpy as np
import pytest

from simt import SCHEDULES, run_program

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4  # "groupID" and "threadID_in_group" of the PTX ISA
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def rng(seed=0):
    return np.random.default_rng(seed)


def bf16_bits(x):
    """float32 to bf16, nearest even, by float64 comparison with the two neighbours."""
    x = np.asarray(x, np.float32)
    low = (x.view(np.uint32) >> 16).astype(np.uint32)
    down, up = (low << 16).view(np.float32), ((low + 1) << 16).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        to_down = np.abs(x.astype(np.float64) - down)
        to_up = np.abs(up.astype(np.float64) - x)
        # The next step beyond the largest number is infinity, but rounding decides as if it were 2**128.
        to_up = np.where(np.isinf(up), 2.0**128 - np.abs(x.astype(np.float64)), to_up)
    take_up = (to_up < to_down) | ((to_up == to_down) & (low & 1 == 1))
    bits = np.where(np.isinf(x), low, np.where(take_up, low + 1, low))
    return np.where(np.isnan(x), 0x7FFF, bits).astype(np.uint16)


def from_bf16(bits):
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def fragments(matrix, rows, columns):
    """words[lane, register] of 16-bit or 8-bit `matrix`; rows and columns are [lane, register, position]."""
    values = matrix[rows, columns]
    return np.ascontiguousarray(values).view(np.uint32)[..., 0]


def a_layout(per):
    """m16 x (8 per): registers (row g | g + 8) x (first half of k | second half), `per` neighbours along k."""
    register, position = np.arange(4), np.arange(per)
    rows = G[:, None, None] + 8 * (register % 2)[None, :, None] + 0 * position
    columns = per * T[:, None, None] + position + 4 * per * (register // 2)[None, :, None]
    return rows, columns


def b_layout(per):
    register, position = np.arange(2), np.arange(per)
    k = per * T[:, None, None] + position + 4 * per * register[None, :, None]
    return k, G[:, None, None] + 0 * k


D_ROWS = G[:, None] + np.array([0, 0, 8, 8])
D_COLUMNS = 2 * T[:, None] + np.array([0, 1, 0, 1])


def product(name, a, b, d, schedule):
    """d + a @ b through the program `name`; a [16, k], b [k, 8] of 16-bit or 8-bit integers, d [16, 8]."""
    per = 4 // a.itemsize
    words = np.concatenate(
        [
            d[D_ROWS, D_COLUMNS].view(np.uint32),
            fragments(a, *a_layout(per)),
            fragments(b, *b_layout(per)),
        ],
        axis=1,
    )
    out = run_program(name, words, np.zeros((32, 4), d.dtype), schedule=schedule)
    result = np.zeros_like(d)
    result[D_ROWS, D_COLUMNS] = out
    return result


@schedules
def test_simt_mma_bf16_is_the_matrix_product(schedule):
    r = rng(1)
    a, b = bf16_bits(r.normal(size=(16, 16))), bf16_bits(r.normal(size=(16, 8)))
    d = r.normal(size=(16, 8)).astype(np.float32)
    wide_a, wide_b = from_bf16(a).astype(np.float64), from_bf16(b).astype(np.float64)
    expected = d + wide_a @ wide_b
    # Sixteen exact products added to d one by one: each sum rounds once.
    bound = 17 * 2.0**-24 * (np.abs(d) + np.abs(wide_a) @ np.abs(wide_b))
    assert (np.abs(product("mma_m16n8k16_bf16", a, b, d, schedule) - expected) <= bound).all()


@schedules
def test_simt_mma_of_bytes_is_exact(schedule):
    r = rng(2)
    a = r.integers(-128, 127, (16, 32), np.int8, endpoint=True)
    b = r.integers(-128, 127, (32, 8), np.int8, endpoint=True)
    d = r.integers(-(2**30), 2**30, (16, 8), np.int32)
    expected = d + a.astype(np.int32) @ b.astype(np.int32)
    assert (product("mma_m16n8k32_s8", a, b, d, schedule) == expected).all()


@pytest.mark.parametrize(
    ("variant", "matrices", "transposed"), [(0, 4, 0), (1, 4, 1), (2, 2, 0), (3, 2, 1)]
)
@schedules
def test_simt_ldmatrix_hands_out_rows_or_columns(variant, matrices, transposed, schedule):
    data = rng(3).integers(0, 2**16, (4, 8, 8), np.uint16)
    out = run_program(
        "ldmatrix", data, np.zeros((32, 4), np.uint32), variant=variant, schedule=schedule
    )
    seen = data.transpose(0, 2, 1) if transposed else data
    for q in range(matrices):
        pair = seen[q, G[:, None], 2 * T[:, None] + np.arange(2)].astype(np.uint32)
        assert (out[:, q] == (pair[:, 0] | pair[:, 1] << 16)).all()
    assert (out[:, matrices:] == 0).all()


@pytest.mark.parametrize("nbytes", [16, 8, 4])
@schedules
def test_simt_cp_async_copies_group_by_group_and_fills_with_zeros(nbytes, schedule):
    data = rng(4).integers(0, 2**32, (3, 32, nbytes // 4), np.uint32)
    out = run_program(f"cp_async_{nbytes}", data, np.zeros_like(data), schedule=schedule)
    stored = data[:, ::-1].copy()
    stored[2, 1::2] = 0
    assert (out == np.roll(stored, -1, axis=1)).all()


@schedules
def test_simt_named_barriers_order_part_of_a_block(schedule):
    data = rng(5).integers(0, 1000, 64, np.int32)
    out = run_program("named_barrier", data, np.zeros(128, np.int32), schedule=schedule)
    assert (out[:64] == data[::-1] + 1).all()
    assert (out[64:] == 2 * (data + 1)).all()


def words(name, data, count):
    return run_program(name, np.asarray(data, np.uint32), np.zeros(count, np.uint32))


def test_simt_lop3_is_its_truth_table():
    data = rng(6).integers(0, 2**32, (500, 3), np.uint32)
    a, b, c = data.T
    assert (words("lop3", data, 500) == ((a & b) | c) ^ (c ^ a ^ b) * np.uint32(3)).all()


def test_simt_prmt_permutes_bytes():
    data = rng(7).integers(0, 2**32, (500, 3), np.uint32)
    data[:, 2] &= 0x7777
    source = np.ascontiguousarray(data[:, :2]).view(np.uint8)
    expected = np.zeros((500, 4), np.uint8)
    for i in range(4):
        expected[:, i] = source[np.arange(500), data[:, 2] >> (4 * i) & 7]
    assert (words("prmt", data, 500) == expected.view(np.uint32)[:, 0]).all()


def float_samples(count, seed):
    """Bit patterns of floats: any, ties of bf16 and their neighbours, special ones."""
    r = rng(seed)
    ties = (r.integers(0, 2**16, count, np.uint32) << 16 | 0x8000) + r.integers(-1, 2, count)
    special = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x7F7FFFFF, 1, 0x8000]
    return np.concatenate([r.integers(0, 2**32, count, np.uint32), ties, special]).astype(np.uint32)


def test_simt_bf16_conversions_round_to_nearest_even():
    low, high = float_samples(3000, 8), float_samples(3000, 9)
    data = np.stack([low, high, low], axis=1)
    low_bits, high_bits = (bf16_bits(x.view(np.float32)).astype(np.uint32) for x in (low, high))
    assert (words("to_bf16", data, len(low)) == low_bits).all()
    assert (words("to_bf16x2", data, len(low)) == (low_bits | high_bits << 16)).all()


def test_simt_fma_bf16x2_rounds_once():
    r = rng(10)
    # Close exponents, far ones, and products that meet a tie which only the addend resolves.
    x = np.concatenate(
        [r.normal(size=(3000, 3, 2)), np.exp2(r.uniform(-60, 60, (3000, 3, 2)))]
    ).astype(np.float32)
    bits = bf16_bits(x)
    bits[-500:, 2] = bf16_bits(np.exp2(r.integers(-100, -20, (500, 2)).astype(np.float32)))
    data = np.ascontiguousarray(bits).view(np.uint32)[..., 0]
    wide = from_bf16(bits).astype(object)  # exact: fractions of Python integers
    out = words("fma_bf16x2", data, len(data))
    for half in (0, 1):
        got = from_bf16(out >> (16 * half) & 0xFFFF)
        for row, value in zip(wide[:, :, half], got, strict=True):
            assert value == nearest_bf16(row)


def nearest_bf16(row):
    """a * b + c in exact arithmetic, rounded once to bf16 (normal range)."""
    from fractions import Fraction

    a, b, c = (Fraction(float(v)) for v in row)
    exact = a * b + c
    if exact == 0:
        return 0.0
    exponent = 0
    size = abs(exact)
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    mantissa = round(size * 128)  # Python rounds ties to even
    return float(Fraction(mantissa, 128) * Fraction(2) ** exponent * (1 if exact > 0 else -1))


def test_simt_exp2_is_within_two_ulp():
    x = rng(11).uniform(-126, 127, 3000).astype(np.float32)
    out = words("exp2_approx", np.stack([x.view(np.uint32)] * 3, axis=1), 3000).view(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(out - exact) <= 2 * 2.0**-23 * exact).all()


def test_simt_load_streaming_reads_sixteen_bytes():
    data = rng(12).integers(0, 2**32, (100, 3), np.uint32)
    pieces = data.ravel()[:32].reshape(8, 4) * np.array([1, 3, 5, 7], np.uint32)
    expected = np.bitwise_xor.reduce(pieces, axis=1)[np.arange(100) % 8]
    assert (words("load_streaming", data, 100) == expected).all()


@schedules
def test_simt_shuffles_and_votes(schedule):
    v = rng(13).integers(0, 250, 32, np.uint32)
    out = run_program("shuffle", v, np.zeros((32, 9), np.uint32), schedule=schedule)
    assert (out[:, 0] == v[v % 32]).all()
    assert (out[:, 1] == v[LANE // 8 * 8 + LANE * 3 % 8]).all()
    assert (out[:, 2] == v[LANE ^ 5]).all()
    assert (out[:, 3] == np.where(LANE >= 3, v[LANE - 3], v)).all()
    assert (out[:, 4] == np.where(LANE % 16 < 13, v[(LANE + 3) % 32], v)).all()

    def ballot(flags):
        return np.uint32(sum(1 << int(lane) for lane in LANE[flags]))

    assert (out[:, 5] == ballot(v & 1 == 1)).all()
    assert (out[:, 6] == 2 * (v == 77).any() + (v < 200).all()).all()
    assert (out[:, 7] == [ballot(v % 5 == one % 5) for one in v]).all()
    upper = LANE >= 16
    expected = v[LANE ^ 3] + ballot((v & 2 != 0) & upper)
    assert (out[:, 8] == np.where(upper, expected, 0)).all()
