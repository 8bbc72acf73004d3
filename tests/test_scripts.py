"""The scripts from the outside: files and fields that others rely on, exact resume, and errors in one line."""

import contextlib
import copy
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

import evaluate
import train_grpo
import train_sft
from conftest import GRPO, ROOT, SFT, rows, script, succeed
from data import load_samples
from flags import parse_eval_args
from metrics.plots import plot_curves
from metrics.rows import sample_to_row
from metrics.suite import read_suite
from metrics.training import stack_parts
from pretrained import load_model
from rewards import REWARD_PARTS, RewardPart
from rollout import predict
from runtime import checkpoint
from runtime.errors import UserError
from runtime.lora import adapted_layers, add_adapters
from sample import format_target
from several import PARSE
from tiny.scenes import Scenes

FIELDS = ("step", "stage", "task", "reward", "reward_std", "parts", "kl", "entropy", "clip_frac", "grad_norm", "loss", "lr",
          "len_mean", "truncated_frac", "zero_std_frac", "resampled", "data_s", "rollout_s", "update_s", "tokens_per_s")

# ----------------------------------------------------------------------------------------------------------------------
# SFT -> GRPO in stages -> evaluation

def test_sft_leaves_a_model_a_checkpoint_and_curves(sft):
    assert {"model", "checkpoint", "metrics.jsonl", "curves.png"} <= {p.name for p in sft.iterdir()}
    log = rows(sft / "metrics.jsonl")
    assert [row["step"] for row in log] == list(range(1, 31)) and all(row["loss"] > 0 for row in log)
    assert log[-1]["loss"] < log[0]["loss"] / 3


def test_grpo_logs_every_step_of_every_stage(staged):
    log = rows(staged / "metrics.jsonl")
    steps = [(row["step"], row["stage"], row["task"]) for row in log]
    assert steps == [(1, 0, "cls"), (2, 0, "cls"), (3, 1, "det"), (4, 1, "det")]
    for row in log:
        assert set(FIELDS) <= set(row) and set(row["parts"]) == {"format", "accuracy"}
        assert all(math.isfinite(row[name]) for name in FIELDS if name not in ("task", "parts"))
        assert all(0 <= row[name] <= 1 for name in ("clip_frac", "truncated_frac", "zero_std_frac"))
        assert row["reward"] == pytest.approx(sum(row["parts"].values())) and 0 < row["len_mean"] <= 32


def test_learning_rate_begins_anew_in_each_stage(staged):
    lr = [row["lr"] for row in rows(staged / "metrics.jsonl")]
    assert lr[:2] == lr[2:] == pytest.approx([5e-4, 2.5e-4])


def test_each_stage_is_held_near_its_own_start(staged):
    """The KL to the reference is 0 in the first step of every stage, and no longer in the second."""
    kl = [row["kl"] for row in rows(staged / "metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-6) == kl[2] and kl[1] > 1e-4 and kl[3] > 1e-4


def test_grpo_shows_completions_with_their_parts_and_advantages(staged):
    samples = rows(staged / "samples.jsonl")
    assert [row["step"] for row in samples] == [step for step in (1, 2, 3, 4) for _ in range(4)]
    for row in samples:
        assert isinstance(row["completion"], str) and row["reward"] == pytest.approx(sum(row["parts"].values()))
        assert row["task"] == ("cls" if row["step"] < 3 else "det")
    groups = [samples[at : at + 4] for at in range(0, 16, 4)]
    assert all(abs(sum(row["advantage"] for row in group)) < 1e-4 for group in groups)


def test_grpo_leaves_a_model_a_checkpoint_and_curves(staged):
    assert {"model", "checkpoint", "curves.png"} <= {p.name for p in staged.iterdir()}
    assert not list(staged.rglob("*partial*"))


def test_saved_model_is_one_of_plain_transformers(staged):
    """In a process that has never seen this project, with numbers that can be computed with."""
    code = """if True:
        import sys, torch
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(sys.argv[1], output_loading_info=True)
        tokenizer, images = AutoTokenizer.from_pretrained(sys.argv[1]), Qwen2VLImageProcessorPil.from_pretrained(sys.argv[1])
        assert not any(info.values()), info
        text = "<|im_start|>user\\nWhere?<|im_end|>\\n<|im_start|>assistant\\n"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert tokenizer.decode(ids[0]) == text and "<think>" in tokenizer.get_vocab() and tokenizer.eos_token == "<|im_end|>"
        assert model(input_ids=ids).logits.isfinite().all() and images.size["longest_edge"] == 112**2
    """
    done = subprocess.run([sys.executable, "-c", code, staged / "model"], capture_output=True, text=True, check=False, cwd=staged,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


def test_evaluation_writes_predictions_that_score_the_same_again(staged, tmp_path, monkeypatch):
    shown = succeed("evaluate.py", "--task", "det", "--model", staged / "model", "--data", "synthetic", "--limit", 48,
                    "--max-new-tokens", 12, "--out", tmp_path / "first")
    predictions = rows(tmp_path / "first" / "predictions.jsonl")
    scores = json.loads((tmp_path / "first" / "scores.json").read_text())
    assert len(predictions) == scores["n"] == 48 and scores["task"] == "det"
    assert all(0 <= value <= 1 for name, value in scores.items() if name not in ("n", "task", "words"))
    assert all(name in shown for name in ("box_precision@0.5", "recall", "f1"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--task", "det", "--out", str(tmp_path / "again"),
                                      "--predictions", str(tmp_path / "first" / "predictions.jsonl")])
    evaluate.main(parse_eval_args(None))
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "first" / name).read_text()


def test_interrupted_evaluation_goes_on_but_not_with_another_model(sft, dataset, tmp_path, monkeypatch):
    """Half of the answers of one model and half of another's would pass for a score. A torn last line is written again."""
    def evaluated(stop_after=None):
        batches, predict = [], evaluate.predict

        def counted(sampler, samples, *more):
            if len(batches) == stop_after:
                raise KeyboardInterrupt
            batches.append(len(samples))
            return predict(sampler, samples, *more)

        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "predict", counted)
            patch.setattr(sys, "argv", ["evaluate.py", "--task", "cls", "--data", str(dataset), "--model", str(tmp_path / "model"),
                                        "--limit", "12", "--batch", "4", "--max-new-tokens", "16", "--out", str(tmp_path / "out")])
            try:
                evaluate.main(parse_eval_args(None))
            except KeyboardInterrupt:
                with open(tmp_path / "out/predictions.partial", "a") as file:
                    file.write('{"completion": "half a li')
        return len(batches)

    shutil.copytree(sft / "model", tmp_path / "model")
    assert evaluated(stop_after=2) == 2 and not (tmp_path / "out/scores.json").exists()
    assert evaluated() == 1 and len(rows(tmp_path / "out/predictions.jsonl")) == 12
    assert evaluated(stop_after=1) == 1
    os.utime(tmp_path / "model/model.safetensors", ns=(1, 1))
    assert evaluated() == 3


def evaluate_here(monkeypatch, *args, predict=predict):
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "predict", predict)
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
        evaluate.main(parse_eval_args(None))


def written(out):
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*")
            if file.is_file() and file.name != ".lock"}


@pytest.fixture(scope="module")
def suite(sft, dataset, tmp_path_factory):
    """Flags of a suite: two sets of the test's own and one with published rows; 4 batches of 6 samples each."""
    lines = [("aid", "cls"), ("my-boxes", "det"), ("my-classes", "cls")]
    file = tmp_path_factory.mktemp("suite") / "suite.jsonl"
    file.write_text("".join(json.dumps({"benchmark": name, "task": task, "data": str(dataset)}) + "\n" for name, task in lines))
    return ["--suite", file, "--model", sft / "model", "--limit", 24, "--batch", 6, "--max-new-tokens", 16, "--out"]


@pytest.fixture(scope="module")
def whole(suite, tmp_path_factory):
    """What the suite writes when nothing interrupts it."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        evaluate_here(patch, *suite, out)
    return written(out)


def test_suite_is_its_evaluations_and_a_table_beside_the_published_rows(suite, whole, dataset, tmp_path, monkeypatch):
    evaluate_here(monkeypatch, "--task", "det", "--data", dataset, *suite[2:], tmp_path / "alone")
    files = whole
    for name, content in written(tmp_path / "alone").items():
        assert files[f"my-boxes/{name}"] == content
    head, _, *table = ([cell.strip() for cell in line.split("|")[1:-1]] for line in files["suite.md"].decode().splitlines())
    assert head == ["benchmark", "samples", "score", "this run", "GPT-4o", "InternVL-8B", "Qwen2.5-VL-3B", "GeoChat", "EarthDial",
                    "GeoVLM-R1"]
    scores = {name: json.loads(files[f"{name}/scores.json"]) for name in ("aid", "my-boxes", "my-classes")}
    assert table[0] == ["aid", "24", "token_recall", f"{100 * scores['aid']['token_recall']:.2f}",
                        "74.73", "60.40", "58.27", "72.03", "88.76", "88.46"]
    assert [row[:4] for row in table[1:]] == [[name, "24", score, f"{100 * scores[name][score]:.2f}"]
                                              for name in ("my-boxes", "my-classes") for score in ("format", "accuracy_reward")]
    assert all(row[4:] == ["-"] * 6 for row in table[1:])


@pytest.mark.parametrize("batches", [2, 5, 11])
def test_killed_suite_continues_and_ends_as_an_unbroken_one(suite, whole, tmp_path, monkeypatch, batches):
    """Killed inside each benchmark, with half a line and with the zeros that a power cut leaves."""
    count = itertools.count()

    def killed(*args):
        if next(count) == batches:
            raise Killed
        return predict(*args)
    with pytest.raises(Killed):
        evaluate_here(monkeypatch, *suite, tmp_path / "broken", predict=killed)
    assert not (tmp_path / "broken/suite.md").exists()
    for n, file in enumerate(sorted(tmp_path.glob("broken/*/predictions.partial"))):
        file.write_bytes(file.read_bytes() + [b'[[3, "half a li', b"\0\0\0\n"][n % 2])
    count = itertools.count(-100)
    evaluate_here(monkeypatch, *suite, tmp_path / "broken", predict=killed)
    assert next(count) + 100 == 12 - batches
    assert written(tmp_path / "broken") == whole


def test_new_evaluation_moves_the_old_one_aside(suite, whole, dataset, tmp_path, monkeypatch):
    """It was once replaced without a word. Also an unfinished one, and one that is scored again where it lies."""
    out, flags = tmp_path / "out", ["--task", "det", "--data", dataset, *suite[2:]]
    for _ in range(2):
        evaluate_here(monkeypatch, *flags, out)
    (out / "predictions.partial").write_text("of other flags\n")
    evaluate_here(monkeypatch, "--task", "det", "--predictions", out / "predictions.jsonl", "--out", out)
    evaluate_here(monkeypatch, *flags, out, "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.1", "out.2"]
    alone = {name.removeprefix("my-boxes/"): content for name, content in whole.items() if name.startswith("my-boxes/")}
    assert written(out) == written(tmp_path / "out.1") == alone
    assert written(tmp_path / "out.2") == alone | {"predictions.partial": b"of other flags\n"}


def test_predictions_that_overwrite_themselves_are_never_missing(suite, whole, tmp_path, monkeypatch):
    """They were removed before they were scored: an error or Ctrl-C in between lost hours of inference."""
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(whole["my-boxes/predictions.jsonl"])
    flags = ("--task", "det", "--predictions", file, "--out", tmp_path, "--overwrite")

    def killed(*_, **__):
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(evaluate, "score_completion", killed)
        evaluate_here(monkeypatch, *flags)
    assert file.read_bytes() == whole["my-boxes/predictions.jsonl"]
    evaluate_here(monkeypatch, *flags)
    assert (tmp_path / "scores.json").read_bytes() == whole["my-boxes/scores.json"]


def test_complete_suite_moves_aside_as_a_whole(suite, whole, tmp_path, monkeypatch):
    """With benchmarks that its file no longer names: they once stayed beside the new table."""
    old = whole | {"removed/scores.json": b"{}"}
    for name, content in old.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    evaluate_here(monkeypatch, *suite, tmp_path / "out")
    evaluate_here(monkeypatch, *suite, tmp_path / "out", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.1"]
    assert written(tmp_path / "out") == whole and written(tmp_path / "out.1") == old


@pytest.mark.parametrize("folder", [".", "aid"])
def test_evaluation_leaves_a_folder_alone_that_another_run_writes_to(suite, tmp_path, monkeypatch, folder):
    """A training run before its first step was moved aside, and so was an evaluation with all that it had open."""
    (tmp_path / "aid").mkdir()
    for name in ("suite.md", "aid/scores.json"):
        (tmp_path / name).write_text("")
    with checkpoint.lock(tmp_path / folder), pytest.raises(UserError, match="another run is writing there"):
        evaluate_here(monkeypatch, *suite, tmp_path)
    assert written(tmp_path) == {"suite.md": b"", "aid/scores.json": b""}


def test_evaluation_does_not_write_into_a_training_run(staged, monkeypatch):
    """Its report.html once replaced the run's."""
    before = written(staged)
    with pytest.raises(UserError, match="holds a training run; choose another --out"):
        evaluate_here(monkeypatch, "--task", "det", "--out", staged)
    assert written(staged) == before


def test_signal_ends_an_evaluation_after_its_batch(suite, tmp_path, monkeypatch, capfd):
    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(*args)
    with pytest.raises(KeyboardInterrupt, match=str(int(signal.SIGTERM))):
        evaluate_here(monkeypatch, *suite, tmp_path / "out", predict=signalled)
    said, acknowledged = capfd.readouterr()
    assert "SIGTERM: stopping after this batch; a second signal ends the process" in acknowledged
    assert f"6 of 24 predictions are in {tmp_path}/out/aid/predictions.partial" in said
    assert len((tmp_path / "out/aid/predictions.partial").read_text().splitlines()) == 2
    assert list(written(tmp_path / "out")) == ["aid/predictions.partial"]


@pytest.mark.parametrize("line, says", [
    ('{"benchmark": "b", "task": "cls", "data": "synthetic", "split": "test"}', "unknown key 'split'"),
    ('{"benchmark": "b", "task": "cls"}', "the key 'data' is missing"),
    ('{"benchmark": "b", "task": "cls", "data": "nowhere.json"}', "data nowhere.json: no such file"),
    ('{"benchmark": "b", "task": "cls", "data": "det=synthetic"}', "data is of task det, not cls"),
    ('{"benchmark": "b", "task": "cls", "data": ["synthetic"]}', "data is not a text"),
    ('{"benchmark": "a", "task": "cls", "data": "synthetic"}', "there is a benchmark a before"),
    ('{"benchmark": "b", "task": "ship", "data": "synthetic"}', "unknown task 'ship'"),
    ('{"benchmark": "aid", "task": "det", "data": "synthetic"}', "aid is a table of task cls, not det"),
    ('{"benchmark": "../b", "task": "cls", "data": "synthetic"}', "'../b' names a folder"),
    ('["b", "cls", "synthetic"]', "not an object"),
    ('{"benchmark": "b"', "not valid JSON"),
])
def test_wrong_line_of_a_suite_is_named(tmp_path, line, says):
    file = tmp_path / "suite.jsonl"
    file.write_text(f'{{"benchmark": "a", "task": "cls", "data": "synthetic"}}\n{line}\n')
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: line 2: .*{re.escape(says)}"):
        read_suite(file)


# ----------------------------------------------------------------------------------------------------------------------
# Exact resume

class Killed(BaseException):
    """Stands for SIGKILL: nothing in the scripts may catch it."""


def here(monkeypatch, main, *args, die_at_save=None):
    """A training script in this process; dies half-way through writing checkpoint number `die_at_save`."""
    saves, save, lock, locks = [], checkpoint.dcp.save, checkpoint.lock, []

    def torn(tensors, checkpoint_id, **options):
        if checkpoint_id.name == "checkpoint.partial":  # not the reference's folder in it
            saves.append(checkpoint_id)
        if len(saves) == die_at_save:
            checkpoint_id.mkdir()
            (checkpoint_id / "__0_0.distcp").write_bytes(b"half a checkpoint")
            raise Killed
        save(tensors, checkpoint_id=checkpoint_id, **options)

    def recorded(out):
        locks.append(lock(out))
        return locks[-1]

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dcp, "save", torn)
        patch.setattr(checkpoint, "lock", recorded)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr("matplotlib.figure.Figure.savefig", lambda self, out, **_: out.touch())  # drawing takes longer than a step
        patch.setattr(sys, "argv", ["script", *map(str, args)])
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            main(PARSE[main.__module__](None))
        finally:
            for file in locks:  # as the end of a process would
                file.close()
            for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers):
                signal.signal(number, handler)


def timeless(file):
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows(file)]


def assert_same_run(one, other, *logs):
    for name in logs:
        assert timeless(one / name) == timeless(other / name)
    a, b = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("die_at_save", [1, 4], ids=["before any checkpoint", "inside stage 2"])
def test_resumed_run_is_the_unbroken_run_bit_for_bit(staged, sft, tmp_path, monkeypatch, grpo_flags, die_at_save):
    """Killed after a step whose checkpoint was never finished: data, draws, optimiser, schedule, stage and reference
    continue, in another process than the unbroken run's, as if nothing had happened. A step off by one would show."""
    with pytest.raises(Killed):
        here(monkeypatch, train_grpo.main, *grpo_flags, tmp_path, die_at_save=die_at_save)
    assert len(rows(tmp_path / "metrics.jsonl")) == die_at_save and not (tmp_path / "model").exists()
    here(monkeypatch, train_grpo.main, *grpo_flags, tmp_path, *(["--resume"] if die_at_save > 1 else []))
    assert_same_run(tmp_path, staged, "metrics.jsonl", "samples.jsonl")
    assert all(row["grad_norm"] > 0 for row in rows(staged / "metrics.jsonl"))        # there was something to get wrong


def test_resumed_sft_is_the_unbroken_run_bit_for_bit(dataset, tmp_path, monkeypatch):
    flags = ["--task", "det,cls", "--model", "scratch", "--data", dataset, "--steps", 4, "--save-every", 1, *SFT, "--out"]
    here(monkeypatch, train_sft.main, *flags, tmp_path / "whole")
    with pytest.raises(Killed):
        here(monkeypatch, train_sft.main, *flags, tmp_path / "broken", die_at_save=3)
    here(monkeypatch, train_sft.main, *flags, tmp_path / "broken", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "broken", "metrics.jsonl")


def tensors(out):
    """Names in a checkpoint."""
    return FileSystemReader(out / "checkpoint").read_metadata().state_dict_metadata


def test_checkpoint_of_all_weights_holds_all(staged):
    names = {name.removeprefix("policy.model.") for name in tensors(staged) if name.startswith("policy.")}
    assert names == {name for name, _ in load_model(str(staged / "model"))[0].named_parameters()}


def test_resumed_run_with_a_frozen_tower_has_it_from_the_model_which_must_be_the_same(
        sft, tmp_path, monkeypatch, grpo_flags):
    """Of a --model that was written again, the tower would not fit to the rest."""
    model, changed = tmp_path / "model", tmp_path / "changed"
    shutil.copytree(sft / "model", changed)
    weights = load_file(changed / "model.safetensors")
    weights[next(name for name in weights if "visual" in name)] *= 1.1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    flags = [*grpo_flags, tmp_path / "whole", "--freeze", "vision", "--model", model]
    broken = [*flags, "--out", tmp_path / "broken"]
    model.symlink_to(sft / "model")
    here(monkeypatch, train_grpo.main, *flags)
    with pytest.raises(Killed):
        here(monkeypatch, train_grpo.main, *broken, die_at_save=4)
    assert tensors(tmp_path / "broken") and not any("visual" in name for name in tensors(tmp_path / "broken"))
    model.unlink()
    model.symlink_to(changed)
    with pytest.raises(UserError, match=r"frozen weights \(as read\) was #\w+ and is now #\w+: that would be another run"):
        here(monkeypatch, train_grpo.main, *broken, "--resume")
    model.unlink()
    model.symlink_to(sft / "model")
    here(monkeypatch, train_grpo.main, *broken, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "broken", "metrics.jsonl", "samples.jsonl")


@pytest.mark.parametrize("more", [
    {"use_dora": True}, {"modules_to_save": ["norm"]}, {"bias": "all"}, {"lora_bias": True},
    {"target_modules": ["qkv", "patch_embed.proj"]}, {"trainable_token_indices": [1]}])
def test_adapters_that_cannot_be_saved_again_are_not_continued(tmp_path, more):
    """DoRA's magnitudes were left out of model/ without a word; with a convolution a run ended in an error as it saved."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | more)
    peft.get_peft_model(load_model("tiny")[0], config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="only plain LoRA of linear layers can be continued"):
        add_adapters(load_model("tiny")[0], 4, str(tmp_path))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_adapters_of_a_head_that_is_tied_are_refused(tmp_path, merge, name):
    """Merged, they changed the embeddings too, or those the head."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=[name], base_model_name_or_path="tiny")
    peft.get_peft_model(load_model("tiny")[0], config).save_pretrained(tmp_path)
    write_base(tmp_path)
    with pytest.raises(UserError, match="its adapters change lm_head"):
        model = load_model(str(tmp_path), merge=merge)[0]
        add_adapters(model, 4, str(tmp_path))


def test_adapters_that_would_leave_nothing_to_learn_are_refused(tmp_path):
    """With --lora the vision tower is frozen, and these adapt nothing else: the optimiser got no weights."""
    peft = pytest.importorskip("peft")
    peft.get_peft_model(load_model("tiny")[0], peft.LoraConfig(r=4, target_modules=r".*visual.*\.qkv")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its adapters change the vision tower alone"):
        add_adapters(load_model("tiny")[0], 4, str(tmp_path))


def write_base(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(ROOT / "tiny")}))


def test_adapters_are_in_all_linear_layers_of_the_decoder_and_count_twice(tiny):
    model = copy.deepcopy(tiny[0])
    add_adapters(model, 4)
    names = [name.rpartition(".")[2] for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    layers = len(model.model.language_model.layers)
    assert Counter(names) == {f"{name}_proj": layers for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {layer.scaling["default"] for layer in adapted_layers(model)} == {2}


def test_room_for_the_reference_does_not_change_the_policy(tmp_path):
    """PiSSA takes its start off the weights of the model, and did so a second time for the reference."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.get_peft_model(load_model("tiny")[0], config).save_pretrained(tmp_path)
    with_it, without = load_model("tiny")[0], load_model("tiny")[0]
    add_adapters(with_it, 4, str(tmp_path), with_reference=True)
    add_adapters(without, 4, str(tmp_path))
    base = [name for name, _ in without.named_parameters() if "base_layer" in name]
    assert base and all(torch.equal(with_it.get_parameter(name), without.get_parameter(name)) for name in base)


def test_continued_adapters_lose_their_dropout(tmp_path):
    """Sampling has none, so the log-probs of the update would be those of another distribution."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5)
    peft.get_peft_model(load_model("tiny")[0], config).save_pretrained(tmp_path)
    model = load_model("tiny")[0]
    add_adapters(model, 4, str(tmp_path))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_resumed_stages_of_lora_are_the_unbroken_run_bit_for_bit(tmp_path, monkeypatch, grpo_flags):
    """The second stage's reference is the adapters that it began with: they have to be in the checkpoint. And the adapters that
    the run leaves are continued: their first step is where they are held."""
    flags = [*grpo_flags, tmp_path / "whole", "--lora", 4]
    here(monkeypatch, train_grpo.main, *flags)
    broken = [tmp_path / "broken" if flag == tmp_path / "whole" else flag for flag in flags]
    with pytest.raises(Killed):
        here(monkeypatch, train_grpo.main, *broken, die_at_save=4)
    assert all("lora_" in name for name in tensors(tmp_path / "broken"))
    here(monkeypatch, train_grpo.main, *broken, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "broken", "metrics.jsonl", "samples.jsonl")
    files = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    adapter = ["--model", tmp_path / "whole/adapter", "--out", tmp_path / "more", "--task", "det", "--lora"]
    for rank in (2, 8):
        with pytest.raises(UserError, match=f"--lora {rank}: the adapters in .* have rank 4"):
            here(monkeypatch, train_grpo.main, *flags, *adapter, rank)
    here(monkeypatch, train_grpo.main, *flags, *adapter, 4)
    first, second = rows(tmp_path / "more/metrics.jsonl")
    assert first["kl"] == 0 < second["kl"]
    bases = [json.loads((tmp_path / name / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
             for name in ("whole", "more")]
    assert bases[0] == bases[1]


def test_resuming_a_finished_run_changes_nothing(staged, tmp_path, monkeypatch, grpo_flags, capsys):
    """Also with another flag of neither data nor loss."""
    shutil.copytree(staged, tmp_path, dirs_exist_ok=True)
    here(monkeypatch, train_grpo.main, *grpo_flags, tmp_path, "--resume", "--save-every", 7)
    assert "--save-every was 50 and is now 7" in capsys.readouterr().out
    assert_same_run(tmp_path, staged, "metrics.jsonl", "samples.jsonl")


def test_curves_of_stages_with_unlike_parts(tmp_path):
    """pair has a length and a repetition part, det has not: after it a run once ended in a KeyError."""
    parts = [{"format": 1, "accuracy": 1, "length": 1, "repetition": 0}, {"format": 1, "accuracy": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"parts": p}) + "\n" for p in parts))
    plot_curves([tmp_path], ("repetition",), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_model_within_out_is_not_cleared_away(staged, dataset, monkeypatch):
    with pytest.raises(UserError, match="choose another --out"):
        here(monkeypatch, train_grpo.main, "--model", staged / "model", "--data", dataset, "--out", staged)
    assert (staged / "model").exists()


def test_base_of_the_adapters_within_out_is_not_cleared_away(staged, dataset, tmp_path, monkeypatch):
    """The run would have left its merged model in the base's place: its adapters, loaded again, then counted twice."""
    peft = pytest.importorskip("peft")
    model = load_model(str(staged / "model"))[0]
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(staged / "model")}))
    with pytest.raises(UserError, match="model lies in --out"):
        here(monkeypatch, train_grpo.main, "--model", tmp_path, "--lora", 4, "--data", dataset, "--out", staged)
    assert (staged / "model").exists()


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_resume_with_other_flags_is_refused(sft, staged, dataset, tmp_path, monkeypatch, grpo_flags, stage):
    shutil.copytree(sft if stage == "sft" else staged, tmp_path, dirs_exist_ok=True)
    sft_flags = ["--task", "det,cls", "--model", "scratch", "--data", dataset, "--steps", 30, *SFT, "--out"]
    main, flags = (train_sft.main, sft_flags) if stage == "sft" else (train_grpo.main, grpo_flags)
    (tmp_path / "system.txt").write_text("Be\nbrief.")
    with pytest.raises(UserError) as error:
        here(monkeypatch, main, *flags, tmp_path, "--resume", "--lr", 7e-4, "--system", tmp_path / "system.txt")
    assert re.search("--lr was .* and is now 0.0007[,:]", str(error.value))
    assert "--system was None and is now Be brief" in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Mixed stages, other prompts for groups without signal, punished length

MIXED = ["--task", "cls,cls+det", "--resample", 2, "--overlong-buffer", 24]


@pytest.fixture(scope="module")
def mixed(sft, dataset, tmp_path_factory):
    """(--out, what was printed) of a stage of one task and a stage of two."""
    out, printed = tmp_path_factory.mktemp("mixed"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        here(patch, train_grpo.main, *MIXED, "--model", sft / "model", "--data", dataset, "--out", out, *GRPO)
    return out, printed.getvalue()


def test_mixed_stage_trains_on_both_tasks_and_shows_what_was_forgotten(mixed):
    out, printed = mixed
    log = rows(out / "metrics.jsonl")
    assert [row["task"] for row in log] == ["cls", "cls", "cls+det", "cls+det"]
    assert [row["task"] for row in rows(out / "samples.jsonl")[::4]] == ["cls", "cls", "cls", "det"]
    scores = [row.get("heldout_tasks", {}) for row in log]
    assert [list(of_tasks) for of_tasks in scores] == [[], ["cls"], [], ["cls", "det"]]
    for name, mean in log[3]["heldout"].items():
        assert mean == pytest.approx((scores[3]["cls"][name] + scores[3]["det"][name]) / 2)
    found = re.findall(r"(\w+): mean rewards .*\n.*\nsampled +(\S+) +(\S+)", printed)
    before_and_after = [(task, float(before), float(after)) for task, before, after in found]
    assert [task for task, *_ in found] == ["cls", "cls", "det"]
    assert before_and_after[0][2] == before_and_after[1][1]  # the second stage begins where the first one ended


def test_held_out_scoring_shows_the_answer_to_the_same_question_before_and_after(mixed):
    shown = re.findall(r"^(\w+): scoring .*\n    e\.g\. (.*) -> .*(\(target .*\)), accuracy reward \d\.\d{3}$", mixed[1], re.MULTILINE)
    assert [task for task, *_ in shown] == ["cls", "cls", "det", "cls", "det"]
    assert len(set(shown)) == 2


def test_first_step_of_a_stage_has_the_held_out_scores_before_it(mixed):
    log, printed = rows(mixed[0] / "metrics.jsonl"), mixed[1]
    assert ["heldout_before" in row for row in log] == [True, False, True, False]
    sampled = [float(before) for before in re.findall(r"sampled +(\S+) +\S+", printed)]  # of cls; of cls, det
    means = sampled[0], (sampled[1] + sampled[2]) / 2
    assert [log[i]["heldout_before"]["sampled"] for i in (0, 2)] == pytest.approx(means, abs=1e-3)


def test_earlier_stage_is_scored_again_after_a_later_one(staged):
    assert [list(row.get("heldout_tasks", {})) for row in rows(staged / "metrics.jsonl")] == [[], ["cls"], [], ["cls", "det"]]
    last = rows(staged / "metrics.jsonl")[-1]
    assert last["heldout"] == last["heldout_tasks"]["det"]  # of the stage's own task


def test_overlong_completions_lose_up_to_a_point(mixed):
    for row in rows(mixed[0] / "metrics.jsonl"):
        assert -1 <= row["parts"]["overlong"] <= 0 and row["reward"] == pytest.approx(sum(row["parts"].values()))
    assert any(row["parts"]["overlong"] < 0 for row in rows(mixed[0] / "metrics.jsonl"))


def test_resumed_mixed_run_is_the_unbroken_run_bit_for_bit(mixed, sft, dataset, tmp_path, monkeypatch):
    flags = [*MIXED, "--model", sft / "model", "--data", dataset, "--save-every", 1, *GRPO, "--out", tmp_path]
    with pytest.raises(Killed):
        here(monkeypatch, train_grpo.main, *flags, die_at_save=3)
    here(monkeypatch, train_grpo.main, *flags, "--resume")
    assert_same_run(tmp_path, mixed[0], "metrics.jsonl", "samples.jsonl")


def test_part_that_a_task_of_a_mixed_stage_lacks_counts_as_zero():
    """On all ranks the same names, even where a rank has prompts of one task only."""
    det, pair = {"format": 1.0, "accuracy": 0.5}, {"format": 1.0, "accuracy": 1.0, "length": 0.5, "repetition": -0.25}
    parts = stack_parts([[det, det], [pair, pair]], ["det", "pair"])
    assert {name: values.tolist() for name, values in parts.items()} == {
        "format": [[1, 1], [1, 1]], "accuracy": [[.5, .5], [1, 1]], "length": [[0, 0], [.5, .5]], "repetition": [[0, 0], [-.25, -.25]]}
    assert stack_parts([[det]], ["det", "pair"]).keys() == parts.keys() and stack_parts([[det]], ["det"]).keys() == det.keys()


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: a non-zero exit, one clear line, and nothing left that looks complete

@pytest.mark.parametrize("name, args, says", [
    ("train_grpo.py", "--task det --group 1", "--group 1"),
    ("train_grpo.py", "--task ship --model SFT", "'ship'.*cls"),
    ("train_grpo.py", "--task cls,det+ship --model SFT", "'ship'.*cls"),
    ("train_grpo.py", "--task det --overlong-buffer 97", "--overlong-buffer 97 is longer than --max-new-tokens 96"),
    ("train_sft.py", "--task det --model scratch --lora 4", "--lora adapts a trained model"),
    ("train_grpo.py", "--task det --model EMPTY", "--model .*empty"),
    ("train_grpo.py", "--task det --model tests/nope", "--model tests/nope: no such folder; if it is a hub id"),  # it once asked the hub for a minute
    ("train_grpo.py", "--task det --model SFT/../checkpoint", "a run's checkpoint; python tools/export.py .* makes a model of it"),
    ("train_grpo.py", "--task det --model SFT/..", "a run's folder; its model is .*model"),
    ("train_grpo.py", "--task det --model SFT --image-size 100", "--image-size 100"),
    ("train_sft.py", "--task det --model SFT --data nowhere.json", "nowhere.json"),
    ("train_sft.py", "--task det --no-think --half-no-think", "--half-no-think .* leave one of them out"),
    ("evaluate.py", "--task det --no-think --predictions a.jsonl", "has its samples and answers already; leave --no-think out"),
    ("evaluate.py", "--task det --system EMPTY/text.jsonl --predictions a.jsonl", "leave --system out"),
    ("train_sft.py", "--task det --model EMPTY --reward det=typo", "no reward of det has this name"),  # it once trained first
    ("evaluate.py", "--task det --predictions a.jsonl --limit 2 --data b.json --oriented", "leave --data, --limit, --oriented out"),
    ("evaluate.py", "--data synthetic", "either --task or --suite"),
    ("evaluate.py", "--task det --suite suite.jsonl", "either --task or --suite"),
    ("evaluate.py", "--suite suite.jsonl --data d.json", "--suite names the data of each benchmark; leave --data out"),
    ("evaluate.py", "--suite EMPTY/none.jsonl", "none.jsonl: no benchmarks"),
    ("evaluate.py", "--task det --predictions nowhere.jsonl", "nowhere.jsonl"),
    ("evaluate.py", "--task det --predictions EMPTY/none.jsonl", "none.jsonl"),
    ("evaluate.py", "--task det --predictions EMPTY/text.jsonl", "text.jsonl: line 1"),
    ("evaluate.py", "--task seg --predictions EMPTY/seg.jsonl", "seg.jsonl: line 1: not a record of predictions.jsonl .*without a mask"),
    ("train_sft.py", "--task cls --model SFT --data DATA --out EMPTY/text.jsonl/out", "Not a directory"),
])
def test_bad_input_ends_in_one_line(name, args, says, sft, dataset, tmp_path, monkeypatch, capsys):
    """In this process; that Python turns SystemExit("error: ..") into a line and exit code 1 is tested below."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "none.jsonl").write_text("")
    (tmp_path / "empty" / "text.jsonl").write_text('{"id": "x", "task": "det"}\n')
    seg = sample_to_row(Scenes("seg", 112, 0)[0]) | {"id": "x", "images": ["a.png"], "mask": None, "completion": ""}
    (tmp_path / "empty" / "seg.jsonl").write_text(json.dumps(seg))
    for word, path in (("SFT", sft / "model"), ("DATA", dataset), ("EMPTY", tmp_path / "empty")):
        args = args.replace(word, str(path))
    monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path / "out"), *args.split()])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert isinstance(end.value.code, str) and "\n" not in end.value.code and end.value.code.startswith("error: ")
    assert re.search(says, end.value.code)
    assert not any((tmp_path / "out" / left).exists() for left in ("model", "checkpoint", "predictions.jsonl", "scores.json"))


def test_wrong_system_prompt_is_an_error_of_its_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--system", "nowhere.txt", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "train_grpo.py"), run_name="__main__")
    assert "--system: nowhere.txt: cannot be read" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, tasks, wrong", [
    ("evidence", {"dett"}, "evidence is for 'dett', which is no task"), ("overlong", None, "overlong has the name of another metric")])
def test_a_reward_part_that_would_not_count_as_written_is_refused(tmp_path, monkeypatch, name, tasks, wrong):
    """One of no task counted for nothing, without a word, and one named as a metric overwrote it."""
    monkeypatch.setitem(REWARD_PARTS, name, RewardPart(lambda **_: 1.0, tasks))
    with pytest.raises(UserError, match=f"reward part {wrong}"):
        here(monkeypatch, train_grpo.main, "--out", tmp_path / "out")


def test_targets_that_do_not_fit_into_max_new_tokens_are_counted(sft, dataset, tmp_path, monkeypatch, capsys):
    """Their completions are cut off before the answer ends. With the real tokenizer, 96 tokens hold some 5 boxes."""
    processor = load_model(str(sft / "model"))[1]
    for main, more in ((train_sft.main, ("--steps", 1)), (train_grpo.main, ("--steps", 1, "--group", 2, "--prompts", 1)),
                       (evaluate.main, ("--split", "train", "--limit", 5))):
        split = "heldout" if main is train_sft.main else "train"
        samples = load_samples(str(dataset), "det", 112, split=split)[: 5 if main is evaluate.main else None]
        lengths = [len(processor.tokenizer(format_target(sample))["input_ids"]) for sample in samples]
        for limit in (max(lengths), max(lengths) - 1):
            here(monkeypatch, main, "--task", "det", "--model", sft / "model", "--data", dataset, *more,
                 "--max-new-tokens", limit, "--out", tmp_path / f"{main.__module__}{limit}")
            warning = (f"warning: {sum(n > limit for n in lengths)} of the first {len(lengths)} targets of det are longer than "
                       f"--max-new-tokens {limit}, the longest has {max(lengths)} tokens")
            said = capsys.readouterr().err
            assert (warning in said) == ("targets of det are longer" in said) == (limit < max(lengths))


def test_error_is_the_last_line_a_user_sees(tmp_path):
    done = script("train_grpo.py", "--task", "det", "--model", tmp_path, "--out", tmp_path / "out")
    assert done.returncode != 0 and done.stderr.splitlines()[-1].startswith("error: --model")
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("script", ["train_sft.py", "train_grpo.py", "evaluate.py"])
def test_help_waits_for_neither_torch_nor_transformers(script):
    code = f"sys.argv = ['{script}', '--help']; atexit.register(lambda: print('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"import atexit, runpy, sys; {code}; runpy.run_path('{script}', run_name='__main__')"],
                          cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage") and done.stdout.endswith("False\n")
