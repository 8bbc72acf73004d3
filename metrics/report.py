"""Model answers -> one HTML page: images with boxes, question, reasoning, answer and reward parts.

    python -m metrics.report runs/eval/predictions.jsonl    writes runs/eval/report.html
    python -m metrics.report runs/grpo/samples.jsonl        writes runs/grpo/report.html

The worst prediction comes first. Of training, the group of the largest spread of rewards, and last
those without signal; completions of a group are side by side, the best first. The page loads
nothing. The text of models and data is escaped, and the security policy runs no other script.
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
from metrics.rows import sample_from_row
from readers.files import iter_json_records
from rewards import TAGS, extract_answer, format_reward
from runtime.errors import UserError, warn
from sample import BOX_TASKS, Sample, gt_texts_of, load_images

TARGET_COLOUR = "#1f93ff"     # of boxes; colour-blind readers can tell the two colours apart,
PREDICTED_COLOUR = "#ff8a1f"  # and predicted boxes are dashed
# Orders of the cards: a number of theirs, or - it for the largest first; the first is the default
GROUP_ORDERS = {"-spread": "largest spread of rewards", "step": "first step", "-step": "last step",
                "-reward": "highest mean reward", "reward": "lowest mean reward"}
PREDICTION_ORDERS = {"reward": "lowest accuracy", "-reward": "highest accuracy"}

# A sample and its completions, each with "text" and "parts" {name: value}. In training these are a
# group, each also with "step", "reward" and "advantage".
Entry = tuple[Sample, list[dict]]


def rewards_of(entry: Entry) -> list[float]:
    """The rewards of the completions; of predictions, the accuracy parts."""
    return [c.get("reward", c["parts"]["accuracy"]) for c in entry[1]]


def spread_of(entry: Entry) -> float:
    """Best minus worst reward; 0 where grpo.groups_with_signal sees no difference."""
    spread = max(rewards_of(entry)) - min(rewards_of(entry))
    return spread if spread > 1e-6 else 0.0


def write_report(path: Path, entries: Iterable[Entry], title: str, limit: int = 200) -> None:
    """Write the page; count unreadable images on stderr.

    Of more than `limit` entries the first in the default order fill half of the page, and an even
    choice of the others the rest, so that there are right answers to see too.
    """
    ranked = sorted(entries, key=lambda entry: (-spread_of(entry), np.mean(rewards_of(entry))))
    first, others = ranked[: limit // 2], ranked[limit // 2 :]
    n_others = min(len(others), limit - len(first))
    shown = first + [others[i] for i in np.linspace(0, len(others) - 1, n_others, dtype=int)]
    missing = []
    cards = "\n".join(render_card(f"i{n}", entry, missing) for n, entry in enumerate(shown))
    if missing:
        warn(f"{path}: {len(missing)} images are missing from the page; the first: {missing[0]}")
    rem = max([26, *(4 + 9 * len(completions) for _, completions in shown)])
    variables = (f":root {{ --target: {TARGET_COLOUR}; --predicted: {PREDICTED_COLOUR}; "
                 f"--card-width: {rem}rem; }}")
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'">
<title>{escape(title)}</title>
<style>{variables}{STYLE}</style>
<header><h1>{escape(title)}</h1>
{render_header(ranked, shown)}</header>
<main>
{cards}
</main>
<script>{SCRIPT}</script></html>
"""
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8", errors="replace")  # half an emoji is no UTF-8
    partial.replace(path)


def render_header(ranked: list[Entry], shown: list[Entry]) -> str:
    """What the page shows of all entries; its orders, tasks and the legend, where it needs them."""
    is_training = any("reward" in completions[0] for _, completions in ranked)
    orders = GROUP_ORDERS if is_training else PREDICTION_ORDERS
    summary = f"{len(ranked)} {'groups' if is_training else 'samples'}"
    if ranked:
        mean = np.mean([np.mean(rewards_of(entry)) for entry in ranked])
        summary += f", mean {'reward' if is_training else 'accuracy'} {mean:.3f}"
    if len(shown) < len(ranked):
        first, n_first = next(iter(orders.values())), len(shown) // 2
        summary += f"; here {n_first} with the {first} and {len(shown) - n_first} of the others"
    if is_training:
        no_signal = sum(not spread_of(entry) for entry in ranked)
        summary += (f"; {no_signal} without signal (equal rewards). A green bar marks completions "
                    "above their group's mean reward, a red one those below.")
    tasks = Counter(sample.task for sample, _ in shown)
    controls = render_select("order", orders)
    if len(tasks) > 1:
        options = {task: f"{task} ({n})" for task, n in sorted(tasks.items())}
        controls += render_select("task", {"": f"all ({len(shown)})"} | options)
    if tasks.keys() & set(BOX_TASKS):
        controls += "".join(f'<span><svg viewBox="0 0 28 8"><path class="{name}" d="M2 4h24"/>'
                            f"</svg> {name}</span>" for name in ("target", "predicted"))
    return f"<p>{summary}</p>\n<form>{controls}</form>"


def render_select(name: str, options: dict[str, str]) -> str:
    """A choice of {value: what it says}."""
    html = "".join(f'<option value="{escape(value)}">{escape(text)}</option>'
                   for value, text in options.items())
    return f'<label>{name.capitalize()} <select name="{name}">{html}</select></label>'


def render_card(name: str, entry: Entry, missing: list[str]) -> str:
    """One sample. Its images are embedded once, as `name`-0, `name`-1.., and shown once, or for a
    group in a task with boxes once for each completion."""
    sample, completions = entry
    images = "".join(embed_image(f"{name}-{i}", replace(sample, images=(image,)), missing)
                     for i, image in enumerate(sample.images))
    each = sample.task in BOX_TASKS and len(completions) > 1
    once = "" if each else render_images(name, sample, completions[0]["text"])
    largest = max(abs(c.get("advantage", 0)) for c in completions) or 1
    sections = ""
    for completion in sorted(completions, key=lambda c: -c.get("advantage", 0)):
        own = render_images(name, sample, completion["text"]) if each else ""
        share = completion.get("advantage", 0) / largest
        kind = "better" if share > 0 else "worse" if share < 0 else "equal"
        sections += (f'<section class="{kind}" style="--strength: {abs(share):.0%}">{own}'
                     f"{render_completion(completion, sample)}</section>")
    rewards, spread, step = rewards_of(entry), spread_of(entry), completions[0].get("step", "")
    mean = np.mean(rewards)
    value = f"accuracy {mean:.2f}"
    if "reward" in completions[0]:
        value = (f"rewards {min(rewards):.2f} to {max(rewards):.2f}, mean {mean:.2f}" if spread
                 else f"rewards all {mean:.2f}, no signal")
    labels = dict.fromkeys((step and f"step {step}", sample.id, sample.subset, sample.category))
    about = " · ".join(escape(label) for label in labels if label)
    targets = "\n".join(map(escape, gt_texts_of(sample)))
    task = escape(sample.task)
    return f"""<article data-task="{task}" data-step="{step}" data-reward="{mean:.6f}"
 data-spread="{spread:.6f}"><svg hidden>{images}</svg>
<p><b>{task}</b> <b>{value}</b> {about}</p>
<h2>{escape(sample.question)}</h2>
<div class="body">{once}<div class="words"><dl><dt>Target</dt><dd>{targets}</dd></dl>
<div class="answers">{sections}</div></div></div></article>"""


def render_completion(completion: dict, sample: Sample) -> str:
    """Rewards, reasoning and answer of a completion, or its whole text if not in the format."""
    text = completion["text"]
    values = {name: completion[name] for name in ("advantage", "reward") if name in completion}
    texts = {"Completion, not in the format": text}
    if format_reward(text, sample):
        *think, answer = re.split("|".join(TAGS), text)[1::2]
        texts = {"Reasoning": think[0]} if think else {}
        texts["Answer"] = answer
    items = "".join(f"<li>{escape(name)} <b>{value:{'+' if name == 'advantage' else ''}.2f}</b></li>"
                    for name, value in (values | completion["parts"]).items())
    terms = "".join(f"<dt>{name}</dt><dd>{escape(value.strip())}</dd>"
                    for name, value in texts.items())
    return f"<ul>{items}</ul><dl>{terms}</dl>"


def render_images(name: str, sample: Sample, text: str) -> str:
    """The sample's images, or an empty square, with the target boxes and those (seg: also the
    points) of a completion."""
    answer = extract_answer(text) or ""
    predicted, points = [], []
    if sample.task in BOX_TASKS:
        found = parse_boxes(answer, sample.oriented)
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
    return f'<div class="figures" style="--images: {len(captions)}">{html}</div>'


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
                entries.append((sample_from_row(row, path.parent), []))
            names = dict.fromkeys((*row["parts"], "accuracy"))  # a record without accuracy is bad
            parts = {name: float(row["parts"][name]) for name in names}
            numbers = {name: float(row[name]) for name in ("reward", "advantage") if name in row}
            if "step" in row:
                numbers["step"] = int(row["step"])
            entries[-1][1].append({"text": str(row["completion"]), "parts": parts, **numbers})
            last_group = group
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{source}: not a record of predictions.jsonl or samples.jsonl "
                            f"({error!r})")
    return entries


STYLE = """
:root { color-scheme: light dark; --page: #f4f5f3; --card: #fff; --text: #1c2321; --soft: #59645f; --line: #dde2df;
  --better: #1b6e3c; --worse: #a8321f; }
@media (prefers-color-scheme: dark) { :root { --page: #121617; --card: #1b2122; --text: #e3e8e5; --soft: #9ba8a3;
  --line: #333d3f; --better: #74cf97; --worse: #ff9c87; } }
* { box-sizing: border-box; margin: 0; padding: 0; }
body { padding: 1.5rem clamp(.75rem, 3vw, 2rem); max-width: 96rem; margin: auto; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; } h2 { font-size: 1rem; line-height: 1.35; margin: .1rem 0 .6rem; }
p, dt, ul, figcaption { color: var(--soft); font-size: .85rem; }
p b, li b { color: var(--text); margin-right: .3rem; } select { font: inherit; }
form { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; margin: .8rem 0 1rem; }
form svg { width: 28px; } [hidden] { display: none !important; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--card-width)), 1fr)); gap: 1rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem;
  min-width: 0; content-visibility: auto; contain-intrinsic-size: auto 24rem; }
.body { display: flex; flex-wrap: wrap; gap: .75rem 1.25rem; } .words { flex: 1 1 10rem; min-width: 0; }
.words:has(section + section) { flex-basis: 18rem; } figcaption { text-align: center; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(6rem, 1fr)); gap: .4rem; align-content: start; }
.body > .figures { flex: 1 1 calc(9rem * var(--images)); max-width: min(100%, 13rem * var(--images)); }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem; }
section { border-top: 1px solid var(--line); padding-top: .4rem; } section:only-child { grid-column: 1 / -1; }
.better { --sign: var(--better); } .worse { --sign: var(--worse); }
:is(.better, .worse) li:first-child b { color: var(--sign); }
:is(.better, .worse) { border-top: 4px solid color-mix(in srgb, var(--sign) var(--strength), var(--line)); }
dl { margin-bottom: .5rem; } dt { margin-top: .25rem; }
dd { white-space: pre-wrap; max-height: 15rem; overflow: auto; font-size: .9rem; line-height: 1.4; }
ul { display: flex; flex-wrap: wrap; list-style: none; gap: 0 .6rem; font-variant-numeric: tabular-nums; }
figure svg { display: block; width: 100%; border-radius: 6px; background: var(--line); margin-bottom: .3rem; }
figure g { filter: drop-shadow(0 0 1px #000); } text { fill: var(--soft); text-anchor: middle; }
rect, path { fill: none; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.target { stroke: var(--target); stroke-width: 2px; } .predicted path { stroke-width: 8px; }
.predicted { stroke: var(--predicted); stroke-width: 2px; stroke-dasharray: 8 5; }
"""

SCRIPT = """
// Order and task live in the page's address: a view can be linked to, and the back button undoes one.
const form = document.forms[0], cards = [...document.querySelectorAll("article")];
function update() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const select of form.querySelectorAll("select"))
    select.value = wanted.get(select.name) ?? select.options[0].value;
  const [, minus, key] = form.elements.order.value.match(/(-?)(.*)/);
  const place = card => (minus ? -1 : 1) * card.dataset[key], noSignal = card => !+card.dataset.spread;
  const sorted = [...cards].sort((a, b) => noSignal(a) - noSignal(b) || place(a) - place(b));
  document.querySelector("main").append(...sorted);
  for (const card of cards) card.hidden = ![null, "", card.dataset.task].includes(wanted.get("task"));
}
form.addEventListener("change", () => location.hash = new URLSearchParams(new FormData(form)));
addEventListener("hashchange", update);
update();
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
