"""Names of files in a checkpoint folder that both its readers and its writers must spell alike."""

from __future__ import annotations

from pathlib import Path

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
# There from the first to the last write of `kimi-native quantize`; its presence says that the folder is not finished.
UNFINISHED_NAME = "quantize-state.json"
# kimi-nano, which is part of the package: what `load` opens if it is given no folder.
NANO_FOLDER = Path(__file__).parent / "nano" / "model"
