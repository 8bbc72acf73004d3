"""Model answers -> one HTML page to look at: images with boxes, question, reasoning, answer and reward parts, worst first.

    python -m scoring.report runs/eval/predictions.jsonl    writes runs/eval/report.html
    python -m scoring.report runs/grpo/samples.jsonl        writes runs/grpo/report.html, the completions of a group side by side

The page loads nothing. What models and data say is escaped, and the page's security policy runs no script but its own.
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

from data import BadInput, Sample, from_row, json_records, load_images
from rewards import TAGS, TASKS, extract_answer, format_reward, parse_boxes

RIGHT = 0.5                                     # mean accuracy from which a sample counts as right
REFERENCE, PREDICTED = "#1f93ff", "#ff8a1f"     # of the boxes; unlike to the colour-blind too, and the second is dashed

# A sample and its completions: "text" and "parts" {name: value}, in a group also "reward" and "advantage"
Entry = tuple[Sample, list[dict]]


def boxed(task: str) -> bool:
    """Do its answers hold boxes? A file may name a task of another version of the project."""
    return task in TASKS and TASKS[task].boxes


def accuracy(entry: Entry) -> float:
    """Mean of the completions' accuracy parts."""
    return float(np.mean([completion["parts"]["accuracy"] for completion in entry[1]]))


def write_report(path: Path, entries: Iterable[Entry], title: str, limit: int = 200) -> None:
    """Write the page, worst first; count unreadable images on stderr. Of more than `limit` entries the worst fill half of
    the page, and an even choice of the others the rest, so that there are right answers to see as well."""
    ranked, problems = sorted(entries, key=accuracy), []
    worst, others = ranked[: limit // 2], ranked[limit // 2 :]
    places = np.linspace(0, len(others) - 1, min(len(others), limit - len(worst)), dtype=int)
    shown = worst + [others[i] for i in places]
    cards = "\n".join(card(f"i{n}", entry, problems) for n, entry in enumerate(shown))
    if problems:
        print(f"{path}: {len(problems)} images are missing from the page; the first: {problems[0]}", file=sys.stderr)

    right, counts = sum(accuracy(entry) >= RIGHT for entry in shown), Counter(sample.task for sample, _ in shown)
    tasks = "".join(f'<option value="{escape(task)}">{escape(task)} ({n})</option>' for task, n in sorted(counts.items()))
    mean = f", mean accuracy {np.mean([accuracy(entry) for entry in ranked]):.3f}" if ranked else ""
    choice = f", here the {len(worst)} worst and {len(places)} of the others" if len(shown) < len(ranked) else ""
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'">
<title>{escape(title)}</title>
<style>:root {{ --reference: {REFERENCE}; --predicted: {PREDICTED}; }}{STYLE}</style>
<header><h1>{escape(title)}</h1>
<p>{len(ranked)} samples{mean}{choice}. Worst first; right is a mean accuracy of {RIGHT} or more.</p>
<form><label>Task <select name="task"><option value="">all ({len(shown)})</option>{tasks}</select></label>
<label>Answer <select name="answer"><option value="">all</option><option value="right">right ({right})</option>
<option value="wrong">wrong ({len(shown) - right})</option></select></label> <output>{len(shown)} shown</output>
<span><svg viewBox="0 0 28 8"><path class="reference" d="M2 4h24"/></svg> reference</span>
<span><svg viewBox="0 0 28 8"><path class="predicted" d="M2 4h24"/></svg> prediction</span></form></header>
<main>
{cards}
</main>
<script>{SCRIPT}</script></html>
"""
    path.with_suffix(".partial").write_text(page, encoding="utf-8", errors="replace")  # half an emoji is no UTF-8
    path.with_suffix(".partial").replace(path)


def card(name: str, entry: Entry, problems: list[str]) -> str:
    """One sample. Its images are embedded once, as `name`-0, `name`-1.., and shown once for each set of boxes."""
    sample, completions = entry
    images = "".join(thumbnail(f"{name}-{i}", replace(sample, images=(x,)), problems) for i, x in enumerate(sample.images))
    each = boxed(sample.task) and len(completions) > 1
    once = "" if each else figures(name, sample, completions[0]["text"])
    answers = "".join(f'<section>{figures(name, sample, c["text"]) if each else ""}{answer(c)}</section>' for c in completions)
    verdict, kind = "right" if accuracy(entry) >= RIGHT else "wrong", "one" if len(completions) == 1 else "group"
    about = " · ".join(escape(text) for text in dict.fromkeys((sample.id, sample.subset, sample.category)) if text)
    references = "\n".join(map(escape, sample.references or (sample.answer,)))
    return f"""<article class="{kind}" data-task="{escape(sample.task)}" data-answer="{verdict}"><svg hidden>{images}</svg>
<p><b>{escape(sample.task)}</b> <b class="{verdict}">{verdict} {accuracy(entry):.2f}</b> {about}</p>
<h2>{escape(sample.question)}</h2>
<div class="body">{once}<div class="words"><dl><dt>Reference</dt><dd>{references}</dd></dl>
<div class="answers">{answers}</div></div></div></article>"""


def answer(completion: dict) -> str:
    """Rewards, reasoning and answer of one completion, or its whole text where that is not in the format."""
    text, values = completion["text"], {name: f"{value:.2f}" for name, value in completion["parts"].items()}
    values |= {key: f"{completion[key]:{form}}" for key, form in (("reward", ".2f"), ("advantage", "+.2f")) if key in completion}
    _, think, _, result, _ = re.split("|".join(TAGS), text) if format_reward(text) else [""] * 5
    said = {"Reasoning": think, "Answer": result} if result else {"Completion, not in the format": text}
    return ("<ul>" + "".join(f"<li>{escape(name)} <b>{value}</b></li>" for name, value in values.items()) + "</ul><dl>"
            + "".join(f"<dt>{name}</dt><dd>{escape(words.strip())}</dd>" for name, words in said.items()) + "</dl>")


def figures(name: str, sample: Sample, text: str) -> str:
    """The sample's images, or an empty frame, with the reference boxes and the boxes (seg: and points) of a completion."""
    result = extract_answer(text) or ""
    found = parse_boxes(result) if boxed(sample.task) else None
    found = [] if found is None else [box for box in found if box[2] > box[0]]  # what is no box has no area
    points = re.findall(r"\[\s*(\d{1,6})\s*,\s*(\d{1,6})\s*\]", result, re.ASCII) if sample.task == "seg" else []
    dots = "".join(f'<path d="M{x} {y}h0"/>' for x, y in points)
    overlay = (f'<g class="reference">{"".join(map(shape, sample.boxes))}</g>'
               f'<g class="predicted">{"".join(map(shape, found))}{dots}</g>')
    captions = ("ground", *sample.choices) if sample.task == "pair" else range(1, max(len(sample.images), 1) + 1)
    return '<div class="figures">' + "".join(
        f'<figure><svg viewBox="0 0 {sample.frame} {sample.frame}" role="img" aria-label="image {escape(str(caption))}, '
        f'{len(sample.boxes)} reference boxes, {len(found)} predicted"><use href="#{name}-{i}"/>{overlay}</svg>'
        f'<figcaption>{escape(str(caption)) if len(sample.images) > 1 else ""}</figcaption></figure>'
        for i, caption in enumerate(captions)) + "</div>"


def shape(box: Sequence[float]) -> str:
    """SVG rectangle of (x1, y1, x2, y2[, theta]): pixels of the frame; theta in degrees, clockwise on the screen."""
    x1, y1, x2, y2 = box[:4]
    turn = f' transform="rotate({box[4]:g} {(x1 + x2) / 2:g} {(y1 + y2) / 2:g})"' if len(box) > 4 and box[4] else ""
    return f'<rect x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"{turn}/>'


def thumbnail(name: str, sample: Sample, problems: list[str]) -> str:
    """The sample's only image as an SVG element `name` that fills its figure, or a placeholder if it cannot be read."""
    try:
        image = load_images(sample)[0]
    except BadInput as error:
        problems.append(str(error))
        return f'<text id="{name}" x="50%" y="50%" font-size="{sample.frame / 14:g}">image not found</text>'
    image.thumbnail((336, 336))
    image.save(file := io.BytesIO(), "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<image id="{name}" width="100%" height="100%" href="data:image/jpeg;base64,{data}"/>'


def read_entries(path: Path) -> list[Entry]:
    """The records of a predictions.jsonl, or of a samples.jsonl, where the completions of a group follow each other."""
    entries, last = [], None
    for where, row in json_records(path):
        try:
            group = (row["step"], row["id"]) if "step" in row else where
            if group != last:
                sample = from_row(row)
                entries.append((replace(sample, id=f"step {row['step']} · {sample.id}") if "step" in row else sample, []))
            parts, last = {name: float(row["parts"][name]) for name in dict.fromkeys((*row["parts"], "accuracy"))}, group
            rewards = {name: float(row[name]) for name in ("reward", "advantage") if name in row}
            entries[-1][1].append({"text": str(row["completion"]), "parts": parts, **rewards})
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{where}: not a record of predictions.jsonl or samples.jsonl ({error!r})")
    return entries


STYLE = """
:root { color-scheme: light dark; --page: #f4f5f3; --card: #fff; --text: #1c2321; --soft: #59645f; --line: #dde2df;
  --right: #1b6e3c; --wrong: #a8321f; }
@media (prefers-color-scheme: dark) { :root { --page: #121617; --card: #1b2122; --text: #e3e8e5; --soft: #9ba8a3;
  --line: #333d3f; --right: #74cf97; --wrong: #ff9c87; } }
* { box-sizing: border-box; margin: 0; padding: 0; }
body { padding: 1.5rem clamp(.75rem, 3vw, 2rem); max-width: 96rem; margin: auto; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; line-height: 1.35; margin: .15rem 0 .9rem; } select { font: inherit; }
p, output, dt, ul, figcaption { color: var(--soft); font-size: .85rem; } p b, li b { color: var(--text); margin-right: .3rem; }
p .right { color: var(--right); } p .wrong { color: var(--wrong); } dl { margin-bottom: .7rem; }
form { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; margin: .8rem 0 1rem; } form svg { width: 28px; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 1rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.15rem; min-width: 0;
  content-visibility: auto; contain-intrinsic-size: auto 24rem; }
.group, .one section { grid-column: 1 / -1; } [hidden] { display: none !important; }
.body { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; } .words { flex: 1 1 13rem; min-width: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .5rem; align-content: start; }
.body > .figures { flex: 1 1 15rem; max-width: 21rem; } figcaption { text-align: center; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(9rem, 22%), 1fr)); gap: 1rem 1.25rem; }
section { border-top: 1px solid var(--line); padding-top: .7rem; } dt { margin-top: .35rem; }
dd { white-space: pre-wrap; max-height: 20rem; overflow: auto; } li { font-variant-numeric: tabular-nums; }
ul { display: flex; flex-wrap: wrap; list-style: none; gap: 0 .6rem; }
figure svg { display: block; width: 100%; border-radius: 6px; background: var(--line); margin-bottom: .3rem; }
figure g { filter: drop-shadow(0 0 1px #000); } text { fill: var(--soft); text-anchor: middle; }
rect, path { fill: none; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.reference { stroke: var(--reference); stroke-width: 3px; } .predicted path { stroke-width: 8px; }
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="predictions.jsonl or samples.jsonl; report.html is written beside it")
    args = parser.parse_args()
    try:
        write_report(args.file.with_name("report.html"), read_entries(args.file), str(args.file))
        print(args.file.with_name("report.html"))
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")
