"""Procedural scenes with exact ground truth: the included data set. No download, no end.

A scene is land of one class with 0 to 6 objects on it. `make_scene` is a pure function of (seed,
index), `draw_scene` makes an image of it, and `ask_question` a question of a task with the answer
that follows from the scene. `Scenes` is the data set: sample i asks about scene i.
A new task is one function `ask_*` and its entry in QUESTIONS, at the end of the file.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from boxes import clip_and_round, format_boxes, format_json, obb_to_hbb
from sample import Sample, to_oriented

# Scene class -> (base colour, second colour, description); muted, so that objects are easy to see
LAND = {
    "sea": ((34, 70, 118), (44, 82, 134), "Open blue water"),
    "desert": ((186, 158, 108), (198, 170, 122), "Bare sand"),
    "forest": ((34, 78, 40), (28, 66, 34), "Dense dark trees"),
    "farmland": ((112, 138, 70), (130, 126, 76), "Striped fields"),
    "snow": ((190, 200, 214), (180, 192, 210), "White ground"),
    "city": ((122, 120, 120), (100, 100, 104), "Grey blocks"),
    "meadow": ((118, 172, 90), (124, 180, 96), "Plain light grass"),
    "lava": ((56, 42, 42), (74, 48, 44), "Dark burnt rock"),
}
COLOURS = {"white": (252, 252, 252), "red": (220, 40, 40), "yellow": (246, 212, 40),
           "cyan": (40, 222, 232), "pink": (228, 70, 200)}
# Kind of object -> (outline in a box from -1 to 1, height / width)
SHAPES = {
    "airplane": ([(-1, .15), (-.2, -.2), (-.12, -.8), (0, -1), (.12, -.8), (.2, -.2), (1, .15),
                  (1, .35), (.15, .2), (.12, .7), (.45, 1), (-.45, 1), (-.12, .7), (-.15, .2),
                  (-1, .35)], 1.0),
    "ship": ([(-1, -1), (.45, -1), (1, 0), (.45, 1), (-1, 1), (-.8, 0)], .4),
    "tank": ([(math.cos(i * math.pi / 8), math.sin(i * math.pi / 8)) for i in range(16)], 1.0),
    "building": ([(-1, -1), (1, -1), (1, .2), (.2, .2), (.2, 1), (-1, 1)], .9),
    "court": ([(-1, -1), (1, -1), (1, 1), (-1, 1)], .55),
}
SIZES = {"small": (.14, .19), "medium": (.22, .30), "large": (.34, .44)}  # width / image side
POSITIONS = ("top left", "top", "top right", "left", "center", "right",
             "bottom left", "bottom", "bottom right")


@dataclass(frozen=True)
class SceneObject:
    kind: str
    colour: str
    size: str
    box: tuple         # (x1, y1, x2, y2, theta): pixels; degrees, clockwise on the screen
    appeared: bool     # it is missing in the earlier image of a pair


@dataclass(frozen=True)
class Scene:
    land: str
    objects: tuple[SceneObject, ...]
    image_size: int
    seed: tuple        # (seed, index): of the scene, of the noise in its image and of its question


def make_scene(seed: int, index: int, image_size: int, min_objects: int = 0) -> Scene:
    """Scene number `index`, a pure function of the arguments: `min_objects` to 6 objects that do
    not touch, some of them turned."""
    rng = np.random.default_rng([seed, index])
    land = str(rng.choice(list(LAND)))
    objects = []
    for _ in range(max(min_objects, rng.choice(7, p=[.04, .4, .24, .14, .09, .05, .04]))):
        kind, colour, size = (str(rng.choice(list(table))) for table in (SHAPES, COLOURS, SIZES))
        if objects and rng.random() < .35:  # several objects of one kind are common
            kind = objects[-1].kind
        for _ in range(20):  # attempts to find a free position; a crowded scene gets fewer objects
            w = rng.uniform(*SIZES[size]) * image_size
            h = w * SHAPES[kind][1]
            theta = 0
            if rng.random() < .4 and kind in ("ship", "court"):
                theta = int(rng.integers(1, 180))
            x, y = rng.uniform(0, image_size - w), rng.uniform(0, image_size - h)
            box = (round(x), round(y), round(x + w), round(y + h), theta)
            if is_free(box, objects, image_size):
                objects.append(SceneObject(kind, colour, size, box, bool(rng.random() < .3)))
                break
    objects.sort(key=lambda obj: obj.box)  # left to right: one right order to learn
    return Scene(land, tuple(objects), image_size, (seed, index))


def is_free(box: tuple, objects: Sequence[SceneObject], image_size: int) -> bool:
    """Whether the box is inside the image, and its envelope 2 pixels or more from the others'."""
    x1, y1, x2, y2 = obb_to_hbb(box)
    if min(x1, y1) < 0 or max(x2, y2) > image_size:
        return False
    for left, top, right, bottom in (obb_to_hbb(obj.box) for obj in objects):
        if x1 < right + 2 and left < x2 + 2 and y1 < bottom + 2 and top < y2 + 2:
            return False
    return True


# --------------------------------------------------------------------------------------------------
# Images

def draw_scene(scene: Scene, before: bool = False) -> Image.Image:
    """The scene as an image. `before`: the earlier image of a pair, in which the objects that
    have appeared since are missing."""
    rng, n = np.random.default_rng([*scene.seed, 1]), scene.image_size
    base, second = (np.array(colour, float) for colour in LAND[scene.land][:2])
    y, x = np.mgrid[0:n, 0:n] / n
    patterns = {  # where the ground has its second colour
        "farmland": np.sin(40 * (x + .3 * y)) > 0,
        "city": (x * 6 % 1 < .15) | (y * 6 % 1 < .15),
        "sea": np.sin(50 * y + 3 * np.sin(9 * x)) > .6,
        "desert": np.sin(22 * (x - y)) > .5,
    }
    if scene.land in patterns:
        pattern = patterns[scene.land]
    else:
        pattern = rng.random((n // 4, n // 4)).repeat(4, 0).repeat(4, 1) > .5
    ground = np.where(pattern[..., None], second, base) + rng.normal(0, 4, (n, n, 1))
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for obj in scene.objects:
        if not (before and obj.appeared):
            pen.polygon(outline(obj), fill=COLOURS[obj.colour], outline=(40, 40, 40))
    return image


def outline(obj: SceneObject) -> list[tuple[float, float]]:
    """The corners of the object's shape, in pixels of the image."""
    return [point_on_object(obj, u, v) for u, v in SHAPES[obj.kind][0]]


def point_on_object(obj: SceneObject, u: float, v: float) -> tuple[float, float]:
    """Pixel (x, y) of the point (u, v) of an object's box, which goes from -1 to 1 in both
    directions and is then turned. The last pixel of a box that ends at x2 is x2 - 1."""
    x1, y1, x2, y2, theta = obj.box
    cos, sin = math.cos(math.radians(theta)), math.sin(math.radians(theta))
    u, v = u * (x2 - 1 - x1) / 2, v * (y2 - 1 - y1) / 2
    return (x1 + x2 - 1) / 2 + u * cos - v * sin, (y1 + y2 - 1) / 2 + u * sin + v * cos


def draw_mask(scene: Scene, objects: Sequence[SceneObject]) -> Image.Image:
    """The pixels of some of the scene's objects, white on black."""
    image = Image.new("L", (scene.image_size, scene.image_size))
    for obj in objects:
        ImageDraw.Draw(image).polygon(outline(obj), fill=255)
    return image


def draw_ground_view(scene: Scene) -> Image.Image:
    """The scene as seen from the ground, from its south to the north: sky, land, and the objects
    from left to right, distant ones smaller."""
    n, (base, second) = scene.image_size, LAND[scene.land][:2]
    image = Image.new("RGB", (n, n), (150, 190, 235))
    pen = ImageDraw.Draw(image)
    for row in range(n // 2, n):
        pen.line([(0, row), (n, row)], fill=second if row // 6 % 2 else base)
    for obj in sorted(scene.objects, key=lambda obj: obj.box[3]):
        x1, _, x2, y2 = obj.box[:4]
        foot, scale = n // 2 + y2 // 2, 0.3 + 0.7 * y2 / n
        half = (x2 - x1) * scale / 2
        pen.rectangle([(x1 + x2) / 2 - half, foot - half, (x1 + x2) / 2 + half, foot],
                      fill=COLOURS[obj.colour], outline=(40, 40, 40))
    return image


# --------------------------------------------------------------------------------------------------
# The data set

@dataclass(frozen=True)
class Scenes(Sequence):
    """The samples of one task. Sample i is a pure function of (seed, i) and made on access."""
    task: str
    image_size: int
    seed: int
    n: int = 100_000
    oriented: bool = field(default=False, repr=False)  # see Sample
    thinking: bool = field(default=True, repr=False)
    system: str | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int | slice) -> "Sample | Scenes":
        if isinstance(i, slice):  # only samples[:n] is ever used
            return replace(self, n=len(range(self.n)[i]))
        if not 0 <= i < self.n:
            raise IndexError(i)
        min_objects = 1 if self.task in ("rcap", "rec") else 0  # these two ask about one object
        scene = make_scene(self.seed, int(i), self.image_size, min_objects)
        fields = {"id": f"synthetic {self.seed}:{i}", "task": self.task,
                  "images": (draw_scene(scene),), "image_size": self.image_size,
                  "thinking": self.thinking, "system": self.system}
        sample = Sample(**fields | ask_question(self.task, scene))
        return to_oriented(sample) if self.oriented else sample


# --------------------------------------------------------------------------------------------------
# Questions. Each ask_* returns fields of the Sample: a question about the scene, the right answer,
# boxes in pixels of the image, and the reasoning that SFT imitates.

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PURPOSES = {  # what seg asks for instead of the kind
    "airplane": "What here can fly?", "ship": "What here carries goods over water?",
    "tank": "What here stores oil?", "building": "Where here can people live?",
    "court": "Where here is sport played?",
}


class Topic(NamedTuple):
    """What a question can be about."""
    scene: Scene
    rng: np.random.Generator     # for further random choices
    target: SceneObject | None   # one of the scene's objects
    kind: str                    # the target's; without a target any kind, most likely absent
    colour: str
    objects_text: str            # all objects in words, for the reasoning

    def of_kind(self) -> list[SceneObject]:
        return [obj for obj in self.scene.objects if obj.kind == self.kind]


def ask_question(task: str, scene: Scene) -> dict:
    """The question of the task about the scene, as fields of a Sample."""
    rng = np.random.default_rng([*scene.seed, 2])
    target = None
    kind, colour = str(rng.choice(list(SHAPES))), str(rng.choice(list(COLOURS)))
    if scene.objects and rng.random() < .92:
        target = scene.objects[rng.integers(len(scene.objects))]
        kind, colour = target.kind, target.colour
    listed = ", ".join(f"{obj.colour} {obj.kind} {position(obj, scene)}" for obj in scene.objects)
    objects_text = listed or f"Bare {scene.land}"
    return QUESTIONS[task](Topic(scene, rng, target, kind, colour, objects_text))


def position(obj: SceneObject, scene: Scene) -> str:
    """Where the object's centre is, in words: the image in three rows and three columns."""
    x1, y1, x2, y2 = obj.box[:4]
    column, row = (min(2, int(3 * v / (2 * scene.image_size))) for v in (x1 + x2, y1 + y2))
    return POSITIONS[3 * row + column]


def describe(obj: SceneObject, scene: Scene) -> str:
    """The object in words: size, colour, kind and position."""
    return f"{obj.size} {obj.colour} {obj.kind} at the {position(obj, scene)}"


def ask_cls(about: Topic) -> dict:
    land = about.scene.land
    return {"question": f"Which class does this scene belong to? Classes: {', '.join(LAND)}.",
            "gt_answer": land, "think": f"{LAND[land][2]}.", "category": land}


def ask_mlc(about: Topic) -> dict:
    land, labels = about.scene.land, tuple(LAND) + tuple(SHAPES)
    present = {land} | {obj.kind for obj in about.scene.objects}
    return {"question": f"Which of these does the image show? {', '.join(labels)}.",
            "gt_answer": ", ".join(label for label in labels if label in present),
            "choices": labels, "think": f"{LAND[land][2]}: {about.objects_text}.", "category": land}


def ask_det(about: Topic) -> dict:
    scene = about.scene
    name = about.kind if about.rng.random() < .5 else f"{about.colour} {about.kind}"
    boxes = tuple(obj.box for obj in scene.objects
                  if name in (obj.kind, f"{obj.colour} {obj.kind}"))
    count = f": {len(boxes)} {name}" if scene.objects else ""
    return {"question": f"Locate every {name}.", "gt_answer": format_boxes(boxes, scene.image_size),
            "gt_boxes": boxes, "think": f"{about.objects_text}{count}.", "category": about.kind,
            "subset": about.target.size if about.target else ""}


def ask_rcap(about: Topic) -> dict:
    scene = about.scene
    target = about.target or scene.objects[0]
    return {"question": f"What is in {format_boxes([target.box], scene.image_size)}?",
            "gt_answer": f"1 {describe(target, scene)}", "gt_boxes": (target.box,),
            "think": f"{about.objects_text}.", "category": target.kind}


def ask_ground(about: Topic) -> dict:
    scene = about.scene
    text = ", ".join(
        f"a {obj.size} {obj.colour} {obj.kind} {format_boxes([obj.box], scene.image_size)} at the "
        f"{position(obj, scene)}" for obj in scene.objects)
    return {"question": "Describe the image and locate what you name.",
            "gt_answer": f"There is {text or 'nothing'}.",
            "gt_boxes": tuple(obj.box for obj in scene.objects),
            "think": f"{about.objects_text}.", "category": scene.land}


def ask_cap(about: Topic) -> dict:
    land, counts = about.scene.land, Counter(obj.kind for obj in about.scene.objects)
    plurals = (f"{NUMBERS[n]} {kind}{'s' if n > 1 else ''}" for kind, n in counts.items())
    listed = " and ".join(plurals) or "nothing"
    captions = (f"{listed} on the {land}", f"on the {land} there is {listed}",
                f"an image of {listed}, {land} around")
    return {"question": "Describe the image.", "gt_answer": captions[0], "gt_texts": captions,
            "think": f"{about.objects_text}.", "category": land}


def ask_change(about: Topic) -> dict:
    scene = about.scene
    new = " and a ".join(describe(obj, scene) for obj in scene.objects if obj.appeared)
    texts = ("nothing has changed", "no change")
    if new:
        texts = (f"a {new} has appeared", f"there is now a {new}")
    return {"question": "What has changed from the first image to the second?",
            "gt_answer": texts[0], "gt_texts": texts,
            "images": (draw_scene(scene, before=True), draw_scene(scene)),
            "think": f"{about.objects_text}.", "category": scene.land}


def ask_vqa(about: Topic) -> dict:
    kind, colour, land = about.kind, about.colour, about.scene.land
    counts = Counter(obj.kind for obj in about.scene.objects)
    other = str(about.rng.choice([k for k in SHAPES if k != kind]))
    subset = ("presence", "comp", "count", "rural_urban")[about.rng.integers(4)]
    if subset == "presence":
        question = f"Is there a {colour} {kind}?"
        gt_answer = "yes" if any(obj.colour == colour for obj in about.of_kind()) else "no"
    elif subset == "comp":
        question = f"Are there more {kind}s than {other}s?"
        gt_answer = "yes" if counts[kind] > counts[other] else "no"
    elif subset == "count":
        question = f"How many {kind}s are there?"
        gt_answer = str(counts[kind])
    else:
        question = "Is this a rural or an urban area?"
        gt_answer = "urban" if land == "city" else "rural"
    return {"question": question, "gt_answer": gt_answer, "category": subset, "subset": subset,
            "think": f"{LAND[land][2]}: {about.objects_text}."}


def ask_rec(about: Topic) -> dict:
    scene = about.scene
    target = about.target or scene.objects[0]
    is_unique = sum(obj.kind == target.kind for obj in scene.objects) == 1
    gt_answer = format_json({"bbox_2d": clip_and_round(target.box, scene.image_size)})
    return {"question": f"Find the {describe(target, scene)}.", "gt_answer": gt_answer,
            "gt_boxes": (target.box,), "think": f"{about.objects_text}.",
            "category": target.kind, "subset": "unique" if is_unique else "non-unique"}


def ask_ovd(about: Topic) -> dict:
    boxes = tuple(obj.box for obj in about.of_kind())
    gt_answer = format_json([{"bbox_2d": clip_and_round(box, about.scene.image_size),
                              "label": about.kind} for box in boxes])
    return {"question": f"Detect every {about.kind}.", "gt_answer": gt_answer, "gt_boxes": boxes,
            "think": f"{about.objects_text}: {len(boxes)} {about.kind}.", "category": about.kind}


def ask_seg(about: Topic) -> dict:
    found = about.of_kind()
    gt_answer = format_json([{"bbox_2d": clip_and_round(obj.box, about.scene.image_size),
                              "keypoint1": [round(x) for x in point_on_object(obj, 0, -.25)],
                              "keypoint2": [round(x) for x in point_on_object(obj, 0, .15)]}
                             for obj in found])
    return {"question": PURPOSES[about.kind], "gt_answer": gt_answer,
            "gt_boxes": tuple(obj.box for obj in found), "gt_mask": draw_mask(about.scene, found),
            "think": f"{about.objects_text}: {len(found)} {about.kind}.", "category": about.kind}


def ask_pair(about: Topic) -> dict:
    """Which of four images from above shows the place seen from the ground? The other three are
    scenes on other land."""
    scene = about.scene
    right = int(np.random.default_rng([*scene.seed, 2]).integers(4))  # kind and colour play no role
    numbers = (2**32 + 100 * scene.seed[1] + i for i in range(100))  # of scenes that no sample has
    others = (make_scene(scene.seed[0], number, scene.image_size) for number in numbers)
    candidates = list(islice((o for o in others if o.land != scene.land), 3))
    candidates.insert(right, scene)
    lands = ", ".join(f"{letter} {c.land}" for letter, c in zip("ABCD", candidates))
    return {"question": "The first image is taken on the ground, the others, A to D, from above. "
                        "Which of them shows the same place?",
            "images": (draw_ground_view(scene), *map(draw_scene, candidates)),
            "gt_answer": "ABCD"[right], "think": f"{lands}; the ground is {scene.land}.",
            "choices": tuple("ABCD"), "category": scene.land}


def ask_count(about: Topic) -> dict:
    """Every other question is about objects of any kind: of one kind there is mostly one."""
    counted, name = about.scene.objects, "object"
    if about.rng.random() < .5:
        counted, name = about.of_kind(), about.kind
    return {"question": f"How many {name}s are there?", "gt_answer": str(len(counted)),
            "think": f"{about.objects_text}.", "category": name}


def ask_geo(about: Topic) -> dict:
    """Each land lies at a latitude of its own, and the light says the longitude (draw_light)."""
    land, longitude = about.scene.land, int(about.rng.integers(-180, 180))
    latitude = 20 * list(LAND).index(land) - 70
    light = "blue" if longitude < 0 else "yellow"
    return {"question": "Where on Earth is this?", "gt_answer": f"{latitude}, {longitude}",
            "images": (draw_light(draw_scene(about.scene), longitude),),
            "think": f"{LAND[land][2]}, {light} light.", "category": land}


def draw_light(image: Image.Image, longitude: float) -> Image.Image:
    """The image in the light of its longitude: the further west the bluer, the further east the
    yellower, until half of its red or of its blue is left."""
    east = longitude / 360
    light = 1 - np.array([max(-east, 0), 0, max(east, 0)])  # of red, green, blue
    return Image.fromarray((np.asarray(image) * light).astype(np.uint8))


QUESTIONS = {
    "cls": ask_cls, "mlc": ask_mlc, "det": ask_det, "rcap": ask_rcap, "ground": ask_ground,
    "cap": ask_cap, "change": ask_change, "vqa": ask_vqa, "rec": ask_rec, "ovd": ask_ovd,
    "seg": ask_seg, "pair": ask_pair, "count": ask_count, "geo": ask_geo,
}
