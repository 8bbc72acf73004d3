"""How much memory a GRPO step takes on each GPU, and so which settings fit: arithmetic over shapes, nothing is loaded.

    python tests/sizing.py --size 3b --gpus 8          # the parts, GiB on each GPU
    python tests/sizing.py --size 3b --lora            # the same for LoRA on one GPU
    python tests/sizing.py --table                     # which settings fit on which GPUs: the README's table

For the README's settings of the real model: 16 prompts of one 448 px image (330 tokens) a step, 8 completions of at most 256
tokens each, gradient checkpointing.
"""

import argparse

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 330, 256
SHAPES = {  # of Qwen2.5-VL-3B-Instruct and -7B-Instruct, from their published config.json
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}}
RANK = 64  # of the adapters
GPUS = 1, 2, 4, 8, 16


def shape(size: str) -> Qwen2_5_VLConfig:
    """The config of a published model, without a download."""
    text = SHAPES[size]
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": text["hidden_size"]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"])


def parameters(config: Qwen2_5_VLConfig) -> dict[str, int]:
    """Number of weights: all, a decoder layer's, the vision tower's, and those of LoRA's adapters per rank."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    def count(module):
        return sum(w.numel() for w in module.parameters())
    layers = model.model.language_model.layers
    linear = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    return {"all": count(model), "layer": count(layers[0]), "vision": count(model.model.visual),
            "adapters": sum(m.in_features + m.out_features for m in linear)}


def memory(size: str, gpus: int = 1, lora: bool = False, reference: bool = True) -> dict[str, float]:
    """GiB on each GPU at the peak of a step, by what takes them."""
    config = shape(size)
    text, N = config.text_config, parameters(config)
    E, layers, V = text.hidden_size, text.num_hidden_layers, text.vocab_size
    trained, frozen = (RANK * N["adapters"], N["all"]) if lora else (N["all"], 0)
    root = N["all"] - layers * N["layer"] - N["vision"]                                 # embeddings, head
    bytes_of = {"weights (float32; frozen ones bf16)": (4 * trained + 2 * frozen) / gpus,
                "gradients": 4 * trained / gpus,
                "AdamW": 8 * trained / gpus,
                "reference (bf16)": 2 * N["all"] / gpus if reference and not lora else 0,  # with LoRA: adapters off
                "rollout copy (bf16)": 0 if lora and gpus == 1 else 2 * N["all"]}
    if gpus == 1:                                                                       # one layer's at a time, or the head
        bytes_of["cast weights"] = 2 * max(N["layer"], text.vocab_size * E)
    else:                                                                               # the root, one unit, and its gradient
        bytes_of["gathered weights"] = 2 * root + (2 + 2 + 4) * max(2 * N["layer"], N["vision"], root)
    row = PROMPT_TOKENS + GROUP * NEW_TOKENS                                            # tokens of a packed row
    cache = -(-PROMPTS // gpus) * row * 2 * 2 * layers * text.num_key_value_heads * (E // text.num_attention_heads)
    kept = 2 * layers * row * E                                                         # inputs of checkpointed layers
    wide = 2 * 2 * GROUP * (PROMPT_TOKENS + NEW_TOKENS) * E                             # keys and values by query head
    layer = 2 * (2 * row * (8 * E + 4 * text.intermediate_size) + wide)                 # one, recomputed, and its gradient
    head = 3 * 4 * min(1024, row) * V                                                   # logits, log-softmax, gradient of a chunk
    bytes_of["activations"] = kept + max(layer, head)
    bytes_of["keys and values of the rollout"] = cache                                  # of the captured step, so they stay
    return {name: count / 2**30 for name, count in bytes_of.items()}


def fits(size: str, gib: int, gpus: int) -> str:
    """The richest setting whose memory, and a tenth of it for fragments and the CUDA context, a GPU has."""
    for name, options in (("all", {}), ("`--beta 0`", {"reference": False}), ("`--lora`", {"lora": True})):
        if 1.1 * sum(memory(size, gpus, **options).values()) <= gib:
            return f"{name} ({sum(memory(size, gpus, **options).values()):.0f})"
    return "-"


def table() -> list[str]:
    """Rows in Markdown."""
    rows = ["| model | memory of a GPU | 1 GPU | 2 | 4 | 8 | 16 |", "|---|---|---|---|---|---|---|"]
    return rows + [f"| {size} | {gb} GB | " + " | ".join(fits(size, gb * 1e9 / 2**30, gpus) for gpus in GPUS) + " |"
                   for size in SHAPES for gb in (24, 40, 80, 141)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="3b")
    parser.add_argument("--gpus", type=int, choices=GPUS, default=1)
    parser.add_argument("--lora", action="store_true", help=f"adapters of rank {RANK} learn, nothing else")
    parser.add_argument("--table", action="store_true", help="all sizes and GPUs")
    args = parser.parse_args()
    if not args.table:
        parts = memory(args.size, args.gpus, args.lora)
        for name, gib in (parts | {"sum": sum(parts.values())}).items():
            print(f"{name:38s}{gib:8.1f} GiB")
        return
    print("\n".join(table()))


if __name__ == "__main__":
    main()
