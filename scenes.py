"""Procedural scenes with exact ground truth: the embedded data set. Nothing to download, never the same scene twice.

A scene is land of one class with 0 to 6 things on it. It is a pure function of (seed, index); `draw` makes an image of it,
and `ask` a question of some task with the answer that the scene dictates.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from rewards import box_text, horizontal

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


def scene(seed: int, index: int, frame: int) -> Scene:
    """Scene number `index`: a pure function of its arguments. 0 to 6 things that do not touch, some of them turned."""
    rng = np.random.default_rng([seed, index])
    land, things = str(rng.choice(list(LAND))), []
    for _ in range(rng.choice(7, p=[.04, .4, .24, .14, .09, .05, .04])):
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
            x1, y1, x2, y2, theta = thing.box
            cos, sin = math.cos(math.radians(theta)), math.sin(math.radians(theta))
            outline = [(u * (x2 - x1) / 2, v * (y2 - y1) / 2) for u, v in SHAPES[thing.kind][0]]
            pen.polygon([((x1 + x2) / 2 + u * cos - v * sin, (y1 + y2) / 2 + u * sin + v * cos) for u, v in outline],
                        fill=PAINT[thing.colour], outline=(40, 40, 40))
    return image


def place(thing: Thing, frame: int) -> str:
    """Where its centre lies, in words: the image in three rows and three columns."""
    x1, y1, x2, y2 = thing.box[:4]
    column, row = (min(2, int(3 * v / (2 * frame))) for v in (x1 + x2, y1 + y2))
    return PLACES[3 * row + column]


def ask(task: str, view: Scene) -> dict:
    """A question of the task about the scene, and what is right: the fields of a data.Sample, boxes in the frame."""
    if task == "cls":
        return dict(question=f"Which class does this scene belong to? Classes: {', '.join(LAND)}.",
                    answer=view.land, think=f"{LAND[view.land][2]}.")
    rng = np.random.default_rng([*view.seed, 2])
    kind, colour = str(rng.choice(list(SHAPES))), str(rng.choice(list(PAINT)))
    if view.things and rng.random() < .92:  # else most likely something that is not there
        thing = view.things[rng.integers(len(view.things))]
        kind, colour = thing.kind, thing.colour
    name = kind if rng.random() < .5 else f"{colour} {kind}"
    found = [t for t in view.things if name in (t.kind, f"{t.colour} {t.kind}")]
    boxes = tuple(t.box for t in found)
    seen = ", ".join(f"{t.colour} {t.kind} {place(t, view.frame)}" for t in view.things)
    return dict(question=f"Locate every {name}.", answer=box_text(boxes, view.frame), boxes=boxes,
                think=f"{seen}: {len(found)} {name}." if seen else f"Bare {view.land}.")
