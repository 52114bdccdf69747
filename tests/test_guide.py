"""Constrained answers: control tokens at their places, declared tools, arguments that their schemas allow."""

from __future__ import annotations

import json
import os
import time

import jsonschema
import numpy as np
import pytest

import kimi_native as kn
from fakes import make_fake_model
from kimi_native import schema_grammar
from kimi_native.chat.template import get_format, render
from kimi_native.chat.tool import Tool
from kimi_native.chat.types import Message, ToolCall
from kimi_native.errors import RequestError
from kimi_native.guide import Guide, Start, ToolRules, answer_start, next_call_index, tool_rules
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.schema_grammar import GrammarCompiler
from tokenizer_files import SLOTS_WITHOUT_THINK, small_tokenizer
from tool_schemas import varied_schemas

FORCED_CALLS = int(os.environ.get("KIMI_NATIVE_FORCED_CALLS", "50"))
SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, CALL_END = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
INTEGER = {"type": "integer", "minimum": 0, "maximum": 99}


def tool(name="get", **properties) -> Tool:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return Tool(name, None, schema | {"additionalProperties": False})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + 5)


@pytest.fixture
def make_guide(tokenizer, compiler):
    def make(*tools, thinks=False, opened=False, choice="auto", first_index=0, budget=None):
        return Guide(
            tokenizer,
            vocab_size=tokenizer.vocab_size + 5,
            eos_ids=tokenizer.eos_ids,
            start=Start(thinks, opened),
            rules=tool_rules(tools, choice, first_index),
            compiler=compiler,
            thinking_budget=budget,
        )

    return make


def push(guide, tokenizer, text):
    for token_id in tokenizer.encode_with_control(text):
        assert guide.allowed()[token_id], f"{tokenizer.decode([token_id])!r} of {text!r}"
        guide.push(token_id)


def controls(guide, tokenizer) -> set[str]:
    """Names of the control tokens that may come; nothing past the vocabulary ever may."""
    allowed = guide.allowed()
    assert allowed.any()
    assert not allowed[tokenizer.vocab_size :].any()
    return {name for name, i in tokenizer.control_ids.items() if allowed[i]}


def may_be_text(guide, tokenizer) -> bool:
    return bool(guide.allowed()[tokenizer.encode("x")[0]])


END = {"<|im_end|>", "[EOS]"}


# ---- the format -----------------------------------------------------------------------------------------------------


def test_guide_lets_control_tokens_come_where_the_format_has_them(make_guide, tokenizer):
    guide = make_guide(tool("get", n=INTEGER), tool("put"), thinks=True, first_index=7)
    for text, expected, is_text in [
        ("", {"<think>", "</think>", SECTION, *END}, True),
        ("<think>", {"</think>", SECTION, *END}, True),
        ("hm", {"</think>", SECTION, *END}, True),
        ("</think>", {SECTION, *END}, True),
        ("hello", {SECTION, *END}, True),
        (SECTION, {CALL}, False),
        (CALL, set(), False),
        ("functions.", set(), False),
        ("get:7", {ARGUMENTS}, False),
        (ARGUMENTS, set(), False),
        ('{"n":5', set(), False),
        ("}", {CALL_END}, False),
        (CALL_END, {CALL, SECTION_END}, False),
        (CALL + "functions.put:8", {ARGUMENTS}, False),
        (ARGUMENTS + "{}", {CALL_END}, False),
        (CALL_END + SECTION_END, END, False),
        ("<|im_end|>", END, False),
    ]:
        push(guide, tokenizer, text)
        assert (controls(guide, tokenizer), may_be_text(guide, tokenizer)) == (expected, is_text)


@pytest.mark.parametrize(
    "text",
    [
        "functions.got",
        "get",
        "functions.get:8",
        "functions.get:77",
        "functions.get :7",
        f"functions.get:7{ARGUMENTS}" + '{"n": 5}',
        f"functions.get:7{ARGUMENTS}" + '{ "n":5}',
        f"functions.get:7{ARGUMENTS}" + '{"n":"5"}',
        f"functions.get:7{ARGUMENTS}" + '{"n":100}',
        f"functions.get:7{ARGUMENTS}" + '{"m":5}',
        f"functions.get:7{ARGUMENTS}" + "{}",
        f"functions.get:7{ARGUMENTS}" + '{"n":5}x',
        f"functions.get:7{CALL_END}",
    ],
)
def test_guide_rules_out_what_is_no_call(make_guide, tokenizer, text):
    guide = make_guide(tool("get", n=INTEGER), first_index=7)
    push(guide, tokenizer, SECTION + CALL)
    refused = False
    for token_id in tokenizer.encode_with_control(text):
        if not guide.allowed()[token_id]:
            refused = True
            break
        guide.push(token_id)
    assert refused


def test_guide_required_calls_right_after_the_reasoning(make_guide, tokenizer):
    guide = make_guide(tool(), choice="required")
    assert (controls(guide, tokenizer), may_be_text(guide, tokenizer)) == ({SECTION}, False)
    guide = make_guide(tool(), choice="required", thinks=True)
    push(guide, tokenizer, "<think>hm")
    assert controls(guide, tokenizer) == {"</think>", SECTION}
    push(guide, tokenizer, "</think>")
    assert (controls(guide, tokenizer), may_be_text(guide, tokenizer)) == ({SECTION}, False)


def test_guide_named_tool_is_called_once(make_guide, tokenizer):
    for choice in ({"name": "put"}, {"type": "function", "function": {"name": "put"}}):
        guide = make_guide(tool("get"), tool("put"), choice=choice)
        push(guide, tokenizer, SECTION + CALL + "functions.")
        assert not guide.allowed()[tokenizer.encode("g")[0]]
        push(guide, tokenizer, f"put:0{ARGUMENTS}{{}}{CALL_END}")
        assert controls(guide, tokenizer) == {SECTION_END}


def test_guide_none_rules_every_call_out(make_guide, tokenizer):
    guide = make_guide(tool(), choice="none", thinks=True)
    push(guide, tokenizer, "<think>")
    assert controls(guide, tokenizer) == {"</think>", *END}
    push(guide, tokenizer, "</think>x")
    assert controls(guide, tokenizer) == END


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_guide_ends_reasoning_at_its_budget(make_guide, tokenizer, choice):
    guide = make_guide(tool(), choice=choice, thinks=True, budget=3)
    push(guide, tokenizer, "<think>abc")
    assert (controls(guide, tokenizer), may_be_text(guide, tokenizer)) == ({"</think>"}, False)
    push(guide, tokenizer, "</think>")
    assert may_be_text(guide, tokenizer)
    guide = make_guide(thinks=True, budget=0)
    assert controls(guide, tokenizer) == {"</think>"}


def test_guide_of_a_budget_alone_leaves_the_rest_to_the_model(tokenizer):
    guide = Guide(
        tokenizer, vocab_size=600, eos_ids=(1,), start=Start(True), rules=None, compiler=None,
        thinking_budget=2,
    )  # fmt: skip
    for name in ("a", "b"):
        assert guide.allowed() is None
        guide.push(tokenizer.encode(name)[0])
    assert controls(guide, tokenizer) == {"</think>"}
    for text in ("</think>", SECTION, CALL, "x", CALL_END):
        guide.push(tokenizer.encode_with_control(text)[0])
        assert guide.allowed() is None


def test_guide_needs_the_control_tokens(tmp_path, compiler):
    tokenizer = small_tokenizer(tmp_path, SLOTS_WITHOUT_THINK)
    options = {"vocab_size": 600, "eos_ids": (1,), "start": Start(True), "compiler": compiler}
    with pytest.raises(RequestError, match="tokenizer must have </think>"):
        Guide(tokenizer, rules=None, thinking_budget=2, **options)
    bare = small_tokenizer(
        tmp_path / "bare", {0: ("[BOS]", True), 1: ("[EOS]", True), 2: ("<|im_end|>", True)}
    )
    with pytest.raises(RequestError, match=r"tokenizer must have <\|tool_calls_section_begin"):
        Guide(bare, rules=ToolRules((tool(),)), **options)


@pytest.mark.parametrize(
    ("format", "thinking", "expected"),
    [
        ("k2-instruct", None, Start(False)),
        ("k2-thinking", None, Start(True)),
        ("k2.5", None, Start(True, opened=True)),
        ("k2.5", False, Start(False)),
    ],
)
def test_answer_starts_where_the_prompt_leaves_it(
    make_guide, tokenizer, format, thinking, expected
):
    options = {} if thinking is None else {"thinking": thinking}
    ids = render([Message("user", "<think>")], format=format, tokenizer=tokenizer, **options)
    start = answer_start(get_format(format), tokenizer, ids)
    assert start == expected
    guide = make_guide(tool(), thinks=start.thinks, opened=start.opened)
    assert ("<think>" in controls(guide, tokenizer)) == (format == "k2-thinking")


# ---- choices and numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice", ["any", "required ", {"name": "nope"}, {}, {"function": "get"}, 3, ["get"]]
)
def test_tool_rules_refuse_another_choice(choice):
    with pytest.raises(RequestError, match=r"tool_choice must be .* with get"):
        tool_rules([tool()], choice, 0)


def test_tool_rules_need_a_tool_for_a_call():
    with pytest.raises(RequestError, match="with no tools"):
        tool_rules([], "required", 0)


def test_next_call_index_counts_the_conversation():
    def calls(*ids):
        return Message("assistant", tool_calls=[ToolCall(i, "get", "{}") for i in ids])

    ask = Message("user", "x")
    assert next_call_index([ask]) == 0
    assert next_call_index([ask, calls("call_a", "call_b")]) == 2
    assert next_call_index([ask, calls("functions.get:0"), calls("functions.get:1")]) == 2
    assert next_call_index([ask, calls("functions.get:8")]) == 9  # a history that was cut off


# ---- schemas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"not": {"type": "null"}}}}, r'Unimplemented keys: \["not"\]'),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ({"if": {}, "then": {}}, "if.*then"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"properties": {"a": {"items": [], "additionalItems": False}}}, "additionalItems"),
        ({"properties": {"a": {"oneOf": [{"type": "string"}, {"maxLength": 2}]}}}, "oneOf"),
        ({"properties": {"a": {"type": "float"}}}, "Invalid type: float"),
        ({"properties": {"a": {"pattern": "(", "type": "string"}}}, "tool get"),
        ({"properties": {"a": {"$ref": "http://example.com/x"}}}, "example.com"),
        ({"type": "string"}, "schema of an object .got type 'string'"),
        ({"properties": {"a": {"enum": ["x" * 70000]}}}, "at most 65536 bytes"),
        ({"properties": {"a": {"default": float("nan")}}}, "must be JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_grammar_refuses_what_it_cannot_enforce_by_name(compiler, schema, message):
    with pytest.raises(RequestError, match=message):
        compiler.arguments(Tool("get", None, schema), 298)


def test_grammar_refuses_a_schema_nested_without_end(compiler):
    schema: dict = {}
    for _ in range(5000):
        schema = {"properties": {"a": schema}}
    with pytest.raises(RequestError, match="nested"):
        compiler.arguments(Tool("get", None, schema), 298)


@pytest.mark.parametrize(
    "parameters", [None, {}, {"$schema": "https://json-schema.org/draft/2020-12/schema"}]
)
def test_grammar_without_a_schema_takes_any_object(compiler, tokenizer, parameters):
    for text, is_object in [
        ('{"a":[1,{"b":null}]}', True),
        ("{}", True),
        ("[]", False),
        ("1", False),
    ]:
        matcher = compiler.arguments(Tool("get", None, parameters), 298)
        taken = 0
        for token_id in tokenizer.encode(text):
            if not matcher.allowed()[token_id]:
                break
            matcher.push(token_id)
            taken += 1
        assert (taken == len(tokenizer.encode(text)) and matcher.allowed()[298]) == is_object


def takes(compiler, tokenizer, schema, text) -> bool:
    """Whether the grammar of a tool's schema takes a text as arguments."""
    matcher = compiler.arguments(Tool("get", None, schema), 298)
    for token_id in tokenizer.encode(text):
        if not matcher.allowed()[token_id]:
            return False
        matcher.push(token_id)
    return bool(matcher.allowed()[298])


def test_grammar_invents_no_properties_where_some_are_declared(compiler, tokenizer):
    a = {"type": "object", "properties": {"a": {"const": 1}}}
    both = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/a"}, "y": {"anyOf": [a, {"const": 2}]}},
    }
    for schema, text, is_taken in [
        (a, '{"a":1}', True),
        (a, "{}", True),
        (a, '{"b":1}', False),
        (a | {"additionalProperties": True}, '{"b":1}', True),
        (a | {"additionalProperties": {"const": 3}}, '{"a":1,"b":3}', True),
        (a | {"required": ["b"]}, '{"b":1}', True),
        (both | {"$defs": {"a": a}}, '{"x":{"a":1},"y":{"a":1}}', True),
        (both | {"$defs": {"a": a}}, '{"x":{"b":1}}', False),
        (both | {"$defs": {"a": a}}, '{"y":{"b":1}}', False),
        ({"allOf": [a, {"properties": {"b": {"const": 2}}}]}, '{"a":1,"b":2}', True),
        (
            a | {"anyOf": [{"properties": {"b": {"const": 2}}, "required": ["b"]}]},
            '{"a":1,"b":2}',
            True,
        ),
        ({"type": "object"}, '{"b":1}', True),
    ]:
        assert takes(compiler, tokenizer, schema, text) == is_taken, (schema, text)


def test_grammar_of_a_property_called_like_a_keyword_stays_a_property(compiler, tokenizer):
    schema = {
        "properties": {"format": {"type": "integer"}, "enum": {"const": 1}},
        "required": ["format", "enum"],
    }
    matcher = compiler.arguments(Tool("get", None, schema), 298)
    for token_id in tokenizer.encode('{"format":3,"enum":1}'):
        assert matcher.allowed()[token_id]
        matcher.push(token_id)
    with pytest.raises(ValueError, match="must be an allowed one"):
        matcher.push(tokenizer.encode("x")[0])


def test_grammar_is_compiled_once_and_the_cache_is_bounded(tokenizer, monkeypatch):
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    compiled = []
    original = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *a: compiled.append(a[1]) or original(*a))
    monkeypatch.setattr(schema_grammar, "MAX_CACHED_BYTES", 700)
    for _ in range(3):
        compiler.arguments(tool("get", n=INTEGER), 298)
    assert len(compiled) == 1
    for n in range(20):
        compiler.arguments(tool("get", **{f"p{n}": INTEGER}), 298)
    assert len(compiled) == 21
    assert compiler._cached_bytes <= 700
    assert compiler._cached_bytes == sum(map(len, compiler._compiled))


# ---- answers --------------------------------------------------------------------------------------------------------


def test_answers_of_a_random_model_keep_to_the_format(tokenizer):
    """Whatever the logits say: parsed calls are valid, and no stray control token is ever generated."""
    model, _, _ = make_fake_model(tokenizer, chat_format="k2-thinking", context=1024)
    tools = [tool("get", n=INTEGER), tool("put", on={"type": "boolean"})]
    reasons = set()
    for seed in range(30):
        result = model.generate("x", tools=tools, seed=seed, max_tokens=300, thinking_budget=20,
                                tool_choice=("auto", "required")[seed % 2])  # fmt: skip
        reasons.add(result.finish_reason)
        names = {v: k for k, v in tokenizer.control_ids.items()}
        said = [names[i] for i in result.ids if i in names]
        assert not [name for name in said if "reserved" in name or "user" in name]
        complete = result.tool_calls[: -1 if result.unfinished_call else None]
        for index, call in enumerate(complete):
            assert call.id == f"functions.{call.name}:{index}"
            schema = next(t.parameters for t in tools if t.name == call.name)
            jsonschema.validate(json.loads(call.arguments), schema)
    assert reasons >= {"tool_calls", "stop"}


def test_answer_that_does_not_get_through_ends_with_length(tokenizer):
    model, _, _ = make_fake_model(tokenizer, chat_format="k2-instruct")
    endless = tool("get", text={"type": "string", "minLength": 400})
    result = model.generate("x", tools=[endless], tool_choice="required", max_tokens=60)
    assert (result.finish_reason, result.unfinished_call) == ("length", True)


def test_answer_that_no_id_can_continue_is_an_error(tokenizer, monkeypatch):
    model, _, cache = make_fake_model(tokenizer, chat_format="k2-instruct")
    monkeypatch.setattr(schema_grammar.Matcher, "_bits", lambda self: np.zeros(100, dtype=np.uint8))
    with pytest.raises(RequestError, match="must allow an id"):
        model.generate("x", tools=[tool()], tool_choice="required")
    assert not cache.sequences


def test_answer_with_constrain_tools_off_is_the_models_own(tokenizer):
    said = f"{SECTION}{CALL}functions.nope:4{ARGUMENTS}{{{CALL_END}{SECTION_END}"
    model, _, _ = make_fake_model(tokenizer, lambda ids: said, chat_format="k2-instruct")
    result = model.generate("x", tools=[tool()], constrain_tools=False)
    assert [call.name for call in result.tool_calls] == ["nope"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "required"}, "with no tools"),
        (
            {"tool_choice": "required", "constrain_tools": False, "tools": [tool()]},
            "constrain_tools=True",
        ),
        ({"thinking_budget": -1}, "thinking_budget must be"),
        ({"thinking_budget": True}, "thinking_budget must be"),
        ({"constrain_tools": 1}, "constrain_tools must be"),
        ({"thinking_budget": 5, "raw_prompt": True}, "thinking_budget needs a prompt"),
        ({"tool_choice": "none", "raw_prompt": True}, "tool_choice needs a prompt"),
        ({"tools": [Tool("get", None, {"not": {}})]}, "tool get"),
    ],
)
def test_generate_refuses_bad_guiding_before_any_compute(tokenizer, options, message):
    model, network, _ = make_fake_model(tokenizer, chat_format="k2-thinking")
    for ask in (model.generate, model.stream):
        with pytest.raises(RequestError, match=message):
            ask("x", **options)
    assert network.prefills == []


def timed(monkeypatch, name: str) -> list[float]:
    """Seconds of every call of a method of Guide from now on."""
    method, seconds = getattr(Guide, name), []

    def measured(*args):
        started = time.perf_counter()
        try:
            return method(*args)
        finally:
            seconds.append(time.perf_counter() - started)

    monkeypatch.setattr(Guide, name, measured)
    return seconds


def test_forced_calls_of_random_weights_are_all_valid(tmp_path, monkeypatch, capsys):
    """KIMI_NATIVE_FORCED_CALLS calls (default 50) over 50 schemas; prints what the guide costs per token."""
    make_checkpoint(tmp_path / "tiny", preset="tiny", format="int4")
    model = kn.load(tmp_path / "tiny", max_context=4096, max_batch=1)
    assert model.chat_format == "k2-thinking"
    spent = timed(monkeypatch, "allowed"), timed(monkeypatch, "push")
    schemas, calls = varied_schemas(50), 0
    for n in range(FORCED_CALLS):
        declared = Tool(f"tool_{n % 50}", "A tool.", schemas[n % 50])
        options = {"temperature": 0.5 + n % 3, "max_tokens": 2000, "thinking_budget": n % 4}
        choice = {"name": declared.name}
        result = model.generate("x", tools=[declared], tool_choice=choice, seed=n, **options)
        assert result.finish_reason == "tool_calls", (n, result.text, declared)
        (call,) = result.tool_calls
        assert call.id == f"functions.{declared.name}:0"
        jsonschema.validate(json.loads(call.arguments), declared.parameters)
        calls += 1
    tokens = len(spent[0])
    with capsys.disabled():
        mean = [sum(times) / tokens * 1e6 for times in spent]
        print(f" [{calls} calls, {tokens} tokens: {mean[0]:.0f} + {mean[1]:.0f} us each]", end="")
