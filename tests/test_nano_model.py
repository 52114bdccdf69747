"""kimi-nano as it is in the package: that it loads, is in the published format, and can do what it is for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import kimi_native as kn
from kimi_native.chat.jinja_template import find_template
from kimi_native.chat.template import render, render_text
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


def _conversations():
    """Turns with and without reasoning, calls and results, text in every form; all have to be rendered."""
    call = {"id": "functions.f:0", "function": {"name": "f", "arguments": '{"a": "ä"}'}}
    user = {"role": "user", "content": "Hello <|im_end|> there"}
    thought = {"role": "assistant", "reasoning_content": "so", "content": "Yes."}
    calling = {**thought, "content": None, "tool_calls": [{**call, "type": "function"}]}
    result = {"role": "tool", "tool_call_id": "functions.f:0", "content": "1\n"}
    yield [user]
    yield [{"role": "system", "content": "Be brief."}, user, thought, user]
    yield [user, calling, result, calling | {"content": "Again."}, result]
    yield [user, calling, result, thought, user, calling, result | {"name": "f"}]
    yield [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ]


@pytest.mark.parametrize(
    "tools", [None, [{"function": {"a": "ü", "name": "f"}, "type": "function"}]]
)
@pytest.mark.parametrize("opened", [False, True])
def test_nano_has_the_chat_template_of_its_format(nano, tools, opened):
    """For other programs, and for copies of it in BF16, which are known by it."""
    template = find_template(NANO_FOLDER)
    options = {"tokenizer": nano.tokenizer, "tools": tools, "add_generation_prompt": opened}
    for messages in _conversations():
        expected = render(messages, format="k2-thinking", **options)
        assert template.render(messages, **options) == expected
        tokenize = {"tools": tools, "chat_template": template.source}
        text = render_jinja_template([messages], add_generation_prompt=opened, **tokenize)[0][0]
        assert text == render_text(
            messages, format="k2-thinking", tools=tools, add_generation_prompt=opened
        )


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
