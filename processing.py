"""A sample's prompt and images as the tensors that Qwen2.5-VL reads, with its rotary positions.

Shapes: B prompts, P prompt tokens (padded on the right), E hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from runtime.distributed import device
from runtime.errors import warn
from sample import Sample, format_prompt, format_target, load_images

TARGETS_MEASURED = 100  # of each task, as a run begins


class Processor(NamedTuple):
    tokenizer: PreTrainedTokenizerFast
    image_processor: Qwen2VLImageProcessorPil
    image_size: int  # side in pixels of the square that every image is resized to


class Prompts(NamedTuple):
    """B prompts, padded on the right. Causal attention never sees what follows a token, so the
    padding needs no mask in the prompt itself."""
    input_ids: Tensor       # (B, P)
    position_ids: Tensor    # (3, B, P) rotary positions: time, height, width
    lengths: Tensor         # (B,) tokens without the padding
    pixel_values: Tensor    # (patches of all images, 3 * 2 * 14 * 14): channels, two video frames
                            # (a still image twice), height, width
    image_grid_thw: Tensor  # (images, 3) patches in time, height, width; on the CPU, because the
                            # vision tower reads them to lay out its windows
    # (image tokens of all prompts, E), computed once if the vision tower does not learn
    image_embeds: Tensor | None = None

    @property
    def attention_mask(self) -> Tensor:
        """(B, P) True on tokens, False on padding."""
        P = self.input_ids.shape[1]
        return torch.arange(P, device=self.lengths.device) < self.lengths[:, None]

    @property
    def has_padding(self) -> bool:
        return self.input_ids.numel() != int(self.lengths.sum())


def encode(processor: Processor, sample: Sample) -> Prompts:
    """The sample's prompt and images as the model reads them -> Prompts with B = 1."""
    return encode_chat(processor, format_prompt(sample), load_images(sample))


def encode_chat(processor: Processor, text: str, images: list[Image.Image]) -> Prompts:
    """A chat and its images -> Prompts with B = 1, on the device.

    Each `<|image_pad|>` of the text is repeated once for every token of its image.
    """
    tokenizer = processor.tokenizer
    merge_size = processor.image_processor.merge_size  # 2: a token is 2 x 2 patches
    image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    # The images have their size already. Resizing them again would shift them against their boxes.
    processed = processor.image_processor(images=images, do_resize=False, return_tensors="pt")
    image_grid_thw = processed["image_grid_thw"]                                # (images, 3)
    image_tokens = iter((image_grid_thw.prod(1) // merge_size**2).tolist())
    input_ids = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        input_ids += [token] * (next(image_tokens) if token == image_token_id else 1)
    position_ids = mrope_position_ids(
        input_ids, image_grid_thw.tolist(), image_token_id, merge_size)
    return Prompts(
        input_ids=torch.tensor([input_ids]).to(device()),
        position_ids=position_ids[:, None].to(device()),
        lengths=torch.tensor([len(input_ids)]).to(device()),
        pixel_values=processed["pixel_values"].to(device()),
        image_grid_thw=image_grid_thw)


def tokenize_target(processor: Processor, sample: Sample) -> Tensor:
    """The completion that SFT imitates, (C,) token ids."""
    ids = processor.tokenizer(format_target(sample), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids).to(device())


def warn_of_long_targets(processor: Processor, samples: Mapping[str, Sequence[Sample]],
                         max_new_tokens: int) -> None:
    """Say for which tasks --max-new-tokens is too short: completions that are cut off have no
    answer, so long answers could never be learned."""
    for task, of_task in samples.items():
        lengths = [len(tokenize_target(processor, s)) for s in of_task[:TARGETS_MEASURED]]
        too_long = sum(length > max_new_tokens for length in lengths)
        if too_long:
            warn(f"warning: {too_long} of the first {len(lengths)} targets of {task} are longer "
                 f"than --max-new-tokens {max_new_tokens}, the longest has {max(lengths)} tokens; "
                 "completions as long as that are cut off, and have no answer")


def pad_prompts(prompts: Prompts, num_pads: int) -> Prompts:
    """Longer by `num_pads` tokens. Any token will do, because nothing reads the padding."""
    return prompts._replace(input_ids=F.pad(prompts.input_ids, (0, num_pads)),
                            position_ids=F.pad(prompts.position_ids, (0, num_pads)))


def collate(prompts: list[Prompts]) -> Prompts:
    """Several Prompts -> one, padded on the right to the longest."""
    P = max(p.input_ids.shape[1] for p in prompts)
    prompts = [pad_prompts(p, P - p.input_ids.shape[1]) for p in prompts]
    has_embeds = prompts[0].image_embeds is not None
    return Prompts(
        input_ids=torch.cat([p.input_ids for p in prompts]),                    # (B, P)
        position_ids=torch.cat([p.position_ids for p in prompts], 1),           # (3, B, P)
        lengths=torch.cat([p.lengths for p in prompts]),                        # (B,)
        pixel_values=torch.cat([p.pixel_values for p in prompts]),
        image_grid_thw=torch.cat([p.image_grid_thw for p in prompts]),
        image_embeds=torch.cat([p.image_embeds for p in prompts]) if has_embeds else None)


def mrope_position_ids(input_ids: list[int], image_grid_thw: list[list[int]], image_token_id: int,
                       merge_size: int) -> Tensor:
    """Rotary positions (3, P) of one prompt. Text counts up in all three; an image counts its time,
    its height and its width, and text continues after the largest of them.

    Equal to transformers' `get_rope_index`, which is not used for two reasons: it gives wrong
    positions without a warning if its token-type argument is missing, and it leaves `rope_deltas`
    in the model for the next call. So positions are always computed here and passed.
    """
    position_ids = []
    start = 0  # position of the next token
    grids = iter(image_grid_thw)
    while len(position_ids) < len(input_ids):
        if input_ids[len(position_ids)] == image_token_id:
            t, h, w = next(grids)
            h //= merge_size
            w //= merge_size
            position_ids += [(start + i, start + j, start + k)
                             for i in range(t) for j in range(h) for k in range(w)]
            start += max(h, w)
        else:
            position_ids.append((start, start, start))
            start += 1
    return torch.tensor(position_ids).T


def max_position_ids(prompts: Prompts) -> Tensor:
    """The largest rotary position of each prompt (B,); its completions start one after it.

    Not that of the last token: at the end of an image some earlier position may be larger.
    """
    largest = prompts.position_ids.amax(0)                                      # (B, P)
    return largest.masked_fill(~prompts.attention_mask, 0).amax(1)


def prefetch(steps: Iterable[tuple[object, list]],
             encode: Callable) -> Iterator[tuple[object, list, list]]:
    """(step, samples) -> (step, samples, each of them encoded), in order.

    Threads encode the next step's samples while this step trains. Reading, decoding and resizing
    images, which is most of the work, releases Python's lock.
    """
    pool = ThreadPoolExecutor(max_workers=4)
    submitted = ((step, samples, [pool.submit(encode, sample) for sample in samples])
                 for step, samples in steps)
    try:
        # pairwise draws step n + 1, which starts its threads, before it yields step n
        for (step, samples, futures), _ in pairwise(chain(submitted, [None])):
            yield step, samples, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
