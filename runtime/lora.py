"""LoRA (https://arxiv.org/abs/2106.09685): W x + 2 B A x, with A (rank, in) random at first and B
(out, rank) zero. Only A and B learn.

peft puts A and B into the layers of the model, and its view of the model, a PeftModel, knows how
they are saved. The reference of the KL penalty is the same model with the adapters of the stage's
start, so it needs no copy of the model.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

from runtime.distributed import full_tensor, to_compute_dtype
from runtime.errors import UserError, first_line
from runtime.ranks import rank


def has_adapters(name: str) -> bool:
    """Whether --model names a folder of adapters."""
    return Path(name, "adapter_config.json").is_file()


def base_of_adapters(folder: str) -> str:
    """The model that a folder's adapters were trained on."""
    return json.loads(Path(folder, "adapter_config.json").read_text())["base_model_name_or_path"]


def import_peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise UserError("LoRA needs peft: pip install peft")
    return peft


def read_adapters(model: Qwen, folder: str) -> "PeftModel":  # noqa: F821  peft is optional
    """Put the adapters of a folder into the model. Raises UserError if they do not belong there."""
    peft = import_peft()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapters = peft.PeftModel.from_pretrained(
                model, folder, is_trainable=True, torch_device="cpu")
    except Exception as error:  # peft raises several types
        raise UserError(f"--model {folder}: its adapters cannot be read "
                        f"({first_line(error)})") from error
    tied = (model.lm_head, model.get_input_embeddings())
    if model.config.tie_word_embeddings and any(hasattr(layer, "lora_A") for layer in tied):
        raise UserError(f"--model {folder}: its adapters change lm_head or embed_tokens, which "
                        "have the same weights in this model; train adapters without them")
    return adapters


def add_adapters(model: Qwen, rank: int, folder: str = "",
                 with_reference: bool = False) -> "PeftModel":  # noqa: F821
    """Add LoRA to all linear layers of the language model, or continue the adapters of a folder.

    Only A and B learn, so the rest is cast to compute_dtype. `with_reference` adds a frozen copy of
    A and B, for update_reference. Raises UserError if the folder's adapters cannot be continued.
    """
    peft = import_peft()
    to_compute_dtype(model)
    if has_adapters(folder):
        adapters = read_adapters(model, folder)
        model.model.visual.requires_grad_(False)  # other programs may have adapted it
        config = adapters.peft_config["default"]
        if config.r != rank:
            raise UserError(f"--lora {rank}: the adapters in {folder} have rank {config.r}; give "
                            "that, or leave --lora out to train all weights")
        linear = all(isinstance(layer.base_layer, torch.nn.Linear)
                     for layer in adapted_layers(model))
        if (config.use_dora or config.modules_to_save or config.bias != "none" or not linear
                or config.lora_bias or config.trainable_token_indices):
            raise UserError(f"--model {folder}: only plain LoRA of linear layers can be continued, "
                            "no DoRA, biases, embeddings, convolutions, tokens or modules_to_save; "
                            "leave --lora out to train all weights")
        if not any(weight.requires_grad for weight in model.parameters()):
            raise UserError(f"--model {folder}: its adapters change the vision tower alone, and "
                            "--lora trains those of the language model; leave --lora out to train "
                            "all weights")
    else:
        targets = r".*language_model\.layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
        adapters = peft.get_peft_model(model, config)
    if with_reference:  # PiSSA's and OLoRA's start would change the weights of the model again
        adapters.add_adapter("reference", replace(config, init_lora_weights=True))
    for layer in adapted_layers(model):  # the log-probs are of the distribution that was sampled
        for dropout in layer.lora_dropout.values():
            dropout.p = 0.0
    return adapters


def save_adapters(adapters: "PeftModel", model: Qwen, folder: Path) -> None:  # noqa: F821
    """Write the adapters of a model that may be sharded, in peft's layout."""
    weights = {f"base_model.model.{name}": full_tensor(weight.detach()).float().cpu()
               for name, weight in model.named_parameters() if ".default." in name}
    if rank() == 0:
        config = adapters.peft_config["default"]
        base = Path(config.base_model_name_or_path)
        if base.is_dir():  # a relative path would be another folder, or a hub id, from elsewhere
            config.base_model_name_or_path = str(base.resolve())
        adapters.save_pretrained(folder, state_dict=weights, selected_adapters=["default"],
                                 save_embedding_layers=False)


def adapted_layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for layer in module.modules() if hasattr(layer, "lora_A")]


@torch.no_grad()
def update_reference(policy: torch.nn.Module) -> None:
    """Make the adapters as they are now the reference, where with_reference has made room."""
    for layer in adapted_layers(policy):
        for part in (layer.lora_A, layer.lora_B):
            if "reference" in part:
                part["reference"].weight.copy_(part["default"].weight)


@contextmanager
def reference_adapters(policy: torch.nn.Module) -> Iterator[None]:
    """A context in which the policy is the reference: the model with the reference's adapters,
    without any if there are none. So the reference needs no copy of the model."""
    # Not peft's set_adapter, which also changes what learns.
    layers = adapted_layers(policy)
    active = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = ["reference"]
    try:
        yield
    finally:  # the same lists again: torch.compile's guards ask which layers share one
        for layer, adapters in zip(layers, active):
            layer._active_adapter = adapters


@torch.no_grad()
def merged_weight(model: Qwen, name: str) -> Tensor:
    """A whole weight in float32, that of a layer with LoRA as W + scaling B A."""
    module_name, _, kind = name.rpartition(".")
    layer = model.get_submodule(module_name)
    if not hasattr(layer, "lora_A"):
        return full_tensor(getattr(layer, kind)).float()
    weight = full_tensor(getattr(layer.base_layer, kind)).float()
    if kind == "weight":
        A, B = (full_tensor(part["default"].weight) for part in (layer.lora_A, layer.lora_B))
        weight = weight + layer.scaling["default"] * (B @ A)
    return weight
