"""Short runs of the scripts, one after the other, in the processes that torchrun starts;
tests/test_parallel.py compares them.

    torchrun --nproc-per-node 2 tests/several.py MODEL DATA OUT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import evaluate
import train_grpo
import train_sft
from flags import parse_eval_args, parse_grpo_args, parse_sft_args
from runtime import distributed

# AdamW divides a gradient by its own size, so where one is rounding noise a weight moves by the
# noise times the rate: at 1e-3 three weights of 1.5 million were off by 4e-5. Hence smaller rates.
SFT = ("--task det,cls --steps 5 --batch 6 --micro-batch 2 --warmup 0 --lr 1e-4 "
       "--max-new-tokens 8")
GRPO = ("--task det --steps 5 --prompts 6 --group 4 --max-new-tokens 32 --warmup 0 --lr 1e-3 "
        "--beta 0.1 --eval-every 100 --heldout 0")
DAPO = "--inner-steps 2 --steps 2 --mask-truncated --lr 1e-4 --freeze vision --shard-size 1"
STAGES = "--heldout 8 --format-weight 0.5"
MIXED = "--resample 2 --overlong-buffer 24 --loss geovlm --temperature 0.8 --pack-tokens 1"
GSPO = ("--clip-low 3e-4 --clip-high 4e-4 --inner-steps 2 --steps 2 --pack-tokens 2000 "
        "--gradient-checkpointing --clip-norm 0.05 --divide-by-std --lr 1e-4")
PARSE = {"train_sft": parse_sft_args, "train_grpo": parse_grpo_args, "evaluate": parse_eval_args}
RUNS = {
    "sft": (train_sft, f"{SFT} --freeze vision"),
    "grpo": (train_grpo, GRPO),
    "dapo": (train_grpo, f"{GRPO} --loss dapo {DAPO}"),
    "stages": (train_grpo, f"{GRPO} --task cls,det --steps 2 --lr 1e-4 {STAGES}"),
    "mixed": (train_grpo, f"{GRPO} --task cls+det --steps 2 --lr 1e-5 {MIXED}"),
    "gspo": (train_grpo, f"{GRPO} --loss gspo {GSPO}"),
    # as on a GPU: float32 weights, bf16 compute, a bf16 copy that generates
    "bf16": (train_grpo, f"{GRPO} --steps 2"),
    "lora": (train_grpo, f"{GRPO} --task cls,det --lora 4 --steps 2 --heldout 8"),
    "sft lora": (train_sft, f"{SFT} --lora 4"),
    # of the included default, whose answers differ; those to the tests' data are all the same
    "eval": (evaluate, "--task det --model tiny --data synthetic --limit 33 --batch 4"),
}


def users_of_compute_dtype():
    """The modules that imported compute_dtype; a test that replaces it has to do so in all."""
    function = distributed.compute_dtype
    return [module for module in list(sys.modules.values())
            if getattr(module, "__dict__", {}).get("compute_dtype") is function]


if __name__ == "__main__":
    model, data, out, *names = sys.argv[1:]
    modules = users_of_compute_dtype()
    sys.modules["matplotlib.figure"] = None  # no plots: each takes longer than a step
    for name in names or RUNS:
        script, flags = RUNS[name]
        out_flags = ["--model", model, "--data", data, "--out", f"{out}/{name}"]
        sys.argv = ["script", *out_flags, *flags.split()]
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        for module in modules:
            module.compute_dtype = lambda dtype=dtype: dtype
        script.main(PARSE[script.__name__](None))
    distributed.destroy()
