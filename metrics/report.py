"""Model answers -> one HTML page: images with boxes, question, reasoning, answer and reward parts.

    python -m metrics.report runs/eval/predictions.jsonl    writes runs/eval/report.html
    python -m metrics.report runs/grpo/samples.jsonl        writes runs/grpo/report.html

The worst samples come first; the completions of a group are side by side. The page loads nothing.
The text of models and data is escaped, and the page's security policy runs no script but its own.
"""

import argparse
import base64
import hashlib
import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np

from boxes import parse_boxes
from data import sample_from_row
from readers.json_records import iter_json_records
from rewards import TAGS, extract_answer, format_reward
from runtime.errors import UserError
from sample import BOX_TASKS, Sample, gt_texts_of, load_images

RIGHT = 0.5                   # mean accuracy from which a sample counts as right
TARGET_COLOUR = "#1f93ff"     # of boxes; colour-blind readers can tell the two colours apart,
PREDICTED_COLOUR = "#ff8a1f"  # and predicted boxes are dashed

# A sample and its completions: "text", "parts" {name: value}; in a group "reward" and "advantage"
Entry = tuple[Sample, list[dict]]


def mean_accuracy(entry: Entry) -> float:
    """Mean of the completions' accuracy parts."""
    return float(np.mean([completion["parts"]["accuracy"] for completion in entry[1]]))


def write_report(path: Path, entries: Iterable[Entry], title: str, limit: int = 200) -> None:
    """Write the page, worst samples first; count unreadable images on stderr.

    Of more than `limit` entries the worst fill half of the page, and an even choice of the others
    the rest, so that there are right answers to see too.
    """
    ranked = sorted(entries, key=mean_accuracy)
    worst, others = ranked[: limit // 2], ranked[limit // 2 :]
    n_others = min(len(others), limit - len(worst))
    shown = worst + [others[i] for i in np.linspace(0, len(others) - 1, n_others, dtype=int)]
    missing = []
    cards = "\n".join(render_card(f"i{n}", entry, missing) for n, entry in enumerate(shown))
    if missing:
        print(f"{path}: {len(missing)} images are missing from the page; the first: {missing[0]}",
              file=sys.stderr)

    summary = f"{len(ranked)} samples"
    if ranked:
        summary += f", mean accuracy {np.mean([mean_accuracy(entry) for entry in ranked]):.3f}"
    if len(shown) < len(ranked):
        summary += f", here the {len(worst)} worst and {n_others} of the others"
    summary += f". Worst first; right is a mean accuracy of {RIGHT} or more."
    right = sum(mean_accuracy(entry) >= RIGHT for entry in shown)
    counts = Counter(sample.task for sample, _ in shown)
    tasks = "".join(f'<option value="{escape(task)}">{escape(task)} ({n})</option>'
                    for task, n in sorted(counts.items()))
    colours = f":root {{ --target: {TARGET_COLOUR}; --predicted: {PREDICTED_COLOUR}; }}"
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'">
<title>{escape(title)}</title>
<style>{colours}{STYLE}</style>
<header><h1>{escape(title)}</h1>
<p>{summary}</p>
<form><label>Task <select name="task"><option value="">all ({len(shown)})</option>{tasks}</select></label>
<label>Answer <select name="answer"><option value="">all</option><option value="right">right ({right})</option>
<option value="wrong">wrong ({len(shown) - right})</option></select></label> <output>{len(shown)} shown</output>
<span><svg viewBox="0 0 28 8"><path class="target" d="M2 4h24"/></svg> target</span>
<span><svg viewBox="0 0 28 8"><path class="predicted" d="M2 4h24"/></svg> prediction</span></form></header>
<main>
{cards}
</main>
<script>{SCRIPT}</script></html>
"""
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8", errors="replace")  # half an emoji is no UTF-8
    partial.replace(path)


def render_card(name: str, entry: Entry, missing: list[str]) -> str:
    """One sample. Its images are embedded once, as `name`-0, `name`-1.., and shown once, or for a
    group in a task with boxes once for each completion."""
    sample, completions = entry
    images = "".join(embed_image(f"{name}-{i}", replace(sample, images=(image,)), missing)
                     for i, image in enumerate(sample.images))
    each = sample.task in BOX_TASKS and len(completions) > 1
    once = "" if each else render_images(name, sample, completions[0]["text"])
    sections = ""
    for completion in completions:
        own = render_images(name, sample, completion["text"]) if each else ""
        sections += f"<section>{own}{render_completion(completion)}</section>"
    accuracy = mean_accuracy(entry)
    verdict = "right" if accuracy >= RIGHT else "wrong"
    kind = "one" if len(completions) == 1 else "group"
    labels = dict.fromkeys((sample.id, sample.subset, sample.category))
    about = " · ".join(escape(label) for label in labels if label)
    targets = "\n".join(map(escape, gt_texts_of(sample)))
    task = escape(sample.task)
    return f"""<article class="{kind}" data-task="{task}" data-answer="{verdict}"><svg hidden>{images}</svg>
<p><b>{task}</b> <b class="{verdict}">{verdict} {accuracy:.2f}</b> {about}</p>
<h2>{escape(sample.question)}</h2>
<div class="body">{once}<div class="words"><dl><dt>Target</dt><dd>{targets}</dd></dl>
<div class="answers">{sections}</div></div></div></article>"""


def render_completion(completion: dict) -> str:
    """Rewards, reasoning and answer of a completion, or its whole text if not in the format."""
    text = completion["text"]
    values = {name: f"{value:.2f}" for name, value in completion["parts"].items()}
    if "reward" in completion:
        values["reward"] = f"{completion['reward']:.2f}"
    if "advantage" in completion:
        values["advantage"] = f"{completion['advantage']:+.2f}"
    texts = {"Completion, not in the format": text}
    if format_reward(text):
        _, think, _, answer, _ = re.split("|".join(TAGS), text)
        texts = {"Reasoning": think, "Answer": answer}
    items = "".join(f"<li>{escape(name)} <b>{value}</b></li>" for name, value in values.items())
    terms = "".join(f"<dt>{name}</dt><dd>{escape(value.strip())}</dd>"
                    for name, value in texts.items())
    return f"<ul>{items}</ul><dl>{terms}</dl>"


def render_images(name: str, sample: Sample, text: str) -> str:
    """The sample's images, or an empty square, with the target boxes and those (seg: also the
    points) of a completion."""
    answer = extract_answer(text) or ""
    predicted, points = [], []
    if sample.task in BOX_TASKS:
        found = parse_boxes(answer)
        found = [] if found is None else found
        predicted = [box for box in found if box[2] > box[0]]  # a malformed box has no area
    if sample.task == "seg":
        points = re.findall(r"\[\s*(\d{1,6})\s*,\s*(\d{1,6})\s*\]", answer, re.ASCII)
    target_boxes = "".join(map(render_box, sample.gt_boxes))
    predicted_boxes = "".join(map(render_box, predicted))
    dots = "".join(f'<path d="M{x} {y}h0"/>' for x, y in points)
    overlay = (f'<g class="target">{target_boxes}</g>'
               f'<g class="predicted">{predicted_boxes}{dots}</g>')
    captions = [str(i + 1) for i in range(max(len(sample.images), 1))]
    if sample.task == "pair":
        captions = ["ground", *sample.choices]
    counts = f"{len(sample.gt_boxes)} target boxes, {len(predicted)} predicted"
    size, html = sample.image_size, ""
    for i, caption in enumerate(map(escape, captions)):
        html += (f'<figure><svg viewBox="0 0 {size} {size}" role="img" '
                 f'aria-label="image {caption}, {counts}"><use href="#{name}-{i}"/>{overlay}</svg>'
                 f'<figcaption>{caption if len(sample.images) > 1 else ""}</figcaption></figure>')
    return f'<div class="figures">{html}</div>'


def render_box(box: Sequence[float]) -> str:
    """SVG rectangle of (x1, y1, x2, y2[, theta]): pixels of the resized image; theta in degrees,
    clockwise on the screen."""
    x1, y1, x2, y2 = box[:4]
    turn = ""
    if len(box) > 4 and box[4]:
        turn = f' transform="rotate({box[4]:g} {(x1 + x2) / 2:g} {(y1 + y2) / 2:g})"'
    return f'<rect x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"{turn}/>'


def embed_image(name: str, sample: Sample, missing: list[str]) -> str:
    """The sample's only image as an SVG element `name`, or a placeholder if it cannot be read."""
    try:
        image = load_images(sample)[0]
    except UserError as error:
        missing.append(str(error))
        return (f'<text id="{name}" x="50%" y="50%" font-size="{sample.image_size / 14:g}">'
                "image not found</text>")
    file = io.BytesIO()
    image.thumbnail((336, 336))
    image.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<image id="{name}" width="100%" height="100%" href="data:image/jpeg;base64,{data}"/>'


def read_entries(path: Path) -> list[Entry]:
    """The records of a predictions.jsonl; or of a samples.jsonl, in which the completions of a
    group follow each other."""
    entries, last_group = [], None
    for source, row in iter_json_records(path):
        try:
            group = (row["step"], row["id"]) if "step" in row else source
            if group != last_group:
                sample = sample_from_row(row)
                if "step" in row:
                    sample = replace(sample, id=f"step {row['step']} · {sample.id}")
                entries.append((sample, []))
            names = dict.fromkeys((*row["parts"], "accuracy"))  # a record without accuracy is bad
            parts = {name: float(row["parts"][name]) for name in names}
            rewards = {name: float(row[name]) for name in ("reward", "advantage") if name in row}
            entries[-1][1].append({"text": str(row["completion"]), "parts": parts, **rewards})
            last_group = group
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{source}: not a record of predictions.jsonl or samples.jsonl "
                            f"({error!r})")
    return entries


STYLE = """
:root { color-scheme: light dark; --page: #f4f5f3; --card: #fff; --text: #1c2321; --soft: #59645f; --line: #dde2df;
  --right: #1b6e3c; --wrong: #a8321f; }
@media (prefers-color-scheme: dark) { :root { --page: #121617; --card: #1b2122; --text: #e3e8e5; --soft: #9ba8a3;
  --line: #333d3f; --right: #74cf97; --wrong: #ff9c87; } }
* { box-sizing: border-box; margin: 0; padding: 0; }
body { padding: 1.5rem clamp(.75rem, 3vw, 2rem); max-width: 96rem; margin: auto; background: var(--page);\
 color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; line-height: 1.35; margin: .15rem 0 .9rem; }\
 select { font: inherit; }
p, output, dt, ul, figcaption { color: var(--soft); font-size: .85rem; } p b, li b { color: var(--text);\
 margin-right: .3rem; }
p .right { color: var(--right); } p .wrong { color: var(--wrong); } dl { margin-bottom: .7rem; }
form { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; margin: .8rem 0 1rem; }\
 form svg { width: 28px; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 1rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.15rem;\
 min-width: 0;
  content-visibility: auto; contain-intrinsic-size: auto 24rem; }
.group, .one section { grid-column: 1 / -1; } [hidden] { display: none !important; }
.body { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; } .words { flex: 1 1 13rem; min-width: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .5rem;\
 align-content: start; }
.body > .figures { flex: 1 1 15rem; max-width: 21rem; } figcaption { text-align: center; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(9rem, 22%), 1fr)); gap: 1rem 1.25rem; }
section { border-top: 1px solid var(--line); padding-top: .7rem; } dt { margin-top: .35rem; }
dd { white-space: pre-wrap; max-height: 20rem; overflow: auto; } li { font-variant-numeric: tabular-nums; }
ul { display: flex; flex-wrap: wrap; list-style: none; gap: 0 .6rem; }
figure svg { display: block; width: 100%; border-radius: 6px; background: var(--line); margin-bottom: .3rem; }
figure g { filter: drop-shadow(0 0 1px #000); } text { fill: var(--soft); text-anchor: middle; }
rect, path { fill: none; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.target { stroke: var(--target); stroke-width: 3px; } .predicted path { stroke-width: 8px; }
.predicted { stroke: var(--predicted); stroke-width: 2px; stroke-dasharray: 8 5; }
"""

SCRIPT = """
// The filters live in the page's address: a view can be linked to, and the back button undoes one.
const form = document.forms[0], cards = [...document.querySelectorAll("article")];
function filter() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const select of form.querySelectorAll("select")) select.value = wanted.get(select.name) ?? "";
  for (const card of cards)
    card.hidden = [...wanted].some(([name, value]) => value && name in card.dataset && value !== card.dataset[name]);
  document.querySelector("output").value = cards.filter(card => !card.hidden).length + " shown";
}
form.addEventListener("change", () => location.hash = new URLSearchParams(new FormData(form)));
addEventListener("hashchange", filter);
filter();
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path,
                        help="predictions.jsonl or samples.jsonl; report.html is written beside it")
    args = parser.parse_args()
    try:
        write_report(args.file.with_name("report.html"), read_entries(args.file), str(args.file))
        print(args.file.with_name("report.html"))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
