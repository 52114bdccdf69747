"""The command line: arguments to one call of the library, its result to a table, text, or JSON.

Exit codes: 0 done; 1 an error with one line on stderr, a plan that does not fit, or a failed check; 2 wrong usage;
130 interrupted. Results go to stdout, all else to stderr. Heavy modules are imported by the verb that needs them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kimi_native import chat_cli, routing_cli
from kimi_native.errors import KimiNativeError, RequestError
from kimi_native.model_arguments import (
    add_ignored_keys,
    add_machine,
    add_model,
    add_sampling,
    add_settings,
    import_torch,
    load_model,
    sampling_overrides,
)
from kimi_native.streams import standard_streams
from kimi_native.terminal import error_text
from kimi_native.terminal import note as _note
from kimi_native.terminal import print_json as _print_json
from kimi_native.terminal import print_table as _print_table
from kimi_native.terminal import rows_of as _rows
from kimi_native.terminal import shown as _shown
from kimi_native.units import bytes_text as _bytes

if TYPE_CHECKING:
    from kimi_native.checkpoint import Checkpoint
    from kimi_native.generation import Generation
    from kimi_native.plan import MemoryPlan

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_ALL_REASONING = (
    "the output ended inside the reasoning; raise --max-tokens, or look at it with --json"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; argparse itself exits with 2 on wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with standard_streams():
            args = _parser(argv).parse_args(argv)
            return args.run(args)
    except BrokenPipeError:
        return 0  # whoever read the output has seen enough
    except KeyboardInterrupt:
        return 130
    except (KimiNativeError, ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
        if "--debug" in argv:
            raise
        _note(f"error: {error_text(error)}")
        return 1


# ---- arguments ------------------------------------------------------------------------------------------------------


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kimi-native",
        description="Kimi K2 and its family, run from the checkpoint as published.",
    )
    if "--version" in argv:
        from kimi_native import __version__
    else:  # looking it up takes as long as all the rest of the parser
        __version__ = ""
    parser.add_argument("--version", action="version", version=f"kimi-native {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], help: str) -> Any:
        sub = verbs.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(run=run, usage_error=sub.error)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    _add_generate(verb("generate", _generate, "answer one prompt"))
    _add_inspect(verb("inspect", _inspect, "show what a checkpoint holds, from its headers"))
    _add_plan(verb("plan", _plan, "show the memory a model needs; exit 1 if it does not fit"))
    chat_cli.add_chat(verb("chat", chat_cli.chat, "talk, with tools if you like"))
    chat_cli.add_render(verb("render", chat_cli.render, "show a conversation as its prompt"))
    chat_cli.add_parse(verb("parse", chat_cli.parse, "show what the ids of an answer say"))
    routing_cli.add_routing(verb("routing", routing_cli.run, "show which experts tokens choose"))
    doctor = verb("doctor", _doctor, "show what this machine offers, and check every kernel once")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--quick", action="store_true", help="measure on less memory")
    _add_quantize(verb("quantize", _quantize, "write a checkpoint with its routed experts in INT4"))
    _add_slow(verb, argv)
    return parser


def _add_slow(verb: Callable[..., Any], argv: Sequence[str]) -> None:
    """The verbs whose arguments come from modules that are slow to import: imported for the verb that is asked for."""
    demo_verb = verb("demo", _demo, "show kimi-nano at work on a problem, with unreliable tools")
    if "demo" in argv:
        from kimi_native.nano import demo

        demo.add_arguments(demo_verb)
    claims = verb("claims", _claims, "measure what the ideas of Kimi K2 are worth, with kimi-nano")
    if "claims" in argv:
        from kimi_native.claims import command as claims_command

        claims_command.add_arguments(claims)
    qat = verb("qat", _qat, "train a small checkpoint further, in INT4")
    if "qat" in argv:
        from kimi_native import qat_cli

        qat_cli.add_arguments(qat)
    make = verb(
        "make-checkpoint", _make_checkpoint, "write a random checkpoint as published ones are"
    )
    if "make-checkpoint" in argv:
        from kimi_native import make_checkpoint

        make_checkpoint.add_arguments(make)
    bench = verb(
        "bench", _bench, "time the kernels, whole models and other engines, against limits"
    )
    if "bench" in argv:
        from kimi_native.bench import command

        command.add_arguments(bench)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="text; absent or -: read from stdin")
    add_model(parser)
    parser.add_argument(
        "--raw-prompt",
        action="store_true",
        help="continue the text as it stands, without chat format",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--stream",
        action="store_true",
        help="print the answer as it comes; on a terminal also the reasoning, dimmed",
    )
    output.add_argument("--json", action="store_true", help="print everything as JSON")
    add_sampling(parser)
    add_machine(parser)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="DIR", help="checkpoint folder")
    parser.add_argument("--model", metavar="DIR", help="the same")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    parser.add_argument("--plan", action="store_true", help="also show the memory plan")
    parser.add_argument(
        "--quantization-error",
        nargs="?",
        const="",
        metavar="BASE",
        help="show instead how far INT4 weights are from those of BASE, the checkpoint they were made from; "
        "without BASE: how far they would be",
    )
    add_settings(parser)
    parser.add_argument("--max-batch", type=int, default=1, metavar="N", help="sequences at once")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    add_settings(parser)
    parser.add_argument("--max-batch", type=int, default=1, metavar="N", help="sequences at once")


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="BF16 or FP8 checkpoint folder")
    parser.add_argument("out", metavar="OUT", help="folder to write, made if missing")
    parser.add_argument(
        "--levels",
        type=int,
        choices=(15, 16),
        default=15,
        help="15: -7 .. 7, as the published weights (default); 16: -8 .. 7, as compressed-tensors",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: the cores there are")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in OUT")
    add_ignored_keys(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _folder(args: argparse.Namespace) -> str:
    if (args.folder is None) == (args.model is None):
        args.usage_error("give the checkpoint folder once, as DIR or --model DIR")
    return args.model if args.folder is None else args.folder


# ---- generate -------------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    import_torch()
    overrides = sampling_overrides(args)
    model = load_model(args, prompt=prompt, raw_prompt=args.raw_prompt)
    options = {"raw_prompt": args.raw_prompt, **overrides}
    if args.stream:
        _print_stream(model.stream(prompt, **options))
        return 0
    result = model.generate(prompt, **options)
    if args.json:
        _print_json(_generation_dict(result))
        return 0
    print(_shown(result.text))
    if result.reasoning and not result.text and result.finish_reason == "length":
        _note(_ALL_REASONING)
    _note_calls([(call.id, call.arguments) for call in result.tool_calls])
    return 0


def _prompt(args: argparse.Namespace) -> str:
    """The prompt argument, or stdin without the newline that ends its last line."""
    where, text = "the argument", args.prompt
    if text in (None, "-"):
        if sys.stdin.isatty():
            _note("type the prompt, then Ctrl-D on a line of its own")
        where, text = "stdin", sys.stdin.read().removesuffix("\n")
    if not text:
        raise RequestError(f"generate: the prompt must not be empty (got nothing from {where})")
    # Python hands over bytes that are no text in its encoding as these code points.
    bad = next((i for i, c in enumerate(text) if "\udc80" <= c <= "\udcff"), None)
    if bad is not None:
        raise RequestError(
            f"generate: the prompt must be UTF-8 text (got byte 0x{ord(text[bad]) - 0xDC00:02x} after "
            f"{bad} characters of {where})"
        )
    return text


def _print_stream(events: Iterator[Any]) -> None:
    from kimi_native.chat.types import ContentDelta, Finish, ReasoningDelta, ToolCallDelta

    on_terminal = sys.stdout.isatty()
    calls: list[tuple[str, str]] = []
    kinds: set[type] = set()
    reason = None
    dimmed = False
    try:
        for event in events:
            kinds.add(type(event))
            if isinstance(event, Finish):
                reason = event.reason
            elif isinstance(event, ReasoningDelta) and on_terminal:
                sys.stdout.write(("" if dimmed else _DIM) + _shown(event.text))
                dimmed = True
            elif isinstance(event, ContentDelta):
                sys.stdout.write((_PLAIN + "\n\n" if dimmed else "") + _shown(event.text))
                dimmed = False
            elif isinstance(event, ToolCallDelta):
                if event.id is not None:
                    calls.append((event.id, event.arguments))
                else:
                    calls[-1] = (calls[-1][0], calls[-1][1] + event.arguments)
            sys.stdout.flush()
    finally:
        sys.stdout.write((_PLAIN if dimmed else "") + "\n")
    if reason == "length" and ReasoningDelta in kinds and ContentDelta not in kinds:
        _note(_ALL_REASONING)
    _note_calls(calls)


def _note_calls(calls: list[tuple[str, str]]) -> None:
    for id, arguments in calls:
        _note(f"the model asks for {id} with {arguments}; nothing was run")


def _generation_dict(result: Generation) -> dict[str, Any]:
    return {
        "text": result.text,
        "reasoning": result.reasoning,
        "tool_calls": [dataclasses.asdict(call) for call in result.tool_calls],
        "ids": result.ids,
        "prompt_ids": result.prompt_ids,
        "finish_reason": result.finish_reason,
        "usage": {**dataclasses.asdict(result.usage), "total_tokens": result.usage.total_tokens},
        "timing": dataclasses.asdict(result.timing),
        "seed": result.seed,
    }


# ---- inspect, plan, doctor, quantize, make-checkpoint, bench --------------------------------------------------------


def _inspect(args: argparse.Namespace) -> int:
    import_torch()
    from kimi_native.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(_folder(args), ignore_keys=args.ignore_config_key)
    if args.quantization_error is not None:
        return _quantization_error(args, checkpoint)
    summary = checkpoint.summary()
    plan = _memory_plan(args, checkpoint)  # without --plan too: a bad setting must not pass
    if args.json:
        _print_json({**summary, "plan": plan.to_dict()} if args.plan else summary)
        return 0
    _print_table(str(checkpoint.path), list(_rows(summary)))
    if args.plan:
        _print_plan(plan)
    return 0


def _quantization_error(args: argparse.Namespace, checkpoint: Checkpoint) -> int:
    from kimi_native.checkpoint import Checkpoint as Opened
    from kimi_native.progress_bar import progress_bar
    from kimi_native.quant.quantization_error import HEADER, quantization_error, table

    base, path = None, args.quantization_error
    if path:
        base = Opened.open(path, ignore_keys=args.ignore_config_key)
    with progress_bar("compare") as progress:
        error = quantization_error(checkpoint, base, progress=progress)
    if args.json:
        _print_json(error.to_dict())
        return 0
    against = f"against {path}" if path else "if quantized"
    _print_table(f"{checkpoint.path}, {against}", list(table(error)), HEADER)
    return 0


def _plan(args: argparse.Namespace) -> int:
    import_torch()
    from kimi_native.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(_folder(args), ignore_keys=args.ignore_config_key)
    plan = _memory_plan(args, checkpoint)
    if args.json:
        _print_json(plan.to_dict())
    else:
        _print_plan(plan)
    plan.check()
    return 0


def _memory_plan(args: argparse.Namespace, checkpoint: Checkpoint) -> MemoryPlan:
    from kimi_native.generate import default_context
    from kimi_native.plan import check_context, memory_plan

    check_context("plan", checkpoint.config, args.max_context)
    if args.max_batch < 1:
        raise RequestError(f"plan: max_batch must be at least 1 (got {args.max_batch})")
    return memory_plan(
        checkpoint,
        max_context=args.max_context or default_context(checkpoint.config),
        max_batch=args.max_batch,
        dtype=args.dtype,
        dense=args.dense,
        cache=args.cache,
    )


def _print_plan(plan: MemoryPlan) -> None:
    settings = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(plan.settings).items())
    _print_table(f"memory plan ({settings})", [(name, _bytes(size)) for name, size in plan.table()])
    for note in plan.notes:
        print(f"note: {note}")


def _demo(args: argparse.Namespace) -> int:
    from kimi_native.nano import demo

    return demo.run(args)


def _claims(args: argparse.Namespace) -> int:
    from kimi_native.claims import command

    return command.run(args)


def _doctor(args: argparse.Namespace) -> int:
    import_torch()
    from kimi_native.doctor import examine

    report = examine(quick=args.quick)
    if args.json:
        _print_json(report)
    else:
        checks = report["self_check"]
        _print_table(
            "kimi-native doctor",
            list(_rows({k: v for k, v in report.items() if k != "self_check"})),
        )
        _print_table("self-check", [(check["op"], check["result"]) for check in checks])
    return 0 if report["ok"] else 1


def _quantize(args: argparse.Namespace) -> int:
    from kimi_native.progress_bar import progress_bar
    from kimi_native.quant.ptq import quantize_checkpoint

    try:
        with progress_bar("quantize") as progress:
            report = quantize_checkpoint(
                args.source,
                args.out,
                levels=args.levels,
                threads=args.threads,
                overwrite=args.overwrite,
                ignore_config_keys=tuple(args.ignore_config_key),
                progress=progress,
            )
    except KeyboardInterrupt as interrupt:
        _note(f"interrupted; {str(interrupt) or 'nothing was written'}")
        raise
    if args.json:
        _print_json(report)
        return 0
    shards = len(report["shards"])
    print(
        f"{report['path']}: {report['quantized']} matrices in INT4 ({report['levels']} levels), "
        f"{_bytes(report['bytes'])} in {shards} shard{'s' if shards > 1 else ''} from "
        f"{_bytes(report['source_bytes'])}, {report['seconds']:.1f} s, {report['gb_per_s']:.2f} GB/s"
    )
    if report["left_out"]:
        _note(f"not copied: {', '.join(report['left_out'])}")
    return 0


def _qat(args: argparse.Namespace) -> int:
    from kimi_native import qat_cli

    return qat_cli.run(args)


def _make_checkpoint(args: argparse.Namespace) -> int:
    from kimi_native import make_checkpoint

    return make_checkpoint.run(args)


def _bench(args: argparse.Namespace) -> int:
    from kimi_native.bench import command

    return command.run(args)
