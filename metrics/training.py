"""What the training scripts report: metrics over all ranks, completions, console lines."""

import math
from argparse import Namespace
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from attention import flash_attn
from grpo import groups_with_signal
from metrics.plots import METRICS, plot_curves
from metrics.report import read_entries, write_report
from metrics.rows import sample_to_row
from model import Qwen
from processing import Prompts
from rewards import REWARD_PARTS
from rollout import Rollout
from runtime.distributed import all_gather_object, all_reduce_means, all_reduce_sum, device
from runtime.errors import errors_as_warnings, warn
from runtime.logging import JsonlLog, print0, shorten
from runtime.ranks import rank, world_size
from sample import Sample

STEPS_WITHOUT_SIGNAL = 5  # in a row, before a warning


def stack_parts(scored: list[list[dict[str, float]]], tasks: Sequence[str]) -> dict[str, Tensor]:
    """B x G x {part: reward} -> {part: (B, G)}, on all ranks the parts that any of the stage's
    tasks has. A part that a completion's own task lacks counts as 0."""
    names = [name for name, part in REWARD_PARTS.items()
             if part.tasks is None or part.tasks & set(tasks)]
    values = {name: [[parts.get(name, 0.0) for parts in group] for group in scored]
              for name in names}
    return {name: torch.tensor(values[name], dtype=torch.float64, device=device())
            for name in names}


def step_metrics(rollout: Rollout, rewards: Tensor, reward_parts: dict[str, Tensor],
                 resampled: int, loss_mask: Tensor, stats: list[dict[str, Tensor]],
                 logprob_diffs: list[Tensor], losses: list[Tensor],
                 grad_norms: list[Tensor]) -> dict:
    """The step's metrics, means over all ranks; NaN where nothing was measured. `rewards` and each
    reward part are (B, G), `loss_mask` is (B, G, C); `stats` and `logprob_diffs` hold sums over the
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
    resampled = int(all_reduce_sum(torch.tensor(resampled, device=device())))
    return means | {"parts": parts, "resampled": resampled}


def step_speed(args: Namespace, model: Qwen, prompts: list[Prompts], lengths: Tensor, keep: Tensor,
               inner_steps: int, len_mean: float, seconds: float) -> dict[str, float]:
    """Tokens and floating point operations per second, of all ranks, computed from shapes; those of
    groups that --resample has replaced do not count."""
    update = inner_steps * update_passes(bool(args.lora))
    if args.beta and inner_steps:
        update += 1                                             # the reference model
    passes = torch.where(keep, 1 + update, 1)                   # (B,): 1 is the rollout's
    flops = (forward_flops(model, prompts, lengths.sum(1)) * passes).sum()
    return {"flops_per_s": all_reduce_sum(flops).item() / seconds,
            "tokens_per_s": len_mean * args.prompts * args.group / seconds}


def forward_flops(model: Qwen, prompts: list[Prompts], num_tokens: Tensor) -> Tensor:
    """Floating point operations (B,) of a forward pass over groups of num_tokens (B,) completion
    tokens each: 2 per parameter and token (or image patch).

    Left out: attention itself, some percent at these lengths, and a vision tower whose embeddings
    were computed before.
    """
    def num_params(module: torch.nn.Module) -> int:
        return sum(param.numel() for param in module.parameters())

    layers = num_params(model.model.language_model.layers)
    head = num_params(model.lm_head)
    vision = num_params(model.model.visual)
    products = []  # parameters x tokens of each prompt
    for p in prompts:
        patches = len(p.pixel_values) if p.image_embeds is None else 0
        products.append(layers * p.input_ids.shape[1] + vision * patches)
    products = torch.tensor(products, device=num_tokens.device)
    return 2 * (products + (layers + head) * num_tokens).double()


def update_passes(lora: bool) -> int:
    """How many forward passes a forward and a backward pass are worth. Backward takes two, for the
    gradients of inputs and of weights; with LoRA about one, because few weights have gradients."""
    return 2 if lora else 3


def log_completions(log: JsonlLog, row: dict, samples: list[Sample], texts: list[list[str]],
                    reward_parts: dict[str, Tensor], rewards: Tensor,
                    advantages: Tensor) -> None:
    """Write the completions of one of the step's groups. All ranks call this; one has the group.
    `rewards` and each part are (B, G), `advantages` (B, G, 1 or C)."""
    completions = []
    owner, b = divmod((row["step"] - 1) % (len(samples) * world_size()), len(samples))
    if rank() == owner:
        for g, text in enumerate(texts[b]):
            parts = {name: values[b, g].item() for name, values in reward_parts.items()}
            completions.append({"step": row["step"], "stage": row["stage"],
                                **sample_to_row(samples[b], log.path.parent),
                                "completion": text, "parts": parts,
                                "reward": rewards[b, g].item(),
                                "advantage": advantages[b, g, 0].item()})  # of the first token
    for completion in chain(*all_gather_object(completions)):
        log.write(completion)


def write_pages(out: Path, tasks: str) -> None:
    """curves.png and report.html of the steps so far, written by the first rank."""
    if rank() == 0:
        with errors_as_warnings("curves.png"):
            plot_curves([out], METRICS, out / "curves.png")
        with errors_as_warnings("report.html"):
            write_report(out / "report.html", read_entries(out / "samples.jsonl"),
                         f"GRPO on {tasks}: groups sampled in training")


class Console:
    """The lines that a run prints of its steps."""

    def __init__(self, total_steps: int, eval_every: int = 1) -> None:
        self.total_steps = total_steps
        self.eval_every = eval_every
        self.seconds = deque(maxlen=10)  # of the last steps
        self.without_signal = 0          # steps in a row
        self.has_warned = False

    def print_model(self, name: str, model: Qwen, image_size: int) -> None:
        sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
        trained = sum(size for size, is_trained in sizes if is_trained)
        print0(f"model: {name}, {sum(size for size, _ in sizes):,} parameters, {trained:,} of them "
               f"trained, images {image_size} px, attention "
               f"{'flash-attn' if flash_attn else 'SDPA'}")

    def eta(self, step: int, seconds: float) -> str:
        """The time that is left after a step, counted from 1, from the mean of the last ten."""
        self.seconds.append(seconds)
        left = (self.total_steps - step) * sum(self.seconds) / len(self.seconds)
        return f"ETA {timedelta(seconds=round(left))}"

    def print_step(self, row: dict, seconds: float, text: str, reward: Tensor) -> None:
        """The step's line, and now and then one of its completions with its reward."""
        eta = self.eta(row["step"], seconds)
        kl, grad = f"{row['kl']:.4f}", f"{row['grad_norm']:5.2f}"
        if row["zero_std_frac"] == 1:  # no group had signal: nothing was measured, nothing is wrong
            kl = grad = "-"
        print0(f"step {row['step']:4d}/{self.total_steps} {row['task']:6s} reward "
               f"{row['reward']:.3f}  accuracy {row['parts']['accuracy']:.3f}  kl {kl}  "
               f"entropy {row['entropy']:.3f}  len {row['len_mean']:4.1f}  grad {grad}  "
               f"{seconds:.2f} s  {eta}")
        if row["step"] == 1 or row["step"] % self.eval_every == 0:
            print0(f"    e.g. reward {reward:.3f} for {shorten(text, 134)}")
        self.warn_without_signal(row)

    def warn_without_signal(self, row: dict) -> None:
        """One warning in a run if nothing could be learned from its last steps."""
        advice = None
        if row["zero_std_frac"] == 1 and row["truncated_frac"] == 1:
            advice = ("all completions are cut off at --max-new-tokens; raise it, or teach the "
                      "model to answer first, with train_sft.py")
        elif row["zero_std_frac"] == 1:
            advice = ("all completions of a group earn the same reward; if the task is too hard, "
                      "teach it first, with train_sft.py, if it is too easy, change the data; or "
                      "raise --temperature or --group")
        self.without_signal = self.without_signal + 1 if advice else 0
        if self.without_signal == STEPS_WITHOUT_SIGNAL and not self.has_warned:
            self.has_warned = True
            warn(f"warning: nothing could be learned in {STEPS_WITHOUT_SIGNAL} steps: {advice}")

    def print_held_out(self, held_out: dict[str, Sequence[Sample]],
                       before: dict[str, dict[str, float]],
                       after: dict[str, dict[str, float]]) -> None:
        """The scores of each task before and after a stage."""
        for task, means in after.items():
            old = before.get(task, {})
            rows = [f"{name:12s}{old.get(name, math.nan):8.3f}{means[name]:8.3f}" for name in means]
            print0("\n".join([f"\n{task}: mean rewards over {len(held_out[task])} held-out samples",
                              f"{'':12s}{'before':>8s}{'after':>8s}", *rows]))
