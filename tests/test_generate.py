"""Prompts to text and events, with the real tokenizer, templates and parser over a fake model."""

from __future__ import annotations

import random
import subprocess
import sys
import threading

import pytest

from fakes import CACHE_TOKENS, FakeCache, FakeModel, make_fake_model
from kimi_native.chat.template import render
from kimi_native.chat.types import (
    ContentDelta,
    Finish,
    Message,
    ReasoningDelta,
    ToolCall,
    ToolCallDelta,
)
from kimi_native.errors import (
    ConfigError,
    NonFiniteLogitsError,
    RequestError,
    TokenizerError,
)
from kimi_native.generate import Model, end_ids, load
from kimi_native.generation import StopStrings
from kimi_native.sampling import SamplingParams
from tokenizer_files import small_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_model(tokenizer):
    """make_fake_model with this module's tokenizer."""
    return lambda answer=None, **options: make_fake_model(tokenizer, answer, **options)


def assert_idle(cache):
    assert cache.free_tokens == CACHE_TOKENS
    assert not cache.sequences


def joined(events, kind) -> str:
    return "".join(e.text for e in events if isinstance(e, kind))


# ---- what is asked --------------------------------------------------------------------------------------------------


def test_generate_renders_a_text_as_one_user_message(make_model, tokenizer):
    model, _, cache = make_model(lambda ids: "Hello there")
    result = model.generate("Hi <|im_end|>")
    messages = [Message("user", "Hi <|im_end|>")]
    assert result.prompt_ids == render(messages, format="moonlight", tokenizer=tokenizer)
    assert result.text == "Hello there"
    assert (result.reasoning, result.tool_calls, result.error) == ("", (), None)
    assert result.finish_reason == "stop"
    assert result.ids == [
        *tokenizer.encode("Hello there"),
        tokenizer.control_ids["<|im_end|>"],
    ]
    assert result.usage.prompt_tokens == len(result.prompt_ids)
    assert result.usage.completion_tokens == len(result.ids)
    assert_idle(cache)


@pytest.mark.parametrize(
    "messages",
    [
        [Message("user", "Hi")],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}],
    ],
    ids=["objects", "dicts"],
)
def test_generate_and_stream_take_messages(make_model, tokenizer, messages):
    model, _, _ = make_model(lambda ids: "yes")
    expected = render(messages, format="moonlight", tokenizer=tokenizer)
    assert model.generate(messages).prompt_ids == expected
    assert joined(model.stream(messages), ContentDelta) == "yes"


def test_generate_raw_prompt_continues_the_text_and_parses_nothing(make_model, tokenizer):
    model, _, _ = make_model(
        lambda ids: "<think>a</think>b<|im_middle|>c", chat_format="k2-thinking"
    )
    result = model.generate("Once", raw_prompt=True)
    assert result.prompt_ids == tokenizer.encode("Once")
    assert result.text == "<think>a</think>bc"  # markers are not special tokens, <|im_middle|> is
    assert result.text == tokenizer.decode(result.ids, skip_control=True)
    assert result.reasoning == ""


def test_generate_takes_token_ids_as_they_are(make_model):
    model, _, _ = make_model(lambda ids: "ok")
    result = model.generate([72, 105])
    assert (result.prompt_ids, result.text) == ([72, 105], "ok")


def test_generate_without_a_chat_format_asks_for_raw_prompt(make_model):
    model, network, _ = make_model(lambda ids: "ok", chat_format=None)
    for prompt in ("Hi", [Message("user", "Hi")]):
        with pytest.raises(RequestError, match=r"no chat format .*raw_prompt=True"):
            model.generate(prompt)
    assert network.prefills == []
    assert model.generate("Hi", raw_prompt=True).text == "ok"
    assert model.generate([72]).text == "ok"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one token, message or prompt"),
        ("", {"raw_prompt": True}, r"at least one token \(got none\)"),
        (["a", []], {}, r"at least one token \(got none\)"),
        ([[1, 2], [1, 9999]], {}, r"got 9999 at position 1"),
        ([1, "a"], {}, r"got 'a' at position 1"),
        (5, {}, "must be a text, messages, or ids .got int"),
        ("x" * 600, {"raw_prompt": True}, r"context of 512 tokens \(got a prompt of 600 tokens\)"),
        ([Message("user", "a")], {"raw_prompt": True}, "needs a text or ids .got messages"),
        ("a", {"raw_prompt": True, "tools": []}, "tools needs a prompt that the chat format"),
        ([1], {"thinking": True}, "thinking needs a prompt that the chat format"),
        ("a", {"temprature": 1}, "unknown argument 'temprature', did you mean 'temperature'"),
        ("a", {"sampling": SamplingParams(), "topp": 1}, "did you mean 'top_p'"),
        ("a", {"sampling": {"top_p": 1}}, "sampling must be SamplingParams .got dict"),
        ("a", {"temperature": -1}, "temperature must be"),
    ],
)
def test_generate_and_stream_refuse_a_bad_request_before_any_compute(
    make_model, prompt, options, message
):
    model, network, cache = make_model()
    with pytest.raises(RequestError, match=message):
        model.generate(prompt, **options)
    if not (isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list))):
        with pytest.raises(RequestError, match=message):
            model.stream(prompt, **options)  # the call, not the first step of the iterator
    assert network.prefills == []
    assert model._engine.num_waiting == 0
    assert_idle(cache)


def test_stream_refuses_a_list_of_prompts(make_model):
    model, _, _ = make_model()
    with pytest.raises(RequestError, match="one prompt at a time"):
        model.stream(["a", "b"])


def test_generate_takes_defaults_from_generation_config(make_model, tokenizer):
    model, _, _ = make_model()
    model.generation_config = {"temperature": 0.0, "max_new_tokens": 3}
    greedy = SamplingParams(temperature=0, max_tokens=3)
    assert model.generate("a").ids == model.generate("a", sampling=greedy).ids
    assert model.generate("a", max_tokens=2).usage.completion_tokens == 2
    # Given parameters replace the file's altogether.
    free = model.generate("a", sampling=SamplingParams(max_tokens=20, seed=0), ignore_eos=True)
    assert free.usage.completion_tokens == 20


# ---- what is answered -----------------------------------------------------------------------------------------------

ANSWER = (
    "<think>Need the tool. 🙂</think>Let me look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get:0"
    '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)


def test_generate_separates_reasoning_content_and_tool_calls(make_model):
    model, _, _ = make_model(lambda ids: ANSWER, chat_format="k2-thinking")
    result = model.generate("q")
    assert result.reasoning == "Need the tool. 🙂"
    assert result.text == "Let me look."
    assert result.tool_calls == (ToolCall("functions.get:0", "get", '{"a": 1}'),)
    assert result.finish_reason == "tool_calls"


def test_tools_are_declared_and_repair_the_ids_of_their_calls(make_model, tokenizer):
    def get_weather(city: str):
        """Tells the weather."""

    answer = ANSWER.replace("functions.get:0", "get-weather_5")
    model, _, _ = make_model(lambda ids: answer, chat_format="k2-thinking")
    result = model.generate("Hi", tools=[get_weather], keep_thinking="all", constrain_tools=False)
    assert '"name":"get_weather"' in tokenizer.decode(result.prompt_ids)
    assert [(c.id, c.name) for c in result.tool_calls] == [
        ("functions.get_weather:0", "get_weather")
    ]
    assert [c.id for c in model.generate("Hi").tool_calls] == ["get-weather_5"]


def test_stream_events_add_up_to_the_generation(make_model):
    model, _, cache = make_model(lambda ids: ANSWER, chat_format="k2-thinking")
    result = model.generate("q")
    events = list(model.stream("q"))
    assert joined(events, ReasoningDelta) == result.reasoning
    assert joined(events, ContentDelta) == result.text
    calls = [e for e in events if isinstance(e, ToolCallDelta)]
    assert "".join(e.arguments for e in calls) == '{"a": 1}'
    assert [e for e in events if isinstance(e, Finish)] == [events[-1]]
    assert events[-1].reason == "tool_calls"
    assert events[-1].usage == result.usage
    assert len([e for e in events if isinstance(e, ReasoningDelta)]) > 3
    assert_idle(cache)


def test_generate_cut_inside_a_tool_call_says_so(make_model):
    model, _, _ = make_model(lambda ids: ANSWER, chat_format="k2-thinking")
    whole = model.generate("q")
    result = model.generate("q", max_tokens=len(whole.ids) - 5)
    assert (result.finish_reason, result.unfinished_call) == ("length", True)
    assert (whole.finish_reason, whole.unfinished_call) == ("tool_calls", False)


@pytest.mark.parametrize("raw_prompt", [False, True])
def test_generate_never_shows_half_a_character(make_model, tokenizer, raw_prompt):
    text = "é月🙂"
    model, _, _ = make_model(lambda ids: [*text.encode()])
    whole = model.generate("a", raw_prompt=raw_prompt)
    assert whole.text == text
    for n in range(1, len(whole.ids)):
        cut = model.generate("a", raw_prompt=raw_prompt, max_tokens=n)
        assert cut.text == text.encode()[:n].decode(errors="replace")
        assert cut.finish_reason == "length"


def test_generate_end_token_has_no_text_even_if_it_is_an_ordinary_token(make_model):
    model, _, _ = make_model(lambda ids: "abcd")
    result = model.generate("q", stop_token_ids=[ord("c")])
    assert (result.text, result.finish_reason) == ("ab", "stop")
    assert result.ids[-1] == ord("c")


def test_generate_ignore_eos_goes_on_and_shows_what_follows(make_model):
    model, _, _ = make_model(lambda ids: "a[EOS]b<|im_end|>c")
    for raw_prompt in (False, True):
        result = model.generate("q", ignore_eos=True, max_tokens=5, raw_prompt=raw_prompt)
        assert (result.text, result.finish_reason) == ("abc", "length")
        assert model.generate("q", raw_prompt=raw_prompt).text == "a"


def test_generate_logprobs_seed_and_timing(make_model):
    model, _, _ = make_model()
    first = model.generate("q", max_tokens=4, logprobs=2, ignore_eos=True)
    assert [t.id for t in first.logprobs] == first.ids
    assert all(len(t.top_logprobs) == 2 for t in first.logprobs)
    again = model.generate("q", max_tokens=4, seed=first.seed, ignore_eos=True)
    assert (again.ids, again.logprobs) == (first.ids, None)
    t = first.timing
    assert t.prefill_tokens_per_s == pytest.approx(len(first.prompt_ids) / t.prefill_s)
    assert t.decode_tokens_per_s == pytest.approx(3 / t.decode_s)  # the first came with the prompt
    assert model.generate("q", max_tokens=1).timing.decode_tokens_per_s is None


def test_generate_reports_an_id_that_the_tokenizer_lacks(tokenizer):
    network = FakeModel(
        vocab_size=tokenizer.vocab_size + 1, script=lambda ids: tokenizer.vocab_size
    )
    cache = FakeCache(max_tokens=CACHE_TOKENS, page_size=16)
    model = Model(network, cache, tokenizer, generation_config={}, chat_format=None)
    with pytest.raises(TokenizerError, match=f"got {tokenizer.vocab_size}"):
        model.generate([1])
    assert_idle(cache)


# ---- stop strings ---------------------------------------------------------------------------------------------------


def naive_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the text before the longest stop string that is the first to be complete."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@pytest.mark.parametrize("seed", range(300))
def test_stop_strings_do_not_depend_on_the_pieces(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("ab", k=rng.randint(0, 14)))
    stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
    expected, expected_hit = naive_stop(text, stops)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6)))
        matcher, shown, hit = StopStrings(stops), "", False
        for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece, hit = matcher.push(text[a:b])
            shown += piece
            assert expected.startswith(shown), "a part of a stop string was shown"
            if hit:
                break
        shown += "" if hit else matcher.flush()
        assert (shown, hit) == (expected, expected_hit)


def test_stop_strings_hold_back_no_more_than_they_must():
    matcher = StopStrings(["END", "\n\n"])
    assert matcher.push("abcE") == ("abc", False)
    assert matcher.push("x\n") == ("Ex", False)
    assert matcher.push("y") == ("\ny", False)
    assert StopStrings([]).push("abc") == ("abc", False)


@pytest.mark.parametrize("raw_prompt", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("two", "one "),
        (["three", "o th"], "one tw"),
        (["ne", "one"], ""),
        ("e two t", "on"),
        ("absent", "one two three"),
        ("e<|im_end|>", "one two three"),
    ],
)
def test_generate_stop_strings_cut_the_text(make_model, raw_prompt, stop, expected):
    model, _, cache = make_model(lambda ids: "one two three")
    result = model.generate("q", stop=stop, raw_prompt=raw_prompt)
    assert (result.text, result.finish_reason) == (expected, "stop")
    shown = ""
    for event in model.stream("q", stop=stop, raw_prompt=raw_prompt):
        if isinstance(event, ContentDelta):
            shown += event.text
            assert expected.startswith(shown)
        else:
            assert event == Finish("stop", result.usage)
    assert shown == expected
    assert_idle(cache)


def test_generate_stop_string_ends_the_computation(make_model):
    model, network, cache = make_model(lambda ids: "ab" + "c" * 100)
    result = model.generate("q", stop="b")
    assert len(result.ids) == 2
    assert sum(network.batches) == 1
    assert_idle(cache)


def test_generate_stop_string_across_the_token_limit_is_shown(make_model):
    """The beginning of a stop string that never completes belongs to the answer."""
    model, _, _ = make_model(lambda ids: "abcdef")
    result = model.generate("q", stop="cdX", max_tokens=4)
    assert (result.text, result.finish_reason) == ("abcd", "length")


def test_generate_stop_strings_leave_reasoning_and_tool_calls_alone(make_model):
    model, _, _ = make_model(lambda ids: ANSWER, chat_format="k2-thinking")
    plain = model.generate("q")
    beside = model.generate("q", stop=["tool.", '"a"'])  # in the reasoning and in the arguments
    assert (beside.reasoning, beside.text) == (plain.reasoning, plain.text)
    assert beside.tool_calls == plain.tool_calls
    inside = model.generate("q", stop=["look"])
    assert (inside.reasoning, inside.text) == (plain.reasoning, "Let me ")
    assert (inside.tool_calls, inside.finish_reason) == ((), "stop")


# ---- many requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_generate_batch_equals_one_by_one(make_model, max_batch):
    model, network, cache = make_model(max_batch=max_batch)
    prompts = ["a", "bc", [1, 2, 3], [Message("user", "d")], "a"]
    options = {"seed": 7, "max_tokens": 24, "top_p": 0.9, "logprobs": 1, "stop": ["e", "t"]}
    together = model.generate(prompts, **options)
    assert max(network.batches) == min(max_batch, 5)
    alone = [model.generate(p, **options) for p in prompts]
    for a, b in zip(together, alone, strict=True):
        for field in ("ids", "text", "finish_reason", "logprobs", "prompt_ids", "usage", "seed"):
            assert getattr(a, field) == getattr(b, field)
    assert together[0].ids == together[4].ids
    assert_idle(cache)


def test_generate_bad_prompt_in_a_list_leaves_nothing_behind(make_model):
    model, network, cache = make_model()
    with pytest.raises(RequestError):
        model.generate(["a", "b", []])
    assert network.prefills == []
    assert model._engine.num_waiting == 0
    assert_idle(cache)


def test_generate_non_finite_logits_raise_for_one_prompt_and_mark_one_of_a_list(make_model):
    def spoil(ids):
        return ids[0] == 99 and len(ids) == 3

    model, _, cache = make_model(spoil=spoil)
    options = {"max_tokens": 6, "seed": 3, "ignore_eos": True}
    with pytest.raises(NonFiniteLogitsError, match="position 3"):
        model.generate([99], **options)
    with pytest.raises(NonFiniteLogitsError, match="position 3"):
        list(model.stream([99], **options))
    good, bad = model.generate([[1], [99]], **options)
    assert good.ids == model.generate([1], **options).ids
    assert (bad.finish_reason, len(bad.ids)) == ("error", 2)
    assert isinstance(bad.error, NonFiniteLogitsError)
    assert_idle(cache)


def test_stream_closed_early_ends_the_request(make_model):
    model, network, cache = make_model(lambda ids: "x" * 100)
    events = model.stream("q", max_tokens=100)
    for _ in range(3):
        next(events)
    assert cache.free_tokens < CACHE_TOKENS
    events.close()
    assert_idle(cache)
    calls = len(network.batches)
    model.generate("q", max_tokens=2)
    assert len(network.batches) == calls + 1


def test_stream_never_started_holds_nothing(make_model):
    model, network, cache = make_model()
    events = model.stream("q")
    del events
    assert model._engine.num_waiting == 0
    assert network.prefills == []
    assert_idle(cache)


def test_stream_closed_during_a_step_is_released_right_after(make_model):
    model, _, cache = make_model(lambda ids: "x" * 100)
    events = model.stream("q", max_tokens=100)
    next(events)
    with model._lock:  # as when the garbage collector closes it inside another request's step
        events.close()
        assert cache.free_tokens < CACHE_TOKENS
    model.generate("q", max_tokens=1)
    assert_idle(cache)


def test_streams_taken_in_turns_give_what_each_gives_alone(make_model):
    model, network, cache = make_model()
    options = {"seed": 5, "max_tokens": 30, "ignore_eos": True}
    expected = {p: list(model.stream(p, **options)) for p in ("a", "b", "c")}
    network.batches.clear()
    streams = {p: model.stream(p, **options) for p in expected}
    seen = {p: [] for p in expected}
    while streams:
        for p in list(streams):
            event = next(streams[p], None)
            if event is None:
                del streams[p]
            else:
                seen[p].append(event)
    assert seen == expected
    assert max(network.batches) == 3
    assert_idle(cache)


def test_threads_give_what_each_gives_alone(make_model):
    model, _, cache = make_model(max_batch=3)
    options = {"seed": 5, "max_tokens": 12, "ignore_eos": True}
    expected = [model.generate([i], **options).ids for i in range(6)]
    actual: list = [None] * 6

    def work(i):
        actual[i] = model.generate([i], **options).ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert actual == expected
    assert_idle(cache)


@pytest.mark.parametrize("error", [RuntimeError("op failed"), KeyboardInterrupt()], ids=repr)
def test_generate_failed_forward_pass_frees_everything(make_model, error):
    model, _, cache = make_model(fail={("decode", 2): error})
    with pytest.raises(type(error)):
        model.generate(["a", "b", "c"], max_tokens=9, ignore_eos=True)
    assert model._engine.num_waiting == model._engine.num_running == 0
    assert_idle(cache)
    assert model.generate("a", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2


def test_stream_whose_pass_failed_under_another_caller_raises(make_model):
    model, _, cache = make_model(fail={("decode", 2): RuntimeError("op failed")})
    options = {"max_tokens": 9, "ignore_eos": True, "raw_prompt": True}
    waiting = model.stream("a", **options)
    model._submit([run := model._prepare("b", True, SamplingParams(max_tokens=9), {})])
    with pytest.raises(RuntimeError, match="op failed"):
        list(waiting)
    run.inbox.clear()
    with pytest.raises(RuntimeError, match="failure in another thread"):
        model._wait([run])
    model._abandon(run)
    assert_idle(cache)


# ---- around it ------------------------------------------------------------------------------------------------------


def test_end_ids_are_the_union_of_all_sources(tokenizer):
    config = FakeModel().config
    config.eos_token_ids = (7,)
    control = tokenizer.control_ids
    family = {control["<|im_end|>"], control["[EOS]"]}
    assert end_ids(config, {}, tokenizer) == {7, *family}
    assert end_ids(config, {"eos_token_id": 8}, tokenizer) == {7, 8, *family}
    assert end_ids(config, {"eos_token_id": [8, 9]}, tokenizer) == {7, 8, 9, *family}
    for bad in ("8", [1.5], [-1], True):
        with pytest.raises(ConfigError, match="eos_token_id must be an id or a list of ids"):
            end_ids(config, {"eos_token_id": bad}, tokenizer)


def test_import_of_the_package_imports_no_torch():
    code = (
        "import sys, kimi_native\n"
        "assert kimi_native.__version__ and 'load' in dir(kimi_native)\n"
        "assert kimi_native.RequestError.__name__ == 'RequestError'\n"
        "heavy = [m for m in ('torch', 'numpy', 'kimi_native._native', 'rich') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_export_resolves():
    import kimi_native

    for name in kimi_native.__all__:
        assert getattr(kimi_native, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kimi_native.nothing


def test_load_refuses_more_threads_than_anybody_has():
    with pytest.raises(RequestError, match=r"load: threads must be at most 1024 \(got 1000000\)"):
        load("/nonexistent", threads=1_000_000)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_context", 0), ("max_batch", True), ("threads", -1), ("max_batch", 1.5)],
)
def test_load_refuses_bad_arguments_before_it_opens_anything(name, value):
    with pytest.raises(RequestError, match=f"load: {name} must be an integer of at least 1"):
        load("/nonexistent", **{name: value})
