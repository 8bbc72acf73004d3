"""Qwen2.5-VL: load and save, prompts as tensors, rotary positions, token log-probs.

The model is transformers' own; attention.py lets the G completions of a group share their prompt.
All log-probs of given tokens come from token_logprobs: for the policy, the old policy, the
reference and SFT.

Shapes: B prompts, G completions of each, P prompt tokens and C completion tokens (padded on the
right), V vocabulary, E hidden size, L tokens that go in, M tokens with a log-prob.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.logging import disable_progress_bar
from transformers.vision_utils import get_vision_position_ids

from attention import SharedPrompt, make_completion_attention_mask
from runtime.distributed import autocast, compute_dtype, device, rank
from runtime.errors import UserError, first_line
from runtime.layers import use_fused_layers
from runtime.logging import print0
from runtime.lora import has_adapters, merged_weight, read_adapters, save_adapters
from sample import Sample, chat_template, format_prompt, load_images

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")  # Qwen2.5-VL ends a turn with either
ATTENTION = {"text_config": "shared_prompt", "vision_config": "sdpa"}
MAX_FILE_SIZE = "500MB"  # of a saved model; a larger tensor has a file of its own


# --------------------------------------------------------------------------------------------------
# Load and save

class Processor(NamedTuple):
    tokenizer: PreTrainedTokenizerFast
    image_processor: Qwen2VLImageProcessorPil
    image_size: int  # side in pixels of the square that every image is resized to


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
    if name.count("/") != 1 and not Path(folder).exists():  # a hub id has one slash
        raise UserError(f"--model {name}: no such folder")
    if Path(folder, "model").is_dir() and not Path(folder, "config.json").exists():
        raise UserError(f"--model {name}: a run's folder; its model is {Path(folder, 'model')}")
    try:
        if has_adapters(name):
            base = json.loads(Path(name, "adapter_config.json").read_text())[
                "base_model_name_or_path"]
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
                        f"({first_line(error)})") from error
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
        image_size = math.isqrt(max_pixels) if min_pixels == max_pixels else 448
    # Saved with the model: this project and transformers' users then resize to the same square.
    image_processor.size = {"shortest_edge": image_size**2, "longest_edge": image_size**2}
    return use_fused_layers(model), Processor(tokenizer, image_processor, image_size)


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


# --------------------------------------------------------------------------------------------------
# Prompts as tensors

class Prompts(NamedTuple):
    """B prompts, padded on the right. Causal attention never sees what follows a token, so the
    padding needs no mask in the prompt itself."""
    input_ids: Tensor       # (B, P)
    position_ids: Tensor    # (3, B, P) rotary positions: time, height, width
    lengths: Tensor         # (B,) tokens without the padding
    pixel_values: Tensor    # (patches of all images, 3 * 2 * 14 * 14): channels, two video frames
                            # (a still image twice), height, width
    image_grid_thw: Tensor  # (images, 3) patches in time, height, width; on the CPU, because the
                            # vision tower reads them to lay out its windows
    # (image tokens of all prompts, E), computed once if the vision tower does not learn
    image_embeds: Tensor | None = None

    @property
    def attention_mask(self) -> Tensor:
        """(B, P) True on tokens, False on padding."""
        P = self.input_ids.shape[1]
        return torch.arange(P, device=self.lengths.device) < self.lengths[:, None]

    @property
    def has_padding(self) -> bool:
        return self.input_ids.numel() != int(self.lengths.sum())


def encode(processor: Processor, sample: Sample) -> Prompts:
    """The sample's prompt and images as the model reads them -> Prompts with B = 1."""
    return encode_chat(processor, format_prompt(sample), load_images(sample))


def encode_chat(processor: Processor, text: str, images: list[Image.Image]) -> Prompts:
    """A chat and its images -> Prompts with B = 1, on the device.

    Each `<|image_pad|>` of the text is repeated once for every token of its image.
    """
    tokenizer = processor.tokenizer
    merge_size = processor.image_processor.merge_size  # 2: a token is 2 x 2 patches
    image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    # The images have their size already. Resizing them again would shift them against their boxes.
    processed = processor.image_processor(images=images, do_resize=False, return_tensors="pt")
    image_grid_thw = processed["image_grid_thw"]                                # (images, 3)
    image_tokens = iter((image_grid_thw.prod(1) // merge_size**2).tolist())
    input_ids = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        input_ids += [token] * (next(image_tokens) if token == image_token_id else 1)
    position_ids = mrope_position_ids(
        input_ids, image_grid_thw.tolist(), image_token_id, merge_size)
    return Prompts(
        input_ids=torch.tensor([input_ids]).to(device()),
        position_ids=position_ids[:, None].to(device()),
        lengths=torch.tensor([len(input_ids)]).to(device()),
        pixel_values=processed["pixel_values"].to(device()),
        image_grid_thw=image_grid_thw)


def pad_prompts(prompts: Prompts, num_pads: int) -> Prompts:
    """Longer by `num_pads` tokens. Any token will do, because nothing reads the padding."""
    return prompts._replace(input_ids=F.pad(prompts.input_ids, (0, num_pads)),
                            position_ids=F.pad(prompts.position_ids, (0, num_pads)))


def collate(prompts: list[Prompts]) -> Prompts:
    """Several Prompts -> one, padded on the right to the longest."""
    P = max(p.input_ids.shape[1] for p in prompts)
    prompts = [pad_prompts(p, P - p.input_ids.shape[1]) for p in prompts]
    has_embeds = prompts[0].image_embeds is not None
    return Prompts(
        input_ids=torch.cat([p.input_ids for p in prompts]),                    # (B, P)
        position_ids=torch.cat([p.position_ids for p in prompts], 1),           # (3, B, P)
        lengths=torch.cat([p.lengths for p in prompts]),                        # (B,)
        pixel_values=torch.cat([p.pixel_values for p in prompts]),
        image_grid_thw=torch.cat([p.image_grid_thw for p in prompts]),
        image_embeds=torch.cat([p.image_embeds for p in prompts]) if has_embeds else None)


def mrope_position_ids(input_ids: list[int], image_grid_thw: list[list[int]], image_token_id: int,
                       merge_size: int) -> Tensor:
    """Rotary positions (3, P) of one prompt. Text counts up in all three; an image counts its time,
    its height and its width, and text continues after the largest of them.

    Equal to transformers' `get_rope_index`, which is not used for two reasons: it gives wrong
    positions without a warning if its token-type argument is missing, and it leaves `rope_deltas`
    in the model for the next call. So positions are always computed here and passed.
    """
    position_ids = []
    start = 0  # position of the next token
    grids = iter(image_grid_thw)
    while len(position_ids) < len(input_ids):
        if input_ids[len(position_ids)] == image_token_id:
            t, h, w = next(grids)
            h //= merge_size
            w //= merge_size
            position_ids += [(start + i, start + j, start + k)
                             for i in range(t) for j in range(h) for k in range(w)]
            start += max(h, w)
        else:
            position_ids.append((start, start, start))
            start += 1
    return torch.tensor(position_ids).T


def max_position_ids(prompts: Prompts) -> Tensor:
    """The largest rotary position of each prompt (B,); its completions start one after it.

    Not that of the last token: at the end of an image some earlier position may be larger.
    """
    largest = prompts.position_ids.amax(0)                                      # (B, P)
    return largest.masked_fill(~prompts.attention_mask, 0).amax(1)


# --------------------------------------------------------------------------------------------------
# Forward passes

def embed_tokens(model: Qwen, input_ids: Tensor) -> Tensor:
    """Token embeddings (B, L, E). Cast here, because autocast does not cast an embedding."""
    return model.get_input_embeddings()(input_ids).to(compute_dtype())


def embed_prompts(model: Qwen, prompts: Prompts) -> Tensor:
    """Token embeddings (B, P, E), those of the image tokens replaced by the vision tower's."""
    inputs_embeds = embed_tokens(model, prompts.input_ids)
    image_embeds = prompts.image_embeds
    if image_embeds is None:
        image_embeds = compute_image_embeds(model, prompts)
    is_image = (prompts.input_ids == model.config.image_token_id).unsqueeze(-1)
    return inputs_embeds.masked_scatter(is_image, image_embeds.to(inputs_embeds.dtype))


def compute_image_embeds(model: Qwen, prompts: Prompts) -> Tensor:
    """The vision tower's output for all images, (image tokens, E)."""
    visual = model.model.visual
    image_grid_thw = prompts.image_grid_thw.cpu()  # FSDP's root moves its inputs to the GPU
    position_ids = get_vision_position_ids(image_grid_thw, visual.spatial_merge_size)
    pixel_values = prompts.pixel_values.to(visual.dtype)
    return visual(pixel_values, image_grid_thw,
                  position_ids=position_ids.to(pixel_values.device)).pooler_output


@torch.no_grad()
def with_image_embeds(model: Qwen, prompts: list[Prompts]) -> list[Prompts]:
    """The prompts with their image_embeds, for a vision tower that does not learn: every later pass
    reuses them."""
    with autocast():
        image_embeds = compute_image_embeds(model, collate(prompts))
    image_token_id = model.config.image_token_id
    lengths = [int((p.input_ids == image_token_id).sum()) for p in prompts]
    return [p._replace(image_embeds=e) for p, e in zip(prompts, image_embeds.split(lengths))]


def run_decoder(model: Qwen, inputs_embeds: Tensor, position_ids: Tensor,
                shared_prompt: SharedPrompt) -> Tensor:
    """The language model on (B, L, E) with positions (3, B, L) -> hidden states (B, L, E)."""
    return model.model.language_model(
        inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False,
        attention_mask={"full_attention": None},  # otherwise transformers builds one of its own
        shared_prompt=shared_prompt).last_hidden_state


def next_token_logits(model: Qwen, hidden: Tensor, temperature: float) -> Tensor:
    """Hidden states (M, E) -> float32 logits (M, V): divided by the temperature, without the vision
    tokens. Rollout and token_logprobs both use them, so the log-probs in the loss are those of the
    distribution that was sampled."""
    logits = model.lm_head(hidden).float() / temperature
    # A sampled image token has no image, and breaks the next forward pass. The ids are compared one
    # by one: a list of them would be copied from the host, which a CUDA graph forbids.
    token_ids = torch.arange(logits.shape[1], device=logits.device)
    is_vision = torch.stack([token_ids == i for i in vision_token_ids(model)]).any(0)  # (V,)
    return logits.masked_fill_(is_vision, float("-inf"))


def vision_token_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that no completion may have."""
    config = model.config
    return [config.image_token_id, config.video_token_id,
            config.vision_start_token_id, config.vision_end_token_id]


def token_logprobs(model: Qwen, prompts: Prompts, tokens: Tensor, mask: Tensor,
                   temperature: float = 1.0, chunk: int = 1024) -> Tensor:
    """Log-probs (B, G, C) of the completions' tokens (B, G, C), 0 where `mask` is False.

    mask   (B, G, C) True on the tokens to compute, the stop token included
    chunk  number of tokens whose logits are computed together. Each chunk is recomputed in the
           backward pass, so the logits of all tokens (M, V) never exist at once.
    """
    B, G, C = tokens.shape
    P = prompts.input_ids.shape[1]
    with autocast():
        # One packed row per group: [prompt, padding | c1, padding | .. | cG, padding].
        prompt_embeds = embed_prompts(model, prompts)                           # (B, P, E)
        completion_embeds = embed_tokens(model, tokens.flatten(1))              # (B, G*C, E)
        inputs_embeds = torch.cat([prompt_embeds, completion_embeds], 1)        # (B, P + G*C, E)

        # Every completion continues the positions of its prompt, not those of the packed row.
        start = max_position_ids(prompts) + 1                                  # (B,)
        completion_position_ids = start[:, None] + torch.arange(C, device=tokens.device)
        completion_position_ids = completion_position_ids.repeat(1, G).expand(3, -1, -1)
        position_ids = torch.cat([prompts.position_ids, completion_position_ids], 2)

        shared_prompt = SharedPrompt("packed", P, G)
        if prompts.has_padding:
            shared_prompt.completion_attention_mask = make_completion_attention_mask(
                prompts.attention_mask, G, C)
        hidden = run_decoder(model, inputs_embeds, position_ids, shared_prompt)

        # The hidden state before a token predicts it. For the first token of a completion that is
        # the one of the prompt's last token; padding may lie between them.
        before = torch.arange(P - 1, P + G * C - 1, device=tokens.device)
        before = before.view(G, C).repeat(B, 1, 1)                              # (B, G, C)
        before[:, :, 0] = (prompts.lengths - 1)[:, None]
        b, g, c = mask.nonzero(as_tuple=True)                                   # (M,) each
        hidden = hidden[b, before[b, g, c]]                                     # (M, E)
        labels = tokens[b, g, c]                                                # (M,)

        def label_logprobs(hidden: Tensor, labels: Tensor) -> Tensor:
            logprobs = next_token_logits(model, hidden, temperature).log_softmax(-1)
            return logprobs.gather(1, labels[:, None]).squeeze(1)

        chunks = zip(hidden.split(chunk), labels.split(chunk))
        logprobs = torch.cat([checkpoint(label_logprobs, h, y, use_reentrant=False)
                              for h, y in chunks])                              # (M,)
    return torch.zeros(B, G, C, device=tokens.device).index_put((b, g, c), logprobs)


class Policy(torch.nn.Module):
    """A module whose forward is token_logprobs. FSDP gathers the weights of a sharded model when
    its root is called, so the training loop has to call the root."""

    def __init__(self, model: Qwen) -> None:
        super().__init__()
        self.model = model

    def forward(self, prompts: Prompts, tokens: Tensor, mask: Tensor,
                temperature: float = 1.0) -> Tensor:
        return token_logprobs(self.model, prompts, tokens, mask, temperature)

    def fsdp_units(self) -> list[torch.nn.Module]:
        """The submodules whose weights FSDP gathers one at a time: the vision tower as a whole, and
        each decoder layer."""
        return [self.model.model.visual, *self.model.model.language_model.layers]
