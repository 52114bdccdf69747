"""Ids of tool calls as models write them: repaired where they can mean one declared tool only, else left alone."""

from __future__ import annotations

import json

import pytest

from chat_corpus import ARGS, CALL, CALL_END, CLOSE, END, SECTION, SECTION_END, THINK, one
from kimi_native.chat.call_ids import DeclaredTools
from kimi_native.chat.parser import OutputParser, merge_events, parse
from kimi_native.chat.template import render
from kimi_native.chat.tool import Tool
from kimi_native.chat.types import ToolCallDelta
from kimi_native.errors import RequestError
from tokenizer_files import small_tokenizer


def tool(name, required=(), optional=()):
    properties = {key: {"type": "string"} for key in (*required, *optional)}
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return Tool(name, None, schema)


TOOLS = [
    tool("get_weather", ["city"], ["days"]),
    tool("run-python", ["code"]),
    tool("bash", ["command"]),
    tool("bash3", ["command", "version"]),
    tool("a.b", (), ["x"]),
    tool("log_2", (), ["y", "z"]),
]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ids_of(tokenizer, text):
    """Ids of a text with control tokens in it, one token per byte elsewhere."""
    return tokenizer.encode_with_control(text)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("functions.get_weather:0", "get_weather"),
        ("get_weather:0", "get_weather"),
        ("get_weather", "get_weather"),
        ("functions.get_weather", "get_weather"),
        ("functions_get_weather_0", "get_weather"),
        ("functions(get_weather):2.0", "get_weather"),
        ("functions ( get_weather ) : 2", "get_weather"),
        ("function.get_weather:0", "get_weather"),
        ("functions:get_weather:0", "get_weather"),
        ("functions.get_weather30", "get_weather"),
        ("functions.get-weather:1", "get_weather"),
        ("functions_run_python_4", "run-python"),
        ("run_python", "run-python"),
        ("functions.run-python#4", "run-python"),
        ("functions.a.b.7", "a.b"),
        ("log_2", "log_2"),
        ("functions.log-2", "log_2"),
        ("log_23", "log_2"),
        ("functions.bash:30", "bash"),
        ("bash3:0", "bash3"),
        ("bash3_0", "bash3"),
        # two tools may be meant, or none is
        ("functions.bash30", None),
        ("functions.aXb:0", None),
        ("functions.weather:0", None),
        ("functions.get_weathers:0", None),
        ("functions.Get_Weather:0", None),
        ("my.get_weather:0", None),
        ("functions.:0", None),
        ("", None),
        ("functions.get_weather:x", None),
        ("chatcmpl-tool-0123", None),
        (" " * 100_000 + "?", None),
        ("functions" * 20_000, None),
    ],
)
def test_name_in_a_header(header, name):
    assert DeclaredTools(TOOLS).name_in(header) == name


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ('{"city": "Rome"}', "get_weather"),
        ('{"city": "Rome", "days": 2}', "get_weather"),
        ('{"command": "ls"}', "bash"),
        ('{"command": "ls", "version": 3}', "bash3"),
        ('{"x": 1}', "a.b"),
        ("{}", None),  # a.b and log_2 both need nothing
        ('{"days": 2}', None),
        ('{"city": "Rome", "town": "Rome"}', None),
        ("[]", None),
        ('{"city": "Ro', None),
        ("", None),
        ("[" * 100_000, None),
    ],
)
def test_name_for_arguments(arguments, name):
    assert DeclaredTools(TOOLS).name_for(arguments) == name


@pytest.mark.parametrize(
    "parameters", [None, {}, {"properties": []}, {"properties": {}, "required": 1}, {"required": 1}]
)
def test_name_for_arguments_survives_any_schema(parameters):
    declared = DeclaredTools(
        [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    )
    assert declared.name_for('{"a": 1}') is None


def test_tools_that_are_no_functions_declare_no_name():
    assert not DeclaredTools([{"type": "_plugin"}, {"function": 1}, {"function": {"name": 2}}])
    with pytest.raises(RequestError, match="names must differ"):
        DeclaredTools([TOOLS[0], TOOLS[0]])


# ---- answers -------------------------------------------------------------------------------------------------------


def told(tokenizer, text, tools=TOOLS, prompt_ids=()):
    parsed = parse(
        tokenizer, ids_of(tokenizer, text), format="k2-thinking", prompt_ids=prompt_ids, tools=tools
    )
    return [(call.id, call.name, call.arguments) for call in parsed.tool_calls]


WRITTEN = (
    one("functions_get_weather_9", "{}")
    + one("functions.get_weather:5", "{}")
    + one("bash3:0", "")
    + one("functions.unknown:0", "{}")
    + one("3", '{"code": "1"}')
    + one("4", "{}")
    + one("run_python", "{}")
)
ANSWER = f"{THINK}a{CLOSE}{SECTION}{WRITTEN}{SECTION_END}{END}"
TOLD = [
    ("functions.get_weather:0", "get_weather", "{}"),
    ("functions.get_weather:5", "get_weather", "{}"),
    ("functions.bash3:2", "bash3", "{}"),
    ("functions.unknown:0", "unknown", "{}"),
    ("functions.run-python:4", "run-python", '{"code": "1"}'),
    ("4", "4", "{}"),
    ("functions.run-python:6", "run-python", "{}"),
]


def test_repaired_ids_count_the_calls(small):
    assert told(small, ANSWER) == TOLD


@pytest.mark.parametrize("tools", [None, [], [{"type": "_plugin"}]])
def test_without_tools_ids_stay_as_written(small, tools):
    written = ["functions_get_weather_9", "functions.get_weather:5", "bash3:0"]
    assert [id for id, _, _ in told(small, ANSWER, tools)][:3] == written


def test_a_repaired_id_is_not_one_that_is_there(small):
    text = f"{CLOSE}{SECTION}{one('functions.bash:1', '')}{one('bash', '')}{SECTION_END}{END}"
    assert [id for id, _, _ in told(small, text)] == ["functions.bash:1", "functions.bash:2"]


def history(*call_ids):
    calls = [
        {"id": id, "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
        for id in call_ids
    ]
    results = [{"role": "tool", "tool_call_id": id, "content": "r"} for id in call_ids]
    return [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": calls},
        *results,
    ]


def test_repaired_ids_count_from_the_calls_of_the_prompt(small):
    prompt = render(history("functions.bash:0", "call_x"), format="k2-thinking", tokenizer=small)
    text = f"{CLOSE}{SECTION}{one('bash', '')}{one('get_weather', '')}{SECTION_END}{END}"
    assert [id for id, _, _ in told(small, text, prompt_ids=prompt)] == [
        "functions.bash:2",
        "functions.get_weather:3",
    ]


def test_a_repaired_id_is_none_of_the_prompt(small):
    prompt = render(history("functions.bash:1"), format="k2-thinking", tokenizer=small)
    text = f"{CLOSE}{SECTION}{one('bash', '')}{SECTION_END}{END}"
    assert [id for id, _, _ in told(small, text, prompt_ids=prompt)] == ["functions.bash:2"]


def test_text_of_the_prompt_is_no_call(small):
    message = {"role": "user", "content": f"{CALL}functions.bash:0{ARGS}{{}}{CALL_END}"}
    prompt = render([message], format="k2-thinking", tokenizer=small)
    text = f"{CLOSE}{SECTION}{one('bash', '')}{SECTION_END}{END}"
    assert [id for id, _, _ in told(small, text, prompt_ids=prompt)] == ["functions.bash:0"]


def test_resumed_at_any_token_the_last_calls_are_told_the_same(small):
    prompt = render(history("functions.bash:0"), format="k2-thinking", tokenizer=small)
    ids = ids_of(small, ANSWER)
    whole = parse(small, ids, format="k2-thinking", prompt_ids=prompt, tools=TOOLS).tool_calls
    assert [call.id for call in whole][::2] == [
        "functions.get_weather:1",
        "functions.bash3:3",
        "functions.run-python:5",
        "functions.run-python:7",
    ]
    numbers = set()
    for cut in range(len(ids)):
        parser = OutputParser(
            small, format="k2-thinking", prompt_ids=[*prompt, *ids[:cut]], tools=TOOLS
        )
        events = [event for token_id in ids[cut:] for event in parser.push(token_id)]
        calls = merge_events([*events, *parser.finish()]).tool_calls
        assert calls == whole[len(whole) - len(calls) :]
        numbers.add(len(calls))
    assert numbers == set(range(len(whole) + 1))


def test_a_call_without_a_name_waits_for_its_arguments(small):
    def events_of(text):
        parser = OutputParser(small, format="k2-instruct", tools=TOOLS)
        events = [event for token_id in ids_of(small, text) for event in parser.push(token_id)]
        return parser, events

    arguments = json.dumps({"city": "Rome"})
    _, events = events_of(f"{SECTION}{CALL}0{ARGS}{arguments}")
    assert events == []
    parser, events = events_of(f"{SECTION}{CALL}0{ARGS}{arguments}{CALL_END}")
    assert events == [
        ToolCallDelta(0, "functions.get_weather:0", "get_weather", ""),
        ToolCallDelta(0, None, None, arguments),
    ]
    parser, _ = events_of(f"{SECTION}{CALL}0{ARGS}" + '{"city": "Ro')
    finished = merge_events(parser.finish("length"))
    assert [(c.id, c.name, c.arguments) for c in finished.tool_calls] == [
        ("0", "0", '{"city": "Ro')
    ]
    assert finished.unfinished_call


def test_a_call_with_a_name_does_not_wait(small):
    parser = OutputParser(small, format="k2-instruct", tools=TOOLS)
    text = f"{SECTION}{CALL}functions_bash_0{ARGS}"
    events = [event for token_id in ids_of(small, text) for event in parser.push(token_id)]
    assert events == [ToolCallDelta(0, "functions.bash:0", "bash", "")]
