"""What one answer may say next: the format's control tokens at their places, and tool calls that are valid.

    state      may come                                           next state
    REASONING  text, </think>, section begin, the end             CONTENT, CALLS
    CONTENT    text, section begin, the end                       CALLS
    CALLS      call begin; after a call also section end          HEADER, END
    HEADER     functions.NAME:INDEX of a declared tool, then argument begin     ARGUMENTS
    ARGUMENTS  JSON of the tool's schema, compact, then call end  CALLS
    END        the end

Grammars are at work in HEADER and ARGUMENTS alone; elsewhere a fixed set of control ids is ruled out. Every state
leaves at least one id, so an answer that does not get through in its max_tokens ends with "length".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_native.chat.template import END_THINK, THINK, ChatFormat, canonical_tool_ids
from kimi_native.chat.tool import Tool, ToolLike, as_tools
from kimi_native.chat.types import Message, as_messages
from kimi_native.errors import RequestError

if TYPE_CHECKING:
    from kimi_native.schema_grammar import GrammarCompiler, Matcher
    from kimi_native.tokenizer import Tokenizer

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
ToolChoice = str | Mapping[str, Any]


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    CALLS = auto()
    HEADER = auto()
    ARGUMENTS = auto()
    END = auto()


@dataclass(frozen=True)
class ToolRules:
    """Which calls an answer may make.

    tools        those that may be called; none: no call
    first_index  the number in the id of the first call: that of the conversation's calls so far
    required     the answer must call a tool, right after its reasoning
    at_most      calls of one answer
    """

    tools: tuple[Tool, ...]
    first_index: int = 0
    required: bool = False
    at_most: int = 2**31


def tool_rules(tools: Sequence[Tool], choice: ToolChoice | None, first_index: int) -> ToolRules:
    """Rules from OpenAI's tool_choice: "auto", "none", "required", {"name": ...}, or the API's object around a name.

    Raises RequestError on another choice, or one that needs a tool that is not declared.
    """
    if choice is None or choice == "auto":
        return ToolRules(tuple(tools), first_index)
    if choice == "none":
        return ToolRules((), first_index)
    if choice == "required" and tools:
        return ToolRules(tuple(tools), first_index, required=True)
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        named = tuple(tool for tool in tools if tool.name == name)
        if named:
            return ToolRules(named, first_index, required=True, at_most=1)
    raise RequestError(
        "generate: tool_choice must be 'auto', 'none', 'required' or {'name': ...}, and name a declared tool "
        f"(got {choice!r} with {', '.join(tool.name for tool in tools) or 'no tools'})"
    )


def next_call_index(messages: Iterable[Message | Mapping[str, Any]]) -> int:
    """Number in the id of the next call: the calls so far, or one more than the largest that the history names."""
    calls = [
        call for message in canonical_tool_ids(as_messages(messages)) for call in message.tool_calls
    ]
    numbers = [int(call.id.rpartition(":")[2]) + 1 for call in calls]
    return max([len(calls), *numbers])


@dataclass(frozen=True)
class Start:
    """Where the prompt leaves the answer. thinks: in reasoning; opened: the prompt has its <think> already."""

    thinks: bool
    opened: bool = False


def answer_start(format: ChatFormat, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> Start:
    """The start of the answer to a rendered prompt, which may end with <think> or with the pair."""
    think, end = (tokenizer.control_ids.get(name) for name in (THINK, END_THINK))
    thinks = format.thinking != "no" and (end is None or prompt_ids[-1] != end)
    return Start(thinks, opened=think is not None and prompt_ids[-1] == think)


class Guide:
    """The ids that one answer may continue with; it is told every id that was chosen.

    start            where the prompt leaves the answer
    rules            of tool calls, or None: control tokens are left to the model
    thinking_budget  ids of reasoning after which </think> comes, or None

    Raises RequestError if a tool's schema cannot be enforced, or the tokenizer lacks a control token this needs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_ids: Collection[int],
        start: Start,
        rules: ToolRules | None,
        compiler: GrammarCompiler | None,
        thinking_budget: int | None = None,
    ) -> None:
        self._ids = tokenizer.control_ids
        self._eos = frozenset(eos_ids)
        self._rules = rules
        self._compiler = compiler
        self._budget = thinking_budget
        self._vocab_size = vocab_size
        self._state = _State.REASONING if start.thinks else _State.CONTENT
        self._matcher: Matcher | None = None
        self._header: list[int] = []
        self._decode = tokenizer.decode
        self._num_calls = 0
        self._num_thought = 0
        self._started = start.opened
        self._fixed: dict[frozenset[int], np.ndarray] = {}
        self._text = self._text_mask(tokenizer)
        self._check()

    def _check(self) -> None:
        needed = []
        if self._budget is not None:
            needed.append(END_THINK)
        if self._rules is not None and self._rules.tools:
            needed += [SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_END, ARGUMENT_BEGIN]
            if all(name in self._ids for name in needed):
                for tool in self._rules.tools:
                    self._compiler.arguments(tool, self._ids[CALL_END])
        missing = [name for name in needed if name not in self._ids]
        if missing:
            raise RequestError(
                f"generate: the tokenizer must have {missing[0]} for this (got none); leave thinking_budget out or "
                "pass constrain_tools=False"
            )

    # ---- what may come ----------------------------------------------------------------------------------------------

    def allowed(self) -> np.ndarray | None:
        """[vocab_size] bool, not to be changed, or None: anything. Raises RequestError if a grammar's limit is met."""
        if self._state is _State.REASONING and self._is_over_budget():
            return self._only(self._ids[END_THINK])
        if self._rules is None:
            return None
        if self._matcher is not None:
            return self._matcher.allowed()
        if self._state is _State.CALLS:
            return self._between_calls()
        if self._state is _State.END:
            return self._only(*self._eos)
        return self._free()

    def _is_over_budget(self) -> bool:
        return self._budget is not None and self._num_thought >= self._budget

    def _between_calls(self) -> np.ndarray:
        begin, end = self._ids[CALL_BEGIN], self._ids[SECTION_END]
        if self._num_calls == 0:
            return self._only(begin)
        if self._num_calls >= self._rules.at_most:
            return self._only(end)
        return self._only(begin, end)

    def _free(self) -> np.ndarray:
        rules, controls = self._rules, set()
        if rules.required and self._state is _State.CONTENT:
            return self._only(self._ids[SECTION_BEGIN])
        if rules.tools:
            controls.add(self._ids[SECTION_BEGIN])
        if not rules.required:
            controls |= self._eos
        if self._state is _State.REASONING:
            controls |= {self._ids[name] for name in (END_THINK,) if name in self._ids}
            if not self._started and THINK in self._ids:
                controls.add(self._ids[THINK])
        return self._mask(frozenset(controls), self._text)

    def _only(self, *ids: int) -> np.ndarray:
        return self._mask(frozenset(ids), None)

    def _mask(self, ids: frozenset[int], others: np.ndarray | None) -> np.ndarray:
        key = ids if others is None else ids | {-1}
        if key not in self._fixed:
            mask = np.zeros(self._vocab_size, dtype=bool) if others is None else others.copy()
            mask[list(ids)] = True
            self._fixed[key] = mask
        return self._fixed[key]

    def _text_mask(self, tokenizer: Tokenizer) -> np.ndarray:
        """True for ids that are text: neither control ids nor slots past the tokenizer's vocabulary."""
        mask = np.zeros(self._vocab_size, dtype=bool)
        mask[: min(self._vocab_size, tokenizer.vocab_size)] = True
        mask[[i for i in tokenizer.control_ids.values() if i < self._vocab_size]] = False
        return mask

    # ---- what came --------------------------------------------------------------------------------------------------

    def push(self, token_id: int) -> None:
        """Takes the id that was chosen."""
        first, self._started = not self._started, True
        if self._state is _State.REASONING and not (first and token_id == self._ids.get(THINK)):
            self._num_thought += 1
        if self._matcher is not None:
            self._in_call(token_id)
        elif token_id == self._ids.get(END_THINK) and self._state is _State.REASONING:
            self._state = _State.CONTENT
        elif token_id == self._ids.get(SECTION_BEGIN):
            self._state = _State.CALLS
        elif self._state is _State.CALLS and self._rules is not None:
            self._on_call(token_id)

    def _on_call(self, token_id: int) -> None:
        if token_id == self._ids[SECTION_END]:
            self._state = _State.END
        elif token_id == self._ids[CALL_BEGIN]:
            self._state = _State.HEADER
            self._header.clear()
            names = tuple(tool.name for tool in self._rules.tools)
            index = self._rules.first_index + self._num_calls
            self._matcher = self._compiler.header(names, index, self._ids[ARGUMENT_BEGIN])

    def _in_call(self, token_id: int) -> None:
        self._matcher.push(token_id)
        if self._state is _State.HEADER:
            if token_id != self._ids[ARGUMENT_BEGIN]:
                self._header.append(token_id)
                return
            name = self._decode(self._header).removeprefix("functions.").rpartition(":")[0]
            tool = next(tool for tool in self._rules.tools if tool.name == name)
            self._matcher = self._compiler.arguments(tool, self._ids[CALL_END])
            self._state = _State.ARGUMENTS
        elif token_id == self._ids[CALL_END]:
            self._matcher = None
            self._num_calls += 1
            self._state = _State.CALLS


@dataclass(frozen=True)
class Guiding:
    """What a caller asks of the answers, checked; makes one Guide per answer.

    tools, tool_choice, constrain_tools, thinking_budget  as in Model.generate

    Raises RequestError on a wrong one.
    """

    tools: Sequence[ToolLike] | None = None
    tool_choice: ToolChoice | None = None
    constrain_tools: bool = True
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        budget = self.thinking_budget
        if budget is not None and (
            isinstance(budget, bool) or not isinstance(budget, int) or budget < 0
        ):
            raise RequestError(
                f"generate: thinking_budget must be an integer of at least 0 (got {budget!r})"
            )
        if not isinstance(self.constrain_tools, bool):
            raise RequestError(
                f"generate: constrain_tools must be True or False (got {self.constrain_tools!r})"
            )
        if self.tool_choice not in (None, "auto") and not self.constrain_tools:
            raise RequestError(
                f"generate: tool_choice needs constrain_tools=True (got {self.tool_choice!r})"
            )

    @property
    def is_used(self) -> bool:
        has_rules = self.constrain_tools and bool(self.tools or self.tool_choice)
        return has_rules or self.thinking_budget is not None

    def check_unused(self) -> None:
        """Raises RequestError if something is asked of an answer that no chat format renders."""
        for name in ("tool_choice", "thinking_budget"):
            if getattr(self, name) is not None:
                raise RequestError(f"generate: {name} needs a prompt that the chat format renders")

    def guide(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_ids: Collection[int],
        start: Start,
        first_index: int,
        compiler: Callable[[], GrammarCompiler],
    ) -> Guide:
        """A guide for one answer; `compiler` is called if grammars are needed. Raises RequestError as Guide does."""
        rules = None
        if self.constrain_tools and (self.tools or self.tool_choice):
            rules = tool_rules(as_tools(self.tools), self.tool_choice, first_index)
        return Guide(
            tokenizer,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
            start=start,
            rules=rules,
            compiler=compiler() if rules is not None and rules.tools else None,
            thinking_budget=self.thinking_budget,
        )


UNGUIDED = Guiding()
