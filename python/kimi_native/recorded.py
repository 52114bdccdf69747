"""A model whose short steps are replayed: the ops of one step are recorded once per number of tokens, then made again
by a single native call, or on a GPU as a CUDA graph. The numbers are those of KimiModel, to the bit; what goes is the
Python between two ops. Steps are the decode of a batch and, on a CPU, where both are one form, the prefill of as few
tokens, such as a tool's result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kimi_native import ops
from kimi_native.cache import CachedSequence, LatentCache
from kimi_native.device_memory import gpu_scratch
from kimi_native.model import Experts, KimiModel, Step
from kimi_native.placement import HostExperts

MAX_RECORDED_TOKENS = 32  # beyond it the Python between the ops hardly shows, and buffers grow
MAX_GRAPH_TOKENS = 256  # on a GPU, which is done sooner than Python has launched a layer's ops


class RecordedModel:
    """`prefill` and `decode` of a KimiModel over one cache. Its modules and weights must not be replaced any more.

    Logits stay on the model's device. Not recorded, but run as they are: models whose experts are BF16 (they loop over
    the hit experts in Python) or on the CPU beside a GPU, larger batches, and the reference backend.

    model, config  the KimiModel, and its configuration
    """

    def __init__(self, model: KimiModel, cache: LatentCache) -> None:
        self.config = model.config
        self.model = model
        self._cache = cache
        self._steps: dict[tuple[int, bool], _RecordedStep] = {}
        self._graphs: _Graphs | None = None
        self._recordable = not any(isinstance(m, Experts | HostExperts) for m in model.modules())

    @property
    def decode_equals_prefill(self) -> bool:
        """See KimiModel.decode_equals_prefill."""
        return self.model.decode_equals_prefill

    # Under inference_mode torch shows a recording its composite operations whole, views and copies alike.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: LatentCache, seq: CachedSequence) -> Tensor:
        """See KimiModel.prefill."""
        count = ids.shape[0]
        if not self.decode_equals_prefill or not self._is_recorded(count, cache):
            return self.model.prefill(ids, cache, seq)
        step = self.model.prefill_step([ids], cache, [seq])
        logits = self._replay(ids, step, last_alone=True)
        seq.length += count
        return logits[0].clone()

    def prefill_batch(
        self, prompts: list[Tensor], cache: LatentCache, seqs: list[CachedSequence]
    ) -> Tensor:
        """See KimiModel.prefill_batch."""
        if len(seqs) == 1:
            return self.prefill(prompts[0], cache, seqs[0])[None]
        return self.model.prefill_batch(prompts, cache, seqs)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def decode(self, ids: Tensor, cache: LatentCache, seqs: list[CachedSequence]) -> Tensor:
        """See KimiModel.decode. The logits are overwritten by the next step."""
        if not self._is_recorded(len(seqs), cache):
            return self.model.decode(ids, cache, seqs)
        step = self.model.decode_step(ids, cache, seqs)
        logits = self._replay(ids, step, last_alone=False)
        for seq in seqs:
            seq.length += 1
        return logits

    def _is_recorded(self, tokens: int, cache: LatentCache) -> bool:
        most = MAX_RECORDED_TOKENS
        if cache.device.type == "cuda":  # a graph's kernels start unseen
            most = 0 if ops.is_synchronous() else MAX_GRAPH_TOKENS
        return (
            self._recordable
            and cache is self._cache
            and 1 <= tokens <= most
            and ops.active_backend() == "native"
        )

    def _replay(self, ids: Tensor, step: Step, *, last_alone: bool) -> Tensor:
        """The logits after each of the tokens, or after the last one alone."""
        kind = len(ids), last_alone and len(ids) > 1
        if self._graphs is None and self._cache.device.type == "cuda":
            self._graphs = _Graphs(self._cache.device, self.config.vocab_size)
        if kind not in self._steps:
            self._steps[kind] = _RecordedStep(self.model, self._cache, *kind, self._graphs)
        return self._steps[kind].run(self.model.embed(ids), step)


class _Graphs:
    """What a GPU's steps share, so that graphs of many batch sizes take little more memory than the largest: they run
    one at a time, and leave nothing behind but the logits."""

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        with torch.cuda.device(device):
            # Of this device: torch's own stream for captures belongs to the device that was current first.
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()
        self.logits = torch.empty(MAX_GRAPH_TOKENS, vocab_size, device=device)


class _RecordedStep:
    """One number of tokens: buffers that change from step to step, and the recording or CUDA graph that reads them."""

    def __init__(
        self,
        model: KimiModel,
        cache: LatentCache,
        batch: int,
        last_alone: bool,
        graphs: _Graphs | None,
    ) -> None:
        config = model.config
        pages = min(cache.num_pages, -(-config.max_position_embeddings // cache.page_size))
        half = config.qk_rope_head_dim // 2
        self._model, self._logits_of = model, slice(-1 if last_alone else 0, None)
        self._graphs = graphs
        where = {"device": cache.device}
        self._x = torch.empty(batch, config.hidden_size, dtype=model.dtype, **where)
        self._step = Step(
            cache,
            torch.zeros(batch, dtype=torch.int64, **where),
            torch.empty(batch, half, **where),
            torch.empty(batch, half, **where),
            page_table=torch.zeros(batch, pages, dtype=torch.int32, **where),
            seq_lens=torch.zeros(batch, dtype=torch.int32, **where),
        )
        self._replay: Callable[[], None] | None = None
        self._logits: Tensor | None = None
        self._scratch: Tensor | None = None  # that the graph's kernels write to

    def run(self, x: Tensor, step: Step) -> Tensor:
        mine = self._step
        self._x.copy_(x)
        mine.slots.copy_(step.slots)
        mine.cos.copy_(step.cos)
        mine.sin.copy_(step.sin)
        mine.page_table[:, : step.page_table.shape[1]].copy_(step.page_table)
        mine.seq_lens.copy_(step.seq_lens)
        if self._replay is None:
            self._replay = self._record() if self._graphs is None else self._capture(self._graphs)
        else:
            self._replay()
        return self._logits

    def _record(self) -> Callable[[], None]:
        with ops.record() as recording:
            self._compute()
        return recording.replay

    def _compute(self) -> None:
        x, update = self._model.model(self._x, self._step)
        self._logits = self._model.logits(x[self._logits_of], update[self._logits_of])

    def _capture(self, shared: _Graphs) -> Callable[[], None]:
        """Capturing runs nothing: the step is made before, which also sizes the scratch, and replayed after."""
        device, graph = self._x.device, torch.cuda.CUDAGraph()
        with gpu_scratch("decode", 0, device):  # nobody makes it grow between the two
            self._compute()
            torch.cuda.synchronize(device)
            with (
                gpu_scratch("decode", 0, device) as self._scratch,
                torch.cuda.device(device),
                # Of this thread: what others do on the GPU meanwhile must not end the capture.
                torch.cuda.graph(
                    graph,
                    pool=shared.pool,
                    stream=shared.stream,
                    capture_error_mode="thread_local",
                ),
            ):
                self._compute()
                self._logits = shared.logits[: len(self._logits)].copy_(self._logits)

        def replay() -> None:
            with gpu_scratch("decode", 0, device):  # after whoever used it on another stream
                graph.replay()

        replay()
        return replay
