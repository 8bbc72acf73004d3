"""What data sets write -> a Sample: boxes in any notation to pixels of the frame, questions and references to plain text.

    {<x1><y1><x2><y2>|<theta>}   [[x1, y1, x2, y2, theta]]   the 0-100 grid of GeoChat, VRSBench and EarthDial
    [x1, y1, x2, y2]                                         pixels of the original image (2U1, VLM-R1)
    four corners                                             of a turned box (DOTA, GeoChat-Bench, VRSBench)

A box is brought along wherever it stands: in the answer, in the question, in the middle of a description. Noise of public
annotation is counted in `skipped`, by reason; what a user has to mend raises BadInput. Knows nothing of files.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data import BadInput, Sample, convert_box, plain_text
from rewards import TASKS, box_numbers, box_text, horizontal, json_text, parse_boxes, says_none

GRID = (100, 100)
MOST_BOXES = 100  # that COCO counts; a tile of DOTA may have five hundred ships, an answer of thousands of tokens
NUMBER = r"-?\d+(?:\.\d+)?"
BRACES = r"\{(?:<-?\d+>){4}(?:\|<-?\d+>)?\}"
FIVE = rf"\[\s*{NUMBER}(?:\s*,\s*{NUMBER}){{4}}\s*\]"
BOX = rf"(?:{BRACES}|\[\s*{NUMBER}(?:\s*,\s*{NUMBER}){{3,4}}\s*\])"
BOXES = re.compile(rf"(?:<box>)?\[*{BOX}(?:(?:[\s,\[\]]|<delim>)*{BOX})*\]*(?:</box>)?")  # a row, and what is around it

MARK = re.compile(r"\s*(?:<image>\s*)*\[(refer|grounding|identify|caption|classify|vqa|changedet)\]")  # GeoChat's tasks
MARKED = {"refer": ("det", "rec"), "grounding": ("ground",), "identify": ("rcap",), "caption": ("cap",),
          "classify": ("cls",), "vqa": ("vqa",), "changedet": ("change",)}
CLOSED = re.compile(r"classif|classes|options:|yes or no|none, one, two", re.IGNORECASE)  # the question offers its answers
COMMA_LABELS = ("land principally occupied by agriculture, with significant areas of natural vegetation",  # BigEarthNet's
                "beaches, dunes, sands", "moors, heathland and sclerophyllous vegetation")


# ----------------------------------------------------------------------------------------------------------------------
# Boxes

def in_frame(boxes: Iterable[Sequence[float]], frame: int, skipped: Counter) -> tuple:
    """The boxes (pixels of the frame, five numbers) that have an area within the frame, upright ones cut to it.

    A turned box cut off is no box any more: it stays whole and is cut where it is used.
    """
    kept = []
    for box in boxes:
        envelope = horizontal(box)
        clipped = tuple(min(max(v, 0), frame) for v in envelope)
        if box[2] <= box[0] or box[3] <= box[1] or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            skipped["boxes without area left out"] += 1
            continue
        if max(abs(a - b) for a, b in zip(clipped, envelope)) > 1e-6:
            skipped["boxes clipped to the image"] += 1
        kept.append(tuple(box) if box[4] else (*clipped, 0))
    return tuple(kept)


def turned_box(corners: np.ndarray) -> tuple:
    """The smallest rectangle around a quadrilateral (4, 2), y down: (x1, y1, x2, y2, theta) with theta in [0, 90) degrees,
    clockwise on the screen. One of its sides lies along one of the quadrilateral's (Freeman and Shapira 1975)."""
    found = []
    for x, y in np.roll(corners, -1, axis=0) - corners:
        theta = round(math.degrees(math.atan2(y, x)), 6) % 90
        cos, sin = math.cos(math.radians(theta)), math.sin(math.radians(theta))
        turn = np.array([[cos, -sin], [sin, cos]])
        low, high = (corners @ turn).min(0), (corners @ turn).max(0)
        (cx, cy), (w, h) = turn @ (low + high) / 2, high - low
        found.append((w * h, tuple(map(float, (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, theta)))))
    return min(found)[1]


def upright_box(points: np.ndarray) -> tuple:
    """The upright box around points (n, 2)."""
    return (*map(float, points.min(0)), *map(float, points.max(0)), 0)


def grid_boxes(text: str, frame: int) -> list[tuple]:
    """Boxes of the 0-100 grid in a text -> frame. Brackets have to be doubled and hold five numbers, or they are pixels."""
    found = re.findall(BRACES, text) or (re.findall(FIVE, text) if "[[" in text else [])
    return [convert_box([float(v) for v in re.findall(NUMBER, box)], GRID, (frame, frame)) for box in found]


def pixel_boxes(answer: str, size: tuple[int, int], frame: int, where: str) -> tuple:
    """`[x1, y1, x2, y2]` in pixels of the original image -> frame; an answer of `none` or `[]` has no boxes."""
    boxes = parse_boxes(answer)
    if boxes is None:
        raise BadInput(f"{where}: the answer {answer[:60]!r} has no box [x1, y1, x2, y2]")
    for x1, y1, x2, y2 in boxes:
        if not (-1 <= x1 < x2 <= size[0] + 1 and -1 <= y1 < y2 <= size[1] + 1):  # a pixel of slack for rounding
            raise BadInput(f"{where}: box [{x1:g}, {y1:g}, {x2:g}, {y2:g}] of {answer[:60]!r} is malformed, has no area or "
                           f"lies outside its image of {size[0]} x {size[1]} pixels")
    return tuple(convert_box(box.tolist(), size, (frame, frame)) for box in boxes)


def place_boxes(text: str, size: tuple[int, int], frame: int, where: str, skipped: Counter) -> tuple[str, tuple]:
    """(the text with its boxes as [x1,y1,x2,y2] in pixels of the frame, these boxes)."""
    boxes = []

    def rewrite(run: re.Match) -> str:
        grid = grid_boxes(run[0], frame)
        found = in_frame(grid, frame, skipped) if grid else pixel_boxes(run[0], size, frame, where)
        boxes.extend(found)
        return f" {box_text(found, frame)}" if found else ""

    return plain_text(BOXES.sub(rewrite, text)), tuple(boxes)


# ----------------------------------------------------------------------------------------------------------------------
# Texts

def tasks_of(question: str, answer: str) -> tuple[str, ...]:
    """The tasks that a question of GeoChat, VRSBench or EarthDial serves, by its mark and, where xBD's marks say too
    little, by whether it offers its answers and whether boxes are given."""
    mark = MARK.match(question)
    mark = mark and mark[1]
    if mark in (None, "identify", "changedet") and CLOSED.search(question):
        return ("mlc",) if "list of classes" in question else ("cls",)
    if mark is None:
        return ("vqa",) if "word" in question.lower() else ()
    return ("change", "cap") if mark == "grounding" and not BOXES.search(answer) else MARKED[mark]


def asking(task: str, phrase: str) -> str:
    """A question from a phrase for what is to be found, or from a box."""
    return f"What is the object at {phrase}" if task == "rcap" else f"Give me the location of {phrase}"


def label_list(question: str, where: str) -> tuple[str, ...]:
    """The labels that a question lists behind a colon or question mark; BigEarthNet's own commas stay in them."""
    listed = re.search(r"[:?]([^:?.]*,[^:?.]*)", question)
    if not listed:
        raise BadInput(f"{where}: the question lists no classes after `:` or `?`, and mlc needs to know them all")
    return tuple(x.strip() for x in re.findall(rf"(?:{'|'.join(COMMA_LABELS)}|[^,])+", listed[1], re.IGNORECASE))


def split_reasoning(answer: str) -> tuple[str, str]:
    """(reasoning, answer) of a reference that may already carry <think> and <answer> tags."""
    answer = re.sub(r"<\|\w+\|>", "", answer)  # a chat mark in a reference would have no probability
    think = re.search(r"<think>(.*?)</think>", answer, re.DOTALL)
    tagged = re.search(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    return think[1].strip() if think else "", (tagged[1] if tagged else answer).strip()


def plain_thought(task: str, answer: str, n_boxes: int) -> str:
    """Reasoning for a source that has none: no more than what the reference itself says."""
    if TASKS[task].boxes:
        return f"{n_boxes} to find." if n_boxes else "Nothing to find."
    return {"cls": f"The scene looks like {answer}.", "mlc": f"The scene shows {answer}.",
            "rcap": f"The region shows {answer}.", "pair": f"The same place as in {answer}.",
            "cap": "The image as a whole.", "change": "The images side by side."}.get(task, f"That is {answer}.")


# ----------------------------------------------------------------------------------------------------------------------
# Samples

def build(where: str, task: str, frame: int, images: Sequence, question: str, answer: str = "", boxes: Sequence = (),
          label: str = "", think: str = "", category: str = "", **more) -> Sample:
    """A Sample. An answer of boxes alone is written here, in the form of the task; `label` names them for ovd."""
    if task == "det":
        answer = box_text(boxes, frame)
    elif task == "rec":
        answer = json_text({"bbox_2d": box_numbers(boxes[0], frame)})
    elif task == "ovd":
        answer = json_text([{"bbox_2d": box_numbers(box, frame), "label": label} for box in boxes])
    if not answer:
        raise BadInput(f"{where}: the answer is empty")
    return Sample(id=where, task=task, images=tuple(images), question=question, answer=answer, frame=frame,
                  boxes=tuple(boxes), think=think or plain_thought(task, answer, len(boxes)),
                  category=category or (answer if task == "cls" else ""), **more)


def from_text(where: str, task: str, frame: int, images: Sequence, size: tuple[int, int], question: str,
              references: Sequence[str], skipped: Counter, boxes: Sequence = (), **more) -> Iterator[Sample]:
    """The Sample of a question and its references in a data set's own words; `boxes` (in the frame) where they come apart
    from the text; `size` of the first image in pixels. None, and counted, where noise leaves no box to speak of."""
    question, asked = place_boxes(question, size, frame, where, skipped)
    answer, found, empty = references[0], asked, False
    if task in ("det", "rec"):
        noisy = boxes or grid_boxes(answer, frame)
        found = in_frame(noisy, frame, skipped) if noisy else pixel_boxes(answer, size, frame, where)
        empty = task == "det" and not noisy  # none is the right answer
    elif TASKS[task].boxes:
        empty = task != "ground" and says_none(answer)
        answer, found = place_boxes(answer, size, frame, where, skipped)
    else:
        references = [plain_text(text) for text in references]
        answer = references[0]
    if (TASKS[task].boxes or task == "rcap") and not found and not empty:
        skipped["records without a box in the image left out"] += 1
        return
    if task == "rec" and len(found) > 1:
        skipped["records of several objects left out"] += 1
        return
    if task == "mlc":
        more["choices"] = label_list(question, where)
    if task == "pair":
        more["choices"] = letters = tuple("ABCDEFGHIJ"[: len(images) - 1])
        if answer not in letters:
            raise BadInput(f"{where}: the answer {answer!r} is none of the candidates' letters, {', '.join(letters)}")
    yield build(where, task, frame, images, question, answer, found, references=tuple(references[len(references) == 1 :]), **more)


def each_class(where: str, task: str, frame: int, images: Sequence, things: Iterable[tuple[str, tuple]], skipped: Counter,
               question: str = "Locate every {}.") -> Iterator[Sample]:
    """One question (det, ovd) for each class of an image; `things` are (class, box in pixels of the frame)."""
    classes: dict[str, list] = {}
    for label, box in things:
        classes.setdefault(label, []).append(box)
    for label, boxes in sorted(classes.items()):
        boxes = in_frame(boxes, frame, skipped)
        if len(boxes) > MOST_BOXES:
            skipped[f"questions for more than {MOST_BOXES} boxes left out"] += 1
        elif boxes:
            yield build(f"{where}, {label}", task, frame, images, question.format(label), boxes=boxes, label=label,
                        category=label)
