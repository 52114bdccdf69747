"""A training run: batches in, a graph with trained weights out; stops and goes on without a bit's difference.

Each step: forward, loss plus the sequence-wise balance term, backward, clip the gradient's norm, MuonAdamW, QK-Clip,
bias update. Every number is looked at: what is not finite ends the run by name before it is saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kimi_native.checkpoint import Checkpoint
from kimi_native.checkpoint_writer import FolderWriter
from kimi_native.config import KimiConfig
from kimi_native.nano.balance import update_bias
from kimi_native.nano.batches import Batch, make_batch
from kimi_native.nano.dataset import Dataset
from kimi_native.nano.divergence import check_loss, check_norms, norms
from kimi_native.nano.graph import GraphOutput, KimiGraph
from kimi_native.nano.muon import MuonAdamW, MuonSettings, qk_clip
from kimi_native.nano.published import published_tensors, read_published
from kimi_native.nano.settings import TrainSettings
from kimi_native.nano.text_rows import TextRows
from kimi_native.nano.train_log import LOG_NAME, StepReport, append, cut_back
from kimi_native.nano.train_state import STATE_NAME, check_same, read_run, restore, save_state
from kimi_native.quant.qat import apply_qat

Progress = Callable[[StepReport], None]


class Trainer:
    """A run in a folder, begun or, if the folder holds its state, continued.

    values    config.json of the model, in one level
    dataset   what to learn; held_out: what to look at only
    out_dir   made if missing; gets the state and the log
    start     a checkpoint of the same config whose weights to start from, instead of random ones

    Raises RequestError if the folder holds a run of another config, dataset, start or settings; ModelFormatError on a
    broken state; CheckpointWriteError if the folder cannot be written or another process trains in it.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        dataset: Dataset,
        out_dir: str | os.PathLike[str],
        settings: TrainSettings,
        *,
        held_out: Dataset | None = None,
        start: Checkpoint | None = None,
    ) -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.values, self.dataset, self.settings = dict(values), dataset, settings
        self.held_out, self.folder = held_out, FolderWriter("train", Path(out_dir))
        self.folder.make()
        self.graph = KimiGraph(
            KimiConfig.from_dict(self.values, source="train: values"),
            dtype=getattr(torch, settings.dtype),
            logit_limit=settings.logit_limit,
            seed=settings.seed,
        )
        if start is not None:
            read_published(self.graph, start)
        self.graph.to(settings.device)
        self.optimizer = MuonAdamW(self.graph, MuonSettings(weight_decay=settings.weight_decay))
        self.schedule, self.stretch = settings.schedule(), settings.stretch()
        self.steps_done, self.counter = 0, 0
        self._began = {
            "settings": settings.fixed(),
            "config": self.values,
            "dataset": {"length": len(dataset), **_fingerprint(dataset)},
            "start": {"weights": None if start is None else _weights_of(self.graph)},
        }
        if (self.folder.path / STATE_NAME).exists():
            self._restore()

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self, progress: Progress | None = None) -> bool:
        """Train to the last step; saves as it goes. An interrupt or a termination signal saves after the step at hand.

        progress  called after every step
        returns   whether the run is complete

        Raises DivergedError, naming step and tensor, at a number that is not finite; the last saved state stays.
        """
        with self.folder.locked(), stop_signals() as stop, ThreadPoolExecutor(1) as ahead:
            cut_back(self.folder, self.steps_done)
            began = time.perf_counter()
            pending = ahead.submit(self._batch, self.counter)
            while self.steps_done < self.settings.steps and not stop.is_set():
                started = time.perf_counter()
                batch = pending.result()
                pending = ahead.submit(self._batch, batch.counter)
                report = self._step(batch)
                now = time.perf_counter()
                report = replace(report, seconds=now - started, total_seconds=now - began)
                self.counter = batch.counter
                self.steps_done += 1
                report = self._looked_at(report)
                if self._is_logged(report):
                    append(self.folder.path / LOG_NAME, report)
                if progress is not None:
                    progress(report)
                if self.steps_done % self.settings.save_every == 0 and not self._is_last():
                    self.save()
            self.save()
        return self._is_last()

    def _is_logged(self, report: StepReport) -> bool:
        due = report.step % self.settings.log_every == 0
        return due or report.held_out_loss is not None or self._is_last()

    def _is_last(self) -> bool:
        return self.steps_done >= self.settings.steps

    def _batch(self, counter: int) -> Batch:
        settings = self.settings
        batch = make_batch(
            self.dataset,
            counter,
            tokens=settings.tokens_per_step,
            seed=settings.seed,
            stretch=self.stretch,
            highest_temperature=settings.highest_temperature,
        )
        return batch.to(settings.device)

    def _step(self, batch: Batch) -> StepReport:
        """Everything that changes the weights."""
        settings, step = self.settings, self.steps_done
        qat = settings.qat_from is not None and step >= settings.qat_from
        if qat:
            apply_qat(self.graph)
        out = self.graph(batch.documents, batch.rows)
        loss = cross_entropy(out.logits, batch.targets)
        check_loss(self.graph, batch.documents, step, float(loss.detach()))
        self.graph.zero_grad()
        (loss + settings.balance_weight * out.balance_loss).backward()
        rate = self.schedule.at(step)
        grad_norm = self._clip_gradients(step)
        self.optimizer.step(rate)
        clipped = qk_clip(self.graph, out.max_logits, settings.logit_limit)
        if settings.bias_until is None or step < settings.bias_until:
            update_bias(self.graph, out.loads, settings.bias_rate)
        named = dict(self.graph.named_parameters())
        check_norms("weight", named, norms(p.detach() for p in named.values()), step)
        return _report(step, loss, out, grad_norm, rate, clipped, qat, batch)

    @torch.no_grad()
    def _clip_gradients(self, step: int) -> float:
        grads = {n: p.grad for n, p in self.graph.named_parameters() if p.grad is not None}
        each = norms(grads.values())
        check_norms("gradient", grads, each, step)
        norm = float(each.norm())
        if norm > self.settings.clip_norm:
            for grad in grads.values():
                grad.mul_(self.settings.clip_norm / norm)
        return norm

    def _looked_at(self, report: StepReport) -> StepReport:
        every = self.settings.held_out_every
        if self.held_out is None or not every:
            return report
        if self.steps_done % every and not self._is_last():
            return report
        tokens = self.settings.held_out_tokens
        loss, accuracy = evaluate(self.graph, self.held_out, tokens=tokens)
        return replace(report, held_out_loss=loss, held_out_accuracy=accuracy)

    # ---- the state --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state as it is between two steps."""
        run = self._began | {
            "threads": torch.get_num_threads(),
            "steps_done": self.steps_done,
            "optimizer_steps": self.optimizer.steps,
            "counter": self.counter,
        }
        save_state(self.folder, self._tensors(), run)

    def _restore(self) -> None:
        path = self.folder.path / STATE_NAME
        file, run = read_run(path)
        for what, now in self._began.items():
            check_same(self.folder.path, what, run.get(what, {}), now)
        if self.settings.threads is not None:
            check_same(self.folder.path, "setting", _threads(run["threads"]), _threads())
        torch.set_num_threads(run["threads"])
        restore(file, self._tensors())
        self.steps_done, self.counter = run["steps_done"], run["counter"]
        self.optimizer.steps = run["optimizer_steps"]

    def _tensors(self) -> dict[str, Tensor]:
        """All that the state consists of; the tensors themselves."""
        weights = {f"weights.{n}": p for n, p in self.graph.named_parameters()}
        buffers = {
            f"weights.{n}": b
            for n, b in self.graph.named_buffers()
            if n.endswith("e_score_correction_bias")
        }
        return weights | buffers | dict(self.optimizer.tensors())


def _report(
    step: int,
    loss: Tensor,
    out: GraphOutput,
    grad_norm: float,
    rate: float,
    clipped: int,
    qat: bool,
    batch: Batch,
) -> StepReport:
    return StepReport(
        step=step,
        loss=float(loss.detach()),
        balance_loss=float(out.balance_loss.detach()),
        grad_norm=grad_norm,
        learning_rate=rate,
        max_logit=float(out.max_logits.max()),
        clipped_heads=clipped,
        loads=out.loads.tolist(),
        qat=qat,
        tokens=len(batch.documents.ids),
        seconds=0.0,
        total_seconds=0.0,
    )


@torch.no_grad()
def evaluate(graph: KimiGraph, dataset: Dataset, *, tokens: int) -> tuple[float, float]:
    """Mean loss in nats and share of the right greedy guesses, over the first examples of the dataset's order 0.

    tokens  how many to look at, at most
    """
    batch = make_batch(dataset, 0, tokens=tokens, seed=0).to(graph.lm_head.weight.device)
    logits = graph(batch.documents, batch.rows).logits
    right = (logits.argmax(1) == batch.targets).double().mean()
    return float(cross_entropy(logits, batch.targets)), float(right)


def _threads(num: int | None = None) -> dict[str, int]:
    return {"threads": torch.get_num_threads() if num is None else num}


def _fingerprint(dataset: Dataset) -> dict[str, str]:
    """Of all rows that were read; of what a generator makes the first example, which its seed is seen in."""
    is_read = isinstance(dataset, TextRows)
    digest = hashlib.sha256()
    for example in dataset.examples if is_read else [dataset.example(0)]:
        digest.update(repr((example.ids, example.loss)).encode())
    return {"rows" if is_read else "first": digest.hexdigest()}


def _weights_of(graph: KimiGraph) -> str:
    digest = hashlib.sha256()
    for _, tensor in published_tensors(graph):
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one does what it always does.

    Outside the main thread, which alone may handle signals, nobody sets it.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
