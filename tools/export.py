"""The model of a run that is not complete, as its last checkpoint has it.

    python tools/export.py runs/grpo runs/grpo-so-far

A complete run has model/ already. Adapters of LoRA are merged into the model, and not written
beside it as a complete run does.
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import Policy
from pretrained import load_model, save_model
from runtime.checkpoint import frozen_weights, read_run_json, read_tensors, saved_weights
from runtime.command_line import run_main
from runtime.errors import UserError
from runtime.lora import add_adapters
from runtime.out_folder import last_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the --out of a training run")
    parser.add_argument("folder", type=Path, help="where to write the model")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process
    checkpoint = last_checkpoint(args.run)
    if not checkpoint:
        raise UserError(f"{args.run}: there is no checkpoint in it")
    if args.folder.exists():
        raise UserError(f"{args.folder} exists; choose another folder")
    saved = read_run_json(checkpoint)
    flags = {name: None if text == "None" else text for name, text in saved["settings"].items()}
    if flags["model"] == "scratch":
        raise UserError(f"{args.run}: a run of --model scratch cannot be exported before its end, "
                        "as its tokenizer is not in the checkpoint; --resume takes it there")
    image_size = flags["image-size"] and int(flags["image-size"])
    model, processor = load_model(flags["model"], image_size, merge=not flags["lora"])
    if flags["lora"]:
        add_adapters(model, int(flags["lora"]), flags["model"])
    else:
        model.float()
    if flags["freeze"]:
        model.model.visual.requires_grad_(False)
    for name, found in frozen_weights(model).items():
        if saved["settings"].get(name, found) != found:
            raise UserError(f"{flags['model']}: its weights are not those that {args.run} began "
                            "with, and the checkpoint holds only what has been trained")
    policy = Policy(model)
    read_tensors(checkpoint, {"": {"policy": saved_weights(policy, policy)}})
    save_model(model, processor, args.folder, flags["system"],
               thinking=flags["no-think"] == "False")
    progress = saved["progress"]
    stage = f" of stage {progress['stage'] + 1}" if "stage" in progress else ""
    print(f"{args.folder}: the model after step {progress['step']}{stage}")


if __name__ == "__main__":
    run_main(main, "nothing was written")
