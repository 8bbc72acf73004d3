"""The flags that scripts share, one place for each: its help, its default, its type."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from runtime.checkpoint import MAY_CHANGE_ON_RESUME
from runtime.errors import UserError

SEED_LIMIT = 2**31  # seeds from here on are for held-out data: no --seed can be one


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of a script's docstring, and shows the flags' defaults."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def non_negative_int(text: str) -> int:
    """argparse type: a whole number from 0 to SEED_LIMIT - 1."""
    if not text.isdecimal() or int(text) >= SEED_LIMIT:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {SEED_LIMIT - 1}")
    return int(text)


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def add_data_flags(flags: argparse._ArgumentGroup) -> None:
    """The flags that name sources, the same in all three scripts, which parse_sources reads; and
    those of the prompt."""
    flags.add_argument("--data", nargs="+", default=["synthetic"],
                       metavar="[TASK=]SOURCE[@IMAGES]",
                       help="`synthetic`, or files and folders in a format of docs/data.md; "
                            "several of one task are joined")
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
    """The text of a file. Raises UserError if it is unreadable, empty, or has tokens of the chat.
    The text itself is the flag's value, so --resume refuses another one."""
    try:
        text = Path(path).read_text("utf-8-sig").strip()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--system {path}: cannot be read ({error}); name a text file in UTF-8")
    control = re.search(r"<\|\w+\|>", text)
    if control or not text:
        wrong = f"holds {control[0]}, a token of the chat; remove it" if control else "is empty"
        raise UserError(f"--system {path}: the file {wrong}")
    return text


def check_oriented(oriented: bool, tasks: Sequence[str]) -> None:
    """Raises UserError if --oriented is given and no task has an oriented form."""
    if oriented and "det" not in tasks:
        raise UserError("--oriented is the form of det answers, and det is not among --task "
                        + ",".join(tasks))


def add_training_data_flags(flags: argparse._ArgumentGroup, heldout: int) -> None:
    """Those of the data in both training scripts."""
    add_data_flags(flags)
    flags.add_argument("--shots", type=positive_int,
                       help="train on at most this many samples of each category")
    flags.add_argument("--heldout", type=non_negative_int, default=heldout,
                       help="held-out samples of each task that the run is scored on, at most; 0: "
                            "none")


def add_optimisation_flags(parser: argparse.ArgumentParser, lr: float, real_lr: str, warmup: int,
                           weight_decay: float) -> argparse._ArgumentGroup:
    """Those of the optimiser and of the hardware in both training scripts -> their group."""
    flags = parser.add_argument_group("optimisation")
    flags.add_argument("--lr", type=float, default=lr,
                       help=f"peak learning rate (all weights of the real 3B model: {real_lr})")
    flags.add_argument("--warmup", type=non_negative_int, default=warmup,
                       help="steps of linear warm-up, followed by linear decay to 0")
    flags.add_argument("--weight-decay", type=float, default=weight_decay, help="of AdamW")
    flags.add_argument("--clip-norm", type=float, default=1.0, help="largest gradient norm")
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
    """Those of a run's folder in both training scripts, and args.defaults, what each flag is unless
    it is given. Call it last: the help of --resume lists those of the flags that may change."""
    flags.add_argument("--save-every", type=positive_int, default=save_every,
                       help="steps between checkpoints")
    flags.add_argument("--tensorboard", action="store_true",
                       help="write each step's metrics to OUT/tensorboard as well")
    names = [name for action in flags._actions for name in action.option_strings]
    may_change = [name for name in names if name.removeprefix("--") in MAY_CHANGE_ON_RESUME]
    flags.add_argument("--overwrite", action="store_true",
                       help="replace a run that is in --out, instead of moving it to OUT.1")
    flags.add_argument("--resume", action="store_true",
                       help="continue from the checkpoint in --out, if there is one; of the flags "
                       f"only {', '.join(may_change)} may change")
    flags.set_defaults(defaults={action.dest: action.default for action in flags._actions})
