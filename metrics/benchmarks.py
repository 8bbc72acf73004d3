"""Scores of a whole set. rewards.TASKS names the scorers of each task.

    scorer(answers, samples, **reward_models) -> {name: value}, values in [0, 1] but for NO_SHARES

An answer is the text in <answer>, or None. What the tables of EarthDial and GeoVLM-R1 print is
computed as in EarthDial's released scripts, which reproduces the published numbers, under a name
that says what it is. Next to it is what the table's heading promises.
"""

import importlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from types import ModuleType

import numpy as np
from scipy.optimize import linear_sum_assignment

from boxes import iou_matrix, obb_to_hbb, oriented_iou_matrix, parse_box, parse_boxes
from rewards import (
    Sam,
    distance_km,
    exact_match_reward,
    extract_answer,
    extract_think,
    iou_reward,
    multiple_choice_reward,
    predicted_mask,
)
from runtime.errors import UserError, first_line, warn
from sample import BOX_TASKS, Sample, gt_hbbs, gt_obbs, gt_texts_of, load_gt_mask
from texts import EARTH_RADIUS, parse_count, parse_labels, tokenize

Answers = Sequence[str | None]
Samples = Sequence[Sample]
Scores = dict[str, float]

NO_SHARES = ("words", "completion_tokens", "absolute_error", "median_km")  # in units of their own


def in_percent(name: str, value: float) -> float:
    """A score as tables show it: 100 times as much, but for NO_SHARES."""
    return value if name in NO_SHARES else 100 * value


def mean(values: Iterable[float]) -> float:
    """0 if there are none."""
    values = list(values)
    return float(np.mean(values)) if values else 0.0


def precision_recall_f1(hits: int, n_pred: int, n_gt: int) -> Scores:
    """0 where the denominator is 0."""
    return {"precision": float(hits / max(n_pred, 1)), "recall": float(hits / max(n_gt, 1)),
            "f1": float(2 * hits / max(n_pred + n_gt, 1))}


def import_package(module: str, package: str) -> ModuleType:
    """A module that only some scores need. Raises UserError that names its package if missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"a score of this task needs a package ({error}): pip install {package}")


# --------------------------------------------------------------------------------------------------
# Labels

def accuracy(answers: Answers, samples: Samples, **_: object) -> Scores:
    """`accuracy`: share of right labels; `token_recall`: what the tables print as accuracy."""
    right = mean(exact_match_reward(a or "", s) for a, s in zip(answers, samples))
    return {"accuracy": right, **token_recall(answers, samples)}


def multilabel(answers: Answers, samples: Samples, **_: object) -> Scores:
    """Precision, recall and F1 over all labels of the set; `token_recall` as for accuracy."""
    hits = n_pred = n_gt = 0
    for answer, sample in zip(answers, samples):
        predicted = parse_labels(answer or "", sample.choices)
        target = parse_labels(sample.gt_answer, sample.choices)
        hits += len(predicted & target)
        n_pred += len(predicted)
        n_gt += len(target)
    return precision_recall_f1(hits, n_pred, n_gt) | token_recall(answers, samples)


def token_recall(answers: Answers, samples: Samples) -> Scores:
    """|set(target) & set(answer)| / len(target), in Treebank tokens of the texts without blanks.

    One label is one token. In a list each comma is a token too, and the set keeps only one of them:
    three labels, all right, score 4 / 5.
    """
    recalls = []
    for answer, sample in zip(answers, samples):
        predicted = treebank_tokens((answer or "").lower().replace(" ", ""))
        target = treebank_tokens(sample.gt_answer.lower().replace(" ", ""))
        recalls.append(len(set(predicted) & set(target)) / max(len(target), 1))
    return {"token_recall": mean(recalls)}


def accuracy_by_type(answers: Answers, samples: Samples, **_: object) -> Scores:
    """Share of right answers for each question type; `average` is over all questions except counts
    and areas, as in the tables. `token_recall`, also without them, is what EarthDial's print."""
    right = [(s.subset, exact_match_reward(a or "", s)) for a, s in zip(answers, samples)]
    types = sorted({subset for subset, _ in right} - {""})
    scores = {name: mean(value for subset, value in right if subset == name) for name in types}
    apart = ("count", "area")
    others = [(a, s) for a, s in zip(answers, samples) if s.subset not in apart]
    if not others:
        return scores
    scores["average"] = mean(value for subset, value in right if subset not in apart)
    return scores | token_recall(*zip(*others))


def choice_accuracy(answers: Answers, samples: Samples, **_: object) -> Scores:
    """Share of right letters; `chance`: what blind guessing reaches, the mean of 1/k."""
    return {"accuracy": mean(multiple_choice_reward(a or "", s) for a, s in zip(answers, samples)),
            "chance": mean(1 / len(s.choices) for s in samples)}


# --------------------------------------------------------------------------------------------------
# Numbers

def count_error(answers: Answers, samples: Samples, **_: object) -> Scores:
    """`exact`: share of right counts; `absolute_error`: the mean of |a - g|, where an answer without
    a count is a 0."""
    pairs = [(parse_count(a or ""), parse_count(s.gt_answer)) for a, s in zip(answers, samples)]
    return {"exact": mean(count == target for count, target in pairs),
            "absolute_error": mean(abs((count or 0) - target) for count, target in pairs)}


def geo_accuracy(answers: Answers, samples: Samples, **_: object) -> Scores:
    """Share of positions within 1, 25, 200, 750 and 2,500 km (street, city, region, country,
    continent), and the median distance. An answer without a position is on the other side of the
    Earth."""
    found = [distance_km(answer, sample) for answer, sample in zip(answers, samples)]
    distances = [np.pi * EARTH_RADIUS if distance is None else distance for distance in found]
    scores = {f"accuracy@{km}km": mean(distance <= km for distance in distances)
              for km in (1, 25, 200, 750, 2500)}
    return scores | {"median_km": float(np.median(distances)) if distances else 0.0}


# --------------------------------------------------------------------------------------------------
# Reasoning

def think_agreement(completions: Sequence[str], samples: Samples) -> Scores:
    """`think_agreement`: the share of answers that agree with what their reasoning says, right or
    wrong, of those for which a rule can tell; `think_stated`: the share of these in all. {} if the
    rule applies to none.

    Tasks with boxes: if the reasoning states one number, the answer has as many boxes ("7 to
    find."). count: the answer is that number. cls: if the reasoning names classes of the set, the
    answer is one of them.
    """
    def words(text: str) -> str:
        return f" {' '.join(tokenize(text))} "

    classes = {words(sample.gt_answer) for sample in samples}
    agrees = []
    for completion, sample in zip(completions, samples):
        think, answer = extract_think(completion), extract_answer(completion) or ""
        stated = parse_count(re.sub("nothing to find", "0", think, flags=re.IGNORECASE))
        if answer and sample.task == "cls":
            named = {name for name in classes | {words(answer)} if name in words(think)}
            agrees += [words(answer) in named] if named else []
        elif answer and sample.task == "count" and stated is not None:
            agrees.append(parse_count(answer) == stated)
        elif answer and sample.task in BOX_TASKS and stated is not None:
            num_boxes = answer.count("bbox_2d") or len(re.findall(r"\[[^\[\]]*\d", answer))
            agrees.append(num_boxes == stated)
    if not agrees:
        return {}
    return {"think_agreement": mean(agrees), "think_stated": len(agrees) / len(samples)}


# --------------------------------------------------------------------------------------------------
# Boxes: x1, y1, x2, y2 in pixels of the resized image, theta in degrees. Target boxes count as
# published, not clipped to the image, but for box_accuracy, which is the reward's IoU.

def parse_oriented_boxes(answer: str | None) -> np.ndarray:
    """The boxes of an answer, (n, 5); four numbers are a horizontal box. A bracket that is no box,
    or has no area, was predicted, so it counts: as an empty box that overlaps nothing. Not
    parse_boxes of the rewards: published scorers want no `none`, and no largest number of boxes."""
    brackets = re.findall(r"\[([^\[\]]*)\]", answer or "")
    return np.array([parse_box(text) for text in brackets if text.strip()]).reshape(-1, 5)


def box_ious(answer: str | None, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """IoU of each box of the answer with each target box, twice (n, m): of the oriented boxes, and
    of their horizontal envelopes."""
    predicted = parse_oriented_boxes(answer)
    envelopes = np.array([obb_to_hbb(box) for box in predicted]).reshape(-1, 4)
    return (oriented_iou_matrix(predicted, gt_obbs(sample)),
            iou_matrix(envelopes, gt_hbbs(sample)))


def box_precision(answers: Answers, samples: Samples, **_: object) -> Scores:
    """What the tables print as mAP: the share of predicted boxes that overlap *any* target box with
    an IoU of t or more. Two boxes on one object are two hits, and a missed object costs nothing.

    At 0.5 also by object size and by one or several targets (no target counts as several, as in
    EarthDial's scorer). `hbb_precision`: the same for the envelopes.
    """
    hits, boxes = Counter(), Counter()
    for answer, sample in zip(answers, samples):
        suffixes = ["", "_single" if len(sample.gt_boxes) == 1 else "_multiple"]
        if sample.subset:
            suffixes.append(f"_{sample.subset}")
        thresholds = {f"@0.5{suffix}": 0.5 for suffix in suffixes} | {"@0.25": 0.25}
        for name, ious in zip(("box_precision", "hbb_precision"), box_ious(answer, sample)):
            best = ious.max(1, initial=0)
            for key, threshold in thresholds.items():
                hits[name + key] += int((best >= threshold).sum())
                boxes[name + key] += len(best)
    return {key: hits[key] / max(boxes[key], 1) for key in sorted(boxes)}


def matched_boxes(answers: Answers, samples: Samples, **_: object) -> Scores:
    """Precision, recall and F1 over all boxes of the set. Hits are the largest number of pairs with
    an IoU of 0.5 or more that one-to-one matching can make."""
    counts = {"matched": np.zeros(3, int), "hbb_matched": np.zeros(3, int)}
    for answer, sample in zip(answers, samples):
        for name, ious in zip(counts, box_ious(answer, sample)):
            is_close = ious >= 0.5
            hits = is_close[linear_sum_assignment(is_close, maximize=True)].sum()
            counts[name] += (hits, *is_close.shape)  # hits, predicted, target boxes
    return {f"{name}_{key}": value for name, count in counts.items()
            for key, value in precision_recall_f1(*count).items()}


def coco_ap(answers: Answers, samples: Samples, **_: object) -> Scores:
    """COCO's AP (IoU 0.5 to 0.95) and AP50 of the horizontal boxes, by pycocotools.

    A sample is an image, its category the class asked for. All boxes have the same confidence, so
    they rank in the order of the set. Where there is no target every box is false. A category
    without any target in the set has no AP and is left out of the mean (0 if there is no other).
    """
    cocoeval = import_package("pycocotools.cocoeval", "pycocotools")
    parsed = [parse_boxes(answer or "") for answer in answers]
    boxes = [np.zeros((0, 4)) if boxes is None else boxes for boxes in parsed]
    gt_boxes = [gt_hbbs(sample) for sample in samples]
    with redirect_stdout(io.StringIO()):
        coco = cocoeval.COCOeval(coco_index(gt_boxes, samples), coco_index(boxes, samples), "bbox")
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    ap, ap50 = coco.stats[:2]  # -1: there is no target
    return {"ap": max(float(ap), 0.0), "ap50": max(float(ap50), 0.0)}


def coco_index(boxes_of_samples: Sequence[np.ndarray], samples: Samples) -> object:
    """pycocotools' index of the horizontal boxes (n, 4) of each sample."""
    categories = sorted({sample.category for sample in samples})
    category_ids = {name: i for i, name in enumerate(categories, 1)}
    annotations = []
    for i, boxes in enumerate(boxes_of_samples):
        for x1, y1, x2, y2 in boxes.tolist():
            annotations.append({
                "id": len(annotations) + 1,  # from 1: pycocotools reads 0 as "no match"
                "image_id": i, "category_id": category_ids[samples[i].category], "iscrowd": 0,
                "score": 1.0, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
    index = import_package("pycocotools.coco", "pycocotools").COCO()
    index.dataset = {"images": [{"id": i} for i in range(len(samples))],
                     "categories": [{"id": i} for i in category_ids.values()],
                     "annotations": annotations}
    index.createIndex()
    return index


def box_accuracy(answers: Answers, samples: Samples, **_: object) -> Scores:
    """Share of samples whose one box has an IoU of more than t: all, and by unique and non-unique
    objects. An answer of several boxes is wrong."""
    ious = [(s.subset, iou_reward(a or "", s)) for a, s in zip(answers, samples)]
    scores = {f"accuracy@{t}": mean(iou > t for _, iou in ious) for t in (0.5, 0.7)}
    for name in sorted({subset for subset, _ in ious} - {""}):
        for t in (0.5, 0.7):
            scores[f"accuracy@{t}_{name}"] = mean(iou > t for subset, iou in ious if subset == name)
    return scores


def mask_iou(answers: Answers, samples: Samples, sam: Sam | None = None, **_: object) -> Scores:
    """`giou`: the mean IoU of the masks; `ciou`: all intersections over all unions.

    As in Geo-R1's released evaluation two empty masks have an IoU of 0, though that answer is right
    (LISA counts 1). An answer without a mask has an empty one.
    """
    areas = np.zeros((len(samples), 2))  # intersection, union
    for i, (answer, sample) in enumerate(zip(answers, samples)):
        target = load_gt_mask(sample)
        mask = predicted_mask(answer or "", sample, sam)
        if mask is None:
            mask = np.zeros_like(target)
        areas[i] = (mask & target).sum(), (mask | target).sum()
    intersections, unions = areas.T
    return {"giou": mean(intersections / unions.clip(1)),
            "ciou": float(intersections.sum() / unions.sum().clip(1))}


# --------------------------------------------------------------------------------------------------
# Texts

def treebank_tokens(text: str) -> list[str]:
    """Words and punctuation as nltk's word_tokenize splits them, without the sentence model that it
    downloads: here a sentence ends at . ! ? before a blank. Only there is a full stop a token."""
    tokenizer = import_package("nltk.tokenize", "nltk").NLTKWordTokenizer()
    return [token for sentence in re.split(r"(?<=[.!?])\s+", text)
            for token in tokenizer.tokenize(sentence)]


def earthdial_tokens(text: str, task: str) -> list[str]:
    """What EarthDial's scorers compare: Treebank tokens of captions, else the words between blanks;
    a grounding description without its tags and boxes."""
    if task in ("cap", "change"):
        return treebank_tokens(text)
    if task == "ground":
        text = re.sub(r"</?(?:ref|box)>|\[[\[\]\d\s,.-]*\]", "", text)
    return text.split()


def rouge(answers: Answers, samples: Samples, **_: object) -> Scores:
    """F1 of ROUGE-1 and ROUGE-L (Lin 2004) with stemmed words; the mean over several reference
    texts, as in EarthDial's scorer."""
    names = ("rouge1", "rougeL")
    rouge_score = import_package("rouge_score.rouge_scorer", "rouge-score")
    scorer = rouge_score.RougeScorer(list(names), use_stemmer=True)
    values = {name: [] for name in names}  # of each sample
    for answer, sample in zip(answers, samples):
        answer = " ".join(earthdial_tokens(answer or "", sample.task))
        references = [" ".join(earthdial_tokens(t, sample.task)) for t in gt_texts_of(sample)]
        scores = [scorer.score(reference, answer) for reference in references]
        for name in names:
            values[name].append(mean(score[name].fmeasure for score in scores))
    return {name: mean(values[name]) for name in names}


def meteor(answers: Answers, samples: Samples, **_: object) -> Scores:
    """METEOR of the best reference text, by nltk. It needs WordNet for synonyms: without it there
    is no score, and a line on stderr."""
    meteor_score = import_package("nltk.translate.meteor_score", "nltk").meteor_score
    try:
        import_package("nltk.corpus", "nltk").wordnet.ensure_loaded()
    except (LookupError, OSError, ValueError) as error:
        missing = isinstance(error, LookupError)
        reason = "is missing" if missing else f"cannot be read ({first_line(error)})"
        warn(f"no METEOR: WordNet {reason}; run `python -m nltk.downloader wordnet`, or copy the "
             "files of Debian's wordnet-base and wordnet-sense-index, and a `lexnames`, to "
             "corpora/wordnet in a folder that NLTK_DATA names")
        return {}
    values = []
    for answer, sample in zip(answers, samples):
        references = [earthdial_tokens(text, sample.task) for text in gt_texts_of(sample)]
        values.append(meteor_score(references, earthdial_tokens(answer or "", sample.task)))
    return {"meteor": mean(values)}
