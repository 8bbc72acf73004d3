"""Rewards read what a policy under optimisation wrote: each test names a way to be right, wrong or sly."""

import itertools
import json
import math
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rewards import (classification_scores, detection_reward, detection_scores, extract_answer, format_reward, horizontal,
                     iou_matrix, matched_ious, parse_boxes, recall_reward, reward_parts)

A, B, C = (10, 10, 50, 50, 0), (60, 60, 100, 90, 0), (0, 70, 30, 110, 0)  # three boxes that do not touch


def det(*boxes, size_group=""):
    return SimpleNamespace(frame=512, task="det", boxes=boxes, answer=text(*boxes), size_group=size_group)


def cls(label):
    return SimpleNamespace(frame=448, task="cls", boxes=(), answer=label, size_group="")


def text(*boxes):
    return ",".join("[" + ",".join(map(str, box[:4])) + "]" for box in boxes) or "none"


def completion(answer, think="I look."):
    return f"<think>{think}</think>\n<answer>{answer}</answer>"


# ----------------------------------------------------------------------------------------------------------------------
# Format

@pytest.mark.parametrize("good", [
    "<think>a</think><answer>b</answer>",
    "<think>a</think>\n\n<answer>b</answer>\n",
    "  <think> a\n</think> <answer>\n b </answer>  ",
    "<think>a < b, b > c [1,2]</think><answer>b</answer>",
    "<think>line 1\nline 2\n\nline 4</think>\n<answer>[1,2,3,4],\n[5,6,7,8]</answer>",  # a regex without DOTALL gives 0
])
def test_format_is_reasoning_then_answer(good):
    assert format_reward(good) == 1


@pytest.mark.parametrize("bad", [
    "", "b", "<answer>b</answer>", "<think>a</think>", "<think>a</think>b",                          # missing
    "<think>a<answer>b</answer>", "a</think><answer>b</answer>", "<think>a</think><answer>b",         # not closed or opened
    "<think>a</think><think>a</think><answer>b</answer>", "<think>a</think><answer>b</answer><answer>b</answer>",  # repeated
    "<think><think>a</think></think><answer>b</answer>", "<think>a<answer>b</answer></think>",        # nested
    "<think>a</think><answer><answer>b</answer></answer>", "<think>a<answer></think>b</answer>",
    "<answer>b</answer><think>a</think>", "</think>a<think><answer>b</answer>", "<think>a</think></answer>b<answer>",  # swapped
    "<think></think><answer>b</answer>", "<think>a</think><answer></answer>", "<think> \n</think><answer>b</answer>",  # empty
    "<think>a</think><answer>\t</answer>",
    "so: <think>a</think><answer>b</answer>", "<think>a</think>so:<answer>b</answer>", "<think>a</think><answer>b</answer>.",
    "<Think>a</Think><answer>b</answer>", "<think >a</think><answer>b</answer>", "<think>a</think><answer>b</answer><|im_start|>",
])
def test_format_is_nothing_else(bad):
    assert format_reward(bad) == 0


# ----------------------------------------------------------------------------------------------------------------------
# The answer

@pytest.mark.parametrize("written, answer", [
    ("<think>a</think><answer> b </answer>", "b"),
    ("<think>a</think><answer>b\nc</answer>", "b\nc"),
    ("<answer>b</answer>", "b"),                                       # a missing <think> costs the format only
    ("<think>a</think> so <answer>b</answer>, I say", "b"),
    ("<think>a</think><answer></answer>", None),
    ("<think>a</think><answer> \n </answer>", None),
    ("<think>a</think>b", None),
    ("<think>a</think><answer>b", None),
    ("<think>a</think></answer>b<answer>", None),
    ("<think><answer>b</answer></think>", None),                       # what stands in the reasoning is no answer
    ("<think>a<answer>b</answer>", None),
    ("<answer>b</answer><think>a</think>", None),
    ("<answer>b</answer></think>", None),
    ("<think>a</think><answer>b<think>c</think></answer>", None),
    ("<think>a</think><answer>b</answer><answer>c</answer>", None),    # two answers are none
    ("<think>a</think><answer>b</answer><answer>b</answer>", None),
    ("<think>the answer is <answer>c</answer></think><answer>b</answer>", None),
    ("", None),
])
def test_answer_is_what_stands_in_the_only_pair_after_the_reasoning(written, answer):
    assert extract_answer(written) == answer


# ----------------------------------------------------------------------------------------------------------------------
# Boxes of an answer

@pytest.mark.parametrize("answer", [
    "[10,20,30,40],[50,60,70,80]",
    "[10, 20, 30, 40], [50, 60, 70, 80]",
    "[ 10 ,20,30 , 40 ]\n[50,\n60,70,80]",
    "[10,20,30,40][50,60,70,80]",
    "[[10,20,30,40],[50,60,70,80]]",
    "[10.0,20.,+30,40],[50,60,70,80.000]",
    "[10,20,30,40,0],[50,60,70,80,0]",
    "The ships are at [10,20,30,40] and [50,60,70,80].",
    '```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "ship"}, {"bbox_2d": [50, 60, 70, 80], "label": "ship"}]\n```',
])
def test_boxes_are_read_in_any_dress(answer):
    assert parse_boxes(answer).tolist() == [[10, 20, 30, 40], [50, 60, 70, 80]]


@pytest.mark.parametrize("answer", ["none", "None", "None.", " NONE\n", "[]", "[]."])
def test_nothing_found_is_an_empty_list(answer):
    assert parse_boxes(answer).shape == (0, 4)


@pytest.mark.parametrize("answer", ["", "ship", "none of them", "10,20,30,40", "(10,20),(30,40)", "[10,20,30,40", "10,20,30,40]"])
def test_neither_boxes_nor_none_is_no_answer(answer):
    assert parse_boxes(answer) is None


@pytest.mark.parametrize("malformed", [
    "[1,2,3]", "[1,2,3,4,5,6]", "[1]", "[ship]", "[1,2,x,4]", "[1,2,,4]", "[ ]",
    "[30,2,10,4]", "[1,4,3,2]", "[1,2,1,4]", "[1,2,3,2]",              # no area
    "[nan,nan,nan,nan]", "[inf,1,2,3]", "[1,2,infinity,4]", "[1e3,1,2,3]", "[0x1,1,2,3]", "[1_0,1,22,33]",
    "[1,2," + "9" * 400 + ",4]", "[1,2,1000000000,1000000000]", "[١,٢,٣,٤]", "[1 2 3 4]",
])
def test_malformed_box_still_counts_as_a_prediction(malformed):
    """Dropping it would make a malformed guess free."""
    boxes = parse_boxes(text(A) + malformed)
    assert boxes.tolist() == [[10, 10, 50, 50], [0, 0, 0, 0]]
    assert detection_reward(text(A) + malformed, det(A)) == 0.5


def test_turned_box_becomes_its_envelope():
    assert parse_boxes("[0,10,20,20,90]") == pytest.approx(np.array([[5, 5, 15, 25]]))
    assert horizontal((0, 0, 2, 2, 45)) == pytest.approx((1 - 2**.5, 1 - 2**.5, 1 + 2**.5, 1 + 2**.5))
    assert horizontal((0, 0, 4, 2, 30)) == pytest.approx(horizontal((0, 0, 4, 2, -30)))  # either sense of rotation
    assert horizontal((1, 2, 3, 4)) == horizontal((1, 2, 3, 4, 0)) == (1, 2, 3, 4)


# ----------------------------------------------------------------------------------------------------------------------
# IoU and matching, against slow and obvious versions

def test_iou_counts_pixels():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 12, (60, 2, 2)), 1)              # (n, corner, axis), some without area
    boxes = corners.reshape(-1, 4)
    masks = np.zeros((60, 12, 12), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[y1:y2, x1:x2] = True
    both = (masks[:, None] & masks).sum((2, 3))
    either = (masks[:, None] | masks).sum((2, 3))
    np.testing.assert_allclose(iou_matrix(boxes.astype(float), boxes.astype(float)), both / np.maximum(either, 1))


@pytest.mark.parametrize("n, m", [(1, 1), (2, 3), (4, 2), (4, 4), (0, 2), (2, 0), (0, 0)])
def test_matching_is_the_best_of_all_permutations(n, m):
    rng = np.random.default_rng(n * 10 + m)
    for _ in range(20):
        p, r = (np.sort(rng.integers(0, 20, (k, 2, 2)), 1).reshape(-1, 4).astype(float) for k in (n, m))
        ious = iou_matrix(p, r) if n <= m else iou_matrix(r, p)
        choices = itertools.permutations(range(max(n, m)), min(n, m))
        best = max(sum(ious[i, j] for i, j in enumerate(choice)) for choice in choices)
        assert matched_ious(p, r).sum() == pytest.approx(best)
        assert matched_ious(p, r).shape == (min(n, m),)


# ----------------------------------------------------------------------------------------------------------------------
# Detection reward

@pytest.mark.parametrize("answer, reference, reward", [
    ([A], [A], 1),
    ([(10, 10, 30, 50)], [A], .5),                                     # left half: 800 / 1600
    ([(30, 30, 70, 70)], [A], 400 / 2800),                             # a quarter shared: 400 / (1600 + 1600 - 400)
    ([(0, 0, 60, 60)], [A], 1600 / 3600),
    ([B], [A], 0),                                                     # a peer compared the prediction with itself
    ([A, B], [A, B], 1),
    ([B, A], [A, B], 1),                                               # order does not matter
    ([A], [A, B], 1 / 2),                                              # a missing box
    ([A, B], [A], 1 / 2),                                              # an extra box
    ([A, A], [A], 1 / 2),                                              # a second box on the same object
    ([A, A], [A, B], 1 / 2),                                           # one prediction cannot serve two objects
    ([A, B, C], [A], 1 / 3),
    ([(10, 10, 30, 50), B], [A, B], .75),
    ([], [], 1),
    ([], [A], 0),
    ([A], [], 0),
])
def test_detection_reward_by_hand(answer, reference, reward):
    assert detection_reward(text(*answer), det(*reference)) == pytest.approx(reward)


@pytest.mark.parametrize("n", range(1, 30, 4))
def test_spraying_boxes_does_not_pay(n):
    """An extra box cannot raise the reward once there are as many boxes as objects, wherever it stands."""
    rng = random.Random(n)
    spray = [(x := rng.randrange(80), y := rng.randrange(80), x + rng.randrange(1, 40), y + rng.randrange(1, 40))
             for _ in range(n)]
    assert detection_reward(text(A, B, *spray), det(A, B)) == pytest.approx(2 / (2 + n))


def test_moving_a_box_towards_the_reference_never_lowers_the_reward():
    rewards = [detection_reward(text((x, 10 + x - 10, x + 40, x + 40)), det(A)) for x in range(60, 9, -1)]
    assert rewards == sorted(rewards) and rewards[0] == 0 and rewards[-1] == 1


def test_prose_is_not_nothing_found():
    assert detection_reward("I see no ship.", det()) == 0
    assert detection_reward("I see a ship.", det(A)) == 0


def test_turned_reference_counts_as_its_envelope():
    turned = (0, 10, 20, 20, 90)                                       # stands upright: 10 wide, 20 high
    assert detection_reward("[5,5,15,25]", det(turned)) == pytest.approx(1)
    assert detection_reward("[0,10,20,20,90]", det(turned)) == pytest.approx(1)
    assert detection_reward("[0,10,20,20]", det(turned)) == pytest.approx(100 / 300)


def test_parts_are_paid_apart():
    assert reward_parts(completion(text(A)), det(A)) == {"format": 1, "accuracy": 1}
    assert reward_parts(completion(text(B)), det(A)) == {"format": 1, "accuracy": 0}
    assert reward_parts(f"<answer>{text(A)}</answer>", det(A)) == {"format": 0, "accuracy": 1}
    assert reward_parts("", det()) == {"format": 0, "accuracy": 0}
    assert reward_parts(completion("Sea Lake"), cls("sea_lake")) == {"format": 1, "accuracy": 1}


def test_right_boxes_in_the_reasoning_earn_nothing():
    assert reward_parts(completion("none", think=text(A)), det(A)) == {"format": 1, "accuracy": 0}
    assert reward_parts(f"<think><answer>{text(A)}</answer></think>", det(A)) == {"format": 0, "accuracy": 0}


# ----------------------------------------------------------------------------------------------------------------------
# Classification reward

@pytest.mark.parametrize("answer", ["sea lake", "Sea Lake", "SeaLake", "sea_lake.", " sea-lake \n", "SEA LAKE."])
def test_label_may_be_written_in_any_case_and_spacing(answer):
    assert recall_reward(answer, cls("SeaLake")) == 1


@pytest.mark.parametrize("answer", [
    "river", "sea", "lake", "sea lake, river", "sea lake or river", "sea lake sea lake", "it is a sea lake", "not sea lake", "",
    "annual crop, forest, highway, industrial, pasture, residential, river, sea lake",  # naming all would have a recall of 1
])
def test_anything_but_the_one_label_is_wrong(answer):
    assert recall_reward(answer, cls("SeaLake")) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Scores

def test_scores_by_hand():
    """Two boxes on one object are two hits for the published "mAP", and one match for precision, recall and F1."""
    near = (10, 10, 50, 30)                                            # IoU 0.5 with A: a hit at exactly the threshold
    poor = (10, 10, 22, 50)                                            # 0.3: a hit at 0.25 only
    samples = [det(A, B, size_group="small"), det(A, size_group="large"), det(C)]
    scores = detection_scores([text(A, near, near), text(poor, B), None], samples)
    assert scores == pytest.approx({
        "reward": (1 / 3 + .3 / 2 + 0) / 3,
        "box_precision@0.5": 3 / 5, "box_precision@0.25": 4 / 5,
        "box_precision@0.5_multiple": 3 / 3, "box_precision@0.5_single": 0 / 2,
        "box_precision@0.5_small": 3 / 3, "box_precision@0.5_large": 0 / 2,
        "precision": 1 / 5, "recall": 1 / 4, "f1": 2 * 1 / (5 + 4)})


@pytest.mark.parametrize("answers, expected", [([text(A), text(B)], 1), ([text(B), text(A)], 0), ([None, None], 0)])
def test_scores_at_their_ends(answers, expected):
    scores = detection_scores(answers, [det(A), det(B)])
    assert all(scores[name] == expected for name in ("reward", "precision", "recall", "f1", "box_precision@0.5"))


def test_box_precision_ignores_what_was_missed_and_f1_does_not():
    """Why the published figure is not called mAP here: one sure box of ten objects scores 1."""
    scores = detection_scores([text(A)], [det(A, B, C)])
    assert scores["box_precision@0.5"] == 1 and scores["precision"] == 1
    assert scores["recall"] == pytest.approx(1 / 3) and scores["f1"] == pytest.approx(1 / 2)


@pytest.mark.skipif("EO_DATA" not in os.environ, reason="EO_DATA does not name the folder of real samples")
def test_box_precision_is_that_of_the_published_script():
    """EarthDial's released answers, scored by its released script with upright envelopes in place of turned polygons.

    Its parser knows no minus sign and so drops references that begin left of the image; here they are dropped alike.
    What is left to differ (0.03) are predictions without area, which earn nothing here.
    """
    rows = map(json.loads, (Path(os.environ["EO_DATA"]) / "earthdial_results/rs_detection_results_GeoChat.jsonl").open())
    answers, samples = [], []
    for row in rows:
        lists = re.findall(r"\[\s*(\d+(?:,\s*\d+)*)\s*\]", row["gt_bbox"])
        samples.append(det(*(tuple(map(int, numbers.split(","))) for numbers in lists), size_group=row["size_group"]))
        answers.append(row["answer"])
    scores = detection_scores(answers, samples)
    names = ("small", "medium", "large", "single", "multiple")
    percent = [100 * scores[f"box_precision@0.5_{name}"] for name in names]
    assert percent == pytest.approx([15.48, 35.72, 43.82, 40.22, 15.33], abs=.05)


def test_classification_accuracy_is_the_share_of_right_labels():
    samples = [cls("river"), cls("lake"), cls("river"), cls("forest")]
    assert classification_scores(["River", "sea", None, "Forest."], samples) == {"accuracy": .5}


# ----------------------------------------------------------------------------------------------------------------------
# Hostile text

LONG = 100_000
HOSTILE = {
    "open": "[" * LONG, "closed": "]" * LONG, "pairs": "[]" * (LONG // 2), "nested": "[" * (LONG // 2) + "]" * (LONG // 2),
    "commas": "[" + "," * LONG + "]", "digits": "[" + "9" * LONG + "]", "long numbers": f"[{'9' * LONG},1,2,3]",
    "decimals": f"[0.{'1' * LONG},1,2,3]", "blanks in a box": f"[1{' ' * LONG},2,3,4]", "signs": "[" + "+-" * (LONG // 2) + "]",
    "unicode digits": f"[{'٣' * (LONG // 2)},١,٢,٣]", "boxes": "[1,2,3,4]" * 10_000, "good boxes": text(A) * 1000,
    "open boxes": "[1,2,3,4" * 10_000, "turned": "[1,2,3,4,999999]" * 900,
    "blanks": " " * LONG, "newlines": "\n" * LONG, "nul": "\0" * LONG, "surrogates": "\ud800" * LONG, "emoji": "🛰" * LONG,
    "<": "<" * LONG, "<think": "<think" * (LONG // 6), "<think>": "<think>" * (LONG // 7), "</think>": "</think>" * (LONG // 8),
    "<answer>": "<answer>" * (LONG // 8), "</answer>": "</answer>" * (LONG // 9),
    "tag pairs": "<think></think><answer></answer>" * (LONG // 32),
    "nested tags": "<answer>" * 5000 + text(A) + "</answer>" * 5000,
    "dots": "none" + "." * LONG, "underscores": "_" * LONG, "word": "a" * LONG, "nan": "[nan,nan,nan,nan]" * 1000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_paid_within_bounds(name):
    """Raw, as the reasoning and as the answer: nothing raises, nothing hangs, nothing leaves [0, 1]."""
    for written in (HOSTILE[name], completion(HOSTILE[name]), completion(text(A), think=HOSTILE[name])):
        for sample in (det(A, B), det(), cls("sea")):
            parts = reward_parts(written, sample)
            assert set(parts) == {"format", "accuracy"} and all(0 <= v <= 1 for v in parts.values())
    answers = [HOSTILE[name], extract_answer(completion(HOSTILE[name]))]
    assert all(0 <= v <= 1 for v in detection_scores(answers, [det(A), det(B, C)]).values())


TOKENS = ["<think>", "</think>", "<answer>", "</answer>", "[", "]", ",", " ", "\n", ".", "-", "none", "10", "50", "7.5", "999999",
          "ship", text(A), text(B), "[10,10,50", "{", '"bbox_2d": ', "nan"]


@pytest.mark.parametrize("seed", range(4))
def test_any_soup_of_tokens_is_paid_alike_twice_and_within_bounds(seed):
    rng = random.Random(seed)
    for _ in range(1000):
        soup = "".join(rng.choices(TOKENS, k=rng.randrange(20)))
        sample = rng.choice([det(), det(A), det(A, B, C), cls("ship")])
        for written in (soup, completion(soup)):
            parts = reward_parts(written, sample)
            assert all(math.isfinite(v) and 0 <= v <= 1 for v in parts.values())
            assert parts == reward_parts(written, sample)


@pytest.mark.parametrize("seed", range(4))
def test_reference_itself_earns_everything_and_nothing_earns_more(seed):
    rng = random.Random(seed)
    for _ in range(100):
        boxes = [(x := rng.randrange(400), y := rng.randrange(400), x + rng.randrange(1, 99), y + rng.randrange(1, 99), 0)
                 for _ in range(rng.randrange(6))]
        assert detection_reward(text(*boxes), det(*boxes)) == pytest.approx(1)
        assert detection_reward(text(*boxes), det(*boxes)) <= 1
