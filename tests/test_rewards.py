"""Rewards read what a policy under optimisation wrote: each test names a way to be right, wrong or to cheat."""

import contextlib
import io
import itertools
import json
import math
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from boxes import (
    average_precision,
    iou_matrix,
    matched_ious,
    obb_to_hbb,
    oriented_iou_matrix,
    parse_boxes,
)
from metrics.reward_choices import (
    BOX_REWARDS,
    TEXT_REWARDS,
    any_overlap_reward,
    box_recall_reward,
    label_recall_reward,
    parse_rewards,
)
from metrics.reward_models import load_reward_models
from rewards import (
    TASKS,
    count_penalised_ap_reward,
    count_reward,
    detection_reward,
    exact_match_reward,
    extract_answer,
    format_reward,
    geo_reward,
    grounding_reward,
    hybrid_reward,
    iou_reward,
    jaccard_reward,
    label_overlap_reward,
    length_reward,
    levenshtein_reward,
    mask_reward,
    multiple_choice_reward,
    repetition_penalty,
    score_completion,
)
from runtime.errors import UserError
from sample import BOX_TASKS, Sample, to_oriented
from texts import (
    great_circle_km,
    lcs_length,
    lexical_similarity,
    parse_coordinates,
    parse_count,
    parse_labels,
)

A, B, C = (10, 10, 50, 50, 0), (60, 60, 100, 90, 0), (0, 70, 30, 110, 0)  # three boxes that do not touch
quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)
box = st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 40)] * 2).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


def sample(task, gt_answer="", gt_boxes=(), gt_texts=(), choices=(), gt_mask=None, image_size=512):
    return Sample("a", task, (), "", gt_answer, image_size, gt_boxes, gt_texts=gt_texts, choices=choices, gt_mask=gt_mask)


def det(*boxes):
    return sample("det", text(*boxes), boxes)


def cls(label):
    return sample("cls", label)


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
    assert format_reward(good, sample("cls", "b")) == 1


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
    assert format_reward(bad, sample("cls", "b")) == 0


@pytest.mark.parametrize("text, reward", [
    ("<answer>b</answer>", 1), (" <answer>\nb </answer>\n", 1), ("<answer> </answer>", 0), ("b", 0), ("<answer>b</answer>.", 0),
    ("<think>a</think><answer>b</answer>", 0), ("<answer>b</answer><answer>b</answer>", 0), ("<answer><think>b</answer>", 0),
    ("a <answer>b</answer>", 0), ("</answer>b<answer>", 0)])
def test_format_without_reasoning_is_one_answer_and_nothing_else(text, reward):
    assert format_reward(text, replace(sample("cls", "b"), thinking=False)) == reward


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
    ("<think><answer>b</answer></think>", None),                       # text inside the reasoning is no answer
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
    assert obb_to_hbb((0, 0, 2, 2, 45)) == pytest.approx((1 - 2**.5, 1 - 2**.5, 1 + 2**.5, 1 + 2**.5))
    assert obb_to_hbb((0, 0, 4, 2, 30)) == pytest.approx(obb_to_hbb((0, 0, 4, 2, -30)))  # either sense of rotation
    assert obb_to_hbb((1, 2, 3, 4)) == obb_to_hbb((1, 2, 3, 4, 0)) == (1, 2, 3, 4)


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


def corners_of(x1, y1, x2, y2, theta):
    """The corners of an oriented box as complex numbers, y down: a turn by theta is a product with e^(i theta)."""
    center = complex(x1 + x2, y1 + y2) / 2
    turn = complex(math.cos(math.radians(theta)), math.sin(math.radians(theta)))
    return [center + turn * (complex(*corner) - center) for corner in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))]


def area_of(polygon):
    return sum((p.conjugate() * q).imag for p, q in zip(polygon, polygon[1:] + polygon[:1])) / 2  # shoelace


def overlap_of(polygon, clip):
    """The polygon within the convex polygon `clip` (Sutherland and Hodgman 1974)."""
    for a, b in zip(clip, clip[1:] + clip[:1]):
        side = [((b - a).conjugate() * (p - a)).imag for p in polygon]  # 0 or more: inside
        kept = []
        for p, q, s, t in zip(polygon, polygon[1:] + polygon[:1], side, side[1:] + side[:1]):
            if s >= 0:
                kept.append(p)
            if s * t < 0:
                kept.append(p + (q - p) * s / (s - t))
        polygon = kept
    return polygon


def test_oriented_iou_is_that_of_clipped_polygons():
    rng = np.random.default_rng(0)
    corner, size, theta = rng.uniform(0, 40, (80, 2)), rng.uniform(2, 60, (80, 2)), rng.uniform(-400, 400, (80, 1))
    theta[::4] = 90 * rng.integers(-3, 4, (20, 1))
    boxes = np.hstack([corner, corner + size, theta])
    polygons = [corners_of(*box) for box in boxes.tolist()]
    shared = np.array([[area_of(overlap_of(p, q)) for q in polygons] for p in polygons])
    found = oriented_iou_matrix(boxes, boxes)
    np.testing.assert_allclose(found, shared / (size.prod(1)[:, None] + size.prod(1) - shared), atol=1e-9)
    assert ((found > 0) & (found < 1)).mean() > .5
    boxes[:, 4] = 0
    np.testing.assert_allclose(oriented_iou_matrix(boxes, boxes), iou_matrix(boxes[:, :4], boxes[:, :4]), atol=1e-9)


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
    """An extra box cannot raise the reward once there are as many boxes as objects, wherever it is."""
    rng = random.Random(n)
    spray = [(x := rng.randrange(80), y := rng.randrange(80), x + rng.randrange(1, 40), y + rng.randrange(1, 40))
             for _ in range(n)]
    assert detection_reward(text(A, B, *spray), det(A, B)) == pytest.approx(2 / (2 + n))


def test_prose_is_not_nothing_found():
    assert detection_reward("I see no ship.", det()) == 0
    assert detection_reward("I see a ship.", det(A)) == 0


def test_turned_reference_counts_as_its_envelope():
    turned = (0, 10, 20, 20, 90)                                       # its envelope: 10 wide, 20 high
    assert detection_reward("[5,5,15,25]", det(turned)) == pytest.approx(1)
    assert detection_reward("[0,10,20,20,90]", det(turned)) == pytest.approx(1)
    assert detection_reward("[0,10,20,20]", det(turned)) == pytest.approx(100 / 300)


@pytest.mark.parametrize("answer, target, reward", [
    ("[0,10,20,20,30]", (0, 10, 20, 20, 30), 1),
    ("[5,5,15,25,120]", (0, 10, 20, 20, 30), 1),                       # sides swapped and a quarter turn: the same rectangle
    ("[0,10,20,20,210]", (0, 10, 20, 20, 30), 1),
    ("[0,0,20,20]", (0, 0, 20, 20, 45), 1 / 2**.5),                    # four numbers are a horizontal box: they share an octagon
    ("[0,0,20,20,0]", (0, 0, 20, 20, 45), 1 / 2**.5),
    ("[-5,-5,25,25,0]", (0, 0, 20, 20, 45), 400 / 900),                # around it: an envelope is twice its square
    ("[0,40,100,60,90]", (40, 0, 60, 100, 0), 1),
    ("[0,40,100,60,0]", (0, 40, 100, 60, 90), 400 / 3600),
    ("[0,10,20,20,30],[60,60,80,80,0]", (0, 10, 20, 20, 30), 1 / 2),   # an extra box costs what it costs without theta
    ("[0,10,20,20,30],[1,2,3]", (0, 10, 20, 20, 30), 1 / 2),
    ("none", (0, 10, 20, 20, 30), 0), ("a ship", (0, 10, 20, 20, 30), 0),
    ("[-10,-5,10,5,90]", (-10, -5, 10, 5, 90), 1),                     # not clipped: the target is as it is written
])
def test_oriented_answers_are_rewarded_by_oriented_iou(answer, target, reward):
    assert detection_reward(answer, to_oriented(det(target))) == pytest.approx(reward)


def test_theta_turns_clockwise():
    """A flat box that is turned by 45 degrees has its right end at the bottom: y points down."""
    bottom_right = "[70,70,90,90]"
    assert detection_reward(bottom_right, to_oriented(det((0, 45, 100, 55, 45)))) > 0
    assert detection_reward(bottom_right, to_oriented(det((0, 45, 100, 55, -45)))) == 0


def test_no_target_and_none_is_right_in_the_oriented_form_too():
    assert detection_reward("none", to_oriented(det())) == detection_reward("[]", to_oriented(det())) == 1
    assert detection_reward("[1,2,3,4,5]", to_oriented(det())) == 0


def test_oriented_reward_without_shapely_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "shapely", None)
    with pytest.raises(UserError, match="pip install shapely$"):
        detection_reward(text(A), to_oriented(det(A)))
    assert detection_reward(text(A), det(A)) == 1


def test_parts_are_paid_apart():
    assert score_completion(completion(text(A)), det(A)) == {"format": 1, "accuracy": 1}
    assert score_completion(completion(text(B)), det(A)) == {"format": 1, "accuracy": 0}
    assert score_completion(f"<answer>{text(A)}</answer>", det(A)) == {"format": 0, "accuracy": 1}
    assert score_completion("", det()) == {"format": 0, "accuracy": 0}
    assert score_completion(completion("Sea Lake"), cls("sea_lake")) == {"format": 1, "accuracy": 1}


def test_right_boxes_in_the_reasoning_earn_nothing():
    assert score_completion(completion("none", think=text(A)), det(A)) == {"format": 1, "accuracy": 0}
    assert score_completion(f"<think><answer>{text(A)}</answer></think>", det(A)) == {"format": 0, "accuracy": 0}


# ----------------------------------------------------------------------------------------------------------------------
# Classification reward

@pytest.mark.parametrize("answer", ["sea lake", "Sea Lake", "SeaLake", "sea_lake.", " sea-lake \n", "SEA LAKE."])
def test_label_may_be_written_in_any_case_and_spacing(answer):
    assert exact_match_reward(answer, cls("SeaLake")) == 1


@pytest.mark.parametrize("answer", [
    "river", "sea", "lake", "sea lake, river", "sea lake or river", "sea lake sea lake", "it is a sea lake", "not sea lake", "",
    "annual crop, forest, highway, industrial, pasture, residential, river, sea lake",  # naming all would have a recall of 1
])
def test_anything_but_the_one_label_is_wrong(answer):
    assert exact_match_reward(answer, cls("SeaLake")) == 0


# ----------------------------------------------------------------------------------------------------------------------
# The other rewards, by hand. BIGEARTHNET: its 19 labels, some with commas

BIGEARTHNET = (
    "Urban fabric", "Industrial or commercial units", "Arable land", "Permanent crops", "Pastures",
    "Complex cultivation patterns", "Agro-forestry areas", "Broad-leaved forest", "Coniferous forest", "Mixed forest",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Natural grassland and sparsely vegetated areas", "Moors, heathland and sclerophyllous vegetation",
    "Transitional woodland, shrub", "Beaches, dunes, sands", "Inland wetlands", "Coastal wetlands", "Inland waters",
    "Marine waters")
LAND = "Land principally occupied by agriculture, with significant areas of natural vegetation"


@pytest.mark.parametrize("answer, reward", [
    (f"{LAND}, Pastures, Mixed forest", 1),
    (f"mixed forest; pastures.\n{LAND.upper()}", 1),                   # any order, case and separator
    (f"{LAND.replace(',', '')}, Pastures, mixed_forest", 2 / 3),       # without its comma it is another label
    (f"{LAND} and Pastures and Mixed forest", 1),
    (f"{LAND}, Pastures", 2 / 3),                                      # one is missing
    (f"{LAND}, Pastures, Mixed forest, Inland waters", 3 / 4),         # one too many
    (f"{LAND}, Pastures, Mixed forest, Jungle, Lava", 3 / 5),          # what no vocabulary knows is too many as well
    ("Pastures, Pastures, Pastures", 1 / 3),                           # said again is said once
    (", ".join(BIGEARTHNET), 3 / 19),                                  # plain recall would be 1
    ("Coniferous forest, Marine waters", 0), ("forest", 0), ("none", 0), ("", 0), (", , and ,", 0),
])
def test_labels_by_hand(answer, reward):
    named = sample("mlc", f"Mixed forest, {LAND}, Pastures", choices=BIGEARTHNET)
    assert label_overlap_reward(answer, named) == pytest.approx(reward)


@pytest.mark.parametrize("text, labels", [
    ("sea", {"sea"}), ("sea and ocean", {"seaandocean"}), ("Sea, Sea-and-Ocean", {"sea", "seaandocean"}),
    ("seaport", {"seaport"}), ("overseas", {"overseas"}), ("sea port", {"sea", "port"}),  # no label within another word
    ("sea and pastures", {"sea", "pastures"}), ("natural pastures", {"naturalpastures"}),
    ("SeaLake sea_lake Sea Lake", {"sealake"}), ("", set()), (".,;", set()),
])
def test_longest_label_made_of_whole_words_is_read(text, labels):
    assert parse_labels(text, ("sea", "sea and ocean", "pastures", "natural pastures", "Sea Lake")) == labels


def test_without_a_vocabulary_labels_stand_between_commas():
    assert parse_labels("Forest, SEA.", ()) == parse_labels("sea; forest", ()) == {"sea", "forest"}


def test_a_label_may_be_called_as_what_separates_labels():
    """A target `and` once earned 0: no label was left of it."""
    named = sample("mlc", "and", choices=("and", "sea"))
    assert label_overlap_reward("and", named) == 1 and label_overlap_reward("sea", named) == 0


some_labels = st.sets(st.sampled_from(BIGEARTHNET), min_size=1)


@quick
@given(some_labels, some_labels, st.sampled_from([", ", ",", "; ", ",\n", " and "]))
def test_any_list_of_labels_is_read_back_and_a_wrong_one_never_pays(right, labels, separator):
    truth = sample("mlc", ", ".join(right), choices=BIGEARTHNET)
    paid = label_overlap_reward(separator.join(labels), truth)
    assert paid == pytest.approx(len(right & labels) / max(len(right), len(labels)))
    for wrong in {*BIGEARTHNET, "Jungle"} - right:
        assert label_overlap_reward(separator.join([*labels, wrong]), truth) <= paid


@pytest.mark.parametrize("answer, reward", [
    ("1 red ship at the top", 1), ("1 Red ship, at the TOP.", 1),
    ("1 red ship", 2 / 3),                                             # both ROUGE-1 and ROUGE-L are 2 * 3 / (3 + 6)
    ("ship red 1", (2 / 3 + 2 / 9) / 2),                               # in the wrong order one word is common to both
    ("1 red ship at the top 1 red ship at the top", 2 * 6 / 18),       # said twice
    ("harbour", 0), ("...", 0),
])
def test_region_caption_by_hand(answer, reward):
    for task in ("rcap", "change"):
        assert hybrid_reward(answer, sample(task, "1 red ship at the top")) == pytest.approx(reward)


@pytest.mark.parametrize("cosine, reward", [
    (1.0, .5 + 1 / 3), (.4, .2 + 1 / 3), (0.0, 1 / 3), (-.7, 1 / 3), (1.0000002, .5 + 1 / 3)])
def test_half_of_a_caption_is_the_cosine_of_its_embedding_never_below_0(cosine, reward):
    scene = sample("rcap", "1 red ship at the top")
    assert hybrid_reward("1 red ship", scene, sbert=lambda a, b: cosine) == pytest.approx(reward)


def test_best_text_counts():
    """The best one as a whole: not the best cosine of one reference beside the best words of another."""
    captions = ("a b c d", "a b", "x")
    assert hybrid_reward("a b", sample("cap", "a b c d", gt_texts=captions)) == 1
    assert levenshtein_reward("a b", sample("cap", "a b c d", gt_texts=captions)) == 1
    assert grounding_reward("a b", sample("ground", "a b c d", gt_texts=captions)) == 1
    assert hybrid_reward("a b", sample("cap", gt_texts=captions), sbert=lambda a, b: float(b == "x")) == .5


@pytest.mark.parametrize("answer, reward", [
    ("a ship [10,10,50,50] and a tank [60,60,100,90]", 1),
    ("A tank [60,60,100,90] and a ship [10,10,50,50].", .5 + .5 * (1 + 3 / 5) / 2),  # boxes all right; "a and a" is in order
    ("a ship and a tank", .5), ("[10,10,50,50][60,60,100,90]", .5),    # half of it each
    ("a ship [10,10,50,50] and a tank", .5 * 1 / 2 + .5),              # a missing box
    ("a ship [10,10,50,50] and a tank [60,60,100,90] [1,1,9,9]", .5 * 2 / 3 + .5),  # an extra box
    ("<ref>a ship</ref> <box>[10,10,50,50]</box> and <p>a tank</p> [60,60,100,90]", 1),
    ("lava", 0), ("none", 0), ("[1,1,9,9]", 0), ("[", 0),
])
def test_grounding_by_hand(answer, reward):
    truth = sample("ground", f"a ship {text(A)} and a tank {text(B)}", (A, B))
    assert grounding_reward(answer, truth) == pytest.approx(reward)


@pytest.mark.parametrize("answer, reference, reward", [
    ("sitting", "kitten", 8 / 13),                                     # i, t, t, n in common: 2 * 4 / (7 + 6)
    ("Many  planes\nare PARKED .", "many planes are parked.", 1), ("abc", "xyz", 0), (".", "a", 0), ("ab" * 3, "ab", 2 * 2 / 8),
])
def test_caption_by_hand(answer, reference, reward):
    assert levenshtein_reward(answer, sample("cap", reference)) == pytest.approx(reward)


@pytest.mark.parametrize("answer, reward", [
    ("yes", 1), ("Yes.", 1), ("yes yes yes", 1), ("no", 0), ("", 0), ("?", 0), ("yes no", 1 / 2), ("yes, there is", 1 / 3)])
def test_short_answer_by_hand(answer, reward):
    assert jaccard_reward(answer, sample("vqa", "yes")) == pytest.approx(reward)


@pytest.mark.parametrize("answer, reward", [
    ('{"bbox_2d": [10, 10, 50, 50]}', 1), ('```json\n[\n  {"bbox_2d": [10, 10, 50, 50], "label": "ship"}\n]\n```', 1),
    (text(A), 1),
    ("[10,10,30,50]", .5), (text(B), 0), ("none", 0), ("None", 0), ("[]", 0), ("ship", 0), ("", 0), ("[50,50,10,10]", 0),
    (text(A, A), 0), (text(A, B), 0),                                  # the object is one
])
def test_referred_object_by_hand(answer, reward):
    assert iou_reward(answer, sample("rec", gt_boxes=(A,))) == pytest.approx(reward)


@pytest.mark.parametrize("answer, reference, reward", [
    ([A], [A], 1), ([A, B], [A, B], 1), ([B, A], [A, B], 1), ([], [], 1), ([], [A], 0), ([A], [], 0), ([C], [A], 0),
    ([A, C], [A], math.sqrt(1 / 2)),                                   # an extra box after the right one: AP alone is 1
    ([C, A], [A], math.sqrt(1 / 2) / 2),                               # before it: precision 1/2 as well
    ([A, A, A, A], [A], 1 / 2),
    ([A], [A, B], 51 / 101),                                           # recall 1/2: 51 of the 101 recalls are reached
    ([(10, 10, 30, 50)], [A], 1 / 10), ([(10, 10, 45, 50)], [A], 8 / 10),  # IoU 0.5 and 0.875: 1 and 8 of 10 thresholds
])
def test_detection_of_a_class_by_hand(answer, reference, reward):
    boxes = json.dumps([{"bbox_2d": list(box[:4]), "label": "ship"} for box in answer]) if answer else "None"
    for written in (boxes, f"```json\n{boxes}\n```" if answer else "[]"):
        assert count_penalised_ap_reward(written, sample("ovd", gt_boxes=tuple(reference))) == pytest.approx(reward)


@pytest.mark.parametrize("answer", ["", "ship", "none of them", "[10,10,50,50"])
def test_prose_is_no_detection(answer):
    assert count_penalised_ap_reward(answer, sample("ovd")) == count_penalised_ap_reward(answer, sample("ovd", gt_boxes=(A,))) == 0


@pytest.mark.parametrize("answer, letter", [
    ("B", "B"), ("B.", "B"), ("B)", "B"), ("(B)", "B"), ("b", "B"), ("(b).", "B"), ("**B**", "B"), ("Image B is right", "B"),
    ("The answer is B: a harbour", "B"), ("I think B", "B"), ("B, and B again", "B"), ("E or B", "B"),  # no choice is called E
    ("A", "A"), ("A is right", "A"),
    ("A or B", None), ("B/C", None), ("A, B, C, D", None), ("ABCD", None), ("a or b", None), ("BB", None),
    ("", None), ("E", None), ("e", None), ("Because", None), ("none", None), ("_B_", None), ("B2", None),
    ("A harbour is in B", None),                                       # article or hedge: only the model knows
    ("image b", None), ("a harbour", None),                            # within words only capitals are letters
])
def test_one_letter_is_read_and_two_are_refused(answer, letter):
    paid = {right: multiple_choice_reward(answer, sample("pair", right, choices=tuple("ABCD"))) for right in "ABCD"}
    assert paid == {right: float(right == letter) for right in "ABCD"}


# ----------------------------------------------------------------------------------------------------------------------
# Masks: an image of 20 x 20, the target 4 x 4 at (2, 2) unless a test says otherwise

def seg(*boxes, side=20):
    """The mask is the union of some boxes in an image of 20 pixels, given as an image of any side."""
    mask = np.zeros((20, 20), np.uint8)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = 1                                         # any value but 0 is the target
    return sample("seg", gt_mask=Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST), image_size=20)


def instance(*box, **points):
    return json.dumps({"bbox_2d": list(box), **points})


EYES = {"keypoint1": [3, 3], "keypoint2": [4, 5]}


@pytest.mark.parametrize("answer, reward", [
    (instance(2, 2, 6, 6, **EYES), 1), (f"[{instance(2, 2, 6, 6, **EYES)}]", 1), (f"```json\n[{instance(2, 2, 6, 6)}]\n```", 1),
    (instance(2, 2, 6, 6), 1), (instance(2, 2, 6, 6, keypoint1=[3]), 1),
    (instance(2, 2, 6, 6, keypoint1=EYES["keypoint2"], keypoint2=EYES["keypoint1"]), 1),  # points swapped
    (instance(2, 2, 4, 6), .5), (instance(0, 0, 20, 20), 16 / 400), (instance(-9, -9, 99, 99), 16 / 400),
    (instance(2, 2, 4, 6) + instance(4, 2, 6, 6), 1), (instance(2, 2, 6, 6) * 2, 1),  # the union of all instances
    (instance(2, 2, 6, 6) + instance(10, 10, 14, 14), 16 / 32),        # an extra one
    (instance(2, 2, 6, 6) + "{}", 1),
    (json.dumps(EYES), 0), (instance(6, 6, 2, 2, **EYES), 0), (instance(2, 2, 6), 0), (instance(30, 30, 40, 40), 0),  # no box
    (instance(10, 10, 14, 14), 0), ("None", 0), ("[]", 0), ("", 0), ("the ship", 0), ("[2, 2, 6, 6]", 0), ("{}", 0),
    ('{"bbox_2d": [2, 2, 6, 6]', 0),                                   # cut off
])
def test_without_sam_an_instance_is_its_box(answer, reward):
    for side in (20, 60):
        assert mask_reward(answer, seg((2, 2, 6, 6), side=side)) == pytest.approx(reward)


@pytest.mark.parametrize("answer, reward", [
    ("None", 1), ("none.", 1), ("[]", 1),
    ("", 0), ("nothing", 0), (instance(2, 2, 6, 6), 0), (instance(6, 6, 2, 2), 0), ("{}", 0)])
def test_no_target_has_to_be_said(answer, reward):
    """An instance without a mask is still an instance that was named."""
    assert mask_reward(answer, seg()) == reward


def test_mask_may_be_a_file(tmp_path):
    seg((2, 2, 6, 6), side=40).gt_mask.save(tmp_path / "mask.png")
    assert mask_reward(instance(2, 2, 4, 6), sample("seg", gt_mask=tmp_path / "mask.png", image_size=20)) == .5


def test_sam_sees_box_and_points_and_its_mask_is_clipped_to_the_box():
    calls = []

    def sam(sample, box, points):
        calls.append((box, points))
        return np.ones((20, 20), bool)                                 # spills over the whole image

    pretty = json.dumps([{"bbox_2d": [2, 2, 6, 6], **EYES}], indent=12)  # with many blanks between the numbers
    for answer in (instance(2, 2, 6, 6, **EYES), pretty):
        assert mask_reward(answer, seg((2, 2, 6, 6)), sam=sam) == 1
        assert calls.pop() == ((2, 2, 6, 6), [(3, 3), (4, 5)])
    for points, seen in (({}, []), ({"keypoint2": [4, 5]}, [(4, 5)]), ({"keypoint1": ["x", 1], "keypoint2": [3]}, [])):
        assert mask_reward(instance(2, 2, 6, 6, **points), seg((2, 2, 6, 6)), sam=sam) == 1  # points that are missing or none
        assert calls.pop() == ((2, 2, 6, 6), seen)
    for no_box in (json.dumps(EYES), instance(6, 6, 2, 2, **EYES), "None"):
        assert mask_reward(no_box, seg((2, 2, 6, 6)), sam=sam) == 0 and not calls  # SAM is not asked


def test_masks_of_several_instances_are_united():
    def sam(sample, box, points):
        return np.eye(20, dtype=bool)

    diagonal = sample("seg", gt_mask=Image.fromarray(np.eye(20, dtype=np.uint8)), image_size=20)
    assert mask_reward(instance(0, 0, 20, 20), diagonal, sam=sam) == 1
    assert mask_reward(instance(0, 0, 5, 5) + instance(10, 10, 20, 20), diagonal, sam=sam) == 15 / 20
    assert mask_reward(instance(0, 10, 10, 20), diagonal, sam=sam) == 0         # what SAM finds outside the box does not count


# ----------------------------------------------------------------------------------------------------------------------
# Counts and positions

@pytest.mark.parametrize("answer, count", [
    ("7", 7), ("There are 7 ships.", 7), ("7 ships, so 7", 7), ("0", 0), ("1,200", 1200), ("1,234,567", 1234567), ("007", 7),
    ("", None), ("seven", None), ("7 or 8", None), ("7-8", None), ("-7", None), ("7.5", None), ("1,2", None), ("[1,2,3]", None),
    ("1,2000", None), ("10,0000", None),
    ("9" * 10, None), ("9" * 9999, None), ("7" + " " * 10_000, None), ("٧", None), ("\u22127", None), (".7", None), ("No.7", 7), ("Total\u20137", 7)])
def test_a_count_is_one_whole_number(answer, count):
    assert parse_count(answer) == count
    assert (count_reward(answer, sample("count", "7")) > 0) == (count is not None and count > 0)


@quick
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_count_reward_is_one_minus_the_relative_error(a, g):
    reward = count_reward(str(a), sample("count", str(g)))
    assert reward == pytest.approx(1 if a == g else min(a, g) / max(a, g))  # 1 - (max - min) / max
    assert reward == count_reward(f"{g:,}", sample("count", str(a)))       # it has no direction
    assert count_reward(str(g), sample("count", str(g))) == 1
    if a < g:
        assert count_reward(str(a), sample("count", str(g))) < count_reward(str(a + 1), sample("count", str(g)))


@pytest.mark.parametrize("answer, position", [
    ("48.86, 2.35", (48.86, 2.35)), ("-33.9,151.2", (-33.9, 151.2)), ("(48.86, 2.35).", (48.86, 2.35)), ("0, 0", (0, 0)),
    ("33.9° S, 151.2° E", (-33.9, 151.2)), ("40.7N 74W", (40.7, -74)), ("Latitude: 48.86, longitude: 2.35", (48.86, 2.35)),
    ("-33.9 S, 7 W", (-33.9, -7)), ("90, -180", (90, -180)), ("33.9 south, 151.2 East", (-33.9, 151.2)), ("33.9s 7w", (-33.9, -7)),
    ("\u221233.9, \u20137", (-33.9, -7)), ("- 33.9, 151.2", None), ("-33.9, .5", None), ("33.9 - 151.2", None), ("48.86\u20132.35", (48.86, 2.35)),
    ("S33.9 E151.2", None), ("South 33.9, 151.2", None), ("33.9 degrees S, 151.2 E", None),
    ("", None), ("Paris", None), ("48.86", None), ("48.86, 2.35, 3", None), ("2.35 E, 48.86 N", None), ("48.86 E, 2.35", None),
    ("48.86 N, 2.35 N", None), ("48.86, 2.35 S", None),
    ("POINT (2.35 48.86)", None), ("Longitude: 2.35, Latitude: 48.86", None), ("lon 2.35 lat 48.86", None),
    ("Longitude: 2.35\nLatitude: 48.86", None), ("lat 48.86\nlon 2.35", (48.86, 2.35)),
    ("90.1, 0", None), ("0, 180.1", None), ("9" * 400 + ", 1", None), ("nan, nan", None), ("48°51'24\", 2°21'3\"", None)])
def test_a_position_is_two_numbers_on_earth(answer, position):
    assert parse_coordinates(answer) == position


degrees = st.tuples(st.floats(-90, 90), st.floats(-180, 180))


@quick
@given(degrees, degrees)
def test_great_circle_is_the_angle_of_two_vectors(a, b):
    """Another formula than haversine's: the angle between points of the unit sphere."""
    def point(position):
        lat, lon = np.radians(position)
        return np.array([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    angle = np.arctan2(np.linalg.norm(np.cross(point(a), point(b))), point(a) @ point(b))
    assert great_circle_km(a, b) == pytest.approx(6371.0088 * angle, abs=.5) == pytest.approx(great_circle_km(b, a), abs=1)


@pytest.mark.parametrize("a, b, km", [
    ((48.8566, 2.3522), (40.7128, -74.0060), 5837), ((90, 0), (-90, 77), 20015), ((0, 179.5), (0, -179.5), 111.2), ((5, 5), (5, 5), 0)])
def test_distances_by_hand(a, b, km):
    assert great_circle_km(a, b) == pytest.approx(km, rel=1e-3)


@pytest.mark.parametrize("km, reward", [
    (0, 1), (375, .75), (750, .5), (1625, .35), (2500, .2), (11_250, .1), (20_000, 0), (20_015, 0)])
def test_geo_reward_is_linear_between_the_distances_of_geo_r(km, reward):
    north = sample("geo", "90, 0")                                     # of the pole everything is south
    assert geo_reward(f"{90 - km / 111.19508:.6f}, 17", north) == pytest.approx(reward, abs=1e-4)


@quick
@given(st.floats(-90, 90), st.floats(-90, 90))
def test_geo_reward_falls_with_the_distance(a, b):
    near, far = sorted((a, b), reverse=True)
    paid = [geo_reward(f"{latitude:.6f}, 0", sample("geo", "90, 0")) for latitude in (near, far)]
    assert 0 <= paid[1] <= paid[0] <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Naive rewards, and other ones for a task

def test_naive_rewards_pay_for_what_nobody_wants():
    both = det(A, B)
    assert any_overlap_reward(text(A), both) == any_overlap_reward(text(A, A, A), both) == 1  # B is missed, A is thrice
    assert any_overlap_reward(text(A, C), both) == .5
    assert detection_reward(text(A), both) == .5 and detection_reward(text(A, A, A), both) == pytest.approx(1 / 3)
    grid = [(x, y, x + 40, y + 40, 0) for x in range(0, 80, 10) for y in range(0, 80, 10)]
    paid = [box_recall_reward(text(*grid[:n]), both) for n in (4, 16, 64)]
    assert paid == sorted(paid) and paid[-1] > .7 > 5 * detection_reward(text(*grid), both)   # boxes multiply
    labels = sample("mlc", "Pastures, Coastal wetlands", choices=BIGEARTHNET)
    everything = ", ".join(BIGEARTHNET)
    assert label_recall_reward(everything, labels) == 1 > 5 * label_overlap_reward(everything, labels)
    for reward in (any_overlap_reward, box_recall_reward):
        assert reward("none", det()) == 1 and reward("none", both) == reward(text(A), det()) == reward("?", both) == 0
        turned = to_oriented(sample("det", "", ((10, 10, 90, 30, 45),)))
        assert reward(turned.gt_answer, turned) == pytest.approx(1) and reward(text(A), turned) < .5


@quick
@given(st.lists(box, min_size=1, max_size=5), st.lists(box, min_size=1, max_size=5), box)
def test_no_further_box_lowers_box_recall_and_no_copy_changes_overlap(targets, predicted, more):
    truth = det(*targets)
    assert box_recall_reward(text(*predicted, more), truth) >= box_recall_reward(text(*predicted), truth) - 1e-12
    assert any_overlap_reward(text(*predicted * 2), truth) == pytest.approx(any_overlap_reward(text(*predicted), truth))


def test_a_task_can_take_another_reward():
    rewards = parse_rewards(["det=box_recall_reward", "mlc=label_recall_reward"], ["cls", "det", "mlc"])
    assert rewards == {"det": box_recall_reward, "mlc": label_recall_reward}
    doubled = completion(text(A, A))
    assert score_completion(doubled, det(A))["accuracy"] == .5
    assert score_completion(doubled, det(A), task_rewards=rewards) == {"format": 1, "accuracy": 1}
    assert score_completion(completion("port"), cls("port"), task_rewards=rewards)["accuracy"] == 1  # its own
    assert score_completion("", det(A), task_rewards=rewards)["accuracy"] == 0
    assert load_reward_models(["det"], None, None, ["det=iou_reward"])["task_rewards"] == {"det": iou_reward}


@pytest.mark.parametrize("value, says", [
    ("det=mask_reward", "no reward of det has this name; choose from detection_reward, .*any_overlap_reward"),
    ("cls=detection_reward", "choose from exact_match_reward, "), ("det", "no reward of det"),
    ("seg=mask_reward", "with a task of --task, cls, det"), ("mask_reward", "expected TASK=FUNCTION")])
def test_unknown_reward_lists_the_choices(value, says):
    with pytest.raises(UserError, match=says):
        parse_rewards([value], ["cls", "det"])


def test_the_reward_that_a_flag_names_needs_its_own_model(capsys):
    load_reward_models(["rcap", "cls"], None, None, ["rcap=jaccard_reward", "cls=hybrid_reward"])
    assert capsys.readouterr().err.startswith("cls: no --sbert")


# ----------------------------------------------------------------------------------------------------------------------
# Further terms of pair

@pytest.mark.parametrize("used, right, wrong", [(0, 1, 0), (.5, .75, -.25), (1, .5, -.5), (2, .5, -.5), (-1, 1, 0),
                                                (1 / 3, .875, -.125)])  # cos 60 degrees is a half
def test_length_reward_by_hand(used, right, wrong):
    """Beyond the longest completion nothing comes back: the cosine of the released code rises again."""
    assert length_reward({"accuracy": 1}, used) == pytest.approx(right)
    assert length_reward({"accuracy": 0.5}, used) == pytest.approx(wrong)
    pair = sample("pair", "B", choices=tuple("ABCD"))
    assert score_completion(completion("B"), pair, used)["length"] == pytest.approx(right)
    for missed in (completion("C"), completion("A or B"), completion("C", think="B"), "B", ""):
        assert score_completion(missed, pair, used)["length"] == pytest.approx(wrong)


@pytest.mark.parametrize("written, penalty", [
    ("", 0), ("a b c d e", 0), ("a b c d e f", 0), ("a b c d e f g", 0),
    ("a " * 8, 1 / 3 - 1),                                             # 3 six-grams, all the same
    ("a b c d e f A B C D E F", 6 / 7 - 1),                            # 7, the last as the first; case does not matter
    ("a " * 1005, 1 / 1000 - 1),
])
def test_repetition_by_hand(written, penalty):
    assert repetition_penalty(written) == pytest.approx(penalty)


def test_only_pair_has_further_terms_and_in_training_alone():
    for task in RIGHT:
        assert set(score_completion("", RIGHT[task][0])) == {"format", "accuracy"}
        more = {"length", "repetition"} if task == "pair" else set()
        assert set(score_completion("", RIGHT[task][0], 0.0)) == {"format", "accuracy"} | more


# ----------------------------------------------------------------------------------------------------------------------
# Every task: (sample, its right answer, a wrong one)

SHIP = json.dumps({"bbox_2d": list(A[:4])})
RIGHT = {
    "cls": (cls("SeaLake"), "sea lake", "river"),
    "mlc": (sample("mlc", f"Pastures, {LAND}", choices=BIGEARTHNET), f"{LAND}, Pastures", "Urban fabric"),
    "det": (det(A, B), text(A, B), text(C)),
    "rcap": (sample("rcap", "1 red ship"), "1 red ship", "two tanks"),
    "ground": (sample("ground", f"a ship {text(A)}", (A,)), f"a ship {text(A)}", f"two tanks {text(B)}"),
    "cap": (sample("cap", "many planes", gt_texts=("few cars", "many planes")), "few cars", "x"),
    "change": (sample("change", "a house has appeared"), "a house has appeared", "no change"),
    "vqa": (sample("vqa", "yes"), "yes", "no"),
    "rec": (sample("rec", gt_boxes=(A,)), SHIP, text(B)),
    "ovd": (sample("ovd", gt_boxes=(A,)), f"[{SHIP}]", "None"),
    "seg": (seg((10, 10, 20, 20)), SHIP, "None"),
    "pair": (sample("pair", "B", choices=tuple("ABCD")), "B", "C"),
    "count": (sample("count", "7"), "7", "none"),
    "geo": (sample("geo", "48.86, 2.35"), "48.86, 2.35", "Paris"),
}
RIGHT["seg"][0].gt_mask.paste(255, (10, 10, 20, 20))
tasks = pytest.mark.parametrize("task", RIGHT)


def test_every_task_has_a_right_and_a_wrong_answer_here():
    assert not TASKS.keys() - RIGHT.keys(), "add them to RIGHT: the tests below then hold for the new task too"


@tasks
def test_only_the_right_answer_in_its_place_earns_1(task):
    sample, right, wrong = RIGHT[task]
    def accuracy(written):
        return score_completion(written, sample)["accuracy"]
    assert accuracy(completion(right)) == accuracy(f"<answer>{right}</answer>") == pytest.approx(1)
    assert accuracy(completion(right + "\n")) == accuracy(completion(f"  {right}")) == pytest.approx(1)
    for missed in (wrong, "", " ", "?"):
        assert accuracy(completion(missed, think=right)) == 0          # in the reasoning it is no answer
    for cheat in (right, f"<think>{right}</think>", f"<think><answer>{right}</answer></think>",
                f"<think>{right}<answer>{wrong}</answer>", completion(f"<answer>{right}</answer>"),
                completion(right) * 2, completion(wrong) + completion(right)):
        assert accuracy(cheat) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Properties, against independent versions where there is one

prose = st.text(max_size=60) | st.text("ab c_-.1A\n", max_size=40)
TOKENS = ["<think>", "</think>", "<answer>", "</answer>", "[", "]", "{", "}", ",", " ", "\n", ".", "-", '"', "none", "10", "7.5",
          "999999", "nan", "ship", "A", "b", "a", "yes", "Pastures", text(A), text(B), "[10,10,50", '"bbox_2d": ',
          '"keypoint1": [1, 2]', SHIP]
soup = st.lists(st.sampled_from(TOKENS), max_size=20).map("".join)


@tasks
@quick
@given(soup | prose)
def test_any_text_is_paid_alike_twice_and_within_bounds(task, written):
    truth = RIGHT[task][0]
    for given_text in (written, completion(written), completion(RIGHT[task][1], think=written)):
        parts = score_completion(given_text, truth, .3)
        assert parts == score_completion(given_text, truth, .3)
        assert all(math.isfinite(v) and -1 <= v <= 1 for v in parts.values())
        assert 0 <= parts["format"] <= 1 and 0 <= parts["accuracy"] <= 1
    for reward in (TASKS[task].reward, *TEXT_REWARDS, *(BOX_REWARDS if task in BOX_TASKS else ())):
        assert 0 <= reward(written, truth) <= 1 and isinstance(reward(written, truth), float)


@quick
@given(prose, prose)
def test_likeness_of_two_texts_has_no_direction_and_is_1_with_itself(a, b):
    for reward, task in ((jaccard_reward, "vqa"), (levenshtein_reward, "cap")):
        assert reward(a, sample(task, b)) == reward(b, sample(task, a))
    assert lexical_similarity(a, b) == pytest.approx(lexical_similarity(b, a))
    assert lexical_similarity(a, a) == jaccard_reward(a, sample("vqa", a)) == float(any(c.isalnum() for c in a))


@quick
@given(st.lists(box), st.lists(box))
def test_iou_has_no_direction_and_is_1_with_itself(a, b):
    a, b = (np.array(boxes, float).reshape(-1, 4) for boxes in (a, b))
    np.testing.assert_array_equal(iou_matrix(a, b), iou_matrix(b, a).T)
    assert (np.diag(iou_matrix(a, a)) == 1).all() and (iou_matrix(a, b) <= 1).all()


@quick
@given(st.text("abc", max_size=30), st.text("abcd", max_size=30))
def test_common_subsequence_is_that_of_the_plain_table(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
    assert lcs_length(a, b) == table[-1, -1]


@quick
@given(st.text(st.characters(codec="ascii"), max_size=60), st.text(st.characters(codec="ascii"), max_size=60))
def test_lexical_similarity_is_the_mean_of_two_rouges(a, b):
    rouge = pytest.importorskip("rouge_score.rouge_scorer", reason="needs the package rouge-score")
    for one, two in ((a, b), (a, a + " " + b)):
        scores = rouge.RougeScorer(["rouge1", "rougeL"], use_stemmer=False).score(one, two)
        assert lexical_similarity(two, one) == pytest.approx((scores["rouge1"].fmeasure + scores["rougeL"].fmeasure) / 2)


@quick
@given(st.text("abc 1\u0301é", max_size=60), st.text("abc 1\u0301é", max_size=60))
def test_levenshtein_reward_is_the_ratio_of_the_package(a, b):
    indel = pytest.importorskip("rapidfuzz.distance", reason="needs the package rapidfuzz").Indel
    def plain(text):
        return " ".join(text.split())
    if plain(a) or plain(b):                                           # of two empty texts the package says 1
        assert levenshtein_reward(a, sample("cap", b)) == pytest.approx(indel.normalized_similarity(plain(a), plain(b)))


def coco_ap(predicted, reference):
    """pycocotools' AP of one image and one class, all predictions with score 1."""
    coco = pytest.importorskip("pycocotools.coco", reason="needs the package pycocotools")
    from pycocotools.cocoeval import COCOeval
    def entry(b):
        return {"image_id": 1, "category_id": 1, "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {"info": {}, "images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [
            {**entry(b), "id": i, "iscrowd": 0, "area": (b[2] - b[0]) * (b[3] - b[1])} for i, b in enumerate(reference, 1)]}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([{**entry(b), "score": 1.0} for b in predicted]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


@pytest.mark.parametrize("side", [4, 8, 20, 60])
@pytest.mark.parametrize("n", [1, 3, 10, 120])
def test_average_precision_is_that_of_pycocotools(side, n):
    """On a small grid many boxes are equal, so ties of equal overlaps are broken in the same way."""
    rng = np.random.default_rng([side, n])
    for _ in range(10):
        p, r = (np.cumsum(rng.integers([0, 1], [side // 2 + 1, side], (k, 2, 2)), 2).transpose(0, 2, 1).reshape(-1, 4)
                for k in (n, rng.integers(1, 12)))                     # corner and size, on either axis
        right = rng.integers(n + 1)
        p[:right] = r[rng.integers(len(r), size=right)]
        p = rng.permutation(p)
        assert average_precision(p.astype(float), r.astype(float)) == pytest.approx(coco_ap(p.tolist(), r.tolist()))


@pytest.mark.parametrize("predicted, reference, at_60", [
    ([(1, 0, 5, 4), (0, 0, 4, 4)], [(0, 0, 4, 4), (2, 0, 6, 4)], 1),   # the first overlaps both by 0.6 and takes the last
    ([(1, 0, 5, 4), (0, 0, 4, 4)], [(2, 0, 6, 4), (0, 0, 4, 4)], 51 / 101),
])
def test_equal_overlaps_go_to_the_last_reference_as_in_pycocotools(predicted, reference, at_60):
    above_60 = 51 / 101 / 2                                            # a miss, then one of two
    assert coco_ap(predicted, reference) == pytest.approx((3 * at_60 + 7 * above_60) / 10)
    ours = average_precision(*(np.array(boxes, float) for boxes in (predicted, reference)))
    assert ours == pytest.approx(coco_ap(predicted, reference))


def test_only_the_first_hundred_boxes_count():
    wrong, right, reference = [(0, 0, 1, 1)], [(5, 5, 9, 9)], np.array([[5, 5, 9, 9.0]])
    for boxes, ap in ((wrong * 99 + right, 1 / 100), (wrong * 100 + right, 0)):
        assert average_precision(np.array(boxes, float), reference) == pytest.approx(ap) == coco_ap(boxes, reference.tolist())


@quick
@given(st.lists(box, max_size=5), st.lists(box, max_size=6), st.data())
def test_a_wrong_box_never_pays(reference, predicted, data):
    """Wherever it is: for detection, for COCO's AP and for the one box."""
    wrong = data.draw(st.sampled_from([(200, 200, 300, 250), (5, 5, 1, 1), (101, 0, 102, 3)]))
    more = predicted.copy()
    more.insert(data.draw(st.integers(0, len(predicted))), wrong)
    truth = sample("det", gt_boxes=tuple(reference))
    for reward in (detection_reward, count_penalised_ap_reward, iou_reward):
        assert reward(text(*more), truth) <= reward(text(*predicted), truth) + 1e-12


@quick
@given(box, box, st.floats(0, 1), st.floats(0, 1))
def test_moving_a_box_towards_its_reference_never_lowers_the_reward(reference, start, a, b):
    far, near = ([f"{v:.6f}" for v in np.add(start, t * np.subtract(reference, start))] for t in sorted((a, b)))
    other = (200, 200, 300, 300)
    for boxes, rest in itertools.product(((reference,), (reference, other)), ((), (other,))):
        truth = sample("det", gt_boxes=boxes)
        for reward in (detection_reward, count_penalised_ap_reward, iou_reward):
            assert reward(text(*rest, far), truth) <= reward(text(*rest, near), truth) + 1e-9


@quick
@given(st.lists(box, max_size=6), st.randoms())
def test_reference_itself_earns_everything_in_any_order_and_nothing_earns_more(boxes, rng):
    shuffled = rng.sample(boxes, len(boxes))
    for reward in (detection_reward, count_penalised_ap_reward):
        assert reward(text(*shuffled), sample("det", gt_boxes=tuple(boxes))) == pytest.approx(1)
        assert reward(text(*shuffled), sample("det", gt_boxes=tuple(boxes))) <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Hostile text: floods of 100 kB, and bait for every regular expression. That it is quick is measured by hand

LONG = 100_000
HOSTILE = {
    "open": "[" * LONG, "closed": "]" * LONG, "pairs": "[]" * (LONG // 2), "nested": "[" * (LONG // 2) + "]" * (LONG // 2),
    "commas": "[" + "," * LONG + "]", "digits": "[" + "9" * LONG + "]", "long numbers": f"[{'9' * LONG},1,2,3]",
    "decimals": f"[0.{'1' * LONG},1,2,3]", "blanks in a box": f"[1{' ' * LONG},2,3,4]", "signs": "[" + "+-" * (LONG // 2) + "]",
    "unicode digits": f"[{'٣' * (LONG // 2)},١,٢,٣]", "boxes": "[1,2,3,4]," * 10_000, "good boxes": text(A) * 1000,
    "open boxes": "[1,2,3,4" * 10_000, "turned": "[1,2,3,4,999999]" * 900,
    "just short enough": ("[" + 4 * (" " * 47 + "1,") + "]") * 500, "nan": "[nan,nan,nan,nan]" * 1000,
    "braces": "{" * LONG, "brace pairs": "{}" * (LONG // 2), "nested braces": "{" * (LONG // 2) + "}" * (LONG // 2),
    "instances": instance(1, 2, 99, 99, **EYES) * 1000, "keys": "{" + '"bbox_2d": [' * (LONG // 12) + "}",
    "same key": "{" + '"bbox_2d": [1,2,3,4], ' * (LONG // 22) + "}",
    "blanks after a key": '{"bbox_2d"' + " " * LONG + ": [1,2,3,4]}",
    "blanks in a point": '{"bbox_2d": [1,2,9,9], "keypoint1": [' + " " * LONG + "]}",
    "blanks": " " * LONG, "newlines": "\n" * LONG, "nul": "\0" * LONG, "surrogates": "\ud800" * LONG, "emoji": "🛰" * LONG,
    "marks": "e" + "\u0301" * LONG, "growing": "İ" * LONG, "growing, short": "İ" * 10_000, "sharp": "ß" * LONG,  # lower: i + mark
    "<": "<" * LONG, "<think": "<think" * (LONG // 6), "<think>": "<think>" * (LONG // 7), "</think>": "</think>" * (LONG // 8),
    "<answer>": "<answer>" * (LONG // 8), "</answer>": "</answer>" * (LONG // 9), "<ref>": "<ref>" * (LONG // 5),
    "tag pairs": "<think></think><answer></answer>" * (LONG // 32),
    "nested tags": "<answer>" * 5000 + text(A) + "</answer>" * 5000,
    "dots": "none" + "." * LONG, "underscores": "_" * LONG, "dashes": "-" * LONG, "word": "a" * LONG, "short word": "a" * 10_000,
    "words": "a " * (LONG // 2), "fewer words": "a " * 5000, "other words": " ".join(map(str, range(17_000))),
    "letters": "B " * (LONG // 2),
    "a letter somewhere": " " * (LONG // 2) + "b" + " " * (LONG // 2) + "?x",
    "labels": ", ".join(BIGEARTHNET) * 200,
    "almost labels": LAND.removesuffix("vegetation") * 1000, "and": " and," * (LONG // 5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_paid_within_bounds(name):
    """Raw, as the reasoning and as the answer, for every task: nothing raises, nothing hangs, nothing leaves [0, 1]."""
    written = HOSTILE[name]
    for task, (truth, right, _) in RIGHT.items():
        assert 0 <= TASKS[task].reward(written, truth) <= 1
        if task == "det":
            assert 0 <= detection_reward(written, to_oriented(truth)) <= 1
        for given_text in (written, completion(written), completion(right, think=written)):
            parts = score_completion(given_text, truth)
            assert parts["format"] in (0, 1) and 0 <= parts["accuracy"] <= 1 and -1 <= parts.get("repetition", 0) <= 0
