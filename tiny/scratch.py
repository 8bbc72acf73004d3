"""`--model scratch`: the architecture of `tiny` with random weights."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model import ATTENTION, STOP_TOKENS, Qwen
from processing import Processor
from rewards import TAGS
from runtime.layers import use_fused_layers

SPECIAL_TOKENS = [*STOP_TOKENS, "<|im_start|>", "<|vision_start|>", "<|vision_end|>",
                  "<|image_pad|>", "<|video_pad|>"]
JSON_PIECES = ['{"bbox_2d": [', '], "label": "', '], "keypoint1": [', '], "keypoint2": [', ']}',
               '"}']


def new_tiny_model(corpus: list[str], image_size: int = 112) -> tuple[Qwen, Processor]:
    """A new model with 1.5 M random weights, and a tokenizer trained on `corpus`.

    Apart from its size it differs from Qwen2.5-VL-3B in two ways, both to shorten completions: a
    number of up to three digits that is frequent in the corpus is one token (Qwen: one per digit),
    and so is each think and answer tag and each piece of a JSON answer.
    """
    tokenizer = new_tokenizer(corpus)
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "initializer_range": 0.08, "max_position_embeddings": 4096, "bos_token_id": None,
            "eos_token_id": ids[STOP_TOKENS[0]], "pad_token_id": ids[STOP_TOKENS[1]],
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                "mrope_section": [4, 6, 6]}},
        vision_config={
            "depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4,
            "out_hidden_size": 128, "fullatt_block_indexes": [0, 2], "initializer_range": 0.08},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True)
    model = Qwen._from_config(config, attn_implementation=ATTENTION)
    # A patch has 1,176 pixels. At the common initializer_range its features, and then the image
    # tokens, would be twenty times the text's, and drown what attention adds, positions first.
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight *= 0.1
        model.model.visual.merger.mlp[2].weight *= 0.1
    size = {"shortest_edge": image_size**2, "longest_edge": image_size**2}
    return use_fused_layers(model), Processor(tokenizer, Qwen2VLImageProcessorPil(size=size), image_size)


def new_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens, one token for a frequent number of
    up to three digits, and one for each tag and JSON piece."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=640, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens([*TAGS, *JSON_PIECES])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=STOP_TOKENS[0],
                                   pad_token=STOP_TOKENS[1])
