"""What a run prints and logs.

A line is logged after its step, a checkpoint is saved every --save-every steps: after a crash the
logs are ahead. A resumed run cuts them back to its checkpoint and writes the same lines again.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from runtime.distributed import all_gather_object
from runtime.errors import UserError
from runtime.ranks import rank


def print0(text: str) -> None:
    """Print on the first rank."""
    if rank() == 0:
        print(text, flush=True)


def shorten(text: str, width: int) -> str:
    """The text in one line of at most `width` characters; two dots mark a cut."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]} .."


class JsonlLog:
    """A file of JSON lines that the first rank writes, equally many for each step. The first write
    drops the lines after the first `steps` steps; not earlier, so that a refused --resume changes
    nothing. Raises UserError if one of the kept lines is damaged or missing."""

    def __init__(self, path: Path, steps: int, lines_per_step: int = 1) -> None:
        self.path = path
        self.is_cut_back = False
        self.kept_lines = []
        i = 0
        if rank() == 0 and steps:
            try:
                if not path.is_file():  # a FIFO would be waited for
                    raise FileNotFoundError
                self.kept_lines = path.read_bytes().split(b"\n")[: steps * lines_per_step]
                for i in range(steps * lines_per_step):
                    if json.loads(self.kept_lines[i])["step"] != i // lines_per_step + 1:
                        raise ValueError
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                raise UserError(f"--resume: {path}: line {i + 1}, of a step before the checkpoint, "
                                "is damaged or missing; restore the file, or start again without "
                                "--resume, which moves this run aside") from error

    def write(self, row: dict, replaces_last: bool = False) -> None:
        """Append a row, whose NaN and infinities become null; or, before any other is written, put
        it in place of the last kept line. Raises UserError if it cannot."""
        if rank() != 0:
            return
        line = json.dumps(finite_or_null(row))
        if replaces_last:
            self.kept_lines[-1] = line.encode()
        try:
            if not self.is_cut_back:
                partial = self.path.with_suffix(".partial")
                partial.write_bytes(b"".join(line + b"\n" for line in self.kept_lines))
                partial.replace(self.path)
                self.is_cut_back = True
            if not replaces_last:
                with open(self.path, "a") as file:
                    print(line, file=file)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error}); --resume continues from the "
                            "last checkpoint") from error


class MetricsLog:
    """The one place where each step's metrics go: out/metrics.jsonl, and with `tensorboard` the
    numbers to out/tensorboard. The steps of an earlier run after `steps_done` are discarded;
    `.last_row` is the last one before.

    A fork adds wandb here: docs/forking.md shows how.
    """

    def __init__(self, out: Path, steps_done: int, tensorboard: bool = False) -> None:
        self.jsonl = JsonlLog(out / "metrics.jsonl", steps_done)
        kept = self.jsonl.kept_lines
        self.last_row = all_gather_object(json.loads(kept[-1]) if kept else {})[0]
        self.tensorboard = None
        if tensorboard and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(out / "tensorboard", purge_step=steps_done + 1)

    def complete_last_row(self, fields: dict) -> None:
        """Write last_row again, with more fields: in one move, as without this row the checkpoint
        would be ahead of the log."""
        self.jsonl.write(self.last_row | fields, replaces_last=True)
        self.write_scalars(fields, self.last_row["step"])

    def write(self, row: dict) -> None:
        """`row` has numbers, texts and dicts of numbers by name; row["step"] counts from 1."""
        self.jsonl.write(row)
        self.write_scalars(row, row["step"])

    def write_scalars(self, row: dict, step: int) -> None:
        if self.tensorboard:
            for name, value in flatten(row):
                if name != "step" and isinstance(value, int | float):
                    self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()  # a killed run loses no step


def finite_or_null(value: object) -> object:
    """The value for JSON, which knows no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: finite_or_null(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flatten(row: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """{"parts": {"accuracy": 1.0}} -> pairs such as ("parts/accuracy", 1.0)."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
