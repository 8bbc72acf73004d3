"""Frozen models that some rewards use: SBERT for the meaning of a text, SAM 2.1 for the mask of a
box.

Both are optional. Without SBERT the reward is its lexical half alone; without SAM the mask of an
instance is its box. `load_reward_models` says so once.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from metrics.reward_choices import parse_rewards
from rewards import TASKS, Sam, Sbert, hybrid_reward, mask_reward
from runtime.distributed import device
from runtime.errors import UserError, warn, why_not_loaded
from sample import Sample, load_images

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # SAM's images are normalised with these
IMAGENET_STD = (0.229, 0.224, 0.225)


def load_reward_models(tasks: Sequence[str], sbert: str | None, sam: str | None,
                       rewards: Sequence[str] = ()) -> dict[str, Sbert | Sam | Mapping | None]:
    """{"sbert": .., "sam": .., "task_rewards": ..}, the keywords of rewards.score_completion, from
    folders or hub ids, and from the values of --reward.

    None where no model was named; one line on stderr says which task goes without. Raises UserError
    if a model cannot be loaded.
    """
    task_rewards = parse_rewards(rewards, tasks)
    models = {"task_rewards": task_rewards}
    for name, model, load, reward, without in (
            ("sbert", sbert, load_sbert, hybrid_reward, "the reward is its lexical half alone"),
            ("sam", sam, load_sam, mask_reward, "the mask of an instance is its box")):
        try:
            models[name] = load(model) if model else None
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise UserError(f"--{name} {model}: no such model can be loaded "
                            f"{why_not_loaded(model, error)}") from error
        users = [task for task in tasks
                 if task_rewards.get(task, TASKS[task].reward) is reward]
        if users and not model:
            warn(f"{', '.join(users)}: no --{name}, so {without}")
    return models


def load_sbert(name: str) -> Sbert:
    """(text, text) -> cosine of their embeddings: the mean over the last layer's tokens, as
    all-MiniLM-L6-v2 was trained."""
    from transformers import AutoModel, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModel.from_pretrained(name, use_safetensors=True).to(device()).eval()

    @lru_cache(maxsize=4096)  # target texts recur for each completion of a group
    @torch.no_grad()
    def embed(text: str) -> torch.Tensor:
        inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt").to(device())
        hidden = model(**inputs).last_hidden_state[0]  # (tokens, E): one text, so no padding
        return F.normalize(hidden.mean(0), dim=0)

    return lambda a, b: float(embed(a) @ embed(b))


def load_sam(name: str) -> Sam:
    """(sample, box, points) -> bool mask (image_size, image_size): SAM 2.1 prompted with a box and
    points on the object, pixels of the resized image, on the sample's first image.

    transformers' own processor is not used, since it needs torchvision.
    """
    from transformers import Sam2Model
    model = Sam2Model.from_pretrained(name, use_safetensors=True).to(device()).eval()
    side = model.config.prompt_encoder_config.image_size
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    embeddings: dict = {}  # of the last image only: the completions of a group share it

    @torch.no_grad()
    def segment(sample: Sample, box: tuple, points: list) -> np.ndarray:
        if sample.id not in embeddings:
            embeddings.clear()
            image = np.asarray(load_images(sample)[0].resize((side, side)), np.float32) / 255
            pixels = ((torch.from_numpy(image) - mean) / std).permute(2, 0, 1)[None]
            embeddings[sample.id] = model.get_image_embeddings(pixels.to(device()))
        scale = side / sample.image_size
        prompts = {"input_boxes": torch.tensor([[box]], device=device()) * scale}  # (1, 1, 4)
        if points:  # (1, 1, n, 2)
            prompts["input_points"] = torch.tensor([[points]], device=device()) * scale
        masks = model(image_embeddings=embeddings[sample.id], multimask_output=False,
                      **prompts).pred_masks                                        # (1, 1, 1, h, w)
        size = (sample.image_size, sample.image_size)
        masks = F.interpolate(masks[0], size, mode="bilinear", align_corners=False)
        return (masks[0, 0] > 0).cpu().numpy()

    return segment
