"""Qwen2.5-VL: token log-probs, and the forward passes that they and the rollout are made of.

The model is transformers' own; attention.py lets the G completions of a group share their prompt.
All log-probs of given tokens come from token_logprobs: for the policy, the old policy, the
reference and SFT.

Shapes: B prompts, G completions of each, P prompt tokens and C completion tokens (padded on the
right), V vocabulary, E hidden size, L tokens that go in, M tokens with a log-prob.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen
from transformers.vision_utils import get_vision_position_ids

from attention import SharedPrompt, make_completion_attention_mask
from processing import Prompts, collate, max_position_ids
from runtime.distributed import autocast, compute_dtype

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")  # Qwen2.5-VL ends a turn with either
ATTENTION = {"text_config": "shared_prompt", "vision_config": "sdpa"}


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
def add_image_embeds(model: Qwen, prompts: list[Prompts], indices: list[int]) -> None:
    """Give the prompts at these indices their image_embeds, for a vision tower that does not learn:
    every later pass reuses them."""
    chosen = [prompts[i] for i in indices]
    with autocast():
        image_embeds = compute_image_embeds(model, collate(chosen))
    lengths = [int((p.input_ids == model.config.image_token_id).sum()) for p in chosen]
    for i, embeds in zip(indices, image_embeds.split(lengths)):
        prompts[i] = prompts[i]._replace(image_embeds=embeds)


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


def vision_token_ids(model: Qwen) -> list[int]:
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
        position_ids = torch.cat([prompts.position_ids, completion_position_ids], 2)  # (3, B, L)

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
