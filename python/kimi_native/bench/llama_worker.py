"""A GGUF file in llama.cpp, as a process that measures what it is asked: one JSON object a line, in and out.

{"prefill": tokens} or {"depth": tokens, "steps": tokens} gives {"seconds": [...]}; the first line out says that it is
ready, or {"missing": why}. The end of the input ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np


class Llama:
    """One sequence; prefill_seconds and decode_seconds measure what those of e2e.LoadedModel do."""

    def __init__(self, api: Any, gguf: str, threads: int, max_context: int) -> None:
        self._api = api
        self._silence = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._silence, None)
        api.llama_backend_init()
        model = api.llama_model_load_from_file(gguf.encode(), api.llama_model_default_params())
        if not model:
            raise SystemExit(f"{gguf}: llama.cpp must be able to load it (it refused)")
        settings = api.llama_context_default_params()
        settings.n_ctx = max_context
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(model, settings)
        if not self._context:
            raise SystemExit(f"{gguf}: llama.cpp must make a context of {max_context} tokens")
        self._memory = api.llama_get_memory(self._context)
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_n_batch(self._context)
        self._random = np.random.default_rng(0)
        self._cached = 0

    def prefill_seconds(self, tokens: int) -> float:
        self._keep(0)
        return self._pass(tokens)

    def decode_seconds(self, depth: int, steps: int) -> list[float]:
        if self._cached < depth:
            self._keep(0)
            self._pass(depth)
        self._keep(depth)
        return [self._pass(1) for _ in range(steps + 2)][2:]

    def _keep(self, tokens: int) -> None:
        self._api.llama_memory_seq_rm(self._memory, 0, tokens, -1)
        self._cached = min(self._cached, tokens)

    def _pass(self, tokens: int) -> float:
        """Appends random ids and chooses the likeliest next one."""
        ids = self._random.integers(0, self._vocab, tokens).tolist()
        started = time.perf_counter()
        for first in range(0, tokens, self._batch):
            part = ids[first : first + self._batch]
            array = (self._api.llama_token * len(part))(*part)
            batch = self._api.llama_batch_get_one(array, len(part))
            if code := self._api.llama_decode(self._context, batch):
                raise SystemExit(f"llama_decode of {len(part)} tokens must return 0 (got {code})")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax()
        self._cached += tokens
        return time.perf_counter() - started


def main(gguf: str, threads: str, max_context: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        import llama_cpp
    except ImportError as error:
        say({"missing": str(error)})
        return
    llama = Llama(llama_cpp, gguf, int(threads), int(max_context))
    say({"ready": llama_cpp.__version__})
    for line in sys.stdin:
        question = json.loads(line)
        if "prefill" in question:
            say({"seconds": [llama.prefill_seconds(question["prefill"])]})
        else:
            say({"seconds": llama.decode_seconds(question["depth"], question["steps"])})


if __name__ == "__main__":
    main(*sys.argv[1:])
