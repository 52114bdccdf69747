"""docs/routing.md is true: its command prints what it says but for the digits, its Python runs, its options exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kimi_native import cli
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.routing_page import SHOWN_TOKENS
from kimi_native.routing_report import HEADER
from kimi_native.routing_statistics import SHUFFLES
from kimi_native.token_roles import CHARACTERS, ROLES

DOC = (Path(__file__).resolve().parents[1] / "docs" / "routing.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def in_folder_with_tiny_k2(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "tiny-k2")
    monkeypatch.chdir(tmp_path)


def masked(text: str) -> list[str]:
    """Lines without what depends on the CPU's instruction set: figures, the width they need, which labels come out."""
    lines = re.sub(r"-?\d+(\.\d+)?", "N", re.sub("─+", "─", text)).splitlines()
    return [" ".join(line.split()) for line in lines if not line.startswith("labels:")]


def test_routing_doc_command_prints_what_it_says(in_folder_with_tiny_k2, capsys):
    command, expected = block("console").removeprefix("$ ").split("\n", 1)
    program, *argv = shlex.split(command)
    assert program == "kimi-native"
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert masked(out) == masked(expected)


def test_routing_doc_python_runs(in_folder_with_tiny_k2, capsys):
    exec(compile(block("python"), "routing.md", "exec"), {})
    first, *layers = capsys.readouterr().out.splitlines()
    assert first == "<|im_system|> special (3, 4)"
    assert f"# {first}" in DOC
    assert [line.split()[0] for line in layers] == ["1", "2", "3"]


def test_routing_doc_names_what_there_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["routing", "--help"])
    text = capsys.readouterr().out
    for option in set(re.findall(r"--[a-z][a-z-]+", DOC)) - {"--preset"}:
        assert option in text, option
    table = DOC[DOC.index("| column |") : DOC.index("**Labels.**")]
    rows = re.findall(r"^\| ([a-z/ ]+) \| \w", table, re.MULTILINE)
    assert tuple(rows) == HEADER[1:]
    for name in {*ROLES, *CHARACTERS}:
        assert f"`{name}`" in DOC, name
    assert f"first {SHOWN_TOKENS:,} tokens" in DOC
    assert SHUFFLES == 20  # "twenty times"
