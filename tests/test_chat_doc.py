"""docs/chat.md is true: its programs print what stands below them."""

from __future__ import annotations

import re
from pathlib import Path

from kimi_native.chat.template import FORMATS
from kimi_native.make_checkpoint import make_checkpoint

DOC = (Path(__file__).resolve().parents[1] / "docs" / "chat.md").read_text()


def test_doc_of_prompts_and_answers_prints_what_it_says(tmp_path, monkeypatch, capsys):
    programs = re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL)
    assert len(programs) == DOC.count("```python") == 6
    make_checkpoint(tmp_path / "tiny-k2")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for program, printed in programs:
        exec(compile(program, "chat.md", "exec"), names)
        assert capsys.readouterr().out == printed


def test_doc_of_prompts_and_answers_names_every_format():
    table = DOC[DOC.index("## Formats") : DOC.index("```python")]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == list(FORMATS)
