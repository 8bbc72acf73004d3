"""The report page: everything escaped, boxes where they belong, an order that helps, one file; looked at in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

import train_grpo
from boxes import obb_to_hbb
from conftest import ROOT
from data import load_samples
from metrics import report
from metrics.report import write_report
from metrics.rows import sample_to_row
from rewards import TASKS
from runtime.errors import UserError
from sample import BOX_TASKS, Sample, load_gt_mask, load_images
from test_scripts import Killed, here
from tiny.scenes import Scenes

HOSTILE = ("</script></dd><script>document.title='owned'</script><img src=x onerror=alert(1)> \"'>"
           "<svg onload=alert(1)> &lt; {cards} \udc00")
GROUND = (120, 40, 130)  # a flat image, found again in a screenshot by this colour
TARGET, PREDICTION = (28, 14, 84, 56), (14, 28, 98, 98)


def completion(answer, accuracy, think="Looking.", **rewards):
    text = f"<think>{think}</think>\n<answer>{answer}</answer>"
    return {"text": text, "parts": {"format": 1.0, "accuracy": accuracy}, **rewards}


def sample(**fields):
    return Sample(**{"id": "a", "task": "det", "images": (Image.new("RGB", (112, 112), GROUND),), "question": "Where?",
                     "gt_answer": "[28,14,84,56]", "image_size": 112, "gt_boxes": ((*TARGET, 0),)} | fields)


def written(folder, *entries, **options):
    write_report(folder / "report.html", entries, options.pop("title", "Answers"), **options)
    return (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser would make of the page: elements as (tag, attributes), and the text outside scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data if self.elements and self.elements[-1][0] not in ("script", "style") else ""

    def rects(self):
        """{"target": rectangles, "predicted": rectangles}, each (x, y, width, height, transform)."""
        found, layer = {"target": [], "predicted": []}, None
        for tag, attributes in self.elements:
            layer = attributes["class"] if tag == "g" else layer
            if tag == "rect":
                numbers = (float(attributes[name]) for name in ("x", "y", "width", "height"))
                found[layer].append((*numbers, attributes.get("transform")))
        return found


# ----------------------------------------------------------------------------------------------------------------------
# What the page says

def test_text_of_models_and_data_is_shown_and_never_markup(tmp_path):
    def page(text, task):
        one = sample(id=text, question=text, gt_answer=text, subset=text + "s", category=text + "c", task="rec")
        many = replace(one, task="pair", images=one.images * 2, choices=(text,), gt_texts=(text, text))
        answers = [completion(text, 0.0, think=text), {"text": text, "parts": {"accuracy": 0.0, text: 0.0}}]
        entries = [(one, answers), (one, answers[:1]), (many, answers), (replace(one, task=task), answers)]
        return Page(written(tmp_path, *entries, title=text))

    hostile, plain = page(HOSTILE, HOSTILE), page("plain", "vqa")
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert [set(names) for _, names in hostile.elements] == [set(names) for _, names in plain.elements]
    assert hostile.text.count(HOSTILE.replace("\udc00", "?")) == plain.text.count("plain") + 2  # twice the task's name


def test_page_shows_reasoning_answer_target_question_and_reward_parts(tmp_path):
    entry = (sample(task="vqa", gt_answer="seven", gt_boxes=()), [completion("eight", 0.125, "I count.")])
    text = Page(written(tmp_path, entry)).text
    for words in ("Where?", "I count.", "eight", "seven", "accuracy 0.12", "format 1.00"):
        assert words in text


def test_a_completion_that_is_not_in_the_format_is_shown_whole(tmp_path):
    text = "<answer>[1,2,3,4]</answer> so"
    assert text in Page(written(tmp_path, (sample(), [{"text": text, "parts": {"accuracy": 0.0}}]))).text


def test_page_is_one_file_that_refers_to_nothing_outside(tmp_path):
    page = written(tmp_path, *((Scenes(task, 112, 0)[1], [completion("none", 0.0)] * 2) for task in TASKS))
    assert not re.search(r"https?://|url\(|@import", page)
    for tag, attributes in Page(page).elements:
        address = attributes.get("src") or attributes.get("href") or "#"
        assert address.startswith(("#", "data:image/jpeg;base64,")), tag
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


# ----------------------------------------------------------------------------------------------------------------------
# Boxes

def test_boxes_of_target_and_prediction_are_drawn_in_the_image(tmp_path):
    rects = Page(written(tmp_path, (sample(), [completion("[14,28,98,98],[1,2,3]", 0.5)]))).rects()
    assert rects == {"target": [(28, 14, 56, 42, None)], "predicted": [(14, 28, 84, 70, None)]}


def test_turned_target_box_is_drawn_turned_clockwise_about_its_centre(tmp_path):
    rects = Page(written(tmp_path, (sample(gt_boxes=((40, 30, 80, 50, 30),)), [completion("none", 0)]))).rects()
    # SVG turns clockwise, as scenes do
    assert rects == {"target": [(40, 30, 40, 20, "rotate(30 60 40)")], "predicted": []}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_perfect_answer_covers_its_target(tmp_path, task):
    scene = next(s for s in Scenes(task, 112, 3) if s.gt_boxes or task not in BOX_TASKS)
    rects = Page(written(tmp_path, (scene, [completion(scene.gt_answer, 1.0)]))).rects()
    boxes = [np.round(obb_to_hbb(box)) for box in scene.gt_boxes] if task in BOX_TASKS else []
    corners = [(x, y, x + w, y + h) for x, y, w, h, _ in rects["predicted"]]
    assert len(corners) == len(boxes) and np.allclose(corners, boxes, atol=1)


def test_boxes_without_an_image_are_drawn_in_an_empty_square(tmp_path):
    rects = Page(written(tmp_path, (sample(images=()), [completion("[14,28,98,98]", 0.5)]))).rects()
    assert rects == {"target": [(28, 14, 56, 42, None)], "predicted": [(14, 28, 84, 70, None)]}


def test_key_points_of_a_segmentation_are_drawn(tmp_path):
    answer = '[{"bbox_2d": [10, 20, 60, 70], "keypoint1": [31, 42], "keypoint2": [33, 44]}]'
    page = written(tmp_path, (sample(task="seg"), [completion(answer, 1.0)]))
    assert 'd="M31 42h0"' in page and 'd="M33 44h0"' in page
    assert Page(page).rects()["predicted"] == [(10, 20, 50, 50, None)]


# ----------------------------------------------------------------------------------------------------------------------
# Order, groups, missing images

def group(step, *rewards):
    mean = np.mean(rewards)
    return [completion("none", reward, step=step, reward=reward, advantage=reward - mean) for reward in rewards]


def ids(page):
    return re.findall(r"(\w+)</p>\n<h2>", page)


def test_predictions_begin_with_the_worst(tmp_path):
    page = written(tmp_path, *((sample(id=f"p{i}"), [completion("none", accuracy)]) for i, accuracy in enumerate((.4, 1, 0))))
    assert ids(page) == ["p2", "p0", "p1"] and "3 samples, mean accuracy 0.467" in page


def test_groups_begin_with_the_largest_spread_and_end_without_signal(tmp_path):
    """The worst groups came first once: pages of easy or hard tasks began with groups of which GRPO learns nothing."""
    entries = [(sample(id=name), group(i, *rewards)) for i, (name, rewards) in enumerate(
        (("equal", (0, 0)), ("wide", (0, 1)), ("narrow", (.4, .6)), ("alike", (1, 1))))]
    page = written(tmp_path, *entries)
    assert ids(page) == ["wide", "narrow", "equal", "alike"]
    assert "4 groups, mean reward 0.500; 2 without signal" in page and page.count("no signal</b>") == 2


def test_limit_keeps_the_worst_and_an_even_choice_of_the_others(tmp_path):
    page = written(tmp_path, *((sample(id=str(i)), [completion("none", i / 100)]) for i in range(100)), limit=6)
    assert ids(page) == ["0", "1", "2", "3", "51", "99"]
    assert "100 samples" in page and "here 3 with the lowest accuracy and 3 of the others" in page


def test_group_is_side_by_side_in_one_card_ordered_and_coloured_by_advantage(tmp_path):
    completions = [completion(f"[{i},2,30,40]", i / 10, step=7, reward=1 + i / 10, advantage=a)
                   for i, a in enumerate((-1.5, 0, .5, 1))]
    page = written(tmp_path, (sample(), completions))
    assert page.count("<article") == 1 and page.count("<section") == 4 and page.count("data:image/jpeg") == 1
    rects = Page(page).rects()
    assert [r[0] for r in rects["predicted"]] == [3, 2, 1, 0] and len(rects["target"]) == 4
    assert re.findall(r"advantage (\S+?)reward (\S+?)format", Page(page).text) == [
        ("+1.00", "1.30"), ("+0.50", "1.20"), ("+0.00", "1.10"), ("-1.50", "1.00")]
    assert re.findall(r'<section class="(\w+)" style="--strength: (\d+)%">', page) == [
        ("better", "67"), ("better", "33"), ("equal", "0"), ("worse", "100")]
    text = Page(page).text
    assert "rewards 1.00 to 1.30, mean 1.15" in text and "step 7" in text
    assert not re.search("right|wrong", text)  # its completions differ: the group is neither


def test_controls_and_legend_are_there_only_where_they_mean_something(tmp_path):
    def controls(*entries):
        form = re.search("<form>.*</form>", written(tmp_path, *entries))[0]
        return re.findall('<select name="(.*?)"', form), re.findall('<option value="(.*?)"', form), "target" in form

    det, cls = (sample(), [completion("none", 0)]), (sample(task="cls", gt_boxes=()), [completion("sea", 0)])
    assert controls(cls) == (["order"], ["reward", "-reward"], False)
    assert controls(det) == (["order"], ["reward", "-reward"], True)
    assert controls(cls, det) == (["order", "task"], ["reward", "-reward", "", "cls", "det"], True)
    orders = ["-spread", "step", "-step", "-reward", "reward"]
    assert controls((det[0], group(1, 0, 1))) == (["order"], orders, True)


def test_missing_image_leaves_a_placeholder_and_is_counted(tmp_path, capsys):
    Image.new("RGB", (50, 20)).save(tmp_path / "here.png")
    pair = sample(task="change", images=(tmp_path / "gone.png", tmp_path / "here.png"), gt_boxes=())
    lost = sample(images=(Path("lost.png"),))
    page = written(tmp_path, (pair, [completion("none", 0)]), (lost, [completion("none", 0)] * 2))
    assert page.count("image not found</text>") == 2 and page.count("data:image/jpeg") == 1
    assert "2 images are missing" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# The files of evaluate.py and train_grpo.py

def row(scene, text, **fields):
    return json.dumps(sample_to_row(scene) | {"completion": text, "parts": {"format": 1.0, "accuracy": 0.5}} | fields)


def command(file):
    return subprocess.run([sys.executable, "-m", "metrics.report", str(file)], cwd=ROOT, capture_output=True, text=True,
                          check=False)


def test_predictions_become_a_page_beside_their_file(tmp_path):
    scenes = [Scenes(task, 112, 7)[2] for task in ("det", "change", "pair")]
    (tmp_path / "predictions.jsonl").write_text("\n".join(row(s, f"<answer>{s.gt_answer}</answer>") for s in scenes))
    done = command(tmp_path / "predictions.jsonl")
    assert done.returncode == 0 and done.stderr == ""
    page = (tmp_path / "report.html").read_text()
    assert page.count("<article") == 3 and page.count("data:image/jpeg") == 1 + 2 + 5  # scenes are drawn again


def test_samples_become_one_card_a_group(tmp_path):
    scenes = [Scenes("det", 112, 7)[i] for i in (2, 2, 3)]  # the second step meets the same scene
    rewards = {"stage": 0, "reward": 0.5, "advantage": -0.25}  # as train_grpo.py logs them
    (tmp_path / "samples.jsonl").write_text("\n".join(
        row(s, f"answer {g}", step=step, **rewards) for step, s in enumerate(scenes) for g in range(4)))
    entries = report.read_entries(tmp_path / "samples.jsonl")
    assert [len(completions) for _, completions in entries] == [4, 4, 4]
    assert entries[2][1][3] == {"text": "answer 3", "parts": {"format": 1.0, "accuracy": 0.5}, "step": 2,
                                "reward": 0.5, "advantage": -0.25}
    assert entries[0][0] == scenes[0]


def files_of_seg(folder):
    """JSON that names an image and a mask."""
    scene = Scenes("seg", 112, 7)[2]
    scene.images[0].save(folder / "image.png")
    scene.gt_mask.save(folder / "mask.png")
    (folder / "seg.json").write_text(json.dumps([{"image": "image.png", "problem": "?", "mask": "mask.png"}]))
    return folder / "seg.json"


def table_of_seg(folder):
    """The same within parquet."""
    datasets = pytest.importorskip("datasets", reason="EarthDial's shards and parquet are read by datasets")
    files_of_seg(folder)
    cells = [{"bytes": (folder / name).read_bytes(), "path": None} for name in ("image.png", "mask.png")]
    image = datasets.Image(decode=False)
    features = datasets.Features({"images": [image], "problem": datasets.Value("string"), "mask": image})
    rows = [{"images": [cells[0]], "problem": "?", "mask": cells[1]}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "seg.parquet")
    return folder / "seg.parquet"


@pytest.mark.parametrize("make", [files_of_seg, table_of_seg])
def test_images_and_masks_are_found_again_though_the_project_moves(tmp_path, monkeypatch, make):
    """Of a row, images of tables were not found at all, and others only from the folder where the run was started."""
    for folder in ("project/data", "project/runs"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    data = make(Path("data"))
    before, = load_samples(str(data), "seg", 112)
    line = sample_to_row(before, Path("runs")) | {"completion": "", "parts": {"accuracy": 0}}
    Path("runs/predictions.jsonl").write_text(json.dumps(line))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "project").rename("moved")
    (after, _), = report.read_entries(Path("moved/runs/predictions.jsonl"))
    assert load_images(after) == [Scenes("seg", 112, 7)[2].images[0]] and load_gt_mask(after).any()
    assert written(tmp_path, (after, [completion("none", 0)])).count("data:image/jpeg") == 1


@pytest.mark.parametrize("line", ["[1]", "{}", "7", *(row(sample(id="x.png"), "", **fields) for fields in (
    {"image_size": "x"}, {"boxes": [[1, 2, 3, None]]}, {"images": None}, {"parts": {"format": 1}},
    {"parts": {"accuracy": "high"}}))])
def test_bad_record_is_named(tmp_path, line):
    (tmp_path / "predictions.jsonl").write_text(row(sample(id="x.png"), "") + "\n" + line)
    with pytest.raises(UserError, match="line 2: not a record"):
        report.read_entries(tmp_path / "predictions.jsonl")


def test_training_writes_page_and_curves_at_every_checkpoint(tmp_path, monkeypatch, grpo_flags):
    """A run of days showed them only when it ended."""
    with pytest.raises(Killed):
        here(monkeypatch, train_grpo.main, *grpo_flags, tmp_path, die_at_save=2)  # --save-every 1
    assert (tmp_path / "report.html").read_text().count("<article") == 1 and (tmp_path / "curves.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# A real browser

@pytest.fixture
def browser(tmp_path):
    """(address, *flags) -> (what the browser prints, what it logs)."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no chromium or google-chrome on PATH (apt-get install chromium)")

    def run(address, *flags):
        done = subprocess.run(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
             "--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=700,900",
             *flags, address],
            capture_output=True, text=True, timeout=60, check=True)
        return done.stdout, done.stderr
    return run


def near(pixels, colour):
    return np.abs(pixels.astype(int) - colour).max(-1) < 24


def test_browser_shows_both_boxes_at_their_place_without_script_errors(tmp_path, browser):
    x1, y1, x2, y2 = PREDICTION
    written(tmp_path, (sample(question=HOSTILE), [completion(f"[{x1},{y1},{x2},{y2}] {HOSTILE}", 0.2)]))
    _, log = browser((tmp_path / "report.html").as_uri(), f"--screenshot={tmp_path / 'shot.png'}")
    assert "CONSOLE" not in log

    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    rows, columns = np.nonzero(near(pixels, GROUND))
    top, left, side = rows.min(), columns.min(), columns.max() + 1 - columns.min()
    assert side > 200 and abs(rows.max() + 1 - top - side) <= 2  # the image, square
    shown = pixels[top : top + side, left : left + side]
    for colour, box in ((report.TARGET_COLOUR, TARGET), (report.PREDICTED_COLOUR, PREDICTION)):
        seen = near(shown, ImageColor.getrgb(colour))
        rows, columns = np.nonzero(seen)
        drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * 112 / side
        assert np.allclose(drawn, box, atol=2), colour  # a line is some 3 of 336 pixels wide
        assert seen.sum() > side, colour


def test_browser_orders_and_filters_by_the_pages_address(tmp_path, browser):
    groups = (("det", 2, (0, 1)), ("vqa", 1, (.8, .9)), ("det", 4, (1, 1)), ("vqa", 3, (.2, .4)))
    written(tmp_path, *((sample(task=task, id=f"{task}{step}", gt_boxes=()), group(step, *rewards))
                        for task, step, rewards in groups))

    def shown(address):
        page, log = browser((tmp_path / "report.html").as_uri() + address, "--dump-dom")
        assert "CONSOLE" not in log
        cards = re.findall(r"<article([^>]*)>.*?(\w+)</p>\n<h2>", page, re.DOTALL)
        return [name for attributes, name in cards if " hidden" not in attributes]

    assert shown("") == ["det2", "vqa3", "vqa1", "det4"]  # the one without signal is last in every order
    assert shown("#order=step&task=") == ["vqa1", "det2", "vqa3", "det4"]
    assert shown("#order=-reward") == ["vqa1", "det2", "vqa3", "det4"]
    assert shown("#order=-step&task=det") == ["det2", "det4"]


def test_browser_would_have_logged_an_error_and_refuses_foreign_scripts(tmp_path, browser):
    page = written(tmp_path, (sample(), [completion("none", 0)]))
    foreign = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    (tmp_path / "report.html").write_text(page.replace("<main>", "<main>" + foreign))
    dom, log = browser((tmp_path / "report.html").as_uri(), "--dump-dom")
    assert "CONSOLE" in log and "<title>Answers</title>" in dom
