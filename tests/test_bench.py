"""kimi-native bench: what it runs, what its rows hold, that a figure means what it says. No time is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench_cases import LIMITS, assert_row
from kimi_native import cli, ops
from kimi_native.bench import (
    e2e,
    native,
    plot,
)
from kimi_native.bench.rows import (
    Limits,
    make_row,
    read_rows,
    row_line,
)
from kimi_native.errors import RequestError
from kimi_native.loader import load_model
from kimi_native.make_checkpoint import make_checkpoint


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [native.PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "tiny"
    make_checkpoint(path, format="int4")
    return path


# ---- the native program ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_rows():
    """Every program on its tiny shapes."""
    result = program("--shape", "tiny", "--quick", "--json", "--threads", "1")
    assert result.returncode == 0, result.stderr
    return json_lines(result.stdout)


def test_kernels_times_every_op(tiny_rows):
    timed = [row for row in tiny_rows if row["op"] != "limits"]
    assert {row["op"] for row in timed} == {*ops.__all__, "moe_layer"}
    for row in timed:
        assert_row(row)
        assert row["threads"] == 1
        assert row["isa"] in ops.supported_isas()
        assert 0 <= row["others"] <= 1
        assert (row["percent_of_limit"] is None) == (row["limit"] == "cache")


def test_kernels_says_what_the_limits_are(tiny_rows):
    limits = [row for row in tiny_rows if row["op"] == "limits"]
    reads = [row for row in limits if row["limit"] == "read"]
    assert {row["pages"] for row in reads} == {"4 KiB", "2 MiB"}
    assert "plain" in {row["pattern"] for row in reads}
    assert all(row["gb_per_s"] > 0 for row in reads)
    peaks = {row["limit"]: row["gflop_per_s"] for row in limits if row["limit"] != "read"}
    assert all(rate > 0 for rate in peaks.values())
    features = ops.cpu_features()
    assert {"int8_dot", "int16_dot"} <= peaks.keys() or "avx512vnni" not in features
    assert "fp16" in peaks or "avx512fp16" not in features


def test_kernels_narrows_to_one_case():
    result = program(
        *("int4_gemm", "--shape", "tiny", "--tokens", "3", "--threads", "1"),
        *("--time-budget", "0.01", "--quick", "--json"),
    )
    timed = [row for row in json_lines(result.stdout) if row["op"] != "limits"]
    assert [(row["op"], row["tokens"]) for row in timed] == [("int4_gemm", 3)]


@pytest.mark.parametrize(
    ("op", "tokens", "shape", "limbs", "compute"),
    [
        ("mla_decode", 1, "moonlight heads=16 length=1024", False, "exact"),
        ("int4_gemm", 32, "moonlight gate/up", True, "exact"),
        ("int4_gemm", 32, "moonlight gate/up", True, "int8"),
    ],
)
def test_kernels_percent_is_that_of_the_binding_limit(op, tokens, shape, limbs, compute):
    """Cold weights: the row's percentage follows from the limits printed above it, by the rule that rows.py has too."""
    case = (op, "--shape", shape, "--tokens", str(tokens), "--compute", compute)
    result = program(*case, "--threads", "1", "--quick", "--json")
    rows = json_lines(result.stdout)
    row = rows[-1]
    read = max(r["gb_per_s"] for r in rows if r["op"] == "limits" and r["limit"] == "read")
    peaks = {r["limit"]: r["gflop_per_s"] for r in rows[:-1] if r["limit"] != "read"}
    seconds = row["time_us"] * 1e-6
    flops = row["gflop_per_s"] * seconds * 1e9
    limit, percent = Limits(1, read, peaks).share(
        seconds, row["bytes"], flops, limbs=limbs, isa=row["isa"], compute=compute
    )
    assert row["compute"] == compute
    assert row["limit"] == limit
    assert row["percent_of_limit"] == pytest.approx(percent, rel=5e-3)


def test_kernels_checks_what_8_bits_give():
    """Every INT4 op on its small shape: the program fails where a result is further off than 8 bits may be."""
    ops = ("int4_gemm", "int4_grouped_swiglu", "int4_grouped_gemm", "moe_layer")
    options = ("--shape", "tiny", "--threads", "1", "--quick", "--json", "--compute", "int8")
    rows = [r for r in json_lines(program(*ops, *options).stdout) if r["op"] != "limits"]
    assert {row["op"] for row in rows} == set(ops)
    assert {row["compute"] for row in rows} == {"int8"}


def test_kernels_runs_the_forced_tier():
    case = ("swiglu", "--shape", "tiny", "--threads", "1", "--quick", "--json")
    result = program(*case, KIMI_NATIVE_CPU_ISA="generic")
    assert {row["isa"] for row in json_lines(result.stdout) if row["op"] != "limits"} == {"generic"}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["no_such_op"], 2, "no_such_op: no such program"),
        (["--tokens", "none"], 2, "--tokens: must be positive numbers (got none)"),
        (["--tokens", "1.5"], 2, "--tokens: must be counts"),
        (["--time-budget", "0"], 2, "--time-budget: must be positive"),
        (["--pages", "1g"], 2, "--pages: must be 4k or 2m (got 1g)"),
        (["--compute", "int7"], 2, "--compute: must be exact or int8 (got int7)"),
        (["--no-such-option", "1"], 2, "--no-such-option: unknown option"),
        (["--threads"], 2, "--threads: a value must follow"),
        (["swiglu", "--shape", "nowhere", "--quick", "--threads", "1"], 1, "no case matches"),
    ],
)
def test_kernels_refuses_with_a_word(arguments, code, says):
    result = program(*arguments)
    assert result.returncode == code
    assert says in result.stderr
    assert result.stdout.startswith("#") or result.stdout == ""


def test_kernels_fails_where_its_results_cannot_be_written():
    case = ["swiglu", "--shape", "tiny", "--threads", "1", "--quick"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [native.PROGRAM, *case], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (result.returncode, result.stderr) == (1, "kn_bench: the results could not be written\n")


def test_bench_hands_its_options_to_the_program(monkeypatch):
    given = []
    monkeypatch.setattr(native, "run_program", lambda arguments: given.append(arguments) or 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert cli.main(["bench", "limits", "--threads", "1,2", "--json"]) == 0
    options = ["--threads", "1", "--tokens", "1,8", "--shape", "k2 gate", "--time-budget", "0.5"]
    options += ["--pages", "4k", "--compute", "int8"]
    assert cli.main(["bench", "kernels", "int4_gemm", *options, "--quick"]) == 0
    assert given == [
        ["limits", "--threads", "1,2", "--json"],
        ["int4_gemm", *options, "--quick"],
    ]


@pytest.mark.parametrize(
    "arguments",
    [["limits"], ["kernels", "int4_gemm"], ["e2e"], ["peers"]],
    ids=lambda arguments: arguments[0],
)
def test_bench_refuses_more_threads_than_cores(monkeypatch, capsys, arguments):
    """They would wait for each other by turns, for minutes where there are hundreds."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert cli.main(["bench", *arguments, "--threads", "3"]) == 1
    assert "bench: threads must be at most the 2 cores (got 3)" in capsys.readouterr().err


def test_bench_tells_a_signal_as_a_shell_does(monkeypatch, tmp_path):
    ended = tmp_path / "kn_bench"
    ended.write_text("#!/bin/sh\nkill -TERM $$\n")
    ended.chmod(0o755)
    monkeypatch.setattr(native, "PROGRAM", ended)
    assert cli.main(["bench", "limits"]) == 128 + 15


def test_bench_says_when_the_program_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native, "PROGRAM", tmp_path / "kn_bench")
    assert cli.main(["bench", "limits"]) == 1
    assert "KN_BENCH=OFF" in capsys.readouterr().err


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("isa", "nbytes", "flops", "limbs", "limit", "percent"),
    [
        (
            "avx512",
            1e9,
            1e9,
            False,
            "read",
            10.0,
        ),  # 0.1 s of reading against 0.01 s of sums, in 1 s
        ("avx512", 1e9, 50e9, False, "fp32", 50.0),
        ("avx512", 1e9, 50e9, True, "int8_dot/2", 25.0),  # twice the fp32 peak
        ("amx", 1e9, 200e9, False, "amx_bf16", 20.0),
        ("amx", 1e9, 500e9, True, "amx_int8/2", 49.98),
    ],
)
def test_limits_share_is_of_what_binds(isa, nbytes, flops, limbs, limit, percent):
    assert LIMITS.share(1.0, nbytes, flops, limbs=limbs, isa=isa) == (limit, percent)


def test_limits_share_counts_dots_where_both_factors_are_bf16():
    assert LIMITS.share(1.0, 1e9, 80e9, limbs=False, dots=True, isa="avx512") == ("bf16_dot", 50.0)
    assert LIMITS.share(1.0, 1e9, 50e9, limbs=False, dots=True, isa="avx2") == ("fp32", 50.0)
    one_limb = {"limbs": True, "compute": "int8"}
    assert LIMITS.share(1.0, 1e9, 200e9, isa="avx512", **one_limb) == ("int8_dot", 50.0)
    of_a_peer = {"limbs": True, "compute": "w4a8"}
    assert LIMITS.share(1.0, 1e9, 200e9, isa="avx512", **of_a_peer) == ("int8_dot", 50.0)
    assert LIMITS.share(1.0, 1e9, 1000e9, isa="amx", **one_limb) == ("amx_int8", 49.98)


def test_row_is_the_median_with_its_spread():
    row = make_row(
        "int4_gemm", "a", 4, [1.0, 2.0, 3.0, 4.0], limits=LIMITS, nbytes=5e9, flops=10e9, isa="avx2"
    )
    assert_row(row)
    assert row["time_us"] == 2.5e6
    assert row["spread"] == round(0.5 * (4 - 2) / 2.5, 4)
    assert (row["limit"], row["percent_of_limit"]) == ("read", 20.0)
    assert "4 samples" in row_line(row)
    assert row_line(row).startswith("int4_gemm  ")
    assert row_line({**row, "compute": "int8"}).startswith("int4_gemm (int8)  ")


def test_read_rows_names_the_line_that_is_none(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('{"op": "limits"}\n\n{"op": 1')
    with pytest.raises(ValueError, match="line 3 must be a JSON object"):
        read_rows(file)
    file.write_text("[1]")
    with pytest.raises(ValueError, match="line 1 must be a row"):
        read_rows(file)
    timed = {"op": "a", "shape": "s", "threads": 1, "tokens": 1, "percent_of_limit": 50}
    for field in ("shape", "threads", "tokens"):
        file.write_text(json.dumps({**timed, field: None}))
        with pytest.raises(ValueError, match=f"line 1 must have a right {field} \\(got None"):
            read_rows(file)
    file.write_bytes(b"\xff")
    with pytest.raises(RequestError, match="must be UTF-8 text"):
        read_rows(file)


# ---- whole models ---------------------------------------------------------------------------------------------------


def test_e2e_counts_the_bytes_that_a_token_reads(folder):
    """As `inspect` counts them from the files, without the 16 bytes that tell each INT4 matrix its shape."""
    model, checkpoint = load_model(folder, max_context=64)
    nbytes, flops = e2e.weights_per_token(model)
    summary = checkpoint.summary()
    quantized = [n for n in checkpoint.tensors if n.endswith(".weight_shape")]
    config = checkpoint.config
    shapes = sum(checkpoint.tensors[n].nbytes for n in quantized)
    shapes = shapes * config.num_experts_per_tok // config.n_routed_experts
    assert nbytes == summary["bytes_per_decoded_token"]["total"] - shapes
    embedding = config.vocab_size * config.hidden_size
    assert flops == 2 * (summary["parameters"]["active_per_token"] - embedding)


# Bytes of a cached token: 4 layers of 64 + 16 bf16 values, or of 64 bytes, a scale and 16 bf16 values.
@pytest.mark.parametrize(
    ("dense", "cache", "compute", "token_bytes"),
    [
        ("bf16", "exact", "exact", 640),
        ("int8", "exact", "exact", 640),
        ("int4", "exact", "int8", 640),
        ("bf16", "fp8", "exact", 4 * (64 + 4 + 32)),
    ],
)
def test_e2e_measures_a_folder(folder, thread_counts, dense, cache, compute, token_bytes):
    rows = []
    e2e.measure(
        str(folder),
        limits=LIMITS,
        prompt_tokens=8,
        new_tokens=3,
        depths=[1, 100],
        dense=dense,
        cache=cache,
        compute=compute,
        report=rows.append,
    )
    assert [row["op"] for row in rows] == ["e2e_prefill", "e2e_decode", "e2e_decode", "e2e_load"]
    for row in rows:
        assert_row(row)
        assert (row["threads"], row["dense"], row["cache"]) == (1, dense, cache)
        assert row["compute"] == compute
    prefill, first, last, load = rows
    assert prefill["tokens_per_s"] == pytest.approx(8e6 / prefill["time_us"], rel=1e-3)
    grown = last["cache_bytes"] - first["cache_bytes"]
    assert last["bytes"] - first["bytes"] == grown == 99 * token_bytes
    assert first["limit_tokens_per_s"] == pytest.approx(10e9 / first["bytes"], rel=1e-3)
    assert load["percent_of_limit"] is None
    assert load["peak_rss_bytes"] > load["file_bytes"] > 0
    table = list(e2e.growth_table(rows, LIMITS.read_gb_per_s))
    assert len(table) == 4  # head, two depths, the slope
    assert f"{token_bytes / 1e4:.3f} ms" in table[-1]  # 1000 tokens at 10 GB/s
    assert f"{load['file_bytes'] / 1e9:.2f} GB" in e2e.memory_line(load)
    assert "tiny" in list(e2e.size_table(rows))[1]


@pytest.mark.parametrize(
    "wrong", [{"prompt_tokens": 0}, {"new_tokens": 0}, {"depths": []}, {"depths": [1, 0]}]
)
def test_e2e_refuses_counts_below_one(folder, wrong):
    counts = {"prompt_tokens": 8, "new_tokens": 1, "depths": [1], **wrong}
    with pytest.raises(RequestError, match=next(iter(wrong))):
        e2e.measure(str(folder), limits=LIMITS, report=print, **counts)


def test_e2e_of_the_command_makes_a_model_itself(capsys, thread_counts):
    options = ["--quick", "--threads", "1", "--prompt-tokens", "4", "--new-tokens", "2"]
    assert cli.main(["bench", "e2e", *options, "--depths", "1,2", "--json"]) == 0
    rows = json_lines(capsys.readouterr().out)
    assert rows[0]["op"] == "limits"
    assert [row["shape"] for row in rows if row["op"] != "limits"] == [
        *("tiny", "tiny depth=1", "tiny depth=2", "tiny")
    ]


@pytest.mark.parametrize("options", [[], ["--cold", "--no-prefetch"]], ids=str)
def test_load_measures_a_folder_against_its_plan(folder, options):
    """In a process of its own: the peak of this one is that of its other tests."""
    command = [sys.executable, "-m", "kimi_native", "bench", "load", str(folder), "--json"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    (row,) = json_lines(result.stdout)
    assert (row["page_cache"], row["prefetch"]) == (
        ("cold", False) if options else ("as it was", True)
    )
    assert 0 < row["before_weights_s"] <= row["load_s"]
    assert 0 < row["private_bytes"] < row["peak_bytes"] <= row["plan_bytes"]
    assert row["private_bytes"] <= row["plan_private_bytes"]
    assert row["first_token"]["minor_faults"] >= row["second_token"]["minor_faults"]


def test_load_refuses_a_context_that_no_prompt_can_fill(folder, capsys):
    assert cli.main(["bench", "load", str(folder), "--max-context", "63"]) == 1
    assert "max_context must be at least 64 (got 63)" in capsys.readouterr().err


def test_e2e_of_several_folders_runs_each_in_its_own_process(folder, capfd):
    options = ["--quick", "--threads", "1", "--new-tokens", "2", "--depths", "1"]
    assert cli.main(["bench", "e2e", str(folder), str(folder), *options]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3  # a head and a line per folder
    assert all(line.startswith("tiny ") for line in lines[1:])


def test_e2e_table_of_folders_of_one_name():
    """Each line has its own folder's figures: those of its first depth."""

    def rows(gigabytes: int, times_ms: tuple[int, ...]) -> list[dict]:
        decode = [
            {"op": "e2e_decode", "shape": f"model depth={i}", "bytes": 1e9, "time_us": 1e3 * ms}
            for i, ms in enumerate(times_ms)
        ]
        load = {"op": "e2e_load", "shape": "model", "file_bytes": 1e9 * gigabytes, "load_s": 0.1}
        return [{"op": "limits"}, *({**d, "percent_of_limit": 50} for d in decode), load]

    _, first, second = e2e.size_table(rows(2, (10, 11)) + rows(3, (20, 21)))
    assert first.split() == ["model", "2.00", "0.10", "1.000", "10.00", "50"]
    assert second.split() == ["model", "3.00", "0.10", "1.000", "20.00", "50"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere: must be a model folder (found none)"),
        (["GOOD", "nowhere"], "nowhere: must be a model folder (found none)"),
        (["GOOD", "--depths", "9000"], "e2e: max_context must be 1 to 8192 (got 9034)"),
        (["GOOD", "--new-tokens", "-1"], "e2e: new_tokens must be at least 1 (got [-1])"),
        (["GOOD", "--prompt-tokens", "0"], "e2e: prompt_tokens must be at least 1 (got [0])"),
    ],
    ids=" ".join,
)
def test_e2e_refuses_before_it_measures(folder, monkeypatch, capsys, arguments, says):
    monkeypatch.setattr("kimi_native.bench.rows.program_rows", None)
    monkeypatch.setattr("kimi_native.bench.command._e2e_folders", None)
    arguments = [str(folder) if word == "GOOD" else word for word in arguments]
    assert cli.main(["bench", "e2e", *arguments]) == 1
    assert capsys.readouterr() == ("", f"kimi-native: error: {says}\n")


@pytest.mark.parametrize("option", ["--dtype", "--dense", "--cache"])
@pytest.mark.parametrize("verb", ["e2e", "load"])
def test_bench_knows_the_forms_of_a_model(capsys, verb, option):
    with pytest.raises(SystemExit):
        cli.main(["bench", verb, "a", option, "bf17"])
    assert f"{option}: invalid choice: 'bf17'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["e2e", "a", "--preset", "tiny"], "folders or --preset"),
        (["e2e", "a", "--depths", "1,x"], "--depths must be counts"),
        (["e2e", "a", "--threads", "0"], "threads must be at least 1"),
        (["peers", "no_such_op"], "op must be one of"),
        (["peers", "--model", "a"], "both --model and --gguf"),
        (["peers", "e2e"], "needs --model and --gguf"),
        (["peers", "--model", "nowhere", "--gguf", "a"], "nowhere: must be a model folder"),
        (["peers", "--time-budget", "-1"], "budget must be positive seconds (got -1.0)"),
        (["peers", "--time-budget", "0"], "budget must be positive seconds (got 0.0)"),
        (["peers", "--time-budget", "nan"], "budget must be positive seconds (got nan)"),
        (["peers", "--tokens", ""], "--tokens must be counts"),
    ],
)
def test_bench_refuses_with_a_word(arguments, says, capsys):
    assert cli.main(["bench", *arguments]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["e2e", "peers"])
def test_bench_refuses_a_missing_tier_before_it_measures(verb):
    command = [sys.executable, "-m", "kimi_native", "bench", verb, "--json"]
    environment = {**os.environ, "KIMI_NATIVE_CPU_ISA": "no_such_tier"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stdout) == (1, "")
    assert "KIMI_NATIVE_CPU_ISA=no_such_tier is not available here" in result.stderr


# ---- plot -----------------------------------------------------------------------------------------------------------


def some_rows() -> list[dict]:
    options = {"limits": LIMITS, "nbytes": 1e9, "flops": 1e9, "isa": "avx2"}
    rows = [make_row("int4_gemm", "a", n, [0.1 * n], **options) for n in (1, 4, 16)]
    rows.append(make_row("int4_gemm", "a", 1, [0.4], **options, peer="torch-int4", ratio=2.0))
    rows.append({**rows[0], "op": "swiglu", "limit": "cache", "percent_of_limit": None})
    return [{"op": "limits", "threads": 1, "limit": "read", "gb_per_s": 10.0}, *rows]


def test_plot_draws_shares_by_tokens():
    assert plot.curves(some_rows(), None) == {
        "int4_gemm": {"a": {1: 100.0, 4: 25.0, 16: 6.25}, "a, torch-int4": {1: 25.0}}
    }
    assert plot.curves(some_rows(), 2) == {}


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows, out = tmp_path / "rows.json", tmp_path / "out.png"
    rows.write_text("\n".join(map(json.dumps, some_rows())))
    assert cli.main(["bench", "plot", str(rows), str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_rows_without_cases(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(some_rows()[0]))
    assert cli.main(["bench", "plot", str(rows), str(tmp_path / "out.png")]) == 1
    assert "must hold timed cases" in capsys.readouterr().err


def test_plot_says_that_matplotlib_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rows = tmp_path / "rows.json"
    rows.write_text("\n".join(map(json.dumps, some_rows())))
    assert cli.main(["bench", "plot", str(rows), str(tmp_path / "out.png")]) == 1
    assert "pip install 'kimi-native[bench]'" in capsys.readouterr().err
