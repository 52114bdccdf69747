"""One request from engine outputs to events, and to the Generation that is its result.

Nothing here computes: token by token, ids become text through the tokenizer's stream or the chat format's parser, and
stop strings cut the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kimi_native.chat.types import (
    ContentDelta,
    Event,
    Finish,
    ReasoningDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from kimi_native.engine import RequestReport, StepOutput
from kimi_native.errors import ConfigError, KimiNativeError, TokenizerError
from kimi_native.sampling import SampledToken, SamplingParams

if TYPE_CHECKING:
    from kimi_native.chat.parser import OutputParser
    from kimi_native.config import KimiConfig
    from kimi_native.guide import Guide
    from kimi_native.prefixes import KeptPrefix
    from kimi_native.tokenizer import Tokenizer


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one request; load_s is that of the model.

    prefill_s covers the prompt and the first token, decode_s the steps of all further tokens, shared with whatever else
    was in the batch. Rates are None where nothing was computed.
    """

    load_s: float
    waiting_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class Generation:
    """One finished request.

    text             the answer: without reasoning, tool calls, control tokens, and what a stop string cut off
    reasoning        what the model thought first; empty for formats without reasoning and for raw prompts
    tool_calls       calls the model asks for; nothing is ever run by this package
    ids, prompt_ids  all generated ids, end token included, and the ids of the prompt
    finish_reason    "stop", "tool_calls", "length" (max_tokens or end of the context), "canceled", "error"
    seed             the seed that was used: with it and the same parameters the result repeats
    logprobs         one SampledToken per id if SamplingParams.logprobs is set, else None
    unfinished_call  the output ended inside the last tool call
    error            why, for finish_reason "error"; only results of a list of prompts carry it, one prompt raises
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    ids: list[int]
    prompt_ids: list[int]
    finish_reason: str
    usage: Usage
    timing: Timing
    seed: int
    logprobs: list[SampledToken] | None = None
    unfinished_call: bool = False
    error: KimiNativeError | None = None


# ---- stop strings ---------------------------------------------------------------------------------------------------


class StopStrings:
    """Cuts a text that comes in pieces before the stop string that is complete first.

    An end of the text that may be the beginning of a stop string is held back. The outcome does not depend on where the
    pieces are cut; of two stop strings that end together, the longer counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string ended it."""
        text = self._held + text
        self._held = ""
        found = [(i + len(s), i) for s in self._stops if (i := text.find(s)) >= 0]
        if found:
            return text[: min(found)[1]], True
        certain = len(text) - self._possible(text)
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """What is held back: no stop string can complete any more."""
        held, self._held = self._held, ""
        return held

    def _possible(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for size in range(min(len(text), self._longest - 1), 0, -1):
            if any(s.startswith(text[-size:]) for s in self._stops):
                return size
        return 0


def end_ids(
    config: KimiConfig, generation_config: Mapping[str, Any], tokenizer: Tokenizer
) -> frozenset[int]:
    """Every id that ends a generation: config.json's, generation_config.json's, and the tokenizer's, which knows the
    names that end a turn or a text in all of the family.

    All of them, because published files disagree: several config.json name an id that a chat never produces.
    Raises ConfigError on an eos_token_id in generation_config.json that is no id or list of ids.
    """
    given = generation_config.get("eos_token_id")
    given = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in given):
        raise ConfigError(
            f"generation_config.json: eos_token_id must be an id or a list of ids (got {given!r})"
        )
    return frozenset((*config.eos_token_ids, *given, *tokenizer.eos_ids))


# ---- one request ----------------------------------------------------------------------------------------------------


class PlainOutput:
    """Output of a raw prompt: the decoded text, all of it content. Same use as OutputParser."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.stream(skip_control=True)

    def push(self, token_id: int) -> list[Event]:
        return self._content(self._decoder.push(token_id))

    def finish(self, reason: str, *, usage: Usage) -> list[Event]:
        return [*self._content(self._decoder.flush()), Finish(reason, usage)]

    def _content(self, text: str) -> list[Event]:
        return [ContentDelta(text)] if text else []


class Run:
    """One request on its way: outputs of the engine in, events out, a Generation at the end."""

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        output: OutputParser | PlainOutput,
        *,
        guide: Guide | None = None,
        prefix: KeptPrefix | None = None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.guide = guide
        self.prefix = prefix
        self.params = params
        self.inbox: deque[StepOutput] = deque()
        self.request_id: int | None = None
        self.report: RequestReport | None = None
        self.tokens: list[SampledToken] = []
        self.finish: Finish | None = None
        self.error: KimiNativeError | None = None
        self._output = output
        self._stops = StopStrings(params.stop)
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []

    @property
    def is_done(self) -> bool:
        return self.finish is not None or self.error is not None

    def take_inbox(self, eos_ids: frozenset[int]) -> list[Event]:
        """The events of everything the engine has produced for this request so far."""
        events: list[Event] = []
        while self.inbox and not self.is_done:
            for event in self._on_output(self.inbox.popleft(), eos_ids):
                self._record(event)
                events.append(event)
        return events

    def _on_output(self, output: StepOutput, eos_ids: frozenset[int]) -> list[Event]:
        if output.token is None:
            self.error = output.error
            return []
        self.tokens.append(output.token)
        pieces: list[Event] = []
        # An end token has no text, whether it ends this request or is ignored.
        if output.finish_reason != "stop" and output.token.id not in eos_ids:
            try:
                pieces = self._output.push(output.token.id)
            except TokenizerError as error:  # an id that the model has and the tokenizer lacks
                self.error = error
                return []
        events, stopped = self._cut(pieces)
        if stopped:
            return [*events, self._close("stop")[-1]]
        if output.finish_reason is None:
            return events
        *pieces, finish = self._close(output.finish_reason)
        tail, stopped = self._cut(pieces)
        if stopped:
            finish = replace(finish, reason="stop")
        elif held := self._stops.flush():
            tail.append(ContentDelta(held))
        return [*events, *tail, finish]

    def _close(self, reason: str) -> list[Event]:
        return self._output.finish(reason, usage=self._usage())

    def _usage(self) -> Usage:
        return Usage(len(self.prompt_ids), len(self.tokens), self.report.reused_tokens)

    def _cut(self, pieces: list[Event]) -> tuple[list[Event], bool]:
        """The events with the stop strings' work done on their content, and whether one was met.

        Reasoning and tool calls are left alone: cutting them would lose the answer, or leave half a call.
        """
        events: list[Event] = []
        for event in pieces:
            if isinstance(event, ContentDelta):
                text, stopped = self._stops.push(event.text)
                if text:
                    events.append(ContentDelta(text))
                if stopped:
                    return events, True
                continue
            if held := self._stops.flush():
                events.append(ContentDelta(held))
            events.append(event)
        return events, False

    def _record(self, event: Event) -> None:
        if isinstance(event, ContentDelta):
            self._text.append(event.text)
        elif isinstance(event, ReasoningDelta):
            self._reasoning.append(event.text)
        elif isinstance(event, ToolCallDelta):
            if event.index == len(self._calls):
                self._calls.append(ToolCall(event.id, event.name, event.arguments))
            else:
                call = self._calls[event.index]
                self._calls[event.index] = replace(call, arguments=call.arguments + event.arguments)
        else:
            self.finish = event

    def timing(self, load_s: float) -> Timing:
        """As far as the request has come."""
        report, usage = self.report, self._usage()
        return Timing(
            load_s=load_s,
            waiting_s=report.waiting_s,
            prefill_s=report.prefill_s,
            decode_s=report.decode_s,
            prefill_tokens_per_s=_rate(usage.prefilled_tokens, report.prefill_s),
            decode_tokens_per_s=_rate(len(self.tokens) - 1, report.decode_s),
        )

    def generation(self, load_s: float) -> Generation:
        return Generation(
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(self._calls),
            ids=[t.id for t in self.tokens],
            prompt_ids=self.prompt_ids,
            finish_reason=self._finish_reason(),
            usage=self._usage(),
            timing=self.timing(load_s),
            seed=self.report.seed,
            logprobs=None if self.params.logprobs is None else self.tokens,
            unfinished_call=self.finish is not None and self.finish.unfinished_call,
            error=self.error,
        )

    def _finish_reason(self) -> str:
        if self.finish is not None:
            return self.finish.reason
        return "canceled" if self.error is None else "error"


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None
