"""Procedural scenes with exact ground truth: the embedded data set. Nothing to download, never the same scene twice.

A scene is land of one class with 0 to 6 things on it. It is a pure function of (seed, index); `draw` makes an image of it,
and `ask` a question of some task with the answer that the scene dictates. A new task is one function of the table QUESTIONS.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

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
# Questions: what is asked about a scene and what is right, as the fields of a data.Sample, boxes in pixels of the frame

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PURPOSE = {"airplane": "What here can fly?", "ship": "What here carries goods over water?", "tank": "What here stores oil?",
           "building": "Where here can people live?", "court": "Where here is sport played?"}


class About(NamedTuple):
    """What a question can be about."""
    view: Scene
    rng: np.random.Generator  # for what else there is to choose
    thing: Thing | None       # one of the scene's things
    kind: str                 # of that thing; without one any kind, which is most likely not there
    colour: str
    seen: str                 # all things in words: the reasoning that SFT imitates

    def of_kind(self) -> list[Thing]:
        return [t for t in self.view.things if t.kind == self.kind]


def ask(task: str, view: Scene) -> dict:
    """The question of the task about the scene."""
    rng, things, thing = np.random.default_rng([*view.seed, 2]), view.things, None
    kind, colour = str(rng.choice(list(SHAPES))), str(rng.choice(list(PAINT)))
    if things and rng.random() < .92:
        thing = things[rng.integers(len(things))]
        kind, colour = thing.kind, thing.colour
    seen = ", ".join(f"{t.colour} {t.kind} {place(t, view.frame)}" for t in things) or f"Bare {view.land}"
    return QUESTIONS[task](About(view, rng, thing, kind, colour, seen))


def ask_cls(about: About) -> dict:
    land = about.view.land
    return {"question": f"Which class does this scene belong to? Classes: {', '.join(LAND)}.", "answer": land,
            "think": f"{LAND[land][2]}.", "category": land}


def ask_mlc(about: About) -> dict:
    land, labels = about.view.land, tuple(LAND) + tuple(SHAPES)
    right = [label for label in labels if label == land or label in {t.kind for t in about.view.things}]
    return {"question": f"Which of these does the image show? {', '.join(labels)}.", "answer": ", ".join(right),
            "choices": labels, "think": f"{LAND[land][2]}: {about.seen}.", "category": land}


def ask_det(about: About) -> dict:
    name = about.kind if about.rng.random() < .5 else f"{about.colour} {about.kind}"
    boxes = tuple(t.box for t in about.view.things if name in (t.kind, f"{t.colour} {t.kind}"))
    return {"question": f"Locate every {name}.", "answer": box_text(boxes, about.view.frame), "boxes": boxes,
            "think": f"{about.seen}: {len(boxes)} {name}." if about.view.things else f"{about.seen}.",
            "category": about.kind, "subset": about.thing.size if about.thing else ""}


def in_words(thing: Thing, frame: int) -> str:
    return f"{thing.size} {thing.colour} {thing.kind} at the {place(thing, frame)}"


def ask_rcap(about: About) -> dict:
    thing, frame = about.thing or about.view.things[0], about.view.frame
    return {"question": f"What is in {box_text([thing.box], frame)}?", "answer": f"1 {in_words(thing, frame)}",
            "boxes": (thing.box,), "think": f"{about.seen}.", "category": thing.kind}


def ask_ground(about: About) -> dict:
    things, frame = about.view.things, about.view.frame
    text = ", ".join(f"a {t.size} {t.colour} {t.kind} {box_text([t.box], frame)} at the {place(t, frame)}" for t in things)
    return {"question": "Describe the image and locate what you name.", "answer": f"There is {text or 'nothing'}.",
            "boxes": tuple(t.box for t in things), "think": f"{about.seen}.", "category": about.view.land}


def ask_cap(about: About) -> dict:
    land, count = about.view.land, Counter(t.kind for t in about.view.things)
    listed = " and ".join(f"{NUMBERS[n]} {kind}{'s' * (n > 1)}" for kind, n in count.items()) or "nothing"
    captions = (f"{listed} on the {land}", f"on the {land} there is {listed}", f"an image of {listed}, {land} around")
    return {"question": "Describe the image.", "answer": captions[0], "references": captions, "think": f"{about.seen}.",
            "category": land}


def ask_change(about: About) -> dict:
    view = about.view
    new = " and a ".join(in_words(t, view.frame) for t in view.things if t.appeared)
    answer, other = (f"a {new} has appeared", f"there is now a {new}") if new else ("nothing has changed", "no change")
    return {"question": "What has changed from the first image to the second?", "answer": answer, "references": (answer, other),
            "images": (draw(view, before=True), draw(view)), "think": f"{about.seen}.", "category": view.land}


def ask_vqa(about: About) -> dict:
    kind, colour, land, count = about.kind, about.colour, about.view.land, Counter(t.kind for t in about.view.things)
    other = str(about.rng.choice([k for k in SHAPES if k != kind]))
    subset, question, answer = (
        ("presence", f"Is there a {colour} {kind}?", "yes" if any(t.colour == colour for t in about.of_kind()) else "no"),
        ("comp", f"Are there more {kind}s than {other}s?", "yes" if count[kind] > count[other] else "no"),
        ("count", f"How many {kind}s are there?", str(count[kind])),
        ("rural_urban", "Is this a rural or an urban area?", "urban" if land == "city" else "rural"))[about.rng.integers(4)]
    return {"question": question, "answer": answer, "think": f"{LAND[land][2]}: {about.seen}.", "category": subset,
            "subset": subset}


def ask_rec(about: About) -> dict:
    thing, view = about.thing or about.view.things[0], about.view
    alone = sum(t.kind == thing.kind for t in view.things) == 1
    return {"question": f"Find the {in_words(thing, view.frame)}.", "boxes": (thing.box,),
            "answer": json_text({"bbox_2d": box_numbers(thing.box, view.frame)}), "think": f"{about.seen}.",
            "category": thing.kind, "subset": "unique" if alone else "non-unique"}


def ask_ovd(about: About) -> dict:
    boxes = tuple(t.box for t in about.of_kind())
    return {"question": f"Detect every {about.kind}.", "boxes": boxes, "think": f"{about.seen}: {len(boxes)} {about.kind}.",
            "answer": json_text([{"bbox_2d": box_numbers(box, about.view.frame), "label": about.kind} for box in boxes]),
            "category": about.kind}


def ask_seg(about: About) -> dict:
    found = about.of_kind()
    things = [{"bbox_2d": box_numbers(t.box, about.view.frame)} |
              {name: [round(x) for x in on_thing(t, 0, v)] for name, v in (("keypoint1", -.25), ("keypoint2", .15))} for t in found]
    return {"question": PURPOSE[about.kind], "answer": json_text(things), "boxes": tuple(t.box for t in found),
            "mask": draw_mask(about.view, found), "think": f"{about.seen}: {len(found)} {about.kind}.", "category": about.kind}


def ask_pair(about: About) -> dict:
    """Which of four images from above shows the place seen from the ground? The others are scenes on other land."""
    view = about.view
    right = int(np.random.default_rng([*view.seed, 2]).integers(4))  # not about.rng: kind and colour do not matter here
    others = (scene(view.seed[0], 2**32 + 100 * view.seed[1] + i, view.frame) for i in range(100))  # no scene of a sample
    above = [draw(other) for other in islice((o for o in others if o.land != view.land), 3)]
    above.insert(right, draw(view))
    return {"question": "The first image is taken on the ground, the others, A to D, from above. "
                        "Which of them shows the same place?",
            "images": (draw_from_ground(view), *above), "answer": "ABCD"[right], "choices": tuple("ABCD"),
            "think": f"The ground is {view.land}, so is {'ABCD'[right]}.", "category": view.land}


QUESTIONS = {"cls": ask_cls, "mlc": ask_mlc, "det": ask_det, "rcap": ask_rcap, "ground": ask_ground, "cap": ask_cap,
             "change": ask_change, "vqa": ask_vqa, "rec": ask_rec, "ovd": ask_ovd, "seg": ask_seg, "pair": ask_pair}
