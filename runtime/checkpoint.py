"""One training run's folder: its lock, its settings, its checkpoints, and how a signal ends it.

    out/checkpoint/           the tensors of all ranks, written by torch.distributed.checkpoint
    out/checkpoint/run.json   settings, progress, and a checksum of each of those files
"""

import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import warnings
import zlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Module
from torch.optim import Optimizer

from runtime.distributed import all_gather_object, all_reduce_max, barrier, rank, world_size
from runtime.errors import UserError, first_line
from runtime.logging import print0

# Flags that change neither the data nor the loss.
MAY_CHANGE_ON_RESUME = ("save-every", "eval-every", "shard-size", "micro-batch", "pack-tokens",
                        "gradient-checkpointing", "compile", "tensorboard")
FOLDERS = ("checkpoint", "checkpoint.old", "checkpoint.partial", "model", "model.partial",
           "adapter", "tensorboard")
FILES = ("metrics.jsonl", "samples.jsonl", "curves.png", "report.html")
START_AGAIN = "start again without --resume, which clears the folder"


def run_config(args: Namespace, fingerprints: Sequence[str]) -> dict[str, str]:
    """What makes a run what it is: its flags by name, and the data that it found."""
    flags = {name.replace("_", "-"): " ".join(value) if isinstance(value, list) else str(value)
             for name, value in vars(args).items()}
    config = {name: value for name, value in flags.items() if name not in ("out", "resume")}
    return config | {"data (as read)": ", ".join(fingerprints)}


class Run:
    """One training run, whose folder is locked until close() or the end of the process.

    .out       the folder, args.out
    .config    the settings that a resumed run must share, from run_config
    .progress  the caller's own dict, as the last checkpoint holds it
    """

    def __init__(self, args: Namespace, config: dict[str, str], fresh_progress: dict) -> None:
        """Begin a run, or with args.resume continue the one whose checkpoint is in args.out.

        A new run removes what an earlier one left; a later --resume would take an old checkpoint
        for this run's. Raises UserError if another run writes to the folder, or if the checkpoint
        is damaged or has other settings.
        """
        self.out = args.out
        self.config = config
        self.progress = fresh_progress
        self.received_signals = []
        self.old_handlers = {}
        if not args.resume and Path(args.model).resolve().is_relative_to(self.out.resolve()):
            raise UserError(f"--model {args.model} lies in --out {self.out}, which a new run "
                            "clears; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock_file = lock(self.out) if rank() == 0 else None
        # All ranks go by what the first one sees.
        folder = all_gather_object(last_checkpoint(self.out) if args.resume else None)[0]
        if folder:
            self.progress = read_progress(folder, config)
            if self.progress.keys() != fresh_progress.keys():
                raise UserError(f"--resume: {folder} is the checkpoint of another script; choose "
                                "another --out, or leave --resume out")
            return
        if args.resume:
            if (self.out / "model").exists():
                raise UserError(f"--resume: {self.out} holds a model but no checkpoint; choose "
                                "another --out, or leave --resume out")
            print0(f"--resume: no checkpoint in {self.out} yet, the run begins")
        if rank() == 0:
            for name in FOLDERS:
                shutil.rmtree(self.out / name, ignore_errors=True)
            for name in FILES:
                (self.out / name).unlink(missing_ok=True)
        barrier()

    def install_signal_handlers(self) -> None:
        """From now on SIGTERM and SIGINT do not end the process; they make should_stop() true."""
        received = self.received_signals
        for number in (signal.SIGTERM, signal.SIGINT):
            self.old_handlers[number] = signal.signal(
                number, lambda number, _: received.append(number))

    def close(self) -> None:
        """Restore the signal handlers and unlock the folder."""
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        if self.lock_file:
            self.lock_file.close()

    def should_stop(self) -> bool:
        """True on all ranks if a signal has reached one of them."""
        return all_reduce_max(len(self.received_signals)) > 0

    def resume_command(self) -> str:
        """This run's command line with --resume. The address where torchrun's nodes meet is not
        known here."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        nodes = [f"--nnodes={world_size() // local}", "--rdzv-..."] if world_size() > local else []
        torchrun = ["torchrun", *nodes, f"--nproc-per-node={local}"]
        launcher = torchrun if world_size() > 1 else ["python"]
        args = [arg for arg in sys.argv if arg != "--resume"]
        return shlex.join([*launcher, *args, "--resume"])

    def save_checkpoint(self, progress: dict, policy: Module, optimizer: Optimizer,
                        ref_model: Module | None = None) -> None:
        """Save all that an exact resume needs, beside the last checkpoint, which is removed when
        this one is complete. Random numbers have no state: they are a function of the seed and the
        step. Raises UserError if the disk is full."""
        folder, partial, old = (self.out / f"checkpoint{end}" for end in ("", ".partial", ".old"))
        try:
            if rank() == 0 and partial.exists():
                shutil.rmtree(partial)
            barrier()
            with warnings.catch_warnings():  # one process alone is no mistake
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.save(state_dict(policy, optimizer, ref_model), checkpoint_id=partial)
            files = checksums(partial)
            if rank() == 0:
                with open(partial / "run.json", "w") as file:
                    json.dump({"settings": self.config, "progress": progress, "files": files}, file)
                    file.flush()
                    os.fsync(file.fileno())
                if folder.exists():  # if not, a run was killed between the renames: keep `old`
                    shutil.rmtree(old, ignore_errors=True)
                    folder.rename(old)
                partial.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
        except (CheckpointException, OSError) as error:  # the first is no Exception
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{partial} cannot be written ({reason(error)}); is the disk full? The "
                            "last checkpoint, if any, is intact; --resume continues from it")
        barrier()
        self.progress = progress

    def load_checkpoint(self, policy: Module, optimizer: Optimizer,
                        ref_model: Module | None = None) -> None:
        """Read the last checkpoint's tensors, saved by any number of ranks, into the modules and
        the optimiser. Raises UserError if a file is not as it was written. Resume from your own
        checkpoints only: torch.distributed.checkpoint describes them in a pickle."""
        folder = last_checkpoint(self.out)
        written = read_run_json(folder)["files"]
        found = checksums(folder)
        for name in written:
            if written[name] != found.get(name):
                raise UserError(f"--resume: {folder / name} is damaged or missing; {START_AGAIN}")
        state = state_dict(policy, optimizer, ref_model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(state, checkpoint_id=folder)
        except CheckpointException as error:
            raise UserError(f"--resume: {folder} is not of this model ({reason(error)})") from error
        set_model_state_dict(policy, state["policy"])
        groups = get_optimizer_state_dict(policy, optimizer)["param_groups"]
        moments = {"state": state["moments"], "param_groups": groups}
        set_optimizer_state_dict(policy, optimizer, moments)
        if ref_model is not None:
            set_model_state_dict(ref_model, state["reference"])


def lock(out: Path) -> TextIO:
    """Let one run at a time write to a folder: workers outlive a torchrun that is killed, and a
    --resume beside them would spoil both. Closing the returned file unlocks it."""
    file = open(out / ".lock", "a")  # noqa: SIM115  it has to stay open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out}: another run is writing there; end it (workers outlive a "
                        "torchrun that is killed)")
    except OSError as error:  # some network file systems have no locks
        print0(f"--out {out} cannot be locked ({error}): make sure that no other run writes there")
    return file


def last_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint, if there is one. A run that is killed between the renames of
    save_checkpoint leaves it as checkpoint.old."""
    return next((f for f in (out / "checkpoint", out / "checkpoint.old") if f.exists()), None)


def read_run_json(folder: Path) -> dict[str, dict]:
    """settings, progress and files of a checkpoint. Raises UserError if one of them is missing."""
    file = folder / "run.json"
    try:
        saved = json.loads(file.read_text())
        return {name: dict(saved[name]) for name in ("settings", "progress", "files")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--resume: {file} is damaged ({first_line(error)}); "
                        f"{START_AGAIN}") from error


def read_progress(folder: Path, config: dict[str, str]) -> dict:
    """A checkpoint's progress. Raises UserError if its settings are not those of `config`. A flag
    that an older checkpoint does not know is not compared."""
    saved = read_run_json(folder)
    before = saved["settings"]
    changes = {name: f"--{name} was {before[name]} and is now {value}"
               for name, value in config.items() if name in before and value != before[name]}
    refused = [change for name, change in changes.items() if name not in MAY_CHANGE_ON_RESUME]
    if refused:
        raise UserError(f"--resume: {', '.join(refused)}: that would be another run; give the old "
                        "values, or start a new run in another --out")
    unknown = [f"the checkpoint does not know --{name}, now {config[name]}"
               for name in config if name not in before]
    for line in [*changes.values(), *unknown]:
        print0(f"--resume: {line}")
    return saved["progress"]


def checksums(folder: Path) -> dict[str, int]:
    """{name: CRC-32} of each file but run.json. Each rank reads some of the files."""
    files = sorted(set(folder.iterdir()) - {folder / "run.json"})
    files = all_gather_object(files)[0]  # as the first rank sees it
    sums = {}
    for path in files[rank() :: world_size()]:
        sums[path.name] = 0
        with open(path, "rb") as file:
            while block := file.read(2**24):
                sums[path.name] = zlib.crc32(block, sums[path.name])
    return {name: value for part in all_gather_object(sums) for name, value in part.items()}


def state_dict(policy: Module, optimizer: Optimizer, ref_model: Module | None) -> dict:
    """All weights and moments by name, in their shards. Moments go by the parameter's name, so the
    number of ranks may change."""
    has_no_moments = not optimizer.state
    moments = get_optimizer_state_dict(policy, optimizer)["state"]
    if has_no_moments:  # torch made them by a step that must not count in Adam's bias correction
        for moment in optimizer.state.values():
            moment["step"].zero_()
    reference = {} if ref_model is None else get_model_state_dict(ref_model)
    return {"policy": get_model_state_dict(policy), "moments": moments, "reference": reference}


def reason(error: BaseException) -> str:
    """One line of an error; a CheckpointException wraps those of the ranks."""
    failures = getattr(error, "failures", {})
    return first_line(next(iter(failures.values()))[0] if failures else error)
