"""Group Relative Policy Optimization: tensors in, tensors out. Nothing here knows of models, text or images.

G completions are sampled for one prompt; a completion's advantage is how much better its reward is than its group's
mean. The policy is pushed along it by PPO's clipped ratio and held near a frozen reference by a KL penalty.

    GRPO      Shao et al. 2024, arXiv 2402.03300
    DAPO      Yu et al. 2025, arXiv 2503.14476: mean over tokens instead of sequences, the upper clip higher than the lower
    Dr. GRPO  Liu et al. 2025, arXiv 2503.20783: no division by the group's std nor by a completion's length
    GSPO      Zheng et al. 2025, arXiv 2507.18071: one ratio per sequence

Shapes: B prompts, G completions each, C completion tokens. `mask` is True on the tokens that carry loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo")
MAX_LOG_RATIO = 10.0  # a larger one is noise; its exp may overflow, and one stray token would make the whole step NaN


def advantages(rewards: Tensor, divide_by_std: bool) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4), over the group: (B, G) -> (B, G). GRPO section 4.1.2.

    The std is the unbiased one (divisor G - 1), as in TRL. Without it, A_i = r_i - mean(r): Dr. GRPO, which finds that
    the division favours prompts that are nearly solved or nearly hopeless.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if divide_by_std else centred


def learning_groups(rewards: Tensor) -> Tensor:
    """(B, G) -> (B,) True where the rewards of a group differ. Where they do not, all advantages are 0 and there is
    nothing to learn; such a group is masked altogether, or its KL penalty would still pull at the policy."""
    return rewards.amax(1) - rewards.amin(1) > 1e-6


def token_weights(mask: Tensor, loss: str, max_tokens: int,
                  sum_over_ranks: Callable[[Tensor], Tensor] = lambda count: count) -> Tensor:
    """What each token's loss counts for: (B, G, C), over *all* prompts of an optimiser step.

        grpo, gspo   1 / (N |o_i|)   mean over the N sequences of the mean over their tokens (GRPO eq. 3)
        dapo         1 / sum |o_i|   mean over all tokens (DAPO eq. 8)
        dr_grpo      1 / (N C_max)   a constant, so that length does not change a token's weight (Dr. GRPO, section 3.2)

    N counts every sampled sequence: one without loss (masked altogether) is a zero in the mean. DAPO draws new groups in
    place of those that have nothing to teach; here none are drawn, and its mean is over the tokens that do carry loss.
    Taken before the step is cut into micro-batches and over all ranks that share it, so neither their number changes
    anything: their losses simply add up.
    """
    lengths = mask.sum(2, keepdim=True)                    # (B, G, 1) |o_i|
    if loss == "dapo":
        return mask / sum_over_ranks(mask.sum()).clamp(min=1)
    N = sum_over_ranks(torch.tensor(mask.shape[0] * mask.shape[1], device=mask.device))
    return mask / (N * (max_tokens if loss == "dr_grpo" else lengths.clamp(min=1)))


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL[policy || reference] at each token: e^x - 1 - x with x = log ref - log policy. Never
    negative, and its mean over tokens of the policy is the KL. GRPO eq. 4, http://joschu.net/blog/kl-approx.html. The clamp
    stands before the exp: after it, the gradient would still be inf * 0 = NaN."""
    x = (reference - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return x.expm1() - x  # expm1: exp() - 1 would round to below 0 where the two agree


def policy_loss(logprobs: Tensor, old: Tensor, reference: Tensor | None, advantage: Tensor, mask: Tensor, weights: Tensor, *,
                loss: str, clip_low: float, clip_high: float, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some groups of the step, and the sums behind its metrics.

        L = - sum_it w_it [ min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - beta KL ]

    rho is the ratio pi / pi_old of the token (GRPO eq. 3), or for gspo the geometric mean of the sequence's ratios
    (GSPO eq. 7). On the first pass over a rollout old = logprobs, so rho = 1 and the gradient is A grad log pi.

    logprobs, old, reference (b, G, C), the latter two without gradient; advantage (b, G); mask, weights (b, G, C): the
    groups' part of `token_weights`. beta 0 needs no reference. Returns a scalar, and detached sums over the masked
    tokens: clipped, kl.
    """
    log_ratio = torch.where(mask, logprobs - old, 0.0)     # where, not *: a padded token's 0 times inf would be NaN
    if loss == "gspo":
        log_ratio = (log_ratio.sum(2, keepdim=True) / mask.sum(2, keepdim=True).clamp(min=1)).expand_as(logprobs)
    rho = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    A = advantage.unsqueeze(2)                             # (b, G, 1): one advantage for all tokens of a completion
    free, clipped = rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A
    kl = kl_k3(logprobs, reference) if beta else torch.zeros_like(logprobs)
    L = torch.where(mask, -torch.minimum(free, clipped) + beta * kl, 0.0).mul(weights).sum()
    return L, {"clipped": ((clipped < free) & mask).sum(), "kl": kl.detach()[mask].sum()}
