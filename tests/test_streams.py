"""Standard streams of the command line that are closed, broken or full: one named error at most, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kimi_native.make_checkpoint import make_checkpoint

COMMAND = [sys.executable, "-P", "-m", "kimi_native"]
FULL = b"kimi-native: error: stdout: cannot be used (got No space left on device)\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_checkpoint(path, format="bf16", layers=2)
    return str(path)


def environment(unbuffered: bool = False) -> dict[str, str]:
    """Where what is written waits, unless asked for otherwise."""
    rest = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return rest | ({"PYTHONUNBUFFERED": "1"} if unbuffered else {})


def in_shell(arguments: list[str], redirection: str, unbuffered: bool = False):
    """The finished command, its streams redirected by the shell."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *COMMAND, *arguments],
        env=environment(unbuffered),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )


def code_of(body: str) -> list[str]:
    """A program whose command line has one verb that works: doctor, with this body; -X dev tells of errors at exit."""
    lines = ["import sys", "from kimi_native import cli", "def doctor(args):", f"    {body}"]
    lines += ["    return 0", "cli._doctor = doctor", "sys.exit(cli.main(['doctor']))"]
    return [sys.executable, "-P", "-X", "dev", "-c", "\n".join(lines)]


@pytest.mark.parametrize(
    "verb",
    [
        "generate --raw-prompt --max-tokens 1 Hi --model DIR",
        "generate --raw-prompt --max-tokens 1 Hi --stream --model DIR",
        "inspect DIR",
        "inspect --json DIR",
        "plan DIR",
        "quantize DIR OUT",
        "make-checkpoint --preset tiny --layers 2 OUT",
        "make-checkpoint --help",
    ],
)
def test_a_closed_stdout_takes_everything(folder, tmp_path, verb):
    places = {"DIR": folder, "OUT": str(tmp_path / "out")}
    result = in_shell([places.get(word, word) for word in verb.split()], ">&-")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_a_closed_stdin_is_empty(folder):
    result = in_shell(["generate", "--model", folder], "<&-")
    assert result.returncode == 1
    assert result.stderr == (
        b"kimi-native: error: generate: the prompt must not be empty (got nothing from stdin)\n"
    )


def test_a_closed_stderr_leaves_stdout_and_the_exit_code(folder):
    result = in_shell(["inspect", "--json", folder], "2>&-")
    assert result.returncode == 0
    assert json.loads(result.stdout)["model_type"]
    result = in_shell(["inspect", "nowhere"], "2>&-")
    assert (result.returncode, result.stdout) == (1, b"")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["inspect"], ["inspect", "--json"]], ids=" ".join
)
def test_a_full_stdout_is_named(folder, arguments, unbuffered):
    if arguments[0] == "inspect":
        arguments = [*arguments, folder]
    result = in_shell(arguments, "> /dev/full", unbuffered)
    assert (result.returncode, result.stderr) == (1, FULL)


@pytest.mark.parametrize("size", [1, 10**6], ids=["buffered", "beyond the buffer"])
def test_a_full_stdout_is_named_whatever_was_written(size):
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            code_of(f"print('x' * {size})"),
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (result.returncode, result.stderr) == (1, FULL)


@pytest.mark.parametrize("size", [1, 10**6], ids=["buffered", "beyond the buffer"])
def test_a_closed_pipe_is_quiet(size):
    """The reader is gone before anything is written; a little is written by the last flush alone."""
    process = subprocess.Popen(
        code_of(f"sys.stdin.read(); print('x' * {size})"),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 0
