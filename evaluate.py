"""Predictions -> scores: greedy answers of a model on a data set, or answers that a file already holds.

    python evaluate.py --task det --model tiny --data synthetic --out runs/eval
    python evaluate.py --task det --predictions runs/eval/predictions.jsonl --out runs/rescored

Writes predictions.jsonl (one record a sample, boxes in pixels of the frame) and scores.json, and prints the scores.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import model as qwen
from data import BadInput, Sample, json_records, load, load_images, positive, prompt
from rewards import TASKS, extract_answer, reward_parts


def predict(model, processor, samples: Sequence[Sample], max_new_tokens: int, batch: int = 32, group: int = 1,
            temperature: float = 0.0, seed: int = 0, progress: bool = False) -> list[list[str]]:
    """`group` completions for each sample; temperature 0 is greedy. The draws depend on (seed, sample) alone."""
    texts = []
    for at in tqdm(range(0, len(samples), batch), disable=not progress, desc="predict"):
        some = [samples[i] for i in range(at, min(at + batch, len(samples)))]
        prompts = qwen.collate([qwen.encode(processor, prompt(s), load_images(s)) for s in some])
        noise = None if temperature == 0 else qwen.noise((seed,), range(at, at + len(some)), group, max_new_tokens)
        texts += qwen.decode(processor, qwen.rollout(model, processor, prompts, max_new_tokens, noise, group, temperature))
    return texts


def heldout_rewards(model, processor, samples: Sequence[Sample], max_new_tokens: int,
                    temperature: float = 1.0) -> dict[str, float]:
    """Mean accuracy reward on held-out samples: `greedy`, and `sampled` (4 draws each, what GRPO optimises); and the
    share of sampled completions in the right format."""
    greedy = predict(model, processor, samples, max_new_tokens)
    sampled = predict(model, processor, samples, max_new_tokens, group=4, temperature=temperature)
    parts = [reward_parts(text, s) for texts, s in zip(sampled, samples) for text in texts]
    return {"sampled": float(np.mean([p["accuracy"] for p in parts])),
            "greedy": float(np.mean([reward_parts(texts[0], s)["accuracy"] for texts, s in zip(greedy, samples)])),
            "format": float(np.mean([p["format"] for p in parts]))}


def read_predictions(path: Path, task: str) -> tuple[list[Sample], list[str]]:
    """Samples and completions of a predictions.jsonl that this script wrote."""
    samples, completions = [], []
    for where, row in json_records(path):
        try:
            if row["task"] != task:
                raise BadInput(f"{where}: a prediction of task {row['task']}, not {task}")
            samples.append(Sample(row["id"], task, tuple(row["images"]), row["question"], row["reference"], row["frame"],
                                  tuple(map(tuple, row["boxes"])), size_group=row["size_group"]))
            completions.append(row["completion"])
        except (KeyError, TypeError) as error:
            raise BadInput(f"{where}: not a record of predictions.jsonl ({error!r})")
    if not samples:
        raise BadInput(f"{path}: no predictions")
    return samples, completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--out", type=Path, required=True, help="folder for predictions.jsonl and scores.json")
    source = parser.add_argument_group("what to score")
    source.add_argument("--predictions", type=Path, help="score this file of answers; no model is run")
    source.add_argument("--model", default="tiny", help="`tiny`, a folder in Hugging Face format, or a hub id")
    source.add_argument("--data", default="synthetic", help="`synthetic`, or a file or folder that data.py reads")
    source.add_argument("--images", help="folder that the file's image names are relative to (default: the file's own)")
    source.add_argument("--split", choices=("all", "heldout", "train"), default="all",
                        help="`heldout`: only the tenth of the images that training leaves out (synthetic: always held-out scenes)")
    decoding = parser.add_argument_group("decoding (greedy)")
    decoding.add_argument("--max-new-tokens", type=positive, default=96)
    decoding.add_argument("--batch", type=positive, default=32, help="prompts decoded together")
    decoding.add_argument("--image-size", type=positive, help="side of the frame in pixels (default: the checkpoint's, else 448)")
    args = parser.parse_args()

    if args.predictions:
        samples, completions = read_predictions(args.predictions, args.task)
    else:
        model, processor = qwen.load(args.model, args.image_size)
        split = "heldout" if args.data == "synthetic" else args.split
        samples = list(load(args.data, args.task, processor.frame, args.images, split))
        print(f"{len(samples)} samples of {args.task} from {args.data} ({split})")
        completions = [texts[0] for texts in predict(model, processor, samples, args.max_new_tokens, args.batch, progress=True)]

    parts = [reward_parts(completion, sample) for completion, sample in zip(completions, samples)]
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "predictions.partial", "w") as file:
        for sample, completion, part in zip(samples, completions, parts):
            images = [str(image) if isinstance(image, (str, Path)) else sample.id for image in sample.images]
            row = {"id": sample.id, "task": sample.task, "images": images,
                   "question": sample.question, "reference": sample.answer, "boxes": sample.boxes, "frame": sample.frame,
                   "size_group": sample.size_group, "completion": completion, "answer": extract_answer(completion),
                   "reward": part}
            print(json.dumps(row), file=file)
    (args.out / "predictions.partial").replace(args.out / "predictions.jsonl")

    scores = {"n": len(samples), "format": float(np.mean([part["format"] for part in parts]))}
    scores |= TASKS[args.task].scores([extract_answer(c) for c in completions], samples)
    (args.out / "scores.json").write_text(json.dumps({"task": args.task, **scores}, indent=1) + "\n")
    for name, value in scores.items():
        print(f"{name:28s} {value if name == 'n' else format(100 * value, '.2f')}")


if __name__ == "__main__":
    try:
        main()
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")
