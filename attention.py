"""Attention with a shared prompt: one function, three modes.

The G completions of a group have one prompt, most of it image tokens. It is computed once:

    prefill  the prompt alone; its keys and values go into the cache           (rollout.py)
    decode   one new token per row, B*G rows, against the cache                (rollout.py)
    group    the row [prompt | c1 | .. | cG], P + G*C tokens instead of G*(P + C), for log-probs
             and gradients                                          (model.token_logprobs)

A completion attends to the prompt and to itself up to now, as G separate rows would: the same
mathematics. transformers' decoder calls `shared_prompt_attention` by its registered name, so none
of its model code is copied.

Shapes: B prompts, G completions each, N = B*G rows, P prompt tokens and C completion tokens (padded
on the right), L tokens of a row, H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

try:
    import flash_attn
except ImportError:  # optional: PyTorch's own attention gives the same result
    flash_attn = None


@dataclass
class SharedPrompt:
    """What the attention has to know beside q, k and v. Passed to the decoder as a keyword."""
    mode: str                      # "prefill", "decode" or "group", as above
    P: int
    G: int = 1
    mask: Tensor | None = None     # group: completion_mask, or None without padding
                                   # decode: (B, 1, 1, P) True on the prompt's tokens
    slot: Tensor | None = None     # decode: (1,) index of the new token in its completion
    filled: Tensor | None = None   # decode: (W,) True on the first W slots up to that one
    # layer -> [prompt k, prompt v (B, K, P, D)], in decode also [.., own k, own v (N, K, C, D)]
    cache: dict[int, list[Tensor]] = field(default_factory=dict)


def completion_mask(attention_mask: Tensor, G: int, C: int) -> Tensor:
    """Which keys a completion attends to, (N, 1, C, P + C) bool: its prompt without the padding,
    and itself up to now. attention_mask: (B, P), True on tokens.

    Only needed where a prompt is padded; otherwise plain causal attention is the same and faster.
    """
    B = len(attention_mask)
    own = torch.ones(C, C, dtype=torch.bool, device=attention_mask.device).tril()
    prompt = attention_mask[:, None].expand(-1, C, -1)                          # (B, C, P)
    mask = torch.cat([prompt, own.expand(B, -1, -1)], 2)                        # (B, C, P + C)
    return mask.repeat_interleave(G, 0).unsqueeze(1)                            # (N, 1, C, P + C)


def shared_prompt_attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor,
    attention_mask: None,  # noqa: ARG001  transformers passes it; the mask is in SharedPrompt
    scaling: float, shared_prompt: SharedPrompt, **_: object,
) -> tuple[Tensor, None]:
    """q (B, H, L, D), k and v (B, K, L, D), rotated -> (output (B, L, H, D), no weights).

    transformers' decoder layers call it; `module` is the layer's attention.
    """
    P, G = shared_prompt.P, shared_prompt.G
    q = q.to(v.dtype)  # the rotary tables are float32 and make q and k float32 under autocast
    k = k.to(v.dtype)
    if shared_prompt.mode == "decode":
        cache = shared_prompt.cache[module.layer_idx]
        return decode_attention(q, k, v, scaling, shared_prompt, cache), None

    out = attend(q[:, :, :P], k[:, :, :P], v[:, :, :P], scaling)                # the prompt itself
    if shared_prompt.mode == "prefill":
        shared_prompt.cache[module.layer_idx] = [k, v]
        return out.transpose(1, 2), None

    def with_prompt(x: Tensor) -> Tensor:                                       # (N, K, P + C, D)
        return torch.cat([x[:, :, :P].repeat_interleave(G, 0), by_completion(x, P, G)], 2)

    own_q = by_completion(q, P, G)                                              # (N, H, C, D)
    own = attend(own_q, with_prompt(k), with_prompt(v), scaling, shared_prompt.mask)
    own = own.unflatten(0, (-1, G)).transpose(1, 2).flatten(2, 3)               # (B, H, G*C, D)
    return torch.cat([out, own], 2).transpose(1, 2), None


def by_completion(x: Tensor, P: int, G: int) -> Tensor:
    """The completions of a packed row as rows: (B, heads, P + G*C, D) -> (N, heads, C, D)."""
    return x[:, :, P:].unflatten(2, (G, -1)).transpose(1, 2).flatten(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Attention of L queries to S >= L keys -> (., H, L, D).

    Without a mask it is causal, aligned at the end: the last query attends to all keys.
    """
    L, S = q.shape[2], k.shape[2]
    package = flash_attn_for(q)
    if package and mask is None:  # flash-attn takes no mask; its causal one is aligned at the end
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = package.flash_attn_func(q, k, v, softmax_scale=scaling, causal=True)
        return out.transpose(1, 2)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)                        # K -> H heads
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    if mask is None and L != S:  # SDPA's own causal mask is aligned at the start
        mask = torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L)
    is_causal = mask is None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scaling)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, shared_prompt: SharedPrompt,
                     cache: list[Tensor]) -> Tensor:
    """One new token per row: q (N, H, 1, D), k and v (N, K, 1, D) -> (N, 1, H, D).

    It attends to its group's prompt and to its own completion so far. Its key and value are written
    into the cache in place. The prompt's keys and values are read once for the G rows of a group,
    not copied to each: the rows become G times as many queries of one row.
    """
    package = flash_attn_for(q)
    if package:
        kernel = package.flash_attn_with_kvcache
        return flash_decode_attention(kernel, q, k, v, scaling, shared_prompt, cache)

    prompt_k, prompt_v, own_k, own_v = cache
    B, K, P, _ = prompt_k.shape
    G, W = shared_prompt.G, len(shared_prompt.filled)
    r = q.shape[1] // K                                  # query heads per key/value head
    own_k.index_copy_(2, shared_prompt.slot, k)
    own_v.index_copy_(2, shared_prompt.slot, v)
    q = q.view(-1, K, r, q.shape[3]) * scaling                                  # (N, K, r, D)

    def by_prompt(x: Tensor) -> Tensor:                                         # (B, K, G*r, .)
        return x.view(B, G, K, r, -1).transpose(1, 2).reshape(B, K, G * r, -1)

    def by_row(x: Tensor) -> Tensor:                                            # (N, K, r, .)
        return x.view(B, K, G, r, -1).transpose(1, 2).reshape(-1, K, r, x.shape[-1])

    prompt_scores = by_prompt(q) @ prompt_k.transpose(2, 3)                     # (B, K, G*r, P)
    prompt_scores = prompt_scores.masked_fill(~shared_prompt.mask, float("-inf"))
    own_scores = q @ own_k[:, :, :W].transpose(2, 3)                            # (N, K, r, W)
    own_scores = own_scores.masked_fill(~shared_prompt.filled, float("-inf"))
    scores = torch.cat([by_row(prompt_scores), own_scores], -1)                 # (N, K, r, P + W)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    out = by_row(by_prompt(weights[..., :P]) @ prompt_v)                        # (N, K, r, D)
    out = out + weights[..., P:] @ own_v[:, :, :W]
    return out.reshape(len(q), 1, K * r, -1)


def flash_decode_attention(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, scaling: float,
                           shared_prompt: SharedPrompt, cache: list[Tensor]) -> Tensor:
    """decode_attention by two calls of flash-attn's kernel: over the prompt, over the completion.

    Softmaxes over disjoint keys are joined by their log-sum-exps p (prompt) and o (own): the share
    of the prompt is e^p / (e^p + e^o) = sigmoid(p - o).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                            # (N, 1, heads, D)
    prompt_k, prompt_v, own_k, own_v = (x.transpose(1, 2) for x in cache)
    prompt_q = q.reshape(len(prompt_k), shared_prompt.G, *q.shape[2:])          # (B, G, H, D)
    prompt_lengths = shared_prompt.mask.sum((1, 2, 3), dtype=torch.int32)       # (B,)
    own_lengths = shared_prompt.slot.expand(len(q)).int()                       # (N,)
    prompt, p = kernel(
        prompt_q, prompt_k, prompt_v, softmax_scale=scaling, cache_seqlens=prompt_lengths,
        return_softmax_lse=True)                                                # p: (B, H, G)
    own, o = kernel(                                     # appends k and v to the cache in place
        q, own_k, own_v, k, v, softmax_scale=scaling, cache_seqlens=own_lengths,
        return_softmax_lse=True)                                                # o: (N, H, 1)
    p = p.transpose(1, 2).reshape(o.shape)                                      # (N, H, 1)
    share = torch.sigmoid(p - o).transpose(1, 2).unsqueeze(-1)                  # (N, 1, H, 1)
    return (share * prompt.reshape(own.shape) + (1 - share) * own).to(v.dtype)


def flash_attn_for(q: Tensor) -> ModuleType | None:
    """flash-attn if it is installed and can take q (on a GPU, 16 bits), else None."""
    return flash_attn if q.is_cuda and q.dtype != torch.float32 else None


# The one thing beside definitions that importing this file does: transformers finds an attention
# by its name only, and a model is built with that name (model.ATTENTION).
AttentionInterface.register("shared_prompt", shared_prompt_attention)
