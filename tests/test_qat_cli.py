"""The verb qat, end to end: rows in, an INT4 checkpoint out that loads and says what it learned."""

from __future__ import annotations

import json
import math

import pytest
import torch

import kimi_native
from graphs import small_graph, small_values
from kimi_native import cli, qat_cli
from kimi_native.checkpoint import Checkpoint
from kimi_native.nano.train_log import LOG_NAME, read_log
from kimi_native.nano.train_state import STATE_NAME
from kimi_native.quant.export import export_checkpoint
from kimi_native.tokenizer import load_tokenizer
from kimi_native.tokenizer_files import tokenizer_files
from oracle import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
VALUES = small_values(num_hidden_layers=2)
QUICK = "--steps 4 --tokens-per-step 160 --log-every 1 --dtype float32".split()  # noqa: SIM905
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "reasoning_content": "Say hello.", "content": "Hello, world!"},
]


@pytest.fixture
def start(tmp_path):
    """A small BF16 checkpoint with a generation config of its own."""
    files = tokenizer_files(VALUES["vocab_size"])
    files["generation_config.json"] = b'{"temperature": 0.5}'
    graph = small_graph(num_hidden_layers=2)
    export_checkpoint(graph, tmp_path / "start", VALUES, format="bf16", files=files)
    return tmp_path / "start"


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"messages": TALK}, {"text": "Once upon a time"}, {"txt": 1}, {"messages": TALK[:2]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def qat(*arguments) -> int:
    return cli.main(["qat", *map(str, arguments)])


def test_qat_writes_an_int4_checkpoint_that_loads(tmp_path, start, data, capsys):
    assert qat(start, data, tmp_path / "out", *QUICK) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["path"] == str(tmp_path / "out")
    assert json.loads(said.out)["format"] == "int4"
    assert "2 rows used, 2 not (line 3: must be" in said.err
    assert "line 4: messages must have one of the assistant (got none)" in said.err
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert {n for n, form in checkpoint.forms.items() if form == "int4"} == {
        f"model.layers.1.mlp.experts.{e}.{kind}_proj"
        for e in range(8)
        for kind in ("gate", "up", "down")
    }
    before = Checkpoint.open(start)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert not torch.equal(checkpoint.tensor(name), before.tensor(name))
    assert checkpoint.generation_config == {"temperature": 0.5}
    steps = read_log(tmp_path / "out.run" / LOG_NAME)
    assert [s["qat"] for s in steps] == [True] * 4
    model = kimi_native.load(tmp_path / "out")
    assert len(model.generate("Hello", max_tokens=3).ids) <= 3


def test_qat_learns_an_answer_by_heart(tmp_path, start, capsys):
    """One conversation, again and again: its loss goes to nothing, and the native INT4 model gives it back."""
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"messages": TALK}))
    options = "--steps 60 --tokens-per-step 60 --learning-rate 0.01 --log-every 1".split()  # noqa: SIM905
    assert qat(start, data, tmp_path / "out", *options) == 0
    losses = [s["loss"] for s in read_log(tmp_path / "out.run" / LOG_NAME)]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.4f}")
    assert losses[0] > 0.8 * math.log(VALUES["vocab_size"])
    assert losses[-1] < 0.05
    result = kimi_native.load(tmp_path / "out").generate(TALK[:2], max_tokens=40, temperature=0)
    assert (result.reasoning, result.text) == ("Say hello.", "Hello, world!")
    assert result.finish_reason == "stop"


def test_qat_starts_from_int4_and_keeps_its_values(tmp_path, start, data):
    """At a rate of almost nothing the experts' INT4 values stay, bit for bit."""
    assert qat(start, data, tmp_path / "a", *QUICK) == 0
    quiet = ["--learning-rate", "1e-12", "--bias-rate", "0"]
    assert qat(tmp_path / "a", data, tmp_path / "b", *QUICK, *quiet) == 0
    a, b = (Checkpoint.open(tmp_path / n) for n in "ab")
    for name in a.tensors:
        assert_same_bits(a.tensor(name), b.tensor(name))


def test_qat_goes_on_after_an_interrupt_and_does_not_overwrite(tmp_path, start, data, capsys):
    out, run = tmp_path / "out", tmp_path / "kept"
    arguments = [start, data, out, "--run", run, *QUICK]
    assert qat(*arguments[: -len(QUICK)], *QUICK[2:], "--steps", "2") == 0
    assert (run / STATE_NAME).exists()
    assert qat(*arguments) == 1
    assert "out_dir must be empty, or be overwritten on request" in capsys.readouterr().err
    assert qat(*arguments, "--overwrite") == 0
    assert "going on after step 2" in capsys.readouterr().err
    assert len(read_log(run / LOG_NAME)) == 4
    (out / "notes.txt").write_text("mine")
    assert qat(*arguments, "--overwrite") == 1
    assert "must hold no other files (got notes.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "nowhere: must be a model folder (found none)"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: must be a readable file"),
        ({"out": "start"}, "qat: MODEL, OUT and the run's folder must be three"),
        ({"--run": "out"}, "qat: MODEL, OUT and the run's folder must be three"),
        ({"--steps": "0"}, "train: steps must be at least 1 (got 0)"),
        ({"--warmup-steps": "9"}, "fit into steps"),
        ({"--chat-format": "chatml"}, "chat: format must be one of"),
        ({"--dtype": "int4"}, "dtype must be bfloat16 or float32 (got int4)"),
        ({"--tokens-per-step": "3"}, "must have a row that can be used"),
    ],
    ids=str,
)
def test_qat_names_errors(tmp_path, start, data, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    given = {"model": "start", "data": str(data), "out": "out"} | {
        k: v for k, v in change.items() if not k.startswith("-")
    }
    options = [x for k, v in change.items() if k.startswith("-") for x in (k, v)]
    assert qat(*given.values(), *QUICK, *options) == 1
    err = capsys.readouterr().err
    assert message in err
    lines = err.splitlines()
    assert len(lines) == 1 + ("kimi-native train: " in err)
    assert lines[-1].startswith("kimi-native: error: ")
    assert not (tmp_path / "out").exists()


def test_qat_refuses_what_memory_does_not_hold(tmp_path, start, data, capsys, monkeypatch):
    monkeypatch.setattr(qat_cli, "available_memory", lambda: 1000)
    assert qat(start, data, tmp_path / "out", *QUICK) == 1
    assert "of memory to train" in capsys.readouterr().err
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["a", "b", "c", "--qat-from", "3"]], ids=str)
def test_qat_wrong_usage_is_exit_code_2(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        qat(*argv)
    assert caught.value.code == 2
    assert "usage: kimi-native" in capsys.readouterr().err


def test_qat_copies_the_tokenizer(tmp_path, start, data):
    assert qat(start, data, tmp_path / "out", *QUICK) == 0
    texts = [
        load_tokenizer(tmp_path / n, vocab_size=600).encode("Hello!") for n in ("start", "out")
    ]
    assert texts[0] == texts[1]
