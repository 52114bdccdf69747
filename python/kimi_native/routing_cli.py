"""The verb routing: which experts the tokens of a text choose, as a table, JSON, a picture and a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_native.argument_files import STDIN, read_list, read_text
from kimi_native.errors import RequestError
from kimi_native.folder_names import NANO_FOLDER
from kimi_native.model_arguments import add_machine, import_torch, load_model
from kimi_native.terminal import note, print_json, print_table

if TYPE_CHECKING:
    from kimi_native.generate import Model
    from kimi_native.routing import Routing

FILES = ("json", "png", "html")


def add_routing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=str(NANO_FOLDER),
        metavar="MODEL",
        help="checkpoint folder (default: kimi-nano, which is in the package)",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="text, or @FILE that holds it; -: stdin")
    what.add_argument("--messages", metavar="FILE", help="JSON list of messages; -: stdin")
    what.add_argument(
        "--rows",
        metavar="FILE",
        help='JSON lines: {"text": ...}, {"messages": ..., "tools": ...} or {"ids": ...}; -: stdin',
    )
    parser.add_argument(
        "--raw-prompt", action="store_true", help="take the text as it stands, without chat format"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=0,
        metavar="N",
        help="answer greedily, and measure that too (default: 0)",
    )
    parser.add_argument(
        "--labels",
        choices=("auto", "roles", "characters"),
        default="auto",
        help="tell tokens apart by their place in a conversation, or by their characters",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything; -: stdout, no table")
    parser.add_argument("--png", metavar="FILE", help="write a heat map (needs matplotlib)")
    parser.add_argument("--html", metavar="FILE", help="write a page to look into it")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table, and writes the files that were asked for."""
    if args.raw_prompt and args.prompt is None:
        args.usage_error("--raw-prompt needs --prompt")
    if args.max_tokens < 0:
        args.usage_error("--max-tokens must be at least 0")
    _check_outputs(args)
    import_torch()
    _check_model(args)
    measure = _measurement(args)
    routing = measure()
    _write(args, routing)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """What could not be written is told before anything is computed."""
    from kimi_native.whole_file import check_writable

    paths = [path for name in FILES if (path := getattr(args, name)) not in (None, STDIN)]
    if STDIN in (args.png, args.html):
        args.usage_error("only --json can be - (standard output)")
    if len({Path(path).resolve() for path in paths}) < len(paths):
        args.usage_error("--json, --png and --html must name different files")
    for path in paths:
        check_writable(path)
    if args.png is not None:
        from kimi_native.routing_plot import new_figure

        new_figure(1, 1)


def _check_model(args: argparse.Namespace) -> None:
    from kimi_native.config import load_config
    from kimi_native.model_file import model_folder
    from kimi_native.routing import check_experts

    folder = model_folder("routing", args.model)
    check_experts(load_config(folder, ignore_keys=tuple(args.ignore_config_key)))


def _measurement(args: argparse.Namespace) -> Callable[[], Routing]:
    """Reads what is to be measured, then loads the model, so that a bad file does not cost that."""
    from kimi_native.routing import measure_routing

    options: dict[str, Any] = {"max_tokens": args.max_tokens, "labels": args.labels}
    if args.prompt is not None:
        prompt = _prompt(args.prompt)
        raw = {"raw_prompt": args.raw_prompt}
        model = load_model(args, prompt=prompt, **raw)
        return lambda: measure_routing(model, prompt, **raw, **options)
    rows = _rows(args)
    model = load_model(args)
    ids = _all_ids(model, rows)
    return lambda: measure_routing(model, ids, **options)


def _prompt(given: str) -> str:
    """The text of --prompt; of a file without the newline that ends its last line."""
    text = given
    if given == STDIN or given.startswith("@"):
        text = read_text(given.removeprefix("@")).removesuffix("\n")
    if not text:
        raise RequestError(f"routing: the prompt must not be empty (got nothing from {given!r})")
    return text


def _rows(args: argparse.Namespace) -> list[Any]:
    from kimi_native.routing_rows import Row, read_rows

    if args.rows is not None:
        return read_rows(args.rows)
    return [Row(args.messages, messages=read_list(args.messages, "messages"))]


def _all_ids(model: Model, rows: list[Any]) -> list[list[int]]:
    from kimi_native.routing_rows import row_ids

    return [row_ids(model, row) for row in rows]


# ---- results --------------------------------------------------------------------------------------------------------


def _write(args: argparse.Namespace, routing: Routing) -> None:
    from kimi_native.routing_report import HEADER, label_line, report, summary, table
    from kimi_native.whole_file import write_whole

    statistics = routing.statistics()
    name = args.model.encode("utf-8", "replace").decode()  # a path need not be text
    found = report(routing, statistics, name) if args.json is not None else {}
    if args.json == STDIN:
        print_json(found)
    else:
        print_table(f"{name}: {summary(routing)}", table(statistics), header=HEADER)
        print(f"labels: {label_line(routing)}")
    if args.json not in (None, STDIN):
        write_whole(args.json, (json.dumps(found, ensure_ascii=False) + "\n").encode())
    if args.png is not None:
        from kimi_native.routing_plot import heat_map

        write_whole(args.png, heat_map(statistics, f"{name}: {routing.num_tokens:,} tokens"))
    if args.html is not None:
        from kimi_native.routing_page import page

        write_whole(args.html, page(routing, statistics, name).encode())
    for kind in FILES:
        if (path := getattr(args, kind)) not in (None, STDIN):
            note(f"wrote {path}")
