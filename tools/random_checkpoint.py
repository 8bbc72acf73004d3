"""A checkpoint of Qwen2.5-VL's true shapes with random weights, in bf16, in several files, with the
tokenizer of tiny: the size of the real model without its download.

    python tools/random_checkpoint.py --size 3b runs/random-3b                # 7.5 GB, tied
    python tools/random_checkpoint.py --size 7b --layers 4 runs/random-7b     # an untied head
    python train_grpo.py --model runs/random-3b --lora 16 --prompts 1 --group 2 --max-new-tokens 8 \\
        --steps 1 --heldout 1 --out runs/true-size
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import Qwen2_5_VLConfig

from model import Qwen
from pretrained import load_model, save_processor
from tools import sizing


def save_random_checkpoint(config: Qwen2_5_VLConfig, folder: Path, file_size: str = "2GB") -> None:
    tiny, processor = load_model("tiny", image_size=448)
    sizing.copy_token_ids(tiny.config, config)
    torch.manual_seed(0)
    model = Qwen._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=file_size)
    save_processor(processor, folder)
    count = sum(weight.numel() for weight in model.parameters())
    print(f"{folder}: {count:,} weights in bf16, image size {processor.image_size}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=sizing.SHAPES, default="3b")
    parser.add_argument("--layers", type=int, help="decoder layers (default: as published)")
    args = parser.parse_args()
    config = sizing.shape(args.size)
    if args.layers:
        config.text_config.num_hidden_layers = args.layers
        config.text_config.layer_types = config.text_config.layer_types[: args.layers]
    save_random_checkpoint(config, args.folder)


if __name__ == "__main__":
    main()
