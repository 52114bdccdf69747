"""`kimi-native demo`: what is posed, what is shown, and that the verdict is the problem's."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from kimi_native import cli
from kimi_native.chat.types import ContentDelta, ReasoningDelta, ToolCall
from kimi_native.conversation import ChatFinish
from kimi_native.nano import demo, expert
from kimi_native.nano.problems import LABELS, held_out_compositions
from kimi_native.tool_runner import ToolResult


class ExpertChat:
    """What Model.chat gives, with the expert inside and an answer of its own at the end."""

    def __init__(self, tools, answer):
        self._tools = {tool.name: tool.function for tool in tools}
        self._answer, self.messages = answer, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def stream(self, text):
        self.messages.append(SimpleNamespace(role="user", content=text, tool_calls=()))
        while True:
            message = expert.answer(self.messages)
            self.messages.append(message)
            yield ReasoningDelta(message.reasoning_content)
            if not message.tool_calls:
                yield ContentDelta(self._answer or message.content)
                break
            (call,) = message.tool_calls
            content = self._tools[call.name](**json.loads(call.arguments))
            self.messages.append(SimpleNamespace(role="tool", content=content, tool_calls=()))
            yield ToolResult(0, call, content)
        if self._answer:
            self.messages[-1] = SimpleNamespace(content=self._answer)
        yield ChatFinish("stop", ())


@pytest.fixture
def play(monkeypatch, capsys):
    def run(*argv, answer=None):
        model = SimpleNamespace(chat=lambda *, tools, **_: ExpertChat(tools, answer))
        monkeypatch.setattr(demo, "load_model", lambda args: model)
        return cli.main(["demo", *argv]), *capsys.readouterr()

    return run


def test_demo_shows_every_call_and_what_failed(play):
    code, out, err = play("--steps", "12", "--failure-rate", "0.5", "--seed", "4")
    problem, world = demo.pose(12, 0.5, 4)
    assert code == 0
    text, _, lines = out.partition("\n\n")
    assert text == problem.text()
    shown = lines.splitlines()
    failed = sum(line.endswith("<- the tool failed") for line in shown)
    assert f"right; {len(shown) - 2} calls, of which {failed} failed" in err
    assert 0 < failed < len(shown)
    assert shown[-1] == f"The value is {problem.values()[-1]}."
    assert shown[0].startswith(f"{LABELS[problem.first_label]}: ")
    assert any(held_out_compositions(problem.steps))
    assert world.log == []  # nothing has been called before the model does


def test_demo_wrong_answer_is_exit_code_1(play):
    problem, _ = demo.pose(3, 0.0, 0)
    wrong = (problem.values()[-1] + 1) % 1000
    code, _, err = play("--steps", "3", "--failure-rate", "0", answer=f"The value is {wrong}.")
    assert code == 1
    assert f"wrong: it is {problem.values()[-1]}; " in err
    assert play("--steps", "3", "--failure-rate", "0", answer="No idea.")[0] == 1


def test_demo_json_is_every_event(play):
    code, out, _ = play("--steps", "2", "--failure-rate", "0", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert events[0]["event"] == "ReasoningDelta"
    assert events[-1]["event"] == "ChatFinish"


@pytest.mark.parametrize("arguments", ['{"a":1,"op":"+"', "[1]"])
def test_demo_shows_arguments_that_are_no_object(arguments, capsys):
    _, world = demo.pose(1, 0.0, 0)
    lines = demo.Lines(world)
    lines.show(ReasoningDelta("a\nb"))
    lines.show(ToolResult(0, ToolCall("functions.calc:0", "calc", arguments), "error"))
    assert capsys.readouterr().out == f"{'a, b':<44} {f'calc({arguments})':<24} error\n"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--steps", "0"], "num_steps must be in 1 .. 415 (got 0)"),
        (["--failure-rate", "2"], "rate must be in 0 .. 1 (got 2.0)"),
    ],
)
def test_demo_bad_arguments_are_named(play, argv, text):
    code, out, err = play(*argv)
    assert (code, out) == (1, "")
    assert text in err
