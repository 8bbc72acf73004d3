"""Text + reference -> reward.

A completion earns `format` (did it reason in <think> and then answer in <answer>?) and `accuracy` (is the answer
right? one formula a task). Both lie in [0, 1]; GeoVLM-R1 (arXiv 2509.25026) adds them up, and so do we, with weights as
flags. The paper names its rewards but not their formulas, so the formulas marked (ours) are reconstructions.

Everything here reads text that a model under optimisation wrote, so: nothing raises, nothing takes more than linear
time, and an ambiguous answer earns nothing. `TASKS` at the end ties a task to its instruction, reward and scores.

The tasks from `rec` on are those of two systems named Geo-R1: few-shot referring (arXiv 2509.21976) and cross-view
pairing (arXiv 2510.00072).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

if TYPE_CHECKING:
    from data import Sample  # which builds on this module

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PARTS = ("format", "accuracy", "length", "repetition")  # of a reward; each has a weight in the sum
MAX_BOXES = 1000   # an answer of more brackets is noise; the bound keeps the matching quick
MAX_TEXT = 10_000  # characters, more than any reference has; the bound keeps the comparison of texts quick

# Frozen models that some rewards consult where a script has loaded them (scoring/judges.py), else None:
#   "sbert"  (text, text) -> cosine of their sentence embeddings
#   "sam"    (sample, box, points) -> (frame, frame) bool mask
JUDGES: dict[str, Callable | None] = {"sbert": None, "sam": None}


# ----------------------------------------------------------------------------------------------------------------------
# Reading a completion

def format_reward(completion: str) -> float:
    """1 if the completion is `<think>reasoning</think> <answer>answer</answer>` and nothing else, else 0.

    Each tag stands exactly once, in this order, both parts say something, and only blanks stand around them.
    Source: GeoVLM-R1 (a format reward of 0 or 1); that empty and repeated tags earn nothing is ours.
    """
    if any(completion.count(tag) != 1 for tag in TAGS):
        return 0.0
    before, think, between, answer, after = re.split("|".join(TAGS), completion)
    in_order = re.findall("|".join(TAGS), completion) == list(TAGS)
    return float(in_order and not (before + between + after).strip() and bool(think.strip() and answer.strip()))


def extract_answer(completion: str) -> str | None:
    """The text between the only <answer> and the only </answer>, stripped; None if there is no such text.

    Two answers are none: a policy must not collect reward for a guess beside another. What stands inside the
    reasoning is no answer either, so the pair has to follow the last </think> (a missing <think> costs only the format).
    """
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    before, rest = completion.split("<answer>")
    answer, closed, after = rest.partition("</answer>")
    if not closed or "think>" in answer + after or before.rfind("<think>") > before.rfind("</think>"):
        return None
    return answer.strip() or None


def parse_boxes(answer: str) -> np.ndarray | None:
    """Boxes of an answer: (n, 4) array of x1, y1, x2, y2 in the units of the text (pixels of the frame); None if the
    answer is neither boxes nor `none`/`[]`.

    Every innermost bracket `[...]` is one prediction: 4 numbers, or 5 with the angle of an oriented box, of which the
    horizontal envelope is taken. A bracket that is no box (3 numbers, words, x2 <= x1) still counts as a prediction,
    as an empty box that overlaps nothing: dropping it would make a malformed guess free. Text around the brackets,
    such as Qwen's JSON, is ignored.
    """
    lists = re.findall(r"\[([^\[\]]*)\]", answer)
    if says_none(answer) or (len(lists) == 1 and not lists[0].strip()):
        return np.zeros((0, 4))
    if not 0 < len(lists) <= MAX_BOXES:
        return None
    return np.array([horizontal(read_box(text)) for text in lists])


def says_none(answer: str) -> bool:
    """`none`, as a model may write it."""
    return answer.strip().rstrip(".").lower() == "none"


def read_box(text: str) -> tuple[float, float, float, float, float]:
    """x1, y1, x2, y2, theta of the inside of a bracket: four numbers are an upright box; what is no box, or has no area, is
    an empty one."""
    values = read_numbers(text)
    good = len(values) in (4, 5) and values[2] > values[0] and values[3] > values[1]
    return (*values, 0.0)[:5] if good else (0.0,) * 5


def read_numbers(text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated list, at most 6; () if one of them is none. Both bounds keep hostile text cheap."""
    values = text.split(",", 5) if len(text) < 200 else []
    good = all(re.fullmatch(r"\s*[+-]?\d{1,6}(\.\d{0,9})?\s*", v, re.ASCII) for v in values)
    return tuple(map(float, values)) if good else ()


# ----------------------------------------------------------------------------------------------------------------------
# Boxes

def horizontal(box: tuple) -> tuple[float, float, float, float]:
    """Smallest upright box around `(x1, y1, x2, y2[, theta])`, a rectangle turned by theta degrees about its centre.

    Any unit. The envelope is the same for both senses of rotation, so no convention for theta is needed here.
    """
    x1, y1, x2, y2 = box[:4]
    theta = math.radians(box[4]) if len(box) > 4 else 0.0
    if theta == 0.0:
        return (x1, y1, x2, y2)
    w, h, cos, sin = (x2 - x1) / 2, (y2 - y1) / 2, abs(math.cos(theta)), abs(math.sin(theta))
    dx, dy = w * cos + h * sin, w * sin + h * cos
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    return (cx - dx, cy - dy, cx + dx, cy + dy)


def box_numbers(box: Sequence[float], frame: int) -> list[int]:
    """A box as a model writes it: the upright envelope, cut to the frame, in whole pixels, at least one wide and high."""
    x1, y1, x2, y2 = (min(max(round(v), 0), frame) for v in horizontal(box))
    x1, y1 = min(x1, frame - 1), min(y1, frame - 1)
    return [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]


def box_text(boxes: Sequence[Sequence[float]], frame: int) -> str:
    """Boxes as an answer of `det`: [x1,y1,x2,y2],[..] or `none`."""
    return ",".join("[{},{},{},{}]".format(*box_numbers(box, frame)) for box in boxes) or "none"


def json_text(things: dict | list[dict]) -> str:
    """Boxes as an answer of `rec`, `ovd` and `seg`: JSON as Qwen2.5-VL writes it, or `None`."""
    return json.dumps(things) if things else "None"


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box of a (n, 4) with every box of b (m, 4): (n, m). Empty boxes give 0."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.clip(bottom_right - top_left, 0, None).prod(-1)  # (n, m)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(-1), (b[:, 2:] - b[:, :2]).prod(-1)
    union = area_a[:, None] + area_b[None, :] - intersection
    return intersection / np.maximum(union, 1e-9)


def matched_ious(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """IoU of each pair of the one-to-one assignment with the largest sum (Hungarian method): (min(n, m),)."""
    ious = iou_matrix(predicted, reference)
    return ious[linear_sum_assignment(ious, maximize=True)]


def average_precision(predicted: np.ndarray, reference: np.ndarray) -> float:
    """COCO's AP (mean over IoU 0.50, 0.55, .. 0.95) of one class in one image, all predictions equally sure.

    Equal to pycocotools: in the order of the answer each of the first 100 boxes takes the best free reference that it
    overlaps enough; precision is made monotonous and read off at 101 recalls. Nothing to find and nothing found: 1.
    """
    if not len(predicted) or not len(reference):
        return float(len(predicted) == len(reference))
    ious, total = iou_matrix(predicted[:100], reference[::-1]), 0.0  # reversed: of equal overlaps COCO takes the last
    for threshold in np.linspace(0.5, 0.95, 10):
        free, hits = np.ones(len(reference), bool), np.zeros(len(ious))
        for i, row in enumerate(np.where(ious >= threshold, ious, 0)):
            best = (row * free).argmax()
            hits[i] = free[best] and row[best] > 0
            free[best] &= not hits[i]
        recall, precision = hits.cumsum() / len(reference), hits.cumsum() / np.arange(1, len(hits) + 1)
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        total += envelope[np.searchsorted(recall, np.linspace(0, 1, 101))].mean()
    return float(total / 10)


def reference_boxes(sample: Sample) -> np.ndarray:
    """The sample's boxes as upright boxes (m, 4), pixels of the frame."""
    return np.array([horizontal(box) for box in sample.boxes]).reshape(-1, 4)


# ----------------------------------------------------------------------------------------------------------------------
# Texts

def words(text: str) -> list[str]:
    """Lower-case words of a text, without punctuation; `_` parts words, as in the package rouge_score."""
    return re.findall(r"[^\W_]+", text.lower())


def common_subsequence(a: Sequence, b: Sequence) -> int:
    """Length of the longest common subsequence of two sequences of words or characters.

    Bit-parallel (Hyyro 2004, "Bit-parallel LCS-length computation revisited"): bit i of `row` is 0 where the answer for
    a[: i + 1] is one larger than for a[:i], and one addition advances a whole row of the usual table.
    """
    places: dict = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    everywhere = row = (1 << len(a)) - 1
    for item in b:
        match = row & places.get(item, 0)
        row = (row + match | row - match) & everywhere
    return len(a) - row.bit_count()


def overlap_f1(hits: int, a: Sequence, b: Sequence) -> float:
    """F1 of precision hits / |a| and recall hits / |b|."""
    return 2 * hits / max(len(a) + len(b), 1)


def lexical_similarity(a: str, b: str) -> float:
    """Mean of ROUGE-1 F1 (common words) and ROUGE-L F1 (common subsequence of words), Lin 2004; words are not stemmed."""
    a, b = words(a), words(b)
    unigrams = (Counter(a) & Counter(b)).total()
    return (overlap_f1(unigrams, a, b) + overlap_f1(common_subsequence(a, b), a, b)) / 2


def references(sample: Sample) -> Sequence[str]:
    """All texts that would be right: several captions, or the one answer."""
    return sample.references or (sample.answer,)


def without_boxes(text: str) -> str:
    """A description without its boxes and its <ref>, <p> and <box> tags."""
    return re.sub(r"\[[^\[\]]*\]|[\[\]]|</?(?:ref|box|p)>", " ", text)


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy rewards: (answer text, Sample) -> [0, 1]

def recall_reward(answer: str, sample: Sample) -> float:
    """Recall of the one reference label: 1 if the answer is that label, else 0 (ours; the paper says only "recall").

    Case, blanks, `_`, `-` and a full stop at the end do not matter. Naming several classes is not recall but a hedge
    that the paper's reviewers warned of, and earns 0.
    """
    return float(plain_label(answer) == plain_label(sample.answer))


def plain_label(text: str) -> str:
    """A class name without case, blanks, `_`, `-` and a full stop at the end."""
    return re.sub(r"[\s_-]", "", text).casefold().removesuffix(".")


def labels_recall_reward(answer: str, sample: Sample) -> float:
    """R = |P & G| / max(|P|, |G|) over the labels named, P, and right, G (ours; the paper says only "recall").

    Recall, as long as no more labels are named than there are: plain recall is 1 for naming them all.
    """
    named, right = named_labels(answer, sample.choices), named_labels(sample.answer, sample.choices)
    return len(named & right) / max(len(named), len(right), 1)


def named_labels(text: str, vocabulary: Sequence[str]) -> set[str]:
    """The labels that a text lists, without blanks. BigEarthNet's labels contain commas, so a list cannot be split at them
    alone: at each place the longest label of the vocabulary that fits is taken, made of whole words (no "sea" in "seaport"),
    and what else stands between commas is a label as well."""
    text, *labels = (" ".join(re.findall(r"[^\W_]+|[,;]", t.casefold())) for t in (text[:MAX_TEXT], *vocabulary))
    names = sorted((label.replace(" ", "") for label in labels), key=len, reverse=True)
    pattern = "|".join(" ?".join(name) for name in names)  # blanks do not matter: SeaLake, sea lake
    pieces = re.split(rf"(?<!\S)({pattern})(?!\S)|[,;]", text)
    return {piece.replace(" ", "") for piece in pieces if piece} - {"", "and"}


def detection_reward(answer: str, sample: Sample) -> float:
    """R = sum of matched IoU / max(n_pred, n_ref) (ours), upright boxes in pixels of the frame.

    Matching is one to one, and the larger count divides, so neither a second box on the same object nor a spray of
    boxes pays (the paper's "IoU" leaves that open). Nothing to find and answered so: 1.
    """
    predicted, reference = parse_boxes(answer), reference_boxes(sample).clip(0, sample.frame)  # cut as its answer is
    if predicted is None:
        return 0.0
    if len(predicted) == 0 or len(reference) == 0:
        return float(len(predicted) == len(reference))
    total = matched_ious(predicted, reference).sum() / max(len(predicted), len(reference))
    return float(min(1.0, total))  # a sum of ones may end an ulp above its count


def hybrid_reward(answer: str, sample: Sample) -> float:
    """R = 0.5 cos(SBERT(a), SBERT(g)) + 0.5 lexical(a, g), best reference g: the paper's hybrid of SBERT and lexical
    metrics (HSLR) with weights and metrics of ours. A negative cosine is 0; without SBERT the lexical half counts alone."""
    if len(answer) > MAX_TEXT:
        return 0.0
    judge = JUDGES["sbert"]
    return max(lexical_similarity(answer, text) if judge is None else
               0.5 * min(max(judge(answer, text), 0.0), 1.0) + 0.5 * lexical_similarity(answer, text)
               for text in references(sample))


def grounding_reward(answer: str, sample: Sample) -> float:
    """R = 0.5 detection + 0.5 lexical, of the boxes and of the text around them (lexical-metric grounding; formula ours)."""
    if len(answer) > MAX_TEXT:
        return 0.0
    text = max(lexical_similarity(without_boxes(answer), without_boxes(t)) for t in references(sample))
    boxes = detection_reward(answer if "[" in answer else "none", sample)
    return 0.5 * boxes + 0.5 * text


def levenshtein_reward(answer: str, sample: Sample) -> float:
    """R = Levenshtein ratio 1 - d / (|a| + |g|), best reference g; d counts insertions and deletions of characters, as in
    the package of that name, so the ratio is 2 LCS / (|a| + |g|). That the best of several captions counts is ours."""
    if len(answer) > MAX_TEXT:
        return 0.0
    a, *texts = (" ".join(text.lower().split()).removesuffix(".").rstrip() for text in (answer, *references(sample)))
    return max(overlap_f1(common_subsequence(g, a), a, g) for g in texts)


def jaccard_reward(answer: str, sample: Sample) -> float:
    """R = |A & G| / |A | G| of the words of answer and reference (the paper names it; on words is ours)."""
    a, g = set(words(answer)), set(words(sample.answer))
    return len(a & g) / max(len(a | g), 1)


def iou_reward(answer: str, sample: Sample) -> float:
    """R = IoU of the one box (Geo-R1 few-shot, REC). The object is one: several boxes, or none, earn 0."""
    predicted = parse_boxes(answer)
    return detection_reward(answer, sample) if predicted is not None and len(predicted) == 1 else 0.0


def count_penalised_ap_reward(answer: str, sample: Sample) -> float:
    """R = min(1, sqrt(n_ref / n_pred)) AP (Geo-R1 few-shot, OVD). All predictions have one score, so AP alone would
    forgive every box that comes after the right ones."""
    predicted = parse_boxes(answer)
    if predicted is None:
        return 0.0
    reference = reference_boxes(sample).clip(0, sample.frame)
    penalty = min(1.0, math.sqrt(max(len(reference), 1) / max(len(predicted), 1)))
    return penalty * average_precision(predicted, reference)


def mask_reward(answer: str, sample: Sample) -> float:
    """R = |M & G| / |M | G|, the IoU of predicted and reference mask (Geo-R1 few-shot, GRES). No target, so answered: 1;
    an instance named there earns 0, be its mask empty or not."""
    mask = predicted_mask(answer, sample)
    if mask is None:
        return 0.0
    reference = reference_mask(sample)
    union = (mask | reference).sum()
    return float((mask & reference).sum() / union) if union else float("{" not in answer)


def predicted_mask(answer: str, sample: Sample) -> np.ndarray | None:
    """The (frame, frame) bool mask of an answer: the union of its instances' masks; None if it names neither instances
    nor `none`.

    An instance is an object `{"bbox_2d": [4 numbers], "keypoint1": [x, y], "keypoint2": [x, y]}`. SAM turns box and points
    into a mask, which is trimmed to the box; without SAM its mask is the box. The points' order does not matter, and
    one without numbers is left out; an instance without a box, or with corners swapped, has an empty mask.
    """
    objects, boxes = re.findall(r"\{([^{}]*)\}", answer), parse_boxes(answer)
    if not objects and (boxes is None or len(boxes)):
        return None
    mask = np.zeros((sample.frame, sample.frame), bool)
    for text in objects[:100]:  # as many as COCO counts; each may ask SAM
        fields = dict(re.findall(r'"(bbox_2d|keypoint[12])"\s{0,9}:\s{0,9}\[([^\[\]]*)\]', text))
        box = horizontal(read_box(fields.pop("bbox_2d", "")))
        x1, y1, x2, y2 = (round(min(max(v, 0), sample.frame)) for v in box)
        if x2 > x1 and y2 > y1:
            points = [point for point in map(read_numbers, fields.values()) if len(point) == 2]
            inside = slice(y1, y2), slice(x1, x2)
            mask[inside] |= True if JUDGES["sam"] is None else JUDGES["sam"](sample, box, points)[inside]
    return mask


def reference_mask(sample: Sample) -> np.ndarray:
    """The sample's mask (frame, frame), True on the target; `mask` is an image or a path, the target non-zero."""
    image = sample.mask if isinstance(sample.mask, Image.Image) else Image.open(sample.mask)
    return np.asarray(image.convert("L").resize((sample.frame, sample.frame), Image.Resampling.NEAREST)) > 0


def choice_reward(answer: str, sample: Sample) -> float:
    """1 if the answer names the right letter and no other (Geo-R1 cross-view), else 0. "B", "b", "(B)", "Image B is right"
    are read as B (the released reader's regex takes neither "B)" nor a sentence); "A or B" is refused, and so is the
    article A beside another letter."""
    letters = {letter.upper() for letter in re.findall(r"(?<!\w)[A-Z](?!\w)", answer) or re.findall(r"^\W*([a-z])\W*$", answer)}
    return float(letters & set(sample.choices) == {sample.answer})


# ----------------------------------------------------------------------------------------------------------------------
# Further terms of the cross-view system; these two may be negative

def length_reward(correct: bool, used: float) -> float:
    """Cosine in the share `used` of the longest completion: 1 -> 0.5 for a right answer, 0 -> -0.5 for a wrong one
    (arXiv 2502.03373, as Geo-R1 cross-view intends it; its released code always takes the right answer's branch, and
    beyond the longest length its cosine comes up again)."""
    top, bottom = (1.0, 0.5) if correct else (0.0, -0.5)
    return bottom + 0.5 * (top - bottom) * (1 + math.cos(math.pi * min(max(used, 0.0), 1.0)))


def repetition_penalty(completion: str, n: int = 6) -> float:
    """-(1 - distinct / all) of the n-grams of words: 0 without repetition, towards -1 with nothing else."""
    text = completion.lower().split()
    grams = list(zip(*(text[i:] for i in range(n))))
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def reward_parts(completion: str, sample: Sample, used: float = 0.0) -> dict[str, float]:
    """The named parts of one completion's reward: format and accuracy, each in [0, 1]; for pair also length and
    repetition. `used` is the completion's share of the longest one allowed. Raises ValueError for a reward function that
    returns no finite number."""
    answer, task = extract_answer(completion), TASKS[sample.task]
    accuracy = 0.0 if answer is None else task.reward(answer, sample)
    if not (isinstance(accuracy, Real) and math.isfinite(accuracy)):  # one NaN would be every weight's
        raise ValueError(f"{task.reward.__name__} of task {sample.task} returned {accuracy!r}, not a finite number, for "
                         f"sample {sample.id} and the answer {answer[:100]!r}")
    parts = {"format": format_reward(completion), "accuracy": float(accuracy)}
    if "length" in task.extra:
        parts["length"] = length_reward(parts["accuracy"] == 1, used)
    if "repetition" in task.extra:
        parts["repetition"] = repetition_penalty(completion)
    return parts


# ----------------------------------------------------------------------------------------------------------------------
# The table that a new task is added to

class Task(NamedTuple):
    instruction: str         # follows the question; {frame} is the side of the image in pixels
    reward: Callable         # (answer, Sample) -> [0, 1]
    scores: tuple[str, ...]  # functions of scoring/scores.py: (answers, Samples) -> {name: value}
    extra: tuple[str, ...] = ()  # further parts of the reward
    boxes: bool = False      # the answer holds boxes: readers bring those of a reference to the frame, reports draw them


TASKS = {
    "cls": Task("Answer with one class.", recall_reward, ("accuracy",)),
    "mlc": Task("Answer with all classes that apply, separated by commas.", labels_recall_reward, ("multilabel",)),
    "det": Task("Answer with a box [x1,y1,x2,y2] for each, in pixels of {frame}x{frame}, or none.", detection_reward,
                ("box_precision", "matched_boxes", "coco_ap"), boxes=True),
    "rcap": Task("Answer with a short phrase.", hybrid_reward, ("rouge", "meteor")),
    "ground": Task("Answer with sentences, a box [x1,y1,x2,y2] in pixels of {frame}x{frame} after each thing.", grounding_reward,
                   ("box_precision", "rouge", "meteor"), boxes=True),
    "cap": Task("Answer with one sentence.", levenshtein_reward, ("rouge", "meteor")),
    "change": Task("Answer with one sentence on what changed.", hybrid_reward, ("rouge", "meteor")),
    "vqa": Task("Answer with one word.", jaccard_reward, ("accuracy_by_type",)),
    "rec": Task('Answer as JSON, {"bbox_2d": [x1, y1, x2, y2]} in pixels of {frame}x{frame}.', iou_reward, ("box_accuracy",),
                boxes=True),
    "ovd": Task('Answer as a JSON list of {"bbox_2d": [x1, y1, x2, y2], "label": name} in pixels of {frame}x{frame}, or None.',
                count_penalised_ap_reward, ("coco_ap",), boxes=True),
    "seg": Task('Answer as a JSON list of {"bbox_2d": [x1, y1, x2, y2], "keypoint1": [x, y], "keypoint2": [x, y]} in pixels of '
                "{frame}x{frame}, both points on the thing, or None.", mask_reward, ("mask_iou",), boxes=True),
    "pair": Task("Answer with one letter.", choice_reward, ("choice_accuracy",), extra=("length", "repetition")),
}
