"""grpo.py against the papers, written once more in NumPy with plain loops over sequences and tokens."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image

import grpo
from flags import LOSSES
from metrics.training import step_metrics
from model import token_logprobs
from processing import collate, encode_chat
from rollout import Rollout, Sampler
from runtime.optimisation import pack_groups

B, G, C, C_MAX = 4, 3, 6, 10
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def case(spread=0.6, seed=0):
    """Log-probs of three models (policy with gradient), advantages (B, G, 1), and a mask of different lengths, one of them 0."""
    rng = np.random.default_rng(seed)
    old = rng.normal(-2, 1, (B, G, C))
    logprobs, reference = old + rng.normal(0, spread, old.shape), old + rng.normal(0, spread, old.shape)
    lengths = rng.integers(1, C + 1, (B, G))
    lengths[1, 2] = 0  # a truncated completion, left out of the loss
    mask = torch.from_numpy(np.arange(C) < lengths[:, :, None])
    logprobs, old, reference, advantage = map(torch.from_numpy, (logprobs, old, reference, rng.normal(0, 1, (B, G, 1))))
    return logprobs.requires_grad_(), old, reference, advantage, mask


def paper_loss(logprobs, old, reference, advantage, mask, loss, clip_low, clip_high, beta):
    """The objective of each paper, negated: sequence by sequence, token by token. (dapo: the mean over the tokens of the
    step, as in verl; eq. 8 prints one over the tokens of each group.)"""
    logprobs, old, reference, advantage, mask = (x.detach().numpy() for x in (logprobs, old, reference, advantage, mask))
    advantage = np.broadcast_to(advantage, mask.shape)
    sequences = [i for i in np.ndindex(mask.shape[:2]) if mask[i].any()]
    N, tokens, total = mask.shape[0] * mask.shape[1], int(mask.sum()), 0.0  # a sequence left out of the loss is a zero
    for i in sequences:
        length, objective = int(mask[i].sum()), 0.0
        ratios = [math.exp(logprobs[i][t] - old[i][t]) for t in range(length)]
        if loss == "gspo":  # (pi / pi_old)^(1 / |o|) for every token
            ratios = [math.prod(ratios) ** (1 / length)] * length
        if loss == "geovlm":  # pi(o|q) / pi_old(o|q): the mean over K completions of min(rho A, clip(rho) A)
            ratios = [math.prod(ratios)] * length
        for t in range(length):
            to_reference = math.exp(reference[i][t] - logprobs[i][t])
            clipped = min(max(ratios[t], 1 - clip_low), 1 + clip_high)
            objective += min(ratios[t] * advantage[i][t], clipped * advantage[i][t])
            objective -= beta * (to_reference - math.log(to_reference) - 1)
        total += objective / {"grpo": N * length, "gspo": N * length, "geovlm": N * length,
                              "dapo": tokens, "dr_grpo": N * C_MAX}[loss]
    return -total


# ----------------------------------------------------------------------------------------------------------------------
# Advantages

def advantages(rewards, divide_by_std):
    """(B, G), of the default estimator."""
    B, G = rewards.shape
    parts, mask = {"format": torch.ones(B, G), "accuracy": rewards}, torch.ones(B, G, C, dtype=torch.bool)
    values, keep = grpo.compute_advantages(rewards, parts, mask, divide_by_std, lambda x: x)
    assert values.shape == (B, G, 1) and torch.equal(keep, grpo.groups_with_signal(rewards))
    return values[:, :, 0]


def test_advantages_are_relative_to_the_group():
    """With the unbiased std, as TRL; the biased one would make them 7 % larger at G = 8."""
    rewards = np.random.default_rng(0).random((5, 8))
    centered = rewards - rewards.mean(1, keepdims=True)
    expected = centered / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(advantages(torch.from_numpy(rewards), divide_by_std=True), expected, rtol=1e-12)
    np.testing.assert_allclose(advantages(torch.from_numpy(rewards), divide_by_std=False), centered, rtol=1e-12)


@pytest.mark.parametrize("reward", [0.0, 1.0, 1.1, 1 / 3])
@pytest.mark.parametrize("size", [2, 7, 16])
def test_equal_rewards_have_no_advantage(reward, size):
    rewards = torch.full((1, size), reward)
    for divide in (True, False):
        assert advantages(rewards, divide).abs().max() < 1e-2  # 0 but for rounding; the group is masked anyway
    assert not grpo.groups_with_signal(rewards).any()


def test_groups_with_signal_are_those_whose_rewards_differ():
    rewards = torch.tensor([[0, 0, 0], [0, 0, 0.01], [2, 2, 2], [0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
    assert grpo.groups_with_signal(rewards).tolist() == [False, True, False, False]


@pytest.mark.parametrize("loss", LOSSES)
def test_group_of_equal_rewards_gets_no_gradient_not_even_from_the_kl(loss):
    """In peers the KL penalty of such groups still pulls the policy back to the reference."""
    logprobs, old, reference, _, mask = case()
    rewards = torch.rand(B, G)
    rewards[2] = 0.7
    mask = mask & grpo.groups_with_signal(rewards)[:, None, None]
    weights = grpo.token_weights(mask, loss, C_MAX)
    advantage = advantages(rewards, divide_by_std=True)[:, :, None]
    total, sums = grpo.policy_loss(logprobs, old, reference, advantage, mask, weights, loss=loss, beta=1.0, **CLIP)
    total.backward()
    assert not logprobs.grad[2].any() and logprobs.grad[[0, 1, 3]].any()
    assert sums["kl"] == torch.where(mask, grpo.kl_k3(logprobs, reference), 0.0).sum()


# ----------------------------------------------------------------------------------------------------------------------
# Loss

@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_the_paper(loss, beta):
    clipped = 0
    for seed in range(5):
        logprobs, old, reference, advantage, mask = case(seed=seed)
        expected = paper_loss(logprobs, old, reference, advantage, mask, loss, beta=beta, **CLIP)
        weights = grpo.token_weights(mask, loss, C_MAX)
        reference = reference if beta else None
        ours, sums = grpo.policy_loss(logprobs, old, reference, advantage, mask, weights, loss=loss, beta=beta, **CLIP)
        assert ours.item() == pytest.approx(expected, rel=1e-5, abs=1e-8)
        clipped += sums["clipped"]
    assert clipped > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_each_token_may_have_its_own_advantage(loss):
    logprobs, old, reference, _, mask = case()
    advantage = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (B, G, C)))
    expected = paper_loss(logprobs, old, reference, advantage, mask, loss, beta=0.3, **CLIP)
    weights = grpo.token_weights(mask, loss, C_MAX)
    ours, _ = grpo.policy_loss(logprobs, old, reference, advantage, mask, weights, loss=loss, beta=0.3, **CLIP)
    assert ours.item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_equals_differences_of_the_paper(loss, beta):
    logprobs, old, reference, advantage, mask = case()
    weights = grpo.token_weights(mask, loss, C_MAX)
    grpo.policy_loss(logprobs, old, reference, advantage, mask, weights, loss=loss, beta=beta, **CLIP)[0].backward()
    numeric = torch.zeros_like(logprobs)
    for i in np.ndindex(B, G, C):
        for step in (1e-6, -1e-6):
            moved = logprobs.detach().clone()
            moved[i] += step
            numeric[i] += paper_loss(moved, old, reference, advantage, mask, loss, beta=beta, **CLIP) / (2 * step)
    torch.testing.assert_close(logprobs.grad, numeric.detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_gradient_is_that_of_the_weighted_advantages(loss):
    """old = logprobs: the ratio is 1, its gradient is not 0, and nothing is clipped. The gradient of a product of ratios is
    the sum over its tokens, not the mean: |o| times as large."""
    logprobs, _, _, advantage, mask = case()
    weights = grpo.token_weights(mask, loss, C_MAX)
    total, sums = grpo.policy_loss(logprobs, logprobs.detach(), None, advantage, mask, weights, loss=loss, beta=0.0, **CLIP)
    total.backward()
    factor = mask.sum(2, keepdim=True) if loss == "geovlm" else 1
    torch.testing.assert_close(logprobs.grad, -advantage * weights * factor)
    assert sums["clipped"] == 0


@pytest.mark.parametrize("advantage, ratio, clipped", [
    (1, 1.27, False), (1, 1.29, True), (1, 0.5, False), (-1, 0.81, False), (-1, 0.79, True), (-1, 1.5, False)])
@pytest.mark.parametrize("loss", LOSSES)
def test_clip_stops_steps_further_in_the_advantages_direction_only(loss, advantage, ratio, clipped):
    """Above at 1.28 where the advantage is positive, below at 0.8 where it is negative; a way back always has gradient."""
    log_ratio = math.log(ratio) / (2 if loss == "geovlm" else 1)  # the product over two tokens
    logprobs = torch.full((1, 1, 2), log_ratio, requires_grad=True)
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    total, sums = grpo.policy_loss(logprobs, torch.zeros(1, 1, 2), None, torch.tensor([[[float(advantage)]]]), mask,
                                   grpo.token_weights(mask, loss, 2), loss=loss, beta=0.0, clip_low=0.2, clip_high=0.28)
    total.backward()
    bound = (1.28 if advantage > 0 else 0.8) if clipped else ratio
    assert total.item() == pytest.approx(-advantage * bound)
    assert sums["clipped"] == 2 * clipped and (logprobs.grad == 0).all() == clipped


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_does_not_poison_the_loss(loss, bad):
    """0 * inf is NaN: one padded token would end the run."""
    logprobs, old, reference, advantage, mask = case()
    weights = grpo.token_weights(mask, loss, C_MAX)
    def run(*inputs):
        return grpo.policy_loss(*inputs, advantage, mask, weights, loss=loss, beta=0.3, **CLIP)
    clean, _ = run(logprobs, old, reference)
    clean.backward()
    for place in range(3):
        inputs = [x.detach().masked_fill(~mask, bad if i == place else 0.0) for i, x in enumerate((logprobs, old, reference))]
        total, sums = run(inputs[0].requires_grad_(), *inputs[1:])
        total.backward()
        torch.testing.assert_close(total, clean)
        torch.testing.assert_close(inputs[0].grad, logprobs.grad)
        assert sums["kl"].isfinite()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ratio", [1000.0, -1000.0])
def test_stray_tokens_keep_the_loss_finite(loss, ratio):
    logprobs, old, reference, advantage, mask = case()
    with torch.no_grad():
        logprobs[0, 0, 0] = old[0, 0, 0] + ratio
    weights = grpo.token_weights(mask, loss, C_MAX)
    total, _ = grpo.policy_loss(logprobs, old, reference, advantage, mask, weights, loss=loss, beta=0.3, **CLIP)
    total.backward()
    assert total.isfinite() and logprobs.grad.isfinite().all()


def test_product_of_ratios_leaves_the_clip_range_that_each_token_keeps():
    """Why it is not the default: at 200 tokens, each 0.2 % more likely, the ratio is 1.49, and the completion has no gradient."""
    logprobs, mask = torch.full((1, 1, 200), 0.002), torch.ones(1, 1, 200, dtype=torch.bool)
    clipped = {}
    for loss in ("grpo", "gspo", "geovlm"):
        inputs = logprobs, torch.zeros(1, 1, 200), None, torch.ones(1, 1, 1), mask, grpo.token_weights(mask, loss, 200)
        clipped[loss] = grpo.policy_loss(*inputs, loss=loss, beta=0.0, **CLIP)[1]["clipped"].item()
    assert clipped == {"grpo": 0, "gspo": 0, "geovlm": 200}


# ----------------------------------------------------------------------------------------------------------------------
# Overlong punishment

@pytest.mark.parametrize("longest, buffer", [(96, 16), (100, 1), (20, 20), (20480, 4096)])
def test_overlong_punishment_equals_dapo(longest, buffer):
    """Eq. 13, case by case, with L_max = longest and L_cache = buffer."""
    lengths = np.unique(np.linspace(1, longest, 500).astype(int)).reshape(1, -1)
    expected = [0 if length <= longest - buffer else ((longest - buffer) - length) / buffer for length in lengths[0]]
    found = grpo.overlong_punishment(torch.from_numpy(lengths), longest, buffer)
    np.testing.assert_allclose(found.numpy(), [expected], rtol=1e-12)
    assert found[0, -1] == -1


# ----------------------------------------------------------------------------------------------------------------------
# KL

def test_kl_is_k3_never_negative_and_zero_at_equality():
    logprobs, _, reference, *_ = case(spread=2.0)
    kl, ratio = grpo.kl_k3(logprobs, reference), (reference - logprobs).exp()
    torch.testing.assert_close(kl, ratio - ratio.log() - 1)
    assert (kl >= 0).all() and not grpo.kl_k3(reference, reference).any()


@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0])
def test_kl_of_far_models_has_finite_value_and_gradient(log_ratio):
    """A clamp after the exp gives a finite value and still a NaN gradient."""
    logprobs = torch.zeros(3, requires_grad=True)
    kl = grpo.kl_k3(logprobs, logprobs.detach() + log_ratio)
    kl.sum().backward()
    assert kl.isfinite().all() and (kl > 1).all() and logprobs.grad.isfinite().all()


def test_a_schedule_of_beta_that_ends_at_0_still_measures_the_kl():
    """It read 0, as if the policy were the reference again."""
    logprobs, old, reference, advantage, mask = case()
    weights = grpo.token_weights(mask, "grpo", C_MAX)
    sums = grpo.policy_loss(logprobs, old, reference, advantage, mask, weights, loss="grpo", beta=0.0, **CLIP)[1]
    assert sums["kl"] == torch.where(mask, grpo.kl_k3(logprobs, reference), 0.0).sum() > 0


def test_kl_estimates_the_true_kl():
    """Its mean over samples of the policy is KL[policy || reference]; with the ratio upside down it would be another."""
    policy, reference = (torch.randn(10, generator=torch.Generator().manual_seed(s)).mul(0.7).log_softmax(0) for s in (0, 1))
    torch.testing.assert_close((policy.exp() * grpo.kl_k3(policy, reference)).sum(), (policy.exp() * (policy - reference)).sum())


# ----------------------------------------------------------------------------------------------------------------------
# Weights and micro-batches

@pytest.mark.parametrize("loss, total", [("grpo", 11 / 12), ("dapo", 1), ("gspo", 11 / 12), ("geovlm", 11 / 12)])
def test_weights_of_a_step_are_a_mean(loss, total):
    """Over all 12 sequences: the one left out counts as a zero, or fewer live ones would mean a larger step. DAPO: over tokens."""
    mask = case()[-1]
    weights = grpo.token_weights(mask, loss, C_MAX)
    assert weights.sum().item() == pytest.approx(total) and not weights[~mask].any()


def test_dr_grpo_weighs_a_token_alike_in_long_and_short_completions():
    mask = case()[-1]
    weights = grpo.token_weights(mask, "dr_grpo", C_MAX)
    assert weights[mask].unique().tolist() == pytest.approx([1 / (B * G * C_MAX)])


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_to_learn_is_zero_not_nan(loss):
    logprobs, old, reference, advantage, mask = case()
    mask = torch.zeros_like(mask)
    weights = grpo.token_weights(mask, loss, C_MAX)
    total, _ = grpo.policy_loss(logprobs, old, reference, advantage, mask, weights, loss=loss, beta=0.3, **CLIP)
    total.backward()
    assert total == 0 and not logprobs.grad.any()


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_change_neither_loss_nor_gradient(loss, size):
    """Normalised per micro-batch, as trainers did for years, the tokens of short completions would weigh more."""
    logprobs, old, reference, advantage, mask = case()
    weights = grpo.token_weights(mask, loss, C_MAX)
    inputs = logprobs, old, reference, advantage, mask, weights
    parts = [grpo.policy_loss(*(x[i : i + size] for x in inputs), loss=loss, beta=0.3, **CLIP) for i in range(0, B, size)]
    total = sum(part for part, _ in parts)
    total.backward()
    gradient, logprobs.grad = logprobs.grad, None
    whole, sums = grpo.policy_loss(*inputs, loss=loss, beta=0.3, **CLIP)
    whole.backward()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradient, logprobs.grad)
    for name in sums:
        torch.testing.assert_close(sum(part[name] for _, part in parts), sums[name])


# ----------------------------------------------------------------------------------------------------------------------
# A training step on the tiny model

@pytest.fixture(scope="module")
def step(tiny):
    """(policy, reference, prompts, rollout, advantages): one step's rollout, on the CPU, some completions cut off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        torch.manual_seed(0)
        policy, processor = copy.deepcopy(tiny[0]).cpu(), tiny[1]
        reference = copy.deepcopy(policy).requires_grad_(False)
        with torch.no_grad():
            policy.model.language_model.norm.weight += 0.1 * torch.randn(128)
        images = np.random.default_rng(0).integers(0, 256, (B, 56, 56, 3), dtype=np.uint8)
        prompts = [encode_chat(processor, "ship " * n + "<|vision_start|><|image_pad|><|vision_end|>", [Image.fromarray(image)])
                   for n, image in enumerate(images)]
        sampler = Sampler(policy, processor)
        stops = torch.tensor(sampler.stop_ids)
        with policy.lm_head.register_forward_hook(lambda _, x, y: y.index_add(-1, stops, torch.full((len(y), 2), 3.5))):
            rollout = sampler.generate(collate(prompts), C, G, 1.0, torch.rand(B * G, C))
        assert 0 < rollout.stopped.sum() < B * G and not rollout.mask.all()
        yield policy, reference, prompts, rollout, torch.randn(B, G, 1)


def gradient(step, size, loss, mask=None, tokens=None, advantages=None):
    """The update of train_grpo.py with `size` groups a micro-batch -> gradient of every parameter."""
    policy, reference, prompts, rollout, advantage = step
    mask = rollout.mask if mask is None else mask
    tokens = rollout.tokens if tokens is None else tokens
    advantage = advantage if advantages is None else advantages
    weights = grpo.token_weights(mask, loss, C_MAX)
    for i in range(0, B, size):
        part = slice(i, i + size)
        inputs = collate(prompts[part]), tokens[part], mask[part]
        logprobs = token_logprobs(policy, *inputs)
        with torch.no_grad():
            ref = token_logprobs(reference, *inputs)
        inputs = logprobs, logprobs.detach(), ref, advantage[part], mask[part], weights[part]
        grpo.policy_loss(*inputs, loss=loss, beta=0.3, **CLIP)[0].backward()
    grads = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    return grads


@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_changes_no_parameter_gradient(step, loss):
    """One group at a time, or padded beside three others in one forward pass."""
    single, together = gradient(step, 1, loss), gradient(step, B, loss)
    for name, expected in together.items():
        torch.testing.assert_close(single[name], expected, rtol=0, atol=1e-5 * max(1e-3, expected.abs().max().item()), msg=name)
    assert max(g.abs().max() for g in together.values()) > 1e-2


def test_masked_truncated_completions_give_no_gradient(step):
    """Whatever they say and however they are rewarded."""
    _, _, _, rollout, advantage = step
    cut = ~rollout.stopped
    mask = rollout.mask & rollout.stopped[:, :, None]
    other = torch.where(cut[:, :, None], rollout.tokens.flip(2), rollout.tokens)
    expected = gradient(step, 1, "grpo", mask)
    for name, grad in gradient(step, 1, "grpo", mask, other, torch.where(cut[:, :, None], 100.0, advantage)).items():
        assert torch.equal(grad, expected[name]), name
    assert any(not torch.equal(grad, expected[name]) for name, grad in gradient(step, 1, "grpo").items())


@pytest.mark.parametrize("max_tokens, passes", [(1, 5), (120, 4), (280, 3), (10_000, 1)])
def test_passes_hold_every_group_once_and_no_more_than_fits(max_tokens, passes):
    """All groups of a pass are padded to its longest prompt, and to its longest completions."""
    sizes = {3: (60, 10), 1: (80, 40), 0: (20, 20), 7: (10, 80), 5: (15, 30)}
    packed = pack_groups(sizes, max_tokens)
    assert sorted(group for groups in packed for group in groups) == sorted(sizes)
    for groups in packed:
        padded = len(groups) * (max(sizes[g][0] for g in groups) + max(sizes[g][1] for g in groups))
        assert len(groups) == 1 or padded <= max_tokens
    assert len(packed) == passes and pack_groups({}, max_tokens) == []


# ----------------------------------------------------------------------------------------------------------------------
# Metrics

def test_metrics_of_a_step_are_those_of_numpy():
    """Two groups of two; the second one has no signal, so it is not in the loss. Two inner steps of two micro-batches."""
    rng, lengths = np.random.default_rng(0), np.array([[3, 1], [2, 3]])
    mask = np.arange(3) < lengths[:, :, None]
    loss_mask = mask & np.array([True, False])[:, None, None]
    entropy, stopped = rng.random((2, 2, 3)) * mask, np.array([[True, True], [True, False]])
    rewards, accuracy = np.array([[2.0, 0.5], [1.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 0.5]])
    kl, clipped, gaps = rng.random(4), np.array([0.0, 0.0, 1.0, 2.0]), rng.random(2)
    losses, grad_norms = rng.random(2), rng.random(2)
    rollout = Rollout(torch.zeros(2, 2, 3), *map(torch.from_numpy, (mask, np.zeros((2, 2, 3)), entropy, stopped)))
    stats = [{"kl": torch.tensor(k), "clipped": torch.tensor(c)} for k, c in zip(kl, clipped)]
    row = step_metrics(rollout, torch.from_numpy(rewards), {"accuracy": torch.from_numpy(accuracy)}, 3, torch.from_numpy(loss_mask),
                       stats, list(torch.from_numpy(gaps)), list(torch.from_numpy(losses)), list(torch.from_numpy(grad_norms)))
    expected = {"reward": rewards.mean(), "reward_std": rewards.std(1, ddof=1).mean(), "kl": kl.sum() / (2 * 4),
                "entropy": entropy[mask].mean(), "clip_frac": 3 / (2 * 4), "sampling_gap": gaps.sum() / 4,
                "len_mean": lengths.mean(), "truncated_frac": 1 / 4, "zero_std_frac": 1 / 2, "loss": losses.mean(),
                "grad_norm": grad_norms.mean()}
    assert row.pop("parts") == pytest.approx({"accuracy": accuracy.mean()}) and row.pop("resampled") == 3
    assert row == pytest.approx(expected)
