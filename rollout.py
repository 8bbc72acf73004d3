"""Rollout: G completions for each of B prompts, without gradients.

    1. prefill: each prompt goes through the model once; its keys and values are the cache, which
       its G completions share.
    2. sample_next_token: logits -> distribution -> one token per row, by inverse CDF from random
       numbers that were drawn before.
    3. decode_step: that token goes through the model, and the next one is sampled.
    4. Repeat 3 until all rows have stopped or have C tokens.

No top-p and no top-k, so that the log-probs in the loss are those of the distribution that was
sampled.

Decoding has two modes with the same result:
    eager   on a CPU: every 8 tokens stopped rows are dropped, if at most half of the rows stay
    static  on a GPU or with torch.compile: fixed shapes. On a GPU a decode step is captured as a
            CUDA graph: one launch instead of about a thousand, and no synchronisation

Shapes: B prompts, G completions of each, N = B*G rows (a row is one completion), P prompt tokens,
at most C completion tokens, W slots of the cache that are read, V vocabulary, E hidden size.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attention import SharedPrompt
from model import STOP_TOKENS, Qwen, embed_prompts, embed_tokens, next_token_logits, run_decoder
from pretrained import load_model
from processing import Processor, Prompts, collate, max_position_ids, pad_prompts
from runtime.distributed import autocast, device, to_compute_dtype
from runtime.errors import first_line, warn

DROP_ROWS_EVERY = 8    # eager decode steps between checks for stopped rows
STOP_CHECK_EVERY = 16  # decode steps between two checks whether all rows have stopped
MAX_STATIC_DECODE_STEPS = 3  # kept for later steps; each holds a cache of keys and values
BLOCK = 512  # tokens; inverse_cdf first finds the block


class Rollout(NamedTuple):
    tokens: Tensor    # (B, G, C), C the longest completion; padded after the stop token
    mask: Tensor      # (B, G, C) True on the completion's tokens, the stop token included
    logprobs: Tensor  # (B, G, C) of the sampled tokens, as sampled; 0 elsewhere
    entropy: Tensor   # (B, G, C) of the distributions they were sampled from, in nats; 0 elsewhere
    stopped: Tensor   # (B, G) False where the completion was cut off at max_new_tokens


def replace_groups(rollout: Rollout, indices: Sequence[int], new: Rollout) -> Rollout:
    """The rollout with the groups of `new` at these indices. Padded places are masked."""
    C = max(rollout.tokens.shape[2], new.tokens.shape[2])

    def replaced(old: Tensor, new: Tensor) -> Tensor:
        if old.dim() == 3:                                                      # (B, G, C)
            old, new = (F.pad(x, (0, C - x.shape[2])) for x in (old, new))
        return old.index_copy(0, torch.tensor(indices, device=old.device), new)

    return Rollout(*map(replaced, rollout, new))


class SamplingParams(NamedTuple):
    stop_ids: tuple[int, ...]  # tokens that end a completion
    pad_id: int                # follows the stop token
    temperature: float         # 0: greedy


@dataclass
class DecodeState:
    """All that a decode step reads and writes."""
    shared_prompt: SharedPrompt    # with the keys and values
    random_numbers: Tensor | None  # (N, C); None if greedy
    start: Tensor                  # (N,) rotary position of a row's first token
    t: Tensor                      # (1,) number of tokens that each row has
    last_token: Tensor             # (N,)
    active: Tensor                 # (N,) bool: not stopped yet
    tokens: Tensor                 # (N, C), as are the next three; see Rollout
    mask: Tensor
    logprobs: Tensor
    entropy: Tensor

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors among the fields."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def all_tensors(self) -> list[Tensor]:
        """The same, and those of shared_prompt that live longer than a decode step."""
        cache = [x for layer in self.shared_prompt.cache.values() for x in layer]
        return [*self.named_tensors().values(), self.shared_prompt.prompt_lengths, *cache]

    def select_rows(self, prompt_indices: Tensor, row_indices: Tensor) -> "DecodeState":
        """The state of these prompts and rows; each prompt has equally many rows."""
        cache = {}
        for layer, (*prompt_kv, completion_k, completion_v) in self.shared_prompt.cache.items():
            cache[layer] = [*(x[prompt_indices] for x in prompt_kv),
                            completion_k[row_indices], completion_v[row_indices]]
        shared_prompt = replace(
            self.shared_prompt, G=len(row_indices) // len(prompt_indices),
            prompt_lengths=self.shared_prompt.prompt_lengths[prompt_indices], cache=cache)
        by_row = {name: x[row_indices] for name, x in self.named_tensors().items() if name != "t"}
        return replace(self, shared_prompt=shared_prompt, **by_row)


# --------------------------------------------------------------------------------------------------
# The sampler

class Sampler:
    """A model that generates, with what makes its decoding fast. It owns

    model, processor     updated weights have to be written in place: a CUDA graph reads the
                         addresses that it was captured with
    decode_step          the function, or its compiled form: each new shape costs 15 seconds or more
    static_decode_steps  the MAX_STATIC_DECODE_STEPS most recently used, the latest at the end
    graph_pool           one pool of memory for all CUDA graphs: none of it outlasts a decode step
    warm_up_stream       one for all captures: cuBLAS keeps up to 32 MiB for each stream
    """

    def __init__(self, model: Qwen, processor: Processor,
                 compile_decode_step: bool = False) -> None:
        self.model = model
        self.processor = processor
        self.stop_ids = tuple(processor.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS)))
        self.decode_step = decode_step
        if compile_decode_step:
            torch._dynamo.config.recompile_limit = 64  # the default of 8 is too few for stages
            self.decode_step = torch.compile(decode_step, dynamic=False)
        self.use_cuda_graphs = torch.cuda.is_available()
        self.fixed_shapes = compile_decode_step or self.use_cuda_graphs
        self.static_decode_steps = {}  # (params, shapes) -> (state, function)
        self.graph_pool = self.warm_up_stream = None

    @torch.no_grad()
    def generate(self, prompts: Prompts, max_new_tokens: int, group: int = 1,
                 temperature: float = 0.0, random_numbers: Tensor | None = None) -> Rollout:
        """G = `group` completions of at most C = `max_new_tokens` tokens for each of B prompts.

        temperature     0 decodes greedily: no random_numbers, and log-probs at temperature 1
        random_numbers  (N, C), from `uniforms`. Token t of a row is the first whose cumulative
                        probability exceeds the row's number t. So a row depends on its own numbers
                        only, not on other rows or on the device's generator.
        """
        C, G = max_new_tokens, group
        if (temperature > 0) != (random_numbers is not None):
            raise ValueError("sampling needs random_numbers and a positive temperature")
        params = SamplingParams(self.stop_ids, self.processor.tokenizer.pad_token_id, temperature)
        if self.fixed_shapes:  # multiples of 64, so that there are few shapes
            prompts = pad_prompts(prompts, -prompts.input_ids.shape[1] % 64)

        was_training = self.model.training
        self.model.eval()  # no dropout in the distribution, and no gradient checkpointing
        with autocast():
            state, hidden = prefill(self.model, prompts, C, G, random_numbers)
            sample_next_token(self.model, state, hidden, params)
            if self.fixed_shapes:
                state = self.decode_static(state, params)
            else:
                state = decode_eager(self.model, state, params)
        self.model.train(was_training)

        tokens = state.tokens.masked_fill(~state.mask, params.pad_id)  # dropped rows hold zeros
        max_len = int(state.mask.sum(1).max())

        def by_group(x: Tensor) -> Tensor:                                      # (B, G, max_len)
            return x[:, :max_len].view(-1, G, max_len).clone()

        return Rollout(
            tokens=by_group(tokens), mask=by_group(state.mask),
            logprobs=by_group(state.logprobs), entropy=by_group(state.entropy),
            stopped=~state.active.view(-1, G))

    def decode_texts(self, rollout: Rollout) -> list[list[str]]:
        """B x G texts without the stop token. Other special tokens stay visible, because the format
        reward should see them."""
        texts = []
        for tokens, mask in zip(rollout.tokens, rollout.mask):                  # (G, C) each
            rows = [row[is_token].tolist() for row, is_token in zip(tokens, mask)]
            rows = [[token for token in row if token not in self.stop_ids] for row in rows]
            texts.append(self.processor.tokenizer.batch_decode(rows, skip_special_tokens=False))
        return texts

    def decode_static(self, state: DecodeState, params: SamplingParams) -> DecodeState:
        """Like decode_eager, but every decode step runs on the same tensors: those of a static
        state, into which `state` is copied."""
        C = state.tokens.shape[1]
        if C == 1:
            return state
        key = (params, *(x.shape for x in state.all_tensors()))
        cached = self.static_decode_steps.pop(key, None)
        while len(self.static_decode_steps) >= MAX_STATIC_DECODE_STEPS:  # room for its cache first
            del self.static_decode_steps[next(iter(self.static_decode_steps))]
        static_state, run_decode_step = cached or self.make_static_decode_step(state, params)
        self.static_decode_steps[key] = static_state, run_decode_step  # at the end: the latest
        for static, new in zip(static_state.all_tensors(), state.all_tensors(), strict=True):
            static.copy_(new)
        for t in range(1, C):
            # The check waits for the GPU, so it is rare. Late decode steps change no completion.
            if t % STOP_CHECK_EVERY == 0 and not static_state.active.any():
                break
            run_decode_step()
        return static_state

    def make_static_decode_step(
        self, state: DecodeState, params: SamplingParams
    ) -> tuple[DecodeState, Callable[[], None]]:
        """-> (a copy of the state, a function that runs a decode step on it)."""
        state = copy.deepcopy(state)
        C = state.tokens.shape[1]
        run_decode_step = partial(self.decode_step, self.model, state, C, params)
        if self.use_cuda_graphs:
            run_decode_step = self.capture_cuda_graph(state, run_decode_step)
        return state, run_decode_step

    def capture_cuda_graph(self, state: DecodeState,
                           run_decode_step: Callable[[], None]) -> Callable[[], None]:
        """The decode step on this state as a CUDA graph -> the function that replays it, or
        run_decode_step itself if the capture fails."""
        # Run before the capture, on another stream as PyTorch asks: libraries set themselves up.
        current_stream = torch.cuda.current_stream()
        warm_up_stream = self.warm_up_stream = self.warm_up_stream or torch.cuda.Stream()
        warm_up_stream.wait_stream(current_stream)
        with torch.cuda.stream(warm_up_stream):
            for _ in range(3):
                state.t.fill_(1)
                run_decode_step()
        current_stream.wait_stream(warm_up_stream)

        if self.graph_pool is None:
            self.graph_pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads may copy images to the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self.graph_pool, capture_error_mode="thread_local"):
                run_decode_step()
        except RuntimeError as error:
            # torch.cuda.graph leaves its own stream current when the end of the capture fails, and
            # a pool whose captures have all failed trips an assertion at the next one.
            torch.cuda.set_stream(current_stream)
            self.graph_pool = torch.cuda.graph_pool_handle()
            warn("a decode step cannot be captured as a CUDA graph, and runs slower: "
                 f"{first_line(error)}")
            return run_decode_step
        state.shared_prompt.end_decode_step()
        return graph.replay


def load_sampler(name: str, image_size: int | None = None) -> Sampler:
    """A model that only generates, whole, on this process's device; see load_model."""
    model, processor = load_model(name, image_size)
    return Sampler(to_compute_dtype(model, vectors=True, to=device()), processor)


def predict(sampler: Sampler, prompts: Sequence[Prompts], max_new_tokens: int, group: int = 1,
            temperature: float = 0.0, prompt_ids: Sequence[int] = ()) -> list[list[str]]:
    """`group` completions for each prompt, as texts.

    prompt_ids  the random numbers of a prompt depend on its id alone; greedy decoding needs none
    """
    random_numbers = None
    if temperature > 0:
        random_numbers = uniforms((0,), prompt_ids, group, max_new_tokens)
    rollout = sampler.generate(collate(prompts), max_new_tokens, group, temperature, random_numbers)
    return sampler.decode_texts(rollout)


def uniforms(seed: tuple[int, ...], prompt_ids: Sequence[int], G: int, C: int) -> Tensor:
    """Uniform random numbers (N, C) in [0, 1) for Sampler.generate. Those of completion g of a
    prompt depend on (seed, prompt id, g) only, not on the batch or the world size."""
    random_numbers = [np.random.default_rng([*seed, prompt_id, g]).random(C, dtype=np.float32)
                      for prompt_id in prompt_ids for g in range(G)]
    return torch.from_numpy(np.stack(random_numbers)).to(device())


# --------------------------------------------------------------------------------------------------
# Prefill, sample, decode

def prefill(model: Qwen, prompts: Prompts, C: int, G: int,
            random_numbers: Tensor | None) -> tuple[DecodeState, Tensor]:
    """The prompts' keys and values with room for those of the completions, and the hidden states
    (N, E) that the first token is sampled from."""
    B, P = prompts.input_ids.shape
    N = B * G
    shared_prompt = SharedPrompt("prefill", P, G)
    inputs_embeds = embed_prompts(model, prompts)                               # (B, P, E)
    hidden = run_decoder(model, inputs_embeds, prompts.position_ids, shared_prompt)
    hidden = hidden[torch.arange(B, device=hidden.device), prompts.lengths - 1]  # (B, E)
    hidden = hidden.repeat_interleave(G, 0)                                     # (N, E)

    slots = max(C, 16)  # flash-attn refuses a cache shorter than its query heads per key head
    for layer, (k, v) in shared_prompt.cache.items():                           # (B, K, P, D) each
        _, K, _, D = k.shape
        # Contiguous: otherwise the matrix product of each decode step copies them. Zeros: a masked
        # value is multiplied by a weight of zero, which must not give NaN.
        shared_prompt.cache[layer] = [
            k.contiguous(), v.contiguous(),
            k.new_zeros(N, K, slots, D), k.new_zeros(N, K, slots, D)]
    shared_prompt.mode = "decode"
    shared_prompt.prompt_lengths = prompts.lengths.int()                        # (B,)

    zeros = torch.zeros(N, C, device=hidden.device)
    state = DecodeState(
        shared_prompt, random_numbers,
        start=(max_position_ids(prompts) + 1).repeat_interleave(G),
        t=torch.zeros(1, dtype=torch.long, device=hidden.device),
        last_token=torch.zeros(N, dtype=torch.long, device=hidden.device),
        active=torch.ones(N, dtype=torch.bool, device=hidden.device),
        tokens=zeros.long(), mask=zeros.bool(),
        logprobs=zeros.clone(), entropy=zeros.clone())
    return state, hidden


def sample_next_token(model: Qwen, state: DecodeState, hidden: Tensor,
                      params: SamplingParams) -> None:
    """Append a token to every active row, given the hidden states (N, E) before it."""
    logits = next_token_logits(model, hidden, params.temperature or 1.0)        # (N, V)
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    if params.temperature == 0:
        token = logprobs.argmax(-1)                                             # (N,)
    else:
        token = inverse_cdf(probs, state.random_numbers.index_select(1, state.t)[:, 0])
    token = torch.where(state.active, token, params.pad_id)
    logprob = logprobs.gather(1, token[:, None])[:, 0].where(state.active, 0.0)
    entropy = torch.special.entr(probs).sum(-1).where(state.active, 0.0)
    state.tokens.index_copy_(1, state.t, token[:, None])
    state.mask.index_copy_(1, state.t, state.active[:, None])
    state.logprobs.index_copy_(1, state.t, logprob[:, None])
    state.entropy.index_copy_(1, state.t, entropy[:, None])
    state.last_token.copy_(token)
    for stop_id in params.stop_ids:
        state.active &= token != stop_id
    state.t += 1


def inverse_cdf(probs: Tensor, random_numbers: Tensor) -> Tensor:
    """Probabilities (N, V) and uniform random numbers (N,) -> tokens (N,).

    The block of tokens first, then the token in it: a GPU is slow at one cumulative sum over V.
    """
    blocks = F.pad(probs, (0, -probs.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    # float64: the rounding of 150,000 terms adds up.
    cdf = blocks.sum(2, dtype=torch.float64).cumsum(1)                          # (N, V / BLOCK)
    # Scaled by the last value, which rounding leaves near 1. right=True: a number on an edge
    # takes what comes after it, so 0 never takes a token of probability 0.
    thresholds = random_numbers.double()[:, None] * cdf[:, -1:]                 # (N, 1)
    # NaN gives an index past the end. On a GPU the gather that follows would abort the process,
    # before the training loop can see the NaN and skip the step.
    block = torch.searchsorted(cdf, thresholds, right=True).clamp(max=cdf.shape[1] - 1)
    thresholds = thresholds - F.pad(cdf, (1, 0)).gather(1, block)
    cdf = blocks.take_along_dim(block[:, :, None], 1)[:, 0].double().cumsum(1)  # (N, BLOCK)
    # The block's sum may have been rounded to a little more than the last value of its cdf.
    thresholds = torch.minimum(thresholds, cdf[:, -1:] * (1 - 1e-9))
    token = torch.searchsorted(cdf, thresholds, right=True).clamp(max=BLOCK - 1)
    return (block * BLOCK + token)[:, 0].clamp(max=probs.shape[1] - 1)


def decode_step(model: Qwen, state: DecodeState, W: int, params: SamplingParams) -> None:
    """The last token of each row goes through the model, its keys and values into the cache, and
    the next one is sampled.

    W  slots of the completion that attention reads, at least as many as hold a token
    For a CUDA graph, all results must be written in place, without synchronisation with the host.
    """
    slot = state.t - 1                                                          # of the last token
    state.shared_prompt.start_decode_step(slot, W)
    position_ids = (state.start + slot).expand(3, 1, -1).transpose(1, 2)        # (3, N, 1)
    inputs_embeds = embed_tokens(model, state.last_token[:, None])              # (N, 1, E)
    hidden = run_decoder(model, inputs_embeds, position_ids, state.shared_prompt)
    sample_next_token(model, state, hidden[:, 0], params)


# --------------------------------------------------------------------------------------------------
# Eager decoding, where stopped rows are dropped

def decode_eager(model: Qwen, state: DecodeState, params: SamplingParams) -> DecodeState:
    """Decode until all rows have stopped or have C tokens."""
    C = state.tokens.shape[1]
    full = state
    kept_rows = None  # (rows of `state`,) their indices in `full`; None as long as it has all
    for t in range(1, C):
        if not state.active.any():
            break
        selection = active_rows(state) if t % DROP_ROWS_EVERY == 0 else None
        if selection is not None:
            scatter_back(full, state, kept_rows)
            prompt_indices, row_indices = selection
            kept_rows = row_indices if kept_rows is None else kept_rows[row_indices]
            state = state.select_rows(prompt_indices, row_indices)
        W = min(C, (t + 15) // 16 * 16)  # multiples of 16: few shapes
        decode_step(model, state, W, params)
    scatter_back(full, state, kept_rows)
    return full


def active_rows(state: DecodeState) -> tuple[Tensor, Tensor] | None:
    """(prompt_indices, row_indices): the prompts with active rows, and the active rows, filled up
    so that each prompt has equally many. None if these are more than half of the rows."""
    G = state.shared_prompt.G
    active = state.active.view(-1, G)                                           # (B, G)
    prompt_indices = active.any(1).nonzero()[:, 0]
    most = int(active.sum(1).max())
    if 2 * len(prompt_indices) * most > active.numel():
        return None
    # A stable sort puts the active rows first and keeps their order.
    order = active[prompt_indices].int().argsort(dim=1, descending=True, stable=True)
    return prompt_indices, (prompt_indices[:, None] * G + order[:, :most]).flatten()


def scatter_back(full: DecodeState, state: DecodeState, kept_rows: Tensor | None) -> None:
    """Write the rows of `state` to their places in the full state."""
    if kept_rows is None:  # they are the same
        return
    for name in ("tokens", "mask", "logprobs", "entropy", "active"):
        getattr(full, name)[kept_rows] = getattr(state, name)
