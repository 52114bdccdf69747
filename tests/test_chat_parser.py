"""Output parsing: a corpus with its answers, every stream cut at every token, a one-shot oracle, and fuzzed streams."""

from __future__ import annotations

import random

import pytest

from chat_corpus import (
    ARGS,
    CALL,
    CALL_END,
    CLOSE,
    END,
    ONE,
    PLAIN,
    SECTION,
    SECTION_END,
    THINK,
    THINKING,
    W0,
    W1,
    WEATHER,
    calls,
    one,
    out,
)
from kimi_native.chat.call_ids import tool_name
from kimi_native.chat.parser import OutputParser, merge_events, parse
from kimi_native.chat.template import FORMATS, render
from kimi_native.chat.types import (
    ContentDelta,
    Finish,
    ReasoningDelta,
    ToolCallDelta,
    Usage,
)
from kimi_native.errors import RequestError, TokenizerError
from kimi_native.tokenizer import load_tokenizer
from naive_parser import naive_parse, to_ids
from tokenizer_files import (
    KIMI_SLOTS,
    SLOTS_WITHOUT_THINK,
    published_folder,
    small_tokenizer,
)

CORPUS = [("k2-thinking", name) for name in THINKING] + [
    (format, name) for format in ("k2-instruct", "moonlight", None) for name in PLAIN
]


# As text, the marker's own first byte ends the unfinished character.
ONLY_AS_IDS = ("marker inside a character",)


def case(format, name):
    return (THINKING if format == "k2-thinking" else PLAIN)[name]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def without_think(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), SLOTS_WITHOUT_THINK)


@pytest.fixture(scope="session")
def published():
    return load_tokenizer(published_folder())


def run(tokenizer, ids, format, prompt_ids=()):
    """The events of a stream, one push at a time."""
    parser = OutputParser(tokenizer, format=format, prompt_ids=prompt_ids)
    events = []
    for token_id in ids:
        events += parser.push(token_id)
    return [*events, *parser.finish()]


# ---- the corpus ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_byte", [False, True])
@pytest.mark.parametrize(("format", "name"), CORPUS)
def test_parse_gives_the_expected_output(small, format, name, by_byte):
    text, expected = case(format, name)
    ids = to_ids(small, text, by_byte)
    assert parse(small, ids, format=format) == expected
    assert merge_events(run(small, ids, format)) == expected


@pytest.mark.parametrize(("format", "name"), CORPUS)
def test_parse_gives_the_expected_output_with_the_published_tokenizer(published, format, name):
    text, expected = case(format, name)
    assert parse(published, to_ids(published, text, False), format=format) == expected


@pytest.mark.parametrize("by_byte", [False, True])
@pytest.mark.parametrize("name", [n for n in THINKING if n not in ONLY_AS_IDS])
def test_parse_finds_think_as_text_where_it_has_no_id(without_think, name, by_byte):
    text, expected = THINKING[name]
    if name == "thinking inside arguments":
        expected = out(None, None, calls((W0, "{<think></think>}")))
    ids = to_ids(without_think, text, by_byte)
    assert parse(without_think, ids, format="k2-thinking") == expected


@pytest.mark.parametrize(("format", "name"), CORPUS)
def test_stream_cut_at_any_token_has_only_said_what_stays(small, without_think, format, name):
    """What a cut stream gave out is a beginning of what the whole stream gives out: nothing is ever taken back."""
    text, _ = case(format, name)
    for tokenizer in [small, without_think] if format == "k2-thinking" else [small]:
        ids = to_ids(tokenizer, text[:400], by_byte=True)
        whole = merge_events(run(tokenizer, ids, format))
        parser = OutputParser(tokenizer, format=format)
        said = []
        for token_id in ids:
            said += parser.push(token_id)
            until_now = merge_events([*said, Finish("cut", Usage(0, 0))])
            assert (whole.reasoning or "").startswith(until_now.reasoning or "")
            assert (whole.content or "").startswith(until_now.content or "")
            for so_far, in_the_end in zip(until_now.tool_calls, whole.tool_calls, strict=False):
                assert so_far.id == in_the_end.id
                assert in_the_end.arguments.startswith(so_far.arguments)
            assert len(until_now.tool_calls) <= len(whole.tool_calls)


@pytest.mark.parametrize(("format", "name"), CORPUS)
def test_stream_resumed_at_any_token_equals_the_whole(small, format, name):
    """The answer so far as part of the prompt: the rest of the stream tells the rest."""
    text, _ = case(format, name)
    ids = to_ids(small, text[:300], by_byte=False)
    end = next((n + 1 for n, i in enumerate(ids) if i in small.eos_ids), len(ids))
    ids = ids[:end]  # an ended answer is not continued
    prompt = render(
        [{"role": "user", "content": "Hi"}], format=format or "moonlight", tokenizer=small
    )
    whole = parse(small, ids, format=format)
    for cut in range(len(ids)):
        first = OutputParser(small, format=format, prompt_ids=prompt)
        before = [event for i in ids[:cut] for event in first.push(i)]
        rest = merge_events(run(small, ids[cut:], format, [*prompt, *ids[:cut]]))
        said = merge_events([*before, Finish("cut", Usage(0, 0))])
        assert rest.unfinished_call == whole.unfinished_call
        held = (whole.content or "")[len(said.content or "") :]
        assert held.endswith(rest.content or ""), (said, rest)
        if rest.tool_calls:
            assert rest.tool_calls == whole.tool_calls[-len(rest.tool_calls) :]


# ---- a one-shot oracle over random streams -------------------------------------------------------------------------


def random_stream(rng, tokenizer, length):
    control = list(tokenizer.control_ids.values())
    names = [THINK, CLOSE, SECTION, SECTION_END, CALL, ARGS, CALL_END]
    markers = [tokenizer.control_ids[n] for n in names if n in tokenizer.control_ids]
    texts = ["a", " ", "\n", "{", "}", '"', "functions.", "f:0", "月", "🙂", "the ", ":1", "\t \n"]
    texts += [] if THINK in tokenizer.control_ids else [THINK, CLOSE, "</th", "<thin", "k>", "<"]
    ids = []
    while len(ids) < length:
        choice = rng.random()
        if choice < 0.45:
            ids += tokenizer.encode(rng.choice(texts))
        elif choice < 0.85:
            ids.append(rng.choice(markers))
        elif choice < 0.9:
            ids.append(rng.randrange(256))  # often not UTF-8
        elif choice < 0.97:
            ids.append(rng.choice(control))
        else:
            ids.append(rng.choice(tokenizer.eos_ids))
    return ids


def test_random_streams_equal_the_oracle(small):
    rng = random.Random(20)
    for _ in range(4000):
        ids = random_stream(rng, small, rng.randint(0, 30))
        for format in ("k2-thinking", "k2-instruct"):
            expected = naive_parse(small, ids, format == "k2-thinking")
            assert parse(small, ids, format=format) == expected, small.decode(ids)


def test_think_as_text_equals_think_as_ids(small, without_think):
    rng = random.Random(22)
    for _ in range(1500):
        pieces = rng.choices(["a", " ", "\n\n", "月", "<", "</", "th", THINK, CLOSE, "🙂 "], k=12)
        text = "".join(pieces) + rng.choice(["", ONE, END, ONE + END])
        by_byte = rng.random() < 0.5
        expected = parse(small, to_ids(small, text, by_byte), format="k2-thinking")
        ids = to_ids(without_think, text, by_byte)
        assert parse(without_think, ids, format="k2-thinking") == expected, text


def client_text(events):
    for event in events:
        if isinstance(event, ReasoningDelta | ContentDelta):
            yield event.text
        elif isinstance(event, ToolCallDelta):
            yield (event.id or "") + (event.name or "") + event.arguments


@pytest.mark.parametrize("format", [*FORMATS, None])
def test_random_streams_leak_no_marker(small, without_think, format):
    rng = random.Random(21)
    for _ in range(1500):
        for tokenizer in (small, without_think):
            ids = random_stream(rng, tokenizer, rng.randint(0, 40))
            names = list(tokenizer.control_ids)
            if tokenizer is without_think and format in ("k2-thinking", "k2.5", "k2.7-code"):
                # as text it is a marker in reasoning and content alone
                names += [THINK, CLOSE] if CALL not in tokenizer.decode(ids) else []
            events = run(tokenizer, ids, format)
            assert isinstance(events[-1], Finish)
            channels = merge_events(events)
            told = [channels.reasoning or "", channels.content or "", *client_text(events)]
            for text in told:
                assert not any(name in text for name in names), (text, tokenizer.decode(ids))


# ---- events --------------------------------------------------------------------------------------------------------


def test_events_of_a_call(small):
    text = (
        f"{THINK}a b{CLOSE}ok{SECTION}{CALL}{W0}{ARGS}"
        + ' {"x": 1}'
        + f"{CALL_END}{SECTION_END}{END}"
    )
    ids = to_ids(small, text, by_byte=True)
    events = run(small, ids, "k2-thinking")
    assert events == [
        *(ReasoningDelta("a"), ReasoningDelta(" b")),
        *(ContentDelta("o"), ContentDelta("k")),
        ToolCallDelta(0, W0, "get_weather", ""),
        *(ToolCallDelta(0, None, None, t) for t in ["{", '"', "x", '"', ":", " 1", "}"]),
        Finish("tool_calls", Usage(0, len(ids))),
    ]


def test_events_hold_back_no_more_than_needed(small):
    parser = OutputParser(small, format="k2-thinking")
    pushes = [parser.push(i) for i in to_ids(small, "a \n<C3>", by_byte=True)]
    assert pushes == [[ReasoningDelta("a")], [], [], []]
    assert parser.push(0xA9) == [ReasoningDelta(" \né")]


def test_text_markers_hold_back_no_more_than_needed(without_think):
    parser = OutputParser(without_think, format="k2-thinking")
    pushes = [parser.push(i) for i in to_ids(without_think, "</thx<</think>y", by_byte=True)]
    texts = ["".join(client_text(events)) for events in pushes]
    assert texts == ["", "", "", "", "</thx", "", "<", "", "", "", "", "", "", "", "y"]


def test_finish_reason_follows_the_caller(small):
    ids = to_ids(small, f"{CLOSE}{SECTION}{one(W0, '{}')}", by_byte=False)
    for given, expected in [
        ("stop", "tool_calls"),
        ("length", "length"),
        ("cancelled", "cancelled"),
    ]:
        parser = OutputParser(small, format="k2-thinking", prompt_ids=[1, 2, 3])
        for i in ids:
            parser.push(i)
        assert parser.finish(given)[-1] == Finish(expected, Usage(3, len(ids)))
    parser = OutputParser(small, format=None)
    parser.push(ids[0])
    assert parser.finish(usage=Usage(7, 8)) == [Finish("length", Usage(7, 8))]
    with pytest.raises(RuntimeError, match="finish must be called once"):
        parser.finish()


def test_ids_after_the_end_do_not_count(small):
    parser = OutputParser(small, format=None)
    for i in to_ids(small, f"ab{END}cd", by_byte=True):
        parser.push(i)
    assert parser.finish()[-1] == Finish("stop", Usage(0, 3))


def test_unknown_format_and_id_are_refused(small):
    with pytest.raises(RequestError, match="format must be one of"):
        OutputParser(small, format="chatml")
    with pytest.raises(TokenizerError, match="id must name a token"):
        OutputParser(small, format=None).push(small.vocab_size)
    with pytest.raises(RequestError, match="must end with Finish"):
        merge_events([ContentDelta("a")])


# ---- prompts -------------------------------------------------------------------------------------------------------


def test_prefilled_thinking_decides_the_first_state(small, without_think):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
        {"role": "user", "content": "Hi"},
    ]
    for tokenizer in (small, without_think):
        ids = to_ids(tokenizer, f"a{CLOSE}b{END}", by_byte=True)
        for thinking, expected in [(True, out("a", "b")), (False, out(None, "ab"))]:
            prompt = render(messages, format="k2.5", tokenizer=tokenizer, thinking=thinking)
            assert parse(tokenizer, ids, format="k2.5", prompt_ids=prompt) == expected
        prompt = render(messages, format="k2-thinking", tokenizer=tokenizer)
        assert parse(tokenizer, ids, format="k2-thinking", prompt_ids=prompt) == out("a", "b")
        assert parse(tokenizer, ids, format="k2.5") == out("a", "b")


def test_prefilled_call_is_told_to_the_client(small):
    prompt = render([{"role": "user", "content": "Hi"}], format="k2-thinking", tokenizer=small)
    prompt += to_ids(
        small, f"{THINK}{CLOSE}x{SECTION}{one(W0, '{}')}{CALL}{W1}{ARGS}" + '{"c', by_byte=False
    )
    ids = to_ids(small, f'": 1}}{CALL_END}{SECTION_END}{END}', by_byte=False)
    parsed = parse(small, ids, format="k2-thinking", prompt_ids=prompt)
    assert parsed == out(None, None, calls((W1, '{"c": 1}')))


def test_prefilled_section_expects_a_call(small):
    prompt = render([{"role": "user", "content": "Hi"}], format="k2-instruct", tokenizer=small)
    prompt += to_ids(small, f"Well.{SECTION}{CALL}functions.", by_byte=False)
    ids = to_ids(small, f"f:0{ARGS}{CALL_END}{SECTION_END}{END}", by_byte=False)
    parsed = parse(small, ids, format="k2-instruct", prompt_ids=prompt)
    assert parsed == out(None, None, calls(("functions.f:0", "{}")))


def test_a_call_survives_the_round_trip_into_the_next_prompt(small):
    """What the parser gives back, rendered as history, is what the model wrote."""
    written = f"{THINK}hmm{CLOSE}Let me see.{ONE}{END}"
    parsed = parse(small, to_ids(small, written, by_byte=False), format="k2-thinking")
    messages = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": parsed.content,
            "reasoning_content": parsed.reasoning,
            "tool_calls": [
                {"id": c.id, "function": {"name": c.name, "arguments": c.arguments}}
                for c in parsed.tool_calls
            ],
        },
    ]
    prompt = render(messages, format="k2-thinking", tokenizer=small, add_generation_prompt=False)
    assert small.decode(prompt).endswith("<|im_middle|>" + written)


def test_the_other_spelling_of_the_section_is_known(tmp_path):
    slots = {
        k: (name.replace("tool_calls_section", "tool_call_section"), special)
        for k, (name, special) in KIMI_SLOTS.items()
    }
    tokenizer = small_tokenizer(tmp_path, slots)
    text = ONE.replace("tool_calls_section", "tool_call_section")
    ids = tokenizer.encode_with_control(f"a{text}{END}")
    assert parse(tokenizer, ids, format="k2-instruct") == out(None, "a", WEATHER)


@pytest.mark.parametrize(
    ("call_id", "name"),
    [
        ("functions.get_weather:0", "get_weather"),
        ("functions.a.b-c_d:12", "a.b-c_d"),
        ("a:b:3", "a:b"),
        ("get_weather:0", "get_weather"),
        ("functions.f", "f"),
        ("f", "f"),
        ("functions.:1", ""),
        ("", ""),
    ],
)
def test_tool_name(call_id, name):
    assert tool_name(call_id) == name
