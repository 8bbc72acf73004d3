"""What has been published: the rows of the papers' tables.

Sources: GeoVLM-R1 (arXiv 2509.25026, tables of its project page; all its benchmarks), Geo-R1
few-shot (arXiv 2509.21976, tables 2 and 5), Geo-R1 cross-view (arXiv 2510.00072) and Geo-R (arXiv
2601.00388). The tables call token recall accuracy and box precision mAP@0.5; here the columns have
the names of benchmarks.py.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from boxes import convert_box, format_boxes
from metrics.benchmarks import box_precision, in_percent
from runtime.errors import warn
from sample import Sample

TEXT = ("rouge1", "rougeL", "meteor")
BOX_PRECISION = tuple(f"box_precision@0.5_{subset}"
                      for subset in ("small", "medium", "large", "single", "multiple"))
BOX_ACCURACY = tuple(f"accuracy@{t}{subset}"
                     for subset in ("_unique", "_non-unique", "") for t in (0.5, 0.7))
PAIR_CHOICES = 5  # not printed; inferred from the 19.0 % of the base model, "nearly random"
GEO_ACCURACY = tuple(f"accuracy@{km}km" for km in (1, 25, 200, 750, 2500))


def parse_table(task: str, scores: tuple[str, ...], text: str) -> dict[str, tuple]:
    """A table as printed: a line of benchmarks, then a line for each model; columns are separated
    by two or more blanks, the scores in a cell by slashes, and - is what was not printed."""
    (_, *benchmarks), *lines = (re.split(r"\s{2,}", line.rstrip())
                                for line in text.strip("\n").split("\n"))
    rows = {benchmark: {} for benchmark in benchmarks}
    for model, *cells in lines:
        for benchmark, cell in zip(benchmarks, cells, strict=True):
            if cell != "-":
                rows[benchmark][model] = tuple(None if value == "-" else float(value)
                                               for value in cell.split("/"))
    return {benchmark: (task, scores, rows[benchmark]) for benchmark in benchmarks}


# benchmark -> (task, names of its scores, {model: values in percent, or in the score's own unit})
BENCHMARKS: dict[str, tuple[str, tuple[str, ...], dict[str, tuple[float | None, ...]]]] = {
    **parse_table("cls", ("token_recall",), """
               aid    ucm    whu19  fmow
GPT-4o         74.73  88.76  91.14  21.43
InternVL-8B    60.40  58.23  79.30  21.04
Qwen2.5-VL-3B  58.27  60.86  78.21  34.36
GeoChat        72.03  84.43  80.09  59.20
EarthDial      88.76  92.42  96.21  70.03
GeoVLM-R1      88.46  97.81  97.91  76.93"""),
    **parse_table("mlc", ("token_recall",), """
               bigearthnet
GPT-4o         49.00
InternVL-8B    19.73
Qwen2.5-VL-3B  24.75
GeoChat        20.35
EarthDial      73.03
GeoVLM-R1      80.91"""),  # EarthDial's own paper says 68.82
    **parse_table("cls", ("token_recall",), """
               xbd-region1  xbd-region2  xbd-image1  xbd-image2  xbd-image3
GPT-4o         51.68        71.62        67.95       75.45       70.41
InternVL2-8B   14.39        58.33        51.44       61.52       51.12
Qwen2.5-VL-3B  71.19        59.69        51.44       56.16       41.26
GeoChat        25.30        57.65        53.32       52.19       49.51
EarthDial      53.70        83.09        96.37       82.85       54.01
GeoVLM-R1      81.36        83.55        98.93       86.39       68.60"""),
    **parse_table("det", BOX_PRECISION, """
              geochat-det                    nwpu-det
InternVL2-4B  6.3/24.37/37.38/24.96/11.72    7.1/12.68/25.48/22.96/8.1
InternVL2-8B  7.20/23.76/31.99/25.77/9.30    4.26/11.85/20.72/21.66/5.86
GeoChat       2.9/13.6/21.7/16/4.3           2.5/3.2/14.7/13.23/1.9
EarthDial     11.43/31.76/39.07/34.29/13.41  11.66/14.21/23.12/25.37/8.9
GeoVLM-R1     36.02/54.72/55.03/57.1/35.04   34.44/48.76/64.91/55.97/41.45"""),
    **parse_table("det", ("box_precision@0.5", "box_precision@0.25"), """
              xbd-det      xbd-refer
GPT-4o        .2/2.15      -
InternVL2-8B  .6/1.07      -/.7
GeoChat       1.15/7.2     .2/3.09
EarthDial     7.6/21.11    5.1/13.09
GeoVLM-R1     38.15/48.13  24.52/34.52"""),
    **parse_table("rcap", TEXT, """
              geochat-rcap       nwpu-rcap
GPT-4o        9.41/7.6/8.02      17.68/11.81/9.63
InternVL2-8B  10.58/9.06/8.5     11.88/9.63/7.7
GeoChat       72.77/72.74/61.9   62.02/62.02/53.31
EarthDial     73.38/73.34/62.72  72.14/72.14/60.01
GeoVLM-R1     75.92/75.9/66.43   72.10/72.10/55.49"""),
    **parse_table("ground", ("box_precision@0.5", "box_precision@0.25", *TEXT), """
              nwpu-ground
GPT-4o        .7/6.1/14.72/10.82/9.41
InternVL2-4B  10.6/29.87/30.67/29.09/21.92
GeoChat       2.2/15.27/21.46/20.74/21.38
EarthDial     17.07/41.00/27.05/26.35/23.12
GeoVLM-R1     38.74/61.45/31.31/30.08/26.10"""),
    **parse_table("change", TEXT, """
               dubai-cc           levir-mci          muds               sysu               xbd-caption
GPT-4o         8.81/7.45/18.68    10.33/8.4/22.05    14.18/11.02/20.92  16.48/12.32/17.49  14.21/10.35/19.52
InternVL2-4B   7.31/6.38/21.12    8.88/7.43/22.14    10.25/7.90/17.73   13.27/9.98/14.36   -
InternVL2-8B   -                  -                  -                  -                  13.89/10.37/14.92
Qwen2.5-VL-3B  14.41/13.62/27.59  12.27/10.11/26.11  12.13/9.30/18.22   13.61/10.34/16.06  11.98/8.12/19.94
GeoChat        14.21/14.19/28.91  17.15/35.42/12.35  12.28/12.23/15.98  13.45/12.02/13.96  14.18/10.67/12.20
EarthDial      31.94/30.66/55.83  33.78/30.47/74.80  28.16/24.03/33.56  18.03/17.42/14.98  87.26/87.26/88.53
GeoVLM-R1      36.60/34.15/61.22  37.85/34.02/73.56  34.07/27.65/45.94  19.64/18.46/15.45  92.26/92.26/93.37"""),
    # On LEVIR-MCI the table prints a ROUGE-L above the ROUGE-1 for GeoChat.
    **parse_table("cap", TEXT, """
               nwpu-captions      rsicd              rsitmd
GPT-4o         19.43/14.86/28.16  20.53/15.59/26.03  18.31/14.22/24.83
InternVL2-8B   20.69/15.64/30.18  21.59/16.13/28.17  18.91/14.65/26.02
Qwen2.5-VL-3B  18.82/14.72/26.79  21.37/16.42/26.53  18.79/15.02/25.05
GeoChat        14.86/12.54/15.21  13.48/11.59/12.39  13.41/11.50/12.33
EarthDial      45.84/39.96/80.61  33.77/27.61/56.18  26.74/21.72/34.06
GeoVLM-R1      46.94/40.96/82.00  34.64/28.63/56.54  30.62/25.39/39.07"""),
    **parse_table("vqa", ("presence", "comp", "rural_urban", "average"), """
               rsvqa-lr
MiniGPTv2      55.16/55.22/39/54.96
Qwen2-VL       38.57/67.59/61/55.35
InternVL2-8B   58.54/72.28/71/66.51
Qwen2.5-VL-3B  59.59/75.04/63/68.40
GeoChat        91.09/90.33/94/90.70
LHRS-Bot       88.51/90.00/89.07/89.19
TeoChat        91.70/92.70/94/92.29
EarthDial      92.58/92.75/94/92.70
GeoVLM-R1      91.81/93.20/96/92.66"""),
    **parse_table("vqa", ("presence", "comp", "average"), """
               rsvqa-hr
MiniGPTv2      40.79/50.91/46.46
Qwen2-VL       66.44/60.41/63.06
InternVL2-8B   67.35/76.91/72.70
Qwen2.5-VL-3B  59.89/72.26/66.81
GeoChat        58.45/83.19/72.30
EarthGPT       62.77/79.53/72.06
TeoChat        67.50/81.10/75.04
EarthDial      58.89/83.11/72.45
GeoVLM-R1      66.38/82.26/75.27"""),
    **parse_table("rec", BOX_ACCURACY, """
                           vrsbench
LLaVA-1.5, 36313 samples   51.10/16.40/34.80/11.50/41.60/13.60
Mini-Gemini, 36313 samples  -/-/-/-/30.10/6.80
MiniGPT-v2, 36313 samples  -/-/-/-/35.80/16.80
GeoChat, 36313 samples     57.40/22.60/44.50/18.00/49.80/19.90
GPT-4V                     8.60/2.20/2.50/0.40/5.10/1.10
Qwen2.5-VL-3B              43.10/25.10/33.46/18.01/37.48/20.97
Qwen2.5-VL-3B, thinking    46.18/26.90/35.22/18.87/39.79/22.22
SFT, 36313 samples         66.54/36.77/60.32/36.30/62.91/36.50
SFT, 1 shot                34.32/18.87/31.62/16.35/32.75/17.40
SFT, 5 shots               36.98/16.61/33.94/17.17/35.21/16.94
SFT, 10 shots              41.81/18.59/35.78/17.20/38.29/17.78
Geo-R1 (GRPO), 1 shot      52.17/31.18/41.21/23.04/45.78/26.43
Geo-R1 (DAPO), 1 shot      51.72/31.68/42.13/24.50/46.13/27.50
Geo-R1 (GRPO), 5 shots     54.11/31.35/42.98/23.98/47.62/27.06
Geo-R1 (DAPO), 5 shots     55.73/32.19/44.19/24.86/49.00/27.92
Geo-R1 (GRPO), 10 shots    57.27/35.61/45.81/27.03/50.59/30.61
Geo-R1 (DAPO), 10 shots    59.49/37.11/47.91/28.07/52.74/31.84"""),
    # Trained on VRSBench and on EarthReason. That the columns are these two scores is inferred: they
    # are the scores of the tasks. The baseline of rec is headed SegEarth-R1 and called SFT in the text.
    **parse_table("rec", ("accuracy@0.5",), """
                   dior-rsvg
SFT, 1 shot        32.35
SFT, 5 shots       34.52
SFT, 10 shots      34.86
Geo-R1, 1 shot     37.27
Geo-R1, 5 shots    40.57
Geo-R1, 10 shots   40.38"""),
    **parse_table("seg", ("giou",), """
                       rrsis-d
SegEarth-R1, 1 shot    18.77
SegEarth-R1, 5 shots   20.29
SegEarth-R1, 10 shots  24.27
Geo-R1, 1 shot         32.11
Geo-R1, 5 shots        36.41
Geo-R1, 10 shots       37.83"""),
    **parse_table("pair", ("accuracy", "completion_tokens"), """
               cross-view
Qwen2.5-VL-7B  19.0/204.6
Geo-SFT        23.1/1127.6
Geo-R1-Zero    78.1/587.4
Geo-R1         82.4/378.8"""),
    **parse_table("geo", ("median_km",), """
         imageo-gss
GeoCLIP  266.90
Geo-R1   69.40"""),
    **parse_table("geo", ("accuracy@1km", "accuracy@2500km"), """
          mp16-reason
GLOBE-7B  17.99/92.52
Geo-R1    17.98/93.56"""),
    **parse_table("geo", GEO_ACCURACY, """
        im2gps3k
Geo-R   18.10/41.53/58.31/75.33/86.42"""),
}


def table(benchmark: str, scores: dict[str, float], samples: Sequence[Sample] = ()) -> str:
    """The published rows of a benchmark and one of `scores`, shares in percent. A last
    row is the envelope_scores of the samples, where it counts in a column. Warns of another number
    of candidates in pair."""
    task, names, rows = BENCHMARKS[benchmark]
    numbers = sorted({len(sample.choices) for sample in samples})
    if task == "pair" and numbers not in ([], [PAIR_CHOICES]):
        warn(f"warning: these questions have {' or '.join(map(str, numbers))} candidates, the "
             f"published rows most likely {PAIR_CHOICES} (--choices {PAIR_CHOICES})")
    found = {"this run": scores}
    envelopes = envelope_scores(samples)
    if envelopes.keys() & set(names):
        found["perfect horizontal answers"] = envelopes
    ours = {row: tuple(in_percent(name, values[name]) if name in values else None
                       for name in names)
            for row, values in found.items()}
    lines = [(benchmark, *names)]
    for model, values in (rows | ours).items():
        lines.append((model, *("-" if value is None else f"{value:.2f}" for value in values)))
    first, *widths = (max(map(len, column)) for column in zip(*lines))
    return "\n".join("  ".join([model.ljust(first), *map(str.rjust, cells, widths)])
                     for model, *cells in lines)


def envelope_scores(samples: Sequence[Sample]) -> dict[str, float]:
    """box_precision of answers that are the horizontal envelopes of oriented targets, in whole
    pixels of the paper's 448 x 448. {} if no target is turned.

    A box at 45 degrees fills half of its envelope or less. So a model whose horizontal answers are
    perfect scores this, not 1, in the columns that count oriented IoU (a box that is smaller than
    the envelope can score more).
    """
    if not any(box[4] for sample in samples for box in sample.gt_boxes):
        return {}
    at_448 = []
    for sample in samples:
        boxes = tuple(convert_box(box, (sample.image_size,) * 2, (448, 448))
                      for box in sample.gt_boxes)
        at_448.append(replace(sample, image_size=448, gt_boxes=boxes))
    return box_precision([format_boxes(sample.gt_boxes, 448) for sample in at_448], at_448)
