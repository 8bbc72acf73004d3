"""A run that is killed again and again ends as the unbroken one. An experiment of some minutes.

    python tools/kill.py --times 20 --ranks 1
    python tools/kill.py --times 20 --ranks 2

SIGKILL reaches all processes of the run at random moments, some of them while a checkpoint is
written (there is one after each step); then --resume continues the run. At the end metrics.jsonl
(without times), samples.jsonl and the weights are compared bit for bit with those of a run that was
left alone.
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
FLAGS = ("--task cls,det --steps 50 --prompts 4 --group 4 --max-new-tokens 48 --lr 1e-3 --warmup 0 "
         "--save-every 1 --eval-every 1000")


def start(out: Path, ranks: int, *more: str) -> subprocess.Popen:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, ROOT / "train_grpo.py", *FLAGS.split(), "--out", out, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # more threads round differently each time
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, env=environment)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def without_times(file: Path) -> list[dict]:
    rows = [json.loads(line) for line in lines(file)]
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="number of kills")
    parser.add_argument("--ranks", type=int, default=1, help="number of processes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp())
    whole, broken = folder / "whole", folder / "broken"
    log = broken / "metrics.jsonl"
    kills_inside = 0
    first = start(whole, args.ranks)
    assert first.wait() == 0, first.stderr.read()
    for kill in range(1, args.times + 1):
        run = start(broken, args.ranks, "--resume")
        before = log.stat().st_mtime_ns if log.exists() else 0
        while run.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
            time.sleep(0.01)  # until the run writes its first line
        steps = len(lines(log)) + moments.randrange(6)
        while run.poll() is None and len(lines(log)) < steps:
            time.sleep(0.01)  # then for some steps, however long they take here
        time.sleep(moments.uniform(0, 0.5))
        assert run.poll() is None, "the run ended before it was killed"
        # torchrun and all of its processes: they have this folder in their command lines
        subprocess.run(["pkill", "-KILL", "-f", str(broken)], check=True)
        run.wait()
        leftovers = (broken / "checkpoint.partial", broken / "checkpoint.old")
        inside = any(path.exists() for path in leftovers)
        kills_inside += inside
        where = "inside" if inside else "outside"
        print(f"kill {kill}: {len(lines(log))} steps, {where} a checkpoint", flush=True)
    last = start(broken, args.ranks, "--resume")
    assert last.wait() == 0, last.stderr.read()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_times(whole / name) == without_times(broken / name), name
    weights = [(out / "model/model.safetensors").read_bytes() for out in (whole, broken)]
    assert weights[0] == weights[1]
    print(f"{args.times} kills, {kills_inside} of them inside a checkpoint, {args.ranks} "
          "processes: nothing lost, bit for bit")


if __name__ == "__main__":
    main()
