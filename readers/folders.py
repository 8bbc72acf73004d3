"""Data sets in their original layout -> Samples. The format is detected from the name of the file,
the content of the folder, or the keys of the records.

To add a format:
1. Write a reader, a generator of Samples with the same arguments as the other readers: of a folder
   here, of a record in json_records.py. `make_sample`, `sample_from_text` or `sample_per_class` of
   box_formats.py makes the Samples.
2. Add its line to the table at the end of the file: FOLDERS here, RECORDS in json_records.py.
3. Test it in tests/test_readers.py, on a small file in the published layout.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from boxes import convert_box
from readers.box_formats import (
    bounding_box,
    make_sample,
    min_area_rect,
    phrase_to_question,
    sample_from_text,
    sample_per_class,
)
from readers.cross_view import read_pairs
from readers.files import (
    IMAGE_SUFFIXES,
    find_image,
    first_image_size,
    split_of_name,
    user_error_on,
)
from readers.json_records import CHANGE_QUESTION, read_mask, read_records
from runtime.errors import NotServedError, UserError
from sample import BOX_TASKS, INSTRUCTIONS, Sample, read_image_size

FMOW_VIEWS = 4  # images of a place in a question, as in EarthDial
NWPU_CLASSES = dict(enumerate((
    "airplane", "ship", "storage tank", "baseball diamond", "tennis court", "basketball court",
    "ground track field", "harbor", "bridge", "vehicle"), 1))
DISASTERS = {  # part of an xBD file's name -> class
    "volcano": "volcano", "fire": "fire", "earthquake": "earthquake", "flood": "flood",
    "tsunami": "tsunami", "tornado": "wind", "harvey": "flood", "florence": "flood",
    "matthew": "wind", "michael": "wind"}


def read_samples(path: Path, tasks: Sequence[str], image_size: int, image_folder: Path | None,
                 notes: dict[str, Counter]) -> dict[str, list[Sample] | NotServedError]:
    """The Samples of a file or folder for each task, in its order; an error for a task that its
    format does not serve.

    image_folder  what image names are relative to; default: where the format keeps its images
    notes         for each task, by reason, how much was left out or changed because of noise
    Raises UserError for what a user has to fix.
    """
    file, name, served, reader = layout_of(path)
    found = {task: not_served(path, task, name, served, reader) for task in tasks}
    tasks = [task for task in found if task in served]
    if reader is read_records:
        return found | read_records(file, tasks, image_size, image_folder, notes)
    return found | {task: list(reader(file, task, image_size, image_folder, notes[task]))
                    for task in tasks}


def layout_of(path: Path) -> tuple[Path, str, Sequence[str], Callable]:
    """(file or folder to read, name of its format, the tasks that it may serve, its reader)."""
    if path.suffix == ".p" or path.name == "instances.json" and any(path.parent.glob("refs(*).p")):
        return path, "RRSIS-D", INSTRUCTIONS, refuse_pickle
    if path.suffix == ".csv":
        return path, "a table of ground and satellite images", ("pair",), read_pairs
    if path.suffix == ".txt" and (path.parent / "Annotations").is_dir():
        return path, "a split of DIOR-RSVG", ("rec", "det"), read_dior_rsvg
    if path.is_file():
        return path, "a file of records", INSTRUCTIONS, read_records
    for pattern, name, served, reader in FOLDERS:
        if any(path.glob(pattern)):
            if reader is None:
                return only_file(path, pattern), name, served, read_records
            return path, name, served, reader
    return path, "one folder per class", ("cls",), read_class_folders


def not_served(path: Path, task: str, name: str, served: Sequence[str],
               reader: Callable) -> NotServedError:
    hint = ""
    if reader is read_class_folders:  # of any folder that is no other layout
        name = f"no known layout (docs/data.md lists them), and {name}"
        hint = "; for a file of records, --data is the file and --images the folder"
    elif reader is read_pairs and task in BOX_TASKS:
        hint = "; boxes are not read from CSV"
    return NotServedError(f"{path}: {name} serves {', '.join(served)}, not {task}{hint}")


def only_file(path: Path, pattern: str) -> Path:
    """The one file of this pattern, which holds the records of a folder."""
    files = sorted(path.glob(pattern))
    if len(files) > 1:
        raise UserError(f"{path}: holds {', '.join(f.name for f in files)}; name one of them")
    return files[0]


# --------------------------------------------------------------------------------------------------
# Readers of folders: (path, task, image_size, image_folder, notes) -> Samples

def subfolders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir())


def read_class_folders(path: Path, task: str, image_size: int, image_folder: Path | None,
                       notes: Counter) -> Iterator[Sample]:
    """EuroSAT and AID: `path[/split][/only folder]/<Class>/<image>`. The question lists the class
    names."""
    roots = subfolders(path)
    has_splits = bool(roots) and all(map(split_of_name, roots))
    root_of = {}
    for root in roots if has_splits else [path]:
        folders = subfolders(root)
        while len(folders) == 1 and subfolders(folders[0]):  # EuroSAT's classes are in 2750/
            folders = subfolders(folders[0])
        root_of |= dict.fromkeys(folders, root)
    files = [file for folder in root_of for file in folder.iterdir()]
    if files and not any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        names = ", ".join(folder.name for folder in list(root_of)[:5])
        raise UserError(f"{path}: no images directly in {names}; if these are splits and not "
                        "classes, name one of them as --data")
    classes = ", ".join(sorted({folder.name for folder in root_of}))
    question = f"Which class does this scene belong to? Classes: {classes}."
    for folder, root in root_of.items():
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            source = f"{root.name}/" * has_splits + f"{folder.name}/{file.name}"
            read_image_size(file, source)
            yield make_sample(source, task, image_size, (file,), question, folder.name,
                              split=split_of_name(root))


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
    is empty if there is no target. The release names no class: `category` is for --shots."""
    for file in sorted([*path.glob("QAs/*.json"), *path.glob("*/QAs/*.json")]):
        root = file.parent.parent
        with user_error_on("`questions` of EarthReason", str(file)):
            document = json.loads(file.read_text(encoding="utf-8"))
            image = find_image(root / "images", f"{file.stem}.jpg").name
            row = {"problem": document["questions"], "category": document.get("category"),
                   "image": f"images/{image}", "mask": f"labels/{file.stem}.png",
                   "split": split_of_name(root)}
            yield from read_mask(str(file), row, task, image_size, root, notes)


def read_fmow(path: Path, task: str, image_size: int, image_folder: Path | None,
              notes: Counter) -> Iterator[Sample]:
    """fMoW: [split/]<class>/<class>_<i>/<class>_<i>_<j>_rgb.jpg, image j of place i. cls asks for
    the class of a place, from its first images as a whole. (`test` has no class folders.)"""
    pattern, files_of = "*/*_[0-9]*/*_rgb.jpg", defaultdict(list)
    for file in [*path.glob(pattern), *path.glob(f"*/{pattern}")]:
        files_of[file.parent].append(file)
    classes = ", ".join(sorted({place.parent.name for place in files_of}))
    question = f"Which class is this place of? Classes: {classes}."
    for place, files in sorted(files_of.items()):
        root, kind = place.parent.parent, place.parent.name
        source = f"{root.name}/{place.name}"
        images = sorted(files, key=lambda file: (len(file.name), file.name))[:FMOW_VIEWS]
        first_image_size(images, source)
        yield make_sample(source, task, image_size, images, question, kind,
                          split=split_of_name(root))


def read_dubai_cc(path: Path, task: str, image_size: int, image_folder: Path | None,
                  notes: Counter) -> Iterator[Sample]:
    """Dubai-CC: description_jsontr_te_val/{Train,Validation,Test}_Dubai_CC.json, and the tiles of
    two years in imgs_tiles/RGB/500_{2000,2010}/."""
    tiles = image_folder or path / "imgs_tiles" / "RGB"
    for file in sorted(path.glob("*/*_Dubai_CC.json")):
        split = split_of_name(Path(file.name.partition("_")[0]))
        with user_error_on("captions of Dubai-CC", str(file)):
            for row in json.loads(file.read_text(encoding="utf-8"))["images"]:
                source, name = f"{file}: {row['filename']}", row["filename"]
                images = (tiles / "500_2000" / name, tiles / "500_2010" / name)
                gt_texts = [sentence["raw"] for sentence in row["sentences"]]
                size = first_image_size(images, source)
                yield from sample_from_text(source, task, image_size, images, size,
                                            CHANGE_QUESTION, gt_texts, notes, split=split)


def refuse_pickle(path: Path, *_: object) -> Iterator[Sample]:
    """RRSIS-D: refs(unc).p beside instances.json, whose boxes are reported to exceed the images."""
    raise UserError(f"{path}: RRSIS-D has its expressions in a pickle, which can run code and is "
                    "not read; write JSON lines of `image`, `mask`, `problem` and `split`")


# (files that identify a folder, its name, the tasks that it may serve, reader; None: the file holds
# records); first match counts
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
    ("*/*_Dubai_CC.json", "Dubai-CC", ("change",), read_dubai_cc),
    ("LevirCCcaptions*.json", "LEVIR-CC", ("change",), None),
    ("*_questions.json", "RSVQA", ("vqa",), None),
    ("data.csv", "a folder of ground and satellite images", ("pair",), read_pairs),
    ("img_info.csv", "CV-Cities", ("pair",), read_pairs),
    ("*/img_info.csv", "CV-Cities", ("pair",), read_pairs),
    ("refs(*).p", "RRSIS-D", INSTRUCTIONS, refuse_pickle),
    ("rrsisd/refs(*).p", "RRSIS-D", INSTRUCTIONS, refuse_pickle),
    ("*/*_[0-9]*/*_rgb.jpg", "fMoW", ("cls",), read_fmow),
    ("*/*/*_[0-9]*/*_rgb.jpg", "fMoW", ("cls",), read_fmow),
)
