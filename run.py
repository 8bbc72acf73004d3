"""One training run: its folder, its checkpoint, its logs and curves, its learning rate. Shared by the two training scripts.

A log line is written after its step and a checkpoint every --save-every steps, so after a crash the logs are ahead; a
resumed run cuts them back to its checkpoint and writes the same lines again.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data import BadInput, first_line


def save_checkpoint(folder: Path, state: dict) -> None:
    """All that an exact resume needs, in one file that is replaced only once the new one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "state.partial")
    (folder / "state.partial").replace(folder / "state.pt")


def start_or_resume(args) -> tuple[dict[str, str], dict | None]:
    """Make `args.out`. Returns the settings to store in checkpoints (the flags that shape a run), and with `args.resume`
    the last checkpoint, else None, with what an earlier run left there removed."""
    if Path(args.model).resolve().is_relative_to(args.out.resolve()) and not args.resume:
        raise BadInput(f"--model {args.model} lies in --out {args.out}, which a new run clears; choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {k.replace("_", "-"): str(v) for k, v in vars(args).items() if k not in ("out", "resume", "save_every")}
    return settings, load_checkpoint(args.out / "checkpoint", settings) if args.resume else clear(args.out)


def load_checkpoint(folder: Path, settings: dict[str, str]) -> dict:
    """The state that save_checkpoint wrote. Raises BadInput if there is none, if it is damaged, or if its `settings`
    (flags of the run) are not the given ones."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"--resume: no checkpoint in {folder}")
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise BadInput(f"--resume: {folder / 'state.pt'} is damaged ({first_line(error)})") from error
    changed = [name for name in settings if settings[name] != state["settings"].get(name)]
    if changed:
        raise BadInput(f"--resume: --{', --'.join(changed)} changed since the checkpoint; that would be another run")
    return state


def clear(out: Path) -> None:
    """Remove what an earlier run left in `out`: a later --resume would take its checkpoint for this run's."""
    for name in ("checkpoint", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("curves.png", "report.html"):
        (out / name).unlink(missing_ok=True)


def keep_lines(file: Path, n: int) -> None:
    """Cut a log back to its first n lines: what a killed run wrote after its last checkpoint is written again."""
    lines = file.read_text().splitlines(keepends=True) if n and file.exists() else []
    file.with_suffix(".partial").write_text("".join(lines[:n]))
    file.with_suffix(".partial").replace(file)


def refuse_several_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("more than one process: training is not distributed yet, start it without --nproc-per-node")


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then linear decay; the step after the last would have rate 0."""
    return peak * min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))


def plot_curves(metrics: Path, names: Sequence[str]) -> None:
    """curves.png beside metrics.jsonl: one panel a name, steps of all stages in a row; `parts` gives one line a part."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no curves.png (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), constrained_layout=True, squeeze=False)
    for axis, name in zip(axes[0], names):
        series = {name: [row[name] for row in rows]}
        if rows and isinstance(rows[0][name], dict):
            parts = dict.fromkeys(part for row in rows for part in row[name])  # pair has more of them than other stages
            series = {part: [row[name].get(part, np.nan) for row in rows] for part in parts}
        for label, values in series.items():
            line = axis.plot(smooth(values), label=label)[0]
            axis.plot(values, alpha=.3, color=line.get_color())
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        if len(series) > 1:
            axis.legend(fontsize=7)
    figure.savefig(metrics.with_name("curves.png"), dpi=110)
    plt.close(figure)


def smooth(values: list[float], window: int = 10) -> list[float]:
    """Mean over the last `window` values."""
    return [float(np.mean(values[max(0, i + 1 - window) : i + 1])) for i in range(len(values))]
