"""Answers as models write them, every interleaving and failure seen so far, and what each of them means."""

from __future__ import annotations

from kimi_native.chat.call_ids import tool_name
from kimi_native.chat.parser import ParsedOutput
from kimi_native.chat.types import ToolCall

THINK, CLOSE = "<think>", "</think>"
SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
END = "<|im_end|>"


def one(header, arguments):
    return CALL + header + ARGS + arguments + CALL_END


W0, W1 = "functions.get_weather:0", "functions.get_weather:1"
BEIJING = '{"city": "Beijing"}'
LONG = '{"code": "' + "x = 1\\n" * 1200 + '"}'
ONE = SECTION + one(W0, BEIJING) + SECTION_END


def calls(*pairs):
    return tuple(ToolCall(id, tool_name(id), arguments) for id, arguments in pairs)


def out(reasoning=None, content=None, tool_calls=(), reason=None, unfinished=False):
    reason = reason or ("tool_calls" if tool_calls else "stop")
    return ParsedOutput(reasoning, content, tuple(tool_calls), unfinished, reason)


WEATHER = calls((W0, BEIJING))

# name: what the model wrote, what it means; of k2-thinking
THINKING = {
    "plain": (f"{THINK}hmm{CLOSE}Hello!{END}", out("hmm", "Hello!")),
    "EOS ends too": (f"{THINK}hmm{CLOSE}Hello!<EOS>", out("hmm", "Hello!")),
    "ids after the end": (f"{THINK}a{CLOSE}b{END}c{THINK}d{END}", out("a", "b")),
    "no opening": (f"hmm{CLOSE}Hello!{END}", out("hmm", "Hello!")),
    "empty reasoning": (f"{THINK}{CLOSE}Hello!{END}", out(None, "Hello!")),
    "blank reasoning": (f"{THINK} \n {CLOSE}Hello!{END}", out(None, "Hello!")),
    "reasoning alone": (f"{THINK}hmm{END}", out("hmm")),
    "nothing": (END, out()),
    "no ids": ("", out(reason="length")),
    "opening twice": (f"{THINK}a{THINK}b{CLOSE}c{END}", out("ab", "c")),
    "stray close": (f"{THINK}a{CLOSE}b{CLOSE}c{END}", out("a", "bc")),
    "thinks again": (f"{THINK}a{CLOSE}b{THINK}c{CLOSE}d{END}", out("ac", "bd")),
    "blank before it thinks again": (f"{THINK}a{CLOSE}\n{THINK}b{CLOSE}c{END}", out("ab", "c")),
    "cut in reasoning": (f"{THINK}hm", out("hm", reason="length")),
    "cut after reasoning": (f"{THINK}hm{CLOSE}", out("hm", reason="length")),
    "cut in content": (f"{THINK}hm{CLOSE}Hel", out("hm", "Hel", reason="length")),
    "cut in a character": (f"{THINK}a{CLOSE}b<E6><9C>", out("a", "b\ufffd", reason="length")),
    "cut in a reasoning character": (f"{THINK}a<F0><9F>{CLOSE}b{END}", out("a\ufffd", "b")),
    "invalid bytes": (f"{THINK}<FF>a{CLOSE}<C3>(b{END}", out("\ufffda", "\ufffd(b")),
    "marker inside a character": (f"{THINK}a{CLOSE}<C3>{CLOSE}<A9>{END}", out("a", "é")),
    "reasoning whitespace inside": (f"{THINK} a \n b \n\n{CLOSE}c{END}", out(" a \n b", "c")),
    "content whitespace": (f"{THINK}a{CLOSE}\n\n b \n{END}", out("a", "\n\n b \n")),
    "blank content without tools": (f"{THINK}a{CLOSE}\n\n{END}", out("a", "\n\n")),
    "call": (f"{THINK}hmm{CLOSE}{ONE}{END}", out("hmm", None, WEATHER)),
    "call with content": (
        f"{THINK}hmm{CLOSE}Let me see.\n{ONE}{END}",
        out("hmm", "Let me see.\n", WEATHER),
    ),
    "call after blank content": (f"{THINK}hmm{CLOSE}\n \n{ONE}{END}", out("hmm", None, WEATHER)),
    "call out of reasoning": (f"{THINK}hmm\n{ONE}{END}", out("hmm", None, WEATHER)),
    "call out of unopened reasoning": (f"hmm{ONE}{END}", out("hmm", None, WEATHER)),
    "call first": (f"{ONE}{END}", out(None, None, WEATHER)),
    "call without section": (f"{THINK}a{CLOSE}b{one(W0, BEIJING)}{END}", out("a", "b", WEATHER)),
    "call without section, out of reasoning": (
        f"{THINK}hmm {one(W0, BEIJING)}{END}",
        out("hmm", None, WEATHER),
    ),
    "stop missing": (f"{THINK}a{CLOSE}{ONE}", out("a", None, WEATHER, "length")),
    "two calls": (
        f"{THINK}a{CLOSE}{SECTION}{one(W0, BEIJING)}{one(W1, '{}')}{SECTION_END}{END}",
        out("a", None, calls((W0, BEIJING), (W1, "{}"))),
    ),
    "two calls, lines between": (
        f"{THINK}a{CLOSE}{SECTION}\n{one(W0, BEIJING)}\n and \n{one(W1, '{}')}\n{SECTION_END}\n{END}",
        out("a", None, calls((W0, BEIJING), (W1, "{}"))),
    ),
    "two sections": (
        f"{THINK}a{CLOSE}{ONE}text{SECTION}{one(W1, '{}')}{SECTION_END}{END}",
        out("a", None, calls((W0, BEIJING), (W1, "{}"))),
    ),
    "second call without section": (
        f"{THINK}a{CLOSE}{ONE}{one(W1, '{}')}{END}",
        out("a", None, calls((W0, BEIJING), (W1, "{}"))),
    ),
    "text after the section": (f"{THINK}a{CLOSE}{ONE}Done.{END}", out("a", None, WEATHER)),
    "thinking after the section": (
        f"{THINK}a{CLOSE}{ONE}{THINK}b{CLOSE}c{END}",
        out("a", None, WEATHER),
    ),
    "text before the call": (
        f"{THINK}a{CLOSE}{SECTION}I call{one(W0, BEIJING)}{SECTION_END}{END}",
        out("a", None, WEATHER),
    ),
    "empty section": (f"{THINK}a{CLOSE}b{SECTION}{SECTION_END}c{END}", out("a", "b")),
    "section twice": (f"{THINK}a{CLOSE}{SECTION}{ONE}{END}", out("a", None, WEATHER)),
    "section end missing": (
        f"{THINK}a{CLOSE}{SECTION}{one(W0, BEIJING)}{END}",
        out("a", None, WEATHER),
    ),
    "call end missing": (
        f"{THINK}a{CLOSE}{SECTION}{CALL}{W0}{ARGS}{BEIJING}{SECTION_END}{END}",
        out("a", None, WEATHER),
    ),
    "call end missing before the next call": (
        f"{THINK}a{CLOSE}{SECTION}{CALL}{W0}{ARGS}{BEIJING}{one(W1, '{}')}{SECTION_END}{END}",
        out("a", None, calls((W0, BEIJING), (W1, "{}"))),
    ),
    "call and section end missing": (
        f"{THINK}a{CLOSE}{SECTION}{CALL}{W0}{ARGS}{BEIJING}{END}",
        out("a", None, WEATHER, unfinished=True),
    ),
    "cut in arguments": (
        f"{THINK}a{CLOSE}{SECTION}{CALL}{W0}{ARGS}" + '{"city": "Bei ',
        out("a", None, calls((W0, '{"city": "Bei ')), "length", unfinished=True),
    ),
    "cut in a second call's arguments": (
        f"{THINK}a{CLOSE}{SECTION}{one(W0, BEIJING)}{CALL}{W1}{ARGS}" + "{",
        out("a", None, calls((W0, BEIJING), (W1, "{")), "length", unfinished=True),
    ),
    "cut before arguments": (
        f"{THINK}a{CLOSE}{SECTION}{CALL}{W0}{ARGS}\n",
        out("a", None, calls((W0, "")), "length", unfinished=True),
    ),
    "cut in the header": (
        f"{THINK}a{CLOSE}b{SECTION}{CALL}functions.get_w",
        out("a", "b", reason="length", unfinished=True),
    ),
    "cut in a second header": (
        f"{THINK}a{CLOSE}{SECTION}{one(W0, BEIJING)}{CALL}funct{END}",
        out("a", None, WEATHER, unfinished=True),
    ),
    "empty arguments": (
        f"{SECTION}{one(W0, '')}{SECTION_END}{END}",
        out(None, None, calls((W0, "{}"))),
    ),
    "blank arguments": (
        f"{SECTION}{one(W0, ' ')}{SECTION_END}{END}",
        out(None, None, calls((W0, "{}"))),
    ),
    "empty arguments, no call end": (
        f"{SECTION}{CALL}{W0}{ARGS}{SECTION_END}{END}",
        out(None, None, calls((W0, "{}"))),
    ),
    "no argument part": (
        f"{SECTION}{CALL}{W0}{CALL_END}{CALL}{W1}{SECTION_END}{END}",
        out(None, None, calls((W0, "{}"), (W1, "{}"))),
    ),
    "no argument part before the next call": (
        f"{SECTION}{CALL}{W0}{one(W1, BEIJING)}{SECTION_END}{END}",
        out(None, None, calls((W0, "{}"), (W1, BEIJING))),
    ),
    "arguments with space around": (
        f"{SECTION}{one(W0, ' ' + BEIJING + chr(10))}{SECTION_END}{END}",
        out(None, None, WEATHER),
    ),
    "line breaks in the header": (
        f"{SECTION}{one(chr(10) + W0 + ' ' + chr(10), BEIJING)}{SECTION_END}{END}",
        out(None, None, WEATHER),
    ),
    "header of digits": (
        f"{SECTION}{one('3', '{}')}{SECTION_END}{END}",
        out(None, None, calls(("3", "{}"))),
    ),
    "header without prefix": (
        f"{SECTION}{one('run-it.now:12', '{}')}{SECTION_END}{END}",
        out(None, None, [ToolCall("run-it.now:12", "run-it.now", "{}")]),
    ),
    "header without number": (
        f"{SECTION}{one('functions.f', '{}')}{SECTION_END}{END}",
        out(None, None, [ToolCall("functions.f", "f", "{}")]),
    ),
    "empty header": (
        f"{SECTION}{one(' ', '{}')}{one(W1, BEIJING)}{SECTION_END}{END}",
        out(None, None, calls((W1, BEIJING))),
    ),
    "header that names nothing": (f"{SECTION}{one('functions.:0', '{}')}{SECTION_END}{END}", out()),
    "arguments without a call": (f"{SECTION}{ARGS}{BEIJING}{CALL_END}{SECTION_END}{END}", out()),
    "argument begin twice": (
        f"{SECTION}{CALL}{W0}{ARGS}{ARGS}{BEIJING}{CALL_END}{SECTION_END}{END}",
        out(None, None, WEATHER),
    ),
    "stray markers in content": (
        f"{CLOSE}a{SECTION_END}b{CALL_END}c{ARGS}d<|im_middle|>e<|im_user|>f[BOS]g{END}",
        out(None, "abcdefg"),
    ),
    "stray markers in reasoning": (
        f"{THINK}a{SECTION_END}b{CALL_END}c{ARGS}d<|im_system|>e{END}",
        out("abcde"),
    ),
    "thinking inside arguments": (
        f"{SECTION}{CALL}{W0}{ARGS}{{{THINK}{CLOSE}}}{CALL_END}{SECTION_END}{END}",
        out(None, None, calls((W0, "{}"))),
    ),
    "long arguments": (
        f"{SECTION}{one(W0, LONG)}{SECTION_END}{END}",
        out(None, None, calls((W0, LONG))),
    ),
    "characters of several bytes": (
        f"{THINK}月🙂{CLOSE}é月{SECTION}{one('functions.搜索:0', chr(34) + '北京🙂' + chr(34))}{SECTION_END}{END}",
        out("月🙂", "é月", calls(("functions.搜索:0", '"北京🙂"'))),
    ),
    "look-alikes as ordinary text": (
        f"{THINK}a{CLOSE}< |im_end|> </ think> <|tool_call_begin| >{END}",
        out("a", "< |im_end|> </ think> <|tool_call_begin| >"),
    ),
}

PLAIN = {
    "plain": (f"Hello!{END}", out(None, "Hello!")),
    "call": (f"Let me see.{ONE}{END}", out(None, "Let me see.", WEATHER)),
    "call after blank content": (f" \n{ONE}{END}", out(None, None, WEATHER)),
    "stray close": (f"a{CLOSE}b{END}", out(None, "ab")),
    "thinks all the same": (f"{THINK}a{CLOSE}b{END}", out("a", "b")),
    "cut": ("Hel", out(None, "Hel", reason="length")),
}
