"""Reading ahead: every byte once, errors and interrupts at once, and no thread left behind."""

from __future__ import annotations

import os
import threading
import time

import pytest

from kimi_native import read_ahead as module
from kimi_native.errors import ModelFormatError
from kimi_native.mapped_file import MappedFile
from kimi_native.read_ahead import Extent, read_ahead


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 64 << 10)
    monkeypatch.setattr(module, "_STEP", 16 << 10)
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def mapped(path, size: int) -> MappedFile:
    path.write_bytes(os.urandom(size))
    with open(path, "rb") as file:
        return MappedFile(file, size, path)


def test_read_ahead_brings_every_byte_once(tmp_path, monkeypatch):
    a, b = mapped(tmp_path / "a", 1_000_001), mapped(tmp_path / "b", 300_000)
    pieces = []
    populate = MappedFile.populate

    def noted(self, start, nbytes):
        pieces.append((self, start, nbytes))
        populate(self, start, nbytes)

    monkeypatch.setattr(MappedFile, "populate", noted)
    extents = [Extent(a, 9, 500_000), Extent(a, 700_001, 300_000), Extent(b, 0, 300_000)]
    reported = []
    read_ahead(extents, reported.append)
    assert sum(reported) == 1_100_000
    for extent in extents:
        end = extent.start
        stop = extent.start + extent.nbytes
        for _, start, nbytes in sorted(
            (p for p in pieces if p[0] is extent.file and extent.start <= p[1] < stop),
            key=lambda p: p[1],
        ):
            assert start == end
            end = start + nbytes
        assert end == stop
    assert sum(p[2] for p in pieces) == 1_100_000


def test_read_ahead_cuts_at_multiples_in_the_file(tmp_path, monkeypatch):
    file = mapped(tmp_path / "a", 200 << 10)
    starts = []
    monkeypatch.setattr(
        MappedFile, "populate", lambda self, start, nbytes: starts.append((start, nbytes))
    )
    read_ahead([Extent(file, 60 << 10, 100 << 10)], lambda nbytes: None)
    chunk = 64 << 10
    assert all(s // chunk == (s + n - 1) // chunk for s, n in starts)


def test_read_ahead_of_nothing_is_nothing(tmp_path):
    reported = []
    read_ahead([], reported.append)
    read_ahead([Extent(mapped(tmp_path / "a", 10), 10, 0)], reported.append)
    assert reported == []


def test_read_ahead_of_a_truncated_file_is_a_named_error(tmp_path):
    file = mapped(tmp_path / "a.safetensors", 4 << 20)
    os.truncate(file.path, 1 << 20)
    reported = []
    with pytest.raises(ModelFormatError, match=r"a\.safetensors: must keep its 4194304 bytes"):
        read_ahead([Extent(file, 0, 4 << 20)], reported.append)
    assert sum(reported) <= 1 << 20


def test_read_ahead_is_interrupted_after_a_piece(tmp_path, monkeypatch):
    file = mapped(tmp_path / "a", 4 << 20)
    populated = []

    def slow(self, start, nbytes):
        time.sleep(0.01)
        populated.append(start)

    def report(nbytes):
        raise KeyboardInterrupt

    monkeypatch.setattr(MappedFile, "populate", slow)
    with pytest.raises(KeyboardInterrupt):
        read_ahead([Extent(file, 0, 4 << 20)], report)
    # Of 256 pieces: one chunk of 4 in each of the 4 threads before the first report, at most one more each after it,
    # and slack for a main thread that has to wait for its turn.
    assert len(populated) < 128
