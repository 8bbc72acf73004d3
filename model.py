"""Qwen2.5-VL with a shared prompt: load and save, positions, attention, token log-probs.

The G completions of a group have one prompt, most of it image tokens. It is computed once: in the rollout (vision tower
and prefill once, every completion attends to the same keys and values) and in the update (one row
[prompt | c1 | .. | cG] of P + G*C tokens instead of G rows of P + C). A completion sees the prompt and itself, and its
rotary positions start right after the prompt's, so the mathematics is that of separate rows.

None of transformers' model code is copied: `AttentionInterface.register` makes its decoder call `shared_attention`.

Shapes: B prompts, G completions each, P prompt tokens and C completion tokens (padded on the right), V vocabulary,
H query heads, K key/value heads, D head size, E hidden size, L tokens of a row, M scored tokens.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoTokenizer, PreTrainedTokenizerFast
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import BadInput, first_line

transformers.utils.logging.disable_progress_bar()

STOPS = ("<|im_end|>", "<|endoftext|>")  # Qwen2.5-VL ends a turn with either


# ----------------------------------------------------------------------------------------------------------------------
# Load and save

class Processor(NamedTuple):
    tokenizer: PreTrainedTokenizerFast
    images: Qwen2VLImageProcessorPil
    frame: int  # side in pixels of the square images that the model was trained on; boxes are in this frame


ATTENTION = {"text_config": "shared_prompt", "vision_config": "sdpa"}  # the vision tower keeps its own


def device() -> torch.device:
    """This process's GPU, if there is one. By number: in other threads than the first `cuda` would be the first GPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype() -> torch.dtype:
    """bf16 on a GPU, float32 on a CPU; the weights that learn are always float32."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def autocast() -> torch.autocast:
    """Matrix products in compute_dtype. Casts are not kept: a weight is used once in a pass, and a kept one would be a second
    copy of the model until the pass ends (and CUDA graphs forbid it)."""
    return torch.autocast(device().type, compute_dtype(), enabled=compute_dtype() != torch.float32, cache_enabled=False)


def load(name: str, frame: int | None = None) -> tuple[Qwen, Processor]:
    """Model (float32 weights, on the CPU) and processor from `tiny`, a folder or a hub id.

    frame   side of the images; None takes the one that a checkpoint of this project was saved with, else 448
    Only safetensors and only transformers' own code are read. Raises BadInput if the checkpoint is not readable.
    """
    folder = Path(__file__).parent / "tiny" if name == "tiny" else name
    if name.count("/") != 1 and not Path(folder).exists():  # a hub id has one slash
        raise BadInput(f"--model {name}: no such folder")
    try:
        model, report = Qwen.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, attn_implementation=ATTENTION,
            output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # the PIL backend by name: torchvision's, the default where it is installed, resizes a little differently
        images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except Exception as error:  # transformers raises a dozen kinds; all mean that this is no usable checkpoint
        raise BadInput(f"--model {name}: no readable Qwen2.5-VL checkpoint ({first_line(error)})") from error
    if report["missing_keys"]:  # transformers would go on with random weights in their place
        raise BadInput(f"--model {name}: not a whole Qwen2.5-VL: no weights for {min(report['missing_keys'])} and "
                       f"{len(report['missing_keys']) - 1} more")
    smallest, largest = images.size["shortest_edge"], images.size["longest_edge"]
    frame = frame or (math.isqrt(largest) if smallest == largest else 448)
    images.size = {"shortest_edge": frame**2, "longest_edge": frame**2}  # saved with the model, see above
    return model, Processor(tokenizer, images, frame)


def to_compute_dtype(model: Qwen, vectors: bool = False) -> Qwen:
    """The matrices of a model that does not learn, as the forward pass computes with them: bf16 on a GPU. Vectors (norms,
    biases) stay float32, as autocast leaves them, so that a log-prob stays what it was; FSDP casts them too, so a copy of a
    sharded model takes `vectors` along. Rotary tables always stay float32."""
    for weight in model.parameters():
        if vectors or weight.dim() > 1:
            weight.data = weight.data.to(compute_dtype())
    return model


def add_adapters(model: Qwen, rank: int) -> torch.nn.Module:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) on all linear layers of the language model, in place: W x + 2 B A x with A
    (rank, in) random and B (out, rank) 0, the only weights that learn. Returns peft's view of the model, which can save
    the adapters and merge them."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise BadInput("--lora needs peft: pip install peft")
    to_compute_dtype(model)
    layers = r".*language_model\.layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers))


@contextmanager
def without_adapters(module: torch.nn.Module) -> Iterator[None]:
    """Within, a model with LoRA is the one it started from: the reference needs no copy."""
    layers = [layer for layer in module.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save(model: torch.nn.Module, processor: Processor, folder: Path) -> None:
    """Hugging Face format, written beside `folder` and moved there when complete. Raises BadInput if it cannot be."""
    partial = folder.with_name(folder.name + ".partial")
    try:
        model.save_pretrained(partial)
        processor.tokenizer.save_pretrained(partial)
        processor.images.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:  # a full disk is an OSError in Python, a SafetensorError in safetensors
        shutil.rmtree(partial, ignore_errors=True)
        raise BadInput(f"{folder} cannot be written ({first_line(error)})") from error


# ----------------------------------------------------------------------------------------------------------------------
# Prompts as tensors

class Prompts(NamedTuple):
    """B prompts, padded on the right. A causal model never sees what follows, so only `lengths` marks the padding."""
    ids: Tensor        # (B, P)
    positions: Tensor  # (3, B, P) rotary positions: time, height, width
    lengths: Tensor    # (B,)
    pixels: Tensor     # (patches of all images, 3 * 2 * 14 * 14): channels, two frames (a still one twice), height, width
    grids: Tensor      # (images, 3) patches in time, height, width
    features: Tensor | None = None  # (image tokens of all prompts, E) of a frozen vision tower, computed once

    @property
    def real(self) -> Tensor:
        """(B, P) True on tokens, False on padding."""
        return torch.arange(self.ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @property
    def padded(self) -> bool:
        return self.ids.shape[1] * self.ids.shape[0] != int(self.lengths.sum())


def encode(processor: Processor, text: str, images: list) -> Prompts:
    """One chat and its images, already in the frame -> Prompts with B = 1, on the device.

    Each `<|image_pad|>` of the text becomes as many as its image has tokens. The processor must not resize again, or
    boxes and pixels would part.
    """
    tokenizer, merge = processor.tokenizer, processor.images.merge_size
    image_pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    processed = processor.images(images=images, do_resize=False, return_tensors="pt")
    grids, ids = processed["image_grid_thw"], []
    counts = iter((grids.prod(1) // merge**2).tolist())
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        ids += [token] * (next(counts) if token == image_pad else 1)
    positions = rope_positions(ids, grids.tolist(), image_pad, merge)
    parts = torch.tensor([ids]), positions[:, None], torch.tensor([len(ids)]), processed["pixel_values"], grids
    return Prompts(*(part.to(device()) for part in parts))


def pad(prompts: Prompts, more: int) -> Prompts:
    """Longer by `more` tokens. Any token will do: nothing reads what stands after the length."""
    return prompts._replace(ids=F.pad(prompts.ids, (0, more)), positions=F.pad(prompts.positions, (0, more)))


def collate(prompts: list[Prompts]) -> Prompts:
    """Several Prompts -> one, padded on the right to the longest."""
    P = max(p.ids.shape[1] for p in prompts)
    prompts = [pad(p, P - p.ids.shape[1]) for p in prompts]
    return Prompts(torch.cat([p.ids for p in prompts]), torch.cat([p.positions for p in prompts], 1),
                   *(torch.cat([getattr(p, name) for p in prompts]) for name in ("lengths", "pixels", "grids")),
                   None if prompts[0].features is None else torch.cat([p.features for p in prompts]))


def rope_positions(ids: list[int], grids: list[list[int]], image_pad: int, merge: int) -> Tensor:
    """Rotary positions (3, P) of one row: text counts on in all three, an image counts its rows and columns.

    Equal to transformers' `get_rope_index`. That one needs a token-type argument whose absence silently gives wrong
    positions, and leaves state behind for the next call; so positions are always computed here and passed.
    """
    positions, start, grids = [], 0, iter(grids)  # start: position of the next token
    while len(positions) < len(ids):
        if ids[len(positions)] == image_pad:
            t, h, w = next(grids)
            h, w = h // merge, w // merge
            positions += [(start + i, start + j, start + k) for i in range(t) for j in range(h) for k in range(w)]
            start += max(h, w)
        else:
            positions.append((start,) * 3)
            start += 1
    return torch.tensor(positions).T


def last_positions(prompts: Prompts) -> Tensor:
    """The largest rotary position of each prompt (B,). Not that of its last token when it ends in an image."""
    return prompts.positions.amax(0).masked_fill(~prompts.real, 0).amax(1)


def completion_mask(prompts: Prompts, G: int, C: int) -> Tensor | None:
    """(B*G, 1, C, P+C) bool: a completion sees its prompt without the padding, and itself up to now. None if no
    prompt is padded: then plain causal attention says the same, and fast kernels apply."""
    if not prompts.padded:
        return None
    own = torch.ones(C, C, dtype=torch.bool, device=prompts.ids.device).tril()
    mask = torch.cat([prompts.real[:, None].expand(-1, C, -1), own.expand(len(prompts.ids), -1, -1)], 2)  # (B, C, P+C)
    return mask.repeat_interleave(G, 0).unsqueeze(1)


# ----------------------------------------------------------------------------------------------------------------------
# One attention, three modes

@dataclass
class Shared:
    """What the attention has to know beside q, k, v. `group`: P + G*C tokens, in token_logprobs. `prefill`: P tokens, cache
    written; then `decode`: one token a row, B*G rows, cache read and written at `slot`, which rollout.decode moves on."""
    mode: str
    P: int
    G: int = 1
    mask: Tensor | None = None   # group: (B*G, 1, C, P+C) bool or None where nothing is padded; decode: (B, 1, 1, P) bool
    slot: Tensor | None = None   # decode: (1,) place of the token in its completion
    filled: Tensor | None = None  # decode: (W,) bool, the places up to that one
    cache: dict = field(default_factory=dict)  # layer -> [prompt k, prompt v (B, K, P, D), own k, own v (B*G, K, C, D)]


def shared_attention(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: None,  # noqa: ARG001
                     scaling: float, shared: Shared, **_: object) -> tuple[Tensor, None]:
    """q (B, H, L, D), k and v (B, K, L, D), rotated -> ((B, L, H, D), None). Called by transformers' decoder layers."""
    q, k, P, G = q.to(v.dtype), k.to(v.dtype), shared.P, shared.G
    if shared.mode == "decode":
        return decode_attention(q, k, v, scaling, shared, shared.cache[module.layer_idx]), None
    out = attend(q[:, :, :P], k[:, :, :P], v[:, :, :P], scaling)  # the prompt attends to itself
    if shared.mode == "prefill":
        shared.cache[module.layer_idx] = [k, v]
    else:
        k, v = (torch.cat([x[:, :, :P].repeat_interleave(G, 0), by_completion(x, P, G)], 2) for x in (k, v))  # (B*G, K, P+C, D)
        completions = attend(by_completion(q, P, G), k, v, scaling, shared.mask)           # (B*G, H, C, D)
        out = torch.cat([out, completions.unflatten(0, (-1, G)).transpose(1, 2).flatten(2, 3)], 2)  # (B, H, P + G*C, D)
    return out.transpose(1, 2), None


def by_completion(x: Tensor, P: int, G: int) -> Tensor:
    """The completions of a packed row, each a row of its own: (B, heads, P + G*C, D) -> (B*G, heads, C, D)."""
    return x[:, :, P:].unflatten(2, (G, -1)).transpose(1, 2).flatten(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Attention of L queries over S >= L keys; without a mask causal, the last query seeing all keys. -> (., H, L, D)."""
    L, S = q.shape[2], k.shape[2]
    if mask is None and (package := flash(q)):  # its causal mask is aligned at the last key
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return package.flash_attn_func(*heads, softmax_scale=scaling, causal=True).transpose(1, 2)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if mask is None and L != S:
        mask = torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, shared: Shared, cache: list[Tensor]) -> Tensor:
    """One new token a row, (B*G, H, 1, D): it attends to its group's prompt and to its own completion so far.

    The prompt's keys and values are read once for the G rows of a group, not copied to each: the rows are laid side by
    side as G times as many queries. -> (B*G, 1, H, D)
    """
    if package := flash(q):
        return flash_decode_attention(package.flash_attn_with_kvcache, q, k, v, scaling, shared, cache)
    prompt_k, prompt_v, own_k, own_v = cache
    (B, K, P, D), W = prompt_k.shape, len(shared.filled)
    r = q.shape[1] // K                                                                    # query heads a key/value head
    own_k.index_copy_(2, shared.slot, k), own_v.index_copy_(2, shared.slot, v)
    q = q.view(-1, K, r, D) * scaling

    def by_prompt(x: Tensor) -> Tensor:                                                    # (B*G, K, r, .) -> (B, K, G*r, .)
        return x.view(B, shared.G, K, r, -1).transpose(1, 2).reshape(B, K, shared.G * r, -1)

    def by_row(x: Tensor) -> Tensor:                                                       # and back
        return x.view(B, K, shared.G, r, -1).transpose(1, 2).reshape(-1, K, r, x.shape[-1])

    scores = (by_prompt(q) @ prompt_k.transpose(2, 3)).masked_fill(~shared.mask, float("-inf"))  # (B, K, G*r, P)
    own = (q @ own_k[:, :, :W].transpose(2, 3)).masked_fill(~shared.filled, float("-inf"))       # (B*G, K, r, W)
    weights = torch.cat([by_row(scores), own], -1).softmax(-1, dtype=torch.float32).to(v.dtype)
    out = by_row(by_prompt(weights[..., :P]) @ prompt_v) + weights[..., P:] @ own_v[:, :, :W]    # (B*G, K, r, D)
    return out.reshape(len(q), 1, K * r, D)


def flash_decode_attention(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, scaling: float, shared: Shared,
                           cache: list[Tensor]) -> Tensor:
    """The same by two calls of a kernel: over the prompt and over the completion. Softmaxes over disjoint keys join by their
    log-sum-exps: the prompt's share is e^p / (e^p + e^o) = sigmoid(p - o)."""
    q, k, v, prompt_k, prompt_v, own_k, own_v = (x.transpose(1, 2) for x in (q, k, v, *cache))  # (., tokens, heads, D)
    prompt, p = kernel(q.reshape(len(prompt_k), shared.G, *q.shape[2:]), prompt_k, prompt_v, softmax_scale=scaling,
                       cache_seqlens=shared.mask.sum((1, 2, 3), dtype=torch.int32), return_softmax_lse=True)  # p: (B, H, G)
    own, o = kernel(q, own_k, own_v, k, v, softmax_scale=scaling, cache_seqlens=shared.slot.expand(len(q)).int(),
                    return_softmax_lse=True)                                               # (B*G, 1, H, D), (B*G, H, 1)
    share = torch.sigmoid(p.transpose(1, 2).reshape(o.shape) - o).transpose(1, 2).unsqueeze(-1)
    return (share * prompt.reshape(own.shape) + (1 - share) * own).to(v.dtype)


def flash(q: Tensor) -> ModuleType | None:
    """The package flash-attn where it is installed and for such a q, else None: PyTorch's own attention is used."""
    return flash_attn() if q.is_cuda and q.dtype != torch.float32 else None


@cache
def flash_attn() -> ModuleType | None:
    try:
        import flash_attn
        return flash_attn
    except ImportError:
        return None


AttentionInterface.register("shared_prompt", shared_attention)


# ----------------------------------------------------------------------------------------------------------------------
# Forward passes

def embed(model: Qwen, ids: Tensor) -> Tensor:
    """Token embeddings (B, L, E), the one step of the model that autocast does not see."""
    return model.get_input_embeddings()(ids).to(compute_dtype())


def embed_prompts(model: Qwen, prompts: Prompts) -> Tensor:
    """Token embeddings with the vision tower's features in the places of the image tokens: (B, P, E)."""
    embeds = embed(model, prompts.ids)
    features = image_features(model, prompts) if prompts.features is None else prompts.features
    places = (prompts.ids == model.config.image_token_id).unsqueeze(-1)
    return embeds.masked_scatter(places, features.to(embeds.dtype))


def image_features(model: Qwen, prompts: Prompts) -> Tensor:
    """The vision tower's features of all images, (image tokens, E)."""
    return torch.cat(list(model.model.get_image_features(prompts.pixels, prompts.grids, return_dict=True).pooler_output))


@torch.no_grad()
def with_features(model: Qwen, prompts: Prompts) -> Prompts:
    """The prompts with their features, for a vision tower that does not learn: every later pass reuses them."""
    with autocast():
        return prompts._replace(features=image_features(model, prompts))


def decoder(model: Qwen, embeds: Tensor, positions: Tensor, shared: Shared) -> Tensor:
    """The language model on (B, L, E) with explicit positions (3, B, L); the empty mask keeps transformers from one."""
    return model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False,
                                      attention_mask={"full_attention": None}, shared=shared).last_hidden_state


def next_token_logits(model: Qwen, hidden: Tensor, temperature: float) -> Tensor:
    """(N, E) -> (N, V) float32 logits of the distribution that is sampled *and* scored: divided by the temperature,
    without the vision tokens (a sampled image token has no image, and breaks the next forward pass)."""
    logits, c = model.lm_head(hidden).float() / temperature, model.config
    ids = torch.arange(logits.shape[1], device=logits.device)  # compared one by one: a list of them would come from the host
    vision = [ids == i for i in (c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id)]
    return logits.masked_fill_(torch.stack(vision).any(0), float("-inf"))


def token_logprobs(model: Qwen, prompts: Prompts, completions: Tensor, mask: Tensor, temperature: float = 1.0,
                   chunk: int = 1024) -> Tensor:
    """Log-probs (B, G, C) of completions (B, G, C) under the model, 0 where `mask` (B, G, C) is False.

    The mask marks the tokens to score, the stop token among them. One function for policy, old policy, reference and
    SFT. The head runs on the marked positions only, `chunk` at a time and recomputed in the backward pass, so that
    (tokens x V) logits never exist at once.
    """
    (B, G, C), P = completions.shape, prompts.ids.shape[1]
    with autocast():
        embeds = torch.cat([embed_prompts(model, prompts), embed(model, completions.flatten(1))], 1)
        start = last_positions(prompts) + 1                                              # (B,)
        later = (start[:, None] + torch.arange(C, device=start.device)).repeat(1, G)     # (B, G*C)
        positions = torch.cat([prompts.positions, later.expand(3, -1, -1)], 2)           # (3, B, P + G*C)
        hidden = decoder(model, embeds, positions, Shared("group", P, G, completion_mask(prompts, G, C)))

        # a row is [prompt, padding | c1, padding | .. | cG, padding]; token t of a completion is predicted from the place
        # of its token t-1, the first one from the last token of the prompt
        predictor = torch.arange(P - 1, P + G * C - 1, device=start.device).view(G, C).repeat(B, 1, 1)  # (B, G, C)
        predictor[:, :, 0] = (prompts.lengths - 1)[:, None]
        b, g, c = mask.nonzero(as_tuple=True)                                            # (M,) each
        hidden, labels = hidden[b, predictor[b, g, c]], completions[b, g, c]             # (M, E), (M,)

        def score(h: Tensor, y: Tensor) -> Tensor:
            return next_token_logits(model, h, temperature).log_softmax(-1).gather(1, y[:, None]).squeeze(1)
        parts = [checkpoint(score, h, y, use_reentrant=False) for h, y in zip(hidden.split(chunk), labels.split(chunk))]
    return torch.zeros(B, G, C, device=mask.device).index_put((b, g, c), torch.cat(parts))


def flops(model: Qwen, prompts: list[Prompts], tokens: Tensor) -> Tensor:
    """Floating point operations (B,) of a forward pass over groups with so many completion tokens (B,): two for each weight of
    a matrix and token, or patch of an image. Attention itself is left out, some percent at these lengths, and so is a vision
    tower that was run once for all passes. A backward pass takes twice as many, with LoRA about as many."""
    modules = model.model.language_model.layers, model.lm_head, model.model.visual
    layers, head, vision = (sum(weight.numel() for weight in module.parameters()) for module in modules)
    before = [layers * p.ids.shape[1] + vision * len(p.pixels) * (p.features is None) for p in prompts]
    return 2 * (torch.tensor(before, device=tokens.device) + (layers + head) * tokens).double()


class Policy(torch.nn.Module):
    """The model whose forward is token_logprobs. FSDP gathers a sharded model's weights when its root is called, so the
    root has to be what the training loop calls."""

    def __init__(self, model: Qwen) -> None:
        super().__init__()
        self.model = model

    def forward(self, prompts: Prompts, completions: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        return token_logprobs(self.model, prompts, completions, mask, temperature)
