"""Where a checkpoint folder keeps its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kimi_native.errors import ConfigError
from kimi_native.json_file import read_json
from kimi_native.model_file import find_file

_MAX_FILE_BYTES = 64 << 20
_CONFIG_NAME = "tokenizer_config.json"


def template_source(folder: str | Path) -> str | None:
    """chat_template.jinja of the folder, else the chat_template of its tokenizer_config.json; None: it has none.

    Of several named templates the one named default. Raises ConfigError on a file that is malformed or too long.
    """
    if path := find_file(Path(folder), "chat_template.jinja"):
        return _read_source(path)
    source = read_tokenizer_config(folder).get("chat_template")
    if isinstance(source, list):
        named = [one for one in source if isinstance(one, dict) and one.get("name") == "default"]
        source = named[0].get("template") if named else None
    if source is not None and not isinstance(source, str):
        raise ConfigError(
            f"{Path(folder) / _CONFIG_NAME}: chat_template must be a string (got {type(source).__name__})"
        )
    return source


def read_tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """tokenizer_config.json of the folder, empty if it has none."""
    path = find_file(Path(folder), _CONFIG_NAME)
    return {} if path is None else read_json(path, max_bytes=_MAX_FILE_BYTES)


def _read_source(path: Path) -> str:
    with open(path, "rb") as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: must be at most {_MAX_FILE_BYTES} bytes (got more)")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: must be UTF-8 text ({error})") from None
