"""Many samples as batches: by length, divided among the ranks, encoded in advance."""

from collections.abc import Iterator, Sequence
from functools import partial

from data import prefetch
from model import Processor, Prompts, encode
from runtime.distributed import rank, world_size
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
