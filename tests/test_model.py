"""model.py, attention.py, processing.py, pretrained.py and rollout.py against transformers' own model: what is computed
once for a group must equal separate, ordinary rows."""

import contextlib
import copy
import itertools
import math
import runpy
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP, Qwen2_5_VLRMSNorm
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import attention
import rollout
import train_grpo
from attention import SharedPrompt, decode_attention, flash_attn_for
from conftest import GRPO, rows
from grpo import policy_loss
from model import STOP_TOKENS, Policy, add_image_embeds, compute_image_embeds, token_logprobs
from pretrained import load_model, save_model
from processing import collate, encode_chat, max_position_ids
from rollout import Rollout, Sampler, inverse_cdf, predict, replace_groups, uniforms
from runtime.distributed import sync_sampling_model
from runtime.errors import UserError
from runtime.layers import AlignedMLP, FusedRMSNorm, use_fused_layers
from runtime.lora import reference_adapters
from runtime.optimisation import linear_warmup_decay
from test_scripts import here
from tools import sizing

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPTS = {  # name -> text, (width, height) of its images
    "one image": (f"<|im_start|>user\n{IMAGE}Find all ships.<|im_end|>\n<|im_start|>assistant\n", [(112, 112)]),
    "two images": (f"before {IMAGE} after {IMAGE} what has appeared between the two images?", [(112, 112), (56, 84)]),
    "wide": (f"{IMAGE} name the class", [(224, 140)]),  # more than one window of the vision tower
    "tall": (f"scene: {IMAGE} name the class of it", [(28, 168)]),
    "image first": ("<|image_pad|> which class?", [(84, 56)]),
    "image last": ("which class is <|image_pad|>", [(140, 56)]),
}
MIXED = ("one image", "two images", "wide", "image last")


def encode(processor, name):
    """One of PROMPTS, with random images."""
    text, sizes = PROMPTS[name]
    rng = np.random.default_rng(0)
    return encode_chat(processor, text, [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes])


def vision_ids(processor):
    return processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])


def stop_ids(processor):
    return processor.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))


def generate(model, processor, prompts, C, random_numbers=None, G=1, temperature=1.0):
    """Greedy without random numbers."""
    temperature = 0.0 if random_numbers is None else temperature
    return Sampler(model, processor).generate(prompts, C, G, temperature, random_numbers)


def random_tokens(processor, *shape):
    allowed = np.setdiff1d(np.arange(len(processor.tokenizer)), vision_ids(processor))
    return torch.from_numpy(np.random.default_rng(1).choice(allowed, shape))


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same_gradients(ours, expected, tolerance=5e-5):
    """Of every parameter, relative to its largest gradient."""
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        atol = tolerance * grad.abs().max().item()
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=atol, msg=f"the gradients of {name} differ")


@pytest.fixture(scope="module", autouse=True)
def float32_on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def sharp(tiny):
    """(model, processor): every bias and norm random too, and predictions far from uniform, so that an error shows."""
    model, generator = copy.deepcopy(tiny[0]).cpu().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn(p.shape, generator=generator)
        model.model.language_model.norm.weight *= 2
    return model, tiny[1]


@pytest.fixture(scope="module")
def folder(sharp, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    save_model(*sharp, path)
    return path


@pytest.fixture(scope="module")
def plain(folder):
    """The same weights in transformers without anything of this project."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()


def plain_inputs(prompt, tokens, processor):
    """One prompt and its (N, k) completions as N ordinary rows."""
    N, ids = len(tokens), torch.cat([prompt.input_ids.expand(len(tokens), -1), tokens], 1)
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == image).int(),
                "pixel_values": prompt.pixel_values.repeat(N, 1), "image_grid_thw": prompt.image_grid_thw.repeat(N, 1)}


def plain_dist(plain, processor, prompt, tokens, temperature=1.0):
    """(N, k, V) log-probs of the distributions that the (N, k) tokens were drawn from."""
    logits = plain(**plain_inputs(prompt, tokens, processor)).logits[:, prompt.input_ids.shape[1] - 1 : -1] / temperature
    return logits.index_fill(2, torch.tensor(vision_ids(processor)), -math.inf).log_softmax(2)


def plain_logprobs(plain, processor, prompt, tokens, temperature=1.0):
    return plain_dist(plain, processor, prompt, tokens, temperature).gather(2, tokens[:, :, None]).squeeze(2)


def likelier(model, tokens, by):
    """A hook that adds `by` to the logits of some tokens; `with` removes it."""
    more = torch.zeros(model.config.text_config.vocab_size).index_fill(0, torch.tensor(list(tokens)), by)

    def add(_, inputs, logits):
        return logits + more
    return model.lm_head.register_forward_hook(add)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts

@pytest.mark.parametrize("name", PROMPTS)
def test_positions_equal_get_rope_index(sharp, plain, name):
    """Without mm_token_type_ids transformers falls back to one-dimensional positions, silently."""
    prompt = encode(sharp[1], name)
    inputs = plain_inputs(prompt, prompt.input_ids[:, :0], sharp[1])
    expected, delta = plain.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"])
    assert torch.equal(prompt.position_ids, expected)
    assert max_position_ids(prompt).item() + 1 == prompt.input_ids.shape[1] + delta.item()  # where the completion continues


def test_every_image_token_has_its_pixels(sharp):
    prompt = encode(sharp[1], "two images")
    image = sharp[1].tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (prompt.input_ids == image).sum() == 4 * 4 + 2 * 3
    assert prompt.image_grid_thw.tolist() == [[1, 8, 8], [1, 6, 4]] and len(prompt.pixel_values) == 8 * 8 + 6 * 4


def test_blank_image_changes_the_logprobs(sharp):
    """A peer's reference saw no image at all, and nothing complained."""
    model, processor = sharp
    prompt, tokens = encode(processor, "one image"), random_tokens(processor, 1, 2, 6)
    blank = prompt._replace(pixel_values=torch.zeros_like(prompt.pixel_values))
    seen, unseen = (token_logprobs(model, p, tokens, torch.ones_like(tokens, dtype=torch.bool)) for p in (prompt, blank))
    assert (seen - unseen).abs().max() > 0.1


@pytest.mark.parametrize("size, calls", [((224, 224), 1), ((224, 168), 4)])
def test_windows_of_one_size_are_one_call_of_attention(sharp, plain, monkeypatch, size, calls):
    """They were 64 for an image of 448 px, with a host read in each block; only unequal ones (at 168 px half ones) need it."""
    model, processor = sharp
    prompt = encode_chat(processor, IMAGE, [Image.effect_noise(size, 99).convert("RGB")])
    attention_calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: attention_calls.append(1) or sdpa(*args, **more))
    with torch.no_grad():
        ours = compute_image_embeds(model, prompt)
        full = model.config.vision_config.fullatt_block_indexes
        assert len(attention_calls) == len(full) + calls * (model.config.vision_config.depth - len(full))
        expected = plain.model.get_image_features(prompt.pixel_values, prompt.image_grid_thw).pooler_output
    torch.testing.assert_close(ours, torch.cat(expected), rtol=0, atol=2e-5)


def test_a_bf16_norm_is_one_operation_and_stays_bf16():
    """Under autocast transformers' norm with float32 weights is eight, and its float32 output was cast again by each product."""
    plain_norm = Qwen2_5_VLRMSNorm(64)
    torch.nn.init.normal_(plain_norm.weight)
    norm = copy.deepcopy(plain_norm)
    norm.__class__ = FusedRMSNorm
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = norm(x), plain_norm(x)
    assert out.dtype == torch.bfloat16 and expected.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=2**-6, atol=1e-6)


def test_an_mlp_with_padded_hidden_units_is_the_same():
    """The real vision tower has 3,420 of them, so that a row of a bf16 weight is no multiple of 16 bytes."""
    plain_mlp = Qwen2_5_VLMLP(SimpleNamespace(hidden_size=12, intermediate_size=20, hidden_act="silu"), bias=True)
    mlp = copy.deepcopy(plain_mlp)
    mlp.__class__ = AlignedMLP
    x = torch.randn(5, 12)
    torch.testing.assert_close(mlp(x), plain_mlp(x))
    mlp(x).square().sum().backward()
    plain_mlp(x).square().sum().backward()
    assert_same_gradients(gradients(mlp), gradients(plain_mlp))
    with torch.device("meta"):
        model = use_fused_layers(Qwen2_5_VLForConditionalGeneration(sizing.shape("3b")))
    assert {type(block.mlp) for block in model.model.visual.blocks} == {AlignedMLP}


def test_adapters_of_a_padded_mlp_take_part():
    """It read the weights below them, so adapters of the 3B model's tower were in model/ and in no log-prob."""
    peft = pytest.importorskip("peft")
    mlp = Qwen2_5_VLMLP(SimpleNamespace(hidden_size=12, intermediate_size=20, hidden_act="silu"), bias=True)
    config = peft.LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(mlp), config).base_model.model
    x = torch.randn(5, 12)
    expected = adapted(x)
    adapted.__class__ = AlignedMLP
    assert (expected - mlp(x)).abs().max() > 1e-3
    torch.testing.assert_close(adapted(x), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Log-probs of a group

@pytest.mark.parametrize("names", [("one image",), ("two images",), ("image last",), MIXED], ids="+".join)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_row_equals_separate_rows(sharp, plain, names, temperature):
    """One packed row [prompt | c1 | .. | cG], or G rows of transformers: the same log-probs and gradients, vision tower included."""
    (model, processor), G, C = sharp, 3, 7
    prompts = [encode(processor, name) for name in names]
    tokens = random_tokens(processor, len(names), G, C)
    lengths = torch.randint(1, C + 1, (len(names), G))
    lengths[0] = torch.tensor([C, 0, 2])  # 0: a completion without any token in the mask
    mask = torch.arange(C) < lengths[:, :, None]
    weights = torch.randn(mask.shape)

    ours = token_logprobs(model, collate(prompts), tokens, mask, temperature)
    rows = torch.zeros_like(ours)
    for b, g in (lengths > 0).nonzero().tolist():
        k = lengths[b, g]
        rows[b, g, :k] = plain_logprobs(plain, processor, prompts[b], tokens[b, g, None, :k], temperature)
    assert rows[mask].std() > 0.3  # far from uniform: a wrong position or mask would show
    torch.testing.assert_close(ours, rows, rtol=0, atol=1e-5 / temperature)

    (ours * weights).sum().backward()
    (rows * weights).sum().backward()
    ours = gradients(model)
    assert ours.keys() == dict(model.named_parameters()).keys()
    assert_same_gradients(ours, gradients(plain))


def test_chunk_changes_neither_logprobs_nor_gradients(sharp):
    model, processor = sharp
    prompt, tokens = encode(processor, "one image"), random_tokens(processor, 1, 3, 7)
    results = []
    for chunk in (1024, 1, 4):
        logprobs = token_logprobs(model, prompt, tokens, torch.ones_like(tokens, dtype=torch.bool), chunk=chunk)
        logprobs.square().sum().backward()
        results.append((logprobs.detach(), gradients(model)))
        torch.testing.assert_close(results[-1][0], results[0][0], rtol=1e-5, atol=1e-5)
        assert_same_gradients(results[-1][1], results[0][1])


def test_no_logits_of_all_tokens_exist(sharp):
    """G x C x 151,936 float32 logits fill a GPU: none are kept for the backward pass, they are made a chunk at a time."""
    (model, processor), chunk, saved, rows = sharp, 5, [], []
    V = model.get_input_embeddings().num_embeddings
    prompt, tokens = encode(processor, "one image"), random_tokens(processor, 1, 3, 7)
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        saved.extend([tuple(tensor.shape)] if tensor.data_ptr() not in weights else [])
        return tensor
    hook = model.lm_head.register_forward_hook(lambda _, inputs, logits: rows.append(logits.shape[0]))
    with hook, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(model, prompt, tokens, torch.ones_like(tokens, dtype=torch.bool), chunk=chunk).sum().backward()
        assert saved and not any(V in shape for shape in saved)
        assert max(rows) == chunk and sum(rows) == 2 * tokens.numel()  # once forward, once more backward
        model.lm_head(torch.ones(21, 128)).log_softmax(1)
        assert any(V in shape for shape in saved)  # the check does see logits that are kept
    model.zero_grad()


# ----------------------------------------------------------------------------------------------------------------------
# Rollout

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_prefill_and_decode_equal_the_whole_forward(sharp, plain, temperature):
    """The distributions that were sampled are those of one plain forward over prompt and completion, token by token."""
    (model, processor), G, C = sharp, 3, 10
    prompts = [encode(processor, name) for name in MIXED]
    result = generate(model, processor, collate(prompts), C, torch.rand(len(prompts) * G, C), G, temperature)
    for b, prompt in enumerate(prompts):
        for g in range(G):
            k = int(result.mask[b, g].sum())
            tokens = result.tokens[b, g, None, :k]
            with torch.no_grad():
                dist = plain_dist(plain, processor, prompt, tokens, temperature)[0]
            torch.testing.assert_close(result.logprobs[b, g, :k], dist.gather(1, tokens[0, :, None])[:, 0], rtol=0, atol=2e-5)
            torch.testing.assert_close(result.entropy[b, g, :k], torch.special.entr(dist.exp()).sum(1), rtol=0, atol=2e-5)


def test_greedy_equals_transformers_generate(sharp, plain):
    (model, processor), C = sharp, 20
    prompts = [encode(processor, name) for name in PROMPTS if name != "image last"]  # generate takes what follows for image
    ours = generate(model, processor, collate(prompts), C, None)
    for b, prompt in enumerate(prompts):
        out = plain.generate(**plain_inputs(prompt, prompt.input_ids[:, :0], processor), do_sample=False, max_new_tokens=C,
                             suppress_tokens=vision_ids(processor), eos_token_id=list(stop_ids(processor)), pad_token_id=0)
        assert ours.tokens[b, 0][ours.mask[b, 0]].tolist() == out[0, prompt.input_ids.shape[1]:].tolist()
    assert len({tuple(row) for row in ours.tokens[:, 0].tolist()}) == len(prompts)  # not one answer to all of them


def assert_frequencies(tokens, probabilities):
    """Chi-square of drawn tokens against a distribution; tokens expected less than ten times share one bin."""
    counts, expected = np.bincount(tokens, minlength=len(probabilities)), len(tokens) * probabilities
    rare = expected < 10
    assert not counts[probabilities == 0].any()
    def merge(x):
        return np.append(x[~rare], x[rare].sum())
    assert (~rare).sum() > 10
    assert chisquare(merge(counts), merge(expected)).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sample_follows_the_softmax(temperature):
    logits = torch.randn(200) * 2
    logits[[0, 7, 199]] = -math.inf
    dist = (logits / temperature).log_softmax(0)
    tokens = inverse_cdf(dist.exp().expand(20_000, -1), uniforms((0,), range(20_000), 1, 1)[:, 0].cpu())
    assert_frequencies(tokens.numpy(), dist.double().softmax(0).numpy())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_follows_the_softmax(sharp, plain, temperature):
    """Hub configs of Qwen2.5-VL (temperature 1e-6, top_k 1) make `sampling` greedy; and a sampled image token has no image."""
    model, processor = sharp
    prompt = encode(processor, "one image")
    tokens = np.concatenate([generate(model, processor, prompt, 1, uniforms((seed,), [0], 2000, 1), 2000, temperature)
                             .tokens.flatten().numpy() for seed in range(10)])
    with torch.no_grad():
        dist = plain_dist(plain, processor, prompt, prompt.input_ids[:, :1], temperature)[0, 0]
    probabilities = dist.double().softmax(0).numpy()
    assert not probabilities[vision_ids(processor)].any()
    assert_frequencies(tokens, probabilities)


def test_nan_logits_give_a_token_of_the_vocabulary():
    """searchsorted gives V for NaN. The gather that follows would end the process on a GPU, before the guard skips the step."""
    probs = torch.randn(3, 50).softmax(1)
    probs[0], probs[1] = math.nan, 0
    tokens = inverse_cdf(probs, torch.rand(3))
    assert ((tokens >= 0) & (tokens < 50)).all()


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("logits", [math.nan, math.inf, -math.inf])
def test_a_rollout_of_a_model_gone_nan_ends(sharp, greedy, logits):
    model, processor = sharp
    with likelier(model, range(model.config.text_config.vocab_size), logits):
        result = generate(model, processor, encode(processor, "one image"), 4, None if greedy else torch.rand(2, 4), 2)
    assert result.logprobs[result.mask].isnan().all() and (result.tokens < model.config.text_config.vocab_size).all()


def test_steps_of_a_model_gone_nan_are_skipped_and_counted(sft, dataset, tmp_path, monkeypatch):
    """The rollout has to survive, so that the guard sees the loss. All completions are the same: the rewards are made to differ."""
    model, processor = load_model(str(sft / "model"))
    model.model.language_model.norm.weight.data[:] = math.nan
    save_model(model, processor, tmp_path / "nan")
    numbers = itertools.count()
    monkeypatch.setattr(train_grpo, "score_completion", lambda *args, **more: {"format": 0.0, "accuracy": next(numbers) % 2})
    here(monkeypatch, train_grpo.main, "--task", "cls", "--model", tmp_path / "nan", "--data", dataset, *GRPO,
         "--heldout", 0, "--out", tmp_path / "run")
    assert [(row["skipped"], row["loss"], row["entropy"]) for row in rows(tmp_path / "run/metrics.jsonl")] == [
        (1, None, None), (2, None, None)]


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-24])
def test_impossible_tokens_are_never_sampled(number):
    """The smallest and the largest uniform number must not fall on a banned token at either end of the vocabulary, nor
    beyond it where the probabilities add up to a little less than 1."""
    probs = torch.zeros(1, 150_000)
    probs[0, 10:-10] = (1 - 1e-5) / (probs.shape[1] - 20)
    assert 10 <= inverse_cdf(probs, torch.tensor([number])).item() < 149_990


@pytest.mark.parametrize("V", [50, 512, 1300])
def test_sampling_by_blocks_equals_one_cumulative_sum(V):
    """Blocks without any probability included."""
    probs = (torch.randn(2000, V) * 3).softmax(1)
    probs[:, 100:900] = 0
    numbers = torch.rand(2000)
    cdf = probs.double().numpy().cumsum(1)
    expected = [np.searchsorted(row, u * row[-1], side="right") for row, u in zip(cdf, numbers.double().numpy())]
    assert inverse_cdf(probs, numbers).tolist() == expected


def test_vision_tokens_are_banned_where_the_model_wants_them(sharp):
    model, processor = sharp
    prompt = encode(processor, "one image")
    with likelier(model, vision_ids(processor), 100.0):
        result = generate(model, processor, prompt, 6, torch.rand(4, 6), 4)
        assert not torch.isin(result.tokens, torch.tensor(vision_ids(processor))).any()
        logprobs = token_logprobs(model, prompt, result.tokens, result.mask)
    torch.testing.assert_close(logprobs, result.logprobs, rtol=0, atol=1e-4)


def test_completions_depend_on_their_own_uniforms_only(sharp):
    """Same seed, same completions: alone or beside other prompts, whatever the size of the group."""
    (model, processor), G, C = sharp, 4, 8
    prompts = [encode(processor, name) for name in MIXED]
    together = generate(model, processor, collate(prompts), C, uniforms((3, 1), range(4), G, C), G)
    for b, prompt in enumerate(prompts):
        assert len(together.tokens[b].unique(dim=0)) == G  # the rows of a group differ
        alone = generate(model, processor, prompt, C, uniforms((3, 1), [b], 2, C), 2)
        k = alone.tokens.shape[2]
        assert torch.equal(alone.tokens[0], together.tokens[b, :2, :k])
    other = generate(model, processor, collate(prompts), C, uniforms((4, 1), range(4), G, C), G)
    assert not torch.equal(other.tokens, together.tokens)


def test_no_two_completions_share_their_uniforms():
    """Nor does the second completion of a prompt have those of the first of the next prompt."""
    rows = torch.cat([uniforms(seed, range(4), 4, 8) for seed in ((3, 1), (3, 2), (4, 1))])
    assert len(rows.unique(dim=0)) == 3 * 4 * 4 and 0.4 < rows.mean() < 0.6


def test_a_sampled_text_depends_on_the_prompts_id_and_not_on_its_batch(sharp):
    prompts = [encode(sharp[1], name) for name in MIXED]
    together = predict(Sampler(*sharp), prompts, 8, 2, 1.0, [7, 5, 6, 4])
    assert [predict(Sampler(*sharp), [p], 8, 2, 1.0, [i])[0] for p, i in zip(prompts, (7, 5, 6, 4))] == together


def test_replaced_groups_stand_where_the_old_ones_stood():
    old, new = (Rollout(*(start + torch.arange(B * 4 * C).view(B, 4, C) for _ in range(4)), start + torch.arange(B * 4).view(B, 4))
                for B, C, start in ((4, 5, 0), (3, 2, 1000)))
    found = replace_groups(old, [1, 3, 0], new)
    assert torch.equal(found.tokens[[1, 3, 0], :, :2], new.tokens) and torch.equal(found.tokens[2], old.tokens[2])
    assert not found.mask[[1, 3, 0], :, 2:].any()
    assert torch.equal(found.stopped[[1, 3, 0, 2]], torch.cat([new.stopped, old.stopped[2:3]]))


def test_image_embeds_go_to_the_prompt_whose_images_they_are(sharp):
    """Of prompts with one and with two images, of unlike sizes."""
    prompts = [encode(sharp[1], name) for name in MIXED]
    with torch.no_grad():
        alone = [compute_image_embeds(sharp[0], prompt) for prompt in prompts]
        add_image_embeds(sharp[0], prompts, [1, 3, 2])
    assert prompts[0].image_embeds is None
    for prompt, embeds in list(zip(prompts, alone))[1:]:
        torch.testing.assert_close(prompt.image_embeds, embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_equal_those_of_the_loss(sharp, temperature):
    """A peer samples at temperature 0.9 and computes log-probs at 1: its ratio is never 1."""
    (model, processor), G, C = sharp, 4, 12
    prompts = collate([encode(processor, name) for name in MIXED])
    with likelier(model, stop_ids(processor), 3.0):
        result = generate(model, processor, prompts, C, torch.rand(len(MIXED) * G, C), G, temperature)
        logprobs = token_logprobs(model, prompts, result.tokens, result.mask, temperature)
    assert not result.mask.all()
    torch.testing.assert_close(logprobs, result.logprobs, rtol=0, atol=1e-4)


@pytest.fixture
def stopping(sharp):
    """(model, processor, random numbers): four prompts, G 8, rows of very different lengths; one whole group stops early."""
    with likelier(sharp[0], stop_ids(sharp[1]), 4.5):
        yield *sharp, torch.rand(len(MIXED) * 8, 40)


def assert_same_completions(one, other):
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask) and torch.equal(one.stopped, other.stopped)
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.entropy, other.entropy, rtol=0, atol=1e-5)


def test_dropping_stopped_rows_changes_no_completion(stopping, monkeypatch):
    model, processor, random_numbers = stopping
    prompts, rows = collate([encode(processor, name) for name in MIXED]), []
    sample_next_token = rollout.sample_next_token

    def count_rows(model, state, *more):
        rows.append(len(state.last_token))
        sample_next_token(model, state, *more)
    monkeypatch.setattr(rollout, "sample_next_token", count_rows)
    result = generate(model, processor, prompts, 40, random_numbers, 8)
    assert rows[0] == 32 and len(set(rows)) > 2 and rows == sorted(rows, reverse=True)  # they were dropped, more than once
    monkeypatch.setattr(rollout, "active_rows", lambda state: None)
    assert_same_completions(result, generate(model, processor, prompts, 40, random_numbers, 8))


@pytest.mark.parametrize("temperature, random_numbers", [(1.5, None), (0.0, torch.rand(1, 2))], ids=["greedy", "sampled"])
def test_temperature_and_random_numbers_go_together(sharp, temperature, random_numbers):
    """A temperature without random numbers gave greedy completions."""
    with pytest.raises(ValueError, match="random_numbers"):
        Sampler(*sharp).generate(encode(sharp[1], "one image"), 2, 1, temperature, random_numbers)


class NoHost(TorchDispatchMode):
    """Fails where an operation would make a GPU wait for the host, or the host for the GPU: a captured graph allows neither."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_loss_of_a_micro_batch_makes_nobody_wait(loss):
    """Sums over x[mask] looked up on the host how many tokens they have, before each backward pass."""
    logprobs, old_logprobs, ref_logprobs, weights = torch.rand(4, 2, 3, 5)
    mask = torch.rand(2, 3, 5) > .5
    with NoHost():
        policy_loss(logprobs, old_logprobs, ref_logprobs, torch.ones(2, 3, 1), mask, weights, loss=loss, clip_low=.2,
                    clip_high=.2, beta=.1)


def test_layers_get_back_the_very_lists_of_adapters_that_they_had():
    """torch.compile guards on lists that layers share: new ones compiled each decode step again after the first reference pass."""
    shared = ["default"]
    layers = [SimpleNamespace(lora_A={}, _active_adapter=shared) for _ in range(2)]
    with reference_adapters(SimpleNamespace(modules=lambda: layers)):
        assert all(layer._active_adapter == ["reference"] for layer in layers)
    assert all(layer._active_adapter is shared for layer in layers)


class StaticSampler(Sampler):
    """A Sampler as on a GPU, with a stand-in for CUDA graphs: the same decode step on the same tensors, wherever they are, and
    nothing else."""
    def __init__(self, *args):
        super().__init__(*args)
        self.fixed_shapes, self.captures = True, 0

    def make_static_decode_step(self, state, params):
        state, run_decode_step = super().make_static_decode_step(state, params)
        places = [x.data_ptr() for x in state.all_tensors()]
        self.captures += 1

        def replay():
            with NoHost():
                run_decode_step()
            assert [x.data_ptr() for x in state.all_tensors()] == places
        return state, replay


@pytest.mark.parametrize("greedy", [False, True])
def test_captured_decode_step_gives_the_same_completions(stopping, greedy):
    """And gives them again when the same graph is replayed for other prompts of that size."""
    model, processor, random_numbers = stopping
    random_numbers = None if greedy else random_numbers
    batches = [collate([encode(processor, name) for name in names]) for names in (MIXED, MIXED[::-1])]
    sampler = StaticSampler(model, processor)
    for batch in batches:
        expected = generate(model, processor, batch, 40, random_numbers, 8)
        assert_same_completions(sampler.generate(batch, 40, 8, 0.0 if greedy else 1.0, random_numbers), expected)
    assert sampler.captures == 1


def test_only_the_last_used_graphs_are_kept(stopping):
    model, processor, _ = stopping
    sampler, prompt = StaticSampler(model, processor), encode(processor, "one image")
    for G in (1, 2, 3, 1, 4, 1):  # 4 drops 2, the first that was not used again
        sampler.generate(prompt, 3, G)
    assert sampler.captures == 4 and len(sampler.static_decode_steps) == rollout.MAX_STATIC_DECODE_STEPS
    assert [state.shared_prompt.G for state, _ in sampler.static_decode_steps.values()] == [3, 4, 1]


def test_two_samplers_share_no_state(sharp, monkeypatch):
    """The captured graphs and the compiled decode step belong to a Sampler: no module and no class holds any of it."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: partial(function))
    model, processor = sharp
    one, other, compiled = StaticSampler(model, processor), StaticSampler(model, processor), Sampler(model, processor, True)
    one.stop_ids = (-1,)
    one.graph_pool = "a pool"
    one.generate(encode(processor, "one image"), 3)
    assert one.static_decode_steps and not other.static_decode_steps and not compiled.static_decode_steps
    assert other.graph_pool is None and set(other.stop_ids) == set(stop_ids(processor))
    assert one.decode_step is other.decode_step is rollout.decode_step is not compiled.decode_step
    assert not other.use_cuda_graphs and not Sampler(model, processor).fixed_shapes and compiled.fixed_shapes
    changeable = (dict, list, set)
    assert not [name for scope in (vars(rollout), vars(Sampler)) for name, value in scope.items()
                if isinstance(value, changeable) and not name.startswith("__")]


class Cuda:
    """A stand-in for what a capture asks of torch.cuda. The first `failures` captures fail at their end; as in torch the
    capture's stream then stays current."""
    def __init__(self, failures):
        self.failures, self.current, self.pools, self.captured_in = failures, "main stream", 0, []

    def graph_pool_handle(self):
        self.pools += 1
        return self.pools

    def current_stream(self):
        return SimpleNamespace(name=self.current, wait_stream=lambda other: None)

    def set_stream(self, stream):
        self.current = stream.name

    @contextlib.contextmanager
    def graph(self, graph, pool, capture_error_mode):
        self.current, self.captured_in = "capture stream", [*self.captured_in, pool]
        yield
        if len(self.captured_in) <= self.failures:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.current = "main stream"

    def patch(self, monkeypatch):
        for name in ("graph_pool_handle", "current_stream", "set_stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))


def test_decoding_continues_after_a_failed_capture(stopping, monkeypatch, capsys):
    """torch.cuda.graph leaves its stream current when the end of a capture fails; and a pool whose graphs are all gone trips
    an assertion in the next capture. So the stream is restored, and the next capture gets a new pool."""
    model, processor, random_numbers = stopping
    prompts = collate([encode(processor, name) for name in MIXED])
    expected = generate(model, processor, prompts, 40, random_numbers, 8)
    sampler, cuda = Sampler(model, processor), Cuda(failures=1)
    sampler.use_cuda_graphs = sampler.fixed_shapes = True
    cuda.patch(monkeypatch)
    for _ in range(2):  # the decode step itself takes the graph's place, and is kept like one
        assert_same_completions(sampler.generate(prompts, 40, 8, 1.0, random_numbers), expected)
    assert cuda.current == "main stream" and cuda.captured_in == [1] and sampler.graph_pool == 2
    error = capsys.readouterr().err
    assert "runs slower: RuntimeError: operation not permitted" in error and error.count("\n") == 1
    for G in (1, 2):  # later captures succeed and share the new pool
        sampler.generate(prompts, 4, G)
    assert cuda.captured_in == [1, 2, 2] and sampler.graph_pool == 2 and not capsys.readouterr().err


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, softmax_scale=None, causal=False,
                            return_softmax_lse=False):
    """flash-attn's function of this name, as its documentation has it, for what is used of it here."""
    if k is not None:
        for row, place in enumerate(cache_seqlens.tolist()):
            k_cache[row, place], v_cache[row, place] = k[row, 0], v[row, 0]
        cache_seqlens = cache_seqlens + 1
    r = q.shape[2] // k_cache.shape[2]
    scores = torch.einsum("blhd,bshd->bhls", q, k_cache.repeat_interleave(r, 2)) * softmax_scale
    scores = scores.masked_fill(torch.arange(k_cache.shape[1]) >= cache_seqlens[:, None, None, None], -math.inf)
    out = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v_cache.repeat_interleave(r, 2))
    return out, scores.logsumexp(-1)


def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    """Likewise; causal is aligned at the last key."""
    L, S, r = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    scores = torch.einsum("blhd,bshd->bhls", q, k.repeat_interleave(r, 2)) * softmax_scale
    scores = scores.masked_fill(~torch.ones(L, S, dtype=torch.bool).tril(S - L), -math.inf)
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v.repeat_interleave(r, 2))


FLASH = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)


@pytest.mark.parametrize("version, found", [(2, True), (4, False)])
def test_only_flash_attn_2_has_the_functions(version, found, tmp_path, monkeypatch):
    """flash-attn-4 puts other ones into a folder of the same name, so `import flash_attn` succeeded and the first prompt failed."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / {2: "flash_attn_interface.py", 4: "cute.py"}[version]).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(AttentionInterface, "register", lambda *_: None)
    assert (runpy.run_path(attention.__file__)["flash_attn"] is not None) == found
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        sys.modules.pop(name, None)


def test_flash_attention_gives_the_same_logprobs(sharp, monkeypatch):
    """Of a prompt without padding; another takes a mask, which flash-attn has not."""
    model, prompt, tokens = sharp[0], encode(sharp[1], "two images"), torch.randint(20, 400, (1, 3, 9))
    plain = token_logprobs(model, prompt, tokens, tokens > 0)
    monkeypatch.setattr(attention, "flash_attn_for", lambda q: FLASH)
    torch.testing.assert_close(token_logprobs(model, prompt, tokens, tokens > 0), plain, rtol=0, atol=1e-5)


def test_a_compiled_decode_step_does_without_flash_attention(monkeypatch):
    """torch.compile breaks its graph at each of flash-attn's calls, and gives up after the eighth layer."""
    monkeypatch.setattr(attention, "flash_attn", FLASH)
    q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert flash_attn_for(q) is FLASH
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert flash_attn_for(q) is None


def test_flash_decoding_gives_the_same_completions(stopping, monkeypatch):
    """Two calls of the kernel, over the prompt and over the completion, are put together by their log-sum-exps."""
    model, processor, random_numbers = stopping
    prompts = collate([encode(processor, name) for name in MIXED])
    plain = generate(model, processor, prompts, 40, random_numbers, 8)
    monkeypatch.setattr(attention, "flash_attn_for", lambda q: FLASH)
    assert_same_completions(generate(model, processor, prompts, 40, random_numbers, 8), plain)


class OnGPU(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_key_biases_as_large_as_those_of_qwen_do_not_blur_decoding(monkeypatch, device):
    """Scores rounded to bf16 were off by up to 8: in transformers' eager attention (its pull request 33317) they cost Qwen2 a
    tenth of its perplexity. Random weights have no such biases, so no bench and no other test saw it."""
    torch.manual_seed(0)
    B, G, K, r, P, t, D = 2, 4, 2, 3, 20, 8, 64
    bias = torch.zeros(K, 1, D)
    bias[:, :, ::9] = 200.0
    q = torch.randn(B * G, K * r, 1, D).bfloat16() + 4 * bias.bool().repeat_interleave(r, 0)
    prompt_k, k_of_rows = (torch.randn(n, K, s, D) + bias for n, s in ((B, P), (B * G, t)))
    prompt_v, v_of_rows = torch.randn(B, K, P, D), torch.randn(B * G, K, t, D)
    prompt_k, k_of_rows, prompt_v, v_of_rows = (x.bfloat16() for x in (prompt_k, k_of_rows, prompt_v, v_of_rows))
    k, v = (torch.cat([shared.repeat_interleave(G, 0), of_rows], 2).double().repeat_interleave(r, 1)
            for shared, of_rows in ((prompt_k, k_of_rows), (prompt_v, v_of_rows)))
    expected = F.scaled_dot_product_attention(q.double(), k, v).transpose(1, 2)
    shared = SharedPrompt("decode", P, G, slot=torch.tensor([t - 1]),
                          no_token=torch.zeros(B * G, 1, 1, P + t, dtype=torch.bool))
    if device == "gpu":  # whose bmm returns float32 of bf16
        monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: (a.double() @ b.double()).to(out_dtype))
        q = q.as_subclass(OnGPU)
    with torch.autocast("cpu", torch.bfloat16):
        out = decode_attention(q, k_of_rows[:, :, -1:], v_of_rows[:, :, -1:], D**-0.5, shared,
                               [prompt_k, prompt_v, k_of_rows, v_of_rows])
    assert (q.double() @ k.transpose(2, 3) * D**-0.5).max() > 500
    assert (out - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|endoftext|>"])
def test_every_stop_token_stops_and_counts(sharp, stop):
    """Qwen ends a turn with either. Masked out of the loss, the stop would get no gradient and length not be learned."""
    (model, processor), G, C = sharp, 64, 8
    stop = processor.tokenizer.convert_tokens_to_ids(stop)
    with likelier(model, [stop], 4.0):
        result = generate(model, processor, encode(processor, "one image"), C, torch.rand(G, C), G)
    assert 0 < result.stopped.sum() < G
    for row, mask, logprobs, stopped in zip(result.tokens[0], result.mask[0], result.logprobs[0], result.stopped[0]):
        places = torch.isin(row, torch.tensor(stop_ids(processor))).nonzero().flatten().tolist()
        length = places[0] + 1 if stopped else C
        assert bool(places) == bool(stopped)
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)  # the first stop, nothing after it
        assert (logprobs[:length] < 0).all() and not logprobs[length:].any()


@pytest.mark.parametrize("by, stopped", [(100.0, True), (-100.0, False)])
def test_a_stop_at_the_last_place_is_not_cut_off(sharp, by, stopped):
    model, processor = sharp
    with likelier(model, stop_ids(processor), by):
        result = generate(model, processor, encode(processor, "one image"), 1, torch.rand(3, 1), 3)
    assert result.stopped.tolist() == [[stopped] * 3] and result.mask.all()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_rollout_is_right_in_training_with_gradient_checkpointing(sharp):
    """model.train() with checkpointing corrupts transformers' generate from the second token on."""
    (model, processor), C = sharp, 8
    training, random_numbers = copy.deepcopy(model), torch.rand(2, C)
    training.gradient_checkpointing_enable()
    training.train()
    prompt, modes = encode(processor, "one image"), set()
    training.lm_head.register_forward_hook(lambda *_: modes.add(training.training))
    expected, result = (generate(m, processor, prompt, C, random_numbers, 2) for m in (model, training))
    assert torch.equal(result.tokens, expected.tokens)
    torch.testing.assert_close(result.logprobs, expected.logprobs)
    assert modes == {False} and training.training and not model.training


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradient_checkpointing_changes_no_gradient(sharp):
    model, processor = sharp
    training = copy.deepcopy(model).train()
    training.gradient_checkpointing_enable()
    prompt, tokens = encode(processor, "two images"), random_tokens(processor, 1, 2, 5)
    for m in (model, training):
        token_logprobs(m, prompt, tokens, torch.ones_like(tokens, dtype=torch.bool)).sum().backward()
    assert_same_gradients(gradients(training), gradients(model))


# ----------------------------------------------------------------------------------------------------------------------
# Text

def test_texts_lose_the_stop_token_only(sharp):
    """The format reward must see every other special token; padding follows the stop."""
    to_ids = sharp[1].tokenizer.encode
    texts = ["<think>a ship</think>\n<answer>[1,2,30,4]</answer>", "<|im_start|> twice <think>", ""]
    rows = [to_ids(texts[0] + "<|im_end|>"), to_ids(texts[1]), to_ids(texts[2] + "<|endoftext|>")]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [to_ids("x")[0]] * (width - len(row)) for row in rows])[None]
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    nothing = torch.zeros(tokens.shape)
    assert Sampler(*sharp).decode_texts(Rollout(tokens, mask[None], nothing, nothing, nothing)) == [texts]


@pytest.mark.parametrize("text", [
    "<think>Two ships.</think>\n<answer>[12,345,6789,0],[1,2,3,4]</answer>", "ÄÖß naïve — “quotes” …", "船が二隻、右下に。",
    "🛰️🌍👩‍🚀 e\u0301", "line\n\n  two\ttabs\r\n ", " leading , spaces . don 't", "0" * 50, "\u0000\u200b\ufeff\U0010ffff", "",
    "".join(chr(c) for c in np.random.default_rng(0).integers(1, 0xd7ff, 500))], ids=range(10))
def test_tokenizer_gives_every_text_back(sharp, text):
    tokenizer = sharp[1].tokenizer
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_tags_and_stops_are_single_tokens(sharp):
    for token in ("<think>", "</think>", "<answer>", "</answer>", "<|im_end|>", "<|endoftext|>"):
        assert len(sharp[1].tokenizer.encode(token)) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Load and save

def test_saved_model_gives_the_same_logprobs_here_and_in_transformers(sharp, plain, folder):
    (model, processor), (loaded, loaded_processor) = sharp, load_model(str(folder))
    assert list(folder.parent.iterdir()) == [folder]  # no partial folder is left
    prompt, tokens = encode(loaded_processor, "two images"), random_tokens(processor, 1, 2, 5)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        ours = token_logprobs(loaded, prompt, tokens, mask)
        assert torch.equal(ours, token_logprobs(model, encode(processor, "two images"), tokens, mask))
        torch.testing.assert_close(ours[0], plain_logprobs(plain, processor, prompt, tokens[0]), rtol=0, atol=2e-5)


def test_saved_tokenizer_and_image_processor_work_in_transformers(sharp, folder):
    """The saved image processor must not resize an image again: that would shift it against its boxes. (AutoImageProcessor reads
    the same file, but in older transformers it needs torchvision.)"""
    tokenizer, images = AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
    text = PROMPTS["one image"][0] + "<think>7 ships</think>"
    assert tokenizer.encode(text) == sharp[1].tokenizer.encode(text)
    image = Image.effect_noise((112, 112), 80).convert("RGB")
    out, ours = images(images=[image], return_tensors="pt"), encode_chat(sharp[1], IMAGE, [image])
    assert out["image_grid_thw"].tolist() == ours.image_grid_thw.tolist() == [[1, 8, 8]]
    torch.testing.assert_close(out["pixel_values"], ours.pixel_values, rtol=0, atol=1e-5)


def test_an_interrupted_save_leaves_nothing_in_the_next_one(sharp, folder, tmp_path):
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "adapter_config.json").write_text("{}")
    save_model(*sharp, tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {path.name for path in folder.iterdir()}


def test_image_size_survives_save_and_load(sharp, tmp_path):
    name = str(tmp_path / "m")
    save_model(*sharp, tmp_path / "m")
    assert load_model(name)[1].image_size == sharp[1].image_size == 112
    save_model(*load_model(name, 140), tmp_path / "m")
    assert load_model(name)[1].image_size == 140


@pytest.mark.parametrize("least, most", [(3136, 12845056), (500**2, 500**2), (112 * 140, 112 * 140)])
def test_a_checkpoint_of_others_is_read_at_448(sharp, tmp_path, least, most):
    """Qwen's own files give a range of sizes. One number that is no square of whole vision tokens was taken for
    an --image-size that nobody had given."""
    save_model(*sharp, tmp_path / "m")
    images = copy.deepcopy(sharp[1].image_processor)
    images.size = {"shortest_edge": least, "longest_edge": most}
    images.save_pretrained(tmp_path / "m")
    assert load_model(str(tmp_path / "m"))[1].image_size == 448


@pytest.mark.parametrize("content", [None, {}, {"config.json": "{}"}, {"config.json": "not json"}], ids=str)
def test_unreadable_model_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "m").mkdir()
        for name, text in content.items():
            (tmp_path / "m" / name).write_text(text)
    with pytest.raises(UserError, match=str(tmp_path / "m")) as error:
        load_model(str(tmp_path / "m"))
    assert "\n" not in str(error.value)


def test_model_that_lacks_one_tensor_is_refused(folder, tmp_path):
    """transformers warns, and fills it with random numbers."""
    shutil.copytree(folder, tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))
    del weights[name]
    save_file(weights, tmp_path / "m/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for .*layers\.0\.self_attn\.q_proj\.weight and 0 more"):
        load_model(str(tmp_path / "m"))


def test_only_weights_that_learn_are_copied_to_the_sampling_model(tiny):
    """Under FSDP each copy is an all-gather, and a frozen weight cannot have changed."""
    policy, sampling_model = Policy(copy.deepcopy(tiny[0])), copy.deepcopy(tiny[0])
    policy.model.model.visual.requires_grad_(False)
    for weight in policy.parameters():
        weight.data += 1
    sync_sampling_model(sampling_model, policy)
    pairs = zip(policy.model.parameters(), sampling_model.parameters(), strict=True)
    assert all(torch.equal(learns, copied) == learns.requires_grad for learns, copied in pairs)


def test_learning_rate_warms_up_and_decays_to_zero_after_the_last_step():
    rates = [linear_warmup_decay(step, 10, 1.0, 4) for step in range(10)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4] == 1.0
    assert rates[4:] == pytest.approx([1 - k / 6 for k in range(6)])
