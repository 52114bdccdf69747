"""Training runs: learning, going on bit by bit, stopping by name, and the command."""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import pytest
import torch

import kimi_native
from graphs import small_graph, small_values
from kimi_native.checkpoint import Checkpoint
from kimi_native.checkpoint_writer import FolderWriter
from kimi_native.errors import CheckpointWriteError, DivergedError, ModelFormatError, RequestError
from kimi_native.folder_names import NANO_FOLDER
from kimi_native.nano import train
from kimi_native.nano.plot import plot_log
from kimi_native.nano.settings import TrainSettings
from kimi_native.nano.text_rows import read_rows
from kimi_native.nano.toy import CopyTask
from kimi_native.nano.train_log import LOG_NAME, read_log
from kimi_native.nano.train_state import COUNTS, STATE_NAME, save_state
from kimi_native.nano.trainer import Trainer, evaluate
from kimi_native.quant.export import export_checkpoint
from kimi_native.tokenizer_files import tokenizer_files
from oracle import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = CopyTask(600, 2, 6)
VALUES = small_values()
SETTINGS = {
    "steps": 8,
    "tokens_per_step": 120,
    "warmup_steps": 2,
    "decay_steps": 3,
    "qat_from": 4,
    "stretch_chance": 0.5,
    "stretch_to": 3000,
    "stretch_jumps": 2,
    "highest_temperature": 1.2,
    "log_every": 1,
    "logit_limit": 3.0,  # low enough for QK-Clip to work
}


def trainer(folder, task=TASK, values=VALUES, **changes) -> Trainer:
    return Trainer(values, task, folder, TrainSettings(**(SETTINGS | changes)))


def state(t: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in t._tensors().items()}


def assert_same_state(a: Trainer, b: Trainer) -> None:
    assert (a.steps_done, a.counter, a.optimizer.steps) == (
        b.steps_done,
        b.counter,
        b.optimizer.steps,
    )
    for (name, x), (other, y) in zip(state(a).items(), state(b).items(), strict=True):
        assert name == other
        assert_same_bits(x, y)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without a stop."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    t = trainer(tmp_path_factory.mktemp("whole"))
    assert t.run()
    torch.set_num_threads(before)
    return t


def interrupt_after(steps: int, number: int = signal.SIGINT):
    """A progress function that sends this process a signal."""

    def progress(report) -> None:
        if report.step + 1 == steps:
            os.kill(os.getpid(), number)

    return progress


# ---- learning -------------------------------------------------------------------------------------------------------


def test_train_learns_to_copy(tmp_path):
    """A tiny model and vocabulary, quantized weights at the end: nothing is left to learn, on unseen sequences too."""
    values = small_values(vocab_size=512, num_hidden_layers=2)
    settings = TrainSettings(
        steps=80,
        tokens_per_step=360,
        learning_rate=0.02,
        warmup_steps=10,
        decay_steps=30,
        qat_from=60,
        dtype="float32",
    )
    t = Trainer(values, CopyTask(12, 4, 4), tmp_path, settings)
    losses: list[float] = []
    t.run(lambda report: losses.append(report.loss))
    loss, accuracy = evaluate(t.graph, CopyTask(12, 4, 4, seed=1), tokens=2000)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.4f}; held out {loss:.4f}, {accuracy:.1%} right")
    assert losses[0] > 2.3 > 0.05 > loss
    assert accuracy > 0.99


def test_train_follows_the_recipe(whole):
    """What the log says of each step: rates of the schedule, QAT from its step, every choice of an expert counted."""
    steps = read_log(whole.folder.path / LOG_NAME)
    assert [s["step"] for s in steps] == list(range(8))
    assert [s["qat"] for s in steps] == [False] * 4 + [True] * 4
    schedule = TrainSettings(**SETTINGS).schedule()
    assert [s["learning_rate"] for s in steps] == [schedule.at(i) for i in range(8)]
    assert sum(s["clipped_heads"] for s in steps) > 0
    for s in steps:
        assert 60 < s["tokens"] <= 120
        assert [sum(load) for load in s["loads"]] == [3 * s["tokens"]] * 2
    bias = whole.graph.model.layers[1].mlp.gate.e_score_correction_bias
    assert 0 < bias.abs().max() <= 8 * 1e-3 * 1.001


def test_train_without_bias_rate_leaves_the_bias(tmp_path):
    t = trainer(tmp_path, steps=2, warmup_steps=0, decay_steps=0, bias_rate=0.0)
    t.run()
    assert t.graph.model.layers[1].mlp.gate.e_score_correction_bias.abs().max() == 0


def test_train_bias_stops_where_told(tmp_path):
    first = trainer(tmp_path / "a", bias_until=1)
    first.run()
    largest = first.graph.model.layers[1].mlp.gate.e_score_correction_bias.abs().max().item()
    assert largest == pytest.approx(1e-3)


def test_train_clips_the_gradient(tmp_path):
    t = trainer(tmp_path, clip_norm=1e-3)
    batch = t._batch(0)
    t._step(batch)
    grads = [p.grad.norm() for p in t.graph.parameters()]
    assert torch.stack(grads).norm().item() == pytest.approx(1e-3, rel=1e-4)


def test_train_starts_from_a_checkpoint(tmp_path):
    export_checkpoint(small_graph(seed=5), tmp_path / "start", VALUES)
    start = Checkpoint.open(tmp_path / "start")
    t = Trainer(VALUES, TASK, tmp_path / "run", TrainSettings(**SETTINGS), start=start)
    stored = start.tensor("model.norm.weight").float()
    assert torch.equal(t.graph.model.norm.weight, stored)


def test_train_looks_at_held_out_data(tmp_path):
    settings = TrainSettings(
        **SETTINGS | {"held_out_every": 3, "held_out_tokens": 100, "log_every": 4}
    )
    t = Trainer(VALUES, TASK, tmp_path, settings, held_out=CopyTask(600, 2, 6, seed=9))
    t.run()
    looked = {s["step"]: s["held_out_loss"] is not None for s in read_log(tmp_path / LOG_NAME)}
    assert looked == {0: False, 2: True, 4: False, 5: True, 7: True}


# ---- going on -------------------------------------------------------------------------------------------------------


def test_train_is_the_same_every_time(tmp_path, whole):
    again = trainer(tmp_path)
    again.run()
    assert_same_state(again, whole)


def test_train_depends_on_the_seed(tmp_path, whole):
    other = trainer(tmp_path, seed=1)
    other.run()
    assert not torch.equal(other.graph.lm_head.weight, whole.graph.lm_head.weight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_train_goes_on_bit_by_bit(tmp_path, whole, stop, number):
    """Stopped by a signal before, at and after the change to quantized weights, and continued by a new object."""
    first = trainer(tmp_path)
    assert not first.run(interrupt_after(stop, number))
    assert first.steps_done == stop
    second = trainer(tmp_path)
    assert second.steps_done == stop
    assert_same_state(first, second)
    assert second.run()
    assert_same_state(second, whole)
    logged, expected = (read_log(t.folder.path / LOG_NAME) for t in (second, whole))
    timeless = [[v for k, v in s.items() if "seconds" not in k] for s in logged]
    assert timeless == [[v for k, v in s.items() if "seconds" not in k] for s in expected]


def test_train_goes_on_after_a_crash_from_the_last_saved_state(tmp_path, whole):
    """The log is ahead of the state then: its lines are cut back and written again."""

    class Crash(Exception):
        pass

    def crash(report) -> None:
        if report.step == 4:
            raise Crash

    with pytest.raises(Crash):
        trainer(tmp_path, save_every=3).run(crash)
    with open(tmp_path / LOG_NAME, "a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote
    second = trainer(tmp_path, save_every=3)
    assert second.steps_done == 3
    second.run()
    assert_same_state(second, whole)
    assert [s["step"] for s in read_log(tmp_path / LOG_NAME)] == list(range(8))


def test_train_a_failed_save_keeps_the_old_state(tmp_path, monkeypatch):
    t = trainer(tmp_path, steps=6, save_every=2)
    real = os.fsync

    def fail(handle) -> None:
        if t.steps_done >= 4:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointWriteError, match=r"cannot write .*No space left"):
        t.run()
    monkeypatch.undo()
    assert trainer(tmp_path, steps=6).steps_done == 2
    assert not list(tmp_path.glob("*.part"))


def test_train_two_at_once_are_refused(tmp_path):
    t = trainer(tmp_path)
    with t.folder.locked(), pytest.raises(CheckpointWriteError, match="another process"):
        trainer(tmp_path).run()


def test_train_a_finished_run_has_nothing_to_do(whole):
    again = trainer(whole.folder.path)
    steps = []
    assert again.run(steps.append)
    assert steps == []
    assert_same_state(again, whole)


def test_train_goes_further_than_it_was_told_first(whole, tmp_path):
    (tmp_path / STATE_NAME).write_bytes((whole.folder.path / STATE_NAME).read_bytes())
    longer = trainer(tmp_path, steps=9, decay_steps=1)
    assert longer.run()
    assert longer.steps_done == 9


def test_train_goes_on_with_as_many_threads_as_it_began(whole, tmp_path):
    (tmp_path / STATE_NAME).write_bytes((whole.folder.path / STATE_NAME).read_bytes())
    torch.set_num_threads(2)
    trainer(tmp_path)
    assert torch.get_num_threads() == 1
    with pytest.raises(RequestError, match=r"another setting: threads must be 1 \(got 2\)"):
        trainer(tmp_path, threads=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"another settings: learning_rate must be 0.003 \(got 0.5\)"),
        ({"task": CopyTask(600, 2, 6, seed=4)}, "another dataset: first must be"),
        ({"task": CopyTask(600, 2, 6, examples=5)}, "another dataset: length must be 1048576"),
        ({"values": VALUES | {"aux_loss_alpha": 0.5}}, "another config: aux_loss_alpha must be"),
    ],
)
def test_train_refuses_to_go_on_with_something_else(whole, tmp_path, changes, message):
    (tmp_path / STATE_NAME).write_bytes((whole.folder.path / STATE_NAME).read_bytes())
    with pytest.raises(RequestError, match=message):
        trainer(tmp_path, **changes)


def test_train_refuses_to_go_on_from_another_start(whole, tmp_path):
    for seed in (5, 6):
        export_checkpoint(small_graph(seed=seed), tmp_path / f"start-{seed}", VALUES)

    def begun(seed: int | None) -> Trainer:
        start = None if seed is None else Checkpoint.open(tmp_path / f"start-{seed}")
        return Trainer(VALUES, TASK, tmp_path / "run", TrainSettings(**SETTINGS), start=start)

    begun(5).save()
    begun(5)
    for seed in (6, None):
        with pytest.raises(RequestError, match="another start: weights must be"):
            begun(seed)


def test_train_refuses_to_go_on_with_rows_that_were_changed(tmp_path):
    def begun(text: str) -> Trainer:
        (tmp_path / "rows").write_text("".join(f'{{"text": "{t}"}}\n' for t in ("abc", text)))
        rows = read_rows(
            tmp_path / "rows", lambda t: [ord(c) for c in t], vocab_size=128, max_tokens=9
        )
        return trainer(tmp_path / "run", rows)

    begun("def").save()
    begun("def")
    with pytest.raises(RequestError, match="another dataset: rows must be"):
        begun("deg")


def test_train_refuses_a_broken_state(whole, tmp_path):
    content = (whole.folder.path / STATE_NAME).read_bytes()
    (tmp_path / STATE_NAME).write_bytes(content[:-5])
    with pytest.raises(ModelFormatError, match="bytes"):
        trainer(tmp_path)
    export_checkpoint(small_graph(), tmp_path / "model", VALUES)
    shard = next((tmp_path / "model").glob("*.safetensors"))
    (tmp_path / STATE_NAME).write_bytes(shard.read_bytes())
    with pytest.raises(ModelFormatError, match="must be the state of a training run"):
        trainer(tmp_path)
    counts = whole._began | dict.fromkeys(COUNTS, 1)
    for run, message in (
        (counts | {"counter": -1}, r"counter must be a count \(got -1\)"),
        (counts | {"steps_done": True}, r"steps_done must be a count \(got True\)"),
        (counts, r"must be those of the model and its optimizer \(got 1 others, first mean"),
    ):
        tensors = {n: t for n, t in whole._tensors().items() if n != "mean.lm_head.weight"}
        save_state(FolderWriter("train", tmp_path), tensors, run)
        with pytest.raises(ModelFormatError, match=message):
            trainer(tmp_path)


# ---- stopping by name -----------------------------------------------------------------------------------------------


def test_train_names_the_weight_that_diverged(tmp_path):
    t = trainer(tmp_path, steps=20, warmup_steps=0, decay_steps=0, learning_rate=1e6)
    with pytest.raises(
        DivergedError, match=r"step \d: the (weight|gradient|loss) .*must be finite"
    ):
        t.run()


def test_train_names_a_gradient_that_is_not_finite(tmp_path):
    t = trainer(tmp_path)
    t.graph.model.layers[1].self_attn.o_proj.weight.register_hook(lambda g: g * torch.nan)
    message = r"step 0: the gradient of model\.layers\.1\.self_attn\.o_proj\.weight must be finite \(got norm nan\)"
    with pytest.raises(DivergedError, match=message):
        t.run()
    assert not (tmp_path / STATE_NAME).exists()


def test_train_names_the_module_behind_a_loss_that_is_not_finite(tmp_path):
    t = trainer(tmp_path)
    with torch.no_grad():
        t.graph.model.layers[1].post_attention_layernorm.weight[3] = torch.inf
    with pytest.raises(
        DivergedError,
        match=r"step 0: the loss must be finite \(got nan, from the output of "
        r"model\.layers\.1\.post_attention_layernorm\)",
    ):
        t.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps must be at least 1 \(got 0\)"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and positive"),
        ({"learning_rate": 1e7}, "learning_rate must be at most 1e6"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative"),
        ({"dtype": "float16"}, r"dtype must be bfloat16 or float32 \(got float16\)"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"qat_from": -1}, "qat_from must be a step"),
        ({"warmup_steps": 900}, "fit into steps"),
        ({"stretch_chance": 2.0}, "chance must be 0 to 1"),
        ({"highest_temperature": 0.9}, "highest_temperature must be finite and at least 1"),
    ],
)
def test_train_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**changes)


# ---- the command ----------------------------------------------------------------------------------------------------

SHORT = "--data copy --steps 3 --warmup-steps 1 --decay-steps 1 --tokens-per-step 60 --log-every 1".split()  # noqa: SIM905


def config_file(tmp_path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(VALUES))
    return str(file)


def test_train_command_exports_what_runs(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [str(out), "--config", config_file(tmp_path), *SHORT, "--qat-from", "1"]
    assert train.main([*arguments, "--plot", str(tmp_path / "log.png")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["format"] == "int4"
    assert (tmp_path / "log.png").stat().st_size > 10_000
    model = kimi_native.load(summary["path"])
    assert len(model.generate("Hello", max_tokens=2).ids) <= 2
    assert train.main(arguments) == 0  # a finished run is exported again
    assert "going on after step 3" in capsys.readouterr().err


def test_train_command_reads_rows_and_reports_bad_ones(tmp_path, capsys):
    (tmp_path / "start").mkdir()
    export_checkpoint(
        small_graph(), tmp_path / "start", VALUES, files=tokenizer_files(600), overwrite=True
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "Once upon a time"}\n{"txt": 1}\n{"text": "Good morning, how"}\n')
    arguments = ["--start", str(tmp_path / "start"), *SHORT, "--data", str(rows)]
    assert train.main([str(tmp_path / "run"), *arguments]) == 0
    said = capsys.readouterr()
    assert "2 rows used, 1 not (line 2: must be" in said.err
    assert json.loads(said.out)["format"] == "bf16"


def test_train_command_shows_its_progress_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert train.main([str(tmp_path / "run"), "--config", config_file(tmp_path), *SHORT]) == 0
    shown = capsys.readouterr().err
    assert re.search(r"step 3/3 .*loss \d+\.\d{4}  [\d,]+ tokens/s", shown)


def test_train_command_without_matplotlib_says_so_before_it_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = [str(tmp_path / "run"), "--config", config_file(tmp_path), *SHORT]
    assert train.main([*arguments, "--plot", str(tmp_path / "log.png")]) == 1
    assert "plot: matplotlib must be installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/log.png", r"none/log\.png: must be writable \(got No such file"),
        (".", "plot: .* must end in one of .*png"),
        ("log.txyz", r"plot: .*log\.txyz must end in one of .*png.* \(got 'txyz'\)"),
    ],
)
def test_train_command_says_what_it_cannot_draw_before_it_trains(tmp_path, capsys, name, message):
    arguments = [str(tmp_path / "run"), "--config", config_file(tmp_path), *SHORT]
    assert train.main([*arguments, "--plot", str(tmp_path / name)]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_train_command_exports_before_it_draws(tmp_path, capsys, monkeypatch):
    def fail(log, picture):
        raise RequestError(f"plot: {picture} cannot be written")

    monkeypatch.setattr(train, "plot_log", fail)
    arguments = [str(tmp_path / "run"), "--config", config_file(tmp_path), *SHORT]
    assert train.main([*arguments, "--plot", str(tmp_path / "log.png")]) == 1
    said = capsys.readouterr()
    assert "cannot be written" in said.err
    assert Checkpoint.open(json.loads(said.out)["path"]).tensors


def test_plot_refuses_what_it_cannot_draw(whole, tmp_path):
    log = whole.folder.path / LOG_NAME
    with pytest.raises(RequestError, match=r"log\.txyz cannot be written"):
        plot_log(log, tmp_path / "log.txyz")
    with pytest.raises(RequestError, match=r"must have steps \(got none\)"):
        plot_log(tmp_path / "none.jsonl", tmp_path / "log.png")


def test_log_with_a_broken_line_is_refused(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 0}\nbroken\n{"step": 2}\n{"st')
    with pytest.raises(ModelFormatError, match="line 2 must be a step"):
        read_log(file)


def test_train_command_learns_kimi_nanos_conversations(tmp_path, capsys):
    """The default data with the default preset's vocabulary; what is looked at is held out."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(small_values(vocab_size=1392)))
    model = ["--config", str(file), "--tokenizer", str(NANO_FOLDER)]
    looks = ["--held-out-every", "2", "--held-out-tokens", "12288", "--tokens-per-step", "12288"]
    assert train.main([str(tmp_path / "run"), *model, *SHORT, "--data", "world", *looks]) == 0
    steps = read_log(tmp_path / "run" / LOG_NAME)
    assert [s["held_out_loss"] is not None for s in steps] == [False, True, True]
    folder = json.loads(capsys.readouterr().out)["path"]
    assert kimi_native.load(folder).generate("1 + 1", max_tokens=1).ids


def test_train_command_stops_at_an_interrupt_and_goes_on(tmp_path, capsys, monkeypatch):
    arguments = [str(tmp_path / "run"), "--config", config_file(tmp_path), *SHORT]
    real = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, progress: real(self, interrupt_after(2)))
    assert train.main(arguments) == 130
    assert "stopped after step 2; the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert train.main(arguments) == 0
    assert "going on after step 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be at least 1"),
        (["--start", "nowhere"], "nowhere: must be a model folder (found none)"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: must be a readable file"),
    ],
)
def test_train_command_names_errors(tmp_path, capsys, arguments, message):
    assert train.main([str(tmp_path / "run"), *arguments]) == 1
    assert message in capsys.readouterr().err
