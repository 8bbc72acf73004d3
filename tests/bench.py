"""The group path of this project beside the same work through plain transformers. Prints one JSON line a case.

    python tests/bench.py                        # seconds of rollout, reference and update; medians after a warm-up
    python tests/bench.py --px 448 --group 8     # one case
    python tests/bench.py --memory               # peak of one group's update, by group, prompt and vocabulary

Both sides have the same random weights, prompts, number of tokens, loss, KL, optimiser and micro-batches (one group).
The baseline is what trainers do: `generate` with num_return_sequences=G, then G rows of prompt + completion, the logits of
the completion only. Neither side may stop early: each completion has exactly C tokens.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import grpo
import model as qwen
import train_sft
from data import load, load_images, prompt, target

CASES = [(448, 8), (448, 16), (224, 8)]  # side of the image in pixels, G
qwen.stop_ids = lambda processor: [-1]   # no token of ours stops a completion; generate gets min_new_tokens


class Ours:
    def __init__(self, policy, processor, prompts, G, C):
        self.policy, self.processor, self.prompts, self.G, self.C = policy, processor, prompts, G, C

    def rollout(self):
        noise = torch.rand(len(self.prompts) * self.G, self.C, device=qwen.device())
        return qwen.rollout(self.policy, self.processor, qwen.collate(self.prompts), self.C, noise, self.G).tokens

    def logprobs(self, model, b, tokens):
        return qwen.token_logprobs(model, self.prompts[b], tokens[None], torch.ones_like(tokens[None], dtype=torch.bool))


class Plain(Ours):
    def inputs(self, ids, attention, b):
        """Rows of prompts `b`; every row brings its own image, as in a trainer's batch."""
        rows = [self.prompts[i] for i in b]
        image = (ids == self.policy.config.image_token_id).int()
        return dict(input_ids=ids, attention_mask=attention, mm_token_type_ids=image,
                    pixel_values=torch.cat([p.pixels for p in rows]), image_grid_thw=torch.cat([p.grids for p in rows]))

    def rollout(self):
        P = max(p.ids.shape[1] for p in self.prompts)  # generate wants the padding on the left
        left = lambda x: torch.nn.functional.pad(x, (P - x.shape[1], 0))
        ids = torch.cat([left(p.ids) for p in self.prompts])
        attention = torch.cat([left(torch.ones_like(p.ids)) for p in self.prompts])
        vision = self.processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
        out = self.policy.eval().generate(
            **self.inputs(ids, attention, range(len(ids))), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            suppress_tokens=vision, num_return_sequences=self.G, max_new_tokens=self.C, min_new_tokens=self.C)
        self.policy.train()
        return out[:, P:].view(len(ids), self.G, self.C)

    def logprobs(self, model, b, tokens):
        ids = torch.cat([self.prompts[b].ids.expand(self.G, -1), tokens], 1)
        with qwen.autocast():
            inputs = self.inputs(ids, torch.ones_like(ids), [b] * self.G)
            logits = model(**inputs, logits_to_keep=self.C + 1, use_cache=False).logits
        return logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2)[None]


def build(px, G, B, C, vocabulary=None):
    """-> the two sides, and their frozen references, on the same weights."""
    torch.manual_seed(0)
    data = load("synthetic", "det", px)
    samples = [data[i] for i in range(200)]
    policy, processor = train_sft.scratch([prompt(s) + target(s) for s in samples], px)
    policy.to(qwen.device())
    if vocabulary:
        policy.resize_token_embeddings(vocabulary, mean_resizing=False)
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").to(qwen.device())
    prompts = [qwen.encode(processor, prompt(s), load_images(s)) for s in samples[:B]]
    return [(kind(m.train(), processor, prompts, G, C), copy.deepcopy(m).requires_grad_(False))
            for kind, m in ((Ours, policy), (Plain, plain))]


def one_step(side, reference, optimizer, groups):
    """One GRPO step on random rewards -> seconds of its three parts."""
    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
    began, seconds = now(), dict.fromkeys(("rollout", "reference", "update"), 0.0)
    tokens = side.rollout()
    assert tokens.shape == (groups, side.G, side.C)
    seconds["rollout"] = now() - began
    advantage, mask = grpo.advantages(torch.rand(groups, side.G, device=tokens.device)), torch.ones_like(tokens, dtype=torch.bool)
    weights = grpo.token_weights(mask, "grpo", side.C)
    for b in range(groups):
        began = now()
        with torch.no_grad():
            ref = side.logprobs(reference, b, tokens[b])
        middle = now()
        logprobs, part = side.logprobs(side.policy, b, tokens[b]), slice(b, b + 1)
        grpo.policy_loss(logprobs, logprobs.detach(), ref, advantage[part], mask[part], weights[part],
                         loss="grpo", clip_low=0.2, clip_high=0.2, beta=0.01)[0].backward()
        seconds["reference"] += middle - began
        seconds["update"] += now() - middle
    began = now()
    optimizer.step()
    optimizer.zero_grad()
    seconds["update"] += now() - began
    return seconds | {"total": sum(seconds.values())}


def time_case(px, G, B, C, repeats):
    row = {"case": f"{px} px, G {G}", "prompts": B, "group": G, "tokens": C, "px": px}
    for name, (side, reference) in zip(("ours", "plain"), build(px, G, B, C)):
        row["prompt_tokens"] = max(p.ids.shape[1] for p in side.prompts)
        optimizer = torch.optim.AdamW(side.policy.parameters(), lr=1e-6)
        steps = [one_step(side, reference, optimizer, B) for _ in range(repeats + 1)][1:]  # the first one warms up
        row[name] = {part: round(statistics.median(s[part] for s in steps), 3) for part in steps[0]}
    row["ratio"] = {part: round(row["plain"][part] / row["ours"][part], 2) for part in row["ours"]}
    print(json.dumps(row), flush=True)


def memory_case(px, G, C, vocabulary):
    row = {"case": "memory", "px": px, "group": G, "tokens": C, "vocabulary": vocabulary}
    for name, (side, _) in zip(("ours", "plain"), build(px, G, 1, C, vocabulary)):
        row["prompt_tokens"] = side.prompts[0].ids.shape[1]
        tokens = torch.randint(10, 500, (G, C), device=qwen.device())
        row[name] = {}
        for part in ("forward", "forward and backward"):
            def work():
                logprobs = side.logprobs(side.policy, 0, tokens)
                if part != "forward":
                    logprobs.sum().backward()
                side.policy.zero_grad()
            row[name][part] = round(peak_mib(work))
    print(json.dumps(row), flush=True)


def peak_mib(work):
    """MiB of tensors that `work` holds at its peak, beside those that were there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        held += change
        peak = max(peak, held)
    return peak / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int), parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4), parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3), parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "cpus": os.cpu_count(),
                      "threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True)
    if args.memory:
        for G in (8, 16):
            memory_case(448, G, args.tokens, 1_000)
        for vocabulary in (1_000, 16_000, 64_000):
            for px in [args.px] if args.px else (224, 448):
                memory_case(px, args.group, args.tokens, vocabulary)
    else:
        for px, G in [(args.px, args.group)] if args.px else CASES:
            time_case(px, G, args.prompts, args.tokens, args.repeats)


if __name__ == "__main__":
    main()
