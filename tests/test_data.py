"""From a file to a Sample: readers, the pixels of the boxes, synthetic scenes, the order of the data, and bad input."""

import json
import os
import re
import shutil
import sys
import zlib
from argparse import ArgumentTypeError
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

import data
import evaluate
from boxes import clip_and_round, convert_box, format_boxes, obb_to_hbb, parse_boxes
from data import Source, get_batch, load_samples, load_splits, parse_sources, read_source
from flags import check_oriented, non_negative_int, parse_grpo_args, read_system_prompt
from metrics.rows import sample_from_row, sample_to_row
from processing import prefetch
from readers.splits import HELD_OUT_SEED, split_samples
from rewards import TASKS, format_reward, score_completion
from runtime.errors import UserError
from sample import (
    REQUESTS,
    Sample,
    format_prompt,
    format_target,
    gt_hbbs,
    gt_obbs,
    load_images,
    loosen_boxes,
    to_oriented,
)
from tiny.scenes import Scenes, draw_scene, make_scene

F = 112
SIZE = (200, 50)  # of the images in `folder`: far from square, so that swapped axes show


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "sub/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", SIZE, "green").save(tmp_path / name)
    Image.new("RGB", (200, 1)).save(tmp_path / "thin.png")
    return tmp_path


def write(folder, *records, name="data.jsonl"):
    """Records as JSON lines, or as a JSON array where the name ends in .json; strings are written as they are."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    (folder / name).write_text("[" + ",\n".join(lines) + "]" if name.endswith(".json") else "\n".join(lines), encoding="utf-8")
    return str(folder / name)


def chat(*turns, image="a.png"):
    return {"id": "x", "image": image, "conversations": [
        {"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]}


# ----------------------------------------------------------------------------------------------------------------------
# Boxes in pixels of the resized image

def load_split(sources, eval_sources, task, image_size):
    """load_splits of one task."""
    return load_splits(sources, eval_sources, [task], image_size)[task]


def test_box_follows_its_image_into_the_frame():
    assert convert_box((10, 10, 60, 40), (200, 50), (100, 100)) == (5, 20, 30, 80, 0)


@pytest.mark.parametrize("source, to", [((100, 100), (448, 448)), ((981, 775), (448, 448)), ((30, 900), (112, 112))])
def test_box_survives_a_round_trip(source, to):
    box = (3.5, 7, 21, 29, 0)
    assert convert_box(convert_box(box, source, to), to, source) == pytest.approx(box)


@pytest.mark.parametrize("box, whole", [((111.6, 50, 112, 60), [111, 50, 112, 60]), ((50, 111.6, 60, 112), [50, 111, 60, 112])])
def test_box_at_the_far_edge_stays_in_the_image(box, whole):
    assert clip_and_round(box, 112) == whole


def test_turned_box_stays_turned_only_where_both_axes_scale_alike():
    assert convert_box((10, 10, 30, 20, 30), (100, 100), (448, 448)) == pytest.approx((44.8, 44.8, 134.4, 89.6, 30))
    box = (10, 10, 30, 20, 90)
    assert convert_box(box, (100, 100), (200, 100)) == pytest.approx((30, 5, 50, 25, 0))  # the envelope (15, 5, 25, 25)


def test_answer_holds_whole_pixels_of_the_horizontal_boxes():
    assert format_boxes([(10.4, 10.6, 30, 20, 0), (10, 10, 30, 20, 90)], 112) == "[10,11,30,20],[15,5,25,25]"
    assert format_boxes([], 112) == "none"


def test_images_come_as_rgb_squares_of_the_frame(folder):
    Image.new("L", (7, 300)).save(folder / "grey.png")
    Image.new("RGBA", (300, 7)).save(folder / "alpha.png")
    images = load_images(Sample("x", "cls", (folder / "grey.png", folder / "alpha.png", Image.new("1", (5, 5))), "q", "a", 56))
    assert [(i.mode, i.size) for i in images] == [("RGB", (56, 56))] * 3


@pytest.mark.parametrize("size", [(1232, 224), (224, 1232), (750, 750), (8192, 4096), (640, 480), (9000, 3)])
def test_images_of_pair_and_geo_keep_their_shape(size):
    """A panorama of 1232 x 224 was once squeezed to a square, five times as thin as it is."""
    image, = load_images(Sample("x", "pair", (Image.new("RGB", size),), "q", "A", 448))
    assert not image.width % 28 and not image.height % 28
    assert 0.8 * 448**2 <= image.width * image.height <= 1.2 * 448**2
    if max(size) < 10 * min(size):
        assert image.width / image.height == pytest.approx(size[0] / size[1], rel=.12)  # half a token of four
    other, = load_images(Sample("x", "cls", (Image.new("RGB", size),), "q", "a", 448))
    assert other.size == (448, 448) and (size[0] != size[1] or image.size == other.size)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and targets

@pytest.mark.parametrize("n", [1, 2, 4])
def test_prompt_has_one_mark_for_each_image(n):
    text = format_prompt(Sample("x", "cls", ("i.png",) * n, "Which class?", "sea", F))
    assert text.count("<|vision_start|><|image_pad|><|vision_end|>") == text.count("<|image_pad|>") == n
    assert text.index("<|image_pad|>") < text.index("Which class?") and text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("task", ["det", "cls"])
def test_prompt_names_the_frame_and_never_the_answer(task):
    for sample in Scenes(task, F, seed=3)[:40]:
        text = format_prompt(sample)
        assert not re.search(r"\[\s*\d", text)
        assert sample.think not in text and format_prompt(replace(sample, gt_answer="?", think="?", gt_boxes=())) == text
        assert (f"{F}x{F}" in text) == (task == "det")


@pytest.mark.parametrize("task", TASKS)
def test_without_reasoning_prompt_target_and_reward_speak_of_the_answer_alone(task):
    for sample in Scenes(task, F, seed=4, thinking=False)[:5]:
        prompt, (completion, end, _) = format_prompt(sample), format_target(sample).partition("<|im_end|>")
        assert "think" not in prompt and end and completion == f"<answer>{sample.gt_answer}</answer>"
        assert score_completion(completion, sample)["format"] == 1
        assert score_completion(completion, replace(sample, thinking=True))["format"] == 0


@pytest.mark.parametrize("thinking", [True, False])
def test_every_task_is_asked_for_the_format_at_the_end_of_the_users_turn(thinking):
    """Instruct models hardly follow a system prompt. It has the same request, unless --system replaces it."""
    request = f" {REQUESTS[thinking]}<|im_end|>\n"
    for task in TASKS:
        for system, n in ((None, 2), ("Be brief.", 1)):
            prompt = format_prompt(Scenes(task, F, seed=4, thinking=thinking, system=system)[0])
            assert prompt.count(request) == n and prompt.endswith(f"{request}<|im_start|>assistant\n")
            assert (f"<|im_start|>system\n{system}<|im_end|>\n" in prompt) == (system is not None)


@pytest.mark.parametrize("source", ["synthetic", "file"])
@pytest.mark.parametrize("thinking", [True, False])
def test_prompt_flags_reach_all_samples(folder, source, thinking):
    if source == "file":
        source = write(folder, {**GOOD, "image": "a.png"}, {**GOOD, "image": "b.png"})
    split = load_splits(parse_sources([source]), [], ["det"], F, thinking=thinking, system="Be brief.")["det"]
    assert all(part[0].thinking == thinking and part[0].system == "Be brief." for part in (split.train, split.held_out))


def test_the_seed_is_that_of_the_scenes_to_train_on_and_no_other():
    one, other = (load_splits(parse_sources(["synthetic"]), [], ["det"], F, seed=seed)["det"] for seed in (1, 2))
    assert one.train[0] != other.train[0] and one.held_out[0].gt_answer == other.held_out[0].gt_answer


@pytest.mark.parametrize("content, says", [
    (None, "cannot be read.*No such file"), (b"", "is empty"), (b" \n\t", "is empty"), (b"\xef\xbb\xbf", "is empty"),
    (b"\xff\xfe", "cannot be read.*UTF-8"), (b"a<|im_end|>", r"holds <\|im_end\|>"), (b"<|image_pad|>", r"<\|image_pad\|>, a token")])
def test_system_prompt_that_cannot_be_one_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "system.txt").write_bytes(content)
    with pytest.raises(ArgumentTypeError, match=f"system.txt: .*{says}") as error:
        read_system_prompt(str(tmp_path / "system.txt"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task, target, warns", [
    ("cls", "[10,20,30,40]", True), ("vqa", "It is at [10, 20.5, 30, 40, 0].", True), ("vqa", "[10,20]", False),
    ("det", "[10,20,30,40]", False)])
def test_boxes_in_targets_of_a_task_without_boxes_are_warned_of(folder, task, target, warns, capsys):
    """A slip in --task: it once trained in silence, with accuracy 0. Nor are boxes in a text converted."""
    boxes = [{**GOOD, "image": f"{name}.png", "conversations": [GOOD["conversations"][0], {"from": "gpt", "value": target}]}
             for name in "ab"]
    load_splits(parse_sources([write(folder, *boxes)]), [], [task], F)
    assert (f"targets of {task} hold boxes" in capsys.readouterr().err) == warns


def test_oriented_answers_are_asked_for_and_written_with_theta():
    for sample in Scenes("det", 448, seed=4, oriented=True)[:20]:
        prompt, completion = format_prompt(sample), format_target(sample).partition("<|im_end|>")[0]
        assert "[x1,y1,x2,y2,theta]" in prompt and "degrees clockwise" in prompt and "448x448" in prompt
        assert score_completion(completion, sample)["accuracy"] > .95  # whole pixels and degrees


def test_oriented_answer_is_rounded_and_not_clipped():
    """A clipped oriented box would be no rectangle."""
    boxes = [(-3.4, 10.6, 30, 11, 179.7), (4, 4, 4.2, 4.2, -30)]
    assert format_boxes(boxes, 112, oriented=True) == "[-3,11,30,12,0],[4,4,5,5,150]"
    assert format_boxes([], 112, oriented=True) == "none"


def test_box_noise_moves_the_edges_and_not_theta():
    sample = Sample("x", "det", (), "q", "", 448, ((100, 120, 200, 180, 0), (100, 100, 200, 150, 30)))
    noisy = parse_boxes(loosen_boxes(to_oriented(sample), 4, (0,)).gt_answer, oriented=True)
    assert noisy[:, 4].tolist() == [0, 30] and 2 < np.abs(noisy - sample.gt_boxes)[:, :4].mean() < 6
    horizontal = parse_boxes(loosen_boxes(sample, 4, (0,)).gt_answer)
    assert horizontal[0].tolist() == noisy[0, :4].tolist()


def test_box_noise_points_outwards_and_has_the_mean_and_std_that_were_asked_for():
    """In both forms, from the box that the form has without noise."""
    sample = Sample("x", "det", (), "q", "", 448, ((100, 120, 200, 180, 0), (150, 100, 250, 150, 30)))
    for form, boxes in ((to_oriented(sample), gt_obbs(sample)), (sample, gt_hbbs(sample))):
        noise = [parse_boxes(loosen_boxes(form, 4, (0, i)).gt_answer, oriented=form.oriented)[:, :4] - boxes[:, :4] for i in range(200)]
        outwards = np.multiply(noise, (-1, -1, 1, 1))
        assert abs(np.mean(outwards, (0, 1)) - 4).max() < 0.6 and 3.7 < np.std(outwards) < 4.3


@pytest.mark.parametrize("source", ["synthetic", "file"])
def test_only_det_has_an_oriented_form(folder, source, capsys):
    if source == "file":
        source = write(folder, {**GOOD, "image": "a.png"}, {**GOOD, "image": "b.png"})
    splits = load_splits(parse_sources([source]), parse_sources([]), ["det", "cls"], F, oriented=True)
    for part in (splits["det"].train, splits["det"].held_out):
        assert part[0].oriented and all(len(box) == 5 for box in part[0].gt_boxes)
    assert not splits["cls"].train[0].oriented
    assert ("no target box is turned" in capsys.readouterr().err) == (source != "synthetic")
    check_oriented(True, ["det", "cls"])
    with pytest.raises(UserError, match="det is not among --task cls"):
        check_oriented(True, ["cls"])


# ----------------------------------------------------------------------------------------------------------------------
# Synthetic scenes

def test_heldout_scenes_are_the_same_for_every_seed_and_never_those_of_training():
    heldout = load_samples("synthetic", "det", F, split="heldout", seed=1)
    assert heldout == load_samples("synthetic", "det", F, split="heldout", seed=2)
    assert heldout.seed == HELD_OUT_SEED and len(heldout) == 256
    train = {s.images[0].tobytes() for seed in (0, 1) for s in load_samples("synthetic", "det", F, split="train", seed=seed)[:50]}
    assert not train & {s.images[0].tobytes() for s in heldout[:50]}


@pytest.mark.parametrize("flags", ["--clip-norm 0", "--clip-norm -1", "--beta -1", "--clip-high -0.5", "--lr nan"])
def test_a_number_that_turns_learning_around_is_refused(flags, monkeypatch, capsys):
    """--clip-norm 0 trained nothing, and -1 went up the loss; in other programs 0 is no clipping."""
    monkeypatch.setattr("sys.argv", ["train_grpo.py", "--task", "det", *flags.split()])
    with pytest.raises(SystemExit):
        parse_grpo_args("")
    assert f"argument {flags.split()[0]}" in capsys.readouterr().err


def test_no_seed_of_a_run_is_the_held_out_one():
    assert non_negative_int(str(HELD_OUT_SEED - 1)) < HELD_OUT_SEED
    with pytest.raises(ArgumentTypeError):
        non_negative_int(str(HELD_OUT_SEED))


def test_tasks_share_their_pictures():
    assert np.array_equal(Scenes("det", F, 0)[3].images[0], Scenes("cls", F, 0)[3].images[0])


def test_scenes_hold_none_to_six_things_apart_from_each_other_some_turned():
    counts, turned = Counter(), Counter()
    for i in range(400):
        boxes = [obb_to_hbb(t.box) for t in make_scene(0, i, F).objects]
        counts[len(boxes)] += 1
        turned.update(bool(t.box[4]) for t in make_scene(0, i, F).objects)
        for k, (x1, y1, x2, y2) in enumerate(boxes):
            assert 0 <= x1 < x2 <= F and 0 <= y1 < y2 <= F
            assert not any(x1 < b[2] and b[0] < x2 and y1 < b[3] and b[1] < y2 for b in boxes[:k])
    assert set(counts) == set(range(7)) and .1 < turned[True] / turned.total() < .4


def painted(view, **drawing):
    """(rows, columns) of the pixels that the things of the scene change."""
    with_things, without = draw_scene(view, **drawing), draw_scene(replace(view, objects=()))
    return np.nonzero((np.asarray(with_things) != np.asarray(without)).any(-1))


@pytest.mark.parametrize("image_size, n", [(112, 60), (252, 15)])
def test_reference_box_is_where_the_thing_was_painted(image_size, n):
    """All paint lies in the horizontal box; it reaches all four sides where the outline does (horizontal, or a rectangle)."""
    for i in range(n):
        view = make_scene(1, i, image_size)
        for thing in view.objects:
            ys, xs = painted(replace(view, objects=(thing,)))
            x1, y1, x2, y2 = obb_to_hbb(thing.box)
            edges = np.array([xs.min() - x1, ys.min() - y1, x2 - 1 - xs.max(), y2 - 1 - ys.max()])  # x2 - 1 is the last pixel
            assert (edges >= -1).all()                                 # a turned corner is painted in the nearest pixel
            if thing.box[4] == 0 or thing.kind == "court":
                assert (edges <= 2).all()


# ----------------------------------------------------------------------------------------------------------------------
# Order of the data

@pytest.mark.parametrize("n, size", [(10, 4), (10, 5), (7, 16), (1, 3), (64, 64), (13, 1)])
def test_each_pass_visits_every_sample_once(n, size):
    """A batch size that does not divide the data drops no tail: passes follow each other without a seam."""
    stream = [i for step in range(3 * n) for i in get_batch([range(n)], step, size, seed=(1,))]
    passes = [stream[at : at + n] for at in range(0, len(stream) - n + 1, n)]
    assert all(sorted(one) == list(range(n)) for one in passes)
    assert n < 5 or passes[0] != passes[1]


def test_tasks_of_a_mixed_stage_take_turns_each_with_a_stream_of_its_own():
    """One task alone has the stream that it always had, and the ranks' parts are together the batch."""
    batch = get_batch([range(10), range(100, 120)], 7, 5, seed=(3,))
    streams = get_batch([range(10)], 0, 20, seed=(3,)), get_batch([range(100, 120)], 0, 20, seed=(3, 1))
    assert batch == [streams[position % 2][position // 2] for position in range(35, 40)]
    parts = [get_batch([range(10), range(100, 120)], 7, 5, seed=(3,), part=part) for part in (range(3), range(3, 5))]
    assert parts == [batch[:3], batch[3:]]


def test_no_two_of_seeds_stages_and_tasks_share_an_order():
    """Seeds were added: stage 1 of --seed 0 saw the batches of stage 0 of --seed 1, so seeds were no repetitions."""
    orders = [get_batch([range(100), range(100)], 0, 40, seed=(seed, stage))[1::2] if task else
              get_batch([range(100)], 0, 20, seed=(seed, stage))
              for seed in range(3) for stage in range(3) for task in range(2)]
    assert len(set(map(tuple, orders))) == len(orders)


def test_a_later_pass_of_one_seed_is_no_pass_of_another():
    passes = [tuple(get_batch([range(20)], epoch, 20, seed=(seed, 0))) for seed in range(3) for epoch in range(3)]
    assert len(set(passes)) == 9


def test_batch_is_a_function_of_seed_and_step():
    """A resumed run begins anywhere in the stream and meets the samples that the unbroken one would have met."""
    late = get_batch([range(100)], 40, 8, seed=(3,))
    data.permutation.cache_clear()
    assert [get_batch([range(100)], step, 8, seed=(3,)) for step in range(41)][-1] == late != get_batch([range(100)], 40, 8, seed=(4,))


# ----------------------------------------------------------------------------------------------------------------------
# Readers

@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_conversations_in_pixels(folder, name):
    """2U1 and VLM-R1: an array or lines, one image or several, with or without reasoning."""
    source = write(folder, chat("<image>\nWhere is the ship?", "[10, 10, 60, 40]"),
                   chat("<image><image>Where is it now?", "<think>It\nmoved.</think>\n<answer>[0,0,100,25],"
                        "[100,25,200,50]</answer>", image=["a.png", "sub/a.jpg"]),
                   chat("Where?", '{"bbox_2d": [10, 10, 60, 40]}'),
                   chat("<image>Any?", "<think>Not the one at [8,8,40,40].</think> none"), name=name)
    one, two, qwen, none = load_samples(source, "det", F)
    assert one.question == "Where is the ship?" and one.images == (folder / "a.png",) and one.image_size == F
    assert one.gt_boxes[0] == pytest.approx((5.6, 22.4, 33.6, 89.6, 0)) and one.gt_answer == "[6,22,34,90]"
    assert two.images == (folder / "a.png", folder / "sub/a.jpg") and two.question == "Where is it now?"
    assert two.think == "It\nmoved." and two.gt_answer == "[0,0,56,56],[56,56,112,112]"
    assert qwen.gt_boxes == one.gt_boxes and none.gt_boxes == () and none.gt_answer == "none"
    assert len({s.id for s in (one, two, qwen, none)}) == 4 and all(name in s.id for s in (one, two, qwen, none))
    assert all(format_reward(format_target(s).removesuffix("<|im_end|>"), s) == 1 for s in (one, two, qwen, none))


def test_images_may_lie_elsewhere(folder):
    (folder / "notes").mkdir()
    source = write(folder / "notes", chat("Which class?", "sea"))
    assert load_samples(source, "cls", F, images=str(folder))[0].images == (folder / "a.png",)
    with pytest.raises(UserError):
        load_samples(source, "cls", F)


def test_classes_of_conversations(folder):
    record = chat("<image>\nClassify the scene. Classes: Sea, Forest", "<answer> Forest </answer>")
    sample, = load_samples(write(folder, record), "cls", F)
    assert (sample.question, sample.gt_answer, sample.gt_boxes) == ("Classify the scene. Classes: Sea, Forest", "Forest", ())


def test_geochat_boxes_are_on_a_grid_and_noisy(folder, capsys):
    """Values beyond 100 are clipped, boxes without area are left out, and both are counted."""
    source = write(folder, chat("<image>\n[refer] where are <p>2 planes</p> ?",
                                "<p>2 planes</p> {<10><20><30><40>|<0>}<delim>{<50><50><90><70>|<45>}",
                                "[refer] and <p>the ship</p>?", "{<90><80><102><104>|<0>}",
                                "[refer] and <p>the tank</p>?", "{<50><50><50><60>|<0>}"),
                   chat("<image>[refer] <p>it</p>", "{<0><0><50><25>}"), name="geochat.json")
    planes, ship, it = load_samples(source, "det", 700)
    assert planes.question == "where are 2 planes ?" and planes.gt_boxes == ((70, 140, 210, 280, 0), (350, 350, 630, 490, 45))
    assert planes.gt_answer == "[70,140,210,280],[342,272,638,568]"
    assert ship.gt_boxes == ((630, 560, 700, 700, 0),) and it.gt_boxes == ((0, 0, 350, 175, 0),)
    assert planes.id != ship.id and planes.images == ship.images == (folder / "a.png",)
    notes = capsys.readouterr().err
    assert "1 boxes clipped" in notes and "1 boxes without area" in notes and "geochat.json: 3 samples" in notes


def test_earthdial_rows(folder):
    row = {"image": "a.png", "question": " [refer] [hr_rgb_0.5] <image> \\n Give me the location of <ref>2 ships</ref>",
           "gt_bbox": "[[10, 20, 30, 40, 0]][[-1, 50, 60, 101, 90]]", "task_type": "ref", "size_group": '"small"'}
    sample, = load_samples(write(folder, row), "det", 700)
    assert sample.question == "Give me the location of 2 ships" and sample.subset == "small"
    assert sample.gt_boxes == (pytest.approx((70, 140, 210, 280, 0)), pytest.approx((-7, 350, 420, 707, 90)))
    assert sample.gt_answer == "[70,140,210,280],[28,315,385,700]"  # a turned box keeps its corners, its envelope is cut


@pytest.mark.parametrize("above", ["", "2750/"])
def test_class_folders(tmp_path, above):
    for name in ("River", "AnnualCrop"):
        for i in range(3):
            (tmp_path / above / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64)).save(tmp_path / above / name / f"{name}_{i}.jpg")
            (tmp_path / above / name / "notes.txt").write_text("no image")
    samples = load_samples(str(tmp_path), "cls", F)
    assert [s.gt_answer for s in samples] == ["AnnualCrop"] * 3 + ["River"] * 3
    assert len({s.id for s in samples}) == 6 and "Classes: AnnualCrop, River." in samples[0].question


@pytest.mark.parametrize("mark", ["\u2028", "\u0085"])
def test_record_ends_at_a_newline_and_nowhere_else(folder, mark):
    """str.splitlines also cuts at characters that JSON leaves bare inside a string."""
    samples = load_samples(write(folder, chat(f"Which{mark}class?", "sea"), chat("Which?", "sea")), "cls", F)
    assert [s.gt_answer for s in samples] == ["sea", "sea"] and samples[1].id.endswith("line 2")


# ----------------------------------------------------------------------------------------------------------------------
# Real files

real = pytest.mark.skipif("EO_DATA" not in os.environ, reason="EO_DATA does not name the folder of real samples")


@real
def test_real_referring_boxes_lie_on_their_objects():
    """NWPU VHR-10: boxes of the 0-100 grid, in pixels of the resized image, against the same boxes in pixels (the grid is floored)."""
    source = Path(os.environ["EO_DATA"]) / "nwpu_vhr10"
    rows = [json.loads(line) for line in (source / "refer.jsonl").open()]
    samples = load_samples(str(source / "refer.jsonl"), "det", 448, images=str(source / "positive image set"))
    assert len(samples) == len(rows) == 451
    for sample, row in zip(samples, rows):
        pixels = np.array(row["gt_xyxy_px"]) / ([row["width"], row["height"]] * 2) * 448
        np.testing.assert_allclose(np.array(sample.gt_boxes)[:, :4], pixels, atol=.012 * 448)
        assert not re.search(r"[\[\]<>\\\n]|image|hr_rgb|refer", sample.question)
        assert sample.subset in ("small", "medium", "large")
    assert load_images(samples[0])[0].size == (448, 448)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line that names the file, the record, what is wrong and what to do

GOOD = chat("Where is the ship?", "[10, 10, 60, 40]")
EARTHDIAL = {"image": "a.png", "question": "Where?", "gt_bbox": "[[10, 20, 30, 40, 0]]", "size_group": "small"}
BAD_RECORDS = {  # what is wrong -> (second record, what the message has to say)
    "image that is missing": (chat("Where?", "[1,2,3,4]", image="gone.png"), "gone.png.*--images"),
    "second image that is missing": (chat("Where?", "[1,2,3,4]", image=["a.png", "gone.png"]), "gone.png.*--images"),
    "image that is none": (chat("Where?", "[1,2,3,4]", image="data.jsonl"), "data.jsonl.*cannot be read"),
    "image that is a folder": (chat("Where?", "[1,2,3,4]", image="sub"), "sub.*cannot be read"),
    "image one pixel thin": (chat("Where?", "[1,2,3,4]", image="thin.png"), "thin.png.*200 x 1"),
    "no image": ({"conversations": GOOD["conversations"]}, "image"),
    "empty list of images": (chat("Where?", "[1,2,3,4]", image=[]), "image"),
    "image that is a number": (chat("Where?", "[1,2,3,4]", image=5), "image"),
    "list of images with a number": (chat("Where?", "[1,2,3,4]", image=[5]), "image"),
    "fewer marks than images": (chat("<image>Where?", "[1,2,3,4]", image=["a.png", "b.png"]), "1 <image> marks.* 2 images"),
    "more marks than images": (chat("<image><image>Where?", "[1,2,3,4]"), "2 <image> marks.* 1 image"),
    "odd number of turns": (chat("Where?", "[1,2,3,4]", "And?"), "3 turns"),
    "no turns": (chat(), "0 turns"),
    "turns that are no list": ({"image": "a.png", "conversations": "Where?"}, "conversations"),
    "turn without a text": ({"image": "a.png", "conversations": [{"value": "Where?"}, {"value": None}]}, "value"),
    "reasoning with a box, and no answer": (chat("Where?", "<think>Not the one at [1,2,3,4].</think>"), "the target '' has no box"),
    "answer without a box": (chat("Where?", "over there"), "the target 'over there' has no box.*--task det needs boxes or `none`"),
    "box of three numbers": (chat("Where?", "[1,2,3]"), "box"),
    "box outside the image": (chat("Where?", "[10,10,60,60]"), r"\[10,10,60,60\]'.*lies outside.*200 x 50"),
    "box left of the image": (chat("Where?", "[-9,10,60,40]"), r"\[-9,10,60,40\]"),
    "box without area": (chat("Where?", "[10,10,10,40]"), r"10,10,10,40.*area"),
    "one bad box among good ones": (chat("Where?", "[1,2,3,4],[10,10,60,60]"), r"box '\[10,10,60,60\]'"),
    "malformed JSON": ('{"image": "a.png", ', "JSON"),
    "number of 5000 digits": ('{"image": ' + "9" * 5000 + "}", "line 2"),
    "brackets without end": ("[" * 50_000, "line 2"),
    "record that is no object": ("7", "int"),
    "record of an unknown format": ({"picture": "a.png"}, "picture"),
    "EarthDial row without an image": ({k: v for k, v in EARTHDIAL.items() if k != "image"}, "image"),
    "EarthDial boxes of four numbers": (EARTHDIAL | {"gt_bbox": "[[10, 20, 30, 40]]"}, "gt_bbox.*five"),
    "EarthDial row without boxes": (EARTHDIAL | {"gt_bbox": ""}, "gt_bbox"),
    "EarthDial question that is a number": (EARTHDIAL | {"question": 5}, "question"),
}


def refuse(message, *patterns):
    """One line that says all of this."""
    assert "\n" not in message and all(re.search(pattern, message) for pattern in patterns), message


@pytest.mark.parametrize("wrong", BAD_RECORDS)
def test_bad_record_is_named(folder, wrong):
    record, says = BAD_RECORDS[wrong]
    with pytest.raises(UserError) as error:
        load_samples(write(folder, GOOD, record), "det", F)
    refuse(str(error.value), "data.jsonl: line 2", says)


def test_bad_record_of_an_array_is_named_by_its_place(folder):
    with pytest.raises(UserError) as error:
        load_samples(write(folder, GOOD, GOOD, chat("Where?", "there"), name="data.json"), "det", F)
    refuse(str(error.value), "data.json: record 2", "there")


def test_malformed_array_is_named_by_its_line(folder):
    with pytest.raises(UserError) as error:
        load_samples(write(folder, GOOD, '{"image": }', name="data.json"), "det", F)
    refuse(str(error.value), "data.json: line 2", "JSON")


def test_bad_turn_of_a_record_is_named(folder):
    with pytest.raises(UserError) as error:
        load_samples(write(folder, chat("Where?", "[1,2,3,4]", "And?", "there")), "det", F)
    refuse(str(error.value), "data.jsonl: line 1, turn 1", "there")


def test_label_must_say_something(folder):
    with pytest.raises(UserError) as error:
        load_samples(write(folder, chat("Which class?", "sea"), chat("Which class?", "<think>?</think><answer> </answer>")), "cls", F)
    refuse(str(error.value), "data.jsonl: line 2")


@pytest.mark.parametrize("suffix, keep", [("jpg", .5), ("png", .5), ("jpg", 0), ("png", .02)])
def test_image_cut_off_is_named_with_its_record(folder, suffix, keep):
    """A header that reads well does not mean that the pixels do."""
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE[::-1], 3), np.uint8)
    Image.fromarray(noise).save(folder / f"cut.{suffix}")
    file = (folder / f"cut.{suffix}")
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(UserError) as error:
        load_images(load_samples(write(folder, GOOD, chat("Where?", "[1,2,3,4]", image=file.name)), "det", F)[1])
    refuse(str(error.value), "data.jsonl: line 2", file.name, "cannot be read")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_pillow_turns_them(folder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((400, 100), 50).convert("RGB").save(folder / "turned.png", exif=exif)
    image, = load_images(Sample("x", "geo", (folder / "turned.png",), "", "", F))
    upright = ImageOps.exif_transpose(Image.open(folder / "turned.png"))
    assert image.tobytes() == upright.resize(image.size, Image.Resampling.BICUBIC).tobytes()


def test_photographs_stand_upright_and_maps_stay_as_their_boxes_are(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (400, 100)).save(folder / "turned.jpg", exif=exif)
    sample = Sample("x", "geo", (folder / "turned.jpg",), "", "", F)
    assert load_images(sample)[0].size[0] < load_images(sample)[0].size[1]
    Image.effect_noise((F, F), 50).rotate(180).convert("RGB").save(folder / "map.png", exif=exif)
    image, = load_images(replace(sample, task="det", images=(folder / "map.png",)))
    assert image.tobytes() == Image.open(folder / "map.png").convert("RGB").tobytes()


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_mask_that_cannot_be_read_is_named_with_its_record(tmp_path, content):
    """evaluate.py --predictions, with masks that had moved, once ended in a traceback."""
    if content is not None:
        (tmp_path / "mask.png").write_bytes(content)
    sample = Sample("data.jsonl: line 2", "seg", (), "Where?", "none", 112, gt_mask=tmp_path / "mask.png")
    with pytest.raises(UserError, match="^data.jsonl: line 2: mask .*mask.png cannot be read"):
        score_completion("<think>a</think> <answer>none</answer>", sample)


def test_image_too_large_for_pillow_is_named(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1] // 3)  # beyond twice this PIL takes it for an attack
    with pytest.raises(UserError) as error:
        load_images(load_samples(write(folder, GOOD), "det", F)[0])
    refuse(str(error.value), "data.jsonl: line 1", "a.png")


def test_bad_image_in_a_class_folder_is_named(tmp_path):
    (tmp_path / "sea").mkdir()
    (tmp_path / "forest").mkdir()
    (tmp_path / "sea" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        load_samples(str(tmp_path), "cls", F)
    refuse(str(error.value), "sea/1.jpg", "cannot be read")


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_empty_file_is_refused(folder, content):
    with pytest.raises(UserError) as error:
        load_samples(write(folder, content), "det", F)
    refuse(str(error.value), "data.jsonl: no samples of task det")


@pytest.mark.parametrize("content", [b"\xff\xfe[", b"\x89PNG\r\n\x1a\n\xff"])
def test_binary_file_is_refused(folder, content):
    (folder / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_samples(str(folder / "data.jsonl"), "det", F)
    refuse(str(error.value), "data.jsonl", "UTF-8")


@pytest.mark.parametrize("source, task, image_size, says", [
    ("synthetic", "ship", F, "'ship'.*cls, mlc, det"), ("synthetic", "", F, "''"),
    ("synthetic", "det", 100, "--image-size 100.*28"), ("synthetic", "det", 0, "--image-size 0"),
    ("synthetic", "det", -28, "-28"), ("nowhere.json", "det", F, "nowhere.json: no such file"),
    ("dett=.", "det", F, "'dett' is no task"),
    (".", "det", F, "no known layout.*one folder per class serves cls, not det; .*--images"), ("empty", "cls", F, "empty.*no samples"),
])
def test_bad_flag_is_named(tmp_path, monkeypatch, source, task, image_size, says):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_samples(source, task, image_size)
    refuse(str(error.value), says)


def test_first_held_out_samples_are_of_all_classes(folder):
    """Class folders come sorted: the first 256 of a long list, which the scripts score, would be one class."""
    for label in ("desert", "forest", "sea"):
        (folder / "set" / label).mkdir(parents=True)
        for i in range(60):
            Image.new("RGB", (8, 8)).save(folder / "set" / label / f"{i}.png")
    for split in ("heldout", "train"):
        labels = [s.gt_answer for s in load_samples(str(folder / "set"), "cls", F, split=split)]
        assert set(labels[:20]) == {"desert", "forest", "sea"} and labels != sorted(labels)


def test_images_that_share_a_name_are_not_a_tenth():
    """Of scene_1/rgb.png, scene_1/nir.png, scene_2/rgb.png .. every nir.png was trained on and every rgb.png held out."""
    samples = [Sample(f"d.json: record {i}", "cls", (Path(f"{i // 2}/{'rgb' if i % 2 else 'nir'}.png"),), "q", "sea", 112)
               for i in range(60)]
    with pytest.raises(UserError, match="60 images have 2; set `split`"):
        split_samples(samples, "d.json")
    split_samples(samples[:2] * 30, "d.json")  # few images with many questions are no mistake


def test_a_split_that_some_records_lack_is_refused():
    """Records without one, meant for testing, were trained on, and records of train were held out."""
    samples = [Sample(f"d.json: record {i}", "cls", (Path(f"{i}.png"),), "q", "sea", 112, split="train" * (i < 6))
               for i in range(12)]
    for whole in (None, "train"):
        with pytest.raises(UserError, match="some records have `split`: train, and others none"):
            split_samples(samples, "d.json", whole)


def test_training_is_scored_on_val_and_evaluation_on_test(tmp_path, monkeypatch):
    """Training once scored itself on the test split every 50 steps: settings were chosen by it."""
    for name in ("train", "val", "test"):
        Image.new("RGB", (100, 100)).save(tmp_path / f"{name}.png")
    source = write(tmp_path, *({**GOOD, "image": f"{name}.png", "split": name} for name in ("train", "val", "test")))
    split = load_splits(parse_sources([source]), [], ["det"], F)["det"]
    assert [s.images[0].stem for part in split[:2] for s in part] == ["train", "val"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--task", "det", "--data", source, "--out", "x"])
    assert [s.images[0].stem for s in evaluate.load_evaluation(evaluate.parse_eval_args(None), F)] == ["test"]


def test_rows_of_the_logs_bring_their_samples_back(tmp_path):
    for task in TASKS:
        sample = Scenes(task, F, seed=3)[5]
        assert sample_from_row(json.loads(json.dumps(sample_to_row(sample)))) == sample
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    sample = Sample("a", "det", (tmp_path / "a.png",), "Where?", "[1,2,3,4]", F, ((1.0, 2.0, 3.0, 4.0, 5.0),), subset="small",
                    gt_texts=("x", "y"), choices=("A", "B"), category="ship")
    scene = Scenes("det", F, seed=3)[5]
    for expected in (sample, to_oriented(sample), to_oriented(scene), replace(sample, thinking=False), replace(scene, thinking=False)):
        assert sample_from_row(json.loads(json.dumps(sample_to_row(expected)))) == expected
    assert not {"oriented", "thinking"} & sample_to_row(scene).keys()  # horizontal rows are what they were


def test_order_and_what_is_held_out_do_not_depend_on_the_folder(tmp_path):
    """Else the same seed would meet other batches on another machine, and a copy of the data would be tested on what the
    original was trained on."""
    answers, heldout = [], []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        for i in range(30):
            Image.new("RGB", (30, 30)).save(folder / f"{i}.png")
        records = [{"image": f"{i}.png", "captions": [f"image {i}"]} for i in range(30)]
        (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
        samples = read_source(Source(str(folder / "captions.jsonl"), None, None), ["cap"], F)["cap"]
        answers.append([s.gt_answer for s in sorted(samples, key=data.record_hash)])
        heldout.append([s.gt_answer for s in load_samples(str(folder / "captions.jsonl"), "cap", F, split="heldout")])
    assert answers[0] == answers[1] != sorted(answers[0])
    assert heldout[0] == heldout[1] and 0 < len(heldout[0]) < 10


def test_prefetch_keeps_the_order_and_is_one_step_ahead():
    taken, began = [], []
    def plan(step):
        return [(step, i) for i in range(3)]
    def steps():
        for step in range(2, 5):
            taken.append(step)
            yield step, plan(step)
    for step, samples, encoded in prefetch(steps(), lambda sample: began.append(sample) or sample):
        assert samples == encoded == plan(step)
        assert taken == list(range(2, min(step + 1, 4) + 1))
    assert sorted(began) == [(step, i) for step in (2, 3, 4) for i in range(3)]
    assert list(prefetch([], str)) == []


def test_prefetch_hands_on_an_error_of_its_step():
    def encode(sample):
        if sample == 2:
            raise UserError("image 2 is missing")
        return sample
    seen = []
    with pytest.raises(UserError, match="image 2"):
        for step, _, _ in prefetch(((step, [step]) for step in range(5)), encode):
            seen.append(step)
    assert seen == [0, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Several sources

def scenes_of(folder, name, labels, **fields):
    """A file of class records, one image for each label, all different."""
    records = []
    for i, label in enumerate(labels):
        color = tuple(np.random.default_rng([zlib.crc32(f"{folder.name}{name}".encode()), i]).integers(0, 255, 3).tolist())
        image = f"{Path(name).stem}_{i}.png"
        Image.new("RGB", (20 + i, 30), color).save(folder / image)
        records.append({**chat("Which class? Classes: sea, land", label, image=image), **fields})
    return write(folder, *records, name=name)


def test_joined_sources_are_mixed_and_shots_are_of_training_alone(tmp_path):
    """End to end, those that a run is scored on would be those of the first source. And --shots leaves the held-out ones as they are."""
    files = [scenes_of(tmp_path, f"{name}.jsonl", ["sea", "land"] * 15, split="train") for name in "ab"]
    held = [scenes_of(tmp_path, f"{name}.jsonl", ["sea", "land"] * 15, split="val") for name in "cd"]
    split = load_splits(parse_sources(files), parse_sources(held), ["cls"], F, shots=2, heldout=20)["cls"]
    assert Counter(sample.category for sample in split.train) == {"sea": 2, "land": 2}
    assert len(split.held_out) == 20
    assert {Path(sample.id.partition(": ")[0]).name for sample in split.held_out} == {"c.jsonl", "d.jsonl"}


@pytest.mark.parametrize("value, source", [
    ("a.json", ("a.json", None, None)), ("a.json@img", ("a.json", "img", None)), ("det=a.json", ("a.json", None, "det")),
    ("det=a.json@img/b", ("a.json", "img/b", "det")), ("x=a.json", ("x=a.json", None, None)),  # no task: part of the name
    ("synthetic", ("synthetic", None, None))])
def test_sources_are_parsed(value, source):
    assert [s[:3] for s in parse_sources([value])] == [source]
    assert parse_sources([value], "default")[0].images == (source[1] or "default")


@pytest.mark.parametrize("heldout, says", [(16, "256 held out, 16 of them scored ("), (300, "256 held out (")])
def test_start_of_a_run_says_how_many_samples_are_scored(heldout, says):
    """It once said 256 whatever --heldout was."""
    split = load_splits(parse_sources(["synthetic"]), [], ["det"], F, heldout=heldout)["det"]
    assert len(split.held_out) == min(heldout, 256) and says in split.summary


def test_a_name_may_contain_an_at_sign(tmp_path):
    (tmp_path / "a@b.json").write_text("[]")
    for images, value in ((None, ""), ("img", "@img")):
        assert parse_sources([f"{tmp_path}/a@b.json{value}"]) == [Source(f"{tmp_path}/a@b.json", images, None)]


def test_each_task_takes_its_own_source_and_those_without_a_task(folder):
    one, two = scenes_of(folder, "one.json", ["sea"] * 20), scenes_of(folder, "two.json", ["land"] * 30)
    boxes = write(folder, GOOD, {**GOOD, "image": "b.png"}, name="boxes.json")
    sources = parse_sources([f"cls={one}", f"cls={two}", f"det={boxes}"])
    cls, det = (load_split(sources, [], task, F) for task in ("cls", "det"))
    assert len(cls.train) + len(cls.held_out) == 50 and {s.gt_answer for s in cls.train} == {"sea", "land"}
    assert len(det.train) == len(det.held_out) == 1
    assert "cls: " in cls.summary and "one.json" in cls.summary and "two.json" in cls.summary and "a tenth" in cls.summary
    with pytest.raises(UserError, match="--data has no source for task vqa: add vqa=SOURCE"):
        load_split(sources, [], "vqa", F)


def test_a_source_that_cannot_serve_a_task_is_passed_over_unless_it_was_named_for_it(folder):
    (folder / "set/sea").mkdir(parents=True)
    (folder / "set/land").mkdir()
    for i in range(20):
        Image.new("RGB", (9 + i, 9)).save(folder / f"set/{('sea', 'land')[i % 2]}/{i}.png")
    boxes = write(folder, GOOD, {**GOOD, "image": "b.png"}, name="boxes.json")
    sources = parse_sources([str(folder / "set"), f"det={boxes}"])
    assert len(load_split(sources, [], "det", F).train) == 1
    with pytest.raises(UserError, match="serves cls, not det"):
        load_split(parse_sources([f"det={folder / 'set'}"]), [], "det", F)
    with pytest.raises(UserError, match="serves cls, not vqa"):
        load_split(parse_sources([str(folder / "set")]), [], "vqa", F)


def test_eval_data_is_held_out_and_nothing_else(folder):
    train, test = scenes_of(folder, "a.json", ["sea"] * 20), scenes_of(folder, "b.json", ["land"] * 10)
    split = load_split(parse_sources([train]), parse_sources([test]), "cls", F)
    assert len(split.train) == 20 and len(split.held_out) == 10 and {s.gt_answer for s in split.held_out} == {"land"}
    published = scenes_of(folder, "c.json", ["land"] * 4, split="test")
    more = scenes_of(folder, "d.json", ["sea"] * 4, split="train")
    split = load_split(parse_sources([train]), parse_sources([published, more]), "cls", F)
    assert len(split.held_out) == 8


@pytest.mark.parametrize("name", ["train.json", "VRSBench_train.json", "train_1shot.json", "fs-10-shots.json"])
def test_file_named_as_a_training_split_is_used_whole(folder, name):
    """A 1-shot file of 26 categories once trained on 23: a tenth was held out."""
    split = load_split(parse_sources([scenes_of(folder, name, ["sea", "land"] * 13)]), [], "cls", F)
    assert len(split.train) == 26 and len(split.held_out) == 0 and "none of" in split.summary


def test_one_task_of_a_training_split_is_used_whole_too(folder):
    """load_samples once held a tenth of it out, load_splits nothing."""
    source = scenes_of(folder, "train_1shot.json", ["sea", "land"] * 13)
    assert len(load_samples(source, "cls", F, split="train")) == 26
    with pytest.raises(UserError, match="no samples of task cls in the heldout split; it holds nothing out"):
        load_samples(source, "cls", F, split="heldout")


def test_file_of_one_image_says_that_it_is_held_out(folder):
    """It once said that nothing was."""
    with pytest.raises(UserError, match="no samples of task cls in the train split; all its images are held out; add images"):
        load_split(parse_sources([scenes_of(folder, "one.json", ["sea"])]), [], "cls", F)


@pytest.mark.parametrize("name", ["trains.json", "shots.json", "strained.json", "all.json"])
def test_other_names_hold_a_tenth_out(folder, name):
    split = load_split(parse_sources([scenes_of(folder, name, ["sea", "land"] * 13)]), [], "cls", F)
    assert 0 < len(split.held_out) < 8 and len(split.train) + len(split.held_out) == 26


def test_a_source_of_nothing_but_training_records_holds_nothing_out(folder, capsys):
    train = scenes_of(folder, "a.json", ["sea"] * 20, split="train")
    split = load_split(parse_sources([train]), [], "cls", F)
    assert len(split.train) == 20 and "0 held out" in split.summary and "no scores will tell" in split.summary


@pytest.mark.parametrize("mark", ["", "[classify] "])
def test_a_document_of_splits_trains_on_none_of_its_test_records(folder, mark):
    """It was read as NWPU-Captions, whose lists are classes: `test` was one of them."""
    records = {name: json.loads(Path(scenes_of(folder, f"{name}.json", ["sea"] * n)).read_text())
               for name, n in (("train", 9), ("test", 4))}
    for record in records["train"] + records["test"]:
        record["conversations"][0]["value"] = mark + record["conversations"][0]["value"]
    if mark:
        records["train"].append(chat("[refer] where is it?", "{<1><2><30><40>}", image="train_0.png"))
    (folder / "both.json").write_text(json.dumps(records))
    split = load_split(parse_sources([str(folder / "both.json")]), [], "cls", F)
    assert len(split.train) == 9 and {s.images[0].name[:5] for s in split.held_out} == {"test_"}
    assert {s.category for s in split.train} == {"sea"}


def test_a_published_split_may_be_named_by_both_flags(folder, capsys):
    """Its copies in train and test are a warning with --data alone; with both flags they ended the run."""
    train = [*json.loads(Path(scenes_of(folder, "t.json", ["sea"] * 9, split="train")).read_text())]
    shutil.copy(folder / "t_3.png", folder / "copy.png")
    source = write(folder, *train, {**chat("Which class? Classes: sea, land", "sea", image="copy.png"), "split": "test"}, name="p.json")
    split = load_split(parse_sources([source]), parse_sources([source]), "cls", F)
    assert len(split.train) == 9 and "trained on" in split.summary
    assert "1 of its held-out images are trained on too" in capsys.readouterr().err


def test_classes_that_differ_between_the_flags_are_named(folder, capsys):
    train, test = scenes_of(folder, "a.json", ["sea", "land"] * 9), scenes_of(folder, "b.json", ["land", "city"])
    load_split(parse_sources([train]), parse_sources([test]), "cls", F)
    assert "asks of cls" not in capsys.readouterr().err  # records whose questions are alike
    for name in ("train/sea/1.png", "train/land/1.png", "test/sea/2.png"):
        (folder / "f" / name).parent.mkdir(parents=True)
        Image.new("RGB", (30, 30 + len(name))).save(folder / "f" / name)
    load_split(parse_sources([str(folder / "f" / "train")]), parse_sources([str(folder / "f" / "test")]), "cls", F)
    assert "asks of cls what --data does not, such as 'Which class does this scene belong to? Classes: sea.'" in capsys.readouterr().err


def test_a_label_with_a_slash_does_not_fix_the_order(folder):
    """All records of xView's `Truck w/Box` had the hash of `Box`, so --shots took the first ones."""
    samples = [Sample(f"/data/a.json: image {i}, Truck w/Box", "det", (), "", "", F) for i in range(40)]
    elsewhere = [Sample(f"b/a.json: image {i}, Truck w/Box", "det", (), "", "", F) for i in range(40)]
    assert len({data.record_hash(s)[0] for s in samples}) == 40
    assert list(map(data.record_hash, samples)) == list(map(data.record_hash, elsewhere))


def test_held_out_image_that_is_trained_on_is_refused(folder):
    """The same file in both, or a copy of it under another name."""
    train = scenes_of(folder, "a.json", ["sea"] * 20)
    with pytest.raises(UserError, match="a.json: in --data and in --eval-data, but it has no val or test"):
        load_split(parse_sources([train]), parse_sources([train]), "cls", F)
    shutil.copy(folder / "a_3.png", folder / "copy.png")
    test = write(folder, chat("Which class?", "sea", image="copy.png"), name="t.json")
    with pytest.raises(UserError) as error:
        load_split(parse_sources([train]), parse_sources([test]), "cls", F)
    refuse(str(error.value), "a_3.png", "copy.png", "remove one")


def test_image_of_another_task_is_shared_too(folder):
    """In SFT, and from stage to stage, one model learns all tasks."""
    for name in ("a.json", "b.json"):
        scenes_of(folder, name, ["sea"] * 20)
    a, b = folder / "a.json", folder / "b.json"
    with pytest.raises(UserError, match="holds it out"):
        load_splits(parse_sources([f"cls={a}", f"vqa={b}"]), parse_sources([f"cls={b}", f"vqa={a}"]), ["cls", "vqa"], F)


@pytest.mark.parametrize("splits", [("train", "test"), ("", "")])
def test_image_that_one_source_has_on_both_sides_is_counted(folder, capsys, splits):
    """Copies within a source were not looked for. A published split may have some, so it is no error."""
    scenes = scenes_of(folder, "a.json", ["sea"] * 20)
    held_out = load_split(parse_sources([scenes]), [], "cls", F).held_out[0].images[0]
    assert "trained on too" not in capsys.readouterr().err
    shutil.copy(held_out, folder / "trained.png")
    write(folder, *({**chat("Which class? Classes: sea, land", "sea", image=name), "split": split}
                    for name, split in zip(["trained.png", held_out.name] * 2, splits * 2)), name="b.json")
    split = load_split(parse_sources([str(folder / "b.json")]), [], "cls", F)
    assert {s.images[0].name for s in split.train}.isdisjoint(s.images[0].name for s in split.held_out)
    assert "b.json: 1 of its held-out images are trained on too" in capsys.readouterr().err


def test_source_of_an_evaluation_that_gives_nothing_is_named(folder):
    """Beside a source with a test split, one of training records was named in the line above the scores and not scored."""
    test = write(folder, *[GOOD | {"image": "a.png", "split": "test"}] * 3)
    (folder / "c_train.json").write_text(json.dumps([GOOD | {"image": "b.png"}]))
    with pytest.raises(UserError, match="c_train.json: no samples of task det in the heldout split"):
        evaluated(task="det", data=[str(test), f"{folder / 'c_train.json'}"], images=str(folder))


def test_images_of_the_same_names_in_another_folder_are_other_data():
    """A resumed run would have gone on with them."""
    one, other, moved = (data.fingerprint([Sample("x", "cls", (Path(f"{folder}/1.png"),), "?", "sea", F)])
                         for folder in ("/old/A", "/old/B", "/new/A"))
    assert one == moved != other


def test_scenes_have_no_files_to_share(folder):
    eval_sources = parse_sources([scenes_of(folder, "a.json", ["sea"] * 3)])
    assert load_splits(parse_sources(["synthetic"]), eval_sources, ["cls"], F)["cls"].train


def test_shots_are_taken_of_scenes_too():
    shots = Counter(sample.category for sample in data.few_shots(Scenes("cls", 28, 0, n=60), 2))
    assert len(shots) > 5 and set(shots.values()) == {2}


def test_source_of_a_task_that_is_not_asked_for_is_not_read(folder, capsys):
    load_splits(parse_sources(["synthetic", "cls=missing.json"]), [], ["det"], F)
    assert "missing.json is not read" in capsys.readouterr().err


@pytest.mark.parametrize("first", [0, 1])
def test_a_record_of_another_task_is_named_wherever_it_is(folder, first):
    """A first record of another task once passed the whole file over, a last one ended the run."""
    records = [{"image_id": "a.png", "question": "Is it?", "ground_truth": "yes", "type": "presence"}] * 2
    records[first] = {"image_id": "a.png", "question": "ship", "ground_truth": "{<10><10><40><40>}", "type": "ref"}
    with pytest.raises(UserError, match="a benchmark's row serves"):
        load_samples(write(folder, *records), "vqa", F)


def test_synthetic_is_not_joined_with_files(folder):
    with pytest.raises(UserError, match="synthetic cannot be joined"):
        load_split(parse_sources(["synthetic", scenes_of(folder, "a.json", ["sea"] * 20)]), [], "cls", F)


def test_joined_sources_share_no_image(folder):
    one, two = scenes_of(folder, "one.json", ["sea"] * 60), scenes_of(folder, "two.json", ["land"] * 60)
    load_split(parse_sources([one, two]), [], "cls", F)
    shutil.copy(folder / "one.json", folder / "train_1shot.json")
    with pytest.raises(UserError, match="holds it out"):
        load_split(parse_sources([one, str(folder / "train_1shot.json")]), [], "cls", F)


def evaluated(image_size=F, **flags):
    flags = {"task": "cls", "data": ["synthetic"], "eval_data": [], "images": None, "split": None, "limit": None,
             "oriented": False, "no_think": False, "system": None, "choices": None,
             "negatives": None} | flags
    return evaluate.load_evaluation(SimpleNamespace(**flags), image_size)


def test_a_source_of_test_samples_only_is_scored(folder):
    """A file of a published test split trains nothing; evaluate.py once refused it for that."""
    test = scenes_of(folder, "t.json", ["sea"] * 5, split="test")
    assert len(evaluated(data=[test])) == 5
    with pytest.raises(UserError, match="t.json: no samples of task cls in the train split"):
        load_split(parse_sources([test]), [], "cls", F)


def test_eval_data_alone_is_what_is_scored(folder, capsys):
    """Its own file is read and named, not the default of --data."""
    assert len(evaluated(eval_data=[scenes_of(folder, "e.json", ["sea"] * 7)])) == 7
    assert "7 samples of cls from" in (out := capsys.readouterr().out) and "e.json (heldout)" in out
    whole = scenes_of(folder, "train_1shot.json", ["land"] * 3)
    assert len(evaluated(eval_data=[whole])) == len(evaluated(data=[whole])) == 3
