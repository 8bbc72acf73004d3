"""Which samples a run sees, and in which order: loading, joining, shuffling.

Public data sets are read by readers/; the included one is rendered by tiny/scenes.py. The order is
a function of the seed and the step alone, so a resumed run and a run on more ranks see the same
samples.
"""

import gc
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from readers.box_formats import Request
from readers.cross_view import check_candidates
from readers.folders import read_samples
from readers.shared_images import check_shared_images
from readers.splits import (
    VAL_FIRST,
    Split,
    check_part,
    few_shots,
    published_split,
    record_hash,
    split_samples,
)
from rewards import TASKS
from runtime.errors import NotServedError, UserError, warn
from runtime.ranks import rank
from sample import BOX_TASKS, INSTRUCTIONS, TOKEN_SIZE, Sample, to_oriented
from tiny.scenes import QUESTIONS, Scenes

# --------------------------------------------------------------------------------------------------
# Tasks and sources

def parse_tasks(text: str) -> list[str]:
    """The tasks of a comma-separated list, or of `all`."""
    return list(TASKS) if text == "all" else [check_task(task) for task in text.split(",")]


def parse_stages(text: str) -> list[list[str]]:
    """The tasks of each stage: `cls,det+rcap` is cls, then det and rcap mixed; `all`, a stage for
    each task."""
    stages = list(TASKS) if text == "all" else text.split(",")
    return [[check_task(task) for task in stage.split("+")] for stage in stages]


def check_task(task: str) -> str:
    """The task itself. Raises UserError if it lacks its line of TASKS or of INSTRUCTIONS."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    if task not in INSTRUCTIONS:
        raise UserError(f"task {task!r} has no line of INSTRUCTIONS in sample.py")
    return task


class Source(NamedTuple):
    """A value `[TASK=]SOURCE[@IMAGES]` of --data or --eval-data."""
    path: str            # `synthetic`, or a file or folder that readers/ knows
    images: str | None   # folder that its image names are relative to; None: where its format is
    task: str | None     # None: every task that it can serve
    choices: int | None = None    # --choices and --negatives: flags.add_candidate_flags
    negatives: str | None = None


def parse_sources(values: Sequence[str], images: str | None = None, choices: int | None = None,
                  negatives: str | None = None) -> list[Source]:
    """The sources that a flag names; `images` is the default of @IMAGES."""
    sources = []
    for value in values:
        task, path, folder = None, value, images
        before, _, after = value.partition("=")
        if before in TASKS:
            task, path = before, after
        if "@" in path and not Path(path).exists():  # a name may contain an @
            path, _, folder = path.rpartition("@")
        sources.append(Source(path, folder, task, choices, negatives))
    return sources


# --------------------------------------------------------------------------------------------------
# Loading

def load_splits(sources: Sequence[Source], eval_sources: Sequence[Source], tasks: Sequence[str],
                image_size: int, seed: int = 0, shots: int | None = None,
                oriented: bool = False, thinking: bool = True, system: str | None = None,
                heldout: int | None = None) -> dict[str, Split]:
    """What a run trains on and what it is scored on, of each task, joined from all its sources.

    Each source holds out samples of its own. With eval_sources, these give what is held out: their
    val or test split, or all samples of one without. The run is scored on the first `heldout` of a
    task, None: on all. Raises UserError, in one line, for what a user has to fix in a source, and
    if a source trains on an image that another one holds out, for any task.
    """
    read = partial(read_sources, tasks=tasks, image_size=image_size, oriented=oriented,
                   thinking=thinking, system=system)
    found = read(sources, seed=seed)
    eval_found = read(eval_sources, flag="--eval-data") if eval_sources else found
    splits, trained, held = {}, [], []
    for task, parts in found.items():
        paths, eval_parts = [source.path for source, _ in parts], eval_found[task]
        train, held_out, rules = split_sources(parts, whole="train" if eval_sources else None)
        for (source, samples), part in zip(parts, train):
            check_part(source.path, samples, part, "train")
        if eval_sources:
            _, held_out, rules = split_sources(eval_parts, "heldout")
            check_eval_sources(parts, eval_parts)
            rules.append(f"trained on {', '.join(paths)}")
        trained += zip(paths, train)
        held += [(source.path if source.path in paths else "--eval-data", part)
                 for (source, _), part in zip(eval_parts, held_out)]
        train, held_out = join(train), join(held_out)
        if shots:
            train = few_shots(train, shots)
        warn_of_boxes(task, train)
        if len(held_out) < 10 and heldout != 0:
            few = "so few tell little" if held_out else "so no scores will tell what was learned"
            rules.append(few if eval_sources else f"{few}; --eval-data names others")
        scored = held_out[:heldout]
        of_them = f", {len(scored)} of them scored" if len(scored) < len(held_out) else ""
        splits[task] = Split(train, scored, f"{task}: {len(train):,} train, {len(held_out):,} held "
                                            f"out{of_them} ({'; '.join(rules)})")
    if rank() == 0:  # it compares images for all; rendered scenes are no files
        check_shared_images(*([part for part in parts if not isinstance(part[1], Scenes)]
                              for parts in (trained, held)))
    return splits


def warn_of_boxes(task: str, train: Sequence[Sample]) -> None:
    """Say if targets of a task without boxes hold some."""
    if task in BOX_TASKS:
        return
    first = [train[i].gt_answer for i in range(min(8, len(train)))]
    found = next(filter(re.compile(r"\[[\d. ]+(,[\d. ]+){3,4}\]").search, first), None)
    if found:
        warn(f"warning: targets of {task} hold boxes, such as {found[:60]}; they stay in pixels of "
             "the original image. Which task are they for?")


def check_eval_sources(parts: Sequence[tuple[Source, Sequence[Sample]]],
                       eval_parts: Sequence[tuple[Source, Sequence[Sample]]]) -> None:
    """Raises UserError for a source of one task in both flags that has no splits of its own, and
    warns if --eval-data asks other questions of cls (those of class folders list the classes)."""
    if any(isinstance(samples, Scenes) for _, samples in (*parts, *eval_parts)):
        return  # 100,000 scenes are too many to draw
    for source, samples in parts:
        if (source.path in [other.path for other, _ in eval_parts]
                and not published_split(samples)):
            raise UserError(f"{source.path}: in --data and in --eval-data, but it has no val or "
                            "test split; set `split` in each record, or leave out --eval-data")
    if parts[0][1][0].task == "cls":
        questions, eval_questions = ({sample.question for _, samples in side for sample in samples}
                                     for side in (parts, eval_parts))
        others = sorted(eval_questions - questions)
        if others and len(questions) < 10:  # 10 or more: records, which word theirs in many ways
            warn("warning: --eval-data asks of cls what --data does not, such as "
                 f"{others[0][:200]!r}; do both have the same classes?")


def read_sources(sources: Sequence[Source], tasks: Sequence[str], image_size: int, seed: int = 0,
                 oriented: bool = False, thinking: bool = True, system: str | None = None,
                 flag: str = "--data") -> dict[str, list[tuple[Source, Sequence[Sample]]]]:
    """All samples of each task, with the sources that serve it, those of det with `oriented` in
    their oriented form. Raises UserError for a task that no source serves."""
    found, reasons = {task: [] for task in tasks}, {task: [] for task in tasks}
    for source in sources:
        if (source.choices or source.negatives) and "pair" not in tasks:
            raise UserError("--choices and --negatives are of pair, which is not among --task")
        wanted = [task for task in found if source.task in (None, task)]
        if not wanted:
            warn(f"{source.path} is not read: {source.task} is not among --task")
            continue
        for task, samples in read_source(source, wanted, image_size, seed).items():
            if isinstance(samples, NotServedError):
                if source.task:
                    raise samples
                reasons[task].append(str(samples))
                continue
            if task == "pair":
                check_candidates(source.path, samples, source.choices, source.negatives)
            samples = set_prompt(samples, source.path, oriented and task == "det", thinking, system)
            found[task].append((source, samples))
    for task, parts in found.items():
        if not parts:
            raise UserError("; ".join(reasons[task])
                            or f"{flag} has no source for task {task}: add {task}=SOURCE")
        if reasons[task]:
            warn(f"{task}: not from {'; '.join(reasons[task])}")
    return found


def set_prompt(samples: Sequence[Sample], source: str, oriented: bool, thinking: bool,
               system: str | None) -> Sequence[Sample]:
    """The samples, asked for oriented boxes or not, with or without reasoning, and with this system
    prompt. A line says if they are asked for oriented boxes, and none of theirs is turned."""
    form = {"thinking": thinking, "system": system}
    if isinstance(samples, Scenes):
        return replace(samples, oriented=oriented, **form)
    if oriented:
        if not any(box[4] for sample in samples for box in sample.gt_boxes):
            warn(f"{source}: no target box is turned, so every theta is 0 ([x1,y1,x2,y2,theta] in "
                 "pixels is read as its horizontal envelope)")
        samples = [to_oriented(sample) for sample in samples]
    if thinking and system is None:
        return samples
    return [replace(sample, **form) for sample in samples]


def read_source(source: Source, tasks: Sequence[str], image_size: int,
                seed: int = 0) -> dict[str, Sequence[Sample] | NotServedError]:
    """All samples of one source for each task, from one reading: a list, `Scenes` for `synthetic`,
    or the error of a task that it does not serve. `seed` is that of the scenes."""
    for task in tasks:
        check_task(task)
    if image_size % TOKEN_SIZE or image_size <= 0:
        raise UserError(f"--image-size {image_size} is not a multiple of {TOKEN_SIZE}, the side of "
                        "a vision token in pixels")
    if source.path == "synthetic":
        return {task: Scenes(task, image_size, seed) if task in QUESTIONS else NotServedError(
            f"--data synthetic has no questions of task {task}; add one to QUESTIONS in "
            "tiny/scenes.py") for task in tasks}
    path = Path(source.path)
    if not path.exists():
        before, equals, _ = source.path.partition("=")
        no_task = f"; {before!r} is no task" if equals else ""
        raise UserError(f"{path}: no such file or folder (or write: synthetic){no_task}")
    image_folder = Path(source.images) if source.images else None
    requests = {task: Request(task, image_size, image_folder, Counter(), choices=source.choices,
                              negatives=source.negatives) for task in tasks}
    gc.disable()  # the search for cycles in the new objects takes as long as reading
    try:
        found = read_samples(path, requests)
    finally:
        gc.freeze()  # the rest of the run does not search them either
        gc.enable()
    for task, samples in found.items():
        notes = sorted(requests[task].notes.items())
        reasons = "".join(f"; {n} {what}" for what, n in notes if n)
        if isinstance(samples, list) and not samples:
            found[task] = NotServedError(f"{path}: no samples of task {task}{reasons}")
        elif reasons and samples:
            warn(f"{path}: {len(samples)} samples of {task}{reasons}")
    return found


def load_samples(source: str, task: str, image_size: int, images: str | None = None,
                 split: str = "all", seed: int = 0, shots: int | None = None) -> Sequence[Sample]:
    """The samples of one task from one source.

    source      `synthetic`, or a file or folder that readers/ knows
    image_size  side in pixels of the square that images are resized to
    images      folder that a file's image names are relative to; default: where its format keeps it
    split       "all", "train" or "heldout" (split_samples)
    seed        of the synthetic scenes; "heldout" has a seed of its own
    shots       keep this many samples of each category (few_shots)
    Raises UserError, in one line, for anything in the source that a user has to fix.
    """
    samples = read_source(Source(source, images, task), [task], image_size, seed)[task]
    if isinstance(samples, NotServedError):
        raise samples
    if split != "all":
        parts = split_samples(samples, source)
        kept = parts.train if split == "train" else parts.held_out
        check_part(source, samples, kept, split)
        samples = kept
    return few_shots(samples, shots) if shots else samples


def split_sources(found: Sequence[tuple[Source, Sequence[Sample]]], whole: str | None = None,
                  order: Sequence[str] = VAL_FIRST) -> tuple[list, list, list[str]]:
    """The train parts, the held-out parts and the rules of several sources (split_samples)."""
    parts = [split_samples(samples, source.path, whole, order) for source, samples in found]
    return [p.train for p in parts], [p.held_out for p in parts], [p.summary for p in parts]


def join(parts: Sequence[Sequence[Sample]]) -> Sequence[Sample]:
    """The samples of several sources as one sequence."""
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part, Scenes) for part in parts):
        raise UserError("--data: synthetic cannot be joined with another source of the same task")
    # In the order of the hash, or the first held-out samples would be those of one source
    return sorted((sample for part in parts for sample in part), key=record_hash)


def fingerprint(samples: Sequence[Sample]) -> str:
    """Number and checksum of the samples, images by their names and folders' names: the same in
    every process, and where only the images have moved."""
    crc = 0
    if isinstance(samples, Scenes):
        crc = zlib.crc32(repr(samples).encode())  # it says all that the scenes depend on
    else:
        for s in samples:
            names = [str(image).split("/")[-2:] if isinstance(image, Path)
                     else getattr(image, "name", "")  # of a table's image a hash, of a scene none
                     for image in (*s.images, s.gt_mask)]
            row = (s.id, s.question, s.gt_answer, s.gt_boxes, s.think, s.gt_texts, s.choices,
                   s.category, names)
            crc = zlib.crc32(repr(row).encode(), crc)
    return f"{len(samples)} samples #{crc:08x}"


# --------------------------------------------------------------------------------------------------
# Order

def get_batch(streams: Sequence[Sequence[Sample]], step: int, size: int, seed: tuple[int, ...],
              part: range | None = None) -> list[Sample]:
    """The samples of one step: a function of (seed, step), so a resumed run sees the same data.

    The tasks take turns. The stream of each is pass after pass over its data, each shuffled anew; a
    batch may span two passes, so no pass drops its tail. `part`: which ones of the batch; None for
    all.
    """
    batch = []
    for i in range(size) if part is None else part:
        position_in_stream, task_index = divmod(step * size + i, len(streams))
        samples = streams[task_index]
        epoch, index = divmod(position_in_stream, len(samples))
        batch.append(samples[permutation(len(samples), (*seed, task_index), epoch)[index]])
    return batch


@lru_cache(maxsize=32)  # one for each task of a mixed stream, or each sample would shuffle again
def permutation(n: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    return np.random.default_rng([seed[0], epoch, *seed[1:]]).permutation(n)
