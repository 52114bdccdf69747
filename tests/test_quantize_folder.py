"""quantize and its folder: interrupted anywhere it never loads wrong, and goes on to the same bytes."""

from __future__ import annotations

import errno
import fcntl
import inspect
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import kimi_native as kn
from kimi_native import checkpoint_writer, cli
from kimi_native.checkpoint import Checkpoint
from kimi_native.config import load_config
from kimi_native.errors import CheckpointWriteError, ModelFormatError
from kimi_native.loader import load_model
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.quant import ptq, ptq_state
from kimi_native.quant.ptq import quantize_checkpoint
from made_checkpoints import read_bytes
from tiny_checkpoint import TINY, write_checkpoint

STATE = "quantize-state.json"
SHARD_BYTES = 50_000
INTERRUPTED = "kimi-native quantize was interrupted here"


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """When data is flushed is counted below; waiting for a real disk several thousand times tells nothing more."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def quantize(source: Path, out: Path, **options) -> dict:
    return quantize_checkpoint(source, out, threads=1, shard_bytes=SHARD_BYTES, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small BF16 checkpoint in three files, with a tokenizer's file."""
    folder = tmp_path_factory.mktemp("small") / "source"
    write_checkpoint(folder, TINY | {"num_hidden_layers": 2}, shards=3)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder


@pytest.fixture(scope="module")
def fresh(source, tmp_path_factory):
    """The files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("fresh") / "out"
    report = quantize(source, out)
    assert len(report["shards"]) == 4
    Checkpoint.open(out)
    return read_bytes(out)


def own_copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "own"))


# ---- interruption ----------------------------------------------------------------------------------------------------


class Died(BaseException):
    """Stands for a kill or a lost machine."""


class Disk:
    """Every step that changes the disk, counted; step `at` fails, after half of its data if it is a write.

    With stay_dead all later steps fail too, so that nothing is cleaned up, as after a kill.
    """

    def __init__(self, monkeypatch, at: int, error: BaseException, *, stay_dead: bool = False):
        self.at, self.error, self.stay_dead, self.steps = at, error, stay_dead, 0
        for owner, name in (
            (checkpoint_writer, "write_at"),
            (os, "fsync"),
            (os, "replace"),
            (Path, "unlink"),
            (Path, "mkdir"),
        ):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, function):
        def step(*args, **options):
            now, self.steps = self.steps, self.steps + 1
            if now == self.at or (self.stay_dead and now > self.at):
                if function.__name__ == "write_at":
                    file, position, data = args
                    octets = bytes(memoryview(data).cast("B"))
                    function(file, position, octets[: len(octets) // 2])
                    file.flush()
                raise self.error
            function(*args, **options)

        return step


def number_of_steps(source: Path, out: Path, **options) -> int:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, -1, Died())
        quantize(source, out, **options)
    return disk.steps


def check_not_loadable(out: Path, fresh: dict[str, bytes]) -> None:
    """Ours names the reason; for other readers there are not both index and config, unless all is as it should be."""
    files = read_bytes(out) if out.exists() else {}
    complete = {n: d for n, d in files.items() if n != STATE and not n.endswith(".part")} == fresh
    if complete and STATE not in files:  # died after the last step that counts
        Checkpoint.open(out)
        return
    assert complete or not {"config.json", "model.safetensors.index.json"} <= files.keys()
    if files.keys() - {STATE + ".part"}:
        with pytest.raises(ModelFormatError, match=INTERRUPTED):
            Checkpoint.open(out)


def test_quantize_flushes_each_file_before_its_rename(source, fresh, tmp_path, monkeypatch):
    """A lost machine must not leave a name without its data, nor a later file's name without an earlier one's."""
    out, events = tmp_path / "out", []
    replace, remove = os.replace, Path.unlink

    def fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        events.append(("flush", path.name, 0 if path.is_dir() else os.fstat(handle).st_size))

    def renamed(old, new):
        replace(old, new)
        events.append(("rename", new.name, new.stat().st_size))

    def removed(path, missing_ok=False):
        if path.exists():
            events.append(("remove", path.name, 0))
        remove(path, missing_ok)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(Path, "unlink", removed)
    quantize(source, out)
    names = [name for step, name, _ in events if step == "rename"]
    for i, (step, name, nbytes) in enumerate(events):
        if step == "rename":  # at once after all its bytes were flushed
            assert events[i - 1] == ("flush", f"{name}.part", nbytes)
    assert {*names} == {*fresh, STATE}
    assert names[-2:] == ["model.safetensors.index.json", "config.json"]
    assert events[-2:] == [("flush", "out", 0), ("remove", STATE, 0)]
    for i, (step, name, _) in enumerate(
        events
    ):  # a shard is in its folder before it counts as done
        if step == "rename" and name.startswith("model-"):
            assert events[i + 1] == ("flush", "out", 0)
    first_state = events.index(next(e for e in events if e[:2] == ("rename", STATE)))
    assert events[first_state + 1] == ("flush", "out", 0)


@pytest.mark.parametrize("error", ["killed", "disk full", "Ctrl-C"])
def test_quantize_interrupted_at_any_step_is_refused_and_resumes_to_the_same_bytes(
    source, fresh, tmp_path, error
):
    steps = number_of_steps(source, tmp_path / "counted")
    assert steps > 100
    for at in range(0, steps, 1 if error == "killed" else 3):
        out = tmp_path / str(at)
        raised = {
            "killed": Died(),
            "disk full": OSError(errno.ENOSPC, "No space left on device"),
            "Ctrl-C": KeyboardInterrupt(),
        }[error]
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, at, raised, stay_dead=error == "killed")
            expected = CheckpointWriteError if error == "disk full" else type(raised)
            with pytest.raises(expected) as caught:
                quantize(source, out)
        if error == "disk full":
            assert re.search(
                r"quantize: cannot \w+ \S+ \(got No space left on device\)", str(caught.value)
            )
            assert not list(out.glob("*.part")) if out.exists() else True
        check_not_loadable(out, fresh)
        quantize(source, out, overwrite=error == "killed" and at % 2 == 1)
        assert read_bytes(out) == fresh, at
        shutil.rmtree(out)


def test_quantize_interrupted_while_it_replaces_a_checkpoint(source, fresh, tmp_path):
    """Until the state file is there the old checkpoint is untouched; from then on nothing loads."""
    old = tmp_path / "old"
    make_checkpoint(old, layers=2, shard_bytes=1 << 18)
    (old / "tiktoken.model").unlink()  # the source has none: quantize would not replace it
    (old / "tokenizer_config.json").unlink()
    before = read_bytes(old)
    counted = Path(shutil.copytree(old, tmp_path / "counted"))
    steps = number_of_steps(source, counted, overwrite=True)
    seen = set()
    for at in range(0, steps, 3):
        out = Path(shutil.copytree(old, tmp_path / str(at)))
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, at, Died(), stay_dead=True)
            with pytest.raises(Died):
                quantize(source, out, overwrite=True)
        files = read_bytes(out)
        if files.keys() >= before.keys() and {n: files[n] for n in before} == before:
            seen.add("old")
            if STATE in files:
                with pytest.raises(ModelFormatError, match=INTERRUPTED):
                    Checkpoint.open(out)
        else:
            seen.add("neither")
            check_not_loadable(out, fresh)
        quantize(source, out, overwrite=True)
        assert read_bytes(out) == fresh, at
        shutil.rmtree(out)
    assert seen == {"old", "neither"}


@pytest.fixture
def half(source, tmp_path):
    """A folder left with two finished shards of four; (folder, inodes of the finished)."""
    out = tmp_path / "half"
    written = []
    write_shard = checkpoint_writer.FolderWriter.write_shard

    def failing(folder, name, tensors, pieces):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        write_shard(folder, name, tensors, pieces)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer.FolderWriter, "write_shard", failing)
        with pytest.raises(
            KeyboardInterrupt, match=r"^2 of 4 shards are done: .* goes on after them$"
        ):
            quantize(source, out)
    return out, {name: (out / name).stat().st_ino for name in written}


def test_quantize_says_what_a_full_disk_left_of_it(source, half, monkeypatch):
    out, _ = half
    Disk(monkeypatch, 0, OSError(errno.ENOSPC, "No space left on device"), stay_dead=True)
    with pytest.raises(CheckpointWriteError, match=r"; 2 of 4 shards are done: .* goes on after"):
        quantize(source, out)


def test_quantize_loses_little_when_interrupted():
    """What a run may lose is what it writes in a shard: 1 GiB, of models that have several."""
    assert inspect.signature(quantize_checkpoint).parameters["shard_bytes"].default == 1 << 30


def test_quantize_does_not_write_finished_shards_again(source, fresh, half):
    out, inodes = half
    seen = []
    report = quantize(source, out, progress=lambda done, total: seen.append((done, total)))
    assert report["resumed_shards"] == 2
    assert {name: (out / name).stat().st_ino for name in inodes} == inodes
    assert seen == sorted(seen)
    assert seen[-1] == (report["source_bytes"], report["source_bytes"])
    assert read_bytes(out) == fresh


def test_quantize_goes_on_when_the_source_has_moved(source, fresh, half, tmp_path):
    out, _ = half
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)  # keeps modification times
    assert quantize(moved, out)["resumed_shards"] == 2
    assert read_bytes(out) == fresh


@pytest.mark.parametrize("damage", ["header", "longer", "gone", "rewritten"])
def test_quantize_writes_a_damaged_shard_again(source, fresh, half, damage):
    out, inodes = half
    shard = out / next(iter(inodes))
    status, content = shard.stat(), bytearray(shard.read_bytes())
    if damage == "gone":
        shard.unlink()
    else:
        content[20] ^= damage == "header"
        content += b"\0" * (damage == "longer")
        shard.write_bytes(content)
        if damage != "rewritten":
            os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert quantize(source, out)["resumed_shards"] == 1
    assert read_bytes(out) == fresh


def test_quantize_names_the_setting_that_differs(source, half, tmp_path):
    out, _ = half
    before = read_bytes(out)
    with pytest.raises(
        CheckpointWriteError,
        match=r"unfinished run of the same source and settings, .* \(got \S+, begun with levels 15, not 16\)",
    ):
        quantize(source, out, levels=16)
    assert read_bytes(out) == before
    report = quantize(source, out, levels=16, overwrite=True)
    assert report["resumed_shards"] == 0
    quantize(source, tmp_path / "other", levels=16)
    assert read_bytes(out) == read_bytes(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: os.utime(s / "model-00002-of-000003.safetensors"), "model-00002.*changed since"),
        (lambda s: (s / "tokenizer.json").write_text("{}"), "tokenizer.json, which is new"),
        (
            lambda s: (s / "generation_config.json").unlink(),
            "generation_config.json, which is gone",
        ),
    ],
)
def test_quantize_names_the_source_file_that_differs(source, half, tmp_path, change, message):
    out, _ = half
    own = own_copy(source, tmp_path)
    change(own)
    with pytest.raises(CheckpointWriteError, match=rf"begun with source file .*{message}"):
        quantize(own, out)
    assert quantize(own, out, overwrite=True)["resumed_shards"] == 0
    Checkpoint.open(out)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"source": 1, "files": {}, "settings": {}, "shards": {}}',
        '{"source": "", "files": {}, "settings": {}, "shards": {"a": [1, "x"]}}',
    ],
)
def test_quantize_refuses_a_state_file_that_is_none(source, fresh, half, text):
    out, _ = half
    (out / STATE).write_text(text)
    with pytest.raises(CheckpointWriteError, match=rf"{STATE}.* can be overwritten on request"):
        quantize(source, out)
    quantize(source, out, overwrite=True)
    assert read_bytes(out) == fresh


def test_quantize_notices_a_source_that_changes_meanwhile(source, tmp_path):
    own, out = own_copy(source, tmp_path), tmp_path / "out"
    touched = []

    def touch(done, total):
        if done > total // 2 and not touched:
            touched.append(os.utime(own / "model-00001-of-000003.safetensors"))

    with pytest.raises(
        ModelFormatError, match=r"must stay as it is .* model-00001-\S+ which is changed"
    ):
        quantize(own, out, progress=touch)
    with pytest.raises(ModelFormatError, match=INTERRUPTED):
        Checkpoint.open(out)


def test_quantize_lets_one_process_at_a_time_write_a_folder(source, fresh, half):
    out, _ = half
    before = read_bytes(out)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(CheckpointWriteError, match=r"must be free .* another process"):
            quantize(source, out, overwrite=True)
    finally:
        os.close(handle)
    assert read_bytes(out) == before
    quantize(source, out)
    assert read_bytes(out) == fresh


def test_quantize_of_another_version_does_not_go_on(source, half, monkeypatch):
    out, _ = half
    monkeypatch.setattr(ptq, "__version__", "99")
    with pytest.raises(CheckpointWriteError, match=r"begun with version '.*', not '99'"):
        quantize(source, out)


def test_quantize_state_survives_a_round_trip(tmp_path):
    state = ptq_state.RunState("/s", {"a": [1, 2]}, {"levels": 15}, {"b": [3, 4]})
    state.write(checkpoint_writer.FolderWriter("quantize", tmp_path))
    assert ptq_state.RunState.read(tmp_path) == state
    assert ptq_state.RunState.read(tmp_path / "none") is None


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_quantize_replaces_a_checkpoint_only_on_request(source, fresh, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(source, out, levels=16)
    before = read_bytes(out)
    with pytest.raises(CheckpointWriteError, match="out_dir must be empty, or be overwritten"):
        quantize(source, out)
    assert read_bytes(out) == before
    quantize(source, out, overwrite=True)
    assert read_bytes(out) == fresh


@pytest.mark.parametrize(
    "stranger", ["notes.txt", "model.safetensors", "tokenizer.json", "deeper/"]
)
def test_quantize_never_touches_a_folder_with_other_files(source, tmp_path, stranger):
    out = tmp_path / "out"
    quantize(source, out)
    if stranger.endswith("/"):
        (out / stranger).mkdir()
    else:
        (out / stranger).write_text("mine")
    before = sorted(p.name for p in out.iterdir())
    name = stranger.rstrip("/")
    with pytest.raises(CheckpointWriteError, match=rf"hold no other files \(got {name} in "):
        quantize(source, out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == before


def test_quantize_does_not_write_through_a_leftover_link(source, fresh, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("precious")
    out.mkdir()
    for name in fresh:
        (out / f"{name}.part").symlink_to(victim)
        (out / name).symlink_to(victim)
    quantize(source, out, overwrite=True)
    assert victim.read_text() == "precious"
    assert read_bytes(out) == fresh
    assert not any(p.is_symlink() for p in out.iterdir())


def test_quantize_sees_a_full_disk_before_anything_is_written_or_removed(
    source, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    make_checkpoint(out, layers=2)
    (out / "tiktoken.model").unlink()
    (out / "tokenizer_config.json").unlink()
    for path in out.glob("*.safetensors"):
        path.write_bytes(b"")  # its room does not help
    before = read_bytes(out)
    monkeypatch.setattr(
        checkpoint_writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    room = r"quantize: \S+ needs 0\.\d+ GiB on the disk \(got 0\.000 GiB free\)"
    with pytest.raises(CheckpointWriteError, match=room):
        quantize(source, out, overwrite=True)
    assert read_bytes(out) == before
    with pytest.raises(CheckpointWriteError, match=room):
        quantize(source, tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


def test_quantize_needs_room_for_what_is_missing_only(source, fresh, half, monkeypatch):
    out, inodes = half
    finished = sum((out / name).stat().st_size for name in inodes)
    total = sum(map(len, fresh.values()))
    free = total - finished + (1 << 20) + 300 * len(fresh) * 40
    asked = []
    require_room = checkpoint_writer.FolderWriter.require_room

    def noting(folder, needed, freed=()):
        asked.append(needed)
        require_room(folder, needed, freed)

    monkeypatch.setattr(checkpoint_writer.FolderWriter, "require_room", noting)
    quantize(source, out)
    assert total - finished < asked[0] < free


def test_quantize_reads_a_folder_of_links(source, fresh, tmp_path):
    """As a Hugging Face cache keeps it: snapshots/<revision>/name -> ../../blobs/<hash>."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(source.iterdir())):
        shutil.copy2(path, blobs / f"blob{i}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob{i}")
    quantize(snapshot, tmp_path / "out")
    assert read_bytes(tmp_path / "out") == fresh


def test_quantize_gives_torch_its_threads_back_after_an_error(source, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    Disk(monkeypatch, 20, Died())
    with pytest.raises(Died):
        quantize(source, tmp_path / "out")
    assert torch.get_num_threads() == before


def test_an_unfinished_folder_is_refused_by_every_way_in(half, capsys):
    out, _ = half
    for enter in (kn.load, load_config, Checkpoint.open, load_model):
        with pytest.raises(ModelFormatError, match=rf"{INTERRUPTED} .* run it again with the same"):
            enter(out)
    assert cli.main(["inspect", str(out)]) == 1
    message = capsys.readouterr().err
    assert INTERRUPTED in message
    assert message.count("\n") == 1


def test_state_file_says_whose_run_it_is(source, half):
    out, inodes = half
    state = json.loads((out / STATE).read_text())
    assert state["source"] == str(source)
    assert state["settings"]["levels"] == 15
    assert state["shards"].keys() == inodes.keys()
    assert state["files"]["config.json"][0] == (source / "config.json").stat().st_size
