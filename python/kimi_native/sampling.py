"""From one row of logits to one token: parameters, penalties, filters, and a draw that depends on nothing else.

The draw is an inverse CDF over the surviving tokens in id order, with one uniform double from a counter-based
generator (Philox, keyed by the seed, counted by the sequence position). So the same seed gives the same tokens
whatever else is in the batch and whatever the process did before, and a filter that removes nothing changes nothing.

Order, as vLLM: repetition, frequency and presence penalty; what is not allowed; temperature; min_p; top_k; top_p. Sums
are float64 in a fixed order (numpy, one thread); ties go to the lowest id.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_native.errors import ConfigError, NonFiniteLogitsError, RequestError

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # characters of one stop string: text that long is held back while streaming
MAX_LOGPROBS = 20  # alternatives per token, as common servers allow
MAX_TOKEN_ID = 2**31 - 1
_REPETITION_PENALTY = (
    1e-3,
    10,
)  # far above where a float32 logit divided by it would be no double any more
_BINS = 4096  # of the top_p histogram
_MAX_SORTED = 2048  # tokens that top_p sorts at once; beyond it the histogram is quicker

# generation_config.json fields that mean the same here; the file's max_length is the context, which the engine knows.
GENERATION_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def _fail(name: str, must: str, value: object) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise RequestError(f"sampling: {name} must be {must} (got {shown})")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """A finite real number in [low, high], or (low, high]; bool is not a number here."""
    must = (
        f"a number {'above' if open_low else 'from'} {low:g} {'up ' if open_low else ''}to {high:g}"
    )
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        _fail(name, must, value)
    # NaN fails the comparison; an int beyond float range is compared as an int.
    if not low <= value <= high or (open_low and value == low):
        _fail(name, must, value)
    return float(value)


def _integer(name: str, value: object, low: int, high: int, meaning: str = "") -> int:
    must = f"an integer from {low} to {high}{meaning}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        _fail(name, must, value)
    if not low <= value <= high:
        _fail(name, must, value)
    return int(value)


def _stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) for s in stops):
        _fail("stop", "a string or a list of strings", value)
    if len(stops) > MAX_STOPS:
        _fail("stop", f"at most {MAX_STOPS} strings", f"{len(stops)} strings")
    for s in stops:
        if not 1 <= len(s) <= MAX_STOP_LENGTH:
            _fail("stop", f"strings of 1 to {MAX_STOP_LENGTH} characters", s)
    return tuple(stops)


def _stop_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple, set, frozenset)):
        _fail("stop_token_ids", "a list of token ids", value)
    if len(value) > MAX_STOPS:
        _fail("stop_token_ids", f"at most {MAX_STOPS} ids", f"{len(value)} ids")
    return tuple(_integer("stop_token_ids", i, 0, MAX_TOKEN_ID) for i in value)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Names as in vLLM where the meaning is equal; values are checked.

    temperature         0 to 100; 0 takes the most likely token
    top_p               (0, 1]; keep the smallest set of likeliest tokens whose probability reaches it
    top_k               0 (off) or the number of likeliest tokens to keep
    min_p               [0, 1]; keep tokens at least this times as likely as the likeliest
    presence_penalty    [-2, 2]; subtracted from the logit of every token already generated
    frequency_penalty   [-2, 2]; the same, times the number of times it was generated
    repetition_penalty  [0.001, 10]; logits of tokens in prompt or output are divided by it (multiplied if negative)
    max_tokens          None: up to engine.DEFAULT_MAX_TOKENS. Always limited by the end of the context
    stop                string or up to 16 strings that end the answer and are cut off; kept as a tuple
    stop_token_ids      up to 16 ids that end the output, besides the checkpoint's own
    seed                0 to 2**64 - 1; None draws one, which the result reports
    logprobs            None, or the number of alternatives (0 to 20) reported besides the chosen token's logprob
    ignore_eos          go on past the checkpoint's own end tokens

    Raises RequestError naming the field and its value.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    stop: str | list[str] | tuple[str, ...] = ()
    stop_token_ids: list[int] | tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checked = {
            "temperature": _number("temperature", self.temperature, 0, 100),
            "top_p": _number("top_p", self.top_p, 0, 1, open_low=True),
            "top_k": _integer("top_k", self.top_k, 0, MAX_TOKEN_ID, " (0: off)"),
            "min_p": _number("min_p", self.min_p, 0, 1),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, -2, 2),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty, -2, 2),
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, *_REPETITION_PENALTY
            ),
            "stop": _stops(self.stop),
            "stop_token_ids": _stop_ids(self.stop_token_ids),
        }
        optional = {
            "max_tokens": (1, MAX_TOKEN_ID),
            "seed": (0, 2**64 - 1),
            "logprobs": (0, MAX_LOGPROBS),
        }
        for name, (low, high) in optional.items():
            if (value := getattr(self, name)) is not None:
                checked[name] = _integer(name, value, low, high, ", or None")
        if not isinstance(self.ignore_eos, bool):
            _fail("ignore_eos", "True or False", self.ignore_eos)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_generation_config(
        cls,
        generation_config: Mapping[str, Any],
        source: str = "generation_config.json",
        /,
        **overrides: Any,
    ) -> SamplingParams:
        """Defaults from a checkpoint's generation_config.json, then `overrides`; errors name the file as `source`.

        Only the fields that the file holds are taken; `do_sample: false` means temperature 0; null means absent.

        Raises RequestError on an unknown or bad override, ConfigError on a bad value in the file.
        """
        check_names(overrides)
        fields = {
            ours: generation_config[theirs]
            for theirs, ours in GENERATION_FIELDS.items()
            if generation_config.get(theirs) is not None
        }
        do_sample = generation_config.get("do_sample")
        if do_sample is not None and not isinstance(do_sample, bool):
            raise ConfigError(f"{source}: do_sample must be true or false (got {do_sample!r})")
        if do_sample is False:
            fields["temperature"] = 0.0
        try:
            defaults = cls(**{k: v for k, v in fields.items() if k not in overrides})
        except RequestError as error:
            what = str(error).removeprefix("sampling: ")
            raise ConfigError(f"{source}: {what}") from error
        return dataclasses.replace(defaults, **overrides)

    def replace(self, **overrides: Any) -> SamplingParams:
        """A copy with some fields changed. Raises RequestError on an unknown or bad one."""
        check_names(overrides)
        return dataclasses.replace(self, **overrides)


def check_names(arguments: Iterable[str]) -> None:
    """Raises RequestError for a name that is no field of SamplingParams, with the nearest one that is."""
    valid = [f.name for f in dataclasses.fields(SamplingParams)]
    for name in arguments:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]
            raise RequestError(
                f"sampling: unknown argument {name!r}, did you mean {near!r}? (valid: {', '.join(valid)})"
            )


# ---- one token ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampledToken:
    """A chosen token. The logprobs are those of the raw logits, before penalties and temperature.

    id            token id
    logprob       natural logarithm of its probability, or None if SamplingParams.logprobs is None
    top_logprobs  (id, logprob) of the likeliest tokens, best first, or None likewise
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


class TokenHistory:
    """What the penalties look at: the ids of the prompt and how often each id was generated."""

    def __init__(self, prompt_ids: Iterable[int] = (), output_ids: Iterable[int] = ()) -> None:
        self.prompt = np.unique(np.fromiter(prompt_ids, dtype=np.int64))
        self.counts: dict[int, int] = {}
        for i in output_ids:
            self.append(i)

    def append(self, token_id: int) -> None:
        """Counts one generated token."""
        self.counts[token_id] = self.counts.get(token_id, 0) + 1


def sample(
    logits: Tensor,
    params: SamplingParams,
    *,
    seed: int,
    position: int,
    history: TokenHistory | None = None,
    allowed: np.ndarray | None = None,
) -> SampledToken:
    """Chooses one token.

    logits    [vocab]  float32 on the CPU, all finite; not changed
    seed      key of the random draw (params.seed is not read: the caller has settled it)
    position  index in the sequence, prompt included, of the token to choose: the counter of the random draw
    history   prompt and output so far; needed for the penalties only
    allowed   [vocab] bool: the tokens to choose from, at least one; the logprobs stay those of all

    Raises NonFiniteLogitsError naming the position, ValueError on a shape, TypeError on a dtype.
    """
    if logits.dtype != torch.float32:
        raise TypeError(f"sample: logits must be torch.float32 (got {logits.dtype})")
    if logits.dim() != 1 or logits.shape[0] == 0:
        raise ValueError(f"sample: logits must be [vocab] (got {list(logits.shape)})")
    raw = logits.detach().numpy()
    if not np.isfinite(raw).all():
        bad_nan, bad_inf = int(np.isnan(raw).sum()), int(np.isinf(raw).sum())
        raise NonFiniteLogitsError(
            f"sample: logits must be finite (got {bad_nan} NaN and {bad_inf} infinite of {raw.size} "
            f"at position {position})"
        )
    scores = _penalized(raw, params, history)
    if allowed is not None:
        check_allowed(allowed, raw.size)
        scores = np.where(allowed, scores, -np.inf)
    if params.temperature == 0:
        chosen = int(np.argmax(scores))
    else:
        chosen = _draw(*_surviving(scores, params), uniform(seed, position))
    return SampledToken(chosen, *_logprobs(raw, chosen, params.logprobs))


def check_allowed(allowed: np.ndarray, vocab: int) -> None:
    """Raises ValueError unless `allowed` is [vocab] and True for at least one token."""
    if allowed.shape != (vocab,) or not allowed.any():
        raise ValueError(
            f"sample: allowed must be True for at least one of {vocab} tokens "
            f"(got {int(allowed.sum())} of {allowed.size})"
        )


def uniform(seed: int, position: int) -> float:
    """One double in [0, 1): the upper 53 bits of the first word of Philox block (seed, position)."""
    raw = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (raw >> 11) * 2.0**-53


def has_penalty(params: SamplingParams, history: TokenHistory | None) -> bool:
    """Whether `sample` would change scores for what was said before."""
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    return history is not None and penalties != (0, 0, 1)


def _penalized(raw: np.ndarray, params: SamplingParams, history: TokenHistory | None) -> np.ndarray:
    """`raw` itself if no penalty applies, else a float64 copy with the penalties of vLLM's order."""
    if not has_penalty(params, history):
        return raw
    counted = params.presence_penalty != 0 or params.frequency_penalty != 0
    scores = raw.astype(np.float64)
    ids = np.fromiter(history.counts, dtype=np.int64)
    if params.repetition_penalty != 1:
        seen = np.union1d(history.prompt, ids)
        x = scores[seen]
        penalty = params.repetition_penalty
        scores[seen] = np.where(x > 0, x / penalty, x * penalty)
    if counted and ids.size:
        counts = np.fromiter(history.counts.values(), dtype=np.float64)
        scores[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return scores


def _surviving(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray | None]:
    """Unnormalised probabilities (float64, largest 1) of the tokens left by the filters, and their ids, ascending.

    ids is None when every token is left.
    """
    # Dividing the distance from the maximum cannot overflow upwards; -inf at a tiny temperature is a weight of 0.
    weights = scores.astype(np.float64)
    weights -= weights.max()
    with np.errstate(over="ignore", under="ignore"):
        weights /= params.temperature
        np.exp(weights, out=weights)
    vocab = weights.size
    ids = None
    if params.min_p > 0:
        ids = np.flatnonzero(weights >= params.min_p)
    if 0 < params.top_k < (vocab if ids is None else ids.size):
        ids = _top_k(scores, params.top_k, ids)
    if params.top_p < 1:
        ids = _top_p(scores, weights, params, ids)
    return (weights, None) if ids is None else (weights[ids], ids)


def _best(scores: np.ndarray, k: int, ids: np.ndarray | None) -> np.ndarray:
    """Ids of the k highest scores and of all that equal the lowest of them, best first, ties to the lowest id.

    The selection finds a threshold value only, so which of several equal scores it met does not matter.
    """
    pool = scores if ids is None else scores[ids]
    if k < pool.size:
        threshold = torch.from_numpy(pool).topk(k, sorted=False).values.min().item()
        inside = np.flatnonzero(pool >= threshold)
    else:
        inside = np.arange(pool.size)
    order = inside[np.argsort(-pool[inside], kind="stable")]
    return order if ids is None else ids[order]


def _top_k(scores: np.ndarray, k: int, ids: np.ndarray | None) -> np.ndarray:
    return np.sort(_best(scores, k, ids)[:k])


def _top_p(
    scores: np.ndarray, weights: np.ndarray, params: SamplingParams, ids: np.ndarray | None
) -> np.ndarray:
    """Keeps a token while the probability of the better ones is below top_p.

    Probability is counted in steps of about 2**-53 times the number of tokens, of the best one: their sums are exact,
    hence the same in any order, and neither shortcut can differ from a full sort.
    """
    pool = scores if ids is None else scores[ids]
    counts = (weights if ids is None else weights[ids]) * 2.0 ** (53 - pool.size.bit_length())
    np.rint(counts, out=counts)
    bound = params.top_p * counts.sum()
    kept = _kept_of_few(pool, counts, bound)
    if kept is None:
        kept = _kept_of_many(pool, counts, bound, params.temperature)
    return kept if ids is None else ids[kept]


def _kept_of_few(pool: np.ndarray, counts: np.ndarray, bound: float) -> np.ndarray | None:
    """The usual case: sorts only the tokens that weigh enough; None if they are too many."""
    # All tokens at or below this weight together are within what the bound leaves over.
    heavy = counts > (counts.sum() - bound) / counts.size
    if not 0 < np.count_nonzero(heavy) <= _MAX_SORTED:
        return None
    best = np.flatnonzero(pool >= pool[heavy].min())  # the best of all in order, ties included
    order = best[np.argsort(-pool[best], kind="stable")]
    reached = np.cumsum(counts[order])
    if reached[-1] < bound:  # the limit of `heavy` was rounded
        return None
    return np.sort(order[: 1 + int(np.searchsorted(reached, bound, side="left"))])


def _kept_of_many(
    pool: np.ndarray, counts: np.ndarray, bound: float, temperature: float
) -> np.ndarray:
    """A histogram over the distance from the best score finds the bin in which the bound is reached; only that bin is
    sorted. Equal scores share a bin."""
    gap = pool.max().astype(np.float64) - pool
    # Weights past 64 nats count as 0: the last bin may as well hold them all.
    widest = min(float(gap.max()), 64 * temperature)
    if widest > 0:
        gap /= widest
        gap *= _BINS
        np.minimum(gap, _BINS - 1, out=gap)
    bins = gap.astype(np.int64)
    reached = np.cumsum(np.bincount(bins, weights=counts, minlength=_BINS))
    crossing = int(np.searchsorted(reached, bound, side="left"))
    inside = np.flatnonzero(bins == crossing)
    order = inside[np.argsort(-pool[inside], kind="stable")]
    before = reached[crossing - 1] if crossing else 0.0
    kept = 1 + int(np.searchsorted(before + np.cumsum(counts[order]), bound, side="left"))
    keep = bins < crossing
    keep[order[:kept]] = True
    return np.flatnonzero(keep)


def _draw(weights: np.ndarray, ids: np.ndarray | None, u: float) -> int:
    """Inverse CDF: the first token whose cumulative weight exceeds u times the total."""
    cdf = np.cumsum(weights)
    index = int(np.searchsorted(cdf, u * cdf[-1], side="right"))
    if index == cdf.size:  # u * total was rounded up to the total
        index = int(np.searchsorted(cdf, cdf[-1], side="left"))
    return index if ids is None else int(ids[index])


def _logprobs(
    raw: np.ndarray, chosen: int, count: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...] | None]:
    if count is None:
        return None, None
    wide = raw.astype(np.float64)
    wide -= wide.max()  # first, so that huge logits keep their differences
    log_sum = math.log(float(np.exp(wide).sum()))
    top = _best(raw, count, None)[:count] if count else ()
    return float(wide[chosen]) - log_sum, tuple((int(i), float(wide[i]) - log_sum) for i in top)
