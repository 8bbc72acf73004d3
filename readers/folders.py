"""Data sets in their original layout -> Samples. The format is detected from the name of the file,
the content of the folder, or the keys of the records.

To add a format:
1. Write a reader, a generator of Samples with the same arguments as the other readers: of a folder
   here, of a record in json_records.py. `make_sample`, `sample_from_text` or `sample_per_class` of
   box_formats.py makes the Samples.
2. Add its line to the table at the end of the file: FOLDERS here, RECORDS in json_records.py.
3. Test it in tests/test_readers.py, on a small file in the published layout.
"""

import csv
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from boxes import convert_box
from readers.box_formats import (
    bounding_box,
    make_sample,
    min_area_rect,
    phrase_to_question,
    sample_from_text,
    sample_per_class,
)
from readers.json_records import (
    IMAGE_SUFFIXES,
    find_image,
    first_image_size,
    read_mask,
    read_records,
    split_of_name,
    user_error_on,
)
from runtime.errors import NotServedError, UserError
from sample import BOX_TASKS, INSTRUCTIONS, Sample, read_image_size

PAIR_CANDIDATES = 4  # satellite images to choose from in a question of `pair`
NWPU_CLASSES = dict(enumerate((
    "airplane", "ship", "storage tank", "baseball diamond", "tennis court", "basketball court",
    "ground track field", "harbor", "bridge", "vehicle"), 1))
DISASTERS = {  # part of an xBD file's name -> class
    "volcano": "volcano", "fire": "fire", "earthquake": "earthquake", "flood": "flood",
    "tsunami": "tsunami", "tornado": "wind", "harvey": "flood", "florence": "flood",
    "matthew": "wind", "michael": "wind"}


def read_samples(path: Path, task: str, image_size: int, image_folder: Path | None,
                 notes: Counter) -> Iterator[Sample]:
    """The Samples of a file or folder for one task, in its order.

    image_folder  what image names are relative to; default: where the format keeps its images
    notes         counts, by reason, what was left out or changed because of noise
    Raises UserError if the format does not serve the task, and for what a user has to fix.
    """
    if path.suffix == ".csv":
        name, tasks, reader = "a table of ground and satellite images", ("pair",), read_pairs
    elif path.suffix == ".txt" and (path.parent / "Annotations").is_dir():
        name, tasks, reader = "a split of DIOR-RSVG", ("rec", "det"), read_dior_rsvg
    elif path.is_file():
        name, tasks, reader = "a file of records", INSTRUCTIONS, read_records
    else:
        layouts = (layout for pattern, *layout in FOLDERS if any(path.glob(pattern)))
        name, tasks, reader = next(layouts, ("one folder per class", ("cls",), read_class_folders))
    if task not in tasks:
        hint = ""
        if reader is read_class_folders:  # of any folder that is no other layout
            name = f"no known layout (docs/data.md lists them), and {name}"
            hint = "; for a file of records, --data is the file and --images the folder"
        elif reader is read_pairs and task in BOX_TASKS:
            hint = "; boxes are not read from CSV"
        raise NotServedError(f"{path}: {name} serves {', '.join(tasks)}, not {task}{hint}")
    yield from reader(path, task, image_size, image_folder, notes)


# --------------------------------------------------------------------------------------------------
# Readers of folders: (path, task, image_size, image_folder, notes) -> Samples

def read_class_folders(path: Path, task: str, image_size: int, image_folder: Path | None,
                       notes: Counter) -> Iterator[Sample]:
    """EuroSAT and AID: `path[/only folder]/<Class>/<image>`. The question lists the class names."""
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    while len(folders) == 1:  # EuroSAT's class folders are in a folder 2750/
        folders = sorted(p for p in folders[0].iterdir() if p.is_dir())
    files = [file for folder in folders for file in folder.iterdir()]
    if files and not any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        names = ", ".join(folder.name for folder in folders[:5])
        raise UserError(f"{path}: no images directly in {names}; if these are splits and not "
                        "classes, name one of them as --data")
    classes = ", ".join(folder.name for folder in folders)
    question = f"Which class does this scene belong to? Classes: {classes}."
    for folder in folders:
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            source = f"{folder.name}/{file.name}"
            read_image_size(file, source)
            yield make_sample(source, task, image_size, (file,), question, folder.name)


def reader_of_one_file(pattern: str) -> Callable:
    """A reader of folders that keep their records in the one file of this pattern."""
    def reader(path: Path, task: str, image_size: int, image_folder: Path | None,
               notes: Counter) -> Iterator[Sample]:
        files = sorted(path.glob(pattern))
        if len(files) > 1:
            raise UserError(f"{path}: holds {', '.join(f.name for f in files)}; name one of them")
        yield from read_records(files[0], task, image_size, image_folder, notes)
    return reader


def samples_from_lines(file: Path, image: Path, parse: Callable, expected: str, task: str,
                       image_size: int, notes: Counter, split: str = "") -> Iterator[Sample]:
    """Samples of an image whose annotation file has one object a line. `parse` maps (line, size of
    the image) to (class, box in pixels of the resized image)."""
    size = read_image_size(image, str(file))
    with user_error_on("text", str(file)):
        lines = file.read_text().splitlines()
    objects = []
    for i, line in enumerate(lines, 1):
        if line.strip() and not line.startswith(("imagesource:", "gsd:")):  # DOTA's metadata
            with user_error_on(expected, f"{file}: line {i}"):
                objects.append(parse(line, size))
    yield from sample_per_class(str(file), task, image_size, (image,), objects, notes, split=split)


def read_nwpu(path: Path, task: str, image_size: int, image_folder: Path | None,
              notes: Counter) -> Iterator[Sample]:
    """NWPU VHR-10: `ground truth/NNN.txt`, lines (x1,y1),(x2,y2),class in pixels, stray blanks."""
    def parse(line: str, size: tuple[int, int]) -> tuple:
        fields = re.fullmatch(r"\((\d+),(\d+)\),\((\d+),(\d+)\),(\d+)", re.sub(r"\s", "", line))
        *box, label = map(int, fields.groups())
        return NWPU_CLASSES[label], convert_box(box, size, (image_size, image_size))

    for file in sorted(path.glob("ground truth/*.txt")):
        image = find_image(image_folder or path / "positive image set", f"{file.stem}.jpg")
        yield from samples_from_lines(file, image, parse, "(x1,y1),(x2,y2),class", task, image_size,
                                      notes)


def read_dota(path: Path, task: str, image_size: int, image_folder: Path | None,
              notes: Counter) -> Iterator[Sample]:
    """DOTA: [split/]labelTxt*/X.txt, lines x1 y1 .. x4 y4 class [difficulty] in pixels. The corners
    are scaled before an oriented box (OBB) is made of them: two scale factors would skew it."""
    def parse(line: str, size: tuple[int, int]) -> tuple:
        *corners, label = line.split()[:9]
        corners = np.array(corners, float).reshape(4, 2)
        return label, min_area_rect(corners / size * image_size)

    for file in sorted([*path.glob("labelTxt*/*.txt"), *path.glob("*/labelTxt*/*.txt")]):
        root = file.parent.parent
        image = find_image(image_folder or root / "images", f"{file.stem}.png")
        yield from samples_from_lines(file, image, parse, "x1 y1 .. x4 y4 class", task, image_size,
                                      notes, split_of_name(root))


def read_dior_rsvg(path: Path, task: str, image_size: int, image_folder: Path | None,
                   notes: Counter) -> Iterator[Sample]:
    """DIOR-RSVG: all objects of the folder, or those of a list if the path is train.txt, val.txt or
    test.txt. A list names the objects of a split by their number in the order of Annotations/*.xml.

    The published lists split objects, not images. Of the folder, a train object in an image with
    test objects (without test.txt, val objects) gets no split. A named list is read as it is.
    """
    root, lists, count = path, [path / f"{name}.txt" for name in ("train", "val", "test")], 0
    if path.is_file():
        root, lists = path.parent, [path]
    split_of = {}
    for file in filter(Path.is_file, lists):
        with user_error_on("a list of object numbers", str(file)):
            numbers = [int(line) for line in file.read_text().split()]
        split_of |= dict.fromkeys(numbers, split_of_name(file.with_suffix("")))
    held_out = next((s for s in ("test", "val") if s in split_of.values()), None)
    for file in sorted(root.glob("Annotations/*.xml")):
        with user_error_on("an annotation of DIOR-RSVG", str(file)):
            tree = ElementTree.parse(file)
            objects = list(enumerate(tree.iter("object"), count))
            count += len(objects)
            is_held_out = held_out in [split_of.get(i, "") for i, _ in objects]
            if path.is_file():
                objects = [(i, node) for i, node in objects if i in split_of]
            image = (image_folder or root / "JPEGImages") / tree.findtext("filename")
            size = read_image_size(image, str(file)) if objects else None
            for i, node in objects:
                split = split_of.get(i, "")
                if split == "train" and is_held_out:
                    notes[f"train objects in {held_out} images are not trained on"] += 1
                    split = ""
                sides = ("xmin", "ymin", "xmax", "ymax")
                box = [float(node.findtext(f"bndbox/{side}")) for side in sides]
                boxes = [convert_box(box, size, (image_size, image_size))]
                question = phrase_to_question(task, node.findtext("description").strip())
                yield from sample_from_text(
                    f"{file}: object {i}", task, image_size, (image,), size, question, [""], notes,
                    boxes, category=node.findtext("name"), split=split)
    if split_of and max(split_of) >= count:
        raise UserError(f"{path}: object {max(split_of)} is listed, but Annotations holds {count}; "
                        "some annotations are missing")


def read_xbd(path: Path, task: str, image_size: int, image_folder: Path | None,
             notes: Counter) -> Iterator[Sample]:
    """xBD: [split/]images/*_{pre,post}_disaster.png with labels or masks of the later image. cls
    asks for the disaster, and whether a building is damaged. det, which needs the labels, asks for
    the buildings of each class of damage.

    train (tier1 in the geotiffs) and tier3 are for training. The xView2 challenge used test for its
    public leaderboard and hold for its final ranking. Here hold is "val": unused beside test.
    """
    pattern = "images/*_post_disaster.*"
    for post in sorted([*path.glob(pattern), *path.glob(f"*/{pattern}")]):
        pair, source = (post.with_name(post.name.replace("_post_", "_pre_")), post), post.name
        size, split = first_image_size(pair, source), split_of_name(post.parent.parent)
        with user_error_on("an annotation of xBD", source):
            buildings, damaged = read_xbd_annotation(post, size, image_size)
        if task == "cls":
            yield from ask_about_disaster(source, image_size, pair, damaged, split)
        elif buildings is None:
            notes["image pairs without labels/*.json left out"] += 1
        else:
            classified = [(kind, box) for kind, box in buildings if kind != "un-classified"]
            if len(classified) < len(buildings):
                notes["buildings of no class left out"] += len(buildings) - len(classified)
            question = "Locate every {} building in the second image."
            yield from sample_per_class(source, task, image_size, pair, classified, notes, question,
                                        split=split)


def read_xbd_annotation(post: Path, size: tuple[int, int], image_size: int) -> tuple:
    """(buildings, damaged); None for what is not annotated. `buildings` is a list of (damage, box
    in pixels of the resized image), from labels/*.json. `damaged`, whether any is, comes from that
    file or from a mask in targets/ or masks/ (0 no building, 1 no damage .. 4 destroyed)."""
    root = post.parent.parent
    label = root / "labels" / f"{post.stem}.json"
    if label.is_file():
        features = json.loads(label.read_text(encoding="utf-8"))["features"]["xy"]
        buildings = [(f["properties"]["subtype"], polygon_box(f["wkt"], size, image_size))
                     for f in features]
        damage = ("minor-damage", "major-damage", "destroyed")
        return buildings, any(kind in damage for kind, _ in buildings)
    for mask in (root / "targets" / f"{post.stem}_target.png", root / "masks" / post.name):
        if mask.is_file():
            return None, (np.asarray(Image.open(mask)) > 1).any()
    return None, None


def polygon_box(wkt: str, size: tuple[int, int], image_size: int) -> tuple:
    """POLYGON ((x y, ..)) in pixels -> its axis-aligned box (HBB), pixels of the resized image."""
    points = np.reshape(re.findall(r"[-\d.e]+", wkt.partition("((")[2]), (-1, 2)).astype(float)
    return bounding_box(points / size * image_size)


def ask_about_disaster(source: str, image_size: int, pair: tuple, damaged: bool | None,
                       split: str) -> Iterator[Sample]:
    """What the disaster is, and whether there is damage (None: not annotated)."""
    kind = next((kind for name, kind in DISASTERS.items() if name in source), None)
    if kind is None:
        raise UserError(f"{source}: the name has none of xBD's disasters ({', '.join(DISASTERS)}); "
                        "rename or remove it")
    classes = ", ".join(sorted(set(DISASTERS.values())))
    question = f"Which disaster struck between the images? Classes: {classes}."
    yield make_sample(f"{source}, disaster", "cls", image_size, pair, question, kind,
                      think=f"The damage is that of {kind}.", split=split)
    if damaged is not None:
        question = "Is any building damaged in the second image? Classes: yes, no."
        yield make_sample(f"{source}, damage", "cls", image_size, pair, question,
                          "yes" if damaged else "no",
                          think=f"{'A' if damaged else 'No'} building is damaged.", split=split)


def read_earthreason(path: Path, task: str, image_size: int, image_folder: Path | None,
                     notes: Counter) -> Iterator[Sample]:
    """EarthReason: [split/]QAs/X.json with `questions`, images/X.*, and labels/X.png, a mask that
    is empty if there is no target."""
    for file in sorted([*path.glob("QAs/*.json"), *path.glob("*/QAs/*.json")]):
        root = file.parent.parent
        with user_error_on("`questions` of EarthReason", str(file)):
            image = find_image(root / "images", f"{file.stem}.jpg").name
            row = {"problem": json.loads(file.read_text(encoding="utf-8"))["questions"],
                   "image": f"images/{image}", "mask": f"labels/{file.stem}.png",
                   "split": split_of_name(root)}
            yield from read_mask(str(file), row, task, image_size, root, notes)


# --------------------------------------------------------------------------------------------------
# Cross-view pairs

class Place(NamedTuple):
    source: str
    ground: Path
    satellite: Path
    position: tuple | None  # (longitude, latitude) in degrees
    city: str


def read_pairs(path: Path, task: str, image_size: int, image_folder: Path | None,
               notes: Counter) -> Iterator[Sample]:
    """Questions with a ground image and PAIR_CANDIDATES satellite images, one of them right. The
    right letters follow the rank of a hash, so that their counts differ by at most 1."""
    places = read_places(path, image_folder)
    k = min(PAIR_CANDIDATES, len(places))
    letters = tuple("ABCDEFGHIJ"[:k])
    by_hash = sorted(range(len(places)), key=lambda i: zlib.crc32(places[i].ground.name.encode()))
    right_of = {i: rank % k for rank, i in enumerate(by_hash)}
    others_of = other_places([place.position for place in places])
    for i, (source, ground, satellite, _, city) in enumerate(places):
        others = [places[j].satellite for j in others_of[i]]
        wrong = list(dict.fromkeys(other for other in others if other != satellite))[: k - 1]
        expected = max(k, 2) - 1
        if len(wrong) < expected:
            raise UserError(f"{source}: {len(wrong)} other places to choose from, "
                            f"expected {expected}; add pairs")
        question = (f"The first image is taken on the ground, the others, A to {letters[-1]}, from "
                    "above. Which of them shows the same place?")
        right = right_of[i]
        candidates = (*wrong[:right], satellite, *wrong[right:])
        yield make_sample(source, task, image_size, (ground, *candidates), question, letters[right],
                          choices=letters, category=city)


def read_places(path: Path, image_folder: Path | None) -> list[Place]:
    """The lines of tables without a header: `aerial,ground[,annotation]` (CVUSA) or
    `name,longitude,latitude,city,aerial,ground` (CV-Cities, <city>/img_info.csv)."""
    places, files = [], [path]
    if path.is_dir():
        files = sorted([*path.glob("*.csv"), *path.glob("*/img_info.csv")])
    for file in files:
        with user_error_on("a table of text", str(file)):
            lines = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines()))
        for i, line in enumerate(lines, 1):
            source = f"{file}: line {i}"
            with user_error_on("`aerial,ground` or `name,lon,lat,city,aerial,ground`", source):
                if len(line) > 5:
                    _, lon, lat, city, aerial, ground = line[:6]
                    position, root = (float(lon), float(lat)), image_folder or file.parent.parent
                else:
                    aerial, ground = line[:2]
                    position, city, root = None, "", image_folder or file.parent
                first_image_size((root / ground, root / aerial), source)
                places.append(Place(source, root / ground, root / aerial, position, city))
    return places


def other_places(positions: list) -> list[np.ndarray]:
    """For each place the indices of other places, whose images are wrong candidates. If all places
    have a position, the nearest come first, without those at the same position, which would be
    right too. Otherwise they are drawn at random, with the place's index as the seed."""
    n = len(positions)
    few = min(n, 4 * PAIR_CANDIDATES)
    if not positions or None in positions:
        return [np.random.default_rng(i).choice(n, few, replace=False) for i in range(n)]
    lon, lat = np.radians(np.reshape(positions, (-1, 2))).T
    x, y, z = np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)
    points = np.stack([x, y, z], 1)  # (n, 3) on the unit sphere
    distances, indices = cKDTree(points).query(points, few)
    distances, indices = distances.reshape(n, few), indices.reshape(n, few)
    return [indices[i][distances[i] > 0] for i in range(n)]


# (files that identify a folder, its name, the tasks that it may serve, reader); first match counts
FOLDERS = (
    ("dataset_info.json", "an EarthDial shard", INSTRUCTIONS, read_records),
    ("dataset_dict.json", "an EarthDial shard", INSTRUCTIONS, read_records),
    ("*.parquet", "a folder of parquet", INSTRUCTIONS, read_records),
    ("data/*.parquet", "a folder of parquet", INSTRUCTIONS, read_records),
    ("ground truth/*.txt", "NWPU VHR-10", ("det", "ovd"), read_nwpu),
    ("labelTxt*/*.txt", "DOTA", ("det", "ovd"), read_dota),
    ("*/labelTxt*/*.txt", "DOTA", ("det", "ovd"), read_dota),
    ("Annotations/*.xml", "DIOR-RSVG", ("rec", "det"), read_dior_rsvg),
    ("images/*_post_disaster.*", "xBD", ("cls", "det"), read_xbd),
    ("*/images/*_post_disaster.*", "xBD", ("cls", "det"), read_xbd),
    ("QAs/*.json", "EarthReason", ("seg",), read_earthreason),
    ("*/QAs/*.json", "EarthReason", ("seg",), read_earthreason),
    ("LevirCCcaptions*.json", "LEVIR-CC", ("change",), reader_of_one_file("LevirCCcaptions*.json")),
    ("*_questions.json", "RSVQA", ("vqa",), reader_of_one_file("*_questions.json")),
    ("data.csv", "a folder of ground and satellite images", ("pair",), read_pairs),
    ("img_info.csv", "CV-Cities", ("pair",), read_pairs),
    ("*/img_info.csv", "CV-Cities", ("pair",), read_pairs),
)
