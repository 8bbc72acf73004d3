"""Samples as rows of predictions.jsonl and samples.jsonl, and back."""

import os
import re
from dataclasses import asdict
from pathlib import Path

from readers.files import TableImage
from sample import Sample
from tiny.scenes import Scenes


def sample_to_row(sample: Sample, folder: Path = Path()) -> dict:
    """The sample as JSON, a line of a file in `folder`. An image is its path, or its place in a
    table's file, relative to `folder`; a synthetic scene is known by the sample's id."""
    def from_folder(path: str) -> str:
        return path if os.path.isabs(path) else os.path.relpath(path, os.path.realpath(folder))

    def to_json(image: object) -> str | dict | None:
        if isinstance(image, TableImage):
            return asdict(image) | {"file": from_folder(image.file)}
        return from_folder(str(image)) if isinstance(image, (str, Path)) else None

    images = [to_json(image) or sample.id for image in sample.images]
    form = {"oriented": True} if sample.oriented else {}
    form |= {} if sample.thinking else {"thinking": False}  # what no reward reads is left out
    return {"id": sample.id, "task": sample.task, "images": images, "question": sample.question,
            "target": sample.gt_answer, "targets": sample.gt_texts, "boxes": sample.gt_boxes,
            "image_size": sample.image_size, "choices": sample.choices, "subset": sample.subset,
            "category": sample.category, "mask": to_json(sample.gt_mask), **form}


def sample_from_row(row: dict, folder: Path = Path()) -> Sample:
    """The sample that sample_to_row wrote; a synthetic scene is rendered again. Raises LookupError,
    TypeError, ValueError or AttributeError for a row that is none."""
    def from_json(image: str | dict) -> Path | TableImage:
        if isinstance(image, dict):
            return TableImage(**image | {"file": str(folder / image["file"])})
        return folder / image

    form = {"oriented": bool(row.get("oriented")), "thinking": bool(row.get("thinking", True))}
    scene = re.fullmatch(r"synthetic (\d+):(\d+)", str(row["id"]))
    if scene:
        seed, index = int(scene[1]), int(scene[2])
        return Scenes(str(row["task"]), int(row["image_size"]), seed, **form)[index]
    if row["task"] == "seg" and not row["mask"]:
        raise ValueError("seg without a mask")
    boxes = tuple((float(x1), float(y1), float(x2), float(y2), float(theta))
                  for x1, y1, x2, y2, theta in row["boxes"])
    return Sample(
        id=str(row["id"]), task=str(row["task"]), images=tuple(map(from_json, row["images"])),
        question=str(row["question"]), gt_answer=str(row["target"]),
        image_size=int(row["image_size"]), gt_boxes=boxes, gt_texts=tuple(map(str, row["targets"])),
        choices=tuple(map(str, row["choices"])), category=str(row["category"]),
        subset=str(row["subset"]), gt_mask=row["mask"] and from_json(row["mask"]),
        **form)
