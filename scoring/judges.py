"""Frozen models that some rewards consult: SBERT for the meaning of a text, SAM 2.1 for the mask of a box.

Both are optional. Without SBERT the lexical half of a reward counts alone, without SAM the mask of an instance is its
box; `load_judges` says so once.
"""

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from data import BadInput, Sample, first_line, load_images
from model import device
from rewards import JUDGES, TASKS, hybrid_reward, mask_reward

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # mean and std that SAM's images are normalised with


def load_judges(tasks: Sequence[str], sbert: str | None, sam: str | None) -> None:
    """Put the models into rewards.JUDGES: `sbert` and `sam` are folders or hub ids. Says once which task goes without.
    Raises BadInput if one cannot be loaded."""
    for name, source, loader, reward, instead in (
            ("sbert", sbert, load_sbert, hybrid_reward, "the lexical half of the reward counts alone"),
            ("sam", sam, load_sam, mask_reward, "the mask of an instance is its box")):
        concerned = [task for task in tasks if TASKS[task].reward is reward]
        try:
            JUDGES[name] = loader(source) if source else None
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise BadInput(f"--{name} {source}: no such model can be loaded ({first_line(error)})") from error
        if concerned and not source:
            print(f"{', '.join(concerned)}: no --{name}, so {instead}", file=sys.stderr)


def load_sbert(source: str) -> Callable[[str, str], float]:
    """(text, text) -> cosine of their embeddings: mean of the last layer's tokens, as all-MiniLM-L6-v2 was trained."""
    from transformers import AutoModel, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, use_safetensors=True).to(device()).eval()

    @lru_cache(maxsize=4096)  # references come back for each completion of a group
    @torch.no_grad()
    def embed(text: str) -> torch.Tensor:
        inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt").to(device())
        return F.normalize(model(**inputs).last_hidden_state[0].mean(0), dim=0)  # one text: no padding to leave out

    return lambda a, b: float(embed(a) @ embed(b))


def load_sam(source: str) -> Callable[[Sample, tuple, list], np.ndarray]:
    """(sample, box, points) -> mask (frame, frame): SAM 2.1 prompted with a box and points on the thing, pixels of the
    frame, on the sample's first image. transformers' own processor is not used: it needs torchvision."""
    from transformers import Sam2Model
    model = Sam2Model.from_pretrained(source, use_safetensors=True).to(device()).eval()
    side = model.config.prompt_encoder_config.image_size

    embedded: dict = {}  # of the last image: the completions of a group share it

    @torch.no_grad()
    def segment(sample: Sample, box: tuple, points: list) -> np.ndarray:
        if sample.id not in embedded:
            embedded.clear()
            image = np.asarray(load_images(sample)[0].resize((side, side)), np.float32) / 255
            pixels = (torch.from_numpy(image) - IMAGENET[0]) / IMAGENET[1]
            embedded[sample.id] = model.get_image_embeddings(pixels.permute(2, 0, 1)[None].to(device()))
        scale = side / sample.frame
        prompts = {"input_boxes": torch.tensor([[box]], device=device()) * scale}            # (1, 1, 4)
        if points:
            prompts["input_points"] = torch.tensor([[points]], device=device()) * scale      # (1, 1, n, 2)
        masks = model(image_embeddings=embedded[sample.id], multimask_output=False, **prompts).pred_masks  # (1, 1, 1, h, w)
        masks = F.interpolate(masks[0], (sample.frame, sample.frame), mode="bilinear", align_corners=False)
        return (masks[0, 0] > 0).cpu().numpy()

    return segment
