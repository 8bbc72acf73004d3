"""What must not spoil a run: losses and rewards that are no finite numbers, full disks, signals, a
second run in the same folder."""

import contextlib
import copy
import dataclasses
import gc
import json
import os
import resource
import shutil
import signal
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rewards
import train_grpo
from conftest import GRPO, rows
from data import fingerprint, get_batch, load_samples
from model import token_logprobs
from pretrained import load_model, save_model
from processing import encode
from rewards import TASKS, score_completion
from runtime import checkpoint
from runtime.checkpoint import Run, last_checkpoint, run_config, state_dict
from runtime.distributed import to_compute_dtype
from runtime.errors import UserError
from runtime.logging import MetricsLog
from runtime.optimisation import NonFiniteGuard
from sample import Sample
from several import users_of_compute_dtype
from test_scripts import assert_same_run, here

SAMPLE_IDS = ["left.png#0", "right.png#3"]
NAN, INF = float("nan"), float("inf")

# --------------------------------------------------------------------------------------------------
# Numbers

@pytest.mark.parametrize("loss, grad_norm", [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, INF)])
def test_step_without_finite_loss_and_gradient_is_refused_and_counted(loss, grad_norm):
    """Adam's moments would be NaN forever after one."""
    guard = NonFiniteGuard()
    steps = [(1.0, 1.0), (loss, grad_norm), (1.0, 1.0)]
    finite = [guard.all_finite(torch.tensor(a), torch.tensor(b), SAMPLE_IDS) for a, b in steps]
    assert finite == [True, False, True]
    assert guard.skipped == 1


def test_ten_skipped_steps_in_a_row_end_the_run_with_the_samples():
    guard, bad, good = NonFiniteGuard(skipped=5), torch.tensor(NAN), torch.tensor(1.0)
    for grad_norm in [bad] * 9 + [good] + [bad] * 9:
        guard.all_finite(good, grad_norm, SAMPLE_IDS)
    assert guard.skipped == 5 + 18
    with pytest.raises(UserError, match="10 times in a row.*left.png#0, right.png#3"):
        guard.all_finite(good, bad, SAMPLE_IDS)


def test_skipped_steps_are_null_in_the_log(sft, dataset, tmp_path, monkeypatch):
    """The loss is NaN for one step: the run continues, no such number reaches the weights, and the
    log stays JSON."""
    steps, policy_loss = [], train_grpo.grpo.policy_loss

    def poisoned(logprobs, *more, **options):
        loss, sums = policy_loss(logprobs, *more, **options)
        steps.append(loss)
        return (loss * NAN if len(steps) == 1 else loss), sums
    monkeypatch.setattr(train_grpo.grpo, "policy_loss", poisoned)
    here(monkeypatch, train_grpo.main, "--task", "cls", "--model", sft / "model", "--data", dataset,
         *GRPO, "--heldout", 0, "--out", tmp_path)
    first, second = rows(tmp_path / "metrics.jsonl")
    assert first["loss"] is None and first["grad_norm"] is None
    assert first["skipped"] == second["skipped"] == 1
    assert second["loss"] is not None and "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    model, _ = load_model(str(tmp_path / "model"))
    assert all(w.isfinite().all() for w in model.parameters())


@pytest.mark.parametrize("value", [NAN, INF, None, "1", torch.tensor([1.0, 0.0]), [0.5]],
                         ids=["nan", "inf", "None", "text", "tensor", "list"])
def test_reward_that_is_no_number_is_an_error_with_its_name(monkeypatch, value):
    def my_reward(answer, sample, **_):
        return value
    monkeypatch.setitem(rewards.TASKS, "cls", TASKS["cls"]._replace(reward=my_reward))
    sample = Sample("tile 7", "cls", [], "What?", "port", 112)
    with pytest.raises(ValueError, match="part accuracy of task cls returned .* for sample tile 7 and the answer 'port'") as error:
        score_completion("<think>a</think> <answer>port</answer>", sample)
    assert str(error.value).endswith("; return float(..)") != isinstance(value, float)


@pytest.mark.parametrize("answer, says", [(None, "and no answer$"), ("None", "and the answer 'None'$")])
def test_missing_answer_is_not_the_answer_none(answer, says):
    """The error showed the same words for both, and asked for a float where it had a NaN."""
    with pytest.raises(ValueError, match=says):
        rewards.finite_reward("mine", lambda **_: NAN, answer=answer, sample=Sample("tile 7", "ovd", [], "What?", "None", 112))


def test_reward_that_raises_is_an_error_that_names_part_and_sample(monkeypatch):
    def my_reward(answer, sample, **_):
        return 1 / (sample.gt_answer != answer)
    monkeypatch.setitem(rewards.TASKS, "cls", TASKS["cls"]._replace(reward=my_reward))
    sample = Sample("tile 7", "cls", [], "What?", "port", 112)
    says = "part accuracy of task cls raised ZeroDivisionError: division by zero, for sample tile 7 and the answer 'port'"
    with pytest.raises(ValueError, match=says) as error:
        score_completion("<think>a</think> <answer>port</answer>", sample)
    assert isinstance(error.value.__cause__, ZeroDivisionError)  # its traceback names the line


# --------------------------------------------------------------------------------------------------
# Disks

@contextlib.contextmanager
def full_disk(megabytes):
    """No file can grow beyond this size: what a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_last_checkpoint_intact(
        sft, staged, dataset, tmp_path, monkeypatch, grpo_flags):
    """When the disk is full at its second checkpoint, the run ends in one line; with room again it
    continues."""
    run_flags = [*grpo_flags, tmp_path]
    save = checkpoint.dcp.save

    def second_fails(tensors, **options):
        if (tmp_path / "checkpoint").exists():
            raise OSError(28, "No space left on device")
        save(tensors, **options)
    message = "checkpoint.partial cannot be written .*No space left on device"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dcp, "save", second_fails)
        with pytest.raises(UserError, match=message):
            here(monkeypatch, train_grpo.main, *run_flags)
    saved = json.loads((tmp_path / "checkpoint/run.json").read_text())
    assert saved["progress"]["step"] == 1
    with full_disk(4), pytest.raises(UserError, match=r"is the disk full\?"):
        here(monkeypatch, train_grpo.main, *run_flags, "--resume")
    assert not (tmp_path / "checkpoint.partial").exists()
    here(monkeypatch, train_grpo.main, *run_flags, "--resume")
    assert_same_run(tmp_path, staged, "metrics.jsonl", "samples.jsonl")


def test_model_that_does_not_fit_on_the_disk_is_not_half_there(staged, tmp_path):
    loaded = load_model(str(staged / "model"))
    with full_disk(1), pytest.raises(UserError, match="cannot be written"):
        save_model(*loaded, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_image_that_vanishes_during_a_run_is_named(sft, dataset, tmp_path, monkeypatch):
    flags = ["--task", "cls", "--model", sft / "model", "--data", dataset, *GRPO,
             "--heldout", 0, "--out", tmp_path, "--save-every", 1]
    encode = train_grpo.encode
    second_step = get_batch([load_samples(str(dataset), "cls", 112, split="train")], 1, 4, (0,))

    def gone(processor, sample):
        if sample in second_step:
            sample = dataclasses.replace(sample, images=["nowhere.png"])
        return encode(processor, sample)
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "encode", gone)
        with pytest.raises(UserError, match="image nowhere.png cannot be read"):
            here(monkeypatch, train_grpo.main, *flags)
    assert len(rows(tmp_path / "metrics.jsonl")) == 1
    here(monkeypatch, train_grpo.main, *flags, "--resume")
    assert len(rows(tmp_path / "metrics.jsonl")) == 2


# --------------------------------------------------------------------------------------------------
# Resume

def run_args(out, resume=False, overwrite=False, **defaults):
    return SimpleNamespace(out=out, resume=resume, overwrite=overwrite, defaults=defaults,
                           may_change=["--save-every"], model="tiny", steps=10)


def test_out_resume_overwrite_and_defaults_are_left_out_of_the_settings():
    args = SimpleNamespace(out="a", resume=True, overwrite=True, defaults={}, may_change=[], tensorboard=True,
                           lr=1.0, save_every=7)
    config = run_config(args, ["3 samples #1", "4 samples #2"], ["2 samples #3"], torch.nn.Linear(2, 1))
    assert config == {"tensorboard": "True", "lr": "1.0", "save-every": "7",
                      "data (as read)": "3 samples #1, 4 samples #2",
                      "held-out data (as read)": "2 samples #3"}


def test_frozen_weights_are_settings_because_no_checkpoint_holds_them():
    """Whatever a device keeps them in: a run may move from a GPU to a CPU."""
    def settings():
        return run_config(SimpleNamespace(), [], [], model)
    model = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.Linear(9, 1))
    assert "frozen weights (as read)" not in settings()
    model[0].requires_grad_(False)
    before = settings()
    model[1].weight.data += 1
    model[0].weight.data = model[0].weight.data.bfloat16()
    assert "frozen weights (as read)" in before and settings() == before
    model[0].bias.data[8] += 1
    assert settings() != before


def test_flag_that_an_older_checkpoint_does_not_know_had_its_default(tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    saved = {"settings": {"lr": "1.0"}, "progress": {"step": 3}, "files": {}}
    (tmp_path / "checkpoint/run.json").write_text(json.dumps(saved))
    run = Run(run_args(tmp_path, resume=True), {"lr": "1.0", "new-flag": "7"}, {"step": 0})
    assert run.progress == {"step": 3}
    assert "the checkpoint does not know --new-flag, now 7" in capsys.readouterr().out
    run.close()
    with pytest.raises(UserError, match="checkpoint of another script"):
        Run(run_args(tmp_path, resume=True), {"lr": "1.0"}, {"stage": 0, "step": 0})
    with pytest.raises(UserError, match="--lr was 1.0 and is now 2.0"):
        Run(run_args(tmp_path, resume=True), {"lr": "2.0", "new-flag": "7"}, {"step": 0})
    config = {"lr": "1.0", "new-flag": "7"}
    with pytest.raises(UserError, match="--new-flag was 5 and is now 7"):
        Run(run_args(tmp_path, resume=True, new_flag=5), config, {"step": 0})
    run = Run(run_args(tmp_path, resume=True, new_flag=7), config, {"step": 0})
    assert run.progress == {"step": 3} and run.steps_done == 3


def test_checkpoint_without_its_list_of_files_is_damaged(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/run.json").write_text(json.dumps({"settings": {}, "progress": {}}))
    with pytest.raises(UserError, match="run.json is damaged"):
        Run(run_args(tmp_path, resume=True), {}, {"step": 0})


def test_closed_run_gives_back_its_folder_and_the_signal_handlers(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = Run(run_args(tmp_path), {}, {"step": 0})
    run.install_signal_handlers()
    assert signal.getsignal(signal.SIGINT) is not before
    run.close()
    assert signal.getsignal(signal.SIGINT) is before
    Run(run_args(tmp_path), {}, {"step": 0}).close()


def test_resume_without_a_checkpoint_begins_the_run(tmp_path, capsys):
    """A batch system that starts a job again uses the same command line. But a model without a
    checkpoint is no beginning of a run."""
    args = run_args(tmp_path / "out", resume=True)
    progress = Run(args, {}, {"step": 0}).progress
    assert progress == {"step": 0}
    assert "the run begins" in capsys.readouterr().out
    (tmp_path / "out/model").mkdir()
    with pytest.raises(UserError, match="a model but no checkpoint"):
        Run(args, {}, {"step": 0})


def test_resume_with_other_data_is_refused(staged, dataset, tmp_path):
    """A record that was taken out after an error would shift the order of all samples, and nobody
    would know."""
    shutil.copytree(staged, tmp_path / "out")
    shutil.copytree(dataset.parent, tmp_path / "data")
    (tmp_path / "data/data.json").write_text(json.dumps(json.loads(dataset.read_text())[1:]))
    fewer = [load_samples(str(tmp_path / "data/data.json"), task, 112, None, "train", 0)
             for task in ("cls", "det")]
    args = run_args(tmp_path / "out", resume=True)
    config = run_config(SimpleNamespace(), map(fingerprint, fewer), [], torch.nn.Linear(2, 1))
    assert list(config) == ["data (as read)", "held-out data (as read)"]
    message = r"data \(as read\) was (\d+ samples #\w+, )?\d+ samples #\w+ and is now"
    with pytest.raises(UserError, match=message):
        Run(args, config, dict.fromkeys(("stage", "step", "before", "skipped")))


@pytest.mark.parametrize("other", [{"choices": ("sea", "ice")}, {"gt_mask": Path("b.png")}, {"gt_boxes": ((1, 2, 3, 4, 0),)}])
def test_changed_choices_masks_or_boxes_are_other_data(other):
    """What a reward reads and no other field shows: both were once left out."""
    before = Sample("a.json: record 0", "mlc", (), "Which?", "sea", 112, choices=("sea", "land"), gt_mask=Path("a.png"))
    assert fingerprint([before]) != fingerprint([dataclasses.replace(before, **other)])


def trained(save_first=False):
    """A weight after two steps of AdamW; what state_dict finds before them is a checkpoint's
    content."""
    weight = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(weight.weight)
    optimizer = torch.optim.AdamW(weight.parameters(), lr=0.1, weight_decay=0.1)
    if save_first:
        state_dict(weight, optimizer)
    for _ in range(2):
        weight.weight.grad = torch.tensor([[1.0, -3.0]])
        optimizer.step()
    return weight.weight


def test_checkpoint_before_the_first_update_changes_nothing():
    """torch makes the moments by a step without gradients, which put Adam's bias correction one
    step ahead: a run whose first steps had no signal, or were skipped, depended on --save-every."""
    assert torch.equal(trained(save_first=True), trained())


def test_killed_twice_between_the_renames_a_checkpoint_is_left(tmp_path, monkeypatch):
    """After the first kill checkpoint.old is all there is, and it must stay until the next one is
    in its place."""
    weight = torch.nn.Linear(2, 1)
    optimizer, rename = torch.optim.AdamW(weight.parameters()), Path.rename
    run = Run(run_args(tmp_path), {}, {"step": 0})

    def killed(path, target):
        if path.name == "checkpoint.partial":
            raise KeyboardInterrupt
        rename(path, target)
    run.save_checkpoint({"step": 1}, weight, optimizer)
    monkeypatch.setattr(Path, "rename", killed)
    for step in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint({"step": step}, weight, optimizer)
        saved = json.loads((last_checkpoint(tmp_path) / "run.json").read_text())
        assert saved["progress"] == run.progress == {"step": 1}
        run.load_checkpoint(weight, optimizer)
    monkeypatch.undo()
    run.save_checkpoint({"step": 4}, weight, optimizer)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".lock", "checkpoint"]


def test_second_run_into_the_same_folder_is_refused(tmp_path):
    """Workers outlive a torchrun that is killed."""
    first = Run(run_args(tmp_path), {}, {})
    with pytest.raises(UserError, match="another run is writing there"):
        Run(run_args(tmp_path), {}, {})
    del first
    Run(run_args(tmp_path), {}, {})


def test_two_runs_in_one_process_share_no_state(tmp_path):
    """Each has its own lock, signals and progress, and one that is closed leaves nothing behind."""
    args = run_args(tmp_path / "one"), run_args(tmp_path / "two")
    one, two = (Run(a, {}, {"step": 0}) for a in args)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        one.install_signal_handlers()
        os.kill(os.getpid(), signal.SIGTERM)
        assert one.should_stop() and not two.should_stop()
        two.install_signal_handlers()
        os.kill(os.getpid(), signal.SIGINT)
        assert len(one.received_signals) == len(two.received_signals) == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    weight = torch.nn.Linear(2, 1)
    one.save_checkpoint({"step": 5}, weight, torch.optim.AdamW(weight.parameters()))
    assert one.progress == {"step": 5} and two.progress == {"step": 0}
    assert last_checkpoint(tmp_path / "two") is None
    one.close()
    again = Run(run_args(tmp_path / "one", resume=True), {}, {"step": 0})
    assert again.progress == {"step": 5} and not again.should_stop()
    with pytest.raises(UserError, match="another run is writing there"):
        Run(args[1], {}, {})


def test_signal_ends_the_run_after_its_step_with_a_checkpoint_and_the_command_that_continues(
        staged, tmp_path, monkeypatch, grpo_flags, capfd):
    """Between two stages too: the second one starts with the resumed run."""
    policy_loss = train_grpo.grpo.policy_loss
    for step, number in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGTERM), 1):
        signals = [number]

        def interrupted(*tensors, signals=signals, **options):
            if signals:
                os.kill(os.getpid(), signals.pop())
            return policy_loss(*tensors, **options)
        with monkeypatch.context() as patch:
            patch.setattr(train_grpo.grpo, "policy_loss", interrupted)
            here(monkeypatch, train_grpo.main, *grpo_flags, tmp_path, *["--resume"][: step - 1])
        said, acknowledged = capfd.readouterr()
        name = signal.Signals(number).name
        assert f"{name}: finishing step {step}; a second signal ends the process\n" in acknowledged
        assert f"stopped after step {step}; to continue: python script" in said
        assert said.rstrip().endswith("--resume")
    here(monkeypatch, train_grpo.main, *grpo_flags, tmp_path, "--resume")
    assert_same_run(tmp_path, staged, "metrics.jsonl", "samples.jsonl")


# --------------------------------------------------------------------------------------------------
# TensorBoard

def row(step, **more):
    return {"step": step, "task": "det", "reward": step / 4, "parts": {"accuracy": step / 8},
            "loss": None, **more}


def test_tensorboard_reads_each_steps_metrics_once(tmp_path):
    """Read by tensorboard itself. A run is killed after step 4, three steps behind its checkpoint,
    and resumed: what it had logged of the steps 2 to 4 is gone."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    killed = MetricsLog(tmp_path, 0, tensorboard=True)
    for step in (1, 2, 3, 4):
        killed.write(row(step, reward=-1.0 if step > 1 else 0.25))
    resumed = MetricsLog(tmp_path, 1, tensorboard=True)
    for step in (2, 3):
        resumed.write(row(step, heldout={"accuracy": 0.5}))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = {tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}
    assert read == {"reward": [(1, 0.25), (2, 0.5), (3, 0.75)],
                    "parts/accuracy": [(1, 0.125), (2, 0.25), (3, 0.375)],
                    "heldout/accuracy": [(2, 0.5), (3, 0.5)]}
    assert [r["reward"] for r in rows(tmp_path / "metrics.jsonl")] == [0.25, 0.5, 0.75]


def test_tensorboard_gets_what_a_run_logs(sft, dataset, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    here(monkeypatch, train_grpo.main, "--task", "cls", "--model", sft / "model", "--data", dataset,
         *GRPO, "--heldout", 0, "--out", tmp_path, "--tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("reward", "kl", "parts/format"):
        first, *path = name.split("/")
        logged = [r[first][path[0]] if path else r[first] for r in rows(tmp_path / "metrics.jsonl")]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(logged)


def test_missing_tensorboard_is_one_line_and_costs_no_earlier_run(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard") as error:
        here(monkeypatch, train_grpo.main, "--tensorboard", "--out", tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "model").exists()


# --------------------------------------------------------------------------------------------------
# Precision

def test_bf16_copy_scores_as_the_float32_weights_under_autocast(tiny, monkeypatch):
    """On a GPU the reference's matrices are bf16 and the policy's float32: at a stage's start the
    KL between them has to be 0. Here with autocast to bf16 on the CPU. If the norms' weights were
    rounded too, it would not be."""
    modules = users_of_compute_dtype()
    for module in modules:
        monkeypatch.setattr(module, "compute_dtype", lambda: torch.bfloat16)
    policy = copy.deepcopy(tiny[0])
    for weight in policy.parameters():
        weight.data += 0.01 * torch.randn_like(weight)                  # no longer numbers of bf16
    ref_model = to_compute_dtype(copy.deepcopy(policy))
    prompts = encode(tiny[1], load_samples("synthetic", "det", 112)[0])
    completions = torch.randint(20, 400, (1, 3, 7))
    mask = completions > 0
    a, b = (token_logprobs(m, prompts, completions, mask) for m in (policy, ref_model))
    assert torch.equal(a, b) and a.dtype == torch.float32
    assert {w.dtype for w in ref_model.parameters()} == {torch.bfloat16, torch.float32}
    for module in modules:
        monkeypatch.setattr(module, "compute_dtype", lambda: torch.float32)
    exact = token_logprobs(policy, prompts, completions, mask)
    assert (exact - a).abs().max() < 0.1


def test_weights_are_cast_on_their_way_to_the_gpu(monkeypatch):
    """Cast on the host first, each process of a node held a private bf16 copy of a float32 checkpoint there."""
    monkeypatch.setattr("runtime.distributed.compute_dtype", lambda: torch.bfloat16)
    calls = []
    weight = SimpleNamespace(dim=lambda: 2, device="cpu", data=SimpleNamespace(to=lambda *args: calls.append(args)))
    module = SimpleNamespace(parameters=lambda: [weight], to=lambda device: None)
    to_compute_dtype(module, to="cuda")
    assert calls == [("cuda", torch.bfloat16)]


def test_a_stage_frees_the_reference_of_the_stage_before(sft, dataset, tmp_path, monkeypatch):
    """A name that outlived the loop once held it: two references at every later stage's peak."""
    made, make = [], train_grpo.make_ref_model

    def recorded(*args):
        gc.collect()
        assert not any(ref() for ref in made)
        ref_model = make(*args)
        made.append(weakref.ref(ref_model))
        return ref_model

    monkeypatch.setattr(train_grpo, "make_ref_model", recorded)
    here(monkeypatch, train_grpo.main, "--task", "cls,det", "--model", sft / "model", "--data", dataset,
         *GRPO, "--heldout", 0, "--out", tmp_path)
    assert len(made) == 2
