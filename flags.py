"""The flags of the three scripts: the help, the default and the type of each, and which of them
cannot work together."""

import argparse
import re
from argparse import Namespace
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from data import check_task
from metrics import published
from readers.splits import HELD_OUT_SAMPLES, HELD_OUT_SEED
from rewards import REWARD_PARTS, TASKS
from runtime.errors import UserError
from runtime.ranks import world_size

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "geovlm")
# Flags that change neither the data nor the loss, so --resume may give other values.
MAY_CHANGE = ("--save-every", "--eval-every", "--shard-size", "--micro-batch", "--pack-tokens",
              "--gradient-checkpointing", "--compile", "--tensorboard")

# --------------------------------------------------------------------------------------------------
# What scripts share

class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of a script's docstring, and shows the flags' defaults."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or isinstance(action.default, list):
            return action.help
        return super()._get_help_string(action)


def non_negative_int(text: str) -> int:
    """argparse type: a whole number below HELD_OUT_SEED, so that --seed is never that."""
    if not text.isdecimal() or int(text) >= HELD_OUT_SEED:
        raise argparse.ArgumentTypeError(
            f"{text} is not a whole number from 0 to {HELD_OUT_SEED - 1}")
    return int(text)


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def positive_float(text: str) -> float:
    """argparse type: a number above 0; inf is one."""
    if not non_negative_float(text):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def non_negative_float(text: str) -> float:
    """argparse type: a number of at least 0."""
    if not float(text) >= 0:  # or NaN
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return float(text)


def add_data_flags(flags: argparse._ArgumentGroup) -> None:
    """The flags that name sources, the same in all three scripts, which parse_sources reads; and
    those of the prompt."""
    flags.add_argument("--data", nargs="+", default=["synthetic"],
                       metavar="[TASK=]SOURCE[@IMAGES]",
                       help="`synthetic`, or files and folders in a format of docs/data.md; "
                            "several of one task are joined (default: synthetic)")
    flags.add_argument("--eval-data", nargs="+", default=[], metavar="[TASK=]SOURCE[@IMAGES]",
                       help="sources of the held-out samples (default: a part of --data)")
    flags.add_argument("--images",
                       help="default of @IMAGES, the folder that image names are relative to "
                            "(default: the folder of the file, or where its format keeps images)")
    flags.add_argument("--image-size", type=positive_int,
                       help="side in pixels that images are resized to (default: the checkpoint's, "
                            "else 448)")
    add_prompt_flags(flags)
    add_candidate_flags(flags)


def add_prompt_flags(flags: argparse._ActionsContainer) -> None:
    """The flags that say what a model is asked for, the same in all three scripts and ask.py."""
    flags.add_argument("--oriented", action="store_true",
                       help="det answers with oriented boxes [x1,y1,x2,y2,theta], rewarded by "
                            "oriented IoU; other tasks stay as they are")
    flags.add_argument("--no-think", action="store_true",
                       help="no reasoning: prompt, target and format reward want <answer> alone")
    flags.add_argument("--system", type=read_system_prompt, metavar="FILE",
                       help="a file whose text replaces the system prompt")


def add_candidate_flags(flags: argparse._ActionsContainer) -> None:
    """The flags of pair's candidates."""
    flags.add_argument("--choices", type=int, choices=range(2, 11), metavar="K",
                       help="pair: satellite images in a question of CVUSA or CV-Cities, 2 to 10 "
                            "(default: 4)")
    flags.add_argument("--negatives", choices=("near", "random"),
                       help="pair: wrong ones are the nearest of other places, or random (default: "
                            "near where the table has positions)")


def read_system_prompt(path: str) -> str:
    """argparse type: the text of a file, not empty and without tokens of the chat. The text itself
    is the flag's value, so --resume refuses another one."""
    try:
        text = Path(path).read_text("utf-8-sig").strip()
    except (OSError, UnicodeError) as error:
        raise argparse.ArgumentTypeError(
            f"{path}: cannot be read ({error}); name a text file in UTF-8")
    control = re.search(r"<\|\w+\|>", text)
    if control or not text:
        wrong = f"holds {control[0]}, a token of the chat; remove it" if control else "is empty"
        raise argparse.ArgumentTypeError(f"{path}: the file {wrong}")
    return text


def check_oriented(oriented: bool, tasks: Sequence[str]) -> None:
    """Raises UserError if --oriented is given and no task has an oriented form."""
    if oriented and "det" not in tasks:
        raise UserError("--oriented is the form of det answers, and det is not among --task "
                        + ",".join(tasks))


def add_reward_flag(flags: argparse._ArgumentGroup) -> None:
    """The flag of all three scripts that parse_rewards reads."""
    flags.add_argument("--reward", nargs="+", default=[], metavar="TASK=FUNCTION",
                       help="accuracy rewards in place of the tasks' own (SFT: only in its "
                            "scores), such as det=box_recall_reward, under which boxes multiply")


def add_reward_model_flags(flags: argparse._ArgumentGroup) -> None:
    """The frozen models that some rewards use, which load_reward_models reads."""
    flags.add_argument("--sbert",
                       help="for rcap and change: a folder, or a hub id such as "
                            "sentence-transformers/all-MiniLM-L6-v2")
    flags.add_argument("--sam", help="SAM 2.1 for the masks of seg: a folder or hub id")


def add_training_data_flags(flags: argparse._ArgumentGroup) -> None:
    """Flags of the data in both training scripts."""
    add_data_flags(flags)
    flags.add_argument("--shots", type=positive_int,
                       help="train on at most this many samples of each category")
    flags.add_argument("--heldout", type=non_negative_int, default=HELD_OUT_SAMPLES,
                       help="held-out samples of each task that the run is scored on, at most; 0: "
                            "none")


def add_optimisation_flags(parser: argparse.ArgumentParser, lr: float, real_lr: str, warmup: int,
                           weight_decay: float) -> argparse._ArgumentGroup:
    """Flags of the optimiser and the hardware in both training scripts -> their group."""
    flags = parser.add_argument_group("optimisation")
    flags.add_argument("--lr", type=non_negative_float, default=lr,
                       help=f"peak learning rate (all weights of the real 3B model: {real_lr})")
    flags.add_argument("--warmup", type=non_negative_int, default=warmup,
                       help="steps of linear warm-up, followed by linear decay to 0")
    flags.add_argument("--weight-decay", type=non_negative_float, default=weight_decay,
                       help="of AdamW")
    flags.add_argument("--clip-norm", type=positive_float, default=1.0,
                       help="largest gradient norm; inf: no clipping")
    flags.add_argument("--gradient-checkpointing", action="store_true",
                       help="recompute activations: slower, less memory")
    flags.add_argument("--lora", type=positive_int,
                       help="train LoRA adapters of this rank in the language model, nothing else")
    flags.add_argument("--freeze", choices=["vision"],
                       help="do not train the vision tower; GRPO then encodes an image once a step")
    flags.add_argument("--shard-size", type=positive_int,
                       help="processes that share one copy of the model (default: all of them)")
    return flags


def add_run_flags(flags: argparse._ArgumentGroup, save_every: int) -> None:
    """Flags of a run's folder in both training scripts. Call it last: args.defaults is what each
    flag is unless it is given, and args.may_change names those that --resume lets change."""
    flags.add_argument("--save-every", type=positive_int, default=save_every,
                       help="steps between checkpoints")
    flags.add_argument("--tensorboard", action="store_true",
                       help="write each step's metrics to OUT/tensorboard as well")
    names = [name for action in flags._actions for name in action.option_strings]
    may_change = [name for name in names if name in MAY_CHANGE]
    flags.add_argument("--overwrite", action="store_true",
                       help="replace a run that is in --out, instead of moving it to OUT.1")
    flags.add_argument("--resume", action="store_true",
                       help="continue from the checkpoint in --out, if there is one; of the flags "
                       f"only {', '.join(may_change)} may change")
    flags.set_defaults(defaults={action.dest: action.default for action in flags._actions},
                       may_change=may_change)


def check_training_args(args: Namespace, divided: str) -> None:
    """Raises UserError for what cannot work in either training script; the flag `divided` counts
    what the processes share."""
    number = getattr(args, divided)
    if number % world_size():
        raise UserError(f"--{divided} {number} cannot be divided evenly among {world_size()} "
                        "processes; take a multiple")
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401  now, before a run moves an earlier one
        except ImportError:
            raise UserError("--tensorboard needs tensorboard: pip install tensorboard")


# --------------------------------------------------------------------------------------------------
# train_grpo.py

def parse_grpo_args(description: str) -> Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--task", default="det",
                        help="stages, comma-separated, in this order: a task, or several mixed, as "
                             "in det+rcap; or `all`, a stage for each task")
    parser.add_argument("--out", type=Path, default=Path("runs/grpo"),
                        help="folder that the run writes to; a run in it moves to OUT.1")
    flags = parser.add_argument_group("model and data")
    flags.add_argument("--model", default="tiny",
                       help="`tiny`, a folder in Hugging Face format, or a hub id")
    add_training_data_flags(flags)
    flags = parser.add_argument_group("rollout")
    flags.add_argument("--steps", type=positive_int, default=150,
                       help="rollouts per stage, with --inner-steps optimiser steps on each")
    flags.add_argument("--prompts", type=positive_int, default=16,
                       help="B: prompts per step, over all processes")
    flags.add_argument("--group", type=int, default=8, help="G: completions per prompt, at least 2")
    flags.add_argument("--max-new-tokens", type=positive_int, default=96,
                       help="C_max: longest completion (with tiny use 160 for ground, ovd, seg)")
    flags.add_argument("--temperature", type=float, default=1.0,
                       help="of sampling, and of the log-probs that are trained on")
    flags.add_argument("--resample", type=non_negative_int, default=0,
                       help="replace groups without signal by those of other prompts, up to this "
                            "many times a step (DAPO); on a GPU a decode step is prepared anew "
                            "for each new number of groups")
    flags.add_argument("--seed", type=non_negative_int, default=0,
                       help="seed of the data order, of sampling and of synthetic scenes")
    flags.add_argument("--compile", action="store_true",
                       help="torch.compile a decode step: 15 seconds of warm-up for each shape, "
                            "80 for the 3B model")
    flags = parser.add_argument_group("reward")
    for name, part in REWARD_PARTS.items():
        only = f" (task {', '.join(sorted(part.tasks))})" if part.tasks else ""
        flags.add_argument(f"--{name}-weight", type=float, default=1.0,
                           help=f"weight of the {name} reward in the sum{only}")
    add_reward_model_flags(flags)
    add_reward_flag(flags)
    flags.add_argument("--overlong-buffer", type=non_negative_int, default=0,
                       help="punish completions within this many tokens of --max-new-tokens, by "
                            "up to -1 (DAPO); 0: do not")
    flags = parser.add_argument_group("objective")
    flags.add_argument("--loss", choices=LOSSES, default="grpo",
                       help="token weights and ratio, see grpo.py; with one inner step gspo is "
                            "grpo")
    flags.add_argument("--divide-by-std", action="store_true",
                       help="divide advantages by the group's std (GRPO; Dr. GRPO does not)")
    flags.add_argument("--inner-steps", type=positive_int, default=1,
                       help="mu: optimiser steps on each rollout")
    flags.add_argument("--clip-low", type=non_negative_float, default=0.2,
                       help="the ratio, which is 1 with one inner step, is clipped at 1 - this "
                            "(GSPO: 3e-4)")
    flags.add_argument("--clip-high", type=non_negative_float, default=0.2,
                       help="and at 1 + this (DAPO: 0.28, GSPO: 4e-4)")
    flags.add_argument("--beta", type=non_negative_float, default=0.001,
                       help="weight of the KL penalty (VLM-R1: 0.04); 0 keeps no reference model")
    flags.add_argument("--mask-truncated", action="store_true",
                       help="no loss on completions that are cut off at --max-new-tokens")
    flags = add_optimisation_flags(parser, lr=3e-4, real_lr="1e-6", warmup=5, weight_decay=0.0)
    flags.add_argument("--pack-tokens", type=positive_int,
                       help="tokens per forward pass of the update: as many groups as fit, at "
                            "least 1 (default: 2048; with --gradient-checkpointing on a GPU 4096 "
                            "for each 10 GiB, at most 16384)")
    flags = parser.add_argument_group("output")
    flags.add_argument("--eval-every", type=positive_int, default=50,
                       help="steps between held-out scores")
    add_run_flags(flags, save_every=50)
    return parser.parse_args()


def check_grpo_args(args: Namespace, stages: list[list[str]]) -> None:
    """Raises UserError for flags that cannot work, before anything is loaded."""
    check_oriented(args.oriented, list(chain(*stages)))
    for name, part in REWARD_PARTS.items():
        for task in (part.tasks or set()) - TASKS.keys():  # a part of no task would never count
            raise UserError(f"rewards.py: the reward part {name} is for {task!r}, which is no task")
        if name in ("overlong", "reward", "sampled", "greedy"):  # it would overwrite this one
            raise UserError(f"rewards.py: the reward part {name} has the name of another metric")
    if args.group < 2:
        raise UserError(f"--group {args.group}: an advantage is relative to the group's mean, so a "
                        "group needs at least 2")
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature}: greedy completions of a group are all "
                        "the same; it has to be positive")
    if args.overlong_buffer > args.max_new_tokens:
        raise UserError(f"--overlong-buffer {args.overlong_buffer} is longer than --max-new-tokens "
                        f"{args.max_new_tokens}, of which it is the end")
    check_training_args(args, "prompts")


# --------------------------------------------------------------------------------------------------
# train_sft.py

def parse_sft_args(description: str) -> Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--task", default="all",
                        help="comma-separated tasks to mix, a repeated one counts again; or `all`")
    parser.add_argument("--out", type=Path, default=Path("runs/sft"),
                        help="folder for model/, checkpoint/, metrics.jsonl, curves.png; a run in "
                             "it moves to OUT.1")
    flags = parser.add_argument_group("model and data")
    flags.add_argument("--model", default="tiny",
                       help="`tiny`, a folder, a hub id; or `scratch`: tiny with random weights")
    add_training_data_flags(flags)
    add_reward_flag(flags)
    flags.add_argument("--box-noise", type=float, default=0.0,
                       help="mean and std in pixels by which the box edges of det's targets move "
                            "outwards: hasty annotators, whom GRPO can surpass")
    flags.add_argument("--half-no-think", action="store_true",
                       help="every other step as with --no-think: the model then answers either "
                            "way")
    flags = add_optimisation_flags(parser, lr=1e-3, real_lr="1e-5", warmup=20, weight_decay=0.01)
    flags.add_argument("--steps", type=positive_int, default=1000, help="optimiser steps")
    flags.add_argument("--batch", type=positive_int, default=32,
                       help="samples per optimiser step, over all processes")
    flags.add_argument("--micro-batch", type=positive_int, default=32,
                       help="samples per forward pass; lower it to save memory")
    flags.add_argument("--seed", type=non_negative_int, default=0,
                       help="seed of the data order and of random weights and noise")
    flags = parser.add_argument_group("output")
    flags.add_argument("--max-new-tokens", type=positive_int, default=96,
                       help="longest completion in the held-out scores")
    add_run_flags(flags, save_every=500)
    return parser.parse_args()


def check_sft_args(args: Namespace, tasks: list[str]) -> None:
    """Raises UserError for flags that cannot work, before anything is loaded."""
    check_oriented(args.oriented, tasks)
    if args.box_noise and "det" not in tasks:
        raise UserError(f"--box-noise {args.box_noise} moves the boxes of det, which is not among "
                        f"--task {args.task}")
    if args.half_no_think and args.no_think:
        raise UserError("--half-no-think wants the reasoning in every other step, --no-think in "
                        "none; leave one of them out")
    if args.lora and args.model == "scratch":
        raise UserError("--lora adapts a trained model, and --model scratch has random weights")
    check_training_args(args, "batch")


# --------------------------------------------------------------------------------------------------
# evaluate.py

def parse_eval_args(description: str) -> Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--task", help=f"one of {', '.join(TASKS)}; not with --suite")
    parser.add_argument("--out", type=Path, default=Path("runs/eval"),
                        help="folder for predictions.jsonl, scores.json, report.html; an "
                             "evaluation in it moves to OUT.1")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace an evaluation that is in --out, instead of moving it")
    parser.add_argument("--suite", type=Path,
                        help="file of several benchmarks, one after the other, in place of --task, "
                             "--benchmark, --data and --images; all other flags count for each")
    parser.add_argument("--benchmark", choices=published.BENCHMARKS, metavar="NAME",
                        help="print the published rows of this table as well, one of "
                             + ", ".join(published.BENCHMARKS))
    flags = parser.add_argument_group("what to score")
    flags.add_argument("--predictions", type=Path,
                       help="score the answers of this file; no model is run")
    flags.add_argument("--model", default="tiny",
                       help="`tiny`, a folder in Hugging Face format, or a hub id")
    add_data_flags(flags)
    flags.add_argument("--split", choices=("all", "heldout", "train"),
                       help="`heldout`: the source's test split, else its val split, else the "
                            "tenth of the images that training leaves out (default: heldout for "
                            "synthetic and where the source has such a split, else all)")
    flags.add_argument("--limit", type=positive_int,
                       help="score only the first samples; with --split all they are in the order "
                            "of the file, in which the first may all be of one class")
    add_reward_model_flags(flags)
    add_reward_flag(flags)
    flags = parser.add_argument_group("decoding (greedy)")
    flags.add_argument("--max-new-tokens", type=positive_int, default=96,
                       help="longest completion (with tiny use 160 for ground, ovd, seg)")
    flags.add_argument("--batch", type=positive_int, default=32,
                       help="prompts that a process decodes together: more are faster, and take "
                            "more memory")
    return parser.parse_args()


def given_flags(args: Namespace, *names: str) -> str:
    """Those of the flags of evaluate.py that were given, as a list in words."""
    values = {f"--{name}": getattr(args, name.replace("-", "_")) for name in names}
    return ", ".join(flag for flag, value in values.items() if value and value != ["synthetic"])


def check_eval_args(args: Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is loaded."""
    if (args.task is None) == (args.suite is None):
        raise UserError("give either --task or --suite")
    if args.suite:
        given = given_flags(args, "predictions", "benchmark", "data", "eval-data", "images")
        if given:
            raise UserError(f"--suite names the data of each benchmark; leave {given} out")
        return
    check_task(args.task)
    given = given_flags(args, "data", "eval-data", "split", "images", "limit", "oriented",
                        "no-think", "system")
    if given and args.predictions:
        raise UserError(f"--predictions has its samples and answers already; leave {given} out")
    if args.benchmark and published.BENCHMARKS[args.benchmark][0] != args.task:
        raise UserError(f"--benchmark {args.benchmark} is a table of task "
                        f"{published.BENCHMARKS[args.benchmark][0]}, not {args.task}")
    if args.eval_data and args.split in ("all", "train"):
        raise UserError(f"--split {args.split} scores --data, but --eval-data is given; leave one "
                        "of them out")
