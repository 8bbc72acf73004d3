"""What an optimiser step needs: its learning rate, its micro-batches, and a guard against losses
that are not finite."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from runtime.distributed import all_gather_object, all_reduce_sum, device
from runtime.errors import UserError

MAX_SKIPPED_IN_A_ROW = 10


def linear_warmup_decay(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate of `step`, counted from 0: linear warm-up over `warmup` steps, then linear
    decay, which would reach 0 in the step after the last."""
    return peak * min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))


def default_pack_tokens(gradient_checkpointing: bool) -> int:
    """Tokens of a micro-batch: 2048. With gradient checkpointing a GPU holds more, and is kept busy
    by more."""
    if device().type == "cpu" or not gradient_checkpointing:
        return 2048
    return pack_tokens_for(torch.cuda.get_device_properties(device()).total_memory / 2**30)


def pack_tokens_for(gib: float) -> int:
    """4096 tokens for each 10 GiB of a GPU's memory, at most 16384."""
    return 4096 * min(max(int(gib / 10), 1), 4)


def pack_groups(sizes: dict[int, tuple[int, int]], pack_tokens: int) -> list[list[int]]:
    """{index of a group: (prompt tokens, completion tokens)} -> the indices of each micro-batch.

    Groups of similar size go together, as many as fit in `pack_tokens` when padded to the longest
    prompt and the longest completions among them, at least one.
    """
    def padded_tokens(indices: list[int]) -> int:
        longest_prompt = max(sizes[i][0] for i in indices)
        longest_completions = max(sizes[i][1] for i in indices)
        return len(indices) * (longest_prompt + longest_completions)

    micro_batches = []
    for index in sorted(sizes, key=lambda i: sum(sizes[i]), reverse=True):
        if micro_batches and padded_tokens([*micro_batches[-1], index]) <= pack_tokens:
            micro_batches[-1].append(index)
        else:
            micro_batches.append([index])
    return micro_batches


class NonFiniteGuard:
    """Tells the loop which optimiser steps to skip: those whose loss or gradient is not finite, as
    one NaN would stay in Adam's moments forever. `.skipped` counts them."""

    def __init__(self, skipped: int = 0) -> None:
        self.skipped = skipped
        self.skipped_in_a_row = 0

    def all_finite(self, loss: Tensor, grad_norm: Tensor, sample_ids: Sequence[str]) -> bool:
        """`loss` is this rank's part, `grad_norm` the whole gradient's, `sample_ids` what they came
        from. The same on all ranks. Raises UserError after too many skipped steps in a row."""
        if torch.isfinite(all_reduce_sum(loss) + grad_norm):
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            all_ids = ", ".join(chain(*all_gather_object(sample_ids)))
            raise UserError(f"loss or gradient was not finite {MAX_SKIPPED_IN_A_ROW} times in a "
                            f"row; lower --lr, or look at the last samples: {all_ids}")
        return False
