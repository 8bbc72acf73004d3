"""GRPO, after SFT: sample completions, reward them, make the better ones of each group more likely.

As in GeoVLM-R1 (arXiv 2509.25026): a format reward plus a task-specific accuracy reward, advantages
relative to the group, a clipped ratio, a KL penalty to a frozen reference model, one stage per
task. Different from it (a flag in brackets restores its way, or VLM-R1's): the ratio is that of a
token (--loss geovlm), advantages are not divided by the group's std (--divide-by-std), a group's
prompt is computed once for all its completions, groups whose rewards are all equal are left out;
prompts, the form of boxes and some rewards are ours. docs/method.md has the whole list, and says
why.

A step is one rollout with its mu optimiser steps (--inner-steps, 1 by default).

    torchrun train_grpo.py --task det                    # the included default: minutes on a laptop
    python train_grpo.py --task cls,det+rcap --out runs/staged   # cls, then a mix of two tasks
    torchrun --nproc-per-node 8 train_grpo.py --task det --model runs/sft-3b/model \\
        --data geochat/GeoChat_Instruct.json --images images --lr 1e-6 --beta 0.04 \\
        --divide-by-std --prompts 16 --max-new-tokens 256 --steps 400 --gradient-checkpointing \\
        --out runs/grpo-3b

Writes to --out: metrics.jsonl (a line per step), samples.jsonl (completions of one group per step)
and its page report.html, curves.png, model/ and checkpoint/.
"""

from flags import check_grpo_args, parse_grpo_args

if __name__ == "__main__":
    args = parse_grpo_args(__doc__)  # before torch loads, so that --help is quick

import gc
import time
from argparse import Namespace
from functools import partial
from itertools import chain

import torch

import grpo
from data import fingerprint, get_batch, load_splits, parse_sources, parse_stages
from metrics.held_out import held_out_by_task, held_out_row
from metrics.reward_models import load_reward_models
from metrics.training import (
    Console,
    log_completions,
    stack_parts,
    step_metrics,
    step_speed,
    write_pages,
)
from model import Policy, add_image_embeds
from pretrained import load_model, save_model
from processing import collate, encode, prefetch, warn_of_long_targets
from rewards import REWARD_PARTS, score_completion
from rollout import Sampler, replace_groups, uniforms
from runtime.checkpoint import Run, run_config
from runtime.command_line import run_main
from runtime.distributed import (
    all_reduce_max,
    all_reduce_sum,
    barrier,
    build_policy_and_sampling_model,
    full_tensor,
    init_distributed,
    make_ref_model,
    sync_sampling_model,
)
from runtime.logging import JsonlLog, MetricsLog, print0
from runtime.lora import add_adapters, has_adapters, reference_adapters, update_reference
from runtime.optimisation import (
    NonFiniteGuard,
    default_pack_tokens,
    linear_warmup_decay,
    pack_groups,
)
from runtime.ranks import rank, world_size


def main(args: Namespace) -> None:
    stages = parse_stages(args.task)
    check_grpo_args(args, stages)
    mesh = init_distributed(args.shard_size)
    all_tasks = list(dict.fromkeys(chain(*stages)))
    reward_models = load_reward_models(all_tasks, args.sbert, args.sam, args.reward)
    torch.manual_seed(args.seed)
    model, processor = load_model(args.model, args.image_size, merge=not args.lora)
    adapters = None
    if args.lora:  # new adapters are 0: the first stage's reference is the model without them
        starts_adapted = len(stages) > 1 or has_adapters(args.model)
        with_reference = args.beta > 0 and starts_adapted
        adapters = add_adapters(model, args.lora, args.model, with_reference)
    if args.freeze:
        model.model.visual.requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pack_tokens = args.pack_tokens or default_pack_tokens(args.gradient_checkpointing)
    console = Console(len(stages) * args.steps, args.eval_every)
    console.print_model(args.model, model, processor.image_size)
    sources = parse_sources(args.data, args.images, args.choices, args.negatives)
    eval_sources = parse_sources(args.eval_data, args.images, args.choices, args.negatives)
    splits = load_splits(sources, eval_sources, all_tasks, processor.image_size,
                         args.seed, args.shots, args.oriented, not args.no_think, args.system,
                         args.heldout)
    data = [[splits[task].train for task in tasks] for tasks in stages]
    held_out = {task: split.held_out for task, split in splits.items()}
    print0("\n".join(split.summary for split in splits.values()))
    warn_of_long_targets(processor, {task: split.train for task, split in splits.items()},
                         args.max_new_tokens)
    part_weights = {name: getattr(args, f"{name}_weight") for name in REWARD_PARTS}
    part_weights["overlong"] = 1.0  # no flag: --overlong-buffer 0 turns it off

    config = run_config(args, (fingerprint(split.train) for split in splits.values()),
                        map(fingerprint, held_out.values()), model)
    run = Run(args, config, {"stage": 0, "step": 0, "before": {}, "skipped": 0})
    progress = run.progress
    metrics_log = MetricsLog(args.out, run.steps_done, args.tensorboard)
    completions_log = JsonlLog(args.out / "samples.jsonl", run.steps_done, args.group)
    run.install_signal_handlers()
    # Decoding is slow with sharded weights, and in float32 on a GPU, so an unsharded copy samples.
    # One process on a CPU needs none: there sampling_model is policy.model.
    policy, sampling_model = build_policy_and_sampling_model(Policy(model), mesh)
    sampler = Sampler(sampling_model, processor, args.compile)
    score_held_out = partial(held_out_by_task, sampler, held_out, args.max_new_tokens,
                             args.temperature, run.should_stop, **reward_models)
    # This rank's prompts of each step: a range, as a stride could miss a task of a mixed stage.
    num_local = args.prompts // world_size()
    local_prompts = range(rank() * num_local, (rank() + 1) * num_local)

    for stage in range(progress["stage"], len(stages)):
        tasks, tasks_so_far = stages[stage], list(chain(*stages[: stage + 1]))
        ref_model = optimizer = None                            # frees the previous stage's memory
        gc.collect()                                            # FSDP has reference cycles
        if adapters:                    # the reference is the policy with its present adapters
            update_reference(policy)
        elif args.beta:
            ref_model = make_ref_model(policy, sampling_model, mesh)
        trainable = [param for param in policy.parameters() if param.requires_grad]
        # Second moment over 100 steps, not PyTorch's 1000: a stage has some hundred.
        optimizer = torch.optim.AdamW(trainable, lr=args.lr, betas=(0.9, 0.99),
                                      weight_decay=args.weight_decay,
                                      fused=torch.cuda.is_available())
        guard = NonFiniteGuard(progress["skipped"])
        after = None                    # the last held-out scores; {} where nothing is held out
        if progress["step"]:
            run.load_checkpoint(policy, optimizer, ref_model)
            sync_sampling_model(sampling_model, policy)
            after = metrics_log.last_row.get("heldout_tasks", {})
            if after is None:                                   # null: a signal stopped the scoring
                is_stage_end = progress["step"] == args.steps
                after = score_held_out(tasks_so_far if is_stage_end else tasks)
                metrics_log.complete_last_row(held_out_row(after, tasks, part_weights))
        unscored = [task for task in tasks if task not in progress["before"]]
        before = progress["before"] | (score_held_out(unscored) or {})  # as the stage began
        if run.should_stop():
            run.print_stopped()
            return
        policy.train()

        local_batch = partial(get_batch, data[stage], size=args.prompts,
                              seed=(args.seed, stage), part=local_prompts)
        steps = ((step, local_batch(step)) for step in range(progress["step"], args.steps))
        step_end = time.perf_counter()
        for step, samples, prompts in prefetch(steps, partial(encode, processor)):
            run.doing = f"finishing step {stage * args.steps + step + 1}"
            beta = args.beta                                    # a schedule of beta goes here
            lr = linear_warmup_decay(step, args.steps, args.lr, args.warmup)

            # --- rollout: G completions for each prompt, again for groups without signal --------
            # From here on B counts this rank's prompts, and C is its longest completion. Without
            # --resample the loop over attempts runs once, with all prompts.
            t0 = time.perf_counter()
            todo = list(range(len(samples)))                    # prompts whose groups to sample
            scored = [None] * len(samples)                      # B x G x {part: reward}
            rollout, resampled = None, 0
            for attempt in range(1 + args.resample):
                # Prompts and random numbers depend on (seed, stage, step, prompt): the same on any
                # number of ranks. A further attempt takes those of a step after the stage's end.
                data_step = step + attempt * args.steps
                if attempt:
                    resampled += len(todo)
                    others = local_batch(data_step)
                    for b in todo:
                        samples[b], prompts[b] = others[b], encode(processor, others[b])
                if args.freeze or args.lora:                    # the vision tower is frozen
                    add_image_embeds(sampling_model, prompts, todo)
                random_numbers = uniforms((args.seed, stage, data_step),
                                          [local_prompts[b] for b in todo],
                                          args.group, args.max_new_tokens)
                groups = sampler.generate(
                    collate([prompts[b] for b in todo]), args.max_new_tokens, args.group,
                    args.temperature, random_numbers)
                rollout = replace_groups(rollout, todo, groups) if attempt else groups
                texts = sampler.decode_texts(rollout)                           # B x G
                lengths = rollout.mask.sum(2)                                   # (B, G)

                # --- rewards --------------------------------------------------------------------
                length_fractions = (lengths / args.max_new_tokens).tolist()
                for b in todo:
                    scored[b] = [score_completion(text, samples[b], fraction, **reward_models)
                                 for text, fraction in zip(texts[b], length_fractions[b])]
                reward_parts = stack_parts(scored, tasks)                       # {part: (B, G)}
                if args.overlong_buffer:
                    reward_parts["overlong"] = grpo.overlong_punishment(
                        lengths, args.max_new_tokens, args.overlong_buffer)
                weighted = [part_weights[name] * r for name, r in reward_parts.items()]
                rewards = sum(weighted).float()                                 # (B, G)
                # What the next attempt samples again.
                todo = (~grpo.groups_with_signal(rewards)).nonzero()[:, 0].tolist()
                if not todo:
                    break
            t1 = time.perf_counter()

            # --- advantages ---------------------------------------------------------------------
            advantages, keep = grpo.compute_advantages(                         # (B, G, 1), (B,)
                rewards, reward_parts, rollout.mask, args.divide_by_std, all_reduce_sum)
            loss_mask = rollout.mask & keep[:, None, None]                      # (B, G, C)
            if args.mask_truncated:
                loss_mask &= rollout.stopped[:, :, None]
            token_weights = grpo.token_weights(loss_mask, args.loss, args.max_new_tokens,
                                               all_reduce_sum)                  # (B, G, C)

            # --- update: mu optimiser steps on the rollout, in micro-batches of whole groups ----
            max_lens = lengths.amax(1).tolist()                                 # B
            sizes = {b: (prompts[b].input_ids.shape[1], args.group * max_lens[b])
                     for b in keep.nonzero()[:, 0].tolist()}
            micro_batches = pack_groups(sizes, pack_tokens) if loss_mask.any() else []
            # Under FSDP every rank must run equally many forward and backward passes. A rank with
            # fewer micro-batches runs group 0 again, without loss.
            num_with_loss = len(micro_batches)
            micro_batches += [[0]] * (all_reduce_max(num_with_loss) - num_with_loss)
            # Indices on the device: a list of them would wait for it at each use.
            on_device = [torch.tensor(indices, device=lengths.device) for indices in micro_batches]
            old_logprobs, ref_logprobs = [], []                                 # by micro-batch
            stats, logprob_diffs, losses, grad_norms = [], [], [], []
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            # No loss, no optimiser step: Adam's momentum alone would move the weights.
            for inner_step in range(args.inner_steps if micro_batches else 0):
                losses.append(torch.zeros((), device=lengths.device))
                for i, (indices, at) in enumerate(zip(micro_batches, on_device)):  # b prompts
                    max_len = max(max_lens[index] for index in indices)
                    inputs = collate([prompts[index] for index in indices])
                    tokens = rollout.tokens[at, :, :max_len]                    # (b, G, C)
                    mask = loss_mask[at, :, :max_len] & (i < num_with_loss)
                    logprobs = policy(inputs, tokens, mask, args.temperature)   # (b, G, C)
                    if inner_step == 0:
                        # pi_old comes from the same function as pi, so rho is exactly 1 here.
                        # rollout.logprobs differ by rounding: the metric sampling_gap.
                        old_logprobs.append(logprobs.detach())
                        diff = (old_logprobs[i] - rollout.logprobs[at, :, :max_len]).abs()
                        logprob_diffs.append(torch.where(mask, diff, 0.0).sum())
                        ref_logprobs.append(None)
                        if args.beta:
                            with torch.no_grad(), reference_adapters(policy):
                                ref_logprobs[i] = (policy if adapters else ref_model)(
                                    inputs, tokens, mask, args.temperature)
                    loss, sums = grpo.policy_loss(
                        logprobs, old_logprobs[i], ref_logprobs[i],
                        advantages[at, :, :max_len], mask, token_weights[at, :, :max_len],
                        loss=args.loss, clip_low=args.clip_low, clip_high=args.clip_high, beta=beta)
                    loss.backward()  # ranks' gradients are summed, not averaged: see apply_fsdp
                    losses[-1] += loss.detach()
                    stats.append(sums)
                grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip_norm)
                grad_norms.append(full_tensor(grad_norm))
                if guard.all_finite(losses[-1], grad_norms[-1], [s.id for s in samples]):
                    optimizer.step()
                optimizer.zero_grad()
            sync_sampling_model(sampling_model, policy)

            # --- metrics, log, checkpoint -------------------------------------------------------
            is_stage_end = step + 1 == args.steps
            metrics = step_metrics(rollout, rewards, reward_parts, resampled, loss_mask, stats,
                                   logprob_diffs, losses, grad_norms)
            t2 = time.perf_counter()                            # step_metrics waited for the GPU
            seconds = t2 - step_end
            row = {"step": stage * args.steps + step + 1, "stage": stage,
                   "task": "+".join(tasks), **metrics, "lr": lr, "skipped": guard.skipped,
                   "data_s": t0 - step_end, "rollout_s": t1 - t0, "update_s": t2 - t1,
                   **step_speed(args, sampling_model, prompts, lengths, keep, len(losses),
                                metrics["len_mean"], seconds)}
            console.print_step(row, seconds, texts[0][0], rewards[0, 0])
            if step == 0 and before:
                row["heldout_before"] = held_out_row(before, tasks, part_weights)["heldout"]
            if (step + 1) % args.eval_every == 0 or is_stage_end:
                after = score_held_out(tasks_so_far if is_stage_end else tasks)
                row |= held_out_row(after, tasks, part_weights)
            metrics_log.write(row)
            log_completions(completions_log, row, samples, texts, reward_parts, rewards, advantages)
            stop = run.should_stop()
            run.doing = "finishing the next step"               # if a signal comes only now
            is_run_end = is_stage_end and stage + 1 == len(stages)
            if (step + 1) % args.save_every == 0 or is_stage_end or stop:
                progress = {"stage": stage, "step": step + 1, "before": before,
                            "skipped": guard.skipped}
                run.save_checkpoint(progress, policy, optimizer, ref_model)
                if not is_run_end:
                    write_pages(args.out, args.task)
            if stop and (after is None or not is_run_end):
                run.print_stopped()
                return
            step_end = time.perf_counter()

        progress = progress | {"step": 0, "before": after}      # the next stage starts at step 0
        console.print_held_out(held_out, before, after)

    run.doing = "saving the model"
    chat = {"system": args.system, "thinking": not args.no_think}
    if adapters:
        save_model(policy.model, processor, args.out / "adapter", **chat, adapters=adapters)
    save_model(policy.model, processor, args.out / "model", **chat)
    write_pages(args.out, args.task)
    barrier()  # until the first rank has saved
    run.close()
    saved = "adapter/, model/" if adapters else "model/"
    print0(f"{saved}, metrics.jsonl, samples.jsonl, curves.png and report.html are in {args.out}")


if __name__ == "__main__":
    run_main(partial(main, args))
