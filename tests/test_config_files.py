"""config.json on the disk, and whatever else somebody may write into it."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from family_configs import WRAPPED
from kimi_native.config import KimiConfig, load_config
from kimi_native.errors import ConfigError
from tiny_checkpoint import K2, TINY, V2_LITE

# ---- files ----------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str | bytes, name: str = "config.json") -> Path:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


DEEP = '{"a":' * 10_000 + "1" + "}" * 10_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nests too deep"),
        (DEEP.replace("{", "[").replace('"a":', "").replace("}", "]"), "nests too deep"),
        ('{"a":' * 200 + "1" + "}" * 200, "at most 64 deep"),
        ("", "must be valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("{", "must be valid JSON"),
        (b"\xff\xfe{}", "must be valid JSON"),
        ('{"rope_theta": NaN}', "must be finite"),
        ('{"rope_theta": -Infinity}', "must be finite"),
        ('{"model_type": "kimi_k2", "model_type": "kimi_k2"}', "must appear once"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "must be valid JSON"),
        ('{"\\u001b[31m": 1, "model_type": "deepseek_v3"}', "vocab_size is missing"),
    ],
)
def test_config_malformed_file_is_a_named_error(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path, text))
    assert "config.json" in str(error.value)
    assert len(str(error.value)) < 1000


def test_config_huge_number_is_a_named_error(tmp_path):
    text = json.dumps(TINY).replace('"rope_theta": 10000.0', '"rope_theta": 1e999')
    with pytest.raises(ConfigError, match="rope_theta"):
        load_config(write(tmp_path, text))


def test_config_unprintable_key_is_printed_escaped(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, json.dumps(TINY | {"\x1b[31m\ud800": 1})))
    assert "\x1b" not in str(error.value)
    str(error.value).encode()


def test_config_oversized_file_is_a_named_error(tmp_path):
    with pytest.raises(ConfigError, match="at most 16777216 bytes"):
        load_config(write(tmp_path, " " * ((16 << 20) + 1)))


def test_config_missing_file_is_a_named_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", write(tmp_path, "") / "config.json"):
        with pytest.raises(ConfigError, match=r"config\.json"):
            load_config(folder)


def test_config_link_out_of_the_folder_is_refused(tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(TINY))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(ConfigError, match="must stay inside the model folder"):
        load_config(folder)


def test_config_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="must be a regular file"):
        load_config(tmp_path)


def test_config_imports_no_torch():
    code = "import kimi_native.config, sys; assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


# ---- anything -------------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**18, 1e308, "yarn", "default", "re:(a+)+", "greedy"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def check_anything(d: dict) -> bool:
    """Parses or raises a named error; what parses gives finite numbers."""
    try:
        c = KimiConfig.from_dict(d)
    except (ConfigError, NotImplementedError) as e:
        return len(str(e)) > 2000
    numbers = [*c.rope_inv_freq(), c.rope_magnitude(), c.softmax_scale()]
    assert all(math.isfinite(x) and x > 0 for x in numbers)
    return False


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_config_any_value_at_any_key_parses_or_is_a_named_error(data):
    d = copy.deepcopy(data.draw(st.sampled_from([TINY, K2, WRAPPED, V2_LITE])))
    for _ in range(data.draw(st.integers(1, 3))):
        inner = d
        while True:
            key = data.draw(st.sampled_from(sorted(inner)))
            if not (isinstance(inner[key], dict) and inner[key]) or data.draw(st.booleans()):
                break
            inner = inner[key]
        inner[key] = data.draw(JSON_VALUES)
    assert not check_anything(d)


def test_config_mutated_text_parses_or_is_a_named_error(tmp_path):
    rng = random.Random(7)
    text = json.dumps(WRAPPED | {"text_config": K2})
    parsed = 0
    for _ in range(800):
        content = bytearray(text.encode())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content))
            new = rng.choices(b'{}[],:"0123456789.-eaN\x00\xff', k=rng.randint(0, 2))
            content[at : at + rng.randint(0, 2)] = bytes(new)
        write(tmp_path, bytes(content))
        try:
            load_config(tmp_path)
            parsed += 1
        except (ConfigError, NotImplementedError):
            continue
    print(f"800 inputs, {parsed} parsed, {800 - parsed} named errors, 0 others")
    assert 0 < parsed < 800
