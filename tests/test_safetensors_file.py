"""The safetensors reader: what it accepts is what the file says, everything else is a named error."""

from __future__ import annotations

import copy
import json
import random
import struct
import warnings

import pytest
import safetensors
import safetensors.torch
import torch

import tiny_checkpoint
from kimi_native.errors import ModelFormatError
from kimi_native.safetensors_file import DTYPES, MAX_HEADER_BYTES, MAX_TENSORS, SafetensorsFile


def raw(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), begin=0, end=8, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]} | more


def write(tmp_path, content: bytes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_safetensors_reads_what_the_published_library_writes(tmp_path, dtype):
    raw_bytes = torch.randint(0, 2, (5, 6), dtype=torch.uint8)
    expected = {
        "a": raw_bytes.to(dtype),
        "b": torch.zeros(0, 3).to(dtype),
        "c": torch.ones(()).to(dtype),
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(expected, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    assert set(file.tensors) == set(expected)
    for name, tensor in expected.items():
        actual = file.tensor(name)
        assert actual.dtype == dtype
        assert actual.shape == tensor.shape == file.tensors[name].shape
        assert torch.equal(
            actual.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )


def test_safetensors_tensor_info_points_at_the_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    data = tiny_checkpoint.content("a", "BF16", (3, 5))
    tiny_checkpoint.write_safetensors(
        path, {"z": ("U8", (4,), b"1234"), "a": ("BF16", (3, 5), data)}
    )
    info = SafetensorsFile(path).tensors["a"]
    assert path.read_bytes()[info.start : info.start + info.nbytes] == data
    assert (info.name, info.dtype, info.shape, info.file) == ("a", "BF16", (3, 5), path)


def test_safetensors_views_are_not_copies_and_do_not_warn(tmp_path):
    path = write(tmp_path, raw({"a": entry(end=8)}, bytes(8)))
    file = SafetensorsFile(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = file.tensor("a"), file.tensor("a")
    assert a.data_ptr() == b.data_ptr()
    with open(path, "r+b") as f:  # a shared map shows what is written to the file, a copy would not
        f.seek(-8, 2)
        f.write(struct.pack("<2f", 3.0, -7.0))
    assert a.tolist() == [3.0, -7.0]


def test_safetensors_views_outlive_the_file_object(tmp_path):
    view = SafetensorsFile(write(tmp_path, raw({"a": entry()}, struct.pack("<2f", 1, 2)))).tensor(
        "a"
    )
    assert view.tolist() == [1, 2]


def test_safetensors_unaligned_tensors_are_views_too(tmp_path):
    header = json.dumps({"a": entry("U8", (1,), 0, 1), "b": entry("F32", (2,), 1, 9)}).encode()
    header += b" " * (-(8 + len(header)) % 4)  # then b begins one byte past a multiple of 4
    file = SafetensorsFile(write(tmp_path, raw(header, b"\1" + struct.pack("<2f", 1.5, -2.5))))
    assert file.tensor("b").tolist() == [1.5, -2.5]
    assert file.tensor("b").data_ptr() % 4 == 1
    assert file.tensor("b").data_ptr() == file.tensor("b").data_ptr()


def test_safetensors_zero_size_tensors_may_share_an_offset(tmp_path):
    header = {
        "a": entry("F32", (0, 7), 0, 0),
        "b": entry("F32", (2,), 0, 8),
        "c": entry("I64", (0,), 8, 8),
    }
    file = SafetensorsFile(write(tmp_path, raw(header, bytes(8))))
    assert file.tensor("a").shape == (0, 7)
    assert file.tensor("c").dtype == torch.int64


def test_safetensors_unknown_tensor_is_named(tmp_path):
    file = SafetensorsFile(write(tmp_path, raw({"a": entry()}, bytes(8))))
    with pytest.raises(ModelFormatError, match=r"x\.safetensors: tensor nope is not in this file"):
        file.tensor("nope")


DEEP = b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
MALFORMED = {
    "empty": (b"", "at least 8 bytes"),
    "seven bytes": (b"1234567", "at least 8 bytes"),
    "length past the end": (raw(b"{}", length=3), "header length must lie within"),
    "length 2**63": (struct.pack("<Q", 1 << 63) + b"{}", "header length must be at most"),
    "length above the cap": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "header length must be at most"),
    "no object": (raw(b"[1]"), "must start with {"),
    "leading space": (raw(b" {}"), "must start with {"),
    "no json": (raw(b"{]"), "must be valid JSON"),
    "trailing text": (raw(b"{}x"), "must be valid JSON"),
    "not utf-8": (raw(b'{"\xff": 1}'), "must be valid JSON"),
    "utf-16": (raw("{}".encode("utf-16-le")), "must be valid JSON"),
    "nan": (raw(b'{"a": NaN}'), "must be finite"),
    "deep": (raw(DEEP), "nests too deep"),
    "huge digits": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "must be valid JSON"),
    "duplicate tensor": (raw(b'{"a": 1, "a": 2}'), "'a' must appear once"),
    "duplicate field": (
        raw(b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [], "data_offsets": [0, 1]}}', b"1"),
        "'dtype' must appear once",
    ),
    "metadata no object": (raw({"__metadata__": 3}), "__metadata__"),
    "metadata no string": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry no object": (raw({"a": 1}), "tensor a: entry must be an object"),
    "entry field missing": (raw({"a": {"dtype": "F32", "shape": [1]}}), "tensor a: entry must hold"),
    "entry field more": (raw({"a": entry(extra=1)}, bytes(8)), "tensor a: entry must hold"),
    "dtype unknown": (raw({"a": entry("F33")}, bytes(8)), "tensor a: dtype must be one of"),
    "dtype no string": (raw({"a": entry(["F32"])}, bytes(8)), "tensor a: dtype must be one of"),
    "shape no list": (raw({"a": entry() | {"shape": 2}}, bytes(8)), "tensor a: shape must be a list"),
    "shape negative": (raw({"a": entry(shape=(-2,))}, bytes(8)), "tensor a: shape must be a list"),
    "shape two negatives": (raw({"a": entry(shape=(-1, -2))}, bytes(8)), "tensor a: shape must be a list"),
    "shape float": (raw({"a": entry(shape=(2.0,))}, bytes(8)), "tensor a: shape must be a list"),
    "shape bool": (raw({"a": entry(shape=(True, 2))}, bytes(8)), "tensor a: shape must be a list"),
    "shape long": (raw({"a": entry(shape=(1,) * 9)}, bytes(8)), "at most 8 dimensions"),
    "shape wraps 32 bits": (raw({"a": entry(shape=(2**31, 2, 2))}, bytes(8)), "span dtype times shape"),
    "shape wraps 64 bits": (raw({"a": entry(shape=(2**32, 2**32, 2))}, bytes(8)), "less than 2\\*\\*63"),
    "shape zero times huge": (raw({"a": entry(shape=(0, 2**62, 2**62), end=0)}), "less than 2\\*\\*63"),
    "offsets one": (raw({"a": entry() | {"data_offsets": [0]}}, bytes(8)), "tensor a: data_offsets"),
    "offsets float": (raw({"a": entry() | {"data_offsets": [0, 8.0]}}, bytes(8)), "tensor a: data_offsets"),
    "offsets descend": (raw({"a": entry(begin=8, end=0)}, bytes(8)), "tensor a: data_offsets must ascend"),
    "offsets negative": (raw({"a": entry(begin=-8, end=0)}, bytes(8)), "tensor a: data_offsets must ascend"),
    "offsets past the end": (raw({"a": entry(end=8)}, bytes(7)), "tensor a: data_offsets must ascend"),
    "size short": (raw({"a": entry(end=4)}, bytes(4)), "span dtype times shape = 8"),
    "size long": (raw({"a": entry(end=12)}, bytes(12)), "span dtype times shape = 8"),
    "overlap": (raw({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)), "tensor b: data_offsets overlaps"),
    "same place": (raw({"a": entry(), "b": entry()}, bytes(8)), "data_offsets overlaps"),
    "gap": (raw({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)), "tensor b: data_offsets leaves a gap"),
    "gap at the start": (raw({"a": entry(begin=4, end=12)}, bytes(12)), "leaves a gap after the header"),
    "bytes after the end": (raw({"a": entry()}, bytes(9)), "the file must end with tensor a"),
    "bytes after an empty header": (raw({}, b"x"), "the file must end with the header"),
    "name with control characters": (raw({"a\x1b[31m\n": 1}), r"tensor a\\x1b\[31m\\n: entry"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_safetensors_malformed_file_is_a_named_error(tmp_path, case):
    content, message = MALFORMED[case]
    with pytest.raises(ModelFormatError, match=message) as error:
        SafetensorsFile(write(tmp_path, content))
    assert "x.safetensors" in str(error.value)
    assert len(str(error.value)) < 1000


def test_safetensors_too_many_tensors_is_a_named_error(tmp_path):
    one = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(f'"{i}":{one}' for i in range(MAX_TENSORS + 1)) + "}"
    with pytest.raises(ModelFormatError, match="at most 200000 tensors"):
        SafetensorsFile(write(tmp_path, raw(text.encode())))


def test_safetensors_every_truncation_is_a_named_error(tmp_path):
    header = {"a": entry(), "b": entry("BF16", (3, 2), 8, 20), "__metadata__": {"k": "v"}}
    content = raw(header, bytes(range(20)))
    SafetensorsFile(write(tmp_path, content))
    for length in range(len(content)):
        with pytest.raises(ModelFormatError, match=r"x\.safetensors"):
            SafetensorsFile(write(tmp_path, content[:length]))


EDGES = [-1, 0, 1, 2, 7, 8, 9, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64, 10**30]
ODD = [None, True, 1.5, "", "F32", [], {}, [[]], "BF16", "F8_E4M3", 1e308]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """A valid file with one to three things wrong: fields, offsets, shapes, header length, bytes."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    declared = None
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([n for n in header if n != "__metadata__"] or ["new"])
        target = header.setdefault(name, entry())
        kind = rng.randrange(9)
        if kind < 4 and isinstance(target, dict):
            field = rng.choice(["dtype", "shape", "data_offsets"])
            values = target.get(field)
            if isinstance(values, list) and values and rng.random() < 0.8:
                odd = copy.deepcopy(rng.choice(ODD))
                values[rng.randrange(len(values))] = rng.choice([*EDGES, odd])
            else:
                target[field] = copy.deepcopy(rng.choice([*ODD, *DTYPES]))
        elif kind == 4:
            header[rng.choice(["a", "new", "__metadata__"])] = copy.deepcopy(
                rng.choice([*ODD, entry()])
            )
        elif kind == 5 and isinstance(target, dict):
            target.pop(rng.choice(["dtype", "shape", "data_offsets"]), None)
        elif kind == 6:
            data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data + b"x"
        elif kind == 7:
            declared = rng.choice([e for e in EDGES if 0 <= e < 2**64])
        else:
            del header[name]
    text = bytearray(json.dumps(header).encode())
    if rng.random() < 0.2:
        text[rng.randrange(len(text))] = rng.randrange(256)
    return raw(bytes(text), bytes(data), declared)


def test_safetensors_fuzzed_file_is_accepted_correctly_or_a_named_error(tmp_path):
    rng = random.Random(20240711)
    header = {
        "a": entry("F32", (2, 3), 0, 24),
        "b": entry("BF16", (4,), 24, 32),
        "c": entry("I64", (), 32, 40),
        "d": entry("F8_E4M3", (0,), 40, 40),
        "__metadata__": {"format": "pt"},
    }
    valid = raw(header, bytes(range(40)))
    inputs, accepted, unnamed = 4000, 0, 0
    for _ in range(inputs):
        content = mutate(rng, valid)
        try:
            file = SafetensorsFile(write(tmp_path, content))
        except ModelFormatError as e:
            unnamed += "x.safetensors" not in str(e)
            continue
        accepted += 1
        published = dict(safetensors.deserialize(content))  # raises if the published reader refuses
        assert set(published) == set(file.tensors)
        for name, expected in published.items():
            info = file.tensors[name]
            assert list(info.shape) == expected["shape"]
            assert content[info.start : info.start + info.nbytes] == bytes(expected["data"])
            assert file.tensor(name).shape == info.shape
    print(f"{inputs} inputs, {accepted} accepted, {inputs - accepted} named errors, 0 others")
    assert 0 < accepted < inputs
    assert unnamed == 0
