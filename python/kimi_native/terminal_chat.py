"""kimi-native chat: one conversation in a terminal or a pipe, over Model.chat.

On a terminal, Ctrl-C stops the answer at its next token (pressed again: at once), twice at the prompt leaves; a tool
that was not allowed by name is asked about. In a pipe each line is a message, and such a tool is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from kimi_native.chat.tool import Tool
from kimi_native.chat.types import Finish, Message, ToolCall
from kimi_native.chat_input import ask, enable_editing, piped_messages, read_message
from kimi_native.chat_output import JsonLines, Plain, Screen, answer_line
from kimi_native.conversation import Chat, ChatEvent, ChatFinish
from kimi_native.errors import KimiNativeError, RequestError
from kimi_native.model_arguments import import_torch, load_model, sampling_overrides
from kimi_native.tool_file import load_tools

if TYPE_CHECKING:
    from kimi_native.generate import Model

_DECLINED = "the user declined this call"
_NOT_ALLOWED = "the user did not allow this tool"
_STOPPED = "the user stopped this call"


class Output(Protocol):
    def show(self, event: ChatEvent) -> None: ...

    def line(self, text: str) -> None: ...

    def clear(self) -> None: ...


class Session:
    """A chat with what it shows and what it may run.

    allowed  names of tools that run without asking; grows where the user answers "always"
    options  of Model.chat, for every conversation of this session
    """

    def __init__(
        self,
        model: Model,
        output: Output,
        *,
        tools: Sequence[Tool] = (),
        allowed: Sequence[str] = (),
        system: str | None = None,
        is_interactive: bool,
        **options: Any,
    ) -> None:
        self.model, self.output, self.tools = model, output, tools
        self.allowed = set(allowed)
        self.is_interactive = is_interactive
        self._options = options
        self.chat = self.new_chat(system=system)

    def new_chat(self, **start: Any) -> Chat:
        return self.model.chat(
            tools=self.tools or None, run_tools=sorted(self.allowed), **start, **self._options
        )

    def restart(self, **start: Any) -> None:
        """Another conversation, given by arguments of Model.chat. Raises as that does, and changes nothing then."""
        chat = self.new_chat(**start)
        self.chat.close()
        self.chat = chat

    @property
    def system(self) -> str | None:
        """The system text, if the conversation begins with one."""
        first = self.chat.messages[:1]
        return first[0].content if first and first[0].role == "system" else None

    def say(self, text: str) -> None:
        """One message and all that follows from it. Raises as Chat.stream and its iterator."""
        try:
            with self._stoppable():
                finish = self._play(self.chat.stream(text))
            self._go_on(finish)
        finally:
            self._settle()

    def resume(self) -> None:
        """Goes on with calls that wait, as a loaded conversation may have them."""
        try:
            self._go_on(ChatFinish("paused", (), self.chat.pending))
        finally:
            self._settle()

    def _go_on(self, finish: ChatFinish) -> None:
        while finish.reason == "paused":
            for call in self.chat.pending:
                self._decide(call)
            with self._stoppable():
                finish = self._play(self.chat.resume_stream())
        if finish.reason in ("canceled", "max_tool_calls"):
            words = {"canceled": "stopped", "max_tool_calls": "stopped: too many tool calls"}
            self.output.line(words[finish.reason])

    def _play(self, events: Iterator[ChatEvent]) -> ChatFinish:
        with contextlib.closing(events):
            for event in events:
                self.output.show(event)
                if isinstance(event, Finish) and self.is_interactive:
                    line = answer_line(event, self.chat.timing, self.model.max_context)
                    self.output.line(line)
        return event

    def _decide(self, call: ToolCall) -> None:
        """Approves or declines a call: what is not allowed by name is the user's to say, and in a pipe declined."""
        if call.name in self.allowed:
            self.chat.approve(call.id)
            return
        answer, reason = "n", _NOT_ALLOWED
        if self.is_interactive:
            answer, reason = _yes_no_always(f"run {call.id}? [y]es, [n]o, [a]lways: "), _DECLINED
        if answer == "n":
            for result in self.chat.decline(call.id, reason=reason):
                self.output.show(result)
            return
        if answer == "a":
            self.allowed.add(call.name)
        self.chat.approve(call.id)

    def _settle(self) -> None:
        """After a stop or a failure: nothing half shown, and no call waits, so that the user can speak."""
        self.output.clear()
        if self.chat.pending:
            self.chat.decline(reason=_STOPPED)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """On a terminal Ctrl-C cancels the loop; the second one is an interrupt."""
        if not self.is_interactive:
            yield
            return

        def on_interrupt(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, before)
            # Not here: this thread may hold the lock that cancel takes.
            threading.Thread(target=self.chat.cancel, daemon=True).start()

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _yes_no_always(question: str) -> str:
    while True:
        answer = ask(question).strip().lower()
        for word in ("yes", "no", "always"):
            if answer and word.startswith(answer):
                return word[0]


# ---- commands -------------------------------------------------------------------------------------------------------


def _help(session: Session, text: str) -> None:
    for name, (_, words) in _COMMANDS.items():
        session.output.line(f"/{name:<8} {words}")
    session.output.line("//...     a message that begins with /")
    session.output.line(
        'a line that ends in \\ goes on; """ begins and ends a message of many lines'
    )
    session.output.line("Ctrl-C stops an answer; Ctrl-D, or Ctrl-C twice, leaves")


def _save(session: Session, text: str) -> None:
    session.chat.save(_file_name(text, "save"))
    session.output.line(f"{len(session.chat.messages)} messages saved in {text}")


def _load(session: Session, text: str) -> None:
    session.restart(transcript=_file_name(text, "load"))
    session.output.line(f"{len(session.chat.messages)} messages loaded from {text}")
    if session.chat.pending:
        session.resume()


def _reset(session: Session, text: str) -> None:
    session.restart(system=session.system)
    session.output.line("a new conversation")


def _system(session: Session, text: str) -> None:
    if text:
        before = session.chat.messages
        rest = before[1:] if session.system is not None else before
        session.restart(system=text, messages=rest)
    session.output.line(f"system: {session.system or 'none'}")


def _file_name(text: str, command: str) -> str:
    if not text:
        raise RequestError(f"chat: /{command} must be followed by a file's name (got none)")
    return os.path.expanduser(text)


_COMMANDS = {
    "help": (_help, "lists the commands"),
    "save": (_save, "FILE: writes the conversation"),
    "load": (_load, "FILE: goes on with a saved conversation"),
    "reset": (_reset, "begins a new conversation"),
    "system": (_system, "TEXT: sets the system text; without one, shows it"),
    "exit": (None, "leaves"),
}


def _command(session: Session, line: str) -> bool:
    """Does what a line that begins with / says; False to leave."""
    name, _, text = line[1:].partition(" ")
    if name not in _COMMANDS:
        raise RequestError(f"chat: no command is called /{name}; /help lists them")
    if name == "exit":
        return False
    _COMMANDS[name][0](session, text.strip())
    return True


# ---- terminal and pipe ----------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """The verb chat. Exit codes: 0; 130 for a chat left with Ctrl-C. Raises RequestError before a model is loaded."""
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty() and not args.json and not args.one
    tools = load_tools(args.tools) if args.tools else ()
    _check_allowed(args.allow, tools)
    import_torch()
    options = {
        "max_tool_calls": args.max_tool_calls,
        "thinking_budget": args.thinking_budget,
        **sampling_overrides(args),
    }
    _check_options(tools, options)
    output = Screen() if is_interactive else JsonLines() if args.json else Plain()
    model = load_model(args)
    _check_format(model, tools)
    session = Session(
        model,
        output,
        tools=tools,
        allowed=args.allow,
        system=args.system,
        is_interactive=is_interactive,
        **options,
    )
    if is_interactive:
        return _talk(session, args.model or "kimi-nano")
    for text in piped_messages(whole=args.one):
        session.say(text)
    return 0


def _talk(session: Session, name: str) -> int:
    """Messages and commands from the terminal, to the end."""
    enable_editing()
    _greet(session, name)
    num_interrupts = 0
    while num_interrupts < 2:
        try:
            text = _next_message()
            num_interrupts = 0
            if not _answer(session, text):
                return 0
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            num_interrupts += 1
            session.output.line("Ctrl-C again, or Ctrl-D, leaves")
        except (KimiNativeError, OSError, RuntimeError) as error:
            session.output.line(f"error: {error}")
    return 130


def _next_message() -> str:
    print()
    try:
        return read_message()
    except KeyboardInterrupt:
        print()  # behind what was typed
        raise


def _answer(session: Session, text: str) -> bool:
    """Does what a message or command asks for; False to leave."""
    try:
        if text.startswith("/") and not text.startswith("//"):
            return _command(session, text)
        if text.strip():
            session.say(text.removeprefix("/") if text.startswith("//") else text)
    except KeyboardInterrupt:  # at a question, or the second one of an answer
        print()
        session.output.line("stopped")
    return True


def _greet(session: Session, name: str) -> None:
    model = session.model
    format = model.chat_format or "its own chat template"
    session.output.line(f"{name}: {format}, {model.max_context} tokens of context")
    session.output.line("/help lists commands, Ctrl-D leaves")
    if session.tools:
        kinds = [
            f"{tool.name} ({'runs' if tool.name in session.allowed else 'asks'})"
            for tool in session.tools
        ]
        session.output.line(f"tools: {', '.join(kinds)}")


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_allowed(names: Sequence[str], tools: Sequence[Tool]) -> None:
    declared = [tool.name for tool in tools]
    for name in names:
        if name not in declared:
            raise RequestError(
                f"chat: --allow must name a tool of --tools (got {name!r}, declared: {', '.join(declared) or 'none'})"
            )


def _check_options(tools: Sequence[Tool], options: dict[str, Any]) -> None:
    """A bad value should not cost the loading of a model."""
    from kimi_native.guide import Guiding

    Guiding(tools, thinking_budget=options["thinking_budget"])
    if options["max_tool_calls"] < 0:
        raise RequestError(
            f"chat: max_tool_calls must be at least 0 (got {options['max_tool_calls']})"
        )


def _check_format(model: Model, tools: Sequence[Tool]) -> None:
    """Raises RequestError for a checkpoint that cannot chat, or not with tools."""
    from kimi_native.chat.template import render

    if model.chat_template is not None:
        return
    if model.chat_format is None:
        raise RequestError(
            "chat: this checkpoint has no chat format known here and no chat template "
            f"(got model_type={model.config.model_type})"
        )
    options = {"format": model.chat_format, "tokenizer": model.tokenizer}
    render([Message("user", "")], tools=tools or None, **options)
