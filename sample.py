"""A `Sample`, what every task learns from, and its prompt.

Qwen2.5-VL speaks absolute pixels of the image that it is given. So an image is resized once, here,
to a square of side `image_size`, and every box is converted to pixels of that resized image when
its file is read. Prompts, answers, rewards and plots then need no conversion. The tasks of
KEEPS_ASPECT_RATIO, which have no boxes, keep the shape of their images.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from boxes import format_boxes, obb_to_hbb
from readers.image_headers import has_16_bits
from runtime.errors import UserError


@dataclass(frozen=True, slots=True)  # slots: a run holds hundreds of thousands
class Sample:
    id: str                 # file and record, named in errors and logs
    task: str               # a key of INSTRUCTIONS and of rewards.TASKS
    images: tuple           # in the order in which they precede the question: paths, PIL images,
                            # or objects with .open
    question: str           # plain text; format_prompt adds the task's instruction
    gt_answer: str          # the right answer as the model should write it
    image_size: int         # side in pixels of the square image that the model sees
    gt_boxes: tuple = ()    # (x1, y1, x2, y2, theta): pixels of the resized image, degrees
    think: str = ""         # reasoning that SFT imitates
    gt_texts: tuple = ()    # all right texts, where there are several captions
    choices: tuple = ()     # what to choose from: the label vocabulary of mlc, the letters of pair
    category: str = ""      # class of the object or scene: --shots draws evenly from these
    subset: str = ""        # row of the benchmark's table: object size, question type, uniqueness
    split: str = ""         # "train", "val" or "test" where the source says so
    place: str = ""         # pair, geo: samples of one place are held out together (default: those
                            # whose first image has the same file name)
    gt_mask: object = None  # seg: image or path, non-zero on the target
    oriented: bool = False  # det: the answer's boxes have five numbers, theta is the last
    thinking: bool = True   # prompt, target and format reward want the reasoning, too
    system: str | None = None  # system prompt in place of the project's own


# --------------------------------------------------------------------------------------------------
# The prompt, in Qwen's chat layout. The included `tiny` was trained on these very words.

SYSTEM = "Read the image."
REQUESTS = {  # thinking or not -> the form of the completion; ends system prompt and user's turn
    True: "Reason in <think></think>, then give only the result in <answer></answer>.",
    False: "Answer only in <answer></answer>.",
}
INSTRUCTIONS = {  # task -> what follows the question
    "cls": "Answer with one class.",
    "mlc": "Answer with all classes that apply, separated by commas.",
    "det": "Answer with a box [x1,y1,x2,y2] for each, in pixels of {image_size}x{image_size}, "
           "or none.",
    "rcap": "Answer with a short phrase.",
    "ground": "Answer with sentences, a box [x1,y1,x2,y2] in pixels of {image_size}x{image_size} "
              "after each thing.",
    "cap": "Answer with one sentence.",
    "change": "Answer with one sentence on what changed.",
    "vqa": "Answer with one word.",
    "rec": 'Answer as JSON, {"bbox_2d": [x1, y1, x2, y2]} in pixels of {image_size}x{image_size}.',
    "ovd": 'Answer as a JSON list of {"bbox_2d": [x1, y1, x2, y2], "label": name} in pixels of '
           "{image_size}x{image_size}, or None.",
    "seg": 'Answer as a JSON list of {"bbox_2d": [x1, y1, x2, y2], "keypoint1": [x, y], '
           '"keypoint2": [x, y]} in pixels of {image_size}x{image_size}, both points on the thing, '
           "or None.",
    "pair": "Answer with one letter.",
    "count": "Answer with one number.",
    "geo": "Answer with latitude, longitude in degrees, south and west negative.",
}
ORIENTED_DET = ("Answer with a box [x1,y1,x2,y2,theta] for each, which is turned by theta degrees "
                "clockwise about its center, in pixels of {image_size}x{image_size}, or none.")
BOX_TASKS = ("det", "ground", "rec", "ovd", "seg")  # tasks whose answers hold boxes


def format_prompt(sample: Sample) -> str:
    """The chat up to where the model continues, with one `<|image_pad|>` for each image
    (processing.encode repeats it once per image token)."""
    images = "<|vision_start|><|image_pad|><|vision_end|>" * len(sample.images)
    instruction = ORIENTED_DET if sample.oriented else INSTRUCTIONS[sample.task]
    instruction = instruction.replace("{image_size}", str(sample.image_size))
    request = REQUESTS[sample.thinking]  # instruct models follow it in the user's turn
    return (f"<|im_start|>system\n{sample.system or f'{SYSTEM} {request}'}<|im_end|>\n"
            f"<|im_start|>user\n{images}{sample.question} {instruction} {request}<|im_end|>\n"
            f"<|im_start|>assistant\n")


def chat_template(system: str | None = None, thinking: bool = True) -> str:
    """The same chat for other programs, in Jinja. They put the task's instruction after the
    question; the request follows by itself."""
    request = REQUESTS[thinking]
    quoted = json.dumps(system or f"{SYSTEM} {request}", ensure_ascii=False)  # it may hold {{ or {%
    return (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\n{{ " + quoted + " }}<|im_end|>\n"
        "{% endif %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if 'text' in part %}{{ part['text'] }}{% else %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}"
        "{% if message['role'] == 'user' %} " + request + "{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def format_target(sample: Sample) -> str:
    """The completion that SFT imitates. It includes the end-of-turn token: a model that never sees
    it never learns to stop."""
    think = f"<think>{sample.think}</think>\n" if sample.thinking else ""
    return f"{think}<answer>{sample.gt_answer}</answer><|im_end|>"


def to_oriented(sample: Sample) -> Sample:
    """The det sample with answers of oriented boxes [x1,y1,x2,y2,theta], as in GeoVLM-R1."""
    gt_answer = format_boxes(sample.gt_boxes, sample.image_size, oriented=True)
    return replace(sample, oriented=True, gt_answer=gt_answer)


def loosen_boxes(sample: Sample, pixels: float, seed: Sequence[int]) -> Sample:
    """The sample with loose boxes in its target answer, like those of a hasty annotator: each
    edge moves outwards by Gaussian noise whose mean and std are `pixels` of the resized image.
    Theta stays exact, and so do `gt_boxes`, which the reward reads."""
    noise = np.random.default_rng(seed).normal(pixels, pixels, (len(sample.gt_boxes), 4))
    noise *= (-1, -1, 1, 1)
    boxes = sample.gt_boxes if sample.oriented else map(obb_to_hbb, sample.gt_boxes)
    noisy = [(*np.add(box[:4], n), *box[4:]) for box, n in zip(boxes, noise)]
    return replace(sample, gt_answer=format_boxes(noisy, sample.image_size, sample.oriented))


# --------------------------------------------------------------------------------------------------
# Images

KEEPS_ASPECT_RATIO = ("pair", "geo")  # tasks without boxes, of panoramas and photographs
FLIP = Image.Transpose
UPRIGHT = {2: FLIP.FLIP_LEFT_RIGHT, 3: FLIP.ROTATE_180, 4: FLIP.FLIP_TOP_BOTTOM, 5: FLIP.TRANSPOSE,
           6: FLIP.ROTATE_270, 7: FLIP.TRANSVERSE, 8: FLIP.ROTATE_90}  # orientation in EXIF -> turn
TOKEN_SIZE = 28  # Qwen2.5-VL makes one token of 28 x 28 pixels, 2 x 2 patches


def load_images(sample: Sample) -> list[Image.Image]:
    """The sample's images as RGB, resized to image_size x image_size; of KEEPS_ASPECT_RATIO, to
    fit_size. Raises UserError for one that cannot be read."""
    square = (sample.image_size, sample.image_size)
    loaded = []
    for path in sample.images:
        with unreadable_as_user_error(f"{sample.id}: image {path}"):
            image = open_image(path)
            if has_16_bits(image):
                raise UserError(f"{sample.id}: image {path} has more than 8 bits per band; convert "
                                "it to 8 first")
            keeps_ratio = sample.task in KEEPS_ASPECT_RATIO
            if keeps_ratio:  # turned upright; boxes of other tasks refer to the pixels as stored
                # Not ImageOps.exif_transpose: it writes all tags again, and fails for odd ones.
                turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
                image = image if turn is None else image.transpose(turn)
            size = fit_size(image.size, sample.image_size) if keeps_ratio else square
            loaded.append(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    return loaded


@contextmanager
def unreadable_as_user_error(image: str) -> Iterator[None]:
    """A context in which an image is read; one that cannot be read is a UserError."""
    try:
        yield
    except (OSError, SyntaxError, ValueError) as error:  # missing, truncated or damaged
        raise UserError(f"{image} cannot be read ({error}); replace it by one of the same name, or "
                        "leave it out")


def fit_size(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """(width, height) in multiples of TOKEN_SIZE, near the image's aspect ratio, with about as many
    pixels as the square of side image_size."""
    shape = math.sqrt(size[0] / size[1])
    most = (image_size // TOKEN_SIZE) ** 2  # tokens of the square
    width, height = (min(max(round(side / TOKEN_SIZE), 1), most) * TOKEN_SIZE
                     for side in (image_size * shape, image_size / shape))
    return width, height


def open_image(image: object) -> Image.Image:
    """Open a path or an object with .open; a PIL image stays as it is."""
    if isinstance(image, Image.Image):
        return image
    return Image.open(image if isinstance(image, (str, Path)) else image.open("rb"))


# --------------------------------------------------------------------------------------------------
# The ground truth in the form that rewards and scores compare with

def gt_hbbs(sample: Sample) -> np.ndarray:
    """The sample's boxes as horizontal boxes (m, 4), pixels of the resized image."""
    return np.array([obb_to_hbb(box) for box in sample.gt_boxes]).reshape(-1, 4)


def gt_obbs(sample: Sample) -> np.ndarray:
    """The sample's boxes as oriented boxes (m, 5), pixels of the resized image, degrees."""
    return np.array(sample.gt_boxes, float).reshape(-1, 5)


def gt_texts_of(sample: Sample) -> Sequence[str]:
    """All texts that are right: several captions, or the one answer."""
    return sample.gt_texts or (sample.gt_answer,)


def load_gt_mask(sample: Sample, resized: bool = True) -> np.ndarray:
    """The sample's mask, True on the target: (image_size, image_size), or (H, W) as stored. Raises
    UserError if it cannot be read."""
    with unreadable_as_user_error(f"{sample.id}: mask {sample.gt_mask}"):
        mask = open_image(sample.gt_mask)
        values = np.asarray(mask)  # of a palette the indices, not the colours
        if mask.mode == "P":
            is_coloured = np.reshape(mask.getpalette(), (-1, 3)).any(1)  # by index: not black
            if is_coloured[0] and not is_coloured[np.unique(values[values > 0])].all():
                raise ValueError("in its palette index 0 is not black and another one is, so "
                                 "either may be the target; save it as gray values")
    values = values != 0
    if mask.mode in ("LA", "RGBA"):
        values = values[..., :-1] & values[..., -1:]  # nothing is where it is transparent
    mask = Image.fromarray(values if values.ndim == 2 else values.any(2))
    size = (sample.image_size, sample.image_size) if resized else mask.size
    return np.asarray(mask.resize(size, Image.Resampling.NEAREST))
