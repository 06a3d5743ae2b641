"""What reading a stranger's cache may never do, watched by an audit hook while it is read.

Forbidden are: running or compiling code (a spec is parsed to a tree, which runs nothing), importing what was not imported
before, other processes, sockets, native libraries, pickles, and files outside the folders that are named, or written ones.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORBIDDEN = (
    "cpython.run_", "ctypes.call", "ctypes.dl", "ctypes.set_",
    "exec", "fcntl.fcntl", "fcntl.ioctl", "ftplib.", "http.", "import", "marshal.", "os.exec", "os.fork", "os.kill",
    "os.posix_spawn", "os.putenv", "os.spawn", "os.startfile", "os.system", "os.unsetenv", "pickle.", "pty.", "smtplib.",
    "socket.", "sqlite3.", "subprocess.", "syslog.", "telnetlib.", "urllib.", "webbrowser.",
)  # fmt: skip
READS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "glob.")
WRITES = (
    "os.chflags", "os.chmod", "os.chown", "os.link", "os.lockf", "os.mkdir", "os.remove", "os.removexattr", "os.rename",
    "os.rmdir", "os.setxattr", "os.symlink", "os.truncate", "os.utime", "shutil.", "tempfile.",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class Breach(BaseException):
    """Something forbidden was about to happen."""


class Hung(BaseException):
    """Reading took longer than any reading should."""


class _Watch:
    def __init__(self) -> None:
        self.on = False
        self.readable: tuple[Path, ...] = ()
        self.writable: tuple[Path, ...] = ()
        self.breaches: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and (why := self._wrong(event, arguments)):
            self.breaches.append(why)  # who reads might catch what is raised here
            raise Breach(why)

    def _wrong(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event.startswith(FORBIDDEN):
            return f"{event} {arguments!r:.200}"
        if event == "compile" and arguments[1] != "<unknown>":  # ast.parse says so
            return f"compile {arguments!r:.200}"
        if event == "open":
            path, _, flags = arguments
            if flags & os.O_NOFOLLOW and not isinstance(path, int):  # a link itself is not followed
                path = os.path.join(os.path.realpath(os.path.dirname(os.fsdecode(path))), ".")  # noqa: PTH118, PTH120
            return self._outside(event, path, self.writable if flags & _WRITING else self.readable)
        if event.startswith(READS):
            return self._outside(event, arguments[0], self.readable)
        if event.startswith(WRITES):
            return self._outside(event, arguments[0], self.writable)
        return None

    def _outside(self, event: str, path: Any, folders: tuple[Path, ...]) -> str | None:
        if isinstance(path, int):  # opened before
            return None
        real = os.path.realpath(os.fsdecode(path))
        inside = any(real == str(f) or real.startswith(f"{f}{os.sep}") for f in folders)
        return None if inside else f"{event} {path!r:.200}"


_WATCH = _Watch()
sys.addaudithook(_WATCH)  # there is no way back: it sleeps but in watched()


@contextlib.contextmanager
def watched(*readable: Path, writable: tuple[Path, ...] = (), seconds: float = 20) -> Iterator[None]:
    """Nothing forbidden happens inside, and it ends in time. Raises :class:`Breach`, :class:`Hung`."""

    def hung(*_: object) -> None:
        raise Hung(f"not done after {seconds:g} s")

    installed = (Path(p) for p in sys.path if p)  # where the version of a library is looked up
    _WATCH.readable = tuple(p.resolve() for p in (*readable, *writable, *installed))
    _WATCH.writable = tuple(p.resolve() for p in writable)
    _WATCH.breaches.clear()
    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _WATCH.on = True
    try:
        yield
    finally:
        _WATCH.on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if _WATCH.breaches:
        raise Breach(_WATCH.breaches[0])


def limit_memory(more: int) -> int:
    """This process may grow by ``more`` bytes of address space from here. Returns what it may have."""
    most = _status("VmSize") + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return most


def memory() -> dict[str, int]:
    """The most that this process has had so far, in bytes: of addresses, and of memory in use."""
    return {"addresses": _status("VmPeak"), "in_use": _status("VmHWM")}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"no {key} in /proc/self/status")
