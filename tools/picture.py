"""One group of samples.jsonl as a picture: its question, its best and its worst completion.

    python tools/picture.py runs/grpo/samples.jsonl --step 4 --out docs/group.png

Or, of a run with a naive --reward, what it was paid beside what its answers are worth by the task's
own reward, and the boxes of its best-paid completion of a step:

    python tools/picture.py runs/naive/samples.jsonl --step 150 --hacking --out docs/hacking.png
"""

import argparse
import sys
import textwrap
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import numpy as np

from boxes import parse_boxes
from metrics.plots import smooth
from metrics.report import PREDICTED_COLOUR, TARGET_COLOUR, read_entries
from rewards import extract_answer, score_completion
from runtime.command_line import run_main
from sample import BOX_TASKS, gt_hbbs, load_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="samples.jsonl of a run")
    parser.add_argument("--step", type=int, required=True, help="the step whose group is drawn")
    parser.add_argument("--hacking", action="store_true",
                        help="curves of the reward paid and of the task's own, and one answer")
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    args = parser.parse_args()
    entries = read_entries(args.samples)
    groups = [entry for entry in entries if entry[1][0].get("step") == args.step]
    if not groups:
        sys.exit(f"error: {args.samples} has no step {args.step}")
    sample, completions = groups[0]
    completions = sorted(completions, key=lambda completion: completion["reward"])

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    if args.hacking:
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), dpi=120, layout="constrained")
        plot_hacking(axes, entries)
        draw_boxes(axes[2], sample, completions[-1]["text"])
        axes[2].set_title(textwrap.fill(f"step {args.step}: {sample.question}", 44), fontsize=9)
    else:
        figure, axes = plt.subplots(2, 2, figsize=(8.6, 3.3), height_ratios=(2, 1), dpi=120)
        mean = fmean(completion["reward"] for completion in completions)
        figure.suptitle(f"{sample.question}  Best and worst of {len(completions)} completions, whose "
                        f"mean reward is {mean:.2f}", fontsize=10, x=0.02, ha="left")
        for picture, text, completion in zip(*axes, (completions[-1], completions[0])):
            draw_boxes(picture, sample, completion["text"])
            write_completion(text, completion)
        figure.legend(handles=[plt.Line2D([], [], color=TARGET_COLOUR, label="target"),
                               plt.Line2D([], [], color=PREDICTED_COLOUR, ls="--", label="predicted")],
                      loc="center", bbox_to_anchor=(0.41, 0.8), frameon=False, fontsize=9)
        figure.tight_layout(rect=(0, 0, 1, 1), pad=0.5)
    figure.savefig(args.out)
    print(f"the picture is in {args.out}")


def plot_hacking(axes, entries):
    """Means over a step's group: the reward paid and the task's own, and the number of boxes."""
    paid = [fmean(c["parts"]["accuracy"] for c in group) for _, group in entries]
    own = [fmean(score_completion(c["text"], sample)["accuracy"] for c in group)
           for sample, group in entries]
    boxes = [fmean(len(boxes_of(c["text"])) for c in group) for _, group in entries]
    for values, label in ((paid, "reward paid"), (own, "the task's own")):
        axes[0].plot(smooth(np.array(values), 20), label=label)
    axes[1].plot(smooth(np.array(boxes), 20), color="C3")
    axes[0].set(xlabel="step", title="accuracy reward (mean of 20 steps)")
    axes[1].set(xlabel="step", title="predicted boxes")
    axes[0].legend(frameon=False)


def boxes_of(text):
    predicted = parse_boxes(extract_answer(text) or "none")
    return [] if predicted is None else predicted


def draw_boxes(axis, sample, text):
    axis.imshow(load_images(sample)[0])
    axis.axis("off")
    if sample.task not in BOX_TASKS:
        return
    for boxes, colour, style in ((gt_hbbs(sample), TARGET_COLOUR, "-"),
                                 (boxes_of(text), PREDICTED_COLOUR, "--")):
        for x1, y1, x2, y2 in boxes:
            axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, ls=style, lw=2)


def write_completion(axis, completion):
    axis.axis("off")
    lines = [line for paragraph in completion["text"].splitlines()
             for line in textwrap.wrap(paragraph, 54)]
    parts = " + ".join(f"{name} {value:.2f}" for name, value in completion["parts"].items())
    axis.text(0, 1, "\n".join(lines), family="monospace", fontsize=8, va="top",
              transform=axis.transAxes)
    axis.text(0, 0, f"reward {completion['reward']:.2f} = {parts}\n"
              f"advantage {completion['advantage']:+.2f}", fontsize=9, weight="bold",
              transform=axis.transAxes)


if __name__ == "__main__":
    run_main(main, "nothing was written")
