"""Shared by ablate.py and every_task.py: many short runs, N at once, each scored on held-out scenes.

A trial is SFT (or none), then GRPO. Its folder keeps what is done, so the same command continues
after an interruption.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from metrics.held_out import BATCH_SIZE, NUM_SAMPLED
from processing import encode
from readers.splits import HELD_OUT_SEED
from rewards import score_completion
from rollout import load_sampler, predict
from tiny.scenes import Scenes

ROOT = Path(__file__).resolve().parent.parent


class Trial(NamedTuple):
    name: str
    task: str   # as train_grpo.py takes it
    sft: str    # further flags of train_sft.py; "": no SFT
    grpo: str   # further flags of train_grpo.py


def add_trial_flags(parser: argparse.ArgumentParser, out: str, seeds: Sequence[int]) -> None:
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--scenes", type=int, default=512, help="held-out scenes of each task")


def run_trials(trials: Sequence[Trial], args: argparse.Namespace) -> dict[str, list[dict]]:
    """{name: what run_trial returns for each seed}, of those that ran to their end."""
    done = {}
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        futures = {(seed, trial): pool.submit(run_trial, trial, seed, args.out, args.scenes)
                   for seed in args.seeds for trial in trials}
        for (seed, trial), future in futures.items():
            try:
                rewards = future.result()
                done.setdefault(trial.name, []).append(rewards)
                print(f"{trial.name} {seed}: {gain([rewards], 'sampled')}", flush=True)
            except (ValueError, OSError, subprocess.CalledProcessError) as error:
                print(f"{trial.name} {seed} failed: {error}", flush=True)
    return done


def run_trial(trial: Trial, seed: int, out: Path, scenes: int) -> dict:
    """Accuracy rewards of held-out scenes before and after GRPO, {"before" or "after": {"sampled"
    or "greedy": one for each scene}}, of temperature 1 and by the task's own reward."""
    folder = out / trial.name / str(seed)
    scores = folder / "scores.json"
    settings = f"{trial} of {scenes} scenes\n"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "settings.txt", "a+") as file:
        file.seek(0)
        if file.read() not in ("", settings):
            raise ValueError(f"{folder} has a run with other settings; choose another --out")
        file.truncate(0)
        file.write(settings)
    if not scores.exists():
        start, task = Path("tiny"), f"--task {trial.task} --seed {seed}"
        if trial.sft:
            start = train("train_sft.py", f"{task} {trial.sft}", folder / "sft")
        end = train("train_grpo.py", f"{task} --model {start} {trial.grpo}", folder / "grpo")
        thinking = "--no-think" not in trial.grpo
        rewards = {when: score_scenes(model, trial.task, thinking, scenes)
                   for when, model in (("before", start), ("after", end))}
        scores.write_text(json.dumps(rewards))
    return json.loads(scores.read_text())


def train(script: str, flags: str, out: Path) -> Path:
    """Run a training script, or what is left of its run, on one thread; returns its model."""
    if not (out / "model").exists():
        out.mkdir(exist_ok=True)
        with open(out / "log.txt", "a") as log:
            subprocess.run([sys.executable, ROOT / script, *shlex.split(flags), "--out", out,
                            "--resume"], stdout=log, stderr=log, check=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    return out / "model"


@cache  # most trials start from the same model
def score_scenes(model: Path, tasks: str, thinking: bool, n: int) -> dict[str, list[float]]:
    """The accuracy reward of n held-out scenes of each task."""
    torch.set_num_threads(1)
    sampler = load_sampler(str(model))
    rewards = {"sampled": [], "greedy": []}
    for task in re.split("[,+]", tasks):
        samples = list(Scenes(task, sampler.processor.image_size, HELD_OUT_SEED, n, thinking=thinking))
        for first in range(0, n, BATCH_SIZE):
            batch = samples[first : first + BATCH_SIZE]
            prompts = [encode(sampler.processor, sample) for sample in batch]
            ids = range(first, first + len(batch))
            for name, group, temperature in (("sampled", NUM_SAMPLED, 1.0), ("greedy", 1, 0.0)):
                texts = predict(sampler, prompts, 160, group, temperature, ids)
                rewards[name] += [fmean(score_completion(text, sample)["accuracy"] for text in row)
                                  for row, sample in zip(texts, batch)]
    return rewards


def gain_and_error(runs: Sequence[dict], name: str) -> tuple[float, float]:
    """Mean gain and its standard error: over seeds, or of a single seed over its scenes."""
    gains = [np.subtract(run["after"][name], run["before"][name]) for run in runs]
    gains = np.array([g.mean() for g in gains] if len(gains) > 1 else gains[0])
    return float(gains.mean()), float(gains.std(ddof=1) / len(gains) ** 0.5)


def gain(runs: Sequence[dict], name: str) -> str:
    before, after = (fmean(fmean(run[when][name]) for run in runs) for when in ("before", "after"))
    mean, error = gain_and_error(runs, name)
    return f"{before:.3f} -> {after:.3f} ({mean:+.3f} ± {error:.3f})"


def minutes(folders: Sequence[Path]) -> float:
    """Minutes of training, the mean over the runs' folders, without the held-out scores."""
    seconds = 0.0
    files = [folder / name / "metrics.jsonl" for folder in folders for name in ("sft", "grpo")]
    for file in filter(Path.exists, files):  # a trial without SFT has no sft/
        rows = map(json.loads, file.read_text().splitlines())
        seconds += sum(row.get("rollout_s", 0.0) + row["update_s"] for row in rows)
    return seconds / 60 / len(folders)
