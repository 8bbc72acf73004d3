"""Each task on the synthetic scenes, from SFT to the report, and what it did to the reward. A trial, not a test: some 2 minutes
a task.

    python tests/every_task.py                 # all tasks, a Markdown table at the end
    python tests/every_task.py vqa seg         # some of them
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards import TASKS

ROOT = Path(__file__).resolve().parent.parent


def script(name: str, *args: object) -> str:
    """Runs a script of the project, shows and returns what it printed."""
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, args)], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout[-600:], flush=True)
    return done.stdout


def main() -> None:
    rows = []
    for task in sys.argv[1:] or TASKS:
        began, out = time.perf_counter(), Path(tempfile.mkdtemp())
        script("train_sft.py", "--task", task, "--steps", 60, "--batch", 16, "--lr", 3e-4, "--max-new-tokens", 160,
               "--out", out / "sft")
        said = script("train_grpo.py", "--task", task, "--model", out / "sft/model", "--steps", 40, "--prompts", 16, "--lr", 2e-4,
                      "--max-new-tokens", 160, "--out", out / "grpo")
        script("evaluate.py", "--task", task, "--model", out / "grpo/model", "--max-new-tokens", 160, "--out", out / "eval")
        assert (out / "eval/report.html").exists() and (out / "grpo/report.html").exists()
        scores = {name: tuple(map(float, re.search(rf"^{name} +([\d.]+) +([\d.]+)$", said, re.MULTILINE).groups()))
                  for name in ("sampled", "greedy")}
        rows.append((task, *scores["sampled"], *scores["greedy"], time.perf_counter() - began))

    print("| task | sampled | greedy | seconds |\n|---|---|---|---|")
    for task, sampled, sampled_after, greedy, greedy_after, seconds in rows:
        print(f"| `{task}` | {sampled:.3f} -> {sampled_after:.3f} | {greedy:.3f} -> {greedy_after:.3f} | {seconds:.0f} |")
    print(f"sampled reward rose on {sum(row[2] > row[1] for row in rows)} of {len(rows)}")


if __name__ == "__main__":
    main()
