"""Output parsing under fuzzed streams: broken answers of the corpus, random ids, any format, prompt and tools.

Stream n is the same on every machine. KIMI_NATIVE_FUZZED_STREAMS sets how many there are (default 3000; 100000 take
some minutes).
"""

from __future__ import annotations

import os
import random
import re

import pytest

from chat_corpus import (
    ARGS,
    CALL,
    CALL_END,
    CLOSE,
    END,
    PLAIN,
    SECTION,
    SECTION_END,
    THINK,
    THINKING,
)
from chat_grammar import FAILING, LEGAL
from kimi_native.chat.parser import OutputParser, merge_events
from kimi_native.chat.template import FORMATS, render
from kimi_native.chat.types import ContentDelta, Finish, ReasoningDelta, ToolCallDelta, Usage
from kimi_native.errors import TokenizerError
from kimi_native.tokenizer import load_tokenizer
from naive_parser import control_names, naive_parse, to_ids
from tokenizer_files import SLOTS_WITHOUT_THINK, published_folder, small_tokenizer

STREAMS = int(os.environ.get("KIMI_NATIVE_FUZZED_STREAMS", "3000"))
ANSWERS = [
    text
    for corpus in (THINKING, PLAIN, LEGAL, FAILING)
    for text, _ in corpus.values()
    if len(text) < 500
]
MARKERS = (THINK, CLOSE, SECTION, SECTION_END, CALL, ARGS, CALL_END)
HEADERS = ("functions.get_weather:0", "functions_get_weather_0", "get_weather", "3", "call_x", "")
TEXTS = ("a", " ", "\n", "{", '{"city": "月"}', "🙂", "the ", ":1", "\t \n", *HEADERS)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {p: {}}}}}
    for name, p in (("get_weather", "city"), ("get-weather", "town"), ("run.it", "code"))
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def without_think(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), SLOTS_WITHOUT_THINK)


@pytest.fixture(scope="module")
def published():
    return load_tokenizer(published_folder())


# ---- streams -------------------------------------------------------------------------------------------------------


def random_ids(rng: random.Random, tokenizer, length: int) -> list[int]:
    control = list(tokenizer.control_ids.values())
    ids = []
    while len(ids) < length:
        choice = rng.random()
        if choice < 0.4:
            ids += tokenizer.encode(rng.choice(TEXTS))
        elif choice < 0.8:
            ids += to_ids(tokenizer, rng.choice(MARKERS), False)
        elif choice < 0.9:
            ids.append(rng.randrange(tokenizer.vocab_size - len(control)))  # often no UTF-8
        elif choice < 0.97:
            ids.append(rng.choice(control))
        else:
            ids.append(rng.choice(tokenizer.eos_ids))
    return ids


def broken(rng: random.Random, tokenizer, ids: list[int]) -> list[int]:
    """Some of: a piece lost, said twice, moved, or something else in between; at times cut."""
    for _ in range(rng.randint(0, 4)):
        start = rng.randint(0, len(ids))
        end = min(len(ids), start + rng.choice([0, 1, 1, 2, 5, 20]))
        other = rng.choice([[], ids[start:end] * 2, random_ids(rng, tokenizer, rng.randint(1, 4))])
        ids = ids[:start] + other + ids[end:]
    return ids[: rng.randint(0, len(ids))] if rng.random() < 0.2 else ids


def fuzzed_stream(rng: random.Random, tokenizer) -> list[int]:
    if rng.random() < 0.3:
        return random_ids(rng, tokenizer, rng.randint(0, 40))
    texts = rng.choices(ANSWERS, k=rng.choice([1, 1, 1, 2]))
    ids = to_ids(tokenizer, "".join(texts), by_byte=rng.random() < 0.3)
    return broken(rng, tokenizer, ids)


def fuzzed_prompt(rng: random.Random, tokenizer, format: str | None) -> list[int]:
    choice = rng.random()
    if choice < 0.5:
        return []
    if choice < 0.6:
        return fuzzed_stream(rng, tokenizer)
    prompt = render(
        [{"role": "user", "content": "Hi"}], format=format or "moonlight", tokenizer=tokenizer
    )
    return prompt + (fuzzed_stream(rng, tokenizer)[:20] if choice < 0.8 else [])


# ---- what must hold ------------------------------------------------------------------------------------------------


def check_events(events: list, num_ids: int) -> None:
    assert [isinstance(event, Finish) for event in events] == [False] * (len(events) - 1) + [True]
    num_calls = 0
    for event in events[:-1]:
        if isinstance(event, ReasoningDelta | ContentDelta):
            assert event.text
        else:
            is_first = event.id is not None
            num_calls += is_first
            assert event.index == num_calls - 1  # calls one after the other
            assert bool(event.id) == bool(event.name) == is_first
            assert event.arguments or is_first
    finish = events[-1]
    assert finish.usage.completion_tokens <= num_ids
    assert finish.reason in ("stop", "tool_calls", "length")
    assert finish.reason != "stop" or num_calls == 0


def check_texts(tokenizer, ids: list[int], events: list, thinks: bool) -> None:
    answer = merge_events(events)
    channels = [answer.reasoning or "", answer.content or ""]
    texts = [*channels, *(text for c in answer.tool_calls for text in (c.id, c.name, c.arguments))]
    for text in texts:
        assert not any(
            name in tokenizer.control_ids for name in control_names(tokenizer).findall(text)
        )
    assert not channels[0][-1:].isspace()
    if thinks and THINK not in tokenizer.control_ids:
        pairs = f"{THINK}|{CLOSE}"
        spelled = re.sub(pairs, "", control_names(tokenizer).sub("", tokenizer.decode(ids)))
        if not re.search(pairs, spelled):  # else what stands around a marker spells another
            assert not any(re.search(pairs, text) for text in channels)


def check_stream(rng: random.Random, tokenizer) -> None:
    format = rng.choice([*FORMATS, None])
    ids = fuzzed_stream(rng, tokenizer)
    prompt = fuzzed_prompt(rng, tokenizer, format)
    tools = rng.choice([None, TOOLS])
    parser = OutputParser(tokenizer, format=format, prompt_ids=prompt, tools=tools)
    events = [event for token_id in ids for event in parser.push(token_id)]
    events += parser.finish()
    thinks = format in ("k2-thinking", "k2.5", "k2.7-code")
    check_events(events, len(ids))
    check_texts(tokenizer, [*prompt, *ids], events, thinks)
    if not prompt and tools is None and (THINK in tokenizer.control_ids or not thinks):
        assert merge_events(events) == naive_parse(tokenizer, ids, thinks)


def check_streams(tokenizer, name: str, count: int) -> None:
    for number in range(count):
        try:
            check_stream(random.Random(f"{name} {number}"), tokenizer)
        except Exception as error:
            error.add_note(f"stream {number} of {name}")
            raise


def test_fuzzed_streams_keep_their_promises(small):
    check_streams(small, "small", STREAMS // 2)


def test_fuzzed_streams_keep_their_promises_where_think_is_text(without_think):
    check_streams(without_think, "without think", STREAMS // 4)


def test_fuzzed_streams_keep_their_promises_with_the_published_tokenizer(published):
    check_streams(published, "published", STREAMS // 4)


def test_a_stream_is_the_same_every_time(small):
    streams = [[fuzzed_stream(random.Random(n), small) for n in range(50)] for _ in range(2)]
    assert streams[0] == streams[1]
    assert len({tuple(ids) for ids in streams[0]}) > 40


@pytest.mark.parametrize("extra", [-1, 0, 10**9])
def test_an_id_outside_the_vocabulary_is_named_and_ends_nothing(small, extra):
    parser = OutputParser(small, format="k2-thinking")
    events = [e for i in to_ids(small, f"{THINK}a{CLOSE}b", False) for e in parser.push(i)]
    with pytest.raises(TokenizerError, match="id must name a token"):
        parser.push(small.vocab_size + extra if extra >= 0 else -1)
    events += parser.push(to_ids(small, END, False)[0])
    events += parser.finish(usage=Usage(0, 0))
    assert events == [ReasoningDelta("a"), ContentDelta("b"), Finish("stop", Usage(0, 0))]
    assert not any(isinstance(event, ToolCallDelta) for event in events)
