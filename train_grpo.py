"""GRPO, after SFT: sample answers, reward them, and make the better ones of each group more likely. Task after task.

As in GeoVLM-R1 (arXiv 2509.25026): a format reward plus a task-aware accuracy reward, advantages relative to the group,
a clipped ratio, a KL penalty to a frozen reference, one task per stage. Unlike there: the ratio is the token's (the paper
prints the sequence's, of which --loss gspo is the length-normalised form), advantages are not divided by the group's std
unless --divide-by-std says so (IoU rewards of a group often differ by a hair, and the division would blow that up), a
group's prompt is computed once for all its completions, and groups whose rewards are all equal are left out altogether.

    torchrun train_grpo.py --task det                          # the embedded default: minutes on a laptop
    python train_grpo.py --task cls,det --out runs/staged      # stages: det starts from, and is held near, the end of cls
    torchrun --nproc-per-node 8 train_grpo.py --task det --model runs/sft-3b/model --data GeoChat_Instruct.json --lr 1e-6 \\
        --beta 0.04 --divide-by-std --prompts 16 --max-new-tokens 256 --steps 400 --gradient-checkpointing --out runs/grpo-3b

Writes metrics.jsonl (a line a step), samples.jsonl and its page report.html, curves.png, model/ and checkpoint/ to --out.
"""

import argparse
import time
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

import torch

import grpo
import model as qwen
import parallel
import rollout
import run
from data import HELDOUT, BadInput, ahead, as_row, batch, load, tasks_named
from evaluate import encode, heldout_rewards
from rewards import PARTS, reward_parts
from run import HelpFormatter, natural, positive
from scoring.curves import FIGURES, plot_curves
from scoring.judges import load_judges
from scoring.report import read_entries, write_report

parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
parser.add_argument("--task", default="det", help="comma-separated tasks, one stage each in this order; or `all`")
parser.add_argument("--out", type=Path, default=Path("runs/grpo"), help="folder that the run writes to, over an earlier run in it")
flags = parser.add_argument_group("model and data")
flags.add_argument("--model", default="tiny", help="`tiny`, a folder in Hugging Face format, or a hub id")
flags.add_argument("--data", default="synthetic", help="`synthetic`, or a file or folder that formats/ knows")
flags.add_argument("--images", help="folder that the file's image names are relative to (default: the file's own)")
flags.add_argument("--shots", type=positive, help="train on so many samples of each category only")
flags.add_argument("--image-size", type=positive, help="side of the frame in pixels (default: the checkpoint's, else 448)")
flags = parser.add_argument_group("rollout")
flags.add_argument("--steps", type=positive, default=200, help="rollouts of each stage, --inner-steps optimiser steps on each")
flags.add_argument("--prompts", type=positive, default=32, help="B: prompts in a step")
flags.add_argument("--group", type=int, default=8, help="G: completions for each prompt, at least 2")
flags.add_argument("--max-new-tokens", type=positive, default=96, help="C: longest completion (tiny: 160 for ground, ovd, seg)")
flags.add_argument("--temperature", type=float, default=1.0, help="of sampling and, alike, of the log-probs")
flags.add_argument("--seed", type=natural, default=0, help="of the order of the data, and of what is random")
flags.add_argument("--compile", action="store_true", help="torch.compile a decoding step: 15 seconds of warm-up for each shape")
flags = parser.add_argument_group("reward")
for part in PARTS:
    flags.add_argument(f"--{part}-weight", type=float, default=1.0, help=f"weight of the {part} reward in the sum"
                       + " (task pair)" * (part in ("length", "repetition")))
flags.add_argument("--sbert", help="for rcap and change: sentence-transformers/all-MiniLM-L6-v2, or a folder")
flags.add_argument("--sam", help="SAM 2.1 for the masks of seg: folder or hub id")
flags = parser.add_argument_group("objective")
flags.add_argument("--loss", choices=grpo.LOSSES, default="grpo", help="how tokens are weighted and ratios taken, see grpo.py; "
                   "with one inner step gspo is grpo")
flags.add_argument("--divide-by-std", action="store_true", help="advantages over the group's std (as GRPO, not Dr. GRPO)")
flags.add_argument("--inner-steps", type=positive, default=1, help="mu: optimiser steps on each rollout")
flags.add_argument("--clip-low", type=float, default=0.2, help="the ratio, which is 1 with one inner step, is clipped at "
                   "1 - this (GSPO: 3e-4)")
flags.add_argument("--clip-high", type=float, default=0.2, help="and above at 1 + this (DAPO: 0.28, GSPO: 4e-4)")
flags.add_argument("--beta", type=float, default=0.001, help="weight of the KL penalty (VLM-R1: 0.04); 0 keeps no reference model")
flags.add_argument("--mask-truncated", action="store_true", help="no loss on completions cut off at --max-new-tokens")
flags = parser.add_argument_group("optimisation")
flags.add_argument("--lr", type=float, default=2e-4, help="peak learning rate (all weights of the real 3B model: 1e-6)")
flags.add_argument("--warmup", type=natural, default=5, help="steps of linear warm-up; after them it decays linearly to 0")
flags.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW")
flags.add_argument("--clip-norm", type=float, default=1.0, help="largest gradient norm")
flags.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: slower, less memory")
flags.add_argument("--lora", type=positive, help="rank of LoRA adapters in the language model, all that learns then")
flags.add_argument("--freeze", choices=["vision"], help="the vision tower does not learn; its features are computed once a prompt")
flags.add_argument("--shard-size", type=positive, help="processes that share one copy of the model (default: all of them)")
flags.add_argument("--pack-tokens", type=positive, default=2048, help="tokens in a forward pass of the update: as many groups "
                   "as fit, at least one")
flags = parser.add_argument_group("output")
flags.add_argument("--save-every", type=positive, default=50, help="steps between checkpoints")
flags.add_argument("--eval-every", type=positive, default=50, help="steps between held-out scores")
run.add_resume(flags)


def pack(sizes: dict[int, tuple[int, int]], room: int) -> list[list[int]]:
    """Groups and their tokens (prompt, all completions) -> the groups of each forward pass, like with like: as many as fit
    in `room` when padded to the longest prompt and the longest completions among them."""
    def padded(groups: list[int]) -> int:
        return len(groups) * (max(sizes[g][0] for g in groups) + max(sizes[g][1] for g in groups))

    passes = []
    for group in sorted(sizes, key=lambda g: sum(sizes[g]), reverse=True):
        if passes and padded([*passes[-1], group]) <= room:
            passes[-1].append(group)
        else:
            passes.append([group])
    return passes


def main() -> None:
    args = parser.parse_args()
    tasks = tasks_named(args.task)
    if args.group < 2:
        raise BadInput(f"--group {args.group}: an advantage is relative to the group's mean, so a group needs at least 2")
    if args.temperature <= 0:
        raise BadInput(f"--temperature {args.temperature}: greedy completions of a group are all the same; it has to be positive")
    if args.prompts % parallel.ranks():
        raise BadInput(f"--prompts {args.prompts} cannot be spread evenly over {parallel.ranks()} processes; take a multiple")
    if args.lora and len(tasks) > 1:
        raise BadInput("--lora has one stage, whose reference is the model without adapters; run the tasks one by one, each "
                       "from the last one's model/")
    mesh = parallel.start(args.shard_size)
    if args.compile:
        rollout.compile()
    mine = range(parallel.rank(), args.prompts, parallel.ranks())                        # this rank's prompts of a step
    torch.manual_seed(args.seed)
    model, processor = qwen.load(args.model, args.image_size)
    adapters = qwen.add_adapters(model, args.lora) if args.lora else None
    if args.freeze:
        model.model.visual.requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    data = [load(args.data, task, processor.frame, args.images, "train", args.seed, args.shots) for task in tasks]
    heldout = [load(args.data, task, processor.frame, args.images, "heldout")[:HELDOUT] for task in tasks]
    load_judges(tasks, args.sbert, args.sam)
    part_weights = {name: getattr(args, f"{name}_weight") for name in PARTS}
    settings = run.settings_of(args, data)
    progress = run.start_or_resume(args, settings, {"stage": 0, "step": 0, "before": None, "skipped": 0})
    done = progress["stage"] * args.steps + progress["step"]
    metrics_log = run.Log(args.out / "metrics.jsonl", done)
    samples_log = run.Log(args.out / "samples.jsonl", done * args.group)
    run.finish_step_on_signal()
    policy, sampler = parallel.spread(model, mesh)  # one learns, one generates; alone on a CPU they are one

    for stage in range(progress["stage"], len(tasks)):
        reference = optimizer = None                                                     # frees the last stage's memory
        if args.beta and not adapters:                                                   # with them: the policy without
            reference = parallel.frozen(policy, sampler, mesh)
        optimizer = torch.optim.AdamW([w for w in policy.parameters() if w.requires_grad], lr=args.lr, betas=(0.9, 0.99),
                                      weight_decay=args.weight_decay, fused=torch.cuda.is_available())
        guard = run.Guard(progress["skipped"])
        if progress["step"]:
            run.load_checkpoint(args.out, policy, optimizer, reference)
            parallel.refresh(sampler, policy)
        heldout_scores = partial(heldout_rewards, sampler, processor, heldout[stage], args.max_new_tokens, args.temperature)
        before = progress["before"] or heldout_scores()                                  # a resumed stage keeps its own
        after = None
        policy.train()

        steps = ((step, batch(data[stage], step, args.prompts, args.seed + stage)[parallel.rank() :: parallel.ranks()])
                 for step in range(progress["step"], args.steps))
        for step, samples, prompts in ahead(steps, partial(encode, processor)):          # this rank's part of B
            # --- rollout: B prompts, G completions each ---------------------------------------------------------------
            began = time.perf_counter()
            if args.freeze or args.lora:
                prompts = [qwen.with_features(sampler, p) for p in prompts]
            noise = rollout.noise((args.seed, stage, step), mine, args.group, args.max_new_tokens)
            drawn = rollout.generate(sampler, processor, qwen.collate(prompts), args.max_new_tokens, noise, args.group,
                                     args.temperature)
            texts = rollout.texts(processor, drawn)
            rollout_s = time.perf_counter() - began

            # --- rewards and advantages, (B, G) -----------------------------------------------------------------------
            used = (drawn.mask.sum(2) / args.max_new_tokens).tolist()                    # share of C: pair's length reward
            parts = [[reward_parts(text, sample, share) for text, share in zip(group, shares)]
                     for sample, group, shares in zip(samples, texts, used)]             # B x G x {name: value}
            rewards = torch.tensor([[sum(part_weights[name] * value for name, value in p.items()) for p in group]
                                    for group in parts], device=qwen.device())           # (B, G)
            advantages = grpo.advantages(rewards, args.divide_by_std)
            learning = grpo.learning_groups(rewards)                                     # (B,)
            mask = drawn.mask & learning[:, None, None]                                  # (B, G, C): tokens with loss
            if args.mask_truncated:
                mask &= drawn.stopped[:, :, None]
            token_weights = grpo.token_weights(mask, args.loss, args.max_new_tokens, parallel.total)

            # --- update: mu optimiser steps on the rollout, each in micro-batches of whole groups ---------------------
            update_began = time.perf_counter()
            for param_group in optimizer.param_groups:
                param_group["lr"] = run.learning_rate(step, args.steps, args.lr, args.warmup)
            longest = drawn.mask.sum(2).amax(1).tolist()                                 # tokens of each group's longest
            sizes = {b: (prompts[b].ids.shape[1], args.group * longest[b]) for b in learning.nonzero()[:, 0].tolist()}
            packed = pack(sizes, args.pack_tokens) if mask.any() else []                 # the groups of each micro-batch
            most = parallel.largest(len(packed))                                         # of any rank
            old, ref = {}, {}                                                            # log-probs by micro-batch
            totals = Counter()                                                           # its update() adds up tensors
            for inner in range(args.inner_steps if most else 0):  # none: there is no loss, and Adam alone would drift
                inner_loss = torch.zeros((), device=mask.device)
                for i in range(most):
                    extra = i >= len(packed)       # another rank has more, and FSDP needs all ranks in each: group 0 again,
                    groups = [0] if extra else packed[i]                                 # with no token that carries loss
                    here = groups, slice(None), slice(max(longest[b] for b in groups))   # (B, G, C) -> (b, G, their C)
                    live = mask[here] & (not extra)
                    inputs = qwen.collate([prompts[b] for b in groups]), drawn.tokens[here], live, args.temperature
                    logprobs = policy(*inputs)                                           # model.token_logprobs, (b, G, C)
                    if inner == 0:                 # pi_old is scored, as drawn.logprobs may have been rounded to bf16
                        old[i], ref[i] = logprobs.detach(), None
                        totals["gap"] += (old[i] - drawn.logprobs[here]).abs()[live].sum()
                        if args.beta:
                            with torch.no_grad(), qwen.without_adapters(policy):
                                ref[i] = (reference or policy)(*inputs)
                    loss, sums = grpo.policy_loss(
                        logprobs, old[i], ref[i], advantages[groups], live, token_weights[here],
                        loss=args.loss, clip_low=args.clip_low, clip_high=args.clip_high, beta=args.beta)
                    loss.backward()
                    inner_loss += loss.detach()
                    totals.update(sums)
                norm = parallel.whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip_norm))
                if guard.finite(inner_loss, norm, samples):
                    optimizer.step()
                optimizer.zero_grad()
                totals.update(loss=inner_loss, norm=norm)
            parallel.refresh(sampler, policy)

            # --- what the ranks have measured, one line ---------------------------------------------------------------
            tokens, scored = drawn.mask.sum(), mask.sum()                                # sampled; with loss
            update = ((2 if args.lora else 3) * args.inner_steps + bool(args.beta)) * (most > 0)  # in forward passes; rollout: 1
            work = (qwen.flops(sampler, prompts, drawn.mask.sum((1, 2))) * (1 + learning * update)).sum()
            means = parallel.means({                                                     # name: (sum, count) on this rank
                "reward": (rewards.sum(), rewards.numel()),
                "reward_std": (rewards.std(1).sum(), len(rewards)),
                "kl": (totals["kl"], scored * args.inner_steps),
                "entropy": (drawn.entropy.sum(), tokens),
                "clip_frac": (totals["clipped"], scored * args.inner_steps),
                "sampling_gap": (totals["gap"], scored),                                 # |log-prob scored - as sampled|
                "len_mean": (tokens, rewards.numel()),
                "truncated_frac": ((~drawn.stopped).sum(), rewards.numel()),
                "zero_std_frac": ((~learning).sum(), len(rewards)),
                "loss": (totals["loss"], args.inner_steps / parallel.ranks()),           # each rank holds a part of it
                "grad_norm": (totals["norm"], args.inner_steps)})
            part_means = parallel.means({
                name: (sum(p[name] for group in parts for p in group), rewards.numel()) for name in parts[0][0]})
            work = parallel.total(work).item()
            now, last = time.perf_counter(), step + 1 == args.steps
            row = {"step": stage * args.steps + step + 1, "stage": stage, "task": tasks[stage], **means, "parts": part_means,
                   "lr": run.learning_rate(step, args.steps, args.lr, args.warmup), "skipped": guard.skipped,
                   "rollout_s": rollout_s, "update_s": now - update_began, "flops_per_s": work / (now - began),
                   "tokens_per_s": means["len_mean"] * args.prompts * args.group / (now - began)}
            if (step + 1) % args.eval_every == 0 or last:
                row["heldout"] = after = heldout_scores()
            metrics_log.write(row)
            shown, completions = step % args.prompts, []                                 # samples.jsonl keeps a group a step
            if shown in mine:
                b = mine.index(shown)
                completions = [{"step": row["step"], "stage": stage, **as_row(samples[b]), "completion": text, "parts": part,
                                "reward": reward, "advantage": advantage} for text, part, reward, advantage
                               in zip(texts[b], parts[b], rewards[b].tolist(), advantages[b].tolist())]
            for completion in chain(*parallel.gathered(completions)):
                samples_log.write(completion)
            run.say(f"step {row['step']:4d} {tasks[stage]:6s} reward {row['reward']:.3f}  accuracy "
                    f"{part_means['accuracy']:.3f}  kl {row['kl']:.4f}  entropy {row['entropy']:.3f}  len "
                    f"{row['len_mean']:4.1f}  grad {row['grad_norm']:5.2f}  {now - began:.2f} s")
            stop = run.asked_to_stop()
            if (step + 1) % args.save_every == 0 or last or stop:
                progress = {"stage": stage, "step": step + 1, "before": before, "skipped": guard.skipped}
                run.save_checkpoint(args.out, settings, progress, policy, optimizer, reference)
            if stop and not (last and stage + 1 == len(tasks)):
                return run.say(f"stopped after step {row['step']}; to go on: {run.command()} --resume")

        after = after or heldout_scores()                                                # resumed behind the last step
        progress |= {"step": 0, "before": None}                                          # of the next stage
        run.say(f"\n{tasks[stage]}: mean accuracy reward over {len(heldout[stage])} held-out samples\n"
                f"{'':12s}{'before':>8s}{'after':>8s}\n"
                + "\n".join(f"{name:12s}{before[name]:8.3f}{after[name]:8.3f}" for name in before))
        if parallel.rank() == 0:
            plot_curves([args.out], FIGURES, args.out / "curves.png")
            write_report(args.out / "report.html", read_entries(args.out / "samples.jsonl"),
                         f"GRPO on {args.task}: groups sampled in training")

    model = parallel.collect(policy, sampler)
    if parallel.rank() == 0:
        if adapters:
            adapters.save_pretrained(args.out / "adapter")
            model = adapters.merge_and_unload()
        qwen.save(model, processor, args.out / "model")
    run.say(f"model/, metrics.jsonl, samples.jsonl, curves.png and report.html are in {args.out}")


if __name__ == "__main__":
    run.script(main)
