"""What one source trains on and what it holds out, by which rule."""

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from readers.files import held_out_tenth
from runtime.errors import UserError, warn
from sample import Sample
from tiny.scenes import Scenes

HELD_OUT_SEED = 2**31   # of synthetic scenes: outside the range of --seed
HELD_OUT_SAMPLES = 256  # held-out samples that a training run is scored on
# Where a source has both: who chooses settings by test scores reports them too high
VAL_FIRST = ("val", "test")   # what training is scored on
TEST_FIRST = ("test", "val")  # and evaluate.py
# File or folder names of few-shot and training splits, such as train_1shot.json
NAMED_TRAIN = re.compile(r"(?:^|[_.-])(?:train(?:ing)?|\d+-?shots?)(?:[_.-]|$)", re.IGNORECASE)


class Split(NamedTuple):
    train: Sequence[Sample]
    held_out: Sequence[Sample]  # those that the run is scored on
    summary: str  # how many of each, from where, by which rule


def split_samples(samples: Sequence[Sample], source: str, whole: str | None = None,
                  order: Sequence[str] = VAL_FIRST) -> Split:
    """What one source trains on and what it holds out, in the order of a hash, and by which rule.

    Held out is the first split of `order` that it has, the other is unused; without any, a tenth
    of the images, chosen by a hash of their file names. `whole`, "train" or "heldout", puts all
    samples of a source without such splits on that side; one that is named as a few-shot or
    training split holds nothing out. Raises UserError if some records are marked train and others
    not at all.
    """
    if isinstance(samples, Scenes):
        scenes = replace(samples, seed=HELD_OUT_SEED, n=HELD_OUT_SAMPLES)
        return Split(samples, scenes, "other scenes")
    if not whole and (NAMED_TRAIN.search(Path(source).stem)
                      or all(sample.split == "train" for sample in samples)):
        whole = "train"
    published = published_split(samples, order)
    if published:
        train = [sample for sample in samples if sample.split == "train"]
        held_out = [sample for sample in samples if sample.split == published]
        rule = published
        unused = len(samples) - len(train) - len(held_out)
        if unused:
            warn(f"{source}: {unused} samples of {samples[0].task}, neither train nor "
                 f"{published}, are not used here")
    elif len({sample.split for sample in samples}) > 1:
        raise UserError(f"{source}: some records have `split`: train, and others none; give it to "
                        "all of them, or to none")
    elif whole:
        train, held_out = (samples, []) if whole == "train" else ([], samples)
        rule = "none" if whole == "train" else "all"
    else:  # by image and for all tasks of a file, so no task trains on another task's test image
        names = [image_name(sample) for sample in samples]
        chosen = held_out_tenth(names)
        train = [sample for sample, name in zip(samples, names) if name not in chosen]
        held_out = [sample for sample, name in zip(samples, names) if name in chosen]
        check_names(source, names, samples, held_out)
        rule = f"about a tenth of the {'places' if samples[0].place else 'images'}"
    # In the order of a hash: in that of the source, the first 256 could be one class
    return Split(sorted(train, key=record_hash), sorted(held_out, key=record_hash),
                 f"{rule} of {source}")


def check_names(source: str, names: Sequence[str], samples: Sequence[Sample],
                held_out: Sequence[Sample]) -> None:
    """Raises UserError where the held-out names are far from a tenth of the images, because images
    of several folders share a name, as in scene_1/rgb.png, scene_2/rgb.png."""
    images, held = ({sample.place or sample.images[0] for sample in part}
                    for part in (samples, held_out))
    if len(images) >= 10 and len(held) > len(images) / 3 and len(set(names)) < len(images):
        raise UserError(f"{source}: the tenth to hold out is chosen by file names, but "
                        f"{len(images)} images have {len(set(names))}; set `split` in each record, "
                        "or give the images names of their own")


def check_part(source: str, samples: Sequence[Sample], part: Sequence[Sample],
               split: str) -> None:
    """Raises UserError if the part of a source's samples that is its split is empty."""
    if part:
        return
    hints = {"train": "; all its images are held out; add images, or set `split` in each record",
             "heldout": "; it holds nothing out: it has too few images, or the name of a training "
                        "split, or no records but of train; add images, or set `split` in each"}
    hint = "; set `split` in each record" if published_split(samples) else hints[split]
    raise UserError(f"{source}: no samples of task {samples[0].task} in the {split} split{hint}")


def published_split(samples: Sequence[Sample], order: Sequence[str] = VAL_FIRST) -> str | None:
    """The first of these splits that the source itself keeps, if it has one."""
    found = {sample.split for sample in samples}
    return next((split for split in order if split in found), None)


def record_hash(sample: Sample) -> tuple[int, str]:
    """A hash of file name and record, not of the folder: the same order on every machine."""
    folder = sample.id.partition(": ")[0].rpartition("/")[0]  # a record may hold a / as well
    name = sample.id.removeprefix(f"{folder}/")
    return zlib.crc32(name.encode()), name


def image_name(sample: Sample) -> str:
    """The sample's place, else the file name of its first image without the folder; for an image of
    a table a hash of its content."""
    return sample.place or sample.images[0].name


def few_shots(samples: Sequence[Sample], shots: int) -> list[Sample]:
    """At most `shots` samples of each category, in their order.

    A hash of the record's name chooses, so the choice is the same on every machine, and fewer shots
    are a subset of more.
    """
    samples = list(samples[:2000] if isinstance(samples, Scenes) else samples)
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
