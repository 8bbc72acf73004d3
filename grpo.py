"""Group Relative Policy Optimization: tensors in, tensors out. No models, no text, no images.

For each prompt, G completions are sampled. A completion's advantage says how much better its
reward is than the mean of its group. Log-probs move with the advantages; a clipped ratio, as in
PPO (Schulman et al. 2017), limits each move; a KL penalty holds it near a frozen reference model.

    GRPO       Shao et al. 2024, arXiv 2402.03300
    DAPO       Yu et al. 2025, arXiv 2503.14476: mean over tokens, not completions; wider upper clip
    Dr. GRPO   Liu et al. 2025, arXiv 2503.20783: no division by the group's std or by the length
    GSPO       Zheng et al. 2025, arXiv 2507.18071: one ratio per completion, normalised by length
    GeoVLM-R1  Fiaz et al. 2025, arXiv 2509.25026: one ratio per completion, not normalised

Shapes: B prompts, G completions each, C completion tokens (padded); b of the B prompts in a
micro-batch. `loss_mask` is True on the tokens that carry loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RATIO = 10.0  # beyond it is noise, and one overflowing exp would make the whole step NaN


def compute_advantages(
    rewards: Tensor,                             # (B, G), this rank's prompts
    reward_parts: dict[str, Tensor],             # {name: (B, G)}, unweighted
    mask: Tensor,                                # (B, G, C) True on the completions' tokens
    divide_by_std: bool,
    all_reduce_sum: Callable[[Tensor], Tensor],  # for statistics over all ranks
) -> tuple[Tensor, Tensor]:
    """A_i = r_i - mean(r) of the group, divided by std(r) + 1e-4 if divide_by_std (GRPO, 4.1.2).

    The division favours prompts that are nearly solved or nearly hopeless, so Dr. GRPO leaves it
    out. The std is unbiased (divisor G - 1), as in TRL.

    Returns the advantages, (B, G, 1), or (B, G, C) where each token has its own, and the groups to
    keep, (B,) bool; the others carry no loss. The unused arguments are for other estimators.
    """
    centered = rewards - rewards.mean(1, keepdim=True)
    advantages = centered / (rewards.std(1, keepdim=True) + 1e-4) if divide_by_std else centered
    return advantages[:, :, None], groups_with_signal(rewards)


def groups_with_signal(rewards: Tensor) -> Tensor:
    """(B, G) -> (B,) True where the rewards of a group differ. A group of equal rewards is left out
    of the loss: all its advantages are 0, but its KL penalty would still pull at the policy."""
    return rewards.amax(1) - rewards.amin(1) > 1e-6


def overlong_punishment(lengths: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """Completion lengths (B, G) in tokens -> rewards (B, G): 0 up to `buffer` tokens before
    max_new_tokens, from there linearly down to -1 at max_new_tokens (DAPO, eq. 13)."""
    return ((max_new_tokens - buffer - lengths.double()) / buffer).clamp(max=0)


def token_weights(loss_mask: Tensor, loss: str, max_new_tokens: int,
                  all_reduce_sum: Callable[[Tensor], Tensor] = lambda count: count) -> Tensor:
    """The weight w_it of each token in the loss, (B, G, C), over all prompts of a step.

        grpo     1 / (N |o_i|)   mean over N completions of the mean over tokens (GRPO, eq. 3); also
                                 for gspo and geovlm, whose one ratio then weighs 1 / N
        dapo     1 / sum |o_i|   mean over all tokens of the step that carry loss, as in verl, on
                                 which DAPO's code is built (its eq. 8 prints one for each group)
        dr_grpo  1 / (N C_max)   constant: it depends on no length (Dr. GRPO, section 3.2)

    N counts every completion of the step; one without loss adds 0. C_max is max_new_tokens.
    These are counts of the whole step over all ranks, from before it is split into micro-batches.
    So the losses of micro-batches and ranks simply add up, and their number changes nothing.
    """
    B, G, _ = loss_mask.shape
    if loss == "dapo":
        return loss_mask.float() / all_reduce_sum(loss_mask.sum()).clamp(min=1)
    N = all_reduce_sum(torch.tensor(B * G, device=loss_mask.device))
    if loss == "dr_grpo":
        return loss_mask.float() / (N * max_new_tokens)
    lengths = loss_mask.sum(2, keepdim=True).clamp(min=1)                  # (B, G, 1) |o_i|
    return loss_mask.float() / (N * lengths)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL[policy || reference] at each token: e^x - 1 - x with
    x = log pi_ref - log pi (GRPO, eq. 4; http://joschu.net/blog/kl-approx.html).

    Never negative; its mean over tokens sampled from the policy is KL[policy || reference]. Its
    mean gradient is that of KL[reference || policy]; near the reference the two agree.
    """
    # clamp before exp: after it, the gradient would be inf * 0 = NaN
    x = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return x.expm1() - x  # not exp() - 1: that rounds to below 0 where the two agree


def policy_loss(
    logprobs: Tensor,             # (b, G, C)
    old_logprobs: Tensor,         # (b, G, C), no gradient
    ref_logprobs: Tensor | None,  # (b, G, C), no gradient; None without a reference model
    advantages: Tensor,           # (b, G, 1) or (b, G, C)
    loss_mask: Tensor,            # (b, G, C)
    weights: Tensor,              # (b, G, C), from token_weights
    *,
    loss: str, clip_low: float, clip_high: float, beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the groups of a micro-batch, a scalar:

        L = - sum_it w_it [ min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - beta KL ]

    rho is the token's ratio pi / pi_old (GRPO, eq. 3); for gspo the geometric mean of these over
    the completion's tokens (GSPO, eq. 7); for geovlm their product pi(o|q) / pi_old(o|q), which a
    hundred tokens soon drive out of any clip range, so it is not the default. In the first
    inner step rho = 1. Also returns sums over the tokens with loss: how many were clipped, and KL.
    """
    # where, not a product with the mask: 0 * inf is NaN
    log_ratio = torch.where(loss_mask, logprobs - old_logprobs, 0.0)
    if loss == "gspo":
        lengths = loss_mask.sum(2, keepdim=True).clamp(min=1)              # (b, G, 1) |o_i|
        log_ratio = log_ratio.sum(2, keepdim=True) / lengths
    elif loss == "geovlm":
        log_ratio = log_ratio.sum(2, keepdim=True)
    rho = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(logprobs)
    # The smaller of two: a ratio that has moved the right way is clipped, one that has moved the
    # wrong way is not, so that it can come back.
    unclipped = rho * advantages
    clipped = rho.clamp(1 - clip_low, 1 + clip_high) * advantages
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else kl_k3(logprobs, ref_logprobs)
    token_loss = torch.where(loss_mask, -torch.minimum(unclipped, clipped) + beta * kl, 0.0)
    sums = {"clipped": ((clipped < unclipped) & loss_mask).sum(),
            "kl": torch.where(loss_mask, kl.detach(), 0.0).sum()}
    return (token_loss * weights).sum(), sums
