"""kimi-native chat over a model that says what the user's message asks for; run by tests in a process of its own.

python chat_program.py TOKENIZER_DIR [arguments of kimi-native chat]
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from fakes import make_scripted_model
from kimi_native import chat_cli, cli, generate
from kimi_native.tokenizer import load_tokenizer

WORDS = " ".join(f"word{i}" for i in range(400))


def call_text(*calls: tuple[str, str]) -> str:
    body = "".join(
        f"<|tool_call_begin|>functions.{name}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for name, arguments in calls
    )
    return f"<|tool_calls_section_begin|>{body}<|tool_calls_section_end|>"


def say(prompt: str) -> str:
    """What the last message of the user asks for; with results behind it, what they say."""
    system = re.findall(r"<\|im_system\|>system<\|im_middle\|>(.*?)<\|im_end\|>", prompt, re.DOTALL)
    message, after = prompt.split("<|im_user|>user<|im_middle|>")[-1].split("<|im_end|>", 1)
    results = re.findall(r"## Return of [^\n]*\n(.*?)<\|im_end\|>", after, re.DOTALL)
    count = prompt.count("## Return of")
    if results:
        return f"<think>I see.</think>The tool said: {results[-1]}"
    if message == "weather":
        return "<think>I look.</think>" + call_text((f"weather:{count}", '{"city":"Berlin"}'))
    if message == "both":
        calls = (f"weather:{count}", '{"city":"Bonn"}'), (f"send_mail:{count + 1}", '{"to":"ben"}')
        return "<think></think>" + call_text(*calls)
    if message == "mail":
        return "<think></think>" + call_text((f"send_mail:{count}", '{"to":"anna"}'))
    if message == "hang":
        return "<think></think>" + call_text((f"hang:{count}", "{}"))
    if message == "long":
        return f"<think>So much to say.</think>{WORDS}"
    if message == "escape":
        return "<think>x</think>a\x1b]0;owned\x07\x1b[2Jb"
    if message == "system":
        return f"<think></think>{system[-1] if system else 'none'}"
    users = prompt.count("<|im_user|>user")
    return f"<think>Message {users} came.</think>You said {message!r}."


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the verb alone, as cli.main reads them."""
    parser = argparse.ArgumentParser(prog="kimi-native chat")
    parser.set_defaults(run=chat_cli.chat, usage_error=parser.error, debug=False)
    chat_cli.add_chat(parser)
    return parser


def main() -> int:
    folder, *argv = sys.argv[1:]
    model, network, _ = make_scripted_model(load_tokenizer(Path(folder)), say)
    decode = network.decode

    def slow(ids, cache, seqs):  # as a model that one can interrupt
        time.sleep(0.01)
        return decode(ids, cache, seqs)

    network.decode = slow
    prefill, stuck = network.prefill, iter([100])

    def get_stuck(ids, cache, seq):  # once, as at a very long prompt
        if "get stuck" in model.tokenizer.decode(ids.tolist()):
            Path(folder, "stuck").touch()
            time.sleep(next(stuck, 0))
        return prefill(ids, cache, seq)

    network.prefill = get_stuck
    generate.load = lambda path, **options: model
    cli._parser = lambda argv: make_parser()
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
