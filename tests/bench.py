"""The group path beside the same work through plain transformers, and beside what the machine allows. One JSON line a case.

    python tests/bench.py                            # CPU, a random model of tiny's size: 448 px G 8, 448 px G 16, 224 px G 8
    python tests/bench.py --size mid --px 448        # of 110 M weights
    python tests/bench.py --device cuda --size 3b    # the true shapes of Qwen2.5-VL-3B, random weights, bf16 (7b: with LoRA)
    python tests/bench.py --memory                   # peak of one group's update, by group, prompt and vocabulary

A step has all parts of a GRPO step with a KL penalty; medians after a warm-up. `plain` is what trainers do on the same weights:
`generate` with num_return_sequences=G, then G rows of prompt + completion, the logits of the completion only. Neither may
stop early: each completion has exactly C tokens. `floor`: for a decoded token the bytes of weights and cache over the copy
bandwidth, for the update its floating point operations over the rate of a large matrix product, both measured on the spot.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import grpo
import model as qwen
import parallel
import rollout
import sizing
from data import load, load_images, prompt, target
from rewards import reward_parts
from tiny.scratch import scratch

PLAIN = {"text_config": "sdpa", "vision_config": "sdpa"}


class Ours:
    def __init__(self, policy, sampler, reference, processor, samples, G, C):
        self.policy, self.sampler, self.reference, self.processor, self.G, self.C = policy, sampler, reference, processor, G, C
        self.samples, self.prompts = samples, self.data(samples)

    def data(self, samples):
        return [qwen.encode(self.processor, prompt(s), load_images(s)) for s in samples]

    def rollout(self, C=None):
        noise = torch.rand(len(self.prompts) * self.G, C or self.C, device=qwen.device())
        return rollout.generate(self.sampler, self.processor, qwen.collate(self.prompts), C or self.C, noise, self.G).tokens

    def logprobs(self, model, b, tokens):
        return qwen.token_logprobs(model, self.prompts[b], tokens[None], torch.ones_like(tokens[None], dtype=torch.bool))


class Plain(Ours):
    def __init__(self, *args):
        super().__init__(*args)
        for model in (self.policy, self.sampler, self.reference):
            model.set_attn_implementation(PLAIN)

    def inputs(self, ids, attention, b):
        """Rows of prompts `b`; every row brings its own image, as in a trainer's batch."""
        rows = [self.prompts[i] for i in b]
        image = (ids == self.policy.config.image_token_id).int()
        return {"input_ids": ids, "attention_mask": attention, "mm_token_type_ids": image,
                    "pixel_values": torch.cat([p.pixels for p in rows]), "image_grid_thw": torch.cat([p.grids for p in rows])}

    @torch.no_grad()
    def rollout(self, C=None):
        P = max(p.ids.shape[1] for p in self.prompts)  # generate wants the padding on the left
        def left(x):
            return torch.nn.functional.pad(x, (P - x.shape[1], 0))
        ids = torch.cat([left(p.ids) for p in self.prompts])
        attention = torch.cat([left(torch.ones_like(p.ids)) for p in self.prompts])
        vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
        with qwen.autocast():
            out = self.sampler.eval().generate(
                **self.inputs(ids, attention, range(len(ids))), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                suppress_tokens=self.processor.tokenizer.convert_tokens_to_ids(vision), num_return_sequences=self.G,
                max_new_tokens=C or self.C, min_new_tokens=C or self.C)
        self.policy.train()
        return out[:, P:].view(len(ids), self.G, -1)

    def logprobs(self, model, b, tokens):
        ids = torch.cat([self.prompts[b].ids.expand(self.G, -1), tokens], 1)
        with qwen.autocast():
            inputs = self.inputs(ids, torch.ones_like(ids), [b] * self.G)
            logits = model(**inputs, logits_to_keep=self.C + 1, use_cache=False).logits
        return logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2)[None]


def build(size, px, G, B, C, vocabulary=None):
    """-> (the three models, processor, samples, G, C) for one side; random weights."""
    torch.manual_seed(0)
    data = load("synthetic", "det", px)
    samples = [data[i] for i in range(200)]
    model, processor = scratch([prompt(s) + target(s) for s in samples], px)
    if size != "tiny":
        mid = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 16, "num_attention_heads": 10,
               "num_key_value_heads": 2, "vocab_size": 8192,
               "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}
        vision = {"depth": 8, "hidden_size": 320, "num_heads": 8, "intermediate_size": 860, "out_hidden_size": 640,
                  "fullatt_block_indexes": [3, 7]}
        config = sizing.shape(size) if size != "mid" else Qwen2_5_VLConfig(text_config=mid, vision_config=vision,
                                                                           tie_word_embeddings=True)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            setattr(config, name, getattr(model.config, name))
        with torch.device(qwen.device()):
            model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=qwen.ATTENTION)
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    if size == "7b":  # one GPU cannot hold all of its moments
        qwen.add_adapters(model, sizing.RANK)
    policy, sampler = parallel.spread(model, None)
    if qwen.device().type == "cuda":  # as training at these sizes does
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.model.train(), sampler, parallel.frozen(policy, sampler, None).model, processor, samples[:B], G, C


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def one_step(side, optimizer):
    """One GRPO step -> seconds of its parts."""
    B, times = len(side.samples), [now()]
    def tick():
        return times.append(now()) or times[-1] - times[-2]
    side.data(side.samples)
    seconds = {"data": tick()}
    tokens = side.rollout()
    assert tokens.shape == (B, side.G, side.C)
    seconds["rollout"] = tick()
    nothing = torch.ones_like(tokens, dtype=torch.bool)
    for sample, group in zip(side.samples, rollout.texts(side.processor, rollout.Completions(tokens, nothing, *[None] * 3))):
        for text in group:
            reward_parts(text, sample)
    seconds |= {"rewards": tick(), "reference": 0.0, "update": 0.0}
    advantage = grpo.advantages(torch.rand(B, side.G, device=tokens.device), divide_by_std=False)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    weights = grpo.token_weights(mask, "grpo", side.C)
    for b in range(B):
        with torch.no_grad():
            reference = side.logprobs(side.reference, b, tokens[b])
        seconds["reference"] += tick()
        logprobs, part = side.logprobs(side.policy, b, tokens[b]), slice(b, b + 1)
        grpo.policy_loss(logprobs, logprobs.detach(), reference, advantage[part], mask[part], weights[part],
                         loss="grpo", clip_low=0.2, clip_high=0.2, beta=0.01)[0].backward()
        seconds["update"] += tick()
    optimizer.step()
    optimizer.zero_grad()
    if side.sampler is not side.policy:
        parallel.refresh(side.sampler, qwen.Policy(side.policy))
    seconds["update"] += tick()
    return seconds | {"total": sum(seconds.values())}


def machine():
    """Bytes a second of a copy, floating point operations a second of a matrix product, on the device in its compute type."""
    cuda = torch.cuda.is_available()
    x, side = torch.ones(2**29 if cuda else 2**26, device=qwen.device()), 8192 if cuda else 2048
    a = torch.randn(side, side, device=qwen.device())
    a, y, rates = a.to(qwen.compute_dtype()), torch.empty_like(x), []
    for work, amount in ((lambda: y.copy_(x), 2 * x.numel() * 4), (lambda: a @ a, 2 * len(a) ** 3)):
        for _ in range(3):
            work()
        began = now()
        for _ in range(10):
            work()
        rates.append(10 * amount / (now() - began))
    return rates


def floor(side, bandwidth, rate):
    """Seconds that a decoded token of all rows, and an update, take at least."""
    model, B, wide = side.sampler, len(side.samples), 2 if torch.cuda.is_available() else 4
    text = model.config.text_config
    read = sum(w.numel() for module in (model.model.language_model.layers, model.lm_head) for w in module.parameters())
    cached = sum(p.ids.shape[1] for p in side.prompts) + B * side.G * side.C / 2
    cached *= 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    work = 3 * qwen.flops(model, side.prompts, torch.full((B,), side.G * side.C)).sum().item()
    return wide * (read + cached) / bandwidth, work / rate


def time_case(size, px, G, B, C, repeats, plain):
    bandwidth, rate = machine()
    row = {"case": f"{px} px, G {G}", "size": size, "prompts": B, "group": G, "tokens": C, "px": px}
    for name, kind in (("ours", Ours), ("plain", Plain))[: 1 + plain]:
        side = kind(*build(size, px, G, B, C))
        row["prompt_tokens"] = max(p.ids.shape[1] for p in side.prompts)
        learning = [w for w in side.policy.parameters() if w.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-6, fused=torch.cuda.is_available())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        steps = [one_step(side, optimizer) for _ in range(repeats + 1)][1:]  # the first one warms up
        seconds = {part: statistics.median(s[part] for s in steps) for part in steps[0]}
        side.rollout(2)
        short = []
        for _ in range(repeats):
            began = now()
            side.rollout(2)
            short.append(now() - began)
        token = (seconds["rollout"] - statistics.median(short)) / (C - 2)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident
        row[name] = {part: round(s, 3) for part, s in seconds.items()} | {
            "decode_ms": round(1e3 * token, 2), "tokens_per_s": round(B * G * C / seconds["total"]),
            "peak_gib": round(peak / 2**30, 2)}
        if name == "ours":
            least, update = floor(side, bandwidth, rate)
            row["floor"] = {"decode_ms": round(1e3 * least, 3), "update": round(update, 3), "gb_per_s": round(bandwidth / 1e9, 1),
                            "tflop_per_s": round(rate / 1e12, 2), "update_share": round(update / seconds["update"], 2)}
        del side, optimizer
        rollout.GRAPHS.clear()
    if plain:
        parts = ("rollout", "reference", "update", "total", "decode_ms")
        row["ratio"] = {part: round(row["plain"][part] / row["ours"][part], 2) for part in parts}
    print(json.dumps(row), flush=True)


def one_pass(side, tokens, backward):
    logprobs = side.logprobs(side.policy, 0, tokens)
    if backward:
        logprobs.sum().backward()
    side.policy.zero_grad()


def memory_case(px, G, C, vocabulary):
    row = {"case": "memory", "px": px, "group": G, "tokens": C, "vocabulary": vocabulary}
    for name, kind in (("ours", Ours), ("plain", Plain)):
        side = kind(*build("tiny", px, G, 1, C, vocabulary))
        row["prompt_tokens"] = side.prompts[0].ids.shape[1]
        tokens = torch.randint(10, 500, (G, C), device=qwen.device())
        row[name] = {}
        for part in ("forward", "forward and backward"):
            row[name][part] = round(peak_mib(partial(one_pass, side, tokens, backward=part != "forward")))
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("tiny", "mid", *sizing.SHAPES), default="tiny")
    parser.add_argument("--px", type=int, help="one case, with --group (default: three for the CPU, 448 px for a GPU)")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompts", type=int, help="default: 4, on a GPU 8")
    parser.add_argument("--tokens", type=int, help="default: 64, on a GPU 256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="the decoding step")
    parser.add_argument("--ours", action="store_true", help="without the plain side")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    rollout.stop_ids = lambda _: (-1,)  # no token of ours stops a completion; generate gets min_new_tokens
    if args.device == "cpu":
        torch.cuda.is_available = lambda: False
    elif not torch.cuda.is_available():
        sys.exit("error: --device cuda: no GPU is to be seen")
    cuda = args.device == "cuda"
    print(json.dumps({"device": torch.cuda.get_device_name() if cuda else "cpu", "cpus": os.cpu_count(),
                      "threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True)
    if args.compile:
        rollout.compile()
    C = args.tokens or (256 if cuda else 64)
    if args.memory:
        for G in (8, 16):
            memory_case(448, G, C, 1_000)
        for vocabulary in (1_000, 16_000, 64_000):
            for px in [args.px] if args.px else (224, 448):
                memory_case(px, args.group, C, vocabulary)
    else:
        several = [(448, 8)] if cuda else [(448, 8), (448, 16), (224, 8)]
        for px, G in [(args.px, args.group)] if args.px else several:
            time_case(args.size, px, G, args.prompts or (8 if cuda else 4), C, args.repeats, not args.ours)


if __name__ == "__main__":
    main()
