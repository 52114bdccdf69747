"""The command line over a fake model: what goes to stdout, to stderr, and which exit code."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fakes import make_fake_model
from kimi_native import checkpoint, cli, generate, plan, terminal
from kimi_native.errors import CheckpointWriteError, MemoryPlanError, ModelFormatError
from tokenizer_files import small_tokenizer

ANSWER = (
    "<think>Hm.</think>Hello there<|tool_calls_section_begin|><|tool_call_begin|>functions.get:0"
    '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|>'
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def loaded(monkeypatch, tokenizer):
    """Replaces load by one that gives a fake model; returns the model and what load was called with."""
    model, _, _ = make_fake_model(tokenizer, lambda ids: ANSWER, chat_format="k2-thinking")
    calls = []

    def fake_load(path, **options):
        calls.append((path, options))
        return model

    monkeypatch.setattr(generate, "load", fake_load)
    return SimpleNamespace(model=model, calls=calls)


def run(*argv: str) -> int:
    return cli.main(list(argv))


# ---- generate -------------------------------------------------------------------------------------------------------


def test_generate_prints_the_text_alone(loaded, capsys):
    assert run("generate", "--model", "m", "Hi") == 0
    out, err = capsys.readouterr()
    assert out == "Hello there\n"
    assert err == 'kimi-native: the model asks for functions.get:0 with {"a": 1}; nothing was run\n'


def test_generate_json_holds_everything(loaded, capsys):
    assert run("generate", "--model", "m", "--json", "--seed", "5", "Hi") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    expected = loaded.model.generate("Hi", seed=5)
    assert (result["text"], result["reasoning"]) == ("Hello there", "Hm.")
    assert (result["ids"], result["prompt_ids"]) == (expected.ids, expected.prompt_ids)
    assert (result["finish_reason"], result["seed"]) == ("tool_calls", 5)
    assert result["usage"]["total_tokens"] == len(expected.ids) + len(expected.prompt_ids)
    assert result["timing"]["prefill_s"] > 0
    assert result["tool_calls"] == [
        {"id": "functions.get:0", "name": "get", "arguments": '{"a": 1}'}
    ]
    assert err == ""


def test_generate_stream_prints_the_same_text(loaded, capsys):
    assert run("generate", "--model", "m", "--stream", "Hi") == 0
    out, err = capsys.readouterr()
    assert out == "Hello there\n"
    assert "functions.get:0" in err


def test_generate_stream_on_a_terminal_dims_the_reasoning(loaded, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("generate", "--model", "m", "--stream", "Hi") == 0
    assert capsys.readouterr().out == "\x1b[2mHm.\x1b[0m\n\nHello there\n"


def test_generate_on_a_terminal_shows_no_control_characters(capsys, monkeypatch, tokenizer):
    model, _, _ = make_fake_model(tokenizer, lambda ids: "a\x1b]0;owned\x07b\nc\td\x9b")
    monkeypatch.setattr(generate, "load", lambda path, **options: model)
    for options in ([], ["--stream"]):
        monkeypatch.undo()
        monkeypatch.setattr(generate, "load", lambda path, **options: model)
        run("generate", "--model", "m", "Hi", *options)
        assert "\x1b" in capsys.readouterr().out  # a pipe gets the text as it is
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        run("generate", "--model", "m", "Hi", *options)
        assert capsys.readouterr().out == "a�]0;owned�b\nc\td�\n"


@pytest.mark.parametrize("argument", [[], ["-"]])
@pytest.mark.parametrize(("text", "prompt"), [("Hi\n", "Hi"), ("Hi", "Hi"), ("a\n\n", "a\n")])
def test_generate_reads_the_prompt_from_stdin(loaded, monkeypatch, capsys, argument, text, prompt):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert run("generate", "--model", "m", "--json", *argument) == 0
    ids = json.loads(capsys.readouterr().out)["prompt_ids"]
    assert ids == loaded.model.generate(prompt).prompt_ids


def test_generate_on_a_terminal_says_that_it_waits_for_the_prompt(loaded, monkeypatch, capsys):
    stdin = io.StringIO("Hi\n")
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("generate", "--model", "m") == 0
    assert capsys.readouterr().err.startswith("kimi-native: type the prompt, then Ctrl-D")


@pytest.mark.parametrize(
    ("prompt", "stdin", "message"),
    [
        ([], "", r"the prompt must not be empty \(got nothing from stdin\)"),
        ([], "\n", r"the prompt must not be empty \(got nothing from stdin\)"),
        ([""], "", r"the prompt must not be empty \(got nothing from the argument\)"),
        (
            ["ab\udcff"],
            "",
            r"must be UTF-8 text \(got byte 0xff after 2 characters of the argument",
        ),
        (["-"], "é\udc80", r"must be UTF-8 text \(got byte 0x80 after 1 characters of stdin"),
    ],
)
def test_generate_refuses_a_prompt_that_is_none_before_loading(
    loaded, monkeypatch, capsys, prompt, stdin, message
):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    assert run("generate", "--model", "m", *prompt) == 1
    out, err = capsys.readouterr()
    assert (out, loaded.calls) == ("", [])
    assert re.search(message, err), err


def test_generate_in_an_encoding_without_the_answers_characters(tmp_path):
    """Text is shown with replacements, JSON with escapes; neither is cut short."""
    code = (
        "import sys\n"
        "from kimi_native import cli, terminal\n"
        "def doctor(args):\n"
        "    print(terminal.shown('a月b'))\n"
        "    terminal.print_json({'text': 'a月b'})\n"
        "    return 0\n"
        "cli._doctor = doctor\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == b'a?b\n{"text": "a\\u6708b"}\n'


def test_tables_in_a_pipe_have_no_trailing_blanks(capsys):
    terminal.print_table("title", [("name", "value"), ("n", "x" * 300)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title"
    assert not [line for line in lines if line != line.rstrip()]
    assert "  name   value" in lines


@pytest.mark.parametrize("options", [[], ["--stream"]], ids=str)
def test_generate_says_when_the_reasoning_used_up_the_tokens(loaded, capsys, options):
    assert run("generate", "--model", "m", "--max-tokens", "2", "Hi", *options) == 0
    out, err = capsys.readouterr()
    assert out == "\n"
    assert err.startswith("kimi-native: the output ended inside the reasoning")


def test_generate_passes_options_on(loaded, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(
        loaded.model,
        "generate",
        lambda prompt, **options: (
            seen.update(prompt=prompt, **options)
            or SimpleNamespace(text="", reasoning="", tool_calls=())
        ),
    )
    options = "--max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --seed 0 --stop a --stop b"
    machine = (
        "--threads 2 --max-context 99 --dtype float32 --dense int8 --cache fp8 --compute int8 --isa avx2 "
        "--no-prefetch --ignore-config-key k --device cuda:1 --experts cpu"
    )
    argv = f"generate --model m Hi --raw-prompt {options} {machine}".split()
    assert run(*argv) == 0
    assert seen == {
        "prompt": "Hi",
        "raw_prompt": True,
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "seed": 0,
        "stop": ["a", "b"],
    }
    ((path, given),) = loaded.calls
    assert path == "m"
    assert given == {
        "max_context": 99,
        "max_batch": 1,
        "threads": 2,
        "dtype": "float32",
        "dense": "int8",
        "cache": "fp8",
        "compute": "int8",
        "device": "cuda:1",
        "experts": "cpu",
        "isa": "avx2",
        "prefetch": False,
        "ignore_config_keys": ["k"],
        "progress": None,
        "prompt": "Hi",
        "raw_prompt": True,
    }


def test_generate_without_options_leaves_the_defaults_to_the_checkpoint(loaded, monkeypatch):
    seen = []
    monkeypatch.setattr(
        loaded.model,
        "stream",
        lambda prompt, **options: seen.append(options) or iter(()),
    )
    assert run("generate", "--model", "m", "--stream", "Hi") == 0
    assert seen == [{"raw_prompt": False}]


# ---- errors and exit codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModelFormatError("a.safetensors: bad\nheader"), "a.safetensors: bad header"),
        (MemoryPlanError("memory: too much"), "memory: too much"),
        (CheckpointWriteError("op: no room"), "op: no room"),
        (ValueError("op: bad shape"), "op: bad shape"),
        (RuntimeError("op: no kernel"), "op: no kernel"),
        (NotImplementedError("op: not built yet"), "op: not built yet"),
        (FileNotFoundError(2, "No such file", "m/a"), "m/a: cannot be used (got No such file)"),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
        (MemoryError(), "MemoryError"),
    ],
    ids=lambda e: type(e).__name__ if isinstance(e, Exception) else "",
)
def test_errors_are_one_line_and_exit_code_1(monkeypatch, capsys, error, line):
    def fail(path, **options):
        raise error

    monkeypatch.setattr(generate, "load", fail)
    assert run("generate", "--model", "m", "Hi") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"kimi-native: error: {line}\n"
    with pytest.raises(type(error)):
        run("generate", "--model", "m", "Hi", "--debug")


def test_a_bad_sampling_value_is_refused_before_the_model_is_loaded(loaded, capsys):
    assert run("generate", "--model", "m", "Hi", "--top-p", "7") == 1
    assert "sampling: top_p must be" in capsys.readouterr().err
    assert loaded.calls == []


def test_interrupt_while_torch_is_imported_ends_the_process():
    """Extension modules can swallow the exception that an interrupt becomes in Python."""
    code = (
        "import os, signal, sys, types\n"
        "from kimi_native import cli\n"
        "class Swallow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "            except KeyboardInterrupt:\n"
        "                pass\n"
        "sys.meta_path.insert(0, Swallow())\n"
        "cli.main(['doctor', '--quick'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


def test_interrupt_while_the_command_line_is_imported_is_exit_code_130():
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'kimi_native.cli':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from kimi_native.__main__ import main\n"
        "sys.exit(main())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


def test_interrupt_is_exit_code_130(monkeypatch, capsys):
    def interrupted(path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load", interrupted)
    assert run("generate", "--model", "m", "Hi") == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["unknown"],
        ["generate", "--model", "m", "--stream", "--json", "Hi"],
        ["generate", "--model", "m", "--top-k", "x", "Hi"],
        ["generate", "--model", "m", "--dtype", "fp4", "Hi"],
        ["inspect"],
        ["inspect", "a", "--model", "b"],
        ["plan"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2
    assert "usage: kimi-native" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["plan", "--help"]], ids=" ".join)
def test_help_and_version_are_exit_code_0(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 0
    assert "kimi-native" in capsys.readouterr().out


def test_help_imports_no_torch():
    code = (
        "import sys\n"
        "from kimi_native import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'rich' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
    assert result.returncode == 0


def test_python_dash_m_runs_the_command_line():
    result = subprocess.run(
        [sys.executable, "-m", "kimi_native", "plan", "/nonexistent"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("kimi-native: error: ")
    assert result.stderr.count("\n") == 1


# ---- inspect, plan, doctor ------------------------------------------------------------------------------------------

SUMMARY = {
    "model_type": "kimi_k2",
    "quantization": None,
    "parameters": {"total": 1234567, "active_per_token": 1000},
    "bytes": 594_200_000_000,
    "bytes_by_dtype": {"BF16": 2048},
}


@pytest.fixture
def folder(monkeypatch):
    """A checkpoint that opens; its plan needs 3 GB of `folder.available` bytes."""
    state = SimpleNamespace(available=4 * 10**9, asked=[])

    def open_fake(path, *, ignore_keys=()):
        state.asked.append((path, ignore_keys))
        config = SimpleNamespace(max_position_embeddings=262144)
        return SimpleNamespace(path=path, config=config, summary=lambda: dict(SUMMARY))

    def plan_fake(opened, **settings):
        state.asked.append(settings)
        items = (("latent cache", 10**9), ("working memory", 2 * 10**9))
        return plan.MemoryPlan(plan.Settings(**settings), items, state.available, 5, 1, ("slow",))

    monkeypatch.setattr(checkpoint.Checkpoint, "open", open_fake)
    monkeypatch.setattr(plan, "memory_plan", plan_fake)
    return state


@pytest.mark.parametrize("argv", [["inspect", "m"], ["inspect", "--model", "m"]], ids=" ".join)
def test_inspect_prints_the_summary(folder, capsys, argv):
    assert run(*argv, "--ignore-config-key", "k") == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "model type kimi_k2" in rows
    assert "quantization none" in rows
    assert "parameters: total 1,234,567" in rows
    assert "bytes 594.20 GB" in rows
    assert "bytes by dtype: BF16 2.05 kB" in rows
    assert folder.asked[0] == ("m", ["k"])


def test_inspect_json(folder, capsys):
    assert run("inspect", "m", "--json") == 0
    assert json.loads(capsys.readouterr().out) == SUMMARY
    assert run("inspect", "m", "--json", "--plan") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["plan"]["needed_bytes"] == 3 * 10**9
    assert result["bytes"] == SUMMARY["bytes"]


def test_plan_prints_the_table_and_fails_when_it_does_not_fit(folder, capsys):
    assert run("plan", "m") == 0
    out, err = capsys.readouterr()
    assert "3.00 GB" in out
    assert "note: slow" in out
    assert err == ""
    assert folder.asked[1] == {
        "max_context": generate.DEFAULT_CONTEXT,
        "max_batch": 1,
        "dtype": "bfloat16",
        "dense": "bf16",
        "cache": "exact",
    }
    folder.available = 10**9
    for options in ([], ["--json"]):
        assert run("plan", "m", *options) == 1
        out, err = capsys.readouterr()
        assert "3.00 GB" in out or json.loads(out)["fits"] is False
        assert err.startswith("kimi-native: error: memory: the model needs 3.00 GB")
    assert run("inspect", "m", "--plan") == 0


def test_plan_passes_settings_on(folder):
    argv = [
        "plan",
        "m",
        "--max-context",
        "100",
        "--max-batch",
        "3",
        "--dtype",
        "float32",
        "--dense",
        "int4",
        "--cache",
        "fp8",
    ]
    assert run(*argv) == 0
    assert folder.asked[1] == {
        "max_context": 100,
        "max_batch": 3,
        "dtype": "float32",
        "dense": "int4",
        "cache": "fp8",
    }


@pytest.mark.parametrize("verb", [["plan"], ["inspect"], ["inspect", "--plan"]], ids=" ".join)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--max-context 0", "plan: max_context must be 1 to 262144 (got 0)"),
        ("--max-context 262145", "plan: max_context must be 1 to 262144 (got 262145)"),
        ("--max-batch 0", "plan: max_batch must be at least 1 (got 0)"),
    ],
)
def test_plan_and_inspect_refuse_what_load_refuses(folder, capsys, verb, setting, message):
    assert run(*verb, "m", *setting.split()) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"kimi-native: error: {message}\n")
    assert len(folder.asked) == 1  # nothing was planned


@pytest.mark.parametrize("ok", [True, False])
def test_doctor_exit_code_says_whether_the_self_check_passed(monkeypatch, capsys, ok):
    from kimi_native import doctor

    report = {
        "version": "1",
        "kernels": {"KIMI_NATIVE_CPU_ISA": None},
        "self_check": [{"op": "swiglu", "ok": ok, "result": "ok" if ok else "failed: why"}],
        "ok": ok,
    }
    monkeypatch.setattr(doctor, "examine", lambda *, quick: {**report, "quick": quick})
    assert run("doctor", "--json", "--quick") == (0 if ok else 1)
    assert json.loads(capsys.readouterr().out) == {**report, "quick": True}
    assert run("doctor") == (0 if ok else 1)
    out = capsys.readouterr().out
    assert "KIMI_NATIVE_CPU_ISA" in out
    assert ("failed: why" in out) == (not ok)


def test_make_checkpoint_registers_and_runs(monkeypatch, capsys):
    from kimi_native import make_checkpoint

    monkeypatch.setattr(
        make_checkpoint, "add_arguments", lambda parser: parser.add_argument("--preset")
    )
    monkeypatch.setattr(make_checkpoint, "run", lambda args: print(args.preset) or 0)
    assert run("make-checkpoint", "--preset", "tiny") == 0
    assert capsys.readouterr().out == "tiny\n"
