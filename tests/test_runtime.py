"""A run's folder on a bad day: a run that is in it already, damage, signals, and why a run ended; and
what a run prints."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train_grpo
from conftest import GRPO, ROOT, rows
from metrics import held_out, training
from metrics.training import Console
from runtime import checkpoint, signals
from runtime.checkpoint import Run
from runtime.command_line import RESUME_HINT, run_main
from runtime.distributed import all_reduce_means, init_distributed
from runtime.errors import UserError
from runtime.logging import JsonlLog
from runtime.signals import replace_broken_pipes
from test_guards import run_args
from test_scripts import assert_same_run, here

FRESH = {"stage": 0, "step": 0, "before": None, "skipped": 0}
PROGRESS = {"stage": 1, "step": 2, "before": {"sampled": 0.5}, "skipped": 0}
STEPS_DONE, LINES_PER_STEP = 12, 2  # run_args has 10 steps a stage


def modules_and_optimizer():
    module = torch.nn.Linear(2, 1)
    return module, torch.optim.AdamW(module.parameters()), torch.nn.Linear(2, 1)


@pytest.fixture
def out(tmp_path):
    """--out of a run that was killed after step 13, one step after its checkpoint."""
    folder = tmp_path / "out"
    run = Run(run_args(folder), {"lr": "1.0"}, FRESH)
    for name, lines_per_step in (("metrics", 1), ("samples", LINES_PER_STEP)):
        log = JsonlLog(folder / f"{name}.jsonl", 0, lines_per_step)
        for step in range(1, STEPS_DONE + 2):
            for _ in range(lines_per_step):
                log.write({"step": step})
    run.save_checkpoint(PROGRESS, *modules_and_optimizer())
    run.close()
    return folder


def resume(out):
    """All that reads the folder of a run that continues."""
    run = Run(run_args(out, resume=True), {"lr": "1.0"}, FRESH)
    try:
        JsonlLog(out / "metrics.jsonl", run.steps_done)
        JsonlLog(out / "samples.jsonl", run.steps_done, LINES_PER_STEP)
        run.load_checkpoint(*modules_and_optimizer())
    finally:
        run.close()
    return run


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


# --------------------------------------------------------------------------------------------------
# A new run where one is

def test_means_over_ranks_keep_the_precision_of_float64():
    """Numbers of Python became float32 first, so a metric changed in its eighth digit with the number of ranks."""
    assert all_reduce_means({"reward": (0.1, 1), "none": (0.0, 0)})["reward"] == 0.1


def test_new_run_moves_the_old_one_aside(out, capsys):
    """The README's command given twice once erased the first run. What is not the run's stays."""
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    Run(run_args(out), {}, FRESH).close()
    (out / "model").mkdir()
    Run(run_args(out), {}, FRESH).close()
    said = capsys.readouterr().out
    assert f"held results, which are now in {out}.2" in said and f"continues with --resume --out {out}.1\n" in said
    assert contents(Path(f"{out}.1")) | {"notes.txt": b"mine"} == before
    assert [path.name for path in Path(f"{out}.2").iterdir()] == ["model"]
    assert contents(out) == {"notes.txt": b"mine"}


def test_overwrite_replaces_the_run(out):
    Run(run_args(out, overwrite=True), {}, FRESH).close()
    assert not contents(out) and not Path(f"{out}.1").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_logs_without_a_checkpoint_move_aside(out, resume, capsys):
    """Of a run that was killed before its first checkpoint; --resume once dropped them without a word."""
    shutil.rmtree(out / "checkpoint")
    before = contents(out)
    Run(run_args(out, resume=resume), {}, FRESH).close()
    assert not contents(out) and contents(Path(f"{out}.1")) == before
    assert f"held results, which are now in {out}.1" in capsys.readouterr().out


def test_logs_that_were_being_cut_back_go_with_their_run(out):
    """A kill between two lines of JsonlLog.write leaves them; the next run's folder once kept them."""
    for name in ("metrics.partial", "samples.partial"):
        (out / name).write_text("")
    Run(run_args(out), {}, FRESH).close()
    assert not contents(out) and "metrics.partial" in contents(Path(f"{out}.1"))


@pytest.mark.parametrize("name", checkpoint.ENTRIES)
def test_nothing_but_litter_is_removed(tmp_path, name):
    """A new run with --data OUT/samples.jsonl once removed that file. An entry may be all that is left of a run."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_text("results")
    checkpoint.clear(folder, keep_run=True)
    assert not contents(folder)
    is_litter = name == "ended.txt" or name.endswith(".partial") and name != "predictions.partial"
    assert (tmp_path / "out.1" / name).exists() != is_litter


def test_run_that_another_process_writes_is_not_moved(out):
    run = resume(out)
    run.lock_file = checkpoint.lock(out)
    with pytest.raises(UserError, match="another run is writing there"):
        Run(run_args(out), {}, FRESH)
    assert not Path(f"{out}.1").exists() and (out / "checkpoint").exists()
    run.lock_file.close()


def test_killed_while_it_moves_the_old_run_a_new_one_loses_nothing(out, monkeypatch):
    """Also where --out is a link to another disk."""
    before, rename = contents(out), Path.rename
    out.rename(out.with_name("disk"))
    out.symlink_to(out.with_name("disk"))
    moves = []

    def killed(path, target):
        moves.append(path)
        if len(moves) == 2:
            raise KeyboardInterrupt
        rename(path, target)
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        Run(run_args(out), {}, FRESH)
    Run(run_args(out), {}, FRESH).close()
    assert out.is_symlink() and not contents(out)
    moved = [contents(out.with_name(f"disk.{n}")) for n in (1, 2)]
    assert all(moved) and moved[0] | moved[1] == before


def test_run_that_cannot_be_moved_is_kept(out, monkeypatch):
    before = contents(out)

    def refused(path, target):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(UserError, match="cannot be moved aside .*--overwrite"):
        Run(run_args(out), {}, FRESH)
    assert contents(out) == before


# --------------------------------------------------------------------------------------------------
# Damage

def edit_json(*path, value=None):
    """Set, or without a value remove, an entry of run.json."""
    def damage(out):
        file = out / "checkpoint/run.json"
        saved = json.loads(file.read_text())
        entry = saved
        for name in path[:-1]:
            entry = entry[name]
        entry.pop(path[-1], None) if value is None else entry.update({path[-1]: value})
        file.write_text(json.dumps(saved))
    return damage


def edit_file(name, change):
    def damage(out):
        (out / name).write_bytes(change((out / name).read_bytes()))
    return damage


def replace(name, by):
    """Something else in the place of a file or folder."""
    def damage(out):
        checkpoint.remove(out / name)
        if by == "a folder":
            (out / name).mkdir()
        elif by == "a file":
            (out / name).write_text("")
        elif by == "a dead link":
            (out / name).symlink_to("nowhere")
        elif by == "a pipe":
            os.mkfifo(out / name)
    return damage


def swap(one, other):
    def damage(out):
        (out / one).rename(out / "third")
        (out / other).rename(out / one)
        (out / "third").rename(out / other)
    return damage


def line(n, by):
    """Replace line n of a file."""
    def change(old):
        lines = old.splitlines(keepends=True)
        return b"".join([*lines[: n - 1], by, *lines[n:]])
    return change


DAMAGES = {
    **{f"{part} {value}": edit_json(*part.split(), value=value) for part, value in [
        ("settings", None), ("settings", []), ("settings", "lr"), ("settings lr", 1), ("files", None),
        ("files", {}), ("files", []), ("files .metadata", None), ("files .metadata", "x"),
        ("files __0_0.distcp", 7), ("files reference/.metadata", None), ("progress", None), ("progress", [1, 2]), ("progress step", 1),
        ("progress before", {})]},
    **{f"{name} {how}": edit_file(f"checkpoint/{name}", change)
       for name in ("__0_0.distcp", ".metadata", "run.json")
       for how, change in [("empty", lambda old: b""), ("cut off", lambda old: old[: len(old) // 2]),
                           ("something else", lambda old: b"no checkpoint"),
                           ("a bit", lambda old: old[:50] + bytes([old[50] ^ 0x80]) + old[51:])]},
    "run.json null": edit_file("checkpoint/run.json", lambda old: b"null"),
    "run.json nested": edit_file("checkpoint/run.json", lambda old: b"[" * 10**5),
    "run.json UTF-16": edit_file("checkpoint/run.json", lambda old: old.decode().encode("utf-16")),
    "metrics cut": edit_file("metrics.jsonl", lambda old: b"".join(old.splitlines(True)[:11])),
    "metrics without its first line": edit_file("metrics.jsonl", line(1, b"")),
    "metrics emptied": edit_file("metrics.jsonl", lambda old: b""),
    "metrics torn": edit_file("metrics.jsonl", lambda old: old[: len(old) // 2]),
    "metrics comment": edit_file("metrics.jsonl", line(5, b"# a note\n")),
    "metrics blank": edit_file("metrics.jsonl", line(5, b"\n")),
    "metrics twice": edit_file("metrics.jsonl", lambda old: line(5, b'{"step": 4}\n')(old)),
    "metrics no object": edit_file("metrics.jsonl", line(5, b"5\n")),
    "metrics Latin-1": edit_file("metrics.jsonl", line(5, b'{"step": 5, "task": "\xe9"}\n')),
    "samples cut": edit_file("samples.jsonl", lambda old: b"".join(old.splitlines(True)[:23])),
    **{f"{name} {by}": replace(name, by)
       for name in ("checkpoint", "checkpoint/run.json", "checkpoint/.metadata", "metrics.jsonl",
                    "checkpoint/reference", "checkpoint/reference/__0_0.distcp")
       for by in ("a folder", "a file", "a dead link")},
    **{f"{name} a pipe": replace(name, "a pipe")  # which a reader would wait for
       for name in ("checkpoint/run.json", "checkpoint/__0_0.distcp", "samples.jsonl")},
    "logs swapped": swap("metrics.jsonl", "samples.jsonl"),
    "tensors swapped": swap("checkpoint/.metadata", "checkpoint/__0_0.distcp"),
    "models swapped": swap("checkpoint/__0_0.distcp", "checkpoint/reference/__0_0.distcp"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_run_is_refused_in_one_line(out, damage):
    """Some of these once ended in a traceback, others in another result than that of the unbroken
    run."""
    damage(out)
    before = contents(out)
    with pytest.raises(UserError, match="^--resume: ") as error:
        resume(out)
    assert "\n" not in str(error.value)
    assert contents(out) == before


def link_elsewhere(out):
    shutil.move(out / "checkpoint", out.with_name("elsewhere"))
    (out / "checkpoint").symlink_to(out.with_name("elsewhere"))


HARMLESS = {
    "no checksum": edit_json("checksum"),
    "torn last line": edit_file("metrics.jsonl", lambda old: old[:-5]),
    "last line no newline": edit_file("metrics.jsonl", lambda old: old[: old.rindex(b"\n", 0, -1)]),
    "stray file": lambda out: (out / "checkpoint/.nfs1").write_text(""),
    "checkpoint a link": link_elsewhere,
    "ended.txt a folder": replace("ended.txt", "a folder"),
    **{f"{name} {by}": replace(name, by) for name in ("checkpoint.partial", "checkpoint.old")
       for by in ("a folder", "a file", "a dead link")},
}


@pytest.mark.parametrize("damage", HARMLESS.values(), ids=HARMLESS)
def test_what_is_no_damage_does_not_stop_a_run(out, damage):
    damage(out)
    run = resume(out)
    assert run.progress == PROGRESS
    run.save_checkpoint(PROGRESS | {"step": 3}, *modules_and_optimizer())
    log = JsonlLog(out / "metrics.jsonl", STEPS_DONE)
    log.write({"step": 13})
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == list(range(1, 14))
    run = Run(run_args(out, resume=True), {"lr": "1.0"}, FRESH)
    assert run.steps_done == 13
    run.close()


# --------------------------------------------------------------------------------------------------
# The reference model's files, which the checkpoints of a stage share

def reopened(out):
    run = Run(run_args(out, resume=True), {"lr": "1.0"}, FRESH)
    run.close()
    run.load_checkpoint(*modules_and_optimizer())
    return run


def save(run, step, stage=1):
    run.save_checkpoint(PROGRESS | {"stage": stage, "step": step}, *modules_and_optimizer())


def inodes(out):
    files = (out / "checkpoint/reference").iterdir()
    return {file.name: file.stat().st_ino for file in files}


@pytest.mark.parametrize("last", ["checkpoint", "checkpoint.old"])
def test_reference_is_written_once_a_stage(out, last):
    """Also where the run was killed between the renames; the last checkpoint goes, its files stay."""
    first = inodes(out)
    assert first.keys() == {".metadata", "__0_0.distcp"}
    (out / "checkpoint").rename(out / last)
    run = reopened(out)
    for step in (3, 4):
        save(run, step)
        assert inodes(out) == first and not (out / "checkpoint.old").exists()
    reopened(out)
    kept = os.open(out / "checkpoint/reference/__0_0.distcp", os.O_RDONLY)  # so no inode is used again
    save(run, 1, stage=2)
    assert not set(inodes(out).values()) & set(first.values())
    os.close(kept)


@pytest.mark.parametrize("links", [0, 1])
def test_where_no_links_can_be_made_the_reference_is_written_again(out, monkeypatch, links):
    """A link that was made before is not written into: it is the last checkpoint's file."""
    run, link, calls = reopened(out), os.link, itertools.count()
    for name in inodes(out):
        link(out / "checkpoint/reference" / name, out / name)

    def refused(source, target):
        if next(calls) == links:
            raise PermissionError(1, "Operation not permitted")
        link(source, target)
    monkeypatch.setattr(os, "link", refused)
    first, before = inodes(out), [(out / name).read_bytes() for name in inodes(out)]
    save(run, 3)
    assert not set(inodes(out).values()) & set(first.values())
    assert [(out / name).read_bytes() for name in first] == before
    reopened(out)


@pytest.mark.parametrize("stage, module, name, call", [
    (1, checkpoint.dcp, "save", 1), (1, os, "link", 1), (1, os, "link", 2), (1, checkpoint, "checksums", 1),
    (2, checkpoint.dcp, "save", 1), (2, checkpoint.dcp, "save", 2), (2, checkpoint, "checksums", 1)])
def test_killed_in_a_save_the_last_checkpoint_is_left_with_its_reference(
        out, monkeypatch, stage, module, name, call):
    run, function, calls = reopened(out), getattr(module, name), itertools.count(1)

    def killed(*args, **options):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **options)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            save(run, 3, stage)
    run = reopened(out)
    assert run.progress == PROGRESS
    save(run, 4, stage)
    assert reopened(out).progress == PROGRESS | {"stage": stage, "step": 4}


# --------------------------------------------------------------------------------------------------
# Signals and ends

def python(code, **environment):
    """A process with this code."""
    code = (f"import os, signal, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
            f"from runtime.command_line import run_main\n{code}")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env=os.environ | environment)


def test_second_signal_ends_the_process_and_is_named_by_resume(out, capsys):
    done = python(f"""
from pathlib import Path, PosixPath
from types import SimpleNamespace as namespace
from runtime.checkpoint import Run
run = Run({run_args(out, resume=True)}, {{"lr": "1.0"}}, {FRESH})
run.install_signal_handlers()
run.doing = "finishing step 13"
os.kill(os.getpid(), signal.SIGINT)
print("still there", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("not there")
""")
    assert done.returncode == 128 + signal.SIGTERM and done.stdout.endswith("still there\n")
    assert done.stderr == (
        "\nSIGINT: finishing step 13; a second signal ends the process\n"
        "\nSIGTERM again: the process ends now; the checkpoint after step 12 is complete; "
        "to continue: python -c --resume\n")
    resume(out)
    said = capsys.readouterr().out
    assert "the last run ended: rank 0, exit code 143: SIGTERM, a second signal" in said
    assert "continues after step 12" in said


def test_signal_that_comes_twice_within_moments_is_one(tmp_path, monkeypatch, capfd):
    """timeout(1) signals a process and then its group; torchrun passes on what its workers have
    already got."""
    monkeypatch.setattr(signals.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    run = Run(run_args(tmp_path), {}, FRESH)
    run.install_signal_handlers()
    os.kill(os.getpid(), signal.SIGTERM)
    run.close()
    assert run.should_stop() and capfd.readouterr().err.count("SIGTERM: ") == 1


def test_signal_while_a_script_loads_ends_it_with_a_word():
    done = python("run_main(lambda: os.kill(os.getpid(), signal.SIGTERM))")
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == ("interrupted by SIGTERM; the same command with --resume continues from "
                           "the last checkpoint, if there is one\n")


def test_an_error_in_a_run_is_followed_by_how_to_go_on(tmp_path):
    """A broken image once ended a run without a word on whether its steps are lost."""
    def fail():
        raise UserError("1.jpg cannot be read")

    with pytest.raises(SystemExit, match=r"^error: 1.jpg cannot be read$"):
        run_main(fail)
    run = Run(run_args(tmp_path), {}, FRESH)
    with pytest.raises(SystemExit, match=f"^error: 1.jpg cannot be read\n{RESUME_HINT}$"):
        run_main(fail)
    run.close()


def test_signal_stops_held_out_scoring_after_its_batch_and_nothing_is_lost(
        sft, dataset, tmp_path, monkeypatch, capfd):
    """At the start, after a step and after the last step: the resumed run scores again, and ends as
    the unbroken one."""
    flags = ["--task", "cls", "--model", sft / "model", "--data", dataset, *GRPO, "--heldout", 2,
             "--eval-every", 1, "--out"]
    monkeypatch.setattr(held_out, "BATCH_SIZE", 1)  # so each scoring calls predict four times
    here(monkeypatch, train_grpo.main, *flags, tmp_path / "whole")
    capfd.readouterr()
    predict = held_out.predict
    for call, doing, where, how in (
            (1, "stopping before the next step", "without a checkpoint", "the same command starts again"),
            (5, "finishing step 1", "after step 1", "to continue: "),
            (5, "finishing step 2", "after step 2", "to continue: ")):
        calls = itertools.count(1)

        def signalled(*args, calls=calls, last_call=call, **options):
            if next(calls) == last_call:
                os.kill(os.getpid(), signal.SIGTERM)
            return predict(*args, **options)
        with monkeypatch.context() as patch:
            patch.setattr(held_out, "predict", signalled)
            here(monkeypatch, train_grpo.main, *flags, tmp_path / "broken", "--resume")
        said, acknowledged = capfd.readouterr()
        assert f"SIGTERM: {doing}; a second signal" in acknowledged
        assert f"stopped {where}; {how}" in said
    here(monkeypatch, train_grpo.main, *flags, tmp_path / "broken", "--resume")
    assert "the last run ended: rank 0, exit code 0: stopped after step 2" in capfd.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "broken", "metrics.jsonl", "samples.jsonl")


@pytest.mark.parametrize("script, module, kept", [
    (train_grpo, held_out, "there is no checkpoint yet"),
    (evaluate, evaluate, "finished batches are kept, and the same command continues")])
def test_second_signal_ends_held_out_scoring_and_evaluation_at_once(
        sft, dataset, tmp_path, monkeypatch, capfd, script, module, kept):
    def predict(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(module, "predict", predict)
    monkeypatch.setattr(signals.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        here(monkeypatch, script.main, "--task", "cls", "--model", sft / "model", "--data", dataset, "--out", tmp_path)
    assert end.value.code == 128 + signal.SIGTERM
    assert f"\nSIGTERM again: the process ends now; {kept}\n" in capfd.readouterr().err


def failing(out, error):
    def main():
        Run(run_args(out, resume=True), {"lr": "1.0"}, FRESH)
        raise error
    return main


@pytest.mark.parametrize("error, named", [
    (UserError("lower --lr"), "rank 0, exit code 1: error: lower --lr"),
    (RuntimeError("CUDA out of memory\nmore"), "rank 0, exit code 1: RuntimeError: CUDA out of memory")])
def test_resume_names_the_error_that_ended_the_last_run(out, capsys, error, named):
    with pytest.raises(SystemExit):
        run_main(failing(out, error))
    assert (out / "ended.txt").read_text().startswith(named)
    resume(out).close()
    assert f"--resume: the last run ended: {named}\n" in capsys.readouterr().out
    assert not (out / "ended.txt").exists()


def test_resume_names_the_cause_among_the_ends_of_all_ranks(out, capsys):
    (out / "ended.txt").write_text("rank 1, exit code 1: error: another process has ended, ..\n"
                                   "rank 0, exit code 1: OSError: disk\nTraceback ..\n")
    resume(out)
    assert "the last run ended: rank 0, exit code 1: OSError: disk\n" in capsys.readouterr().out


def test_resume_names_what_ended_a_run_before_its_first_step(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_main(failing(tmp_path, UserError("no memory")))
    Run(run_args(tmp_path, resume=True), {}, FRESH).close()
    assert "the last run ended: rank 0, exit code 1: error: no memory\n" in capsys.readouterr().out


def test_resume_says_that_the_last_run_ended_without_a_word(out, capsys):
    """kill -9 leaves no reason; a complete run needs none."""
    resume(out)
    assert "the last run ended without a word after step 13" in capsys.readouterr().out
    (out / "model").mkdir()
    resume(out)
    assert "ended" not in capsys.readouterr().out


def test_resume_command_is_the_launchers(out, monkeypatch):
    run = resume(out)
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--overwrite", "--out", "my run"])
    assert run.resume_command() == "python train_grpo.py --out 'my run' --resume"
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    command = "--nproc-per-node={} train_grpo.py --out 'my run' --resume"
    assert run.resume_command() == f"torchrun {command.format(1)}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert run.resume_command() == f"torchrun --nnodes=2 --rdzv-... {command.format(8)}"


# --------------------------------------------------------------------------------------------------
# What a run prints, and what it can do without

def row(step, **metrics):
    return {"step": step, "task": "det", "parts": {"accuracy": 0.5}, "truncated_frac": 0,
            "zero_std_frac": 0.5, **dict.fromkeys(("reward", "kl", "entropy", "len_mean",
                                                   "grad_norm"), 1.0), **metrics}


def test_steps_are_counted_with_the_time_that_is_left_and_a_completion_now_and_then(capsys):
    console = Console(total_steps=200, eval_every=2)
    for step, seconds in ((1, 1.0), (2, 3.0), (3, 2.0)):
        console.print_step(row(step), seconds, "<think>a\nb</think> " + "c" * 200, 0.25)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    assert said[0].startswith("step    1/200 det") and said[0].endswith("1.00 s  ETA 0:03:19")
    assert said[2].endswith("3.00 s  ETA 0:06:36") and said[4].endswith("2.00 s  ETA 0:06:34")
    for shown in (said[1], said[3]):
        assert shown.startswith("    e.g. reward 0.250 for <think>a b</think> ccc")
        assert len(shown) == 160 and shown.endswith("c ..")


def test_a_pipe_without_a_reader_does_not_end_the_run_before_it_has_saved():
    """Ctrl-C of `train_grpo.py .. | tee log` ended tee first, and the run at its next print."""
    read, write = os.pipe()
    replace_broken_pipes([write])
    os.write(write, b"a")
    assert os.read(read, 1) == b"a"  # a pipe with a reader stays
    os.close(read)
    replace_broken_pipes([write])
    os.write(write, b"b")
    os.close(write)


@pytest.mark.parametrize("metrics, advice", [({"zero_std_frac": 1.0}, "raise --temperature"),
                                             ({"zero_std_frac": 1.0, "truncated_frac": 1.0}, "--max-new-tokens; raise it")])
def test_one_warning_when_nothing_can_be_learned(capsys, metrics, advice):
    console = Console(total_steps=20)
    nothing = [row(step, **metrics) for step in range(1, 5)]
    for printed in [*nothing, row(5), *nothing, *nothing, row(13), *nothing, *nothing]:
        console.print_step(printed, 1.0, "", 0.0)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and advice in warnings[0]
    assert warnings[0].startswith("warning: nothing could be learned in 5 steps: all completions")


def test_run_without_held_out_samples_and_without_plots_is_complete(
        sft, dataset, tmp_path, monkeypatch, capsys):
    """A plot that fails once cost the model."""
    def broken(*_):
        raise ValueError("no font\nat all")
    monkeypatch.setattr(training, "plot_curves", broken)
    monkeypatch.setattr(training, "write_report", broken)
    here(monkeypatch, train_grpo.main, "--task", "cls", "--model", sft / "model", "--data", dataset,
         *GRPO, "--heldout", 0, "--out", tmp_path)
    said, warned = capsys.readouterr()
    assert (tmp_path / "model").exists() and len(rows(tmp_path / "metrics.jsonl")) == 2
    for file in ("curves.png", "report.html"):
        assert f"warning: {file} cannot be made (ValueError: no font)\n" in warned
    assert "held-out samples" not in said
    assert not any(name.startswith("heldout") for log in rows(tmp_path / "metrics.jsonl")
                   for name in log)
    assert "device: CPU, threads: 1 (OMP_NUM_THREADS sets them), processes: 1\nmodel: " in said


def test_a_cpu_run_takes_one_thread_unless_the_environment_says_more(monkeypatch):
    """Two threads beside another program once scored for minutes without a word."""
    taken = []
    for environment in ("2", None):
        torch.set_num_threads(2)
        monkeypatch.delenv("OMP_NUM_THREADS")
        if environment:
            monkeypatch.setenv("OMP_NUM_THREADS", environment)
        init_distributed()
        taken.append(torch.get_num_threads())
    assert taken == [2, 1]


def test_held_out_rewards_are_in_the_log_nested_and_flat(staged):
    last = rows(staged / "metrics.jsonl")[-1]
    sampled, greedy, form = (last["heldout"][name] for name in ("sampled", "greedy", "format"))
    assert last["heldout_reward"] == pytest.approx(sampled + form)
    assert (last["heldout_accuracy"], last["heldout_greedy"]) == (sampled, greedy)
    assert last["heldout_format"] == form
