"""Damaged files in every layout. A reader's outcome is Samples whose own target earns its reward, or one short line."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from data import load_samples, split_samples
from rewards import score_completion
from runtime.errors import UserError
from sample import format_prompt, format_target, load_images
from test_readers import EARTHDIAL, LAYOUTS, VRSBENCH, F, chat, make_records

CHATS = {  # task -> question, target
    "cls": ("<image>Which class? Classes: sea, land.", "sea"), "mlc": ("<image>Which? Classes: sea, land, ice.", "sea, ice"),
    "det": ("<image>Where?", "[2,2,9,9],[1,1,4.5,3]"), "rec": ("<image>[refer] <p>it</p>", "{<10><20><60><70>|<30>}"),
    "rcap": ("<image>What is in [2, 2, 9, 9]?", "<think>Small.</think><answer>a ship</answer>"),
    "ground": ("<image>[grounding] describe", "A <p>ship</p> {<10><20><60><70>|<30>} at [[[5, 5, 9, 9, 0]]] sea."),
    "cap": ("<image>Describe.", "A pier."), "change": ("<image><image>What changed?", "A pier is built."),
    "count": ("<image>How many ships?", "3"), "geo": ("<image>Where?", "48.86, 2.35")}
MESSAGES = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
                         {"role": "assistant", "content": "[2,2,9,9]"}]}
ROWS = {**{f"chat, {task}": (chat(*turns), task) for task, turns in CHATS.items()}, "messages": (MESSAGES, "det"),
        **{f"EarthDial, {task}": (row, task) for task, (row, _, _) in EARTHDIAL.items() if task != "change"},
        "VRSBench, grid": (VRSBENCH | {"obj_corner": [], "image_id": None}, "det")}


def record_of(row, task):
    key = "image_id" if "image_id" in row else "image"
    return lambda name: row | {key: [f"{name}.png"] * 2 if task == "change" else f"{name}.png"}


LAYOUTS = LAYOUTS | {name: (make_records(record_of(row, task)), (task,), ("",)) for name, (row, task) in ROWS.items()}
# The least reward of a target. Boxes are in whole pixels; without SAM a mask is its boxes.
LEAST = {"det": .75, "rec": .75, "ground": .87, "ovd": .6, "seg": 1e-9}

TEXTS = ["", " ", "\n", "\x00", "\x1b[2J", "\u2028", "\ud800", "\udcff", "<think>", "</answer>", "<|image_pad|>", "<|im_end|>", "<image>",
         "[]", "[", "]", "{", "{<1><2><3><4>}", "[[1, 2, 3, 4, 5]]", "[1,2,1,2]", "[.1,.2,.3,.4]", "none", "-", "١٢", "海",
         "../", "%s{}", "[" * 3000, "<think>" * 3000, "9" * 5000, "a" * 20_000, "a b " * 5000, '"', "\\", ",", "=1+1", "&a;", "1e999", "nan"]
VALUES = [None, True, 0, -1, 1, .5, 1e-300, 1e300, -1e7, float("nan"), float("inf"), -float("inf"), 10 ** 400, [], {}, [[]],
          [None], [1, 2, 3, 4], {"a": 1}, [1, 1, 1, 1], [9, 9, 2, 2], [0, 0, .5, .5], *TEXTS]
BYTES = [b"", b"\0", b"\xff", b"\n", b"[" * 100_000, b'{"a":' * 50_000, b'"image": 5, ', b'"image": null, ', b"NaN", b"-Infinity",
         b"1e400", b"9" * 5000, b" " * 5000, *(text.encode("utf-8", "surrogatepass") for text in TEXTS)]
NAMES = ["<think>", " ", "-", "a\nb", "<|image_pad|>", "[x]", "{}", "\udcff", "é海", "n" * 200, "A", "images", "x.txt", "x"]


def pick(rng, options):
    return options[rng.integers(len(options))]


def nodes(value):
    """(container, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from nodes(inner)


def mutate_value(document, rng):
    places = list(nodes(document))
    if not places:
        return pick(rng, VALUES)
    container, key = pick(rng, places)
    value, how = container[key], rng.integers(6)
    if how == 0:
        del container[key]
    elif how == 1:
        container[key] = [copy.deepcopy(value)] * rng.integers(1, 200)
    elif how == 2:
        other, key2 = pick(rng, places)
        container[key] = copy.deepcopy(other[key2])
    elif isinstance(value, str) and how < 5:
        at = rng.integers(len(value) + 1)
        container[key] = value[:at] + pick(rng, TEXTS) + value[at + rng.integers(4):]
    elif isinstance(value, (int, float)) and how < 5:
        container[key] = value * pick(rng, [1e-3, -1, 1e3, .01, 1e9])
    else:
        container[key] = pick(rng, VALUES)
    return document


def mutate_bytes(data, rng):
    at, end = sorted(rng.integers(0, len(data) + 1, 2))
    how = rng.integers(5)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + data[end:]
    if how == 2:
        return data[:at] + data[at:end] * 2 + data[end:]
    if how == 3:
        flipped = bytearray(data)
        for i in rng.integers(0, len(data), rng.integers(1, 9)) if data else ():
            flipped[i] ^= 1 << rng.integers(8)
        return bytes(flipped)
    return data[:at] + pick(rng, BYTES) + data[at + rng.integers(4):]


def mutate_file(file, rng):
    """A function that undoes it."""
    data, how = file.read_bytes(), rng.integers(8)
    if how == 0 and file.suffix != ".arrow":
        target = file if rng.integers(2) else file.parent
        name = pick(rng, NAMES)
        renamed = target.with_name(name + target.suffix * int(rng.integers(2)))
        if not renamed.exists():
            target.rename(renamed)
            return lambda: renamed.rename(target)
    if file.suffix in (".json", ".jsonl") and how < 6:
        data = data.decode()
        try:
            text = json.dumps(mutate_value(json.loads(data), rng), indent=1 if data.startswith("{\n") else None)
            new = text.encode()
        except ValueError:
            new = mutate_bytes(data.encode(), rng)
        data = data.encode()
    else:
        new = mutate_bytes(data, rng)
    file.write_bytes(new)
    return lambda: file.write_bytes(data)


def check(source, task, images):
    """The outcome of reading, "samples" or "error"."""
    try:
        samples = load_samples(str(source), task, F, images and str(images))
    except UserError as error:
        message = str(error)
        assert message.isprintable() and 10 < len(message) <= 300, message
        return "error"
    split_samples(samples, str(source))
    for sample in samples:
        parts = score_completion(format_target(sample).removesuffix("<|im_end|>"), sample)
        assert parts["format"] == 1 and parts["accuracy"] >= LEAST.get(task, 1), (sample, parts)
        assert format_prompt(sample).count("<|image_pad|>") == len(sample.images)
        f"{sample}{format_prompt(sample)}".encode()
        try:
            load_images(sample)
        except UserError as error:
            assert "\n" not in str(error)
    return "samples"


def fuzz(root, layout, seed, n):
    """The ends of n mutations of a layout that is made in the folder root."""
    make, tasks, splits = LAYOUTS[layout]
    rng = np.random.default_rng([seed, *layout.encode()])
    names = [f"{number:08d}" for number in rng.choice(10**8, max(3, len(splits)), replace=False)]
    source, images, _ = make(root, dict(zip(names, splits * 3)), rng)
    files = sorted(p for p in Path(root).rglob("*") if p.is_file())
    pictures = [file for file in files if file.suffix in (".png", ".jpg", ".tif")]
    annotations = [file for file in files if file not in pictures]
    for task in tasks:
        assert check(source, task, images) == "samples"  # before any damage
    ends = []
    for _ in range(n):
        wanted = pictures if pictures and rng.integers(4) == 0 else annotations or pictures
        undo = mutate_file(pick(rng, wanted), rng)
        ends.append(check(source, pick(rng, tasks), images))
        undo()
    return ends


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_file_gives_samples_that_earn_their_reward_or_one_line(tmp_path, layout):
    fuzz(tmp_path, layout, seed=0, n=8)
