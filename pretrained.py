"""Qwen2.5-VL in Hugging Face format: load and save it, with its processor.

All weights are read as the file has them, and written in float32.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from model import ATTENTION, STOP_TOKENS, Qwen, vision_token_ids
from processing import Processor
from runtime.errors import UserError, first_line, why_not_loaded
from runtime.layers import use_fused_layers
from runtime.logging import print0
from runtime.lora import base_of_adapters, has_adapters, merged_weight, read_adapters, save_adapters
from runtime.out_folder import is_unfinished
from runtime.ranks import rank
from sample import TOKEN_SIZE, chat_template

MAX_FILE_SIZE = "500MB"  # of a saved model; a larger tensor has a file of its own


def load_model(name: str, image_size: int | None = None,
               merge: bool = True) -> tuple[Qwen, Processor]:
    """Model and processor from `tiny`, a folder, a hub id, or a folder of adapters (peft's layout).

    image_size  None takes the size that a checkpoint of this project was saved with, else 448
    merge       of adapters: False returns their base alone, for add_adapters
    The weights are on the CPU, in the file's precision, and mapped from it: they are read when they
    are used, and the processes of a node share them. Only safetensors and only transformers' own
    code are read. Raises UserError if the checkpoint is unreadable or incomplete.
    """
    disable_progress_bar()  # transformers' own; it would break up the lines of a training run
    folder = base = Path(__file__).parent / "tiny" if name == "tiny" else name
    if name != "tiny":
        check_model_name(name)
    try:
        if has_adapters(name):
            base = base_of_adapters(name)
            print0(f"--model {name}: adapters of {base}, {'merged' if merge else 'continued'}")
        model, report = Qwen.from_pretrained(
            base, dtype="auto", use_safetensors=True, trust_remote_code=False,
            attn_implementation=ATTENTION, output_loading_info=True)
        # Adapters of other programs have no processor.
        folder = folder if Path(folder, "preprocessor_config.json").exists() else base
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # The PIL backend by name: torchvision's is the default where it is installed, and resizes
        # a little differently, so two machines would not agree.
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except Exception as error:  # transformers raises a dozen types for an unusable checkpoint
        raise UserError(f"--model {name}: no readable Qwen2.5-VL checkpoint "
                        f"{why_not_loaded(str(base), error)}") from error
    missing = report["missing_keys"]
    if missing:  # transformers only warns, and fills them with random weights
        raise UserError(f"--model {name}: not a whole Qwen2.5-VL: no weights for {min(missing)} "
                        f"and {len(missing) - 1} more")
    if has_adapters(name) and merge:
        # In float32: bf16 would round small changes away.
        model = read_adapters(model.float(), name).merge_and_unload().requires_grad_(True)
    min_pixels = image_processor.size["shortest_edge"]  # both are areas, in spite of their names
    max_pixels = image_processor.size["longest_edge"]
    if image_size is None:  # Qwen's own files give a range
        side = math.isqrt(max_pixels)
        is_square = min_pixels == max_pixels == side**2 and side % TOKEN_SIZE == 0
        image_size = side if is_square else 448
    # Saved with the model: this project and transformers' users then resize to the same square.
    image_processor.size = {"shortest_edge": image_size**2, "longest_edge": image_size**2}
    return use_fused_layers(model), Processor(tokenizer, image_processor, image_size)


def check_model_name(name: str) -> None:
    """Raises UserError for a folder without a model, and for neither a folder nor a hub id."""
    folder = Path(name)
    run = folder.parent if folder.name == "model" else folder
    if is_unfinished(run):
        raise UserError(f"--model {name}: {run} holds a run that is not complete, and model/ is "
                        "written at its end; continue it with --resume, or take the model of its "
                        f"last checkpoint: python tools/export.py {run} FOLDER")
    if not folder.exists():
        if name.count("/") != 1:  # a hub id has one slash
            raise UserError(f"--model {name}: no such folder")
        if folder.parent.is_dir():  # a slip: the hub would be asked for a minute
            raise UserError(f"--model {name}: no such folder; if it is a hub id, rename the folder "
                            f"{folder.parent} that is here")
    if (folder / "model").is_dir() and not (folder / "config.json").exists():
        adapters = f" (adapters: {folder / 'adapter'})" * (folder / "adapter").is_dir()
        raise UserError(f"--model {name}: a run's folder; its model is {folder / 'model'}"
                        + adapters)
    if (folder / "run.json").exists():
        raise UserError(f"--model {name}: a run's checkpoint; python tools/export.py "
                        f"{folder.parent} FOLDER makes a model of it")


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to, moved there when complete, so that no run reads half a
    model. The first rank writes. Raises UserError if it cannot."""
    partial_folder = folder.with_name(folder.name + ".partial")
    try:
        if rank() == 0:
            shutil.rmtree(partial_folder, ignore_errors=True)  # left by a run that was killed
            partial_folder.mkdir(parents=True)
        yield partial_folder
        if rank() == 0:
            for file in partial_folder.iterdir():  # safetensors lets nobody else read its files
                file.chmod(partial_folder.stat().st_mode & 0o666)
            shutil.rmtree(folder, ignore_errors=True)
            partial_folder.rename(folder)
    except (OSError, SafetensorError) as error:  # a full disk raises either
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({first_line(error)})") from error


def save_model(model: Qwen, processor: Processor, folder: Path, system: str | None = None,
               thinking: bool = True, adapters: "PeftModel | None" = None) -> None:  # noqa: F821
    """Save in Hugging Face format, with LoRA merged; or only `adapters`, peft's view of the model.

    All ranks call it, as a sharded model is gathered for it. `system` and `thinking` are those of
    the Samples that it was trained on. So that other programs ask the model as this one does, its
    chat template, image processor and generation config replace those of a hub model. Raises
    UserError if the files cannot be written.
    """
    config, tokenizer = model.config, processor.tokenizer
    generation_config = GenerationConfig(  # greedy, without Qwen's penalty on repetition
        eos_token_id=tokenizer.convert_tokens_to_ids(list(STOP_TOKENS)),
        pad_token_id=tokenizer.pad_token_id, suppress_tokens=vision_token_ids(model))
    with complete_folder(folder) as partial_folder:
        if adapters:
            save_adapters(adapters, model, partial_folder)
        else:
            save_weights(model, partial_folder)
        if rank() == 0:
            save_processor(processor, partial_folder, system, thinking)
        if rank() == 0 and not adapters:
            config.architectures = [type(model).__name__]
            for part in (config, config.text_config, config.vision_config):
                part.dtype = torch.float32
            config.save_pretrained(partial_folder)
            generation_config.save_pretrained(partial_folder)


def save_processor(processor: Processor, folder: Path, system: str | None = None,
                   thinking: bool = True) -> None:
    tokenizer, image_processor, _ = processor
    tokenizer.chat_template = chat_template(system, thinking)
    image_processor.do_resize = False  # it cannot make a square of an image, as load_images does
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def save_weights(model: Qwen, folder: Path) -> None:
    """Write the weights in float32, because bf16 would round what was learned. No more than a file
    of them is in memory; transformers' save_pretrained would need all of them."""
    shapes = {name.replace(".base_layer", ""): torch.empty(weight.shape, device="meta")
              for name, weight in model.named_parameters() if "lora_" not in name}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=MAX_FILE_SIZE)
    weight_map = {}
    for file, names in split.filename_to_tensors.items():
        weights = {}
        for name in names:
            weight = merged_weight(model, name)
            if rank() == 0:
                weights[name] = weight.cpu()
        if rank() == 0:
            weights = revert_weight_conversion(model, weights)  # to the names of hub files
            save_file(weights, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(weights, file)
    if rank() == 0 and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
