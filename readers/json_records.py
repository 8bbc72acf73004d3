"""Records of JSON files, EarthDial shards and parquet -> Samples. The keys of a record tell its
format, which is one reader and one line of the table RECORDS at the end."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np

from readers.box_formats import (
    BRACKET,
    CLOSED_QUESTION,
    LOCATE,
    MARKED_TEXT,
    TASK_MARK,
    Request,
    bounding_box,
    box_from_pixels,
    min_area_rect,
    parse_grid_boxes,
    plain_text,
    sample_from_text,
    sample_per_class,
    split_reasoning,
    tasks_of_question,
)
from readers.documents import read_rsvqa_answers, records_of_document
from readers.files import (
    SPLITS,
    check_stated_size,
    find_image,
    first_image_size,
    has_match,
    image_names,
    images_of,
    iter_table_rows,
    open_table,
    parquet_files,
    read_headers_ahead,
    read_json,
    split_of_name,
    user_error_on,
)
from readers.masks import read_mask
from runtime.errors import NotServedError, UserError
from sample import INSTRUCTIONS, Sample

OTHER_MARK = "turns with the mark of another task, such as [vqa], left out"
CHANGE_QUESTION = "What has changed from the first image to the second?"


def read_records(path: Path,
                 requests: dict[str, Request]) -> dict[str, list[Sample] | NotServedError]:
    """{task: Request} -> the Samples of each task, from one reading of a JSON array or document,
    JSON lines, an EarthDial shard or parquet; an error for a task that the records do not serve."""
    file_split = split_of_name(path) or next(map(split_of_name, parquet_files(path)), "")
    is_table = path.is_dir() or path.suffix == ".parquet"
    table = open_table(path) if is_table else None
    records = iter_table_rows(path, table) if is_table else iter(read_json(path))
    first = list(islice(records, 2))
    records = chain(first, records)
    source, document = first[0] if first and isinstance(first[0][1], dict) else (str(path), {})
    if len(first) == 1 and document and not format_of(document):
        with user_error_on("a document of RSVQA, COCO, Karpathy's or NWPU's captions", source):
            notes = Counter()
            rows = list(records_of_document(path, source, document, notes))
            for request in requests.values():
                request.notes.update(notes)
            records, document = iter(rows), rows[0][1] if rows else {}
    is_chat = "conversations" in document or "messages" in document
    marked = is_chat and has_match(MARKED_TEXT, path, table)
    image_folder = next((r.image_folder for r in requests.values()), None) or path.parent
    about_file = {"image_folder": image_folder, "marked": marked,
                  "rsvqa_answers": cache(lambda: read_rsvqa_answers(image_folder))}
    requests = {task: request._replace(**about_file) for task, request in requests.items()}
    found, not_served = {task: [] for task in requests}, {}  # the first error of a task
    for source, record in read_headers_ahead(records, image_folder):
        if not isinstance(record, dict):
            raise UserError(f"{source}: expected an object, found {type(record).__name__}")
        line = format_of(record)
        if not line:
            raise UserError(f"{source}: no known format has the keys {', '.join(record)[:60]}; "
                            "docs/data.md lists the formats, such as `conversations`, `messages`, "
                            "COCO, RSVQA and captions")
        split = SPLITS.get(str(record.get("split") or "").lower())
        if split is None:
            raise UserError(f"{source}: its `split` is {record['split']!r}, expected train, val or "
                            "test")
        _, name, served, reader = line
        if reader is read_earthdial and (
                "completion" in record or "answer" in record and not image_names(record)):
            raise UserError(f"{source}: a model's answer; evaluate.py --predictions scores these")
        marks = tasks_of_turns(record) if marked and reader is read_conversation else served
        for task, request in requests.items():
            if task in served and task not in marks:
                request.notes[OTHER_MARK] += len(record["conversations"]) // 2
                continue
            try:
                with user_error_on(name, source):
                    if task not in served:
                        raise NotServedError(f"{source}: {name} serves {', '.join(served)}, not "
                                             f"{task}{OTHER_FORMATS.get(task, '')}")
                    for sample in reader(source, record, request):
                        named = split or sample.split or file_split
                        found[task].append(sample if named == sample.split
                                           else replace(sample, split=named))
            except NotServedError as error:
                not_served.setdefault(task, error)
    for task, error in not_served.items():
        if found[task]:  # this record does not serve the task, others do
            raise UserError(str(error)) from error
    return found | not_served


def format_of(record: dict) -> tuple | None:
    """The line of RECORDS for a record."""
    for line in RECORDS:
        if line[0] <= record.keys():
            return line
    return None


def tasks_of_turns(record: dict) -> set[str]:
    """The tasks of the marks in a conversation: few records of GeoChat's mix serve a task, so one
    look at the turns saves a reading for each other task."""
    turns = record["conversations"]
    try:
        return {task for question, target in zip(turns[::2], turns[1::2])
                for task in tasks_of_question(question["value"], target["value"])}
    except (LookupError, TypeError):  # no turns: their reader says what is wrong
        return set(INSTRUCTIONS)


# --------------------------------------------------------------------------------------------------
# Readers: (source, record, request) -> Samples

def read_conversation(source: str, record: dict, request: Request) -> Iterator[Sample]:
    """2U1, VLM-R1, GeoChat_Instruct, VRSBench_train and EarthDial's training shards: `image` (one
    name or several, or image columns) and `conversations`, in turn human and gpt.

    GeoChat mixes tasks in one file and marks the turns: only those of the task are taken, and the
    others are counted. In other files every turn belongs to the task, or to the record's `task`.
    """
    turns, task, own_task = record["conversations"], request.task, record.get("task")
    if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise UserError(f"{source}: `conversations` is not a list of turns with texts; expected "
                        "`from` and `value` in each turn, as docs/data.md has it")
    wrong_role = any(turn.get("from") in ("gpt", "assistant", "system") for turn in turns[::2])
    if len(turns) < 2 or len(turns) % 2 or wrong_role:
        raise UserError(f"{source}: `conversations` has {len(turns)} turns, expected question and "
                        "target in pairs, `from` human and gpt in turn, without a system turn")
    if own_task and own_task not in INSTRUCTIONS:
        raise UserError(f"{source}: its `task` is {own_task!r}, expected one of "
                        f"{', '.join(INSTRUCTIONS)}")
    if own_task and own_task != task:
        request.notes["records of another `task` left out"] += 1
        return
    images = images_of(source, record, request.image_folder)
    n_marks = turns[0]["value"].count("<image>")
    # Images of a table are not checked: xBD's shards have one <image> mark for two of them.
    if n_marks and n_marks != len(images) and isinstance(images[0], Path):
        raise UserError(f"{source}: {n_marks} <image> marks for {len(images)} images")
    for i, (turn, target) in enumerate(zip(turns[::2], turns[1::2])):
        question, target = turn["value"], target["value"]
        if request.marked and task not in tasks_of_question(question, target):
            request.notes[OTHER_MARK] += 1
            continue
        think, gt_answer = split_reasoning(target, source)
        turn_source = f"{source}, turn {i}" if len(turns) > 2 else source
        yield from sample_from_text(turn_source, request, images, question, [gt_answer],
                                    think=think, category=record.get("category"))


def read_messages(source: str, record: dict, request: Request) -> Iterator[Sample]:
    """TRL and LLaMA-Factory: `messages` of `role` and `content`, a text or a list of texts and
    images, and `images`. Read as the same conversation."""
    turns = []
    for message in record["messages"]:
        content = message["content"]
        if isinstance(content, list):
            content = "".join(part["text"] if part["type"] == "text" else "<image>"
                              for part in content)
        turns.append({"from": message["role"], "value": content})
    yield from read_conversation(source, record | {"conversations": turns}, request)


def read_earthdial(source: str, row: dict, request: Request) -> Iterator[Sample]:
    """EarthDial's evaluation rows, of its shards or as JSON: `question`, target texts under one of
    the keys below, and `size_group` or `ttype`. Values may be JSON-quoted.

    Boxes are `[[x1, y1, x2, y2, theta]]...` on the 0-100 grid. theta is read as clockwise on the
    screen, as in GeoChat, where these boxes come from. EarthDial's scorer rotates the other way.
    """
    def unquoted(key: str) -> str:
        return str(row.get(key) or "").strip('"')

    task = request.task
    keys = ("gt_bbox", "groundtruth", "annotation", "groundtruth0", "caption0")
    key = next((key for key in keys if key in row), None)
    if not key or not isinstance(row["question"], str):
        raise UserError(f"{source}: a row of EarthDial needs a text as `question` and a target "
                        "such as `groundtruth`; docs/data.md has the form of your own records")
    question = row["question"].strip('"')
    others = [unquoted(f"{key[:-1]}{i}") for i in range(1, 5)]  # caption1 .. caption4
    gt_texts = [unquoted(key), *filter(None, others)]
    if gt_texts[0].startswith('["'):  # SYSU's lists
        gt_texts = json.loads(gt_texts[0])
    tasks = ("det", "rec") if key == "gt_bbox" else ("cls", "mlc", "cap", "change", "vqa")
    if TASK_MARK.match(question):
        tasks = tasks_of_question(question, gt_texts[0])
    if task not in tasks:
        raise NotServedError(f"{source}: a row with `{key}` and this question serves "
                             f"{', '.join(tasks)}, not {task}")
    if task in ("det", "rec"):
        boxes = parse_grid_boxes(gt_texts[0], request.image_size)
        if not boxes or len(boxes) < len(BRACKET.findall(gt_texts[0])):
            raise UserError(f"{source}: `{key}` {gt_texts[0][:60]!r} has no boxes of five numbers")
        before, tag, _ = question.partition("<ref>")
        if tag and not plain_text(before):  # NWPU: a phrase, not a question
            question = LOCATE + plain_text(question)
    subset = "" if task == "ground" else unquoted("size_group")
    if task == "vqa":
        subset = unquoted("ttype") or unquoted("vqa_type")
    images = images_of(source, row, request.image_folder)
    yield from sample_from_text(source, request, images, question, gt_texts, subset=subset,
                                category=unquoted("category"))


def read_benchmark(source: str, row: dict, request: Request) -> Iterator[Sample]:
    """GeoChat-Bench and VRSBench_EVAL_*: `image_id` or `image`, `question` or `text`, and
    `ground_truth`: polygons in pixels, a box of the grid, or a text.

    `obj_corner`, in fractions of the image's sides, is preferred to a box of the grid. lrben and
    hrben have no ground truth: RSVQA's answers JSON has to be in image_folder.
    grounding_description has no boxes, so it serves cap.
    """
    task, image_size = request.task, request.image_size
    question = str(row.get("question") or row.get("text") or "Describe the image.")
    truth = row.get("ground_truth", row.get("description"))
    if isinstance(truth, list) or parse_grid_boxes(str(truth), image_size):
        tasks = ("det", "rec")
    elif parse_grid_boxes(question, image_size):
        tasks = ("rcap",)
    elif truth is not None and ("description" in row or "caption" in str(row.get("type"))):
        tasks = ("cap",)
    elif truth is not None and "type" not in row and CLOSED_QUESTION.search(question):
        tasks = ("cls",)
    else:
        tasks = ("vqa",)
    if task not in tasks:
        raise NotServedError(f"{source}: a benchmark's row serves {', '.join(tasks)}, not {task}")
    images = (find_image(request.image_folder, str(row.get("image_id") or row["image"])),)
    polygons = []  # (4, 2) each, in fractions of the image's sides
    if task in ("det", "rec") and row.get("obj_corner"):
        polygons = [np.reshape(row["obj_corner"], (4, 2))]
    elif isinstance(truth, list):
        size = first_image_size(images, source)
        polygons = [np.reshape(polygon, (4, 2)) / size for polygon in truth]
    to_box = min_area_rect if task == "det" else bounding_box
    boxes = [to_box(polygon * image_size) for polygon in polygons]
    if truth is None:
        truth = request.rsvqa_answers()[row["question_id"]]
    gt_answer = str(truth)
    if task == "cls":
        gt_answer = gt_answer.removesuffix("gt")  # aid.jsonl has MediumResidentialgt
    subset = row.get("size_group")
    if "unique" in row:
        subset = "unique" if row["unique"] else "non-unique"
    elif task == "vqa":
        subset = subset or row.get("category") or row.get("type")
    if task in ("det", "rec", "rcap"):
        question = ("What is the object at " if task == "rcap" else LOCATE) + question
    yield from sample_from_text(source, request, images, question, [gt_answer], boxes,
                                subset=subset, category=row.get("obj_cls"))


def read_rsvqa(source: str, row: dict, request: Request) -> Iterator[Sample]:
    """RSVQA: a question with its answer; images in Images*/<img_id>.png, .tif or .jpg. count takes
    the questions of type count, whose answers are whole numbers."""
    if request.task == "count" and row["type"] != "count":
        request.notes["questions of another type than count left out"] += 1
        return
    folder = request.image_folder
    inner = next((p for p in sorted(folder.glob("Images*")) if p.is_dir()), folder)
    images = (find_image(inner, f"{row['img_id']}.png"),)
    yield from sample_from_text(source, request, images, row["question"], [str(row["answer"])],
                                subset=row["type"], category=row["type"])


def read_few_shot(source: str, row: dict, request: Request) -> Iterator[Sample]:
    """Geo-R1's VRSBench-FS, parquet or JSON: `problem`, and `answer` or `solution` as x1, y1, x2,
    y2 in pixels."""
    images = images_of(source, row, request.image_folder)
    numbers = row.get("solution") or row.get("answer")
    if not isinstance(numbers, list) or len(numbers) != 4:
        raise UserError(f"{source}: `solution` or `answer` is not a list of four numbers, x1, y1, "
                        "x2, y2; for `none` write a record of `conversations`")
    x1, y1, x2, y2 = map(float, numbers)
    box = box_from_pixels((x1, y1, x2, y2), first_image_size(images, source), request)
    is_unique = str(row.get("is_unique", "")).lower()
    subset = is_unique and ("unique" if is_unique in ("true", "1", "unique") else "non-unique")
    yield from sample_from_text(source, request, images, row["problem"], [""], [box],
                                subset=subset, category=row.get("category"))


def read_captions(source: str, row: dict, request: Request) -> Iterator[Sample]:
    """Several captions of an image or a change: `sentences` in Karpathy's layout (RSICD, RSITMD,
    UCM), with `changeflag` in LEVIR-CC (images/<filepath>/{A,B}), `raw`, `raw_1` .. in
    NWPU-Captions, `captions` in RSICD's captions on AID."""
    name, folder = row.get("filename") or row["image"], request.image_folder
    serves = "change" if "changeflag" in row else "cap"
    if request.task != serves:
        raise NotServedError(f"{source}: these captions serve {serves}, not {request.task}")
    gt_texts = [row[key] for key in row if key.startswith("raw")] or row.get("captions")
    gt_texts = gt_texts or [sentence["raw"] for sentence in row["sentences"]]
    gt_texts = [gt_texts] if isinstance(gt_texts, str) else gt_texts
    gt_texts = [text for text in gt_texts if text != ""] or gt_texts
    if serves == "change":
        images = tuple(folder / "images" / row["filepath"] / date / name for date in "AB")
        yield from sample_from_text(source, request, images, CHANGE_QUESTION, gt_texts,
                                    category="change" if row["changeflag"] else "no change",
                                    split=split_of_name(Path(row["filepath"])))
    else:
        category = row.get("category") or Path(name).parent.name
        image = folder / category / name
        images = (image if image.is_file() else folder / name,)
        yield from sample_from_text(source, request, images, "Describe the image.", gt_texts,
                                    category=category)


def read_coco(source: str, row: dict, request: Request) -> Iterator[Sample]:
    """NWPU-FS and other COCO JSON: an image with its `objects`, x, y, width, height in pixels."""
    images = (request.image_folder / row["file_name"],)
    size = first_image_size(images, source)
    check_stated_size(source, (row.get("width"), row.get("height")), size)
    objects = [(label, box_from_pixels((x, y, x + w, y + h), size, request))
               for label, (x, y, w, h) in row["objects"]]
    yield from sample_per_class(source, request, images, objects)


def read_geobench(source: str, row: dict, request: Request) -> Iterator[Sample]:
    """GEOBench-VLM's questions about one image, Single/qa.json or Single.parquet: a Sample for each
    of the `prompts`, with the `options`; the target is the letter of the right one. A benchmark, so
    all of it is test. Its release has no images of xBD."""
    if not isinstance(row["image_path"], str):
        raise NotServedError(f"{source}: of GEOBench-VLM only questions about one image are read")
    image = row.get("image", f"images/{row['image_name']}")  # that of a table is a column
    if image is None or isinstance(image, str) and not (request.image_folder / image).is_file():
        request.notes["questions without their image (the release lacks xBD's) left out"] += 1
        return
    images = images_of(source, {"image": image}, request.image_folder)
    for i, prompt in enumerate(row["prompts"]):
        question = (f"{row.get('cls_description') or ''} {prompt} {row['options']}. "
                    "Which letter is right?")
        yield from sample_from_text(
            f"{source}, prompt {i}", request, images, question, [row["ground_truth_option"]],
            subset=row["task"], category=row["task"], split="test")


OTHER_FORMATS = {"ovd": "; `ovd` reads COCO files", "seg": "; `seg` reads EarthReason"}
CONVERSATION_TASKS = tuple(task for task in INSTRUCTIONS if task not in OTHER_FORMATS)
# (keys of a record, name, the tasks that it may serve, its reader); first match counts
RECORDS = (
    ({"conversations"}, "a record of conversations", CONVERSATION_TASKS, read_conversation),
    ({"messages"}, "a record of messages", CONVERSATION_TASKS, read_messages),
    ({"problem", "mask"}, "a record of EarthReason", ("seg",), read_mask),
    ({"problem", "solution"}, "a record of Geo-R1's few shots", ("rec", "det"), read_few_shot),
    ({"problem", "answer"}, "a record of Geo-R1's few shots", ("rec", "det"), read_few_shot),
    ({"file_name", "objects"}, "an image of COCO", ("ovd", "det"), read_coco),
    ({"img_id", "question"}, "a question of RSVQA", ("vqa", "count"), read_rsvqa),
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
