"""A model whose decode steps are replayed: the ops of one step are recorded once per batch size, then made again by a
single native call, or on a GPU as a CUDA graph. The numbers are those of KimiModel.decode, to the bit; what goes is the
Python between two ops.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kimi_native import ops
from kimi_native.cache import CachedSequence, LatentCache
from kimi_native.model import Experts, KimiModel, Step
from kimi_native.placement import HostExperts

MAX_RECORDED_BATCH = 16  # beyond it the Python between the ops hardly shows, and buffers grow


class RecordedModel:
    """`prefill` and `decode` of a KimiModel over one cache. Its modules and weights must not be replaced any more.

    Logits come back to the CPU. Not recorded, but run as they are: models whose experts are BF16 (they loop over the
    hit experts in Python) or on the CPU beside a GPU, larger batches, and the reference backend.

    model, config  the KimiModel, and its configuration
    """

    def __init__(self, model: KimiModel, cache: LatentCache) -> None:
        self.config = model.config
        self.model = model
        self._cache = cache
        self._steps: dict[int, _RecordedStep] = {}
        self._recordable = not any(isinstance(m, Experts | HostExperts) for m in model.modules())

    def prefill(self, ids: Tensor, cache: LatentCache, seq: CachedSequence) -> Tensor:
        """See KimiModel.prefill."""
        return self.model.prefill(ids, cache, seq).cpu()

    # Under inference_mode torch shows a recording its composite operations whole, views and copies alike.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def decode(self, ids: Tensor, cache: LatentCache, seqs: list[CachedSequence]) -> Tensor:
        """See KimiModel.decode. The logits are overwritten by the next step of as many sequences."""
        batch = len(seqs)
        if (
            not self._recordable
            or cache is not self._cache
            or not 1 <= batch <= MAX_RECORDED_BATCH
            or ops.active_backend() != "native"
        ):
            return self.model.decode(ids, cache, seqs).cpu()
        step = self.model.decode_step(ids, cache, seqs)
        if batch not in self._steps:
            self._steps[batch] = _RecordedStep(self.model, cache, batch)
        logits = self._steps[batch].run(self.model.embed(ids), step)
        for seq in seqs:
            seq.length += 1
        return logits.cpu()


class _RecordedStep:
    """One batch size: the buffers that change from step to step, and what reads them, a recording or a CUDA graph."""

    def __init__(self, model: KimiModel, cache: LatentCache, batch: int) -> None:
        config = model.config
        pages = min(cache.num_pages, -(-config.max_position_embeddings // cache.page_size))
        half = config.qk_rope_head_dim // 2
        self._model = model
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
            self._replay = self._capture() if self._x.is_cuda else self._record()
        else:
            self._replay()
        return self._logits

    def _record(self) -> Callable[[], None]:
        with ops.record() as recording:
            self._logits = self._model.logits(*self._model.model(self._x, self._step))
        return recording.replay

    def _capture(self) -> Callable[[], None]:
        """Capturing runs nothing: the step is made before, which also sizes the scratch, and replayed after."""
        self._model.logits(*self._model.model(self._x, self._step))
        torch.cuda.synchronize(self._x.device)
        self._scratch = ops.workspace(0, self._x.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._model.logits(*self._model.model(self._x, self._step))
        graph.replay()
        return graph.replay
