"""Runs chat templates in a process that may use little memory and little time, and can be ended at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_native.errors import RequestError

_WORKER = Path(__file__).with_name("sandbox_worker.py")
_START_SECONDS = 60  # of an interpreter with jinja2 on a busy machine


@dataclass(frozen=True)
class Limits:
    """What one template may use.

    seconds         of wall-clock time for one prompt
    memory_bytes    address space of the worker process, of which the interpreter takes some 60 MB
    template_chars  its own length; the longest published ones have 30,000
    output_chars    of one prompt
    loop_steps      the lengths of all its `range` together
    """

    seconds: int = 5
    memory_bytes: int = 512 << 20
    template_chars: int = 1 << 18
    output_chars: int = 1 << 22
    loop_steps: int = 100_000


class Sandbox:
    """A worker process, started at the first render and kept; one render at a time. Safe to use from several threads.

    A template that breaks a limit, or the worker, costs that render alone: the next one gets a new worker.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, template: str, variables: Sequence[dict[str, Any]], mark: str) -> list[str]:
        """The template's output for each of the sets of variables (JSON values).

        mark  character that tojson never escapes

        Raises RequestError naming the template's line for whatever goes wrong in it, and for a broken limit.
        """
        if len(template) > self.limits.template_chars:
            raise RequestError(
                f"chat template: must have at most {self.limits.template_chars} characters (got {len(template)})"
            )
        request = {"template": template, "variables": list(variables), "mark": mark}
        with self._lock:
            reply = self._ask(json.dumps(request).encode() + b"\n")
        if "error" in reply:
            where = (
                "chat template" if reply["line"] is None else f"chat template: line {reply['line']}"
            )
            raise RequestError(f"{where}: {reply['error']}")
        return reply["texts"]

    def close(self) -> None:
        """Ends the worker, if there is one; a later render starts another."""
        with self._lock:
            self._stop()

    def _ask(self, line: bytes) -> dict[str, Any]:
        worker = self._running()
        # What is escaped has up to six characters where the text has one, and there may be two texts.
        longest = 16 * self.limits.output_chars + 4096
        with self._deadline(worker, self.limits.seconds) as ended:
            answer = _exchange(worker, line, longest)
        if answer.endswith(b"\n"):
            return json.loads(answer)
        self._stop()
        if ended.is_set():
            raise RequestError(
                f"chat template: must be done within {self.limits.seconds} s (got more); it was ended"
            )
        raise RequestError("chat template: must not end its process (got a worker that died)")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # a fork shares the parent's pipes
            self._worker = None
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        self._stop()
        # -P: this folder's types.py must not become the standard library's.
        command = [sys.executable, "-P", str(_WORKER), json.dumps(dataclasses.asdict(self.limits))]
        worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={k: v for k, v in os.environ.items() if k in ("PYTHONPATH", "PYTHONHOME", "TZ")},
            start_new_session=True,  # Ctrl-C is for the parent
        )
        self._worker, self._owner = worker, os.getpid()
        weakref.finalize(self, _end, worker, self._owner)
        with self._deadline(worker, _START_SECONDS):
            answer = _exchange(worker, b"", 16)
        if answer != b"{}\n":
            self._stop()
            raise RuntimeError("chat template: the sandbox must start (is jinja2 installed?)")
        return worker

    @contextlib.contextmanager
    def _deadline(
        self, worker: subprocess.Popen[bytes], seconds: float
    ) -> Iterator[threading.Event]:
        """Kills the worker when the time is up, which ends any wait for it."""
        ended = threading.Event()

        def end() -> None:
            ended.set()
            worker.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield ended
        except BaseException:
            self._stop()  # half an exchange would be read by the next one
            raise
        finally:
            timer.cancel()

    def _stop(self) -> None:
        if self._worker is not None:
            _end(self._worker, self._owner)
            self._worker = None


def _exchange(worker: subprocess.Popen[bytes], line: bytes, longest: int) -> bytes:
    """The line that answers a line, or what there is of it when the worker ends."""
    try:
        worker.stdin.write(line)
        worker.stdin.flush()
    except BrokenPipeError:
        return b""
    return worker.stdout.readline(longest)


def _end(worker: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():
        return
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
