"""kimi-native chat as a person meets it: in a real pseudo-terminal whose screen is read, and in a pipe.

The program is tests/chat_program.py, whose model says what the user's message asks for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pseudo_terminal import PseudoTerminal
from tokenizer_files import small_tokenizer

TESTS = Path(__file__).resolve().parent
ASK = "[y]es, [n]o, [a]lways:"

TOOLS = '''
from pathlib import Path

def weather(city: str) -> dict:
    """Tells the weather."""
    return {"city": city, "sky": "clear"}

def send_mail(to: str) -> str:
    """Sends a mail."""
    with open("mails", "a") as file:
        file.write(f"{to}\\n")
    return f"sent to {to}"
'''


@pytest.fixture
def folder(tmp_path):
    small_tokenizer(tmp_path)
    (tmp_path / "tools.py").write_text(TOOLS)
    return tmp_path


def command(folder: Path, *argv: str) -> list[str]:
    program = [sys.executable, "-P", str(TESTS / "chat_program.py"), str(folder)]
    return [*program, "--model", "demo", "--temperature", "0", *argv]


@pytest.fixture
def environment(monkeypatch):
    """What the program imports: tests/ and the package this process has."""
    import kimi_native

    package = Path(kimi_native.__file__).resolve().parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(package)]))


@pytest.fixture
def start(folder, environment):
    """Starts the chat in a pseudo-terminal and waits for its prompt."""
    terminals = []

    def start(*argv: str) -> PseudoTerminal:
        terminal = PseudoTerminal(command(folder, *argv), cwd=folder)
        terminals.append(terminal)
        terminal.wait_for_prompt()
        return terminal

    yield start
    for terminal in terminals:
        terminal.close()


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


def test_terminal_shows_reasoning_dimmed_then_content_and_what_it_cost(start):
    terminal = start()
    say(terminal, "Hello é月", "context:")
    lines = terminal.lines()
    at = lines.index("> Hello é月")
    assert lines[at + 1 : at + 4] == ["Message 1 came.", "", "You said 'Hello é月'."]
    assert " tokens/s | prompt: 0 reused, " in lines[at + 4]
    assert lines[at + 4].endswith(" of 8192")
    assert "Message 1 came." in terminal.dimmed()
    assert "You said" not in terminal.dimmed()
    assert lines[at + 4] in terminal.dimmed()
    say(terminal, "More", "Message 2 came.")
    assert "prompt: 0 reused" not in terminal.lines()[-3]  # the first message is in the cache
    leave(terminal)


def test_terminal_greets_with_model_context_and_tools(start):
    terminal = start("--tools", "tools.py", "--allow", "weather")
    lines = terminal.lines()
    assert "demo: k2-thinking, 8192 tokens of context" in lines
    assert "tools: weather (runs), send_mail (asks)" in lines
    leave(terminal)


def test_terminal_shows_no_control_characters_of_the_model(start):
    terminal = start()
    say(terminal, "Hello", "You said 'Hello'.")
    say(terminal, "escape", "owned")
    assert "a�]0;owned��[2Jb" in terminal.lines()
    assert "You said 'Hello'." in terminal.text()  # the screen was not cleared
    leave(terminal)


def test_terminal_takes_messages_of_many_lines(start):
    terminal = start()
    terminal.enter("a\\")
    terminal.wait_for_prompt(".")
    say(terminal, "b", r"You said 'a\nb'.")
    terminal.enter('"""')
    terminal.wait_for_prompt(".")
    for line in ("c", "", "/d\\"):
        terminal.enter(line)
    say(terminal, '"""', r"You said 'c\n\n/d\\'.")
    leave(terminal)


def test_terminal_remembers_messages(start):
    terminal = start()
    say(terminal, "first", "You said 'first'.")
    say(terminal, "\x1b[A", "You said 'first'.")  # the arrow up, then return
    assert "Message 2 came." in terminal.lines()
    leave(terminal)


def test_terminal_leaves_empty_lines_alone(start):
    terminal = start()
    terminal.enter()
    terminal.enter("   ")
    say(terminal, "Hello", "Message 1 came.")
    leave(terminal)


# ---- terminal: tools ------------------------------------------------------------------------------------------------


def test_terminal_runs_an_allowed_tool_and_shows_call_and_result(start):
    terminal = start("--tools", "tools.py", "--allow", "weather")
    say(terminal, "weather", "The tool said")
    lines = terminal.lines()
    at = next(i for i, line in enumerate(lines) if "call functions.weather:0" in line)
    assert lines[at] == "╭─ call functions.weather:0 ─╮"
    assert lines[at + 1] == '│ city: "Berlin"             │'
    at = next(i for i, line in enumerate(lines) if "result of functions.weather:0" in line)
    assert lines[at + 1] == '│ {"city": "Berlin", "sky": "clear"} │'
    assert lines[at + 2].endswith(" ms ─╯")
    assert 'The tool said: {"city": "Berlin", "sky": "clear"}' in lines
    assert sum(" tokens/s | " in line for line in lines) == 2  # a line for each answer
    assert ASK not in terminal.text()
    leave(terminal)


def test_terminal_refusal_is_the_result(start, folder):
    terminal = start("--tools", "tools.py")
    terminal.enter("mail")
    terminal.wait_for(f"run functions.send_mail:0? {ASK}")
    assert '│ to: "anna"                   │' in terminal.lines()
    terminal.enter("what")
    terminal.wait_for(ASK, times=2)
    say(terminal, "n", "The tool said: error: the user declined this call")
    assert mails(folder) == []
    say(terminal, "Hello", "You said 'Hello'.")
    leave(terminal)


def test_terminal_runs_what_the_user_says_yes_to_and_asks_again(start, folder):
    terminal = start("--tools", "tools.py")
    for count in (1, 2):
        terminal.enter("mail")
        terminal.wait_for(ASK, times=count)
        say(terminal, "y", "The tool said: sent to anna")
    assert mails(folder) == ["anna", "anna"]
    leave(terminal)


def test_terminal_always_allows_one_tool_from_then_on(start, folder):
    terminal = start("--tools", "tools.py")
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
    leave(terminal)


def test_terminal_answers_to_questions_are_no_messages_to_remember(start):
    terminal = start("--tools", "tools.py")
    terminal.enter("mail")
    terminal.wait_for(ASK)
    say(terminal, "n", "declined this call", "context:")
    terminal.enter("\x1b[A")  # mail, not n
    terminal.wait_for(ASK, times=2)
    say(terminal, "n", "context:")
    leave(terminal)


# ---- terminal: leaving and stopping ---------------------------------------------------------------------------------


def test_terminal_ctrl_c_stops_the_answer_and_not_the_program(start):
    terminal = start()
    terminal.enter("long")
    terminal.wait_for("word20 ")
    terminal.press_ctrl("c")
    terminal.wait_for("stopped")
    terminal.wait_for_prompt()
    assert "word399" not in terminal.text()
    say(terminal, "Hello", "Message 2 came.", "You said 'Hello'.")
    leave(terminal)


def test_terminal_ctrl_c_at_a_question_runs_nothing(start, folder):
    terminal = start("--tools", "tools.py")
    terminal.enter("mail")
    terminal.wait_for(ASK)
    terminal.press_ctrl("c")
    terminal.wait_for("stopped")
    terminal.wait_for_prompt()
    assert mails(folder) == []
    say(terminal, "Hello", "You said 'Hello'.")  # no call waits any more
    leave(terminal)


def test_terminal_ctrl_d_at_a_question_leaves_and_runs_nothing(start, folder):
    terminal = start("--tools", "tools.py")
    terminal.enter("mail")
    terminal.wait_for(ASK)
    leave(terminal)
    assert mails(folder) == []


def test_terminal_ctrl_c_twice_at_the_prompt_leaves(start):
    terminal = start()
    terminal.type("half a mess")
    terminal.press_ctrl("c")
    terminal.wait_for("Ctrl-C again, or Ctrl-D, leaves")
    say(terminal, "Hello", "You said 'Hello'.")  # and what was typed is gone
    terminal.press_ctrl("c")
    terminal.wait_for("Ctrl-C again, or Ctrl-D, leaves", times=2)
    terminal.wait_for_prompt()
    terminal.press_ctrl("c")
    assert terminal.wait_for_exit() == 130


def test_terminal_stops_a_tool_that_hangs(start, folder):
    (folder / "slow.py").write_text(
        "import time\ndef weather(city: str) -> str:\n    time.sleep(100)\n    return ''\n"
    )
    terminal = start("--tools", "slow.py", "--allow", "weather")
    terminal.enter("weather")
    terminal.wait_for("context:")
    terminal.press_ctrl("c")
    terminal.wait_for("stopped")
    terminal.wait_for_prompt()
    say(terminal, "Hello", "You said 'Hello'.")
    leave(terminal)


# ---- terminal: commands ---------------------------------------------------------------------------------------------


def test_terminal_commands_save_reset_and_load(start, folder):
    terminal = start("--system", "Be brief.")
    say(terminal, "Hello", "Message 1 came.")
    say(terminal, "/save talk.json", "3 messages saved in talk.json")
    assert len(json.loads((folder / "talk.json").read_text())["messages"]) == 3
    say(terminal, "/reset", "a new conversation")
    say(terminal, "Again", "Message 1 came.")
    say(terminal, "/load talk.json", "3 messages loaded from talk.json")
    say(terminal, "More", "Message 2 came.")
    say(terminal, "system", "Be brief.")
    terminal.enter("/exit")
    assert terminal.wait_for_exit() == 0


def test_terminal_system_command_changes_the_text_and_keeps_the_conversation(start):
    terminal = start()
    say(terminal, "/system", "system: none")
    say(terminal, "Hello", "Message 1 came.")
    say(terminal, "/system Speak Latin.", "system: Speak Latin.")
    say(terminal, "system", "Speak Latin.")
    say(terminal, "More", "Message 3 came.")
    leave(terminal)


def test_terminal_asks_about_calls_of_a_loaded_conversation(start, folder):
    call = {"name": "send_mail", "arguments": '{"to":"carl"}'}
    calls = [{"id": "functions.send_mail:0", "type": "function", "function": call}]
    messages = [{"role": "user", "content": "mail"}, {"role": "assistant", "tool_calls": calls}]
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {}}}
        for name in ("weather", "send_mail")
    ]
    transcript = {"version": 1, "tools": tools, "messages": messages}
    (folder / "talk.json").write_text(json.dumps(transcript))
    terminal = start("--tools", "tools.py")
    terminal.enter("/load talk.json")
    terminal.wait_for(ASK)
    say(terminal, "y", "The tool said: sent to carl")
    assert mails(folder) == ["carl"]
    leave(terminal)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/help", "sets the system text"),
        ("/none", "error: chat: no command is called /none; /help lists them"),
        ("/save", "error: chat: /save must be followed by a file's name"),
        ("/save no/such/folder/x", "error: [Errno 2]"),
        ("/load no.json", "error: [Errno 2]"),
        ("/load tools.py", "error: transcript: tools.py must be JSON"),
        ("//help", "You said '/help'."),
    ],
)
def test_terminal_commands_answer_in_a_line_and_go_on(start, text, words):
    terminal = start()
    say(terminal, text, words)
    assert "Traceback" not in terminal.text()
    say(terminal, "Hello", "You said 'Hello'.")
    leave(terminal)


# ---- pipe -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(folder, environment):
    """Runs the chat with this standard input; gives exit code, stdout and stderr."""

    def pipe(text: str | bytes, *argv: str) -> tuple[int, str, str]:
        data = text.encode() if isinstance(text, str) else text
        done = subprocess.run(
            command(folder, *argv), input=data, capture_output=True, cwd=folder, timeout=120
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

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


def test_pipe_says_where_an_answer_was_cut_off(pipe):
    code, out, err = pipe("Hello\n", "--max-tokens", "25")
    assert code == 0
    assert "You said 'Hello'.".startswith(out.rstrip("\n"))
    assert "cut off" in err


@pytest.mark.parametrize(
    ("text", "argv", "code", "message"),
    [
        ("", [], 1, "chat: stdin must hold a message (got none)"),
        (" \n\n", [], 1, "chat: stdin must hold a message (got none)"),
        (b"a\xffb\n", [], 1, "UTF-8"),
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


def test_pipe_interrupted_ends_with_130(folder, environment):
    process = subprocess.Popen(
        command(folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder
    )  # fmt: skip
    with process:
        process.stdin.write(b"long\n")
        process.stdin.flush()
        assert process.stdout.read(20)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
