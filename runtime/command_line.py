"""What the scripts share between the shell and main(): signals and errors end in one line."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

from torch.distributed import DistError

from runtime.distributed import destroy
from runtime.errors import LOST_PEER, UserError, first_line, record_end
from runtime.ranks import world_size

RESUME_HINT = "the same command with --resume continues from the last checkpoint, if there is one"


def run_main(main: Callable[[], None], hint: str = RESUME_HINT) -> None:
    """Call main. A UserError or OSError ends in one line; so does SIGINT or SIGTERM, with the hint,
    until a run handles them. A run's folder keeps why it ended."""
    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(number)

    # transformers 5.24 calls it activation checkpointing; peft, and 5.17, know the old name alone.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
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
    """Exit; with other ranks at once, as an orderly exit would wait for them. An error that ends a
    run is followed by how to continue."""
    has_run = record_end(code, message)
    if has_run and RESUME_HINT not in message:
        message += f"\n{RESUME_HINT}"
    if world_size() == 1 and code == 1:
        sys.exit(message)
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(code)
