"""Documents that keep their records in several lists, which ids join -> records."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from readers.files import SPLITS, read_json, user_error_on
from runtime.errors import UserError

SPLIT_LISTS = SPLITS | {"training": "train", "testing": "test"}


def records_of_document(path: Path, source: str, document: dict,
                        notes: Counter) -> Iterator[tuple[str, dict]]:
    """The records of a document that keeps them in several lists, joined by their ids."""
    if "questions" in document:  # RSVQA
        answers = read_rsvqa_answers(path.with_name(path.name.replace("questions", "answers")))
        active = [q for q in document["questions"] if q.get("active", True)]
        inactive = len(document["questions"]) - len(active)
        notes["questions of other splits left out"] += inactive
        for q in active:
            answer = {"answer": answers[q["id"]]} if q["id"] in answers else {}
            yield f"{path}: question {q['id']}", q | answer
    elif "annotations" in document:  # COCO
        names = {c["id"]: c["name"] for c in document["categories"]}
        objects, seen = defaultdict(list), set()
        for a in document["annotations"]:
            if int(a.get("iscrowd") or 0):
                notes["boxes of a crowd (iscrowd) left out"] += 1
            else:
                objects[a["image_id"]].append((names[a["category_id"]], a["bbox"]))
        for image in document["images"]:
            if image["id"] in seen:
                raise ValueError(f"two images have the id {image['id']}")
            seen.add(image["id"])
            yield f"{path}: image {image['id']}", image | {"objects": objects[image["id"]]}
        for image_id in objects.keys() - seen:
            notes["boxes of images that are not listed left out"] += len(objects[image_id])
    elif "images" in document:  # Karpathy
        for i, image in enumerate(document["images"]):
            yield f"{path}: image {i}", image
    elif all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
             for rows in document.values()):  # NWPU-Captions
        splits = [SPLIT_LISTS.get(name.lower()) for name in document]  # {"train": [..], ..}
        if any(splits) and not all(splits):
            raise ValueError(f"its lists {', '.join(document)} are not all of splits")
        for (name, rows), split in zip(document.items(), splits):
            for i, row in enumerate(rows):
                named = row | {"split": split} if split else {"category": name} | row
                yield f"{path}: {name} {i}", named
    else:
        yield source, document  # of no known format


def read_rsvqa_answers(path: Path) -> dict:
    """question id -> answer, from an answers JSON of RSVQA or from the only one in a folder."""
    files = sorted(path.glob("*answers*.json")) if path.is_dir() else [path]
    if len(files) != 1:
        raise UserError(f"{path}: holds {len(files)} files *answers*.json, expected RSVQA's one")
    with user_error_on("answers of RSVQA", str(files[0])):
        (_, document), = read_json(files[0])
        return {a["question_id"]: a["answer"] for a in document["answers"] if a.get("active", True)}
