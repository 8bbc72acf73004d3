"""Mean rewards of a model on held-out samples, as the training scripts report them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np
from tqdm import tqdm

from rewards import REWARD_PARTS, Sam, Sbert, score_completion
from rollout import Sampler, predict
from runtime.distributed import all_gather_object, rank, world_size
from runtime.logging import print0
from sample import Sample

NUM_SAMPLED = 4  # sampled completions for each sample
BATCH_SIZE = 32


def held_out_rewards(sampler: Sampler, samples: Sequence[Sample], max_new_tokens: int,
                     temperature: float = 1.0, should_stop: Callable[[], bool] = lambda: False,
                     **reward_models: Sbert | Sam | None) -> dict[str, float] | None:
    """Means over held-out samples of one task. The ranks share the work and get the same result:
    None if `should_stop`, which all of them ask before each batch, says so.

    `sampled` is the accuracy reward of sampled completions, what GRPO optimises; `greedy` that of
    greedy ones; `format` the format reward of the sampled ones. Each further part of
    rewards.REWARD_PARTS that is not train_only follows, of the sampled ones.
    """
    if not samples:  # a source that is used whole holds none out
        return {}
    print0(f"{samples[0].task}: scoring {len(samples)} held-out samples")
    greedy, sampled = [], []  # the reward parts of each completion
    first_starts = range(0, len(samples), world_size() * BATCH_SIZE)  # the first rank's
    for first_start in tqdm(first_starts, "held out", leave=False, disable=rank() > 0 or None):
        if should_stop():
            return None
        start = first_start + rank() * BATCH_SIZE
        batch = [samples[i] for i in range(start, min(start + BATCH_SIZE, len(samples)))]
        if batch:
            texts = predict(sampler, batch, max_new_tokens)
            greedy += score_all(texts, batch, reward_models)
            texts = predict(sampler, batch, max_new_tokens, NUM_SAMPLED, temperature, first=start)
            sampled += score_all(texts, batch, reward_models)
    greedy_means = mean_parts(greedy)
    sampled_means = mean_parts(sampled)
    return {"sampled": sampled_means.pop("accuracy"), "greedy": greedy_means["accuracy"],
            "format": sampled_means.pop("format"), **sampled_means}


def held_out_row(held_out: dict[str, float] | None, part_weights: Mapping[str, float]) -> dict:
    """These means as fields of metrics.jsonl: nested, flat, and the weighted sum of the parts of
    sampled completions. None marks scores that are yet to come."""
    if not held_out:
        return {} if held_out == {} else {"heldout": None}
    parts = held_out | {"accuracy": held_out["sampled"]}
    reward = sum(part_weights[name] * parts[name] for name in REWARD_PARTS if name in parts)
    flat = {f"heldout_{name}": value for name, value in parts.items() if name != "sampled"}
    return {"heldout": held_out, "heldout_reward": reward, **flat}


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
