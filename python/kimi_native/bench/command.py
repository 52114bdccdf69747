"""`kimi-native bench`: the arguments of its verbs, and what each prints."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from kimi_native.argument_files import read_text
from kimi_native.errors import RequestError
from kimi_native.model_arguments import add_compute, add_dense, add_forms

DEFAULT_DEPTHS = "1,512,4096"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verbs limits, kernels, e2e, load, logits, peers and plot; each sets `bench_run`."""
    verbs = parser.add_subparsers(dest="bench_verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], help: str) -> Any:
        sub = verbs.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(bench_run=run)
        return sub

    def measured(sub: Any) -> Any:
        sub.add_argument("--quick", action="store_true", help="fewer cases and samples")
        sub.add_argument("--json", action="store_true", help="one JSON object per line")
        return sub

    limits = measured(verb("limits", _limits, "measure read bandwidth and arithmetic peaks"))
    limits.add_argument("--threads", metavar="N,...", help="thread counts (default: 1 and all)")
    kernels = measured(verb("kernels", _kernels, "time every op against this machine's limits"))
    kernels.add_argument("ops", nargs="*", metavar="OP", help="int4_gemm, moe_layer, ... or all")
    kernels.add_argument("--threads", metavar="N,...", help="thread counts (default: 1 and all)")
    kernels.add_argument("--tokens", metavar="N,...", help="token counts instead of the usual")
    kernels.add_argument("--shape", metavar="TEXT", help="shapes whose text contains this")
    kernels.add_argument("--time-budget", metavar="S", help="seconds for one case (0.3)")
    kernels.add_argument("--pages", choices=("4k", "2m"), help="pages under the weights (2m)")
    add_compute(kernels)
    _add_e2e(measured(verb("e2e", _e2e, "time whole models: prefill, decode, memory, growth")))
    _add_load(verb("load", _load, "time loading, page faults and memory of a folder"))
    _add_logits(verb("logits", _logits, "tell what load()'s inexact options do to the logits"))
    _add_peers(measured(verb("peers", _peers, "time other engines and ours in one run")))
    plot = verb("plot", _plot, "draw percent of limit by token count")
    plot.add_argument("rows", metavar="ROWS.json", help="what --json printed; -: stdin")
    plot.add_argument("out", metavar="OUT.png", help="picture to write; .svg and .pdf work too")
    plot.add_argument("--threads", type=int, metavar="N", help="rows of this count (default: most)")


def _add_e2e(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", metavar="DIR", help="checkpoint folders")
    parser.add_argument(
        "--preset", metavar="NAME", help="make this one, in INT4, instead (default: tiny)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: the cores there are")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="of the timed prefill (512)")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="decoded at each depth (32)")
    parser.add_argument("--depths", metavar="N,...", help=f"tokens before ({DEFAULT_DEPTHS})")
    add_forms(parser)
    add_compute(parser)


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="checkpoint folder")
    parser.add_argument("--cold", action="store_true", help="drop its files from the cache first")
    parser.add_argument(
        "--no-prefetch", dest="prefetch", action="store_false", help="as of generate"
    )
    parser.add_argument("--max-context", type=int, default=2048, metavar="N", help="tokens (2048)")
    add_forms(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_logits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="DIR", help="checkpoint (default: kimi-nano)")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line (default: three)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="of each answer")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")


def _add_peers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="OP", help="int4_gemm, moe_layer, ... or all")
    parser.add_argument("--peer", metavar="TEXT", help="peers whose name contains this")
    parser.add_argument("--shape", metavar="TEXT", help="shapes whose text contains this")
    parser.add_argument("--tokens", metavar="N,...", help="token counts instead of the usual")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the cores there are")
    parser.add_argument("--time-budget", type=float, metavar="S", help="seconds for one pair (2)")
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder for e2e")
    parser.add_argument("--gguf", metavar="FILE", help="the same model for llama.cpp, for e2e")
    add_dense(parser)
    add_compute(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the verb that was parsed; returns the exit code."""
    return args.bench_run(args)


# ---- the native program ---------------------------------------------------------------------------------------------


def _limits(args: argparse.Namespace) -> int:
    return _program(args, ["limits"], ("threads",))


def _kernels(args: argparse.Namespace) -> int:
    return _program(
        args, args.ops, ("threads", "tokens", "shape", "time_budget", "pages", "compute")
    )


def _program(args: argparse.Namespace, programs: list[str], options: tuple[str, ...]) -> int:
    from kimi_native.bench.native import run_program

    arguments = list(programs)
    for name in options:
        if (value := getattr(args, name)) is not None:
            arguments += ["--" + name.replace("_", "-"), value]
    counts = [int(p) for p in (args.threads or "").split(",") if p.isascii() and p.isdigit()]
    _check_cores(max(counts, default=1))  # what is no count the program refuses
    arguments += [f"--{name}" for name in ("quick", "json") if getattr(args, name)]
    sys.stdout.flush()
    return run_program(arguments)


# ---- e2e ------------------------------------------------------------------------------------------------------------


def _e2e(args: argparse.Namespace) -> int:
    if args.folders and args.preset:
        raise RequestError("bench e2e: give folders or --preset, not both")
    _threads(args)
    for folder in args.folders:
        _check_e2e(args, folder)
    if len(args.folders) > 1:
        return _e2e_folders(args)
    with _folder(args) as folder:
        _e2e_one(args, folder)
    return 0


def _e2e_counts(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "prompt_tokens": _given(args.prompt_tokens, 64 if args.quick else 512),
        "new_tokens": _given(args.new_tokens, 4 if args.quick else 32),
        "depths": _counts(
            "--depths", _given(args.depths, "1,256" if args.quick else DEFAULT_DEPTHS)
        ),
    }


def _check_e2e(args: argparse.Namespace, folder: str) -> None:
    """Before the machine is measured, and before a first folder of several is."""
    from kimi_native.bench import e2e

    e2e.check(folder, **_e2e_counts(args))


@contextlib.contextmanager
def _folder(args: argparse.Namespace) -> Iterator[str]:
    """The folder that was given, or a made one that does not outlive the run."""
    if args.folders:
        yield args.folders[0]
        return
    from kimi_native.make_checkpoint import make_checkpoint

    preset = args.preset or "tiny"
    with tempfile.TemporaryDirectory(prefix="kimi-native-") as parent:
        path = os.path.join(parent, preset)
        make_checkpoint(path, preset=preset, format="int4")
        yield path


def _e2e_one(args: argparse.Namespace, folder: str) -> None:
    from kimi_native.bench import e2e
    from kimi_native.bench.rows import measure_limits, row_line

    counts = _e2e_counts(args)
    limits = measure_limits(_threads(args), quick=args.quick)
    _print_limits(args, limits)
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        if args.json:
            print(json.dumps(row), flush=True)
        elif row["op"] != "e2e_load":
            print(row_line(row), flush=True)

    e2e.measure(
        folder,
        limits=limits,
        **counts,
        dtype=args.dtype,
        dense=args.dense,
        cache=args.cache,
        compute=args.compute,
        report=report,
    )
    if not args.json:
        print("\n".join(["", *e2e.growth_table(rows, limits.read_gb_per_s)]))
        print(e2e.memory_line(rows[-1]))


def _e2e_folders(args: argparse.Namespace) -> int:
    """Each folder in a process of its own, so that one's peak memory is not the other's."""
    from kimi_native.bench.e2e import size_table
    from kimi_native.bench.native import exit_code

    rows: list[dict[str, Any]] = []
    options = [f"--{name}" for name in ("quick",) if getattr(args, name)]
    for name in (
        "threads",
        "prompt_tokens",
        "new_tokens",
        "depths",
        "dtype",
        "dense",
        "cache",
        "compute",
    ):
        if (value := getattr(args, name)) is not None:
            options += ["--" + name.replace("_", "-"), str(value)]
    for folder in args.folders:
        command = [sys.executable, "-P", "-m", "kimi_native", "bench", "e2e", "--json", *options]
        result = subprocess.run([*command, folder], stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            return exit_code(result.returncode)  # it has said why on stderr
        rows += [json.loads(line) for line in result.stdout.splitlines()]
        if args.json:
            print(result.stdout, end="", flush=True)
    if not args.json:
        print("\n".join(size_table(rows)))
    return 0


# ---- load, peers, plot ----------------------------------------------------------------------------------------------


def _load(args: argparse.Namespace) -> int:
    from kimi_native.bench.loading import measure
    from kimi_native.terminal import print_json, print_table, rows_of

    options = ("cold", "prefetch", "max_context", "dtype", "dense", "cache")
    row = measure(args.folder, **{name: getattr(args, name) for name in options})
    if args.json:
        print_json(row)
    else:
        print_table(f"load {args.folder}", list(rows_of(row)))
    return 0


def _logits(args: argparse.Namespace) -> int:
    from kimi_native.bench import logits

    prompts = logits.PROMPTS
    if args.prompts is not None:
        prompts = tuple(line for line in read_text(args.prompts).splitlines() if line.strip())
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        if args.json:
            print(json.dumps(row), flush=True)

    logits.compare(args.folder, prompts=prompts, new_tokens=args.new_tokens, report=report)
    if not args.json:
        print("\n".join(logits.table(rows)))
    return 0


def _peers(args: argparse.Namespace) -> int:
    from kimi_native.bench import peers
    from kimi_native.bench.rows import measure_limits, row_line

    selection = peers.Selection(
        ops=tuple(args.ops),
        peer=args.peer or "",
        shape=args.shape or "",
        tokens=None if args.tokens is None else tuple(_counts("--tokens", args.tokens)),
        budget_s=_given(args.time_budget, 0.5 if args.quick else 2.0),
        quick=args.quick,
        model=args.model,
        gguf=args.gguf,
        dense=args.dense,
        compute=args.compute,
    )
    peers.check(selection)
    limits = measure_limits(_threads(args), quick=args.quick)
    _print_limits(args, limits)
    for row in peers.compare(selection, limits, skipped=_note):
        print(json.dumps(row) if args.json else row_line(row), flush=True)
    return 0


def _plot(args: argparse.Namespace) -> int:
    from kimi_native.bench.plot import plot
    from kimi_native.bench.rows import read_rows

    plot(read_rows(args.rows), args.out, threads=args.threads)
    return 0


# ---- shared ---------------------------------------------------------------------------------------------------------


def _threads(args: argparse.Namespace) -> int:
    """How many to measure with, before anything is. Raises RuntimeError if the kernel tier asked for is not here."""
    from kimi_native import ops

    ops.active_isa()
    if args.threads is None:
        return ops.num_threads()
    if args.threads < 1:
        raise RequestError(f"bench: threads must be at least 1 (got {args.threads})")
    _check_cores(args.threads)
    return args.threads


def _check_cores(threads: int) -> None:
    """More threads than cores wait for each other by turns: no figure of such a run means anything."""
    cores = os.cpu_count() or 1
    if threads > cores:
        raise RequestError(f"bench: threads must be at most the {cores} cores (got {threads})")


def _counts(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        raise RequestError(f"bench: {option} must be counts such as 1,16 (got {text})")
    return [int(p) for p in parts]


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _print_limits(args: argparse.Namespace, limits: Any) -> None:
    from kimi_native.bench.rows import limits_line

    if not args.json:
        print(limits_line(limits), flush=True)
        return
    common = {"op": "limits", "threads": limits.threads, "others": limits.others}
    print(json.dumps({**common, "limit": "read", "gb_per_s": limits.read_gb_per_s}))
    for unit, rate in limits.gflop_per_s.items():
        print(json.dumps({**common, "limit": unit, "gflop_per_s": rate}))


def _note(text: str) -> None:
    print(f"kimi-native: {text}", file=sys.stderr, flush=True)
