"""Which samples a run sees, and in which order: loading, splits, shuffling, prefetching.

Public data sets are read by readers/; the embedded one is rendered by tiny/scenes.py. The order is
a function of the seed and the step alone, so a resumed run and a run on more ranks see the same
samples.
"""

import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from readers.folders import read_samples
from rewards import TASKS
from runtime.errors import UserError
from sample import Sample
from tiny.scenes import QUESTIONS, Scenes

TOKEN_SIZE = 28         # Qwen2.5-VL makes one token of 28 x 28 pixels, 2 x 2 patches
HELD_OUT_SEED = 2**31   # of synthetic scenes: outside the range of --seed
HELD_OUT_SAMPLES = 256  # held-out samples that a training run is scored on


# --------------------------------------------------------------------------------------------------
# Loading: a source is `synthetic`, a file or a folder

def parse_tasks(text: str) -> list[str]:
    """The tasks of a comma-separated list, or of `all`."""
    return list(TASKS) if text == "all" else [check_task(task) for task in text.split(",")]


def check_task(task: str) -> str:
    """The task itself. Raises UserError if TASKS does not have it."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    return task


def load_samples(source: str, task: str, image_size: int, images: str | None = None,
                 split: str = "all", seed: int = 0, shots: int | None = None) -> Sequence[Sample]:
    """The samples of one task: a list, or `Scenes` where the source is `synthetic`.

    source      `synthetic`, or a file or folder that readers/ knows
    image_size  side in pixels of the square that images are resized to
    images      folder that a file's image names are relative to; default: where its format keeps it
    split       "all", "train" or "heldout" (split_samples)
    seed        of the synthetic scenes; "heldout" has a seed of its own
    shots       keep this many samples of each category (few_shots)
    Raises UserError, in one line, for anything in the source that a user has to fix.
    """
    check_task(task)
    if image_size % TOKEN_SIZE or image_size <= 0:
        raise UserError(f"--image-size {image_size} is not a multiple of {TOKEN_SIZE}, the side of "
                        "a vision token in pixels")
    if source == "synthetic":
        if task not in QUESTIONS:
            raise UserError(f"--data synthetic has no questions of task {task}; add one to "
                            "QUESTIONS in tiny/scenes.py")
        if split == "heldout":
            return Scenes(task, image_size, HELD_OUT_SEED, HELD_OUT_SAMPLES)
        scenes = Scenes(task, image_size, seed)
        return few_shots(scenes[:2000], shots) if shots else scenes
    samples = read_source(source, task, image_size, images)
    if split != "all":
        samples = split_samples(samples, split, source)
    return few_shots(samples, shots) if shots else samples


@lru_cache(maxsize=32)  # the train and the held-out split come from one reading
def read_source(source: str, task: str, image_size: int, images: str | None) -> list[Sample]:
    """All samples of a file or folder, in its order."""
    path = Path(source)
    skipped = Counter()
    if not path.exists():
        raise UserError(f"--data {source}: no such file or folder (or write: synthetic)")
    image_folder = Path(images) if images else None
    samples = list(read_samples(path, task, image_size, image_folder, skipped))
    notes = "".join(f"; {n} {what}" for what, n in sorted(skipped.items()))
    if not samples:
        raise UserError(f"{path}: no samples of task {task}{notes}")
    if notes:
        print(f"{path}: {len(samples)} samples of {task}{notes}", file=sys.stderr)
    return samples


def split_samples(samples: Sequence[Sample], split: str, source: str) -> list[Sample]:
    """The samples of split "train" or "heldout", in the order of a hash.

    Held out is the source's "test" split where it has one (its "val" split is then unused), else
    its "val" split, else a tenth of the images, chosen by a hash of their file names.
    """
    published = published_split(samples)
    if published:
        kept = [s for s in samples if s.split == (published if split == "heldout" else "train")]
        unused = sum(s.split not in ("train", published) for s in samples)
        if unused:
            print(f"{source}: {unused} samples of {samples[0].task}, neither train nor "
                  f"{published}, are not used", file=sys.stderr)
    else:  # by image and for all tasks of a file, so no task trains on another task's test image
        hashes = {image_name(s): zlib.crc32(image_name(s).encode()) for s in samples}
        held_out = {name for name in hashes if hashes[name] % 10 == 0}
        held_out = held_out or {min(hashes, key=hashes.get)}
        kept = [s for s in samples if (image_name(s) in held_out) == (split == "heldout")]
    if not kept:
        raise UserError(f"{source}: no samples of task {samples[0].task} in the {split} split"
                        + ("" if published else "; it has too few images to hold some out: add "
                           "images, or set `split` in each record"))
    return sorted(kept, key=record_hash)  # in its order, the first 256 could be one class


def published_split(samples: Sequence[Sample]) -> str | None:
    """The split that the source itself keeps for testing, if it has one."""
    found = {sample.split for sample in samples}
    return next((split for split in ("test", "val") if split in found), None)


def record_hash(sample: Sample) -> tuple[int, str]:
    """A hash of file name and record, not of the folder: the same order on every machine."""
    name = sample.id.rsplit("/", 1)[-1]
    return zlib.crc32(name.encode()), name


def image_name(sample: Sample) -> str:
    """File name of the first image without its folder; for an image inside a table a hash of its
    content."""
    return Path(getattr(sample.images[0], "filename", sample.images[0])).name


def few_shots(samples: Sequence[Sample], shots: int) -> list[Sample]:
    """At most `shots` samples of each category, in their order.

    A hash of the record's name chooses, so the choice is the same on every machine, and fewer shots
    are a subset of more.
    """
    samples = list(samples)
    uncategorised = next((s.id for s in samples if not s.category), None)
    if uncategorised:
        raise UserError(f"{uncategorised}: has no category, and --shots draws evenly from "
                        "categories; give each record a `category`, or leave --shots out")
    counts = Counter()
    kept = []
    for i in sorted(range(len(samples)), key=lambda i: record_hash(samples[i])):
        if counts[samples[i].category] < shots:
            counts[samples[i].category] += 1
            kept.append(i)
    return [samples[i] for i in sorted(kept)]


def fingerprint(samples: Sequence[Sample]) -> str:
    """Number and checksum of the samples, images by their names: the same in every process."""
    if isinstance(samples, Scenes):
        rows = [repr(samples)]  # it says all that the scenes depend on
    else:
        rows = (sample_to_row(sample) | {"think": sample.think} for sample in samples)
    crc = 0
    for row in rows:
        crc = zlib.crc32(json.dumps(row).encode(), crc)
    return f"{len(samples)} samples #{crc:08x}"


# --------------------------------------------------------------------------------------------------
# Order

def get_batch(samples: Sequence[Sample], step: int, size: int, seed: int) -> list[Sample]:
    """The samples of one step: a function of (seed, step), so a resumed run sees the same data.

    The stream is pass after pass over the data, each shuffled anew. A batch may span two passes, so
    no pass drops its tail.
    """
    batch = []
    for position in range(step * size, (step + 1) * size):
        epoch, i = divmod(position, len(samples))
        batch.append(samples[permutation(len(samples), seed, epoch)[i]])
    return batch


@lru_cache(maxsize=32)  # one for each task of a mixed stream, or each draw would shuffle again
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def prefetch(steps: Iterable[tuple[int, list]],
             encode: Callable) -> Iterator[tuple[int, list, list]]:
    """(step, samples) -> (step, samples, each of them encoded), in order.

    Threads encode the next step's samples while this step trains. Reading, decoding and resizing
    images, which is most of the work, releases Python's lock.
    """
    pool = ThreadPoolExecutor(max_workers=4)
    current = None
    try:
        for step, samples in chain(steps, [(None, [])]):  # the empty one yields the last real step
            upcoming = step, samples, [pool.submit(encode, sample) for sample in samples]
            if current:
                step, samples, encoded = current
                yield step, samples, [future.result() for future in encoded]
            current = upcoming
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# Samples as rows of predictions.jsonl and samples.jsonl

def sample_to_row(sample: Sample) -> dict:
    """The sample as JSON. Images are named by their paths; a synthetic scene, or an image inside a
    table, by the sample's id."""
    images = [str(image) if isinstance(image, (str, Path)) else sample.id
              for image in sample.images]
    mask = str(sample.gt_mask) if isinstance(sample.gt_mask, (str, Path)) else None
    return {"id": sample.id, "task": sample.task, "images": images, "question": sample.question,
            "reference": sample.gt_answer, "boxes": sample.gt_boxes, "frame": sample.image_size,
            "references": sample.gt_texts, "choices": sample.choices, "category": sample.category,
            "subset": sample.subset, "mask": mask}


def sample_from_row(row: dict) -> Sample:
    """The sample that sample_to_row wrote; a synthetic scene is rendered again. Raises LookupError,
    TypeError, ValueError or AttributeError for a row that is none."""
    scene = re.fullmatch(r"synthetic (\d+):(\d+)", str(row["id"]))
    if scene:
        seed, index = int(scene[1]), int(scene[2])
        return Scenes(str(row["task"]), int(row["frame"]), seed)[index]
    boxes = tuple((float(x1), float(y1), float(x2), float(y2), float(theta))
                  for x1, y1, x2, y2, theta in row["boxes"])
    return Sample(
        id=str(row["id"]), task=str(row["task"]), images=tuple(map(Path, row["images"])),
        question=str(row["question"]), gt_answer=str(row["reference"]),
        image_size=int(row["frame"]), gt_boxes=boxes, gt_texts=tuple(map(str, row["references"])),
        choices=tuple(map(str, row["choices"])), category=str(row["category"]),
        subset=str(row["subset"]), gt_mask=row["mask"] and Path(row["mask"]))
