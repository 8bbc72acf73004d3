"""Answers that EarthDial released, in their original layout -> Samples and answers, to score."""

import json
import re
from collections import Counter
from pathlib import Path

from boxes import format_boxes
from readers.box_formats import plain_text
from readers.files import iter_json_records
from runtime.errors import UserError, warn
from sample import Sample

# The first of these keys that a record has -> (key of its target, key of its subset, its tasks)
RESULTS = {
    "gt_bbox": ("gt_bbox", "size_group", ("det",)),
    "obj_ids": ("groundtruth", None, ("ground",)),
    "vqa_type": ("annotation", "vqa_type", ("vqa",)),
    "task_type": ("annotation", None, ("rcap",)),
    "annotation": ("annotation", None, ("cls", "mlc")),
    "caption0": ("caption0", None, ("cap", "change", "cls", "det")),
}
ORIENTED_BOX = re.compile(r"(\[\s*\d+(?:\s*,\s*\d+){3}\s*,\s*)-?(\d+)\s*\]")  # group 2: theta
LABEL_COMMA = re.compile(r",(?!\s*(?:with significant|dunes|sands))\s*")  # not within a label


def read_earthdial_results(path: Path, task: str) -> tuple[list[Sample], list[str]]:
    """Samples (without images, boxes on the 0-100 grid) and answers of a result file that EarthDial
    released, in its original layout.

    What EarthDial's scorers leave out is left out, and counted on stderr. Raises UserError for a
    record that cannot be scored.
    """
    samples, answers, left_out = [], [], Counter()
    for source, row in iter_json_records(path):
        kind = result_kind(row, source, task)
        key, subset, _ = RESULTS[kind]
        texts = [row[key].strip()]
        boxes, choices = (), ()
        if task in ("det", "ground"):
            boxes = parse_gt_boxes(row[kind], source, left_out)
        if task == "ground" and len(boxes) >= 50:
            left_out["descriptions of 50 boxes or more"] += 1
            continue
        if task == "det":
            texts = [format_boxes(boxes, 100)]
        elif kind == "caption0":
            texts = [text for i in range(5) for text in captions(row.get(f"caption{i}"), source)]
        if task == "mlc":
            listed = re.search(r"\?\s*(.+?)\.\s*Answer", row["question"])
            choices = tuple(LABEL_COMMA.split(listed[1])) if listed else ()
        if not any(texts):
            raise UserError(f"{source}: `{key}` is empty: nothing to score the answer against")
        samples.append(Sample(
            source, task, (), plain_text(row["question"]), texts[0], 100, boxes, choices=choices,
            gt_texts=tuple(texts) if len(texts) > 1 else (), subset=row[subset] if subset else ""))
        answers.append(turn_clockwise(row["answer"], task, kind))
    if not samples:
        raise UserError(f"{path}: no results")
    if left_out:
        notes = ", ".join(f"{n} {what}" for what, n in left_out.items())
        warn(f"{path}: left out as by EarthDial's scorers: {notes}")
    return samples, answers


def result_kind(row: object, source: str, task: str) -> str:
    """Which key of RESULTS the record has. Raises UserError if there is none, if it is not of this
    task, or if a field is missing."""
    kind = next((key for key in RESULTS if isinstance(row, dict) and key in row), None)
    if kind is None:
        raise UserError(f"{source}: no result of EarthDial's, it has none of the keys "
                        f"{', '.join(RESULTS)}")
    key, subset, tasks = RESULTS[kind]
    if task not in tasks:
        raise UserError(f"{source}: a result with `{kind}` is scored with --task "
                        f"{' or '.join(tasks)}, not {task}")
    for name in ("question", "answer", kind, key, subset or key):
        if not isinstance(row.get(name), str):
            raise UserError(f"{source}: `{name}` is missing or no text")
    return kind


def turn_clockwise(answer: str, task: str, kind: str) -> str:
    """The answer with each theta negated: EarthDial's scorers ignore its sign and turn a box
    counter-clockwise on the screen, a Sample clockwise. xBD's scorer takes each for 0."""
    if task == "det" and kind == "caption0":
        return ORIENTED_BOX.sub(r"\g<1>0]", answer)
    return ORIENTED_BOX.sub(r"\1-\2]", answer) if task in ("det", "ground") else answer


def parse_gt_boxes(text: str, source: str, left_out: Counter) -> tuple:
    """The boxes of a target such as `[[x1, y1, x2, y2, theta]][[..]]`, theta negated. EarthDial's
    parser knows neither a minus sign nor a point, so its scores are without boxes that begin
    outside the image."""
    boxes = [inner for inner in re.findall(r"\[([^\[\]]*)\]", text) if inner.strip()]
    for box in boxes or [text.strip("[] ")]:
        if box and not re.fullmatch(r"\s*-?[\d.]+(\s*,\s*-?[\d.]+){4}\s*", box):
            raise UserError(f"{source}: the target {box[:60]!r} is no box of five numbers")
    kept = [box for box in boxes if "-" not in box and "." not in box]
    if len(kept) < len(boxes):
        left_out["boxes with a minus sign or a point"] += len(boxes) - len(kept)
    numbers = [tuple(map(float, box.split(","))) for box in kept]
    return tuple((x1, y1, x2, y2, 0 - theta) for x1, y1, x2, y2, theta in numbers)


def captions(text: object, source: str) -> list[str]:
    """The captions in one field: none, one, or a JSON list as in SYSU's. (EarthDial's scorer took
    the METEOR of SYSU's raw field, with brackets and quotes.)"""
    try:
        texts = json.loads(text) if text and text.startswith("[") else [text or ""]
        return [t.strip() for t in texts if t.strip()]
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{source}: the caption {str(text)[:60]!r} is neither a text nor a JSON "
                        f"list of texts ({error})")
