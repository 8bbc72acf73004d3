"""Several processes compute what one does: the same rollouts, losses, gradients and weights for any
number of them, on the CPU with gloo."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig

import train_grpo
from conftest import ROOT, rows
from pretrained import load_model
from runtime.errors import UserError
from several import RUNS
from tools import sizing
from tools.random_checkpoint import save_random_checkpoint

OF_TWO = [name for name in RUNS if name != "bf16"]              # runs of one process and of two
OF_THREE = ["sft", "grpo", "mixed", "lora", "bf16", "eval"]     # and of three
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
                            "OMP_NUM_THREADS": "1"}


def command(ranks, *args):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={ranks}", *map(str, args)]


def torchrun(ranks, *args):
    done = subprocess.run(command(ranks, *args), capture_output=True, text=True, check=False,
                          env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory, dataset, sft):
    out = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, ROOT / "tests/several.py", sft / "model", dataset, out, *OF_TWO],
                   check=True, env=ENVIRONMENT)
    return out


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, dataset, sft):
    out = tmp_path_factory.mktemp("of_two")
    torchrun(2, ROOT / "tests/several.py", sft / "model", dataset, out, *OF_TWO)
    return out


@pytest.fixture(scope="module")
def of_three(tmp_path_factory, dataset, sft):
    out = tmp_path_factory.mktemp("of_three")
    torchrun(3, ROOT / "tests/several.py", sft / "model", dataset, out, *OF_THREE)
    return out


@pytest.fixture(params=["of_two", "of_three"])
def together(request):
    return request.getfixturevalue(request.param)


def numbers(row):
    found = {name: value for name, value in row.items()
             if isinstance(value, int | float) and not name.endswith("_s")}
    return found | row.get("parts", {})


def assert_close(one, many):
    """Two metrics.jsonl up to the order of additions."""
    for a, b in zip(rows(one / "metrics.jsonl"), rows(many / "metrics.jsonl"), strict=True):
        assert numbers(a) == pytest.approx(numbers(b), abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("name", sorted(RUNS.keys() - {"bf16", "eval"}))
def test_several_processes_train_the_model_that_one_trains(alone, together, name):
    one, many = alone / name, together / name
    if not many.exists():  # three processes repeat some of the runs
        return
    assert_close(one, many)
    if "sft" not in name:
        texts = [[row["completion"] for row in rows(out / "samples.jsonl")] for out in (one, many)]
        assert texts[0] == texts[1]
        assert any(row["grad_norm"] > 0 for row in rows(one / "metrics.jsonl"))
    a, b = (load_file(out / "model/model.safetensors") for out in (one, many))
    assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_several_processes_predict_what_one_predicts(alone, together):
    """Nine batches, the last one of one sample: the last round is short."""
    names = ["predictions.jsonl", "report.html", "scores.json"]
    assert sorted(file.name for file in (together / "eval").glob("[!.]*")) == names  # and the lock
    for name in names:
        assert (alone / "eval" / name).read_bytes() == (together / "eval" / name).read_bytes()
    assert len({row["completion"] for row in rows(alone / "eval/predictions.jsonl")}) > 10


def test_lora_trains_only_its_adapters_and_is_saved_both_ways(of_two, sft):
    """Trained by several processes: the merged model differs from the start in the adapted layers
    only, and in plain transformers and peft it computes what the start with the adapters does."""
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration
    folders = (of_two / "lora/model", sft / "model")
    merged, start = (load_file(folder / "model.safetensors") for folder in folders)
    changed = {key for key in start if not torch.equal(start[key], merged[key])}
    assert changed
    assert all("layers" in key and "_proj" in key and "visual" not in key for key in changed)
    models = [Qwen2_5_VLForConditionalGeneration.from_pretrained(folder) for folder in folders]
    adapted = PeftModel.from_pretrained(copy.deepcopy(models[1]), of_two / "lora/adapter")
    input_ids = torch.arange(20, 60)[None]
    merged, start, adapted = (m(input_ids=input_ids).logits for m in (*models, adapted))
    assert torch.allclose(merged, adapted, atol=1e-5)
    assert not torch.allclose(merged, start, atol=1e-3)


@pytest.mark.parametrize("name", ["lora", "sft lora"])
def test_a_folder_of_adapters_is_the_model_that_they_are_merged_into(of_two, name):
    """load_model merges them into their base, as was done for model/, and as peft does."""
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration
    adapter, model = of_two / name / "adapter", of_two / name / "model"
    loaded = load_model(str(adapter))[0].state_dict()
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    peft_model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    of_peft = PeftModel.from_pretrained(peft_model, adapter).merge_and_unload().state_dict()
    for other in (load_model(str(model))[0].state_dict(), of_peft):
        assert loaded.keys() == other.keys()
        assert all(torch.allclose(loaded[key], other[key], atol=1e-6) for key in loaded)


def test_each_stage_of_lora_is_held_near_its_own_start(alone):
    """Once LoRA had one stage: its reference was the model without adapters."""
    kl = [row["kl"] for row in rows(alone / "lora/metrics.jsonl")]
    assert kl[0] == kl[2] == 0 and kl[1] > 1e-6 and kl[3] > 1e-6


def test_clipping_begins_with_the_second_inner_step(alone):
    """rho is pi over the pi of the rollout: recomputed at each inner step it would always be 1."""
    assert all(row["clip_frac"] > 0 for row in rows(alone / "gspo/metrics.jsonl"))


@pytest.mark.parametrize("name", sorted(name for name in OF_TWO if RUNS[name][0] is train_grpo))
def test_float32_log_probs_are_those_of_sampling(alone, name):
    """Also at another temperature, packed, and of adapters."""
    gaps = [row["sampling_gap"] for row in rows(alone / name / "metrics.jsonl")]
    assert all(gap < 1e-4 for gap in gaps)


def test_reward_is_the_weighted_sum_of_its_parts(alone):
    """With --format-weight 0.5, on the mean and on each completion."""
    for file in ("metrics.jsonl", "samples.jsonl"):
        for row in rows(alone / "stages" / file):
            assert row["reward"] == pytest.approx(0.5 * row["parts"]["format"] + row["parts"]["accuracy"])
    assert any(row["parts"]["format"] > 0 for row in rows(alone / "stages/metrics.jsonl"))


def test_bf16_compute_keeps_float32_weights_and_a_reference_that_starts_equal(of_three):
    """The whole model is gathered in float32. Once the other ranks' copies were still bf16, and
    ranks gathered shards of different sizes."""
    weights = load_file(of_three / "bf16/model/model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights.values())
    first, second = rows(of_three / "bf16/metrics.jsonl")
    assert first["kl"] == 0 < second["kl"] and first["sampling_gap"] < 0.02


@pytest.mark.parametrize("name", ["dapo", "sft"])
def test_frozen_vision_does_not_change(of_two, sft, name):
    folders = (sft, of_two / name)
    start, end = (load_file(folder / "model/model.safetensors") for folder in folders)
    for key in start:
        if "visual" in key or "self_attn" in key:
            assert torch.equal(start[key], end[key]) == ("visual" in key)


@pytest.mark.parametrize("name, before, ranks, number", [
    ("grpo", 2, 3, signal.SIGTERM), ("grpo", 2, 1, signal.SIGKILL), ("lora", 1, 2, signal.SIGKILL)])
def test_a_checkpoint_is_resumed_by_another_number_of_processes(
        alone, tmp_path, dataset, sft, name, before, ranks, number):
    """A signal reaches one of two processes. SIGTERM: both finish the step, save, and print how to
    continue; SIGKILL: the other ends too, instead of waiting forever. Another number of processes
    continues from the last checkpoint, and ends as one alone does."""
    flags = ["--model", sft / "model", "--data", dataset, "--out", tmp_path,
             *RUNS[name][1].split(), "--save-every", 1]
    launcher = subprocess.Popen(command(before, ROOT / "train_grpo.py", *flags), stdout=subprocess.PIPE,
                                text=True, env=ENVIRONMENT)
    for line in launcher.stdout:
        if line.startswith("step    2"):
            workers = subprocess.check_output(["pgrep", "-P", str(launcher.pid)], text=True).split()
            os.kill(int(workers[-1]), number)
            break
    said, code = launcher.communicate(timeout=120)[0], launcher.returncode
    if number == signal.SIGTERM:
        assert code == 0 and "stopped after step" in said and "--resume" in said
    else:
        assert code != 0
    progress = json.loads((tmp_path / "checkpoint/run.json").read_text())["progress"]
    done = {"grpo": 5, "lora": 2}[name] * progress["stage"] + progress["step"]
    assert 0 < done < len(rows(alone / name / "metrics.jsonl"))
    if ranks == 1:
        subprocess.run([sys.executable, ROOT / "train_grpo.py", *map(str, flags), "--resume"],
                       check=True, env=ENVIRONMENT)
    else:
        torchrun(ranks, ROOT / "train_grpo.py", *flags, "--resume")
    assert_close(alone / name, tmp_path)


def test_workers_end_with_a_launcher_that_is_killed(tmp_path):
    """They once lived on, with their GPUs and the lock of their folder."""
    worker = tmp_path / "worker.py"
    worker.write_text(f"""if True:
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from runtime.distributed import init_distributed
        init_distributed()
        sys.stdout.write("ready\\n")  # one write: two ranks' prints may stand on one line
        sys.stdout.flush()
        time.sleep(600)
    """)
    launcher = subprocess.Popen(command(2, worker), stdout=subprocess.PIPE, text=True,
                                env=ENVIRONMENT)
    said = [launcher.stdout.readline() for _ in range(3)]  # the first rank names the device
    assert said.count("ready\n") == 2
    launcher.kill()
    assert launcher.communicate(timeout=60)[0] == ""  # ends when no worker holds the pipe


def test_prompts_that_cannot_be_divided_among_the_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--prompts", "3"])
    with pytest.raises(UserError, match="--prompts 3 cannot be divided evenly among 2 processes"):
        train_grpo.check_grpo_args(train_grpo.parse_grpo_args(None), [["det"]])


@pytest.mark.parametrize("size, published", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_sizing_counts_the_parameters_of_the_published_models(size, published):
    """Half the total_size of their model.safetensors.index.json, which are bf16."""
    assert sizing.parameters(size)["all"] == published


MEMORY = f"""if True:
    import gc, os, resource, sys
    from pathlib import Path
    sys.path.insert(0, {str(ROOT)!r})
    import torch
    from model import Policy
    from pretrained import load_model, save_model
    from runtime import distributed
    from tests.several import users_of_compute_dtype

    def peak():  # not ru_maxrss, which begins with the parent's
        line = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
        return 1024 * int(line.split()[1])

    folder, out = map(Path, sys.argv[1:])
    for module in users_of_compute_dtype():
        module.compute_dtype = lambda: torch.bfloat16
    mesh = distributed.init_distributed()
    model, processor = load_model(str(folder))
    before = peak()
    policy, sampling_model = distributed.build_policy_and_sampling_model(Policy(model), mesh)
    del model, sampling_model  # on a GPU
    gc.collect()
    save_model(policy.model, processor, out)
    file = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    shard = sum(4 * weight.to_local().numel() for weight in policy.parameters())
    sys.stdout.write(f"peak {{peak() - before}} {{file}} {{shard}}\\n")
    sys.stdout.flush()
    distributed.destroy()
"""


def test_a_rank_never_holds_more_than_the_checkpoint_and_its_shard(tmp_path):
    """On 500 M weights in bf16, from loading to the saved model, which is float32 and twice as
    large. Each rank once made two whole models in float32 to begin with, and one at the end."""
    config = Qwen2_5_VLConfig(
        text_config={"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 12,
                     "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 32768},
        vision_config={"depth": 4, "hidden_size": 640, "num_heads": 8, "intermediate_size": 1720,
                       "out_hidden_size": 1536, "fullatt_block_indexes": [3]},
        tie_word_embeddings=True)
    save_random_checkpoint(config, tmp_path / "random", file_size="400MB")
    (tmp_path / "rank.py").write_text(MEMORY)
    done = torchrun(2, tmp_path / "rank.py", tmp_path / "random", tmp_path / "saved")
    peaks = [list(map(int, line.split()[1:])) for line in done.stdout.splitlines()
             if line.startswith("peak")]
    assert len(peaks) == 2
    for peak, file, shard in peaks:
        assert shard == pytest.approx(file, rel=0.01)       # half the weights, in float32
        assert peak < 1.2 * file + shard
    before, after = (load_model(str(tmp_path / name))[0] for name in ("random", "saved"))
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and b.dtype == torch.float32 and torch.equal(a.float(), b)
