"""The embedded checkpoint: small, in the format for every task, as accurate as its card says, with room for GRPO."""

from dataclasses import replace
from pathlib import Path

import pytest

from data import load_samples
from metrics.held_out import held_out_rewards
from model import load_model
from rewards import REWARD_PARTS, TASKS, RewardPart
from rollout import Sampler

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def shipped():
    return Sampler(*load_model("tiny"))


def held_out(sampler, task, n):
    return load_samples("synthetic", task, sampler.processor.image_size, split="heldout")[:n]


def test_it_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "tiny").iterdir()) < 8e6


@pytest.mark.parametrize("task, greedy", [("det", (0.3, 0.6)), ("cls", (0.95, 1.0))])
def test_it_answers_in_format_and_leaves_detection_room(shipped, task, greedy):
    """Over the first 64 held-out scenes: the card's 256 take longer."""
    scores = held_out_rewards(shipped, held_out(shipped, task, 64), max_new_tokens=96)
    assert scores["format"] > 0.95 and greedy[0] <= scores["greedy"] <= greedy[1]
    assert scores["sampled"] <= scores["greedy"]


@pytest.mark.parametrize("task", TASKS)
def test_it_answers_every_task_in_its_format(shipped, task):
    scores = held_out_rewards(shipped, held_out(shipped, task, 16), max_new_tokens=160)
    assert scores["format"] > 0.9 and scores["sampled"] > 0.05


@pytest.mark.parametrize("task", ["det", "count"])
def test_it_answers_without_reasoning_where_it_is_asked_to(shipped, task):
    samples = [replace(sample, thinking=False) for sample in held_out(shipped, task, 16)]
    scores = held_out_rewards(shipped, samples, max_new_tokens=96)
    assert scores["format"] > 0.9 and scores["sampled"] > 0.05


def test_a_new_reward_part_is_a_held_out_reward_of_its_tasks(shipped, monkeypatch):
    monkeypatch.setattr("metrics.held_out.predict", lambda sampler, prompts, *args, **_: [["abc"]] * len(prompts))
    monkeypatch.setitem(REWARD_PARTS, "brevity", RewardPart(lambda text, **_: 1 / len(text), tasks=("cls",)))
    for task, new in (("cls", {"brevity": 1 / 3}), ("pair", {})):
        found = held_out_rewards(shipped, load_samples("synthetic", task, 28)[:3], max_new_tokens=8)
        assert list(found.items()) == [("sampled", 0), ("greedy", 0), ("format", 0), *new.items()]
