"""How SIGTERM and Ctrl-C end long work: the first one at the next pause, a second one at once."""

import os
import select
import signal
import time
from collections.abc import Sequence
from typing import Self

from runtime.distributed import all_reduce_max
from runtime.errors import record_end
from runtime.ranks import rank

# timeout(1) signals a process and its group, torchrun passes on what its workers got already.
SAME_SIGNAL_SECONDS = 0.3


class Stoppable:
    """Work that asks should_stop() at each pause. Signals are caught within `with`, or from
    install_signal_handlers() to restore_signal_handlers().

    .doing  what a first signal makes the process do
    .kept   what a second signal leaves behind
    """

    kept = "finished batches are kept, and the same command continues"

    def __init__(self, doing: str) -> None:
        self.doing = doing
        self.received_signals = []
        self.is_acknowledged = False
        self.old_handlers = {}

    def __enter__(self) -> Self:
        self.install_signal_handlers()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore_signal_handlers()

    def install_signal_handlers(self) -> None:
        """From now on a first SIGTERM or SIGINT makes should_stop() true, a second one ends the
        process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.old_handlers[number] = signal.signal(number, self.on_signal)

    def restore_signal_handlers(self) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, _frame: object) -> None:
        """Acknowledge a first signal; at a second one, exit with status 128 + number."""
        name = signal.Signals(number).name
        if self.is_acknowledged:
            record_end(128 + number, f"{name}, a second signal")
            self.say(f"{name} again: the process ends now; {self.kept}")
            os._exit(128 + number)
        self.received_signals.append(number)
        if len(self.received_signals) == 1:
            time.sleep(SAME_SIGNAL_SECONDS)
            replace_broken_pipes()
            self.say(f"{name}: {self.doing}; a second signal ends the process")
            self.is_acknowledged = True

    def say(self, text: str) -> None:
        if rank() == 0:  # not by print, which the signal may have interrupted
            os.write(2, f"\n{text}\n".encode())

    def should_stop(self) -> int:
        """Not 0 on all ranks if a signal has reached one of them: its number."""
        return all_reduce_max(max(self.received_signals, default=0))


def replace_broken_pipes(fds: Sequence[int] = (1, 2)) -> None:
    """Send stdout and stderr nowhere if their reader is gone: Ctrl-C also ends the `tee` of a
    pipeline, and the next print would end the run before it has saved."""
    for fd in fds:
        poll = select.poll()
        poll.register(fd, 0)  # errors alone
        if poll.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
