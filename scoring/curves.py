"""metrics.jsonl -> curves: one panel a figure, over the steps of all stages.

    python -m scoring.curves runs/seed0 runs/seed1 --out curves.png        # a line for each run
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FIGURES = ("reward", "accuracy", "kl", "len_mean", "entropy")


def plot_curves(runs: Sequence[Path], figures: Sequence[str], out: Path) -> None:
    """Draw fields of metrics.jsonl, or parts of the reward, of one or several runs: thin as measured, thick the mean over
    the last ten steps. Without matplotlib there is no picture, and a line on stderr."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed: no {out.name} (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    canvas, axes = plt.subplots(1, len(figures), figsize=(3.2 * len(figures), 2.6), constrained_layout=True, squeeze=False)
    for run in runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [row | row.get("parts", {}) for row in rows]
        for axis, name in zip(axes[0], figures):
            if rows and not any(name in row for row in rows):
                raise ValueError(f"{run / 'metrics.jsonl'} has no figure {name}; it has {', '.join(rows[0])}")
            values = [np.nan if row.get(name) is None else row[name] for row in rows]  # null: no finite number
            line = axis.plot(smooth(values), label=run.name)[0]
            axis.plot(values, alpha=.3, color=line.get_color())
            axis.set_title(name, fontsize=9)
            axis.tick_params(labelsize=7)
    if len(runs) > 1:
        axes[0][0].legend(fontsize=7)
    canvas.savefig(out, dpi=110)
    plt.close(canvas)


def smooth(values: list[float], window: int = 10) -> list[float]:
    """Mean over the last `window` values, those that are no number left out."""
    windows = [np.array(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    return [float(w[np.isfinite(w)].mean()) if np.isfinite(w).any() else np.nan for w in windows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that hold metrics.jsonl")
    parser.add_argument("--figures", nargs="+", default=FIGURES, help="fields of metrics.jsonl, or parts of the reward")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    try:
        plot_curves(args.runs, args.figures, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
