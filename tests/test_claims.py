"""The experiments of `kimi-native claims`, played by the expert, whose accuracy is known."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from kimi_native import cli
from kimi_native.claims import command, int4, interleaved
from kimi_native.claims.interleaved import Cell, calls_per_step, derived, fits, play, popular
from kimi_native.claims.kept_rows import KeptRows
from kimi_native.errors import RequestError
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.nano import expert
from kimi_native.nano.evaluate import Share
from kimi_native.nano.vocabulary import write_vocabulary


def the_expert(episodes):
    return [expert.answer(episode.messages) for episode in episodes]


def test_interleaved_plans_play_what_they_claim():
    for quick in (True, False):
        plan = interleaved.cells(quick=quick)
        assert len(set(plan)) == len(plan)
        for mode in ("interleaved", "plan-first"):
            rates = {c.failure_rate for c in plan if c.mode == mode and c.num_steps == 20}
            assert {0.0, 0.1} <= rates
    lengths = {cell.num_steps for cell in interleaved.cells(quick=False)}
    assert lengths == {5, 10, 20, 30, 50, 100, 150, 200}


def test_interleaved_counts_calls_of_a_step():
    """Against the calls that the expert makes where nothing fails."""
    plan = [Cell("interleaved", 12, 0.0, 30), Cell("interleaved", 5, 0.0, 7)]
    made = sum(row["false_alarms"]["trials"] for row in play(the_expert, plan, seed=3, done=print))
    assert calls_per_step(plan, seed=3) == pytest.approx(made / (12 * 30 + 5 * 7), rel=1e-12)


def test_interleaved_accounts_agree_with_a_simulation():
    """A step of `calls` calls, each repeated as long as its failure is noticed, 200,000 times."""
    rng = random.Random(0)
    rate, catch, calls, trials = 0.2, 0.7, 2, 200_000
    right = 0
    for _ in range(trials):
        lost = False
        for _ in range(calls):
            failed = rng.random() < rate
            while failed and rng.random() < catch:
                failed = rng.random() < rate
            lost |= failed
        right += not lost
    expected = derived(rate, catch, calls, 1.0)
    assert abs(right / trials - expected) < 5 * (expected * (1 - expected) / trials) ** 0.5
    assert derived(rate, 0.0, 1, 0.9) == pytest.approx(0.9 * popular(rate, 0.0), rel=1e-12)
    assert popular(0.1, 0.8) ** 50 == pytest.approx(0.364, abs=1e-3)
    assert popular(0.1, 0.0) ** 50 == pytest.approx(0.005, abs=2e-4)


def test_interleaved_fits_the_expert():
    """No failures: every step right. With failures: the derived account within the interval of what was counted."""
    plan = [
        Cell(mode, n, e, 60)
        for mode in ("interleaved", "plan-first")
        for e in (0.0, 0.2)
        for n in (4, 10)
    ]
    rows = play(the_expert, plan, seed=1, done=print)
    found = {(f["mode"], f["failure_rate"]): f for f in fits(rows, calls_per_step(plan, seed=1))}
    assert len(found) == 4
    for mode in ("interleaved", "plan-first"):
        assert found[mode, 0.0]["step"] == {"count": 840, "trials": 840}
        fit = found[mode, 0.2]
        low, high = Share(**fit["step"]).interval(z=4)
        assert low < fit["derived"] < high
    assert found["plan-first", 0.2]["caught"]["count"] == 0
    assert found["interleaved", 0.2]["popular"] > found["plan-first", 0.2]["popular"]


def test_interleaved_plays_no_cell_twice(tmp_path):
    """The second time the kept rows are what comes back, and nobody is asked; a line that was cut off is played."""
    plan = [Cell("interleaved", 2, 0.2, 5), Cell("plan-first", 3, 0.0, 4)]
    path, of = tmp_path / "cells.jsonl", {"seed": 1}
    rows = play(the_expert, plan, seed=1, done=print, kept=KeptRows(path, of))

    def nobody(episodes):
        raise AssertionError

    again = play(nobody, plan, seed=1, done=print, kept=KeptRows(path, of))
    assert again == json.loads(json.dumps(rows))
    path.write_text(path.read_text()[:-3])
    with pytest.raises(AssertionError):
        play(nobody, plan, seed=1, done=print, kept=KeptRows(path, of))
    more = play(the_expert, plan, seed=1, done=print, kept=KeptRows(path, of))
    assert more[0] == again[0]
    assert [row["solved"] for row in more] == [row["solved"] for row in again]
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('{"of": {"seed": 2}}\n', "must be of the same model, settings and seed"),
        ("hello\n", "must hold JSON lines"),
        ('{"of": {"seed": 1}}\n{"row": 1}\n', "must hold JSON lines"),
        ("[]\n", "must hold JSON lines"),
    ],
)
def test_interleaved_other_rows_are_refused(tmp_path, text, rule):
    (tmp_path / "cells.jsonl").write_text(text)
    with pytest.raises(RequestError, match=rule):
        KeptRows(tmp_path / "cells.jsonl", {"seed": 1})
    assert (tmp_path / "cells.jsonl").read_text() == text


# ---- the verb -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    make_checkpoint(tmp_path / "model", preset="nano", format="int4")
    write_vocabulary(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def small(monkeypatch):
    plan = (Cell("interleaved", 2, 0.5, 2), Cell("plan-first", 2, 0.0, 2))
    monkeypatch.setattr(interleaved, "cells", lambda *, quick: plan)


def test_claims_prints_and_writes(folder, small, tmp_path, capsys):
    """A model that has learned nothing: all is lost, and said so."""
    out = tmp_path / "out"
    argv = ["claims", "interleaved", "--quick", "--model", str(folder), "--out", str(out)]
    argv += ["--max-context", "1024"]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert "interleaved, 2 steps, 50 % fail" in text
    assert "0.0 % [0.0, 65.8] solved" in text
    result = json.loads((out / "interleaved.json").read_text())
    assert [row["solved"] for row in result["cells"]] == [{"count": 0, "trials": 2}] * 2
    assert (out / "interleaved.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(argv) == 0  # played before: the same table, no row more
    assert capsys.readouterr().out == text
    assert len((out / "interleaved-cells.jsonl").read_text().splitlines()) == 3
    assert cli.main([*argv, "--seed", "1"]) == 1
    assert "name another folder" in capsys.readouterr().err
    assert cli.main([*argv, "--dense", "int8"]) == 1
    assert "name another folder" in capsys.readouterr().err
    only = [*argv, "--json", "--lengths", "2,5", "--failure-rates", "0.5"]
    assert cli.main(only) == 0
    (cell,) = json.loads(capsys.readouterr().out)["interleaved"]["cells"]
    assert (cell["mode"], cell["failure_rate"]) == ("interleaved", 0.5)
    with pytest.raises(SystemExit):
        cli.main([*argv, "--lengths", "5,ten"])
    assert "must be numbers with commas (got '5,ten')" in capsys.readouterr().err
    assert cli.main([*argv, "--lengths", "3"]) == 1
    assert (
        "must have a cell left (got lengths (3.0,), failure rates None)" in capsys.readouterr().err
    )


def test_claims_without_matplotlib_prints_tables(folder, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    out = tmp_path / "out"
    argv = ["claims", "interleaved", "--model", str(folder), "--out", str(out), "--json"]
    argv += ["--max-context", "1024"]
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["interleaved"]["cells"]
    assert "no picture: plot: matplotlib must be installed" in said.err
    assert not (out / "interleaved.png").exists()


def test_claims_tells_each_result_before_the_next_experiment(
    folder, small, tmp_path, monkeypatch, capsys
):
    def fail(args):
        raise RequestError("int4: broken")

    monkeypatch.setitem(command.CLAIMS, "int4", fail)
    out = tmp_path / "out"
    argv = ["claims", "interleaved", "int4", "--model", str(folder), "--out", str(out)]
    assert cli.main([*argv, "--max-context", "1024"]) == 1
    said = capsys.readouterr()
    assert "int4: broken" in said.err
    assert "plan-first, 2 steps, 0 % fail" in said.out
    assert "failures caught: of none" in said.out
    assert (out / "interleaved.json").exists()


def test_claims_bad_arguments_are_named(folder, tmp_path, capsys):
    assert cli.main(["claims", "magic", "--model", str(folder)]) == 1
    assert f"must be of {', '.join(command.CLAIMS)} (got magic)" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["claims", "--model", str(folder), "--out", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err


# ---- int4 -----------------------------------------------------------------------------------------------------------


def test_int4_kl_divergence_is_the_definition():
    g = torch.Generator().manual_seed(0)
    base, other = torch.randn(50, 7, generator=g), torch.randn(50, 7, generator=g)
    each = []
    for a, b in zip(base.double().numpy(), other.double().numpy(), strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        each.append(float((p * np.log(p / q)).sum()))
    found = int4.kl_divergence(base, other)
    assert found["mean"] == pytest.approx(np.mean(each), rel=1e-6)
    assert found["error"] == pytest.approx(np.std(each, ddof=1) / 50**0.5, rel=1e-6)
    assert int4.kl_divergence(base, base)["mean"] == 0


def test_claims_int4_compares_four_checkpoints(folder, tmp_path, monkeypatch, capsys):
    """A few steps from random weights: what is written differs as it should, and a second run repeats the numbers."""
    monkeypatch.setattr(int4, "QUICK", int4.Plan(2, 4096, 2, num_steps=1))
    monkeypatch.setattr(int4, "DECODED", 4)
    out = tmp_path / "out"
    formats, load_model = [], command.load_model

    def loaded(*args, **options):
        model = load_model(*args, **options)
        formats.append(model.chat_format)
        return model

    monkeypatch.setattr(command, "load_model", loaded)
    argv = ["claims", "int4", "--quick", "--model", str(folder), "--out", str(out)]
    argv += ["--max-context", "512", "--json"]
    assert cli.main(argv) == 0
    rows = {r["variant"]: r for r in json.loads(capsys.readouterr().out)["int4"]["rows"]}
    assert list(rows) == list(int4.VARIANTS)
    assert set(formats) == {"k2-thinking"}  # the BF16 copy's too
    assert rows["bf16"]["kl"]["mean"] == 0
    assert min(rows[name]["kl"]["mean"] for name in int4.VARIANTS[1:]) > 0
    assert len({row["loss"] for row in rows.values()}) == 4
    assert len({rows[name]["bytes"] for name in int4.VARIANTS[1:]}) == 1
    assert rows["bf16"]["bytes"] > 2 * rows["qat"]["bytes"]
    assert (out / "int4.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(argv) == 0
    again = {r["variant"]: r for r in json.loads(capsys.readouterr().out)["int4"]["rows"]}
    for row in (*rows.values(), *again.values()):
        del row["tokens_per_s"]
    assert again == rows
