"""kimi-nano as it is in the package: that it loads, is in the published format, and can do what it is for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import kimi_native as kn
from kimi_native.checkpoint import Checkpoint
from kimi_native.folder_names import NANO_FOLDER
from kimi_native.nano.evaluate import evaluate_all
from kimi_native.nano.player import played_by
from kimi_native.nano.small_talk import all_exchanges
from kimi_native.nano.world import Failures

MAX_FOLDER_BYTES = 7_700_000  # of which the wheel's 10 MB leave room for the libraries


@pytest.fixture(scope="module")
def nano():
    return kn.load(max_context=4096, max_batch=16)


def test_nano_is_a_published_checkpoint():
    checkpoint = Checkpoint.open(NANO_FOLDER)
    summary = checkpoint.summary()
    assert summary["matrices_by_form"]["int4"] == 4 * 32 * 3
    assert sum(path.stat().st_size for path in NANO_FOLDER.iterdir()) < MAX_FOLDER_BYTES


def test_nano_is_what_load_gives_without_a_folder(nano):
    assert nano.config.hidden_size == 192
    assert nano.chat_format == "k2-thinking"
    assert nano.generation_config["do_sample"] is False


def test_nano_says_who_it_is(nano):
    """Every tenth wording of its small talk, answered as it was taught, thought included: most of them (103 of 119)."""
    exchanges = list(all_exchanges())[::10]
    answers = nano.generate([exchange.question for exchange in exchanges], max_tokens=96)
    right = [
        (answer.text, answer.reasoning) == (exchange.answer, exchange.thought)
        for answer, exchange in zip(answers, exchanges, strict=True)
    ]
    assert sum(right) >= 0.75 * len(exchanges)


def test_nano_solves_held_out_problems(nano):
    """docs/claims.md measures how many; here on few, with room for bad luck."""
    score = evaluate_all(played_by(nano), num_steps=6, failures=Failures(0.1), count=32)
    assert score.solved.rate >= 0.9
    assert score.catches.rate >= 0.9


def test_nano_answers_the_same_with_one_thread_and_alone(nano):
    """In a process of its own, one thread; here in a batch with others."""
    question = "What is 17 * 23?"
    code = f"import kimi_native as kn; print(kn.load(threads=1).generate({question!r}).ids)"
    command = [sys.executable, "-P", "-c", code]
    alone = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert alone.stdout.strip() == str(nano.generate(["Hello", question])[1].ids)
