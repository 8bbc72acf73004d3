"""What must not spoil a run: gradients that are no numbers, rewards that are none, full disks, signals, a second run beside it."""

import copy
import dataclasses
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model as qwen
import rewards
import run
import train_grpo
from conftest import GRPO, ROOT, rows
from data import BadInput, Sample, batch, load, load_images, prompt
from rewards import TASKS, reward_parts
from test_scripts import assert_same_run, here

SAMPLES = [SimpleNamespace(id="left.png#0"), SimpleNamespace(id="right.png#3")]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers

@pytest.mark.parametrize("loss, norm", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_step_without_finite_loss_and_gradient_is_told_and_counted(loss, norm):
    """Adam's moments would be NaN for ever after one."""
    guard = run.Guard()
    steps = [(1.0, 1.0), (loss, norm), (1.0, 1.0)]
    assert [guard.finite(torch.tensor(part), torch.tensor(n), SAMPLES) for part, n in steps] == [True, False, True]
    assert guard.skipped == 1


def test_ten_skipped_steps_in_a_row_end_the_run_with_the_samples():
    guard, bad, good = run.Guard(skipped=5), torch.tensor(float("nan")), torch.tensor(1.0)
    for norm in [bad] * 9 + [good] + [bad] * 9:
        guard.finite(good, norm, SAMPLES)
    assert guard.skipped == 5 + 18
    with pytest.raises(BadInput, match="10 times in a row.*left.png#0, right.png#3"):
        guard.finite(good, bad, SAMPLES)


def test_skipped_steps_stand_in_the_log_as_null(sft, dataset, tmp_path, monkeypatch):
    """An infinite learning signal for one step: the run goes on, no number of it reaches the weights, and the log stays JSON."""
    steps, policy_loss = [], train_grpo.grpo.policy_loss

    def poisoned(logprobs, *more, **options):
        loss, sums = policy_loss(logprobs, *more, **options)
        steps.append(loss)
        return (loss * float("nan") if len(steps) == 1 else loss), sums
    monkeypatch.setattr(train_grpo.grpo, "policy_loss", poisoned)
    here(monkeypatch, train_grpo.main, "--task", "cls", "--model", sft / "model", "--data", dataset, *GRPO, "--out", tmp_path)
    first, second = rows(tmp_path / "metrics.jsonl")
    assert first["loss"] is None and first["grad_norm"] is None and first["skipped"] == second["skipped"] == 1
    assert second["loss"] is not None and "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert all(w.isfinite().all() for w in qwen.load(str(tmp_path / "model"))[0].parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1", torch.tensor([1.0, 0.0]), [0.5]],
                         ids=["nan", "inf", "None", "text", "tensor", "list"])
def test_reward_that_is_no_number_is_an_error_with_its_name(monkeypatch, value):
    def my_reward(answer, sample):
        return value
    monkeypatch.setitem(rewards.TASKS, "cls", TASKS["cls"]._replace(reward=my_reward))
    sample = Sample("tile 7", "cls", [], "What?", "port", 112)
    with pytest.raises(ValueError, match="my_reward of task cls returned .* for sample tile 7"):
        reward_parts("<think>a</think> <answer>port</answer>", sample)


# ----------------------------------------------------------------------------------------------------------------------
# Disks

def limited(script, megabytes, *args):
    """The script where no file can grow beyond so many megabytes: what a full disk or a quota does."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes * 2**20, megabytes * 2**20))
    return subprocess.run([sys.executable, ROOT / script, *map(str, args)], capture_output=True, text=True, check=False,
                          preexec_fn=limit, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})


def test_full_disk_leaves_the_last_checkpoint_whole(sft, staged, dataset, tmp_path, monkeypatch, grpo_flags):
    """Killed by nothing but a full disk at its second checkpoint, the run ends in one line; with room again it goes on."""
    run_flags = [*grpo_flags, tmp_path]
    save = run.dcp.save

    def second_fails(tensors, **options):
        if (tmp_path / "checkpoint").exists():
            raise OSError(28, "No space left on device")
        save(tensors, **options)
    with monkeypatch.context() as patch:
        patch.setattr(run.dcp, "save", second_fails)
        with pytest.raises(BadInput, match="checkpoint.partial cannot be written .*No space left on device"):
            here(monkeypatch, train_grpo.main, *run_flags)
    assert json.loads((tmp_path / "checkpoint/run.json").read_text())["progress"]["step"] == 1
    done = limited("train_grpo.py", 4, *run_flags, "--resume")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and "is the disk full?" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "checkpoint.partial").exists()
    here(monkeypatch, train_grpo.main, *run_flags, "--resume")
    assert_same_run(tmp_path, staged, "metrics.jsonl", "samples.jsonl")


def test_model_that_does_not_fit_on_the_disk_is_not_half_there(staged, tmp_path):
    code = f"""if True:
        import resource, sys; from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        import model as qwen
        loaded = qwen.load({str(staged / "model")!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        try:
            qwen.save(*loaded, Path({str(tmp_path)!r}) / "model")
        except qwen.BadInput as error:
            sys.exit(f"error: {{error}}")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and not list(tmp_path.iterdir())


def test_image_that_vanishes_during_a_run_is_named(sft, dataset, tmp_path, monkeypatch):
    flags = ["--task", "cls", "--model", sft / "model", "--data", dataset, *GRPO, "--out", tmp_path, "--save-every", 1]
    encode, later = train_grpo.encode, batch(load(str(dataset), "cls", 112, split="train"), 1, 4, 0)  # the second step's

    def gone(processor, sample):
        return encode(processor, dataclasses.replace(sample, images=["nowhere.png"]) if sample in later else sample)
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "encode", gone)
        with pytest.raises(BadInput, match="image nowhere.png cannot be read"):
            here(monkeypatch, train_grpo.main, *flags)
    assert len(rows(tmp_path / "metrics.jsonl")) == 1
    here(monkeypatch, train_grpo.main, *flags, "--resume")
    assert len(rows(tmp_path / "metrics.jsonl")) == 2


def test_out_that_cannot_be_made_is_one_line(sft, dataset, tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, ROOT / "train_sft.py", "--data", dataset, "--model", sft / "model", "--task", "cls",
                           "--out", tmp_path / "file/out"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Resume

def test_resume_may_change_what_changes_neither_data_nor_loss(staged, tmp_path, monkeypatch, grpo_flags, capsys):

    shutil.copytree(staged, tmp_path, dirs_exist_ok=True)
    here(monkeypatch, train_grpo.main, *grpo_flags, tmp_path, "--resume", "--save-every", 7)
    assert "--save-every was 50 and is now 7" in capsys.readouterr().out


def test_resume_of_what_has_no_checkpoint_yet_begins(tmp_path, monkeypatch, capsys):
    """A batch system that starts a job again uses the same command line. A model there is no run's beginning."""
    monkeypatch.setattr(run, "locks", [])
    args = SimpleNamespace(out=tmp_path / "out", resume=True, model="tiny")
    assert run.start_or_resume(args, {}, {"step": 0}) == {"step": 0}
    assert "the run begins" in capsys.readouterr().out
    os.close(run.locks.pop())
    (tmp_path / "out/model").mkdir()
    with pytest.raises(BadInput, match="a model but no checkpoint"):
        run.start_or_resume(args, {}, {"step": 0})


def test_resume_with_other_data_is_refused(staged, dataset, tmp_path, monkeypatch):
    """A record that was taken out after an error would shift the order of all samples, and nobody would know."""
    shutil.copytree(staged, tmp_path / "out")
    shutil.copytree(dataset.parent, tmp_path / "data")
    (tmp_path / "data/data.json").write_text(json.dumps(json.loads(dataset.read_text())[1:]))
    args = SimpleNamespace(out=tmp_path / "out", resume=True)
    monkeypatch.setattr(run, "locks", [])
    fewer = [load(str(tmp_path / "data/data.json"), task, 112, None, "train", 0) for task in ("cls", "det")]
    with pytest.raises(BadInput, match=r"data \(as read\) was (\d+ samples #\w+, )?\d+ samples #\w+ and is now"):
        run.start_or_resume(args, {"data (as read)": run.settings_of(args, fewer)["data (as read)"]}, {})


def trained(save_first=False):
    """A weight after two steps of AdamW; what tensors_of finds before them is a checkpoint's content."""
    weight = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(weight.weight)
    optimizer = torch.optim.AdamW(weight.parameters(), lr=0.1, weight_decay=0.1)
    if save_first:
        run.tensors_of(weight, optimizer, None)
    for _ in range(2):
        weight.weight.grad = torch.tensor([[1.0, -3.0]])
        optimizer.step()
    return weight.weight


def test_checkpoint_before_the_first_update_changes_nothing():
    """torch makes the moments by a step without gradients, and so had Adam's bias correction one step ahead: a run whose
    first steps had nothing to learn from, or were skipped, depended on --save-every."""
    assert torch.equal(trained(save_first=True), trained())


def test_killed_twice_between_the_renames_a_checkpoint_is_left(tmp_path, monkeypatch):
    """After the first kill checkpoint.old is all there is, and it must stay until the next one is in its place."""
    weight = torch.nn.Linear(2, 1)
    optimizer, rename = torch.optim.AdamW(weight.parameters()), Path.rename

    def killed(path, target):
        if path.name == "checkpoint.partial":
            raise KeyboardInterrupt
        rename(path, target)
    run.save_checkpoint(tmp_path, {}, {"step": 1}, weight, optimizer)
    monkeypatch.setattr(Path, "rename", killed)
    for step in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint(tmp_path, {}, {"step": step}, weight, optimizer)
        assert json.loads((run.last_checkpoint(tmp_path) / "run.json").read_text())["progress"] == {"step": 1}
        run.load_checkpoint(tmp_path, weight, optimizer)
    monkeypatch.undo()
    run.save_checkpoint(tmp_path, {}, {"step": 4}, weight, optimizer)
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint"]


def test_second_run_into_the_same_folder_is_refused(tmp_path, monkeypatch):
    """Workers outlive a torchrun that is killed."""
    monkeypatch.setattr(run, "locks", [])
    run.lock(tmp_path)
    with pytest.raises(BadInput, match="another run is writing there"):
        run.lock(tmp_path)


def test_signal_ends_the_run_after_its_step_with_a_checkpoint_and_the_command_that_goes_on(
        staged, tmp_path, monkeypatch, grpo_flags, capsys):
    """Between two stages too: the second one starts with the resumed run."""
    policy_loss, signals = train_grpo.grpo.policy_loss, itertools.cycle((signal.SIGTERM, signal.SIGINT))

    def interrupted(*tensors, **options):
        os.kill(os.getpid(), next(signals))
        return policy_loss(*tensors, **options)
    for step in range(1, 4):
        with monkeypatch.context() as patch:
            patch.setattr(train_grpo.grpo, "policy_loss", interrupted)
            here(monkeypatch, train_grpo.main, *grpo_flags, tmp_path, *["--resume"][: step - 1])
        said = capsys.readouterr().out
        assert f"stopped after step {step}; to go on: python script" in said and said.rstrip().endswith("--resume")
    here(monkeypatch, train_grpo.main, *grpo_flags, tmp_path, "--resume")
    assert_same_run(tmp_path, staged, "metrics.jsonl", "samples.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# Precision

def test_bf16_copy_scores_as_the_float32_weights_under_autocast(tiny, monkeypatch):
    """On a GPU the reference's matrices are bf16 and the policy's float32: at a stage's start the KL between them has to be 0.
    Here with autocast to bf16 on the CPU. Were the norms' weights rounded too, it would not be."""
    monkeypatch.setattr(qwen, "compute_dtype", lambda: torch.bfloat16)
    policy = copy.deepcopy(tiny[0])
    for weight in policy.parameters():
        weight.data += 0.01 * torch.randn_like(weight)                                   # no longer numbers of bf16
    reference = qwen.to_compute_dtype(copy.deepcopy(policy))
    sample = load("synthetic", "det", 112)[0]
    prompts = qwen.encode(tiny[1], prompt(sample), load_images(sample))
    completions = torch.randint(20, 400, (1, 3, 7))
    a, b = (qwen.token_logprobs(m, prompts, completions, completions > 0) for m in (policy, reference))
    assert torch.equal(a, b) and a.dtype == torch.float32
    assert {w.dtype for w in reference.parameters()} == {torch.bfloat16, torch.float32}
    exact = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(qwen, "compute_dtype", lambda: torch.float32)
    with exact:
        assert (qwen.token_logprobs(policy, prompts, completions, completions > 0) - a).abs().max() < 0.1
