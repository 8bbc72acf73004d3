"""Boxes: read them from text, write them as text, convert and compare them.

A box is (x1, y1, x2, y2), horizontal (HBB), or (x1, y1, x2, y2, theta), oriented (OBB): the
rectangle turned by theta degrees about its centre, clockwise on the screen. Boxes that are read
come from a model under optimisation, so no text makes anything here raise, and bounds on its
numbers and boxes keep it fast.
"""

import json
import math
import re
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from runtime.errors import UserError

MAX_BOXES = 1000  # an answer with more brackets is noise; the bound keeps the matching fast


# --------------------------------------------------------------------------------------------------
# Read

def parse_boxes(answer: str, oriented: bool = False) -> np.ndarray | None:
    """Boxes of an answer: (n, 4) array of x1, y1, x2, y2 in the units of the text; with `oriented`
    (n, 5), theta as well.

    None if the answer is neither boxes nor `none`/`[]`. Every innermost bracket `[...]` is one
    prediction: 4 numbers, or 5 with the angle of an oriented box, which becomes its horizontal
    envelope unless `oriented`. A bracket that is no box (3 numbers, words, x2 <= x1) counts as an
    empty box that overlaps nothing: dropping it would make a malformed guess free. Text around the
    brackets, such as Qwen's JSON, is ignored.
    """
    brackets = re.findall(r"\[([^\[\]]*)\]", answer)
    says_none = answer.strip().rstrip(".").lower() == "none"
    if says_none or (len(brackets) == 1 and not brackets[0].strip()):
        return np.zeros((0, 5 if oriented else 4))
    if not 0 < len(brackets) <= MAX_BOXES:
        return None
    boxes = [parse_box(text) for text in brackets]
    return np.array(boxes if oriented else [obb_to_hbb(box) for box in boxes])


def parse_box(text: str) -> tuple[float, float, float, float, float]:
    """x1, y1, x2, y2, theta of the inside of a bracket. Four numbers are a horizontal box; what is
    no box, or has no area, becomes an empty one."""
    values = parse_numbers(text)
    is_box = len(values) in (4, 5) and values[2] > values[0] and values[3] > values[1]
    return (*values, 0.0)[:5] if is_box else (0.0,) * 5


def parse_numbers(text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated list; () for more than 6, or if one of them is no number.
    The bounds on count and length keep hostile text cheap."""
    values = text.split(",", 5) if len(text) < 200 else []
    number = r"\s*[+-]?\d{1,6}(\.\d{0,9})?\s*"
    all_numbers = all(re.fullmatch(number, value, re.ASCII) for value in values)
    return tuple(map(float, values)) if all_numbers else ()


# --------------------------------------------------------------------------------------------------
# Write

def clip_and_round(box: Sequence[float], image_size: int) -> list[int]:
    """A box as a model writes it: the horizontal envelope, clipped to the image, in whole pixels,
    at least one pixel wide and high."""
    x1, y1, x2, y2 = map(round, obb_to_hbb(box))
    x1, y1 = min(max(x1, 0), image_size - 1), min(max(y1, 0), image_size - 1)
    return [x1, y1, max(min(x2, image_size), x1 + 1), max(min(y2, image_size), y1 + 1)]


def round_obb(box: Sequence[float]) -> list[int]:
    """An oriented box as a model writes it: whole pixels, at least one wide and high, and whole
    degrees from 0 to 179. Clipped it would be no rectangle, so numbers may lie outside the image.
    """
    x1, y1, x2, y2, theta = map(round, box)
    return [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1), theta % 180]


def format_boxes(boxes: Sequence[Sequence[float]], image_size: int, oriented: bool = False) -> str:
    """Boxes as an answer of `det`: [x1,y1,x2,y2],[..], with `oriented` [x1,y1,x2,y2,theta],[..], or
    `none`."""
    rounded = [round_obb(box) if oriented else clip_and_round(box, image_size) for box in boxes]
    return ",".join([f"[{','.join(map(str, box))}]" for box in rounded]) or "none"


def format_json(objects: dict | list[dict]) -> str:
    """Boxes as an answer of `rec`, `ovd` and `seg`: JSON as Qwen2.5-VL writes it, or `None`."""
    return json.dumps(objects) if objects else "None"


# --------------------------------------------------------------------------------------------------
# Convert

def obb_to_hbb(box: Sequence[float]) -> tuple[float, float, float, float]:
    """OBB to HBB: the smallest horizontal box around `(x1, y1, x2, y2[, theta])`.

    Any unit. The envelope is the same for both senses of rotation, so theta needs no convention.
    """
    x1, y1, x2, y2 = box[:4]
    if len(box) == 4 or box[4] == 0:
        return (x1, y1, x2, y2)
    theta = math.radians(box[4])
    w, h = (x2 - x1) / 2, (y2 - y1) / 2
    cos, sin = abs(math.cos(theta)), abs(math.sin(theta))
    dx, dy = w * cos + h * sin, w * sin + h * cos
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    return (cx - dx, cy - dy, cx + dx, cy + dy)


def obb_corners(boxes: np.ndarray) -> np.ndarray:
    """Oriented boxes (n, 5) -> their corners (n, 4, 2), x and y."""
    center = (boxes[:, :2] + boxes[:, 2:4]) / 2                                     # (n, 2)
    half = (boxes[:, 2:4] - boxes[:, :2]) / 2                                       # (n, 2)
    cos, sin = np.cos(np.radians(boxes[:, 4])), np.sin(np.radians(boxes[:, 4]))
    rotation = np.array([[cos, sin], [-sin, cos]]).transpose(2, 0, 1)               # (n, 2, 2)
    corners = half[:, None] * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])        # (n, 4, 2)
    return corners @ rotation + center[:, None]  # row vectors, y down


def convert_box(box: Sequence[float], from_size: tuple[float, float],
                to_size: tuple[float, float]) -> tuple[float, ...]:
    """(x1, y1, x2, y2[, theta]) from a space of (width, height) units to another, five numbers.

    A turned rectangle stays a rectangle only if both axes scale by the same factor; otherwise its
    horizontal envelope is converted.
    """
    sx, sy = to_size[0] / from_size[0], to_size[1] / from_size[1]
    theta = box[4] if len(box) > 4 else 0
    if theta and not math.isclose(sx, sy):
        box, theta = obb_to_hbb(box), 0
    return (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy, theta)


# --------------------------------------------------------------------------------------------------
# Compare

def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box of a (n, 4) with every box of b (m, 4): (n, m). Empty
    boxes give 0."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.clip(bottom_right - top_left, 0, None).prod(-1)  # (n, m)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(-1), (b[:, 2:] - b[:, :2]).prod(-1)
    union = area_a[:, None] + area_b[None, :] - intersection
    return intersection / np.maximum(union, 1e-9)


def oriented_iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every oriented box of a (n, 5) with every one of b (m, 5): (n, m). Empty boxes give
    0. Raises UserError without shapely."""
    try:
        import shapely
    except ImportError as error:
        raise UserError(f"the IoU of oriented boxes needs a package ({error}): pip install shapely")

    def polygons(boxes: np.ndarray) -> np.ndarray:
        shapes = shapely.polygons(obb_corners(boxes))
        shapes[~shapely.is_valid(shapes)] = shapely.Polygon()  # those without area
        return shapes

    a, b = polygons(a)[:, None], polygons(b)[None]
    intersection = shapely.area(shapely.intersection(a, b))
    return intersection / np.maximum(shapely.area(a) + shapely.area(b) - intersection, 1e-9)


def matched_ious(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """IoU of each pair of the one-to-one assignment with the largest sum (Hungarian method):
    (min(n, m),). Horizontal boxes (n, 4) and (m, 4), or oriented ones (n, 5) and (m, 5)."""
    iou = oriented_iou_matrix if predicted.shape[1] == 5 else iou_matrix
    ious = iou(predicted, target)
    return ious[linear_sum_assignment(ious, maximize=True)]


def average_precision(predicted: np.ndarray, target: np.ndarray) -> float:
    """COCO's AP (mean over IoU 0.50, 0.55, .. 0.95) of one class in one image, where all
    predictions have the same confidence.

    Equal to pycocotools: in the order of the answer each of the first 100 boxes takes the best
    unmatched target that it overlaps enough; precision is made monotonic and read off at 101
    recalls. Neither side is empty.
    """
    ious = iou_matrix(predicted[:100], target[::-1])  # reversed: of equals COCO takes the last
    total = 0.0
    for threshold in np.linspace(0.5, 0.95, 10):
        unmatched, hits = np.ones(len(target), bool), np.zeros(len(ious))
        for i, row in enumerate(np.where(ious >= threshold, ious, 0)):
            best = np.where(unmatched, row, 0).argmax()
            if unmatched[best] and row[best] > 0:
                hits[i] = 1
                unmatched[best] = False
        recall = hits.cumsum() / len(target)
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        total += envelope[np.searchsorted(recall, np.linspace(0, 1, 101))].mean()
    return float(total / 10)
