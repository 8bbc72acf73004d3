"""Files of records -> (source, record) one by one, and the images that records name.

JSON is parsed a record at a time. The rows of EarthDial's shards (`datasets.save_to_disk`) and of
parquet stay in Arrow files, those of the shard or those to which `datasets` converts parquet once,
in its cache. So neither a file of many records nor the images of a table have to fit into memory.
"""

import codecs
import io
import json
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

import numpy as np

from readers.image_headers import read_image_size, size_of
from runtime.errors import UserError, first_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
IMAGE_COLUMNS = ("jpg", "jpg_A", "jpg_B", "jpg_C", "jpg_D", "jpg_pre", "jpg_post")  # EarthDial's
ANY_COLUMN = set(IMAGE_COLUMNS)
SPLITS = {s: s for s in ("", "train", "val", "test")} | {"valid": "val", "validation": "val"}
# In names of folders (tier1, tier3 and hold are xBD's) and files (EVAL is VRSBench's)
NAMED_SPLITS = SPLITS | {"tier1": "train", "tier3": "train", "hold": "val", "eval": "test"}
FILE_SPLIT = re.compile(  # RSVQA, VRSBench; tables
    r"(?:.+_split|VRSBench)_([^_.]+).*\.jsonl?|([^_.-]+).*\.parquet")
SLOW = 3e-4  # seconds that a file takes on a slow disk
PIECE = 1 << 20  # characters of a JSON file that are read together
JSON_SPACE = re.compile(r"[ \t\n\r]*")


class user_error_on:
    """Turns any error in reading into a UserError of one short line: `source` is not `expected`.
    One for each record: a context manager made of a generator takes three times as long."""

    def __init__(self, expected: str, source: str) -> None:
        self.expected, self.source = expected, source

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, Exception):  # damaged files raise anything
            return
        if not isinstance(error, UserError):
            error = UserError(f"{self.source}: not {self.expected} ({first_line(error)}); fix or "
                              "remove it")
        raise type(error)(one_line(str(error)))


def one_line(text: str) -> str:
    """The text in one line without control characters. Of a long one the middle is left out."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 300 else f"{text[:200]} .. {text[-96:]}"


# --------------------------------------------------------------------------------------------------
# JSON

def iter_json_records(path: Path) -> Iterator[tuple[str, object]]:
    """("file:record", value) of each record of a JSON array or of JSON lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # not at U+2028 too
            is_array = file.read(PIECE).lstrip().startswith("[")
            file.seek(0)
            if is_array:
                name = str(path)
                for i, value in enumerate(iter_json_array(path, file)):
                    yield f"{name}: record {i}", value
                return
            for i, line in enumerate(file, 1):
                if line.strip():
                    with user_error_on("valid JSON", f"{path}: line {i}"):
                        value = json.loads(line)
                    yield f"{path}: line {i}", value
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})")


def iter_json_array(path: Path, file: TextIO) -> Iterator[object]:
    """The values of a JSON array. Pieces of the file are read as values need them: json.loads of it
    all makes objects of several times its size."""
    decode = json.JSONDecoder().raw_decode
    text, lines_before = file.read(PIECE), 0
    position, is_first = text.index("[") + 1, True
    while True:
        try:
            end = JSON_SPACE.match(text, position).end()
            if is_first and text[end] == "]":
                break
            value, end = decode(text, end)
            end = JSON_SPACE.match(text, end).end()
            if text[end] not in ",]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except (ValueError, RecursionError, IndexError) as error:
            is_cut = isinstance(error, (json.JSONDecodeError, IndexError))  # no 5,000 digits or [[[
            more = file.read(max(PIECE, len(text))) if is_cut else ""
            if not more:
                at = getattr(error, "pos", len(text) if is_cut else position)
                line = lines_before + text.count("\n", 0, at) + 1
                raise UserError(f"{path}: line {line}: not valid JSON ({error})")
            lines_before += text.count("\n", 0, position)
            text, position = text[position:] + more, 0
            continue
        yield value
        if text[end] == "]":
            break
        position, is_first = end + 1, False
    if text[end + 1:].strip() or file.read().strip():
        raise UserError(f"{path}: not valid JSON: more follows the array")


def read_json(path: Path) -> Iterator[tuple[str, object]]:
    """iter_json_records. A file whose first line opens an object and does not close it, as of
    LEVIR-CC and many COCO files, holds one object."""
    with user_error_on("a JSON document", str(path)), path.open("rb") as file:
        is_object = file.read(99).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
        file.seek(0)  # an array is not read further: all of it may be one line
        if is_object and file.readline().rstrip().endswith((b"{", b"[", b",")):
            return iter([(str(path), json.loads(path.read_text(encoding="utf-8-sig")))])
    return iter_json_records(path)


# --------------------------------------------------------------------------------------------------
# Tables

@dataclass(frozen=True, slots=True)
class TableImage:
    """An image in a table: a piece of an Arrow file, read whenever it is opened, as a Path is. Two
    are equal if their contents are, in whichever rows."""
    name: str                                     # a hash of the content
    num_bytes: int
    size: tuple[int, int] = field(compare=False)  # width, height
    file: str = field(compare=False)
    offset: int = field(compare=False)

    def read_bytes(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.num_bytes)

    def open(self, mode: str = "rb") -> io.BytesIO:
        return io.BytesIO(self.read_bytes())


def parquet_files(path: Path) -> list[Path]:
    """The files of a table: the path itself, or those in a folder or its data/."""
    if path.is_file():
        return [path]
    return sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])


def open_table(path: Path) -> Any:
    """A shard or parquet as a datasets.Dataset, whose rows stay on disk."""
    try:
        import datasets
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: to read it, pip install datasets")
    files = parquet_files(path)
    shard = re.compile(r"(-\d+-(of-\d+|[0-9a-f-]{36}).*|[-_.]?\d*)\.parquet$")  # HF's, Spark's
    splits = {shard.sub("", file.name) for file in files}
    splits = splits or {file.parent.name for file in path.glob("*/dataset_info.json")}
    if len(splits) > 1 or splits and not files:
        raise UserError(f"{path}: holds the splits {', '.join(sorted(splits))}; "
                        "name the file or folder of one of them")
    with user_error_on("a table that datasets can read", str(path)):
        if files:  # not by Dataset.from_parquet, which reads gigabytes ahead
            features = datasets.Features.from_arrow_schema(parquet.read_schema(files[0]))
            versions = [(str(file), file.stat().st_mtime_ns) for file in files]
            return datasets.Dataset.from_generator(
                iter_parquet_rows, features, writer_batch_size=100,
                gen_kwargs={"versions": versions})
        table = datasets.load_from_disk(str(path))
        table.data.validate(full=True)  # offsets outside a damaged file would end the process
        return table


def iter_parquet_rows(versions: list[tuple[str, int]]) -> Iterator[dict]:
    """The rows of parquet files. `datasets` keeps them for these names and times of change."""
    from pyarrow import parquet
    for file, _ in versions:  # pre_buffer would hold the whole file
        for batch in parquet.ParquetFile(file, pre_buffer=False).iter_batches(100):
            yield from batch.to_pylist()


def iter_table_rows(path: Path, table: Any) -> Iterator[tuple[str, dict]]:
    """("file: row", row) of each row, with a TableImage for each image."""
    import pyarrow
    numbers = count()
    for file in table.cache_files:
        with open(file["filename"], "rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        buffer = pyarrow.py_buffer(mapped)
        for batch in pyarrow.ipc.open_stream(buffer):
            columns = {name: iter_column(column, file["filename"], buffer)
                       for name, column in zip(batch.schema.names, batch.columns)}
            for _ in range(batch.num_rows):
                source = f"{path}: row {next(numbers)}"
                with user_error_on("a row of readable images, `conversations` as JSON", source):
                    row = {name: next(cells) for name, cells in columns.items()}
                    if isinstance(row.get("conversations"), str):
                        row["conversations"] = json.loads(row["conversations"])
                yield source, row
            mapped.madvise(mmap.MADV_DONTNEED)  # else the process seems to hold the whole table


def iter_column(column: Any, file: str, mapped: Any) -> Iterator[object]:
    """The cells of a column of an Arrow file, which is mapped in a buffer: an image is a
    TableImage, or its name if it is not in the table. Raises UserError for compressed images."""
    import pyarrow
    is_list = pyarrow.types.is_list(column.type)
    if not is_image(column.type.value_type if is_list else column.type):
        yield from column.to_pylist()
    elif is_list:
        images = iter_column(column.flatten(), file, mapped)
        for n in column.value_lengths().to_pylist():
            yield None if n is None else list(islice(images, n))
    else:
        content = column.field("bytes")
        is_large = pyarrow.types.is_large_binary(content.type)
        _, offsets, data = content.buffers()
        offsets = np.frombuffer(offsets, np.int64 if is_large else np.int32)[content.offset:]
        names, filled = column.field("path").to_pylist(), column.is_valid().to_pylist()
        for i, name in enumerate(names):
            if filled[i] and content[i].is_valid:
                image = memoryview(data)[offsets[i] : offsets[i + 1]]
                offset = data.address + int(offsets[i]) - mapped.address
                if not 0 <= offset < mapped.size:  # Arrow has decompressed it to elsewhere
                    raise UserError(f"{file}: its columns are compressed, so images cannot be read "
                                    "from it one by one; write it without compression")
                size = size_of(io.BytesIO(image))
                yield TableImage(f"{zlib.crc32(image):08x}", len(image), size, file, offset)
            else:
                yield name if filled[i] else None


def is_image(kind: Any) -> bool:
    """Whether this Arrow type is that of `datasets` for images."""
    import pyarrow
    return pyarrow.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def has_match(pattern: str, path: Path, table: Any | None) -> bool:
    """Whether the pattern is in the file, or in the conversations of the table."""
    if table is None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return re.search(pattern.encode(), text) is not None
    import pyarrow.compute
    name = next((n for n in ("conversations", "messages") if n in table.column_names), None)
    if name is None:
        return False
    column = table.data.column(name)
    if not pyarrow.types.is_string(column.type):
        return any(re.search(pattern, json.dumps(turns)) for turns in column.to_pylist())
    found = pyarrow.compute.match_substring_regex(column, pattern)
    return bool(pyarrow.compute.any(found).as_py())


# --------------------------------------------------------------------------------------------------
# Names of splits and images

def split_of_name(path: Path) -> str:
    """The split that a folder or a published file is named after; "" if none."""
    name = os.path.basename(os.path.abspath(path))  # of the folder `.` too
    match = FILE_SPLIT.fullmatch(name)
    return NAMED_SPLITS.get((match[match.lastindex] if match else name).lower(), "")


def held_out_tenth(names: Iterable[str]) -> set[str]:
    """A tenth of the names, at least one, chosen by a hash: the same on every machine."""
    hashes = {name: zlib.crc32(os.fsencode(name)) for name in dict.fromkeys(names)}
    chosen = {name for name in hashes if hashes[name] % 10 == 0}
    return chosen or set(sorted(hashes, key=hashes.get)[:1])


@lru_cache(maxsize=2**18)  # one Path for the many samples of an image
def image_path(image_folder: Path, name: str) -> Path:
    return image_folder / name


def image_names(record: dict) -> list | None:
    """What the record names as its images: file names or TableImages. None if that is no list."""
    names = [] if ANY_COLUMN.isdisjoint(record) else [
        record[key] for key in IMAGE_COLUMNS if record.get(key) is not None]
    names = names or record.get("image") or record.get("images")
    if isinstance(names, str):
        return [names]
    names = names if isinstance(names, list) else [names]
    return names if all(isinstance(name, (str, TableImage)) for name in names) else None


def images_of(source: str, record: dict, image_folder: Path) -> tuple:
    """The record's images in order: paths in image_folder, or TableImages."""
    names = image_names(record)
    if not names:
        raise UserError(f"{source}: `image` is neither a file name nor a list of file names")
    return tuple([image_path(image_folder, n) if isinstance(n, str) else n for n in names])


def find_image(image_folder: Path, name: str) -> Path:
    """image_folder / name. If it has no extension or a wrong one (GeoChat-Bench's aid.jsonl), the
    image of the same stem."""
    stem = name[: name.rindex(".")] if name.lower().endswith(IMAGE_SUFFIXES) else name
    names = [name, *(f"{stem}{suffix}" for suffix in (*IMAGE_SUFFIXES, ".JPG", ".PNG", ".TIF"))]
    return image_path(image_folder, next((n for n in names if (image_folder / n).is_file()), name))


def first_image_size(images: Sequence, source: str) -> tuple[int, int]:
    """(width, height) of the first image. Reads the headers of all, to find a missing one early."""
    sizes = [image.size if isinstance(image, TableImage) else read_image_size(image, source)
             for image in images]
    return sizes[0]


def check_stated_size(source: str, stated: tuple, size: tuple[int, int]) -> None:
    """Raises UserError if an annotation states another (width, height) than its image has: boxes of
    another resolution, or of a photograph turned upright, would lie elsewhere."""
    if all(stated) and tuple(map(float, stated)) != size:
        raise UserError(f"{source}: says that its image has {stated[0]} x {stated[1]} pixels, and "
                        f"it has {size[0]} x {size[1]}; boxes are in pixels of the file, so "
                        "correct one of the two")


def read_headers_ahead(records: Iterator, image_folder: Path) -> Iterator[tuple[str, object]]:
    """The records. The headers of their images are read many at once, which read_image_size
    remembers."""
    def read_header(name: str) -> None:
        with suppress(UserError):  # it is met again by the reader, which names the record
            read_image_size(image_path(image_folder, name), "")

    seen = set()
    for batch in iter(lambda: list(islice(records, 2000)), []):
        names = {name for _, record in batch if isinstance(record, dict)
                 for name in image_names(record) or () if isinstance(name, str)}
        map_files(read_header, list(names - seen))
        seen |= names
        yield from batch


def map_files(function: Callable, files: Sequence) -> list:
    """What the function returns for each file. On a slow disk by threads: one by one, a network
    disk answers a few hundred a second. On a fast one they would only wait for each other."""
    start = perf_counter()
    results = [function(file) for file in files[:16]]
    if perf_counter() - start < 16 * SLOW:
        return results + [function(file) for file in files[16:]]
    with ThreadPoolExecutor(16) as pool:
        return results + list(pool.map(function, files[16:]))
