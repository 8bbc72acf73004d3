"""Memory that a GRPO step takes on each GPU, and so which settings fit: arithmetic over shapes.

    python tools/sizing.py --size 3b --gpus 8      # by what takes it, GiB on each GPU of 80 GB
    python tools/sizing.py --size 3b --lora        # the same for LoRA on one GPU
    python tools/sizing.py --table                 # which settings fit on which GPUs

No weights are loaded. The settings are the README's for the real model: 16 prompts of one 448 px
image (355 tokens) per step, 8 completions of at most 256 tokens each, gradient checkpointing.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metrics.held_out import BATCH_SIZE, NUM_SAMPLED
from runtime.optimisation import pack_tokens_for

PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 355, 256
SHAPES = {  # of Qwen2.5-VL-3B-Instruct and -7B-Instruct, from their published config.json
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
           "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
           "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
           "tie_word_embeddings": False},
}
RANK = 64  # of the LoRA adapters
GPUS = (1, 2, 4, 8, 16)
MARGIN = 1.1  # a tenth more, for fragmentation


def shape(size: str) -> Qwen2_5_VLConfig:
    """The config of a published model, without a download."""
    text = SHAPES[size]
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420,
              "out_hidden_size": text["hidden_size"]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision,
                            tie_word_embeddings=text["tie_word_embeddings"])


def copy_token_ids(source: Qwen2_5_VLConfig, config: Qwen2_5_VLConfig) -> None:
    """Give the config the vision tokens of another one, that of the tokenizer."""
    for name in ("image_token_id", "video_token_id", "vision_start_token_id",
                 "vision_end_token_id"):
        setattr(config, name, getattr(source, name))


@cache
def parameters(size: str) -> dict[str, int]:
    """Number of weights: all, of a decoder layer, of the vision tower, and of LoRA's adapters per
    rank."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(shape(size))
    layers = model.model.language_model.layers
    linear = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    return {"all": count(model), "layer": count(layers[0]), "vision": count(model.model.visual),
            "adapters": sum(module.in_features + module.out_features for module in linear)}


def count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def memory(size: str, gpu_gib: float, gpus: int = 1, lora: bool = False,
           reference: bool = True) -> dict[str, float]:
    """GiB on each GPU of gpu_gib GiB at the peak of a step, by what takes them."""
    text, n = shape(size).text_config, parameters(size)
    E, layers, V = text.hidden_size, text.num_hidden_layers, text.vocab_size
    trained, frozen = (RANK * n["adapters"], n["all"]) if lora else (n["all"], 0)
    ref_copy = 4 * trained if lora else 2 * n["all"]    # LoRA's is of the adapters
    has_rollout_copy = not (lora and gpus == 1)
    sizes = {
        "weights (float32; frozen ones bf16)": (4 * trained + 2 * frozen) / gpus,
        "AdamW": 8 * trained / gpus,
        "reference (bf16; adapters float32)": ref_copy / gpus if reference else 0,
        "rollout copy (bf16)": 2 * n["all"] if has_rollout_copy else 0,
    }
    # Captured decode steps keep their caches: of training, of greedy and sampled held-out scores.
    row = PROMPT_TOKENS + GROUP * NEW_TOKENS        # tokens of a packed row
    prompts = -(-PROMPTS // gpus)
    cached = [prompts * row, BATCH_SIZE * (PROMPT_TOKENS + NEW_TOKENS),
              BATCH_SIZE * (PROMPT_TOKENS + NUM_SAMPLED * NEW_TOKENS)]
    per_token = 2 * 2 * layers * text.num_key_value_heads * (E // text.num_attention_heads)
    sizes["keys and values of rollouts"] = per_token * sum(cached)
    sizes["CUDA context, NCCL"] = (0.6 + (gpus > 1)) * 2**30
    # Of the captured graphs, whose memory nothing else gets.
    sizes["a draw of tokens"] = 6 * 4 * max(prompts * GROUP, BATCH_SIZE * NUM_SAMPLED) * V
    rollout = {"keys and values of a prefill": per_token * max(cached)}

    rows = min(max(pack_tokens_for(gpu_gib) // row, 1), prompts)    # rows of a micro-batch
    kept = 2 * layers * rows * row * E              # inputs of checkpointed layers
    attended = 2 * 2 * GROUP * (PROMPT_TOKENS + NEW_TOKENS) * E     # keys, values by query head
    # One layer, recomputed, and its gradient
    layer = rows * 2 * (2 * row * (8 * E + 4 * text.intermediate_size) + attended)
    head = 3 * 4 * min(1024, row) * V               # logits, log-softmax, gradient of a chunk
    update = {"gradients": 4 * trained / gpus, "activations": kept + max(layer, head)}
    if gpus == 1:                                   # one layer's at a time, or the head's
        update["cast weights"] = 2 * max(n["layer"], V * E)
    else:                                           # the root, one unit, and the unit's gradient
        root = n["all"] - layers * n["layer"] - n["vision"]     # embeddings and head
        largest = max(2 * n["layer"], n["vision"], root)
        update["gathered weights"] = 2 * root + (2 + 2 + 4) * largest
    sizes |= max(rollout, update, key=lambda part: sum(part.values()))  # never both at once
    return {name: value / 2**30 for name, value in sizes.items()}


def fits(size: str, gib: float, gpus: int) -> str:
    """The richest setting that fits into a GPU's memory, with the GiB it takes."""
    settings = {"all": {}, "`--beta 0`": {"reference": False}, "`--lora`": {"lora": True}}
    for name, options in settings.items():
        total = sum(memory(size, gib, gpus, **options).values())
        if MARGIN * total <= gib:
            return f"{name} ({total:.0f})"
    return "-"


def table() -> list[str]:
    """Rows in Markdown."""
    rows = ["| model | memory of a GPU | 1 GPU | 2 | 4 | 8 | 16 |", "|---|---|---|---|---|---|---|"]
    for size in SHAPES:
        for gb in (24, 40, 80, 141):
            cells = " | ".join(fits(size, gb * 1e9 / 2**30, gpus) for gpus in GPUS)
            rows.append(f"| {size} | {gb} GB | {cells} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="3b")
    parser.add_argument("--gpus", type=int, choices=GPUS, default=1)
    parser.add_argument("--lora", action="store_true",
                        help=f"train LoRA adapters of rank {RANK} only")
    parser.add_argument("--table", action="store_true", help="all sizes and GPUs")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table()))
        return
    sizes = memory(args.size, 80e9 / 2**30, args.gpus, args.lora)
    for name, gib in (sizes | {"sum": sum(sizes.values())}).items():
        print(f"{name:38s}{gib:8.1f} GiB")


if __name__ == "__main__":
    main()
