"""Files written whole: what was there stays until the new is complete, and a place that cannot be is told before."""

from __future__ import annotations

import os

import pytest

from kimi_native import whole_file
from kimi_native.errors import RequestError
from kimi_native.whole_file import check_writable, write_whole


def test_whole_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "a.json"
    for data in (b"one", b"", b"three"):
        check_writable(path)
        write_whole(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["a.json"]


def test_whole_file_check_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "new")
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").write_bytes(b"old")
    check_writable(tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"old"


@pytest.mark.parametrize("step", ["write", "replace"])
def test_whole_file_that_fails_leaves_what_was_there(tmp_path, monkeypatch, step):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(whole_file.os, "fsync", fail)
        else:
            patch.setattr(whole_file.Path, "replace", fail)
        with pytest.raises(RequestError, match=r"a: must be writable \(got No space left"):
            write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_whole_file_follows_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "target")
    check_writable(tmp_path / "link")
    write_whole(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "target").read_bytes() == b"x"


@pytest.mark.parametrize("act", [check_writable, lambda path: write_whole(path, b"")])
def test_whole_file_refuses_places_that_hold_no_file(tmp_path, act):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RequestError, match=r"must be the name of an ordinary file"):
        act(tmp_path)
    with pytest.raises(RequestError, match=r"must be the name of an ordinary file"):
        act(os.devnull)
    with pytest.raises(RequestError, match=r"must be writable \(got No such file or directory"):
        act(tmp_path / "none" / "a")
    with pytest.raises(RequestError, match=r"must be writable \(got Not a directory"):
        act(tmp_path / "file" / "a")
    assert sorted(os.listdir(tmp_path)) == ["file"]
