"""What training eats: token ids, and for each of them whether the model is to predict it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Example:
    """One conversation.

    ids   the whole conversation, prompt and answers
    loss  as long as ids; loss[i]: token i is to be predicted, from ids[:i]. Only what the assistant says, its
          <|im_end|> included
    """

    ids: list[int]
    loss: list[bool]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.loss):
            raise ValueError(
                f"example: ids and loss must have the same length (got {len(self.ids)} and {len(self.loss)})"
            )
        if self.loss and self.loss[0]:
            raise ValueError("example: the first token has nothing to be predicted from (got loss)")


class Dataset(Protocol):
    """A sequence of examples, each made anew when asked for."""

    def __len__(self) -> int: ...

    def example(self, index: int) -> Example:
        """The same example for the same index, on any machine. Raises IndexError outside 0 .. len - 1."""
        ...
