"""Rollout: G completions for each of B prompts. The prompts are computed once, all completions then grow token by token.

No top-p, no top-k: the sampled distribution is the one that `model.token_logprobs` scores. A decoding step reads and writes
buffers that stay where they are, so on a GPU it is captured once as a CUDA graph and replayed: one launch a token instead of
some thousand, and no synchronisation. On a CPU the rows that have stopped are dropped once they are half of all.

Shapes: N = B*G rows, C tokens at most, V vocabulary, E hidden size.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import model as qwen
from data import first_line
from model import Processor, Prompts, Qwen, Shared


class Completions(NamedTuple):
    tokens: Tensor    # (B, G, C) padded after the stop token
    mask: Tensor      # (B, G, C) True on the completion's tokens, the stop token included
    logprobs: Tensor  # (B, G, C) of the sampled tokens, as sampled; 0 elsewhere
    entropy: Tensor   # (B, G, C) of the distributions they were drawn from, in nats; 0 elsewhere
    stopped: Tensor   # (B, G) False where the completion was cut off at C tokens


class Sampling(NamedTuple):
    """How a token is chosen, and which ones end a completion."""
    stops: tuple[int, ...]
    pad: int                    # stands after the stop token
    temperature: float | None   # None: greedy


@dataclass
class State:
    """Everything that a decoding step reads and writes, beside the keys and values in `shared`."""
    shared: Shared
    noise: Tensor     # (N, C)
    start: Tensor     # (N,) rotary position of a row's first token
    t: Tensor         # (1,) number of tokens that each row has
    token: Tensor     # (N,) the last of them
    running: Tensor   # (N,) bool
    tokens: Tensor    # (N, C), as are the next three
    mask: Tensor
    logprobs: Tensor
    entropy: Tensor

    def tensors(self) -> list[Tensor]:
        own = [getattr(self, f.name) for f in fields(self) if f.name != "shared"]
        return [*own, self.shared.mask, *(x for layer in self.shared.cache.values() for x in layer)]

    def take(self, prompts: Tensor, rows: Tensor) -> "State":
        """The state of some prompts and of some rows, the same number of each prompt."""
        own = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in ("shared", "t")}
        cache = {i: [pk[prompts], pv[prompts], k[rows], v[rows]] for i, (pk, pv, k, v) in self.shared.cache.items()}
        shared = replace(self.shared, G=len(rows) // len(prompts), mask=self.shared.mask[prompts], cache=cache)
        return replace(self, shared=shared, **own)


@torch.no_grad()
def generate(model: Qwen, processor: Processor, prompts: Prompts, C: int, noise: Tensor | None, G: int = 1,
             temperature: float = 1.0) -> Completions:
    """G completions of at most C tokens for each of B prompts: the prompts are computed (prefill) and a first token drawn;
    then the last token goes through the model and the next one is drawn (decode), until all rows have stopped.

    noise   (N, C) uniform numbers in [0, 1): token t of a row is where its number falls in the cumulated distribution
            (inverse CDF). A row's tokens thus depend on its own numbers only, not on its neighbours, the batch or the
            device's generator. None decodes greedily.
    """
    was_training = model.training
    model.eval()  # the sampled distribution has no dropout
    sampling = Sampling(stop_ids(processor), processor.tokenizer.pad_token_id, None if noise is None else temperature)
    with qwen.autocast():
        state, hidden = prefill(model, prompts, C, noise, G)
        draw(model, state, hidden, sampling)
        state = (decode_in_place if fixed_shapes() else decode_shrinking)(model, state, sampling)
    model.train(was_training)
    longest = int(state.mask.sum(1).max())
    tokens = state.tokens.masked_fill(~state.mask, sampling.pad)                         # rows that were dropped have none
    columns = (x[:, :longest].view(-1, G, longest).clone() for x in (tokens, state.mask, state.logprobs, state.entropy))
    return Completions(*columns, ~state.running.view(-1, G))


def prefill(model: Qwen, prompts: Prompts, C: int, noise: Tensor | None, G: int) -> tuple[State, Tensor]:
    """The prompts' keys and values, room for those of the completions, and the hidden states (N, E) that the first token
    is drawn from."""
    if fixed_shapes():  # so that there are few of them
        prompts = qwen.pad(prompts, -prompts.ids.shape[1] % 64)
    (B, P), N, on = prompts.ids.shape, len(prompts.ids) * G, prompts.ids.device
    shared = Shared("prefill", P, G)
    hidden = qwen.decoder(model, qwen.embed_prompts(model, prompts), prompts.positions, shared)
    hidden = hidden[torch.arange(B, device=on), prompts.lengths - 1].repeat_interleave(G, 0)
    for layer in shared.cache.values():
        K, D = layer[0].shape[1], layer[0].shape[3]
        layer[:] = [x.contiguous() for x in layer]               # or every step's matrix product would copy them
        layer += [layer[0].new_zeros(N, K, max(C, 16), D) for _ in "kv"]  # zeros: what is masked out must still be a number;
        # 16: flash-attn refuses a cache shorter than a key head has query heads
    shared.mode, shared.mask = "decode", prompts.real[:, None, None]
    zeros = torch.zeros(N, C, device=on)
    return State(shared, zeros if noise is None else noise, (qwen.last_positions(prompts) + 1).repeat_interleave(G),
                 t=torch.zeros(1, dtype=torch.long, device=on), token=torch.zeros(N, dtype=torch.long, device=on),
                 running=torch.ones(N, dtype=torch.bool, device=on), tokens=zeros.long(), mask=zeros.bool(),
                 logprobs=zeros.clone(), entropy=zeros.clone()), hidden


def draw(model: Qwen, state: State, hidden: Tensor, sampling: Sampling) -> None:
    """Append a token to every row that has not stopped, given the hidden states (N, E) before it."""
    greedy = sampling.temperature is None
    dist = qwen.next_token_logits(model, hidden, sampling.temperature or 1.0).log_softmax(-1)  # (N, V)
    token = dist.argmax(-1) if greedy else sample(dist, state.noise.index_select(1, state.t)[:, 0])
    token = torch.where(state.running, token, sampling.pad)
    entropy = torch.special.entr(dist.exp()).sum(-1).where(state.running, 0.0)
    logprob = dist.gather(1, token[:, None])[:, 0].where(state.running, 0.0)
    for column, values in ((state.tokens, token), (state.mask, state.running), (state.logprobs, logprob), (state.entropy, entropy)):
        column.index_copy_(1, state.t, values[:, None])
    state.token.copy_(token)
    for stop in sampling.stops:
        state.running &= token != stop
    state.t += 1


def decode(model: Qwen, state: State, width: int, sampling: Sampling) -> None:
    """One step: the last token goes through the model, its keys and values into the cache, and the next one is drawn.

    width   how many places of the completion are looked at, at least as many as are filled. Nothing here may synchronise with
            the host, and all that lasts is written in place.
    """
    slot = state.t - 1                                                                   # of the last token
    state.shared.slot, state.shared.filled = slot, torch.arange(width, device=slot.device) <= slot
    positions = (state.start + slot).expand(3, 1, -1).transpose(1, 2)                    # (3, N, 1)
    hidden = qwen.decoder(model, qwen.embed(model, state.token[:, None]), positions, state.shared)
    draw(model, state, hidden[:, 0], sampling)


def decode_shrinking(model: Qwen, state: State, sampling: Sampling) -> State:
    """Decode until all rows have stopped or are full. Whenever half of the rows would do, the others are dropped."""
    C, full, rows = state.tokens.shape[1], state, None
    for t in range(1, C):
        if not state.running.any():
            break
        if t % 8 == 0 and (fewer := still_running(state)):
            settle(full, state, rows)
            prompts, some = fewer
            rows, state = some if rows is None else rows[some], state.take(prompts, some)
        decode(model, state, min(C, (t + 15) // 16 * 16), sampling)                      # multiples of 16: few shapes
    settle(full, state, rows)
    return full


def still_running(state: State) -> tuple[Tensor, Tensor] | None:
    """The prompts with running rows, and as many rows of each as the most that run: if that is at most half of all."""
    running = state.running.view(-1, state.shared.G)
    prompts, most = running.any(1).nonzero()[:, 0], int(running.sum(1).max())
    if 2 * len(prompts) * most > running.numel():
        return None
    first = running[prompts].int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return prompts, (prompts[:, None] * state.shared.G + first).flatten()


def settle(full: State, state: State, rows: Tensor | None) -> None:
    """Write what the rows of `state` have become to their places in the full one."""
    if rows is not None:
        for name in ("tokens", "mask", "logprobs", "entropy", "running"):
            getattr(full, name)[rows] = getattr(state, name)


# ----------------------------------------------------------------------------------------------------------------------
# The same with fixed shapes: captured as a CUDA graph, compiled, or both

step = decode                                    # or compiled
GRAPHS: dict = {}                                # model -> {shapes: (State, what makes a step on it)}, the last three
CHECK = 16                                       # steps between two looks at whether all rows have stopped


def compile() -> None:
    """From now on torch.compile fuses the small operations of a step. Each new shape costs some 15 seconds first."""
    global step
    step = torch.compile(decode, dynamic=False)


def fixed_shapes() -> bool:
    return torch.cuda.is_available() or step is not decode


def decode_in_place(model: Qwen, state: State, sampling: Sampling) -> State:
    """As decode_shrinking, making all steps on one and the same state, into which this one is copied: a graph reads and writes the
    addresses it was captured with. So the model's weights, too, have to be updated in place."""
    C, graphs = state.tokens.shape[1], GRAPHS.setdefault(model, {})
    if C == 1:
        return state
    shapes = sampling, *(x.shape for x in state.tensors())
    graphs[shapes] = graphs.pop(shapes, None) or capture(model, state, sampling)         # the last used is the last
    while len(graphs) > 3:
        del graphs[next(iter(graphs))]
    fixed, next_step = graphs[shapes]
    for mine, new in zip(fixed.tensors(), state.tensors(), strict=True):
        mine.copy_(new)
    for t in range(1, C):
        if t % CHECK == 0 and not fixed.running.any():
            break
        next_step()
    return fixed


def capture(model: Qwen, state: State, sampling: Sampling) -> tuple[State, Callable[[], None]]:
    """A copy of the state, and what makes a step on it."""
    state = copy.deepcopy(state)
    one = partial(step, model, state, state.tokens.shape[1], sampling)
    if not torch.cuda.is_available():
        return state, one
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):                                                               # libraries set themselves up
            state.t.fill_(1)
            one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool(), capture_error_mode="thread_local"):    # others may be loading images
            one()
    except RuntimeError as error:
        print(f"a decoding step cannot be captured as a CUDA graph, and runs slower: {first_line(error)}", file=sys.stderr)
        return state, one
    state.shared.slot = state.shared.filled = None                                          # they lie in the pool
    return state, graph.replay


@cache
def pool() -> tuple[int, int]:
    """One pool of memory for all graphs: of what lies in it nothing is needed after a step."""
    return torch.cuda.graph_pool_handle()


# ----------------------------------------------------------------------------------------------------------------------
# Drawing and reading tokens

def noise(seed: tuple[int, ...], rows: Sequence[int], G: int, C: int) -> Tensor:
    """Uniform numbers for `generate`, (N, C): those of completion g of prompt b are a function of (seed, b, g)."""
    draws = [np.random.default_rng([*seed, b, g]).random(C, dtype=np.float32) for b in rows for g in range(G)]
    return torch.from_numpy(np.stack(draws)).to(qwen.device())


def sample(logprobs: Tensor, noise: Tensor) -> Tensor:
    """Inverse CDF: (N, V) log-probs and (N,) uniform numbers -> (N,) tokens. In float64: 150,000 terms add up."""
    cdf = logprobs.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, (noise.double() * cdf[:, -1])[:, None], right=True).squeeze(1)


def stop_ids(processor: Processor) -> tuple[int, ...]:
    return tuple(processor.tokenizer.convert_tokens_to_ids(list(qwen.STOPS)))


def texts(processor: Processor, completions: Completions) -> list[list[str]]:
    """B x G texts without the stop token. Other special tokens stay visible: the format reward should see them."""
    ends = set(stop_ids(processor))
    return [processor.tokenizer.batch_decode([[t for t in row[real].tolist() if t not in ends] for row, real in zip(*group)],
                                             skip_special_tokens=False) for group in zip(completions.tokens, completions.mask)]
