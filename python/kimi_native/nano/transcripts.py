"""Conversations as training data: the ids of the K2-Thinking prompt, and which of them the model is to predict."""

from __future__ import annotations

from dataclasses import dataclass, field

from kimi_native.chat.template import render
from kimi_native.nano.conversations import Conversation, Recipe, make_conversation
from kimi_native.nano.dataset import Example
from kimi_native.nano.dice import Dice
from kimi_native.nano.problems import Split
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

    Their opening does not: it is the prompt's. Nor does a call's id that nothing in the conversation tells.
    """
    ids = render(
        conversation.messages,
        format=FORMAT,
        tokenizer=tokenizer,
        tools=conversation.tools,
        add_generation_prompt=False,
        keep_thinking="all",
    )
    before = conversation.messages[: conversation.first_learned]
    num_skipped = sum(message.role == "assistant" for message in before)
    loss = answer_mask(ids, tokenizer, num_skipped)
    if conversation.number_is_open:
        _hide_first_header(ids, loss, tokenizer)
    return Example(ids, loss)


def answer_mask(ids: list[int], tokenizer: Tokenizer, num_skipped: int = 0) -> list[bool]:
    """Which ids are an assistant's words or the <|im_end|> after them, but for its first num_skipped messages."""
    control = tokenizer.control_ids
    assistant, middle, end = (
        control[name] for name in ("<|im_assistant|>", "<|im_middle|>", "<|im_end|>")
    )
    mask = [False] * len(ids)
    position = 0
    while True:
        try:
            position = ids.index(middle, ids.index(assistant, position)) + 1
            stop = ids.index(end, position) + 1
        except ValueError:
            return mask
        if num_skipped:
            num_skipped -= 1
        else:
            mask[position:stop] = [True] * (stop - position)
        position = stop


def _hide_first_header(ids: list[int], loss: list[bool], tokenizer: Tokenizer) -> None:
    """Takes the loss off the id of the first call that carries any."""
    begin = tokenizer.control_ids["<|tool_call_begin|>"]
    arguments = tokenizer.control_ids["<|tool_call_argument_begin|>"]
    start = next((i for i, token in enumerate(ids) if token == begin and loss[i]), None)
    if start is not None:
        for i in range(start + 1, ids.index(arguments, start)):
            loss[i] = False
