"""The benchmark program kn_bench: where it lies, running it, and the rows it prints."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("kn_bench")


def run_program(arguments: Sequence[str]) -> int:
    """Runs kn_bench with its output going where ours goes; returns its exit code.

    Raises RuntimeError if this installation has no program.
    """
    return exit_code(subprocess.run(_command(arguments), check=False).returncode)


def exit_code(returncode: int) -> int:
    """Of a process, as subprocess tells it: one that a signal ended has 128 and its number, as in a shell."""
    return returncode if returncode >= 0 else 128 - returncode


def program_rows(arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Runs kn_bench with --json and yields its rows as they come.

    Raises RuntimeError if this installation has no program, or if it fails, with what it said.
    """
    command = _command([*arguments, "--json"])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            yield json.loads(line)
        said = process.stderr.read().strip()
    if process.returncode != 0:
        raise RuntimeError(f"kn_bench: must exit with 0 (got {process.returncode}: {said})")


def _command(arguments: Sequence[str]) -> list[str]:
    if not PROGRAM.exists():
        raise RuntimeError(
            f"bench: {PROGRAM} must exist (this installation was built with KN_BENCH=OFF); "
            "install again without that setting"
        )
    return [str(PROGRAM), *arguments]
