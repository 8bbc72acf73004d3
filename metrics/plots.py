"""metrics.jsonl -> curves: one panel per metric, over the steps of all stages.

    python -m metrics.plots runs/seed0 runs/seed1 --out curves.png        # one line for each run
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

METRICS = ("reward", "accuracy", "kl", "len_mean", "entropy")


def plot_curves(runs: Sequence[Path], metrics: Sequence[str], out: Path) -> None:
    """Plot fields of metrics.jsonl, or parts of the reward: thin as measured, thick the mean over
    the last ten steps. Without matplotlib there is no plot, and a line on stderr."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed: no {out.name} (pip install matplotlib)",
              file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, axes = plt.subplots(1, len(metrics), figsize=(3.2 * len(metrics), 2.6),
                             constrained_layout=True, squeeze=False)
    for run in runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [row | row.get("parts", {}) for row in rows]
        for axis, name in zip(axes[0], metrics):
            if rows and not any(name in row for row in rows):
                raise ValueError(f"{run / 'metrics.jsonl'} has no metric {name}; it has "
                                 f"{', '.join(rows[0])}")
            values = [row.get(name) for row in rows]
            values = [np.nan if value is None else value for value in values]  # null: not finite
            line = axis.plot(smooth(values), label=run.name)[0]
            axis.plot(values, alpha=.3, color=line.get_color())
            axis.set_title(name, fontsize=9)
            axis.tick_params(labelsize=7)
    if len(runs) > 1:
        axes[0][0].legend(fontsize=7)
    fig.savefig(out, dpi=110)
    plt.close(fig)


def smooth(values: list[float], window: int = 10) -> list[float]:
    """Mean over the last `window` values, without those that are not finite."""
    windows = [np.array(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    return [float(w[np.isfinite(w)].mean()) if np.isfinite(w).any() else np.nan for w in windows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that hold metrics.jsonl")
    parser.add_argument("--figures", nargs="+", default=METRICS, dest="metrics", metavar="METRIC",
                        help="fields of metrics.jsonl, or parts of the reward")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    try:
        plot_curves(args.runs, args.metrics, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
