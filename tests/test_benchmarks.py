"""Scores of a set: the published answers give the published numbers, and small sets the numbers counted by hand."""

import json
import math
import os
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import evaluate
from boxes import average_precision, obb_corners
from data import load_samples
from metrics import benchmarks
from metrics.benchmarks import (
    NO_SHARES,
    accuracy,
    accuracy_by_type,
    box_accuracy,
    box_ious,
    box_precision,
    choice_accuracy,
    coco_ap,
    count_error,
    earthdial_tokens,
    geo_accuracy,
    in_percent,
    mask_iou,
    matched_boxes,
    meteor,
    multilabel,
    rouge,
    think_agreement,
    token_recall,
)
from metrics.published import BENCHMARKS, envelope_scores, table
from metrics.rows import sample_to_row
from readers.earthdial_results import read_earthdial_results
from rewards import TASKS
from runtime.errors import UserError
from sample import Sample, format_target
from tiny.scenes import SceneObject, point_on_object

A, B, C = (10, 10, 50, 50, 0), (60, 60, 100, 90, 0), (0, 70, 30, 110, 0)  # three boxes that do not touch
HALF = (10, 10, 50, 30, 0)                                                # IoU with A: exactly 0.5
POOR = (10, 10, 22, 50, 0)                                                # IoU with A: 0.3

real = pytest.mark.skipif("EO_DATA" not in os.environ, reason="EO_DATA does not name the folder of real samples")
def released(name):
    return Path(os.environ["EO_DATA"]) / "earthdial_results" / f"{name}.jsonl"


def sample(task, answer="", gt_boxes=(), **fields):
    return Sample("x", task, (), "?", answer, 112, gt_boxes, **fields)


def det(*gt_boxes, **fields):
    return sample("det", "", gt_boxes, **fields)


@lru_cache
def synthetic(task):
    return list(load_samples("synthetic", task, 56)[:16])


def text(*boxes):
    return ",".join("[" + ",".join(map(str, box[:4])) + "]" for box in boxes)


@pytest.fixture(scope="session")
def wordnet(tmp_path_factory):
    """nltk's WordNet, assembled from Debian's packages where nltk has none. METEOR never asks for the names of the
    lexicographer files, which those packages lack, so any 45 names do."""
    nltk = pytest.importorskip("nltk")
    try:
        return nltk.corpus.wordnet.ensure_loaded()
    except LookupError:
        debian = Path("/usr/share/wordnet")
        if not (debian / "data.noun").exists() or not (debian / "index.sense").exists():
            pytest.skip("no WordNet: neither nltk's nor Debian's wordnet-base and wordnet-sense-index")
        folder = tmp_path_factory.mktemp("nltk") / "corpora" / "wordnet"
        folder.mkdir(parents=True)
        for file in filter(Path.is_file, debian.iterdir()):
            shutil.copy(file, folder)
        (folder / "lexnames").write_text("".join(f"{i:02d}\tfile.{i}\t0\n" for i in range(45)))
        nltk.data.path.append(str(folder.parent.parent))
        return nltk.corpus.wordnet.ensure_loaded()


# ----------------------------------------------------------------------------------------------------------------------
# The published numbers, from EarthDial's released answers

@real
@pytest.mark.parametrize("name, task, function, expected", [
    ("rs_detection_results_GeoChat", "det", box_precision, {
        "box_precision@0.5_small": 11.43, "box_precision@0.5_medium": 31.73, "box_precision@0.5_large": 39.07,
        "box_precision@0.5_single": 34.27, "box_precision@0.5_multiple": 13.41,
        "hbb_precision@0.5_small": 15.48, "hbb_precision@0.5_medium": 35.72,
        "hbb_precision@0.5_large": 43.82,
        "hbb_precision@0.5_single": 40.22, "hbb_precision@0.5_multiple": 15.33}),
    ("rs_image_caption_results_RSICD_Captions", "cap", rouge, {"rouge1": 33.77, "rougeL": 27.61}),
    ("rs_region_captioning_results_GeoChat", "rcap", rouge, {"rouge1": 73.35, "rougeL": 73.31}),
    ("rs_classification_results_WHU_19", "cls", accuracy, {"accuracy": 96.42, "token_recall": 96.42}),
    ("rs_vqa_results_RSVQA_LR", "vqa", accuracy_by_type, {
        "presence": 92.59, "comp": 92.75, "rural_urban": 94, "average": 92.70}),
    # No published numbers for these 25 lines: box by box and word by word as the released scripts do
    ("rs_grounding_description_results_NWPU_VHR_10", "ground", box_precision, {
        "box_precision@0.5": 11.36, "box_precision@0.25": 47.73}),
    ("rs_grounding_description_results_NWPU_VHR_10", "ground", rouge, {"rouge1": 27.08, "rougeL": 26.57}),
    ("rs_change_detection__xBD_object_detection", "det", box_precision, {
        "box_precision@0.5": 12.50, "box_precision@0.25": 27.68}),
    ("rs_change_detection__Dubai_CC", "change", rouge, {"rouge1": 26.59, "rougeL": 25.40})])
def test_released_answers_score_as_published(name, task, function, expected):
    samples, answers = read_earthdial_results(released(name), task)
    found = function(answers, samples)
    assert {key: 100 * found[key] for key in expected} == pytest.approx(expected, abs=.05)


@real
@pytest.mark.parametrize("name, task, expected", [
    ("rs_image_caption_results_RSICD_Captions", "cap", 56.18), ("rs_region_captioning_results_GeoChat", "rcap", 62.72),
    ("rs_grounding_description_results_NWPU_VHR_10", "ground", 24.71),
    ("rs_change_detection__LEVIR_MCI", "change", 79.11)])
def test_released_answers_have_the_published_meteor(wordnet, name, task, expected):
    samples, answers = read_earthdial_results(released(name), task)
    assert 100 * meteor(answers, samples)["meteor"] == pytest.approx(expected, abs=.05)


# ----------------------------------------------------------------------------------------------------------------------
# Every score

@pytest.mark.parametrize("task", TASKS)
def test_scores_of_every_task_lie_between_0_and_1(task):
    samples = synthetic(task)
    for answers in ([s.gt_answer for s in samples], [None] * len(samples), ["[1,2], maybe ]["] * len(samples)):
        for name in TASKS[task].scores:
            found = getattr(benchmarks, name)(answers, samples)
            assert all(0 <= value <= (math.inf if key in NO_SHARES else 1) for key, value in found.items())


@pytest.mark.parametrize("task", TASKS)
def test_nothing_answered_and_nothing_asked_score_0(task):
    for samples in (synthetic(task), []):
        for name in TASKS[task].scores:
            found = getattr(benchmarks, name)([None] * len(samples), samples)
            assert not any(value for key, value in found.items() if key not in ("chance", *NO_SHARES))


@pytest.mark.parametrize("function, module, pip", [
    (rouge, "rouge_score.rouge_scorer", "rouge-score"), (meteor, "nltk.corpus", "nltk"),
    (accuracy, "nltk.tokenize", "nltk"), (box_precision, "shapely", "shapely"),
    (matched_boxes, "shapely", "shapely"), (coco_ap, "pycocotools.coco", "pycocotools")])
def test_missing_package_is_named(function, module, pip, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {pip}$"):
        function(["a"], [sample("rcap", "a", (A,))])


# ----------------------------------------------------------------------------------------------------------------------
# Labels

def test_accuracy_is_the_share_of_right_labels():
    samples = [sample("cls", label) for label in ("river", "sea lake", "river", "forest")]
    assert accuracy(["River", "SeaLake", None, "Forest."], samples) == {"accuracy": .75, "token_recall": .75}


def test_token_recall_of_a_perfect_list_is_below_1():
    """The published quirk: "a,b,c" has five tokens, but only four different ones."""
    found = multilabel(["sea, sand, reef"], [sample("mlc", "sea, sand, reef", choices=("sea", "sand", "reef"))])
    assert found == {"precision": 1, "recall": 1, "f1": 1, "token_recall": pytest.approx(4 / 5)}


def test_blanks_of_a_right_label_cost_no_token():
    samples = [Sample("x", "cls", (), "", label, 112) for label in ("storage tank", "sea lake")]
    assert token_recall(["storage tank", "SeaLake"], samples) == {"token_recall": 1}


def test_labels_with_commas_are_one_label_and_wrong_ones_cost_precision():
    choices = ("beaches, dunes, sands", "pastures", "vineyards")
    samples = [sample("mlc", answer, choices=choices) for answer in ("Pastures, beaches, dunes, sands", "vineyards")]
    found = multilabel(["beaches, dunes, sands, vineyards", None], samples)
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((1 / 2, 1 / 3, 2 / 5))


def test_average_over_question_types_is_by_samples_and_without_counts_and_areas():
    """RSVQA-HR asks for areas too. The tables leave out both, and print token recall."""
    targets = ("yes", "comp"), ("no", "comp"), ("no", "presence"), ("3", "count"), ("7m2", "area")
    samples = [sample("vqa", answer, subset=subset) for answer, subset in targets]
    found = accuracy_by_type(["Yes, it is.", "yes", "no", "4", "8m2"], samples)
    assert found == {"comp": 0, "count": 0, "presence": 1, "area": 0, "average": pytest.approx(1 / 3),
                     "token_recall": pytest.approx(2 / 3)}


def test_counts_alone_have_no_average():
    assert accuracy_by_type(["3"], [Sample("x", "vqa", (), "", "3", 112, subset="count")]) == {"count": 1}


def test_choice_accuracy_comes_with_chance():
    samples = [sample("pair", "A", choices=tuple("ABCD")), sample("pair", "B", choices=tuple("AB"))]
    assert choice_accuracy(["(A)", "A or B"], samples) == {"accuracy": .5, "chance": 3 / 8}


# ----------------------------------------------------------------------------------------------------------------------
# Boxes

def test_box_precision_counts_each_box_and_matching_each_object_once():
    samples = [det(A, B, subset="small"), det(A, subset="large"), det(C)]
    answers = [text(A, HALF, HALF), text(POOR, B), None]
    shares = {"0.5": 3 / 5, "0.5_multiple": 3 / 3, "0.5_single": 0 / 2, "0.5_small": 3 / 3, "0.5_large": 0 / 2,
              "0.25": 4 / 5}
    assert box_precision(answers, samples) == pytest.approx(
        {f"{kind}_precision@{key}": share for kind in ("box", "hbb") for key, share in shares.items()})
    shares = {"precision": 1 / 5, "recall": 1 / 4, "f1": 2 / 9}
    assert matched_boxes(answers, samples) == pytest.approx(
        {f"{kind}_{key}": share for kind in ("matched", "hbb_matched") for key, share in shares.items()})


def test_one_right_box_of_three_objects_has_full_box_precision():
    assert box_precision([text(A)], [det(A, B, C)])["box_precision@0.5"] == 1
    assert matched_boxes([text(A)], [det(A, B, C)])["matched_recall"] == pytest.approx(1 / 3)


def test_matching_makes_as_many_pairs_as_it_can():
    """If each took its best target, that would pair the first box with A and leave none for the second."""
    wide = (10, 10, 50, 70, 0)  # IoU 2/3 with A, 1 with itself
    assert matched_boxes([text(A, (10, 10, 50, 34))], [det(A, wide)])["matched_recall"] == 1


@pytest.mark.parametrize("junk", [
    "[10,10,50]", "[a,b,c,d]", "[50,10,10,50]", "[10,10,10,50]", "[1,2,3,4,5,6]", "[1e3,0,2e3,9]"])
def test_malformed_box_counts_and_overlaps_nothing(junk):
    found = box_precision([f"{text(A)},{junk}"], [det(A)]) | matched_boxes([f"{text(A)},{junk}"], [det(A)])
    assert found["box_precision@0.5"] == found["hbb_precision@0.5"] == found["matched_precision"] == .5


def test_sample_without_objects_counts_as_several_and_its_boxes_are_false():
    found = box_precision([text(A), "none"], [det(), det()])
    assert found["box_precision@0.5_multiple"] == 0 and "box_precision@0.5_single" not in found


def test_turned_boxes_overlap_as_polygons():
    """A square and itself turned by 45 degrees share a regular octagon: 8 (sqrt 2 - 1) of 4, so IoU = 1 / sqrt 2."""
    oriented, horizontal = box_ious("[0,0,20,20,45][0,0,20,20]", det((0, 0, 20, 20, 0)))
    assert oriented[:, 0] == pytest.approx([1 / math.sqrt(2), 1]) and horizontal[:, 0] == pytest.approx([1 / 2, 1])
    oriented, _ = box_ious("[0,40,100,60,90]", det((40, 0, 60, 100, 0)))
    assert oriented == pytest.approx(1)


def test_theta_turns_clockwise_as_the_scenes_are_drawn():
    """The corners of an object's outline, as it is painted, are those of its polygon (up to the last pixel)."""
    obj = SceneObject("court", "red", "large", (0, 40, 100, 60, 30), False)
    corners = obb_corners(np.array([obj.box], float))[0]
    assert np.abs(corners - [point_on_object(obj, u, v) for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1))]).max() < 1.2
    assert corners[1][1] > 40  # the right end of a flat box goes down


@pytest.mark.parametrize("answer, boxes", [
    (text(A, B, C), (A, B)), (text(C, A), (A,)), (text(HALF, A), (A, B)), (text(POOR), (A,)),
    (text(C, C, C, B), (A, B, C))])
def test_coco_ap_of_one_image_is_that_of_the_reward(answer, boxes):
    predicted, target = np.array(json.loads(f"[{answer}]"), float), np.array(boxes, float)[:, :4]
    assert coco_ap([answer], [det(*boxes)])["ap"] == pytest.approx(average_precision(predicted, target))


def test_coco_ap_counts_false_boxes_where_there_is_no_target():
    """Found one of two: precision 1 up to recall 0.5, 51 of 101 points. A false box before it halves the precision."""
    assert coco_ap([text(A), None], [det(A), det(B)])["ap"] == pytest.approx(51 / 101)
    assert coco_ap([None, text(A)], [det(B), det(A)])["ap"] == pytest.approx(51 / 101)  # no answer is no box
    found = coco_ap([text(C), text(A), None], [det(), det(A), det(B)])
    assert found == pytest.approx({"ap": 51 / 202, "ap50": 51 / 202})


def test_coco_ap_is_the_mean_over_categories_with_targets():
    samples = [det(A, category="ship"), det(B, category="plane"), det(category="car")]
    assert coco_ap([text(A), "none", text(C)], samples) == pytest.approx({"ap": .5, "ap50": .5})


def test_box_accuracy_is_strict_and_takes_one_box():
    samples = [sample("rec", "", (A,), subset=s) for s in ("unique", "unique", "non-unique", "non-unique")]
    near = (10, 10, 50, 40)  # IoU 0.75
    assert box_accuracy([text(near), text(HALF), text(A, B), None], samples) == {
        "accuracy@0.5": .25, "accuracy@0.7": .25, "accuracy@0.5_unique": .5, "accuracy@0.7_unique": .5,
        "accuracy@0.5_non-unique": 0, "accuracy@0.7_non-unique": 0}


def test_mask_iou_is_the_mean_of_ious_and_the_ratio_of_sums():
    square = Image.fromarray(np.pad(np.full((56, 56), 255, np.uint8), ((0, 56), (0, 56))))
    samples = [sample("seg", gt_mask=square)] * 2 + [sample("seg", gt_mask=Image.new("L", (112, 112)))] * 2
    answers = ['{"bbox_2d": [0, 0, 56, 28]}', "a square", "none", '{"bbox_2d": [0, 0, 28, 56]}']
    S = 56 * 56
    assert mask_iou(answers, samples) == pytest.approx({"giou": .5 / 4, "ciou": (S / 2) / (S + S + 0 + S / 2)})


# ----------------------------------------------------------------------------------------------------------------------
# Texts

def test_rouge_is_the_mean_over_references_of_stemmed_words():
    found = rouge(["two ships"], [sample("cap", gt_texts=("Two red ship .", "a bridge"))])
    assert found == pytest.approx({"rouge1": (4 / 5 + 0) / 2, "rougeL": (4 / 5 + 0) / 2})  # P 2/2, R 2/3 and 0


def test_rouge_l_depends_on_the_order():
    assert rouge(["ship red"], [sample("rcap", "red ship")]) == pytest.approx({"rouge1": 1, "rougeL": 1 / 2})


def test_captions_are_compared_in_treebank_tokens_and_regions_in_words():
    assert earthdial_tokens("It can't move. A road.", "change") == ["It", "ca", "n't", "move", ".", "A", "road", "."]
    assert earthdial_tokens("1 large-vehicle.", "rcap") == ["1", "large-vehicle."]


def test_descriptions_are_compared_without_their_boxes():
    words = ["there", "is", "3", "ships", "at", "left,", "1", "pier", "."]
    boxes = "[[[8, 4, 22, 9, 0]][[7, 4, 21, 8, 0]]]"
    for boxed in (f"there is <ref>3 ships</ref> <box>{boxes}</box> at left, 1 pier [1,2,3,4] .",
                  "there is 3 ships [[8, 41, 22, 49, 0], [7, 49, 21, 58, 3]]  at left, 1 pier ."):
        assert earthdial_tokens(boxed, "ground") == words


def test_meteor_takes_the_best_reference(wordnet):
    """Three words in one chunk: the penalty is 0.5 (1/3)^3, and precision and recall are 1."""
    captions = sample("cap", gt_texts=("no match", "a red ship"))
    assert meteor(["a red ship"], [captions])["meteor"] == pytest.approx(1 - .5 / 27)
    assert meteor(["a crimson ship"], [captions]) == pytest.approx({"meteor": 1 - .5 / 27})  # by WordNet a synonym


@pytest.mark.parametrize("error", [LookupError(), OSError("no lexnames"), ValueError("damaged")])
def test_without_wordnet_there_is_a_line_on_how_to_get_it_and_no_score(error, monkeypatch, capsys):
    def fail():
        raise error
    monkeypatch.setattr("nltk.corpus.wordnet", SimpleNamespace(ensure_loaded=fail))
    assert meteor(["a"], [sample("cap", "a")]) == {}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nltk.downloader wordnet" in said and str(error) in said


# ----------------------------------------------------------------------------------------------------------------------
# EarthDial's released files

@real
@pytest.mark.parametrize("name, task, n_references", [
    ("Dubai_CC", "change", 5), ("LEVIR_MCI", "change", 5), ("MUDS", "change", 5), ("SYSU", "change", 0),
    ("xBD_image_captioning", "change", 0), ("FMoW", "cls", 0), *((f"xBD_testset_{i}", "cls", 0) for i in (1, 2, 3)),
    *((f"xBD_reg_cls_testset_{i}", "cls", 0) for i in (1, 2)), ("xBD_object_detection", "det", 0),
    ("xBD_referred_object_detection", "det", 0)])
def test_temporal_result_files_are_read_unmodified(name, task, n_references):
    path = released(f"rs_change_detection__{name}")
    samples, answers = read_earthdial_results(path, task)
    assert len(samples) == len(answers) == len(path.read_text().splitlines())
    assert all(s.task == task and s.image_size == 100 and len(s.gt_texts) == n_references for s in samples)
    assert all(bool(s.gt_boxes) == (task == "det") and s.gt_answer and "<image>" not in s.question for s in samples)
    assert not any(s.gt_answer.startswith('["') for s in samples)


def results(tmp_path, *rows):
    path = tmp_path / "results.jsonl"
    question = {"question": "[refer] <image> \n Where?"}
    lines = [row if isinstance(row, str) else json.dumps(question | row) for row in rows]
    path.write_text("\n".join(lines))
    return path


def test_released_scorers_rules_on_boxes_are_kept_and_counted(tmp_path, capsys):
    """Targets with a minus sign or a point are not seen; a prediction's theta is 0 in xBD alone."""
    boxes = "[[1, 2, 3, 4, 5]][[-1, 2, 3, 4, 5]][[1.5, 2, 3, 4, 5]]"
    box = {"answer": "[[1, 2, 3, 4, 45]]", "gt_bbox": boxes, "size_group": "small"}
    (first,), answers = read_earthdial_results(results(tmp_path, box), "det")
    assert (first.gt_boxes, first.subset, answers) == (((1, 2, 3, 4, -5),), "small", ["[[1, 2, 3, 4, -45]]"])
    assert "2 boxes with a minus sign or a point" in capsys.readouterr().err
    xbd = {"answer": "[[1, 2, 3, 4, 45]][[5, 6]]", "caption0": "[[1, 2, 3, 4, 0]]"}
    assert read_earthdial_results(results(tmp_path, xbd), "det")[1] == ["[[1, 2, 3, 4, 0]][[5, 6]]"]


def test_description_of_fifty_boxes_is_left_out_and_counted(tmp_path, capsys):
    def row(n):
        return {"answer": "a", "groundtruth": "b", "obj_ids": json.dumps(["[[1, 2, 3, 4, 0]]" * n])}
    samples, answers = read_earthdial_results(results(tmp_path, row(49), row(50)), "ground")
    assert [len(s.gt_boxes) for s in samples] == [49] and len(answers) == 1
    assert "1 descriptions of 50" in capsys.readouterr().err


def test_empty_captions_are_no_references_and_lists_are_opened(tmp_path):
    apart = {"answer": "a", "caption0": "one .", "caption1": "", "caption2": " two . "}
    listed = {"answer": "a", "caption0": '["one .", "two ."]'}
    samples, _ = read_earthdial_results(results(tmp_path, apart, listed), "change")
    assert [s.gt_texts for s in samples] == [("one .", "two .")] * 2


def test_vocabulary_of_a_multi_label_question_keeps_labels_with_commas_whole(tmp_path):
    row = {"question": "<image> \\n Which ones are depicted? Peatbogs, beaches, dunes, sands, airports. "
                       "Answer with a list.",
           "answer": "beaches, dunes, sands", "annotation": "airports, beaches, dunes, sands"}
    samples, answers = read_earthdial_results(results(tmp_path, row), "mlc")
    assert samples[0].choices == ("Peatbogs", "beaches, dunes, sands", "airports")
    assert multilabel(answers, samples)["recall"] == .5


@pytest.mark.parametrize("row, task, message", [
    ("{", "cls", "not valid JSON"), ("3", "cls", "none of the keys"), ({"answer": "a"}, "cls", "none of the keys"),
    ({"answer": "a", "annotation": "b"}, "det", "with `annotation` is scored with --task cls or mlc, not det"),
    ({"annotation": "b"}, "cls", "`answer` is missing"),
    ({"answer": "a", "annotation": 3}, "cls", "`annotation` is missing or no text"),
    ({"answer": "a", "annotation": " "}, "cls", "`annotation` is empty"),
    ({"answer": "a", "caption0": ""}, "cap", "`caption0` is empty"),
    ({"answer": "a", "caption0": "[1]"}, "cap", "neither a text nor"),
    ({"answer": "a", "caption0": "b", "caption1": 3}, "cap", "neither a text nor"),
    ({"answer": "a", "caption0": "a caption"}, "det", "'a caption' is no box of five"),
    ({"answer": "a", "gt_bbox": "[[1, 2, 3]]", "size_group": "small"}, "det", "'1, 2, 3' is no box of five"),
    ({"answer": "a", "gt_bbox": "[[1, 2, 3, 4, 5]]"}, "det", "`size_group` is missing")])
def test_bad_result_is_named_by_file_and_line(tmp_path, row, task, message):
    good = {"answer": "a", "caption0": "[[1, 2, 3, 4, 5]]" if task == "det" else "b"}
    with pytest.raises(UserError) as error:
        read_earthdial_results(results(tmp_path, good, row), task)
    said = str(error.value)
    assert "results.jsonl: line 2" in said and message in said and "\n" not in said


def test_file_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="no results"):
        read_earthdial_results(results(tmp_path), "cls")


# ----------------------------------------------------------------------------------------------------------------------
# Counts and positions

def test_an_answer_without_a_count_is_a_zero_in_the_error():
    samples = [sample("count", str(n)) for n in (3, 0, 5, 40)]
    found = count_error(["3 ships", "none", None, "30 or 50"], samples)
    assert found == {"exact": 1 / 4, "absolute_error": (5 + 40) / 4}


def test_positions_are_right_within_five_distances():
    """Along a meridian a degree is 111.195 km."""
    samples = [sample("geo", "0, 0")] * 6
    answers = ["0.005, 0", "0.2, 0", "-1.5, 0", "6, 0", "20, 0", None]
    found = geo_accuracy(answers, samples)
    assert [found[f"accuracy@{km}km"] for km in (1, 25, 200, 750, 2500)] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert found["median_km"] == pytest.approx((1.5 + 6) / 2 * 111.195, rel=1e-5)
    assert geo_accuracy([None], samples[:1])["median_km"] == pytest.approx(180 * 111.195, rel=1e-5)  # the antipode


# ----------------------------------------------------------------------------------------------------------------------
# evaluate.py with --reward

def test_evaluation_pays_the_reward_that_the_flag_names(tmp_path, monkeypatch, capsys):
    """Two scenes with objects, each answered with its boxes twice: copies cost half by detection, nothing by overlap."""
    rows, scenes = [], [s for s in load_samples("synthetic", "det", 112)[:9] if len(s.gt_boxes) and not any(b[4] for b in s.gt_boxes)]
    for s in scenes[:2]:
        rows.append(json.dumps(sample_to_row(s) | {"completion": f"<answer>{s.gt_answer},{s.gt_answer}</answer>", "parts": {}}))
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    for flags, paid in (([], .5), (["--reward", "det=any_overlap_reward"], 1)):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--task", "det", "--predictions", str(tmp_path / "p.jsonl"),
                                          "--out", str(tmp_path / "out"), *flags])
        evaluate.main(evaluate.parse_eval_args(None))
        scores, shown = json.loads((tmp_path / "out/scores.json").read_text()), capsys.readouterr().out
        assert scores["accuracy_reward"] == pytest.approx(paid) and f"{100 * paid:.2f}" in shown
        assert [scores["reward"]] == flags[1:] if flags else "reward" not in scores
        assert "hbb_precision@0.5" in scores and "hbb_" not in shown  # upright boxes are their own envelopes


# ----------------------------------------------------------------------------------------------------------------------
# Reasoning

BOX = '{"bbox_2d": [1, 2, 3, 4], "label": "ship"}'
POINTED = '{"bbox_2d": [1, 2, 3, 4], "keypoint1": [2, 3], "keypoint2": [2, 2]}'


@pytest.mark.parametrize("task, think, answer, agrees", [
    ("det", "2 to find.", "[1,2,3,4],[5,6,7,8]", True), ("det", "7 to find.", "[1,2,3,4]", False),
    ("det", "Nothing to find.", "none", True), ("det", "1 to find.", "none", False), ("det", "1 to find.", "[]", False),
    ("det", "white ship left: 1 ship.", "[1,2,3,4]", True), ("det", "A ship far up.", "[1,2,3,4]", None),
    ("det", "1 ship and 2 tanks.", "[1,2,3,4]", None), ("ground", "2 to find.", "A [1,2,3,4] by b [1,2,3,4].", True),
    ("ovd", "2 to find.", f"[{BOX}, {BOX}]", True), ("ovd", "2 to find.", f"[{BOX}]", False),
    ("ovd", "Bare sea: 0 ship.", "None", True), ("rec", "1 to find.", BOX, True),
    ("seg", "1 tank.", f"[{POINTED}]", True), ("seg", "3 tank.", f"[{POINTED}]", False),
    ("cls", "Open blue water, the open sea.", "sea", True), ("cls", "This is a parking_lot.", "parking lot", True),
    ("cls", "Open water, a sea.", "city", False), ("cls", "The densest area of this season.", "sea", None),
    ("count", "That is 3.", "3", True), ("count", "I see 3 ships.", "4", False), ("count", "Some ships.", "4", None),
    ("vqa", "That is 3.", "4", None), ("cap", "7 to find.", "A pier.", None)])
def test_reasoning_agrees_with_the_answer_where_a_rule_can_tell(task, think, answer, agrees):
    completions = [f"<think>{think}</think> <answer>{answer}</answer>", "<answer>3</answer>", f"<think>{think}</think>"]
    samples = [sample(task, "sea")] * 3
    scores = {} if agrees is None else {"think_agreement": float(agrees), "think_stated": 1 / 3}
    assert think_agreement(completions, samples) == pytest.approx(scores)


@pytest.mark.parametrize("task", TASKS)
def test_targets_of_the_scenes_agree_with_their_own_reasoning(task):
    samples = load_samples("synthetic", task, 56)[:40]
    targets = [format_target(s) for s in samples]
    stated = {"det", "ovd", "seg"}  # the others list what there is
    assert think_agreement(targets, samples).get("think_agreement") == (1 if task in stated else None)


# ----------------------------------------------------------------------------------------------------------------------
# The published tables

@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_table_shows_every_published_row_and_this_run(benchmark):
    task, names, rows = BENCHMARKS[benchmark]
    shown = table(benchmark, {names[0]: 12.341 if names[0] in NO_SHARES else .12341})
    lines = shown.split("\n")
    assert task in TASKS and all(len(values) == len(names) for values in rows.values())
    assert len({len(line) for line in lines}) == 1 and lines[0].split() == [benchmark, *names]
    assert [line.split("  ")[0] for line in lines[1:]] == [*rows, "this run"]
    published = [["-" if value is None else f"{value:.2f}" for value in values] for values in rows.values()]
    assert [line.split()[-len(names):] for line in lines[1:-1]] == published
    assert lines[-1].split()[2:] == ["12.34", *["-"] * (len(names) - 1)]


@real
def test_perfect_horizontal_answers_score_78_in_the_oriented_column():
    """The published rows count oriented IoU: without this row, 78 would look like a bad detector."""
    samples, _ = read_earthdial_results(released("rs_detection_results_GeoChat"), "det")
    envelopes = envelope_scores(samples)
    assert 100 * envelopes["box_precision@0.5"] == pytest.approx(78.1, abs=.05)
    assert 100 * envelopes["box_precision@0.5_small"] == pytest.approx(73.2, abs=.05)


def test_envelopes_of_turned_targets_are_a_row():
    """A square that is turned by 30 degrees fills 0.54 of its envelope, and a long box at 45 degrees less than half."""
    boxes = [(25, 25, 50, 50, 0), (25, 25, 50, 50, 30), (25, 25, 50, 50, 60), (25, 25, 75, 30, 45)]
    turned = [det(box, subset="small") for box in boxes]
    envelopes = envelope_scores(turned)
    assert envelopes["box_precision@0.5"] == 3 / 4 and envelopes["hbb_precision@0.5"] == 1
    assert table("geochat-det", {}, turned).split("\n")[-1].split()[:6] == ["perfect", "horizontal", "answers", "75.00", "-", "-"]
    assert envelope_scores([det(A)]) == {}  # horizontal targets: no row
    region = sample("rcap", "a", ((10, 10, 50, 50, 45),))
    for name, samples in (("geochat-det", [det(A)]), ("geochat-rcap", [region])):
        assert table(name, {}, samples).split("\n")[-1].startswith("this run")


@pytest.mark.parametrize("choices, says", [("ABCDE", ""), ("ABCD", "have 4 candidates, the published rows most likely 5")])
def test_another_number_of_candidates_than_the_published_is_said(choices, says, capsys):
    table("cross-view", {"accuracy": .3}, [sample("pair", "A", choices=tuple(choices))] * 2)
    warned = capsys.readouterr().err
    assert says in warned and bool(warned) == bool(says)


def test_counts_of_tokens_are_no_shares():
    assert in_percent("completion_tokens", 20) == 20 and in_percent("accuracy", 0.2) == 20


def test_columns_of_the_tables_are_names_of_scores():
    """A misspelt column would always show "-". Sizes are known to the benchmarks alone, METEOR needs WordNet, and
    tokens a tokenizer."""
    elsewhere = {"meteor", "completion_tokens", *(f"box_precision@0.5_{size}" for size in ("small", "medium", "large"))}
    for benchmark, (task, names, _) in BENCHMARKS.items():
        samples = synthetic(task)
        answers = [s.gt_answer for s in samples]
        found = {key for name in TASKS[task].scores for key in getattr(benchmarks, name)(answers, samples)}
        assert set(names) - elsewhere <= found, benchmark


def test_tables_hold_the_papers_28_benchmarks():
    """One of them, the type of disaster in xBD, is in two of its tables."""
    geo_r1 = {"vrsbench", "dior-rsvg", "rrsis-d", "cross-view", "imageo-gss", "mp16-reason", "im2gps3k"}
    assert len(set(BENCHMARKS) - geo_r1) + 1 == 28
    assert BENCHMARKS["rsicd"][2]["EarthDial"] == (33.77, 27.61, 56.18)
    assert BENCHMARKS["xbd-det"][2]["GeoVLM-R1"] == (38.15, 48.13) and "GPT-4o" not in BENCHMARKS["xbd-refer"][2]
    assert BENCHMARKS["xbd-refer"][2]["InternVL2-8B"] == (None, .7) and len(BENCHMARKS["rsvqa-lr"][2]) == 9
    assert BENCHMARKS["vrsbench"][2]["MiniGPT-v2, 36313 samples"] == (None, None, None, None, 35.8, 16.8)
    assert "204.60" in table("cross-view", {}) and "69.40" in table("imageo-gss", {})  # no percentages
