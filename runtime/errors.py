"""What is meant for the user: the one exception, warnings, and why a process ended."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.ranks import rank

LOST_PEER = "another process has ended"
END_FILES = []  # where record_end writes: ended.txt of this process's run, while there is one


class UserError(Exception):
    """Something the user has to fix: one line that names the file, the record, what is wrong and
    what to do."""


class NotServedError(UserError):
    """A source of data cannot serve a task."""


def record_end(code: int, why: str) -> bool:
    """Leave the reason in the run's folder, if this process has a run; returns whether it has."""
    for path in END_FILES:  # on a full disk stderr has to do
        with suppress(OSError), open(path, "a", errors="replace") as file:
            print(f"rank {rank()}, exit code {code}: {why}", file=file)
    return bool(END_FILES)


def warn(text: str) -> None:
    """A line on stderr, of the first process alone."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def errors_as_warnings(what: str) -> Iterator[None]:
    """A context that makes what a run can do without: an error in it is a warning."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  whatever fails in drawing, the model is worth more
        warn(f"warning: {what} cannot be made ({first_line(error)})")


def why_not_loaded(name: str, error: BaseException) -> str:
    """Why a model cannot be loaded, a folder or a hub id; of a possible hub id also what to do."""
    why = f"({first_line(error)})"
    if Path(name).exists():
        return why
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        return f"{why}; there is no folder {name}"
    return (f"{why}; if {name} is a hub id and there is no network here, run `hf download {name}` "
            "where there is one, and set HF_HUB_OFFLINE=1 here")


def first_line(error: BaseException) -> str:
    """The type and the first line of an error, for the inside of a UserError."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
