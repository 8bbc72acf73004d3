"""Boxes, questions and target texts as data sets write them -> a Sample.

    {<x1><y1><x2><y2>|<theta>}   0-100 grid of GeoChat and VRSBench
    [[x1, y1, x2, y2, theta]]    0-100 grid of EarthDial
    [x1, y1, x2, y2]             pixels of the original image (2U1, VLM-R1)
    four corners                 of an oriented box (DOTA, GeoChat-Bench, VRSBench)

An oriented box (OBB) is a rectangle with an angle, (x1, y1, x2, y2, theta). A horizontal box
(HBB) has theta 0; the envelope of an OBB is the smallest HBB around it. Every box becomes pixels of
the resized image, also in a question or within a description. Every target earns its own reward, up
to rounding to whole pixels. What a user has to fix raises UserError.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from boxes import clip_and_round, convert_box, format_boxes, format_json, obb_to_hbb, parse_boxes
from readers.files import first_image_size, one_line
from runtime.errors import UserError
from sample import BOX_TASKS, Sample
from texts import MAX_TEXT, parse_coordinates, parse_count, strip_boxes

MAX_BOXES_PER_QUESTION = 100  # COCO's limit; the 536 ships of one DOTA tile are 5,000 tokens
FAR = 1e6  # pixels from the image: an answer's numbers have at most six digits
LOCATE = "Give me the location of "  # before a phrase that names an object
NO_AREA = "boxes without area left out"

NUMBER = r"-?\d+(?:\.\d+)?"
BRACKET = re.compile(r"\[[^\[\]]*\]")  # one box for parse_boxes
LONG_FRACTION = re.compile(r"(\.\d{9})\d+")
BRACE_BOX = r"\{(?:<-?\d+>){4}(?:\|<-?\d+>)?\}"
GRID_BOX = re.compile(r"\{<(-?\d+)><(-?\d+)><(-?\d+)><(-?\d+)>(?:\|<(-?\d+)>)?\}")
FIVE_NUMBERS = re.compile(r"\[\s*" + r"\s*,\s*".join([f"({NUMBER})"] * 5) + r"\s*\]")
BOX = rf"(?:{BRACE_BOX}|\[\s*{NUMBER}(?:\s*,\s*{NUMBER}){{3,4}}\s*\])"
# Consecutive boxes, with the brackets and tags between and around them.
BOX_START = re.compile(r"\{<|\[\s*-?\d")  # a text without it has no boxes, which is found quickly
BOX_RUN = re.compile(rf"(?:<box>)?\[{{0,9}}{BOX}(?:(?:[\s,\[\]]|<delim>)*{BOX})*\]*(?:</box>)?")

# GeoChat begins a question with the mark of its task, but not those about scenes and of one word.
TASK_MARK = re.compile(
    r"\s*(?:<image>\s*)*\[(refer|grounding|identify|caption|classify|vqa|changedet)\]")
MARK_TASKS = {"refer": ("det", "rec"), "grounding": ("ground",), "identify": ("rcap",),
              "caption": ("cap",), "classify": ("cls",), "vqa": ("vqa",), "changedet": ("change",)}
MARKED_TEXT = rf'"(?:\s|\\[nrt]|<image>)*\[(?:{"|".join(MARK_TASKS)})\]'  # in JSON
# A closed question lists the answers to choose from.
CLOSED_QUESTION = re.compile(r"classif|classes|options:|yes or no|none, one, two", re.IGNORECASE)
TAGS = re.compile(r"<image>|</?(?:p|ref)>|\\n|<\|\w+\|>")
LETTER_OR_DIGIT = re.compile(r"[^\W_]")
CHAT_TOKEN = re.compile(r"<\|\w+\|>")
LAYOUT = re.compile(r"(?:<think>(.*?)</think>)?\s*(?:<answer>(.*)</answer>|(.*))", re.DOTALL)
LAYOUT_TAG = re.compile(r"think(?:ing)?\s*>|</?answer\s*>", re.IGNORECASE)
RESERVED = re.compile(f"{LAYOUT_TAG.pattern}|{CHAT_TOKEN.pattern}", re.IGNORECASE)
LEADING_MARKS = re.compile(r"\s*(?:\[[\w.]+\]\s*)+")
LABELS_WITH_COMMAS = (  # of BigEarthNet
    "land principally occupied by agriculture, with significant areas of natural vegetation|"
    "beaches, dunes, sands|moors, heathland and sclerophyllous vegetation")
DEFAULT_THINK = {
    "cls": "The scene looks like {}.", "mlc": "The scene shows {}.",
    "rcap": "The region shows {}.", "pair": "The same place as in {}.",
    "cap": "The image as a whole.", "change": "The images side by side."}


class Request(NamedTuple):
    """What a reader is asked for."""
    task: str
    image_size: int             # side in pixels of the resized image
    image_folder: Path | None   # that image names are relative to; None: where the format has it
    notes: Counter              # by reason, how much was left out or changed because of noise
    marked: bool = False        # whether GeoChat's marks tell the tasks of turns apart
    rsvqa_answers: Callable[[], dict] = dict  # question id -> answer
    choices: int | None = None    # satellite images in a question of pair; None: the reader's
    negatives: str | None = None  # "random" or "near"; None: near where there are positions


# --------------------------------------------------------------------------------------------------
# Boxes

def clip_boxes(boxes: Iterable[Sequence[float]], request: Request) -> tuple:
    """The boxes (five numbers, pixels of the resized image) that have an area within the image.

    HBBs are clipped to the image. A clipped OBB would be no rectangle, so it stays whole, and its
    envelope is clipped where it is used. A box of a few pixels becomes that of its own answer,
    which has whole pixels, if their IoU is below 0.75.
    """
    size, notes, kept = request.image_size, request.notes, []
    for box in boxes:
        x1, y1, x2, y2, theta = box
        is_box = -FAR < x1 < x2 < FAR and -FAR < y1 < y2 < FAR and -FAR < theta < FAR  # not for NaN
        envelope = obb_to_hbb(box) if is_box else (0, 0, 0, 0)
        is_inside = min(envelope) >= 0 and max(envelope) <= size
        clipped = envelope if is_inside else tuple([min(max(v, 0), size) for v in envelope])
        x1, y1, x2, y2 = clipped
        if x2 <= x1 or y2 <= y1:
            notes[NO_AREA] += 1
            continue
        if not is_inside and max(abs(a - b) for a, b in zip(clipped, envelope)) > 1e-6:
            notes["boxes clipped to the image"] += 1
        box = tuple(box) if theta else (*clipped, 0)
        if x2 - x1 < 8 or y2 - y1 < 8:  # of a larger one IoU >= (7 / 8)^2
            a1, b1, a2, b2 = whole = clip_and_round(clipped, size)
            common = (min(x2, a2) - max(x1, a1)) * (min(y2, b2) - max(y1, b1))
            if common < 0.75 * ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common):
                notes["boxes of a few pixels rounded to whole pixels"] += 1
                box = (*whole, 0)
        kept.append(box)
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
    """The horizontal box around points (n, 2)."""
    return (*map(float, points.min(0)), *map(float, points.max(0)), 0)


def box_from_pixels(box: Sequence[float], size: tuple[int, int], request: Request) -> tuple:
    """A box in pixels of the original image, of `size`, in those of the resized image. Raises
    ValueError if it can only be in fractions of the image."""
    if max(box[:4]) <= 1:
        raise ValueError(f"the box to {box[2]:g}, {box[3]:g} is in fractions, expected pixels")
    return convert_box(box, size, (request.image_size, request.image_size))


def parse_grid_boxes(text: str, image_size: int) -> list[tuple]:
    """Boxes of the 0-100 grid in a text, in pixels of the resized image. Square brackets have to be
    doubled and hold five numbers; otherwise they hold pixels."""
    found = GRID_BOX.findall(text) if "{" in text else []
    if not found and "[[" in text:
        found = FIVE_NUMBERS.findall(text)
    scale = image_size / 100
    return [(float(x1) * scale, float(y1) * scale, float(x2) * scale, float(y2) * scale,
             float(theta or 0)) for x1, y1, x2, y2, theta in found]


def parse_pixel_boxes(text: str, size: tuple[int, int], request: Request,
                      source: str) -> list[tuple]:
    """Boxes `[x1, y1, x2, y2]` in pixels of the original image, of `size`, in pixels of the resized
    image. `none` and `[]` have no boxes. Raises UserError for a bad box."""
    boxes = parse_boxes(LONG_FRACTION.sub(r"\1", text))  # an answer has at most nine digits
    if boxes is None:
        raise UserError(f"{source}: the text {text[:60]!r} has too many boxes")
    for bracket, (x1, y1, x2, y2) in zip(BRACKET.findall(text), boxes):
        inside = -1 <= x1 < x2 <= size[0] + 1 and -1 <= y1 < y2 <= size[1] + 1  # 1 px of rounding
        if inside and max(x2, y2) > 1:
            continue
        if inside:
            wrong = "looks like fractions of the image; write pixels of the original image"
        elif x1 == x2:  # what parse_boxes makes of it
            wrong = ("is malformed or has no area, as x2 <= x1 or y2 <= y1; if it is x, y, width, "
                     "height, write x1, y1, x2, y2 in pixels")
        else:
            lies = "its horizontal envelope lies" if bracket.count(",") == 4 else "lies"
            wrong = (f"{lies} outside its image of {size[0]} x {size[1]} pixels; write pixels of "
                     "the original image")
        raise UserError(f"{source}: box {bracket[:60]!r} {wrong}")
    return [box_from_pixels(box, size, request) for box in boxes.tolist()]


def rewrite_boxes(text: str, size: tuple[int, int], request: Request,
                  source: str) -> tuple[str, tuple]:
    """(the text with its boxes as [x1,y1,x2,y2] in pixels of the resized image, these boxes)."""
    boxes = []

    def rewrite(match: re.Match) -> str:
        found = parse_grid_boxes(match[0], request.image_size)
        found = clip_boxes(found or parse_pixel_boxes(match[0], size, request, source), request)
        boxes.extend(found)
        return f" {format_boxes(found, request.image_size)}" if found else ""

    if BOX_START.search(text):
        text = BOX_RUN.sub(rewrite, text)
    return plain_text(text), tuple(boxes)


# --------------------------------------------------------------------------------------------------
# Texts

def without_tags(text: str) -> str:
    """The text without <image>, <p> and <ref> tags and chat tokens <|..|>."""
    text = text.replace("<image>", " ")  # mostly the only one, and quicker than TAGS
    if "<" in text or "\\" in text:
        text = TAGS.sub(" ", text)
    return " ".join(text.split())


def plain_text(text: str) -> str:
    """without_tags, and without the bracketed marks of task and sensor that it begins with."""
    text = without_tags(text)
    marks = LEADING_MARKS.match(text) if "[" in text else None
    return text[marks.end():] if marks else text


@lru_cache(maxsize=64)  # each task of a run asks
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


def parse_label_list(question: str, source: str) -> tuple[str, ...]:
    """The labels that a question lists after a colon or question mark. Commas within a label of
    BigEarthNet do not split it."""
    listed = re.search(r"[:?]([^:?.]*,[^:?.]*)", question)
    if not listed:
        raise UserError(f"{source}: the question lists no classes after `:` or `?`, and mlc needs "
                        "to know them all")
    labels = re.findall(rf"(?:{LABELS_WITH_COMMAS}|[^,])+", listed[1], re.IGNORECASE)
    return tuple(label.strip() for label in labels)


def split_reasoning(text: str, source: str) -> tuple[str, str]:
    """(reasoning, gt_answer) of a target, which may be the answer alone, or in <answer> tags, or
    after <think>..</think>. Raises UserError for any other use of these tags: boxes of the
    reasoning would become targets."""
    if "<" not in text:
        return "", text.strip()
    if "<|" in text:
        text = CHAT_TOKEN.sub(" ", text)  # a completion cannot contain them
    think, tagged, untagged = LAYOUT.fullmatch(text.strip()).groups(default="")
    answer = tagged or untagged
    if LAYOUT_TAG.search(answer):
        raise UserError(f"{source}: the tags of the target {text[:60]!r} are not one "
                        "<think>..</think> and one <answer>..</answer>")
    return think.strip(), answer.strip()


def default_think(task: str, gt_answer: str, n_boxes: int) -> str:
    """Reasoning for a data set that has none: it adds nothing to the target."""
    if task in BOX_TASKS:
        return f"{n_boxes} to find." if n_boxes else "Nothing to find."
    return DEFAULT_THINK.get(task, "That is {}.").format(gt_answer)


# --------------------------------------------------------------------------------------------------
# Samples

def check_target(source: str, task: str, question: str, think: str, gt_answer: str,
                 n_boxes: int) -> None:
    """Raises UserError for a target that would fail its own reward, and for text that holds a tag
    of the answer or a token of the chat, ValueError for text that no tokenizer takes."""
    text = f"{question}{think}{gt_answer}"
    text.encode()  # not possible for half a surrogate pair
    if not LETTER_OR_DIGIT.search(strip_boxes(gt_answer) if task == "ground" else gt_answer):
        wrong = "is empty: it has neither letter nor digit (in conversations, the gpt value)"
    elif len(gt_answer) > MAX_TEXT:
        wrong = f"has {len(gt_answer)} characters, more than {MAX_TEXT}"
    elif ">" in text and RESERVED.search(text):
        wrong = (f"or its question or reasoning holds {RESERVED.search(text)[0]!r}, a part of the "
                 "chat's layout")
    elif task in ("ground", "ovd") and len(BRACKET.findall(gt_answer)) != n_boxes:
        wrong = "has brackets that are no box [x1, y1, x2, y2]; write them as (..)"
    elif task == "count" and parse_count(gt_answer) is None:
        wrong = "is no whole number, which count needs"
    elif task == "geo" and parse_coordinates(gt_answer) is None:
        wrong = "is no latitude and longitude in degrees such as 48.86, 2.35, which geo needs"
    else:
        return
    raise UserError(f"{source}: --task {task}: the target {gt_answer[:60]!r} {wrong}")


def make_sample(source: str, request: Request, images: Sequence, question: str,
                gt_answer: str = "", gt_boxes: Sequence = (), label: str = "", think: str = "",
                category: object = "", subset: object = "", **fields) -> Sample:
    """A Sample. For det, rec and ovd gt_answer is written here, from the boxes; `label` is the
    class of ovd's boxes. Raises UserError for a target that check_target refuses."""
    task, image_size = request.task, request.image_size
    if task == "det":
        gt_answer = format_boxes(gt_boxes, image_size)
    elif task == "rec":
        gt_answer = format_json({"bbox_2d": clip_and_round(gt_boxes[0], image_size)})
    elif task == "ovd":
        gt_answer = format_json(
            [{"bbox_2d": clip_and_round(box, image_size), "label": label} for box in gt_boxes])
    think = think or default_think(task, gt_answer, len(gt_boxes))
    check_target(source, task, question, think, gt_answer, len(gt_boxes))
    if not category and task == "cls":
        category = gt_answer
    return Sample(id=one_line(source), task=task, images=tuple(images), question=question,
                  gt_answer=gt_answer, image_size=image_size, gt_boxes=tuple(gt_boxes), think=think,
                  category=str(category or ""), subset=str(subset or ""), **fields)


def sample_from_text(source: str, request: Request, images: Sequence, question: str,
                     gt_texts: Sequence[str], boxes: Sequence = (), **fields) -> Iterator[Sample]:
    """The Sample of a question and its target texts as the data set writes them, or nothing.

    gt_texts  all right texts; the first one becomes gt_answer
    boxes     target boxes in pixels of the resized image, where they are not part of the text
    Yields nothing, and counts it in `notes`, if noise leaves no box or, for rec, several.
    """
    task, notes, size = request.task, request.notes, first_image_size(images, source)
    question, gt_boxes = rewrite_boxes(question, size, request, source)
    gt_answer, nothing_to_find = gt_texts[0], False
    if task in ("det", "rec"):
        boxes = boxes or parse_grid_boxes(gt_answer, request.image_size)
        if not boxes:
            if parse_boxes(gt_answer) is None and not BRACKET.search(gt_answer):
                needs = "boxes or `none`" if task == "det" else "a box"
                raise UserError(f"{source}: the target {gt_answer[:60]!r} has no box "
                                f"[x1, y1, x2, y2]; --task {task} needs {needs}")
            boxes = parse_pixel_boxes(gt_answer, size, request, source)
            nothing_to_find = task == "det" and not boxes  # `none` is a target too
        gt_boxes = clip_boxes(boxes, request)
    elif task == "ground":
        gt_answer, gt_boxes = rewrite_boxes(gt_answer, size, request, source)
    else:
        gt_texts = [without_tags(text) for text in gt_texts]
        gt_answer = gt_texts[0]
        if len(gt_texts) > 1:
            fields["gt_texts"] = tuple(gt_texts)

    if (task in BOX_TASKS or task == "rcap") and not gt_boxes and not nothing_to_find:
        notes["records without a box in the image left out"] += 1
        return
    if task == "rec" and len(gt_boxes) > 1:
        notes["records of several objects left out"] += 1
        return
    if task == "change" and len(images) < 2:
        raise UserError(f"{source}: change needs two images or more; `images` lists them in order")
    if task == "mlc":
        fields["choices"] = parse_label_list(question, source)
    if task == "pair":
        letters = tuple("ABCDEFGHIJ"[: len(images) - 1])
        if gt_answer not in letters:
            raise UserError(f"{source}: the target {gt_answer[:60]!r} is not the letter of a "
                            f"candidate, {', '.join(letters)}")
        fields["choices"] = letters
    yield make_sample(source, request, images, question, gt_answer, gt_boxes, **fields)


def sample_per_class(source: str, request: Request, images: Sequence,
                     objects: Iterable[tuple[str, tuple]], question: str = "Locate every {}.",
                     **fields) -> Iterator[Sample]:
    """One Sample (det, ovd) for each class of an image. `objects` are (class, box in pixels of the
    resized image)."""
    boxes_of_class: dict[str, list] = {}
    for label, box in objects:
        boxes_of_class.setdefault(plain_text(str(label)), []).append(box)
    for kind, boxes in sorted(boxes_of_class.items()):
        boxes = clip_boxes(boxes, request)
        if not kind:
            raise UserError(f"{source}: an object has no class")
        if len(boxes) > MAX_BOXES_PER_QUESTION:
            request.notes[f"questions for more than {MAX_BOXES_PER_QUESTION} boxes left out"] += 1
        elif boxes:
            yield make_sample(f"{source}, {kind}", request, images, question.format(kind),
                              gt_boxes=boxes, label=kind, category=kind, **fields)
