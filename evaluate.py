"""Predictions -> scores: greedy answers of a model on a data set, or answers that a file holds.

    python evaluate.py --task det --model tiny --data synthetic --out runs/eval
    torchrun --nproc-per-node 8 evaluate.py --task det --model M --data FILE --out runs/eval
    python evaluate.py --suite suite.jsonl --model M --out runs/suite
    python evaluate.py --task det --predictions runs/eval/predictions.jsonl --out runs/rescored
    python evaluate.py --task det --predictions rs_detection_results_GeoChat.jsonl \\
        --benchmark geochat-det --out runs/earthdial

Writes predictions.jsonl (a record per sample, boxes in pixels of the resized image), scores.json
and report.html. Prints the scores, beside the published ones where --benchmark names a table. After
an interruption the same command continues where it stopped; any other evaluation in --out moves to
OUT.1.

With torchrun each process answers its share of the questions, with a model of its own; the scores
are the same as with one process. A suite is a file with a line of JSON for each benchmark, such as

    {"benchmark": "aid", "task": "cls", "data": "AID_test"}
    {"benchmark": "geochat-det", "task": "det", "data": "geochat.json", "images": "images"}

Each benchmark gets a folder of --out, and suite.md has them all in one table.
"""

from flags import check_eval_args, check_oriented, parse_eval_args

if __name__ == "__main__":
    args = parse_eval_args(__doc__)  # before torch loads, so that --help is quick

import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import fingerprint, join, parse_sources, read_sources, split_sources
from metrics import benchmarks, published
from metrics.batches import batches_by_length, is_partial, local_batches, read_partial
from metrics.report import write_report
from metrics.reward_models import load_reward_models
from metrics.rows import sample_from_row, sample_to_row
from metrics.suite import read_suite, suite_table
from processing import warn_of_long_targets
from readers.earthdial_results import read_earthdial_results
from readers.files import iter_json_records
from readers.splits import TEST_FIRST, check_part, published_split
from rewards import TASKS, extract_answer, score_completion
from rollout import Sampler, load_sampler, predict
from runtime.command_line import run_main
from runtime.distributed import all_gather_object, barrier, init_distributed
from runtime.errors import UserError, errors_as_warnings
from runtime.logging import print0
from runtime.out_folder import TRAINED, clear, lock, move_aside
from runtime.ranks import rank
from runtime.signals import Stoppable
from sample import Sample
from tiny.scenes import Scenes

SCORING_TIMEOUT = timedelta(hours=3)  # the first rank scores a benchmark while the others wait


def main(args: Namespace) -> None:
    check_eval_args(args)
    runs = suite_runs(args) if args.suite else [args]
    tasks = list(dict.fromkeys(run.task for run in runs))
    check_oriented(args.oriented, tasks)
    scorers = {task: [getattr(benchmarks, name) for name in TASKS[task].scores] for task in tasks}
    init_distributed(timeout=SCORING_TIMEOUT)
    reward_models = {}
    if rank() == 0:
        locks = [lock(args.out)]  # held to the end; a run that begins there has no results yet
        check_out(runs)
        reward_models = load_reward_models(tasks, args.sbert, args.sam, args.reward)
    sampler = None if args.predictions else load_sampler(args.model, args.image_size)
    if rank() == 0 and args.suite:
        clear_suite(args)
        locks += [lock(run.out) for run in runs]

    all_scores = {}
    for i, run in enumerate(runs, 1):
        if args.suite:
            print0(f"\n{run.out.name}, benchmark {i} of {len(runs)}")
        if args.predictions:
            samples, completions = [], []
            if rank() == 0:  # it alone scores
                samples, completions = read_predictions(args.predictions, args.task)
                if not args.overwrite:  # else score replaces the files, which may be what was read
                    clear(args.out, keep_run=True)
        else:
            samples, completions = run_model(run, sampler)
        if rank() == 0:
            all_scores[run.out.name] = score(run, samples, completions, scorers[run.task],
                                             reward_models)
    if args.suite and rank() == 0:
        table = suite_table(all_scores)
        (args.out / "suite.md").write_text(table)
        print(f"\n{table}")
    if rank() == 0:  # last, so that an earlier error loses no completion
        for run in runs:
            (run.out / "predictions.partial").unlink(missing_ok=True)
    barrier()  # until the first rank has scored


def check_out(runs: Sequence[Namespace]) -> None:
    """Raises UserError if a folder to write to holds a training run: its report.html would go."""
    for out in (run.out for run in runs):
        if any((out / name).exists() for name in TRAINED):
            raise UserError(f"--out {out} holds a training run; choose another --out")


def clear_suite(args: Namespace) -> None:
    """Leave no older table beside new scores: a suite that is complete moves aside as a whole."""
    table = args.out / "suite.md"
    if table.exists() and not args.overwrite:
        folders = [file.parent for file in sorted(args.out.glob("*/scores.json"))]
        for folder in folders:
            lock(folder).close()  # raises UserError if another run is writing there
        move_aside(args.out, [table, *folders])
    table.unlink(missing_ok=True)


def suite_runs(args: Namespace) -> list[Namespace]:
    """The flags of an evaluation for each benchmark of --suite."""
    runs = []
    for name, task, data, images in read_suite(args.suite):
        benchmark = name if name in published.BENCHMARKS else None
        of_pair = {} if task == "pair" else {"choices": None, "negatives": None}
        runs.append(Namespace(**vars(args) | of_pair | {
            "task": task, "benchmark": benchmark, "data": [data], "images": images,
            "out": args.out / name}))
    return runs


def score(args: Namespace, samples: list[Sample], completions: list[str],
          scorers: Sequence[Callable], reward_models: Mapping) -> benchmarks.Scores:
    """Write predictions.jsonl, scores.json and report.html, and print the scores."""
    answers = [extract_answer(completion) for completion in completions]
    parts = [score_completion(completion, sample, **reward_models)
             for completion, sample in zip(completions, samples)]
    write_predictions(args.out, samples, completions, answers, parts)

    scores = {"n": len(samples)}
    for name in parts[0]:
        key = "format" if name == "format" else f"{name}_reward"
        scores[key] = float(np.mean([values[name] for values in parts]))
    scores["words"] = float(np.mean([len(completion.split()) for completion in completions]))
    for scorer in scorers:
        scores |= scorer(answers, samples, **reward_models)
    scores |= benchmarks.think_agreement(completions, samples)
    other_reward = reward_models["task_rewards"].get(args.task)
    head = {"task": args.task}
    if other_reward:
        head["reward"] = f"{args.task}={other_reward.__name__}"
    text = json.dumps(head | scores, indent=1)
    (args.out / "scores.json").write_text(text + "\n")

    is_upright = not any(theta for sample in samples for *_, theta in sample.gt_boxes)
    for name, value in scores.items():
        if name.startswith("hbb_") and is_upright:
            continue  # the boxes are their own envelopes
        unit = "" if name in benchmarks.NO_SHARES else " %"
        number = value if name == "n" else f"{benchmarks.in_percent(name, value):.2f}{unit}"
        print(f"{name:32s} {number}")
    if args.benchmark:
        print(published.table(args.benchmark, scores, samples))
    model = args.predictions.name if args.predictions else args.model
    entries = [(sample, [{"text": completion, "parts": values}])
               for sample, completion, values in zip(samples, completions, parts)]
    with errors_as_warnings("report.html"):
        write_report(args.out / "report.html", entries, f"{args.task}: {model}")
    print(f"predictions.jsonl, scores.json and report.html are in {args.out}")
    return scores


def run_model(args: Namespace, sampler: Sampler) -> tuple[list[Sample], list[str]]:
    """Samples, and the greedy completions of a model on them, which the ranks share.

    The first rank keeps what is done in predictions.partial: a line with the settings, then a line
    per batch. After an interruption the same command continues from it, on any number of ranks.
    """
    samples = load_evaluation(args, sampler.processor.image_size)
    warn_of_long_targets(sampler.processor, {args.task: samples}, args.max_new_tokens)
    file, settings = args.out / "predictions.partial", prediction_settings(args, samples)
    kept = None
    if rank() == 0:
        if not is_partial(file, settings):
            clear(args.out, keep_run=not args.overwrite)
        kept = read_partial(file, settings)
    done = all_gather_object(kept)[0]
    batches = [[i for i in batch if i not in done]
               for batch in batches_by_length(samples, args.batch)]
    batches = [batch for batch in batches if batch]
    with (Stoppable("stopping after this batch") as work,
          open(file if rank() == 0 else os.devnull, "a") as log,
          tqdm(total=len(samples), initial=len(done), desc="predict", unit="samples",
               disable=rank() > 0) as bar):
        for indices, prompts in local_batches(sampler.processor, samples, batches):
            texts = predict(sampler, prompts, args.max_new_tokens) if prompts else []
            local = [(i, text) for i, (text,) in zip(indices, texts)]
            for batch in filter(None, all_gather_object(local)):
                print(json.dumps(batch), file=log, flush=True)
                done |= dict(batch)
                bar.update(len(batch))
            if work.should_stop():
                break
    signal_number = work.should_stop()
    if signal_number:
        print0(f"{len(done)} of {len(samples)} predictions are in {file}")
        raise KeyboardInterrupt(signal_number)
    return samples, [done[i] for i in range(len(samples))]


def load_evaluation(args: Namespace, image_size: int) -> list[Sample]:
    """The samples to score; a line says which they are."""
    values = args.eval_data or args.data
    sources = parse_sources(values, args.images, args.choices, args.negatives)
    found = read_sources(sources, [args.task], image_size, oriented=args.oriented,
                         thinking=not args.no_think, system=args.system)[args.task]
    has_split = any(isinstance(samples, Scenes) or published_split(samples) for _, samples in found)
    split = args.split or ("heldout" if has_split or args.eval_data else "all")
    if split == "all":
        samples = join([samples for _, samples in found])
    else:
        train, held_out, _ = split_sources(found, "heldout" if args.eval_data else None, TEST_FIRST)
        parts = train if split == "train" else held_out
        for (source, of_source), part in zip(found, parts):
            check_part(source.path, of_source, part, split)
        samples = join(parts)
    samples = list(samples[: args.limit])
    hint = "; for a file that a model was trained on add --split heldout" if split == "all" else ""
    print0(f"{len(samples)} samples of {args.task} from {' '.join(values)} ({split}){hint}")
    return samples


def prediction_settings(args: Namespace, samples: Sequence[Sample]) -> str:
    """All that the completions depend on, as a line of JSON."""
    other = ("out", "overwrite", "batch", "suite", "benchmark", "sbert", "sam", "reward",
             "predictions")
    flags = {name: str(value) for name, value in vars(args).items() if name not in other}
    files = sorted(Path(args.model).glob("*.safetensors"))  # none for a hub id: taken as unchanged
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps(flags | {"weights": weights, "samples": fingerprint(samples)})


def read_predictions(path: Path, task: str) -> tuple[list[Sample], list[str]]:
    """Samples and completions of a predictions.jsonl that this script wrote, or of a result file
    of EarthDial, whose answers have no tags and whose boxes lie on a grid of 100."""
    records = list(iter_json_records(path))
    if not records:
        raise UserError(f"{path}: no predictions")
    if not (isinstance(records[0][1], dict) and "completion" in records[0][1]):
        samples, answers = read_earthdial_results(path, task)
        return samples, [f"<answer>{answer}</answer>" for answer in answers]
    samples, completions = [], []
    for source, row in records:
        try:
            if row["task"] != task:
                raise UserError(f"{source}: a prediction of task {row['task']}, not {task}")
            samples.append(sample_from_row(row, path.parent))
            completions.append(str(row["completion"]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{source}: not a record of predictions.jsonl ({error!r})")
    return samples, completions


def write_predictions(out: Path, samples: list[Sample], completions: list[str],
                      answers: list[str | None], parts: list[dict[str, float]]) -> None:
    """predictions.jsonl, complete or not at all."""
    for name in ("scores.json", "report.html"):
        (out / name).unlink(missing_ok=True)  # no older scores beside new predictions
    with open(out / "predictions.done", "w") as file:
        for sample, completion, answer, values in zip(samples, completions, answers, parts):
            row = sample_to_row(sample, out)
            row |= {"completion": completion, "answer": answer, "parts": values}
            print(json.dumps(row), file=file)
    (out / "predictions.done").replace(out / "predictions.jsonl")


if __name__ == "__main__":
    run_main(lambda: main(args), "the same command continues where it stopped")
