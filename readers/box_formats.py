"""Boxes, questions and target texts as data sets write them -> a Sample.

    {<x1><y1><x2><y2>|<theta>}   0-100 grid of GeoChat and VRSBench
    [[x1, y1, x2, y2, theta]]    0-100 grid of EarthDial
    [x1, y1, x2, y2]             pixels of the original image (2U1, VLM-R1)
    four corners                 of an oriented box (DOTA, GeoChat-Bench, VRSBench)

An oriented box (OBB) is a rectangle with an angle, (x1, y1, x2, y2, theta). An axis-aligned box
(HBB) has theta 0; the envelope of an OBB is the smallest HBB around it. Every box becomes pixels of
the resized image, also in a question or within a description. `notes` counts, by reason, what was
left out or changed because of noise. What a user has to fix raises UserError.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from boxes import clip_and_round, convert_box, format_boxes, format_json, obb_to_hbb, parse_boxes
from runtime.errors import UserError
from sample import BOX_TASKS, Sample

GRID = (100, 100)
MAX_BOXES_PER_QUESTION = 100  # COCO's limit; the 536 ships of one DOTA tile are 5,000 tokens

NUMBER = r"-?\d+(?:\.\d+)?"
BRACKET = re.compile(r"\[[^\[\]]*\]")  # one box for parse_boxes
BRACE_BOX = r"\{(?:<-?\d+>){4}(?:\|<-?\d+>)?\}"
FIVE_NUMBERS = rf"\[\s*{NUMBER}(?:\s*,\s*{NUMBER}){{4}}\s*\]"
BOX = rf"(?:{BRACE_BOX}|\[\s*{NUMBER}(?:\s*,\s*{NUMBER}){{3,4}}\s*\])"
# Consecutive boxes, with the brackets and tags between and around them.
BOX_RUN = re.compile(rf"(?:<box>)?\[*{BOX}(?:(?:[\s,\[\]]|<delim>)*{BOX})*\]*(?:</box>)?")

# GeoChat begins a question with the mark of its task.
TASK_MARK = re.compile(
    r"\s*(?:<image>\s*)*\[(refer|grounding|identify|caption|classify|vqa|changedet)\]")
MARK_TASKS = {"refer": ("det", "rec"), "grounding": ("ground",), "identify": ("rcap",),
              "caption": ("cap",), "classify": ("cls",), "vqa": ("vqa",), "changedet": ("change",)}
# A closed question lists the answers to choose from.
CLOSED_QUESTION = re.compile(r"classif|classes|options:|yes or no|none, one, two", re.IGNORECASE)
TAGS = re.compile(r"<image>|</?(?:p|ref)>|\\n|<\|\w+\|>")
LEADING_MARKS = re.compile(r"^\s*(?:\[[\w.]+\]\s*)+")
LABELS_WITH_COMMAS = (  # of BigEarthNet
    "land principally occupied by agriculture, with significant areas of natural vegetation",
    "beaches, dunes, sands", "moors, heathland and sclerophyllous vegetation")


# --------------------------------------------------------------------------------------------------
# Boxes

def clip_boxes(boxes: Iterable[Sequence[float]], image_size: int, notes: Counter) -> tuple:
    """The boxes (five numbers, pixels of the resized image) that have an area within the image.
    HBBs are clipped to the image. A clipped OBB would be no rectangle, so it stays whole, and its
    envelope is clipped where it is used."""
    kept = []
    for box in boxes:
        envelope = obb_to_hbb(box)
        clipped = tuple(min(max(v, 0), image_size) for v in envelope)
        x1, y1, x2, y2 = clipped
        if box[2] <= box[0] or box[3] <= box[1] or x2 <= x1 or y2 <= y1:
            notes["boxes without area left out"] += 1
            continue
        if max(abs(a - b) for a, b in zip(clipped, envelope)) > 1e-6:
            notes["boxes clipped to the image"] += 1
        kept.append(tuple(box) if box[4] else (*clipped, 0))
    return tuple(kept)


def min_area_rect(corners: np.ndarray) -> tuple:
    """The smallest rectangle around a quadrilateral (4, 2), y down: (x1, y1, x2, y2, theta). theta
    is in [0, 90) degrees, clockwise on the screen. One side of the rectangle lies along a side of
    the quadrilateral (Freeman and Shapira 1975)."""
    rectangles = []
    for x, y in np.roll(corners, -1, axis=0) - corners:
        theta = round(math.degrees(math.atan2(y, x)), 6) % 90
        cos, sin = math.cos(math.radians(theta)), math.sin(math.radians(theta))
        rotation = np.array([[cos, -sin], [sin, cos]])
        rotated = corners @ rotation
        low, high = rotated.min(0), rotated.max(0)
        cx, cy = rotation @ (low + high) / 2
        w, h = high - low
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, theta)
        rectangles.append((w * h, tuple(map(float, box))))
    return min(rectangles)[1]


def bounding_box(points: np.ndarray) -> tuple:
    """The axis-aligned box around points (n, 2)."""
    return (*map(float, points.min(0)), *map(float, points.max(0)), 0)


def parse_grid_boxes(text: str, image_size: int) -> list[tuple]:
    """Boxes of the 0-100 grid in a text, in pixels of the resized image. Square brackets have to be
    doubled and hold five numbers; otherwise they hold pixels."""
    found = re.findall(BRACE_BOX, text)
    if not found and "[[" in text:
        found = re.findall(FIVE_NUMBERS, text)
    boxes = [[float(v) for v in re.findall(NUMBER, box)] for box in found]
    return [convert_box(box, GRID, (image_size, image_size)) for box in boxes]


def parse_pixel_boxes(text: str, size: tuple[int, int], image_size: int, source: str) -> tuple:
    """Boxes `[x1, y1, x2, y2]` in pixels of the original image, in pixels of the resized image.

    size  (width, height) of the original image
    `none` and `[]` have no boxes. Raises UserError for a bad box.
    """
    boxes = parse_boxes(text)
    if boxes is None:
        raise UserError(f"{source}: the text {text[:60]!r} has too many boxes")
    for bracket, (x1, y1, x2, y2) in zip(BRACKET.findall(text), boxes):
        if not (-1 <= x1 < x2 <= size[0] + 1 and -1 <= y1 < y2 <= size[1] + 1):  # 1 px of rounding
            lies = "its axis-aligned envelope lies" if bracket.count(",") == 4 else "lies"
            raise UserError(f"{source}: box {bracket[:60]!r} is malformed, has no area, or {lies} "
                            f"outside its image of {size[0]} x {size[1]} pixels")
    return tuple(convert_box(box.tolist(), size, (image_size, image_size)) for box in boxes)


def rewrite_boxes(text: str, size: tuple[int, int], image_size: int, source: str,
                  notes: Counter) -> tuple[str, tuple]:
    """(the text with its boxes as [x1,y1,x2,y2] in pixels of the resized image, these boxes)."""
    boxes = []

    def rewrite(match: re.Match) -> str:
        found = parse_grid_boxes(match[0], image_size)
        if found:
            found = clip_boxes(found, image_size, notes)
        else:
            found = parse_pixel_boxes(match[0], size, image_size, source)
        boxes.extend(found)
        return f" {format_boxes(found, image_size)}" if found else ""

    if "{" in text or "[" in text:
        text = BOX_RUN.sub(rewrite, text)
    return plain_text(text), tuple(boxes)


# --------------------------------------------------------------------------------------------------
# Texts

def plain_text(text: str) -> str:
    """The text without <image>, <p> and <ref> tags, chat tokens <|..|>, and the bracketed marks of
    task and sensor that it begins with."""
    if "<" in text or "\\" in text:
        text = TAGS.sub(" ", text)
    if "[" in text:
        text = LEADING_MARKS.sub("", text)
    return " ".join(text.split())


def tasks_of_question(question: str, target: str) -> tuple[str, ...]:
    """The tasks that a question of GeoChat, VRSBench or EarthDial serves. The mark decides. Where
    xBD's marks are ambiguous, it also matters whether the question is closed and whether the target
    has boxes."""
    match = TASK_MARK.match(question)
    mark = match[1] if match else None
    if mark in (None, "identify", "changedet") and CLOSED_QUESTION.search(question):
        return ("mlc",) if "list of classes" in question else ("cls",)
    if mark is None:
        return ("vqa",) if "word" in question.lower() else ()
    if mark == "grounding" and not BOX_RUN.search(target):
        return ("change", "cap")
    return MARK_TASKS[mark]


def phrase_to_question(task: str, phrase: str) -> str:
    """A question from a phrase that names an object, or (rcap) from a box."""
    if task == "rcap":
        return f"What is the object at {phrase}"
    return f"Give me the location of {phrase}"


def parse_label_list(question: str, source: str) -> tuple[str, ...]:
    """The labels that a question lists after a colon or question mark. Commas within a label of
    BigEarthNet do not split it."""
    listed = re.search(r"[:?]([^:?.]*,[^:?.]*)", question)
    if not listed:
        raise UserError(f"{source}: the question lists no classes after `:` or `?`, "
                        "and mlc needs to know them all")
    label = rf"(?:{'|'.join(LABELS_WITH_COMMAS)}|[^,])+"
    return tuple(text.strip() for text in re.findall(label, listed[1], re.IGNORECASE))


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, gt_answer) of a target that may already have <think> and <answer> tags."""
    if "<" not in text:
        return "", text.strip()
    text = re.sub(r"<\|\w+\|>", "", text)  # a completion cannot contain chat tokens
    think = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    answer = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return think[1].strip() if think else "", (answer[1] if answer else text).strip()


def default_think(task: str, gt_answer: str, n_boxes: int) -> str:
    """Reasoning for a data set that has none: it adds nothing to the target."""
    if task in BOX_TASKS:
        return f"{n_boxes} to find." if n_boxes else "Nothing to find."
    texts = {"cls": f"The scene looks like {gt_answer}.", "mlc": f"The scene shows {gt_answer}.",
             "rcap": f"The region shows {gt_answer}.", "pair": f"The same place as in {gt_answer}.",
             "cap": "The image as a whole.", "change": "The images side by side."}
    return texts.get(task, f"That is {gt_answer}.")


# --------------------------------------------------------------------------------------------------
# Samples

def make_sample(source: str, task: str, image_size: int, images: Sequence, question: str,
                gt_answer: str = "", gt_boxes: Sequence = (), label: str = "", think: str = "",
                category: str = "", **fields) -> Sample:
    """A Sample. For det, rec and ovd gt_answer is written here, from the boxes; `label` is the
    class of ovd's boxes. Raises UserError for an empty target."""
    if task == "det":
        gt_answer = format_boxes(gt_boxes, image_size)
    elif task == "rec":
        gt_answer = format_json({"bbox_2d": clip_and_round(gt_boxes[0], image_size)})
    elif task == "ovd":
        gt_answer = format_json(
            [{"bbox_2d": clip_and_round(box, image_size), "label": label} for box in gt_boxes])
    if not gt_answer:
        raise UserError(f"{source}: the target is empty (in conversations, the gpt value)")
    if not category and task == "cls":
        category = gt_answer
    return Sample(id=source, task=task, images=tuple(images), question=question,
                  gt_answer=gt_answer, image_size=image_size, gt_boxes=tuple(gt_boxes),
                  think=think or default_think(task, gt_answer, len(gt_boxes)),
                  category=category, **fields)


def sample_from_text(source: str, task: str, image_size: int, images: Sequence,
                     size: tuple[int, int], question: str, gt_texts: Sequence[str],
                     notes: Counter, boxes: Sequence = (), **fields) -> Iterator[Sample]:
    """The Sample of a question and its target texts as the data set writes them, or nothing.

    size      (width, height) of the first image, before it is resized
    gt_texts  all right texts; the first one becomes gt_answer
    boxes     target boxes in pixels of the resized image, where they are not part of the text
    Yields nothing, and counts it in `notes`, if noise leaves no box or, for rec, several.
    """
    question, gt_boxes = rewrite_boxes(question, size, image_size, source, notes)
    gt_answer, nothing_to_find = gt_texts[0], False
    if task in ("det", "rec"):
        boxes = boxes or parse_grid_boxes(gt_answer, image_size)
        if boxes:
            gt_boxes = clip_boxes(boxes, image_size, notes)
        elif parse_boxes(gt_answer) is None and not BRACKET.search(gt_answer):
            needs = "boxes or `none`" if task == "det" else "a box"
            raise UserError(f"{source}: the target {gt_answer[:60]!r} has no box [x1, y1, x2, y2]; "
                            f"--task {task} needs {needs}")
        else:
            gt_boxes = parse_pixel_boxes(gt_answer, size, image_size, source)
            nothing_to_find = task == "det"  # `none` is a target too
    elif task in BOX_TASKS:
        found = parse_boxes(gt_answer)
        nothing_to_find = task != "ground" and found is not None and not len(found)
        gt_answer, gt_boxes = rewrite_boxes(gt_answer, size, image_size, source, notes)
    else:
        gt_texts = [plain_text(text) for text in gt_texts]
        gt_answer = gt_texts[0]

    needs_box = (task in BOX_TASKS or task == "rcap") and not nothing_to_find
    if needs_box and not gt_boxes:
        notes["records without a box in the image left out"] += 1
        return
    if task == "rec" and len(gt_boxes) > 1:
        notes["records of several objects left out"] += 1
        return
    if task == "mlc":
        fields["choices"] = parse_label_list(question, source)
    if task == "pair":
        letters = tuple("ABCDEFGHIJ"[: len(images) - 1])
        if gt_answer not in letters:
            raise UserError(f"{source}: the target {gt_answer!r} is not the letter of a candidate, "
                            f"{', '.join(letters)}")
        fields["choices"] = letters
    if len(gt_texts) > 1:
        fields["gt_texts"] = tuple(gt_texts)
    yield make_sample(source, task, image_size, images, question, gt_answer, gt_boxes, **fields)


def sample_per_class(source: str, task: str, image_size: int, images: Sequence,
                     objects: Iterable[tuple[str, tuple]], notes: Counter,
                     question: str = "Locate every {}.", **fields) -> Iterator[Sample]:
    """One Sample (det, ovd) for each class of an image. `objects` are (class, box in pixels of the
    resized image)."""
    boxes_of_class: dict[str, list] = {}
    for label, box in objects:
        boxes_of_class.setdefault(label, []).append(box)
    for kind, boxes in sorted(boxes_of_class.items()):
        boxes = clip_boxes(boxes, image_size, notes)
        if len(boxes) > MAX_BOXES_PER_QUESTION:
            notes[f"questions for more than {MAX_BOXES_PER_QUESTION} boxes left out"] += 1
        elif boxes:
            yield make_sample(f"{source}, {kind}", task, image_size, images, question.format(kind),
                              gt_boxes=boxes, label=kind, category=kind, **fields)
