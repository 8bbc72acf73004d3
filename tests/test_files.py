"""Files of records are read a record at a time, and images of tables when they are opened."""

import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

import readers.files
from data import load_splits, parse_sources
from readers.files import TableImage, iter_json_records, map_files
from runtime.errors import UserError
from sample import load_images

VALUES = [{"a": [1, {"b": "],[\\\"é\u2028"}]}, "x, ]", 12.5, [], {}, None, 123456789, "\n", [[[]]], {"deep": [[1]] * 5}]


def values_of(path):
    return [value for _, value in iter_json_records(path)]


@pytest.mark.parametrize("is_slow", [True, False])
def test_threads_read_files_of_a_slow_disk_alone(monkeypatch, is_slow):
    """On a fast disk 16 of them took five times as long as one, as they waited for each other."""
    monkeypatch.setattr(readers.files, "SLOW", 0 if is_slow else 1e9)
    results = map_files(lambda file: (file, threading.get_ident()), range(100))
    assert [file for file, _ in results] == list(range(100))
    assert (len({thread for _, thread in results}) > 1) == is_slow


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 8, 13, 10_000])
def test_an_array_is_the_same_whatever_the_pieces_it_is_read_in(tmp_path, monkeypatch, piece):
    """A number may end at the end of a piece, and an escape may be cut in two."""
    monkeypatch.setattr(readers.files, "PIECE", piece)
    file, rng = tmp_path / "a.json", np.random.default_rng(piece)
    for _ in range(30):
        values = [VALUES[i] for i in rng.integers(0, len(VALUES), rng.integers(0, 6))]
        text = json.dumps(values, indent=rng.choice([None, 0, 3]), ensure_ascii=bool(rng.integers(2)))
        file.write_text(" \n" * int(rng.integers(2)) * (piece > 2) + text + " \n", encoding="utf-8")
        assert values_of(file) == values


@pytest.mark.parametrize("piece", [1, 4, 10_000])
@pytest.mark.parametrize(("text", "says"), [
    ('[1,\n2,\n', "line 3: not valid JSON"), ('[1,\n 2 3]', "line 2: not valid JSON"), ("[1,]", "line 1: not valid"),
    ('[{"a": 1},\n\n{"a" 1}]', "line 3: not valid JSON"), ("[1, 2] 3", "more follows"), ("[", "line 1: not valid JSON"),
    ('["\ud800"]', "cannot be read as UTF-8")])
def test_what_is_no_array_is_refused_with_its_line(tmp_path, monkeypatch, piece, text, says):
    monkeypatch.setattr(readers.files, "PIECE", piece)
    (tmp_path / "a.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError, match=says):
        values_of(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "[" + "9" * 5000 + "]"])
def test_too_deep_and_too_long_are_no_json(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="not valid JSON"):
        values_of(tmp_path / "a.json")


@pytest.mark.parametrize("indent", [None, 1])
def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path, indent):
    """Before `{` on a line of its own it once made the file JSON lines, and that line no JSON."""
    (tmp_path / "a.json").write_text(json.dumps({"images": []}, indent=indent), encoding="utf-8-sig")
    assert [value for _, value in readers.files.read_json(tmp_path / "a.json")] == [{"images": []}]


# ----------------------------------------------------------------------------------------------------------------------
# Tables

def encoded(colour):
    content = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(content, "PNG")
    return content.getvalue()


def table_of(tmp_path, rows, kind):
    datasets = pytest.importorskip("datasets")
    image = datasets.Image()
    features = datasets.Features({"images": [image], "jpg": image, "conversations": datasets.Value("string")})
    table = datasets.Dataset.from_list(rows, features=features)
    if kind == "shard":
        table.save_to_disk(tmp_path / "table", max_shard_size=400)
        return tmp_path / "table"
    table.to_parquet(tmp_path / "table.parquet", batch_size=2)
    return tmp_path / "table.parquet"


@pytest.mark.parametrize("kind", ["shard", "parquet"])
def test_an_image_of_a_table_is_a_piece_of_its_file(tmp_path, monkeypatch, kind):
    """In several record batches and files, alone and in lists, with empty cells between."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    colours = [(10 * i, 0, 0) for i in range(7)]
    turns = json.dumps([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "ship"}])
    rows = [{"images": [{"bytes": encoded(c), "path": None}] * (i % 3), "conversations": turns,
             "jpg": {"bytes": encoded(c), "path": "n.png"} if i % 2 else None} for i, c in enumerate(colours)]
    path = table_of(tmp_path, rows, kind)
    table = readers.files.open_table(path)
    for i, (source, row) in enumerate(readers.files.iter_table_rows(path, table)):
        images = [*row["images"], *([row["jpg"]] if i % 2 else [])]
        assert source == f"{path}: row {i}" and len(images) == i % 3 + i % 2 and (i % 2 or row["jpg"] is None)
        assert all(image.read_bytes() == encoded(colours[i]) and image.size == (30, 20) for image in images)
        assert len(set(images)) <= 1  # equal content, one image
    assert i == 6


def test_samples_of_a_table_hold_no_pixels(tmp_path):
    """They were PIL images over their bytes: a shard of 1.3 GB took 6 GB in each process."""
    turns = json.dumps([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "ship"}])
    rows = [{"images": [], "jpg": {"bytes": encoded((i, i, i)), "path": None}, "conversations": turns} for i in range(5)]
    path = str(table_of(tmp_path, rows, "shard"))
    split = load_splits(parse_sources([path]), [], ["cls"], 28)["cls"]
    samples = [*split.train, *split.held_out]
    assert all(isinstance(image, TableImage) for sample in samples for image in sample.images)
    assert sorted(load_images(sample)[0].getpixel((3, 3))[0] for sample in samples) == [0, 1, 2, 3, 4]


def test_one_reading_serves_all_tasks(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "b.png")
    turns = [("[classify] which?", "ship"), ("[caption] describe", "A ship."), ("[refer] where is <p>it</p>?", "{<1><2><30><40>}")]
    records = [{"image": name, "conversations": [{"from": role, "value": text}
                for turn in turns for role, text in zip(("human", "gpt"), turn)]} for name in ("a.png", "b.png")]
    (tmp_path / "mix.json").write_text(json.dumps(records))
    readings = []
    monkeypatch.setattr("readers.files.iter_json_array",
                        lambda path, file: readings.append(path) or iter(json.load(file)))
    splits = load_splits(parse_sources([str(tmp_path / "mix.json")]), [], ["cls", "cap", "det"], 112)
    assert len(readings) == 1 and all(len(s.train) == len(s.held_out) == 1 for s in splits.values())


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_images_are_refused_in_one_line(tmp_path, codec):
    """An offset into what Arrow had decompressed was once taken for one into the file."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    rows = [{"jpg": {"bytes": encoded("red") * 9, "path": None}, "question": "Which class?", "groundtruth": "sea"}]
    features = datasets.Features({"jpg": datasets.Image(), "question": datasets.Value("string"),
                                  "groundtruth": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "shard")
    file, = (tmp_path / "shard").glob("*.arrow")
    with pyarrow.OSFile(str(file), "rb") as stream:
        table = pyarrow.ipc.open_stream(stream).read_all()
    options = pyarrow.ipc.IpcWriteOptions(compression=codec)
    with pyarrow.OSFile(str(file), "wb") as stream, \
            pyarrow.ipc.new_stream(stream, table.schema, options=options) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="columns are compressed.*write it without compression"):
        load_splits(parse_sources([str(tmp_path / "shard")]), [], ["cls"], 56)
