"""Which of torchrun's processes this is. Without torch, for what does not need it."""

import os


def rank() -> int:
    """This process's number; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))
