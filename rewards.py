"""Text + reference -> reward.

A completion earns `format` (did it reason in <think> and then answer in <answer>?) and `accuracy` (is the answer
right? one formula a task). Both lie in [0, 1]; GeoVLM-R1 (arXiv 2509.25026) adds them up, and so do we, with weights as
flags. The paper names its rewards but not their formulas, so the formulas marked (ours) are reconstructions.

Everything here reads text that a model under optimisation wrote, so: nothing raises, nothing takes more than linear
time, and an ambiguous answer earns nothing. `TASKS` at the end ties a task to its instruction, reward and scores.
"""

import math
import re
from collections.abc import Sequence
from typing import Callable, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MAX_BOXES = 1000  # an answer of more brackets is noise; the bound keeps the matching quick


# ----------------------------------------------------------------------------------------------------------------------
# Reading a completion

def format_reward(completion: str) -> float:
    """1 if the completion is `<think>reasoning</think> <answer>answer</answer>` and nothing else, else 0.

    Each tag stands exactly once, in this order, both parts say something, and only blanks stand around them.
    Source: GeoVLM-R1 (a format reward of 0 or 1); that empty and repeated tags earn nothing is ours.
    """
    if any(completion.count(tag) != 1 for tag in TAGS):
        return 0.0
    before, think, between, answer, after = re.split("|".join(TAGS), completion)
    in_order = re.findall("|".join(TAGS), completion) == list(TAGS)
    return float(in_order and not (before + between + after).strip() and bool(think.strip() and answer.strip()))


def extract_answer(completion: str) -> str | None:
    """The text between the only <answer> and the only </answer>, stripped; None if there is no such text.

    Two answers are none: a policy must not collect reward for a guess beside another. What stands inside the
    reasoning is no answer either, so the pair has to follow the last </think> (a missing <think> costs only the format).
    """
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    before, rest = completion.split("<answer>")
    answer, closed, after = rest.partition("</answer>")
    if not closed or "think>" in answer + after or before.rfind("<think>") > before.rfind("</think>"):
        return None
    return answer.strip() or None


def parse_boxes(answer: str) -> np.ndarray | None:
    """Boxes of an answer: (n, 4) array of x1, y1, x2, y2 in the units of the text (pixels of the frame); None if the
    answer is neither boxes nor `none`/`[]`.

    Every innermost bracket `[...]` is one prediction: 4 numbers, or 5 with the angle of an oriented box, of which the
    horizontal envelope is taken. A bracket that is no box (3 numbers, words, x2 <= x1) still counts as a prediction,
    as an empty box that overlaps nothing: dropping it would make a malformed guess free. Text around the brackets,
    such as Qwen's JSON, is ignored.
    """
    lists = re.findall(r"\[([^\[\]]*)\]", answer)
    if answer.strip().rstrip(".").lower() == "none" or (len(lists) == 1 and not lists[0].strip()):
        return np.zeros((0, 4))
    if not 0 < len(lists) <= MAX_BOXES:
        return None
    return np.array([_box(text) for text in lists])


def _box(text: str) -> tuple[float, float, float, float]:
    values = text.split(",", 5) if len(text) < 200 else []
    if len(values) in (4, 5) and all(re.fullmatch(r"\s*[+-]?\d{1,6}(\.\d{0,9})?\s*", v, re.ASCII) for v in values):
        box = tuple(map(float, values))
        if box[2] > box[0] and box[3] > box[1]:
            return horizontal(box)
    return (0.0, 0.0, 0.0, 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Boxes

def horizontal(box: tuple) -> tuple[float, float, float, float]:
    """Smallest upright box around `(x1, y1, x2, y2[, theta])`, a rectangle turned by theta degrees about its centre.

    Any unit. The envelope is the same for both senses of rotation, so no convention for theta is needed here.
    """
    x1, y1, x2, y2 = box[:4]
    theta = math.radians(box[4]) if len(box) > 4 else 0.0
    if theta == 0.0:
        return (x1, y1, x2, y2)
    w, h, cos, sin = (x2 - x1) / 2, (y2 - y1) / 2, abs(math.cos(theta)), abs(math.sin(theta))
    dx, dy = w * cos + h * sin, w * sin + h * cos
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    return (cx - dx, cy - dy, cx + dx, cy + dy)


def box_text(boxes: Sequence[tuple], frame: int) -> str:
    """Boxes as an answer: the upright envelope of each, cut to the frame, in whole pixels, at least one wide and high;
    or `none`."""
    texts = []
    for box in boxes:
        x1, y1, x2, y2 = (min(max(round(v), 0), frame) for v in horizontal(box))
        x1, y1 = min(x1, frame - 1), min(y1, frame - 1)
        texts.append(f"[{x1},{y1},{max(x2, x1 + 1)},{max(y2, y1 + 1)}]")
    return ",".join(texts) or "none"


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box of a (n, 4) with every box of b (m, 4): (n, m). Empty boxes give 0."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.clip(bottom_right - top_left, 0, None).prod(-1)  # (n, m)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(-1), (b[:, 2:] - b[:, :2]).prod(-1)
    union = area_a[:, None] + area_b[None, :] - intersection
    return intersection / np.maximum(union, 1e-9)


def matched_ious(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """IoU of each pair of the one-to-one assignment with the largest sum (Hungarian method): (min(n, m),)."""
    ious = iou_matrix(predicted, reference)
    return ious[linear_sum_assignment(ious, maximize=True)]


def reference_boxes(sample) -> np.ndarray:
    """The sample's boxes as upright boxes (m, 4), pixels of the frame."""
    return np.array([horizontal(box) for box in sample.boxes]).reshape(-1, 4)


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy rewards: (answer text, Sample) -> [0, 1]

def recall_reward(answer: str, sample) -> float:
    """Recall of the one reference label: 1 if the answer is that label, else 0 (ours; the paper says only "recall").

    Case, blanks, `_`, `-` and a full stop at the end do not matter. Naming several classes is not recall but a hedge
    that the paper's reviewers warned of, and earns 0.
    """
    return float(_label(answer) == _label(sample.answer))


def _label(text: str) -> str:
    return re.sub(r"[\s_-]", "", text).casefold().removesuffix(".")


def detection_reward(answer: str, sample) -> float:
    """R = sum of matched IoU / max(n_pred, n_ref) (ours), upright boxes in pixels of the frame.

    Matching is one to one, and the larger count divides, so neither a second box on the same object nor a spray of
    boxes pays (the paper's "IoU" leaves that open). Nothing to find and answered so: 1.
    """
    predicted, reference = parse_boxes(answer), reference_boxes(sample).clip(0, sample.frame)  # cut as its answer is
    if predicted is None:
        return 0.0
    if len(predicted) == 0 or len(reference) == 0:
        return float(len(predicted) == len(reference))
    total = matched_ious(predicted, reference).sum() / max(len(predicted), len(reference))
    return float(min(1.0, total))  # a sum of ones may end an ulp above its count


def reward_parts(completion: str, sample) -> dict[str, float]:
    """The named parts of one completion's reward, each in [0, 1]: format, accuracy."""
    answer = extract_answer(completion)
    accuracy = 0.0 if answer is None else TASKS[sample.task].reward(answer, sample)
    return {"format": format_reward(completion), "accuracy": accuracy}


# ----------------------------------------------------------------------------------------------------------------------
# Scores of a whole set: (answers, Samples) -> {name: value in [0, 1]}

def classification_scores(answers: list[str | None], samples: list) -> dict[str, float]:
    """Share of right labels."""
    return {"accuracy": float(np.mean([recall_reward(a or "", s) for a, s in zip(answers, samples)]))}


def detection_scores(answers: list[str | None], samples: list) -> dict[str, float]:
    """What the tables of GeoVLM-R1 and EarthDial print as mAP, under its true name, and beside it honest figures.

    `box_precision@t`: share of predicted boxes that overlap *any* reference by at least t; no matching, no penalty for
    what was missed; also by EarthDial's size group and by one or several references. `precision`, `recall`, `f1`: pairs of
    the reward's one-to-one matching with an IoU of at least 0.5. `reward`: the mean detection reward. All on upright boxes.
    """
    tally: dict[str, list[int]] = {}  # name -> [hits, boxes]
    matches = n_pred = n_ref = 0
    for answer, sample in zip(answers, samples):
        predicted, reference = parse_boxes(answer or ""), reference_boxes(sample)
        predicted = np.zeros((0, 4)) if predicted is None else predicted
        best = iou_matrix(predicted, reference).max(1) if len(reference) else np.zeros(len(predicted))
        groups = ["", "_single" if len(reference) == 1 else "_multiple"]  # none counts as several, as in EarthDial's script
        groups += [f"_{sample.size_group}"] if sample.size_group else []
        for threshold in (0.5, 0.25):
            for group in groups if threshold == 0.5 else groups[:1]:
                entry = tally.setdefault(f"box_precision@{threshold}{group}", [0, 0])
                entry[0] += int((best >= threshold).sum())
                entry[1] += len(predicted)
        matches += int((matched_ious(predicted, reference) >= 0.5).sum())
        n_pred, n_ref = n_pred + len(predicted), n_ref + len(reference)
    scores = {"reward": float(np.mean([detection_reward(a or "", s) for a, s in zip(answers, samples)]))}
    scores |= {name: hits / max(boxes, 1) for name, (hits, boxes) in tally.items()}
    return scores | {"precision": matches / max(n_pred, 1), "recall": matches / max(n_ref, 1),
                     "f1": 2 * matches / max(n_pred + n_ref, 1)}


# ----------------------------------------------------------------------------------------------------------------------
# The table that a new task is added to

class Task(NamedTuple):
    instruction: str   # follows the question; {frame} is the side of the image in pixels
    reward: Callable   # (answer, Sample) -> [0, 1]
    scores: Callable   # (answers, Samples) -> {name: value}


TASKS = {
    "cls": Task("Answer with one class.", recall_reward, classification_scores),
    "det": Task("Answer with a box [x1,y1,x2,y2] for each, in pixels of {frame}x{frame}, or none.",
                detection_reward, detection_scores),
}
