"""Predictions -> scores: greedy answers of a model on a data set, or answers that a file already holds.

    python evaluate.py --task det --model tiny --data synthetic --out runs/eval
    python evaluate.py --task det --predictions runs/eval/predictions.jsonl --out runs/rescored
    python evaluate.py --task det --predictions rs_detection_results_GeoChat.jsonl --benchmark geochat-det --out runs/earthdial

Writes predictions.jsonl (one record a sample, boxes in pixels of the frame), scores.json and report.html, and prints the
scores, beside the published ones where --benchmark names a table. An interrupted evaluation goes on where it stopped.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

import model as qwen
import parallel
import rollout
import run
from data import BadInput, Sample, as_row, fingerprint, from_row, heldout_split, json_records, known_task, load, load_images, prompt
from rewards import TASKS, extract_answer, reward_parts
from run import HelpFormatter, positive
from scoring import published
from scoring import scores as metrics
from scoring.judges import load_judges
from scoring.report import write_report


def encode(processor: qwen.Processor, sample: Sample) -> qwen.Prompts:
    """The sample as the model reads it: its prompt and its images."""
    return qwen.encode(processor, prompt(sample), load_images(sample))


def predict(model: qwen.Qwen, processor: qwen.Processor, samples: Sequence[Sample], max_new_tokens: int, group: int = 1,
            temperature: float = 0.0, first: int = 0) -> list[list[str]]:
    """`group` completions for each sample; temperature 0 is greedy. The draws of sample i depend on first + i alone."""
    prompts = qwen.collate([encode(processor, sample) for sample in samples])
    rows = range(first, first + len(samples))
    noise = None if temperature == 0 else rollout.noise((0,), rows, group, max_new_tokens)
    return rollout.texts(processor, rollout.generate(model, processor, prompts, max_new_tokens, noise, group, temperature))


def heldout_rewards(model: qwen.Qwen, processor: qwen.Processor, samples: Sequence[Sample], max_new_tokens: int,
                    temperature: float = 1.0, batch: int = 32) -> dict[str, float]:
    """Mean accuracy reward on held-out samples: `greedy`, and `sampled` (4 draws each, what GRPO optimises); and the
    share of sampled completions in the right format."""
    parts: dict[str, list] = {"greedy": [], "sampled": []}
    for at in range(parallel.rank() * batch, len(samples), parallel.ranks() * batch):
        some = [samples[i] for i in range(at, min(at + batch, len(samples)))]
        for name, texts in (("greedy", predict(model, processor, some, max_new_tokens)),
                            ("sampled", predict(model, processor, some, max_new_tokens, 4, temperature, at))):
            parts[name] += [reward_parts(text, sample) for group, sample in zip(texts, some) for text in group]
    parts = {name: list(chain(*parallel.gathered(found))) for name, found in parts.items()}  # each rank has scored its batches
    mean = {(name, part): float(np.mean(sorted(p[part] for p in found)))  # sorted, to round alike on any number of ranks
            for name, found in parts.items() for part in ("accuracy", "format")}
    return {"sampled": mean["sampled", "accuracy"], "greedy": mean["greedy", "accuracy"], "format": mean["sampled", "format"]}


def run_model(args: argparse.Namespace) -> tuple[list[Sample], list[str]]:
    """Samples and greedy completions of args.model on args.data. What is done is kept in predictions.partial, below a
    line with the settings, so that the same command goes on after an interruption."""
    model, processor = qwen.load(args.model, args.image_size)
    qwen.to_compute_dtype(model, vectors=True).to(qwen.device())
    source = args.data, args.task, processor.frame, args.images
    split = args.split or ("heldout" if args.data == "synthetic" or heldout_split(load(*source)) else "all")
    samples = list(load(*source, split)[: args.limit])
    print(f"{len(samples)} samples of {args.task} from {args.data} ({split})"
          + "; of a file that a model was trained on take --split heldout" * (split == "all"))
    file = args.out / "predictions.partial"
    weights = sorted(Path(args.model).glob("*.safetensors"))  # none for a hub id, whose weights do not change
    settings = json.dumps({name: str(value) for name, value in vars(args).items() if name not in ("out", "batch")}
                          | {"weights": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights],
                             "samples": fingerprint(samples)})
    lines = file.read_text().split("\n")[:-1] if file.exists() else []  # a torn last line has no end
    completions = [json.loads(line)["completion"] for line in lines[1:]] if lines[:1] == [settings] else []
    file.write_text("".join(line + "\n" for line in [settings, *(json.dumps({"completion": text}) for text in completions)]))
    with open(file, "a") as log, tqdm(total=len(samples), initial=len(completions), desc="predict") as bar:
        for at in range(len(completions), len(samples), args.batch):
            texts = predict(model, processor, samples[at : at + args.batch], args.max_new_tokens)
            for (text,) in texts:
                print(json.dumps({"completion": text}), file=log)
            log.flush()
            completions += [text for (text,) in texts]
            bar.update(len(texts))
    return samples, completions


def read_predictions(path: Path, task: str) -> tuple[list[Sample], list[str]]:
    """Samples and completions of a predictions.jsonl that this script wrote, or of a result file of EarthDial's, whose
    answers stand without tags and in a frame of 100."""
    records = list(json_records(path))
    if not records:
        raise BadInput(f"{path}: no predictions")
    if not (isinstance(records[0][1], dict) and "completion" in records[0][1]):
        samples, answers = published.read_earthdial_results(path, task)
        return samples, [f"<answer>{answer}</answer>" for answer in answers]
    samples, completions = [], []
    for where, row in records:
        try:
            if row["task"] != task:
                raise BadInput(f"{where}: a prediction of task {row['task']}, not {task}")
            samples.append(from_row(row))
            completions.append(str(row["completion"]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{where}: not a record of predictions.jsonl ({error!r})")
        if task == "seg" and samples[-1].mask is None:
            raise BadInput(f"{where}: its mask lies in a table; score it with --data instead")
    return samples, completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--task", required=True, help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for predictions.jsonl, scores.json, report.html")
    parser.add_argument("--benchmark", choices=published.BENCHMARKS, help="print the published rows of this table as well")
    source = parser.add_argument_group("what to score")
    source.add_argument("--predictions", type=Path, help="score this file of answers; no model is run")
    source.add_argument("--model", default="tiny", help="`tiny`, a folder in Hugging Face format, or a hub id")
    source.add_argument("--data", default="synthetic", help="`synthetic`, or a file or folder that formats/ knows")
    source.add_argument("--images", help="folder that the file's image names are relative to (default: the file's own)")
    source.add_argument("--split", choices=("all", "heldout", "train"),
                        help="`heldout`: what training leaves out, the source's test or val split or a tenth of the images; that "
                        "is the default where the source has such a split, and for synthetic; elsewhere `all` is")
    source.add_argument("--limit", type=positive, help="only the first so many samples")
    source.add_argument("--image-size", type=positive, help="side of the frame in pixels (default: the checkpoint's, else 448)")
    source.add_argument("--sbert", help="sentence embedding model for the mean reward of rcap and change: folder or hub id")
    source.add_argument("--sam", help="SAM 2.1 for the masks of seg: folder or hub id")
    decoding = parser.add_argument_group("decoding (greedy)")
    decoding.add_argument("--max-new-tokens", type=positive, default=96, help="longest completion (tiny: 160 for ground, ovd, seg)")
    decoding.add_argument("--batch", type=positive, default=32, help="prompts decoded together")
    args = parser.parse_args()
    known_task(args.task)
    benchmark_task = published.BENCHMARKS[args.benchmark][0] if args.benchmark else args.task
    if benchmark_task != args.task:
        raise BadInput(f"--benchmark {args.benchmark} is a table of task {benchmark_task}, not {args.task}")

    if parallel.ranks() > 1:
        raise BadInput("evaluate.py is one process: start it with python, not torchrun")

    scorers = [getattr(metrics, name) for name in TASKS[args.task].scores]
    args.out.mkdir(parents=True, exist_ok=True)
    load_judges([args.task], args.sbert, args.sam)
    samples, completions = read_predictions(args.predictions, args.task) if args.predictions else run_model(args)

    answers = [extract_answer(completion) for completion in completions]
    parts = [{name: part[name] for name in ("format", "accuracy")} for part in map(reward_parts, completions, samples)]
    for name in ("scores.json", "report.html"):
        (args.out / name).unlink(missing_ok=True)  # no older scores beside new predictions
    with open(args.out / "predictions.done", "w") as file:
        for sample, completion, answer, part in zip(samples, completions, answers, parts):
            print(json.dumps(as_row(sample) | {"completion": completion, "answer": answer, "parts": part}), file=file)
    (args.out / "predictions.done").replace(args.out / "predictions.jsonl")
    if not args.predictions:
        (args.out / "predictions.partial").unlink()

    scores = {"n": len(samples), "format": float(np.mean([part["format"] for part in parts])),
              "accuracy_reward": float(np.mean([part["accuracy"] for part in parts])),
              "words": float(np.mean([len(completion.split()) for completion in completions]))}
    for scorer in scorers:
        scores |= scorer(answers, samples)
    (args.out / "scores.json").write_text(json.dumps({"task": args.task, **scores}, indent=1) + "\n")
    for name, value in scores.items():
        print(f"{name:32s} {value if name == 'n' else format(value if name == 'words' else 100 * value, '.2f')}")
    if args.benchmark:
        print(published.table(args.benchmark, scores))
    entries = [(s, [{"text": text, "parts": part}]) for s, text, part in zip(samples, completions, parts)]
    write_report(args.out / "report.html", entries,
                 f"{args.task}: {args.model if not args.predictions else args.predictions.name}")


if __name__ == "__main__":
    run.script(main, "the same command goes on where it stopped")
