"""What each part of the method does: variants of one GRPO run, one change each, on tiny.

    python tools/ablate.py --list
    python tools/ablate.py --jobs 16               # all variants, 2 seeds each: two hours of CPU
    python tools/ablate.py beta group-4 --seeds 0  # a question and a variant

Writes OUT/VARIANT/SEED/ (the runs), OUT/table.md and OUT/curves.png. The same command continues
after an interruption. The table scores every model on the same held-out scenes, temperature 1,
the task's own reward. The curves show each run's own reward and temperature.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from matplotlib.figure import Figure

from metrics.plots import held_out_scores
from tools.trial import Trial, add_trial_flags, gain, minutes, run_trials

SFT = "--batch 16 --lr 3e-4 --heldout 0"
GRPO = "--heldout 64"


class Variant(NamedTuple):
    name: str
    questions: str   # variants of one question are compared
    flags: str = ""  # of train_grpo.py
    sft: str = ""    # of train_sft.py before it; "": no SFT


VARIANTS = [Variant(*fields) for fields in (
    ("default", "beta std group temperature inner resample think start reward"),
    ("inner-2", "inner loss", "--inner-steps 2"),
    ("inner-4", "inner clip", "--inner-steps 4"),
    ("dr_grpo", "loss", "--inner-steps 2 --loss dr_grpo"),
    ("dapo", "loss", "--inner-steps 2 --loss dapo"),
    ("gspo", "loss", "--inner-steps 2 --loss gspo --clip-low 3e-4 --clip-high 4e-4"),
    ("geovlm", "loss", "--inner-steps 2 --loss geovlm"),
    ("clip-higher", "clip", "--inner-steps 4 --clip-high 0.28"),
    ("beta-0", "beta", "--beta 0"),
    ("beta-0.04", "beta", "--beta 0.04"),
    ("divide-by-std", "std", "--divide-by-std"),
    ("group-2", "group", "--group 2"),  # all groups: equally many completions
    ("group-4", "group", "--group 4"),
    ("group-16", "group", "--group 16"),
    ("temperature-0.7", "temperature", "--temperature 0.7"),
    ("temperature-1.3", "temperature", "--temperature 1.3"),
    ("resample-2", "resample", "--resample 2"),
    ("no-think", "think", "--no-think"),
    ("start-exact", "start", "", "--steps 100"),
    ("start-hasty", "start", "", "--steps 100 --box-noise 8"),
    ("start-few", "start", "", "--steps 100 --shots 2"),  # of each of five kinds of objects
    ("start-none", "start", "", "--model scratch --steps 1"),
    ("naive-overlap", "reward", "--reward det=any_overlap_reward"),
    ("naive-recall", "reward", "--reward det=box_recall_reward"),
    ("staged", "schedule", "--task det,rcap"),  # half of the steps each
    ("mixed", "schedule", "--task det+rcap"),
)]


def to_trial(variant: Variant, steps: int, completions: int) -> Trial:
    """A run of `steps` steps in all its stages, of equally many completions each."""
    name, _, flags, sft = variant
    task = re.search(r"(?<=--task )\S+|$", flags)[0] or "det"
    group = int(re.search(r"(?<=--group )\d+|$", flags)[0] or 8)
    steps //= len(task.split(","))
    return Trial(name, task, sft and f"{SFT} {sft}",
                 f"{GRPO} --steps {steps} --eval-every {ceil(steps / 4)} "
                 f"--prompts {completions // group} {flags}")


def by_question(variants: Sequence[Variant]) -> dict[str, list[Variant]]:
    questions = defaultdict(list)
    for variant in variants:
        for question in variant.questions.split():
            questions[question].append(variant)
    return questions


def write_table(variants: Sequence[Variant], done: dict[str, list[dict]], out: Path) -> None:
    lines = ["| question | variant | flags | seeds | sampled | greedy | minutes |",
             "|---|---|---|---|---|---|---|"]
    for question, compared in by_question(variants).items():
        for name, _, flags, sft in (v for v in compared if v.name in done):
            flags = f"`{flags}`" if flags else f"SFT `{sft}`" if sft else ""
            runs, folders = done[name], list((out / name).iterdir())
            lines.append(f"| {question} | {name} | {flags} | {len(runs)} | {gain(runs, 'sampled')} "
                         f"| {gain(runs, 'greedy')} | {minutes(folders):.1f} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def plot(variants: Sequence[Variant], done: dict[str, list[dict]], out: Path) -> None:
    """Held-out sampled reward over steps, a panel for each question; the band is the standard
    error over seeds."""
    questions = by_question(variants)
    columns = min(4, len(questions))
    rows = ceil(len(questions) / columns)
    fig = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    for i, (question, compared) in enumerate(questions.items()):
        axis = fig.add_subplot(rows, columns, i + 1, title=question, xlabel="step")
        for name in [variant.name for variant in compared if variant.name in done]:
            done_runs = (scores.parent / "grpo" for scores in (out / name).glob("*/scores.json"))
            curves = np.array([read_curve(run) for run in done_runs])
            steps, mean = curves.mean(0)                                    # of (seeds, 2, scores)
            error = curves[:, 1].std(0) / max(1, len(curves) - 1) ** 0.5
            axis.plot(steps, mean, label=name)
            axis.fill_between(steps, mean - error, mean + error, alpha=.2)
            axis.legend(fontsize=7, frameon=False)
    fig.savefig(out / "curves.png", dpi=110)


def read_curve(run: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Steps, and the held-out sampled reward after each and before each stage."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tuple(zip(*held_out_scores(rows, "sampled")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="questions and variants (default: all)")
    parser.add_argument("--list", action="store_true", help="print the variants and end")
    parser.add_argument("--steps", type=int, default=60, help="rollouts of each run")
    parser.add_argument("--completions", type=int, default=64, help="of each step")
    add_trial_flags(parser, "runs/ablate", seeds=(0, 1))
    args = parser.parse_args()
    unknown = set(args.names).difference(*({v.name, *v.questions.split()} for v in VARIANTS))
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no variant or question; --list prints them")
    variants = [v for v in VARIANTS
                if not args.names or {v.name, *v.questions.split()} & set(args.names)]
    if args.list:
        print("\n".join(f"{v.name:16s} {v.questions:16s} {v.sft} {v.flags}" for v in variants))
        return
    done = run_trials([to_trial(v, args.steps, args.completions) for v in variants], args)
    write_table(variants, done, args.out)
    plot(variants, done, args.out)


if __name__ == "__main__":
    main()
