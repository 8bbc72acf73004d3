"""Qwen2.5-VL: load and save, prompts as tensors, rotary positions, token log-probs.

The model is transformers' own; attention.py lets the G completions of a group share their prompt.
token_logprobs is the one function that scores tokens: for the policy, the old policy, the reference
and SFT.

Shapes: B prompts, G completions each, P prompt tokens and C completion tokens (padded on the
right), V vocabulary, E hidden size, L tokens of a row, M scored tokens.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from attention import SharedPrompt, completion_mask
from runtime.distributed import autocast, compute_dtype, device, to_compute_dtype
from runtime.errors import UserError, first_line
from sample import Sample, format_prompt, load_images

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")  # Qwen2.5-VL ends a turn with either
# The vision tower keeps its own attention: it has no prompt to share.
ATTENTION = {"text_config": "shared_prompt", "vision_config": "sdpa"}


# --------------------------------------------------------------------------------------------------
# Load and save

class Processor(NamedTuple):
    tokenizer: PreTrainedTokenizerFast
    image_processor: Qwen2VLImageProcessorPil
    image_size: int  # side in pixels of the square that every image is resized to


def load_model(name: str, image_size: int | None = None) -> tuple[Qwen, Processor]:
    """Model (float32 weights, on the CPU) and processor from `tiny`, a folder or a hub id.

    image_size  None takes the size that a checkpoint of this project was saved with, else 448
    Only safetensors and only transformers' own code are read. Raises UserError if the checkpoint
    cannot be read or is not whole.
    """
    disable_progress_bar()  # transformers' own; it would break up the lines of a training run
    folder = Path(__file__).parent / "tiny" if name == "tiny" else name
    if name.count("/") != 1 and not Path(folder).exists():  # a hub id has one slash
        raise UserError(f"--model {name}: no such folder")
    try:
        model, report = Qwen.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            attn_implementation=ATTENTION, output_loading_info=True)
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
    shortest = image_processor.size["shortest_edge"]  # both are areas, in spite of their names
    longest = image_processor.size["longest_edge"]
    if image_size is None:  # Qwen's own files give a range
        image_size = math.isqrt(longest) if shortest == longest else 448
    # Saved with the model: this project and transformers' users then resize to the same square.
    image_processor.size = {"shortest_edge": image_size**2, "longest_edge": image_size**2}
    return model, Processor(tokenizer, image_processor, image_size)


def save_model(model: torch.nn.Module, processor: Processor, folder: Path) -> None:
    """Save in Hugging Face format. Raises UserError if the files cannot be written.

    Written beside `folder` and moved there when complete, so that no run reads half a model.
    """
    disable_progress_bar()
    partial = folder.with_name(folder.name + ".partial")
    try:
        model.save_pretrained(partial)
        processor.tokenizer.save_pretrained(partial)
        processor.image_processor.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:  # a full disk raises either
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({first_line(error)})") from error


def add_adapters(model: Qwen, rank: int) -> torch.nn.Module:
    """Add LoRA (https://arxiv.org/abs/2106.09685) to all linear layers of the language model.

    In place: W x + 2 B A x, with A (rank, in) random and B (out, rank) zero. Only A and B learn, so
    the rest is cast to compute_dtype. Returns peft's view of the model, which can save the adapters
    and merge them.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("--lora needs peft: pip install peft")
    to_compute_dtype(model)
    layers = r".*language_model\.layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers))


@contextmanager
def without_adapters(module: torch.nn.Module) -> Iterator[None]:
    """Switch LoRA off for a while: the model is the one it started from, so the reference needs no
    copy."""
    layers = [layer for layer in module.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


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
    image_grid_thw: Tensor  # (images, 3) patches in time, height, width
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
    """The sample as the model reads it, its prompt and its images -> Prompts with B = 1."""
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
    grids = processed["image_grid_thw"]
    image_tokens = iter((grids.prod(1) // merge_size**2).tolist())
    ids = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        ids += [token] * (next(image_tokens) if token == image_token_id else 1)
    position_ids = mrope_position_ids(ids, grids.tolist(), image_token_id, merge_size)
    return Prompts(
        input_ids=torch.tensor([ids]).to(device()),
        position_ids=position_ids[:, None].to(device()),
        lengths=torch.tensor([len(ids)]).to(device()),
        pixel_values=processed["pixel_values"].to(device()),
        image_grid_thw=grids.to(device()))


def pad_prompts(prompts: Prompts, more: int) -> Prompts:
    """Longer by `more` tokens. Any token will do, because nothing reads the padding."""
    return prompts._replace(input_ids=F.pad(prompts.input_ids, (0, more)),
                            position_ids=F.pad(prompts.position_ids, (0, more)))


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


def mrope_position_ids(input_ids: list[int], grids: list[list[int]], image_token_id: int,
                       merge_size: int) -> Tensor:
    """Rotary positions (3, P) of one row. Text counts up in all three; an image counts its time,
    its rows and its columns, and text continues after the largest of them.

    Equal to transformers' `get_rope_index`, which is not used for two reasons: it gives wrong
    positions without a warning if its token-type argument is missing, and it leaves `rope_deltas`
    in the model for the next call. So positions are always computed here and passed.
    """
    positions = []
    start = 0  # position of the next token
    grids = iter(grids)
    while len(positions) < len(input_ids):
        if input_ids[len(positions)] == image_token_id:
            t, h, w = next(grids)
            h, w = h // merge_size, w // merge_size
            positions += [(start + i, start + j, start + k)
                          for i in range(t) for j in range(h) for k in range(w)]
            start += max(h, w)
        else:
            positions.append((start, start, start))
            start += 1
    return torch.tensor(positions).T


def last_position_ids(prompts: Prompts) -> Tensor:
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
    output = model.model.get_image_features(
        prompts.pixel_values, prompts.image_grid_thw, return_dict=True)
    return torch.cat(list(output.pooler_output))


@torch.no_grad()
def with_image_embeds(model: Qwen, prompts: Prompts) -> Prompts:
    """The prompts with their image_embeds, for a vision tower that does not learn: every later pass
    reuses them."""
    with autocast():
        return prompts._replace(image_embeds=compute_image_embeds(model, prompts))


def run_decoder(model: Qwen, inputs_embeds: Tensor, position_ids: Tensor,
                shared_prompt: SharedPrompt) -> Tensor:
    """The language model on (B, L, E) with positions (3, B, L) -> hidden states (B, L, E)."""
    return model.model.language_model(
        inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False,
        attention_mask={"full_attention": None},  # or transformers would build one of its own
        shared_prompt=shared_prompt).last_hidden_state


def next_token_logits(model: Qwen, hidden: Tensor, temperature: float) -> Tensor:
    """Hidden states (M, E) -> float32 logits (M, V) of the distribution that is sampled *and*
    scored: divided by the temperature, without the vision tokens."""
    config = model.config
    logits = model.lm_head(hidden).float() / temperature
    # A sampled image token has no image, and breaks the next forward pass. The ids are compared one
    # by one: a list of them would be copied from the host, which a CUDA graph forbids.
    token_ids = torch.arange(logits.shape[1], device=logits.device)
    vision_token_ids = (config.image_token_id, config.video_token_id,
                        config.vision_start_token_id, config.vision_end_token_id)
    is_vision = torch.stack([token_ids == i for i in vision_token_ids]).any(0)  # (V,)
    return logits.masked_fill_(is_vision, float("-inf"))


def token_logprobs(model: Qwen, prompts: Prompts, completions: Tensor, mask: Tensor,
                   temperature: float = 1.0, chunk: int = 1024) -> Tensor:
    """Log-probs (B, G, C) of completions (B, G, C) under the model, 0 where `mask` is False.

    mask   (B, G, C) True on the tokens to score; the stop token is one of them
    chunk  how many positions go through the head together. Each chunk is recomputed in the
           backward pass, so (tokens x V) logits never exist at once.
    """
    B, G, C = completions.shape
    P = prompts.input_ids.shape[1]
    on = completions.device
    with autocast():
        # One row per group: [prompt, padding | c1, padding | .. | cG, padding].
        prompt_embeds = embed_prompts(model, prompts)                           # (B, P, E)
        own_embeds = embed_tokens(model, completions.flatten(1))                # (B, G*C, E)
        inputs_embeds = torch.cat([prompt_embeds, own_embeds], 1)               # (B, P + G*C, E)

        # Every completion continues the positions of the prompt, not those of the row.
        start = last_position_ids(prompts) + 1                                  # (B,)
        own_ids = (start[:, None] + torch.arange(C, device=on)).repeat(1, G)    # (B, G*C)
        position_ids = torch.cat([prompts.position_ids, own_ids.expand(3, -1, -1)], 2)

        own_mask = None
        if prompts.has_padding:
            own_mask = completion_mask(prompts.attention_mask, G, C)
        shared_prompt = SharedPrompt("group", P, G, own_mask)
        hidden = run_decoder(model, inputs_embeds, position_ids, shared_prompt)

        # Token t of a completion is predicted at the place of its token t-1 in the row; the first
        # one at the last token of the prompt, which the padding may separate from it.
        predictor = torch.arange(P - 1, P + G * C - 1, device=on).view(G, C).repeat(B, 1, 1)
        predictor[:, :, 0] = (prompts.lengths - 1)[:, None]
        b, g, c = mask.nonzero(as_tuple=True)                                   # (M,) each
        hidden = hidden[b, predictor[b, g, c]]                                  # (M, E)
        labels = completions[b, g, c]                                           # (M,)

        def score(hidden: Tensor, labels: Tensor) -> Tensor:
            logprobs = next_token_logits(model, hidden, temperature).log_softmax(-1)
            return logprobs.gather(1, labels[:, None]).squeeze(1)

        chunks = zip(hidden.split(chunk), labels.split(chunk))
        scores = torch.cat([checkpoint(score, h, y, use_reentrant=False) for h, y in chunks])
    return torch.zeros(B, G, C, device=on).index_put((b, g, c), scores)


def forward_flops(model: Qwen, prompts: list[Prompts], num_tokens: Tensor) -> Tensor:
    """Floating point operations (B,) of a forward pass over groups of num_tokens (B,) completion
    tokens each: two for each weight of a matrix and each token, or patch of an image.

    Left out: attention itself, some percent at these lengths, and a vision tower whose embeddings
    were computed before. A backward pass takes twice as many, with LoRA about as many.
    """
    def num_weights(module: torch.nn.Module) -> int:
        return sum(weight.numel() for weight in module.parameters())

    layers = num_weights(model.model.language_model.layers)
    head = num_weights(model.lm_head)
    vision = num_weights(model.model.visual)
    prompt_flops = []
    for p in prompts:
        patches = len(p.pixel_values) if p.image_embeds is None else 0
        prompt_flops.append(layers * p.input_ids.shape[1] + vision * patches)
    prompt_flops = torch.tensor(prompt_flops, device=num_tokens.device)
    return 2 * (prompt_flops + (layers + head) * num_tokens).double()


class Policy(torch.nn.Module):
    """The model whose forward is token_logprobs. FSDP gathers the weights of a sharded model when
    its root is called, so the root has to be what the training loop calls."""

    def __init__(self, model: Qwen) -> None:
        super().__init__()
        self.model = model

    def forward(self, prompts: Prompts, completions: Tensor, mask: Tensor,
                temperature: float = 1.0) -> Tensor:
        return token_logprobs(self.model, prompts, completions, mask, temperature)

    def fsdp_units(self) -> list[torch.nn.Module]:
        """The submodules whose weights FSDP gathers one at a time: the vision tower as a whole, and
        each decoder layer."""
        return [self.model.model.visual, *self.model.model.language_model.layers]
