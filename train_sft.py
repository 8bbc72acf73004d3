"""Supervised fine-tuning (SFT), the stage before GRPO: the model learns to write
<think>reasoning</think> <answer>answer</answer>.

Plain next-token cross-entropy on the completion, averaged over all T completion tokens of a step
(the paper sums over tokens; with the mean, --clip-norm does not depend on the batch):

    L = -1/T sum_t log pi(y_t | image, question, y_<t)

Prompts carry no loss, the end-of-turn token does. A completion is a group of one, so log-probs come
from the same function as in GRPO.

    python train_sft.py --task det,cls --model scratch --out runs/sft     # from random weights
    python train_sft.py --task det --data refer.jsonl --images images/ --out runs/sft
    torchrun --nproc-per-node 8 train_sft.py --task det --model Qwen/Qwen2.5-VL-3B-Instruct \\
        --data geochat/GeoChat_Instruct.json --images images --lr 1e-5 --batch 128 \\
        --micro-batch 4 --steps 1000 --max-new-tokens 256 --gradient-checkpointing --out runs/sft-3b
"""

from flags import check_sft_args, parse_sft_args

if __name__ == "__main__":
    args = parse_sft_args(__doc__)  # before torch loads, so that --help is quick

import time
from argparse import Namespace
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import fingerprint, get_batch, load_splits, parse_sources, parse_tasks
from metrics.held_out import held_out_by_task
from metrics.plots import plot_curves
from metrics.reward_choices import parse_rewards
from metrics.training import Console
from model import Policy
from pretrained import load_model, save_model
from processing import collate, encode, prefetch, tokenize_target, warn_of_long_targets
from rollout import Sampler
from runtime.checkpoint import Run, run_config
from runtime.command_line import run_main
from runtime.distributed import (
    all_reduce_sum,
    barrier,
    build_policy_and_sampling_model,
    device,
    full_tensor,
    init_distributed,
    sync_sampling_model,
)
from runtime.errors import errors_as_warnings
from runtime.logging import MetricsLog, print0
from runtime.lora import add_adapters
from runtime.optimisation import NonFiniteGuard, linear_warmup_decay
from runtime.ranks import rank, world_size
from sample import Sample, format_prompt, format_target, loosen_boxes
from tiny.scratch import new_tiny_model


def main(args: Namespace) -> None:
    tasks = parse_tasks(args.task)
    check_sft_args(args, tasks)
    task_rewards = parse_rewards(args.reward, tasks)
    mesh = init_distributed(args.shard_size)
    torch.manual_seed(args.seed)
    sources = parse_sources(args.data, args.images, args.choices, args.negatives)
    eval_sources = parse_sources(args.eval_data, args.images, args.choices, args.negatives)
    load = partial(load_splits, sources, eval_sources, tasks, seed=args.seed, shots=args.shots,
                   oriented=args.oriented, thinking=not args.no_think, system=args.system,
                   heldout=args.heldout)
    if args.model == "scratch":  # tiny's architecture, a tokenizer learned from the data
        image_size = args.image_size or 112
        splits = load(image_size=image_size)
        corpus = [format_prompt(sample) + format_target(sample) for task in tasks
                  for sample in get_batch([splits[task].train], 0, 500, (args.seed,))]
        model, processor = new_tiny_model(corpus, image_size)
    else:
        model, processor = load_model(args.model, args.image_size, merge=not args.lora)
        image_size = processor.image_size
        splits = load(image_size=image_size)
    adapters = add_adapters(model, args.lora, args.model) if args.lora else None
    if args.freeze:
        model.model.visual.requires_grad_(False)
    console = Console(args.steps)
    console.print_model(args.model, model, image_size)
    data = [splits[task].train for task in tasks]
    held_out = {task: split.held_out for task, split in splits.items()}
    print0("\n".join(split.summary for split in splits.values()))
    warn_of_long_targets(processor, held_out, args.max_new_tokens)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = run_config(args, (fingerprint(split.train) for split in splits.values()),
                        map(fingerprint, held_out.values()), model)
    run = Run(args, config, {"step": 0, "skipped": 0})
    first_step = run.progress["step"]
    metrics_log = MetricsLog(args.out, first_step, args.tensorboard)
    guard = NonFiniteGuard(run.progress["skipped"])
    run.install_signal_handlers()
    policy, sampling_model = build_policy_and_sampling_model(Policy(model), mesh)
    if sampling_model is not policy.model:
        sampling_model.cpu()  # not needed before the end
    trainable = [param for param in policy.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, betas=(0.9, 0.99),
                                  weight_decay=args.weight_decay, fused=torch.cuda.is_available())
    if first_step:
        run.load_checkpoint(policy, optimizer)

    policy.train()
    steps = ((step, local_batch(args, data, step)) for step in range(first_step, args.steps))
    step_end = time.perf_counter()
    for step, samples, prompts in prefetch(steps, partial(encode, processor)):
        run.doing = f"finishing step {step + 1}"
        t0 = time.perf_counter()
        targets = [tokenize_target(processor, sample) for sample in samples]
        # T counts the tokens of all micro-batches and ranks, so their losses add up to the mean
        T = int(all_reduce_sum(torch.tensor(sum(map(len, targets)), device=device())))
        loss = torch.zeros((), device=device())
        for start in range(0, len(samples), args.micro_batch):
            micro_batch = slice(start, start + args.micro_batch)                # b samples
            completions, mask = pad_completions(targets[micro_batch])           # (b, 1, C) each
            logprobs = policy(collate(prompts[micro_batch]), completions, mask)  # (b, 1, C)
            micro_loss = -logprobs.sum() / T
            micro_loss.backward()
            loss += micro_loss.detach()
        for param_group in optimizer.param_groups:
            param_group["lr"] = linear_warmup_decay(step, args.steps, args.lr, args.warmup)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip_norm)
        grad_norm = full_tensor(grad_norm)
        if guard.all_finite(loss, grad_norm, [sample.id for sample in samples]):
            optimizer.step()
        optimizer.zero_grad()

        mean_loss = all_reduce_sum(loss).item()  # waits for the GPU
        t1 = time.perf_counter()
        seconds = t1 - step_end
        row = {"step": step + 1, "task": args.task, "loss": mean_loss,
               "grad_norm": grad_norm.item(), "lr": optimizer.param_groups[0]["lr"],
               "skipped": guard.skipped, "data_s": t0 - step_end, "update_s": t1 - t0,
               "tokens_per_s": T / seconds}
        metrics_log.write(row)
        is_last = step + 1 == args.steps
        if (step + 1) % 10 == 0 or step == first_step or is_last:
            print0(f"step {step + 1:5d}/{args.steps}  loss {row['loss']:7.4f}  grad "
                   f"{row['grad_norm']:6.2f}  {seconds:5.2f} s  {console.eta(step + 1, seconds)}")
        stop = run.should_stop()
        run.doing = "finishing the next step"  # if a signal comes only now
        if (step + 1) % args.save_every == 0 or is_last or stop:
            run.save_checkpoint({"step": step + 1, "skipped": guard.skipped}, policy, optimizer)
        if stop and not is_last:
            run.print_stopped()
            return
        step_end = time.perf_counter()

    run.doing = "stopping before the held-out scores and model/"
    sync_sampling_model(sampling_model.to(device()), policy)
    sampler = Sampler(sampling_model, processor)
    scores = held_out_by_task(sampler, held_out, args.max_new_tokens, 1.0, run.should_stop, tasks,
                              task_rewards=task_rewards)  # without SBERT and SAM
    if scores is None:
        run.print_stopped()
        return
    for task, rewards in scores.items():
        means = "  ".join(f"{name} {value:.3f}" for name, value in rewards.items())
        print0(f"{task}: mean rewards over {len(held_out[task])} held-out samples: {means}")
    run.doing = "saving the model"
    chat = {"system": args.system, "thinking": not args.no_think}
    if adapters:
        save_model(policy.model, processor, args.out / "adapter", **chat, adapters=adapters)
    save_model(policy.model, processor, args.out / "model", **chat)
    if rank() == 0:
        with errors_as_warnings("curves.png"):
            plot_curves([args.out], ("loss", "grad_norm", "lr"), args.out / "curves.png")
    barrier()  # until the first rank has saved
    run.close()
    saved = "adapter/, model/" if adapters else "model/"
    print0(f"{saved}, metrics.jsonl and curves.png are in {args.out}")


def local_batch(args: Namespace, data: list, step: int) -> list[Sample]:
    """This rank's samples of a step."""
    samples = get_batch(data, step, args.batch, (args.seed,))
    if args.half_no_think and step % 2:
        samples = [replace(sample, thinking=False) for sample in samples]
    if args.box_noise:
        samples = [loosen_boxes(s, args.box_noise, (args.seed, step, i)) if s.task == "det" else s
                   for i, s in enumerate(samples)]
    # Similar lengths go together: less padding in a micro-batch.
    samples.sort(key=lambda sample: (len(sample.images), len(format_target(sample))))
    return samples[rank() :: world_size()]


def pad_completions(targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """b completions -> tokens (b, 1, C), each a group of one, and a mask that is True on them."""
    tokens = pad_sequence(targets, batch_first=True)[:, None]
    ones = [torch.ones_like(target, dtype=torch.bool) for target in targets]
    return tokens, pad_sequence(ones, batch_first=True)[:, None]


if __name__ == "__main__":
    run_main(partial(main, args))
