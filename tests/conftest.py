"""Shared by all tests: the project root on the path, a fixed seed, and one tiny random model."""

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # float32 on the CPU everywhere: the tolerances are those of float32
os.environ["OMP_NUM_THREADS"] = "1"      # bit for bit takes one thread: several round differently from run to run
logging.disable(logging.DEBUG)            # torch logs each step of a checkpoint, hundreds of lines beside a failure
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.errors import END_FILES  # noqa: E402


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With -n, the tests of a file stay together: they share runs that take longer than they do. Files start in the order of
    pytest_collection_modifyitems."""
    from xdist.scheduler import LoadScopeScheduling
    config.option.loadscopereorder = False
    return LoadScopeScheduling(config, log)


def pytest_collection_modifyitems(items):
    """The files that take longest come first: at the end, the other process would wait for one."""
    items.sort(key=lambda item: item.path.name not in ("test_parallel.py", "test_scripts.py"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it; torch only where it is loaded already. Nor is
    it in the run of an earlier test."""
    np.random.seed(0)
    END_FILES.clear()
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny():
    """(model, processor): random weights and a tokenizer learned from synthetic prompts and targets. Do not change it."""
    import torch

    from data import load_samples
    from sample import format_prompt, format_target
    from tiny.scratch import new_tiny_model

    torch.manual_seed(0)
    samples = [*load_samples("synthetic", "det", 112)[:150], *load_samples("synthetic", "cls", 112)[:50]]
    return new_tiny_model([format_prompt(s) + format_target(s) for s in samples])


# ----------------------------------------------------------------------------------------------------------------------
# Short runs of the scripts, made once for all tests that look at them

SFT = shlex.split("--batch 8 --warmup 3 --lr 3e-3 --max-new-tokens 32")
GRPO = shlex.split("--steps 2 --prompts 4 --group 4 --max-new-tokens 32 --warmup 0 --lr 5e-4 --eval-every 100 --heldout 1")


def script(name, *args):
    """The script as a user starts it, on the CPU and without the hub."""
    return subprocess.run([sys.executable, ROOT / name, *map(str, args)], capture_output=True, text=True, check=False,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})


def succeed(name, *args):
    done = script(name, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A small file of both tasks, in GeoChat's layout: 40 synthetic scenes, some held out. All boxes are the same: easy to learn."""
    from tiny.scenes import Scenes
    folder, records = tmp_path_factory.mktemp("data"), []
    for i in range(40):
        sample = Scenes("cls", 112, seed=1)[i]
        sample.images[0].save(folder / f"{i}.png")
        records.append({"image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\n[refer] where is <p>the ship</p>?"},
            {"from": "gpt", "value": "{<10><20><60><80>|<0>}"},
            {"from": "human", "value": f"Classify the scene. {sample.question}"},
            {"from": "gpt", "value": sample.gt_answer}]})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.fixture(scope="session")
def sft(tmp_path_factory, dataset):
    """--out of SFT from scratch: half learned, so that completions differ and GRPO has something to choose from."""
    out = tmp_path_factory.mktemp("sft")
    succeed("train_sft.py", "--task", "det,cls", "--model", "scratch", "--data", dataset, "--steps", 30, "--out", out, *SFT)
    return out


@pytest.fixture(scope="session")
def staged(tmp_path_factory, dataset, sft):
    """--out of two stages of GRPO, two steps each, from the SFT model."""
    out = tmp_path_factory.mktemp("grpo")
    succeed("train_grpo.py", "--task", "cls,det", "--model", sft / "model", "--data", dataset, "--out", out, *GRPO)
    return out


@pytest.fixture
def grpo_flags(sft, dataset):
    return ["--task", "cls,det", "--model", sft / "model", "--data", dataset, "--save-every", 1, *GRPO, "--out"]
