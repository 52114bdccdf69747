"""kimi-native routing: what it prints and writes, and one line for whatever is wrong, before a weight is read."""

from __future__ import annotations

import io
import json
import os
import struct
import sys

import pytest

import kimi_native as kn
from kimi_native import cli, generate
from kimi_native.chat.template import render
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.routing import measure_routing
from tiny_checkpoint import TINY, write_checkpoint

TEXT = "What is 17 * 23?"
MESSAGES = [
    {"role": "user", "content": TEXT},
    {"role": "assistant", "content": "391.", "reasoning_content": "Easy."},
]
ROWS = [
    {"text": "raw 17"},
    {"messages": MESSAGES},
    {"messages": MESSAGES[:1], "tools": []},
    {"ids": [5, 6, 7], "loss": [False, True, True]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "tiny"
    make_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return kn.load(folder, max_batch=1, threads=1)


@pytest.fixture
def run(folder, model, tmp_path, monkeypatch):
    """Runs the verb in an empty folder, on a model that is loaded once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load", lambda path, **options: model)
    return lambda *argv: cli.main(["routing", str(folder), *argv])


@pytest.fixture
def not_loaded(monkeypatch):
    """Loading a model ends the test."""

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(generate, "load", load)


def written(name):
    with open(name, encoding="utf-8") as file:
        return json.load(file)


def test_routing_prints_a_table(run, model, capsys):
    assert run("--prompt", TEXT) == 0
    out, err = capsys.readouterr()
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    tokens = len(model.prompt_ids(TEXT))
    assert lines[0].endswith(
        f"/tiny: {tokens} tokens of 1 text; each chooses 4 of 16 experts in each of 3 layers"
    )
    assert lines[1].split()[:3] == ["layer", "max/mean", "variation"]
    statistics = measure_routing(model, TEXT).statistics()
    for line, s in zip(lines[3:6], statistics, strict=True):
        assert line.split()[:4] == [
            *(str(s.layer), f"{s.max_over_mean:.2f}", f"{s.variation:.2f}", f"{s.entropy:.3f}"),
        ]
    assert lines[6].startswith("labels: special ")
    assert err == ""
    assert os.listdir() == []


def test_routing_writes_what_is_asked_for(run, model, capsys):
    argv = ["--json", "a.json", "--png", "b.png", "--html", "c.html"]
    assert run("--prompt", TEXT, "--max-tokens", "3", *argv) == 0
    assert sorted(os.listdir()) == ["a.json", "b.png", "c.html"]
    expected = measure_routing(model, TEXT, max_tokens=3)
    found = written("a.json")
    (text,) = found["texts"]
    assert text["ids"] == expected.texts[0].ids
    assert text["experts"] == expected.texts[0].experts.tolist()
    assert [layer["counts"] for layer in found["layers"]] == [
        s.counts.tolist() for s in expected.statistics()
    ]
    with open("b.png", "rb") as file:
        head = file.read(24)
    assert head.startswith(b"\x89PNG\r\n")
    assert min(struct.unpack(">II", head[16:])) > 100
    with open("c.html", encoding="utf-8") as file:
        assert file.read().startswith("<!DOCTYPE html>")
    assert capsys.readouterr().err.splitlines() == [
        f"kimi-native: wrote {name}" for name in ("a.json", "b.png", "c.html")
    ]


def test_routing_json_goes_to_stdout_alone(run, capsys):
    assert run("--prompt", TEXT, "--raw-prompt", "--json", "-", "--labels", "roles") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["label_tokens"]["text"] == found["num_tokens"]
    assert (out.count("\n"), err) == (1, "")


@pytest.mark.parametrize("given", ["@prompt.txt", "-"])
def test_routing_reads_the_prompt(run, model, monkeypatch, capsys, given):
    with open("prompt.txt", "w", encoding="utf-8") as file:
        file.write(TEXT + "\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode() + b"\n")))
    assert run("--prompt", given, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["texts"][0]["ids"] == model.prompt_ids(TEXT)


def test_routing_of_rows(run, model, capsys):
    with open("rows.jsonl", "w", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) + "\n" for row in ROWS))
    assert run("--rows", "rows.jsonl", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    raw, whole, opened, ids = [text["ids"] for text in found["texts"]]
    tokenizer, format = model.tokenizer, model.chat_format
    assert raw == tokenizer.encode("raw 17")
    options = {"format": format, "tokenizer": tokenizer, "keep_thinking": "all"}
    assert whole == render(MESSAGES, add_generation_prompt=False, **options)
    assert opened == render(MESSAGES[:1], **options)
    assert ids == [5, 6, 7]
    assert found["label_tokens"]["reasoning"] > 0
    assert found["num_tokens"] == sum(map(len, (raw, whole, opened, ids)))


def test_routing_of_messages(run, model, capsys):
    with open("messages.json", "w", encoding="utf-8") as file:
        json.dump(MESSAGES[:1], file)
    assert run("--messages", "messages.json", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["texts"][0]["ids"] == model.prompt_ids(TEXT)


# ---- what is wrong --------------------------------------------------------------------------------------------------

BAD_ROWS = {
    '{"text": 7}': "text must be a string (got int)",
    '{"messages": {}}': "messages must be a list (got dict)",
    '{"messages": [], "tools": 1}': "tools must be a list (got int)",
    '{"ids": "a"}': "ids must be a list (got str)",
    "{}": "must be {",
    '{"text": "a", "ids": [1]}': "must be {",
    "[1]": "must be {",
    "{": "must be valid JSON",
    '{"ids": [NaN]}': "numbers must be finite (got NaN)",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_routing_names_the_row_that_is_wrong(run, not_loaded, capsys, row):
    with open("rows", "w", encoding="utf-8") as file:
        file.write('{"text": "a"}\n\n' + row)
    assert run("--rows", "rows") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"kimi-native: error: rows: line 3: {BAD_ROWS[row]}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages: must hold at least one message (got 0)"),
        ({"messages": [{"role": "none", "content": ""}]}, "message: role must be one of"),
        ({"messages": [7]}, "message: must be an object (got int)"),
        ({"messages": MESSAGES, "tools": [7]}, "tool: must be"),
        ({"ids": [True]}, "engine: prompt ids must be integers"),
        ({"text": ""}, "engine: prompt must hold at least one token (got none)"),
    ],
)
def test_routing_names_the_row_that_cannot_be_a_prompt(run, capsys, row, message):
    with open("rows", "w", encoding="utf-8") as file:
        file.write(json.dumps(row))
    assert run("--rows", "rows") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"kimi-native: error: rows: line 1: {message}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", ""], "routing: the prompt must not be empty (got nothing from '')"),
        (["--prompt", "@none"], "none: cannot be used (got No such file or directory)"),
        (["--prompt", "@bytes"], "bytes: must be UTF-8 text"),
        (["--rows", "empty"], "empty: must hold at least one row (got none)"),
        (["--messages", "empty"], "empty: must be valid JSON"),
        (["--messages", "object"], "object: messages must be a JSON list (got dict)"),
        (["--prompt", "a", "--json", "none/a"], "none/a: must be writable (got No such file"),
        (["--prompt", "a", "--png", "."], ".: must be the name of an ordinary file"),
        (["--prompt", "a", "--html", os.devnull], f"{os.devnull}: must be the name of an ordinary"),
    ],
)
def test_routing_errors_are_one_line_and_cost_no_loading(run, not_loaded, capsys, argv, message):
    for name, data in (("bytes", b"\xff"), ("empty", b""), ("object", b"{}")):
        with open(name, "wb") as file:
            file.write(data)
    assert run(*argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"kimi-native: error: {message}")
    assert err.count("\n") == 1


def test_routing_without_matplotlib_is_told_before_loading(run, not_loaded, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("--prompt", "a", "--png", "a.png") == 1
    err = capsys.readouterr().err
    assert err.startswith("kimi-native: error: routing: matplotlib must be installed for --png")
    assert os.listdir() == []


@pytest.mark.parametrize(
    "values",
    [
        {
            "n_routed_experts": None,
            "n_shared_experts": None,
            "first_k_dense_replace": 3,
        },
        {"first_k_dense_replace": 3},
    ],
)
def test_routing_of_a_dense_model_names_the_key(tmp_path, not_loaded, capsys, values):
    write_checkpoint(tmp_path / "dense", TINY | values, {})
    assert cli.main(["routing", str(tmp_path / "dense"), "--prompt", "a"]) == 1
    key = next(iter(values))
    err = capsys.readouterr().err
    assert err.startswith("kimi-native: error: routing: the model must have ")
    assert key in err


def test_routing_that_fails_while_writing_leaves_no_part(run, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert run("--prompt", "a", "--html", "a.html") == 1
    assert "a.html: must be writable (got No space left on device)" in capsys.readouterr().err
    assert os.listdir() == []


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--prompt", "a", "--rows", "b"],
        ["--rows", "b", "--raw-prompt"],
        ["--prompt", "a", "--max-tokens", "-1"],
        ["--prompt", "a", "--png", "-"],
        ["--prompt", "a", "--json", "x", "--html", "./x"],
        ["--prompt", "a", "--labels", "kinds"],
    ],
)
def test_routing_wrong_usage_is_exit_code_2(run, not_loaded, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2
    assert "usage: kimi-native routing" in capsys.readouterr().err
