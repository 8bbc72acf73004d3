"""What the scripts share between the shell and main(): flag types, help, errors in one line."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable

from torch.distributed import DistError

from runtime.checkpoint import MAY_CHANGE_ON_RESUME
from runtime.distributed import destroy, world_size
from runtime.errors import LOST_PEER, UserError, first_line, record_end

SEED_LIMIT = 2**31  # seeds from here on are for held-out data: no --seed can be one
RESUME_HINT = "the same command with --resume continues from the last checkpoint, if there is one"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of a script's docstring, and shows the flags' defaults."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def add_run_flags(flags: argparse._ArgumentGroup) -> None:
    """Add --overwrite and --resume, and args.defaults, what each flag is unless it is given. Call
    it last: the help of --resume lists those of the earlier flags that may change."""
    names = [name for action in flags._actions for name in action.option_strings]
    may_change = [name for name in names if name.removeprefix("--") in MAY_CHANGE_ON_RESUME]
    flags.add_argument("--overwrite", action="store_true",
                       help="replace a run that is in --out, instead of moving it to OUT.1")
    flags.add_argument("--resume", action="store_true",
                       help="continue from the checkpoint in --out, if there is one; of the flags "
                       f"only {', '.join(may_change)} may change")
    flags.set_defaults(defaults={action.dest: action.default for action in flags._actions})


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


def linear_warmup_decay(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate of `step`, counted from 0: linear warm-up over `warmup` steps, then linear
    decay, which would reach 0 in the step after the last."""
    return peak * min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))


def run_main(main: Callable[[], None], hint: str = RESUME_HINT) -> None:
    """Call main. A UserError or OSError ends in one line; so does SIGINT or SIGTERM, with the hint,
    until a run handles them. A run's folder keeps why it ended."""
    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(number)

    handlers = {number: signal.signal(number, interrupt)
                for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        try:
            main()
        finally:  # whatever hangs from here on, Ctrl-C can end it
            for number, handler in handlers.items():
                signal.signal(number, handler)
        destroy()
    except (UserError, OSError) as error:
        exit_with_error(f"error: {error}")
    except KeyboardInterrupt as error:
        number = signal.Signals(*error.args or [signal.SIGINT])
        exit_with_error(f"interrupted by {number.name}; {hint}", 128 + number)
    except Exception as error:  # noqa: BLE001  it goes to stderr, and into the run's folder
        gloo = ("Connection closed by peer", "Connection reset")  # of its RuntimeErrors
        lost_peer = isinstance(error, DistError) or any(text in str(error) for text in gloo)
        if lost_peer and world_size() > 1:
            exit_with_error(f"error: {LOST_PEER}, killed or with an error of its own; {hint}")
        exit_with_error(f"{first_line(error)}\n{traceback.format_exc()}")


def exit_with_error(message: str, code: int = 1) -> None:
    """Exit; with other ranks at once, as an orderly exit would wait for them."""
    record_end(code, message)
    if world_size() == 1 and code == 1:
        sys.exit(message)
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(code)
