"""Each step of the training scripts: as plain transformers and the papers' formulas have it, with what the flags ask for."""

import itertools
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import grpo
import train_grpo
import train_sft
from conftest import GRPO, SFT, rows
from data import get_batch, load_samples
from pretrained import load_model
from processing import encode
from sample import format_target
from test_scripts import Killed, here

# ----------------------------------------------------------------------------------------------------------------------
# The same step from independent code

def test_sft_loss_is_that_of_transformers_on_target_and_end_of_turn(sft, dataset, tmp_path, monkeypatch):
    """Its `labels=`, -100 on the prompt; the mean over all tokens of the batch, of several micro-batches."""
    here(monkeypatch, train_sft.main, "--task", "det,cls", "--model", sft / "model", "--data", dataset, "--steps", 1, "--batch", 4,
         "--micro-batch", 3, "--heldout", 0, "--out", tmp_path)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(sft / "model")
    processor, total, count = load_model(str(sft / "model"))[1], 0.0, 0
    banned = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    plain.lm_head.register_forward_hook(lambda _, inputs, logits: logits.index_fill(2, torch.tensor(banned), -1e9))
    data = [load_samples(str(dataset), task, 112, split="train") for task in ("det", "cls")]
    for sample in get_batch(data, 0, 4, (0,)):
        prompt, (target, end, _) = encode(processor, sample), format_target(sample).partition("<|im_end|>")
        target = processor.tokenizer(target + end, return_tensors="pt")["input_ids"]
        ids = torch.cat([prompt.input_ids, target], 1)
        with torch.no_grad():
            loss = plain(input_ids=ids, labels=ids.index_fill(1, torch.arange(prompt.input_ids.shape[1]), -100),
                         mm_token_type_ids=(ids == banned[2]).int(), pixel_values=prompt.pixel_values,
                         image_grid_thw=prompt.image_grid_thw).loss
        total, count = total + loss.item() * target.numel(), count + target.numel()
    assert rows(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("loss, clip_norm, weight_decay, more", [
    ("grpo", 0.05, 0.1, ["--divide-by-std"]), ("dapo", 1.0, 0.0, ["--mask-truncated", "--max-new-tokens", 18, "--pack-tokens", 1]),
    ("gspo", 1.0, 0.0, [])])
def test_grpo_steps_are_those_of_plain_transformers_and_the_papers_formulas(
        loss, clip_norm, weight_decay, more, sft, dataset, tmp_path, monkeypatch):
    """Two steps of two inner steps, again from the papers: one completion at a time, with transformers' own forward and AdamW.
    Loss, KL, clipped tokens and gradient norm have to agree. No test noticed when the script swapped --clip-low and --clip-high."""
    rollouts, generate = [], train_grpo.Sampler.generate

    def recorded(self, prompts, *args):
        rollouts.append((prompts, generate(self, prompts, *args)))
        return rollouts[-1][1]

    def parts_of(text, *_, **__):  # they differ within each group
        return {"format": len(text) % 3 / 2, "accuracy": text.count("e") / 10}
    monkeypatch.setattr(train_grpo.Sampler, "generate", recorded)
    monkeypatch.setattr(train_grpo, "score_completion", parts_of)
    here(monkeypatch, train_grpo.main, "--task", "det+cls", "--model", sft / "model", "--data", dataset, "--prompts", 3, "--group", 4,
         "--max-new-tokens", 32, "--steps", 2, "--inner-steps", 2, "--lr", 4e-4, "--warmup", 1, "--temperature", 1.2, "--beta", 0.3,
         "--clip-low", 0.02, "--clip-high", 0.2, "--format-weight", 0.5, "--loss", loss, "--clip-norm", clip_norm,
         "--weight-decay", weight_decay, *more, "--heldout", 0, "--out", tmp_path)
    policy, reference = (Qwen2_5_VLForConditionalGeneration.from_pretrained(sft / "model") for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.99), weight_decay=weight_decay)
    tokenizer = load_model(str(sft / "model"))[1].tokenizer
    banned = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])

    def logprobs_of(model, b, completion):
        prompt = prompts.input_ids[b : b + 1, : prompts.lengths[b]]
        ids = torch.cat([prompt, completion[None]], 1)
        logits = model(input_ids=ids, mm_token_type_ids=(ids == banned[2]).int(), pixel_values=prompts.pixel_values.chunk(3)[b],
                       image_grid_thw=prompts.image_grid_thw[b : b + 1]).logits[0, prompt.shape[1] - 1 : -1]
        logprobs = (logits.index_fill(1, torch.tensor(banned), -1e9) / 1.2).log_softmax(-1)
        return logprobs.gather(1, completion[:, None])[:, 0]

    for row, lr, (prompts, rollout) in zip(rows(tmp_path / "metrics.jsonl"), (2e-4, 4e-4), rollouts, strict=True):
        completions = {i: rollout.tokens[i][rollout.mask[i]] for i in itertools.product(range(3), range(4))}
        texts = [tokenizer.decode(c[:-1] if rollout.stopped[i] else c) for i, c in completions.items()]
        rewards = np.array([0.5 * parts_of(text)["format"] + parts_of(text)["accuracy"] for text in texts]).reshape(3, 4)
        advantages = rewards - rewards.mean(1, keepdims=True)
        if "--divide-by-std" in more:
            advantages /= rewards.std(1, ddof=1, keepdims=True) + 1e-4
        completions = {i: completion for i, completion in completions.items() if np.ptp(rewards[i[0]]) > 0
                       and (rollout.stopped[i] or "--mask-truncated" not in more)}
        num_tokens = sum(map(len, completions.values()))
        old, losses, norms, clipped, kls = {}, [], [], [], []
        for _ in range(2):
            total = 0
            for i, completion in completions.items():
                logprobs, A = logprobs_of(policy, i[0], completion), advantages[i]
                log_rho = logprobs - old.setdefault(i, logprobs.detach())
                rho = (log_rho.mean().expand_as(log_rho) if loss == "gspo" else log_rho).exp()
                with torch.no_grad():
                    x = logprobs_of(reference, i[0], completion)
                kl = (x - logprobs).exp() - (x - logprobs) - 1
                weight = 1 / num_tokens if loss == "dapo" else 1 / (12 * len(completion))
                total -= weight * (torch.minimum(rho * A, rho.clamp(0.98, 1.2) * A) - 0.3 * kl).sum()
                clipped += (rho > 1.2 if A > 1e-6 else rho < (0.98 if A < -1e-6 else 0)).tolist()
                kls += kl.tolist()
            total.backward()
            losses.append(total.item())
            norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), clip_norm).item())
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-3)
        assert row["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-3)
        assert row["kl"] == pytest.approx(np.mean(kls), rel=1e-3)
        assert row["clip_frac"] == pytest.approx(np.mean(clipped), abs=0.005) and row["clip_frac"] > 0


# ----------------------------------------------------------------------------------------------------------------------
# What reaches the loader, the sampler, the reward and the optimiser

def by_length(text, *_, **__):
    """A reward that every group can raise: the tests' model has learned det, and can hardly learn cls."""
    return {"format": 0.0, "accuracy": -len(text) / 100}


@pytest.mark.parametrize("main, flags", [
    (train_grpo.main, ["--task", "cls", *GRPO]), (train_sft.main, ["--task", "det,cls", *SFT, "--steps", 3])])
def test_optimiser_has_the_rate_of_the_log_the_weight_decay_and_a_clipped_gradient(main, flags, sft, dataset, tmp_path, monkeypatch):
    steps, step = [], torch.optim.AdamW.step

    def recorded(self, *args, **options):
        group, = self.param_groups
        norm = torch.nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None]).item()
        if group["lr"]:  # a checkpoint makes the moments by a step of rate 0
            steps.append((group["lr"], group["weight_decay"], norm))
        return step(self, *args, **options)
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    monkeypatch.setattr(train_grpo, "score_completion", by_length)
    here(monkeypatch, main, *flags, "--model", sft / "model", "--data", dataset, "--warmup", 1, "--clip-norm", 0.01,
         "--weight-decay", 0.05, "--heldout", 0, "--out", tmp_path)
    log = rows(tmp_path / "metrics.jsonl")
    assert [lr for lr, *_ in steps] == [row["lr"] for row in log] and len({row["lr"] for row in log}) > 1
    assert all(decay == 0.05 and norm == pytest.approx(0.01, rel=1e-3) for _, decay, norm in steps)


def test_every_token_with_loss_is_in_a_micro_batch(sft, dataset, tmp_path, monkeypatch):
    """Also where its first group, that of the longest prompt, has not the longest completions."""
    seen, expected, longest = [], [], set()
    policy_loss, token_weights = grpo.policy_loss, grpo.token_weights

    def recorded(mask, *args):
        expected.append(mask.sum().item())
        longest.update(mask.sum(2).amax(1).tolist())
        return token_weights(mask, *args)
    monkeypatch.setattr(grpo, "token_weights", recorded)
    monkeypatch.setattr(grpo, "policy_loss", lambda *args, **flags: seen.append(args[4].sum().item()) or policy_loss(*args, **flags))
    monkeypatch.setattr(train_grpo, "score_completion", by_length)
    monkeypatch.setattr(train_grpo, "pack_groups", lambda sizes, _: [sorted(sizes, key=sizes.get)])
    here(monkeypatch, train_grpo.main, "--task", "cls", "--model", sft / "model", "--data", dataset, *GRPO, "--group", 2, "--prompts", 8,
         "--heldout", 0, "--out", tmp_path)
    assert seen == expected and len(longest - {0}) > 1


def test_length_fraction_of_a_reward_is_that_of_max_new_tokens(sft, dataset, tmp_path, monkeypatch):
    fractions = []
    monkeypatch.setattr(train_grpo, "score_completion", lambda text, _, fraction, **__: fractions.append(fraction) or by_length(text))
    here(monkeypatch, train_grpo.main, "--task", "cls", "--model", sft / "model", "--data", dataset, *GRPO, "--max-new-tokens", 128,
         "--heldout", 0, "--out", tmp_path)
    assert 128 * np.mean(fractions) == pytest.approx(np.mean([row["len_mean"] for row in rows(tmp_path / "metrics.jsonl")]))


def test_held_out_samples_are_sampled_and_rewarded_as_those_of_training(sft, dataset, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_grpo, "held_out_by_task", lambda *args, **models: seen.append((args[3], models)) or {})
    here(monkeypatch, train_grpo.main, "--task", "cls", "--reward", "cls=jaccard_reward", "--temperature", 0.7, "--model", sft / "model",
         "--data", dataset, *GRPO, "--out", tmp_path)
    assert seen and all(temperature == 0.7 and "cls" in models["task_rewards"] for temperature, models in seen)


def test_grpo_raises_the_reward(sft, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train_grpo, "score_completion", by_length)
    here(monkeypatch, train_grpo.main, "--task", "cls", "--model", sft / "model", "--data", dataset, *GRPO, "--steps", 6,
         "--heldout", 0, "--out", tmp_path)
    reward = [row["reward"] for row in rows(tmp_path / "metrics.jsonl")]
    assert np.mean(reward[3:]) > np.mean(reward[:3])


def test_groups_without_signal_are_replaced_and_no_others(sft, dataset, tmp_path, monkeypatch):
    """One step of 12 groups of two. Those with a signal stay as they are, the others are of other prompts."""
    log_completions, found = train_grpo.log_completions, {}
    for n in (0, 1, 5):
        def spied(log, row, samples, texts, parts, rewards, advantages, n=n):
            found[n] = row, [sample.id for sample in samples], texts, rewards[:, 0] != rewards[:, 1]
            log_completions(log, row, samples, texts, parts, rewards, advantages)

        with monkeypatch.context() as patch:
            patch.setattr(train_grpo, "log_completions", spied)
            here(monkeypatch, train_grpo.main, "--task", "cls", "--model", sft / "model", "--data", dataset, *GRPO, "--prompts", 12,
                 "--group", 2, "--steps", 1, "--heldout", 0, "--resample", n, "--out", tmp_path / str(n))
    row, ids, texts, has_signal = found[0]
    missing = 12 - int(has_signal.sum())
    assert 0 < missing < 12 and row["resampled"] == 0
    assert found[1][0]["resampled"] == missing <= found[5][0]["resampled"] <= 5 * missing
    for n in (1, 5):
        kept = [new == old for new, old in zip(zip(*found[n][1:3]), zip(ids, texts))]
        assert kept == has_signal.tolist()
    assert found[5][0]["zero_std_frac"] <= found[1][0]["zero_std_frac"] <= row["zero_std_frac"] > found[5][0]["zero_std_frac"]


def test_no_two_steps_attempts_and_stages_share_their_prompts_or_uniforms(sft, dataset, tmp_path, monkeypatch):
    """Else --resample would draw the same completions, or prompts that the next step has as well."""
    batches, seeds, uniforms = [], [], train_grpo.uniforms
    monkeypatch.setattr(train_grpo, "score_completion", lambda *_, **__: {"format": 0.0, "accuracy": 0.0})
    monkeypatch.setattr(train_grpo, "get_batch", lambda *args, **more: batches.append((more["seed"], args[1])) or get_batch(*args, **more))
    monkeypatch.setattr(train_grpo, "uniforms", lambda seed, *args: seeds.append(seed) or uniforms(seed, *args))
    here(monkeypatch, train_grpo.main, "--task", "cls,cls", "--model", sft / "model", "--data", dataset, *GRPO, "--resample", 2,
         "--heldout", 0, "--out", tmp_path)
    assert sorted(batches) == [((0, stage), step) for stage in (0, 1) for step in range(6)] and len(set(seeds)) == 12


def test_each_rank_of_a_mixed_stage_has_prompts_of_both_tasks(sft, dataset, tmp_path, monkeypatch):
    """Every second prompt is of the second task: with every second prompt, one of two ranks had all of the long answers."""
    monkeypatch.setattr(train_grpo, "rank", lambda: 1)
    monkeypatch.setattr(train_grpo, "world_size", lambda: 2)
    batches = []

    def stop_at_first(*args, **more):
        batches.append(get_batch(*args, **more))
        raise Killed
    monkeypatch.setattr(train_grpo, "get_batch", stop_at_first)
    with pytest.raises(Killed):
        here(monkeypatch, train_grpo.main, "--task", "cls+det", "--model", sft / "model", "--data", dataset, *GRPO, "--heldout", 0,
             "--out", tmp_path)
    assert [sample.task for sample in batches[0]] == ["cls", "det"]


def test_every_other_step_is_without_reasoning_and_every_box_has_noise_of_its_own():
    det = load_samples("synthetic", "det", 112)[:8]
    args = Namespace(batch=4, seed=0, half_no_think=True, box_noise=0.0)
    assert [{s.thinking for s in train_sft.local_batch(args, [det], step)} for step in range(4)] == [{True}, {False}, {True}, {False}]
    same = [replace(det[0], id=str(i), gt_boxes=((20, 20, 90, 90, 0),)) for i in range(8)]
    args = Namespace(batch=8, seed=0, half_no_think=False, box_noise=4.0)
    assert len({s.gt_answer for step in range(4) for s in train_sft.local_batch(args, [same], step)}) > 28


def test_shots_reach_the_loader(sft, dataset, tmp_path, monkeypatch, capsys):
    here(monkeypatch, train_sft.main, "--task", "cls", "--model", sft / "model", "--data", dataset, *SFT, "--steps", 1,
         "--shots", 1, "--heldout", 0, "--out", tmp_path)
    classes = {s.category for s in load_samples(str(dataset), "cls", 112, split="train")}
    assert f"cls: {len(classes)} train" in capsys.readouterr().out
