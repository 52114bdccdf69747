"""Native INT4: the same model trained on with and without quantized weights, and what quantizing afterwards costs.

Two copies of a model go on training for as many steps on the same data: one in BF16, one with its experts quantized in
every forward pass (quant/qat.py). The BF16 copy is then quantized in the two usual ways, to nearest and by calibration
(quant/calibrate.py). All four are written in the published format, loaded, and played by the native kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from kimi_native.checkpoint import Checkpoint
from kimi_native.claims.training import conversations, train
from kimi_native.config import KimiConfig
from kimi_native.folder_names import CONFIG_NAME
from kimi_native.nano.batches import Batch
from kimi_native.nano.evaluate import evaluate_all
from kimi_native.nano.graph import KimiGraph
from kimi_native.nano.player import played_by
from kimi_native.nano.published import read_published
from kimi_native.nano.settings import TrainSettings
from kimi_native.nano.train import config_values, read_files
from kimi_native.nano.world import Failures
from kimi_native.quant.calibrate import calibrate_and_quantize
from kimi_native.quant.export import export_checkpoint

if TYPE_CHECKING:
    from kimi_native.generate import Model

VARIANTS = ("bf16", "nearest", "calibrated", "qat")
DECODED = 256  # tokens that the speed is measured on
AT_ONCE = 128  # problems that are played, so that the cache keeps all their conversations
Load = Callable[[Path], "Model"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How much is done.

    steps     that both copies are trained on, of tokens_per_step
    tokens    held-out ones that loss and KL are taken over; as many of the training's calibrate
    problems  held-out ones played by each variant, of num_steps steps, the share failure_rate of the calls failing
    """

    steps: int
    tokens: int
    problems: int
    num_steps: int = 10
    failure_rate: float = 0.1
    tokens_per_step: int = 4096


FULL, QUICK = Plan(200, 65536, 400, tokens_per_step=12288), Plan(10, 8192, 10)


def settings_of(plan: Plan, seed: int) -> TrainSettings:
    """The recipe of kimi-nano's last part: up to half its rate and down to 0."""
    return TrainSettings(
        steps=plan.steps,
        tokens_per_step=plan.tokens_per_step,
        seed=seed + 1000,  # conversations that the model has not been trained on
        learning_rate=1.5e-3,
        warmup_steps=max(1, plan.steps // 10),
        decay_steps=plan.steps // 2,
        stretch_chance=0.3,
        stretch_to=32768,
        stretch_jumps=4,
        highest_temperature=1.4,
    )


def run(
    source: Path, folder: Path, plan: Plan, *, seed: int, load: Load, say: Say
) -> dict[str, Any]:
    """One row for each of VARIANTS.

    source  the checkpoint that both copies start from
    folder  gets the runs and the four checkpoints; an interrupted experiment goes on there
    load    opens a checkpoint for playing
    say     told what is going on
    """
    paths = _make_variants(source, folder, plan, seed, say)
    rows, base = [], None
    batch = conversations(plan.tokens, seed=seed, split="held-out")
    for name in VARIANTS:
        say(f"measuring {name}")
        logits = _logits(paths[name], batch)
        base = logits if base is None else base
        rows.append(
            {
                "variant": name,
                "bytes": Checkpoint.open(paths[name]).summary()["bytes"],
                "loss": float(cross_entropy(logits, batch.targets)),
                "kl": kl_divergence(base, logits),
                **_played(load(paths[name]), plan, seed),
            }
        )
    return {"plan": asdict(plan), "seed": seed, "tokens": len(batch.targets), "rows": rows}


def _make_variants(source: Path, folder: Path, plan: Plan, seed: int, say: Say) -> dict[str, Path]:
    values, files = config_values(source / CONFIG_NAME), read_files(source)
    settings = settings_of(plan, seed)
    paths = {name: folder / name for name in VARIANTS}

    def write(name: str, graph: KimiGraph, **options: Any) -> None:
        export_checkpoint(graph, paths[name], values, files=files, overwrite=True, **options)

    say(f"training {plan.steps} steps with quantized weights")
    aware = replace(settings, qat_from=0)
    write("qat", train(values, folder / "qat-run", aware, start=source))
    say(f"training {plan.steps} steps in BF16")
    graph = train(values, folder / "bf16-run", settings, start=source)
    write("bf16", graph, format="bf16")
    write("nearest", graph)
    seen = conversations(plan.tokens, seed=seed, split="train")
    calibrated = calibrate_and_quantize(graph, [seen.documents])
    say(str(calibrated.report))
    write("calibrated", calibrated.graph, weights=calibrated.weights)
    return paths


@torch.no_grad()
def _logits(path: Path, batch: Batch) -> Tensor:
    """Of the predicted tokens, [n, vocab_size], computed in float32 from the weights as they are stored."""
    values = config_values(path / CONFIG_NAME)
    graph = KimiGraph(KimiConfig.from_dict(values, source=str(path)))
    read_published(graph, Checkpoint.open(path))
    return graph(batch.documents, batch.rows).logits


def kl_divergence(base: Tensor, other: Tensor) -> dict[str, float]:
    """Mean KL(base || other) in nats a token, and its standard error. base, other: logits [n, vocab_size]."""
    p, q = log_softmax(base.double(), 1), log_softmax(other.double(), 1)
    each = (p.exp() * (p - q)).sum(1)
    return {"mean": float(each.mean()), "error": float(each.std() / len(each) ** 0.5)}


def _played(model: Model, plan: Plan, seed: int) -> dict[str, Any]:
    """Problems solved, and tokens a second where one answer is decoded alone."""
    score = evaluate_all(
        played_by(model, constrain_tools=False),
        num_steps=plan.num_steps,
        failures=Failures(plan.failure_rate),
        count=plan.problems,
        at_once=AT_ONCE,
        seed=seed,
    )
    options: Mapping[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": DECODED}
    model.generate("Hello", **options)
    began = time.perf_counter()
    model.generate("Hello", **options)
    seconds = time.perf_counter() - began
    return {
        "solved": asdict(score.solved),
        "step": asdict(score.steps),
        "tokens_per_s": DECODED / seconds,
    }
