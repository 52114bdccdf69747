"""Puts this folder's modules on the path and builds the shim before the first test needs it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
