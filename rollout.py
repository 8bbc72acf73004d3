"""Rollout: G completions for each of B prompts, without gradients.

    1. prefill: each prompt goes through the model once; its keys and values are the cache, which
       its G completions share.
    2. sample_next_token: logits -> distribution -> one token per row, by inverse CDF from uniform
       numbers that are drawn beforehand.
    3. decode_step: that token goes through the model, and the next one is sampled.
    4. Repeat 3 until all rows have stopped or have C tokens.

No top-p and no top-k: the sampled distribution is the one that model.token_logprobs scores.

Step 3 runs in one of three modes, with the same result:
    eager       on a CPU: rows that have stopped are dropped once they are half of all
    compiled    Sampler(compile_step=True): torch.compile fuses small operations; fixed shapes
    CUDA graph  on a GPU, compiled or not: captured once, then replayed with one launch per token
                instead of some thousand, and no synchronisation; fixed shapes

Shapes: N = B*G rows, P prompt tokens, C completion tokens at most, V vocabulary, E hidden size.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attention import SharedPrompt
from model import (
    STOP_TOKENS,
    Processor,
    Prompts,
    Qwen,
    collate,
    embed_prompts,
    embed_tokens,
    encode,
    last_position_ids,
    next_token_logits,
    pad_prompts,
    run_decoder,
)
from runtime.distributed import autocast, device
from runtime.errors import first_line
from sample import Sample

STOP_CHECK_EVERY = 16  # decoding steps between two checks whether all rows have stopped
MAX_CUDA_GRAPHS = 3


class Completions(NamedTuple):
    tokens: Tensor    # (B, G, C) padded after the stop token
    mask: Tensor      # (B, G, C) True on the completion's tokens, the stop token included
    logprobs: Tensor  # (B, G, C) of the sampled tokens, as sampled; 0 elsewhere
    entropy: Tensor   # (B, G, C) of the distributions they were sampled from, in nats; 0 elsewhere
    stopped: Tensor   # (B, G) False where the completion was cut off at C tokens


class SamplingParams(NamedTuple):
    """How a token is chosen, and which ones end a completion."""
    stop_ids: tuple[int, ...]
    pad_id: int                 # follows the stop token
    temperature: float | None   # None: greedy


@dataclass
class DecodeState:
    """All that a decoding step reads and writes."""
    shared_prompt: SharedPrompt  # with the keys and values
    uniforms: Tensor             # (N, C)
    start: Tensor                # (N,) rotary position of a row's first token
    t: Tensor                    # (1,) number of tokens that each row has
    token: Tensor                # (N,) the last of them
    active: Tensor               # (N,) bool: not stopped yet
    tokens: Tensor               # (N, C), as are the next three; see Completions
    mask: Tensor
    logprobs: Tensor
    entropy: Tensor

    def tensors(self) -> list[Tensor]:
        own = [getattr(self, f.name) for f in fields(self) if f.name != "shared_prompt"]
        cache = [x for layer in self.shared_prompt.cache.values() for x in layer]
        return [*own, self.shared_prompt.mask, *cache]

    def select_rows(self, prompts: Tensor, rows: Tensor) -> "DecodeState":
        """The state of some prompts and of some rows, equally many of each prompt."""
        by_row = [f.name for f in fields(self) if f.name not in ("shared_prompt", "t")]
        own = {name: getattr(self, name)[rows] for name in by_row}
        cache = {}
        for layer, (prompt_k, prompt_v, own_k, own_v) in self.shared_prompt.cache.items():
            cache[layer] = [prompt_k[prompts], prompt_v[prompts], own_k[rows], own_v[rows]]
        shared_prompt = replace(
            self.shared_prompt, G=len(rows) // len(prompts),
            mask=self.shared_prompt.mask[prompts], cache=cache)
        return replace(self, shared_prompt=shared_prompt, **own)


# --------------------------------------------------------------------------------------------------
# The sampler

class Sampler:
    """A model that generates, with what makes its decoding fast. It owns

    model, processor  updated weights have to be written in place: a CUDA graph reads the addresses
                      that it was captured with
    decode_step       the function, or its compiled form: each new shape costs some 15 seconds
    cuda_graphs       the last MAX_CUDA_GRAPHS used, the last used last
    graph_pool        one pool of memory for all graphs: nothing in it is needed after a step
    """

    def __init__(self, model: Qwen, processor: Processor, compile_step: bool = False) -> None:
        self.model = model
        self.processor = processor
        self.stop_ids = stop_ids(processor)
        self.decode_step = decode_step
        if compile_step:
            self.decode_step = torch.compile(decode_step, dynamic=False)
        self.use_cuda_graphs = torch.cuda.is_available()
        self.fixed_shapes = compile_step or self.use_cuda_graphs
        self.cuda_graphs = {}  # (params, shapes) -> (state, function that makes a step on it)
        self.graph_pool = None

    @torch.no_grad()
    def generate(self, prompts: Prompts, C: int, G: int = 1, temperature: float = 1.0,
                 uniforms: Tensor | None = None) -> Completions:
        """G completions of at most C tokens for each of B prompts.

        uniforms  (N, C) numbers in [0, 1), see the function of this name; token t of a row is the
                  one in whose part of the cumulated distribution the row's number t falls. So a
                  row depends on its own numbers only, not on its neighbours, the batch or the
                  device's generator. None decodes greedily.
        """
        params = SamplingParams(
            self.stop_ids, self.processor.tokenizer.pad_token_id,
            temperature=None if uniforms is None else temperature)
        if self.fixed_shapes:  # multiples of 64, so that there are few shapes
            prompts = pad_prompts(prompts, -prompts.input_ids.shape[1] % 64)

        was_training = self.model.training
        self.model.eval()  # the scored distribution has no dropout; and checkpointing is off
        with autocast():
            state, hidden = prefill(self.model, prompts, C, G, uniforms)
            sample_next_token(self.model, state, hidden, params)
            if self.fixed_shapes:
                state = self.decode_static(state, params)
            else:
                state = decode_eager(self.model, state, params)
        self.model.train(was_training)

        tokens = state.tokens.masked_fill(~state.mask, params.pad_id)  # dropped rows have no pads
        max_len = int(state.mask.sum(1).max())

        def by_group(x: Tensor) -> Tensor:                                      # (B, G, max_len)
            return x[:, :max_len].view(-1, G, max_len).clone()

        return Completions(by_group(tokens), by_group(state.mask), by_group(state.logprobs),
                           by_group(state.entropy), stopped=~state.active.view(-1, G))

    def decode_texts(self, completions: Completions) -> list[list[str]]:
        """B x G texts without the stop token. Other special tokens stay visible, because the format
        reward should see them."""
        texts = []
        for tokens, mask in zip(completions.tokens, completions.mask):          # (G, C) each
            rows = [row[is_token].tolist() for row, is_token in zip(tokens, mask)]
            rows = [[token for token in row if token not in self.stop_ids] for row in rows]
            texts.append(self.processor.tokenizer.batch_decode(rows, skip_special_tokens=False))
        return texts

    def decode_static(self, state: DecodeState, params: SamplingParams) -> DecodeState:
        """Decode as decode_eager does, but with all steps on one and the same state, into which
        this one is copied."""
        C = state.tokens.shape[1]
        if C == 1:
            return state
        key = (params, *(x.shape for x in state.tensors()))
        if key in self.cuda_graphs:
            self.cuda_graphs[key] = self.cuda_graphs.pop(key)  # moves to the end: last used
        else:
            self.cuda_graphs[key] = self.capture_cuda_graph(state, params)
        while len(self.cuda_graphs) > MAX_CUDA_GRAPHS:
            del self.cuda_graphs[next(iter(self.cuda_graphs))]

        static_state, run_step = self.cuda_graphs[key]
        for static, new in zip(static_state.tensors(), state.tensors(), strict=True):
            static.copy_(new)
        for t in range(1, C):
            # The check waits for the GPU, so it is rare; the steps after the last stop are no-ops.
            if t % STOP_CHECK_EVERY == 0 and not static_state.active.any():
                break
            run_step()
        return static_state

    def capture_cuda_graph(
        self, state: DecodeState, params: SamplingParams
    ) -> tuple[DecodeState, Callable[[], None]]:
        """-> (a copy of the state, a function that makes a decoding step on it).

        On a GPU the function replays a CUDA graph, or is the step itself if the capture failed.
        """
        state = copy.deepcopy(state)
        run_step = partial(self.decode_step, self.model, state, state.tokens.shape[1], params)
        if not self.use_cuda_graphs:
            return state, run_step

        # Run before the capture, on another stream as PyTorch asks: libraries set themselves up.
        current_stream = torch.cuda.current_stream()
        warm_up_stream = torch.cuda.Stream()
        warm_up_stream.wait_stream(current_stream)
        with torch.cuda.stream(warm_up_stream):
            for _ in range(3):
                state.t.fill_(1)
                run_step()
        current_stream.wait_stream(warm_up_stream)

        if self.graph_pool is None:
            self.graph_pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads may copy images to the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self.graph_pool, capture_error_mode="thread_local"):
                run_step()
        except RuntimeError as error:
            # torch.cuda.graph leaves its own stream current when the end of the capture fails, and
            # a pool whose captures have all failed trips an assertion at the next one.
            torch.cuda.set_stream(current_stream)
            self.graph_pool = torch.cuda.graph_pool_handle()
            print("a decoding step cannot be captured as a CUDA graph, and runs slower: "
                  f"{first_line(error)}", file=sys.stderr)
            return state, run_step
        # These two are in the graph's pool, whose memory the next graph overwrites.
        state.shared_prompt.slot = state.shared_prompt.filled = None
        return state, graph.replay


def predict(sampler: Sampler, samples: Sequence[Sample], max_new_tokens: int, group: int = 1,
            temperature: float = 0.0, first: int = 0) -> list[list[str]]:
    """`group` completions for each sample, as texts; temperature 0 is greedy.

    first  number of the first sample: the random numbers of sample i depend on first + i alone
    """
    prompts = collate([encode(sampler.processor, sample) for sample in samples])
    numbers = None
    if temperature > 0:
        rows = range(first, first + len(samples))
        numbers = uniforms((0,), rows, group, max_new_tokens)
    completions = sampler.generate(prompts, max_new_tokens, group, temperature, numbers)
    return sampler.decode_texts(completions)


def uniforms(seed: tuple[int, ...], rows: Sequence[int], G: int, C: int) -> Tensor:
    """Uniform numbers (N, C) for Sampler.generate; those of completion g of prompt b are a function
    of (seed, b, g), so neither batch nor world size changes them. `rows`: the prompts' b."""
    numbers = [np.random.default_rng([*seed, b, g]).random(C, dtype=np.float32)
               for b in rows for g in range(G)]
    return torch.from_numpy(np.stack(numbers)).to(device())


def stop_ids(processor: Processor) -> tuple[int, ...]:
    return tuple(processor.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS)))


# --------------------------------------------------------------------------------------------------
# The three steps

def prefill(model: Qwen, prompts: Prompts, C: int, G: int,
            uniforms: Tensor | None) -> tuple[DecodeState, Tensor]:
    """The prompts' keys and values with room for those of the completions, and the hidden states
    (N, E) that the first token is sampled from."""
    B, P = prompts.input_ids.shape
    N, on = B * G, prompts.input_ids.device
    shared_prompt = SharedPrompt("prefill", P, G)
    inputs_embeds = embed_prompts(model, prompts)                               # (B, P, E)
    hidden = run_decoder(model, inputs_embeds, prompts.position_ids, shared_prompt)
    hidden = hidden[torch.arange(B, device=on), prompts.lengths - 1]            # (B, E)
    hidden = hidden.repeat_interleave(G, 0)                                     # (N, E)

    slots = max(C, 16)  # flash-attn refuses a cache shorter than its query heads per key head
    for layer, (k, v) in shared_prompt.cache.items():                           # (B, K, P, D) each
        _, K, _, D = k.shape
        shared_prompt.cache[layer] = [
            k.contiguous(), v.contiguous(),  # or the matrix product of each step would copy them
            k.new_zeros(N, K, slots, D),     # zeros: a masked value is multiplied by a weight of
            k.new_zeros(N, K, slots, D)]     # zero, which has to give zero and not NaN
    shared_prompt.mode = "decode"
    shared_prompt.mask = prompts.attention_mask[:, None, None]                  # (B, 1, 1, P)

    zeros = torch.zeros(N, C, device=on)
    state = DecodeState(
        shared_prompt,
        uniforms=zeros if uniforms is None else uniforms,
        start=(last_position_ids(prompts) + 1).repeat_interleave(G),
        t=torch.zeros(1, dtype=torch.long, device=on),
        token=torch.zeros(N, dtype=torch.long, device=on),
        active=torch.ones(N, dtype=torch.bool, device=on),
        tokens=zeros.long(), mask=zeros.bool(), logprobs=zeros.clone(), entropy=zeros.clone())
    return state, hidden


def sample_next_token(model: Qwen, state: DecodeState, hidden: Tensor,
                      params: SamplingParams) -> None:
    """Append a token to every active row, given the hidden states (N, E) before it."""
    logits = next_token_logits(model, hidden, params.temperature or 1.0)        # (N, V)
    dist = logits.log_softmax(-1)
    if params.temperature is None:
        token = dist.argmax(-1)                                                 # (N,)
    else:
        token = inverse_cdf(dist, state.uniforms.index_select(1, state.t)[:, 0])
    token = torch.where(state.active, token, params.pad_id)
    logprob = dist.gather(1, token[:, None])[:, 0].where(state.active, 0.0)
    entropy = torch.special.entr(dist.exp()).sum(-1).where(state.active, 0.0)
    state.tokens.index_copy_(1, state.t, token[:, None])
    state.mask.index_copy_(1, state.t, state.active[:, None])
    state.logprobs.index_copy_(1, state.t, logprob[:, None])
    state.entropy.index_copy_(1, state.t, entropy[:, None])
    state.token.copy_(token)
    for stop_id in params.stop_ids:
        state.active &= token != stop_id
    state.t += 1


def inverse_cdf(logprobs: Tensor, numbers: Tensor) -> Tensor:
    """Log-probs (N, V) and uniform numbers (N,) -> tokens (N,)."""
    cdf = logprobs.double().exp().cumsum(-1)  # float64: the rounding of 150,000 terms adds up
    # Times the last value, which rounding leaves a little off 1. right=True: a number on an edge
    # takes the token after it, so 0 never takes a token of probability 0.
    numbers = (numbers.double() * cdf[:, -1])[:, None]                          # (N, 1)
    token = torch.searchsorted(cdf, numbers, right=True).squeeze(1)
    # NaN logits give V. On a GPU the gather that follows would abort the process, before the
    # training loop can see the NaN and skip the step.
    return token.clamp(max=logprobs.shape[1] - 1)


def decode_step(model: Qwen, state: DecodeState, width: int, params: SamplingParams) -> None:
    """The last token of each row goes through the model, its keys and values into the cache, and
    the next one is sampled.

    width  slots of the completion that attention reads, at least as many as are filled
    A CUDA graph allows no synchronisation with the host here, and all that lasts has to be written
    in place.
    """
    slot = state.t - 1                                                          # of the last token
    state.shared_prompt.slot = slot
    state.shared_prompt.filled = torch.arange(width, device=slot.device) <= slot
    position_ids = (state.start + slot).expand(3, 1, -1).transpose(1, 2)        # (3, N, 1)
    inputs_embeds = embed_tokens(model, state.token[:, None])                   # (N, 1, E)
    hidden = run_decoder(model, inputs_embeds, position_ids, state.shared_prompt)
    sample_next_token(model, state, hidden[:, 0], params)


# --------------------------------------------------------------------------------------------------
# Eager decoding, where stopped rows are dropped

def decode_eager(model: Qwen, state: DecodeState, params: SamplingParams) -> DecodeState:
    """Decode until all rows have stopped or are full. Whenever at most half of the rows are needed,
    the others are dropped."""
    C = state.tokens.shape[1]
    full, rows = state, None  # rows: those of `full` that `state` has, once some are dropped
    for t in range(1, C):
        if not state.active.any():
            break
        kept = active_rows(state) if t % 8 == 0 else None
        if kept is not None:
            scatter_back(full, state, rows)
            prompts, kept_rows = kept
            rows = kept_rows if rows is None else rows[kept_rows]
            state = state.select_rows(prompts, kept_rows)
        width = min(C, (t + 15) // 16 * 16)  # multiples of 16: few shapes
        decode_step(model, state, width, params)
    scatter_back(full, state, rows)
    return full


def active_rows(state: DecodeState) -> tuple[Tensor, Tensor] | None:
    """(prompts that have active rows, rows of each: as many as the prompt with the most has), or
    None if these are more than half of all."""
    G = state.shared_prompt.G
    active = state.active.view(-1, G)                                           # (B, G)
    prompts = active.any(1).nonzero()[:, 0]
    most = int(active.sum(1).max())
    if 2 * len(prompts) * most > active.numel():
        return None
    # A stable sort puts the active rows first and keeps their order.
    first = active[prompts].int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return prompts, (prompts[:, None] * G + first).flatten()


def scatter_back(full: DecodeState, state: DecodeState, rows: Tensor | None) -> None:
    """Write the rows of `state` to their places in the full state."""
    if rows is None:  # they are the same
        return
    for name in ("tokens", "mask", "logprobs", "entropy", "active"):
        getattr(full, name)[rows] = getattr(state, name)
