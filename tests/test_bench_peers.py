"""kimi-native bench peers: turns, guarded engines, and results that must be ours. No time is judged here."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from bench_cases import LIMITS, PEAKS, assert_row
from kimi_native.bench import load, peer_int4, peer_llama, peer_moe, peers, turns
from kimi_native.bench.load import OtherLoad
from kimi_native.bench.problem import PeerMissing, num_copies
from kimi_native.bench.rows import PEER_FIELDS, Limits, limits_line
from kimi_native.errors import RequestError
from kimi_native.make_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "tiny"
    make_checkpoint(path, format="int4")
    return path


def compare(*named: str, peer: str = "torch", **options) -> list[dict]:
    selection = peers.Selection(ops=named, peer=peer, shape="tiny", budget_s=0.05, **options)
    return list(peers.compare(selection, LIMITS, skipped=pytest.fail))


@pytest.mark.parametrize("op", peers.PROBLEMS)
def test_peers_of_torch_take_turns_with_ours(op, thread_counts):
    rows = compare(op, quick=True)
    assert len(rows) >= 2
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert_row(ours)
        assert_row(theirs)
        assert set(PEER_FIELDS) <= set(ours) & set(theirs)
        assert (ours["peer"], ours["ratio"], ours["compute"]) == (None, None, "exact")
        assert theirs["peer"].startswith("torch-")
        assert theirs["ratio"] == pytest.approx(theirs["time_us"] / ours["time_us"], rel=0.01)
        same = ("op", "shape", "tokens", "threads", "bytes")
        assert [ours[k] for k in same] == [theirs[k] for k in same]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_peers_that_run_graphs_give_our_result(engine, thread_counts):
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    rows = compare("int4_gemm", peer=engine, tokens=(2,))
    assert {row["compute"] for row in rows if row["peer"]} == {"exact", "w4a8"}


def test_peers_kt_kernel_gives_our_result(thread_counts, capfd):
    """What it prints by itself does not come among our rows."""
    pytest.importorskip("kt_kernel", reason="kt-kernel is not installed")
    rows = compare("moe_layer", peer="kt-kernel", tokens=(1, 20))
    names = ["kt-kernel", "kt-kernel", "kt-kernel-spare", "kt-kernel-spare"]
    assert [row["peer"] for row in rows if row["peer"]] == names
    assert capfd.readouterr().out == ""
    with pytest.raises(RequestError, match="tokens must be at most 4096"):
        compare("moe_layer", peer="kt-kernel", tokens=(5000,))


@pytest.mark.parametrize("op", ["int4_gemm", "moe_layer", "bf16_gemm"])
def test_peers_of_ours_in_8_bits(op, thread_counts):
    """Our INT4 products, held against one limb's peak; what has no such form stays exact."""
    rows = compare(op, tokens=(2,), compute="int8")
    assert [row["compute"] for row in rows if row["peer"] is None] == [
        "exact" if op == "bf16_gemm" else "int8"
    ]
    assert {row["limit"] for row in rows if row["compute"] == "int8"}.isdisjoint(
        {"int8_dot/2", "amx_int8/2"}
    )


def test_peers_problem_computes_in_8_bits():
    problem = peer_int4.Int4Gemm("tiny", 64, 128)
    problem.set_tokens(2)
    exact = problem.ours(0).float()
    problem.compute = "int8"
    error = (problem.ours(0).float() - exact).norm() / exact.norm()
    assert 1e-3 < error < peers.TOLERANCES["int8"]


@pytest.mark.parametrize("nothing", [{"shape": "nowhere"}, {"peer": "nobody"}], ids=str)
def test_peers_refuses_to_compare_nothing(thread_counts, nothing):
    selection = peers.Selection(**{"shape": "tiny", "budget_s": 0.01, **nothing})
    with pytest.raises(RequestError, match="no case matches"):
        list(peers.compare(selection, LIMITS, skipped=pytest.fail))


def test_peers_refuses_a_gguf_that_is_no_file(folder, tmp_path):
    selection = peers.Selection(model=str(folder), gguf=str(tmp_path))
    with pytest.raises(RequestError, match="gguf must be a file"):
        peers.check(selection)


def test_peers_skips_by_name_what_is_not_installed(monkeypatch, thread_counts):
    for engine in ("onnxruntime", "onnx", "openvino", "kt_kernel"):
        monkeypatch.setitem(sys.modules, engine, None)
    skipped = []
    selection = peers.Selection(
        ops=("int4_gemm",), peer="o", shape="tiny", budget_s=0.01, quick=True
    )
    rows = list(peers.compare(selection, LIMITS, skipped=skipped.append))
    assert {row["peer"] for row in rows} == {None, "torch-int4"}
    assert len(skipped) == 2
    assert "onnxruntime and onnx must be installed" in skipped[0]
    assert "openvino must be installed" in skipped[1]
    selection = peers.Selection(ops=("moe_layer",), peer="kt", shape="tiny", budget_s=0.01)
    assert list(peers.compare(selection, LIMITS, skipped=skipped.append)) == []
    assert "kt-kernel must be installed" in skipped[2]


@pytest.mark.parametrize(
    ("contestant", "op"), [(peer_int4.TorchInt4, "int4_gemm"), (peer_moe.TorchLoop, "moe_layer")]
)
def test_peers_refuses_a_result_that_is_not_ours(monkeypatch, thread_counts, contestant, op):
    right = contestant.__call__
    monkeypatch.setattr(contestant, "__call__", lambda self, call: right(self, call) * 1.05)
    with pytest.raises(RuntimeError, match=f"{contestant.name} must give our result for {op}"):
        compare(op, quick=True)


def test_take_turns_gives_both_their_turns(monkeypatch):
    """Turns alternate, every call has a number of its own, and the first of a turn is not counted."""
    clock = [0.0]
    calls = []
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.05)
    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(turns.time, "sleep", lambda seconds: None)

    def engine(name: str, seconds: float):
        def solve(call: int) -> None:
            calls.append((name, call))
            clock[0] += seconds

        return solve

    ours, theirs = turns.take_turns(engine("a", 0.03), engine("b", 0.05), 4, budget_s=0.5)
    assert ours == pytest.approx([0.03] * len(ours))
    assert theirs == pytest.approx([0.05 / 4] * len(theirs))
    assert min(len(ours), len(theirs)) >= turns.FEWEST_SAMPLES
    assert [name for name, _ in calls[:7]] == ["a", "a", "a", "b", "b", "a", "a"]
    for name, samples in (("a", ours), ("b", theirs)):
        numbers = [call for who, call in calls if who == name]
        assert sorted(set(numbers)) == list(range(len(samples) + 1))


def test_other_load_is_that_of_others():
    """What a process computes is others' work, unless it is known; also on a machine where it has to wait."""
    spin = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(spin, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        alone, together = OtherLoad(), OtherLoad([other.pid])
        began, started = load._own_ticks([other.pid]), time.perf_counter()
        while (spent := load._own_ticks([other.pid]) - began) < 30:
            assert time.perf_counter() < started + 60
            time.sleep(0.01)
        known, unknown = together.share(), alone.share()
        other.kill()
    ticks = (time.perf_counter() - started) * os.sysconf("SC_CLK_TCK")
    # Each of the seven counters read may be off by a tick or two.
    assert unknown - known > (spent - 12) / ticks / os.sysconf("SC_NPROCESSORS_ONLN")


def test_other_load_is_not_that_of_a_child_that_ended():
    began = load._own_ticks([os.getpid()])
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    assert load._own_ticks([os.getpid()]) - began >= 25  # of 30 at 100 a second


def test_limits_line_tells_a_disturbed_machine():
    assert "others" not in limits_line(LIMITS)
    assert limits_line(Limits(1, 10.0, PEAKS, 0.4)).endswith("G/s | others 40 %")


def test_problem_rotates_through_more_than_the_cache(monkeypatch):
    monkeypatch.setattr("kimi_native.bench.problem.last_level_cache_bytes", lambda: 100)
    assert [num_copies(n) for n in (1, 60, 200, 1000)] == [200, 4, 2, 2]


# ---- llama.cpp, in a process of its own -----------------------------------------------------------------------------

FAKE_LLAMA = """
import ctypes
__version__ = "fake"
llama_token = ctypes.c_int32
_logits = (ctypes.c_float * 16)()
def llama_log_callback(f): return f
def llama_log_set(f, data): pass
def llama_backend_init(): pass
def llama_model_default_params(): return None
def llama_model_load_from_file(path, params): return None if b"refused" in path else 1
class Settings: pass
llama_context_default_params = Settings
def llama_init_from_model(model, settings): return 1
def llama_get_memory(context): return 1
def llama_model_get_vocab(model): return 1
def llama_vocab_n_tokens(vocab): return 16
def llama_n_batch(context): return 8
def llama_memory_seq_rm(memory, sequence, first, last): pass
def llama_batch_get_one(array, n): return n
def llama_decode(context, n):
    assert n <= 8
    return 0
def llama_get_logits_ith(context, i): return ctypes.cast(_logits, ctypes.POINTER(ctypes.c_float))
print("a library that prints to stdout")
"""


@pytest.fixture
def fake_llama(tmp_path, monkeypatch):
    """A llama_cpp module that does nothing, before any other that is installed."""
    module = tmp_path / "llama_cpp.py"
    module.write_text(FAKE_LLAMA)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return module


def test_peers_llama_is_timed_beside_a_folder(fake_llama, folder, thread_counts):
    options = {"model": str(folder), "gguf": "made.gguf", "tokens": (20,)}
    rows = compare("e2e", **options)
    assert [(row["op"], row["peer"]) for row in rows] == [
        ("e2e_prefill", None),
        ("e2e_prefill", "llama-cpp"),
        ("e2e_decode", None),
        ("e2e_decode", "llama-cpp"),
    ]
    for row in rows:
        assert_row(row)
        assert row["tokens_per_s"] > 0


def test_peers_llama_says_what_ended_it(fake_llama):
    with pytest.raises(RuntimeError, match=r"refused\.gguf: llama\.cpp must be able to load it"):
        peer_llama.Llama("refused.gguf", threads=1, max_context=64)


def test_peers_llama_is_skipped_by_name(fake_llama, folder):
    fake_llama.write_text("raise ImportError('not here')")
    with pytest.raises(PeerMissing, match="llama-cpp-python must be installed"):
        peer_llama.Llama("a.gguf", threads=1, max_context=64)
    skipped = []
    selection = peers.Selection(ops=("e2e",), model=str(folder), gguf="a.gguf")
    assert list(peers.compare(selection, LIMITS, skipped=skipped.append)) == []
    assert "llama-cpp-python must be installed (not here)" in skipped[0]
