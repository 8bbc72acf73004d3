"""Stage 1, supervised fine-tuning: the model learns to write <think>reasoning</think> <answer>answer</answer>.

Plain next-token cross-entropy on the completion, L = -1/T sum_t log pi(y_t | image, question, y_<t), over all T
completion tokens of a step (the paper sums over tokens; a mean only rescales the learning rate). Prompts carry no loss,
the end-of-turn token does. A completion is a group of one, so this is the log-prob function of GRPO.

    python train_sft.py --task det,cls --model scratch --out runs/sft          # how tiny/ was made: see its README
    python train_sft.py --task det --data refer.jsonl --images images/ --out runs/sft
    python train_sft.py --task det --model Qwen/Qwen2.5-VL-3B-Instruct --data GeoChat_Instruct.json --lr 1e-5 \\
        --batch 128 --micro-batch 4 --steps 1000 --out runs/sft-3b
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import model as qwen
from data import BadInput, batch, load, load_images, prompt, target
from evaluate import heldout_rewards, plot_curves
from rewards import TASKS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--task", default="all", help="comma-separated tasks, mixed in equal parts (one named twice counts twice); or `all`")
parser.add_argument("--out", type=Path, required=True, help="folder for model/, checkpoint/, metrics.jsonl, curves.png")
parser.add_argument("--resume", action="store_true", help="continue the run in --out from its checkpoint")
group = parser.add_argument_group("model and data")
group.add_argument("--model", default="tiny", help="`tiny`, a folder, a hub id; or `scratch`: tiny's architecture, random")
group.add_argument("--data", default="synthetic", help="`synthetic`, or a file or folder that data.py reads")
group.add_argument("--images", help="folder that the file's image names are relative to (default: the file's own)")
group.add_argument("--limit", type=int, help="train on the first so many samples of each task only")
group.add_argument("--image-size", type=int, help="side of the frame in pixels (default: the checkpoint's, else 448)")
group = parser.add_argument_group("optimisation")
group.add_argument("--steps", type=int, default=1000)
group.add_argument("--batch", type=int, default=32, help="samples in an optimiser step")
group.add_argument("--micro-batch", type=int, default=32, help="samples in a forward pass; lower it to save memory")
group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (the real 3B model: 1e-5)")
group.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up; after them it decays linearly to 0")
group.add_argument("--weight-decay", type=float, default=0.01)
group.add_argument("--clip-norm", type=float, default=1.0, help="largest gradient norm")
group.add_argument("--seed", type=int, default=0)
group = parser.add_argument_group("output")
group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
group.add_argument("--max-new-tokens", type=int, default=96, help="longest completion in the held-out scores")


def main() -> None:
    args = parser.parse_args()
    tasks = list(TASKS) if args.task == "all" else args.task.split(",")
    torch.manual_seed(args.seed)
    if args.model == "scratch":
        corpus = [prompt(s) + target(s) for task in tasks for s in batch(load(args.data, task, 112, args.images, "train"), 0, 500, 0)]
        model, processor = qwen.scratch(corpus, args.image_size or 112)
    else:
        model, processor = qwen.load(args.model, args.image_size)
    data = [load(args.data, task, processor.frame, args.images, "train", args.seed)[: args.limit] for task in tasks]
    heldout = {task: load(args.data, task, processor.frame, args.images, "heldout")[:256] for task in tasks}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay)

    args.out.mkdir(parents=True, exist_ok=True)
    first, metrics_file = 0, args.out / "metrics.jsonl"
    if args.resume:
        state = qwen.load_checkpoint(args.out / "checkpoint")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    qwen.keep_lines(metrics_file, first)

    model.train()
    with open(metrics_file, "a") as log, tqdm(total=args.steps, initial=first, disable=not sys.stderr.isatty()) as bar:
        for step in range(first, args.steps):
            began = time.perf_counter()
            samples = [batch(data[place % len(tasks)], place // len(tasks), 1, args.seed + place % len(tasks))[0]
                       for place in range(step * args.batch, (step + 1) * args.batch)]
            targets = [torch.tensor(processor.tokenizer(target(s))["input_ids"], device=qwen.device()) for s in samples]
            T = sum(map(len, targets))  # counted before the micro-batches, so that their number does not matter
            loss = torch.zeros((), device=qwen.device())
            for at in range(0, args.batch, args.micro_batch):
                part = slice(at, at + args.micro_batch)
                prompts = qwen.collate([qwen.encode(processor, prompt(s), load_images(s)) for s in samples[part]])
                completions = pad_sequence(targets[part], batch_first=True)[:, None]                             # (B, 1, C)
                mask = pad_sequence([torch.ones_like(t, dtype=torch.bool) for t in targets[part]], batch_first=True)[:, None]
                logprobs = qwen.token_logprobs(model, prompts, completions, mask)
                micro_loss = -logprobs.sum() / T
                micro_loss.backward()
                loss += micro_loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm)
            for param_group in optimizer.param_groups:
                param_group["lr"] = qwen.learning_rate(step, args.steps, args.lr, args.warmup)
            optimizer.step()
            optimizer.zero_grad()

            seconds = time.perf_counter() - began
            row = {"step": step + 1, "task": args.task, "loss": loss.item(), "grad_norm": norm.item(),
                   "lr": optimizer.param_groups[0]["lr"], "update_s": seconds, "tokens_per_s": T / seconds}
            print(json.dumps(row), file=log, flush=True)
            if bar.disable and (step % 10 == 9 or step == first):
                print(f"step {step + 1:5d}  loss {row['loss']:7.4f}  grad {row['grad_norm']:6.2f}  lr {row['lr']:.1e}  {seconds:5.2f} s", flush=True)
            bar.set_postfix_str(f"loss {row['loss']:.4f}")
            bar.update()
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                qwen.save_checkpoint(args.out / "checkpoint", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})

    qwen.save(model, processor, args.out / "model")
    plot_curves(metrics_file, ("loss", "grad_norm", "lr"))
    for task in tasks:
        scores = heldout_rewards(model, processor, heldout[task], args.max_new_tokens)
        print(f"{task}: held-out reward over {len(heldout[task])} samples: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")
