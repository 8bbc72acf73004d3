"""Each task on the synthetic scenes, from SFT to the report, and what GRPO did to its reward. A
trial, not a test: some 2 minutes per task.

    python tools/every_task.py                 # all tasks, a Markdown table at the end
    python tools/every_task.py vqa seg         # some of them
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards import TASKS

ROOT = Path(__file__).resolve().parent.parent


def run_script(name: str, *args: object) -> str:
    """Run a script of the project; show the end of what it printed, and return all of it."""
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout[-600:], flush=True)
    return done.stdout


def before_and_after(printed: str, name: str) -> tuple[float, float]:
    """A held-out reward before and after GRPO, from what train_grpo.py printed."""
    before, after = re.search(rf"^{name} +([\d.]+) +([\d.]+)$", printed, re.MULTILINE).groups()
    return float(before), float(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help="default: all")
    args = parser.parse_args()
    rows = []
    for task in args.tasks:
        t0, out = time.perf_counter(), Path(tempfile.mkdtemp())
        common = "--task", task, "--max-new-tokens", 160
        run_script("train_sft.py", *common, "--steps", 60, "--batch", 16, "--lr", 3e-4,
                   "--out", out / "sft")
        printed = run_script("train_grpo.py", *common, "--model", out / "sft/model", "--steps", 40,
                             "--prompts", 16, "--lr", 2e-4, "--out", out / "grpo")
        run_script("evaluate.py", *common, "--model", out / "grpo/model", "--out", out / "eval")
        assert (out / "eval/report.html").exists() and (out / "grpo/report.html").exists()
        rewards = [*before_and_after(printed, "sampled"), *before_and_after(printed, "greedy")]
        rows.append((task, *rewards, time.perf_counter() - t0))

    print("| task | sampled | greedy | seconds |\n|---|---|---|---|")
    for task, sampled, sampled_after, greedy, greedy_after, seconds in rows:
        print(f"| `{task}` | {sampled:.3f} -> {sampled_after:.3f} | "
              f"{greedy:.3f} -> {greedy_after:.3f} | {seconds:.0f} |")
    n_better = sum(row[2] > row[1] for row in rows)
    print(f"sampled reward rose on {n_better} of {len(rows)}")


if __name__ == "__main__":
    main()
