"""Token ids in, token ids out: many requests over one model and one paged cache.

One step is one forward pass: the prefill of the oldest waiting request if a place and enough pages are free, and of
those behind it that fit into the same pass; else one decode of everything that runs. A request is admitted only when
the pages for its prompt and all the tokens it may generate are free, and they are reserved at once: what has started
can never run out of memory. Order is first come, first served; a large request at the head waits for pages and is not
overtaken. Requests given the same KeptPrefix, one after the other, compute only what their prompts do not share; the
results are those of requests without it.

Text is not known here: stop strings, templates and parsing live in generate.py.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kimi_native.device_memory import memory_of
from kimi_native.device_sampling import Draw, sample_rows
from kimi_native.errors import KimiNativeError, RequestError
from kimi_native.prefixes import KeptPrefix, PrefixStore
from kimi_native.sampling import SampledToken, SamplingParams, TokenHistory

if TYPE_CHECKING:
    from kimi_native.cache import CachedSequence, LatentCache
    from kimi_native.config import KimiConfig
    from kimi_native.model import KimiModel

# Tokens a request may generate if it does not say: long enough for an answer, short enough that the pages reserved
# for it do not keep others waiting.
DEFAULT_MAX_TOKENS = 2048
BATCHED_PREFILL = (
    1024  # new tokens of prompts that are computed together; a longer one is computed alone
)


@dataclass
class RequestReport:
    """What a request cost. Seconds of wall clock; a step counts for every request that took part in it.

    reused_tokens  of the prompt, that were in the cache already
    """

    seed: int
    reused_tokens: int = 0
    waiting_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class StepOutput(NamedTuple):
    """One request's share of a step.

    token          the token chosen, or None when the step failed for this request
    finish_reason  None (goes on), "stop" (end token or stop_token_ids), "length", or "error"
    error          what failed, for "error"
    """

    request_id: int
    token: SampledToken | None
    finish_reason: str | None
    error: KimiNativeError | None = None


class Guide(Protocol):
    """What a request may generate next."""

    def allowed(self) -> np.ndarray | None:
        """[vocab_size] bool, True for at least one id; None: anything. A RequestError ends the request."""

    def push(self, token_id: int) -> None:
        """Takes the id that was chosen."""


def check_prompt(prompt_ids: Sequence[int], config: KimiConfig, max_context: int) -> None:
    """Raises RequestError for a prompt that is empty, too long, or holds an id outside the vocabulary."""
    if len(prompt_ids) == 0:
        raise RequestError("engine: prompt must hold at least one token (got none)")
    if len(prompt_ids) >= max_context:
        most = config.max_position_embeddings
        way_out = f"; max_context may be up to {most}" if most > len(prompt_ids) else ""
        raise RequestError(
            f"engine: prompt and at least one new token must fit the context of {max_context} tokens "
            f"(got a prompt of {len(prompt_ids)} tokens){way_out}"
        )
    if (
        set(map(type, prompt_ids)) == {int}
        and 0 <= min(prompt_ids) <= max(prompt_ids) < config.vocab_size
    ):
        return
    for position, i in enumerate(prompt_ids):
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < config.vocab_size:
            raise RequestError(
                f"engine: prompt ids must be integers from 0 to {config.vocab_size - 1} "
                f"(got {i!r} at position {position})"
            )


def _new_seed() -> int:
    """53 random bits: a JSON reader that keeps numbers as doubles can hand the seed back."""
    return secrets.randbits(53)


@dataclass(eq=False)
class _Request:
    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    limit: int  # tokens it may generate
    report: RequestReport
    added: float  # time.perf_counter()
    history: TokenHistory
    prefix: KeptPrefix | None
    guide: Guide | None
    seq: CachedSequence | None = None
    output_ids: list[int] = field(default_factory=list)

    @property
    def cached_tokens(self) -> int:
        """Cache entries it may need: the last token is never fed back."""
        return len(self.prompt_ids) + self.limit - 1


class Engine:
    """Runs requests over one model and one cache. Not thread-safe: one caller at a time.

    model          KimiModel: .config, .prefill_batch(prompts, cache, seqs), .decode(ids, cache, seqs),
                   .decode_equals_prefill
    cache          LatentCache used by nobody else
    max_batch      requests that run at once
    eos_ids        ids that end every request without ignore_eos
    max_context    prompt and output together; default and upper limit: what model and cache can hold
    check_weights  called after each forward pass; raises if its weights could not be read
    """

    def __init__(
        self,
        model: KimiModel,
        cache: LatentCache,
        *,
        max_batch: int,
        eos_ids: Collection[int],
        max_context: int | None = None,
        check_weights: Callable[[], None] = lambda: None,
    ) -> None:
        if max_batch < 1:
            raise RequestError(f"engine: max_batch must be at least 1 (got {max_batch})")
        limit = min(model.config.max_position_embeddings, cache.free_tokens)
        self.max_context = limit if max_context is None else min(max_context, limit)
        self.eos_ids = frozenset(eos_ids)
        self.max_batch = max_batch
        self._model = model
        self._cache = cache
        self._check_weights = check_weights
        self._ids = itertools.count()
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._prefixes = PrefixStore(cache)

    # ---- requests in and out ----------------------------------------------------------------------------------------

    def check(self, prompt_ids: Sequence[int]) -> None:
        """Raises RequestError as check_prompt."""
        check_prompt(prompt_ids, self._model.config, self.max_context)

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        prefix: KeptPrefix | None = None,
        guide: Guide | None = None,
    ) -> int:
        """Queues a request and returns its id. Raises RequestError as `check`, before any compute.

        prefix  start from the rows an earlier request left there, and leave those of this prompt
        guide   rules tokens out; used by this request alone
        """
        self.check(prompt_ids)
        room = self.max_context - len(prompt_ids)
        wanted = DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens
        request = _Request(
            request_id=next(self._ids),
            prompt_ids=list(prompt_ids),
            params=params,
            limit=min(wanted, room),
            report=RequestReport(_new_seed() if params.seed is None else params.seed),
            added=time.perf_counter(),
            history=TokenHistory(prompt_ids),
            prefix=prefix,
            guide=guide,
        )
        self._waiting.append(request)
        return request.request_id

    def cancel(self, request_id: int) -> bool:
        """Ends a request and frees its pages at once; False if it has already ended."""
        for request in (*self._waiting, *self._running):
            if request.request_id == request_id:
                self._end(request)
                return True
        return False

    def drop(self, prefix: KeptPrefix) -> None:
        """Frees the pages kept under a prefix; a request that runs with it is not disturbed."""
        self._prefixes.drop(prefix)

    def is_active(self, request_id: int) -> bool:
        """Whether the request waits or runs."""
        return any(r.request_id == request_id for r in (*self._waiting, *self._running))

    def report(self, request_id: int) -> RequestReport:
        """The report of a waiting or running request; the object goes on being updated. KeyError if it has ended."""
        for request in (*self._waiting, *self._running):
            if request.request_id == request_id:
                return request.report
        raise KeyError(request_id)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def _end(self, request: _Request, *, failed: bool = False) -> None:
        """Takes a request out of wherever it is; its pages are free afterwards, or kept for the next request."""
        if request in self._waiting:
            self._waiting.remove(request)
        if request in self._running:
            self._running.remove(request)
        seq, request.seq = request.seq, None
        if seq is None:
            return
        ids = request.prompt_ids
        if self._model.decode_equals_prefill:
            ids = ids + request.output_ids
        computed = ids[: seq.length]
        if request.prefix is not None and computed and not failed:
            self._prefixes.keep(request.prefix, computed, seq)
        else:
            self._cache.free(seq)

    # ---- one forward pass -------------------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """One forward pass; one StepOutput for every request that took part, in order of admission.

        A row of non-finite logits ends that request alone. Any other exception ends the requests of the failed pass,
        frees their pages, and is passed on; the others can go on with the next step.
        """
        if self._waiting and len(self._running) < self.max_batch:
            if batch := self._admit():
                return self._prefill(batch)
            if not self._running:
                raise RuntimeError(
                    f"engine: an idle cache must hold the next request's {self._waiting[0].cached_tokens} tokens "
                    f"(got {self._cache.free_tokens} free: someone else holds pages)"
                )
        return self._decode() if self._running else []

    def _admit(self) -> list[_Request]:
        """The waiting requests that the next pass computes, oldest first, their pages reserved."""
        batch: list[_Request] = []
        tokens, places = 0, self.max_batch - len(self._running)
        for request in itertools.islice(self._waiting, places):
            if not self._has_room(request):
                break
            tokens += len(request.prompt_ids) - request.seq.length
            if batch and tokens > BATCHED_PREFILL:
                break
            self._cache.reserve(request.seq, request.cached_tokens - request.seq.length)
            batch.append(request)
            if not self._model.decode_equals_prefill:
                break  # a GPU's prefill takes one sequence
        return batch

    def _has_room(self, request: _Request) -> bool:
        """Gives a waiting request the rows kept for it, and says whether the pages it still needs are free."""
        if request.seq is None:
            request.seq = self._prefixes.take(request.prefix, request.prompt_ids)
            request.report.reused_tokens = request.seq.length
        held = len(request.seq.pages) * self._cache.page_size
        return self._prefixes.make_room(request.cached_tokens - held)

    def _prefill(self, batch: list[_Request]) -> list[StepOutput]:
        started = time.perf_counter()
        with contextlib.ExitStack() as undo:
            for request in batch:
                request.report.waiting_s = started - request.added
                undo.callback(self._end, request, failed=True)
            prompts = [torch.tensor(r.prompt_ids[r.seq.length :], dtype=torch.int64) for r in batch]
            with self._memory("prefill", f"{sum(map(len, prompts))} tokens"):
                logits = self._model.prefill_batch(prompts, self._cache, [r.seq for r in batch])
            self._check_weights()
            for request in batch:
                self._waiting.remove(request)
                self._running.append(request)
            outputs = self._choose(batch, logits)
            undo.pop_all()
        elapsed = time.perf_counter() - started
        for request in batch:
            request.report.prefill_s = elapsed
        return outputs

    def _decode(self) -> list[StepOutput]:
        started = time.perf_counter()
        batch = list(self._running)
        with contextlib.ExitStack() as undo:
            for request in batch:
                undo.callback(self._end, request, failed=True)
            ids = torch.tensor([r.output_ids[-1] for r in batch], dtype=torch.int64)
            with self._memory("decode", f"{len(batch)} sequences"):
                logits = self._model.decode(ids, self._cache, [r.seq for r in batch])
            self._check_weights()
            outputs = self._choose(batch, logits)
            undo.pop_all()
        elapsed = time.perf_counter() - started
        for request in batch:
            request.report.decode_s += elapsed
        return outputs

    def _memory(self, step: str, got: str) -> contextlib.AbstractContextManager[None]:
        return memory_of(step, "what it computes", self._cache.device, got)

    def _choose(self, batch: list[_Request], logits: Tensor) -> list[StepOutput]:
        """Samples a row for each request and ends those whose last token it was."""
        chosen: dict[int, SampledToken | KimiNativeError] = {}
        draws: dict[int, Draw] = {}
        for row, request in enumerate(batch):
            try:
                draws[row] = self._draw(request)
            except RequestError as error:
                chosen[row] = error
        chosen |= sample_rows(logits, draws)
        return [self._accept(request, chosen[row]) for row, request in enumerate(batch)]

    def _draw(self, request: _Request) -> Draw:
        position = len(request.prompt_ids) + len(request.output_ids)
        allowed = None if request.guide is None else request.guide.allowed()
        return Draw(request.params, request.report.seed, position, request.history, allowed)

    def _accept(self, request: _Request, token: SampledToken | KimiNativeError) -> StepOutput:
        if isinstance(token, KimiNativeError):
            self._end(request, failed=True)
            return StepOutput(request.request_id, None, "error", token)
        request.output_ids.append(token.id)
        request.history.append(token.id)
        if request.guide is not None:
            request.guide.push(token.id)
        reason = self._finish_reason(request, token.id)
        if reason is not None:
            self._end(request)
        return StepOutput(request.request_id, token, reason)

    def _finish_reason(self, request: _Request, token_id: int) -> str | None:
        if token_id in request.params.stop_token_ids:
            return "stop"
        if token_id in self.eos_ids and not request.params.ignore_eos:
            return "stop"
        return "length" if len(request.output_ids) >= request.limit else None
