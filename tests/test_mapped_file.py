"""Mapped files: their bytes without a copy, and a named error instead of a dead process when the bytes are gone."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_native import _native, mapped_file
from kimi_native.errors import ModelFormatError
from kimi_native.mapped_file import MappedFile
from page_table import present_pages

PAGE = mmap.PAGESIZE
SIZE = 600 * PAGE + 123


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(i % 251 for i in range(SIZE)))
    return path


def mapped(path: Path, size: int = SIZE) -> MappedFile:
    with open(path, "rb") as file:
        return MappedFile(file, size, path)


def num_pages() -> int:
    return -(-SIZE // PAGE)


def test_mapped_file_is_the_file(path):
    file = mapped(path)
    assert bytes(file.buffer) == path.read_bytes()
    assert file.address % PAGE == 0
    file.check()


def test_mapped_file_may_be_a_part(path):
    assert bytes(mapped(path, 1000).buffer) == path.read_bytes()[:1000]


def test_mapped_file_buffer_keeps_the_map(path):
    buffer = mapped(path).buffer
    gc.collect()
    assert buffer[SIZE - 1] == bytes([(SIZE - 1) % 251])


def test_mapped_file_that_lost_bytes_before_it_was_mapped_is_a_named_error(path):
    with open(path, "rb") as file:
        os.truncate(path, SIZE - 1)
        with pytest.raises(
            ModelFormatError, match=rf"x\.safetensors: must keep its {SIZE} bytes while"
        ):
            MappedFile(file, SIZE, path)


# ---- lost bytes -----------------------------------------------------------------------------------------------------


def test_mapped_file_truncated_in_use_is_a_named_error_and_the_process_lives(path):
    file = mapped(path)
    other = mapped(path, 5 * PAGE)
    os.truncate(path, 7 * PAGE + 9)
    data = bytes(file.buffer)
    assert data[: 7 * PAGE + 9] == bytes(i % 251 for i in range(7 * PAGE + 9))
    assert not any(data[7 * PAGE + 9 :])
    with pytest.raises(ModelFormatError) as error:
        file.check()
    assert f"{path}: must keep its {SIZE} bytes readable" in str(error.value)
    assert f"truncated to {7 * PAGE + 9} bytes, noticed at byte {8 * PAGE}" in str(error.value)
    bytes(other.buffer)
    other.check()  # another map of the same file, within what is left


def test_mapped_file_reports_the_first_lost_byte(path):
    file = mapped(path)
    os.truncate(path, 0)
    for at in (500, 20, 300):
        assert file.buffer[at * PAGE] == b"\0"
    with pytest.raises(ModelFormatError, match=rf"noticed at byte {20 * PAGE}\)"):
        file.check()


def test_mapped_file_populate_finds_lost_bytes_without_touching_them(path):
    file = mapped(path)
    os.truncate(path, 7 * PAGE)
    file.populate(0, 7 * PAGE)
    with pytest.raises(ModelFormatError, match=f"truncated to {7 * PAGE} bytes, noticed at byte 0"):
        file.populate(10, SIZE - 10)
    file.check()


def test_mapped_file_of_a_file_that_is_gone_says_so(path):
    file = mapped(path)
    os.truncate(path, 0)
    path.unlink()
    bytes(file.buffer)
    with pytest.raises(ModelFormatError, match=r"got removed, noticed at byte 0\)"):
        file.check()


def test_mapped_file_watches_end_with_the_map(path):
    numbers = []
    for _ in range(50):
        file = mapped(path)
        numbers.append(file._number)
        os.truncate(path, 0)
        bytes(file.buffer)
        assert _native.lost_from(file._number) == 0
        del file
        gc.collect()
        path.write_bytes(bytes(SIZE))
    assert [_native.lost_from(n) for n in numbers] == [-1] * 50
    mapped(path).check()


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


FOREIGN_FAULT = """
import faulthandler, mmap, os, sys, tempfile
from pathlib import Path
from kimi_native.mapped_file import MappedFile
if {before}: faulthandler.enable()
path = Path(tempfile.mkstemp()[1])
path.write_bytes(bytes(8192))
with open(path, "rb") as f:
    ours = MappedFile(f, 8192, path)
    other = mmap.mmap(f.fileno(), 8192, access=mmap.ACCESS_READ)
if {after}: faulthandler.enable()
if {after}: again = MappedFile(open(path, "rb"), 8192, path)
os.truncate(path, 0)
path.unlink()
other[5000]
"""


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_mapped_file_leaves_the_faults_of_others_to_others(before, after):
    result = run(FOREIGN_FAULT.format(before=before, after=after))
    assert result.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in result.stderr) == bool(before or after)


SENT_SIGNAL = """
import os, signal, sys, time
from kimi_native.mapped_file import MappedFile
if {handled}: signal.signal(signal.SIGBUS, lambda *_: sys.exit(3))
ours = MappedFile(open({path!r}, "rb"), 100, None)
os.kill(os.getpid(), signal.SIGBUS)
time.sleep(10)
"""


@pytest.mark.parametrize(("handled", "code"), [(0, -signal.SIGBUS), (1, 3)])
def test_mapped_file_leaves_a_sent_signal_its_meaning(path, handled, code):
    assert run(SENT_SIGNAL.format(handled=handled, path=str(path))).returncode == code


# ---- bringing bytes in ----------------------------------------------------------------------------------------------


def test_mapped_file_populated_pages_cost_no_fault(path):
    file = mapped(path)
    assert present_pages(file) == 0
    file.populate(0, SIZE)
    assert present_pages(file) == num_pages()


def test_mapped_file_populate_takes_any_range(path):
    file = mapped(path)
    for start, nbytes in [(0, 1), (SIZE - 1, 1), (PAGE - 1, 2), (PAGE, PAGE), (5, SIZE - 5)]:
        file.populate(start, nbytes)
    assert present_pages(file) == num_pages()
    file.check()


def test_mapped_file_populates_where_the_system_cannot_do_it_at_once(path, monkeypatch):
    monkeypatch.setattr(mapped_file._native, "populate_pages", lambda *_: errno.EINVAL)
    file = mapped(path)
    file.populate(3, SIZE - 3)
    assert present_pages(file) == num_pages()
    os.truncate(path, PAGE)
    with pytest.raises(ModelFormatError, match=f"truncated to {PAGE} bytes"):
        file.populate(0, SIZE)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.EIO, ModelFormatError, r"x\.safetensors: must keep .*got a failing disk"),
        (errno.EFAULT, ModelFormatError, r"x\.safetensors: must keep .*got a failing disk"),
        (errno.ENOMEM, OSError, r"Cannot allocate memory: '.*x\.safetensors'"),
    ],
)
def test_mapped_file_populate_names_the_file(path, monkeypatch, code, error, message):
    monkeypatch.setattr(mapped_file._native, "populate_pages", lambda *_: code)
    with pytest.raises(error, match=message):
        mapped(path).populate(0, SIZE)


def test_mapped_file_released_pages_come_back_unchanged(path):
    file = mapped(path)
    file.populate(0, SIZE)
    file.release(100, SIZE - 100)
    assert present_pages(file) <= 2  # the first and the last are not released as a whole
    assert bytes(file.buffer) == path.read_bytes()


def test_mapped_file_release_keeps_what_shares_a_page(path, monkeypatch):
    file = mapped(path)
    asked = []
    monkeypatch.setattr(file, "_advise", lambda advice, start, stop: asked.append((start, stop)))
    file.release(100, 3 * PAGE)
    file.release(PAGE, 2 * PAGE)
    assert asked == [(PAGE, 3 * PAGE), (PAGE, 3 * PAGE)]


def test_watch_mapping_refuses_what_is_no_map():
    for address, nbytes in [(0, 1), (PAGE + 1, 1), (PAGE, 0), (PAGE, -5)]:
        with pytest.raises(ValueError, match="watch_mapping: address must be that of a page"):
            _native.watch_mapping(address, nbytes)
