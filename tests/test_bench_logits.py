"""kimi-native bench logits: differences are what they are called, and each option of load() is really compared."""

from __future__ import annotations

import json
import math

import pytest
import torch

from kimi_native import cli
from kimi_native.bench import logits
from kimi_native.errors import RequestError
from kimi_native.make_checkpoint import make_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("logits") / "tiny"
    make_checkpoint(path, preset="tiny", format="int4")
    return str(path)


def test_differences_of_two_positions_by_hand():
    """Row 0 the same; row 1 moved by 0.2 in all: no divergence. Row 2: probabilities 3/4, 1/4 against 1/4, 3/4."""
    expected = torch.tensor([[0.0, 1.0], [0.0, 1.0], [math.log(3), 0.0]])
    actual = torch.tensor([[0.0, 1.0], [0.2, 1.2], [0.0, math.log(3)]])
    found = logits.differences(expected, actual)
    spread = 2**-0.5  # of 0 and 1
    each = [0, 0, 0.5 * math.log(3)]
    assert found["tokens"] == 3
    assert found["same_best"] == 2
    assert found["rms"] == pytest.approx(0.2 / spread, rel=1e-6)  # the median of 0, this, and more
    assert found["kl"] == pytest.approx(sum(each) / 3, rel=1e-6)
    assert found["kl_error"] == pytest.approx(each[2] / 3, rel=1e-6)  # std of (0, 0, x): x / sqrt 3
    assert logits.differences(expected[:1], actual[:1])["kl_error"] is None


def test_logits_of_a_model_and_its_options(folder):
    rows = []
    logits.compare(folder, prompts=("Hello", "2 + 2"), new_tokens=8, report=rows.append)
    assert [{k: r[k] for k in ("dense", "compute", "cache")} for r in rows] == [
        {"dense": "bf16", "compute": "exact", "cache": "exact", **options}
        for options in logits.VARIANTS
    ]
    assert len({r["tokens"] for r in rows}) == 1
    assert 2 <= rows[0]["tokens"] <= 16
    plain, *others = rows
    assert 1e-4 < plain["rms"] < 0.1  # activations of 8 bits, a few layers
    assert all(0 < r["kl"] < 2 for r in rows)
    assert len({r["rms"] for r in rows}) == len(rows)  # every option was really on
    int4 = [r["rms"] for r in others if r["dense"] == "int4"]
    assert min(int4) > 3 * plain["rms"]  # 15 levels: some 10 % of each dense product
    assert len(list(logits.table(rows))) == 1 + len(rows)


def test_logits_of_the_command(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts"
    prompts.write_text("Hello\n\n  \n")
    command = ["bench", "logits", folder, "--prompts", str(prompts), "--new-tokens", "2"]
    assert cli.main([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["op"] for r in rows] == ["logits"] * len(logits.VARIANTS)
    assert cli.main(command) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("dense  compute  cache")
    assert [line.split()[:3] for line in lines] == [
        [r["dense"], r["compute"], r["cache"]] for r in rows
    ]


def test_logits_refuses_nothing_to_compare(folder, tmp_path, capsys):
    for arguments in ({"prompts": ()}, {"new_tokens": 0}):
        with pytest.raises(RequestError, match="prompts and new_tokens must be at least 1"):
            logits.compare(folder, report=print, **arguments)
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert cli.main(["bench", "logits", folder, "--prompts", str(empty)]) == 1
    assert "prompts and new_tokens must be at least 1 (got 0 and 64)" in capsys.readouterr().err
