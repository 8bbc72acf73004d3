"""Text + ground truth -> reward.

A completion earns `format` (did it reason in <think> and then answer in <answer>?) and `accuracy`
(is the answer right? one formula per task). Both lie in [0, 1]. GeoVLM-R1 (arXiv 2509.25026) adds
them up, and so do we, with weights as flags. That paper names its rewards, but its formulas were
not found; those marked (ours) are reconstructions.

Everything here reads text that a model under optimisation wrote. So no text makes it raise, bounds
on its length keep it fast, and an ambiguous answer earns nothing (vqa pays for each shared word).

A reward is a function of keywords: it names what it needs and takes the rest as **_. There are

    answer           the text in <answer>, stripped
    sample           the Sample with its ground truth
    think            the reasoning
    text             the whole completion
    length_fraction  length of the completion over the longest one allowed; None outside training
    parts            the parts of the reward computed so far, {name: value}
    sbert, sam       frozen models that some rewards use, or None (metrics/reward_models.py)
    task_rewards     {task: reward} in place of those of TASKS (the flag --reward)

TASKS and REWARD_PARTS at the end tie tasks to rewards and rewards to flags and metrics. The tasks
from `rec` to `pair` are those of two systems named Geo-R1: few-shot referring (arXiv 2509.21976)
and cross-view pairing (arXiv 2510.00072).
"""

import math
import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import NamedTuple

import numpy as np

from boxes import average_precision, matched_ious, obb_to_hbb, parse_box, parse_boxes, parse_numbers
from runtime.errors import UserError, first_line
from sample import Sample, gt_hbbs, gt_obbs, gt_texts_of, load_gt_mask
from texts import (
    MAX_TEXT,
    great_circle_km,
    lcs_length,
    lexical_similarity,
    normalize_label,
    overlap_f1,
    parse_coordinates,
    parse_count,
    parse_labels,
    strip_boxes,
    tokenize,
)

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
GEO_KNOTS = (0, 750, 2500, 20_000), (1.0, 0.5, 0.2, 0.0)  # km, reward; linear in between

Sbert = Callable[[str, str], float]                       # two texts -> cosine of their embeddings
Sam = Callable[[Sample, tuple, list], np.ndarray]         # sample, box, points -> bool mask


# --------------------------------------------------------------------------------------------------
# Reading a completion

def format_reward(text: str, sample: Sample, **_: object) -> float:
    """1 if the completion is `<think>reasoning</think> <answer>answer</answer>` and nothing else;
    `<answer>answer</answer>` and nothing else if the sample asks for no reasoning.

    Each tag occurs exactly once, in this order; both parts say something; only blanks surround
    them. Source: GeoVLM-R1 (a format reward of 0 or 1). Ours: empty and repeated tags earn nothing.
    """
    pieces = re.split("|".join(TAGS), text)
    has_tags = re.findall("|".join(TAGS), text) == list(TAGS if sample.thinking else TAGS[2:])
    only_blanks_around = not "".join(pieces[::2]).strip()
    return float(has_tags and only_blanks_around and all(part.strip() for part in pieces[1::2]))


def extract_answer(text: str) -> str | None:
    """The text between the only <answer> and the only </answer>, stripped; None if there is none.

    Two answers count as none: a policy must not collect reward for a guess beside another. An
    answer inside the reasoning is none either, so the pair has to follow the last </think> (a
    missing <think> costs only the format).
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    before, rest = text.split("<answer>")
    answer, closing_tag, after = rest.partition("</answer>")
    inside_think = before.rfind("<think>") > before.rfind("</think>")
    if not closing_tag or "think>" in answer + after or inside_think:
        return None
    return answer.strip() or None


def extract_think(text: str) -> str:
    """The reasoning: what lies between the first <think> and the next </think>, stripped."""
    return text.partition("<think>")[2].partition("</think>")[0].strip()


# --------------------------------------------------------------------------------------------------
# Accuracy rewards, in [0, 1]

def exact_match_reward(answer: str, sample: Sample, **_: object) -> float:
    """1 if the answer is the target label, else 0: the recall of one label (ours; the paper says
    only "recall").

    Case, blanks, `_`, `-` and a full stop at the end do not matter. Naming several classes, a hack
    that the paper's reviewers warned of, earns 0.
    """
    return float(normalize_label(answer) == normalize_label(sample.gt_answer))


def label_overlap_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = shared labels / max(predicted labels, target labels) (ours; the paper says only
    "recall").

    This is recall as long as no more labels are named than there are. Plain recall would be 1 for
    naming them all.
    """
    predicted = parse_labels(answer, sample.choices)
    target = parse_labels(sample.gt_answer, sample.choices)
    return len(predicted & target) / max(len(predicted), len(target), 1)


def box_reward(answer: str, sample: Sample,
               score: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """The score of the answer's boxes (n, 4) and the sample's (m, 4), pixels of the resized image;
    (n, 5) and (m, 5) if the sample asks for theta. 0 if only one side has boxes, 1 if neither has,
    0 if the answer cannot be parsed."""
    predicted = parse_boxes(answer, sample.oriented)
    if predicted is None:
        return 0.0
    # Clipped, as gt_answer is
    target = gt_obbs(sample) if sample.oriented else gt_hbbs(sample).clip(0, sample.image_size)
    if len(predicted) == 0 or len(target) == 0:
        return float(len(predicted) == len(target))
    return float(min(1.0, score(predicted, target)))  # a mean of ones may end an ulp above 1


def detection_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = sum of matched IoU / max(n_pred, n_gt) (ours), pixels of the resized image, horizontal
    boxes; oriented ones if the sample asks for theta.

    Matching is one to one. Dividing by the larger count penalises spurious and duplicate boxes
    (the paper's "IoU" leaves that open). No targets and an answer of none: 1.
    """
    def score(predicted: np.ndarray, target: np.ndarray) -> float:
        return matched_ious(predicted, target).sum() / max(len(predicted), len(target))

    return box_reward(answer, sample, score)


def hybrid_reward(answer: str, sample: Sample, sbert: Sbert | None = None, **_: object) -> float:
    """R = 0.5 cos(SBERT(a), SBERT(g)) + 0.5 lexical(a, g), best target text g.

    The paper's hybrid of SBERT and lexical metrics, with weights and metrics of ours. A
    negative cosine counts as 0. Without SBERT the reward is the lexical half alone.
    """
    if len(answer) > MAX_TEXT:
        return 0.0

    def similarity(text: str) -> float:
        lexical = lexical_similarity(answer, text)
        if sbert is None:
            return lexical
        return 0.5 * min(max(sbert(answer, text), 0.0), 1.0) + 0.5 * lexical

    return max(similarity(text) for text in gt_texts_of(sample))


def grounding_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = 0.5 detection + 0.5 lexical, of the boxes and of the text around them (lexical-metric
    grounding; formula ours)."""
    if len(answer) > MAX_TEXT:
        return 0.0
    text = max(lexical_similarity(strip_boxes(answer), strip_boxes(t)) for t in gt_texts_of(sample))
    boxes = detection_reward(answer if "[" in answer else "none", sample)
    return 0.5 * boxes + 0.5 * text


def levenshtein_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = Levenshtein ratio 1 - d / (|a| + |g|), best target text g.

    d counts insertions and deletions of characters, as in the package of that name, so the ratio
    is 2 LCS / (|a| + |g|). Ours: the best of several captions counts.
    """
    if len(answer) > MAX_TEXT:
        return 0.0

    def normalize(text: str) -> str:
        return " ".join(text.lower().split()).removesuffix(".").rstrip()

    a = normalize(answer)
    texts = [normalize(text) for text in gt_texts_of(sample)]
    return max(overlap_f1(lcs_length(g, a), a, g) for g in texts)


def jaccard_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = shared words / distinct words of answer and target (Jaccard; the name is the paper's,
    words are ours)."""
    a, g = set(tokenize(answer)), set(tokenize(sample.gt_answer))
    return len(a & g) / max(len(a | g), 1)


def iou_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = IoU of the one box (Geo-R1 few-shot). There is one object: several boxes, or none,
    earn 0."""
    predicted = parse_boxes(answer)
    if predicted is None or len(predicted) != 1:
        return 0.0
    return detection_reward(answer, sample)


def count_penalised_ap_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = min(1, sqrt(n_gt / n_pred)) AP (Geo-R1 few-shot). All predictions have the same
    confidence, so AP alone would forgive every box that follows the right ones. The question names
    one class, so labels are not compared."""
    def score(predicted: np.ndarray, target: np.ndarray) -> float:
        penalty = min(1.0, math.sqrt(len(target) / len(predicted)))
        return penalty * average_precision(predicted, target)

    return box_reward(answer, sample, score)


def mask_reward(answer: str, sample: Sample, sam: Sam | None = None, **_: object) -> float:
    """R = IoU of the predicted mask and the target mask (Geo-R1 few-shot). No target and an answer
    of none: 1. No target and an instance, even one with an empty mask: 0."""
    mask = predicted_mask(answer, sample, sam)
    if mask is None:
        return 0.0
    target = load_gt_mask(sample)
    union = (mask | target).sum()
    if not union:
        return float("{" not in answer)
    return float((mask & target).sum() / union)


def predicted_mask(answer: str, sample: Sample, sam: Sam | None = None) -> np.ndarray | None:
    """The (image_size, image_size) bool mask of an answer, the union of its instances' masks;
    None if it names neither instances nor `none`.

    An instance is an object `{"bbox_2d": [4 numbers], "keypoint1": [x, y], "keypoint2": [x, y]}`.
    SAM turns box and points into a mask, which is clipped to the box; without SAM the mask is the
    box. The order of the points does not matter, and a point without numbers is left out. An
    instance without a box, or with swapped corners, has an empty mask.
    """
    instances = re.findall(r"\{([^{}]*)\}", answer)
    boxes = parse_boxes(answer)
    if not instances and (boxes is None or len(boxes)):
        return None
    image_size = sample.image_size
    mask = np.zeros((image_size, image_size), bool)
    for text in instances[:100]:  # as many as COCO counts; each one may run SAM
        field = r'"(bbox_2d|keypoint[12])"\s{0,9}:\s{0,9}\[([^\[\]]*)\]'
        fields = dict(re.findall(field, text))
        box = obb_to_hbb(parse_box(fields.pop("bbox_2d", "")))
        x1, y1, x2, y2 = (round(min(max(v, 0), image_size)) for v in box)
        if x2 > x1 and y2 > y1:
            points = [point for point in map(parse_numbers, fields.values()) if len(point) == 2]
            inside = slice(y1, y2), slice(x1, x2)
            mask[inside] |= True if sam is None else sam(sample, box, points)[inside]
    return mask


def multiple_choice_reward(answer: str, sample: Sample, **_: object) -> float:
    """1 if the answer names the right candidate and no other (Geo-R1 cross-view), else 0.

    "B", "b", "(B)", "Image B is right" are read as B (the authors' regex takes neither "B)" nor a
    sentence). "A or B" is refused, and so is the article A beside another letter.
    """
    found = re.findall(r"(?<!\w)[A-Z](?!\w)", answer) or re.findall(r"^\W*([a-z])\W*$", answer)
    letters = {letter.upper() for letter in found}
    return float(letters & set(sample.choices) == {sample.gt_answer})


def count_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = 1 - |a - g| / max(a, g, 1) of the counts a and g; 0 without a count, or with several
    (RSThinker's formula with its alpha at 1, arXiv 2509.22221)."""
    count, target = parse_count(answer), parse_count(sample.gt_answer)
    return 0.0 if count is None else 1 - abs(count - target) / max(count, target, 1)


def geo_reward(answer: str, sample: Sample, **_: object) -> float:
    """R = linear in the great-circle distance between 1 at 0 km, 0.5 at 750, 0.2 at 2,500 and 0 at
    20,000 (Geo-R, arXiv 2601.00388). No latitude and longitude: 0."""
    distance = distance_km(answer, sample)
    return 0.0 if distance is None else float(np.interp(distance, *GEO_KNOTS))


def distance_km(answer: str | None, sample: Sample) -> float | None:
    """From the position of the answer to that of the sample; None if the answer has none."""
    position = parse_coordinates(answer or "")
    return position and great_circle_km(position, parse_coordinates(sample.gt_answer))


# --------------------------------------------------------------------------------------------------
# The parts of a reward

def accuracy_reward(answer: str | None, sample: Sample,
                    task_rewards: Mapping[str, Callable[..., float]] | None = None,
                    **context: object) -> float:
    """The accuracy reward of the sample's task, from task_rewards if it has one; 0 without an
    answer."""
    if answer is None:
        return 0.0
    reward = (task_rewards or {}).get(sample.task, TASKS[sample.task].reward)
    return reward(answer=answer, sample=sample, **context)


def length_reward(parts: Mapping[str, float], length_fraction: float, **_: object) -> float:
    """A cosine that falls as the completion grows: from 1 to 0.5 if the answer is right, from 0 to
    -0.5 if it is wrong.

    From arXiv 2502.03373, as Geo-R1 cross-view intends it. Its released code always takes the
    right answer's branch, and beyond the longest length its cosine rises again.
    """
    top, bottom = (1.0, 0.5) if parts["accuracy"] == 1 else (0.0, -0.5)
    length = min(max(length_fraction, 0.0), 1.0)
    return bottom + 0.5 * (top - bottom) * (1 + math.cos(math.pi * length))


def repetition_penalty(text: str, n: int = 6, **_: object) -> float:
    """-(1 - distinct / all) of the n-grams of words: 0 without repetition, towards -1 with nothing
    else (Geo-R1 cross-view)."""
    words = text.lower().split()
    ngrams = list(zip(*(words[i:] for i in range(n))))
    return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0


def score_completion(text: str, sample: Sample, length_fraction: float | None = None,
                     **reward_models: Callable | Mapping | None) -> dict[str, float]:
    """A completion's reward by parts, {name: value}: those of REWARD_PARTS that its task has.

    length_fraction  known in training only; without it the parts that are train_only are left out
    reward_models    what load_reward_models returned: sbert, sam and task_rewards
    Raises ValueError for a reward function that raises, or that returns no finite number.
    """
    answer, think = extract_answer(text), extract_think(text)
    parts = {}
    for name, part in REWARD_PARTS.items():
        is_used = not part.train_only or length_fraction is not None
        if is_used and (part.tasks is None or sample.task in part.tasks):
            parts[name] = finite_reward(name, part.compute, answer=answer, sample=sample, text=text,
                                        think=think, length_fraction=length_fraction, parts=parts,
                                        **reward_models)
    return parts


def finite_reward(name: str, compute: Callable[..., float], *, answer: str | None, sample: Sample,
                  **context: object) -> float:
    """One part of a reward. Raises ValueError, which names part and sample, if its function raises
    or returns no finite number: one NaN would reach all weights."""
    part = f"the reward part {name} of task {sample.task}"
    said = "no answer" if answer is None else f"the answer {answer[:100]!r}"
    where = f"for sample {sample.id} and {said}"
    try:
        value = compute(answer=answer, sample=sample, **context)
    except UserError:  # of the sample's files
        raise
    except Exception as error:
        raise ValueError(f"{part} raised {first_line(error)}, {where}") from error
    if not (isinstance(value, Real) and math.isfinite(value)):
        hint = "" if isinstance(value, Real) else "; return float(..)"
        raise ValueError(f"{part} returned {value!r}, expected a finite Python number, {where}"
                         f"{hint}")
    return float(value)


class RewardPart(NamedTuple):
    compute: Callable[..., float]
    tasks: set[str] | None = None         # None: all
    train_only: bool = False              # not in evaluate.py and not in the held-out rewards


# A part that is added here gets a flag --NAME-weight, a metric of each training step, a line
# NAME_reward in evaluate.py and a row of the held-out rewards. It may read the `parts` above it.
REWARD_PARTS = {
    "format": RewardPart(format_reward),
    "accuracy": RewardPart(accuracy_reward),
    "length": RewardPart(length_reward, tasks={"pair"}, train_only=True),
    "repetition": RewardPart(repetition_penalty, tasks={"pair"}, train_only=True),
}


class Task(NamedTuple):
    reward: Callable[..., float]
    scores: tuple[str, ...]  # functions of metrics/benchmarks.py


# A new task is a line here and a line of INSTRUCTIONS in sample.py.
TASKS = {
    "cls": Task(exact_match_reward, ("accuracy",)),
    "mlc": Task(label_overlap_reward, ("multilabel",)),
    "det": Task(detection_reward, ("box_precision", "matched_boxes", "coco_ap")),
    "rcap": Task(hybrid_reward, ("rouge", "meteor")),
    "ground": Task(grounding_reward, ("box_precision", "rouge", "meteor")),
    "cap": Task(levenshtein_reward, ("rouge", "meteor")),
    "change": Task(hybrid_reward, ("rouge", "meteor")),
    "vqa": Task(jaccard_reward, ("accuracy_by_type",)),
    "rec": Task(iou_reward, ("box_accuracy",)),
    "ovd": Task(count_penalised_ap_reward, ("coco_ap",)),
    "seg": Task(mask_reward, ("mask_iou",)),
    "pair": Task(multiple_choice_reward, ("choice_accuracy",)),
    "count": Task(count_reward, ("count_error",)),
    "geo": Task(geo_reward, ("geo_accuracy",)),
}
