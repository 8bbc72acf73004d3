"""Synthetic scenes: what the questions of every task say is what the scene holds, and what the picture shows."""

import json
import re
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import pytest

import rewards
from data import Sample, Scenes, prompt, target
from rewards import TASKS, horizontal, iou_matrix, parse_boxes, reference_boxes, reference_mask, reward_parts
from tiny.scenes import LAND, PAINT, PURPOSE, SHAPES, draw, draw_from_ground, draw_mask, place, scene

FRAME, SEED = 112, 5
tasks = pytest.mark.parametrize("task", TASKS)


@lru_cache
def samples(task, n=40):
    """The first n samples, each with the scene that it asks about."""
    source = Scenes(task, FRAME, SEED)
    return [(source[i], scene(SEED, i, FRAME, least=task in ("rcap", "rec"))) for i in range(n)]


def name(thing):
    return f"{thing.size} {thing.colour} {thing.kind} at the {place(thing, FRAME)}"


def pixels(image):
    return image.tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# Every task

def plain(sample):
    """A sample with the pixels of its images, so that two can be compared."""
    fields = asdict(sample)
    return fields | {"images": [pixels(image) for image in sample.images], "mask": sample.mask and pixels(sample.mask)}


@tasks
def test_sample_is_a_function_of_seed_and_index(task):
    first, again = Scenes(task, FRAME, SEED), Scenes(task, FRAME, SEED)
    later = [plain(again[i]) for i in (7, 3, 0)]                       # in another order
    assert later == [plain(first[i]) for i in (7, 3, 0)]
    assert plain(first[0]) != plain(first[1]) and plain(first[0]) != plain(Scenes(task, FRAME, SEED + 1)[0])


@tasks
def test_target_earns_everything(task, monkeypatch):
    """Up to the whole pixels in which turned boxes are written; of seg once SAM finds the thing in its box."""
    monkeypatch.setattr(rewards, "JUDGES", {"sbert": None, "sam": lambda sample, box, points: reference_mask(sample)})
    for sample, _ in samples(task):
        parts = reward_parts(target(sample).removesuffix("<|im_end|>"), sample)
        turned = any(box[4] for box in sample.boxes)
        assert parts["format"] == 1
        assert parts["accuracy"] >= (0.8 if turned or task == "seg" else 1 - 1e-9)


@tasks
def test_of_another_scene_the_target_earns_less(task):
    pairs = [(sample, other) for (sample, _), (other, _) in zip(samples(task), samples(task)[1:])]
    paid = [TASKS[task].reward(other.answer, sample) for sample, other in pairs]
    assert np.mean(paid) < 0.75 * np.mean([TASKS[task].reward(sample.answer, sample) for sample, _ in pairs])


@tasks
def test_boxes_lie_in_the_frame_and_are_those_of_the_answer(task):
    for sample, view in samples(task):
        boxes = reference_boxes(sample)
        assert (boxes >= 0).all() and (boxes <= FRAME).all() and {*sample.boxes} <= {thing.box for thing in view.things}
        for x1, y1, x2, y2 in parse_boxes(sample.answer) if task in ("det", "ground", "rec", "ovd") and len(boxes) else ():
            assert 0 <= x1 < x2 <= FRAME and 0 <= y1 < y2 <= FRAME


@tasks
def test_prompt_and_target_say_all_there_is_to_say(task):
    for sample, _ in samples(task):
        assert isinstance(sample, Sample) and all(image.size == (FRAME, FRAME) for image in sample.images)
        assert len(sample.images) == {"change": 2, "pair": 5}.get(task, 1) == prompt(sample).count("<|image_pad|>")
        assert sample.question in prompt(sample) and "{frame}" not in prompt(sample)
        assert sample.think and sample.answer and sample.category


# ----------------------------------------------------------------------------------------------------------------------
# What a task asks, and what is right

def test_choices_of_a_question_stand_in_it():
    for sample, view in samples("cls"):
        assert all(land in sample.question for land in LAND) and sample.answer == view.land
    for sample, view in samples("mlc"):
        assert sample.choices == (*LAND, *SHAPES) and all(label in sample.question for label in sample.choices)
        assert set(sample.answer.split(", ")) == {view.land} | {thing.kind for thing in view.things}
    assert all(letter in Scenes("pair", FRAME, SEED)[0].question for letter in "AD")


def test_box_tasks_name_what_they_look_for_and_find_all_of_it():
    for sample, view in samples("det"):
        colour, kind = re.fullmatch(r"Locate every (?:(\w+) )?(\w+)\.", sample.question).groups()
        assert sample.boxes == tuple(t.box for t in view.things if t.kind == kind and colour in (None, t.colour))
    for sample, view in samples("ovd"):
        kind = re.fullmatch(r"Detect every (\w+)\.", sample.question)[1]
        assert sample.boxes == tuple(t.box for t in view.things if t.kind == kind)
        assert [entry["label"] for entry in json.loads(sample.answer.replace("None", "[]"))] == [kind] * len(sample.boxes)
    for task in ("rec", "rcap"):
        for sample, view in samples(task):
            thing = next(t for t in view.things if (t.box,) == sample.boxes)
            box, = parse_boxes(sample.answer if task == "rec" else sample.question)
            assert iou_matrix(box[None], reference_boxes(sample)).item() >= 0.8
            assert name(thing) in (sample.question if task == "rec" else sample.answer)
            kinds = [t.kind for t in view.things]
            assert task == "rcap" or sample.subset == ("unique" if kinds.count(thing.kind) == 1 else "non-unique")
    for sample, view in samples("ground"):
        assert sample.boxes == tuple(t.box for t in view.things)
        assert all(name(t).split(" at ")[0] in sample.answer for t in view.things)


def test_things_of_a_kind_are_counted_in_captions():
    for sample, view in samples("cap"):
        assert sample.references[0] == sample.answer and len(sample.references) == 3
        for caption in sample.references:
            assert view.land in caption and all(t.kind in caption for t in view.things)
            counts = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
            assert sum(counts.get(word, 0) for word in caption.split()) == len(view.things)


def test_questions_of_all_types_are_answered_by_counting():
    seen = set()
    for sample, view in samples("vqa", 400):
        def count(*words, things=view.things):
            return sum(all(word in (t.kind, t.colour) for word in words) for t in things)
        if found := re.fullmatch(r"Is there a (\w+) (\w+)\?", sample.question):
            right = "yes" if count(*found.groups()) else "no"
        elif found := re.fullmatch(r"Are there more (\w+)s than (\w+)s\?", sample.question):
            right = "yes" if count(found[1]) > count(found[2]) else "no"
        elif found := re.fullmatch(r"How many (\w+)s are there\?", sample.question):
            right = str(count(found[1]))
        else:
            assert "rural or an urban" in sample.question
            right = "urban" if view.land == "city" else "rural"
        assert sample.answer == right
        seen.add((sample.subset, right))
    yes_or_no = {(subset, right) for subset in ("presence", "comp") for right in ("yes", "no")}
    assert yes_or_no | {("rural_urban", "rural"), ("rural_urban", "urban"), ("count", "1"), ("count", "2")} <= seen


# ----------------------------------------------------------------------------------------------------------------------
# Several images, masks

def test_change_names_exactly_what_appeared():
    """By the pixels of the two images: a thing that is named differs, one that is not does not, nor does the ground."""
    named = 0
    for sample, view in samples("change"):
        before, after = (np.asarray(image).astype(int) for image in sample.images)
        assert (after == np.asarray(draw(view))).all()                 # what has appeared is in the second image
        differs, appeared = (before != after).any(-1), [t for t in view.things if t.appeared]
        assert (differs == (np.asarray(draw_mask(view, appeared)) > 0)).mean() > 0.99  # the mask has no outline
        for thing in view.things:
            inside = differs[np.asarray(draw_mask(view, [thing])) > 0]
            assert inside.mean() > 0.9 if thing.appeared else not inside.any()
        for text in (sample.answer, *sample.references):
            assert all(name(t) in text for t in appeared) and text.count(" at the ") == len(appeared)
        named += len(appeared)
    assert named > 10 and any(sample.answer == "nothing has changed" for sample, _ in samples("change"))


def test_letters_of_pair_are_even_and_only_the_right_image_is_the_scene():
    source, letters = Scenes("pair", 28, SEED), []                     # small images, to be quick
    for i in range(400):
        sample, view = source[i], scene(SEED, i, 28)
        right = "ABCD".index(sample.answer)
        ground, *above = map(pixels, sample.images)
        assert ground == pixels(draw_from_ground(view))
        assert [image == pixels(draw(view)) for image in above] == [k == right for k in range(4)]
        assert len({*above}) == 4
        letters.append(right)
    assert abs(np.bincount(letters, minlength=4) - 100).max() < 30     # 3 standard deviations are 26


def test_keypoints_lie_on_the_mask_of_their_thing():
    instances = 0
    for sample, view in samples("seg"):
        kind = next(kind for kind, purpose in PURPOSE.items() if purpose == sample.question)
        things = [t for t in view.things if t.kind == kind]
        entries = json.loads(sample.answer) if things else []
        assert (sample.answer == "None") == (not things) and len(entries) == len(things)
        assert pixels(sample.mask) == pixels(draw_mask(view, things))
        for entry, thing in zip(entries, things):
            mask = np.asarray(draw_mask(view, [thing])) > 0
            points = [entry["keypoint1"], entry["keypoint2"]]
            assert all(mask[y, x] for x, y in points) and points[0] != points[1]
            assert np.abs(np.subtract(entry["bbox_2d"], horizontal(thing.box))).max() <= 0.5
        instances += len(things)
    assert instances > 20 and len({*PURPOSE.values()}) == len(SHAPES)


def test_mask_is_where_the_things_are_drawn():
    for sample, view in samples("seg"):
        painted = (np.asarray(draw(view))[..., None, :] == np.array([*PAINT.values()])).all(-1).any(-1)
        others = np.asarray(draw_mask(view, [t for t in view.things if t.box not in sample.boxes])) > 0
        mask = np.asarray(sample.mask) > 0
        assert (painted & mask).sum() >= 0.4 * mask.sum()              # the rest is the dark outline
        assert not (painted & ~mask & ~others).any() and not (mask & others).any()


def test_a_thing_fills_its_box_to_the_pixel():
    """PIL paints the last pixel of an outline too, so a thing drawn from x1 to x2 would be one pixel wider than its box."""
    seen = 0
    for sample, view in samples("seg"):
        for thing in (t for t in view.things if not t.box[4]):
            rows, columns = np.nonzero(np.asarray(draw_mask(view, [thing])))
            edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert np.abs(np.subtract(edges, thing.box[:4])).max() <= (1 if thing.kind == "tank" else 0)  # its outline is round
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("task", ["rcap", "rec"])
def test_tasks_about_one_thing_always_have_one(task):
    assert all(len(sample.boxes) == 1 for sample, _ in samples(task, 150))
