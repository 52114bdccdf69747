"""kimi-native chat as a person meets it: in a real pseudo-terminal whose screen is read, and in a pipe.

The program is tests/chat_program.py, whose model says what the user's message asks for.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import kimi_native
from chat_program import make_parser
from chat_program import say as answer
from fakes import make_scripted_model
from kimi_native import cli, generate
from kimi_native.chat.types import Finish, Usage
from kimi_native.chat_output import answer_line
from kimi_native.generation import Timing
from kimi_native.tokenizer import load_tokenizer
from pseudo_terminal import PseudoTerminal
from tokenizer_files import small_tokenizer

TESTS = Path(__file__).resolve().parent
ASK = "[y]es, [n]o, [a]lways:"

TOOLS = '''
import time

def weather(city: str) -> dict:
    """Tells the weather."""
    return {"city": city, "sky": "clear"}

def send_mail(to: str) -> str:
    """Sends a mail."""
    with open("mails", "a") as file:
        file.write(f"{to}\\n")
    return f"sent to {to}"

def hang() -> str:
    """Takes its time."""
    time.sleep(100)
    return ""
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    small_tokenizer(path)
    (path / "tools.py").write_text(TOOLS)
    return path


@pytest.fixture(autouse=True)
def no_mails(folder):
    (folder / "mails").unlink(missing_ok=True)


def command(folder: Path, *argv: str) -> list[str]:
    program = [sys.executable, "-P", str(TESTS / "chat_program.py"), str(folder)]
    return [*program, "--model", "demo", "--temperature", "0", *argv]


def environment() -> dict[str, str]:
    """With what the program imports: tests/ and the package this process has."""
    package = Path(kimi_native.__file__).resolve().parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(package)])}


@contextlib.contextmanager
def started(folder: Path, *argv: str):
    """The chat in a pseudo-terminal, at its prompt."""
    terminal = PseudoTerminal(command(folder, *argv), cwd=folder, env=environment())
    try:
        terminal.wait_for_prompt()
        yield terminal
    finally:
        terminal.close()


@pytest.fixture(scope="module")
def asking(folder):
    """A chat that asks about every tool; one process for many tests, since it imports torch."""
    with started(folder, "--tools", "tools.py") as terminal:
        yield terminal
        leave(terminal)


@pytest.fixture
def terminal(asking):
    """The same with a new conversation and an empty screen."""
    say(asking, "/reset", "a new conversation")
    asking.forget()
    asking.wait_for_prompt()
    return asking


def mails(folder: Path) -> list[str]:
    path = folder / "mails"
    return path.read_text().split() if path.exists() else []


def leave(terminal: PseudoTerminal) -> None:
    terminal.press_ctrl("d")
    assert terminal.wait_for_exit() == 0


def say(terminal: PseudoTerminal, text: str, *expected: str) -> None:
    """Types a message and waits for what must appear, then for the next prompt."""
    before = {words: terminal.text().count(words) for words in expected}
    terminal.enter(text)
    for words in expected:
        terminal.wait_for(words, times=before[words] + 1)
    terminal.wait_for_prompt()


# ---- terminal: answers ----------------------------------------------------------------------------------------------


def test_terminal_shows_reasoning_dimmed_then_content_and_what_it_cost(terminal):
    say(terminal, "Hello é月", "context:")
    lines = terminal.lines()
    at = lines.index("> Hello é月")
    assert lines[at + 1 : at + 4] == ["Message 1 came.", "", "You said 'Hello é月'."]
    assert re.fullmatch(
        r"[\d.]+ tokens/s \| prompt: \d+ reused, \d+ prefilled \| context: \d+ of 8192",
        lines[at + 4],
    )
    assert "Message 1 came." in terminal.dimmed()
    assert "You said" not in terminal.dimmed()
    assert lines[at + 4] in terminal.dimmed()


def test_terminal_tells_what_the_cache_held(terminal):
    say(terminal, "Hello", "context:")
    say(terminal, "More", "context:")
    costs = [re.findall(r"(\d+) reused, (\d+) prefilled", line) for line in terminal.lines()]
    (_, new), (reused, more) = [tuple(map(int, found[0])) for found in costs if found]
    assert reused > 10 * more
    assert reused >= new


def test_terminal_shows_no_control_characters_of_the_model(terminal):
    say(terminal, "Hello", "You said 'Hello'.")
    say(terminal, "escape", "owned")
    assert "a�]0;owned��[2Jb" in terminal.lines()
    assert "You said 'Hello'." in terminal.text()  # the screen was not cleared


def test_terminal_takes_messages_of_many_lines(terminal):
    terminal.enter("a\\")
    terminal.wait_for_prompt(".")
    say(terminal, "b", r"You said 'a\nb'.")
    terminal.enter('"""')
    terminal.wait_for_prompt(".")
    for line in ("c", "", "/d\\"):
        terminal.enter(line)
    say(terminal, '"""', r"You said 'c\n\n/d\\'.")


def test_terminal_remembers_messages(terminal):
    say(terminal, "first", "You said 'first'.")
    say(terminal, "\x1b[A", "You said 'first'.")  # the arrow up, then return
    assert "Message 2 came." in terminal.lines()


def test_terminal_leaves_empty_lines_alone(terminal):
    terminal.enter()
    terminal.enter("   ")
    say(terminal, "Hello", "Message 1 came.")


# ---- terminal: tools ------------------------------------------------------------------------------------------------


def test_terminal_refusal_is_the_result(terminal, folder):
    terminal.enter("mail")
    terminal.wait_for(f"run functions.send_mail:0? {ASK}")
    assert '│ to: "anna"                   │' in terminal.lines()
    terminal.enter("what")
    terminal.wait_for(ASK, times=2)
    say(terminal, "n", "The tool said: error: the user declined this call")
    assert mails(folder) == []
    say(terminal, "Hello", "You said 'Hello'.")


def test_terminal_runs_what_the_user_says_yes_to_and_asks_again(terminal, folder):
    for count in (1, 2):
        terminal.enter("mail")
        terminal.wait_for(ASK, times=count)
        say(terminal, "y", "The tool said: sent to anna")
    assert mails(folder) == ["anna", "anna"]


def test_terminal_answers_to_questions_are_no_messages_to_remember(terminal):
    terminal.enter("mail")
    terminal.wait_for(ASK)
    say(terminal, "n", "The tool said", "context:")
    terminal.enter("\x1b[A")  # mail, not n
    terminal.wait_for(ASK, times=2)
    say(terminal, "n", "The tool said")


def test_terminal_shows_calls_and_results_and_stops_a_tool_that_hangs(folder):
    argv = ("--tools", "tools.py", "--allow", "weather", "--allow", "hang")
    with started(folder, *argv) as terminal:
        assert "demo: k2-thinking, 8192 tokens of context" in terminal.lines()
        assert "tools: weather (runs), send_mail (asks), hang (runs)" in terminal.lines()
        say(terminal, "weather", "The tool said")
        lines = terminal.lines()
        at = lines.index("╭─ call functions.weather:0 ─╮")
        assert lines[at + 1] == '│ city: "Berlin"             │'
        at = lines.index("╭─ result of functions.weather:0 ────╮")
        assert lines[at + 1] == '│ {"city": "Berlin", "sky": "clear"} │'
        assert lines[at + 2].endswith(" ms ─╯")
        assert sum(" tokens/s | " in line for line in lines) == 2  # a line for each answer
        assert ASK not in terminal.text()
        terminal.enter("hang")
        terminal.wait_for("call functions.hang:1")
        terminal.wait_for("context:", times=3)
        terminal.press_ctrl("c")
        terminal.wait_for("stopped")
        terminal.wait_for_prompt()
        say(terminal, "Hello", "You said 'Hello'.")
        terminal.enter("mail")
        terminal.wait_for(ASK)
        leave(terminal)  # Ctrl-D at the question
    assert mails(folder) == []


def test_terminal_always_allows_one_tool_from_then_on_and_ctrl_c_twice_leaves(folder):
    with started(folder, "--tools", "tools.py") as terminal:
        terminal.enter("both")
        terminal.wait_for(f"run functions.weather:0? {ASK}")
        terminal.enter("y")
        terminal.wait_for(f"run functions.send_mail:1? {ASK}")
        say(terminal, "a", "The tool said: sent to ben")
        say(terminal, "mail", "The tool said: sent to anna")
        say(terminal, "/reset", "a new conversation")
        say(terminal, "mail", "The tool said: sent to anna")
        assert terminal.text().count(ASK) == 2
        assert mails(folder) == ["ben", "anna", "anna"]
        press_ctrl_c_at_prompt(terminal, times=1)
        terminal.press_ctrl("c")
        assert terminal.wait_for_exit() == 130


# ---- terminal: stopping ---------------------------------------------------------------------------------------------


def press_ctrl_c_at_prompt(terminal: PseudoTerminal, *, times: int) -> None:
    terminal.press_ctrl("c")
    terminal.wait_for("Ctrl-C again, or Ctrl-D, leaves", times=times)
    terminal.wait_for_prompt()


def test_terminal_ctrl_c_stops_the_answer_and_not_the_program(terminal):
    terminal.enter("long")
    terminal.wait_for("word20 ")
    terminal.press_ctrl("c")
    terminal.wait_for("stopped")
    terminal.wait_for_prompt()
    assert "word399" not in terminal.text()
    say(terminal, "Hello", "Message 2 came.", "You said 'Hello'.")


def test_terminal_second_ctrl_c_stops_at_once(terminal, folder):
    """The first one waits for the next token, which may be long in coming."""
    terminal.enter("get stuck")
    while not (folder / "stuck").exists():
        time.sleep(0.01)
    terminal.press_ctrl("c")
    terminal.wait_for("^C")
    time.sleep(0.2)  # two signals at once would be one
    terminal.press_ctrl("c")
    terminal.wait_for("stopped")
    terminal.wait_for_prompt()
    say(terminal, "Hello", "You said 'Hello'.")


def test_terminal_ctrl_c_at_a_question_runs_nothing(terminal, folder):
    terminal.enter("mail")
    terminal.wait_for(ASK)
    terminal.press_ctrl("c")
    terminal.wait_for("stopped")
    terminal.wait_for_prompt()
    assert mails(folder) == []
    say(terminal, "Hello", "You said 'Hello'.")  # no call waits any more


def test_terminal_ctrl_c_at_the_prompt_drops_what_is_typed(terminal):
    for times in (1, 2):  # not one after the other, so they do not leave
        terminal.type("half a mess")
        terminal.wait_for("half a mess", times=times)
        press_ctrl_c_at_prompt(terminal, times=times)
        say(terminal, "Hello", "You said 'Hello'.")


# ---- terminal: commands ---------------------------------------------------------------------------------------------


def test_terminal_commands_keep_and_change_the_conversation(folder):
    with started(folder, "--system", "Be brief.") as terminal:
        say(terminal, "Hello", "Message 1 came.")
        say(terminal, "/save talk.json", "3 messages saved in talk.json")
        assert len(json.loads((folder / "talk.json").read_text())["messages"]) == 3
        say(terminal, "/reset", "a new conversation")
        say(terminal, "Again", "Message 1 came.")
        say(terminal, "/load talk.json", "3 messages loaded from talk.json")
        say(terminal, "More", "Message 2 came.")
        say(terminal, "/system", "system: Be brief.")
        say(terminal, "/system Speak Latin.", "system: Speak Latin.")
        say(terminal, "system", "\nSpeak Latin.")
        say(terminal, "More", "Message 4 came.")
        terminal.enter("/exit")
        assert terminal.wait_for_exit() == 0


def test_terminal_asks_about_calls_of_a_loaded_conversation(terminal, folder):
    call = {"name": "send_mail", "arguments": '{"to":"carl"}'}
    calls = [{"id": "functions.send_mail:0", "type": "function", "function": call}]
    messages = [{"role": "user", "content": "mail"}, {"role": "assistant", "tool_calls": calls}]
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {}}}
        for name in ("weather", "send_mail", "hang")
    ]
    transcript = {"version": 1, "tools": tools, "messages": messages}
    (folder / "waiting.json").write_text(json.dumps(transcript))
    terminal.enter("/load waiting.json")
    terminal.wait_for(ASK)
    say(terminal, "y", "The tool said: sent to carl")
    assert mails(folder) == ["carl"]


def test_terminal_commands_answer_in_a_line_and_go_on(terminal):
    for text, words in (
        ("/help", "Ctrl-C stops an answer"),
        ("/none", "error: chat: no command is called /none; /help lists them"),
        ("/save", "error: chat: /save must be followed by a file's name"),
        ("/save no/such/folder/x", "error: [Errno 2]"),
        ("/load none.json", "error: [Errno 2]"),
        ("/load tools.py", "error: transcript: tools.py must be JSON"),
        ("//help", "You said '/help'."),
    ):
        say(terminal, text, words)
    assert "Traceback" not in terminal.text()
    say(terminal, "Hello", "Message 2 came.")


# ---- pipe -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(folder, monkeypatch, capsys):
    """Runs the chat with this standard input; gives exit code, stdout and stderr."""
    model, _, _ = make_scripted_model(load_tokenizer(folder), answer)
    monkeypatch.setattr(generate, "load", lambda path, **options: model)
    monkeypatch.setattr(cli, "_parser", lambda argv: make_parser())
    monkeypatch.chdir(folder)

    def pipe(text: str | bytes, *argv: str) -> tuple[int, str, str]:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        try:
            code = cli.main(["--model", "demo", "--temperature", "0", *argv])
        except SystemExit as end:  # argparse, on wrong usage
            code = end.code
        return code, *capsys.readouterr()

    return pipe


def test_pipe_answers_each_line_in_plain_text(pipe):
    assert pipe("Hello\n\n/help\nsystem", "--system", "S") == (
        0,
        "You said 'Hello'.\nYou said '/help'.\nS\n",
        "",
    )


def test_pipe_with_one_takes_the_whole_as_a_message(pipe):
    assert pipe("a\nb\n", "--one") == (0, "You said 'a\\nb'.\n", "")


def test_pipe_hands_control_characters_on_and_makes_none(pipe):
    _, out, _ = pipe("escape\n")
    assert out == "a\x1b]0;owned\x07\x1b[2Jb\n"


def test_pipe_runs_no_tool_that_is_not_allowed(pipe, folder):
    code, out, err = pipe("mail\nHello\n", "--tools", "tools.py")
    assert (code, mails(folder)) == (0, [])
    assert out == "The tool said: error: the user did not allow this tool\nYou said 'Hello'.\n"
    assert err == (
        'kimi-native: functions.send_mail:0 with {"to":"anna"}: error: the user did not allow this tool\n'
    )


def test_pipe_runs_allowed_tools(pipe, folder):
    code, out, err = pipe("both\n", "--tools", "tools.py", "--allow", "send_mail")
    assert (code, mails(folder)) == (0, ["ben"])
    assert out == "The tool said: sent to ben\n"
    assert 'functions.send_mail:1 with {"to":"ben"} ran' in err
    assert 'functions.weather:0 with {"city":"Bonn"}: error: the user did not allow' in err


def test_pipe_json_has_every_event(pipe):
    code, out, err = pipe("both\n", "--json", "--tools", "tools.py", "--allow", "weather")
    events = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    kinds = [e["event"] for e in events if not e["event"].endswith("Delta")]
    assert kinds == ["Finish", "ToolResult", "ChatFinish", "ToolResult", "Finish", "ChatFinish"]
    results = [e for e in events if e["event"] == "ToolResult"]
    assert [(r["call"]["name"], r["is_error"]) for r in results] == [
        ("weather", False),
        ("send_mail", True),
    ]
    text = "".join(e["text"] for e in events if e["event"] == "ContentDelta")
    assert text == "The tool said: error: the user did not allow this tool"
    assert events[-1]["reason"] == "stop"


@pytest.mark.parametrize(("tokens", "out"), [("25", "You said"), ("2", "")])
def test_pipe_says_where_an_answer_was_cut_off(pipe, tokens, out):
    """Even an answer without text is a line, so that a reader does not wait for it."""
    code, printed, err = pipe("Hello\nHello\n", "--max-tokens", tokens)
    assert code == 0
    assert printed.count("\n") == 2
    assert all(line.startswith(out) and "Hello" not in line for line in printed.splitlines())
    assert err.count("cut off") == 2


def test_answer_line_says_what_ended_an_answer():
    timing = Timing(0.0, 0.0, 1.0, 2.0, 10.0, None)
    for finish, end in (
        (Finish("stop", Usage(10, 1, 4)), "| context: 11 of 64"),
        (Finish("length", Usage(10, 1, 4)), "| cut off by max tokens"),
        (Finish("length", Usage(60, 4, 4)), "| the context is full"),
    ):
        assert answer_line(finish, timing, 64).endswith(end)
    line = answer_line(
        Finish("stop", Usage(10, 3, 4)), replace(timing, decode_tokens_per_s=1.25), 64
    )
    assert line == "1.2 tokens/s | prompt: 4 reused, 6 prefilled | context: 13 of 64"


@pytest.mark.parametrize(
    ("text", "argv", "code", "message"),
    [
        ("", [], 1, "chat: stdin must hold a message (got none)"),
        (" \n\n", [], 1, "chat: stdin must hold a message (got none)"),
        (b"a\xffb\n", [], 1, "chat: stdin must be UTF-8 text"),
        ("a", ["--allow", "weather"], 1, "--allow must name a tool of --tools"),
        ("a", ["--tools", "none.py"], 1, "none.py: must be a Python file"),
        ("a", ["--temperature", "-1"], 1, "temperature must be"),
        ("a", ["--thinking-budget", "-1"], 1, "thinking_budget must be"),
        ("a", ["--max-tool-calls", "-1"], 1, "max_tool_calls must be"),
        ("a", ["--max-tokens", "x"], 2, "invalid int value"),
    ],
)
def test_pipe_errors_are_one_line(pipe, text, argv, code, message):
    actual, out, err = pipe(text, *argv)
    assert (actual, out) == (code, "")
    assert message in err
    if code == 1:
        assert err.startswith("kimi-native: error: ")
        assert err.count("\n") == 1


def test_pipe_interrupted_ends_with_130(folder):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command(folder), cwd=folder, env=environment(), **pipes) as process:
        process.stdin.write(b"long\n")
        process.stdin.flush()
        assert process.stdout.read(20) == b"word0 word1 word2 wo"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_chat_takes_the_sampling_and_machine_arguments_of_generate():
    def options(parser):
        return {
            option: (action.type, action.choices, action.default, action.help)
            for action in parser._actions
            for option in action.option_strings
        }

    (verbs,) = (a for a in cli._parser([])._actions if a.dest == "verb")
    generate_options, chat_options = options(verbs.choices["generate"]), options(make_parser())
    own = {"--raw-prompt", "--stream", "--json", "--debug"}
    assert len(generate_options) > 15
    for option in set(generate_options) - own:
        assert chat_options[option] == generate_options[option], option
