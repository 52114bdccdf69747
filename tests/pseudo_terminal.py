"""A program in a real pseudo-terminal, and what a person would see of it: control sequences are interpreted by pyte."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time

import pyte

TIMEOUT_S = 120  # importing torch on a busy machine takes a while


class PseudoTerminal:
    """Runs argv with the terminal as its controlling one, so that Ctrl-C is a signal as on a real one."""

    def __init__(self, argv, *, cwd, env, columns: int = 100, rows: int = 60) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=2000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        env = {**env, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            env.pop(name, None)
        pid, self._fd = pty.fork()
        if pid == 0:  # only system calls here: the parent may have threads
            for number in (signal.SIGINT, signal.SIGQUIT):  # a job in the background ignores both
                signal.signal(number, signal.SIG_DFL)
            os.chdir(cwd)
            os.execvpe(argv[0], argv, env)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._pid = pid
        self._status: int | None = None

    # ---- the keyboard -----------------------------------------------------------------------------------------------

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def enter(self, text: str = "") -> None:
        self.type(text + "\r")

    def press_ctrl(self, letter: str) -> None:
        os.write(self._fd, bytes([ord(letter.upper()) - ord("@")]))

    def forget(self) -> None:
        """Clears what was seen so far; only where the program waits at an empty prompt, which is shown again."""
        self.screen.reset()
        self.screen.history.top.clear()
        self.raw = b""
        self.enter()

    # ---- the screen -------------------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """Every line so far, those that scrolled away too, without trailing blanks."""
        history = [
            "".join(line[x].data for x in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        lines = [line.rstrip() for line in [*history, *self.screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def text(self) -> str:
        return "\n".join(self.lines())

    def dimmed(self) -> str:
        """All that was printed dim, which pyte does not know."""
        pieces = re.findall(rb"\x1b\[2m([^\x1b]*)\x1b\[0m", self.raw)
        return b"".join(pieces).decode()

    def wait_for(self, text: str, *, times: int = 1) -> None:
        """Until the text has been on the screen this many times."""
        self._read_until(lambda: self.text().count(text) >= times, f"{text!r} {times} times")

    def wait_for_prompt(self, prompt: str = ">") -> None:
        """Until the program waits behind its prompt on the last line."""
        self._read_until(lambda: self.lines()[-1:] == [prompt], f"the prompt {prompt!r}")

    def wait_for_exit(self) -> int:
        self._read_until(lambda: self._status is not None, "the end")
        return os.waitstatus_to_exitcode(self._status)

    def _read_until(self, condition, what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited for {what}, saw:\n{self.text()}")
            if self._status is not None:
                raise AssertionError(f"ended before {what}, with {self._status}:\n{self.text()}")
            self._read()

    def _read(self) -> None:
        ready, _, _ = select.select([self._fd], [], [], 0.1)
        if not ready:
            return
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # how Linux says that the other side is closed
            data = b""
        if not data:
            _, self._status = os.waitpid(self._pid, 0)
        self.raw += data
        self._stream.feed(data)

    def close(self) -> None:
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            _, self._status = os.waitpid(self._pid, 0)
        os.close(self._fd)
