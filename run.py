"""One training run: its flags, folder, checkpoints and logs, how it is stopped, and its learning rate. Shared by the two
training scripts.

A log line is written after its step and a checkpoint every --save-every steps, so after a crash the logs are ahead; a
resumed run cuts them back to its checkpoint and writes the same lines again.
"""

import argparse
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed import DistError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

import parallel
from data import HELDOUT_SEED, BadInput, Sample, fingerprint, first_line
from model import Policy

# flags that change neither data nor loss, and so may change when a run is resumed
FREE = ("save-every", "eval-every", "shard-size", "micro-batch", "pack-tokens", "gradient-checkpointing", "compile")
warnings.filterwarnings("ignore", "torch.distributed is disabled")                   # one process is no mishap


# ----------------------------------------------------------------------------------------------------------------------
# Flags

class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows a script's docstring as it is written, and the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def add_resume(flags: argparse._ArgumentGroup) -> None:
    """The flag --resume, after all others, as its help names those that may have changed."""
    free = [name for action in flags._actions for name in action.option_strings if name.removeprefix("--") in FREE]
    flags.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one; of the flags "
                       f"only {', '.join(free)} may have changed")


def natural(text: str) -> int:
    """argparse type: a whole number from 0 on, below the seed of the held-out scenes."""
    if not text.isdecimal() or int(text) >= HELDOUT_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {HELDOUT_SEED - 1}")
    return int(text)


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a folder `checkpoint` with the tensors of all ranks, and run.json with the run's flags and progress

def start_or_resume(args: argparse.Namespace, settings: dict[str, str], fresh: dict) -> dict:
    """Make `args.out`, and return the run's progress: `fresh`, or with `args.resume` that of the last checkpoint, whose
    settings must be the same. A new run removes what an earlier one left, or a later --resume would take its checkpoint for
    this run's."""
    if not args.resume and Path(args.model).resolve().is_relative_to(args.out.resolve()):
        raise BadInput(f"--model {args.model} lies in --out {args.out}, which a new run clears; choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    lock(args.out)
    folder = parallel.gathered(last_checkpoint(args.out) if args.resume else None)[0]  # as the first rank sees it
    if args.resume and not folder:
        if (args.out / "model").exists():
            raise BadInput(f"--resume: {args.out} holds a model but no checkpoint; choose another --out, or leave --resume out")
        say(f"--resume: no checkpoint in {args.out} yet, the run begins")
    if not folder:
        if parallel.rank() == 0:
            for name in ("checkpoint", "checkpoint.old", "checkpoint.partial", "model", "adapter"):
                shutil.rmtree(args.out / name, ignore_errors=True)
            for name in ("metrics.jsonl", "samples.jsonl", "curves.png", "report.html"):
                (args.out / name).unlink(missing_ok=True)
        parallel.wait()
        return fresh
    file = folder / "run.json"
    try:
        saved = json.loads(file.read_text())
        changed = {name: f"--{name} was {saved['settings'].get(name)} and is now {value}"
                   for name, value in settings.items() if value != saved["settings"].get(name)}
        progress = fresh | saved["progress"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"--resume: {file} is damaged ({first_line(error)}); {START_AGAIN}") from error
    if refused := [change for name, change in changed.items() if name not in FREE]:
        raise BadInput(f"--resume: {', '.join(refused)}: that would be another run")
    for change in changed.values():
        say(f"--resume: {change}")
    return progress


START_AGAIN = "start again without --resume, which clears the folder"


def settings_of(args: argparse.Namespace, data: list[Sequence[Sample]]) -> dict[str, str]:
    """What makes a run what it is: its flags by name, and the samples that were found."""
    flags = {name.replace("_", "-"): str(value) for name, value in vars(args).items() if name not in ("out", "resume")}
    return flags | {"data (as read)": ", ".join(map(fingerprint, data))}


locks: list[int] = []  # open files, as long as the process lives


def lock(out: Path) -> None:
    """See that one run at a time writes to a folder: workers outlive a torchrun that is killed, and a --resume beside them
    would spoil both."""
    if parallel.rank() == 0:
        locks.append(os.open(out / ".lock", os.O_CREAT | os.O_RDWR))
        try:
            fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"--out {out}: another run is writing there; end it (workers outlive a torchrun that is killed)")
        except OSError as error:  # some network file systems have no locks
            say(f"--out {out} cannot be locked ({error}): see that no other run writes there")


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint, if there is one. Between the two renames of save_checkpoint it is the old one."""
    return next((folder for folder in (out / "checkpoint", out / "checkpoint.old") if folder.exists()), None)


def tensors_of(policy: Policy, optimizer: Optimizer, reference: Policy | None) -> dict:
    """All weights and moments by name, sharded as they are; the optimiser's by parameter, so that ranks may change."""
    fresh = not optimizer.state
    moments = get_optimizer_state_dict(policy, optimizer)["state"]
    if fresh:  # to have moments at all it has made a step without gradients; let that not count in Adam's bias correction
        for moment in optimizer.state.values():
            moment["step"].zero_()
    return {"policy": get_model_state_dict(policy), "moments": moments,
            "reference": get_model_state_dict(reference) if reference else {}}


def save_checkpoint(out: Path, settings: dict[str, str], progress: dict, policy: Policy, optimizer: Optimizer,
                    reference: Policy | None = None) -> None:
    """All that an exact resume needs, written beside the last checkpoint, which goes only when this one is complete. Random
    numbers are a function of the seed and the step, so there is no state of theirs."""
    partial, folder, old = (out / f"checkpoint{ending}" for ending in (".partial", "", ".old"))
    try:
        if parallel.rank() == 0 and partial.exists():
            shutil.rmtree(partial)
        parallel.wait()
        dcp.save(tensors_of(policy, optimizer, reference), checkpoint_id=partial, no_dist=parallel.ranks() == 1)
        state = {"settings": settings, "progress": progress, "files": checksums(partial)}
        if parallel.rank() == 0:
            with open(partial / "run.json", "w") as file:
                file.write(json.dumps(state))
                file.flush()
                os.fsync(file.fileno())
            if folder.exists():  # else a run was killed between these two lines, and the old one is the last that is whole
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    except (CheckpointException, OSError) as error:  # the first is no Exception
        shutil.rmtree(partial, ignore_errors=True)
        raise BadInput(f"{partial} cannot be written ({reason(error)}); is the disk full? The last checkpoint, if there was "
                       "one, is whole: --resume goes on from it")
    parallel.wait()


def load_checkpoint(out: Path, policy: Policy, optimizer: Optimizer, reference: Policy | None = None) -> None:
    """Read the last checkpoint's tensors, of any number of ranks, into the modules and the optimiser. Resume from your own
    checkpoints only: torch.distributed.checkpoint describes them in a pickle. Raises BadInput if a file is not as it was
    written."""
    folder = last_checkpoint(out)
    written, found = json.loads((folder / "run.json").read_text())["files"], checksums(folder)
    for name in written:
        if written[name] != found.get(name):
            raise BadInput(f"--resume: {folder / name} is damaged or missing; {START_AGAIN}")
    tensors = tensors_of(policy, optimizer, reference)
    try:
        dcp.load(tensors, checkpoint_id=folder, no_dist=parallel.ranks() == 1)
    except CheckpointException as error:
        raise BadInput(f"--resume: {folder} is not of this model ({reason(error)})") from error
    set_model_state_dict(policy, tensors["policy"])
    groups = get_optimizer_state_dict(policy, optimizer)["param_groups"]
    set_optimizer_state_dict(policy, optimizer, {"state": tensors["moments"], "param_groups": groups})
    if reference:
        set_model_state_dict(reference, tensors["reference"])


def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file that holds tensors, or tells which; every rank reads some of them."""
    files, sums = parallel.gathered(sorted(set(folder.iterdir()) - {folder / "run.json"}))[0], {}  # as the first rank sees it
    for path in files[parallel.rank() :: parallel.ranks()]:
        sums[path.name] = 0
        with open(path, "rb") as file:
            while block := file.read(2**24):
                sums[path.name] = zlib.crc32(block, sums[path.name])
    return {name: value for part in parallel.gathered(sums) for name, value in part.items()}


def reason(error: BaseException) -> str:
    """One line of an error, of a CheckpointException that of the rank it wraps."""
    inner = getattr(error, "failures", {})
    return first_line(next(iter(inner.values()))[0] if inner else error)


# ----------------------------------------------------------------------------------------------------------------------
# Logs

def say(text: str) -> None:
    """Print on the first rank."""
    if parallel.rank() == 0:
        print(text, flush=True)


class Log:
    """A file of JSON lines that the first rank writes. The first write, and no earlier one, lest a --resume that is refused
    spoil it, cuts it back to n lines: what a killed run wrote after its last checkpoint is written again."""

    def __init__(self, path: Path, n: int) -> None:
        self.path, self.n = path, n

    def write(self, row: dict) -> None:
        if parallel.rank():
            return
        row = {name: None if isinstance(value, float) and not math.isfinite(value) else value  # JSON knows no NaN
               for name, value in row.items()}
        try:
            if self.n is not None:
                lines = self.path.read_text().splitlines(keepends=True) if self.n else []
                self.path.with_suffix(".partial").write_text("".join(lines[: self.n]))
                self.path.with_suffix(".partial").replace(self.path)
                self.n = None
            with open(self.path, "a") as file:
                print(json.dumps(row), file=file)
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written ({error}); --resume goes on from the last checkpoint") from error


# ----------------------------------------------------------------------------------------------------------------------
# Guards

class Guard:
    """Counts the steps whose loss or gradient is not finite, for the loop to skip, and ends the run after ten in a row."""

    def __init__(self, skipped: int = 0) -> None:
        self.skipped, self.in_a_row = skipped, 0

    def finite(self, loss: torch.Tensor, norm: torch.Tensor, samples: Sequence[Sample]) -> bool:
        """`loss` is this rank's part, `norm` the whole gradient's, `samples` what they came from. The same on all ranks."""
        finite = bool(torch.isfinite(parallel.total(loss) + norm))
        self.skipped, self.in_a_row = self.skipped + (not finite), 0 if finite else self.in_a_row + 1
        if self.in_a_row == 10:
            ids = chain(*parallel.gathered([s.id for s in samples]))
            raise BadInput(f"loss or gradient was not finite 10 times in a row; lower --lr, or look at the last samples: "
                           f"{', '.join(ids)}")
        return finite


# ----------------------------------------------------------------------------------------------------------------------
# Stopping

signals: list[int] = []  # SIGTERM and SIGINT that have arrived


def finish_step_on_signal() -> None:
    """From now on SIGTERM and SIGINT do not end the process: the loop asks after each step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))


def asked_to_stop() -> bool:
    """True on all ranks if a signal has reached one of them."""
    return parallel.largest(len(signals)) > 0


def command() -> str:
    """The command line of this run, without --resume. How torchrun's nodes meet is not known here."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = [f"--nnodes={parallel.ranks() // local}", "--rdzv-..."] if parallel.ranks() > local else []
    launcher = ["torchrun", *nodes, f"--nproc-per-node={local}"] if parallel.ranks() > 1 else ["python"]
    return shlex.join([*launcher, *(arg for arg in sys.argv if arg != "--resume")])


# ----------------------------------------------------------------------------------------------------------------------
# Schedule

def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then linear decay; the step after the last would have rate 0."""
    return peak * min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))


# ----------------------------------------------------------------------------------------------------------------------
# The end

def script(main: Callable[[], None], interrupted: str = "the same command with --resume goes on from the last checkpoint, if "
           "one was written") -> None:
    """Call main. What is wrong with the input ends in one line; so does Ctrl-C, with a hint."""
    try:
        main()
        parallel.finish()
    except (BadInput, OSError) as error:
        leave(f"error: {error}")
    except KeyboardInterrupt:
        leave(f"interrupted; {interrupted}")
    except Exception as error:
        if parallel.ranks() == 1:
            raise
        lost = isinstance(error, DistError) or "Connection closed by peer" in str(error) or "Connection reset" in str(error)
        leave("error: another process has ended, see there; --resume goes on from the last checkpoint" if lost
              else traceback.format_exc())


def leave(message: str) -> None:
    """Exit with an error, at once where there are other ranks: an orderly exit would wait for them, and they for this one."""
    if parallel.ranks() == 1:
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    os._exit(1)
