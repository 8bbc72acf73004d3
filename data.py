"""`Sample`, what every task learns from: prompts, the frame of the boxes, loading, and a deterministic order.

All boxes of a `Sample` live in one frame: pixels of the square image of side `frame` that the model sees. Qwen2.5-VL
speaks absolute pixels of the *processed* image, so an image is resized to the frame once, here, and every box is
brought along when it is read; prompts, answers, rewards and pictures then need no conversion.

Public data sets are read by formats/, the built-in one is drawn by tiny/scenes.py.
"""

import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from rewards import TASKS, box_text, horizontal
from tiny.scenes import QUESTIONS, ask, draw, scene

PATCH = 28            # Qwen2.5-VL turns 28 x 28 pixels into one token, so a frame is a multiple of it
HELDOUT_SEED = 2**31  # the seed of the synthetic scenes that no training run sees
HELDOUT = 256         # held-out samples that a training run is scored on


class BadInput(Exception):
    """Something the user must mend: one line with the file, the record, what is wrong and what to do."""


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


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
    references: tuple = ()  # all right texts, where there are several captions; else `answer` is the only one
    choices: tuple = ()   # what to choose from: the label vocabulary of mlc, the letters of pair
    category: str = ""    # class of the object or scene: --shots draws evenly from these
    subset: str = ""      # row of the benchmark's table: size of the object, type of the question, unique or not
    split: str = ""       # "train", "val" or "test" where the source says so
    mask: object = None   # seg: image or path, non-zero on the target


# ----------------------------------------------------------------------------------------------------------------------
# Prompts, in Qwen's chat layout

SYSTEM = "Read the image. Reason in <think></think>, then give only the result in <answer></answer>."


def prompt(sample: Sample) -> str:
    """The chat up to where the model takes over, one `<|image_pad|>` for each image (model.encode widens it)."""
    images = "<|vision_start|><|image_pad|><|vision_end|>" * len(sample.images)
    instruction = TASKS[sample.task].instruction.replace("{frame}", str(sample.frame))
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


def sloppy(sample: Sample, pixels: float, seed: Sequence[int]) -> Sample:
    """The sample as a hasty annotator would answer it: box edges off by Gaussian noise, its std in pixels of the frame.
    `boxes`, which the reward reads, stay exact."""
    noise = np.random.default_rng(seed).normal(0, pixels, (len(sample.boxes), 4))
    return replace(sample, answer=box_text([np.add(horizontal(b), n) for b, n in zip(sample.boxes, noise)], sample.frame))


# ----------------------------------------------------------------------------------------------------------------------
# Loading: a source is `synthetic`, a file or a folder

def tasks_named(text: str) -> list[str]:
    """The tasks of a comma-separated list, or of `all`."""
    return list(TASKS) if text == "all" else [known_task(task) for task in text.split(",")]


def known_task(task: str) -> str:
    """The task itself. Raises BadInput for one that TASKS has not."""
    if task not in TASKS:
        raise BadInput(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    return task


def load(source: str, task: str, frame: int, images: str | None = None, split: str = "all", seed: int = 0,
         shots: int | None = None) -> Sequence[Sample]:
    """The samples of one task: a list, or `Scenes` where the source is `synthetic`.

    source  `synthetic`, or a file or folder that formats/ knows
    frame   side of the square image that the model sees, in pixels
    images  folder that a file's image names are relative to; where the format keeps them by default
    split   "all", or "train" / "heldout". Held out is the source's "test" split where it has one (and "val" is neither), else
            its "val" split, else a tenth of the images, chosen by a hash of their file names
    seed    of the synthetic scenes; "heldout" takes a seed of its own
    shots   only so many of each category (few_shots)
    Raises BadInput, in one line, for anything in the source that a user has to mend.
    """
    known_task(task)
    if frame % PATCH or frame <= 0:
        raise BadInput(f"--image-size {frame} is not a multiple of {PATCH}, the side of a vision token in pixels")
    if source == "synthetic":
        if task not in QUESTIONS:
            raise BadInput(f"--data synthetic has no questions of task {task}; add one to QUESTIONS in tiny/scenes.py")
        scenes = Scenes(task, frame, seed=HELDOUT_SEED, n=HELDOUT) if split == "heldout" else Scenes(task, frame, seed)
        return few_shots(scenes[:2000], shots) if shots else scenes  # a scene is drawn when it is looked at
    samples = read_source(source, task, frame, images)
    published = heldout_split(samples)
    if split != "all" and published:
        others = sum(s.split not in ("train", published) for s in samples)
        if others:
            print(f"{source}: {others} samples of {task}, neither train nor {published}, are left aside", file=sys.stderr)
        samples = [s for s in samples if s.split == (published if split == "heldout" else "train")]
    elif split != "all":  # by image, not by record, and alike for every task of a file: no task trains on another's test
        names = list(map(image_name, samples))
        held = {name for name in names if zlib.crc32(name.encode()) % 10 == 0}
        held = held or {min(names, key=lambda name: zlib.crc32(name.encode()))}
        samples = [s for s, name in zip(samples, names) if (name in held) == (split == "heldout")]
    if split != "all":
        samples = sorted(samples, key=record_hash)  # or the first 256 of class folders are one class
    if not samples:
        raise BadInput(f"{source}: no samples of task {task} in the {split} split"
                       + ("" if published else "; it has too few images to hold some out"))
    return few_shots(samples, shots) if shots else samples


def heldout_split(samples: Sequence[Sample]) -> str | None:
    """The split that the source itself keeps for testing, if it has one."""
    found = {sample.split for sample in samples}
    return next((split for split in ("test", "val") if split in found), None)


def record_hash(sample: Sample) -> tuple[int, str]:
    """Of file name and record, not of the folder: the same order on every machine."""
    name = sample.id.rsplit("/", 1)[-1]
    return zlib.crc32(name.encode()), name


def few_shots(samples: Sequence[Sample], shots: int) -> list[Sample]:
    """So many samples of each category, in their order. A hash of the record's name chooses, so the choice is the same on
    every machine, and fewer shots are a subset of more."""
    samples = list(samples)
    nameless = next((s.id for s in samples if not s.category), None)
    if nameless:
        raise BadInput(f"{nameless}: has no category, and --shots draws so many of each; leave --shots out")
    seen, kept = Counter(), []
    for i in sorted(range(len(samples)), key=lambda i: record_hash(samples[i])):
        seen[samples[i].category] += 1
        if seen[samples[i].category] <= shots:
            kept.append(i)
    return [samples[i] for i in sorted(kept)]


@lru_cache(maxsize=32)  # train and held-out split come from one reading
def read_source(source: str, task: str, frame: int, images: str | None) -> list[Sample]:
    """All samples of a file or folder, in its order."""
    from formats import readers  # which builds on this module
    path, skipped = Path(source), Counter()
    if not path.exists():
        raise BadInput(f"--data {source}: no such file or folder (or write: synthetic)")
    samples = list(readers.read(path, task, frame, Path(images) if images else None, skipped))
    if skipped:
        notes = ", ".join(f"{n} {what}" for what, n in sorted(skipped.items()))
        print(f"{path}: {len(samples)} samples of {task}; {notes}", file=sys.stderr)
    if not samples:
        raise BadInput(f"{path}: no samples of task {task}")
    return samples


def fingerprint(samples: Sequence[Sample]) -> str:
    """Number and checksum of the samples, whose images are told by their names: the same in every process."""
    rows = [repr(samples)] if isinstance(samples, Scenes) else (as_row(s) | {"think": s.think} for s in samples)
    crc = 0
    for row in rows:
        crc = zlib.crc32(json.dumps(row).encode(), crc)
    return f"{len(samples)} samples #{crc:08x}"


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
        view = scene(self.seed, int(i), self.frame, least=self.task in ("rcap", "rec"))  # these two ask about one thing
        common = {"id": f"synthetic {self.seed}:{i}", "task": self.task, "images": (draw(view),), "frame": self.frame}
        return Sample(**common | ask(self.task, view))


def image_name(sample: Sample) -> str:
    """File name of the first image, the same in whatever folder it lies; of an image in a table a hash of its content."""
    return Path(getattr(sample.images[0], "filename", sample.images[0])).name


def as_row(sample: Sample) -> dict:
    """The sample as JSON for predictions.jsonl and samples.jsonl: images by their paths; a built-in scene, or an image that
    lies in a table, by the sample's id."""
    images = [str(image) if isinstance(image, (str, Path)) else sample.id for image in sample.images]
    return {"id": sample.id, "task": sample.task, "images": images, "question": sample.question,
            "reference": sample.answer, "boxes": sample.boxes, "frame": sample.frame, "references": sample.references,
            "choices": sample.choices, "category": sample.category, "subset": sample.subset,
            "mask": str(sample.mask) if isinstance(sample.mask, (str, Path)) else None}


def from_row(row: dict) -> Sample:
    """The sample that as_row wrote. A built-in scene is drawn again. Raises LookupError, TypeError, ValueError or
    AttributeError for a row that is none."""
    scene = re.fullmatch(r"synthetic (\d+):(\d+)", str(row["id"]))
    if scene:
        return Scenes(str(row["task"]), int(row["frame"]), int(scene[1]))[int(scene[2])]
    boxes = tuple((float(x1), float(y1), float(x2), float(y2), float(theta)) for x1, y1, x2, y2, theta in row["boxes"])
    return Sample(id=str(row["id"]), task=str(row["task"]), images=tuple(map(Path, row["images"])), question=str(row["question"]),
                  answer=str(row["reference"]), frame=int(row["frame"]), boxes=boxes,
                  references=tuple(map(str, row["references"])), choices=tuple(map(str, row["choices"])),
                  category=str(row["category"]), subset=str(row["subset"]), mask=row["mask"] and Path(row["mask"]))


def batch(samples: Sequence, step: int, size: int, seed: int) -> list[Sample]:
    """The samples of one step: a function of (seed, step), so a resumed run meets the same data.

    The stream is one shuffled pass after the other without a seam, so no pass drops its tail.
    """
    places = range(step * size, (step + 1) * size)
    return [samples[_permutation(len(samples), seed, place // len(samples))[place % len(samples)]] for place in places]


@lru_cache(maxsize=32)  # one a task of a mixed stream, or each draw would shuffle anew
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def ahead(steps: Iterable[tuple[int, list]], encode: Callable, workers: int = 4) -> Iterator[tuple[int, list, list]]:
    """(step, samples) -> (step, samples, each of them encoded) in order. The next step's are encoded by threads while this one
    is trained on: reading, decoding and resizing images, most of the work, happens outside Python's lock."""
    pool, waiting = ThreadPoolExecutor(workers), None
    try:
        for step, samples in chain(steps, [(None, [])]):
            coming = step, samples, [pool.submit(encode, sample) for sample in samples]
            if waiting:
                yield *waiting[:2], [future.result() for future in waiting[2]]
            waiting = coming
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# What readers and scores share

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


def plain_text(question: str) -> str:
    """The question without <image>, <p>/<ref> tags, task and sensor marks in brackets, and chat marks <|..|>."""
    text = re.sub(r"<image>|</?(?:p|ref)>|\\n|<\|\w+\|>", " ", question)
    text = re.sub(r"^\s*(?:\[[\w.]+\]\s*)+", "", text)
    return " ".join(text.split())
