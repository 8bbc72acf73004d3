"""Files -> `Sample`: readers, prompts, the frame of the boxes, and a deterministic order.

All boxes of a `Sample` live in one frame: pixels of the square image of side `frame` that the model sees. Qwen2.5-VL
speaks absolute pixels of the *processed* image, so an image is resized to the frame once, here, and every box is
brought along when it is read; prompts, answers, rewards and pictures then need no conversion.

A new file format is one more reader: a generator of Samples, named in `load`.
"""

import argparse
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from rewards import TASKS, box_text, horizontal, parse_boxes
from scenes import ask, draw, scene

PATCH = 28            # Qwen2.5-VL turns 28 x 28 pixels into one token, so a frame is a multiple of it
GRID = (100, 100)     # the 0-100 space of GeoChat's and EarthDial's boxes
HELDOUT_SEED = 2**31  # the seed of the synthetic scenes that no training run sees
MARK = re.compile(r"\s*(?:<image>\s*)*\[(refer|grounding|identify|caption|classify|vqa|changedet)\]")  # GeoChat's tasks
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}


class BadInput(Exception):
    """Something the user must mend: one line with the file, the record, what is wrong and what to do."""


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


@dataclass(frozen=True)
class Sample:
    id: str               # file and record: what an error or a log line names
    task: str             # key of rewards.TASKS
    images: tuple         # paths or PIL images, in the order in which they stand before the question
    question: str         # plain text; the task's instruction is added by `prompt`
    answer: str           # the reference as the model should write it, boxes in pixels of the frame
    frame: int            # side of the square image that the model sees, in pixels
    boxes: tuple = ()     # reference boxes (x1, y1, x2, y2, theta): pixels of the frame, degrees
    think: str = ""       # reasoning that SFT imitates
    size_group: str = ""  # "small", "medium" or "large" where the benchmark says so


# ----------------------------------------------------------------------------------------------------------------------
# Prompts, in Qwen's chat layout

SYSTEM = "Read the image. Reason in <think></think>, then give only the result in <answer></answer>."


def prompt(sample: Sample) -> str:
    """The chat up to where the model takes over, one `<|image_pad|>` for each image (model.encode widens it)."""
    images = "<|vision_start|><|image_pad|><|vision_end|>" * len(sample.images)
    instruction = TASKS[sample.task].instruction.format(frame=sample.frame)
    return (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
            f"<|im_start|>user\n{images}{sample.question} {instruction}<|im_end|>\n<|im_start|>assistant\n")


def target(sample: Sample) -> str:
    """The completion that SFT imitates. The end-of-turn token is part of it: without it no length is ever learned."""
    return f"<think>{sample.think}</think>\n<answer>{sample.answer}</answer><|im_end|>"


# ----------------------------------------------------------------------------------------------------------------------
# Images and boxes in the frame

def load_images(sample: Sample) -> list[Image.Image]:
    """The sample's images as RGB, resized to frame x frame. Raises BadInput where one cannot be read."""
    images = []
    for source in sample.images:
        try:
            image = source if isinstance(source, Image.Image) else Image.open(source)
            if image.mode[0] in "IF":  # convert("RGB") would clip 16-bit values to white
                raise BadInput(f"{sample.id}: image {source} has {image.mode} pixels; convert it to 8 bits a band first")
            images.append(image.convert("RGB").resize((sample.frame, sample.frame), Image.Resampling.BICUBIC))
        except (OSError, SyntaxError, ValueError) as error:  # missing, cut off, or damaged: PIL says which
            raise BadInput(f"{sample.id}: image {source} cannot be read ({error}); replace it or remove the record")
    return images


def image_size(path: Path, where: str) -> tuple[int, int]:
    """(width, height) from the file's header. Raises BadInput if it is missing, no image, or one pixel thin."""
    try:
        with Image.open(path) as image:
            size = image.size
    except FileNotFoundError:
        raise BadInput(f"{where}: image {path} does not exist; --images names the folder it is relative to")
    except (OSError, Image.DecompressionBombError) as error:
        raise BadInput(f"{where}: image {path} cannot be read ({error}); replace it or remove the record")
    if min(size) < 2:
        raise BadInput(f"{where}: image {path} is {size[0]} x {size[1]} pixels, too thin to show anything")
    return size


def convert_box(box: Sequence[float], source: tuple[float, float], to: tuple[float, float]) -> tuple[float, ...]:
    """(x1, y1, x2, y2[, theta]) from a space of `source` = (width, height) units to one of `to`, five numbers.

    A turned rectangle stays one only if both axes scale alike; otherwise its upright envelope is converted.
    """
    sx, sy = to[0] / source[0], to[1] / source[1]
    theta = box[4] if len(box) > 4 else 0
    if theta and not math.isclose(sx, sy):
        box, theta = horizontal(box), 0
    return (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy, theta)


def plain_thought(task: str, answer: str, n_boxes: int) -> str:
    """Reasoning for a source that has none: no more than what the reference itself says."""
    if task == "det":
        return f"{n_boxes} to find." if n_boxes else "Nothing to find."
    return f"The scene looks like {answer}."


# ----------------------------------------------------------------------------------------------------------------------
# Loading: a source is `synthetic`, a file or a folder

def load(source: str, task: str, frame: int, images: str | None = None, split: str = "all", seed: int = 0) -> Sequence:
    """The samples of one task: a list, or `Scenes` where the source is `synthetic`.

    source  `synthetic`; a .json/.jsonl file of conversations (2U1, VLM-R1, GeoChat_Instruct) or of EarthDial rows;
            or a folder of class folders (task cls)
    frame   side of the square image that the model sees, in pixels
    images  folder that a file's image names are relative to; the file's own folder by default
    split   "all", or "train" / "heldout": a tenth of the images, chosen by a hash of their names, is held out, so that
            a source without a published split can be scored on images that training did not see
    seed    of the synthetic scenes; "heldout" takes a seed of its own
    Raises BadInput, in one line, for anything in the source that a user has to mend.
    """
    if task not in TASKS:
        raise BadInput(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    if frame % PATCH or frame <= 0:
        raise BadInput(f"--image-size {frame} is not a multiple of {PATCH}, the side of a vision token in pixels")
    if source == "synthetic":
        return Scenes(task, frame, seed=HELDOUT_SEED, n=256) if split == "heldout" else Scenes(task, frame, seed)
    samples = read_source(source, task, frame, images)
    if split != "all":  # by image, not by record, and alike for every task of a file: no task trains on another's test
        held = {name for s in samples if zlib.crc32((name := image_name(s)).encode()) % 10 == 0}
        held = held or {min(map(image_name, samples), key=lambda name: zlib.crc32(name.encode()))}
        samples = [s for s in samples if (image_name(s) in held) == (split == "heldout")]
        samples.sort(key=lambda s: (zlib.crc32(s.id.encode()), s.id))  # or the first 256 of class folders are one class
    if not samples:
        raise BadInput(f"{source}: no samples of task {task} in the {split} split; it has too few images to hold some out")
    return samples


@lru_cache(maxsize=8)  # train and held-out split come from one reading
def read_source(source: str, task: str, frame: int, images: str | None) -> list[Sample]:
    """All samples of a file or folder, in its order."""
    path, skipped = Path(source), Counter()
    if path.is_dir():
        samples = list(read_class_folders(path, task, frame))
    elif path.is_file():
        samples = list(read_records(path, task, frame, Path(images) if images else path.parent, skipped))
    else:
        raise BadInput(f"--data {source}: no such file or folder (or write: synthetic)")
    if skipped:
        notes = ", ".join(f"{n} {what}" for what, n in sorted(skipped.items()))
        print(f"{path}: {len(samples)} samples of {task}; {notes}", file=sys.stderr)
    if not samples:
        raise BadInput(f"{path}: no samples of task {task}")
    return samples


@dataclass(frozen=True)
class Scenes(Sequence):
    """The synthetic source as a sequence of Samples; sample i is a pure function of (seed, i)."""
    task: str
    frame: int
    seed: int
    n: int = 100_000

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int | slice) -> "Sample | Scenes":
        if isinstance(i, slice):  # only samples[:n] is ever taken
            return replace(self, n=len(range(self.n)[i]))
        if not 0 <= i < self.n:
            raise IndexError(i)
        view = scene(self.seed, int(i), self.frame)
        return Sample(id=f"synthetic {self.seed}:{i}", task=self.task, images=(draw(view),), frame=self.frame,
                      **ask(self.task, view))


def image_name(sample: Sample) -> str:
    """Folder and file name of the first image: the same on every machine."""
    return Path(*sample.images[0].parts[-2:]).as_posix()


def batch(samples: Sequence, step: int, size: int, seed: int) -> list[Sample]:
    """The samples of one step: a function of (seed, step), so a resumed run meets the same data.

    The stream is one shuffled pass after the other without a seam, so no pass drops its tail.
    """
    places = range(step * size, (step + 1) * size)
    return [samples[_permutation(len(samples), seed, place // len(samples))[place % len(samples)]] for place in places]


@lru_cache(maxsize=32)  # one a task of a mixed stream, or each draw would shuffle anew
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


# ----------------------------------------------------------------------------------------------------------------------
# Readers: (file or folder) -> Samples. `skipped` counts what a noisy source had clipped or left out, by reason.

def read_class_folders(path: Path, task: str, frame: int) -> Iterator[Sample]:
    """EuroSAT- and AID-style folders: `path[/only folder]/<Class>/<image>`; the class names are the question's choices."""
    if task != "cls":
        raise BadInput(f"{path}: a folder of class folders serves the task cls, not {task}")
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    while len(folders) == 1:  # EuroSAT keeps its classes below one more folder, 2750/
        folders = sorted(p for p in folders[0].iterdir() if p.is_dir())
    classes = ", ".join(folder.name for folder in folders)
    for folder in folders:
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            image_size(file, f"{folder.name}/{file.name}")
            yield Sample(id=f"{folder.name}/{file.name}", task=task, images=(file,), frame=frame, answer=folder.name,
                         question=f"Which class does this scene belong to? Classes: {classes}.",
                         think=plain_thought(task, folder.name, 0))


def read_records(path: Path, task: str, frame: int, folder: Path, skipped: Counter) -> Iterator[Sample]:
    """A JSON array or JSON lines; the keys of a record say which format it is."""
    records = list(json_records(path))
    marked = any(MARK.match(str(turn.get("value"))) for _, r in records if isinstance(r, dict)
                 for turn in r.get("conversations") or () if isinstance(turn, dict))  # GeoChat's mix of tasks
    for where, record in records:
        if not isinstance(record, dict):
            raise BadInput(f"{where}: expected an object, found {type(record).__name__}")
        if "conversations" in record:
            yield from read_conversation(where, record, task, frame, folder, skipped, marked)
        elif "question" in record and "gt_bbox" in record:
            yield from read_earthdial(where, record, task, frame, folder, skipped)
        else:
            raise BadInput(f"{where}: neither `conversations` nor `question` + `gt_bbox` among its keys {list(record)}")


def json_records(path: Path) -> Iterator[tuple[str, object]]:
    """("file:record", value) of each record of a JSON array or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({error})")

    def parse(text: str, place: str) -> object:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            place = f"line {error.lineno}" if not place and isinstance(error, json.JSONDecodeError) else place
            raise BadInput(f"{path}: {place or 'array'}: not valid JSON ({error})")

    if text.lstrip().startswith("["):
        yield from ((f"{path}: record {i}", value) for i, value in enumerate(parse(text, "")))
    else:
        for i, line in enumerate(text.split("\n"), 1):  # not splitlines(), which also cuts at U+2028 within a string
            if line.strip():
                yield f"{path}: line {i}", parse(line, f"line {i}")


def read_conversation(where: str, record: dict, task: str, frame: int, folder: Path, skipped: Counter,
                      marked: bool) -> Iterator[Sample]:
    """2U1 / VLM-R1 / GeoChat_Instruct: `image` (one name or several) and `conversations`, alternately human and gpt.

    Boxes `{<x1><y1><x2><y2>|<theta>}` are GeoChat's 0-100 grid, `[x1, y1, x2, y2]` are pixels of the original image.
    GeoChat mixes tasks in one file and marks them, so in a `marked` file det takes the turns with [refer], cls those
    that say "classify", and the others are counted. Elsewhere every turn belongs to the task that was asked for.
    """
    names = record.get("image") or record.get("images")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"{where}: `image` is neither a file name nor a list of file names")
    paths = tuple(folder / name for name in names)
    turns = record["conversations"]
    if not isinstance(turns, list) or any(not isinstance(t, dict) or not isinstance(t.get("value"), str) for t in turns):
        raise BadInput(f"{where}: `conversations` is not a list of objects with a text `value`")
    if len(turns) < 2 or len(turns) % 2:
        raise BadInput(f"{where}: `conversations` has {len(turns)} turns, expected question and answer in pairs")
    placeholders = turns[0]["value"].count("<image>")
    if placeholders and placeholders != len(paths):
        raise BadInput(f"{where}: {placeholders} <image> marks for {len(paths)} images")
    sizes = []
    for i in range(0, len(turns), 2):
        question, answer = turns[i]["value"], turns[i + 1]["value"]
        tag = MARK.match(question)
        mark = tag[1] if tag else "classify" if "classif" in question.lower() else None
        if marked and mark != {"det": "refer", "cls": "classify"}[task]:
            skipped["turns of other tasks left out"] += 1
            continue
        sizes = sizes or [image_size(path, where) for path in paths]
        think, answer = split_reasoning(answer)
        boxes = ()
        if task == "det":
            grid = re.findall(r"\{<(-?\d+)><(-?\d+)><(-?\d+)><(-?\d+)>(?:\|<(-?\d+)>)?\}", answer)
            if grid:
                boxes = grid_boxes([[float(v or 0) for v in box] for box in grid], frame, skipped)
                if not boxes:
                    continue  # counted by grid_boxes
            else:
                boxes = pixel_boxes(answer, sizes[0], frame, f"{where}, turn {i // 2}")
            answer = box_text(boxes, frame)
        if not answer:
            raise BadInput(f"{where}, turn {i // 2}: the answer is empty")
        yield Sample(id=f"{where}" + (f", turn {i // 2}" if len(turns) > 2 else ""), task=task, images=paths,
                     question=plain_text(question), answer=answer, frame=frame, boxes=boxes,
                     think=think or plain_thought(task, answer, len(boxes)))


def read_earthdial(where: str, row: dict, task: str, frame: int, folder: Path, skipped: Counter) -> Iterator[Sample]:
    """EarthDial's detection rows: `image`, `question`, `gt_bbox` as `[[x1, y1, x2, y2, theta]]...` on the 0-100 grid."""
    if task != "det":
        raise BadInput(f"{where}: a row with `gt_bbox` serves the task det, not {task}")
    if not isinstance(row.get("image"), str) or not isinstance(row["question"], str):
        raise BadInput(f"{where}: `image` and `question` have to be texts")
    image_size(folder / row["image"], where)
    lists = re.findall(r"\[([^\[\]]+)\]", str(row["gt_bbox"]))
    boxes = [[float(v) for v in re.findall(r"-?\d+(?:\.\d+)?", text)] for text in lists]
    if not boxes or any(len(values) != 5 for values in boxes):
        raise BadInput(f"{where}: `gt_bbox` {row['gt_bbox']!r} holds no boxes of five numbers")
    boxes = grid_boxes(boxes, frame, skipped)
    if boxes:
        yield Sample(id=where, task=task, images=(folder / row["image"],), question=plain_text(row["question"]),
                     answer=box_text(boxes, frame), frame=frame, boxes=boxes, think=plain_thought(task, "", len(boxes)),
                     size_group=str(row.get("size_group") or "").strip('"'))


def grid_boxes(boxes: list[list[float]], frame: int, skipped: Counter) -> tuple:
    """0-100 boxes -> frame. GeoChat's and EarthDial's are noisy: beyond 100 is clipped, without area is left out."""
    kept = []
    for box in boxes:
        envelope = horizontal(box)
        clipped = tuple(min(max(v, 0), 100) for v in envelope)
        if box[2] <= box[0] or box[3] <= box[1] or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            skipped["boxes without area left out"] += 1
            continue
        if clipped != envelope:
            skipped["boxes clipped to the image"] += 1
            box = box if box[4] else clipped  # a turned box cut off is no box any more: it is cut where it is used
        kept.append(convert_box(box, GRID, (frame, frame)))
    if not kept:
        skipped["records without any such box left out"] += 1
    return tuple(kept)


def pixel_boxes(answer: str, size: tuple[int, int], frame: int, where: str) -> tuple:
    """`[x1, y1, x2, y2]` in pixels of the original image -> frame; an answer of `none` or `[]` has no boxes."""
    boxes = parse_boxes(answer)
    if boxes is None:
        raise BadInput(f"{where}: the answer {answer[:60]!r} has no box [x1, y1, x2, y2] (task det)")
    for x1, y1, x2, y2 in boxes:
        if not (-1 <= x1 < x2 <= size[0] + 1 and -1 <= y1 < y2 <= size[1] + 1):  # a pixel of slack for rounding
            raise BadInput(f"{where}: box [{x1:g}, {y1:g}, {x2:g}, {y2:g}] of {answer[:60]!r} is malformed, has no area or "
                           f"lies outside its image of {size[0]} x {size[1]} pixels")
    return tuple(convert_box(box.tolist(), size, (frame, frame)) for box in boxes)


def plain_text(question: str) -> str:
    """The question without <image>, <p>/<ref> tags, task and sensor marks in brackets, and chat marks <|..|>."""
    text = re.sub(r"<image>|</?(?:p|ref)>|\\n|<\|\w+\|>", " ", question)
    text = re.sub(r"^\s*(?:\[[\w.]+\]\s*)+", "", text)
    return " ".join(text.split())


def split_reasoning(answer: str) -> tuple[str, str]:
    """(reasoning, answer) of a reference that may already carry <think> and <answer> tags."""
    answer = re.sub(r"<\|\w+\|>", "", answer)  # a chat mark in a reference would have no probability
    think = re.search(r"<think>(.*?)</think>", answer, re.DOTALL)
    tagged = re.search(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    return think[1].strip() if think else "", (tagged[1] if tagged else answer).strip()
