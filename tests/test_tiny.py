"""The embedded checkpoint: small, in the format for every task, right about as often as its card says, with room for GRPO."""

from pathlib import Path

import pytest

import model as qwen
from data import load
from evaluate import heldout_rewards

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ("cls", "mlc", "det", "rcap", "ground", "cap", "change", "vqa", "rec", "ovd", "seg", "pair")


@pytest.fixture(scope="module")
def shipped():
    return qwen.load("tiny")


def test_it_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "tiny").iterdir()) < 8e6


@pytest.mark.parametrize("task, greedy", [("det", (0.3, 0.6)), ("cls", (0.95, 1.0))])
def test_it_answers_in_format_and_leaves_detection_room(shipped, task, greedy):
    """Over the first 64 held-out scenes: the card's 256 take longer."""
    scores = heldout_rewards(*shipped, load("synthetic", task, shipped[1].frame, split="heldout")[:64], max_new_tokens=96)
    assert scores["format"] > 0.95 and greedy[0] <= scores["greedy"] <= greedy[1]
    assert scores["sampled"] <= scores["greedy"]


@pytest.mark.parametrize("task", TRAINED)
def test_it_answers_every_task_in_its_format(shipped, task):
    scores = heldout_rewards(*shipped, load("synthetic", task, shipped[1].frame, split="heldout")[:16], max_new_tokens=160)
    assert scores["format"] > 0.9 and scores["sampled"] > 0.05
