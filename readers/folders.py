"""Data sets in their original layout -> Samples. The format is detected from the name of the file,
the content of the folder, or the keys of the records. docs/forking.md says how to add one."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, filterfalse
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from readers.box_formats import (
    LOCATE,
    NO_AREA,
    Request,
    bounding_box,
    box_from_pixels,
    make_sample,
    min_area_rect,
    sample_from_text,
    sample_per_class,
)
from readers.cross_view import read_pairs
from readers.files import (
    IMAGE_SUFFIXES,
    check_stated_size,
    find_image,
    first_image_size,
    split_of_name,
    user_error_on,
)
from readers.image_headers import header_size, read_image_size
from readers.json_records import CHANGE_QUESTION, read_records
from readers.masks import read_mask
from runtime.errors import NotServedError, UserError, warn
from sample import BOX_TASKS, INSTRUCTIONS, Sample

FMOW_VIEWS = 4  # images of a place in a question, as in EarthDial
NWPU_CLASSES = dict(enumerate((
    "airplane", "ship", "storage tank", "baseball diamond", "tennis court", "basketball court",
    "ground track field", "harbor", "bridge", "vehicle"), 1))
# Folders of other layouts, such as LEVIR-CD's A, B, label and list
NO_CLASSES = {"a", "b", "label", "labels", "list", "image", "images", "mask", "masks",
              "annotations", "jpegimages"}
DISASTERS = {  # part of an xBD file's name -> class
    "volcano": "volcano", "fire": "fire", "earthquake": "earthquake", "flood": "flood",
    "tsunami": "tsunami", "tornado": "wind", "harvey": "flood", "florence": "flood",
    "matthew": "wind", "michael": "wind"}


def read_samples(path: Path,
                 requests: dict[str, Request]) -> dict[str, list[Sample] | NotServedError]:
    """{task: Request} -> the Samples of a file or folder for each task, in its order, or an error
    if its format does not serve it. Raises UserError for what a user has to fix."""
    header_size.cache_clear()
    with user_error_on("readable", str(path)):
        file, name, served, reader = layout_of(path)
        found = {task: not_served(path, task, name, served, reader) for task in requests}
        requests = {task: requests[task] for task in requests if task in served}
        if reader is read_records:
            found |= read_records(file, requests)
        else:
            for task, request in requests.items():
                try:
                    found[task] = list(reader(file, request))
                except NotServedError as error:
                    found[task] = error
        for task, request in requests.items():
            number = request.notes[NO_AREA]
            if isinstance(found[task], list) and number > len(found[task]):
                raise UserError(f"{path}: {number} boxes have no area, as x2 <= x1 or y2 <= y1; "
                                "boxes are x1, y1, x2, y2 (COCO: x, y, width, height)")
    return found


def layout_of(path: Path) -> tuple[Path, str, Sequence[str], Callable]:
    """(file or folder to read, name of its format, the tasks that it may serve, its reader)."""
    folder = path.parent if path.name == "instances.json" else path
    if path.suffix == ".p" or glob(folder, "{,*/}refs(*).p"):
        raise UserError(f"{path}: RRSIS-D has its expressions in a pickle, which can run code and "
                        "is not read; write JSON lines of `image`, `mask`, `problem` and `split`")
    if path.suffix == ".csv":
        return path, "a table of ground and satellite images", ("pair", "geo"), read_pairs
    if path.suffix == ".txt" and (path.parent / "Annotations").is_dir():
        return path, "a split of DIOR-RSVG", ("rec", "det"), read_dior_rsvg
    if path.is_file():
        return path, "a file of records", INSTRUCTIONS, read_records
    for pattern, name, served, reader in FOLDERS:
        files = glob(path, pattern)
        if reader is None and len(files) > 1:  # each holds records
            raise UserError(f"{path}: holds {', '.join(f.name for f in files)}; name one of them")
        if files:
            return (path if reader else files[0]), name, served, reader or read_records
    return path, "one folder per class", ("cls",), read_class_folders


def not_served(path: Path, task: str, name: str, served: Sequence[str],
               reader: Callable) -> NotServedError:
    hint = "; boxes are not read from CSV" if reader is read_pairs and task in BOX_TASKS else ""
    if reader is read_class_folders:  # of any folder that is no other layout
        name = f"no known layout (docs/data.md lists them), and {name}"
        hint = "; for a file of records, --data is the file and --images the folder"
    return NotServedError(f"{path}: {name} serves {', '.join(served)}, not {task}{hint}")


def glob(path: Path, pattern: str) -> list[Path]:
    """What fits a pattern, in which {,*/} is the folder itself or those of its splits. Not what
    other programs leave in folders: .ipynb_checkpoints, macOS's ._image.jpg and __MACOSX."""
    patterns = {pattern.replace("{,*/}", inside) for inside in ("", "*/")}  # one without braces
    found = {file for pattern in patterns for file in path.glob(pattern)}
    return sorted(file for file in found if not any(
        part.startswith(".") or part == "__MACOSX" for part in file.relative_to(path).parts))


def has_image_suffix(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


# --------------------------------------------------------------------------------------------------
# Readers of folders: (path, request) -> Samples

def read_class_folders(path: Path, request: Request) -> Iterator[Sample]:
    """EuroSAT and AID: `path[/split][/only folder]/<Class>/<image>`. The question lists the class
    names."""
    roots = glob(path, "*/")
    has_splits = bool(roots) and all(map(split_of_name, roots))
    root_of = {}
    for root in roots if has_splits else [path]:
        folders = glob(root, "*/")
        while len(folders) == 1 and glob(folders[0], "*/"):  # EuroSAT's classes are in 2750/
            folders = glob(folders[0], "*/")
        root_of |= dict.fromkeys(folders, root)
    files = {folder: glob(folder, "*") for folder in root_of}
    images = {folder: list(filter(has_image_suffix, files[folder])) for folder in root_of}
    names = sorted({folder.name for folder in root_of})
    classes = sorted({folder.name for folder in root_of if images[folder]})
    if NO_CLASSES.intersection(map(str.lower, names)) or any(files.values()) and not classes:
        other = [name for name in names if name.lower() in NO_CLASSES]
        hint = (f"one called {other[0]} is of another layout, rename it if it is a class" if other
                else "if they are splits, name one of them as --data")
        raise UserError(f"{path}: no known layout (docs/data.md lists them), and its folders "
                        f"{', '.join(names)[:60]} are no classes with images directly in them; "
                        f"{hint}")
    if not classes and any(map(has_image_suffix, glob(path, "*"))):
        raise UserError(f"{path}: has images directly in it; --data is the folder above, whose "
                        "folders are the classes")
    request.notes["folders without images left out"] += len(set(names) - set(classes))
    for file in filterfalse(has_image_suffix, chain(*files.values())):
        request.notes["folders within those of the classes left out" if file.is_dir()
                      else "files of other types left out"] += 1
    if len(classes) == 1:
        warn(f"{path}: {classes[0]} is its only class, so there is nothing to tell apart")
    question = f"Which class does this scene belong to? Classes: {', '.join(classes)}."
    for folder, root in root_of.items():
        for file in images[folder]:
            source = f"{root.name}/" * has_splits + f"{folder.name}/{file.name}"
            read_image_size(file, source)
            yield make_sample(source, request, (file,), question, folder.name,
                              split=split_of_name(root))


def samples_from_lines(file: Path, image: Path, parse: Callable, expected: str, request: Request,
                       split: str = "") -> Iterator[Sample]:
    """Samples of an image whose annotation file has one object a line. `parse` maps (line, size of
    the image) to (class, box in pixels of the resized image)."""
    objects, size = [], read_image_size(image, str(file))
    with user_error_on("text", str(file)):
        for i, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
            if line.strip() and not line.startswith(("imagesource:", "gsd:")):  # DOTA's metadata
                with user_error_on(expected, f"{file}: line {i}"):
                    objects.append(parse(line, size))
        yield from sample_per_class(str(file), request, (image,), objects, split=split)


def read_nwpu(path: Path, request: Request) -> Iterator[Sample]:
    """NWPU VHR-10: `ground truth/NNN.txt`, lines (x1,y1),(x2,y2),class in pixels, stray blanks."""
    def parse(line: str, size: tuple[int, int]) -> tuple:
        fields = re.fullmatch(r"\((\d+),(\d+)\),\((\d+),(\d+)\),(\d+)", re.sub(r"\s", "", line))
        *box, label = map(int, fields.groups())
        return NWPU_CLASSES[label], box_from_pixels(box, size, request)

    for file in sorted(path.glob("ground truth/*.txt")):
        folder = request.image_folder or path / "positive image set"
        image = find_image(folder, f"{file.stem}.jpg")
        yield from samples_from_lines(file, image, parse, "(x1,y1),(x2,y2),class", request)


def read_dota(path: Path, request: Request) -> Iterator[Sample]:
    """DOTA: [split/]labelTxt*/X.txt, lines x1 y1 .. x4 y4 class [difficulty] in pixels. The corners
    are scaled before an oriented box (OBB) is made of them: two scale factors would skew it."""
    def parse(line: str, size: tuple[int, int]) -> tuple:
        fields = line.split()
        if (len(fields) not in (9, 10) or re.fullmatch(r"[-+\d.]+", fields[8])
                or fields[9:] and not fields[9].lstrip("-").isdigit()):
            raise ValueError("eight numbers, a class without blanks, and one digit or nothing")
        corners, label = np.array(fields[:8], float).reshape(4, 2), fields[8]
        if corners.max() <= 1 and np.ptp(corners) > 0:  # not what splitting left of a cut box
            raise ValueError("its corners are in fractions of the image, expected pixels")
        return label, min_area_rect(corners / size * request.image_size)

    folder_of = {}
    for file in glob(path, "{,*/}labelTxt*/*.txt"):
        root = file.parent.parent
        if folder_of.setdefault(root, file.parent) != file.parent:
            raise UserError(f"{root}: holds {folder_of[root].name} and {file.parent.name}, labels "
                            "of the same images; keep one of them there")
        image = find_image(request.image_folder or root / "images", f"{file.stem}.png")
        yield from samples_from_lines(file, image, parse, "x1 y1 .. x4 y4 class", request,
                                      split_of_name(root))


def read_dior_rsvg(path: Path, request: Request) -> Iterator[Sample]:
    """DIOR-RSVG: all objects of the folder, or those of a list if the path is train.txt, val.txt or
    test.txt. A list names the objects of a split by their number in the order of Annotations/*.xml.

    The published lists split objects, not images. Of the folder, a train object in an image with
    val or test objects gets no split. A named list is read as it is.
    """
    root, lists, count = path, [path / f"{name}.txt" for name in ("train", "val", "test")], 0
    if path.is_file():
        root, lists = path.parent, [path]
    split_of = {}
    for file in filter(Path.is_file, lists):
        with user_error_on("a list of object numbers", str(file)):
            numbers = [int(line) for line in file.read_text(encoding="utf-8-sig").split()]
        split_of |= dict.fromkeys(numbers, split_of_name(file.with_suffix("")))
    for file in sorted(root.glob("Annotations/*.xml")):
        with user_error_on("an annotation of DIOR-RSVG", str(file)):
            tree = ElementTree.parse(file)
            objects = list(enumerate(tree.iter("object"), count))
            count += len(objects)
            is_held_out = any(split_of.get(i) in ("val", "test") for i, _ in objects)
            image = (request.image_folder or root / "JPEGImages") / tree.findtext("filename")
            stated = tree.findtext("size/width"), tree.findtext("size/height")
            for i, node in objects:
                split = split_of.get(i, "")
                if path.is_file() and i not in split_of:
                    continue
                if split == "train" and is_held_out:
                    request.notes["train objects in val or test images are not trained on"] += 1
                    split = ""
                sides = ("xmin", "ymin", "xmax", "ymax")
                box = [float(node.findtext(f"bndbox/{side}")) for side in sides]
                size = read_image_size(image, str(file))
                check_stated_size(str(file), stated, size)
                box = box_from_pixels(box, size, request)
                question = LOCATE + node.findtext("description").strip()
                yield from sample_from_text(f"{file}: object {i}", request, (image,), question,
                                            [""], [box], category=node.findtext("name"),
                                            split=split)
    if split_of and max(split_of) >= count:
        raise UserError(f"{path}: object {max(split_of)} is listed, but Annotations holds {count}; "
                        "some annotations are missing")


def read_xbd(path: Path, request: Request) -> Iterator[Sample]:
    """xBD: [split/]images/*_{pre,post}_disaster.png with labels or masks of the later image. cls
    asks for the disaster, and whether a building is damaged. det, which needs the labels, asks for
    the buildings of each class of damage. train (tier1 in the geotiffs) and tier3 are for training.
    The xView2 challenge ranked by test and hold; here hold is "val"."""
    for post in glob(path, "{,*/}images/*_post_disaster.*"):
        pair, source = (post.with_name(post.name.replace("_post_", "_pre_")), post), post.name
        size, split = first_image_size(pair, source), split_of_name(post.parent.parent)
        with user_error_on("an annotation of xBD", source):
            buildings, damaged = read_xbd_annotation(post, size, request.image_size)
            if request.task == "cls":
                yield from ask_about_disaster(source, request, pair, damaged, split)
            elif buildings is None:
                request.notes["image pairs without labels/*.json left out"] += 1
            else:
                known = [(kind, box) for kind, box in buildings if kind != "un-classified"]
                request.notes["buildings of no class left out"] += len(buildings) - len(known)
                question = "Locate every {} building in the second image."
                yield from sample_per_class(source, request, pair, known, question, split=split)


def read_xbd_annotation(post: Path, size: tuple[int, int], image_size: int) -> tuple:
    """(buildings, damaged); None for what is not annotated. `buildings` is a list of (damage, box
    in pixels of the resized image), from labels/*.json. `damaged`, whether any is, comes from that
    file or from a mask in targets/ or masks/ (0 no building, 1 no damage .. 4 destroyed)."""
    def to_box(wkt: str) -> tuple:  # POLYGON ((x y, ..)) in pixels
        points = np.reshape(re.findall(r"[-\d.e]+", wkt.partition("((")[2]), (-1, 2))
        return bounding_box(points.astype(float) / size * image_size)

    root = post.parent.parent
    label = root / "labels" / f"{post.stem}.json"
    if label.is_file():
        features = json.loads(label.read_text(encoding="utf-8"))["features"]["xy"]
        buildings = [(f["properties"]["subtype"], to_box(f["wkt"])) for f in features]
        damage = ("minor-damage", "major-damage", "destroyed")
        return buildings, any(kind in damage for kind, _ in buildings)
    for mask in (root / "targets" / f"{post.stem}_target.png", root / "masks" / post.name):
        if mask.is_file():
            return None, (np.asarray(Image.open(mask)) > 1).any()
    return None, None


def ask_about_disaster(source: str, request: Request, pair: tuple, damaged: bool | None,
                       split: str) -> Iterator[Sample]:
    """What the disaster is, and whether there is damage (None: not annotated)."""
    kind = next((kind for name, kind in DISASTERS.items() if name in source), None)
    if kind is None:
        raise UserError(f"{source}: the name has none of xBD's disasters ({', '.join(DISASTERS)}); "
                        "rename or remove it")
    question = ("Which disaster struck between the images? Classes: "
                f"{', '.join(sorted(set(DISASTERS.values())))}.")
    yield make_sample(f"{source}, disaster", request, pair, question, kind,
                      think=f"The damage is that of {kind}.", split=split)
    if damaged is not None:
        question = "Is any building damaged in the second image? Classes: yes, no."
        yield make_sample(f"{source}, damage", request, pair, question, "yes" if damaged else "no",
                          think=f"{'A' if damaged else 'No'} building is damaged.", split=split)


def read_earthreason(path: Path, request: Request) -> Iterator[Sample]:
    """EarthReason: [split/]QAs/X.json with `questions`, images/X.*, and labels/X.png, a mask that
    is empty if there is no target. The release names no class: `category` is for --shots."""
    for file in glob(path, "{,*/}QAs/*.json"):
        root = file.parent.parent
        with user_error_on("`questions` of EarthReason", str(file)):
            document = json.loads(file.read_text(encoding="utf-8"))
            image = find_image(root / "images", f"{file.stem}.jpg").name
            row = {"problem": document["questions"], "category": document.get("category"),
                   "image": f"images/{image}", "mask": f"labels/{file.stem}.png",
                   "split": split_of_name(root)}
            yield from read_mask(str(file), row, request._replace(image_folder=root))


def read_fmow(path: Path, request: Request) -> Iterator[Sample]:
    """fMoW: [split/]<class>/<class>_<i>/<class>_<i>_<j>_rgb.jpg, image j of place i. cls asks for
    the class of a place, from its first images as a whole. (`test` has no class folders.)"""
    files_of = defaultdict(list)
    for file in glob(path, "{,*/}*/*_[0-9]*/*_rgb.jpg"):
        files_of[file.parent].append(file)
    classes = ", ".join(sorted({place.parent.name for place in files_of}))
    question = f"Which class is this place of? Classes: {classes}."
    for place, files in sorted(files_of.items()):
        root, kind = place.parent.parent, place.parent.name
        source = f"{root.name}/{place.name}"
        images = sorted(files, key=lambda file: (len(file.name), file.name))[:FMOW_VIEWS]
        first_image_size(images, source)
        yield make_sample(source, request, images, question, kind, split=split_of_name(root))


def read_dubai_cc(path: Path, request: Request) -> Iterator[Sample]:
    """Dubai-CC: description_jsontr_te_val/{Train,Validation,Test}_Dubai_CC.json, and the tiles of
    two years in imgs_tiles/RGB/500_{2000,2010}/."""
    tiles = request.image_folder or path / "imgs_tiles" / "RGB"
    for file in sorted(path.glob("*/*_Dubai_CC.json")):
        split = split_of_name(Path(file.name.partition("_")[0]))
        with user_error_on("captions of Dubai-CC", str(file)):
            for row in json.loads(file.read_text(encoding="utf-8"))["images"]:
                name = row["filename"]
                images = (tiles / "500_2000" / name, tiles / "500_2010" / name)
                gt_texts = [sentence["raw"] for sentence in row["sentences"]]
                yield from sample_from_text(f"{file}: {name}", request, images, CHANGE_QUESTION,
                                            gt_texts, split=split)


# (files that identify a folder, see glob, its name, the tasks that it may serve, reader; None: the
# file holds records); first match counts
FOLDERS = (
    ("dataset_info.json", "an EarthDial shard", INSTRUCTIONS, read_records),
    ("dataset_dict.json", "an EarthDial shard", INSTRUCTIONS, read_records),
    ("*.parquet", "a folder of parquet", INSTRUCTIONS, read_records),
    ("data/*.parquet", "a folder of parquet", INSTRUCTIONS, read_records),
    ("ground truth/*.txt", "NWPU VHR-10", ("det", "ovd"), read_nwpu),
    ("{,*/}labelTxt*/*.txt", "DOTA", ("det", "ovd"), read_dota),
    ("Annotations/*.xml", "DIOR-RSVG", ("rec", "det"), read_dior_rsvg),
    ("{,*/}images/*_post_disaster.*", "xBD", ("cls", "det"), read_xbd),
    ("{,*/}QAs/*.json", "EarthReason", ("seg",), read_earthreason),
    ("*/*_Dubai_CC.json", "Dubai-CC", ("change",), read_dubai_cc),
    ("LevirCCcaptions*.json", "LEVIR-CC", ("change",), None),
    ("*_questions.json", "RSVQA", ("vqa", "count"), None),
    ("data.csv", "a folder of ground and satellite images", ("pair", "geo"), read_pairs),
    ("{,*/}img_info.csv", "CV-Cities", ("pair", "geo"), read_pairs),
    ("{,*/}*/*_[0-9]*/*_rgb.jpg", "fMoW", ("cls",), read_fmow),
)
