"""Does a long run stay flat? Memory, open files and threads of a run of many very small steps.

    python tools/flat.py                  # 500 steps: some minutes
    python tools/flat.py --steps 2000

Linux only: it reads /proc. The last line is the growth per 100 steps, a line fitted to the
measurements of the second half: the first half has the warm-up of caches and allocators.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--task det --prompts 2 --group 2 --max-new-tokens 40 --heldout 0"


def measure(pid: int) -> tuple[float, int, int]:
    """(resident memory in MiB, open files, threads) of a process."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    files = len(list((process / "fd").iterdir()))
    return int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="steps of the run, at least 200")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        log, rows = Path(out) / "metrics.jsonl", []
        command = [sys.executable, ROOT / "train_grpo.py", *FLAGS.split(), "--out", out,
                   "--steps", str(args.steps)]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        print(f"{'step':>8s}{'RSS, MiB':>12s}{'files':>8s}{'threads':>9s}")
        while run.poll() is None and len(rows) < args.steps // 50:
            time.sleep(0.02)
            step = log.read_bytes().count(b"\n") if log.exists() else 0
            if step >= 50 * (len(rows) + 1):
                rows.append((step, *measure(run.pid)))
                print("{:8d}{:12.1f}{:8d}{:9d}".format(*rows[-1]), flush=True)
        if run.wait():
            sys.exit("the run has failed")
    steps, *columns = np.array(rows[len(rows) // 2 :]).T
    growth = [100 * np.polyfit(steps, column, 1)[0] for column in columns]
    print("per 100:{:+12.2f}{:+8.2f}{:+9.2f}".format(*growth))


if __name__ == "__main__":
    main()
