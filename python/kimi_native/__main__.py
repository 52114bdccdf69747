"""python -m kimi_native: the command line."""

from __future__ import annotations

import sys

from kimi_native.cli import main

if __name__ == "__main__":
    sys.exit(main())
