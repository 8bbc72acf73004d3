"""`--model scratch`: tiny's architecture before it has learned anything."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import model as qwen
from rewards import TAGS


def scratch(corpus: list[str], frame: int = 112) -> tuple[qwen.Qwen, qwen.Processor]:
    """A new model of the same architecture with 1.5 M random weights, and a tokenizer learned from `corpus`.

    Beside its size it differs from Qwen2.5-VL-3B in two things, both to shorten completions: a number of up to three
    digits is one token (Qwen: one a digit), and so is each of the think and answer tags and of the pieces of JSON answers.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [*qwen.STOPS, "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=640, special_tokens=special, show_progress=False,
                                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens([*TAGS, '{"bbox_2d": [', '], "label": "', '], "keypoint1": [', '], "keypoint2": [', ']}', '"}'])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=qwen.STOPS[0], pad_token=qwen.STOPS[1])
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special)))
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08,
                     "max_position_embeddings": 4096,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
                     "bos_token_id": None, "eos_token_id": ids[qwen.STOPS[0]], "pad_token_id": ids[qwen.STOPS[1]]},
        vision_config={"depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128,
                       "fullatt_block_indexes": [0, 2], "initializer_range": 0.08},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True)
    model = qwen.Qwen._from_config(config, attn_implementation=qwen.ATTENTION)
    with torch.no_grad():  # 1,176 pixels go into a patch: at the common scale its features, and then the image tokens',
        model.model.visual.patch_embed.proj.weight *= 0.1  # would be twenty times the text's and drown all that
        model.model.visual.merger.mlp[2].weight *= 0.1     # attention adds to them, positions first
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": frame**2, "longest_edge": frame**2})
    return model, qwen.Processor(tokenizer, images, frame)
