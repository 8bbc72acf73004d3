"""The flag --reward: another accuracy reward for a task, for ablations, and rewards that show how a
policy games a reward."""

from collections.abc import Callable, Sequence

from boxes import iou_matrix, oriented_iou_matrix
from rewards import (
    TASKS,
    box_reward,
    count_penalised_ap_reward,
    detection_reward,
    exact_match_reward,
    grounding_reward,
    hybrid_reward,
    iou_reward,
    jaccard_reward,
    label_overlap_reward,
    levenshtein_reward,
)
from runtime.errors import UserError
from runtime.logging import print0
from sample import BOX_TASKS, Sample
from texts import parse_labels

# --------------------------------------------------------------------------------------------------
# Naive rewards: each one pays for something that nobody wants

def any_overlap_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = mean over predicted boxes of the IoU with the best target. Naive: copies and missed
    objects cost nothing, so one sure box is enough."""
    return mean_best_iou(answer, sample, axis=1)


def box_recall_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = mean over target boxes of the IoU with the best prediction. Naive: further boxes cost
    nothing, so boxes multiply (as under VLM-R1's AP reward)."""
    return mean_best_iou(answer, sample, axis=0)


def mean_best_iou(answer: str, sample: Sample, axis: int) -> float:
    """The mean of the largest IoUs along an axis of (predicted, target)."""
    iou = oriented_iou_matrix if sample.oriented else iou_matrix
    return box_reward(answer, sample, lambda *boxes: iou(*boxes).max(axis).mean())


def label_recall_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = |P & G| / |G| over predicted labels P and target labels G. Naive: naming all labels earns
    1."""
    predicted = parse_labels(answer, sample.choices)
    target = parse_labels(sample.gt_answer, sample.choices)
    return len(predicted & target) / max(len(target), 1)


# --------------------------------------------------------------------------------------------------
# The flag

# What --reward TASK=FUNCTION can put in place of a task's own reward
TEXT_REWARDS = (exact_match_reward, label_overlap_reward, label_recall_reward, hybrid_reward,
                levenshtein_reward, jaccard_reward)
BOX_REWARDS = (detection_reward, any_overlap_reward, box_recall_reward, iou_reward,
               count_penalised_ap_reward, grounding_reward)  # tasks whose answers hold boxes


def parse_rewards(values: Sequence[str], tasks: Sequence[str]) -> dict[str, Callable[..., float]]:
    """{task: reward} of the flag. A task can take its own reward, one of texts, and, if its answers
    hold boxes, one of boxes. Raises UserError for another one, or for another task."""
    task_rewards = {}
    for value in values:
        task, _, name = value.partition("=")
        if task not in tasks:
            raise UserError(f"--reward {value}: expected TASK=FUNCTION with a task of --task, "
                            f"{', '.join(tasks)}")
        rewards = (TASKS[task].reward, *TEXT_REWARDS, *(BOX_REWARDS if task in BOX_TASKS else ()))
        choices = {reward.__name__: reward for reward in rewards}
        if name not in choices:
            raise UserError(f"--reward {value}: no reward of {task} has this name; choose from "
                            f"{', '.join(choices)}, or add yours to TEXT_REWARDS or BOX_REWARDS in "
                            "metrics/reward_choices.py")
        task_rewards[task] = choices[name]
        print0(f"{task}: the accuracy reward is {name} (--reward)")
    return task_rewards
