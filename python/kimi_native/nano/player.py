"""A model as one who plays episodes: what evaluate.py asks for its next messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kimi_native.chat.types import Message
from kimi_native.errors import RequestError
from kimi_native.nano.episode import Episode
from kimi_native.nano.evaluate import AnswerAll
from kimi_native.prefixes import KeptPrefix


class Model(Protocol):
    """What kimi_native.load gives, as far as it is needed here."""

    def generate(self, prompt: Any, **options: Any) -> Any: ...

    def prompt_ids(self, prompt: Any, **options: Any) -> list[int]: ...

    def forget(self, prefix: KeptPrefix) -> None: ...


def played_by(model: Model, *, max_tokens: int = 4096, **options: Any) -> AnswerAll:
    """A model as one who answers many conversations at once: as a batch, greedily unless `options` say otherwise.

    max_tokens  of one message; a plan of n steps takes about 40 n

    Each conversation keeps its rows in the model's cache while it goes on, as far as there is room: a message costs
    what is new, not the conversation. Who goes on until the context is full has not answered: the message is empty.
    What model.generate raises otherwise, evaluate_all raises.
    """
    options = {"temperature": 0.0, "max_tokens": max_tokens, **options}
    kept: dict[int, tuple[Episode, KeptPrefix]] = {}  # the episode too, so that no other has its id

    def answer_all(episodes: Sequence[Episode]) -> list[Message]:
        going_on = {id(episode) for episode in episodes}
        for key in kept.keys() - going_on:
            model.forget(kept.pop(key)[1])
        try:
            return ask(episodes)
        except RequestError:
            fitting = [episode for episode in episodes if _fits(model, episode)]
            if len(fitting) == len(episodes):
                raise
        answered = dict(zip(map(id, fitting), ask(fitting) if fitting else (), strict=True))
        return [answered.get(id(episode), Message("assistant", "")) for episode in episodes]

    def ask(episodes: Sequence[Episode]) -> list[Message]:
        prefixes = [kept.setdefault(id(e), (e, KeptPrefix()))[1] for e in episodes]
        answers = model.generate(
            [list(episode.messages) for episode in episodes],
            tools=list(episodes[0].tools) or None,
            prefixes=prefixes,
            **options,
        )
        return [
            Message("assistant", a.text or None, a.reasoning or None, a.tool_calls) for a in answers
        ]

    return answer_all


def _fits(model: Model, episode: Episode) -> bool:
    """Whether the conversation leaves room for an answer."""
    try:
        model.prompt_ids(list(episode.messages), tools=list(episode.tools) or None)
    except RequestError:
        return False
    return True
