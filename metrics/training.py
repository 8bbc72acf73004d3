"""What train_grpo.py reports of each step: metrics over all ranks, completions, console lines."""

from argparse import Namespace
from itertools import chain

import torch
from torch import Tensor

from data import sample_to_row
from grpo import groups_with_signal
from model import Prompts, Qwen, forward_flops, update_passes
from rollout import Rollout
from runtime.distributed import all_gather_object, all_reduce_means, all_reduce_sum, world_size
from runtime.logging import JsonlLog, print0
from sample import Sample


def step_metrics(rollout: Rollout, rewards: Tensor, reward_parts: dict[str, Tensor],
                 loss_mask: Tensor, stats: list[dict[str, Tensor]], logprob_diffs: list[Tensor],
                 losses: list[Tensor], grad_norms: list[Tensor]) -> dict:
    """The step's metrics, means over all ranks. `stats` and `logprob_diffs` hold sums over the
    tokens of each micro-batch; `losses` and `grad_norms` have an entry for each inner step."""
    num_completions = rewards.numel()
    num_tokens = rollout.mask.sum()
    num_loss_tokens = loss_mask.sum() * len(losses)             # of all inner steps
    means = all_reduce_means({                                  # name: (sum, count) on this rank
        "reward": (rewards.sum(), num_completions),
        "reward_std": (rewards.std(1).sum(), len(rewards)),
        "kl": (sum(s["kl"] for s in stats), num_loss_tokens),
        "entropy": (rollout.entropy.sum(), num_tokens),
        "clip_frac": (sum(s["clipped"] for s in stats), num_loss_tokens),
        "sampling_gap": (sum(logprob_diffs), loss_mask.sum()),  # |old_logprobs - as sampled|
        "len_mean": (num_tokens, num_completions),
        "truncated_frac": ((~rollout.stopped).sum(), num_completions),
        "zero_std_frac": ((~groups_with_signal(rewards)).sum(), len(rewards)),
        # The ranks' losses add up, so each inner step counts once over all ranks.
        "loss": (sum(losses), len(losses) / world_size()),
        "grad_norm": (sum(grad_norms), len(grad_norms))})
    parts = all_reduce_means({name: (sum(values.flatten().tolist()), num_completions)
                              for name, values in reward_parts.items()})
    return means | {"parts": parts}


def step_speed(args: Namespace, model: Qwen, prompts: list[Prompts], lengths: Tensor, keep: Tensor,
               inner_steps: int, len_mean: float, seconds: float) -> dict[str, float]:
    """Tokens and floating point operations per second, of all ranks, computed from shapes."""
    update = inner_steps * update_passes(bool(args.lora))
    if args.beta and inner_steps:
        update += 1                                             # the reference model
    passes = torch.where(keep, 1 + update, 1)                   # (B,): 1 is the rollout's
    flops = (forward_flops(model, prompts, lengths.sum(1)) * passes).sum()
    return {"flops_per_s": all_reduce_sum(flops).item() / seconds,
            "tokens_per_s": len_mean * args.prompts * args.group / seconds}


def log_completions(log: JsonlLog, row: dict, samples: list[Sample], texts: list[list[str]],
                    reward_parts: dict[str, Tensor], rewards: Tensor, advantages: Tensor,
                    b: int | None) -> None:
    """Write the completions of this rank's prompt b. All ranks call this; one of them has a b."""
    completions = []
    if b is not None:
        for g, text in enumerate(texts[b]):
            parts = {name: values[b, g].item() for name, values in reward_parts.items()}
            completions.append({"step": row["step"], "stage": row["stage"],
                                **sample_to_row(samples[b]), "completion": text, "parts": parts,
                                "reward": rewards[b, g].item(),
                                "advantage": advantages[b, g, 0].item()})  # of the first token
    for completion in chain(*all_gather_object(completions)):
        log.write(completion)


def print_step(row: dict, seconds: float) -> None:
    print0(f"step {row['step']:4d} {row['task']:6s} reward {row['reward']:.3f}  accuracy "
           f"{row['parts']['accuracy']:.3f}  kl {row['kl']:.4f}  entropy {row['entropy']:.3f}  "
           f"len {row['len_mean']:4.1f}  grad {row['grad_norm']:5.2f}  {seconds:.2f} s")


def print_held_out(task: str, num_samples: int, before: dict[str, float],
                   after: dict[str, float]) -> None:
    if not num_samples:
        return
    rows = [f"{name:12s}{before[name]:8.3f}{after[name]:8.3f}" for name in before]
    print0("\n".join([f"\n{task}: mean rewards over {num_samples} held-out samples",
                      f"{'':12s}{'before':>8s}{'after':>8s}", *rows]))
