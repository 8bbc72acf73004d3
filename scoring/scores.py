"""Scores of a whole set: (answers, Samples) -> {name: value in [0, 1]}. `rewards.TASKS` says which ones a task has.

An answer is the text within <answer>, or None. What stands in the tables of EarthDial and GeoVLM-R1 is computed as
EarthDial's released scripts do, which reproduces their figures, under a name that says what it is; beside it stands what
the table's heading promises.
"""

import importlib
import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from types import ModuleType

import numpy as np
from scipy.optimize import linear_sum_assignment

from data import BadInput, Sample, first_line
from rewards import (
    choice_reward,
    horizontal,
    iou_matrix,
    iou_reward,
    named_labels,
    parse_boxes,
    predicted_mask,
    read_box,
    recall_reward,
    reference_boxes,
    reference_mask,
    references,
)

Answers = Sequence[str | None]


def mean(values: Iterable[float]) -> float:
    """0 if there are none."""
    values = list(values)
    return float(np.mean(values)) if values else 0.0


def precision_recall_f1(hits: int, n_pred: int, n_ref: int) -> dict[str, float]:
    """0 where there is nothing to divide by."""
    return {"precision": float(hits / max(n_pred, 1)), "recall": float(hits / max(n_ref, 1)),
            "f1": float(2 * hits / max(n_pred + n_ref, 1))}


def package(module: str, name: str) -> ModuleType:
    """A module that only some scores need. Raises BadInput, with the name of its package, if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(f"a score of this task needs a package ({error}): pip install {name}")


# ----------------------------------------------------------------------------------------------------------------------
# Labels

def accuracy(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """Share of right labels, `accuracy`; and `token_recall`, which the tables print as accuracy."""
    return {"accuracy": mean(recall_reward(a or "", s) for a, s in zip(answers, samples))} | token_recall(answers, samples)


def multilabel(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """Precision, recall and F1 of all labels named in the set; and `token_recall`, which the tables print as accuracy."""
    pairs = [(named_labels(a or "", s.choices), named_labels(s.answer, s.choices)) for a, s in zip(answers, samples)]
    counts = np.array([(len(named & right), len(named), len(right)) for named, right in pairs]).reshape(-1, 3).sum(0)
    return precision_recall_f1(*counts) | token_recall(answers, samples)


def token_recall(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """|set(reference) & set(answer)| / len(reference), in Treebank tokens of the texts without blanks. One label is one
    token; in a list each comma is one too, of which the set keeps a single one: three labels, all right, score 4 / 5."""
    def recall(answer: str, reference: str) -> float:
        named, right = (treebank(text.lower().replace(" ", "")) for text in (answer, reference))
        return len(set(named) & set(right)) / max(len(right), 1)
    return {"token_recall": mean(recall(a or "", s.answer) for a, s in zip(answers, samples))}


def accuracy_by_type(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """Share of right answers of each type of question; `average` is that of all questions but counts, as in the tables."""
    right = [(s.subset, recall_reward(a or "", s)) for a, s in zip(answers, samples)]
    scores = {kind: mean(r for k, r in right if k == kind) for kind in sorted({k for k, _ in right} - {""})}
    return scores | {"average": mean(r for k, r in right if k != "count")}


def choice_accuracy(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """Share of right letters, beside what blind guessing reaches, the mean of 1/k."""
    return {"accuracy": mean(choice_reward(a or "", s) for a, s in zip(answers, samples)),
            "chance": mean(1 / len(s.choices) for s in samples)}


# ----------------------------------------------------------------------------------------------------------------------
# Boxes: x1, y1, x2, y2 in pixels of the frame, theta in degrees. References count as published, not cut to the frame.

def oriented_boxes(answer: str | None) -> np.ndarray:
    """The boxes of an answer, (n, 5); four numbers are an upright box. A bracket that is no box, or has no area, is kept as
    an empty box, which overlaps nothing: it was predicted, so it counts."""
    lists = re.findall(r"\[([^\[\]]*)\]", answer or "")
    return np.array([read_box(text) for text in lists if text.strip()]).reshape(-1, 5)


def polygons(boxes: np.ndarray) -> np.ndarray:
    """Turned boxes (n, 5), theta clockwise on the screen -> shapely polygons (n,), empty for those without area."""
    shapely = package("shapely", "shapely")
    centre, half = (boxes[:, :2] + boxes[:, 2:4]) / 2, (boxes[:, 2:4] - boxes[:, :2]) / 2
    cos, sin = np.cos(np.radians(boxes[:, 4])), np.sin(np.radians(boxes[:, 4]))
    turn = np.array([[cos, sin], [-sin, cos]]).transpose(2, 0, 1)             # (n, 2, 2), for row vectors, y down
    corners = half[:, None] * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])  # (n, 4, 2)
    shapes = shapely.polygons(corners @ turn + centre[:, None])
    shapes[~shapely.is_valid(shapes)] = shapely.Polygon()
    return shapes


def box_ious(answer: str | None, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """IoU of each of the answer's boxes with each reference, (n, m): as they are turned, and of their upright envelopes."""
    shapely = package("shapely", "shapely")
    predicted, reference = oriented_boxes(answer), np.array(sample.boxes, float).reshape(-1, 5)
    a, b = polygons(predicted)[:, None], polygons(reference)[None]
    intersection = shapely.area(shapely.intersection(a, b))
    oriented = intersection / np.maximum(shapely.area(a) + shapely.area(b) - intersection, 1e-9)
    envelopes = np.array([horizontal(box) for box in predicted]).reshape(-1, 4)
    return oriented, iou_matrix(envelopes, reference_boxes(sample))


def box_precision(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """What the tables print as mAP: the share of all predicted boxes that overlap *any* reference by an IoU of t or more.
    Two boxes on one object are two hits, and what was missed costs nothing. At 0.5 also by the size of the object and by one
    or several references (none counts as several, as in EarthDial's scorer). `upright_precision`: that of the envelopes."""
    hits, boxes = Counter(), Counter()
    for answer, sample in zip(answers, samples):
        groups = ["", "_single" if len(sample.boxes) == 1 else "_multiple"] + [f"_{sample.subset}"] * bool(sample.subset)
        for name, ious in zip(("box_precision", "upright_precision"), box_ious(answer, sample)):
            best = ious.max(1, initial=0)
            for key, t in [(f"{name}@0.5{group}", 0.5) for group in groups] + [(f"{name}@0.25", 0.25)]:
                hits[key] += int((best >= t).sum())
                boxes[key] += len(best)
    return {key: hits[key] / max(boxes[key], 1) for key in sorted(boxes)}


def matched_boxes(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """Precision, recall and F1 of all boxes of the set. Hits are as many pairs of an IoU of 0.5 or more as can be made, with
    each box in one pair at most."""
    counts = {"matched": np.zeros(3, int), "upright_matched": np.zeros(3, int)}  # hits, predicted, references
    for answer, sample in zip(answers, samples):
        for count, ious in zip(counts.values(), box_ious(answer, sample)):
            close = ious >= 0.5
            count += (close[linear_sum_assignment(close, maximize=True)].sum(), *close.shape)
    return {f"{kind}_{name}": v for kind, count in counts.items() for name, v in precision_recall_f1(*count).items()}


def coco_ap(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """COCO's AP (IoU 0.5 to 0.95) and AP50 of the upright boxes, by pycocotools. A sample is an image, its category the
    class asked for; all boxes are equally sure, so they rank in the order of the set. Where nothing is to be found every box
    is false; a category without any reference in the set has no AP and is left out of the mean (0 if there is no other)."""
    coco, cocoeval = package("pycocotools.coco", "pycocotools"), package("pycocotools.cocoeval", "pycocotools")
    category = {name: i for i, name in enumerate(sorted({s.category for s in samples}), 1)}

    def index(boxes_of_samples: list[np.ndarray]) -> "coco.COCO":
        rows = [(i, box) for i, boxes in enumerate(boxes_of_samples) for box in boxes.tolist()]
        data = coco.COCO()
        data.dataset = {
            "images": [{"id": i} for i in range(len(samples))], "categories": [{"id": i} for i in category.values()],
            "annotations": [{"id": n, "image_id": i, "category_id": category[samples[i].category], "score": 1.0, "iscrowd": 0,
                             "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                            for n, (i, (x1, y1, x2, y2)) in enumerate(rows, 1)]}  # from 1: pycocotools reads 0 as "no match"
        data.createIndex()
        return data

    predicted = [parse_boxes(a or "") for a in answers]
    with redirect_stdout(io.StringIO()):
        run = cocoeval.COCOeval(index([reference_boxes(s) for s in samples]),
                                index([np.zeros((0, 4)) if boxes is None else boxes for boxes in predicted]), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {"ap": max(float(run.stats[0]), 0.0), "ap50": max(float(run.stats[1]), 0.0)}  # -1: there is no reference


def box_accuracy(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """Share of samples whose one box has an IoU of more than t: all, and by unique and non-unique objects. An answer of
    several boxes is wrong."""
    ious = [(s.subset, iou_reward(a or "", s)) for a, s in zip(answers, samples)]
    scores = {f"accuracy@{t}": mean(iou > t for _, iou in ious) for t in (0.5, 0.7)}
    return scores | {f"accuracy@{t}_{subset}": mean(iou > t for kind, iou in ious if kind == subset)
                     for subset in sorted({kind for kind, _ in ious} - {""}) for t in (0.5, 0.7)}


def mask_iou(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """`giou`, the mean IoU of the masks, and `ciou`, all intersections over all unions. As in Geo-R1's released
    evaluation two empty masks have an IoU of 0, though to answer so is right (LISA counts 1); an answer without a mask is
    an empty one."""
    areas = np.zeros((len(samples), 2))  # intersection, union
    for i, (answer, sample) in enumerate(zip(answers, samples)):
        reference, mask = reference_mask(sample), predicted_mask(answer or "", sample)
        mask = np.zeros_like(reference) if mask is None else mask
        areas[i] = (mask & reference).sum(), (mask | reference).sum()
    return {"giou": mean(areas[:, 0] / areas[:, 1].clip(1)), "ciou": float(areas[:, 0].sum() / areas[:, 1].sum().clip(1))}


# ----------------------------------------------------------------------------------------------------------------------
# Texts

def treebank(text: str) -> list[str]:
    """Words and punctuation as nltk's word_tokenize parts them, without the model of sentences that it downloads: here a
    sentence ends at . ! ? before a blank. Only there is a full stop a token of its own."""
    tokenizer = package("nltk.tokenize", "nltk").NLTKWordTokenizer()
    return [token for sentence in re.split(r"(?<=[.!?])\s+", text) for token in tokenizer.tokenize(sentence)]


def tokens(text: str, task: str) -> list[str]:
    """What EarthDial's scorers compare: Treebank tokens of captions, else the words between blanks; of a grounding
    description without its tags and boxes."""
    if task in ("cap", "change"):
        return treebank(text)
    return (re.sub(r"</?(?:ref|box)>|\[[\[\]\d\s,.-]*\]", "", text) if task == "ground" else text).split()


def rouge(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """F1 of ROUGE-1 and ROUGE-L (Lin 2004) with stemmed words; of several references the mean, as in EarthDial's scorer."""
    scorer = package("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    figures = []  # (rouge1, rougeL) of each sample
    for answer, sample in zip(answers, samples):
        answer, *texts = (" ".join(tokens(text, sample.task)) for text in (answer or "", *references(sample)))
        scores = [scorer.score(text, answer) for text in texts]
        figures.append([mean(s[name].fmeasure for s in scores) for name in ("rouge1", "rougeL")])
    return {name: mean(f[i] for f in figures) for i, name in enumerate(("rouge1", "rougeL"))}


def meteor(answers: Answers, samples: Sequence[Sample]) -> dict[str, float]:
    """METEOR of the best reference, by nltk. It needs WordNet for synonyms: without it no figure, and a line on stderr."""
    score = package("nltk.translate.meteor_score", "nltk").meteor_score
    try:
        package("nltk.corpus", "nltk").wordnet.ensure_loaded()
    except (LookupError, OSError, ValueError) as error:
        reason = "is not there" if isinstance(error, LookupError) else f"cannot be read ({first_line(error)})"
        print(f"no METEOR: WordNet {reason}; run `python -m nltk.downloader wordnet`, or copy the files of Debian's "
              "wordnet-base and wordnet-sense-index, and a `lexnames`, to corpora/wordnet in a folder that NLTK_DATA names",
              file=sys.stderr)
        return {}
    return {"meteor": mean(score([tokens(text, s.task) for text in references(s)], tokens(a or "", s.task))
                           for a, s in zip(answers, samples))}
