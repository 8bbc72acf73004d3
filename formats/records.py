"""Records of JSON files, EarthDial shards and parquet -> Samples; the keys of a record say what it is.

A record format is one generator and one line of the table RECORDS at the end. How boxes and questions are written is the
business of notation.py, folders with a layout of their own that of readers.py.
"""

import io
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data import BadInput, Sample, convert_box, first_line, image_size, json_records, plain_text
from formats.notation import (
    BOXES,
    CLOSED,
    GRID,
    MARK,
    NUMBER,
    asking,
    build,
    each_class,
    from_text,
    grid_boxes,
    split_reasoning,
    tasks_of,
    turned_box,
    upright_box,
)
from rewards import TASKS, box_numbers, json_text, reference_mask

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
SPLITS = {"": "", "train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
STORED_IMAGES = ("jpg", "jpg_A", "jpg_B", "jpg_C", "jpg_D", "jpg_pre", "jpg_post")  # columns of EarthDial's shards


# ----------------------------------------------------------------------------------------------------------------------
# Files and images

@contextmanager
def expecting(form: str, where: str) -> Iterator[None]:
    """Turns what goes wrong in reading a record of a documented form into one line for the user."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OSError, SyntaxError) as error:
        raise BadInput(f"{where}: not {form} ({first_line(error)}); mend or remove it") from error


def json_values(path: Path) -> list[tuple[str, object]]:
    """("file:record", value) of each record of a JSON array or of JSON lines, or the one object that a file holds whose
    first brace has a line of its own, as LEVIR-CC and many COCO files do."""
    with expecting("a JSON document", str(path)), path.open("rb") as file:
        if file.readline().strip() == b"{":
            return [(str(path), json.loads(path.read_text(encoding="utf-8")))]
    return list(json_records(path))


def table_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """("file: row", row) of an EarthDial shard (`datasets.save_to_disk`) or of parquet; images as {"bytes", "path"}."""
    try:
        import datasets
        from pyarrow import parquet
    except ImportError:
        raise BadInput(f"{path}: to read it, pip install datasets")
    files = [path] if path.is_file() else sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    splits = {file.name.split("-")[0] for file in files} or {file.parent.name for file in path.glob("*/dataset_info.json")}
    if len(splits) > 1 or splits and not files:
        raise BadInput(f"{path}: holds the splits {', '.join(sorted(splits))}; name the file or folder of one of them")
    with expecting("a table that datasets can read", str(path)):
        tables = [parquet.read_table(file) for file in files] or [datasets.load_from_disk(str(path)).with_format("arrow")[:]]
    rows = (row for table in tables for batch in table.to_batches(1000) for row in batch.to_pylist())
    for i, row in enumerate(rows):
        with expecting("a row of a shard, with its `conversations` as JSON", f"{path}: row {i}"):
            row |= {"conversations": json.loads(row["conversations"])} if "conversations" in row else {}
        yield f"{path}: row {i}", row


def stored_image(cell: dict) -> Image.Image:
    """An image kept in a table, not decoded yet; its `filename`, a hash, tells it from others whatever row it stands in."""
    image = Image.open(io.BytesIO(cell["bytes"]))
    image.filename = f"{zlib.crc32(cell['bytes']):08x}"
    return image


def images_of(where: str, record: dict, folder: Path) -> tuple:
    """The record's images in order: paths below the folder, or PIL images where the table holds them."""
    names = [record[key] for key in STORED_IMAGES if record.get(key) is not None]
    names = names or record.get("image") or record.get("images")
    names = names if isinstance(names, list) else [names]
    if not names or not all(isinstance(name, str) or isinstance(name, dict) and "bytes" in name for name in names):
        raise BadInput(f"{where}: `image` is neither a file name nor a list of file names")
    return tuple(folder / name if isinstance(name, str) else stored_image(name) for name in names)


def find_image(folder: Path, name: str) -> Path:
    """folder / name; where the name has no extension, or a wrong one (GeoChat-Bench's aid.jsonl), the image of that stem."""
    stem = name[: name.rindex(".")] if name.lower().endswith(IMAGE_SUFFIXES) else name
    paths = [folder / name, *(folder / f"{stem}{suffix}" for suffix in IMAGE_SUFFIXES)]
    return next((path for path in paths if path.is_file()), folder / name)


def first_size(images: Sequence, where: str) -> tuple[int, int]:
    """(width, height) of the first image. The headers of all are read, so that a missing one is found now."""
    size, *_ = [image.size if isinstance(image, Image.Image) else image_size(image, where) for image in images]
    return size


# ----------------------------------------------------------------------------------------------------------------------
# From a file to its records

def read_records(path: Path, task: str, frame: int, images: Path | None, skipped: Counter) -> Iterator[Sample]:
    """A JSON array or document, JSON lines, an EarthDial shard or parquet."""
    table = path.is_dir() or path.suffix == ".parquet"
    folder, records = images or path.parent, list(table_rows(path)) if table else json_values(path)
    if len(records) == 1 and isinstance(records[0][1], dict) and not form_of(records[0][1]):
        where, document = records[0]
        with expecting("a document of RSVQA, COCO, Karpathy's or NWPU's captions", where):
            records = list(unfold(path, document, skipped))
    marked = any(MARK.match(str(turn.get("value"))) for _, record in records if isinstance(record, dict)
                 for turn in record.get("conversations") or () if isinstance(turn, dict))  # GeoChat's mix of tasks
    for where, record in records:
        if not isinstance(record, dict):
            raise BadInput(f"{where}: expected an object, found {type(record).__name__}")
        if not form_of(record):
            raise BadInput(f"{where}: no known format has the keys {', '.join(record)}")
        _, name, serves, reader = form_of(record)
        if task not in serves:
            raise BadInput(f"{where}: {name} serves {', '.join(serves)}, not {task}")
        options = {"marked": marked} if reader is read_conversation else {}
        with expecting(name, where):
            yield from reader(where, record, task, frame, folder, skipped, **options)


def form_of(record: dict) -> tuple | None:
    """The line of RECORDS for a record."""
    return next((form for form in RECORDS if form[0] <= record.keys()), None)


def unfold(path: Path, document: dict, skipped: Counter) -> Iterator[tuple[str, dict]]:
    """The records of a document that keeps them in several lists, joined by their ids."""
    if "questions" in document:  # RSVQA
        answers = rsvqa_answers(path.with_name(path.name.replace("questions", "answers")))
        active = [q for q in document["questions"] if q.get("active", True)]
        if len(active) < len(document["questions"]):
            skipped["questions of other splits left out"] += len(document["questions"]) - len(active)
        for q in active:
            yield f"{path}: question {q['id']}", q | ({"answer": answers[q["id"]]} if q["id"] in answers else {})
    elif "annotations" in document:  # COCO
        names, objects = {c["id"]: c["name"] for c in document["categories"]}, defaultdict(list)
        for a in document["annotations"]:
            objects[a["image_id"]].append((names[a["category_id"]], a["bbox"]))
        for image in document["images"]:
            yield f"{path}: image {image['id']}", image | {"objects": objects[image["id"]]}
    elif "images" in document:  # Karpathy
        yield from ((f"{path}: image {i}", image) for i, image in enumerate(document["images"]))
    elif all(isinstance(rows, list) for rows in document.values()):  # NWPU-Captions
        for name, rows in document.items():
            yield from ((f"{path}: {name} {i}", row | {"category": name}) for i, row in enumerate(rows))
    else:
        raise BadInput(f"{path}: no known format has the keys {', '.join(document)}")


@lru_cache(maxsize=2)
def rsvqa_answers(path: Path) -> dict:
    """question id -> answer, from an answers JSON of RSVQA or from the only one in a folder."""
    files = sorted(path.glob("*answers*.json")) if path.is_dir() else [path]
    if len(files) != 1:
        raise BadInput(f"{path}: holds {len(files)} files *answers*.json, expected RSVQA's one for these questions")
    with expecting("answers of RSVQA", str(files[0])):
        (_, document), = json_values(files[0])
        return {a["question_id"]: a["answer"] for a in document["answers"] if a.get("active", True)}


# ----------------------------------------------------------------------------------------------------------------------
# Readers: (where, record, task, frame, folder of the images, skipped) -> Samples

def read_conversation(where: str, record: dict, task: str, frame: int, folder: Path, skipped: Counter,
                      marked: bool) -> Iterator[Sample]:
    """2U1, VLM-R1, GeoChat_Instruct, VRSBench_train and EarthDial's training shards: `image` (one name or several, or
    image columns) and `conversations`, alternately human and gpt.

    GeoChat mixes tasks in one file and marks them, so in a `marked` file only the turns of the task are taken, and the
    others are counted. Elsewhere every turn belongs to the task that was asked for.
    """
    images, turns = images_of(where, record, folder), record["conversations"]
    if not isinstance(turns, list) or any(not isinstance(t, dict) or not isinstance(t.get("value"), str) for t in turns):
        raise BadInput(f"{where}: `conversations` is not a list of objects with a text `value`")
    if len(turns) < 2 or len(turns) % 2 or any(t.get("from") in ("gpt", "assistant", "system") for t in turns[::2]):
        raise BadInput(f"{where}: `conversations` has {len(turns)} turns, expected question and answer in pairs, `from` human and "
                       "gpt in turn, without a system turn")
    split = SPLITS.get(str(record.get("split") or "").lower())
    if split is None:
        raise BadInput(f"{where}: its `split` is {record['split']!r}, expected train, val or test")
    placeholders = turns[0]["value"].count("<image>")
    if placeholders and placeholders != len(images) and isinstance(images[0], Path):  # xBD's shards: one for two images
        raise BadInput(f"{where}: {placeholders} <image> marks for {len(images)} images")
    size = None
    for i in range(0, len(turns), 2):
        question, answer = turns[i]["value"], turns[i + 1]["value"]
        if marked and task not in tasks_of(question, answer):
            skipped["turns with the mark of another task, such as [vqa], left out"] += 1
            continue
        size = size or first_size(images, where)
        think, answer = split_reasoning(answer)
        yield from from_text(where + (f", turn {i // 2}" if len(turns) > 2 else ""), task, frame, images, size, question,
                             [answer], skipped, think=think, category=str(record.get("category") or ""),
                             split=split)


def read_earthdial(where: str, row: dict, task: str, frame: int, folder: Path, skipped: Counter) -> Iterator[Sample]:
    """EarthDial's evaluation rows, of its shards or as JSON: `question`, the reference(s) under one of these keys, and
    `size_group` or `ttype`. Values may be JSON-quoted; boxes are `[[x1, y1, x2, y2, theta]]...` on the 0-100 grid. Theta is
    taken as clockwise on the screen, as in GeoChat, where these boxes come from; EarthDial's scorer turns it the other way."""
    key = next((k for k in ("gt_bbox", "groundtruth", "annotation", "groundtruth0", "caption0") if k in row), None)
    if not key or not isinstance(row["question"], str):
        raise BadInput(f"{where}: a row of EarthDial needs a text as `question` and a reference such as `groundtruth`")
    question, text = row["question"].strip('"'), lambda k: str(row.get(k) or "").strip('"')
    references = [text(key), *filter(None, (text(f"{key[:-1]}{i}") for i in range(1, 5)))]
    references = json.loads(references[0]) if references[0].startswith('["') else references  # SYSU's lists
    serves = ("cls", "mlc", "cap", "change", "vqa")
    if key == "gt_bbox" or MARK.match(question):
        serves = ("det", "rec") if key == "gt_bbox" else tasks_of(question, references[0])
    if task not in serves:
        raise BadInput(f"{where}: a row with `{key}` and this question serves {', '.join(serves)}, not {task}")
    images, boxes = images_of(where, row, folder), []
    if task in ("det", "rec"):
        boxes = [[float(v) for v in re.findall(NUMBER, box)] for box in re.findall(r"\[([^\[\]]+)\]", references[0])]
        if not boxes or any(len(values) != 5 for values in boxes):
            raise BadInput(f"{where}: `{key}` {row[key]!r} holds no boxes of five numbers")
        boxes = [convert_box(box, GRID, (frame, frame)) for box in boxes]
        before, tag, _ = question.partition("<ref>")
        question = asking(task, plain_text(question)) if tag and not plain_text(before) else question  # NWPU: bare phrases
    subset = "" if task == "ground" else text("ttype") or text("vqa_type") if task == "vqa" else text("size_group")
    yield from from_text(where, task, frame, images, first_size(images, where), question, references, skipped, boxes,
                         subset=subset, category=text("category"))


def read_benchmark(where: str, row: dict, task: str, frame: int, folder: Path, skipped: Counter) -> Iterator[Sample]:
    """GeoChat-Bench and VRSBench_EVAL_*: `image_id` or `image`, `question` or `text`, and `ground_truth`: polygons in
    pixels, a box of the grid (better: `obj_corner`, in shares of the side), or a text. lrben and hrben have none: an
    answers JSON of RSVQA has to lie in the images' folder. grounding_description has no boxes, so it serves cap."""
    question = str(row.get("question") or row.get("text") or "Describe the image.")
    truth = row.get("ground_truth", row.get("description"))
    located = isinstance(truth, list) or bool(grid_boxes(str(truth), frame))
    serves = (("det", "rec") if located else ("rcap",) if BOXES.search(question) else ("vqa",) if truth is None
              else ("cap",) if "description" in row or "caption" in str(row.get("type"))
              else ("cls",) if "type" not in row and CLOSED.search(question) else ("vqa",))
    if task not in serves:
        raise BadInput(f"{where}: this row of a benchmark serves {', '.join(serves)}, not {task}")
    images, boxes = (find_image(folder, str(row.get("image_id") or row["image"])),), []
    size = first_size(images, where)
    if located:
        shapes = [np.reshape(polygon, (4, 2)) / size for polygon in truth] if isinstance(truth, list) else []
        shapes = [np.reshape(row["obj_corner"], (4, 2))] if row.get("obj_corner") else shapes
        boxes = [(turned_box if task == "det" else upright_box)(shape * frame) for shape in shapes]
    if truth is None:
        truth = rsvqa_answers(folder)[row["question_id"]]
    truth = str(truth).removesuffix("gt") if task == "cls" else str(truth)  # aid.jsonl has MediumResidentialgt
    subset = row.get("size_group") or (row.get("category") or row.get("type") if task == "vqa" else "")
    subset = ("non-unique", "unique")[bool(row["unique"])] if "unique" in row else str(subset or "")
    question = asking(task, question) if located or task == "rcap" else question
    yield from from_text(where, task, frame, images, size, question, [truth], skipped, boxes, subset=subset,
                         category=str(row.get("obj_cls") or ""))


def read_rsvqa(where: str, row: dict, task: str, frame: int, folder: Path, skipped: Counter) -> Iterator[Sample]:
    """RSVQA: a question with its answer as `unfold` joins them; images in Images*/<img_id>.png, .tif or .jpg."""
    inner = next((p for p in sorted(folder.glob("Images*")) if p.is_dir()), folder)
    images = (find_image(inner, f"{row['img_id']}.png"),)
    yield from from_text(where, task, frame, images, first_size(images, where), row["question"], [str(row["answer"])],
                         skipped, subset=row["type"], category=row["type"])


def read_few_shot(where: str, row: dict, task: str, frame: int, folder: Path, skipped: Counter) -> Iterator[Sample]:
    """Geo-R1's VRSBench-FS, parquet or JSON: `problem`, and `answer` or `solution` as x1, y1, x2, y2 in pixels."""
    images, values = images_of(where, row, folder), [float(v) for v in row.get("solution") or row["answer"]]
    size, unique = first_size(images, where), str(row.get("is_unique")).lower() in ("true", "1", "unique")
    yield from from_text(where, task, frame, images, size, row["problem"], [""], skipped,
                         [convert_box(values[:4], size, (frame, frame))], category=str(row.get("category") or ""),
                         subset=("unique" if unique else "non-unique") if "is_unique" in row else "")


def read_captions(where: str, row: dict, task: str, frame: int, folder: Path, skipped: Counter) -> Iterator[Sample]:
    """Several captions of an image or a change: Karpathy's layout (RSICD, RSITMD, UCM: `sentences`), LEVIR-CC (the same
    and `changeflag`; images/<filepath>/{A,B}), NWPU-Captions (`raw`, `raw_1`..) and RSICD's captions on AID (`captions`)."""
    name, serves = row.get("filename") or row["image"], "change" if "changeflag" in row else "cap"
    if task != serves:
        raise BadInput(f"{where}: these captions serve {serves}, not {task}")
    texts = [row[key] for key in row if key.startswith("raw")] or row.get("captions") or [s["raw"] for s in row["sentences"]]
    if serves == "change":
        images = tuple(folder / "images" / row["filepath"] / when / name for when in "AB")
        question = "What has changed from the first image to the second?"
        category = "change" if row["changeflag"] else "no change"
    else:
        category, question = row.get("category") or Path(name).parent.name, "Describe the image."
        images = (folder / category / name if (folder / category / name).is_file() else folder / name,)
    yield from from_text(where, task, frame, images, first_size(images, where), question, texts, skipped, category=category,
                         split=str(row.get("split") or ""))


def read_coco(where: str, row: dict, task: str, frame: int, folder: Path, skipped: Counter) -> Iterator[Sample]:
    """NWPU-FS and other COCO JSON: an image with the `objects` that `unfold` joins to it, x, y, width, height in pixels."""
    image = folder / row["file_name"]
    size = image_size(image, where)
    things = [(name, convert_box((x, y, x + w, y + h), size, (frame, frame))) for name, (x, y, w, h) in row["objects"]]
    yield from each_class(where, task, frame, (image,), things, skipped)


def read_mask(where: str, row: dict, task: str, frame: int, folder: Path, skipped: Counter) -> Iterator[Sample]:
    """EarthReason as Geo-R1 has it: `problem` (one or several) and `mask`, non-zero on the target. The answer has an
    instance for each piece of at least a hundredth of the mask: its box, its innermost pixel, and the next one away from it.
    """
    from scipy import ndimage
    images = images_of(where, row, folder)
    mask = stored_image(row["mask"]) if isinstance(row["mask"], dict) else folder / row["mask"]
    first_size((*images, mask), where)
    target = reference_mask(Sample(where, task, images, "", "", frame, mask=mask))  # (frame, frame)
    pieces, boxes, things = ndimage.label(target)[0], [], []
    for i, (rows, columns) in enumerate(ndimage.find_objects(pieces), 1):
        piece = np.pad(pieces[rows, columns] == i, 1)
        if piece.sum() >= target.sum() / 100:
            depth = ndimage.distance_transform_edt(piece)
            first = np.unravel_index(depth.argmax(), depth.shape)
            away = depth * (np.hypot(*(np.indices(depth.shape) - np.reshape(first, (2, 1, 1)))) >= depth.max())
            second = np.unravel_index(away.argmax(), depth.shape) if away.any() else first
            one, two = ([int(columns.start + x - 1), int(rows.start + y - 1)] for y, x in (first, second))
            boxes.append((columns.start, rows.start, columns.stop, rows.stop, 0))
            things.append({"bbox_2d": box_numbers(boxes[-1], frame), "keypoint1": one, "keypoint2": two})
    problems = row["problem"] if isinstance(row["problem"], list) else [row["problem"]]
    for i, problem in enumerate(problems):
        yield build(where + (f", question {i}" if len(problems) > 1 else ""), task, frame, images, problem,
                    json_text(things), boxes, mask=mask, category=str(row.get("category") or ""))


RECORDS = (  # (keys of a record, what it is, the tasks it may serve, its reader); the first line that fits counts
    ({"conversations"}, "a record of conversations", tuple(t for t in TASKS if t not in ("ovd", "seg")), read_conversation),
    ({"problem", "mask"}, "a record of EarthReason", ("seg",), read_mask),
    ({"problem", "solution"}, "a record of Geo-R1's few shots", ("rec", "det"), read_few_shot),
    ({"problem", "answer"}, "a record of Geo-R1's few shots", ("rec", "det"), read_few_shot),
    ({"file_name", "objects"}, "an image of COCO", ("ovd", "det"), read_coco),
    ({"img_id", "question"}, "a question of RSVQA", ("vqa",), read_rsvqa),
    ({"image", "captions"}, "a record of captions", ("cap",), read_captions),
    ({"filename", "sentences"}, "an image of Karpathy's captions", ("cap", "change"), read_captions),
    ({"filename", "raw"}, "an image of NWPU-Captions", ("cap",), read_captions),
    ({"image_id"}, "a row of GeoChat-Bench or VRSBench", ("det", "rec", "rcap", "cap", "vqa"), read_benchmark),
    ({"question_id", "image"}, "a row of GeoChat-Bench", ("cls", "vqa"), read_benchmark),
    ({"question"}, "a row of EarthDial",
     ("cls", "mlc", "det", "rcap", "ground", "cap", "change", "vqa", "rec"), read_earthdial),
)
