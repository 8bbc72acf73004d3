"""Synthetic scenes: what the questions of every task say is what the scene holds, and what the picture shows."""

import json
import re
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import pytest

from boxes import iou_matrix, obb_to_hbb, parse_boxes
from rewards import TASKS, score_completion
from sample import Sample, format_prompt, format_target, gt_hbbs, load_gt_mask
from tiny.scenes import (
    COLOURS,
    LAND,
    PURPOSES,
    SHAPES,
    Scenes,
    draw_ground_view,
    draw_mask,
    draw_scene,
    make_scene,
    position,
)

SIZE, SEED = 112, 5
tasks = pytest.mark.parametrize("task", TASKS)


@lru_cache
def samples(task, n=40):
    """The first n samples, each with the scene that it asks about."""
    source = Scenes(task, SIZE, SEED)
    return [(source[i], make_scene(SEED, i, SIZE, min_objects=int(task in ("rcap", "rec")))) for i in range(n)]


def words_of(obj, scene):
    return f"{obj.size} {obj.colour} {obj.kind} at the {position(obj, scene)}"


def pixels(image):
    return image.tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# Every task

def plain(sample):
    """A sample with the pixels of its images, so that two can be compared."""
    fields = asdict(sample)
    return fields | {"images": [pixels(image) for image in sample.images],
                     "gt_mask": sample.gt_mask and pixels(sample.gt_mask)}


@tasks
def test_sample_is_a_function_of_seed_and_index(task):
    first, again = Scenes(task, SIZE, SEED), Scenes(task, SIZE, SEED)
    later = [plain(again[i]) for i in (7, 3, 0)]                       # in another order
    assert later == [plain(first[i]) for i in (7, 3, 0)]
    assert plain(first[0]) != plain(first[1]) and plain(first[0]) != plain(Scenes(task, SIZE, SEED + 1)[0])


@tasks
def test_target_earns_everything(task):
    """The end of the turn is part of it. Up to the whole pixels in which turned boxes are written; for seg once SAM finds the object in its box."""
    for sample, _ in samples(task):
        completion, end, rest = format_target(sample).partition("<|im_end|>")
        parts = score_completion(completion, sample, sam=lambda sample, box, points: load_gt_mask(sample))
        turned = any(box[4] for box in sample.gt_boxes)
        assert end and not rest and parts["format"] == 1
        assert parts["accuracy"] >= (0.8 if turned or task == "seg" else 1 - 1e-9)


@tasks
def test_the_target_of_another_scene_earns_less(task):
    pairs = [(sample, other) for (sample, _), (other, _) in zip(samples(task), samples(task)[1:])]
    paid = [TASKS[task].reward(other.gt_answer, sample) for sample, other in pairs]
    assert np.mean(paid) < 0.75 * np.mean([TASKS[task].reward(sample.gt_answer, sample) for sample, _ in pairs])


@tasks
def test_boxes_lie_in_the_image_and_are_those_of_the_answer(task):
    for sample, scene in samples(task):
        boxes = gt_hbbs(sample)
        assert (boxes >= 0).all() and (boxes <= SIZE).all() and {*sample.gt_boxes} <= {obj.box for obj in scene.objects}
        has_boxes = task in ("det", "ground", "rec", "ovd") and len(boxes)
        for x1, y1, x2, y2 in parse_boxes(sample.gt_answer) if has_boxes else ():
            assert 0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE


@tasks
def test_prompt_and_target_are_complete(task):
    for sample, _ in samples(task):
        assert isinstance(sample, Sample) and all(image.size == (SIZE, SIZE) for image in sample.images)
        prompt = format_prompt(sample)
        assert len(sample.images) == {"change": 2, "pair": 5}.get(task, 1) == prompt.count("<|image_pad|>")
        assert sample.question in prompt and "{image_size}" not in prompt
        assert sample.think and sample.gt_answer and sample.category


# ----------------------------------------------------------------------------------------------------------------------
# Questions and their right answers

def test_choices_are_in_their_question():
    assert {make_scene(SEED, i, SIZE).land for i in range(200)} == {*LAND}
    for sample, scene in samples("cls"):
        assert all(land in sample.question for land in LAND) and sample.gt_answer == scene.land
    for sample, scene in samples("mlc"):
        assert sample.choices == (*LAND, *SHAPES) and all(label in sample.question for label in sample.choices)
        assert set(sample.gt_answer.split(", ")) == {scene.land} | {obj.kind for obj in scene.objects}
    assert all(letter in Scenes("pair", SIZE, SEED)[0].question for letter in "AD")


def test_box_tasks_name_a_kind_of_object_and_find_all_of_it():
    for sample, scene in samples("det"):
        colour, kind = re.fullmatch(r"Locate every (?:(\w+) )?(\w+)\.", sample.question).groups()
        found = [obj for obj in scene.objects if obj.kind == kind and colour in (None, obj.colour)]
        assert sample.gt_boxes == tuple(obj.box for obj in found)
        assert [box[0] for box in sample.gt_boxes] == sorted(box[0] for box in sample.gt_boxes)
    assert 0 < sum(not sample.gt_boxes for sample, _ in samples("det")) < 15
    for sample, scene in samples("ovd"):
        kind = re.fullmatch(r"Detect every (\w+)\.", sample.question)[1]
        assert sample.gt_boxes == tuple(obj.box for obj in scene.objects if obj.kind == kind)
        entries = json.loads(sample.gt_answer.replace("None", "[]"))
        assert [entry["label"] for entry in entries] == [kind] * len(sample.gt_boxes)
    for task in ("rec", "rcap"):
        for sample, scene in samples(task):
            obj = next(obj for obj in scene.objects if (obj.box,) == sample.gt_boxes)
            box, = parse_boxes(sample.gt_answer if task == "rec" else sample.question)
            assert iou_matrix(box[None], gt_hbbs(sample)).item() >= 0.8
            assert words_of(obj, scene) in (sample.question if task == "rec" else sample.gt_answer)
            kinds = [obj.kind for obj in scene.objects]
            assert task == "rcap" or sample.subset == ("unique" if kinds.count(obj.kind) == 1 else "non-unique")
    for sample, scene in samples("ground"):
        assert sample.gt_boxes == tuple(obj.box for obj in scene.objects)
        assert all(words_of(obj, scene).split(" at ")[0] in sample.gt_answer for obj in scene.objects)


def test_count_is_of_one_kind_or_of_all_objects():
    asked = set()
    for sample, scene in samples("count"):
        kind = re.fullmatch(r"How many (\w+)s are there\?", sample.question)[1]
        assert int(sample.gt_answer) == sum(kind in ("object", obj.kind) for obj in scene.objects)
        asked.add(kind == "object")
    assert asked == {True, False}


def test_looks_of_a_scene_tell_where_it_is():
    """Latitude by its land; longitude by how much of the red or the blue of the plain scene is left."""
    for sample, scene in samples("geo"):
        latitude, longitude = map(int, sample.gt_answer.split(", "))
        assert latitude == dict(zip(LAND, range(-70, 90, 20)))[scene.land] and -180 <= longitude < 180
        plain, seen = (np.asarray(image, float) for image in (draw_scene(scene), sample.images[0]))
        red, green, blue = ((seen + .5)[..., c].sum() / plain[..., c].sum() for c in range(3))  # the half: rounded down
        assert green == pytest.approx(1, abs=.02)
        assert blue - red == pytest.approx(-longitude / 360, abs=.02)


def test_captions_count_the_objects_of_a_kind():
    for sample, scene in samples("cap"):
        assert sample.gt_texts[0] == sample.gt_answer and len(sample.gt_texts) == 3
        for caption in sample.gt_texts:
            assert scene.land in caption and all(obj.kind in caption for obj in scene.objects)
            counts = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
            assert sum(counts.get(word, 0) for word in caption.split()) == len(scene.objects)


def test_questions_of_all_types_are_answered_by_counting():
    seen = set()
    for sample, scene in samples("vqa", 400):
        def count(*words, objects=scene.objects):
            return sum(all(word in (obj.kind, obj.colour) for word in words) for obj in objects)
        if found := re.fullmatch(r"Is there a (\w+) (\w+)\?", sample.question):
            right = "yes" if count(*found.groups()) else "no"
        elif found := re.fullmatch(r"Are there more (\w+)s than (\w+)s\?", sample.question):
            right = "yes" if count(found[1]) > count(found[2]) else "no"
        elif found := re.fullmatch(r"How many (\w+)s are there\?", sample.question):
            right = str(count(found[1]))
        else:
            assert "rural or an urban" in sample.question
            right = "urban" if scene.land == "city" else "rural"
        assert sample.gt_answer == right
        seen.add((sample.subset, right))
    yes_or_no = {(subset, right) for subset in ("presence", "comp") for right in ("yes", "no")}
    assert yes_or_no | {("rural_urban", "rural"), ("rural_urban", "urban"), ("count", "1"), ("count", "2")} <= seen


# ----------------------------------------------------------------------------------------------------------------------
# Several images, masks

def test_change_names_exactly_what_appeared():
    """By the pixels of the two images: they differ on the objects that are named, and nowhere else."""
    named = 0
    for sample, scene in samples("change"):
        before, after = (np.asarray(image).astype(int) for image in sample.images)
        assert (after == np.asarray(draw_scene(scene))).all()           # new objects are in the second image
        differs, appeared = (before != after).any(-1), [obj for obj in scene.objects if obj.appeared]
        assert (differs == (np.asarray(draw_mask(scene, appeared)) > 0)).mean() > 0.99  # the mask has no outline
        for obj in scene.objects:
            inside = differs[np.asarray(draw_mask(scene, [obj])) > 0]
            assert inside.mean() > 0.9 if obj.appeared else not inside.any()
        for text in (sample.gt_answer, *sample.gt_texts):
            assert all(words_of(obj, scene) in text for obj in appeared) and text.count(" at the ") == len(appeared)
        named += len(appeared)
    assert named > 10 and any(sample.gt_answer == "nothing has changed" for sample, _ in samples("change"))


def test_letters_of_pair_are_even_and_only_the_right_image_is_the_scene():
    source, letters = Scenes("pair", 28, SEED), []                     # small images, to be quick
    for i in range(400):
        sample, scene = source[i], make_scene(SEED, i, 28)
        right = "ABCD".index(sample.gt_answer)
        ground, *above = map(pixels, sample.images)
        assert ground == pixels(draw_ground_view(scene))
        assert [image == pixels(draw_scene(scene)) for image in above] == [k == right for k in range(4)]
        assert len({*above}) == 4
        letters.append(right)
    assert abs(np.bincount(letters, minlength=4) - 100).max() < 30     # 3 standard deviations are 26


def test_keypoints_lie_on_the_mask_of_their_thing():
    instances = 0
    for sample, scene in samples("seg"):
        kind = next(kind for kind, purpose in PURPOSES.items() if purpose == sample.question)
        objects = [obj for obj in scene.objects if obj.kind == kind]
        entries = json.loads(sample.gt_answer) if objects else []
        assert (sample.gt_answer == "None") == (not objects) and len(entries) == len(objects)
        assert pixels(sample.gt_mask) == pixels(draw_mask(scene, objects))
        for entry, obj in zip(entries, objects):
            mask = np.asarray(draw_mask(scene, [obj])) > 0
            points = [entry["keypoint1"], entry["keypoint2"]]
            assert all(mask[y, x] for x, y in points) and points[0] != points[1]
            assert np.abs(np.subtract(entry["bbox_2d"], obb_to_hbb(obj.box))).max() <= 0.5
        instances += len(objects)
    assert instances > 20 and len({*PURPOSES.values()}) == len(SHAPES)


def test_mask_is_where_the_things_are_drawn():
    for sample, scene in samples("seg"):
        painted = (np.asarray(draw_scene(scene))[..., None, :] == np.array([*COLOURS.values()])).all(-1).any(-1)
        others = np.asarray(draw_mask(scene, [obj for obj in scene.objects if obj.box not in sample.gt_boxes])) > 0
        mask = np.asarray(sample.gt_mask) > 0
        assert (painted & mask).sum() >= 0.4 * mask.sum()              # the rest is the dark outline
        assert not (painted & ~mask & ~others).any() and not (mask & others).any()


def test_a_thing_fills_its_box_to_the_pixel():
    """PIL paints the last pixel of an outline too: drawn from x1 to x2, an object would be wider than its box."""
    seen = 0
    for sample, scene in samples("seg"):
        for obj in (obj for obj in scene.objects if not obj.box[4]):
            rows, columns = np.nonzero(np.asarray(draw_mask(scene, [obj])))
            edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            tolerance = 1 if obj.kind == "tank" else 0                 # its outline is round
            assert np.abs(np.subtract(edges, obj.box[:4])).max() <= tolerance
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("task", ["rcap", "rec"])
def test_tasks_about_one_thing_always_have_one(task):
    assert all(len(sample.gt_boxes) == 1 for sample, _ in samples(task, 150))
