"""`kimi-native claims`: runs the experiments, prints their tables, and writes numbers and pictures to a folder."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_native.claims import interleaved
from kimi_native.errors import RequestError
from kimi_native.folder_names import NANO_FOLDER
from kimi_native.model_arguments import add_machine, add_model, import_torch, load_model
from kimi_native.nano.evaluate import Score, Share
from kimi_native.terminal import note, print_json, print_table
from kimi_native.units import bytes_text

if TYPE_CHECKING:
    from kimi_native.generate import Model

CONTEXT = 32768  # 200 steps with failing tools take some 25,000 tokens
BATCH = 16
_FORMS = {
    "dtype": "bfloat16",
    "dense": "bf16",
    "cache": "exact",
    "compute": "exact",
    "max_context": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "claims", nargs="*", metavar="CLAIM", help=f"of {', '.join(CLAIMS)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="minutes instead of hours")
    parser.add_argument(
        "--lengths",
        type=_numbers,
        metavar="N,N,...",
        help="of interleaved: of its problems those of so many steps",
    )
    parser.add_argument(
        "--failure-rates", type=_numbers, metavar="X,X,...", help="of interleaved: these rates"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the problems")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for numbers (JSON) and pictures (PNG, with matplotlib)"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    add_model(parser)
    add_machine(parser)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas (got {text!r})") from None


def run(args: argparse.Namespace) -> int:
    unknown = [name for name in args.claims if name not in CLAIMS]
    if unknown:
        raise RequestError(f"claims: must be of {', '.join(CLAIMS)} (got {', '.join(unknown)})")
    folder = None if args.out is None else _made_folder(Path(args.out))
    import_torch()
    results = {}
    for name in args.claims or CLAIMS:
        results[name] = result = CLAIMS[name](args)  # hours: told before the next begins
        if not args.json:
            _TABLES[name](result)
            sys.stdout.flush()
        if folder is not None:
            _write(folder / f"{name}.json", result)
            _draw(name, result, folder / f"{name}.png")
    if args.json:
        print_json(results)
    return 0


def _made_folder(path: Path) -> Path:
    """Made before anything is played: what cannot be written is said at once."""
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise RequestError(f"claims: {path} must be a folder that can be written")
    return path


def _write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")
    note(f"wrote {path}")


def _draw(name: str, result: dict[str, Any], path: Path) -> None:
    from kimi_native.claims import pictures

    try:
        pictures.DRAW[name](result, path)
    except RequestError as error:  # without matplotlib the tables are all there is
        note(f"no picture: {error}")
        return
    note(f"wrote {path}")


# ---- interleaved ----------------------------------------------------------------------------------------------------


def _interleaved(args: argparse.Namespace) -> dict[str, Any]:
    from kimi_native.claims.kept_rows import KeptRows
    from kimi_native.nano.player import played_by

    folder = NANO_FOLDER if args.model is None else Path(args.model)
    path = None if args.out is None else Path(args.out) / "interleaved-cells.jsonl"
    subject = {"seed": args.seed, "weights": _weights_of(folder), **_chosen_forms(args)}
    kept = KeptRows(path, None if path is None else subject)
    context = args.max_context or CONTEXT
    options = {"max_context": context}
    model = load_model(argparse.Namespace(**{**vars(args), **options}), max_batch=BATCH)

    def done(score: Score) -> None:
        note(score.row())

    # Held to the schemas, a call cannot be malformed; here the model's own calls are wanted.
    answer_all = played_by(model, constrain_tools=False)
    plan = [
        cell
        for cell in interleaved.cells(quick=args.quick)
        if (args.lengths is None or cell.num_steps in args.lengths)
        and (args.failure_rates is None or cell.failure_rate in args.failure_rates)
    ]
    if not plan:
        raise RequestError(
            "claims: interleaved must have a cell left "
            f"(got lengths {args.lengths}, failure rates {args.failure_rates})"
        )
    rows = interleaved.play(
        answer_all, plan, seed=args.seed, done=done, kept=kept, room=BATCH * context
    )
    calls = interleaved.calls_per_step(plan, seed=args.seed)
    return {"seed": args.seed, "cells": rows, "fits": list(interleaved.fits(rows, calls))}


def _chosen_forms(args: argparse.Namespace) -> dict[str, Any]:
    """What else decides what the weights say, where it is not the default."""
    given = {name: getattr(args, name) for name in _FORMS}
    return {name: value for name, value in given.items() if value != _FORMS[name]}


def _weights_of(folder: Path) -> str:
    """SHA-256 of a folder's weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _interleaved_tables(result: dict[str, Any]) -> None:
    rows = [
        (
            f"{row['mode']}, {row['num_steps']} steps, {100 * row['failure_rate']:g} % fail",
            f"{Share(**row['solved'])} solved",
        )
        for row in result["cells"]
    ]
    print_table("held-out problems solved, with 95 % intervals", rows)
    fits = [
        (
            f"{fit['mode']}, {100 * fit['failure_rate']:g} % fail",
            f"a step right: {Share(**fit['step'])}; failures caught: {Share(**fit['caught'])}; "
            f"usual account {100 * fit['popular']:.2f} %, derived {100 * fit['derived']:.2f} %",
        )
        for fit in result["fits"]
    ]
    print_table("a single step, over all lengths", fits)


# ---- int4 -----------------------------------------------------------------------------------------------------------


def _int4(args: argparse.Namespace) -> dict[str, Any]:
    from kimi_native.claims import int4

    source = NANO_FOLDER if args.model is None else Path(args.model)

    def load(path: Path, chat_format: str | None = None) -> Model:
        options = {"model": str(path), "max_context": args.max_context or CONTEXT}
        return load_model(
            argparse.Namespace(**{**vars(args), **options}),
            max_batch=BATCH,
            chat_format=chat_format,
        )

    # Told: from its config.json a BF16 copy would be taken for a model of the family that does not think.
    chat_format = load(source).chat_format
    plan = int4.QUICK if args.quick else int4.FULL
    with _work_folder(args.out) as folder:
        return int4.run(
            source,
            folder / "int4-work",
            plan,
            seed=args.seed,
            load=lambda path: load(path, chat_format),
            say=note,
        )


@contextlib.contextmanager
def _work_folder(out: str | None) -> Iterator[Path]:
    """For runs and checkpoints: kept if the user named a folder, so that what was interrupted can go on."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="kimi-native-claims-") as folder:
        yield Path(folder)


def _int4_tables(result: dict[str, Any]) -> None:
    plan = result["plan"]
    rows = [
        (
            row["variant"],
            f"{bytes_text(row['bytes'])}; loss {row['loss']:.4f}; KL from BF16 {row['kl']['mean']:.2e} "
            f"+- {row['kl']['error']:.0e}; solved {Share(**row['solved'])}; {row['tokens_per_s']:.0f} tokens/s",
        )
        for row in result["rows"]
    ]
    steps, percent = plan["num_steps"], 100 * plan["failure_rate"]
    print_table(f"quantized afterwards or in training; {steps} steps, {percent:g} % fail", rows)


# ---- routing --------------------------------------------------------------------------------------------------------


def _routing(args: argparse.Namespace) -> dict[str, Any]:
    from kimi_native.claims import routing

    def load(path: Path) -> Model:
        return load_model(argparse.Namespace(**{**vars(args), "model": str(path)}))

    plan = routing.QUICK if args.quick else routing.FULL
    with _work_folder(args.out) as folder:
        return routing.run(folder / "routing-work", plan, seed=args.seed, load=load, say=note)


def _routing_tables(result: dict[str, Any]) -> None:
    rows = []
    for row in result["rows"]:
        text = f"held-out loss {row['loss']:.4f}; {row['parameters'] / 1e6:.2f} M parameters"
        if "max_over_mean" in row:
            last = row["max_over_mean"][-max(1, len(row["max_over_mean"]) // 10) :]
            text += f"; largest load {sum(last) / len(last):.2f} of the mean"
            text += f", {row['without_tokens'][-1]} experts without tokens"
        if "information" in row:
            bits = ", ".join(f"{value:.2f}" for value in row["information"])
            text += f"; bits about a token's role, layer by layer: {bits}"
        rows.append((row["variant"], text))
    print_table(f"trained for {result['plan']['steps']} steps each", rows)


CLAIMS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "interleaved": _interleaved,
    "int4": _int4,
    "routing": _routing,
}
_TABLES: dict[str, Callable[[dict[str, Any]], None]] = {
    "interleaved": _interleaved_tables,
    "int4": _int4_tables,
    "routing": _routing_tables,
}
