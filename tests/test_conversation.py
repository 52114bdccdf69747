"""The loop of answers and tool calls: what is said, run, paused, refused, canceled, kept and computed."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import re
import threading
from pathlib import Path

import pytest

from fakes import make_scripted_model
from kimi_native.chat.tool import Tool
from kimi_native.chat.types import ContentDelta, Finish, Message, ReasoningDelta, ToolCall
from kimi_native.conversation import ChatFinish
from kimi_native.errors import NonFiniteLogitsError, RequestError
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.prompts import prompt_ids
from kimi_native.tool_runner import MAX_RESULT_CHARS, ToolResult, cut, result_text
from tokenizer_files import small_tokenizer

LOOP_CALLS = int(os.environ.get("KIMI_NATIVE_LOOP_CALLS", "12"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def call_text(*calls: tuple[str, int, str]) -> str:
    body = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for name, index, arguments in calls
    )
    return f"<|tool_calls_section_begin|>{body}<|tool_calls_section_end|>"


def turn(prompt: str) -> int:
    """Number of tool results in the prompt."""
    return prompt.count("## Return of")


def last_result(prompt: str) -> str:
    return re.findall(r"## Return of [^\n]*\n(.*?)<\|im_end\|>", prompt, re.DOTALL)[-1]


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def boom(n: int) -> str:
    raise ValueError(f"no {n}")


def one_call(name="add", arguments='{"a":1,"b":2}', then="It is {}."):
    """Thinks, calls a tool once, and tells its result."""

    def say(prompt):
        if turn(prompt) == 0:
            return f"<think>I call.</think>{call_text((name, 0, arguments))}"
        return f"<think>I see.</think>{then.format(last_result(prompt))}"

    return say


@pytest.fixture
def make_chat(tokenizer):
    def make(say, *, model_options=None, **options):
        model, network, cache = make_scripted_model(tokenizer, say, **(model_options or {}))
        chat = model.chat(**{"temperature": 0} | options)
        chat.model, chat.network, chat.cache = model, network, cache
        return chat

    return make


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_chat_thinks_calls_looks_and_answers(make_chat):
    chat = make_chat(one_call(), tools=[add], run_tools=["add"], system="Be brief.")
    events = list(chat.stream("1 + 2?"))
    call = ToolCall("functions.add:0", "add", '{"a":1,"b":2}')
    assert chat.messages == (
        Message("system", "Be brief."),
        Message("user", "1 + 2?"),
        Message("assistant", "", "I call.", (call,)),
        Message("tool", "3", tool_call_id="functions.add:0"),
        Message("assistant", "It is 3.", "I see."),
    )
    (result,) = [e for e in events if isinstance(e, ToolResult)]
    assert (result.call, result.content, result.is_error) == (call, "3", False)
    finishes = [e for e in events if isinstance(e, Finish)]
    assert [f.reason for f in finishes] == ["tool_calls", "stop"]
    assert events[-1] == ChatFinish("stop", tuple(f.usage for f in finishes))
    at = events.index(result)
    for kind, text in ((ReasoningDelta, "I see."), (ContentDelta, "It is 3.")):
        assert "".join(e.text for e in events[at:] if isinstance(e, kind)) == text


def test_chat_send_tells_what_the_loop_came_to(make_chat):
    chat = make_chat(one_call(), tools=[add], run_tools=["add"])
    reply = chat.send("1 + 2?")
    assert (reply.text, reply.reasoning, reply.finish.reason) == ("It is 3.", "I see.", "stop")
    assert [r.content for r in reply.results] == ["3"]
    assert chat.send("Again?").text  # a new turn: the history has a plain answer now


def test_chat_runs_the_calls_of_one_answer_at_once_and_keeps_their_order(make_chat):
    meeting = threading.Barrier(3, timeout=20)

    def meet(n: int) -> str:
        meeting.wait()  # gets through only if all run at once
        return f"met {n}"

    def say(prompt):
        if turn(prompt) == 0:
            return "<think></think>" + call_text(*(("meet", i, f'{{"n":{i}}}') for i in range(3)))
        return "<think></think>done"

    chat = make_chat(say, tools=[meet], run_tools=["meet"])
    assert chat.send("go").text == "done"
    told = [(m.tool_call_id, m.content) for m in chat.messages if m.role == "tool"]
    assert told == [(f"functions.meet:{i}", f"met {i}") for i in range(3)]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ('{"n":3}', "error: ValueError: no 3"),
        ("{}", "error: RequestError: tool boom"),
        ('{"n":"x"}', "error: RequestError: tool boom"),
        ('{"n":', "error: RequestError: tool boom"),
    ],
)
def test_chat_tells_the_model_what_went_wrong(make_chat, arguments, error):
    chat = make_chat(
        one_call("boom", arguments, "Oh: {}"),
        tools=[boom],
        run_tools=["boom"],
        constrain_tools=False,
    )
    reply = chat.send("go")
    assert reply.results[0].is_error
    assert reply.text.startswith(f"Oh: {error}")


def test_chat_survives_a_tool_that_exits(make_chat):
    def leave() -> None:
        raise SystemExit(3)

    chat = make_chat(one_call("leave", "{}", "{}"), tools=[leave], run_tools=["leave"])
    assert chat.send("go").text == "error: SystemExit: 3"


def test_chat_tells_the_model_of_a_tool_that_hangs(make_chat):
    release = threading.Event()

    def hang() -> str:
        release.wait()
        return "late"

    chat = make_chat(
        one_call("hang", "{}", "{}"), tools=[hang], run_tools=["hang"], tool_timeout=0.2
    )
    assert chat.send("go").text == "error: hang timed out after 0.2 s"
    release.set()


def test_chat_refuses_a_call_of_no_tool(make_chat):
    chat = make_chat(
        one_call("nope", "{}", "{}"), tools=[add], run_tools=["add"], constrain_tools=False
    )
    assert chat.send("go").text == "error: no tool is called nope (declared: add)"


@pytest.mark.parametrize("constrain", [True, False])
def test_chat_stops_calling_at_the_limit(make_chat, constrain):
    def say(prompt):
        return "<think></think>" + call_text(("add", turn(prompt), '{"a":1,"b":2}'))

    chat = make_chat(say, tools=[add], run_tools=["add"], max_tool_calls=3, max_tokens=200,
                     constrain_tools=constrain)  # fmt: skip
    reply = chat.send("go")
    assert [r.content for r in reply.results][:3] == ["3"] * 3
    if constrain:
        assert len(reply.results) == 3
        assert reply.finish.reason in (
            "stop",
            "length",
        )  # calls are ruled out: it says what is left
    else:
        assert reply.results[3].content == "error: the limit of 3 tool calls is reached"
        assert reply.finish.reason == "max_tool_calls"


@pytest.mark.parametrize("answer_call", ["decline", "add_result"])
def test_chat_limit_counts_calls_that_did_not_run(make_chat, answer_call):
    """A model that insists on a call nobody runs comes to an end all the same."""

    def say(prompt):
        return "<think></think>" + call_text(("add", turn(prompt), '{"a":1,"b":2}'))

    chat = make_chat(say, tools=[add], max_tool_calls=3, max_tokens=200)
    finish, pauses = chat.send("go").finish, 0
    while finish.reason == "paused":
        pauses += 1
        (call,) = chat.pending
        chat.decline() if answer_call == "decline" else chat.add_result(call.id, "3")
        finish = chat.resume().finish
    assert pauses == 3
    assert finish.reason in ("stop", "length")


def test_chat_limit_counts_calls_of_tools_that_do_not_exist(make_chat):
    say = lambda prompt: "<think></think>" + call_text(("none", turn(prompt), "{}"))  # noqa: E731
    reply = make_chat(say, max_tool_calls=2, max_tokens=60).send("go")
    assert [r.content for r in reply.results] == [
        "error: no tool is called none (declared: none)"
    ] * 2
    assert reply.finish.reason in ("stop", "length")


def test_chat_tool_choice_is_for_the_first_answer_to_a_message(make_chat):
    chat = make_chat(lambda prompt: "<think></think>hi", tools=[add], run_tools=["add"],
                     tool_choice="required", max_tokens=60)  # fmt: skip
    asked, answer = [], chat._answer
    chat._answer = lambda messages, choice, stop: (
        asked.append(choice) or answer(messages, choice, stop)
    )
    reply = chat.send("go")
    assert len(reply.results) == 1
    assert asked == ["required", None]


# ---- pauses ---------------------------------------------------------------------------------------------------------


def two_calls(prompt):
    if turn(prompt) == 0:
        arguments = '{"a":1,"b":2}'
        return f"<think>x</think>{call_text(('add', 0, arguments), ('ask', 1, '{}'))}"
    return f"<think></think>{re.findall('Return of (.*)', prompt)} {last_result(prompt)}"


ASK = Tool(
    "ask", "Asks somebody.", {"type": "object", "properties": {}, "additionalProperties": False}
)


def test_chat_pauses_at_a_tool_that_may_not_run(make_chat):
    chat = make_chat(two_calls, tools=[add, ASK], run_tools=["add"])
    reply = chat.send("go")
    assert reply.finish.reason == "paused"
    assert (
        [c.id for c in reply.finish.pending] == [c.id for c in chat.pending] == ["functions.ask:1"]
    )
    with pytest.raises(
        RequestError, match=r"pending calls must have results first .got functions.ask:1"
    ):
        chat.send("hello?")
    with pytest.raises(
        RequestError, match=r"must be pending .got 'functions.add:0', pending: functions.ask:1"
    ):
        chat.add_result("functions.add:0", "x")
    with pytest.raises(RequestError, match="must have a function"):
        chat.approve()
    chat.add_result("functions.ask:1", "yes")
    assert chat.pending == ()
    reply = chat.resume()
    assert reply.text == "['functions.add:0', 'functions.ask:1'] yes"


def test_chat_runs_what_was_approved(make_chat):
    ran = []

    def ask() -> str:
        ran.append(1)
        return "asked"

    chat = make_chat(two_calls, tools=[add, ask])
    assert len(chat.send("go").finish.pending) == 2
    assert not ran
    chat.approve("functions.ask:1")
    reply = chat.resume()
    assert (reply.finish.reason, ran) == ("paused", [1])
    assert [c.id for c in chat.pending] == ["functions.add:0"]
    chat.decline()
    assert "ask:1'] asked" in chat.resume().text
    assert chat.messages[-3].content == "error: the user declined this call"


def test_chat_has_nothing_to_resume_after_an_answer(make_chat):
    chat = make_chat(lambda prompt: "<think></think>hi")
    with pytest.raises(RequestError, match="resume needs a message"):
        chat.resume()
    chat.send("hi")
    with pytest.raises(RequestError, match="resume needs a message"):
        chat.resume()


# ---- cancellation and failures --------------------------------------------------------------------------------------


def test_chat_canceled_at_every_token_can_go_on(make_chat):
    """The stream is closed after its n-th event, for every n; afterwards the chat answers, and no page is lost."""
    for n in range(200):
        chat = make_chat(one_call(), tools=[add], run_tools=["add"])
        events = chat.stream("1 + 2?")
        finished = False
        for _ in range(n + 1):
            if isinstance(next(events), ChatFinish):
                finished = True
                break
        events.close()
        assert chat.model._engine.num_running == chat.model._engine.num_waiting == 0
        roles = [m.role for m in chat.messages]
        assert roles[0] == "user"
        for message in chat.messages:
            assert not message.tool_calls or message is chat.messages[-1] or "tool" in roles
        if chat.pending:
            assert chat.resume().finish.reason == "stop"
        else:
            assert chat.send("more").finish.reason == "stop"
        chat.close()
        assert not chat.cache.sequences
        if finished:
            break
    assert finished
    assert n > 20


def long_answer(prompt):
    return "<think></think>" + ("short" if prompt.count("<|im_user|>") > 1 else "word " * 1000)


def test_chat_cancel_from_another_thread_ends_a_long_answer(make_chat):
    chat = make_chat(long_answer, max_tokens=6000)
    events, said = chat.stream("go"), 0
    for event in events:
        said += isinstance(event, ContentDelta)
        if said == 5:
            chat.cancel()
    assert event.reason == "canceled"
    assert said == 5
    assert chat.messages[-1].content == "".join(["word "] * 5)[: len(chat.messages[-1].content)]
    assert chat.send("on").text == "short"


def test_chat_cancel_does_not_wait_for_a_tool(make_chat):
    release = threading.Event()

    def hang() -> str:
        release.wait()
        return "late"

    chat = make_chat(
        one_call("hang", "{}", "{}"), tools=[hang], run_tools=["hang"], tool_timeout=600
    )
    threading.Timer(0.3, chat.cancel).start()
    reply = chat.send("go")
    assert (reply.finish.reason, len(chat.pending)) == ("canceled", 1)
    release.set()
    chat.decline(reason="it hung")
    assert chat.resume().text == "error: it hung"


def test_chat_goes_on_after_a_failed_answer(make_chat):
    broken = []
    chat = make_chat(
        lambda prompt: "<think>a</think>fine",
        model_options={"spoil": lambda ids: bool(broken) and broken.pop()},
    )
    broken.append(True)
    with pytest.raises(NonFiniteLogitsError):
        chat.send("hi")
    assert [m.role for m in chat.messages] == ["user"]
    assert chat.resume().text == "fine"


def test_chat_that_does_not_fit_says_nothing(make_chat):
    chat = make_chat(lambda prompt: "<think></think>hi")
    chat.send("hi")
    before = chat.messages
    with pytest.raises(RequestError, match="context of 8192 tokens"):
        chat.send("x" * 20000)
    assert chat.messages == before
    assert chat.send("hi").text == "hi"


def test_chat_runs_one_loop_at_a_time(make_chat):
    chat = make_chat(lambda prompt: "<think></think>hello you")
    first = chat.stream("hi")
    next(first)
    second = chat.stream("hi")
    with pytest.raises(RequestError, match="one loop at a time"):
        next(second)
    first.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_tools": ["add"]}, "run_tools must name declared tools"),
        ({"tools": [ASK], "run_tools": ["ask"]}, "that have a function .got 'ask'"),
        ({"tools": [add], "run_tools": "add"}, "list of names"),
        ({"max_tool_calls": -1}, "max_tool_calls must be"),
        ({"tool_timeout": 0}, "tool_timeout must be"),
        ({"temprature": 1}, "did you mean 'temperature'"),
    ],
)
def test_chat_refuses_bad_arguments(make_chat, options, message):
    with pytest.raises(RequestError, match=message):
        make_chat(lambda prompt: "", **options)


# ---- asyncio --------------------------------------------------------------------------------------------------------


def test_chat_asend_equals_send(make_chat):
    options = {"tools": [add], "run_tools": ["add"]}
    reply = asyncio.run(make_chat(one_call(), **options).asend("1 + 2?"))
    assert reply.text == make_chat(one_call(), **options).send("1 + 2?").text


def test_chat_tells_the_timing_of_its_last_answer(make_chat):
    chat = make_chat(one_call(), tools=[add], run_tools=["add"])
    assert chat.timing is None
    seen = [chat.timing for event in chat.stream("1 + 2?") if isinstance(event, Finish)]
    assert len(seen) == len(set(map(id, seen))) == 2
    assert all(t.prefill_s > 0 and t.decode_tokens_per_s > 0 for t in seen)
    assert chat.timing == seen[-1]


def test_chat_astream_ends_with_its_task(make_chat):
    chat = make_chat(long_answer, max_tokens=6000)

    async def talk():
        async for _ in chat.astream("go"):
            pass

    async def main():
        task = asyncio.create_task(talk())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert chat.model._engine.num_running == 0
    assert chat.send("on").text == "short"


# ---- transcripts ----------------------------------------------------------------------------------------------------


def test_chat_goes_on_from_a_transcript(make_chat, tmp_path):
    chat = make_chat(two_calls, tools=[add, ASK], run_tools=["add"], system="S")
    chat.send("go é")
    chat.save(tmp_path / "chat.json")
    again = make_chat(
        two_calls, tools=[add, ASK], run_tools=["add"], transcript=tmp_path / "chat.json"
    )
    assert again.messages == chat.messages
    assert [c.id for c in again.pending] == ["functions.add:0", "functions.ask:1"]
    for c in (chat, again):
        c.add_result("functions.ask:1", "yes")
        assert c.resume().text == "['functions.add:0', 'functions.ask:1'] yes"
    assert again.messages == chat.messages
    content = json.loads((tmp_path / "chat.json").read_text())
    assert content["messages"][1] == {"role": "user", "content": "go é"}
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]


def test_chat_from_a_transcript_keeps_counting_calls(make_chat):
    call = ToolCall("functions.add:0", "add", "{}")
    told = [Message("assistant", "", "", [call]), Message("tool", "1", tool_call_id=call.id)]
    chat = make_chat(one_call(), tools=[add], messages=[Message("user", "a"), *told, *told])
    assert chat._num_calls == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "must be a transcript of version 1"),
        ('{"version": 2, "messages": []}', "must be a transcript of version 1"),
        ('{"version": 1, "messages": [], "tools": []}', r"tools must be those .* none \(got add\)"),
    ],
)
def test_transcript_refuses_what_it_is_not(make_chat, tmp_path, content, message):
    (tmp_path / "chat.json").write_text(content)
    with pytest.raises(RequestError, match=message):
        make_chat(lambda prompt: "", tools=[add], transcript=tmp_path / "chat.json")


# ---- what is computed -----------------------------------------------------------------------------------------------


def test_loop_of_many_calls_computes_what_is_new_and_loses_nothing(make_chat, capsys):
    """KIMI_NATIVE_LOOP_CALLS calls (default 12): ids, reasoning, prefilled tokens of each turn, and memory."""

    def say(prompt):
        n = turn(prompt)
        if n:
            assert last_result(prompt) == str(2 * n - 1), "the result of the call before"
        thought = f"<think>step {n}: " + "hm " * (n % 5) + "</think>"
        if n == LOOP_CALLS:
            return thought + "done"
        return thought + call_text(("add", n, f'{{"a":{n},"b":{n + 1}}}'))

    chat = make_chat(
        say, tools=[add], run_tools=["add"], max_tokens=200,
        model_options={
            "context": 300 + 250 * LOOP_CALLS, "max_batch": 1, "decode_equals_prefill": False,
        },
    )  # fmt: skip
    asked, answer = [], chat._answer
    chat._answer = lambda messages, *rest: asked.append(messages) or answer(messages, *rest)
    pages, objects = [], []
    events = chat.stream("go")
    for event in events:
        if isinstance(event, ToolResult):
            gc.collect()
            objects.append(len(gc.get_objects()))
            pages.append(len(chat.cache.storage) - len(chat.cache.free_pages))
    assert event.reason == "stop"
    calls = [call for m in chat.messages for call in m.tool_calls]
    assert [c.id for c in calls] == [f"functions.add:{n}" for n in range(LOOP_CALLS)]
    thoughts = [m.reasoning_content for m in chat.messages if m.role == "assistant"]
    assert thoughts == [(f"step {n}: " + "hm " * (n % 5)).strip() for n in range(LOOP_CALLS + 1)]

    text_side = chat.model._text_side
    prompts = [prompt_ids(list(m), False, {"tools": [add]}, text_side) for m in asked]
    lengths = [len(p) for p in prompts]
    assert [u.prompt_tokens for u in event.usages] == lengths
    for before, after in itertools.pairwise(prompts):
        assert after[: len(before)] == before
    new = [b - a for a, b in itertools.pairwise([0, *lengths])]
    assert [u.prefilled_tokens for u in event.usages] == new == chat.network.prefills
    # One conversation in the cache: its prompt, and nothing that grows besides.
    assert pages == [-(-n // 16) for n in lengths[:-1]]
    growth = (objects[-1] - objects[len(objects) // 2]) / (len(objects) / 2)
    assert growth < 60  # a few messages and events a turn
    with capsys.disabled():
        print(f" [{len(calls)} calls, prompt {lengths[-1]}, prefilled {sum(new)}, "
              f"{max(new[1:])} at most a turn, {growth:.0f} objects a turn]", end="")  # fmt: skip


def test_tool_results_are_texts():
    assert result_text("é") == "é"
    assert result_text({"a": [1, None], "b": {2}}) == '{"a": [1, null], "b": "{2}"}'
    assert cut("x" * MAX_RESULT_CHARS) == "x" * MAX_RESULT_CHARS
    assert cut("x" * (MAX_RESULT_CHARS + 7)).endswith("x\n[cut: 7 more characters]")


def test_doc_of_the_loop_runs(tmp_path, monkeypatch, capsys):
    """The two programs of docs/chat-loop.md; of what they print, what does not depend on the CPU's instructions."""
    doc = (Path(__file__).resolve().parents[1] / "docs" / "chat-loop.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", doc, re.MULTILINE | re.DOTALL)
    make_checkpoint(tmp_path / "tiny-k2")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, "chat-loop.md", "exec"), names)
    out = capsys.readouterr().out
    shown = "".join(text for language, text in blocks if not language)
    for kind in (
        r"^[A-Z]\w+",
        "prompt_tokens=281",
        "reused_tokens=281",
        r"is_error=\w+",
        "id='[^']*'",
    ):
        assert re.findall(kind, out, re.MULTILINE) == re.findall(kind, shown, re.MULTILINE)
