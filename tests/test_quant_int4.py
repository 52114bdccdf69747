"""quant.int4 and quant.int8: the bytes of the published format, and the error of rounding to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_native.quant import groups, int4
from kimi_native.quant.int8 import dequantize_int8, quantize_int8
from kimi_native.weights import Int4Weight

# (levels or bits, worst |w - q s| in units of s); derived in the docstrings of quantize and quantize_int8
BOUNDS = {15: 0.5 + 8 * 2**-24, 16: 0.5 + 7.5 * 2**-8 + 8 * 2**-24, 8: 0.5 + 128 * 2**-24}


def slow_pack(q: list[list[int]]) -> list[list[int]]:
    """The format in plain integers, word by word."""
    rows = []
    for row in q:
        words = []
        for c in range(0, len(row), 8):
            word = sum((row[c + k] + 8) << (4 * k) for k in range(8))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return rows


def random_q(out: int, in_: int, seed: int = 0) -> torch.Tensor:
    """All 16 levels occur: the first ones in order, the rest at random."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (out, in_), generator=g, dtype=torch.int8)
    n = min(16, q.numel())
    q.view(-1)[:n] = torch.arange(-8, 8, dtype=torch.int8)[:n]
    return q


def random_scale(out: int, groups_: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(out, groups_, generator=g) * 0.02 + 1e-3).to(torch.bfloat16)


# ---- pack and unpack ---------------------------------------------------------------------------------------------

# From the format's description: (q, the word as int32, its bytes in memory)
WORKED_EXAMPLES = [
    ([-8, -7, -1, 0, 1, 3, 7, -3], 1605994256, bytes.fromhex("1087b95f")),
    ([-4, 2, 7, -8, 0, 5, -1, 6], -405270620, bytes.fromhex("a40fd8e7")),
]


@pytest.mark.parametrize(("q", "word", "octets"), WORKED_EXAMPLES)
def test_pack_gives_the_worked_examples(q, word, octets):
    packed = int4.pack(torch.tensor([q], dtype=torch.int8))
    assert packed.dtype == torch.int32
    assert packed.tolist() == [[word]]
    assert packed.numpy().tobytes() == octets


@pytest.mark.parametrize(("q", "word", "octets"), WORKED_EXAMPLES)
def test_unpack_gives_the_worked_examples(q, word, octets):
    del octets
    unpacked = int4.unpack(torch.tensor([[word]], dtype=torch.int32))
    assert unpacked.dtype == torch.int8
    assert unpacked.tolist() == [q]


def test_dequantize_gives_the_worked_example():
    q = torch.zeros(1, 32, dtype=torch.int8)
    q[0, :8] = torch.tensor(WORKED_EXAMPLES[0][0])
    scale = torch.tensor([[0.0123291015625]], dtype=torch.bfloat16)
    assert scale.view(torch.int16).item() == 0x3C4A
    expected = [-0.0986328125, -0.0863037109375, -0.0123291015625, 0.0]
    expected += [0.0123291015625, 0.0369873046875, 0.0863037109375, -0.0369873046875]
    weight = Int4Weight(int4.pack(q), scale)
    exact = int4.dequantize(weight, torch.float32)[0, :8]
    assert exact.tolist() == expected
    assert int4.dequantize(weight)[0, :8].tolist() == exact.to(torch.bfloat16).tolist()


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_pack_matches_the_slow_packer_and_unpack_inverts_it(out, words, seed):
    q = random_q(out, words * 8, seed)
    packed = int4.pack(q)
    assert packed.tolist() == slow_pack(q.tolist())
    assert torch.equal(int4.unpack(packed), q)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_pack_takes_every_signed_integer_dtype(dtype):
    q = random_q(3, 40)
    assert torch.equal(int4.pack(q.to(dtype)), int4.pack(q))


def test_pack_takes_views():
    q = random_q(48, 64)
    assert torch.equal(int4.pack(q.t()), int4.pack(q.t().contiguous()))


@pytest.mark.parametrize("chunk", [1, 64, 100, 1 << 20])
def test_chunk_size_changes_nothing(monkeypatch, chunk):
    w = torch.randn(37, 96, generator=torch.Generator().manual_seed(3))
    whole = int4.quantize(w)
    q, values, int8 = int4.unpack(whole.weight_packed), int4.dequantize(whole), quantize_int8(w)
    monkeypatch.setattr(groups, "CHUNK_ELEMENTS", chunk)
    chunked = int4.quantize(w)
    assert torch.equal(chunked.weight_packed, whole.weight_packed)
    assert torch.equal(chunked.weight_scale, whole.weight_scale)
    assert torch.equal(int4.pack(q), whole.weight_packed)
    assert torch.equal(int4.unpack(whole.weight_packed), q)
    assert torch.equal(int4.dequantize(whole), values)
    assert torch.equal(quantize_int8(w).weight, int8.weight)
    assert torch.equal(dequantize_int8(quantize_int8(w)), dequantize_int8(int8))


@pytest.mark.parametrize("bad", [-9, 8, 127, -128])
def test_pack_refuses_values_out_of_range(bad):
    q = torch.zeros(2, 8, dtype=torch.int8)
    q[1, 3] = bad
    with pytest.raises(ValueError, match=rf"pack: q must lie in \[-8, 7\] \(got .*{bad}"):
        int4.pack(q)


def test_pack_and_unpack_refuse_wrong_shapes_and_dtypes():
    with pytest.raises(ValueError, match="multiple of 8"):
        int4.pack(torch.zeros(2, 12, dtype=torch.int8))
    with pytest.raises(ValueError, match="pack: q must be"):
        int4.pack(torch.zeros(8, dtype=torch.int8))
    with pytest.raises(TypeError, match="pack: q must be"):
        int4.pack(torch.zeros(2, 8))
    with pytest.raises(TypeError, match="unpack: packed must be"):
        int4.unpack(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="unpack: packed must be"):
        int4.unpack(torch.zeros(8, dtype=torch.int32))
    with pytest.raises(ValueError, match="contiguous"):
        int4.unpack(torch.zeros(8, 8, dtype=torch.int32).t())


# ---- dequantize ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("out", "in_"), [(1, 32), (7, 96), (0, 64)])
def test_dequantize_is_q_times_scale_rounded_once(dtype, out, in_):
    q, scale = random_q(out, in_), random_scale(out, in_ // 32)
    exact = torch.empty(out, in_, dtype=torch.float64)
    for o in range(out):
        for i in range(in_):
            exact[o, i] = float(q[o, i]) * float(scale[o, i // 32])
    values = int4.dequantize(Int4Weight(int4.pack(q), scale), dtype)
    assert values.dtype == dtype
    assert torch.equal(values, exact.to(dtype))


def test_dequantize_refuses_integer_dtypes():
    weight = Int4Weight(int4.pack(random_q(1, 32)), random_scale(1, 1))
    with pytest.raises(
        TypeError, match=r"dequantize: dtype must be floating-point \(got torch.int8"
    ):
        int4.dequantize(weight, torch.int8)
    with pytest.raises(TypeError, match="dequantize_int8: dtype must be floating-point"):
        dequantize_int8(quantize_int8(torch.ones(1, 32)), torch.int8)


# ---- quantize ------------------------------------------------------------------------------------------------------


def hard_matrix(dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different magnitude, outliers, exact halves, tiny and huge groups, zero groups, signed zeros."""
    g = torch.Generator().manual_seed(5)
    w = torch.randn(40, 160, generator=g) * torch.logspace(-6, 6, 40).unsqueeze(1)
    w[3, 17] = 1e4
    w[4, :32] = torch.arange(32) * 0.5 - 8
    w[5, 32:64] = 0.0
    w[6, 32:64] = -0.0
    w[7, :32] = torch.randn(32, generator=g) * 1e-38
    w[8, :32] = torch.randn(32, generator=g) * 1e-42
    w[9, :32] = torch.rand(32, generator=g) * 3e38
    w[10] = 1.0
    w[11] = -1.0
    return w.to(dtype)


def assert_within_scale(w: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bound: float):
    """|w - values| <= bound * scale of the group, in float64; says how far the worst one is."""
    steps = scale.double().repeat_interleave(32, dim=1)
    worst = ((w.double() - values).abs() / steps).max().item()
    assert worst <= bound, f"worst error is {worst} scales, bound {bound}"


@pytest.mark.parametrize("levels", [15, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_quantize_error_is_within_the_derived_bound(levels, dtype):
    w = hard_matrix(dtype)
    weight = int4.quantize(w, levels=levels)
    assert torch.isfinite(weight.weight_scale).all()
    assert_within_scale(
        w.float(), int4.dequantize(weight, torch.float64), weight.weight_scale, BOUNDS[levels]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_quantize_int8_error_is_within_the_derived_bound(dtype):
    w = hard_matrix(dtype)
    weight = quantize_int8(w)
    assert int(weight.weight.min()) >= -127
    values = dequantize_int8(weight, torch.float64)
    assert_within_scale(w.float(), values, weight.weight_scale, BOUNDS[8])


@pytest.mark.parametrize(("levels", "divisor", "q_min"), [(15, 7.0, -7), (16, 7.5, -8)])
def test_quantize_follows_its_rule_value_by_value(levels, divisor, q_min):
    w = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    weight = int4.quantize(w, levels=levels)
    q = int4.unpack(weight.weight_packed)
    for o in range(5):
        for g in range(2):
            group = w[o, 32 * g : 32 * g + 32]
            scale = (group.abs().max() / divisor).to(torch.bfloat16)
            assert weight.weight_scale[o, g] == scale
            expected = [min(max(round(float(x / scale.float())), q_min), 7) for x in group]
            assert q[o, 32 * g : 32 * g + 32].tolist() == expected


def test_quantize_levels_16_reaches_minus_8_and_levels_15_does_not():
    w = torch.full(
        (1, 32), -0.9375
    )  # 7.5 / 8: the scale is exactly 1 / 8, and -7.5 rounds to the even -8
    assert int4.unpack(int4.quantize(w, levels=16).weight_packed).unique().tolist() == [-8]
    assert int4.unpack(int4.quantize(-w, levels=16).weight_packed).unique().tolist() == [7]
    assert int4.unpack(int4.quantize(w, levels=15).weight_packed).unique().tolist() == [-7]


def test_quantize_keeps_zero_groups_zero_with_a_finite_scale():
    w = torch.zeros(2, 64)
    w[1, 40] = 3.0
    for weight, q in (
        (w4 := int4.quantize(w), int4.unpack(w4.weight_packed)),
        (w8 := quantize_int8(w), w8.weight),
    ):
        assert torch.isfinite(weight.weight_scale).all()
        assert (weight.weight_scale > 0).all()
        assert q.count_nonzero() == 1
        assert q[1, 40] != 0


def test_quantize_returns_what_it_made_when_the_scale_is_exact():
    """Weights already on a grid with a BF16 scale come back to the bit."""
    q = random_q(9, 96).clamp_min(-7)
    q[:, ::32] = 7  # every group spans the grid, so amax / 7 is the scale itself
    scale = random_scale(9, 3)
    w = int4.dequantize(Int4Weight(int4.pack(q), scale), torch.float32)
    again = int4.quantize(w)
    assert torch.equal(again.weight_scale, scale)
    assert torch.equal(int4.unpack(again.weight_packed), q)


def test_quantize_int8_is_the_same_on_any_number_of_threads():
    w = torch.randn(700, 1024, generator=torch.Generator().manual_seed(4))  # three chunks
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(quantize_int8(w))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result.weight, results[0].weight)
        assert torch.equal(result.weight_scale, results[0].weight_scale)
    assert (dequantize_int8(results[0], torch.float32) - w).abs().max() < w.abs().max() / 250


def test_quantize_int8_writes_where_it_is_told():
    w = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    out = quantize_int8(torch.zeros(5, 64))
    assert quantize_int8(w, out=out) is out
    assert torch.equal(out.weight, quantize_int8(w).weight)
    with pytest.raises(ValueError, match=r"out must be \[2, 64\] \(got \[5, 64\]\)"):
        quantize_int8(w[:2], out=out)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantize", [int4.quantize, quantize_int8])
def test_quantize_refuses_non_finite_weights(quantize, bad):
    w = torch.ones(3, 64)
    w[2, 63] = bad
    with pytest.raises(ValueError, match=r"w must be finite in float32 \(got 1 NaN or infinite"):
        quantize(w)


@pytest.mark.parametrize("quantize", [int4.quantize, quantize_int8])
def test_quantize_refuses_wrong_shapes_and_dtypes(quantize):
    with pytest.raises(ValueError, match=r"in must be a multiple of 32 \(got \[2, 48\]\)"):
        quantize(torch.ones(2, 48))
    with pytest.raises(ValueError, match=r"w must be \[out, in\]"):
        quantize(torch.ones(32))
    with pytest.raises(TypeError, match="w must be"):
        quantize(torch.ones(2, 32, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"levels must be 15 or 16 \(got 8\)"):
        int4.quantize(torch.ones(2, 32), levels=8)


# ---- against compressed-tensors --------------------------------------------------------------------------------------

SHAPES = [(1, 32), (7, 96), (33, 160), (128, 1408)]


@pytest.fixture(scope="module")
def library():
    """compressed-tensors' compressor of this format with the published group of 32."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import pack_quantized
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=32, dynamic=False
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return pack_quantized, scheme


@pytest.mark.parametrize(("out", "in_"), [*SHAPES, (3, 8), (5, 40)])
def test_pack_writes_and_unpack_reads_the_library_words(library, out, in_):
    pack_quantized, _ = library
    q = random_q(out, in_)
    if out * in_ >= 16:
        assert q.unique().tolist() == list(range(-8, 8))
    words = pack_quantized.pack_to_int32(q, 4)
    assert torch.equal(int4.pack(q), words)
    assert torch.equal(int4.unpack(words), q)
    assert torch.equal(pack_quantized.unpack_from_int32(int4.pack(q), 4, q.shape), q)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_dequantize_gives_the_values_the_library_decompresses(library, out, in_):
    pack_quantized, scheme = library
    q, scale = random_q(out, in_), random_scale(out, in_ // 32)
    weight = Int4Weight(int4.pack(q), scale)
    stored = {
        "weight_packed": weight.weight_packed,
        "weight_scale": weight.weight_scale,
        "weight_shape": torch.tensor([out, in_]),
    }
    theirs = pack_quantized.PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(int4.dequantize(weight), theirs)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_quantize_levels_16_is_the_library_quantizer(library, out, in_):
    """Same scales and same words as the library's observer rule and compressor on float32 weights."""
    pack_quantized, scheme = library
    from compressed_tensors.quantization.utils import calculate_qparams

    w = torch.randn(out, in_, generator=torch.Generator().manual_seed(out)) / in_**0.5
    grouped = w.unflatten(1, (-1, 32))
    scale, _ = calculate_qparams(grouped.amin(2), grouped.amax(2), scheme.weights)
    ours = int4.quantize(w, levels=16)
    assert torch.equal(ours.weight_scale, scale.to(torch.bfloat16))
    state = {"weight": w, "weight_scale": scale.to(torch.bfloat16)}
    theirs = pack_quantized.PackedQuantizationCompressor.compress(state, scheme)
    assert torch.equal(ours.weight_packed, theirs["weight_packed"])
    assert theirs["weight_shape"].tolist() == [out, in_]
