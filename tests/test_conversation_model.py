"""A loop of tool calls on a real network: its own arguments under the guide, and what the cache keeps meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import re
from typing import Literal

import pytest
import torch

import kimi_native as kn
from kimi_native.cache import LatentCache
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.plan import PARTIAL_BYTES
from kimi_native.prefixes import common_length

LOOP_CALLS = int(os.environ.get("KIMI_NATIVE_LOOP_CALLS", "12"))
MB = 1 << 20


def switch(device: Literal["fan", "lamp", "heater"], on: bool) -> str:
    """Turns a device on or off."""
    return f"{device} is {'on' if on else 'off'}"


class Directed:
    """The network of a model with a director: `direct` maps the ids of an answer so far to the id to say, or None for
    what the network itself says. One conversation at a time.

    prompts  the ids of every prompt; raw its logits at the end of it; computed the number of ids it was given; seen
    those it had been given before, of prompt and answer
    """

    def __init__(self, network, direct) -> None:
        self.config, self._network, self._direct = network.config, network, direct
        self.prompts, self.raw, self.computed, self.seen = [], [], [], []
        self.decode_equals_prefill = network.decode_equals_prefill
        self._ids: list[int] = []

    def prefill(self, ids, cache, seq):
        self.seen.append(list(self._ids))
        self._ids = [*self._ids[: seq.length], *ids.tolist()]
        self.prompts.append(list(self._ids))
        self.computed.append(ids.shape[0])
        self.raw.append(self._network.prefill(ids, cache, seq).clone())
        return self._directed(self.raw[-1])

    def prefill_batch(self, prompts, cache, seqs):
        (ids,), (seq,) = prompts, seqs
        return self.prefill(ids, cache, seq)[None]

    def decode(self, ids, cache, seqs):
        assert len(seqs) == 1
        self._ids += ids.tolist()
        return self._directed(self._network.decode(ids, cache, seqs)[0])[None]

    def _directed(self, logits):
        said = self._direct(self._ids[len(self.prompts[-1]) :], len(self.prompts) - 1)
        if said is not None:
            logits = logits.clone()
            logits[said] = 1e4
        return logits


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "k2"
    longest = 8192 if LOOP_CALLS <= 50 else 200 * LOOP_CALLS
    make_checkpoint(folder, layers=2, experts=8, overrides={"max_position_embeddings": longest})
    return kn.load(folder, max_context=longest, max_batch=1)


def test_loop_on_a_network_computes_what_is_new_and_drifts_nowhere(model, capsys):
    """KIMI_NATIVE_LOOP_CALLS calls (default 12) after one message; names, ids and arguments are the network's own."""
    encode = model.tokenizer.encode_with_control
    end_of_call = model.tokenizer.control_ids["<|tool_call_end|>"]

    def direct(said: list[int], turn: int) -> int | None:
        if turn == LOOP_CALLS:
            script = encode(f"<think>step {turn}</think>done<|im_end|>")
        elif end_of_call in said:
            end = encode("<|tool_calls_section_end|><|im_end|>")
            script = said[: said.index(end_of_call) + 1] + end
        else:
            script = encode(f"<think>step {turn}</think><|tool_calls_section_begin|>")
        return script[len(said)] if len(said) < len(script) else None

    network, resident = Directed(model._engine._model, direct), []
    model._engine._model = network
    called = []

    def tool(device: Literal["fan", "lamp", "heater"], on: bool) -> str:
        called.append((device, on))
        resident.append(resident_bytes())
        return switch(device, on)

    declared = kn.Tool(
        "switch", "Turns a device on or off.", kn.Tool.from_function(switch).parameters, tool
    )
    chat = model.chat(
        tools=[declared], run_tools=["switch"], max_tool_calls=LOOP_CALLS, max_tokens=400, seed=5
    )
    reply = chat.send("Work through the list.")
    assert (reply.text, reply.finish.reason) == ("done", "stop")

    calls = [call for message in chat.messages for call in message.tool_calls]
    assert [call.id for call in calls] == [f"functions.switch:{n}" for n in range(LOOP_CALLS)]
    arguments = [json.loads(call.arguments) for call in calls]
    assert [(a["device"], a["on"]) for a in arguments] == called
    assert all(a.keys() == {"device", "on"} for a in arguments)
    assert not [call for call in calls if re.search(r"\s", call.arguments)]
    assert len(set(called)) > 1  # the network's choice, not the test's
    thoughts = [m.reasoning_content for m in chat.messages if m.role == "assistant"]
    assert thoughts == [f"step {n}" for n in range(LOOP_CALLS + 1)]

    for before, after in itertools.pairwise(network.prompts):
        assert after[: len(before)] == before
    lengths = [len(prompt) for prompt in network.prompts]
    # Random weights write some arguments in other tokens than a prompt does.
    shared = [common_length(*pair) for pair in zip(network.seen, network.prompts, strict=True)]
    assert network.computed == [b - a for a, b in zip(shared, lengths, strict=True)]
    # Kept over all turns, decoded or not, or computed at once: the last prompt's logits have the same bits.
    cache = LatentCache(model.config, max_tokens=lengths[-1])
    fresh = network._network.prefill(torch.tensor(network.prompts[-1]), cache, cache.new_sequence())
    assert torch.equal(fresh, network.raw[-1])
    # Parts of attention's result, by chunks of the prompt, up to a bound that the memory plan counts.
    growth = resident[-1] - resident[len(resident) // 2]
    assert growth < PARTIAL_BYTES + 64 * MB
    with capsys.disabled():
        print(f" [{LOOP_CALLS} calls, last prompt {lengths[-1]} tokens, {max(network.computed[1:])} at most computed "
              f"in a turn, {growth / MB:.0f} MB more at the end than half-way]", end="")  # fmt: skip
