"""Records of JSON files, EarthDial shards and parquet -> Samples. The keys of a record tell its
format, which is one reader and one line of the table RECORDS at the end."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
from scipy import ndimage

from boxes import clip_and_round, convert_box, format_json
from readers.box_formats import (
    BOX_RUN,
    CLOSED_QUESTION,
    GRID,
    NUMBER,
    TASK_MARK,
    bounding_box,
    make_sample,
    min_area_rect,
    parse_grid_boxes,
    phrase_to_question,
    plain_text,
    sample_from_text,
    sample_per_class,
    split_reasoning,
    tasks_of_question,
)
from readers.files import (
    SPLITS,
    find_image,
    first_image_size,
    has_task_marks,
    images_of,
    iter_table_rows,
    open_table,
    read_headers_ahead,
    read_json,
    split_of_name,
    user_error_on,
)
from runtime.errors import NotServedError, UserError
from sample import INSTRUCTIONS, Sample, load_gt_mask, read_image_size

OTHER_MARK = "turns with the mark of another task, such as [vqa], left out"
CHANGE_QUESTION = "What has changed from the first image to the second?"


# --------------------------------------------------------------------------------------------------
# From a file to its records

def read_records(path: Path, tasks: Sequence[str], image_size: int, image_folder: Path | None,
                 notes: dict[str, Counter]) -> dict[str, list[Sample] | NotServedError]:
    """The Samples of each task, from one reading of a JSON array or document, JSON lines, an
    EarthDial shard or parquet; an error for a task that the records do not serve."""
    image_folder = image_folder or path.parent
    file_split = split_of_name(path) or split_of_name(next(path.glob("**/*.parquet"), path))
    is_table = path.is_dir() or path.suffix == ".parquet"
    table = open_table(path) if is_table else None
    records = iter_table_rows(path, table) if is_table else iter(read_json(path))
    first = list(islice(records, 2))
    records = chain(first, records)
    if len(first) == 1 and isinstance(first[0][1], dict) and not format_of(first[0][1]):
        source, document = first[0]
        with user_error_on("a document of RSVQA, COCO, Karpathy's or NWPU's captions", source):
            records = iter(list(records_of_document(path, document, notes)))
    marked = cache(lambda: has_task_marks(path, table))
    options = {
        read_conversation: {"marked": marked},
        read_benchmark: {"rsvqa_answers": cache(lambda: read_rsvqa_answers(image_folder))},
    }
    found = {task: [] for task in tasks}
    for source, record in read_headers_ahead(records, image_folder):
        if not isinstance(record, dict):
            raise UserError(f"{source}: expected an object, found {type(record).__name__}")
        line = format_of(record)
        if not line:
            raise UserError(f"{source}: no known format has the keys {', '.join(record)[:200]}; "
                            "docs/data.md lists the formats, and the one for your own data")
        split = SPLITS.get(str(record.get("split") or "").lower())
        if split is None:
            raise UserError(f"{source}: its `split` is {record['split']!r}, "
                            "expected train, val or test")
        _, name, served, reader = line
        marks = tasks_of_turns(record) if reader is read_conversation and marked() else served
        for task in [task for task in tasks if isinstance(found[task], list)]:
            try:
                if task not in served:
                    raise NotServedError(f"{source}: {name} serves {', '.join(served)}, not {task}"
                                         + OTHER_FORMATS.get(task, ""))
                if task not in marks:
                    notes[task][OTHER_MARK] += len(record["conversations"]) // 2
                    continue
                with user_error_on(name, source):
                    for sample in reader(source, record, task, image_size, image_folder,
                                         notes[task], **options.get(reader, {})):
                        named = split or sample.split or file_split
                        found[task].append(sample if named == sample.split
                                           else replace(sample, split=named))
            except NotServedError as error:
                if found[task]:  # this record does not serve the task, others do
                    raise UserError(str(error)) from error
                found[task] = error
    return found


def format_of(record: dict) -> tuple | None:
    """The line of RECORDS for a record."""
    return next((line for line in RECORDS if line[0] <= record.keys()), None)


def tasks_of_turns(record: dict) -> set[str]:
    """The tasks of the marks in a conversation: few records of GeoChat's mix serve a task, so one
    look at the turns saves a reading for each other task."""
    turns = record["conversations"]
    try:
        return {task for question, target in zip(turns[::2], turns[1::2])
                for task in tasks_of_question(question["value"], target["value"])}
    except (LookupError, TypeError):  # no turns: their reader says what is wrong
        return set(INSTRUCTIONS)


def records_of_document(path: Path, document: dict,
                        notes: dict[str, Counter]) -> Iterator[tuple[str, dict]]:
    """The records of a document that keeps them in several lists, joined by their ids."""
    if "questions" in document:  # RSVQA
        answers = read_rsvqa_answers(path.with_name(path.name.replace("questions", "answers")))
        active = [q for q in document["questions"] if q.get("active", True)]
        inactive = len(document["questions"]) - len(active)
        for counts in notes.values():
            counts["questions of other splits left out"] += inactive
        for q in active:
            answer = {"answer": answers[q["id"]]} if q["id"] in answers else {}
            yield f"{path}: question {q['id']}", q | answer
    elif "annotations" in document:  # COCO
        names = {c["id"]: c["name"] for c in document["categories"]}
        objects = defaultdict(list)
        for a in document["annotations"]:
            objects[a["image_id"]].append((names[a["category_id"]], a["bbox"]))
        for image in document["images"]:
            yield f"{path}: image {image['id']}", image | {"objects": objects[image["id"]]}
    elif "images" in document:  # Karpathy
        for i, image in enumerate(document["images"]):
            yield f"{path}: image {i}", image
    elif all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
             for rows in document.values()):  # NWPU-Captions
        for name, rows in document.items():
            for i, row in enumerate(rows):
                yield f"{path}: {name} {i}", row | {"category": name}
    else:
        yield str(path), document  # of no known format


def read_rsvqa_answers(path: Path) -> dict:
    """question id -> answer, from an answers JSON of RSVQA or from the only one in a folder."""
    files = sorted(path.glob("*answers*.json")) if path.is_dir() else [path]
    if len(files) != 1:
        raise UserError(f"{path}: holds {len(files)} files *answers*.json, "
                        "expected RSVQA's one for these questions")
    with user_error_on("answers of RSVQA", str(files[0])):
        (_, document), = read_json(files[0])
        return {a["question_id"]: a["answer"] for a in document["answers"] if a.get("active", True)}


# --------------------------------------------------------------------------------------------------
# Readers: (source, record, task, image_size, image_folder, notes) -> Samples

def read_conversation(source: str, record: dict, task: str, image_size: int, image_folder: Path,
                      notes: Counter, marked: Callable[[], bool]) -> Iterator[Sample]:
    """2U1, VLM-R1, GeoChat_Instruct, VRSBench_train and EarthDial's training shards: `image` (one
    name or several, or image columns) and `conversations`, in turn human and gpt.

    marked  GeoChat mixes tasks in one file and marks the turns: only those of the task are taken,
            and the others are counted. In other files every turn belongs to the task.
    """
    turns = record["conversations"]
    if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise UserError(f"{source}: `conversations` is not a list of turns with texts; expected "
                        "`from` and `value` in each turn")
    wrong_role = any(turn.get("from") in ("gpt", "assistant", "system") for turn in turns[::2])
    if len(turns) < 2 or len(turns) % 2 or wrong_role:
        raise UserError(
            f"{source}: `conversations` has {len(turns)} turns, expected question and target in "
            "pairs, `from` human and gpt in turn, without a system turn")
    images = images_of(source, record, image_folder)
    n_marks = turns[0]["value"].count("<image>")
    # Images of a table are not checked: xBD's shards have one <image> mark for two of them.
    if n_marks and n_marks != len(images) and isinstance(images[0], Path):
        raise UserError(f"{source}: {n_marks} <image> marks for {len(images)} images")

    category = str(record.get("category") or "")
    size = None
    for i in range(0, len(turns), 2):
        question, target = turns[i]["value"], turns[i + 1]["value"]
        if marked() and task not in tasks_of_question(question, target):
            notes[OTHER_MARK] += 1
            continue
        size = size or first_image_size(images, source)
        think, gt_answer = split_reasoning(target)
        turn_source = f"{source}, turn {i // 2}" if len(turns) > 2 else source
        yield from sample_from_text(turn_source, task, image_size, images, size, question,
                                    [gt_answer], notes, think=think, category=category)


def read_earthdial(source: str, row: dict, task: str, image_size: int, image_folder: Path,
                   notes: Counter) -> Iterator[Sample]:
    """EarthDial's evaluation rows, of its shards or as JSON: `question`, target texts under one of
    the keys below, and `size_group` or `ttype`. Values may be JSON-quoted.

    Boxes are `[[x1, y1, x2, y2, theta]]...` on the 0-100 grid. theta is read as clockwise on the
    screen, as in GeoChat, where these boxes come from. EarthDial's scorer rotates the other way.
    """
    keys = ("gt_bbox", "groundtruth", "annotation", "groundtruth0", "caption0")
    key = next((key for key in keys if key in row), None)
    if not key or not isinstance(row["question"], str):
        raise UserError(f"{source}: a row of EarthDial needs a text as `question` and a target "
                        "such as `groundtruth`")

    def unquoted(key: str) -> str:
        return str(row.get(key) or "").strip('"')

    question = row["question"].strip('"')
    others = [unquoted(f"{key[:-1]}{i}") for i in range(1, 5)]  # caption1 .. caption4
    gt_texts = [unquoted(key), *filter(None, others)]
    if gt_texts[0].startswith('["'):  # SYSU's lists
        gt_texts = json.loads(gt_texts[0])
    tasks = ("cls", "mlc", "cap", "change", "vqa")
    if key == "gt_bbox":
        tasks = ("det", "rec")
    elif TASK_MARK.match(question):
        tasks = tasks_of_question(question, gt_texts[0])
    if task not in tasks:
        raise NotServedError(f"{source}: a row with `{key}` and this question serves "
                             f"{', '.join(tasks)}, not {task}")

    images, boxes = images_of(source, row, image_folder), []
    if task in ("det", "rec"):
        brackets = re.findall(r"\[([^\[\]]+)\]", gt_texts[0])
        boxes = [[float(v) for v in re.findall(NUMBER, text)] for text in brackets]
        if not boxes or any(len(values) != 5 for values in boxes):
            raise UserError(f"{source}: `{key}` {row[key]!r} holds no boxes of five numbers")
        boxes = [convert_box(box, GRID, (image_size, image_size)) for box in boxes]
        before, tag, _ = question.partition("<ref>")
        if tag and not plain_text(before):  # NWPU: a phrase, not a question
            question = phrase_to_question(task, plain_text(question))
    subset = "" if task == "ground" else unquoted("size_group")
    if task == "vqa":
        subset = unquoted("ttype") or unquoted("vqa_type")
    size = first_image_size(images, source)
    yield from sample_from_text(source, task, image_size, images, size, question, gt_texts, notes,
                                boxes, subset=subset, category=unquoted("category"))


def read_benchmark(source: str, row: dict, task: str, image_size: int, image_folder: Path,
                   notes: Counter, rsvqa_answers: Callable[[], dict]) -> Iterator[Sample]:
    """GeoChat-Bench and VRSBench_EVAL_*: `image_id` or `image`, `question` or `text`, and
    `ground_truth`: polygons in pixels, a box of the grid, or a text.

    `obj_corner`, in fractions of the image's sides, is preferred to a box of the grid. lrben and
    hrben have no ground truth: RSVQA's answers JSON has to be in image_folder.
    grounding_description has no boxes, so it serves cap.
    """
    question = str(row.get("question") or row.get("text") or "Describe the image.")
    truth = row.get("ground_truth", row.get("description"))
    has_boxes = isinstance(truth, list) or bool(parse_grid_boxes(str(truth), image_size))
    if has_boxes:
        tasks = ("det", "rec")
    elif BOX_RUN.search(question):
        tasks = ("rcap",)
    elif truth is not None and ("description" in row or "caption" in str(row.get("type"))):
        tasks = ("cap",)
    elif truth is not None and "type" not in row and CLOSED_QUESTION.search(question):
        tasks = ("cls",)
    else:
        tasks = ("vqa",)
    if task not in tasks:
        raise NotServedError(f"{source}: a benchmark's row serves {', '.join(tasks)}, not {task}")

    images = (find_image(image_folder, str(row.get("image_id") or row["image"])),)
    size, boxes = first_image_size(images, source), []
    if has_boxes:
        polygons = []  # (4, 2) each, in fractions of the image's sides
        if isinstance(truth, list):
            polygons = [np.reshape(polygon, (4, 2)) / size for polygon in truth]
        if row.get("obj_corner"):
            polygons = [np.reshape(row["obj_corner"], (4, 2))]
        to_box = min_area_rect if task == "det" else bounding_box
        boxes = [to_box(polygon * image_size) for polygon in polygons]
    if truth is None:
        truth = rsvqa_answers()[row["question_id"]]
    gt_answer = str(truth)
    if task == "cls":
        gt_answer = gt_answer.removesuffix("gt")  # aid.jsonl has MediumResidentialgt
    if "unique" in row:
        subset = "unique" if row["unique"] else "non-unique"
    else:
        subset = row.get("size_group")
        if task == "vqa":
            subset = subset or row.get("category") or row.get("type")
    if has_boxes or task == "rcap":
        question = phrase_to_question(task, question)
    category = str(row.get("obj_cls") or "")
    yield from sample_from_text(source, task, image_size, images, size, question, [gt_answer],
                                notes, boxes, subset=str(subset or ""), category=category)


def read_rsvqa(source: str, row: dict, task: str, image_size: int, image_folder: Path,
               notes: Counter) -> Iterator[Sample]:
    """RSVQA: a question with its answer; images in Images*/<img_id>.png, .tif or .jpg."""
    inner = next((p for p in sorted(image_folder.glob("Images*")) if p.is_dir()), image_folder)
    images = (find_image(inner, f"{row['img_id']}.png"),)
    size = first_image_size(images, source)
    gt_texts = [str(row["answer"])]
    yield from sample_from_text(source, task, image_size, images, size, row["question"], gt_texts,
                                notes, subset=row["type"], category=row["type"])


def read_few_shot(source: str, row: dict, task: str, image_size: int, image_folder: Path,
                  notes: Counter) -> Iterator[Sample]:
    """Geo-R1's VRSBench-FS, parquet or JSON: `problem`, and `answer` or `solution` as x1, y1, x2,
    y2 in pixels."""
    images = images_of(source, row, image_folder)
    values = [float(v) for v in row.get("solution") or row["answer"]]
    size = first_image_size(images, source)
    box = convert_box(values[:4], size, (image_size, image_size))
    subset = ""
    if "is_unique" in row:
        is_unique = str(row["is_unique"]).lower() in ("true", "1", "unique")
        subset = "unique" if is_unique else "non-unique"
    category = str(row.get("category") or "")
    yield from sample_from_text(source, task, image_size, images, size, row["problem"], [""],
                                notes, [box], subset=subset, category=category)


def read_captions(source: str, row: dict, task: str, image_size: int, image_folder: Path,
                  notes: Counter) -> Iterator[Sample]:
    """Several captions of an image or a change: `sentences` in Karpathy's layout (RSICD, RSITMD,
    UCM), with `changeflag` in LEVIR-CC (images/<filepath>/{A,B}), `raw`, `raw_1` .. in
    NWPU-Captions, `captions` in RSICD's captions on AID."""
    name, split = row.get("filename") or row["image"], ""
    serves = "change" if "changeflag" in row else "cap"
    if task != serves:
        raise NotServedError(f"{source}: these captions serve {serves}, not {task}")
    gt_texts = [row[key] for key in row if key.startswith("raw")] or row.get("captions")
    gt_texts = gt_texts or [sentence["raw"] for sentence in row["sentences"]]
    if task == "change":
        images = tuple(image_folder / "images" / row["filepath"] / date / name for date in "AB")
        question = CHANGE_QUESTION
        category = "change" if row["changeflag"] else "no change"
        split = split_of_name(Path(row["filepath"]))
    else:
        category = row.get("category") or Path(name).parent.name
        question = "Describe the image."
        image = image_folder / category / name
        images = (image if image.is_file() else image_folder / name,)
    size = first_image_size(images, source)
    yield from sample_from_text(source, task, image_size, images, size, question, gt_texts, notes,
                                category=category, split=split)


def read_coco(source: str, row: dict, task: str, image_size: int, image_folder: Path,
              notes: Counter) -> Iterator[Sample]:
    """NWPU-FS and other COCO JSON: an image with its `objects`, x, y, width, height in pixels."""
    image = image_folder / row["file_name"]
    size = read_image_size(image, source)
    objects = [(label, convert_box((x, y, x + w, y + h), size, (image_size, image_size)))
               for label, (x, y, w, h) in row["objects"]]
    yield from sample_per_class(source, task, image_size, (image,), objects, notes)


def read_mask(source: str, row: dict, task: str, image_size: int, image_folder: Path,
              notes: Counter) -> Iterator[Sample]:
    """EarthReason in Geo-R1's form: `problem` (one or several) and `mask`, non-zero on the target.
    gt_answer has a box and two points for each connected piece of at least 1% of the mask."""
    images, mask = images_of(source, row, image_folder), row["mask"]
    mask = image_folder / mask if isinstance(mask, str) else mask
    first_image_size((*images, mask), source)
    gt_mask = load_gt_mask(Sample(source, task, images, "", "", image_size, gt_mask=mask))
    pieces, _ = ndimage.label(gt_mask)  # (image_size, image_size): 0, or the number of the piece
    gt_boxes, instances = [], []
    for i, (rows, columns) in enumerate(ndimage.find_objects(pieces), 1):
        piece = pieces[rows, columns] == i
        if piece.sum() < gt_mask.sum() / 100:
            continue
        box = (columns.start, rows.start, columns.stop, rows.stop, 0)
        point1, point2 = ([columns.start + x, rows.start + y] for x, y in inner_points(piece))
        gt_boxes.append(box)
        instances.append({"bbox_2d": clip_and_round(box, image_size),
                          "keypoint1": point1, "keypoint2": point2})
    problems = row["problem"] if isinstance(row["problem"], list) else [row["problem"]]
    category = str(row.get("category") or "")
    for i, problem in enumerate(problems):
        problem_source = f"{source}, question {i}" if len(problems) > 1 else source
        yield make_sample(problem_source, task, image_size, images, problem, format_json(instances),
                          gt_boxes, gt_mask=mask, category=category, split=row.get("split", ""))


def inner_points(piece: np.ndarray) -> list[tuple[int, int]]:
    """Two points (x, y) of a mask (H, W): its innermost pixel, and the innermost of the pixels that
    are at least as far from it as its edge is (the same pixel if there are none)."""
    depth = ndimage.distance_transform_edt(np.pad(piece, 1))  # distance to the edge
    y1, x1 = y2, x2 = np.unravel_index(depth.argmax(), depth.shape)
    y, x = np.indices(depth.shape)
    outer_depth = np.where(np.hypot(y - y1, x - x1) >= depth.max(), depth, 0)
    if outer_depth.any():
        y2, x2 = np.unravel_index(outer_depth.argmax(), depth.shape)
    return [(int(x1 - 1), int(y1 - 1)), (int(x2 - 1), int(y2 - 1))]  # without the padding


def read_geobench(source: str, row: dict, task: str, image_size: int, image_folder: Path,
                  notes: Counter) -> Iterator[Sample]:
    """GEOBench-VLM's questions about one image, Single/qa.json or Single.parquet: a Sample for each
    of the `prompts`, with the `options`; the target is the letter of the right one. A benchmark, so
    all of it is test. Its release has no images of xBD."""
    if not isinstance(row["image_path"], str):
        raise NotServedError(f"{source}: of GEOBench-VLM only questions about one image are read")
    image = row.get("image", f"images/{row['image_name']}")  # that of a table is a column
    if image is None or isinstance(image, str) and not (image_folder / image).is_file():
        notes["questions without their image (the release lacks xBD's) left out"] += 1
        return
    images = images_of(source, {"image": image}, image_folder)
    size = first_image_size(images, source)
    for i, prompt in enumerate(row["prompts"]):
        question = (f"{row.get('cls_description') or ''} {prompt} {row['options']}. "
                    "Which letter is right?")
        yield from sample_from_text(
            f"{source}, prompt {i}", task, image_size, images, size, question,
            [row["ground_truth_option"]], notes, subset=row["task"], category=row["task"],
            split="test")


OTHER_FORMATS = {"ovd": "; `ovd` reads COCO files", "seg": "; `seg` reads EarthReason"}
# (keys of a record, name, the tasks that it may serve, its reader); first match counts
RECORDS = (
    ({"conversations"}, "a record of conversations",
     tuple(task for task in INSTRUCTIONS if task not in ("ovd", "seg")), read_conversation),
    ({"problem", "mask"}, "a record of EarthReason", ("seg",), read_mask),
    ({"problem", "solution"}, "a record of Geo-R1's few shots", ("rec", "det"), read_few_shot),
    ({"problem", "answer"}, "a record of Geo-R1's few shots", ("rec", "det"), read_few_shot),
    ({"file_name", "objects"}, "an image of COCO", ("ovd", "det"), read_coco),
    ({"img_id", "question"}, "a question of RSVQA", ("vqa",), read_rsvqa),
    ({"image", "captions"}, "a record of captions", ("cap",), read_captions),
    ({"filename", "sentences"}, "a row of Karpathy's captions", ("cap", "change"), read_captions),
    ({"filename", "raw"}, "an image of NWPU-Captions", ("cap",), read_captions),
    ({"prompts", "ground_truth_option"}, "a question of GEOBench-VLM", ("vqa",), read_geobench),
    ({"image_id"}, "a row of GeoChat-Bench or VRSBench",
     ("det", "rec", "rcap", "cap", "vqa"), read_benchmark),
    ({"question_id", "image"}, "a row of GeoChat-Bench", ("cls", "vqa"), read_benchmark),
    ({"question"}, "a row of EarthDial",
     ("cls", "mlc", "det", "rcap", "ground", "cap", "change", "vqa", "rec"), read_earthdial),
)
