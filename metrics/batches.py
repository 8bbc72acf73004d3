"""Many samples as batches: by length, divided among the ranks, encoded in advance, and what is left
of them after an interruption."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from processing import Processor, Prompts, encode, prefetch
from runtime.ranks import rank, world_size
from sample import Sample, format_prompt


def batches_by_length(samples: Sequence[Sample], size: int) -> list[list[int]]:
    """The indices of the samples in batches of prompts of similar length. The longest come first:
    a batch that is too large for the memory fails at once. The number of ranks changes nothing."""
    lengths = [(len(sample.images), len(format_prompt(sample))) for sample in samples]
    order = sorted(range(len(samples)), key=lengths.__getitem__, reverse=True)
    return [order[start : start + size] for start in range(0, len(order), size)]


def local_batches(processor: Processor, samples: Sequence[Sample],
                  batches: Sequence[list[int]]) -> Iterator[tuple[list[int], list[Prompts]]]:
    """(indices, prompts) of this rank's batches. Each rank gets equally many, so that the ranks can
    exchange results after each one; the last may be empty."""
    padded = [*batches, *[[]] * (-len(batches) % world_size())]
    local = ((indices, [samples[i] for i in indices]) for indices in padded[rank()::world_size()])
    for indices, _, prompts in prefetch(local, partial(encode, processor)):
        yield indices, prompts


def is_partial(file: Path, settings: str) -> bool:
    """Whether an interrupted evaluation with these settings has left the file."""
    if not file.exists():
        return False
    with file.open(errors="replace") as lines:
        return lines.readline() == settings + "\n"


def read_partial(file: Path, settings: str) -> dict[int, str]:
    """{index of a sample: completion} as an interrupted evaluation with these settings left them.
    From the first damaged line on, such as a torn last one, the file is cut."""
    lines = [settings]
    if is_partial(file, settings):
        lines = file.read_text(errors="replace").split("\n")[:-1]
    done = {}
    for n, line in enumerate(lines[1:], 1):
        try:
            done |= dict(json.loads(line))
        except (ValueError, TypeError):
            lines = lines[:n]
            break
    shortened = file.with_suffix(".shortened")
    shortened.write_text("".join(line + "\n" for line in lines))
    shortened.replace(file)
    return done
