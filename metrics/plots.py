"""metrics.jsonl -> curves: one panel per metric, over the steps of all stages.

    python -m metrics.plots runs/seed0 runs/seed1 --out curves.png      # one colour for each run
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.errors import warn

METRICS = ("reward", "accuracy", "kl", "len_mean", "entropy")
LABELS = {"accuracy": "accuracy reward", "kl": "KL to reference (nats/token)",
          "len_mean": "completion length (tokens)", "entropy": "entropy (nats/token)"}
STYLES = {"each step": {"alpha": .35, "lw": 1},
          "mean of the last 10": {},
          "held out, sampled": {"ls": "", "marker": "o", "mec": "black", "zorder": 3},
          "held out, greedy": {"ls": "", "marker": "o", "mfc": "none", "zorder": 3},
          "next task": {"color": ".6", "lw": 1, "ls": ":"}}


def plot_curves(runs: Sequence[Path], metrics: Sequence[str], out: Path) -> None:
    """Plot fields of metrics.jsonl, or parts of the reward. Without matplotlib there is no plot,
    and a line on stderr."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warn(f"no {out.name}: to plot it, pip install matplotlib")
        return
    cells = len(metrics) + 1  # the last one has the legend
    columns = math.ceil(math.sqrt(cells))
    lines = math.ceil(cells / columns)
    fig = Figure(figsize=(3.4 * columns, 2.5 * lines), layout="constrained")
    *panels, legend = [fig.add_subplot(lines, columns, cell + 1) for cell in range(cells)]
    for i, run in enumerate(runs):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [row | row.get("parts", {}) for row in rows]
        for axis, name in zip(panels, metrics):
            if rows and not any(name in row for row in rows):
                raise ValueError(f"{run / 'metrics.jsonl'} has no metric {name}; it has "
                                 f"{', '.join(rows[0])}")
            if any(isinstance(row.get(name), (dict, str)) for row in rows):
                raise ValueError(f"{run / 'metrics.jsonl'}: {name} is no number in each step")
            plot_metric(axis, rows, name, f"C{i}")
        if len(runs) > 1:
            legend.plot([], label=run.name, color=f"C{i}")
    drawn = {line.get_label() for axis in panels for line in axis.lines}
    for label in [label for label in STYLES if label in drawn]:
        legend.plot([], label=label, **{"color": ".3"} | STYLES[label])
    legend.legend(loc="center", frameon=False)
    legend.axis("off")
    fig.savefig(out, dpi=110)


def plot_metric(axis: object, rows: Sequence[dict], name: str, colour: str) -> None:
    """One metric of one run; with the accuracy reward the held-out ones, as dots."""
    steps = range(1, len(rows) + 1)
    values = np.array([row.get(name) for row in rows], float)  # null, not finite, becomes NaN
    borders = [i for i in range(1, len(rows)) if rows[i].get("stage") != rows[i - 1].get("stage")]
    if name.startswith("heldout_"):  # every --eval-every steps
        kind = "greedy" if name == "heldout_greedy" else "sampled"
        scored = np.flatnonzero(np.isfinite(values))
        lines = {f"held out, {kind}": (scored + 1, values[scored])}
    else:
        means = np.concatenate([smooth(part) for part in np.split(values, borders)])
        lines = {"each step": (steps, values), "mean of the last 10": (steps, means)}
    if name == "accuracy":
        for kind in ("sampled", "greedy"):
            scored = held_out_scores(rows, kind)
            if scored:
                lines[f"held out, {kind}"] = tuple(zip(*scored))
    for label, line in lines.items():
        axis.plot(*line, label=label, **{"color": colour} | STYLES[label])
    for i in borders:
        axis.axvline(i + .5, label="next task", **STYLES["next task"])
    axis.set(xlabel="step", ylabel=LABELS.get(name, name))


def held_out_scores(rows: Sequence[dict], kind: str) -> list[tuple[float, float]]:
    """(step, score) of each time that held-out samples were scored; before a stage, the step is
    half a step before its first one (older logs lack that score)."""
    scores = [(i + at, row.get(name)) for i, row in enumerate(rows)
              for at, name in ((.5, "heldout_before"), (1, "heldout"))]
    return [(step, means[kind]) for step, means in scores if means]


def smooth(values: np.ndarray, window: int = 10) -> list[float]:
    """Mean over the last `window` values of a stage, without those that are not finite."""
    windows = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [float(w[np.isfinite(w)].mean()) if np.isfinite(w).any() else np.nan for w in windows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that hold metrics.jsonl")
    parser.add_argument("--metrics", nargs="+", default=METRICS, metavar="METRIC",
                        help="fields of metrics.jsonl, or parts of the reward")
    parser.add_argument("--out", type=Path, default=Path("curves.png"),
                        help="the picture (default: curves.png in the current folder)")
    args = parser.parse_args()
    try:
        plot_curves(args.runs, args.metrics, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"the curves are in {args.out}")
