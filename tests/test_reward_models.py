"""The frozen models behind two rewards: the right numbers, in the right pixels, and one clear line when they are missing."""

import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Sam2Config,
    Sam2Model,
)

from metrics.reward_models import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_reward_models,
    load_sam,
    load_sbert,
)
from pretrained import load_model
from rewards import hybrid_reward, predicted_mask, score_completion
from runtime.errors import UserError
from sample import format_target, load_images
from tiny.scenes import Scenes

TEXTS = ["three ships in a harbour", "a harbour with some boats lying at the pier, seen from above", "bare desert"]


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory):
    """Random weights in the architecture of all-MiniLM-L6-v2, a BERT, with a tokenizer of whole words."""
    torch.manual_seed(0)
    words = sorted({word for text in TEXTS for word in text.replace(",", " ,").split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    folder = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=64, initializer_range=0.5)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small_sam(tmp_path_factory):
    """Random weights in SAM 2.1's architecture, 128 pixels wide instead of 1024."""
    torch.manual_seed(0)
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 16, "image_size": [128, 128],
                "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 64, 128],
                "num_attention_heads_per_stage": [1, 1, 2, 2], "global_attention_blocks": [3]}
    config = Sam2Config(
        vision_config={"backbone_config": backbone, "backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 32,
                           "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]},
        prompt_encoder_config={"hidden_size": 32, "image_size": 128},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32})
    folder = tmp_path_factory.mktemp("sam")
    Sam2Model(config).save_pretrained(folder)
    return str(folder)


def test_sbert_is_the_cosine_of_mean_pooled_tokens(small_bert):
    """Against a padded batch with the mask taken out by hand, as the card of all-MiniLM-L6-v2 describes it."""
    tokenizer, model = AutoTokenizer.from_pretrained(small_bert), AutoModel.from_pretrained(small_bert).eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    similarity, cosines = load_sbert(small_bert), means @ means.T
    for i, one in enumerate(TEXTS):
        for j, other in enumerate(TEXTS):
            assert similarity(one, other) == pytest.approx(float(cosines[i, j]), abs=1e-5)
    assert cosines.min() < 0.9  # the texts differ, so a wrong pooling would show


def test_the_hybrid_reward_takes_both_halves(small_bert):
    sample = Scenes("rcap", 112, seed=0)[1]
    right, wrong = sample.gt_answer, "zebra crossing"
    models = load_reward_models(["rcap"], small_bert, None)
    assert hybrid_reward(right, sample, **models) == pytest.approx(1)
    lexical, cosine = hybrid_reward("some " + right, sample), models["sbert"]("some " + right, right)
    assert hybrid_reward("some " + right, sample, **models) == pytest.approx((lexical + max(cosine, 0)) / 2)
    assert hybrid_reward(wrong, sample, **models) == pytest.approx(max(models["sbert"](wrong, right), 0) / 2)
    assert 0 <= hybrid_reward("\x00<|image_pad|> ]]] " * 400, sample, **models) <= 1


def test_sam_sees_the_image_and_the_prompts_in_its_own_frame(small_sam):
    """Against a forward pass of the whole model on pixels and prompts scaled by hand."""
    sample = Scenes("seg", 112, seed=0)[1]
    box, points = (20.0, 30.0, 90.0, 80.0), [(40.0, 50.0), (60.0, 60.0)]
    image = torch.from_numpy(np.asarray(load_images(sample)[0].resize((128, 128)), np.float32) / 255)
    scale = 128 / 112
    with torch.no_grad():
        logits = Sam2Model.from_pretrained(small_sam).eval()(
            pixel_values=((image - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(2, 0, 1)[None], multimask_output=False,
            input_boxes=torch.tensor([[box]]) * scale, input_points=torch.tensor([[points]]) * scale).pred_masks
    logits = torch.nn.functional.interpolate(logits[0], (112, 112), mode="bilinear")[0, 0]
    mask = load_sam(small_sam)(sample, box, points)
    assert mask.shape == (112, 112) and mask.dtype == bool
    assert ((logits > 0).numpy() == mask)[logits.abs().numpy() > 1e-4].all()


def test_masks_are_clipped_to_their_boxes(small_sam):
    models = load_reward_models(["seg"], None, small_sam)
    sample = next(s for s in Scenes("seg", 112, seed=0) if len(s.gt_boxes) == 1)
    answer = '[{"bbox_2d": [10, 20, 30, 40], "keypoint1": [15, 25], "keypoint2": [20, 30]}]'
    mask = predicted_mask(answer, sample, models["sam"])
    outside = mask.copy()
    outside[20:40, 10:30] = False
    assert not outside.any()
    assert 0 <= score_completion(format_target(sample), sample, **models)["accuracy"] <= 1


def test_what_goes_without_is_said_once(capsys):
    load_reward_models(["det", "rcap", "change", "seg"], None, None)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("rcap, change: no --sbert") and said[1].startswith("seg: no --sam")
    load_reward_models(["det"], None, None)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["sbert", "sam"])
def test_a_missing_model_is_one_line(name, tmp_path):
    with pytest.raises(UserError, match=f"--{name} {tmp_path}: no such model"):
        load_reward_models(["seg"], **{"sbert": None, "sam": None, name: str(tmp_path)})


@pytest.mark.parametrize("load", [load_model, lambda name: load_reward_models(["rcap"], name, None)])
def test_hub_id_that_cannot_be_reached_says_what_to_do(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"couldn't find them.*; if nobody/nothing is a hub id .* `hf download nobody/nothing` .*HF_HUB_OFFLINE=1"):
        load("nobody/nothing")


@pytest.mark.parametrize("name", ["./minilm", "/nowhere/minilm", "runs/sbert/model"])
def test_missing_folder_is_no_hub_id(name, monkeypatch):
    """The advice was `hf download` of a path, also for the base model of adapters that had moved."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"; there is no folder {re.escape(name)}$"):
        load_reward_models(["rcap"], name, None)
