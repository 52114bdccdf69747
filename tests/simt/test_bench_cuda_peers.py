"""bench/cuda/peers.py without a GPU: what it says, and a rehearsal with our kernels in the shim. No time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simt import library_path, not_sanitized

pytestmark = not_sanitized

PEERS = Path(__file__).resolve().parents[2] / "bench" / "cuda" / "peers.py"


def peers(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, PEERS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rehearsed(*arguments: str) -> subprocess.CompletedProcess:
    return peers(*arguments, "--rehearse", str(library_path()), "--json")


def test_peers_says_in_one_line_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = peers()
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "peers: torch sees no GPU (with --rehearse LIBRARY none is needed)\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["no_such_op"], "OP must be of"), (["--tokens", "1,x"], "must be counts such as 1,16")],
)
def test_peers_refuses_with_a_word(arguments, says):
    result = peers(*arguments)
    assert result.returncode == 2
    assert says in result.stderr


@pytest.fixture(scope="module")
def torch_rows():
    """Every op beside torch, in one process: it starts slowly."""
    result = rehearsed("moe_experts", "mla_decode", "int4_gemm", "bf16_gemm", "--peer", "torch")
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("op", "peer"),
    [
        ("moe_experts", "torch-grouped-bf16"),
        ("mla_decode", "torch-bmm"),
        ("int4_gemm", "torch-bf16"),
        ("bf16_gemm", "torch-bf16"),
    ],
)
def test_peers_of_torch_agree_with_ours(torch_rows, op, peer):
    assert [row["limit"] for row in torch_rows[:2]] == ["copy", "bf16"]
    timed = [row for row in torch_rows if row["op"] == op]
    theirs = [row for row in timed if row["peer"]]
    assert {row["peer"] for row in theirs} == {peer}
    for row in theirs:
        ours = timed[timed.index(row) - 1]
        assert ours["peer"] is None
        assert ours["bytes"] == row["bytes"]
        assert row["ratio"] == pytest.approx(row["time_us"] / ours["time_us"], rel=1e-2, abs=1e-3)
        assert 0 <= row["difference"] <= 0.02


def test_peers_names_once_what_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "humming").mkdir()
    (tmp_path / "humming" / "__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    result = rehearsed("int4_gemm", "--peer", "humming")
    assert result.returncode == 0
    lines = result.stderr.splitlines()
    assert lines == ["peers: humming: left out: humming-kernels must be installed (not here)"]
    assert [row["op"] for row in map(json.loads, result.stdout.splitlines())][2:] == [
        "int4_gemm",
        "int4_gemm",  # ours alone, two token counts
    ]


def test_peers_of_another_result_end_the_run_with_1(tmp_path, monkeypatch):
    """A flashinfer whose attention is twice ours."""
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer" / "__init__.py").write_text("")
    (tmp_path / "flashinfer" / "mla.py").write_text(
        "class BatchMLAPagedAttentionWrapper:\n"
        "    def __init__(self, workspace, backend): pass\n"
        "    def plan(self, *args): pass\n"
        "    def run(self, q, q_rope, latent, rope): return q * 2\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    result = rehearsed("mla_decode", "--peer", "fa3", "--tokens", "1")
    assert result.returncode == 1
    assert "flashinfer-fa3: Different: its result is not ours for mla_decode tiny" in result.stderr


def test_peers_times_a_decode_step():
    result = rehearsed("step")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert (row["op"], row["tokens"], row["shape"]) == ("decode_step", 1, "k2-slice depth=10")
    assert row["limit_tokens_per_s"] > 0
    assert row["tokens_per_s"] == pytest.approx(1e6 / row["time_us"], rel=1e-3)
