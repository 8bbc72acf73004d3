"""Every task on the synthetic scenes: SFT on exact targets, then GRPO, and what GRPO gained.

    python tools/every_task.py --jobs 16                # all tasks, a Markdown table at the end
    python tools/every_task.py --tasks vqa seg          # some of them

Each score is the mean accuracy reward of held-out scenes, each gain is given with its standard
error. The same command continues after an interruption.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards import TASKS
from tools.trial import Trial, add_trial_flags, gain, gain_and_error, minutes, run_trials

LONG = "--max-new-tokens 160"
DEFAULT = ("--steps 60", "--steps 120")
RECIPES = {  # task -> further flags of SFT and of GRPO, where the default ones are not enough
    "ground": ("--steps 60", f"--steps 120 --temperature 0.7 {LONG}"),
    "ovd": ("--steps 200", f"--steps 120 {LONG}"),
    "seg": ("--steps 200", f"--steps 120 {LONG}"),
    "pair": ("--steps 600", "--steps 200"),
    "change": ("--steps 60", "--steps 120 --temperature 0.7"),
    "vqa": ("--steps 60", "--steps 120 --temperature 0.7"),
    "count": ("--steps 100", "--steps 120"),
    "geo": ("--steps 200", "--steps 120"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK",
                        help="default: all")
    add_trial_flags(parser, "runs/every_task", seeds=(0,))
    args = parser.parse_args()
    trials = []
    for task in args.tasks:
        sft, grpo = RECIPES.get(task, DEFAULT)
        trials.append(Trial(task, task, f"--batch 16 --lr 3e-4 --heldout 0 {sft}",
                            f"--prompts 16 --lr 2e-4 --heldout 64 --eval-every 1000 {grpo}"))
    done = run_trials(trials, args)

    print("| task | SFT | GRPO | sampled | greedy | minutes |\n|---|---|---|---|---|---|")
    passed = 0
    for task, runs in done.items():
        sft, grpo = RECIPES.get(task, DEFAULT)
        print(f"| `{task}` | `{sft}` | `{grpo}` | {gain(runs, 'sampled')} | "
              f"{gain(runs, 'greedy')} | {minutes(list((args.out / task).iterdir())):.1f} |")
        sampled, sampled_error = gain_and_error(runs, "sampled")
        greedy, greedy_error = gain_and_error(runs, "greedy")
        passed += sampled > 2 * sampled_error and greedy > -greedy_error
    print(f"sampled rose by more than two standard errors, and greedy did not fall by more than "
          f"one, on {passed} of {len(done)}")


if __name__ == "__main__":
    main()
