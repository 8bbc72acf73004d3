"""Mean rewards of a model on held-out samples, as the training scripts report them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from statistics import fmean

import numpy as np
from tqdm import tqdm

from metrics.batches import batches_by_length, local_batches
from rewards import REWARD_PARTS, Sam, Sbert, extract_answer, score_completion
from rollout import Sampler, predict
from runtime.distributed import all_gather_object
from runtime.logging import print0, shorten
from runtime.ranks import rank, world_size
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
    samples = list(samples)  # scenes are rendered once
    greedy, sampled = [], []  # the reward parts of each completion
    batches = batches_by_length(samples, BATCH_SIZE)
    rounds = tqdm(local_batches(sampler.processor, samples, batches), "held out",
                  -(-len(batches) // world_size()), leave=False, disable=rank() > 0 or None)
    for indices, prompts in rounds:
        if should_stop():
            return None
        batch = [samples[i] for i in indices]
        if batch:
            texts = predict(sampler, prompts, max_new_tokens)
            scored = score_all(texts, batch, reward_models)
            greedy += scored
            if 0 in indices:
                at = indices.index(0)
                print_example(batch[at], texts[at][0], scored[at])
            texts = predict(sampler, prompts, max_new_tokens, NUM_SAMPLED, temperature, indices)
            sampled += score_all(texts, batch, reward_models)
    greedy_means = mean_parts(greedy)
    sampled_means = mean_parts(sampled)
    return {"sampled": sampled_means.pop("accuracy"), "greedy": greedy_means["accuracy"],
            "format": sampled_means.pop("format"), **sampled_means}


def print_example(sample: Sample, text: str, parts: Mapping[str, float]) -> None:
    """The greedy answer to a question that is the same each time, so that a reader sees it change."""
    question = shorten(sample.question, 90)
    print(f"    e.g. {question} -> {shorten(extract_answer(text) or 'no answer', 60)} (target "
          f"{shorten(sample.gt_answer, 60)}), accuracy reward {parts['accuracy']:.3f}", flush=True)


def held_out_by_task(sampler: Sampler, held_out: Mapping[str, Sequence[Sample]],
                     max_new_tokens: int, temperature: float, should_stop: Callable[[], bool],
                     tasks: Sequence[str],
                     **reward_models: Sbert | Sam | None) -> dict[str, dict[str, float]] | None:
    """{task: its held_out_rewards} of these tasks, as far as they have held-out samples."""
    scores = {}
    for task in dict.fromkeys(tasks):
        scores[task] = held_out_rewards(sampler, held_out[task], max_new_tokens, temperature,
                                        should_stop, **reward_models)
        if scores[task] is None:
            return None
    return {task: means for task, means in scores.items() if means}


def held_out_row(scores: dict[str, dict[str, float]] | None, tasks: Sequence[str],
                 part_weights: Mapping[str, float]) -> dict:
    """Fields of metrics.jsonl: the scores of held_out_by_task, and means over the tasks of the
    stage, nested and flat, with the weighted sum of the parts of sampled completions. None marks
    scores that are yet to come."""
    if not scores:
        return {} if scores == {} else {"heldout_tasks": None}
    rows = []
    for means in (scores[task] for task in dict.fromkeys(tasks) if task in scores):
        parts = means | {"accuracy": means["sampled"]}
        reward = sum(part_weights[name] * parts[name] for name in REWARD_PARTS if name in parts)
        rows.append(parts | {"reward": reward})
    means = {name: fmean(row.get(name, 0.0) for row in rows)  # 0 where a task lacks a part
             for name in dict.fromkeys(chain(*rows))}
    flat = {f"heldout_{name}": value for name, value in means.items() if name != "sampled"}
    nested = {name: means[name] for name in means if name not in ("accuracy", "reward")}
    return {"heldout": nested, "heldout_tasks": scores, **flat}


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
