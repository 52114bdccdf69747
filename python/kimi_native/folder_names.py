"""Names of files in a checkpoint folder that both its readers and its writers must spell alike."""

from __future__ import annotations

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
# There from the first to the last write of `kimi-native quantize`; its presence says that the folder is not finished.
UNFINISHED_NAME = "quantize-state.json"
