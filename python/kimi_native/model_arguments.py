"""The arguments of verbs that load a model and generate, and what they mean."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kimi_native.errors import MemoryPlanWarning
from kimi_native.progress_bar import progress_bar
from kimi_native.terminal import note

if TYPE_CHECKING:
    from kimi_native.generate import Model

_LOAD_OPTIONS = "max_context threads dtype dense cache compute device experts isa prefetch".split()  # noqa: SIM905
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint folder (default: kimi-nano, in the package)"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group(
        "sampling (default: the checkpoint's generation_config.json)"
    )
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="of the answer (else 2048)")
    sampling.add_argument("--temperature", type=float, metavar="X", help="0: the likeliest token")
    sampling.add_argument(
        "--top-p", type=float, metavar="X", help="the likeliest tokens of this probability together"
    )
    sampling.add_argument("--top-k", type=int, metavar="N", help="the N likeliest tokens; 0: off")
    sampling.add_argument(
        "--min-p",
        type=float,
        metavar="X",
        help="tokens at least X times as likely as the likeliest",
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="same seed, same answer")
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends the answer; may be repeated"
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("model and machine")
    add_settings(machine)
    add_compute(machine)
    machine.add_argument("--threads", type=int, metavar="N", help="default: the cores there are")
    machine.add_argument("--device", default="cpu", help="cpu (default), cuda, or cuda:N")
    machine.add_argument("--experts", choices=["cpu"], help="keep the routed experts off the GPU")
    machine.add_argument("--isa", metavar="NAME", help="kernel tier (default: the best here)")
    machine.add_argument(
        "--no-prefetch",
        dest="prefetch",
        action="store_false",
        help="read each weight when it is first used, not all of them while loading",
    )


def add_settings(parser: Any) -> None:
    """What decides how much memory a model takes."""
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="tokens of prompt and answer (default: the model's, at most 8192)",
    )
    add_forms(parser)
    add_ignored_keys(parser)


def add_forms(parser: Any) -> None:
    """The forms of activations, dense matrices and cache."""
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="activations and cache"
    )
    add_dense(parser)
    parser.add_argument(
        "--cache",
        choices=("exact", "fp8"),
        default="exact",
        help="the latent cache: of --dtype, or rounded to FP8",
    )


def add_compute(parser: Any) -> None:
    parser.add_argument(
        "--compute",
        choices=("exact", "int8"),
        default="exact",
        help="activations that meet INT4 matrices: exact, or rounded to 8 bits",
    )


def add_dense(parser: Any) -> None:
    parser.add_argument(
        "--dense",
        choices=("bf16", "int8", "int4"),
        default="bf16",
        help="dense matrices: as published, or rounded to 8 or 4 bits",
    )


def add_ignored_keys(parser: Any) -> None:
    parser.add_argument(
        "--ignore-config-key",
        action="append",
        default=[],
        metavar="KEY",
        help="accept this unknown key of config.json; may be repeated",
    )


def sampling_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given, checked: a bad value should not cost the loading of a model."""
    from kimi_native.sampling import SamplingParams

    overrides = {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}
    SamplingParams(**overrides)
    return overrides


def load_model(args: argparse.Namespace, *, max_batch: int = 1, **options: Any) -> Model:
    """The model of --model, with a progress bar on a terminal. options: further arguments of load."""
    from kimi_native.generate import load

    with _memory_notes(), progress_bar("loading") as progress:
        return load(
            args.model,
            max_batch=max_batch,
            **{name: getattr(args, name) for name in _LOAD_OPTIONS},
            ignore_config_keys=args.ignore_config_key,
            **options,
            progress=progress,
        )


def import_torch() -> None:
    """An interrupt that arrives while extension modules load can get lost in them: it ends the process instead."""
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import torch  # noqa: F401
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _memory_notes() -> Iterator[None]:
    """Says on stderr, in one line each, what a library user gets as MemoryPlanWarning; other warnings as ever."""
    show = warnings.showwarning

    def say(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if issubclass(category, MemoryPlanWarning):
            note(f"note: {message}")
        else:
            show(message, category, *where, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("always", MemoryPlanWarning)
        warnings.showwarning = say
        yield
