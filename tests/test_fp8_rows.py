"""FP8 rows of the latent cache: the layout against a slow packer, rope_append and mla_decode on such rows."""

from __future__ import annotations

import math

import pytest
import torch

import kimi_native as kn
from kimi_native import _native, fp8_rows, ops, reference
from kimi_native.cache import LatentCache
from kimi_native.loader import load_model
from kimi_native.recorded import RecordedModel
from made_checkpoints import make_tiny_folders
from oracle import threads
from oracle_dense import Guarded, assert_close, assert_same_bits, mla_expected, randn
from oracle_fp8 import e4m3, pack_row, row_error, unpack_row
from test_mla_decode import Case, run_native
from test_rope_append import copies
from test_rope_append import make as make_rope

BF16, FP32 = torch.bfloat16, torch.float32
WIDTHS = [(1, 2), (3, 6), (15, 2), (63, 14), (64, 32), (127, 2), (128, 64), (129, 64), (512, 64)]


def packed(latent: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    rows = [pack_row(*parts) for parts in zip(latent, key, strict=True)]
    return torch.tensor([list(row) for row in rows], dtype=torch.uint8)


def latents(rank: int, seed: int = 0) -> torch.Tensor:
    """Rows of every kind: usual, wide in range, powers of two, ties of e4m3, zeros, tiny, and nearly the largest."""
    usual = randn(2, rank, dtype=FP32, seed=seed)
    ties = torch.arange(rank).remainder(64).add(0.5).float()  # halves between e4m3 numbers
    ties[0] = 448.0
    wide = usual[0] * torch.logspace(0, -12, rank)
    rows = [*usual, wide, 2.0 ** torch.arange(rank).remainder(20), ties, torch.zeros(rank)]
    return torch.stack([*rows, usual[0] * 2.0**-120, usual[1].clamp(-1, 1) * 1.75 * 2.0**127])


# ---- the layout -----------------------------------------------------------------------------------------------------


def test_fp8_rows_of_k2_have_656_bytes():
    assert fp8_rows.row_bytes(512, 64) == 512 + 4 * 4 + 64 * 2 == 656
    assert fp8_rows.row_bytes(64, 32) == 64 + 4 + 32 * 2
    assert fp8_rows.row_bytes(129, 2) == 132 + 8 + 4


@pytest.mark.parametrize(("rank", "rope"), WIDTHS)
def test_fp8_rows_quantize_has_the_bytes_of_the_slow_packer(rank, rope):
    latent = latents(rank)
    key = randn(len(latent), rope, dtype=BF16, seed=1)
    assert torch.equal(fp8_rows.quantize(latent, key), packed(latent, key))


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, 3.3e38])
def test_fp8_rows_quantize_turns_a_group_that_has_no_scale_into_nan(bad):
    latent, key = randn(3, 200, dtype=FP32), randn(3, 4, dtype=BF16)
    latent[1, 150] = bad
    rows = fp8_rows.quantize(latent, key)
    assert torch.equal(rows, packed(latent, key))
    values = fp8_rows.dequantize(rows, 200, 4)
    assert values.isnan().nonzero().tolist() == [[1, i] for i in range(128, 200)]


@pytest.mark.parametrize(("rank", "rope"), WIDTHS)
def test_fp8_rows_dequantize_has_the_values_of_the_bytes(rank, rope):
    rows = fp8_rows.quantize(latents(rank), randn(8, rope, dtype=BF16, seed=1))
    values = fp8_rows.dequantize(rows, rank, rope).double()
    expected = [unpack_row(bytes(row.tolist()), rank, rope) for row in rows]
    assert torch.equal(values, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(values, values.bfloat16().double())  # exact in bf16 too


def test_fp8_rows_dequantize_knows_every_byte():
    rows = torch.zeros(1, fp8_rows.row_bytes(256, 0), dtype=torch.uint8)
    rows[0, :256] = torch.arange(256)
    rows[0, 256:].view(FP32)[:] = torch.tensor([3.0, 5.0])  # any scale, not only powers of two
    expected = torch.tensor([e4m3(b) * (3 if b < 128 else 5) for b in range(256)])
    assert_same_bits(fp8_rows.dequantize(rows, 256, 0)[0], expected)


@pytest.mark.parametrize("rank", [1, 128, 200, 512])
def test_fp8_rows_are_within_their_bound_of_the_values(rank):
    latent = latents(rank)
    values = fp8_rows.dequantize(fp8_rows.quantize(latent, latent[:, :0]), rank, 0)
    assert ((values.double() - latent.double()).abs() <= row_error(latent)).all()


# ---- rope_append ----------------------------------------------------------------------------------------------------


def make(tokens, heads, rank, rope, **options):
    args = make_rope(tokens, heads, rank, rope, **options)
    shape = (*args["cache"].shape[:2], fp8_rows.row_bytes(rank, rope))
    return args | {"cache": torch.full(shape, 7, dtype=torch.uint8)}


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("rank", "rope"), WIDTHS)
def test_rope_append_to_fp8_rows_has_the_bits_of_the_slow_packer(isa, rank, rope, dtype):
    args = make(9, 2, rank, rope, dtype=dtype)
    args["latent"][:8] = latents(rank).to(dtype)
    ops.rope_append(**args)
    key = reference.rotate_pairs(args["k_rope"], args["cos"], args["sin"]).to(BF16)
    rows = args["cache"].flatten(0, 1)
    assert torch.equal(rows[args["slots"]], packed(args["latent"].float(), key))
    untouched = torch.ones(len(rows), dtype=torch.bool)
    untouched[args["slots"]] = False
    assert (rows[untouched] == 7).all()


def test_rope_append_reference_has_the_bits_of_fp8_rows_too(isa):
    args = make(5, 3, 200, 14)
    expected = copies(args)
    reference.rope_append(**expected)
    ops.rope_append(**args)
    assert torch.equal(args["cache"], expected["cache"])
    assert_same_bits(args["q_out"], expected["q_out"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rope_append_to_fp8_rows_shows_what_is_not_finite(isa, bad):
    args = make(4, 2, 200, 8)
    clean = copies(args)
    ops.rope_append(**clean)
    args["latent"][2, 130] = bad
    ops.rope_append(**args)
    rows = args["cache"].flatten(0, 1)
    values = fp8_rows.dequantize(rows[args["slots"]], 200, 8)
    assert values.isnan().nonzero().tolist() == [[2, i] for i in range(128, 200)]
    others = args["slots"][[0, 1, 3]]
    assert torch.equal(rows[others], clean["cache"].flatten(0, 1)[others])


def test_rope_append_to_fp8_rows_does_not_depend_on_threads(isa):
    results = []
    for n in (1, 2):
        args = make(64, 4, 130, 64)
        with threads(n):
            ops.rope_append(**args)
        results.append(args["cache"])
    assert torch.equal(*results)


@pytest.mark.parametrize("nbytes", [651, 655, 657, 576])
def test_rope_append_refuses_rows_of_another_size(nbytes):
    args = make(2, 2, 512, 64)
    args["cache"] = torch.zeros(4, 4, nbytes, dtype=torch.uint8)
    message = rf"rope_append: cache must be \[\*, \*, 656\] \(got \[4, 4, {nbytes}\]\)"
    with pytest.raises(ValueError, match=message):
        ops.rope_append(**args)


def test_rope_append_refuses_an_fp8_activation():
    numbers = (1, 1, 16, 8, 4, 8, 8, 8, 8, 16, 8)
    with pytest.raises(ValueError, match=r"rope_append: dtype must be 0 or 1 \(got 2\)"):
        _native.cpu.rope_append(*[0] * 8, 2, 1, 2, *numbers)
    with pytest.raises(ValueError, match=r"rope_append: cache must be .* fp8 \(2\) \(got 3\)"):
        _native.cpu.rope_append(*[0] * 8, 0, 1, 3, *numbers)


# ---- mla_decode -----------------------------------------------------------------------------------------------------


class Fp8Case(Case):
    """A Case in FP8 rows. `wide` holds the same values in fp32, `exact` what they were before; what must not be read is
    all ones: NaN scales, NaN keys."""

    def __init__(self, seq_lens, **options):
        super().__init__(seq_lens, **({"q_dtype": FP32} | options), cache_dtype=FP32)
        self.exact = self.cache
        self.encode()

    @property
    def rope(self) -> int:
        return self.q.shape[2] - self.latent

    def encode(self) -> None:
        """Makes rows and their values of `exact`."""
        flat = self.exact.flatten(0, 1)
        rows = fp8_rows.quantize(flat[:, : self.latent], flat[:, self.latent :])
        unused = self.unused().flatten()
        rows[unused] = 0xFF
        values = fp8_rows.dequantize(rows, self.latent, self.rope)
        self.cache = rows.view(*self.exact.shape[:2], -1)
        self.wide = values.view(self.exact.shape)

    def unused(self) -> torch.Tensor:
        """[pages, page_size]: slots that no sequence owns."""
        unused = torch.ones(self.exact.shape[:2], dtype=torch.bool)
        for b, length in enumerate(self.seq_lens.tolist()):
            for i in range(length):
                page_size = unused.shape[1]
                unused[int(self.page_table[b, i // page_size]), i % page_size] = False
        return unused

    def exact_row(self, b: int, position: int) -> torch.Tensor:
        page_size = self.exact.shape[1]
        return self.exact[int(self.page_table[b, position // page_size]), position % page_size]

    def expected(self, cache: torch.Tensor):
        tables = (self.page_table, self.seq_lens)
        options = {"kv_lora_rank": self.latent, "softmax_scale": self.scale}
        return mla_expected(self.q, cache, *tables, **options, isa=ops.active_isa())

    def check(self) -> torch.Tensor:
        out = self.run()
        assert_close(out, *self.expected(self.wide))
        # The kernel widens a row to fp32, exactly, and goes on as with a cache in fp32.
        rows, self.cache = self.cache, self.wide
        assert_same_bits(out, self.run())
        self.cache = rows
        return out


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130, 511, 512, 513, 1100])
def test_mla_decode_of_fp8_rows_matches_float64_at_any_length(isa, length):
    Fp8Case([length]).check()


@pytest.mark.parametrize(
    ("latent", "rope"),
    [(1, 0), (1, 1), (15, 3), (16, 0), (17, 15), (63, 1), (64, 64), (100, 7), (130, 2), (272, 16)],
)
def test_mla_decode_of_fp8_rows_matches_float64_at_any_width(isa, latent, rope):
    Fp8Case([5, 70], heads=7, latent=latent, rope=rope).check()


@pytest.mark.parametrize("page_size", [1, 3, 64, 100])
def test_mla_decode_of_fp8_rows_matches_float64_at_any_page_size(isa, page_size):
    Fp8Case([1, 17, 64, 150], page_size=page_size, q_dtype=BF16).check()


@pytest.mark.parametrize("heads", [1, 2, 5, 8, 9, 16, 20, 65])
def test_mla_decode_of_fp8_rows_matches_float64_at_any_number_of_heads(isa, heads):
    Fp8Case([70], heads=heads, latent=160, rope=8).check()


def test_mla_decode_of_fp8_rows_matches_float64_at_the_model_shape(isa):
    Fp8Case([600, 1], heads=64, latent=512, rope=64, scale=192**-0.5).check()


def test_mla_decode_of_fp8_rows_takes_any_scale(isa):
    case = Fp8Case([70], latent=140)
    offset = fp8_rows.row_bytes(140, 0) - 8
    scales = case.cache[..., offset : offset + 8].clone().view(FP32) * 1.37
    case.cache[..., offset : offset + 8] = scales.view(torch.uint8)
    case.wide = fp8_rows.dequantize(case.cache.flatten(0, 1), 140, 16).view(case.wide.shape)
    case.check()


def test_mla_decode_of_fp8_rows_is_near_the_rows_before_rounding(isa):
    """A score moves by at most d = |scale| * |q| . |rounding of a key|, so a softmax weight by a factor within
    exp(2 d), all of them together by exp(2 d) - 1, and the values by their own rounding."""
    case = Fp8Case([300, 70], heads=5, latent=200, rope=16)
    out = case.check()
    exact, kernel_bound = case.expected(case.exact)
    rounded, _ = case.expected(case.wide)
    for b, length in enumerate(case.seq_lens.tolist()):
        rows = torch.stack([case.exact_row(b, i) for i in range(length)])
        error = torch.cat([row_error(rows[:, :200]), 2.0**-8 * rows[:, 200:].double().abs()], 1)
        moved = (case.q[b].double().abs() @ error.T * case.scale).amax(dim=1)  # [heads]
        largest = rows[:, :200].double().abs().amax(dim=0) + error[:, :200].amax(dim=0)
        bound = ((2 * moved).exp() - 1)[:, None] * largest + error[:, :200].amax(dim=0)
        assert_close(out[b], exact[b], bound + kernel_bound[b] * 1.1)
        assert (rounded[b] - exact[b]).abs().max() > 1e-4  # rows are not the exact ones


def test_mla_decode_of_zero_fp8_rows_is_zero(isa):
    case = Fp8Case([100, 3], heads=5, latent=130)
    case.exact = torch.zeros_like(case.exact)
    case.encode()
    assert (case.check() == 0).all()


@pytest.mark.parametrize("position", [0, 64, 511, 599])
@pytest.mark.parametrize("column", [0, 127, 128, 150])
def test_mla_decode_shows_a_nan_in_fp8_rows(isa, position, column):
    case = Fp8Case([600, 600], heads=7, latent=140)
    clean = case.run()
    case.exact_row(0, position)[column] = math.nan
    case.encode()
    out = case.run()
    assert out[0].isnan().all()
    assert_same_bits(out[1], clean[1])


def test_mla_decode_of_fp8_rows_does_not_depend_on_batch_heads_or_threads(isa):
    case = Fp8Case([70, 1, 0, 1030], heads=20, latent=130)
    together = case.run()
    for b in range(4):
        assert_same_bits(case.run(slice(b, b + 1)), together[b : b + 1])
    for first, last in ((0, 1), (5, 12), (2, 20)):
        assert_same_bits(case.run(heads=slice(first, last)), together[:, first:last])
    for n in (1, 2, 4):
        with threads(n):
            assert_same_bits(case.run(), together)


def test_mla_decode_of_fp8_rows_writes_only_its_output(isa):
    # From an address that no row's scales are aligned at.
    case = Fp8Case([0, 70, 513], heads=7, latent=130, rope=2)
    moved = torch.empty(case.cache.numel() + 1, dtype=torch.uint8)[1:].view(case.cache.shape)
    moved.copy_(case.cache)
    out = Guarded(3, 7, 130, dtype=FP32)
    run_native(case, out, cache=moved.data_ptr(), cache_dtype=2)
    assert_same_bits(out.tensor, case.run())


def test_mla_decode_refuses_rows_of_another_size():
    case = Fp8Case([64])
    case.cache = case.cache[..., :-1].contiguous()
    with pytest.raises(ValueError, match=r"mla_decode: cache must be \[\*, \*, 100\] \(got \["):
        case.run()
    with pytest.raises(ValueError, match=r"mla_decode: cache must be .* fp8 \(2\) \(got 3\)"):
        run_native(Case([64]), Guarded(1, 3, 64, dtype=BF16), cache_dtype=3)


def test_mla_decode_reference_takes_fp8_rows():
    case = Fp8Case([70, 3], heads=3)
    with ops.backend("reference"):
        assert_close(case.run(), *case.expected(case.wide))


# ---- a model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_folders(tmp_path_factory.mktemp("tiny"))["int4"]


def logits(folder, rows: torch.dtype, backend: str = "native") -> torch.Tensor:
    """Of a prompt and of two tokens after it."""
    model, _ = load_model(folder, max_context=128, dtype="float32")
    cache = LatentCache(model.config, max_tokens=128, dtype=rows)
    seq = cache.new_sequence()
    with ops.backend(backend):
        steps = [model.prefill(torch.arange(70), cache, seq)]
        steps += [model.decode(torch.tensor([i]), cache, [seq])[0].clone() for i in (7, 8)]
    return torch.stack(steps)


def test_load_with_an_fp8_cache_moves_the_logits_little(folder):
    """e4m3 rounds a latent by at most 1/16, about 1/40 in the mean; attention averages over tokens."""
    exact, rounded = logits(folder, FP32), logits(folder, fp8_rows.DTYPE)
    spread = exact.std()
    assert 1e-4 * spread < (rounded - exact).square().mean().sqrt() < 0.5 * spread
    # Both backends round to the same bytes but where an activation's last bit decides.
    assert (rounded - logits(folder, fp8_rows.DTYPE, "reference")).abs().max() < 0.1 * spread


def test_load_with_an_fp8_cache_gives_the_same_bits_however_a_prompt_is_cut(folder):
    model = kn.load(folder, max_context=512, max_batch=1, cache="fp8")
    network, cache = model._engine._model, model._engine._cache
    assert (cache.dtype, cache.data.shape[-1]) == (torch.uint8, fp8_rows.row_bytes(*cache._widths))
    ids = torch.arange(300)
    results = []
    for cuts in ([300], [1, 300], [64, 65, 300], [33, 170, 299, 300]):
        seq, start = cache.new_sequence(), 0
        for stop in cuts:
            last = network.prefill(ids[start:stop], cache, seq)
            start = stop
        results.append((last, cache.read(1, cache.slots(seq, 0, 300))))
        cache.free(seq)
    for last, rows in results[1:]:
        assert_same_bits(last, results[0][0])
        assert_same_bits(rows, results[0][1])


def test_load_with_an_fp8_cache_generates_alone_as_in_a_batch(folder):
    model = kn.load(folder, max_context=128, max_batch=3, cache="fp8")
    options = {"raw_prompt": True, "max_tokens": 8, "seed": 5}
    prompts = ["Hello", "A", "Once upon a time"]
    together = model.generate(prompts, **options)
    assert [r.ids for r in together] == [model.generate(p, **options).ids for p in prompts]


def test_a_recorded_model_with_an_fp8_cache_has_the_bits_of_the_model(folder):
    model, _ = load_model(folder, max_context=128)
    cache = LatentCache(model.config, max_tokens=256, dtype=fp8_rows.DTYPE)
    recorded = RecordedModel(model, cache)
    ours, theirs = cache.new_sequence(), cache.new_sequence()
    for seq in (ours, theirs):
        model.prefill(torch.arange(60), cache, seq)
    for i in range(8):  # past a page's end
        ids = torch.tensor([i])
        expected = model.decode(ids, cache, [theirs]).clone()
        assert_same_bits(recorded.decode(ids, cache, [ours]), expected)


def test_load_refuses_another_cache(folder):
    with pytest.raises(
        kn.RequestError, match=r"load: cache must be one of exact, fp8 \(got int8\)"
    ):
        kn.load(folder, cache="int8")
