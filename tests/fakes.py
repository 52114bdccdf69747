"""A model and a cache small enough to reason about, with the interfaces of the real ones."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import torch

from kimi_native.errors import RequestError

VOCAB = 300
CACHE_TOKENS = 4096  # of make_fake_model
EOS = 256


class FakeSequence:
    def __init__(self) -> None:
        self.length = 0
        self.pages: list[int] = []


class FakeCache:
    """Pages of token ids, so that a page handed out twice or freed too early changes what the model reads."""

    device = torch.device("cpu")

    def __init__(self, *, max_tokens: int, page_size: int = 4) -> None:
        self.page_size = page_size
        self.storage = torch.full((-(-max_tokens // page_size), page_size), -1, dtype=torch.int64)
        self.free_pages = list(range(self.storage.shape[0]))
        self.sequences: set[FakeSequence] = set()

    @property
    def free_tokens(self) -> int:
        return len(self.free_pages) * self.page_size

    def new_sequence(self) -> FakeSequence:
        seq = FakeSequence()
        self.sequences.add(seq)
        return seq

    def reserve(self, seq: FakeSequence, tokens: int) -> None:
        while len(seq.pages) * self.page_size < seq.length + tokens:
            if not self.free_pages:
                raise RequestError("cache: out of pages")
            seq.pages.append(self.free_pages.pop())

    def free(self, seq: FakeSequence) -> None:
        self.sequences.remove(seq)  # KeyError when freed twice
        self.storage[seq.pages] = -1
        self.free_pages += seq.pages
        seq.pages = []

    def truncate(self, seq: FakeSequence, length: int) -> None:
        seq.length = min(seq.length, length)
        kept = -(-seq.length // self.page_size)
        self.storage[seq.pages[kept:]] = -1
        self.free_pages += seq.pages[kept:]
        seq.pages = seq.pages[:kept]

    def append(self, seq: FakeSequence, ids: list[int]) -> None:
        for i in ids:
            assert seq.length < len(seq.pages) * self.page_size, "an unreserved token was appended"
            page, slot = divmod(seq.length, self.page_size)
            self.storage[seq.pages[page], slot] = i
            seq.length += 1

    def read(self, seq: FakeSequence) -> list[int]:
        return self.storage[seq.pages].flatten()[: seq.length].tolist()


class FakeModel:
    """Logits are a function of the whole sequence as the cache holds it.

    script  maps a sequence to the id that gets a dominating logit, or None
    spoil   maps a sequence to True when its logits shall be NaN
    fail    maps ("prefill" | "decode", call number) to an exception to raise
    decode_equals_prefill  as of KimiModel; True here too, but the engine must not rely on it where it is not said
    """

    def __init__(
        self,
        *,
        context: int = 64,
        vocab_size: int = VOCAB,
        script=None,
        spoil=None,
        fail=None,
        decode_equals_prefill: bool = True,
    ) -> None:
        self.decode_equals_prefill = decode_equals_prefill
        self.config = SimpleNamespace(
            model_type="fake",
            vocab_size=vocab_size,
            max_position_embeddings=context,
            eos_token_ids=(),
        )
        self.script = script or (lambda ids: None)
        self.spoil = spoil or (lambda ids: False)
        self.fail = fail or {}
        self.prefills: list[int] = []  # prompt length of every call
        self.passes: list[int] = []  # prompts of every call of prefill_batch
        self.batches: list[int] = []  # rows of every decode

    def logits(self, ids: list[int]) -> torch.Tensor:
        if (scripted := self.script(ids)) is not None:
            row = torch.zeros(self.config.vocab_size)
            row[scripted] = 1e4
        else:
            seed = zlib.crc32(bytes(str(ids), "ascii"))
            generator = torch.Generator().manual_seed(seed)
            row = 2 * torch.randn(self.config.vocab_size, generator=generator)
        return row.fill_(torch.nan) if self.spoil(ids) else row

    def _count(self, kind: str, calls: list[int], size: int) -> None:
        calls.append(size)
        if (error := self.fail.get((kind, len(calls)))) is not None:
            raise error

    def prefill(self, ids, cache, seq) -> torch.Tensor:
        assert ids.dtype == torch.int64
        assert ids.dim() == 1
        self._count("prefill", self.prefills, ids.shape[0])
        cache.append(seq, ids.tolist())
        return self.logits(cache.read(seq))

    def prefill_batch(self, prompts, cache, seqs) -> torch.Tensor:
        self.passes.append(len(seqs))
        pairs = zip(prompts, seqs, strict=True)
        return torch.stack([self.prefill(ids, cache, seq) for ids, seq in pairs])

    def decode(self, ids, cache, seqs) -> torch.Tensor:
        assert ids.dtype == torch.int64
        assert ids.shape == (len(seqs),)
        for i, seq in zip(ids.tolist(), seqs, strict=True):
            cache.append(seq, [i])
        self._count("decode", self.batches, len(seqs))
        return torch.stack([self.logits(cache.read(seq)) for seq in seqs])


def make_fake_model(
    tokenizer, answer=None, *, chat_format="moonlight", context=512, max_batch=8, **options
):
    """A generate.Model over fakes, with its network and cache.

    answer  function of the prompt's ids to what the network says: ids, or text with control tokens' names in it;
            then <|im_end|>. None: random text.
    """
    from kimi_native.generate import Model

    answers: dict[tuple[int, ...], list[int]] = {}

    def script(ids):
        if answer is None:
            return None
        prompt = next((p for p in answers if tuple(ids[: len(p)]) == p), tuple(ids))
        if prompt not in answers:
            said = answer(ids)
            said = tokenizer.encode_with_control(said) if isinstance(said, str) else said
            answers[prompt] = [*said, tokenizer.control_ids["<|im_end|>"]]
        at = len(ids) - len(prompt)
        return answers[prompt][min(at, len(answers[prompt]) - 1)]

    network = FakeModel(context=context, vocab_size=tokenizer.vocab_size, script=script, **options)
    cache = FakeCache(max_tokens=CACHE_TOKENS, page_size=16)
    model = Model(
        network,
        cache,
        tokenizer,
        generation_config={},
        chat_format=chat_format,
        max_batch=max_batch,
    )
    return model, network, cache


def make_scripted_model(
    tokenizer, say, *, chat_format="k2-thinking", context=8192, max_batch=2, **options
):
    """A generate.Model that says what it is told, for conversations that grow; with its network and cache.

    say  function of the prompt, as a text with control tokens' names in it, to an answer like it; then <|im_end|>
    """
    from kimi_native.generate import Model

    said: dict[tuple[int, ...], list[int]] = {}
    middle = tokenizer.control_ids["<|im_middle|>"]

    def script(ids):
        start = len(ids) - ids[::-1].index(middle)  # answers hold no such token
        prompt = tuple(ids[:start])
        if prompt not in said:
            said.clear()
            answer = tokenizer.encode_with_control(say(tokenizer.decode(prompt)))
            said[prompt] = [*answer, tokenizer.control_ids["<|im_end|>"]]
        return said[prompt][min(len(ids) - start, len(said[prompt]) - 1)]

    network = FakeModel(context=context, vocab_size=tokenizer.vocab_size, script=script, **options)
    cache = FakeCache(max_tokens=context * max_batch, page_size=16)
    model = Model(
        network,
        cache,
        tokenizer,
        generation_config={},
        chat_format=chat_format,
        max_batch=max_batch,
    )
    return model, network, cache
