"""Procedural scenes with exact ground truth: the embedded data set. Nothing to download, never the same scene twice.

A scene is land of one class with 0 to 6 things on it. It is a pure function of (seed, index); `draw` makes an image of it,
and `ask` a question of some task with the answer that the scene dictates.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw

from rewards import box_numbers, box_text, horizontal, json_text

LAND = {  # scene class -> (base colour, second colour, what it looks like); muted, so that things stand out
    "sea": ((34, 70, 118), (44, 82, 134), "Open blue water"), "desert": ((186, 158, 108), (198, 170, 122), "Bare sand"),
    "forest": ((34, 78, 40), (28, 66, 34), "Dense dark trees"), "farmland": ((112, 138, 70), (130, 126, 76), "Striped fields"),
    "snow": ((190, 200, 214), (180, 192, 210), "White ground"), "city": ((122, 120, 120), (100, 100, 104), "Grey blocks"),
    "meadow": ((118, 172, 90), (124, 180, 96), "Plain light grass"), "lava": ((56, 42, 42), (74, 48, 44), "Dark burnt rock")}
PAINT = {"white": (252, 252, 252), "red": (220, 40, 40), "yellow": (246, 212, 40), "cyan": (40, 222, 232), "pink": (228, 70, 200)}
SHAPES = {  # kind -> outline in a box from -1 to 1, and its height over its width
    "airplane": ([(-1, .15), (-.2, -.2), (-.12, -.8), (0, -1), (.12, -.8), (.2, -.2), (1, .15), (1, .35), (.15, .2), (.12, .7),
                  (.45, 1), (-.45, 1), (-.12, .7), (-.15, .2), (-1, .35)], 1.0),
    "ship": ([(-1, -1), (.45, -1), (1, 0), (.45, 1), (-1, 1), (-.8, 0)], .4),
    "tank": ([(math.cos(i * math.pi / 8), math.sin(i * math.pi / 8)) for i in range(16)], 1.0),
    "building": ([(-1, -1), (1, -1), (1, .2), (.2, .2), (.2, 1), (-1, 1)], .9),
    "court": ([(-1, -1), (1, -1), (1, 1), (-1, 1)], .55)}
SIZES = {"small": (.14, .19), "medium": (.22, .30), "large": (.34, .44)}  # width over the frame's side
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    size: str
    box: tuple         # (x1, y1, x2, y2, theta): pixels of the frame, theta in degrees, clockwise on the screen
    appeared: bool     # not there yet in the earlier image of the pair


@dataclass(frozen=True)
class Scene:
    land: str
    things: tuple[Thing, ...]
    frame: int
    seed: tuple        # (seed, index): of the scene, of its ground's noise and of the question


def scene(seed: int, index: int, frame: int, least: int = 0) -> Scene:
    """Scene number `index`: a pure function of its arguments. `least` to 6 things that do not touch, some of them turned."""
    rng = np.random.default_rng([seed, index])
    land, things = str(rng.choice(list(LAND))), []
    for _ in range(max(least, rng.choice(7, p=[.04, .4, .24, .14, .09, .05, .04]))):
        kind, colour, size = (str(rng.choice(list(table))) for table in (SHAPES, PAINT, SIZES))
        kind = things[-1].kind if things and rng.random() < .35 else kind  # of one kind there are often several
        for _ in range(20):  # tries to find a free place; a crowded scene keeps what it has
            w = rng.uniform(*SIZES[size]) * frame
            h, theta = w * SHAPES[kind][1], int(rng.integers(1, 180)) if rng.random() < .4 and kind in ("ship", "court") else 0
            x, y = rng.uniform(0, frame - w), rng.uniform(0, frame - h)
            box = (round(x), round(y), round(x + w), round(y + h), theta)
            x1, y1, x2, y2 = horizontal(box)
            inside = min(x1, y1) >= 0 and max(x2, y2) <= frame
            if inside and not any(x1 < b[2] + 2 and b[0] < x2 + 2 and y1 < b[3] + 2 and b[1] < y2 + 2
                                  for b in (horizontal(t.box) for t in things)):
                things.append(Thing(kind, colour, size, box, bool(rng.random() < .3)))
                break
    things.sort(key=lambda t: t.box)  # from left to right, so that there is one right order to learn
    return Scene(land, tuple(things), frame, (seed, index))


def draw(view: Scene, before: bool = False) -> Image.Image:
    """The scene as an image, or the earlier image of the pair, without what has appeared since."""
    rng, n = np.random.default_rng([*view.seed, 1]), view.frame
    base, second = (np.array(colour, float) for colour in LAND[view.land][:2])
    y, x = np.mgrid[0:n, 0:n] / n
    wave = {"farmland": np.sin(40 * (x + .3 * y)) > 0, "city": (x * 6 % 1 < .15) | (y * 6 % 1 < .15),
            "sea": np.sin(50 * y + 3 * np.sin(9 * x)) > .6, "desert": np.sin(22 * (x - y)) > .5}.get(view.land)
    wave = rng.random((n // 4, n // 4)).repeat(4, 0).repeat(4, 1) > .5 if wave is None else wave
    ground = np.where(wave[..., None], second, base) + rng.normal(0, 4, (n, n, 1))
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for thing in view.things:
        if not (before and thing.appeared):
            pen.polygon([on_thing(thing, u, v) for u, v in SHAPES[thing.kind][0]], fill=PAINT[thing.colour], outline=(40, 40, 40))
    return image


def on_thing(thing: Thing, u: float, v: float) -> tuple[float, float]:
    """Pixel at the point (u, v) of a thing's own box, which reaches from -1 to 1 both ways before it is turned. The last
    pixel of a box that ends at x2 is x2 - 1."""
    x1, y1, x2, y2, theta = thing.box
    cos, sin = math.cos(math.radians(theta)), math.sin(math.radians(theta))
    u, v = u * (x2 - 1 - x1) / 2, v * (y2 - 1 - y1) / 2
    return (x1 + x2 - 1) / 2 + u * cos - v * sin, (y1 + y2 - 1) / 2 + u * sin + v * cos


def place(thing: Thing, frame: int) -> str:
    """Where its centre lies, in words: the image in three rows and three columns."""
    x1, y1, x2, y2 = thing.box[:4]
    column, row = (min(2, int(3 * v / (2 * frame))) for v in (x1 + x2, y1 + y2))
    return PLACES[3 * row + column]


def draw_mask(view: Scene, things: Sequence[Thing]) -> Image.Image:
    """White on black: the pixels of some of the scene's things."""
    image = Image.new("L", (view.frame, view.frame))
    for thing in things:
        ImageDraw.Draw(image).polygon([on_thing(thing, u, v) for u, v in SHAPES[thing.kind][0]], fill=255)
    return image


def draw_from_ground(view: Scene) -> Image.Image:
    """What somebody south of the scene sees, looking north: sky, the land, its things from left to right, far ones small."""
    n, (base, second) = view.frame, LAND[view.land][:2]
    image = Image.new("RGB", (n, n), (150, 190, 235))
    pen = ImageDraw.Draw(image)
    for row in range(n // 2, n):
        pen.line([(0, row), (n, row)], fill=second if row // 6 % 2 else base)
    for thing in sorted(view.things, key=lambda t: t.box[3]):
        x1, _, x2, y2 = thing.box[:4]
        foot, scale = n // 2 + y2 // 2, 0.3 + 0.7 * y2 / n
        half = (x2 - x1) * scale / 2
        pen.rectangle([(x1 + x2) / 2 - half, foot - half, (x1 + x2) / 2 + half, foot],
                      fill=PAINT[thing.colour], outline=(40, 40, 40))
    return image


# ----------------------------------------------------------------------------------------------------------------------
# Questions

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PURPOSE = {"airplane": "What here can fly?", "ship": "What here carries goods over water?", "tank": "What here stores oil?",
           "building": "Where here can people live?", "court": "Where here is sport played?"}


def ask(task: str, view: Scene) -> dict:
    """A question of the task about the scene, and what is right: the fields of a data.Sample, boxes in the frame."""
    rng, frame, things = np.random.default_rng([*view.seed, 2]), view.frame, view.things
    if task == "cls":
        return dict(question=f"Which class does this scene belong to? Classes: {', '.join(LAND)}.", answer=view.land,
                    think=f"{LAND[view.land][2]}.", category=view.land)
    if task == "pair":
        return ask_pair(view, rng)

    kind, colour = str(rng.choice(list(SHAPES))), str(rng.choice(list(PAINT)))
    thing = None
    if things and rng.random() < .92:  # else most likely something that is not there
        thing = things[rng.integers(len(things))]
        kind, colour = thing.kind, thing.colour
    seen = ", ".join(f"{t.colour} {t.kind} {place(t, frame)}" for t in things) or f"Bare {view.land}"
    count = Counter(t.kind for t in things)
    listed = " and ".join(f"{NUMBERS[n]} {kind}{'s' * (n > 1)}" for kind, n in count.items()) or "nothing"
    named = lambda t: f"{t.size} {t.colour} {t.kind} at the {place(t, frame)}"

    if task == "det":
        name = kind if rng.random() < .5 else f"{colour} {kind}"
        found = [t for t in things if name in (t.kind, f"{t.colour} {t.kind}")]
        boxes = tuple(t.box for t in found)
        return dict(question=f"Locate every {name}.", answer=box_text(boxes, frame), boxes=boxes, category=kind,
                    subset=thing.size if thing else "", think=f"{seen}: {len(found)} {name}." if things else f"{seen}.")
    if task == "mlc":
        labels = tuple(LAND) + tuple(SHAPES)
        return dict(question=f"Which of these does the image show? {', '.join(labels)}.", choices=labels, category=view.land,
                    answer=", ".join(x for x in labels if x == view.land or x in count), think=f"{LAND[view.land][2]}: {seen}.")
    if task == "cap":
        captions = (f"{listed} on the {view.land}", f"on the {view.land} there is {listed}",
                    f"an image of {listed}, {view.land} around")
        return dict(question="Describe the image.", answer=captions[0], references=captions, category=view.land, think=f"{seen}.")
    if task == "ground":
        text = ", ".join(f"a {t.size} {t.colour} {t.kind} {box_text([t.box], frame)} at the {place(t, frame)}" for t in things)
        return dict(question="Describe the image and locate what you name.", answer=f"There is {text or 'nothing'}.",
                    boxes=tuple(t.box for t in things), category=view.land, think=f"{seen}.")
    if task == "change":
        new = [named(t) for t in things if t.appeared]
        answer = f"a {' and a '.join(new)} has appeared" if new else "nothing has changed"
        return dict(question="What has changed from the first image to the second?", answer=answer, category=view.land,
                    references=(answer, f"there is now a {' and a '.join(new)}" if new else "no change"), think=f"{seen}.",
                    images=(draw(view, before=True), draw(view)))
    if task == "vqa":
        other = str(rng.choice([k for k in SHAPES if k != kind]))
        subset, question, answer = (
            ("presence", f"Is there a {colour} {kind}?", "yes" if (kind, colour) in [(t.kind, t.colour) for t in things] else "no"),
            ("comp", f"Are there more {kind}s than {other}s?", "yes" if count[kind] > count[other] else "no"),
            ("count", f"How many {kind}s are there?", str(count[kind])),
            ("rural_urban", "Is this a rural or an urban area?", "urban" if view.land == "city" else "rural"))[rng.integers(4)]
        return dict(question=question, answer=answer, think=f"{LAND[view.land][2]}: {seen}.", subset=subset, category=subset)
    if task == "ovd":
        found = [t for t in things if t.kind == kind]
        return dict(question=f"Detect every {kind}.", boxes=tuple(t.box for t in found), category=kind,
                    think=f"{seen}: {len(found)} {kind}.",
                    answer=json_text([dict(bbox_2d=box_numbers(t.box, frame), label=kind) for t in found]))
    if task == "seg":
        found = [t for t in things if t.kind == kind]
        return dict(question=PURPOSE[kind], mask=draw_mask(view, found), boxes=tuple(t.box for t in found), category=kind,
                    think=f"{seen}: {len(found)} {kind}.", answer=json_text([
                        dict(bbox_2d=box_numbers(t.box, frame), **{f"keypoint{i}": [round(x) for x in on_thing(t, 0, v)]
                                                                  for i, v in ((1, -.25), (2, .15))}) for t in found]))
    thing = thing or things[0]  # rcap and rec are about one thing: `scene` gives them at least one
    if task == "rcap":
        return dict(question=f"What is in {box_text([thing.box], frame)}?", answer=f"1 {named(thing)}", boxes=(thing.box,),
                    category=thing.kind, think=f"{seen}.")
    assert task == "rec", f"scenes.ask has no question for the task {task}"
    return dict(question=f"Find the {named(thing)}.", answer=json_text(dict(bbox_2d=box_numbers(thing.box, frame))),
                boxes=(thing.box,), category=thing.kind, think=f"{seen}.", subset="unique" if count[thing.kind] == 1 else "non-unique")


def ask_pair(view: Scene, rng: np.random.Generator) -> dict:
    """Which of four images from above shows the place seen from the ground? The others are scenes on other land."""
    right = int(rng.integers(4))
    others = (scene(view.seed[0], 2**32 + 100 * view.seed[1] + i, view.frame) for i in range(100))  # no scene of a sample
    above = [draw(other) for other in islice((o for o in others if o.land != view.land), 3)]
    above.insert(right, draw(view))
    letter = "ABCD"[right]
    return dict(question="The first image is taken on the ground, the others, A to D, from above. "
                         "Which of them shows the same place?",
                images=(draw_from_ground(view), *above), answer=letter, choices=tuple("ABCD"), category=view.land,
                think=f"The ground is {view.land}, so is {letter}.")
