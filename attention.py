"""Attention with a shared prompt: one function, three modes.

The G completions of a group have the same prompt, mostly image tokens at 448 px. It is computed
once:

    prefill  the prompt alone; its keys and values go into the cache           (rollout.py)
    decode   one new token for each of N rows, against the cache               (rollout.py)
    packed   the packed row [prompt | c1 | .. | cG], P + G*C tokens instead of G*(P + C), for
             log-probs and gradients                                     (model.token_logprobs)

In a packed row a completion must not attend to the other completions. The usual way is a block mask
of (P + G*C)^2. It is never built: the linear layers see the packed row, but attention unpacks it.
There each completion is a row, which attends to the prompt's keys and causally to its own. That is
the same mathematics as G separate sequences of prompt and completion.

transformers' decoder calls `shared_prompt_attention` by its registered name, so none of its model
code is copied.

Shapes: B prompts, G completions of each, N = B*G rows (a row is one completion), P prompt tokens
and C completion tokens (padded on the right), L tokens that go in, W slots of the cache that are
read, H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

flash_attn = None  # optional: PyTorch's own attention gives the same result
if torch.cuda.is_available():
    with suppress(ImportError):  # `import flash_attn` alone would find flash-attn-4, too
        from flash_attn import flash_attn_interface as flash_attn


@dataclass
class SharedPrompt:
    """What attention needs beside q, k and v. Passed to the decoder as a keyword."""
    mode: str  # "prefill", "decode" or "packed", as above
    P: int
    G: int = 1
    # packed: (N, 1, C, P + C) bool, from make_completion_attention_mask; None without padding
    completion_attention_mask: Tensor | None = None
    # decode: (B,) int32: tokens of each prompt without padding
    prompt_lengths: Tensor | None = None
    # decode, once for all layers of a decode step, from start_decode_step:
    slot: Tensor | None = None  # (1,) index of the new token in its completion
    completion_lengths: Tensor | None = None  # (N,) int32: the tokens before it
    # (N, 1, 1, P + W) bool: which keys are no tokens, as they pad the prompt or are slots not yet
    # filled, of the completion's first W; W is at least slot + 1
    no_token: Tensor | None = None
    # layer -> [prompt_k, prompt_v (B, K, P, D)], in decode mode also
    # [.., completion_k, completion_v (N, K, C or more, D)]
    cache: dict[int, list[Tensor]] = field(default_factory=dict)

    def start_decode_step(self, slot: Tensor, W: int) -> None:
        """Compute what all layers of a decode step read."""
        self.slot = slot
        self.completion_lengths = slot.int().repeat(len(self.prompt_lengths) * self.G)
        positions = torch.arange(max(self.P, W), device=slot.device)
        padding = positions[: self.P] >= self.prompt_lengths[:, None]           # (B, P)
        empty = (positions[:W] > slot).expand(len(padding), -1)                 # (B, W)
        no_token = torch.cat([padding, empty], 1).repeat_interleave(self.G, 0)
        self.no_token = no_token[:, None, None]                                 # (N, 1, 1, P + W)

    def end_decode_step(self) -> None:
        """Drop these: in a CUDA graph they are in memory that the next graph overwrites."""
        self.slot = self.completion_lengths = self.no_token = None


def make_completion_attention_mask(attention_mask: Tensor, G: int, C: int) -> Tensor:
    """Which keys a completion attends to, (N, 1, C, P + C) bool: its prompt without the padding,
    and its own tokens up to the current one. attention_mask: (B, P), True on tokens.

    Only needed where a prompt is padded. Without padding, causal attention is the same and faster.
    """
    B = len(attention_mask)
    causal = torch.ones(C, C, dtype=torch.bool, device=attention_mask.device).tril()
    prompt = attention_mask[:, None].expand(-1, C, -1)                          # (B, C, P)
    mask = torch.cat([prompt, causal.expand(B, -1, -1)], 2)                     # (B, C, P + C)
    return mask.repeat_interleave(G, 0).unsqueeze(1)                            # (N, 1, C, P + C)


def shared_prompt_attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor,
    attention_mask: None,  # noqa: ARG001  transformers passes it; the masks are in SharedPrompt
    scaling: float, shared_prompt: SharedPrompt, **_: object,
) -> tuple[Tensor, None]:
    """q (B, H, L, D), k and v (B, K, L, D) -> (output (B, L, H, D), None: attention weights are not
    returned). q and k are rotated already. In decode mode B is N, and L is 1.

    transformers' decoder layers call it; `module` is the layer's attention.
    """
    P, G = shared_prompt.P, shared_prompt.G
    q = q.to(v.dtype)  # where the rotary tables are float32, they make q and k float32
    k = k.to(v.dtype)
    if shared_prompt.mode == "decode":
        cache = shared_prompt.cache[module.layer_idx]
        return decode_attention(q, k, v, scaling, shared_prompt, cache), None

    prompt_out = attend(q[:, :, :P], k[:, :, :P], v[:, :, :P], scaling)         # (B, H, P, D)
    if shared_prompt.mode == "prefill":
        shared_prompt.cache[module.layer_idx] = [k, v]
        return prompt_out.transpose(1, 2), None

    def with_prompt(x: Tensor) -> Tensor:                                       # (N, K, P + C, D)
        prompt = x[:, :, :P].repeat_interleave(G, 0)
        return torch.cat([prompt, unpack_completions(x, P, G)], 2)

    out = attend(                                                               # (N, H, C, D)
        unpack_completions(q, P, G), with_prompt(k), with_prompt(v), scaling,
        shared_prompt.completion_attention_mask)
    out = out.unflatten(0, (-1, G)).transpose(1, 2).flatten(2, 3)               # (B, H, G*C, D)
    return torch.cat([prompt_out, out], 2).transpose(1, 2), None


def unpack_completions(x: Tensor, P: int, G: int) -> Tensor:
    """Packed rows (B, heads, P + G*C, D) -> their completions, one a row (N, heads, C, D)."""
    return x[:, :, P:].unflatten(2, (G, -1)).transpose(1, 2).flatten(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Attention of L queries to S >= L keys -> (.., H, L, D).

    Without a mask it is causal, aligned at the end: the last query attends to all keys.
    """
    L, S = q.shape[2], k.shape[2]
    package = flash_attn_for(q)
    if package and mask is None:  # flash-attn takes no mask; its causal one is aligned at the end
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = package.flash_attn_func(q, k, v, softmax_scale=scaling, causal=True)
        return out.transpose(1, 2)
    if mask is not None:  # PyTorch's kernels with a mask want as many key heads as query heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    else:  # its own causal mask is aligned at the start
        mask = causal_lower_right(L, S)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, shared_prompt: SharedPrompt,
                     cache: list[Tensor]) -> Tensor:
    """One new token per row: q (N, H, 1, D), k and v (N, K, 1, D) -> (N, 1, H, D).

    It attends to its group's prompt and to its own completion so far. Its key and value are written
    into the cache in place. The prompt's keys and values are read once for all G rows of a group,
    not copied to each: the queries of the G rows are stacked.
    """
    package = flash_attn_for(q)
    if package:
        kernel = package.flash_attn_with_kvcache
        return flash_decode_attention(kernel, q, k, v, scaling, shared_prompt, cache)

    prompt_k, prompt_v, completion_k, completion_v = cache
    B, K, P, _ = prompt_k.shape
    G, W = shared_prompt.G, shared_prompt.no_token.shape[3] - P
    r = q.shape[1] // K                                  # query heads per key/value head
    completion_k.index_copy_(2, shared_prompt.slot, k)
    completion_v.index_copy_(2, shared_prompt.slot, v)
    q = q.view(-1, K, r, q.shape[3])                                            # (N, K, r, D)

    def by_prompt(x: Tensor) -> Tensor:                                         # (B, K, G*r, .)
        return x.view(B, G, K, r, -1).transpose(1, 2).reshape(B, K, G * r, -1)

    def by_row(x: Tensor) -> Tensor:                                            # (N, K, r, .)
        return x.view(B, K, G, r, -1).transpose(1, 2).reshape(-1, K, r, x.shape[-1])

    prompt_scores = float32_scores(by_prompt(q), prompt_k, scaling)             # (B, K, G*r, P)
    completion_scores = float32_scores(q, completion_k[:, :, :W], scaling)      # (N, K, r, W)
    scores = torch.cat([by_row(prompt_scores), completion_scores], -1)          # (N, K, r, P + W)
    scores.masked_fill_(shared_prompt.no_token, float("-inf"))
    weights = scores.softmax(-1).to(v.dtype)
    out = by_row(by_prompt(weights[..., :P]) @ prompt_v)                        # (N, K, r, D)
    out = out + weights[..., P:] @ completion_v[:, :, :W]
    return out.reshape(len(q), 1, K * r, -1)


def float32_scores(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """Scaled products of queries (.., L, D) and keys (.., S, D) -> (.., L, S) in float32, as fused
    kernels have them. Qwen2.5's key biases make scores of thousands, where bf16 has steps of 8."""
    if q.is_cuda and q.dtype != torch.float32:
        products = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2),
                             out_dtype=torch.float32)
        return products.unflatten(0, q.shape[:2]) * scaling
    with torch.autocast(q.device.type, enabled=False):  # a CPU has no out_dtype
        return (q.float() * scaling) @ k.float().transpose(2, 3)


def flash_decode_attention(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, scaling: float,
                           shared_prompt: SharedPrompt, cache: list[Tensor]) -> Tensor:
    """decode_attention by two calls of flash-attn's kernel: over the prompt, over the completion.

    Two softmaxes over disjoint keys are joined by their log-sum-exps a (prompt) and b (completion):
    the prompt's share of the weight is e^a / (e^a + e^b) = sigmoid(a - b).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                            # (N, 1, heads, D)
    prompt_k, prompt_v, completion_k, completion_v = (x.transpose(1, 2) for x in cache)
    B, _, K, D = prompt_k.shape
    G, r = shared_prompt.G, q.shape[2] // K
    # The queries that share a key head are stacked, so that the prompt's keys are read once.
    prompt_q = q.view(B, G, K, r, D).transpose(2, 3).reshape(B, G * r, K, D)
    prompt_out, prompt_lse = kernel(                                            # lse: (B, K, G*r)
        prompt_q, prompt_k, prompt_v, softmax_scale=scaling,
        cache_seqlens=shared_prompt.prompt_lengths, return_softmax_lse=True)
    # Given k and v, the kernel appends them to the cache in place.
    completion_out, completion_lse = kernel(                                    # lse: (N, H, 1)
        q, completion_k, completion_v, k, v, softmax_scale=scaling,
        cache_seqlens=shared_prompt.completion_lengths, return_softmax_lse=True)
    prompt_out = prompt_out.view(B, G, r, K, D).transpose(2, 3).reshape(q.shape)  # (N, 1, H, D)
    prompt_lse = prompt_lse.view(B, K, G, r).transpose(1, 2).reshape(completion_lse.shape)
    share = torch.sigmoid(prompt_lse - completion_lse)                          # (N, H, 1)
    share = share.transpose(1, 2).unsqueeze(-1)                                 # (N, 1, H, 1)
    return (share * prompt_out + (1 - share) * completion_out).to(v.dtype)


def flash_attn_for(q: Tensor) -> ModuleType | None:
    """flash-attn if it is installed and can take q (on a GPU, 16 bits), else None. torch.compile
    cannot look into it: the compiled decode step would be one graph for each layer."""
    usable = q.is_cuda and q.dtype != torch.float32 and not torch.compiler.is_compiling()
    return flash_attn if usable else None


# The only side effect of importing this file: transformers finds an attention function by its name,
# and a model is built with that name (model.ATTENTION).
AttentionInterface.register("shared_prompt", shared_prompt_attention)
