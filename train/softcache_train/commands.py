"""Commands of ours, run as processes: who trains never holds a builder, nor a teacher."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from softcache.errors import SoftcacheError


class CommandFailed(SoftcacheError):  # noqa: N818 - named for what it is
    """A command stopped, having said why; ``exit_code`` is its own."""


def softcache(*arguments: object) -> None:
    """Say and run a command of softcache, in a process of its own."""
    words = [str(a) for a in arguments]
    say(f"\n$ {script('softcache')} {shlex.join(words)}")
    # What it says on stdout goes to stderr (2): our stdout is the table's.
    code = subprocess.run([sys.executable, "-m", "softcache.cli", *words], stdout=2, check=False).returncode
    if code:
        failed = CommandFailed(
            f"softcache {words[0]} stopped with exit code {code}, see above; if the folder is of another "
            "machine or of other versions, remove it or give another with -o"
        )
        failed.exit_code = max(code, 1)  # negative: a signal
        raise failed


def script(name: str) -> str:
    """How to call a command of ours from here: by name, or where it lies beside this Python."""
    beside, here = Path(sys.executable).with_name(name), Path.cwd()
    if shutil.which(name) or not beside.exists():
        return name
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
