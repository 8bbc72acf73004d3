"""Supervised fine-tuning, before GRPO: the model learns to write <think>reasoning</think> <answer>answer</answer>.

Plain next-token cross-entropy on the completion, L = -1/T sum_t log pi(y_t | image, question, y_<t), over all T
completion tokens of a step (the paper sums over tokens; a mean only rescales the learning rate). Prompts carry no loss,
the end-of-turn token does. A completion is a group of one, so this is the log-prob function of GRPO.

    python train_sft.py --task det,cls --model scratch --out runs/sft        # from random weights; tiny/README.md
    python train_sft.py --task det --data refer.jsonl --images images/ --out runs/sft
    torchrun --nproc-per-node 8 train_sft.py --task det --model Qwen/Qwen2.5-VL-3B-Instruct --data GeoChat_Instruct.json \\
        --lr 1e-5 --batch 128 --micro-batch 4 --steps 1000 --max-new-tokens 256 --gradient-checkpointing --out runs/sft-3b
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import model as qwen
import parallel
import run
from data import HELDOUT, BadInput, Sample, ahead, batch, load, prompt, sloppy, target, tasks_named
from evaluate import encode, heldout_rewards
from run import HelpFormatter, natural, positive
from scoring.curves import plot_curves
from tiny.scratch import scratch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
parser.add_argument("--task", default="all", help="comma-separated tasks to mix, one named twice counts twice; or `all`")
parser.add_argument("--out", type=Path, required=True, help="folder for model/, checkpoint/, metrics.jsonl, curves.png")
flags = parser.add_argument_group("model and data")
flags.add_argument("--model", default="tiny", help="`tiny`, a folder, a hub id; or `scratch`: tiny's architecture, random")
flags.add_argument("--data", default="synthetic", help="`synthetic`, or a file or folder that formats/ knows")
flags.add_argument("--images", help="folder that the file's image names are relative to (default: the file's own)")
flags.add_argument("--shots", type=positive, help="train on so many samples of each category only")
flags.add_argument("--box-noise", type=float, default=0.0, help="std in pixels of noise on the box edges of det's targets: "
                   "hasty annotators, for GRPO to outgrow")
flags.add_argument("--image-size", type=positive, help="side of the frame in pixels (default: the checkpoint's, else 448)")
flags = parser.add_argument_group("optimisation")
flags.add_argument("--steps", type=positive, default=1000, help="optimiser steps")
flags.add_argument("--batch", type=positive, default=32, help="samples in an optimiser step")
flags.add_argument("--micro-batch", type=positive, default=32, help="samples in a forward pass; lower it to save memory")
flags.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: slower, less memory")
flags.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (the real 3B model: 1e-5)")
flags.add_argument("--warmup", type=natural, default=20, help="steps of linear warm-up; after them it decays linearly to 0")
flags.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
flags.add_argument("--shard-size", type=positive, help="processes that share one copy of the model (default: all of them)")
flags.add_argument("--clip-norm", type=float, default=1.0, help="largest gradient norm")
flags.add_argument("--seed", type=natural, default=0, help="of the order of the data, and of what is random")
flags = parser.add_argument_group("output")
flags.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints")
flags.add_argument("--max-new-tokens", type=positive, default=96, help="longest completion in the held-out scores")
run.add_resume(flags)


def main() -> None:
    args = parser.parse_args()
    tasks = tasks_named(args.task)
    if args.box_noise and "det" not in tasks:
        raise BadInput(f"--box-noise {args.box_noise} moves the boxes of det, which is not among --task {args.task}")
    if args.batch % parallel.ranks():
        raise BadInput(f"--batch {args.batch} cannot be spread evenly over {parallel.ranks()} processes; take a multiple")
    mesh = parallel.start(args.shard_size)
    torch.manual_seed(args.seed)
    if args.model == "scratch":
        frame = args.image_size or 112
        corpus = [prompt(s) + target(s) for task in tasks
                  for s in batch(load(args.data, task, frame, args.images, "train"), 0, 500, args.seed)]
        model, processor = scratch(corpus, frame)
    else:
        model, processor = qwen.load(args.model, args.image_size)
    data = [load(args.data, task, processor.frame, args.images, "train", args.seed, args.shots) for task in tasks]
    heldout = {task: load(args.data, task, processor.frame, args.images, "heldout")[:HELDOUT] for task in tasks}
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = run.settings_of(args, data)
    progress = run.start_or_resume(args, settings, {"step": 0, "skipped": 0})
    run.finish_step_on_signal()
    policy, sampler = parallel.spread(model, mesh)
    if sampler is not policy.model:
        sampler.cpu()  # out of the way until the end
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay,
                                  fused=torch.cuda.is_available())
    if progress["step"]:
        run.load_checkpoint(args.out, policy, optimizer)
    log = run.Log(args.out / "metrics.jsonl", progress["step"])
    guard = run.Guard(progress["skipped"])

    def plan(step: int) -> list[Sample]:
        """This rank's samples of a step."""
        samples = [batch(data[place % len(tasks)], place // len(tasks), 1, args.seed + place % len(tasks))[0]
                   for place in range(step * args.batch, (step + 1) * args.batch)]
        if args.box_noise:
            samples = [sloppy(s, args.box_noise, (args.seed, step, i)) if s.task == "det" else s for i, s in enumerate(samples)]
        samples.sort(key=lambda s: (len(s.images), len(target(s))))  # like with like: less padding in a micro-batch
        return samples[parallel.rank() :: parallel.ranks()]

    policy.train()
    steps = ((step, plan(step)) for step in range(progress["step"], args.steps))
    for step, samples, prompts in ahead(steps, partial(encode, processor)):
        began = time.perf_counter()
        targets = [torch.tensor(processor.tokenizer(target(s), add_special_tokens=False)["input_ids"]).to(qwen.device())
                   for s in samples]
        T = int(parallel.total(torch.tensor(sum(map(len, targets)), device=qwen.device())))  # of all ranks and micro-batches
        loss = torch.zeros((), device=qwen.device())
        for at in range(0, len(samples), args.micro_batch):
            part = slice(at, at + args.micro_batch)
            completions = pad_sequence(targets[part], batch_first=True)[:, None]                             # (B, 1, C)
            mask = pad_sequence([torch.ones_like(t, dtype=torch.bool) for t in targets[part]], batch_first=True)[:, None]
            micro_loss = -policy(qwen.collate(prompts[part]), completions, mask).sum() / T
            micro_loss.backward()
            loss += micro_loss.detach()
        for param_group in optimizer.param_groups:
            param_group["lr"] = run.learning_rate(step, args.steps, args.lr, args.warmup)
        norm = parallel.whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip_norm))
        if guard.finite(loss, norm, samples):
            optimizer.step()
        optimizer.zero_grad()

        seconds = time.perf_counter() - began
        row = {"step": step + 1, "task": args.task, "loss": parallel.total(loss).item(), "grad_norm": norm.item(),
               "lr": optimizer.param_groups[0]["lr"], "skipped": guard.skipped, "update_s": seconds, "tokens_per_s": T / seconds}
        log.write(row)
        if step % 10 == 9 or step == progress["step"]:
            run.say(f"step {step + 1:5d}  loss {row['loss']:7.4f}  grad {row['grad_norm']:6.2f}  {seconds:5.2f} s")
        stop, last = run.asked_to_stop(), step + 1 == args.steps
        if (step + 1) % args.save_every == 0 or last or stop:
            run.save_checkpoint(args.out, settings, {"step": step + 1, "skipped": guard.skipped}, policy, optimizer)
        if stop and not last:
            return run.say(f"stopped after step {step + 1}; to go on: {run.command()} --resume")

    parallel.refresh(sampler.to(qwen.device()), policy)
    for task in dict.fromkeys(tasks):
        scores = heldout_rewards(sampler, processor, heldout[task], args.max_new_tokens)
        figures = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        run.say(f"{task}: mean accuracy reward over {len(heldout[task])} held-out samples: {figures}")
    model = parallel.collect(policy, sampler)
    if parallel.rank() == 0:
        qwen.save(model, processor, args.out / "model")
        plot_curves([args.out], ("loss", "grad_norm", "lr"), args.out / "curves.png")
    run.say(f"model/, metrics.jsonl and curves.png are in {args.out}")


if __name__ == "__main__":
    run.script(main)
