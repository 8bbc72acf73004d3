"""A training run: its settings, its checkpoints, and why it ended.

    out/checkpoint/            the tensors of all ranks, written by torch.distributed.checkpoint
    out/checkpoint/reference/  the reference model's, which later checkpoints of its stage link
    out/checkpoint/run.json    settings, progress, and a checksum of each of those files
    out/ended.txt              why the run ended before it was complete: an entry from each rank
"""

import json
import os
import shlex
import shutil
import sys
import warnings
import zlib
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Module
from torch.optim import Optimizer

from runtime.distributed import all_gather_object, barrier
from runtime.errors import END_FILES, UserError, first_line, record_end
from runtime.logging import print0
from runtime.lora import base_of_adapters, has_adapters
from runtime.out_folder import ENTRIES, clear, last_checkpoint, lock, print_last_end, remove
from runtime.ranks import rank, world_size
from runtime.signals import Stoppable

NO_SETTINGS = ("out", "resume", "overwrite", "defaults", "may_change")
START_AGAIN = "start again without --resume, which moves this run aside"


def run_config(args: Namespace, train: Iterable[str], held_out: Iterable[str],
               model: Module) -> dict[str, str]:
    """What makes a run what it is: its flags by name, and the fingerprints of its data and of the
    weights that no checkpoint holds, of a model on the CPU."""
    config = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    texts = {}
    if rank() == 0:  # one rank reads all samples for them
        texts = {"data (as read)": ", ".join(train), "held-out data (as read)": ", ".join(held_out),
                 **frozen_weights(model)}
    return flag_texts(config) | all_gather_object(texts)[0]


def frozen_weights(model: Module) -> dict[str, str]:
    """The fingerprint of the weights that no checkpoint holds, as an entry of run_config; {} if it
    holds all."""
    saved = saved_names(model)
    # A page of each mapped tensor; in bf16, as a GPU holds what is float32 on a CPU.
    starts = [weight.flatten()[:64].bfloat16().tolist()
              for name, weight in model.named_parameters() if name not in saved]
    if not starts:
        return {}
    return {"frozen weights (as read)": f"#{zlib.crc32(repr(starts).encode()):08x}"}


def flag_texts(flags: dict[str, object]) -> dict[str, str]:
    """The flags of a Namespace as they are written on a command line."""
    return {name.replace("_", "-"): " ".join(value) if isinstance(value, list) else str(value)
            for name, value in flags.items()}


class Run(Stoppable):
    """One training run, whose folder is locked until close() or the end of the process.

    .out       the folder, args.out
    .config    the settings that a resumed run must share, from run_config
    .progress  the caller's own dict, as the last checkpoint holds it
    """

    def __init__(self, args: Namespace, config: dict[str, str], fresh_progress: dict) -> None:
        """Begin a run, or with args.resume continue the one whose checkpoint is in args.out.

        A new run moves the one in args.out aside; a later --resume would take an old checkpoint for
        this run's. Raises UserError if another run writes to the folder, or if the checkpoint is
        damaged or has other settings.
        """
        super().__init__("stopping before the next step")
        self.out = args.out
        self.config = config
        self.progress = fresh_progress
        self.files = {}  # checksums of the last checkpoint's files
        self.steps_per_stage = args.steps
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process
        models = [args.model]
        if has_adapters(args.model):
            models.append(base_of_adapters(args.model))
        entries = [self.out.resolve() / name for name in ENTRIES]
        moved = [model for model in models
                 if any(map(Path(model).resolve().is_relative_to, entries))]
        if moved and not args.resume:
            raise UserError(f"--model {moved[0]} lies in --out {self.out}, from which a new run "
                            "moves it away; choose another --out")
        self.lock_file = lock(self.out) if rank() == 0 else None
        # All ranks go by what the first one sees.
        folder = all_gather_object(last_checkpoint(self.out) if args.resume else None)[0]
        if args.resume and rank() == 0:
            print_last_end(self.out)
        if folder:
            self.progress = read_progress(folder, config, args, fresh_progress)
            print0(f"--resume: {self.out} continues after step {self.steps_done}")
        elif args.resume and (self.out / "model").exists():
            raise UserError(f"--resume: {self.out} holds a model but no checkpoint; choose "
                            "another --out, or leave --resume out")
        elif rank() == 0:
            if args.resume:
                print0(f"--resume: no checkpoint in {self.out} yet, the run begins")
            clear(self.out, keep_run=not args.overwrite)
        if rank() == 0:
            remove(self.out / "ended.txt")
        barrier()
        END_FILES.append(self.out / "ended.txt")

    @property
    def steps_done(self) -> int:
        """Steps of all stages at the last checkpoint."""
        return self.progress.get("stage", 0) * self.steps_per_stage + self.progress["step"]

    @property
    def kept(self) -> str:
        """What a run that ends now leaves behind."""
        if not self.steps_done:
            return "there is no checkpoint yet"
        return (f"the checkpoint after step {self.steps_done} is complete; to continue: "
                f"{self.resume_command()}")

    def close(self) -> None:
        """Restore the signal handlers and unlock the folder."""
        END_FILES.clear()
        self.restore_signal_handlers()
        if self.lock_file:
            self.lock_file.close()

    def print_stopped(self) -> None:
        """Say that a signal has stopped the run at its last checkpoint, and how to continue."""
        where, how = "without a checkpoint", "the same command starts again"
        if self.steps_done:
            where, how = f"after step {self.steps_done}", f"to continue: {self.resume_command()}"
        print0(f"stopped {where}; {how}")
        if rank() == 0:
            record_end(0, f"stopped {where} by a signal")

    def resume_command(self) -> str:
        """This run's command line with --resume. The address where torchrun's nodes meet is not
        known here."""
        args = [arg for arg in sys.argv if arg not in ("--resume", "--overwrite")]
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return shlex.join(["python", *args, "--resume"])
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = [f"--nnodes={world_size() // local}", "--rdzv-..."] if world_size() > local else []
        return shlex.join(["torchrun", *nodes, f"--nproc-per-node={local}", *args, "--resume"])

    def save_checkpoint(self, progress: dict, policy: Module, optimizer: Optimizer,
                        ref_model: Module | None = None) -> None:
        """Save all that an exact resume needs, beside the last checkpoint, which is removed when
        this one is complete. Random numbers have no state: they are a function of the seed and the
        step. Raises UserError if the disk is full."""
        folder, partial, old = (self.out / f"checkpoint{end}" for end in ("", ".partial", ".old"))
        try:
            if rank() == 0:
                remove(partial)
            barrier()
            dcp.save(state_dict(policy, optimizer), checkpoint_id=partial)
            linked = self.link_reference(partial, progress) if rank() == 0 else {}
            linked = all_gather_object(linked)[0]
            if ref_model is not None and not linked:
                dcp.save(saved_weights(ref_model, policy), checkpoint_id=partial / "reference")
            files = checksums(partial, linked)
            if rank() == 0:
                saved = {"settings": self.config, "progress": progress, "files": files,
                         "checksum": zlib.crc32(repr(progress).encode())}
                for log in self.out.glob("*.jsonl"):  # a power cut leaves none behind a checkpoint
                    with open(log) as file:
                        os.fsync(file.fileno())
                with open(partial / "run.json", "w") as file:
                    json.dump(saved, file)
                    file.flush()
                    os.fsync(file.fileno())
                if folder.exists():  # if not, a run was killed between the renames: keep `old`
                    remove(old)
                    folder.rename(old)
                partial.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
        except (CheckpointException, OSError) as error:  # the first is no Exception
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{partial} cannot be written ({reason(error)}); is the disk full? The "
                            "last checkpoint, if any, is intact; --resume continues from it")
        barrier()
        self.progress, self.files = progress, files

    def link_reference(self, partial: Path, progress: dict) -> dict[str, int]:
        """Link the reference model's files from the last checkpoint, if it is of the same stage ->
        their checksums; {} if they have to be written."""
        last, before = last_checkpoint(self.out), self.progress
        files = {name: value for name, value in self.files.items() if "reference/" in name}
        if not (last and files and progress.get("stage") == before.get("stage")):
            return {}
        try:
            (partial / "reference").mkdir()
            for name in files:
                os.link(last / name, partial / name)
        except OSError:  # some file systems have no links
            remove(partial / "reference")  # writing into a link would spoil the last checkpoint
            return {}
        return files

    def load_checkpoint(self, policy: Module, optimizer: Optimizer,
                        ref_model: Module | None = None) -> None:
        """Read the last checkpoint's tensors into the modules and the optimiser. Raises UserError
        if they are damaged, see read_tensors."""
        state = state_dict(policy, optimizer)
        parts = {"": state}
        if ref_model is not None:
            parts["reference"] = saved_weights(ref_model, policy)
        self.files = read_tensors(last_checkpoint(self.out), parts)
        groups = get_optimizer_state_dict(policy, optimizer)["param_groups"]
        moments = {"state": state["moments"], "param_groups": groups}
        set_optimizer_state_dict(policy, optimizer, moments)


def read_run_json(folder: Path) -> dict[str, dict]:
    """settings, progress and files of a checkpoint. Raises UserError if one of them is missing, or
    if the progress is not as it was written."""
    file = folder / "run.json"
    try:
        if not file.is_file():  # a FIFO would be waited for
            raise FileNotFoundError("no such file")
        saved = json.loads(file.read_text())
        parts = {name: saved[name] for name in ("settings", "progress", "files")}
        if not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError("a part is no object")
        checksum = zlib.crc32(repr(parts["progress"]).encode())
        if saved.get("checksum", checksum) != checksum:  # older checkpoints have none
            raise ValueError("its progress has changed")
        return parts
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"--resume: {file} is damaged ({first_line(error)}); "
                        f"{START_AGAIN}") from error


def read_progress(folder: Path, config: dict[str, str], args: Namespace,
                  fresh_progress: dict) -> dict:
    """A checkpoint's progress. Raises UserError if it is not of this script, or if its settings are
    not those of `config`. A flag that an older checkpoint does not know had its default."""
    saved = read_run_json(folder)
    progress = saved["progress"]
    if progress.keys() != fresh_progress.keys():
        raise UserError(f"--resume: {folder} is the checkpoint of another script; choose another "
                        "--out, or leave --resume out")
    before = flag_texts(args.defaults) | saved["settings"]
    changes = {name: " ".join(f"{'' if '(as read)' in name else '--'}{name} was "
                              f"{before[name] or 'not given'} and is now "
                              f"{value or 'not given'}".split())
               for name, value in config.items() if name in before and value != before[name]}
    refused = [change for name, change in changes.items() if f"--{name}" not in args.may_change]
    if refused:
        raise UserError(f"--resume: {', '.join(refused)}: that would be another run; give the old "
                        "values, or start a new run in another --out")
    unknown = [f"the checkpoint does not know --{name}, now {config[name]}"
               for name in config if name not in before]
    for line in [*changes.values(), *unknown]:
        print0(f"--resume: {line}")
    return progress


def read_tensors(folder: Path, parts: dict[str, dict]) -> dict[str, int]:
    """Read a checkpoint's tensors, saved by any number of ranks, into state dicts, {folder in it:
    state dict} -> its checksums. Raises UserError if a file is not as it was written. Read your own
    checkpoints only: torch.distributed.checkpoint describes them in a pickle."""
    written = read_run_json(folder)["files"]
    found = checksums(folder, {})
    for name in found | written:
        if written.get(name) != found.get(name):
            raise UserError(f"--resume: {folder / name} is damaged or missing; {START_AGAIN}")
    try:
        for name, state in parts.items():
            dcp.load(state, checkpoint_id=folder / name)
    except CheckpointException as error:
        raise UserError(f"--resume: {folder} is not of this model ({reason(error)})") from error
    return written


def checksums(folder: Path, known: dict[str, int]) -> dict[str, int]:
    """{name: CRC-32} of each file with tensors. Each rank reads some that are not `known`."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))
             if (path.name == ".metadata" or path.suffix == ".distcp") and path.is_file()]
    names = [name for name in all_gather_object(names)[0] if name not in known]  # as rank 0 sees it
    sums = {}
    for name in names[rank() :: world_size()]:
        sums[name] = 0
        with open(folder / name, "rb") as file:
            while block := file.read(2**24):
                sums[name] = zlib.crc32(block, sums[name])
    return known | {name: value for part in all_gather_object(sums) for name, value in part.items()}


def state_dict(policy: Module, optimizer: Optimizer) -> dict:
    """The weights to save, and all moments, by name, in their shards. Moments go by the parameter's
    name, so the number of ranks may change."""
    has_no_moments = not optimizer.state
    moments = get_optimizer_state_dict(policy, optimizer)["state"]
    if has_no_moments:  # torch made them by a step that must not count in Adam's bias correction
        for moment in optimizer.state.values():
            moment["step"].zero_()
    return {"policy": saved_weights(policy, policy), "moments": moments}


def saved_weights(module: Module, policy: Module) -> dict:
    """The weights, of the policy or its reference model, that a checkpoint holds: themselves, so
    what is read into the dict is read into the module."""
    names = saved_names(policy)
    return {name: w for name, w in get_model_state_dict(module).items() if name in names}


def saved_names(policy: Module) -> set[str]:
    """Names of the weights that --model cannot give back: those that learn (tied ones once) and
    LoRA's reference, which each stage sets."""
    return {name for name, weight in policy.named_parameters()
            if weight.requires_grad or ".reference." in name}


def reason(error: BaseException) -> str:
    """One line of an error; a CheckpointException wraps those of the ranks."""
    failures = getattr(error, "failures", {})
    return first_line(next(iter(failures.values()))[0] if failures else error)
