"""A folder --out: its lock, and how what an earlier training run or evaluation has left in it moves
aside."""

import fcntl
import os
import shutil
from itertools import count
from pathlib import Path
from typing import TextIO

from runtime.errors import LOST_PEER, UserError
from runtime.logging import print0

# What only a training run leaves; what training runs and evaluations leave; what nobody misses
TRAINED = ("checkpoint", "checkpoint.old", "model", "adapter", "metrics.jsonl")
RESULTS = (*TRAINED, "predictions.jsonl", "predictions.partial", "samples.jsonl", "scores.json",
           "tensorboard", "curves.png", "report.html")
LITTER = ("checkpoint.partial", "model.partial", "adapter.partial", "metrics.partial",
          "samples.partial", "ended.txt")
ENTRIES = (*RESULTS, *LITTER)


def lock(out: Path) -> TextIO:
    """Let one run at a time write to a folder, which is made: except on Linux, workers outlive a
    killed torchrun, and a --resume beside them would spoil both. Closing the returned file
    unlocks it. Raises UserError if it cannot."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a")  # noqa: SIM115  it has to stay open
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out}: another run is writing there; end it (except on Linux, "
                        "workers outlive a killed torchrun)")
    except OSError as error:  # some network file systems have no locks
        print0(f"--out {out} cannot be locked ({error}): make sure that no other run writes there")
    return file


def print_last_end(out: Path) -> None:
    """Say why the last run in a folder ended, if it was not complete."""
    ended, log = out / "ended.txt", out / "metrics.jsonl"
    text = ended.read_text(errors="replace") if ended.is_file() else ""
    steps = log.read_bytes().count(b"\n") if log.is_file() else 0
    entries = [line for line in text.splitlines() if line.startswith("rank ")]
    if entries:  # the cause is not in those that only saw another rank end
        cause = min(entries, key=lambda entry: LOST_PEER in entry)
        print0(f"--resume: the last run ended: {cause}")
    elif steps and not (out / "model").exists():
        print0(f"--resume: the last run ended without a word after step {steps}")


def clear(out: Path, keep_run: bool) -> None:
    """Leave nothing of an earlier training run or evaluation in a folder. With keep_run its results
    move aside, and the rest with them."""
    entries = [out / name for name in ENTRIES if os.path.lexists(out / name)]
    if keep_run and entries and entries[0].name in RESULTS:
        move_aside(out, entries)
    else:
        for entry in entries:
            remove(entry)


def move_aside(out: Path, entries: list[Path]) -> None:
    """Move what a training run, an evaluation or a suite has left in a folder to the next free
    OUT.1, OUT.2, .. Raises UserError if it cannot."""
    try:
        folders = (Path(f"{out.resolve()}.{n}") for n in count(1))
        folder = next(folder for folder in folders if not os.path.lexists(folder))
        folder.mkdir()
        for entry in reversed(entries):  # results last: if this is killed, the rest follows later
            entry.rename(folder / entry.name)
    except OSError as error:
        raise UserError(f"--out {out} holds results, which cannot be moved aside ({error}); choose "
                        "another --out, or replace them by --overwrite") from error
    hint = f"; that run continues with --resume --out {folder}" if is_unfinished(folder) else ""
    print0(f"--out {out} held results, which are now in {folder} (--overwrite replaces them){hint}")


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def last_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint, if there is one. A run that is killed between the renames of
    save_checkpoint leaves it as checkpoint.old."""
    folders = (out / "checkpoint", out / "checkpoint.old")
    return next((folder for folder in folders if os.path.lexists(folder)), None)


def is_unfinished(out: Path) -> bool:
    """Whether a folder holds a run that can continue, whose model/ is not written yet."""
    return last_checkpoint(out) is not None and not (out / "model").exists()
