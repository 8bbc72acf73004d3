"""Speed and memory of one GRPO step, beside the same work in plain transformers and beside what the
machine allows. One JSON line per case.

    python tools/bench.py                          # CPU, a random model of tiny's size, 3 cases:
                                                   # 448 px G 8, 448 px G 16, 224 px G 8
    python tools/bench.py --device cuda --size 3b  # the shapes of Qwen2.5-VL-3B, random weights,
                                                   # bf16 (7b: with LoRA)

A step has all parts of a GRPO step with a KL penalty; numbers are medians after a warm-up step.
`plain` is what trainers do with the same weights: `generate` with num_return_sequences=G, then G
rows of prompt + completion, and the logits of the completion only. Neither side stops early: each
completion has exactly C tokens. `floor` is the least time. For a decoded token it is the bytes of
weights and cache divided by the bandwidth of a copy; for the update, its floating point operations
divided by the rate of a large matrix product. Both rates are measured in the same run.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sizing
from data import load_samples
from grpo import compute_advantages, policy_loss, token_weights
from metrics.training import forward_flops, update_passes
from model import ATTENTION, Policy, Qwen, token_logprobs
from processing import collate, encode
from rewards import score_completion
from rollout import Rollout, Sampler
from runtime.distributed import (
    all_reduce_sum,
    autocast,
    build_policy_and_sampling_model,
    compute_dtype,
    device,
    make_ref_model,
    sync_sampling_model,
)
from runtime.layers import use_fused_layers
from runtime.lora import adapted_layers, add_adapters, reference_adapters
from runtime.optimisation import default_pack_tokens, pack_groups
from sample import format_prompt, format_target
from tiny.scratch import new_tiny_model

PLAIN_ATTENTION = {"text_config": "sdpa", "vision_config": "sdpa"}
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


class Ours:
    """The models, the data, and how this project samples completions and computes log-probs."""

    def __init__(self, model, processor, samples, G, C, compile_decode_step=False,
                 pack_tokens=None):
        self.processor, self.samples, self.G, self.C = processor, samples, G, C
        checkpointing = model.model.language_model.gradient_checkpointing
        self.pack_tokens = pack_tokens or default_pack_tokens(checkpointing)
        self.policy, self.sampling_model = build_policy_and_sampling_model(Policy(model), None)
        self.lora = bool(adapted_layers(model))
        self.ref_model = None  # with LoRA, the reference is the policy without adapters
        if not self.lora:
            self.ref_model = make_ref_model(self.policy, self.sampling_model, None)
        self.policy.train()
        self.sampler = Sampler(self.sampling_model, processor, compile_decode_step)
        self.sampler.stop_ids = (-1,)  # no token stops a completion
        self.prompts = self.encode()

    def encode(self):
        return [encode(self.processor, sample) for sample in self.samples]

    def rollout(self, C):
        """-> tokens (B, G, C)"""
        random_numbers = torch.rand(len(self.samples) * self.G, C, device=device())
        return self.sampler.generate(collate(self.prompts), C, self.G, 1.0, random_numbers).tokens

    def micro_batches(self):
        """The indices of the prompts of each pass, as train_grpo.py packs them."""
        sizes = {b: (p.input_ids.shape[1], self.G * self.C) for b, p in enumerate(self.prompts)}
        return pack_groups(sizes, self.pack_tokens)

    def logprobs(self, policy, indices, tokens):
        """Log-probs (b, G, C) of the completions (b, G, C) of these prompts."""
        mask = torch.ones_like(tokens, dtype=torch.bool)
        inputs = collate([self.prompts[b] for b in indices])
        return token_logprobs(policy.model, inputs, tokens, mask)


class Plain(Ours):
    """The same with transformers' own attention and generate."""

    def __init__(self, *args):
        super().__init__(*args)
        for model in (self.policy.model, self.sampling_model):
            model.set_attn_implementation(PLAIN_ATTENTION)
        if self.ref_model:
            self.ref_model.model.set_attn_implementation(PLAIN_ATTENTION)

    def inputs(self, input_ids, attention_mask, prompt_indices):
        """Inputs for rows of these prompts; each row has its own copy of the image."""
        prompts = [self.prompts[b] for b in prompt_indices]
        is_image = input_ids == self.sampling_model.config.image_token_id
        return {"input_ids": input_ids, "attention_mask": attention_mask,
                "mm_token_type_ids": is_image.int(),
                "pixel_values": torch.cat([p.pixel_values for p in prompts]),
                "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts])}

    @torch.no_grad()
    def rollout(self, C):
        P = max(p.input_ids.shape[1] for p in self.prompts)

        def pad_left(x):  # generate wants the padding on the left
            return torch.nn.functional.pad(x, (P - x.shape[1], 0))

        input_ids = torch.cat([pad_left(p.input_ids) for p in self.prompts])
        mask = torch.cat([pad_left(torch.ones_like(p.input_ids)) for p in self.prompts])
        suppressed = self.processor.tokenizer.convert_tokens_to_ids(VISION_TOKENS)
        with autocast():
            tokens = self.sampling_model.eval().generate(
                **self.inputs(input_ids, mask, range(len(input_ids))), do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, suppress_tokens=suppressed,
                num_return_sequences=self.G, max_new_tokens=C, min_new_tokens=C)
        self.policy.train()
        return tokens[:, P:].view(len(input_ids), self.G, C)

    def micro_batches(self):
        return [[b] for b in range(len(self.samples))]

    def logprobs(self, policy, indices, tokens):
        [b], [tokens] = indices, tokens                                         # (G, C)
        input_ids = torch.cat([self.prompts[b].input_ids.expand(self.G, -1), tokens], 1)
        inputs = self.inputs(input_ids, torch.ones_like(input_ids), [b] * self.G)
        with autocast():
            output = policy.model(**inputs, logits_to_keep=self.C + 1, use_cache=False)
        logprobs = output.logits[:, :-1].float().log_softmax(-1)                # (G, C, V)
        return logprobs.gather(2, tokens[:, :, None]).squeeze(2)[None]


def build(size, px, B, checkpointing):
    """-> (model with random weights, processor, B samples)"""
    torch.manual_seed(0)
    dataset = load_samples("synthetic", "det", px)
    samples = [dataset[i] for i in range(200)]
    model, processor = new_tiny_model([format_prompt(s) + format_target(s) for s in samples], px)
    if size != "tiny":
        config = sizing.shape(size)
        sizing.copy_token_ids(model.config, config)
        with torch.device(device()):
            model = use_fused_layers(Qwen._from_config(config, attn_implementation=ATTENTION))
    if size == "7b":  # AdamW's moments of all weights do not fit on one GPU
        add_adapters(model, sizing.RANK)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, processor, samples[:B]


# --------------------------------------------------------------------------------------------------
# Time

def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def one_step(side, optimizer):
    """One GRPO step -> {part: seconds}"""
    B, G, C = len(side.samples), side.G, side.C
    seconds = Counter()
    last = now()

    def record(part):
        nonlocal last
        seconds[part] += now() - last
        last = now()

    side.encode()
    record("data")
    tokens = side.rollout(C)
    assert tokens.shape == (B, G, C)
    record("rollout")
    mask = torch.ones_like(tokens, dtype=torch.bool)
    texts = side.sampler.decode_texts(Rollout(tokens, mask, None, None, None))
    for sample, group in zip(side.samples, texts):
        for text in group:
            score_completion(text, sample)
    record("rewards")
    rewards = torch.rand(B, G, device=tokens.device)  # real ones of a random model are all equal
    advantages, _ = compute_advantages(rewards, {}, mask, False, all_reduce_sum)
    weights = token_weights(mask, "grpo", C)
    for indices in side.micro_batches():
        with torch.no_grad(), reference_adapters(side.policy):
            ref_logprobs = side.logprobs(side.ref_model or side.policy, indices, tokens[indices])
        record("reference")
        logprobs = side.logprobs(side.policy, indices, tokens[indices])
        loss, _ = policy_loss(
            logprobs, logprobs.detach(), ref_logprobs, advantages[indices], mask[indices],
            weights[indices], loss="grpo", clip_low=0.2, clip_high=0.2, beta=0.01)
        loss.backward()
        record("update")
    optimizer.step()
    optimizer.zero_grad()
    sync_sampling_model(side.sampling_model, side.policy)
    record("update")
    return dict(seconds) | {"total": sum(seconds.values())}


def machine_rates():
    """(bytes per second of a copy, floating point operations per second of a matrix product)"""
    cuda = torch.cuda.is_available()
    x = torch.ones(2**29 if cuda else 2**26, device=device())
    y = torch.empty_like(x)
    n = 8192 if cuda else 2048
    a = torch.randn(n, n, device=device()).to(compute_dtype())

    def times_per_second(work):
        for _ in range(3):
            work()
        t0 = now()
        for _ in range(10):
            work()
        return 10 / (now() - t0)

    bandwidth = 2 * 4 * x.numel() * times_per_second(lambda: y.copy_(x))  # read and written
    return bandwidth, 2 * n**3 * times_per_second(lambda: a @ a)


def floor(side, bandwidth, rate):
    """The least seconds of a decoded token of all rows, and of an update."""
    model, B = side.sampling_model, len(side.samples)
    text = model.config.text_config
    modules = (model.model.language_model.layers, model.lm_head)
    num_params = sum(param.numel() for module in modules for param in module.parameters())
    cached_tokens = sum(p.input_ids.shape[1] for p in side.prompts) + B * side.G * side.C / 2
    head_size = text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size
    bytes_read = (num_params + cached_tokens * per_token) * compute_dtype().itemsize
    num_tokens = torch.full((B,), side.G * side.C)
    flops = forward_flops(model, side.prompts, num_tokens).sum().item()
    return bytes_read / bandwidth, update_passes(side.lora) * flops / rate


def time_case(size, px, G, B, C, repeats, plain, checkpointing, compile_decode_step, pack_tokens):
    bandwidth, rate = machine_rates()
    result = {"case": f"{px} px, G {G}", "size": size, "prompts": B, "group": G, "tokens": C,
              "px": px}
    for name, kind in {"ours": Ours, "plain": Plain}.items():
        if name == "plain" and not plain:
            continue
        side = kind(*build(size, px, B, checkpointing), G, C, compile_decode_step, pack_tokens)
        result["prompt_tokens"] = max(p.input_ids.shape[1] for p in side.prompts)
        trainable = [param for param in side.policy.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-6, fused=torch.cuda.is_available())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        steps = [one_step(side, optimizer) for _ in range(repeats + 1)][1:]  # without the warm-up
        seconds = {part: statistics.median(s[part] for s in steps) for part in steps[0]}

        # A rollout of two tokens is nearly all prefill; the rest of a long one is decoding.
        side.rollout(2)
        short = []
        for _ in range(repeats):
            t0 = now()
            side.rollout(2)
            short.append(now() - t0)
        decode_s = (seconds["rollout"] - statistics.median(short)) / (C - 2)
        result[name] = {part: round(s, 3) for part, s in seconds.items()}
        result[name] |= {"decode_ms": round(1e3 * decode_s, 2),
                         "tokens_per_s": round(B * G * C / seconds["total"])}
        if torch.cuda.is_available():
            result[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if name == "ours":
            floor_decode, floor_update = floor(side, bandwidth, rate)
            result["floor"] = {"decode_ms": round(1e3 * floor_decode, 3),
                               "update": round(floor_update, 3),
                               "gb_per_s": round(bandwidth / 1e9, 1),
                               "tflop_per_s": round(rate / 1e12, 2),
                               "update_share": round(floor_update / seconds["update"], 2)}
        del side, optimizer, trainable  # frees the memory for the other side
    if plain:
        parts = ("rollout", "reference", "update", "total", "decode_ms")
        result["ratio"] = {part: round(result["plain"][part] / result["ours"][part], 2)
                           for part in parts}
    print(json.dumps(result), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("tiny", *sizing.SHAPES), default="tiny")
    parser.add_argument("--px", type=int, help="one case, with --group (default: three for the "
                        "CPU, 448 px for a GPU)")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompts", type=int, help="default: 4, on a GPU 8")
    parser.add_argument("--tokens", type=int, help="default: 64, on a GPU 256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the decode step")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                        help="default: on a GPU, as training at these sizes does")
    parser.add_argument("--pack-tokens", type=int, help="default: as train_grpo.py")
    parser.add_argument("--ours", action="store_true", help="without the plain side")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if not cuda:
        torch.cuda.is_available = lambda: False
    elif not torch.cuda.is_available():
        sys.exit("error: --device cuda: PyTorch finds no GPU")
    print(json.dumps({"device": torch.cuda.get_device_name() if cuda else "cpu",
                      "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
                      "torch": torch.__version__}), flush=True)
    C = args.tokens or (256 if cuda else 64)
    checkpointing = cuda if args.gradient_checkpointing is None else args.gradient_checkpointing
    cases = [(448, 8)] if cuda else [(448, 8), (448, 16), (224, 8)]
    if args.px:
        cases = [(args.px, args.group)]
    for px, G in cases:
        time_case(args.size, px, G, args.prompts or (8 if cuda else 4), C, args.repeats,
                  not args.ours, checkpointing, args.compile, args.pack_tokens)


if __name__ == "__main__":
    main()
