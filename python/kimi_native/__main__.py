"""python -m kimi_native, and the command kimi-native: the command line."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs cli.main; an interrupt while it is still being imported gets its exit code and no traceback either."""
    try:
        from kimi_native import cli
    except KeyboardInterrupt:
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
