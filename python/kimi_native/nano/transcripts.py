"""Conversations as training data: the ids of the K2-Thinking prompt, and which of them the model is to predict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kimi_native.chat.template import render
from kimi_native.nano.conversations import Conversation, Recipe, make_conversation
from kimi_native.nano.dataset import Example
from kimi_native.nano.dice import Dice
from kimi_native.nano.problems import Split
from kimi_native.nano.texts import expects_wrong_digit
from kimi_native.tokenizer import Tokenizer

FORMAT = "k2-thinking"


@dataclass(frozen=True)
class TranscriptDataset:
    """Conversations made when asked for: number i from the seed, the split and i, so that nothing has to be kept.

    tokenizer  kimi-nano's, or any with the family's control tokens
    size       how many there are

    Raises ValueError on a negative size.
    """

    tokenizer: Tokenizer
    size: int
    seed: int = 0
    split: Split = "train"
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"dataset: size must not be negative (got {self.size})")

    def __len__(self) -> int:
        return self.size

    def conversation(self, index: int) -> Conversation:
        """The conversation that example `index` is made of. Raises IndexError outside 0 .. len - 1."""
        if not 0 <= index < self.size:
            raise IndexError(f"dataset: index must be in 0 .. {self.size - 1} (got {index})")
        dice = Dice("transcripts", self.split, self.seed, index)
        return make_conversation(dice, self.split, self.recipe)

    def example(self, index: int) -> Example:
        """Example number `index`. Raises IndexError outside 0 .. len - 1."""
        return encode(self.conversation(index), self.tokenizer)


def encode(conversation: Conversation, tokenizer: Tokenizer) -> Example:
    """The ids of a conversation; the assistant's messages from first_learned on carry loss, with their <|im_end|>.

    Their opening does not: it is the prompt's. Nor do the id of a call that nothing in the conversation tells, and a
    wrong digit that is there so that its consequences can be learned.
    """
    ids = render(
        conversation.messages,
        format=FORMAT,
        tokenizer=tokenizer,
        tools=conversation.tools,
        add_generation_prompt=False,
        keep_thinking="all",
    )
    loss = [False] * len(ids)
    control = tokenizer.control_ids
    answers = [(i, m) for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    number_is_open = conversation.number_is_open
    for (index, message), (start, stop) in zip(answers, answer_spans(ids, tokenizer), strict=True):
        if index < conversation.first_learned:
            continue
        loss[start:stop] = [True] * (stop - start)
        if expects_wrong_digit(message):
            loss[ids.index(control["</think>"], start) - 1] = False
        if number_is_open:
            number_is_open = False
            header = ids.index(control["<|tool_call_begin|>"], start) + 1
            end = ids.index(control["<|tool_call_argument_begin|>"], header)
            loss[header:end] = [False] * (end - header)
    if conversation.hidden:
        _hide(conversation, ids, loss, tokenizer)
    return Example(ids, loss)


def _hide(
    conversation: Conversation, ids: list[int], loss: list[bool], tokenizer: Tokenizer
) -> None:
    """Takes the loss off the ids that begin in a hidden span; the last message's reasoning, whose text is ASCII."""
    *_, (start, _) = answer_spans(ids, tokenizer)
    first = ids.index(tokenizer.control_ids["<think>"], start) + 1
    at, spans = 0, iter(conversation.hidden)
    low, high = next(spans)
    for index in range(first, ids.index(tokenizer.control_ids["</think>"], first)):
        while at >= high:
            low, high = next(spans, (len(ids) * 16, len(ids) * 16))  # none is left
        if low <= at:
            loss[index] = False
        at += len(tokenizer.decode_bytes([ids[index]]))


def answer_spans(ids: list[int], tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """(start, stop) of the assistant's words in each of its messages, the <|im_end|> after them included."""
    names = ("<|im_assistant|>", "<|im_middle|>", "<|im_end|>")
    assistant, middle, end = (tokenizer.control_ids[name] for name in names)
    stop = 0
    for _ in range(ids.count(assistant)):
        start = ids.index(middle, ids.index(assistant, stop)) + 1
        stop = ids.index(end, start) + 1
        yield start, stop
