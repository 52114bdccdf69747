"""The verbs of conversations: chat; render and parse, which look at prompts and answers and need no torch."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from kimi_native.argument_files import STDIN, parse_json, read_list, read_text, shown_name
from kimi_native.errors import RequestError
from kimi_native.model_arguments import add_machine, add_model, add_sampling
from kimi_native.terminal import event_dict, print_json, print_table, shown

if TYPE_CHECKING:
    from kimi_native.tokenizer import Tokenizer

# ---- arguments ------------------------------------------------------------------------------------------------------


def add_chat(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system text of the conversation")
    parser.add_argument(
        "--tools",
        metavar="FILE",
        help="Python file to run: its list TOOLS, or its public functions with type hints, are tools",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="run this tool without asking; may be repeated",
    )
    parser.add_argument(
        "--max-tool-calls", type=int, default=300, metavar="N", help="per message (default: 300)"
    )
    parser.add_argument(
        "--thinking-budget", type=int, metavar="N", help="tokens of reasoning per answer"
    )
    parser.add_argument(
        "--one", action="store_true", help="stdin is one message, not one on each line"
    )
    parser.add_argument("--json", action="store_true", help="print the events as JSON lines")
    add_sampling(parser)
    add_machine(parser)


def add_render(parser: argparse.ArgumentParser) -> None:
    _add_format(parser)
    parser.add_argument(
        "--messages", required=True, metavar="FILE", help="JSON list of messages; -: stdin"
    )
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tools; -: stdin")
    parser.add_argument(
        "--keep-thinking",
        choices=("auto", "all", "none"),
        default="auto",
        help="earlier reasoning that is shown (default: auto, as published)",
    )
    parser.add_argument(
        "--no-thinking",
        dest="thinking",
        action="store_false",
        default=None,
        help="open the answer behind an empty reasoning (k2.5)",
    )
    parser.add_argument(
        "--no-generation-prompt",
        dest="add_generation_prompt",
        action="store_false",
        help="end with the last message",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_parse(parser: argparse.ArgumentParser) -> None:
    _add_format(parser)
    parser.add_argument(
        "answer",
        metavar="FILE",
        help="ids, or JSON with ids (and prompt_ids) as generate --json prints; -: stdin",
    )
    parser.add_argument(
        "--text",
        action="store_true",
        help="FILE is text in which the names of control tokens stand for them",
    )
    parser.add_argument(
        "--prompt", metavar="FILE", help="ids of the prompt, or JSON as render --json prints"
    )
    parser.add_argument(
        "--tools", metavar="FILE", help="JSON list of tools: repairs the ids of their calls"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line per event")


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--format", metavar="NAME", help="chat format, such as k2-thinking (default: the model's)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer's files")


def _format_and_tokenizer(args: argparse.Namespace) -> tuple[str | None, Tokenizer]:
    from kimi_native.chat.template import detect_format, get_format
    from kimi_native.config import load_config
    from kimi_native.model_file import model_folder
    from kimi_native.tokenizer import load_tokenizer

    if (args.model is None) == (args.tokenizer is None):
        args.usage_error("give either --model DIR, or --format NAME and --tokenizer DIR")
    if args.format is not None:
        get_format(args.format)
    if args.model is None:
        if args.format is None:
            args.usage_error("--tokenizer DIR needs --format NAME")
        return args.format, load_tokenizer(args.tokenizer)
    config = load_config(model_folder(args.verb, args.model))
    tokenizer = load_tokenizer(args.model, vocab_size=config.vocab_size)
    return args.format or detect_format(config, tokenizer, args.model), tokenizer


# ---- chat -----------------------------------------------------------------------------------------------------------


def chat(args: argparse.Namespace) -> int:
    """Talks in the terminal, or answers the messages of a pipe."""
    from kimi_native import terminal_chat

    return terminal_chat.run(args)


# ---- render ---------------------------------------------------------------------------------------------------------


def render(args: argparse.Namespace) -> int:
    """Prints the prompt of a conversation, control tokens by their names, and its ids."""
    from kimi_native.chat import template
    from kimi_native.chat.jinja_template import find_template

    _check_stdin(args, "messages", "tools")
    format, tokenizer = _format_and_tokenizer(args)
    messages = read_list(args.messages, "messages")
    options = {
        "tokenizer": tokenizer,
        "tools": read_list(args.tools, "tools") if args.tools else None,
        "add_generation_prompt": args.add_generation_prompt,
        "thinking": args.thinking,
        "keep_thinking": args.keep_thinking,
    }
    if format is not None:
        ids = template.render(messages, format=format, **options)
    elif own := find_template(args.model):
        ids = own.render(messages, **options)
    else:
        raise RequestError(
            "render: this checkpoint has no chat format known here and no chat template; pass --format"
        )
    prompt = tokenizer.decode(ids)
    if args.json:
        print_json({"format": format, "prompt": prompt, "ids": ids})
    else:
        print(shown(prompt))
        print(*ids)
    return 0


# ---- parse ----------------------------------------------------------------------------------------------------------


def parse(args: argparse.Namespace) -> int:
    """Prints what the ids of an answer say: its events one by one, or the whole as a table."""
    from kimi_native.chat.parser import OutputParser, merge_events

    _check_stdin(args, "answer", "prompt", "tools")
    format, tokenizer = _format_and_tokenizer(args)
    if args.text:
        ids, prompt_ids = tokenizer.encode_with_control(read_text(args.answer)), []
    else:
        ids, prompt_ids = _read_ids(args.answer)
    if args.prompt:
        prompt_ids, _ = _read_ids(args.prompt)
    tools = read_list(args.tools, "tools") if args.tools else None
    parser = OutputParser(tokenizer, format=format, prompt_ids=prompt_ids, tools=tools)
    events = [event for token_id in ids for event in parser.push(token_id)]
    events += parser.finish()
    if args.json:
        for event in events:
            print_json(event_dict(event))
        return 0
    answer = merge_events(events)
    rows = [("reasoning", answer.reasoning), ("content", answer.content)]
    rows += [(f"call {call.id}", call.arguments) for call in answer.tool_calls]
    rows.append(("finish reason", answer.finish_reason))
    rows.append(("unfinished call", "yes" if answer.unfinished_call else "no"))
    print_table("answer", [(shown(name), shown(text or "none")) for name, text in rows])
    return 0


# ---- files ----------------------------------------------------------------------------------------------------------


def _check_stdin(args: argparse.Namespace, *names: str) -> None:
    if sum(getattr(args, name) == STDIN for name in names) > 1:
        args.usage_error("only one file can be - (standard input)")


def _read_ids(path: str) -> tuple[list[int], list[int]]:
    """ids and prompt_ids of a file: numbers with spaces or commas between them, a JSON list, or an object with both."""
    text = read_text(path)
    if text.lstrip()[:1] not in ("{", "["):
        words = [word for word in re.split(r"[\s,]+", text) if word]
        bad = next((word for word in words if not re.fullmatch("[0-9]{1,9}", word)), None)
        if bad is not None:
            raise RequestError(f"{shown_name(path)}: ids must be whole numbers (got {bad[:40]!r})")
        return [int(word) for word in words], []
    value = parse_json(shown_name(path), text)
    fields = value if isinstance(value, dict) else {"ids": value}
    ids, prompt_ids = fields.get("ids"), fields.get("prompt_ids", [])
    for name, given in (("ids", ids), ("prompt_ids", prompt_ids)):
        if not isinstance(given, list) or not all(type(token_id) is int for token_id in given):
            raise RequestError(f"{shown_name(path)}: {name} must be a list of whole numbers")
    return ids, prompt_ids
