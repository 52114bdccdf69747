"""Every file of a checkpoint folder, broken in every way a file can be: one line that names it, and nothing written."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kimi_native as kn
from kimi_native import cli
from kimi_native.checkpoint import Checkpoint
from kimi_native.make_checkpoint import make_checkpoint

SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = ("tiktoken.model", "tokenizer_config.json")
FILES = ("config.json", "generation_config.json", INDEX, SHARD, *TOKENIZER)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply


# What becomes of the file: first those that are no file at all, then those whose content is wrong.
NO_FILE = {
    "directory": replaced(Path.mkdir),
    "fifo": replaced(os.mkfifo),
    "socket of zeros": replaced(lambda path: path.symlink_to("/dev/zero")),
    "dangling link": replaced(lambda path: path.symlink_to(path.with_name("gone"))),
    "link to itself": replaced(lambda path: path.symlink_to(path)),
    "link elsewhere": replaced(lambda path: path.symlink_to("/etc/hostname")),
}
WRONG_CONTENT = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "array": lambda path: path.write_bytes(b"[1, 2]"),
    "bytes": lambda path: path.write_bytes(bytes(range(255, -1, -1)) * 40),
    "deep": lambda path: path.write_bytes(b'{"a":' * 100_000),
}
BREAK = NO_FILE | WRONG_CONTENT


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """BF16, so that quantize takes it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "whole"
    make_checkpoint(folder, format="bf16", layers=2)
    assert {path.name for path in folder.iterdir()} == {*FILES}
    return folder


@contextlib.contextmanager
def no_hang(seconds: int) -> Iterator[None]:
    """Opening a FIFO waits for its other end: that must fail here, not stop the whole run."""

    def expired(*_) -> None:
        raise TimeoutError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command(verb: str, folder: Path, out: Path) -> list[str]:
    return {
        "generate": ["generate", "--model", str(folder), "Hi", "--max-tokens", "1"],
        "inspect": ["inspect", str(folder)],
        "quantize": ["quantize", str(folder), str(out)],
    }[verb]


def is_read(verb: str, kind: str, name: str) -> bool:
    """inspect leaves the tokenizer alone; quantize copies its files without a look at what is in them."""
    if name not in TOKENIZER:
        return True
    return verb == "generate" or (verb == "quantize" and kind in NO_FILE)


@pytest.mark.parametrize("verb", ["generate", "inspect", "quantize"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", BREAK)
def test_a_broken_file_is_one_line_that_names_it(whole, tmp_path, capsys, kind, name, verb):
    folder = tmp_path / "broken"
    shutil.copytree(whole, folder)
    BREAK[kind](folder / name)
    with no_hang(60):
        code = cli.main(command(verb, folder, tmp_path / "out"))
    out, err = capsys.readouterr()
    if not is_read(verb, kind, name):
        assert code == 0
        return
    assert (code, out) == (1, "")
    assert err.startswith(f"kimi-native: error: {folder / name}: "), err
    assert err.endswith("\n")
    assert err[:-1].isprintable()  # so it is one line
    assert len(err) < 1000
    assert not (tmp_path / "out").exists()


def test_the_whole_checkpoint_passes_every_command(whole, tmp_path, capsys):
    for verb in ("generate", "inspect", "quantize"):
        assert cli.main(command(verb, whole, tmp_path / "out")) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "op"),
    [
        ("inspect EMPTY", "checkpoint"),
        ("inspect --model EMPTY", "checkpoint"),
        ("plan EMPTY", "checkpoint"),
        ("generate Hi --model EMPTY", "load"),
        ("render --messages m --model EMPTY", "render"),
        ("quantize EMPTY out", "quantize"),
        ("quantize in EMPTY", "quantize"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(whole, monkeypatch, capsys, argv, op):
    monkeypatch.chdir(whole)
    assert cli.main(["" if word == "EMPTY" else word for word in argv.split()]) == 1
    expected = f"kimi-native: error: {op}: the folder must be named (got an empty path)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("enter", "path"),
    [(enter, path) for enter in (kn.load, Checkpoint.open) for path in (5, b"folder", ["folder"])]
    + [(Checkpoint.open, None)],  # to load, None is kimi-nano
)
def test_what_is_no_path_is_named(enter, path):
    message = re.escape(f"the folder must be a str or os.PathLike (got {path!r})")
    with pytest.raises(TypeError, match=message):
        enter(path)
