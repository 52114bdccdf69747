"""These tests compare a GPU with the shim. tests/gpu/run.sh runs them, on a GPU or, to rehearse, without one; a plain
pytest run does not collect them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "simt"))

if os.environ.get("KIMI_NATIVE_GPU", "") not in ("required", "rehearsal"):
    collect_ignore_glob = ["test_*"]
