"""A run that is killed again and again ends as the unbroken one. A trial, not a test: some minutes.

    python tests/kill.py --times 20 --ranks 1
    python tests/kill.py --times 20 --ranks 2

SIGKILL reaches all processes of the run at random moments, some of them while a checkpoint is written (there is one after
each step); then the run goes on with --resume. At the end metrics.jsonl (without times), samples.jsonl and the weights are
compared bit for bit with those of a run that was left alone.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--task cls,det --steps 50 --prompts 4 --group 4 --max-new-tokens 48 --lr 1e-3 --warmup 0 --save-every 1 --eval-every 1000"


def start(out: Path, ranks: int, *more: str) -> subprocess.Popen:
    launcher = [sys.executable] + ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] * (ranks > 1)
    return subprocess.Popen([*launcher, ROOT / "train_grpo.py", *FLAGS.split(), "--out", out, *more], start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # several threads round differently from run to run


def without_times(file: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in file.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills")
    parser.add_argument("--ranks", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    moments, folder, writing = random.Random(args.seed), Path(tempfile.mkdtemp()), 0
    whole, broken = folder / "whole", folder / "broken"
    first = start(whole, args.ranks)
    assert first.wait() == 0, first.stderr.read()
    for kill in range(args.times):
        log, run = broken / "metrics.jsonl", start(broken, args.ranks, "--resume")
        before = log.stat().st_mtime_ns if log.exists() else 0
        while run.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
            time.sleep(0.01)          # until the run has begun to write
        steps = len(log.read_text().splitlines()) + moments.randrange(6)
        while run.poll() is None and len(log.read_text().splitlines()) < steps:
            time.sleep(0.01)          # and some steps further, however long they take here
        time.sleep(moments.uniform(0, 0.5))
        assert run.poll() is None, "the run ended before it was killed"
        subprocess.run(["pkill", "-KILL", "-f", str(broken)], check=True)  # torchrun and all of its processes
        run.wait()
        inside = (broken / "checkpoint.partial").exists() or (broken / "checkpoint.old").exists()
        writing += inside
        steps = len(log.read_text().splitlines())
        print(f"kill {kill + 1}: {steps} steps, {'inside' if inside else 'outside'} a checkpoint", flush=True)
    last = start(broken, args.ranks, "--resume")
    assert last.wait() == 0, last.stderr.read()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_times(whole / name) == without_times(broken / name), name
    assert (whole / "model/model.safetensors").read_bytes() == (broken / "model/model.safetensors").read_bytes()
    print(f"{args.times} kills, {writing} of them inside a checkpoint, {args.ranks} processes: nothing lost, bit for bit")


if __name__ == "__main__":
    main()
