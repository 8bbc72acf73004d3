"""Mean rewards of a model on held-out samples, as the training scripts report them."""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from rewards import REWARD_PARTS, Sam, Sbert, score_completion
from rollout import Sampler, predict
from runtime.distributed import all_gather_object, rank, world_size
from sample import Sample

NUM_SAMPLED = 4  # sampled completions for each sample
BATCH_SIZE = 32


def held_out_rewards(sampler: Sampler, samples: Sequence[Sample], max_new_tokens: int,
                     temperature: float = 1.0,
                     **reward_models: Sbert | Sam | None) -> dict[str, float]:
    """Means over held-out samples of one task. The ranks share the work and get the same result.

    `sampled` is the accuracy reward of sampled completions, what GRPO optimises; `greedy` that of
    greedy ones; `format` the format reward of the sampled ones. Each further part of
    rewards.REWARD_PARTS that is not train_only follows, of the sampled ones.
    """
    if not samples:  # a source that is used whole holds none out
        return {}
    greedy, sampled = [], []  # the reward parts of each completion
    for start in range(rank() * BATCH_SIZE, len(samples), world_size() * BATCH_SIZE):
        batch = [samples[i] for i in range(start, min(start + BATCH_SIZE, len(samples)))]
        texts = predict(sampler, batch, max_new_tokens)
        greedy += score_all(texts, batch, reward_models)
        texts = predict(sampler, batch, max_new_tokens, NUM_SAMPLED, temperature, first=start)
        sampled += score_all(texts, batch, reward_models)
    greedy_means = mean_parts(greedy)
    sampled_means = mean_parts(sampled)
    return {"sampled": sampled_means.pop("accuracy"), "greedy": greedy_means["accuracy"],
            "format": sampled_means.pop("format"), **sampled_means}


def score_all(texts: Sequence[Sequence[str]], samples: Sequence[Sample],
              reward_models: Mapping[str, Sbert | Sam | None]) -> list[dict[str, float]]:
    """The reward parts of every completion; `texts` has the completions of each sample."""
    return [score_completion(text, sample, **reward_models)
            for sample, group in zip(samples, texts) for text in group]


def mean_parts(parts: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each reward part over all ranks' completions."""
    parts = list(chain(*all_gather_object(parts)))
    means = {}
    for name in REWARD_PARTS:
        # Sorted, so that the sum rounds the same on any number of ranks
        values = sorted(p[name] for p in parts if name in p)
        if values:
            means[name] = float(np.mean(values))
    return means
