"""Every format of readers/: on small files in the published layout, and on real ones if EO_DATA names
their folder."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import struct
import sys
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from boxes import clip_and_round, obb_to_hbb
from data import Source, few_shots, load_samples, load_splits, parse_sources
from readers import box_formats
from readers.box_formats import (
    Request,
    clip_boxes,
    min_area_rect,
    parse_label_list,
    rewrite_boxes,
    sample_per_class,
    tasks_of_question,
)
from readers.folders import read_samples
from readers.image_headers import read_image_size, size_of
from rewards import TASKS
from runtime.errors import NotServedError, UserError
from sample import Sample, load_gt_mask, load_images
from tools import scaffold

F = 112  # image_size: the side of the resized images
SIZE = (200, 50)  # of the original images: far from square, to reveal swapped axes


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    return tmp_path


def picture(path, size=SIZE, colour="green"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write(path, *records):
    """JSON lines, or a JSON array if the name ends in .json. Texts are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines))
    return path


def document(path, value, **layout):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, **layout))
    return path


def chat(*turns, image="a.png"):
    return {"id": "x", "image": image, "conversations": [
        {"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]}


def read(path, task, images=None, notes=None, image_size=F):
    request = Request(task, image_size, images, Counter() if notes is None else notes)
    found = read_samples(Path(path), {task: request})[task]
    if isinstance(found, NotServedError):
        raise found
    return found


def request(task, notes):
    return Request(task, F, None, notes)


def samples_of(path, task, images=None, notes=None, image_size=F):
    """The Samples of a source. Checks each: its answer is right, its boxes are in the image, no mark is
    left."""
    samples = read(path, task, images, notes, image_size)
    assert len({s.id for s in samples}) == len(samples)
    for s in samples:
        assert s.task == task and s.image_size == image_size and s.think and s.images
        assert TASKS[task].reward(s.gt_answer, s) > .7, (s.gt_answer, s.gt_boxes)  # boxes are rounded to pixels
        assert not re.search(r"</?\w+>|\\n|\[[a-z]|\{<|\[\[", s.question + s.gt_answer), s
        for box in s.gt_boxes:
            x1, y1, x2, y2 = obb_to_hbb(box)
            assert x1 < min(x2, image_size) and y1 < min(y2, image_size) and x2 > 0 and y2 > 0
            assert box[4] or min(x1, y1) >= 0 and max(x2, y2) <= image_size + 1e-6
    return samples


def refused(path, task, *says, images=None):
    """A UserError of one short line that says all of this."""
    with pytest.raises(UserError) as error:
        read(path, task, images)
    message = str(error.value)
    assert message.isprintable() and len(message) <= 300, message
    assert all(re.search(pattern, message) for pattern in says), message


# ----------------------------------------------------------------------------------------------------------------------
# Boxes and texts

def test_box_of_a_square_on_its_corner():
    """By hand: corners (5,0), (10,5), (5,10), (0,5) are a square of side sqrt(50) turned by 45 degrees."""
    half = 50 ** .5 / 2
    box = min_area_rect(np.array([(5, 0), (10, 5), (5, 10), (0, 5)]))
    assert box == pytest.approx((5 - half, 5 - half, 5 + half, 5 + half, 45))


def test_horizontal_box_has_no_angle_whatever_its_first_corner():
    for start in range(4):
        corners = np.roll(np.array([(2., 3), (9, 3), (9, 5), (2, 5)]), start, axis=0)
        assert min_area_rect(corners) == min_area_rect(corners[::-1]) == (2, 3, 9, 5, 0)


@pytest.mark.parametrize("theta", [1, 30, 60, 89, 120, 179, -45])
def test_oriented_box_keeps_the_corners_of_a_rectangle(theta):
    """Clockwise on the screen: y points down, so (1, 0) turns towards (0, 1)."""
    turn = np.radians(theta)
    axes = np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])
    shape = np.array([(-8, -2), (8, -2), (8, 2), (-8, 2)])

    def corners(box):
        t, (w, h) = np.radians(box[4]), ((box[2] - box[0]) / 2, (box[3] - box[1]) / 2)
        u = np.array([(np.cos(t), np.sin(t)), (-np.sin(t), np.cos(t))])
        return np.array([(-w, -h), (w, -h), (w, h), (-w, h)]) @ u + [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]

    expected = shape @ axes + [50, 40]
    found = corners(min_area_rect(expected))
    assert sorted(map(tuple, found.round(4))) == sorted(map(tuple, expected.round(4)))


def test_oriented_box_is_the_smallest_rectangle_around_a_quadrilateral():
    shapely = pytest.importorskip("shapely", reason="shapely knows the smallest rectangle")
    rng = np.random.default_rng(0)
    for _ in range(200):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 4))  # on an ellipse, so convex
        corners = np.stack([30 * np.cos(angles), 20 * np.sin(angles)], 1)
        x1, y1, x2, y2, theta = min_area_rect(corners)
        assert 0 <= theta < 90
        assert (x2 - x1) * (y2 - y1) == pytest.approx(shapely.minimum_rotated_rectangle(shapely.Polygon(corners)).area)


def test_boxes_of_every_notation_become_pixels_anywhere_in_a_text():
    """By hand, 112 / 100 = 1.12: 25 -> 28, 50 -> 56, 75 -> 84; pixels of 200 x 50: x * .56, y * 2.24."""
    notes = Counter()
    text, boxes = rewrite_boxes(
        "[grounding] [hr_rgb_0.5] <image> \\n <ref>1 ship</ref> <box>[[[25, 50, 50, 75, 0]]]</box> at left, "
        "<p>two</p>{<0><0><25><25>}<delim>{<50><50><75><75>|<90>} and [0, 0, 100, 25].", SIZE, request("det", notes), "here")
    assert text == "1 ship [28,56,56,84] at left, two [0,0,28,28],[56,56,84,84] and [0,0,56,56]."
    assert [box[4] for box in boxes] == [0, 0, 90, 0] and not notes


def test_small_and_thin_boxes_earn_three_quarters_of_their_own_reward():
    """An answer has whole pixels: a box that it could not reach becomes that of its own answer."""
    rng = np.random.default_rng(0)
    for x, y, w, h in [(10.5, 10, 1.9, 50), (10, 10.5, 50, 1.9), *rng.uniform((5, 5, 1, 1), (90, 90, 9, 9), (500, 4))]:
        (x1, y1, x2, y2, _), = clip_boxes([(x, y, x + w, y + h, 0)], request("det", Counter()))
        a1, b1, a2, b2 = clip_and_round((x1, y1, x2, y2), 112)
        common = (min(x2, a2) - max(x1, a1)) * (min(y2, b2) - max(y1, b1))
        assert common / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common) >= 0.75


def test_noisy_grid_boxes_in_a_text_are_clipped_or_left_out_and_counted():
    notes = Counter()
    noisy = "a {<90><80><102><104>|<0>} b {<50><50><50><60>|<0>} c"
    text, boxes = rewrite_boxes(noisy, SIZE, request("det", notes), "here")
    assert text == "a [101,90,112,112] b c" and len(boxes) == 1
    assert notes == {"boxes clipped to the image": 1, "boxes without area left out": 1}


@pytest.mark.parametrize("question, answer, tasks", [
    ("<image>\n[refer] where is <p>it</p>?", "{<1><2><3><4>}", ("det", "rec")),
    ("<image>\n[identify] what is {<1><2><3><4>|<5>}", "a ship", ("rcap",)),
    ("[grounding] give a description", "a ship {<1><2><3><4>|<5>}", ("ground",)),
    ("[caption] Describe.", "A ship.", ("cap",)),
    ("[vqa] Is there one of two classes?", "yes", ("vqa",)),
    ("Is there a ship? Answer with one word.", "no", ("vqa",)),
    ("Classify the image. Classes: sea, forest", "sea", ("cls",)), ("Who built this?", "Nobody knows.", ()),
    (" [changedet] [hr_rgb_temp_0.5] <image> <image> \\n are there any semantic change detected?", "no", ("change",)),
    ("[changedet] [hr_rgb_temp_0.5] <image> <image> \\n Identify the type of disaster. Options:  fire, wind.",
     "fire", ("cls",)),
    (("[identify] [hr_rgb_temp_0.5] <image> \\n Is this building at <box>[[5, 5, 8, 7, 0]]</box> affected? "
      "Please answer yes or no."), "yes", ("cls",)),
    ("[grounding] [hr_rgb_temp_0.5] <image> <image> \\n Please describe the damage.",
     "There was a fire.", ("change", "cap")),
    ("[s2_rgb_10] <image> \\n Which are depicted? sea, forest. Answer with a list of classes.", "sea", ("mlc",)),
])
def test_tasks_of_a_question_follow_from_its_mark(question, answer, tasks):
    assert tasks_of_question(question, answer) == tasks


def test_commas_of_bigearthnet_stay_in_their_labels():
    question = ("From the following scene categories, which ones are depicted in the provided remote sensing "
                "image? Broad-leaved forest, Beaches, dunes, sands, Land principally occupied by agriculture, "
                "with significant areas of natural vegetation, salt marshes. Answer with a list of classes.")
    assert parse_label_list(question, "here") == (
        "Broad-leaved forest", "Beaches, dunes, sands",
        "Land principally occupied by agriculture, with significant areas of natural vegetation", "salt marshes")


# ----------------------------------------------------------------------------------------------------------------------
# Conversations

GEOCHAT = ["<image>\n[refer] where is <p>the ship</p>?", "{<10><20><30><40>|<0>}",
           "[identify] what is in {<50><50><75><75>|<0>}", "<p>a ship</p>",
           "[grounding] describe the image", "There is <p>a ship</p> {<0><0><25><25>|<0>} at the top left.",
           "Classify the image. Classes: sea, forest", "sea",
           "Is it rural? Answer with one word.", "no", "Why?", "Because."]


@pytest.mark.parametrize("task, question, answer", [
    ("det", "where is the ship ?", "[11,22,34,45]"),
    ("rec", "where is the ship ?", '{"bbox_2d": [11, 22, 34, 45]}'),
    ("rcap", "what is in [56,56,84,84]", "a ship"),
    ("cls", "Classify the image. Classes: sea, forest", "sea"),
    ("ground", "describe the image", "There is a ship [0,0,28,28] at the top left."),
    ("vqa", "Is it rural? Answer with one word.", "no")])
def test_each_task_takes_its_turns_of_geochats_mix(folder, task, question, answer):
    notes = Counter()
    sample, = samples_of(write(folder / "geochat.json", chat(*GEOCHAT)), task, notes=notes)
    assert (sample.question, sample.gt_answer) == (question, answer)
    assert notes == {"turns with the mark of another task, such as [vqa], left out": 5}
    assert (sample.id.endswith(", turn 0") == (task in ("det", "rec")))


def split_records(folder, *splits):
    records = [chat("Which?", f"number {i}") | {"split": split} for i, split in enumerate(splits)]
    return write(folder / "mine.json", *records)


@pytest.mark.parametrize("splits, held_out", [
    (("train", "Val", "train", "test"), {"number 1"}), (("train", "validation", "train"), {"number 1"})])
def test_own_split_is_kept_in_any_spelling(folder, splits, held_out):
    """A split of unknown spelling was once ignored: samples were held out by hash, and its test records
    trained on."""
    source = str(split_records(folder, *splits))
    assert {s.gt_answer for s in load_samples(source, "vqa", F, split="heldout")} == held_out
    assert {s.gt_answer for s in load_samples(source, "vqa", F, split="train")} == {
        f"number {i}" for i, split in enumerate(splits) if split == "train"}


def test_own_split_of_another_name_and_turns_in_another_order_are_refused(folder):
    with pytest.raises(UserError, match="record 1: its `split` is 'dev', expected train, val or test"):
        load_samples(str(split_records(folder, "train", "dev")), "vqa", F)
    for roles in (("gpt", "human"), ("system", "human")):
        turns = [{"from": role, "value": "2"} for role in roles]
        with pytest.raises(UserError, match="`from` human and gpt in turn, without a system turn"):
            source = write(folder / "mine.json", {"image": "a.png", "conversations": turns})
            load_samples(str(source), "vqa", F)


def test_vrsbench_train(folder):
    source = write(folder / "VRSBench_train.json", chat("<image>\n[caption] Describe the image in detail", "A pier."),
                   chat("<image>\n[refer] give me the location of <p>The pier</p>", "{<25><50><75><100>}"),
                   chat("<image>\n[vqa] How many piers?", "1"))
    answers = [samples_of(source, task)[0].gt_answer for task in ("cap", "det", "vqa")]
    assert answers == ["A pier.", "[28,56,84,112]", "1"]


@pytest.mark.parametrize("task, turns, answer", [
    ("cap", ("<image>Describe it.", "A ship."), "A ship."),
    ("change", ("<image><image>What changed?", "A house."), "A house."),
    ("vqa", ("How many?", "3"), "3"),
    ("rec", ("Find it.", '{"bbox_2d": [100, 25, 200, 50]}'), '{"bbox_2d": [56, 56, 112, 112]}'),
    ("rcap", ("What is in [100, 25, 200, 50]?", "a ship"), "a ship"),
    ("mlc", ("Which? sea, forest, city.", "sea, city"), "sea, city"),
    ("ground", ("Describe.", "A ship [100, 25, 200, 50] at sea."), "A ship [56,56,112,112] at sea."),
    ("pair", ("<image><image><image>Which of A and B?", "<answer>B</answer>"), "B")])
def test_unmarked_conversations_serve_the_requested_task(folder, task, turns, answer):
    n = {"change": 2, "pair": 3}.get(task, 1)
    sample, = samples_of(write(folder / "2u1.jsonl", chat(*turns, image=["a.png"] * n if n > 1 else "a.png")), task)
    assert sample.gt_answer == answer and len(sample.images) == n
    assert sample.choices == {"mlc": ("sea", "forest", "city"), "pair": ("A", "B")}.get(task, ())
    assert ("[56,56,112,112]" in sample.question) == (task == "rcap")


def messages(*contents, images=("a.png",)):
    return {"images": list(images), "messages": [
        {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]}


@pytest.mark.parametrize("question", [
    "<image>Where?", "Where?", [{"type": "image"}, {"type": "text", "text": "Where?"}]])
def test_messages_are_read_as_conversations(folder, question):
    """The form of TRL and LLaMA-Factory."""
    answer = "[100, 25, 200, 50]"
    source = write(folder / "trl.jsonl", messages(question, answer), messages(question, [{"type": "text", "text": answer}]))
    one, two = samples_of(source, "det")
    assert (one.question, one.gt_answer) == (two.question, two.gt_answer) == ("Where?", "[56,56,112,112]")
    table = pytest.importorskip("datasets").Dataset.from_list([messages("Where?", answer)])
    table.to_parquet(folder / "trl.parquet")
    assert samples_of(folder / "trl.parquet", "det", images=folder)[0].gt_answer == "[56,56,112,112]"
    turns = [{"from": "human", "value": "[refer] where?"}, {"from": "gpt", "value": answer}]
    lists = [{"image": "a.png", "conversations": turns}, {"image": "a.png", "conversations": chat("[vqa] any?", "no")["conversations"]}]
    pytest.importorskip("datasets").Dataset.from_list(lists).to_parquet(folder / "lists.parquet")
    assert [s.gt_answer for s in samples_of(folder / "lists.parquet", "vqa", images=folder)] == ["no"]
    marked = write(folder / "marked.jsonl", messages("[refer] where?", answer), messages("[vqa] how many?", "3"))
    assert [s.gt_answer for s in samples_of(marked, "vqa")] == ["3"]


def test_record_may_name_its_task(folder):
    notes = Counter()
    source = write(folder / "a.jsonl", chat("Which?", "sea") | {"task": "cls"}, chat("How many?", "3") | {"task": "vqa"},
                   chat("What?", "sea"))
    assert [s.gt_answer for s in samples_of(source, "cls", notes=notes)] == ["sea", "sea"]
    assert notes == {"records of another `task` left out": 1}
    refused(write(folder / "a.jsonl", chat("Which?", "sea") | {"task": "class"}), "cls", "line 1: its `task` is 'class'.*cls, mlc")


def test_rec_leaves_out_questions_for_several_objects(folder):
    notes = Counter()
    source = write(folder / "a.jsonl", chat("Find it.", "[1,2,30,40]"),
                   chat("Find them.", "[1,2,30,40],[5,6,70,40]"))
    assert len(samples_of(source, "rec", notes=notes)) == 1
    assert notes == {"records of several objects left out": 1}


# ----------------------------------------------------------------------------------------------------------------------
# EarthDial: rows as JSON, and shards

BIGEARTHNET = (" [s2_rgb_10] <image> \\n From the following scene categories, which ones are depicted in the "
               "provided remote sensing image? Water bodies, mixed forest, sea and ocean. Answer with a list of "
               "classes.")
XBD_REGION = ("[identify] [hr_rgb_temp_0.5] <image> <image> \\n Compare the building at "
              "<box>[[25, 50, 50, 75, 0]]</box> between the images. Classify the level of damage. Classes: "
              "no-damage, destroyed.")
EARTHDIAL = {  # task -> (row as in a shard, question, answer)
    "det": ({"question": '"[refer] [hr_rgb_0.5] <image> \\n <ref>2 ships</ref>"', "ttype": '"ref"',
             "size_group": '"small"', "groundtruth": '"[[25, 50, 50, 75, 0]][[75, 75, 100, 100, 0]]"'},
            "Give me the location of 2 ships", "[28,56,56,84],[84,84,112,112]"),
    "rcap": ({"question": " [identify] [hr_rgb_0.5] <image> \\n describe this object in "
                          "<box>[[25, 50, 50, 75, 90]]</box>",
              "groundtruth": '"1 ship"', "size_group": '"small"'}, "describe this object in [28,56,56,84]", "1 ship"),
    "ground": ({"question": "[grounding] [hr_rgb_0.5] <image> \n Describe the image.", "size_group": '["small"]',
                "groundtruth": "There is <ref>1 ship </ref> <box>[[[25, 50, 50, 75, 0]]]</box> located at left."},
               "Describe the image.", "There is 1 ship [28,56,56,84] located at left."),
    "cls": ({"question": XBD_REGION, "groundtruth": '"destroyed"'},
            ("Compare the building at [28,56,56,84] between the images. Classify the level of damage. Classes: "
             "no-damage, destroyed."), "destroyed"),
    "mlc": ({"question": BIGEARTHNET, "groundtruth": "mixed forest, water bodies"},
            BIGEARTHNET[24:], "mixed forest, water bodies"),
    "cap": ({"question": " [caption] [hr_rgb_0.5] <image> \\n Caption the image?",
             **{f"groundtruth{i}": f'"text {i} ."' for i in range(5)}}, "Caption the image?", "text 0 ."),
    "change": ({"question": "[changedet] [hr_rgb_temp_0.5] <image> <image> \\n any change?",
                "groundtruth": '["A road.", "New road."]'}, "any change?", "A road."),
    "vqa": ({"question": "[hr_rgb_0.5] <image>\\n Is there a grass area?", "groundtruth": '"yes"',
             "ttype": '"presence"'},
            "Is there a grass area?", "yes"),
}


@pytest.mark.parametrize("task", EARTHDIAL)
def test_earthdial_rows(folder, task):
    row, question, answer = EARTHDIAL[task]
    images = ["a.png", "b.png"] if task == "change" else "a.png"
    sample, = samples_of(write(folder / "rows.jsonl", row | {"image": images}), task)
    assert (sample.question, sample.gt_answer) == (question, answer)
    assert sample.subset == {"det": "small", "rcap": "small", "vqa": "presence"}.get(task, "")
    assert len(sample.gt_texts) == {"cap": 5, "change": 2}.get(task, 0)
    assert sample.choices == (("Water bodies", "mixed forest", "sea and ocean") if task == "mlc" else ())


def test_earthdial_full_question_is_not_rephrased(folder):
    question = "[refer] [hr_rgb_0.5] <image> \\n Where are <ref>2 ships</ref>"
    row = EARTHDIAL["det"][0] | {"image": "a.png", "question": question}
    assert samples_of(write(folder / "rows.jsonl", row), "det")[0].question == "Where are 2 ships"


def shard(path, rows):
    datasets = pytest.importorskip("datasets", reason="EarthDial's shards and parquet are read by datasets")
    columns = {key: datasets.Image() for key in rows[0] if key.startswith("jpg")}
    features = datasets.Features({key: columns.get(key, datasets.Value("string")) for key in rows[0]})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(path)
    return path


def test_earthdial_evaluation_shard_of_four_dates(tmp_path):
    dates = {f"jpg_{x}": Image.new("RGB", SIZE, colour) for x, colour in zip("ABCD", ("red", "green", "blue", "white"))}
    question = "[hr_rgb_temp_0.5] <image> <image> <image> <image> \\n Classify. Classes: a, b."
    source = shard(tmp_path / "FMoW", [dates | {"question": question, "groundtruth": '"b"'}] * 3)
    first, *_ = samples = samples_of(source, "cls")
    assert [s.gt_answer for s in samples] == ["b"] * 3 and len(first.images) == 4
    assert np.asarray(load_images(first)[2])[0, 0] == pytest.approx((0, 0, 255), abs=3)
    assert len({image.name for s in samples for image in s.images}) == 4  # identified by content, not by row


def test_earthdial_training_shard(tmp_path):
    turns = json.dumps(chat(*GEOCHAT)["conversations"])
    source = shard(tmp_path / "GeoChat_part1", [{"jpg": Image.new("RGB", SIZE), "conversations": turns}] * 2)
    assert [s.gt_answer for s in samples_of(source, "det")] == ["[11,22,34,45]"] * 2
    refused(tmp_path / "GeoChat_part1", "seg", "row 0.*serves.*not seg")


def test_earthdial_training_shard_of_pairs_has_one_mark_for_both_images(tmp_path):
    question = ("[identify] [hr_rgb_temp_0.5] <image> \\n Is this building at <box>[[25, 50, 50, 75, 0]]</box> "
                "affected due to disaster in the second image? Please answer yes or no.")
    turns = json.dumps(chat(question, "no")["conversations"])
    images = {"jpg_A": Image.new("RGB", SIZE), "jpg_B": Image.new("RGB", SIZE)}
    source = shard(tmp_path / "xBD", [images | {"conversations": turns}])
    sample, = samples_of(source, "cls")
    assert len(sample.images) == 2 and sample.gt_answer == "no"
    assert "at [28,56,56,84] affected" in sample.question


# ----------------------------------------------------------------------------------------------------------------------
# GeoChat-Bench, VRSBench's evaluation, few shots

def test_geochat_bench_referring_has_polygons_in_pixels(folder):
    picture(folder / "P0001__1.0__0___0.png")
    source = write(folder / "referring.jsonl", {
        "question_id": "1", "image_id": "P0001__1.0__0___0", "question": "2 gray ships", "type": "ref",
        "dataset": "SOTA", "ground_truth": [[[0, 0], [100, 0], [100, 25], [0, 25]],
                                            [[200, 25], [200, 50], [100, 50], [100, 25]]],
        "obj_ids": [1, 2], "size_group": "medium"})
    sample, = samples_of(source, "det")
    assert sample.question == "Give me the location of 2 gray ships" and sample.subset == "medium"
    assert sample.gt_answer == "[0,0,56,56],[56,56,112,112]" and [box[4] for box in sample.gt_boxes] == [0, 0]
    assert samples_of(source, "rec") == []


def test_geochat_bench_region_captions_scenes_and_descriptions(folder):
    region, = samples_of(write(folder / "region_captioning.jsonl", {
        "question_id": "1", "image_id": "a", "question": "{<25><50><50><75>|<0>}", "ground_truth": "small ship",
        "type": "region", "size_group": "small"}), "rcap")
    assert region.question == "What is the object at [28,56,56,84]"
    assert (region.gt_answer, region.subset) == ("small ship", "small")
    text = ("Classify the image within one of the given classes. Classes: MediumResidential, Pond.\n"
            "Answer with one word.")
    scene, = samples_of(write(folder / "aid.jsonl", {  # the typo and the wrong extension are the published ones
        "question_id": "AerialClass/1", "image": "a.tif", "text": text, "ground_truth": "MediumResidentialgt"}), "cls")
    assert scene.gt_answer == scene.category == "MediumResidential" and scene.images[0].name == "a.png"
    description = {"image_id": "a", "description": "Two ships."}
    described, = samples_of(write(folder / "grounding_description.jsonl", description), "cap")
    assert (described.question, described.gt_answer) == ("Describe the image.", "Two ships.")


def test_geochat_bench_vqa_joins_the_answers_of_rsvqa(folder):
    row = {"image": "a.png", "text": "Is there a road?\nAnswer with one word.", "category": "presence"}
    source = write(folder / "lrben.jsonl", row | {"question_id": 3}, row | {"question_id": 7})
    refused(source, "vqa", "0 files .*answers")
    document(folder / "sub" / "all_answers.json", {"answers": [
        {"id": i, "question_id": i, "answer": f"answer {i}", "active": True} for i in range(9)]})
    picture(folder / "sub" / "a.png")
    assert [(s.gt_answer, s.subset) for s in samples_of(source, "vqa", images=folder / "sub")] == [
        ("answer 3", "presence"), ("answer 7", "presence")]


VRSBENCH = {"image_id": "a.png", "question": "The large yellow vehicle.", "ground_truth": "{<25><50><50><75>}",
            "dataset": "RSBench", "question_id": 0, "type": "ref", "unique": False, "obj_cls": "vehicle",
            "obj_ids": [0], "obj_corner": [.25, .5, .5, .5, .5, .75, .25, .75], "size_group": ""}


@pytest.mark.parametrize("changed", [{}, {"obj_corner": []}], ids=["corners", "grid"])
def test_vrsbench_referring(folder, changed):
    source = write(folder / "VRSBench_EVAL_referring.json", VRSBENCH | changed, VRSBENCH | {"unique": True})
    for task, answer in (("rec", '{"bbox_2d": [28, 56, 56, 84]}'), ("det", "[28,56,56,84]")):
        one, two = samples_of(source, task)
        assert one.gt_answer == two.gt_answer == answer
        assert one.question == "Give me the location of The large yellow vehicle."
        assert (one.subset, two.subset, one.category) == ("non-unique", "unique", "vehicle")


def test_vrsbench_corners_keep_their_angle_for_det_alone(folder):
    source = write(folder / "r.json", VRSBENCH | {"obj_corner": [.5, .25, .75, .5, .5, .75, .25, .5]})
    assert samples_of(source, "det")[0].gt_boxes[0][4] == 45
    assert samples_of(source, "rec")[0].gt_boxes[0] == (28, 28, 84, 84, 0)


def test_vrsbench_questions_and_captions(folder):
    base = {"image_id": "a.png", "dataset": "RSBench", "question_id": 0}
    question = {"question": "How many classes of ships?", "ground_truth": "2", "type": "object quantity"}
    sample, = samples_of(write(folder / "vqa.json", base | question), "vqa")
    assert (sample.question, sample.gt_answer, sample.subset) == tuple(question.values())
    caption = {"question": "Describe the image in detail", "ground_truth": "A pier.", "type": "caption"}
    assert samples_of(write(folder / "Cap.json", base | caption), "cap")[0].gt_answer == "A pier."


@pytest.mark.parametrize("unique, subset", [
    ("True", "unique"), ("False", "non-unique"), (True, "unique"), (False, "non-unique")])
def test_few_shots_as_json(folder, unique, subset):
    row = {"image": "a.png", "problem": "Find the ship.", "solution": [100, 25, 200, 50], "is_unique": unique}
    sample, = samples_of(write(folder / "detailed.json", row), "rec")
    assert sample.gt_answer == '{"bbox_2d": [56, 56, 112, 112]}'
    assert (sample.subset, sample.question) == (subset, "Find the ship.")


def test_few_shots_as_parquet(tmp_path):
    datasets = pytest.importorskip("datasets", reason="EarthDial's shards and parquet are read by datasets")
    row = {"images": [Image.new("RGB", SIZE)], "problem": "Find it.", "answer": [100., 25., 200., 50.],
           "is_unique": "True"}
    rows = [row | {"category": category} for category in ("ship", "pier")]
    features = datasets.Features(dict.fromkeys(rows[0], datasets.Value("string")) | {
        "images": datasets.Sequence(datasets.Image()), "answer": datasets.Sequence(datasets.Value("float64"))})
    table = datasets.Dataset.from_list(rows, features=features)
    for name in ("data", "of_val"):
        (tmp_path / name).mkdir()
    for split in ("train_1shot", "val"):
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    samples = samples_of(tmp_path / "data" / "val-00000-of-00001.parquet", "rec")
    assert {s.split for s in samples} == {"val"}
    answer = '{"bbox_2d": [56, 56, 112, 112]}'
    assert [(s.category, s.gt_answer) for s in samples] == [("ship", answer), ("pier", answer)]
    assert load_images(samples[0])[0].size == (F, F)
    refused(tmp_path, "rec", "splits train_1shot, val")
    for name in ("val-00000-of-00001-9b1a2c3d.parquet", "val_00.parquet", "val.parquet"):
        table.to_parquet(tmp_path / "of_val" / name)
        assert {s.split for s in samples_of(tmp_path / "of_val" / name, "rec")} == {"val"}
    assert len(samples_of(tmp_path / "of_val", "rec")) == 6
    (tmp_path / "data" / "val-00000-of-00001.parquet").unlink()
    assert {s.split for s in samples_of(tmp_path, "rec")} == {"train"}


# ----------------------------------------------------------------------------------------------------------------------
# Detection: DIOR-RSVG, NWPU VHR-10, COCO, DOTA, xBD

XML = ("<annotation><filename>{name}.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}"
       "</annotation>")
OBJECT = ("<object><name>{name}</name><pose>Unspecified</pose><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax>"
          "<ymax>{3}</ymax></bndbox><description>A green {name}</description></object>")


@pytest.fixture
def dior(tmp_path):
    for name, kinds in (("00001", ["dam"]), ("00002", ["ship", "harbor"]), ("00003", ["ship"])):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        objects = "".join(OBJECT.format(100, 25, 200, 50, name=kind) for kind in kinds)
        write(tmp_path / "Annotations" / f"{name}.xml", XML.format(name=name, objects=objects, size=SIZE))
    write(tmp_path / "test.txt", "0", "2")
    return tmp_path


def test_dior_rsvg_split_holds_running_object_numbers(dior):
    everything, test = samples_of(dior, "rec"), samples_of(dior / "test.txt", "rec")
    assert [s.category for s in everything] == ["dam", "ship", "harbor", "ship"]
    assert [s.question for s in test] == [
        "Give me the location of A green dam", "Give me the location of A green harbor"]
    assert {s.gt_answer for s in everything} == {'{"bbox_2d": [56, 56, 112, 112]}'}
    assert samples_of(dior, "det")[0].gt_answer == "[56,56,112,112]"


NWPU_LINES = "(100, 25),(200,50),2 \n( 0,0),( 50, 25),1\n\n(0,25),(50,50),2"


@pytest.fixture
def nwpu(tmp_path):
    picture(tmp_path / "positive image set" / "001.jpg")
    write(tmp_path / "ground truth" / "001.txt", NWPU_LINES)
    return tmp_path


def test_nwpu_asks_once_for_each_class_of_an_image(nwpu):
    airplane, ship = samples_of(nwpu, "ovd")
    assert (airplane.category, ship.category) == ("airplane", "ship") and ship.question == "Locate every ship."
    assert json.loads(ship.gt_answer) == [
        {"bbox_2d": box, "label": "ship"} for box in ([56, 56, 112, 112], [0, 56, 28, 112])]
    assert [s.gt_answer for s in samples_of(nwpu, "det")] == ["[0,0,28,56]", "[56,56,112,112],[0,56,28,112]"]


COCO = {"images": [{"id": 7, "file_name": "a.png", "width": 200, "height": 50}, {"id": 9, "file_name": "b.png"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [100, 25, 100, 25]},
                        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [190, 25, 20, 25]}],
        "categories": [{"id": 3, "name": "ship"}, {"id": 1, "name": "airplane"}]}


@pytest.mark.parametrize("layout", [{}, {"indent": 1}])
def test_coco(folder, layout):
    notes = Counter()
    source = document(folder / "annotations.json", COCO, **layout)
    airplane, ship = samples_of(source, "ovd", notes=notes)
    assert json.loads(ship.gt_answer) == [{"bbox_2d": [56, 56, 112, 112], "label": "ship"}]
    assert ship.images == (folder / "a.png",)
    assert airplane.gt_boxes[0][2] == F and notes == {"boxes clipped to the image": 1}


DOTA_LINES = ("imagesource:GoogleEarth\ngsd:0.146\n100 25 200 25 200 50 100 50 ship 0\n"
              "150 0 200 25 150 50 100 25 plane 1\n")


@pytest.fixture
def dota(tmp_path):
    picture(tmp_path / "images" / "P0001__0.5__0___0.png")
    write(tmp_path / "labelTxt" / "P0001__0.5__0___0.txt", DOTA_LINES)
    return tmp_path


def test_dota_oriented_boxes_come_from_corners_in_the_resized_image(dota):
    """By hand: (150,0) (200,25) (150,50) (100,25) of 200 x 50 is a rhombus (84,0) (112,56) (84,112) (56,56) of
    112 x 112. Its edges, 28 sqrt(5) long, rise by atan2(56, 28) = 63.43 degrees; along one of them it is 1.6
    edges long, across 0.8."""
    plane, ship = samples_of(dota, "det")
    assert ship.gt_boxes == ((56, 56, 112, 112, 0),)
    x1, y1, x2, y2, theta = plane.gt_boxes[0]
    assert theta == pytest.approx(63.434949) and ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx((84, 56))
    assert (x2 - x1, y2 - y1) == pytest.approx((1.6 * 28 * 5 ** .5, .8 * 28 * 5 ** .5))
    assert [s.category for s in samples_of(dota, "ovd")] == ["plane", "ship"]


FIRE = "socal-fire_00000001_post_disaster"


def polygon(x1, y1, x2, y2, kind):
    return {"properties": {"feature_type": "building", "subtype": kind, "uid": "x"},
            "wkt": f"POLYGON (({x1} {y1}, {x2}.5 {y1}, {x2}.5 {y2}, {x1} {y2}, {x1} {y1}))"}


@pytest.fixture
def xbd(tmp_path):
    for name in ("socal-fire_00000001", "hurricane-harvey_00000002"):
        for when in ("pre", "post"):
            picture(tmp_path / "train" / "images" / f"{name}_{when}_disaster.png", (100, 100))
    document(tmp_path / "train" / "labels" / f"{FIRE}.json", {"features": {"lng_lat": [], "xy": [
        polygon(25, 50, 49, 75, "destroyed"), polygon(0, 0, 24, 25, "no-damage"),
        polygon(1, 1, 2, 2, "un-classified")]}})
    (tmp_path / "train" / "masks").mkdir()
    Image.new("L", (100, 100), 1).save(tmp_path / "train" / "masks" / "hurricane-harvey_00000002_post_disaster.png")
    return tmp_path


def test_xbd_asks_for_the_disaster_and_for_damage(xbd):
    samples = samples_of(xbd, "cls")
    # The mask says 1, no damage; the label has one destroyed building.
    assert [s.gt_answer for s in samples] == ["flood", "no", "fire", "yes"]
    assert [image.name[-17:] for image in samples[0].images] == ["_pre_disaster.png", "post_disaster.png"]


def test_xbd_locates_buildings_by_their_damage(xbd):
    notes = Counter()
    destroyed, intact = samples_of(xbd, "det", notes=notes)
    assert destroyed.question == "Locate every destroyed building in the second image."
    assert destroyed.gt_answer == "[28,56,55,84]"
    assert intact.category == "no-damage" and len(intact.images) == 2
    assert notes == {"image pairs without labels/*.json left out": 1, "buildings of no class left out": 1}


# ----------------------------------------------------------------------------------------------------------------------
# Captions, changes, questions

SENTENCES = [{"raw": f" caption {i} ."} for i in range(5)]


def test_captions_of_karpathy_nwpu_and_rsicd_on_aid(folder):
    picture(folder / "pier" / "c.png")
    texts = [sentence["raw"] for sentence in SENTENCES]
    raw = {"raw": texts[0]} | {f"raw_{i}": text for i, text in enumerate(texts[1:], 1)}
    sources = (document(folder / "dataset_rsicd.json", {"images": [{"filename": "a.png", "sentences": SENTENCES}]}),
               document(folder / "dataset_nwpu.json", {"pier": [{"filename": "c.png", "split": "train", **raw}]}),
               write(folder / "rsicd_captions.jsonl", {"image": "pier/c.png", "split": "train", "captions": texts}))
    for source, category in zip(sources, ("", "pier", "pier")):
        sample, = samples_of(source, "cap")
        assert sample.gt_texts == tuple(f"caption {i} ." for i in range(5)) and sample.gt_answer == "caption 0 ."
        assert sample.category == category and sample.images[0].is_file()


@pytest.fixture
def levir(tmp_path):
    for when in "AB":
        picture(tmp_path / "images" / "test" / when / "test_1.png")
    document(tmp_path / "LevirCCcaptions.json", {"dataset": "LEVIR-CC", "images": [
        {"filepath": "test", "filename": "test_1.png", "changeflag": 0, "sentences": SENTENCES}]}, indent=1)
    return tmp_path


def test_levir_cc_shows_before_and_after(levir):
    for source in (levir, levir / "LevirCCcaptions.json"):
        sample, = samples_of(source, "change")
        assert [image.parent.name for image in sample.images] == ["A", "B"] and len(sample.gt_texts) == 5
        assert sample.category == "no change" and sample.gt_answer == "caption 0 ."


@pytest.fixture
def rsvqa(tmp_path):
    picture(tmp_path / "Images_LR" / "5.tif")
    document(tmp_path / "LR_split_test_questions.json", {"questions": [{"id": 0, "active": False}, {
        "id": 1, "img_id": 5, "type": "count", "question": "How many?", "answers_ids": [1], "active": True}]})
    document(tmp_path / "LR_split_test_answers.json", {"answers": [{"id": 0, "active": False}, {
        "id": 1, "question_id": 1, "answer": "34", "active": True}]})
    return tmp_path


def test_rsvqa_takes_the_active_questions_of_a_split(rsvqa):
    notes = Counter()
    sample, = samples_of(rsvqa, "vqa", notes=notes)
    assert (sample.question, sample.gt_answer, sample.subset) == ("How many?", "34", "count")
    assert sample.images[0].name == "5.tif"
    assert notes == {"questions of other splits left out": 1}


def test_rsvqa_counts_are_its_questions_of_type_count(rsvqa):
    sample, = samples_of(rsvqa, "count")
    assert (sample.question, sample.gt_answer, sample.category) == ("How many?", "34", "count")
    questions, answers = (rsvqa / f"LR_split_test_{name}.json" for name in ("questions", "answers"))
    answers.write_text(answers.read_text().replace('"34"', '"many"'))
    refused(rsvqa, "count", "question 1", "'many' is no whole number")
    questions.write_text(questions.read_text().replace('"count"', '"area"'))
    notes = Counter()
    assert not samples_of(rsvqa, "count", notes=notes)
    assert notes["questions of another type than count left out"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# EarthReason

def mask_image(*boxes, size=SIZE):
    image = Image.new("L", size)
    for box in boxes:
        ImageDraw.Draw(image).rectangle(box, fill=255)
    return image


@pytest.fixture
def earthreason(tmp_path):
    for name, boxes in (("x", [(100, 25, 199, 49), (0, 0, 49, 24)]), ("y", [])):
        picture(tmp_path / "val" / "images" / f"{name}.jpg")
        (tmp_path / "val" / "labels").mkdir(exist_ok=True)
        mask_image(*boxes).save(tmp_path / "val" / "labels" / f"{name}.png")
        document(tmp_path / "val" / "QAs" / f"{name}.json", {
            "questions": ["Where to land?", "Where to dock?"], "answer": ["There."] * len(boxes)})
    return tmp_path


def test_earthreason_answers_with_the_pieces_of_the_mask(earthreason):
    one, two, nothing, _ = samples_of(earthreason, "seg")
    assert [two.question, two.gt_answer, two.gt_mask] == ["Where to dock?", one.gt_answer, one.gt_mask]
    assert nothing.gt_answer == "None" and not nothing.gt_boxes and nothing.think == "Nothing to find."
    gt_mask, instances = load_gt_mask(one), json.loads(one.gt_answer)
    assert sorted(instance["bbox_2d"] for instance in instances) == [[0, 0, 28, 56], [56, 56, 112, 112]]
    for instance in instances:
        (x1, y1, x2, y2), points = instance["bbox_2d"], [instance["keypoint1"], instance["keypoint2"]]
        assert points[0] != points[1]
        assert all(gt_mask[y, x] and x1 <= x < x2 and y1 <= y < y2 for x, y in points)
    assert samples_of(earthreason / "val", "seg")[0].gt_answer == one.gt_answer


def test_mask_whose_palette_sorts_its_colours_is_refused():
    """As quantize() writes it: index 0 is the target there, and the rest was taken for it."""
    quantized = Image.fromarray(np.pad(np.full((20, 20), 255, np.uint8), 30)).quantize(2)
    without_0 = Image.fromarray(np.pad(np.full((20, 20), 2, np.uint8), 30, constant_values=1))
    without_0.putpalette([255, 0, 0, 0, 0, 0, 255, 255, 255])
    for mask in (quantized, without_0):
        with pytest.raises(UserError, match="save it as gray values"):
            load_gt_mask(Sample("x", "seg", (), "", "", F, gt_mask=mask))


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "F", "P", "RGB", "RGBA", "LA"])
def test_mask_is_what_is_not_zero_in_any_mode(tmp_path, mode):
    """Read through its colours, a mask of indices was the whole image, or nothing, by what the palette shows."""
    target = np.zeros((F, F), bool)
    target[20:40, 50:90] = True
    mask = Image.fromarray(target.astype({"1": bool, "I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)))
    if mode == "P":
        mask.putpalette([255, 255, 255, 0, 0, 2])
    elif mode == "RGBA":  # white, and transparent beside the target
        mask = Image.fromarray(np.dstack([np.full((F, F, 3), 255, np.uint8), target * np.uint8(255)]))
    elif mode in ("RGB", "LA"):
        mask = mask.convert(mode)
    assert mask.mode == mode and (load_gt_mask(Sample("x", "seg", (), "", "", F, gt_mask=mask)) == target).all()


def test_mask_of_another_shape_is_refused_and_one_too_small_to_see_is_counted(folder):
    """The first was stretched. The second became an empty mask: its target said that there is nothing."""
    row = {"image": "a.png", "mask": "mask.png", "problem": "Where?"}
    Image.new("I;16", SIZE, 1).save(folder / "mask.png")
    assert samples_of(write(folder / "fs.jsonl", row), "seg")  # ids of objects need more than 8 bits
    mask_image((3, 3, 60, 40), size=SIZE[::-1]).save(folder / "mask.png")
    refused(write(folder / "fs.jsonl", row), "seg", "line 1: its mask has 50 x 200 pixels and its image 200 x 50")
    mask_image((3, 3, 3, 3), size=(SIZE[0] * 9, SIZE[1] * 9)).save(folder / "mask.png")
    notes = Counter()
    assert not samples_of(folder / "fs.jsonl", "seg", notes=notes)
    assert notes == {"masks too small to be seen at this size left out": 1}


def test_earthreason_has_shots_once_its_files_name_a_category(earthreason):
    """The release does not: its QAs hold `questions` and `answer`."""
    with pytest.raises(UserError, match="x.json.*has no category.*give each record a `category`"):
        load_samples(str(earthreason), "seg", F, shots=1)
    for name in "xy":
        document(earthreason / "val" / "QAs" / f"{name}.json", {"questions": ["Where?", "Where to?"], "category": name})
    assert [s.category for s in load_samples(str(earthreason), "seg", F, shots=1)] == ["x", "y"]


def test_earthreason_as_json_lines(folder):
    mask_image((100, 25, 199, 49), (3, 3, 6, 4)).save(folder / "mask.png")  # a speck beside the target is no instance
    sample, = samples_of(write(folder / "fs.jsonl", {"id": 1, "category": "pier", "image": "a.png", "mask": "mask.png",
                                                     "problem": "Where?", "bbox_list": [[100, 25, 199, 49]]}), "seg")
    assert [instance["bbox_2d"] for instance in json.loads(sample.gt_answer)] == [[56, 56, 112, 112]]
    assert sample.category == "pier"


def test_points_of_a_single_pixel_lie_on_it(folder):
    picture(folder / "a.png", (F, F))
    mask_image((70, 20, 70, 20), size=(F, F)).save(folder / "mask.png")
    sample, = samples_of(write(folder / "fs.jsonl", {"image": "a.png", "mask": "mask.png", "problem": "Where?"}), "seg")
    assert json.loads(sample.gt_answer) == [{"bbox_2d": [70, 20, 71, 21], "keypoint1": [70, 20], "keypoint2": [70, 20]}]


# ----------------------------------------------------------------------------------------------------------------------
# GEOBench-VLM, Dubai-CC, fMoW, class folders with splits, RRSIS-D

GEOBENCH = {  # from the data set's card
    "image_path": "images/single_347.bmp", "ground_truth": "Nimitz-class aircraft carrier", "ground_truth_option": "E",
    "options_list": ["Maestrale-class frigate", "Murasame-class destroyer", "Mega yacht",
                     "Kitty Hawk-class aircraft carrier", "Nimitz-class aircraft carrier"],
    "options": ("A. Maestrale-class frigate B. Murasame-class destroyer C. Mega yacht D. Kitty Hawk-class aircraft "
                "carrier E. Nimitz-class aircraft carrier"),
    "prompts": ["What type of ship is visible in this image?", "Which class does the vessel belong to?"],
    "task": "Ship Type Classification", "image_name": "single_347.bmp", "question_id": 0, "cls_description": ""}


def test_geobench_asks_for_the_letter_with_each_of_its_prompts(tmp_path):
    picture(tmp_path / "images" / "single_347.bmp")
    notes = Counter()
    source = document(tmp_path / "qa.json", [GEOBENCH, GEOBENCH | {"image_name": "xbd.png"}])
    first, second = samples_of(source, "vqa", notes=notes)
    assert first.question == f"{GEOBENCH['prompts'][0]} {GEOBENCH['options']}. Which letter is right?"
    assert second.question.startswith("Which class") and {s.gt_answer for s in (first, second)} == {"E"}
    assert first.subset == first.category == "Ship Type Classification" and first.split == "test"
    assert notes == {"questions without their image (the release lacks xBD's) left out": 1}
    several = document(tmp_path / "qa.json", [GEOBENCH | {"image_path": ["images/1.png", "images/2.png"]}])
    refused(several, "vqa", "only questions about one image")


def test_geobench_table_holds_its_images(tmp_path):
    cell = {"bytes": picture_bytes(np.random.default_rng(0)), "path": None}
    datasets = pytest.importorskip("datasets", reason="EarthDial's shards and parquet are read by datasets")
    rows = [GEOBENCH | {"image": cell}, GEOBENCH | {"image": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "Single.parquet")
    notes = Counter()
    assert len(samples_of(tmp_path / "Single.parquet", "vqa", notes=notes)) == 2 and notes.total() == 1


def test_what_other_programs_leave_in_class_folders_is_no_class(tmp_path):
    """Jupyter's .ipynb_checkpoints once became a class of the question; a trained model fell from 0.71 to 0.24 by it."""
    for name in ("Forest/1", "River/1", ".ipynb_checkpoints/1", "__MACOSX/1"):
        picture(tmp_path / "all" / f"{name}.jpg")
    (tmp_path / "all" / "River" / "._1.jpg").write_bytes(b"of a Mac")
    (tmp_path / "all" / "Empty").mkdir()
    (tmp_path / "all" / "River" / "old").mkdir()
    (tmp_path / "all" / "River" / "1.jp2").write_bytes(b"of a Mac")
    notes = Counter()
    samples = samples_of(tmp_path / "all", "cls", notes=notes)
    assert [s.gt_answer for s in samples] == ["Forest", "River"] and samples[0].question.endswith("Classes: Forest, River.")
    assert notes == {"folders without images left out": 1, "folders within those of the classes left out": 1,
                     "files of other types left out": 1}

    for name in ("train/River/1", "val/River/2", ".ipynb_checkpoints/3"):
        picture(tmp_path / "splits" / f"{name}.jpg")
    assert [s.split for s in samples_of(tmp_path / "splits", "cls")] == ["train", "val"]
    refused(tmp_path / "all" / "River", "cls", "--data is the folder above")


def test_grey_of_16_bits_is_refused_at_the_start(tmp_path):
    """Radar comes in it. It once ended a run at the step that drew it."""
    (tmp_path / "Sea").mkdir()
    for name, dtype in (("1.png", np.uint16), ("2.tif", np.float32)):
        file = tmp_path / "Sea" / name
        Image.fromarray(np.zeros((8, 8), dtype)).save(file)
        refused(tmp_path, "cls", "more than 8 bits per band; convert it to 8 first")
        file.unlink()


def test_colours_of_16_bits_are_refused_at_the_start(tmp_path):
    """PIL keeps their upper 8: reflectances up to 3,000 became values up to 11, nearly black, without a word."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    file = tmp_path / "River" / "1.png"
    file.parent.mkdir()
    pixels = b"".join(b"\0" + struct.pack(">24H", *range(24)) for _ in range(8))  # 8 x 8, each line without a filter
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))
    assert Image.open(file).mode == "RGB"
    refused(tmp_path, "cls", "more than 8 bits per band; convert it to 8 first")
    with pytest.raises(UserError, match="more than 8 bits"):  # tools/ask.py reads no source
        load_images(Sample("x", "cls", (file,), "", "", F))
    with pytest.raises(ValueError, match="more than 8 bits"):  # an image of a table
        size_of(io.BytesIO(file.read_bytes()))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_jpeg_2000_of_more_than_8_bits_is_refused(tmp_path, bits):
    """Sentinel-2 comes in it."""
    file = tmp_path / "a.jp2"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
    before, siz, after = file.read_bytes().partition(b"\xff\x4f\xff\x51")
    file.write_bytes(before + siz + after[:38] + bytes([bits - 1]) + after[39:])
    with contextlib.nullcontext() if bits == 8 else pytest.raises(UserError, match="more than 8 bits per band"):
        read_image_size(file, "here")


def test_pages_of_a_tiff_are_refused_where_they_may_be_bands(tmp_path):
    """As tifffile writes (13, H, W); the first was read as a gray image. Overviews of a page are smaller."""
    picture(tmp_path / "a.tif", (40, 20))
    page, overview = Image.new("L", (40, 20)), Image.new("L", (20, 10))
    page.save(tmp_path / "overview.tif", save_all=True, append_images=[overview])
    assert read_image_size(tmp_path / "overview.tif", "here") == read_image_size(tmp_path / "a.tif", "here")
    page.save(tmp_path / "bands.tif", save_all=True, append_images=[page])
    with pytest.raises(UserError, match="2 pages"):
        read_image_size(tmp_path / "bands.tif", "here")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_an_image_that_was_cut_off_is_refused_at_the_start(tmp_path, suffix):
    """Half a download once ended a run at the step that drew it. What some cameras add behind the image is harmless."""
    file = tmp_path / "River" / f"1.{suffix}"
    picture(file)
    whole = file.read_bytes()
    file.write_bytes(whole + bytes(5000))
    assert len(samples_of(tmp_path, "cls")) == 1
    file.write_bytes(whole[:-40])
    refused(tmp_path, "cls", f"1.{suffix} cannot be read")


def test_dubai_cc_shows_both_years(tmp_path):
    source = make_dubai(tmp_path, {"11x37": "train"}, np.random.default_rng(0))[0]
    sample, = samples_of(source, "change")
    assert [image.parent.name for image in sample.images] == ["500_2000", "500_2010"]
    assert len(sample.gt_texts) == 5 and sample.gt_answer == "caption 0 ."
    refused(source, "cap", "Dubai-CC serves change")


def test_fmow_shows_the_first_images_of_a_place_by_number(tmp_path):
    for i in (0, 1, 2, 10):
        picture(tmp_path / "val" / "toll_booth" / "toll_booth_7" / f"toll_booth_7_{i}_rgb.jpg")
    make_fmow_place(tmp_path / "train", "3", np.random.default_rng(0))
    (tmp_path / "test" / "0011978").mkdir(parents=True)
    picture(tmp_path / "test" / "0011978" / "0011978_0_rgb.jpg")
    airport, booth = samples_of(tmp_path, "cls")
    assert [image.stem[-6:] for image in booth.images] == ["_0_rgb", "_1_rgb", "_2_rgb", "10_rgb"]
    assert (booth.gt_answer, booth.split, airport.split) == ("toll_booth", "val", "train")
    assert booth.question.endswith("Classes: airport, toll_booth.") and len(airport.images) == 3
    assert [s.id for s in samples_of(tmp_path / "val", "cls")] == [booth.id]


def test_class_folders_with_splits_ask_for_the_classes_of_all(tmp_path):
    for path in ("train/2750/Forest/1.png", "train/2750/River/2.png", "test/Forest/1.png", "val/Sea/3.png"):
        picture(tmp_path / path)
    samples = samples_of(tmp_path, "cls")
    assert [(s.id, s.split, s.category) for s in samples] == [
        ("test/Forest/1.png", "test", "Forest"), ("train/Forest/1.png", "train", "Forest"),
        ("train/River/2.png", "train", "River"), ("val/Sea/3.png", "val", "Sea")]
    assert {s.question for s in samples} == {"Which class does this scene belong to? Classes: Forest, River, Sea."}
    assert [(s.id, s.split) for s in samples_of(tmp_path / "train", "cls")] == [
        ("Forest/1.png", "train"), ("River/2.png", "train")]


def test_pickle_of_rrsis_d_is_not_read(tmp_path):
    (tmp_path / "rrsisd").mkdir()
    (tmp_path / "rrsisd" / "refs(unc).p").write_bytes(b"c__builtin__\nexit\n(I7\ntR.")
    document(tmp_path / "rrsisd" / "instances.json", COCO)
    for source in (tmp_path, tmp_path / "rrsisd", *(tmp_path / "rrsisd").iterdir()):
        for task in ("seg", "det"):
            refused(source, task, r"RRSIS-D.*pickle.*not read; write JSON lines of `image`, `mask`, `problem`")
    picture(tmp_path / "rrsisd" / "a.png")
    assert len(samples_of(write(tmp_path / "rrsisd" / "mine.jsonl", chat("?", "3")), "vqa")) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Published splits: no held-out image is trained on

FOLDER_SPLITS = {"train": "train", "tier1": "train", "tier3": "train", "val": "val", "valid": "val",
                 "validation": "val", "hold": "val", "test": "test"}


def random_image(path, rng):
    picture(path, (16, 16), tuple(int(v) for v in rng.integers(256, size=3)))


def make_xbd(folder, name, rng):
    stem = f"{rng.choice(['socal-fire', 'palu-tsunami'])}_{name}"
    for when in ("pre", "post"):
        random_image(folder / "images" / f"{stem}_{when}_disaster.png", rng)
    document(folder / "labels" / f"{stem}_post_disaster.json",
             {"features": {"xy": [polygon(2, 2, 12, 12, "destroyed")]}})
    return folder / "images" / f"{stem}_pre_disaster.png"


def make_earthreason(folder, name, rng):
    random_image(folder / "images" / f"{name}.jpg", rng)
    (folder / "labels").mkdir(exist_ok=True)
    mask_image((2, 2, 9, 9), size=(16, 16)).save(folder / "labels" / f"{name}.png")
    document(folder / "QAs" / f"{name}.json", {"questions": ["Where?", "Where to?"]})
    return folder / "images" / f"{name}.jpg"


def make_dota(folder, name, rng):
    random_image(folder / "images" / f"{name}.png", rng)
    write(folder / "labelTxt-v1.0" / f"{name}.txt", "gsd:0.1", "2 2 9 2 9 9 2 9 ship 0")
    return folder / "images" / f"{name}.png"


@pytest.mark.parametrize("make, task", [(make_xbd, "det"), (make_earthreason, "seg"), (make_dota, "ovd")])
def test_folder_of_a_split_as_source_carries_the_split_of_its_name(tmp_path, monkeypatch, make, task):
    for name, split in (FOLDER_SPLITS | {"testing": ""}).items():  # the last one is no published name
        make(tmp_path / name, "1", np.random.default_rng(0))
        monkeypatch.chdir(tmp_path / name)
        assert {s.split for path in (tmp_path / name, ".") for s in samples_of(path, task)} == {split}
        if split in ("val", "test"):
            with pytest.raises(UserError, match=f"no samples of task {task} in the train split"):
                load_samples(str(tmp_path / name), task, F, split="train")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("lists", [("train", "val", "test"), ("train", "val")])
def test_no_image_of_a_held_out_object_of_dior_rsvg_is_trained_on(tmp_path, lists, seed):
    """The published lists give the objects of one image to several splits. The first two images here are whole."""
    rng = np.random.default_rng(seed)
    names = sorted(f"{number:05d}" for number in rng.choice(10**5, 12, replace=False))
    splits = [["train"] * 2, [lists[-1]] * 2, *(rng.choice(lists, rng.integers(1, 4)) for _ in names[2:])]
    objects = []  # image, split
    for name, of_image in zip(names, splits):
        random_image(tmp_path / "JPEGImages" / f"{name}.jpg", rng)
        xml = "".join(OBJECT.format(2, 2, 9, 9, name="ship") for _ in of_image)
        write(tmp_path / "Annotations" / f"{name}.xml", XML.format(name=name, objects=xml, size=(16, 16)))
        objects += [(tmp_path / "JPEGImages" / f"{name}.jpg", split) for split in of_image]
    for split in lists:
        write(tmp_path / f"{split}.txt", *(str(i) for i, (_, s) in enumerate(objects) if s == split))
    held = {image for image, split in objects if split != "train"}
    kept = [image for image, split in objects if split == "train" and image not in held]
    for task in ("rec", "det"):
        train = load_samples(str(tmp_path), task, F, split="train")
        assert sorted(s.images[0] for s in train) == kept
        assert [s.images[0] for s in sorted(load_samples(str(tmp_path), task, F, split="heldout"), key=lambda s: s.id)] \
            == [image for image, split in objects if split == "val"]
        assert len(load_samples(str(tmp_path), task, F)) == len(objects)
        for split in lists:  # as --data: this list as it is
            samples = samples_of(tmp_path / f"{split}.txt", task)
            assert [s.images[0] for s in samples] == [image for image, s in objects if s == split]
            assert {s.split for s in samples} == {split}
        with pytest.raises(UserError, match=f"no samples of task {task} in the train split"):
            load_samples(str(tmp_path / f"{lists[-1]}.txt"), task, F, split="train")


def test_list_of_dior_rsvg_for_more_objects_than_the_folder_holds_is_refused(dior):
    write(dior / "train.txt", "1", "3", "4")
    refused(dior, "rec", "object 4 is listed, but Annotations holds 4")


@pytest.mark.parametrize("name, split", [
    ("LR_split_train", "train"), ("LR_split_val", "val"), ("USGS_split_test", "test"), ("USGS_split_test_phili", "test"),
    ("all", ""), ("LR_reduced", "")])
def test_rsvqa_file_carries_the_split_of_its_name(rsvqa, name, split):
    for kind in ("questions", "answers"):
        (rsvqa / f"LR_split_test_{kind}.json").rename(rsvqa / f"{name}_{kind}.json")
    for source in (rsvqa, rsvqa / f"{name}_questions.json"):
        assert [s.split for s in samples_of(source, "vqa")] == [split]
        if split in ("val", "test"):
            with pytest.raises(UserError, match="no samples of task vqa in the train split"):
                load_samples(str(source), "vqa", F, split="train")
    document(rsvqa / "LR_split_another_questions.json", {})
    refused(rsvqa, "vqa", "name one of them")


@pytest.mark.parametrize("name, split", [
    ("VRSBench_EVAL_referring.json", "test"), ("VRSBench_EVAL_Cap.jsonl", "test"), ("VRSBench_train.json", "train"),
    ("referring.json", ""), ("test.json", ""), ("train.json", "")])
def test_vrsbench_file_carries_the_split_of_its_name(folder, name, split):
    assert [s.split for s in samples_of(write(folder / name, VRSBENCH), "rec")] == [split]
    own = write(folder / name, VRSBENCH | {"split": "val"})
    assert [s.split for s in samples_of(own, "rec")] == ["val"]


# ----------------------------------------------------------------------------------------------------------------------
# Cross-view pairs

def cvusa(folder, n):
    for i in range(n):
        picture(folder / f"aerial{i}.jpg", (8, 8))
        picture(folder / f"ground{i}.jpg", (24, 8))
    return write(folder / "data.csv", *(f"aerial{i}.jpg,ground{i}.jpg,label{i}.png" for i in range(n)))


def right_image(sample):
    return sample.images[1 + sample.choices.index(sample.gt_answer)]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 18, 41])
def test_letters_of_pairs_are_even_and_the_right_image_is_once_among_them(tmp_path, n):
    samples = samples_of(cvusa(tmp_path, n), "pair")
    k = {2: 2, 3: 2, 4: 3}.get(n, 4)  # of few places one is held out, and training shows the others alone
    assert len(samples) == n and {s.choices for s in samples} == {tuple("ABCD"[:k])}
    counts = Counter(s.gt_answer for s in samples)
    assert max(counts.values()) - min(counts[letter] for letter in "ABCD"[:k]) <= 1
    for i, s in enumerate(samples):
        assert s.images[0].name == f"ground{i}.jpg" and right_image(s).name == f"aerial{i}.jpg"
        assert len(set(s.images)) == len(s.images) == k + 1
    assert samples == samples_of(tmp_path, "pair")


def test_wrong_images_differ_from_place_to_place_without_coordinates(tmp_path):
    drawn = Counter(image.name for s in samples_of(cvusa(tmp_path, 40), "pair") for image in s.images[1:])
    assert len(drawn) == 40 and max(drawn.values()) < 12  # the mean is 4


@pytest.fixture
def cities(tmp_path):
    """Places along a street through the date line, 0.001 degrees apart, in shuffled order. The last two share a
    position."""
    rng, lines = np.random.default_rng(0), []
    for i in rng.permutation(12):
        lon = (179.995 + .001 * min(int(i), 10) + 180) % 360 - 180
        for kind in ("sat_images", "pano_images"):
            picture(tmp_path / "city" / kind / f"{i}.png", (8, 8))
        lines.append(f"{i},{lon:.3f},10.0,city,city/sat_images/{i}.png,city/pano_images/{i}.png")
    write(tmp_path / "city" / "img_info.csv", *lines)
    return tmp_path


def test_wrong_images_are_the_nearest_places_of_the_same_side_where_there_are_coordinates(cities):
    train, held_out, _ = load_splits([Source(str(cities), None, None)], [], ["pair"], F)["pair"]
    sides = [{int(s.images[0].stem) for s in side} for side in (train, held_out)]

    def distances(i, places):
        return sorted(abs(min(i, 10) - min(j, 10)) for j in places if min(i, 10) != min(j, 10))

    for sample in samples_of(cities, "pair"):
        i = int(sample.images[0].stem)
        side = next(side for side in sides if i in side)
        wrong = {int(image.stem) for image in sample.images[1:] if image != right_image(sample)}
        expected = (distances(i, side) + distances(i, set(range(12)) - side))[:3]
        assert distances(i, wrong) == sorted(expected) and len(wrong) == 3
        assert sample.category == "city" and right_image(sample).stem == sample.images[0].stem
    for source in (cities / "city", cities / "city" / "img_info.csv"):
        assert samples_of(source, "pair") == samples_of(cities, "pair")


@pytest.mark.parametrize("choices", [2, 5, 10])
@pytest.mark.parametrize("negatives", ["near", "random"])
def test_candidates_are_as_many_and_as_near_as_the_flags_say(cities, choices, negatives):
    for i in range(100, 140):
        for kind in ("sat_images", "pano_images"):
            picture(cities / "city" / kind / f"{i}.png", (8, 8))
        with (cities / "city" / "img_info.csv").open("a") as file:
            file.write(f"\n{i},{i / 1000},10.0,city,city/sat_images/{i}.png,city/pano_images/{i}.png")
    sources = parse_sources([str(cities)], choices=choices, negatives=negatives)
    train, held_out, _ = load_splits(sources, [], ["pair"], F)["pair"]
    assert len(train) + len(held_out) == 52
    for s in train:
        assert len(s.choices) == choices and len(set(s.images)) == choices + 1
        assert right_image(s).stem == s.images[0].stem
        assert not {"10", "11"} <= {image.stem for image in s.images} or s.images[0].stem not in ("10", "11")
    lengths = [abs(int(image.stem) - int(s.images[0].stem)) for s in train for image in s.images[1:]]
    assert (max(lengths) > 100) == (negatives == "random")  # the two streets are far apart


@pytest.mark.parametrize("flags, says", [
    ({"choices": 5}, "--choices 5: the questions of .* have 4 candidates, as it has too few places"),
    ({"negatives": "near"}, "places without a position; leave out --negatives near")])
def test_candidates_that_a_table_does_not_have_are_refused(tmp_path, flags, says):
    """With 5 places one is held out, so a training question can have four candidates."""
    with pytest.raises(UserError, match=says):
        load_splits(parse_sources([str(cvusa(tmp_path, 5))], **flags), [], ["pair"], F)


@pytest.mark.parametrize("flags", [{"choices": 5}, {"negatives": "random"}])
def test_flags_of_candidates_that_change_nothing_are_refused(folder, flags):
    record = chat("<image><image><image>A or B?", "A") | {"image": ["a.png", "b.png", "a.png"]}
    for source, task, says in (("synthetic", "pair", "leave"), (str(write(folder / "p.jsonl", record)), "pair", "leave"),
                               ("synthetic", "det", "pair, which is not among --task")):
        with pytest.raises(UserError, match=says):
            load_splits(parse_sources([source], **flags), [], [task], F)


@pytest.mark.parametrize("seed", range(2))
def test_places_that_share_images_are_on_one_side(tmp_path, seed):
    """The side was once drawn by the name of the ground image alone. Two ground images of one satellite image could be
    on either side, and training showed, as the right answer, the image that held-out questions ask for."""
    rng = np.random.default_rng(seed)
    names = [f"{number}.jpg" for number in rng.choice(10**6, 60, replace=False)]
    links = sorted({(int(g), int(s)) for g, s in rng.integers(60, size=(40, 2))})
    for i, name in enumerate(names):
        picture(tmp_path / f"sat{i}.jpg", (8, 8))
        picture(tmp_path / name, (24, 8))
    source = write(tmp_path / "data.csv", *(f"sat{s}.jpg,{names[g]}" for g, s in links))
    train, held_out, _ = load_splits([Source(str(source), None, None)], [], ["pair"], F)["pair"]
    shown = {image.name for sample in train for image in sample.images}
    assert len(train) > len(held_out) > 0
    assert not shown & {image.name for s in held_out for image in (s.images[0], right_image(s))}


def test_geo_asks_for_the_positions_of_ground_images_and_holds_out_the_places_of_pair(cities):
    splits = load_splits([Source(str(cities), None, None)], [], ["pair", "geo"], F)
    for side in ("train", "held_out"):
        assert {s.images[0] for s in getattr(splits["geo"], side)} == {s.images[0] for s in getattr(splits["pair"], side)}
    for sample in samples_of(cities, "geo"):
        i = min(int(sample.images[0].stem), 10)
        assert sample.images[0].parent.name == "pano_images" and len(sample.images) == 1
        latitude, longitude = map(float, sample.gt_answer.split(","))
        assert latitude == 10 and longitude == pytest.approx(179.995 + .001 * i - 360 * (i >= 5))


def test_geo_needs_positions(folder):
    refused(cvusa(folder, 4), "geo", "data.csv: line 1", "no position, so it serves pair, not geo")
    refused(write(folder / "b.jsonl", chat("Where is this?", "Paris")), "geo", "'Paris' is no latitude and longitude")


def haversine_m(a, b):
    """Of two (latitude, longitude) in degrees: 2 R asin sqrt(sin^2(dlat / 2) + cos cos sin^2(dlon / 2))."""
    (lat_a, lon_a), (lat_b, lon_b) = ([math.radians(v) for v in p] for p in (a, b))
    h = (math.sin((lat_b - lat_a) / 2) ** 2
         + math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2)
    return 2 * 6371008.8 * math.asin(math.sqrt(h))


def exemplars(source, out, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["scaffold.py", "--data", str(source), "--out", str(out), *flags])
    scaffold.main()
    return samples_of(out, "pair", image_size=448)


@pytest.mark.parametrize("negatives", ["near", "random"])
def test_every_statement_of_an_exemplar_follows_from_the_table(tmp_path, monkeypatch, negatives):
    rng, table = np.random.default_rng(0), {}
    for city in ("Oslo", "St. John's", "Quito"):
        latitude, longitude = rng.uniform(-89, 89), rng.uniform(-180, 180)
        for i in range(20):
            name = f"{city[:2]}{i}"
            far = rng.uniform(-180, 180, 2) * (.5, 1) if i > 14 else rng.normal((latitude, longitude), .005)
            table[name] = (city, *map(float, far))
            for kind in ("sat", "pano"):
                picture(tmp_path / "all" / city / kind / f"{name}.png", (8, 8))
        write(tmp_path / "all" / city / "img_info.csv", *(
            f"{n},{lon},{lat},{c},{c}/sat/{n}.png,{c}/pano/{n}.png" for n, (c, lat, lon) in table.items() if c == city))
    found = exemplars(tmp_path / "all", tmp_path / "out/a.jsonl", monkeypatch, "--choices", "5", "--negatives", negatives)
    assert len(found) == len(table) and len({s.think for s in found}) == len(table)
    for s in found:
        city, *place = table[s.images[0].stem]
        statements = re.fullmatch(
            r"Cue: the ground image was taken in (?P<city>.+), at (?P<lat>\S+), (?P<lon>\S+)\. "
            r"Inference: that is the (?P<hemisphere>\w+) hemisphere and the (?P<zone>\w+) zone, where the noon sun is "
            r"(?P<sun>[\w ]+)\. Check: the distances to the candidates are (?P<distances>.+)\. "
            r"Decision: (?P<letter>[A-E]) shows the same place\.", s.think)
        north, width = place[0] > 0, abs(place[0])
        assert statements["city"] == city == s.category
        assert [float(statements[key]) for key in ("lat", "lon")] == pytest.approx(place, abs=.00051)
        assert statements["hemisphere"] == ("northern" if north else "southern")
        assert statements["zone"] == ("tropical" if width < 23.44 else "temperate" if width < 66.56 else "polar")
        assert statements["sun"] == ("high" if width < 23.44 else "in the south" if north else "in the north")
        assert right_image(s).stem == s.images[0].stem and statements["letter"] == s.gt_answer
        stated = [part.split() for part in statements["distances"].split(", ")]
        assert [letter for letter, *_ in stated] == list(s.choices) == list("ABCDE")
        for (letter, number, unit), image in zip(stated, s.images[1:], strict=True):
            metres = haversine_m(place, table[image.stem][1:])
            rounding = {"km": 50, "m": .5}[unit]
            assert float(number) * (1000 if unit == "km" else 1) == pytest.approx(metres, abs=1.01 * rounding)
            assert (number == "0") == (letter == s.gt_answer)


def test_exemplars_are_held_out_as_their_places_are(cities, tmp_path, monkeypatch):
    """The file of exemplars has a split of its own, so SFT on it shows nothing of what GRPO on the table holds out."""
    exemplars(cities, tmp_path / "out.jsonl", monkeypatch)
    ours, theirs = (load_splits([Source(str(source), None, None)], [], ["pair"], 448)["pair"]
                    for source in (tmp_path / "out.jsonl", cities))
    for side in ("train", "held_out"):
        assert {s.images[0].resolve() for s in getattr(ours, side)} == {s.images[0] for s in getattr(theirs, side)}


def test_exemplars_without_positions_state_no_place(tmp_path, monkeypatch):
    for s in exemplars(cvusa(tmp_path, 9), tmp_path / "out.jsonl", monkeypatch):
        others = [letter for letter in "ABCD" if letter != s.gt_answer]
        assert s.think == f"Check: other places are shown by {', '.join(others)}. Decision: {s.gt_answer} shows the same place."


def test_exemplars_need_a_table_and_tell_candidates_apart(folder, tmp_path, monkeypatch, capsys):
    record = chat("<image><image><image>A or B?", "A") | {"image": ["a.png", "b.png", "a.png"]}
    with pytest.raises(UserError, match="no table of places"):
        exemplars(write(folder / "p.jsonl", record), tmp_path / "out.jsonl", monkeypatch)
    for i in range(8):
        picture(tmp_path / f"x/{i}.png", (8, 8))
        picture(tmp_path / f"y/{i}.png", (8, 8))
    write(tmp_path / "x/img_info.csv", *(f"n,{max(i, 1) / 10 + i * 1e-6},10.0,z,x/{i}.png,y/{i}.png" for i in range(8)))
    assert len(exemplars(tmp_path / "x/img_info.csv", tmp_path / "out.jsonl", monkeypatch, "--choices", "2")) < 8
    assert "left out: a wrong candidate is less than 0.5 m away" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Every format: what its rule holds out, and that none of it is trained on. A maker writes images of random names and
# content and their annotations for {name: split}. It returns the source, the folder of images or None, and the first
# image of each name: its path, or, in a table, the hash of its content.

def picture_bytes(rng):
    content = io.BytesIO()
    Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def make_folders(make_image):
    """The maker of a layout of folders, one for each split."""
    def make(root, split_of, rng):
        return root, None, {name: make_image(root / split, name, rng) for name, split in split_of.items()}
    return make


def make_records(record, file="a.json", images="images", envelope=list, has_split=True):
    """The maker of a file of records. `record` is a function of the image's name, each image has two of them, and
    `envelope` turns their list into the document."""
    def make(root, split_of, rng):
        rows, firsts = [], {}
        for name, split in split_of.items():
            firsts[name] = root / images / f"{name}.png"
            random_image(firsts[name], rng)
            rows += [record(name) | ({"split": split} if split and has_split else {})] * 2
        return document(root / file, envelope(rows), indent=1 if envelope is not list else None), root / images, firsts
    return make


def make_table(columns, file, n_images=1):
    """The maker of parquet, or of an EarthDial shard if `file` has no ending. `columns` is a function of the images'
    cells; there are two rows of each image."""
    def make(root, split_of, rng):
        datasets = pytest.importorskip("datasets", reason="EarthDial's shards and parquet are read by datasets")
        rows, firsts = [], {}
        for name in split_of:
            content = [picture_bytes(rng) for _ in range(n_images)]
            firsts[name] = f"{zlib.crc32(content[0]):08x}"
            rows += [columns([{"bytes": c, "path": None} for c in content])] * 2
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if not file.endswith(".parquet"):
            datasets.Dataset.from_list(rows).save_to_disk(root / file)
        else:
            datasets.Dataset.from_list(rows).to_parquet(root / file)
        return root / file, None, firsts
    return make


def make_class_image(folder, name, rng):
    path = folder / str(rng.choice(["Forest", "River"])) / f"{name}.png"
    random_image(path, rng)
    return path


def make_nwpu(folder, name, rng):
    random_image(folder / "positive image set" / f"{name}.jpg", rng)
    write(folder / "ground truth" / f"{name}.txt", "(2,2),(9,9),1", "(2,2),(9,9),2")
    return folder / "positive image set" / f"{name}.jpg"


def make_fmow_place(folder, name, rng):
    place = folder / "airport" / f"airport_{name}"
    for i in range(3):
        random_image(place / f"{place.name}_{i}_rgb.jpg", rng)
        random_image(place / f"{place.name}_{i}_msrgb.jpg", rng)
    return place / f"{place.name}_0_rgb.jpg"


def make_dubai(root, split_of, rng):
    rows = {"train": [], "val": [], "test": []}
    for name, split in split_of.items():
        for year in (2000, 2010):
            random_image(root / "imgs_tiles" / "RGB" / f"500_{year}" / f"{name}.tif", rng)
        rows[split].append({"filename": f"{name}.tif", "sentences": SENTENCES})
    for split, named in (("train", "Train"), ("val", "Validation"), ("test", "Test")):
        document(root / "description_jsontr_te_val" / f"{named}_Dubai_CC.json", {"images": rows[split]})
    return root, None, {name: root / "imgs_tiles" / "RGB" / "500_2000" / f"{name}.tif" for name in split_of}


def make_levir(has_key):
    def make(root, split_of, rng):
        rows = []
        for name, split in split_of.items():
            for date in "AB":
                random_image(root / "images" / split / date / f"{name}.png", rng)
            rows.append({"filepath": split, "filename": f"{name}.png", "changeflag": 1, "sentences": SENTENCES}
                        | ({"split": split} if has_key else {}))
        document(root / "LevirCCcaptions.json", {"images": rows}, indent=1)
        return root, None, {name: root / "images" / split / "A" / f"{name}.png" for name, split in split_of.items()}
    return make


def make_rsvqa(named):
    def make(root, split_of, rng):
        questions, answers = [], []
        for name in split_of:
            random_image(root / "Images_LR" / f"{int(name)}.tif", rng)
            for i in (2 * int(name), 2 * int(name) + 1):
                questions.append({"id": i, "img_id": int(name), "type": "count", "question": "How many?"})
                answers.append({"question_id": i, "answer": "3"})
        document(root / f"{named}_questions.json", {"questions": questions})
        document(root / f"{named}_answers.json", {"answers": answers})
        return root, None, {name: root / "Images_LR" / f"{int(name)}.tif" for name in split_of}
    return make


def make_places(has_positions):
    def make(root, split_of, rng):
        lines = []
        for name in split_of:
            for kind in ("sat", "pano"):
                random_image(root / "city" / kind / f"{name}.jpg", rng)
            names = f"city/sat/{name}.jpg,city/pano/{name}.jpg"
            lines.append(f"{name},{rng.uniform(0, 1)},{rng.uniform(0, 1)},city,{names}" if has_positions else names)
        write(root / ("city/img_info.csv" if has_positions else "data.csv"), *lines)
        return root, None, {name: root / "city" / "pano" / f"{name}.jpg" for name in split_of}
    return make


def make_mask_records(root, split_of, rng):
    mask_image((2, 2, 9, 9), size=(16, 16)).save(root / "mask.png")
    records = make_records(lambda name: {"image": f"{name}.png", "mask": "../mask.png", "problem": "Where?"})
    return records(root, split_of, rng)


def coco(rows):
    images = [{"id": i, "file_name": row["file_name"]} for i, row in enumerate(rows[::2])]
    objects = [{"image_id": i, "category_id": 1, "bbox": [2, 2, 7, 7]} for i in range(len(images))]
    return {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "ship"}]}


def make_geobench(root, split_of, rng):
    source, _, firsts = make_records(geobench, "qa.json")(root, split_of, rng)
    return source, root, firsts


def geobench(name):
    return GEOBENCH | {"image_path": f"images/{name}.png", "image_name": f"{name}.png"}


TALK = ("<image>How many?", "3")
BENCH = {"question_id": "1", "question": "2 ships", "type": "ref", "ground_truth": [[[2, 2], [9, 2], [9, 9], [2, 9]]]}
CAPTIONS = {"sentences": SENTENCES}
KARPATHY = make_records(lambda name: {"filename": f"{name}.png", **CAPTIONS}, envelope=lambda rows: {"images": rows})
NWPU_CAPTIONS = make_records(lambda name: {"filename": f"{name}.png", "raw": "A pier."}, envelope=lambda r: {"pier": r})
ANY, NONE = ("train", "val", "test"), ("",)
LAYOUTS = {  # format -> (maker, tasks, the splits that its images have; "" where a tenth of them is held out)
    "conversations": (make_records(lambda name: chat(*TALK, image=f"{name}.png")), ("vqa", "cap"), NONE),
    "conversations with split": (make_records(lambda name: chat(*TALK, image=f"{name}.png")), ("vqa", "cap"), ANY),
    "VRSBench_train": (make_records(lambda name: chat(*TALK, image=f"{name}.png"), "VRSBench_train.json",
                                    has_split=False), ("vqa",), ("train",)),
    "VRSBench_EVAL": (make_records(lambda name: VRSBENCH | {"image_id": f"{name}.png"}, "VRSBench_EVAL_referring.json",
                                   has_split=False), ("rec", "det"), ("test",)),
    "GeoChat-Bench": (make_records(lambda name: BENCH | {"image_id": name}), ("det", "rec"), NONE),
    "EarthDial": (make_table(lambda cells: EARTHDIAL["vqa"][0] | {"jpg": cells[0]}, "GeoChat"), ("vqa",), NONE),
    "EarthDial's pairs": (make_table(lambda cells: EARTHDIAL["change"][0] | {"jpg_A": cells[0], "jpg_B": cells[1]},
                                     "LEVIR", 2), ("change",), NONE),
    "EarthDial, test": (make_table(lambda cells: EARTHDIAL["vqa"][0] | {"jpg": cells[0]}, "GeoChat/test"),
                        ("vqa",), ("test",)),
    "EarthDial, training": (make_table(lambda cells: {"jpg": cells[0], "conversations": json.dumps(
        chat(*TALK)["conversations"])}, "data/train-00000-of-00001.parquet"), ("vqa",), ("train",)),
    "few shots": (make_records(lambda name: {"image": f"{name}.png", "problem": "?", "solution": [2, 2, 9, 9]}),
                  ("rec", "det"), NONE),
    **{f"few shots, {split}": (make_table(lambda cells: {"images": cells, "problem": "?", "answer": [2., 2., 9., 9.]},
                                          f"data/{split}-00000-of-00001.parquet"), ("rec",), splits)
       for split, splits in (("train_10shot", ("train",)), ("val", ("val",)))},
    "COCO": (make_records(lambda name: {"file_name": f"{name}.png"}, envelope=coco), ("ovd", "det"), NONE),
    "NWPU VHR-10": (make_folders(make_nwpu), ("det", "ovd"), NONE),
    "DOTA": (make_folders(make_dota), ("det", "ovd"), NONE),
    "DOTA of train and val": (make_folders(make_dota), ("det", "ovd"), ("train", "val")),
    "xBD": (make_folders(make_xbd), ("cls", "det"), NONE),
    "xBD of tier3, hold and test": (make_folders(make_xbd), ("cls", "det"), ("train", "tier3", "hold", "test")),
    **{f"RSVQA, {named}": (make_rsvqa(named), ("vqa",), splits)
       for named, splits in (("all", NONE), ("LR_split_val", ("val",)), ("USGS_split_test_phili", ("test",)))},
    "RSICD": (KARPATHY, ("cap",), ANY),
    "UCM-Captions": (KARPATHY, ("cap",), NONE),
    "NWPU-Captions": (NWPU_CAPTIONS, ("cap",), ANY),
    "captions": (make_records(lambda name: {"image": f"{name}.png", "captions": ["A pier."]}), ("cap",), NONE),
    "LEVIR-CC": (make_levir(has_key=True), ("change",), ANY),
    "LEVIR-CC without split": (make_levir(has_key=False), ("change",), ANY),
    "Dubai-CC": (make_dubai, ("change",), ANY),
    "EarthReason": (make_folders(make_earthreason), ("seg",), ANY),
    "EarthReason, JSON": (make_mask_records, ("seg",), NONE),
    "GEOBench-VLM": (make_geobench, ("vqa",), ("test",)),
    "CVUSA": (make_places(has_positions=False), ("pair",), NONE),
    "CV-Cities": (make_places(has_positions=True), ("pair",), NONE),
    "class folders": (make_folders(make_class_image), ("cls",), NONE),
    "class folders of train and test": (make_folders(make_class_image), ("cls",), ("train", "test")),
    "fMoW": (make_folders(make_fmow_place), ("cls",), ("train", "val")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_format_holds_out_by_its_rule_and_never_trains_on_what_it_holds_out(tmp_path, layout):
    """Cross-view pairs once showed the satellite image of a held-out place as a wrong candidate in training."""
    make, tasks, splits = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    names = [f"{number:08d}" for number in rng.choice(10**8, 12, replace=False)]
    split_of = dict(zip(names, map(str, [*splits, *rng.choice(splits, 12 - len(splits))])))
    source, images, firsts = make(tmp_path, split_of, rng)
    if splits != NONE:
        expected = {split: {firsts[n] for n in names if FOLDER_SPLITS[split_of[n]] == split} for split in ANY}
    else:  # by the hash of the first image's name
        hashes = {n: zlib.crc32(os.path.basename(firsts[n]).encode()) for n in names}
        tenth = [n for n in names if hashes[n] % 10 == 0] or [min(names, key=hashes.get)]
        expected = {"test": {firsts[n] for n in tenth}, "train": {firsts[n] for n in names if n not in tenth}}

    def name_of(image):
        return image if isinstance(image, Path) else image.name

    sources = [Source(str(source), images and str(images), None)]
    for task in tasks:
        everything = load_samples(str(source), task, F, images)
        assert {name_of(s.images[0]) for s in everything} == set(firsts.values())
        if not expected["train"]:
            with pytest.raises(UserError, match=f"no samples of task {task} in the train split"):
                load_splits(sources, [], [task], F)
            continue
        train, held, _ = load_splits(sources, [], [task], F)[task]
        assert {name_of(s.images[0]) for s in train} == expected["train"]
        assert {name_of(s.images[0]) for s in held} == (expected.get("val") or expected["test"])
        # A held-out pair may show training places as wrong candidates, where few places are held out.
        shown = [(s.images[0], right_image(s)) if task == "pair" else s.images for s in held]
        trained_on = {name_of(image) for s in train for image in s.images}
        assert not trained_on & {name_of(image) for seen in shown for image in seen}


# ----------------------------------------------------------------------------------------------------------------------
# Few shots

def shots_of(n):
    return [Sample(f"folder/data.jsonl: line {i}", "cls", ("a.png",), "?", "x", F, category="abc"[i % 3])
            for i in range(n)]


def test_shots_are_nested_even_and_in_order():
    samples = shots_of(90)
    one, five, ten = (few_shots(samples, k) for k in (1, 5, 10))
    assert {s.id for s in one} < {s.id for s in five} < {s.id for s in ten}
    for k, chosen in ((1, one), (5, five), (10, ten)):
        assert Counter(s.category for s in chosen) == dict.fromkeys("abc", k)
    assert ten == sorted(ten, key=samples.index) and [s.id for s in ten] != [s.id for s in samples[:30]]


def test_shots_do_not_depend_on_the_folder_or_on_other_categories():
    samples = shots_of(60)
    moved = [replace(s, id="/elsewhere/" + s.id) for s in reversed(samples)]
    chosen = few_shots(samples, 3)
    assert {s.id for s in chosen} == {s.id.removeprefix("/elsewhere/") for s in few_shots(moved, 3)}
    assert [s for s in chosen if s.category == "a"] == few_shots([s for s in samples if s.category == "a"], 3)


def test_shots_need_categories():
    samples = shots_of(3) + [Sample("data.jsonl: line 9", "det", ("a.png",), "?", "none", F)]
    with pytest.raises(UserError, match=r"data.jsonl: line 9.*no category.*--shots"):
        few_shots(samples, 1)


# ----------------------------------------------------------------------------------------------------------------------
# What a user has to fix

TWO = ["a.png", "b.png"]
GOOD = {"rcap": chat("What is in [1, 2, 30, 40]?", "x"), "change": chat("<image><image>?", "x", image=TWO),
        "pair": chat("<image><image>?", "A", image=TWO),
        "mlc": chat("? a, b.", "a"), "det": chat("?", "[1, 2, 30, 40]"), "rec": chat("?", "[1, 2, 30, 40]"),
        "seg": {"image": "a.png", "mask": "a.png", "problem": "?"}, "ovd": {"file_name": "a.png", "objects": []}}
A = {"image": "a.png"}


@pytest.mark.parametrize("task, record, says", [
    ("pair", chat("<image><image>Which?", "C", image=["a.png", "b.png"]), "'C'.*A"),
    ("mlc", chat("Which classes?", "sea"), "lists no classes"), ("ovd", chat("?", "x"), "serves.*not ovd; `ovd` reads COCO"),
    ("vqa", EARTHDIAL["vqa"][0] | A | {"groundtruth": ""}, "the target '' is empty"),
    ("det", EARTHDIAL["det"][0] | A | {"groundtruth": "[[1, 2, 3]]"}, "`groundtruth`.*five numbers"),
    ("change", EARTHDIAL["change"][0] | A | {"groundtruth": '["A road.'}, "EarthDial.*JSONDecodeError"),
    ("rcap", EARTHDIAL["vqa"][0] | A, "serves cls, mlc, cap, change, vqa, not rcap"),
    ("det", VRSBENCH | {"obj_corner": [.1, .2, .3]}, "VRSBench.*ValueError"),
    ("rec", VRSBENCH | {"image_id": "gone"}, "gone.*--images"),
    ("rec", A | {"problem": "?", "solution": [1, 2, 3]}, "`solution` or `answer` is not a list of four numbers"),
    ("det", A | {"problem": "?", "solution": "none"}, "for `none` write a record of `conversations`"),
    ("rec", A | {"problem": "?", "solution": [9] * 8}, "four numbers"),
    ("rec", A | {"problem": "?", "solution": ["x"] * 4}, "few shots.*'x'"),
    ("cap", A | {"captions": [None]}, "captions"), ("cap", {"filename": "a.png", "sentences": []}, "captions"),
    ("seg", A | {"mask": "gone.png", "problem": "?"}, "gone.png"),
    ("seg", A | {"mask": "bad.jsonl", "problem": "?"}, "bad.jsonl.*cannot be read"),
    ("change", chat("What changed?", "A pier."), "change needs two images"),
    ("det", {"picture": "a.png"}, "no known format has the keys picture; docs/data.md"),
    ("rec", chat("?", "Farm"), r"the target 'Farm' has no box \[x1, y1, x2, y2\]; --task rec needs a box"),
    ("det", chat("?", "[1,2, 30,40],[5,10,190,50,30]"), r"box '\[5,10,190,50,30\]'.*its horizontal envelope lies outside"),
    ("ground", chat("?", "A ship " + "[1,2,3,4]," * 1001), "too many boxes"),
    ("det", A | {"conversations": [{"role": "user", "content": "?"}]}, "expected `from` and `value`"),
])
def test_bad_record_of_each_format_is_named(folder, task, record, says):
    source = write(folder / "bad.jsonl", GOOD.get(task, chat("?", "x")), record)
    refused(source, task, "bad.jsonl: line 2", says)


def test_file_that_is_no_known_format_says_where_the_formats_are(folder):
    """Boxes by image name, a table of boxes, and the folder where a file and its images lie."""
    for rows in ([[1, 2, 30, 40]], {"boxes": []}):
        source = document(folder / "mine.json", {"a.png": rows, "b.png": rows})
        refused(source, "det", r"mine.json.*: no known format has the keys a.png, b.png; docs/data.md lists")
    refused(write(folder / "mine.csv", "a.png,1,2,30,40"), "det", "serves pair, geo, not det; boxes are not read from CSV")
    refused(folder, "det", r"no known layout \(docs/data.md.*not det; .*--data is the file and --images the folder")


def test_region_that_no_box_marks_is_left_out_and_counted(folder):
    notes = Counter()
    source = write(folder / "a.jsonl", GOOD["rcap"], chat("What is it?", "x"))
    assert len(samples_of(source, "rcap", notes=notes)) == 1
    assert notes == {"records without a box in the image left out": 1}


@pytest.mark.parametrize("fixture, file, old, new, task, source, says", [
    ("nwpu", "ground truth/001.txt", "),2 ", "),11", "ovd", "", ["001.txt: line 1", "KeyError: 11"]),
    ("nwpu", "ground truth/001.txt", "(100, 25)", "(100, x)", "det", "",
     ["001.txt: line 1", r"\(x1,y1\),\(x2,y2\),class"]),
    ("dota", "labelTxt/P0001__0.5__0___0.txt", "50 ship 0", "ship", "det", "", ["0.txt: line 3", "x1 y1"]),
    ("dota", "labelTxt/P0001__0.5__0___0.txt", " plane 1", "", "ovd", "", ["0.txt: line 4", "class"]),
    ("dior", "Annotations/00002.xml", "<xmin>100</xmin>", "", "rec", "", ["00002.xml", "DIOR-RSVG"]),
    ("dior", "Annotations/00002.xml", "</annotation>", "", "rec", "", ["00002.xml", "ParseError"]),
    ("dior", "test.txt", "2", "4", "rec", "test.txt", ["test.txt", "object 4", "holds 4"]),
    ("dior", "test.txt", "2", "two", "rec", "test.txt", ["test.txt", "object numbers"]),
    ("xbd", f"train/labels/{FIRE}.json", '"subtype": "destroyed", ', "", "det", "", ["socal-fire", "subtype"]),
    ("xbd", f"train/labels/{FIRE}.json", "25 50,", "25,", "det", "", ["socal-fire", "ValueError"]),
    ("levir", "LevirCCcaptions.json", '"test_1.png"', '"test_2.png"', "change", "",
     ["image 0", "test_2.png.*--images"]),
    ("levir", "LevirCCcaptions.json", '"filepath"', '"path"', "change", "", ["image 0", "filepath"]),
    ("levir", "LevirCCcaptions.json", "]", "", "change", "", ["LevirCCcaptions.json", "JSON"]),
    ("rsvqa", "LR_split_test_answers.json", '"question_id": 1', '"question_id": 2', "vqa", "",
     ["question 1", "answer"]),
    ("rsvqa", "LR_split_test_questions.json", '"img_id": 5', '"img_id": 6', "vqa", "", ["question 1", "6.png"]),
    ("earthreason", "val/QAs/y.json", '"questions"', '"question"', "seg", "", ["y.json", "questions"]),
    ("cities", "city/img_info.csv", ",10.0,", ",north,", "pair", "", ["img_info.csv: line 1", "north"]),
    ("cities", "city/img_info.csv", "\n", "\n7\n", "pair", "", ["img_info.csv: line 2", "aerial,ground"]),
])
def test_bad_line_of_a_folder_is_named(request, fixture, file, old, new, task, source, says):
    folder = request.getfixturevalue(fixture)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    refused(folder / source, task, *says)


@pytest.mark.parametrize("task, target, says", [
    ("vqa", "<think>", "the tags of the target '<think>' are not one"), ("vqa", "a </answer>", "are not one"), ("cap", "?!", "is empty"),
    ("vqa", "<Thinking>why</Thinking> sea", "are not one <think>"), ("det", "<think>Not the one at [8, 8, 40, 40].", "are not one"),
    ("det", "<answer>[1, 2, 30, 40]</answer> or <answer>[8, 8, 40, 40]</answer>", "are not one"),
    ("det", "[1, 2, 30, 40] <think>why</think> none", "are not one"), ("det", "<think >[1, 2, 30, 40]</think > none", "are not one"),
    ("det", "<think>why</think> [1, 2, 30, 40] <answer>none</answer>", "are not one"),
    ("vqa", "\u200b", "is empty"), ("ground", "[1, 2, 30, 40]", "is empty"), ("cls", "\ud800", "surrogates"),
    ("ground", "A ship [sic] [1, 2, 30, 40]", "brackets"), ("cap", "a ship " * 2000, "characters, more than 10000")])
def test_target_that_would_fail_its_own_reward_is_refused(folder, task, target, says):
    refused(write(folder / "a.jsonl", GOOD.get(task, chat("?", "x [1, 2, 30, 40]")), chat("?", target)), task, "line 2", says)


@pytest.mark.parametrize("name", ["<think>", "<|image_pad|>", " "])
def test_class_folder_whose_name_is_no_label_is_refused(tmp_path, name):
    for label in ("sea", name):
        picture(tmp_path / label / "1.png")
    refused(tmp_path, "cls", f"{re.escape(name)}/1.png: --task cls: the target" if name.strip() else "the target ' ' is empty")


def test_annotation_of_another_resolution_is_refused(folder, dior):
    """Its boxes are in pixels of an image that was larger, or of a photograph before it was turned."""
    larger = COCO | {"images": [COCO["images"][0] | {"width": 400, "height": 100}]}
    refused(document(folder / "coco.json", larger, indent=1), "det", "image 7: says .* 400 x 100 pixels, and it has 200 x 50")
    picture(dior / "JPEGImages" / "00001.jpg", SIZE[::-1])
    refused(dior, "rec", "00001.xml: says that its image has 200 x 50 pixels, and it has 50 x 200")


def test_boxes_of_coco_whose_image_is_not_listed_are_counted_and_an_id_is_of_one_image(folder):
    """Ids that are texts in one list and numbers in the other left boxes out in silence."""
    boxes, notes = [COCO["annotations"][0] | {"image_id": "7"}, COCO["annotations"][1]], Counter()
    samples = samples_of(document(folder / "a.json", COCO | {"annotations": boxes}, indent=1), "ovd", notes=notes)
    assert len(samples) == 1 and notes["boxes of images that are not listed left out"] == 1
    twice = COCO | {"images": [image | {"id": 7} for image in COCO["images"]]}
    refused(document(folder / "a.json", twice, indent=1), "ovd", "two images have the id 7")


@pytest.mark.parametrize("line", [
    "10 10 50 10 50 40 10 40 small vehicle 0", "10 10 50 10 50 40 10 40 1 ship", "0 10 10 50 10 50 40 10 40",
    ".1 .1 .5 .1 .5 .4 .1 .4 ship 0"])
def test_line_that_is_not_quite_dota_is_refused(dota, line):
    """A class of two words, the difficulty before the class, the class first as YOLO has it, and fractions: all were read."""
    next(dota.glob("labelTxt/*.txt")).write_text(line)
    refused(dota, "det", "line 1: not x1 y1 .. x4 y4 class")


def test_lists_named_after_splits_are_splits_and_other_names_no_category_in_place_of_the_records_own(folder):
    row = {"image": "a.png", "question": "?", "groundtruth": "sea", "category": "coast"}
    source = folder / "a.json"
    found = samples_of(document(source, {"Training": [row], "Test": [row]}, indent=1), "vqa")
    assert [s.split for s in found] == ["train", "test"]
    assert [s.category for s in samples_of(document(source, {"data": [row]}, indent=1), "vqa")] == ["coast"]
    refused(document(source, {"train": [row], "extra": [row]}, indent=1), "vqa", "not all of splits")


def test_two_folders_of_labels_of_the_same_images_are_refused(dota):
    shutil.copytree(dota / "labelTxt", dota / "labelTxt-v1.5")
    refused(dota, "det", "holds labelTxt and labelTxt-v1.5")


def test_numbers_of_float32_are_boxes(folder):
    box = f"[{np.float32(100.1):.17f}, 25, 200, 50.000000000001]"
    assert samples_of(write(folder / "a.jsonl", chat("Where?", box)), "det")[0].gt_answer == "[56,56,112,112]"


def test_box_of_a_few_pixels_is_that_of_its_answer(folder):
    """An object that is too small for a whole pixel earned 0.05 for its own answer, and nothing as ovd. The large box stays
    as it is."""
    small, large = [100.2, 25.1, .3, .1], [20.3, 10.1, 100.4, 30.2]
    boxes = [{"image_id": 7, "category_id": 3, "bbox": box} for box in (small, large)]
    source, notes = document(folder / "a.json", COCO | {"annotations": boxes}, indent=1), Counter()
    for task in ("det", "ovd"):
        sample, = samples_of(source, task, notes=notes)
        assert sample.gt_boxes[0] == (56, 56, 57, 57, 0) and sample.gt_boxes[1][0] == pytest.approx(20.3 * .56)
        assert TASKS[task].reward(sample.gt_answer, sample) > .9
    assert notes == {"boxes of a few pixels rounded to whole pixels": 2}


def test_error_is_one_short_line_whatever_it_quotes(folder):
    """Lines had up to 1,500 characters, and line breaks of the data."""
    for record in ({"k" * 5000: 1}, chat("?", "x", image="a\n.png" * 900), chat("?", "x") | {"split": ["x\n"] * 900}):
        refused(write(folder / "a.jsonl", record), "vqa", r"a.jsonl: line 1.{50}")


@pytest.mark.parametrize("box, says", [
    ("[0.1,0.2,0.5,0.6]", "fractions of the image; write pixels"), ("[120,25,60,20]", "x, y, width, height"),
    ("[10,30,90,20]", "x, y, width, height"), ("[1,2,3]", "is malformed")])
def test_boxes_of_another_form_are_named(folder, box, says):
    """Fractions were read as pixels: [0,0,1,1]."""
    refused(write(folder / "a.jsonl", chat("?", "[1,2,30,40]"), chat("?", box)), "det", f"line 2: box '{re.escape(box)}'.*{says}")


def test_boxes_of_another_form_in_fields_are_named(folder):
    few = [A | {"problem": "?", "solution": box} for box in ([120, 25, 60, 20], [20, 30, 50, 10], [1, 2, 30, 40])]
    refused(write(folder / "a.jsonl", *few), "rec", "2 boxes have no area.*x1, y1, x2, y2")
    refused(write(folder / "a.jsonl", A | {"problem": "?", "solution": [.1, .2, .3, .4]}), "rec", "line 1.*fractions")
    fractions = COCO | {"annotations": [COCO["annotations"][0] | {"bbox": [.1, .1, .5, .5]}]}
    refused(document(folder / "coco.json", fractions, indent=1), "ovd", "image 7.*fractions")


def test_folders_of_another_layout_are_no_classes(tmp_path):
    """LEVIR-CD was read as the classes A, B and label."""
    for name in ("A", "B", "label"):
        picture(tmp_path / name / "test_1.png")
    write(tmp_path / "list" / "test.txt", "test_1.png")
    refused(tmp_path, "cls", "no known layout.*folders A, B, label, list are no classes")


@pytest.mark.parametrize("row", [
    {"question": "[refer] ?", "answer": "[[1, 2, 3, 4, 5]]", "gt_bbox": "[[1, 2, 3, 4, 5]]", "size_group": "small"},
    {"question": "?", "answer": "sea", "annotation": "sea"},
    {"id": "1", "task": "vqa", "images": ["a.png"], "question": "?", "target": "3", "completion": "4", "parts": {}}])
def test_answers_of_a_model_are_no_data(folder, row):
    """EarthDial's result files and predictions.jsonl."""
    refused(write(folder / "predictions.jsonl", row), "vqa", "line 1.*evaluate.py --predictions")


def test_one_pair_is_no_choice(tmp_path):
    refused(cvusa(tmp_path, 1), "pair", "data.csv: line 1", "add pairs")


def test_image_that_a_table_holds_damaged_is_named(tmp_path):
    pytest.importorskip("datasets", reason="EarthDial's shards and parquet are read by datasets")
    import pyarrow
    import pyarrow.parquet
    rows = [{"images": [{"bytes": b"no image", "path": None}], "problem": "?", "answer": [1., 2., 3., 4.]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "val.parquet")
    refused(tmp_path / "val.parquet", "rec", "val.parquet: row 0", "Pillow knows no such image")
    (tmp_path / "val.parquet").write_bytes(b"PAR1")
    refused(tmp_path / "val.parquet", "rec", "val.parquet: not a table")


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_info.json").write_text("{}")
    refused(tmp_path, "cls", "pip install datasets")


@pytest.mark.parametrize("fixture, task, says", [
    ("nwpu", "cls", "NWPU VHR-10 serves det, ovd, not cls"), ("dota", "rec", "DOTA serves det, ovd"),
    ("dior", "cap", "DIOR-RSVG serves rec, det"),
    ("xbd", "change", "xBD serves cls, det"), ("levir", "cap", "LEVIR-CC serves change"),
    ("rsvqa", "cls", "RSVQA serves vqa"),
    ("earthreason", "det", "EarthReason serves seg"), ("cities", "vqa", "CV-Cities serves pair")])
def test_format_says_which_tasks_it_serves(request, fixture, task, says):
    refused(request.getfixturevalue(fixture), task, says)


# ----------------------------------------------------------------------------------------------------------------------
# Real files

real = pytest.mark.skipif("EO_DATA" not in os.environ, reason="EO_DATA does not name the folder of real samples")
EO = Path(os.environ.get("EO_DATA", "."))


@real
@pytest.mark.parametrize("source, task, images, n", [
    ("nwpu_vhr10/refer.jsonl", "det", "nwpu_vhr10/positive image set", 451),
    ("nwpu_vhr10/region_caption.jsonl", "rcap", "nwpu_vhr10/positive image set", 262),
    ("nwpu_vhr10/grounding_description.jsonl", "ground", "nwpu_vhr10/positive image set", 10),
    ("eurosat_rgb", "cls", None, 600), ("aid_150px/AID", "cls", None, 588),
    ("aid_150px/rsicd_captions.jsonl", "cap", None, 588),
    ("rsvqa_lr", "vqa", None, 5005), ("levir_cc", "change", None, 3), ("xbd_sample", "cls", None, 6),
    ("cross_view/cvusa_crossnet", "pair", None, 5)])
def test_real_files_give_the_known_number_of_samples(source, task, images, n):
    notes = Counter()
    samples = samples_of(EO / source, task, images and EO / images, notes)
    del notes["boxes of a few pixels rounded to whole pixels"]  # at 112 px some are
    assert len(samples) == n and not notes.total()
    sizes = {(F, F)} | ({(252, 56)} if task == "pair" else set())  # a panorama of 1232 x 224
    assert {image.size for image in load_images(samples[0])} == sizes


@real
def test_real_region_captions_ask_about_the_box_in_pixels():
    rows = [json.loads(line) for line in (EO / "nwpu_vhr10/region_caption.jsonl").open()]
    samples = samples_of(EO / "nwpu_vhr10/region_caption.jsonl", "rcap", EO / "nwpu_vhr10/positive image set")
    assert samples[0].question == "what object is in this location [8,25,16,35]"  # 7, 22, 14, 31 of 100
    for sample, row in zip(samples, rows):
        pixels = np.array(row["gt_xyxy_px"][0]) / ([row["width"], row["height"]] * 2) * F
        asked = [int(v) for v in re.search(r"\[(\d+),(\d+),(\d+),(\d+)\]", sample.question).groups()]
        np.testing.assert_allclose(asked, pixels, atol=.012 * F + .5)  # the grid is floored, the question rounded
        assert sample.gt_answer == row["annotation"]


@real
def test_real_grounding_descriptions_keep_all_boxes():
    rows = [json.loads(line) for line in (EO / "nwpu_vhr10/grounding_description.jsonl").open()]
    samples = samples_of(EO / "nwpu_vhr10/grounding_description.jsonl", "ground", EO / "nwpu_vhr10/positive image set")
    for sample, row in zip(samples, rows):
        pixels = np.array(row["gt_xyxy_px"]) / ([row["width"], row["height"]] * 2) * F
        np.testing.assert_allclose(np.array(sample.gt_boxes)[:, :4], pixels, atol=.012 * F)
        assert sample.gt_answer.count("[") == len(pixels)


@real
def test_real_nwpu_folder_holds_every_annotated_object():
    files = (EO / "nwpu_vhr10/ground truth").glob("*.txt")
    lines = [(file.stem, line.strip()) for file in files for line in file.read_text().split("\n") if line.strip()]
    objects = [(name, int(line[line.rindex(",") + 1:])) for name, line in lines]
    samples = samples_of(EO / "nwpu_vhr10", "ovd", image_size=896)
    assert sum(len(s.gt_boxes) for s in samples) == len(objects) and len(samples) == len(set(objects))
    assert {s.category for s in samples if "004.txt" in s.id} == {"airplane"}  # whose three lines end in class 1


@real
def test_real_dota_boxes_cover_their_polygons(monkeypatch):
    """The smallest rectangle around four noisy corners is only a little larger than their polygon."""
    shapely = pytest.importorskip("shapely")
    monkeypatch.setattr(box_formats, "MAX_BOXES_PER_QUESTION", 1000)
    labels = EO / "dota_tiles/labelTxt"
    notes, lines = Counter(), sum(len(file.read_text().split("\n")) for file in labels.glob("*.txt"))
    samples = samples_of(EO / "dota_tiles", "det", notes=notes, image_size=896)
    assert lines - 3 <= sum(len(s.gt_boxes) for s in samples) + notes["boxes without area left out"] <= lines
    for sample in samples:
        image = Image.open(sample.images[0])
        rows = [line.split() for line in (labels / f"{sample.images[0].stem}.txt").open() if line.strip()]
        rows = [row for row in rows if row[8] == sample.category]
        shapes = [np.array(row[:8], float).reshape(4, 2) / image.size * 896 for row in rows]
        ratios = []
        for box, shape in zip(sample.gt_boxes, shapes):
            (x1, y1, x2, y2, theta), polygon = box, shapely.Polygon(shape)
            # y points down, so a positive theta is clockwise.
            rectangle = shapely.affinity.rotate(shapely.box(x1, y1, x2, y2), theta, "center")
            assert rectangle.buffer(1e-6).covers(polygon)
            ratios.append(rectangle.area / max(polygon.area, 1e-9))
        assert np.median(ratios) < 1.35


def test_questions_for_hundreds_of_boxes_are_left_out_and_counted():
    """One tile of DOTA has 536 ships: an answer of 5,000 tokens, which needed 14 GB of activations."""
    notes, ships = Counter(), [("ship", (i, 0, i + 1, 1, 0)) for i in range(101)]
    assert not list(sample_per_class("a.txt", request("det", notes), ("a.png",), ships))
    assert notes.total() == 1
    assert len(list(sample_per_class("a.txt", request("det", notes), ("a.png",), ships[:100]))) == 1


@real
def test_real_rsvqa_answers_belong_to_their_questions():
    samples = samples_of(EO / "rsvqa_lr", "vqa")
    first = samples[0]
    assert (first.question, first.gt_answer, first.subset) == ("Is it a rural or an urban area", "rural", "rural_urban")
    allowed = {"presence": "yes|no", "comp": "yes|no", "rural_urban": "rural|urban", "count": r"\d+"}
    assert all(re.fullmatch(allowed[s.subset], s.gt_answer) for s in samples)
    assert Counter(s.subset for s in samples) == {"presence": 1491, "comp": 1993, "rural_urban": 50, "count": 1471}


@real
def test_real_xbd_boxes_are_at_their_place(tmp_path):
    """The label file is of a tile whose images are not in EO_DATA, so it gets blank ones."""
    for when in ("pre", "post"):
        name = f"joplin-tornado_00000050_{when}_disaster"
        picture(tmp_path / "images" / f"{name}.png", (1024, 1024))
        (tmp_path / "labels").mkdir(exist_ok=True)
        label = EO / "xbd_sample/labels_json_example" / f"{name}.json"
        (tmp_path / "labels" / f"{name}.json").write_bytes(label.read_bytes())
    notes = Counter()
    samples = samples_of(tmp_path, "det", notes=notes)
    assert sum(len(s.gt_boxes) for s in samples) + notes["buildings of no class left out"] == 15
    first = next(s for s in samples if s.category == "destroyed").gt_boxes[0]  # POLYGON ((265.84 3.48, 263.62 65.86, ..
    assert first == pytest.approx(tuple(v * F / 1024 for v in (211.418, 2.5225, 265.844, 65.8606)) + (0,), abs=1e-3)
    assert [s.gt_answer for s in samples_of(tmp_path, "cls")] == ["wind", "yes"]


@real
def test_real_levir_captions():
    first = samples_of(EO / "levir_cc", "change")[0]
    assert first.gt_answer == "several houses appear on the bareland at the bottom ." and len(first.gt_texts) == 5
    assert [image.relative_to(EO / "levir_cc").as_posix() for image in first.images] == [
        "images/train/A/train_000016.png", "images/train/B/train_000016.png"]
