"""Data sets as they lie on disk -> Samples: `read` tells the format by file name, by what a folder holds, or by the keys of
its records (records.py).

A folder layout is one generator and one line of the table FOLDERS at the end.
"""

import csv
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from data import BadInput, Sample, convert_box, image_size
from formats.notation import asking, build, each_class, from_text, turned_box, upright_box
from formats.records import IMAGE_SUFFIXES, expecting, find_image, first_size, read_mask, read_records
from rewards import TASKS

PAIR_CHOICES = 4  # images from above to choose from in an item of `pair`
NWPU = dict(enumerate(("airplane", "ship", "storage tank", "baseball diamond", "tennis court", "basketball court",
                       "ground track field", "harbor", "bridge", "vehicle"), 1))
DISASTERS = {"volcano": "volcano", "fire": "fire", "earthquake": "earthquake", "flood": "flood", "tsunami": "tsunami",
             "tornado": "wind", "harvey": "flood", "florence": "flood", "matthew": "wind", "michael": "wind"}


def read(path: Path, task: str, frame: int, images: Path | None, skipped: Counter) -> Iterator[Sample]:
    """The Samples of a file or folder for one task, in its order; `images` is the folder that image names are relative to,
    by default the file's own; `skipped` counts, by reason, what noise had left out or changed.

    Raises BadInput where the format does not serve the task, and for whatever a user has to mend.
    """
    if path.suffix == ".csv":
        form = ("a table of ground and satellite images", ("pair",), read_pairs)
    elif path.suffix == ".txt" and (path.parent / "Annotations").is_dir():
        form = ("a split of DIOR-RSVG", ("rec", "det"), read_dior_rsvg)
    elif path.is_file():
        form = ("a file of records", TASKS, read_records)
    else:
        form = next((form for pattern, *form in FOLDERS if any(path.glob(pattern))),
                    ("a folder of class folders", ("cls",), read_class_folders))
    name, serves, reader = form
    if task not in serves:
        raise BadInput(f"{path}: {name} serves {', '.join(serves)}, not {task}")
    yield from reader(path, task, frame, images, skipped)


# ----------------------------------------------------------------------------------------------------------------------
# Folders: (path, task, frame, folder of the images, skipped) -> Samples

def read_class_folders(path: Path, task: str, frame: int, images: Path | None, skipped: Counter) -> Iterator[Sample]:
    """EuroSAT- and AID-style folders: `path[/only folder]/<Class>/<image>`; the class names are the question's choices."""
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    while len(folders) == 1:  # EuroSAT keeps its classes below one more folder, 2750/
        folders = sorted(p for p in folders[0].iterdir() if p.is_dir())
    classes = ", ".join(folder.name for folder in folders)
    for folder in folders:
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            image_size(file, f"{folder.name}/{file.name}")
            yield build(f"{folder.name}/{file.name}", task, frame, (file,),
                        f"Which class does this scene belong to? Classes: {classes}.", folder.name)


def read_the_file(pattern: str) -> Callable:
    """A reader of folders whose records lie in the one file of this pattern."""
    def reader(path: Path, task: str, frame: int, images: Path | None, skipped: Counter) -> Iterator[Sample]:
        files = sorted(path.glob(pattern))
        if len(files) > 1:
            raise BadInput(f"{path}: holds {', '.join(file.name for file in files)}; name one of them")
        yield from read_records(files[0], task, frame, images, skipped)
    return reader


def from_lines(file: Path, image: Path, parse: Callable, form: str, task: str, frame: int,
               skipped: Counter) -> Iterator[Sample]:
    """Questions for the classes of an image whose annotation has a line for each thing: `parse` makes (class, box in the
    frame) of a line and the image's size."""
    size, things = image_size(image, str(file)), []
    with expecting("text", str(file)):
        lines = file.read_text().splitlines()
    for i, line in enumerate(lines, 1):
        if line.strip() and not line.startswith(("imagesource:", "gsd:")):  # DOTA's metadata
            with expecting(form, f"{file}: line {i}"):
                things.append(parse(line, size))
    yield from each_class(str(file), task, frame, (image,), things, skipped)


def read_nwpu(path: Path, task: str, frame: int, images: Path | None, skipped: Counter) -> Iterator[Sample]:
    """NWPU VHR-10: `ground truth/NNN.txt` with lines (x1,y1),(x2,y2),class in pixels, blanks in odd places."""
    def parse(line: str, size: tuple[int, int]) -> tuple:
        fields = re.fullmatch(r"\((\d+),(\d+)\),\((\d+),(\d+)\),(\d+)", re.sub(r"\s", "", line))
        *box, label = map(int, fields.groups())
        return NWPU[label], convert_box(box, size, (frame, frame))

    for file in sorted(path.glob("ground truth/*.txt")):
        image = find_image(images or path / "positive image set", f"{file.stem}.jpg")
        yield from from_lines(file, image, parse, "(x1,y1),(x2,y2),class", task, frame, skipped)


def read_dota(path: Path, task: str, frame: int, images: Path | None, skipped: Counter) -> Iterator[Sample]:
    """DOTA: `labelTxt*/X.txt` with lines x1 y1 .. x4 y4 class [difficulty] in pixels. The corners are brought to the frame
    before they become a box: scaled by two factors, a turned rectangle is none any more."""
    def parse(line: str, size: tuple[int, int]) -> tuple:
        return line.split()[8], turned_box(np.array(line.split()[:8], float).reshape(4, 2) / size * frame)

    for file in sorted(path.glob("labelTxt*/*.txt")):
        image = find_image(images or path / "images", f"{file.stem}.png")
        yield from from_lines(file, image, parse, "x1 y1 .. x4 y4 class", task, frame, skipped)


def read_dior_rsvg(path: Path, task: str, frame: int, images: Path | None, skipped: Counter) -> Iterator[Sample]:
    """DIOR-RSVG: all objects of the folder, or those of a split where the path is train.txt, val.txt or test.txt, which
    name objects by their number in a walk through Annotations/*.xml."""
    root, wanted, count = path if path.is_dir() else path.parent, None, 0
    if path.is_file():
        with expecting("a list of object numbers", str(path)):
            wanted = {int(line) for line in path.read_text().split()}
    for file in sorted(root.glob("Annotations/*.xml")):
        with expecting("an annotation of DIOR-RSVG", str(file)):
            tree = ElementTree.parse(file)
            objects = list(enumerate(tree.iter("object"), count))
            count += len(objects)
            objects = [(i, thing) for i, thing in objects if wanted is None or i in wanted]
            image = (images or root / "JPEGImages") / tree.findtext("filename")
            size = image_size(image, str(file)) if objects else None
            for i, thing in objects:
                box = [float(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
                question = asking(task, thing.findtext("description").strip())
                yield from from_text(f"{file}: object {i}", task, frame, (image,), size, question, [""], skipped,
                                     [convert_box(box, size, (frame, frame))], category=thing.findtext("name"))
    if wanted and max(wanted) >= count:
        raise BadInput(f"{path}: names object {max(wanted)}, but Annotations holds {count}; some annotations are missing")


def read_xbd(path: Path, task: str, frame: int, images: Path | None, skipped: Counter) -> Iterator[Sample]:
    """xBD: images/*_{pre,post}_disaster.png, and of the later one labels/*.json (WKT polygons in pixels) or a mask in
    targets/ or masks/ (0 none, 1 no damage .. 4 destroyed). cls asks for the disaster, and whether a building is damaged;
    det, which needs the labels, for the buildings of each class of damage."""
    for after in sorted([*path.glob("images/*_post_disaster.*"), *path.glob("*/images/*_post_disaster.*")]):
        root, where, pair = after.parent.parent, after.name, (after.with_name(after.name.replace("_post_", "_pre_")), after)
        size, buildings, damaged = first_size(pair, where), None, None
        masks = (root / "targets" / f"{after.stem}_target.png", root / "masks" / after.name)
        with expecting("annotated as xBD is", where):
            if (label := root / "labels" / f"{after.stem}.json").is_file():
                features = json.loads(label.read_text(encoding="utf-8"))["features"]["xy"]
                buildings = [(b["properties"]["subtype"], polygon_box(b["wkt"], size, frame)) for b in features]
                damaged = any(kind in ("minor-damage", "major-damage", "destroyed") for kind, _ in buildings)
            elif mask := next((mask for mask in masks if mask.is_file()), None):
                damaged = (np.asarray(Image.open(mask)) > 1).any()
        if task == "cls":
            yield from ask_xbd(where, frame, pair, damaged)
        elif buildings is None:
            skipped["image pairs without labels/*.json left out"] += 1
        else:
            known = [(kind, box) for kind, box in buildings if kind != "un-classified"]
            if len(known) < len(buildings):
                skipped["buildings of no class left out"] += len(buildings) - len(known)
            yield from each_class(where, task, frame, pair, known, skipped, "Locate every {} building in the second image.")


def polygon_box(wkt: str, size: tuple[int, int], frame: int) -> tuple:
    """The upright box, in the frame, of a polygon in pixels: POLYGON ((x y, x y, ..))."""
    points = np.reshape(re.findall(r"[-\d.e]+", wkt.partition("((")[2]), (-1, 2)).astype(float)
    return upright_box(points / size * frame)


def ask_xbd(where: str, frame: int, pair: tuple, damaged: bool | None) -> Iterator[Sample]:
    """What disaster, and is there damage (None: not annotated)?"""
    kind = next((kind for name, kind in DISASTERS.items() if name in where), None)
    if kind is None:
        raise BadInput(f"{where}: the name tells none of xBD's disasters ({', '.join(DISASTERS)}); rename or remove it")
    question = f"Which disaster struck between the images? Classes: {', '.join(sorted(set(DISASTERS.values())))}."
    yield build(f"{where}, disaster", "cls", frame, pair, question, kind, think=f"The damage is that of {kind}.")
    if damaged is not None:
        yield build(f"{where}, damage", "cls", frame, pair, "Is any building damaged in the second image? Classes: yes, no.",
                    "yes" if damaged else "no", think=f"{'A' if damaged else 'No'} building is damaged.")


def read_earthreason(path: Path, task: str, frame: int, images: Path | None, skipped: Counter) -> Iterator[Sample]:
    """EarthReason: [split/]QAs/X.json with `questions`, images/X.*, labels/X.png; an empty mask where there is no target."""
    for file in sorted([*path.glob("QAs/*.json"), *path.glob("*/QAs/*.json")]):
        root, name = file.parent.parent, f"{file.stem}.jpg"
        with expecting("`questions` of EarthReason", str(file)):
            questions = json.loads(file.read_text(encoding="utf-8"))["questions"]
            image, mask = f"images/{find_image(root / 'images', name).name}", f"labels/{file.stem}.png"
            yield from read_mask(str(file), {"image": image, "mask": mask, "problem": questions}, task, frame, root, skipped)


# ----------------------------------------------------------------------------------------------------------------------
# Cross-view pairs

def read_pairs(path: Path, task: str, frame: int, images: Path | None, skipped: Counter) -> Iterator[Sample]:
    """Ground and satellite images -> items of PAIR_CHOICES satellite images, one of them right. Lines without a header:
    `aerial,ground[,annotation]` (CVUSA) or `name,longitude,latitude,city,aerial,ground` (CV-Cities, <city>/img_info.csv).

    The letters follow the rank of a hash, so that each is right equally often, up to one.
    """
    places = []  # (line, ground image, satellite image, (longitude, latitude) or None, city)
    for file in [path] if path.is_file() else sorted([*path.glob("*.csv"), *path.glob("*/img_info.csv")]):
        with expecting("a table of text", str(file)):
            lines = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines()))
        for i, line in enumerate(lines, 1):
            where, cities = f"{file}: line {i}", len(line) > 5
            with expecting("`aerial,ground` or `name,longitude,latitude,city,aerial,ground`", where):
                aerial, ground = line[4:6] if cities else line[:2]
                root = images or (file.parent.parent if cities else file.parent)
                first_size((root / ground, root / aerial), where)
                at = (float(line[1]), float(line[2])) if cities else None
                places.append((where, root / ground, root / aerial, at, line[3] if cities else ""))
    k, near = min(PAIR_CHOICES, len(places)), neighbours([place[3] for place in places])
    letters = tuple("ABCDEFGHIJ"[:k])
    by_hash = sorted(range(len(places)), key=lambda i: zlib.crc32(places[i][1].name.encode()))
    for i, right in sorted((i, rank % k) for rank, i in enumerate(by_hash)):
        where, ground, aerial, _, city = places[i]
        wrong = list(dict.fromkeys(places[j][2] for j in near(i) if places[j][2] != aerial))[: k - 1]
        if not 0 < len(wrong) == k - 1:
            raise BadInput(f"{where}: {len(wrong)} other places to choose from, expected {max(k, 2) - 1}; add pairs")
        question = (f"The first image is taken on the ground, the others, A to {letters[-1]}, from above. "
                    "Which of them shows the same place?")
        yield build(where, task, frame, (ground, *wrong[:right], aerial, *wrong[right:]), question, letters[right],
                    choices=letters, category=city)


def neighbours(positions: list) -> Callable[[int], Iterable[int]]:
    """place -> other places to take wrong answers from: the nearest first, where all have (longitude, latitude) in degrees,
    else in an order drawn from a seed. A place at the very same position would be right as well, so it is none of them."""
    n, few = len(positions), min(len(positions), 4 * PAIR_CHOICES)
    if None in positions:
        return lambda i: np.random.default_rng(i).choice(n, few, replace=False)
    from scipy.spatial import cKDTree
    lon, lat = np.radians(np.reshape(positions, (-1, 2))).T
    points = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)  # (n, 3) on the unit sphere
    distance, index = (x.reshape(n, few) for x in cKDTree(points).query(points, few))
    return lambda i: index[i][distance[i] > 0]


FOLDERS = (  # (files by which to know the folder, what it is, the tasks it may serve, its reader); the first line that fits
    ("dataset_info.json", "an EarthDial shard", TASKS, read_records),
    ("dataset_dict.json", "an EarthDial shard", TASKS, read_records),
    ("*.parquet", "a folder of parquet", TASKS, read_records),
    ("data/*.parquet", "a folder of parquet", TASKS, read_records),
    ("ground truth/*.txt", "NWPU VHR-10", ("det", "ovd"), read_nwpu),
    ("labelTxt*/*.txt", "DOTA", ("det", "ovd"), read_dota),
    ("Annotations/*.xml", "DIOR-RSVG", ("rec", "det"), read_dior_rsvg),
    ("images/*_post_disaster.*", "xBD", ("cls", "det"), read_xbd),
    ("*/images/*_post_disaster.*", "xBD", ("cls", "det"), read_xbd),
    ("QAs/*.json", "EarthReason", ("seg",), read_earthreason),
    ("*/QAs/*.json", "EarthReason", ("seg",), read_earthreason),
    ("LevirCCcaptions*.json", "LEVIR-CC", ("change",), read_the_file("LevirCCcaptions*.json")),
    ("*_questions.json", "RSVQA", ("vqa",), read_the_file("*_questions.json")),
    ("data.csv", "a folder of ground and satellite images", ("pair",), read_pairs),
    ("img_info.csv", "CV-Cities", ("pair",), read_pairs),
    ("*/img_info.csv", "CV-Cities", ("pair",), read_pairs),
)
