"""The README, docs/ and tiny/README.md are true: links lead somewhere, code links name what their
file defines, commands parse (those in the scripts' docstrings too), tables are complete, and the
code blocks of docs/forking.md work when they are pasted."""

import argparse
import ast
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from conftest import ROOT
from grpo import policy_loss, token_weights
from rewards import REWARD_PARTS, TASKS
from sample import Sample
from tools import sizing

README = ROOT / "README.md"
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [README, *DOCS, ROOT / "tiny/README.md"]
SCRIPTS = [ROOT / "train_sft.py", ROOT / "train_grpo.py", ROOT / "evaluate.py",
           *sorted(ROOT.glob("tools/*.py")), ROOT / "metrics/plots.py", ROOT / "metrics/report.py"]

every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(ROOT)).replace("/", "-"))


def read(name):
    return (ROOT / name).read_text()


def without_fences(text):
    """A page without its ``` blocks, in which `# ..` is no heading and `[..](..)` no link."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def section(page, heading):
    """A section of a page, without its heading."""
    return re.split(r"^## ", read(page).split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# --------------------------------------------------------------------------------------------------
# Links

def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#{1,6} (.+)$", without_fences(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), link
        if anchor:
            assert file.suffix == ".md" and anchor in anchors(file), link


def defines(source, name):
    """Whether a file defines a function, class, constant or flag of this name."""
    name = re.escape(name)
    return re.search(rf'^ *(def|class) {name}\b|^{name}\b[^=\n]* = |"{name}"', source, re.MULTILINE)


@every_page
def test_code_links_name_what_their_file_defines(page):
    for text, file in re.findall(r"\[`([^`]+)`\]\(([^)#]+\.py)\)", page.read_text()):
        if not file.endswith(text):  # [`grpo.py`](grpo.py) names the file
            for name in text.split("."):
                assert defines((page.parent / file).read_text(), name), f"{text} in {file}"


def test_there_are_code_links_and_no_line_numbers():
    text = "".join(page.read_text() for page in PAGES)
    assert len(re.findall(r"\[`[^`]+`\]\([^)]+\.py\)", text)) > 30
    assert not re.findall(r"\.py#L\d+", text), "a line number is wrong after the next edit"


# --------------------------------------------------------------------------------------------------
# Commands and flags

def commands(page):
    """The commands of a page's indented blocks that start a script of this project, without the
    shell around them."""
    text = re.sub(r"\\+\n\s*", " ", page.read_text())  # continued lines
    for line in re.findall(r"^    (.+)$", text, re.MULTILINE):
        start = r"(?:^|&& |do |srun )((?:python (?!-c|-m pytest)|torchrun )[^;&#]+)"
        for command in re.findall(start, line):
            command = command.split("    ")[0]  # without what it does, in a docstring
            command = re.sub(r"\$\([^)]*\)|\$\w+| \.\.\.", "1", command).replace(".py1", ".py")
            yield pytest.param(shlex.split(command), id=command[:70])


@pytest.mark.parametrize("command", [c for page in (*PAGES, *SCRIPTS) for c in commands(page)])
def test_commands_parse(command, monkeypatch):
    """By the script's own parser, and torchrun's part by torchrun's."""
    class ParsedError(BaseException):
        pass

    def parse_and_stop(parser, args=None):
        parse_args(parser, args)
        raise ParsedError

    parse_args = argparse.ArgumentParser.parse_args
    if command[0] == "torchrun":
        from torch.distributed.run import get_args_parser
        args = get_args_parser().parse_args(command[1:])
        command = ["python", args.training_script, *args.training_script_args]
    if command[1] == "-m":
        command[1:3] = [command[2].replace(".", "/") + ".py"]
    script = ROOT / command[1]
    monkeypatch.setattr(sys, "argv", command[1:])
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ROOT / "tools"), *sys.path])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(ParsedError):
        runpy.run_path(str(script), run_name="__main__")


@every_page
def test_flags_in_the_text_exist(page):
    from torch.distributed.run import get_args_parser
    sources = [*SCRIPTS, ROOT / "flags.py"]
    known = {flag for file in sources for flag in re.findall(r'"(--[\w-]+)"', file.read_text())}
    known |= {f"--{part}-weight" for part in REWARD_PARTS}
    known |= set(get_args_parser()._option_string_actions)
    known |= {"--help", "--no-build-isolation", "--index-url"}  # every script's; pip's
    known |= {"--evidence-weight"}               # of the example in docs/forking.md
    prose = re.sub(r"^    .*$", "", without_fences(page.read_text()), flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) <= known


# --------------------------------------------------------------------------------------------------
# What the pages have to hold

def test_readme_is_short():
    assert len(README.read_text().split()) <= 1800


def test_code_of_the_readme_is_the_loss():
    logprobs, old_logprobs, ref_logprobs, weights = torch.rand(4, 2, 3, 5)
    settings = {"clip_low": .1, "clip_high": .2, "beta": .3}
    rollout = SimpleNamespace(tokens=None)
    sampler = SimpleNamespace(generate=lambda *_, **__: rollout, decode_texts=lambda _: None)
    names = {"torch": torch, "sampler": sampler, "score": lambda *_: torch.rand(2, 3), "policy": lambda *_: logprobs,
             "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "weights": weights, "clip_low": .1, "clip_high": .2,
             "beta": .3} | dict.fromkeys(("prompts", "samples", "C", "G"))
    exec(python_blocks(README.read_text())[0], names)  # noqa: S102
    loss, _ = policy_loss(logprobs, old_logprobs, ref_logprobs, names["A"][:, :, None], torch.ones(2, 3, 5, dtype=torch.bool),
                          weights, loss="grpo", **settings)
    torch.testing.assert_close(names["loss"], loss)


def test_every_file_folder_and_task_is_in_the_readme():
    text = README.read_text()
    names = [*(file.name for file in ROOT.glob("*.py")), "requirements.txt", "docs/",
             *{f"{file.parent.name}/" for file in ROOT.glob("[!.]*/*.py")}]
    assert not [name for name in names if not re.search(rf"(?<![\w/]){re.escape(name)}", text)]
    assert not [task for task in TASKS if f"`{task}`" not in text]


def test_every_page_is_in_the_readme_and_says_its_purpose_first():
    for page in DOCS:
        assert f"docs/{page.name}" in README.read_text(), page.name
        assert page.read_text().split("\n\n")[1].startswith("This page "), page.name


def test_every_task_and_reward_part_is_in_the_table_of_rewards():
    text = section("docs/method.md", "Tasks and rewards")
    assert not [task for task in TASKS if f"| `{task}` |" not in text]
    assert not [part for part in REWARD_PARTS if part not in text]


def documented_metrics():
    cells = re.findall(r"^\| (`.*?) \|", section("docs/method.md", "Metrics"), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_sizing_table_is_what_its_command_prints():
    assert "\n\n" + "\n".join(sizing.table()) + "\n\n" in read("docs/scaling.md")


# --------------------------------------------------------------------------------------------------
# Your own data, your own image

def test_own_data_is_read_as_the_text_says(tmp_path, monkeypatch, capsys):
    """The example record in a file, and the command that looks at a sample."""
    text = read("docs/data.md")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "images/a.png")
    record = re.search(r'^    (\{"image": "a.png".*?\]\})$', text, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "my.json").write_text(f"[{record}]")
    look = re.search(r'^    python -c "\n(.*?)"$', text, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "look.py").write_text(textwrap.dedent(look))
    runpy.run_path(str(tmp_path / "look.py"))
    printed = capsys.readouterr().out
    assert printed.startswith("1 <|im_start|>system") and "Locate every ship." in printed
    assert printed.endswith("<think>1 to find.</think>\n"  # x by 448 / 200, y by 448 / 100
                            "<answer>[112,45,224,224]</answer><|im_end|>\n")


def test_one_image_can_be_asked_about(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (200, 100)).save(tmp_path / "image.png")
    (ask,) = python_blocks(section("docs/forking.md", "One image from Python"))
    (tmp_path / "ask.py").write_text(ask.replace("runs/grpo/model", "tiny"))
    runpy.run_path(str(tmp_path / "ask.py"))
    assert "<answer>" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The code blocks of docs/forking.md

FORKING = read("docs/forking.md")
PASTED = re.findall(r"^```python\n# at the end of (\S+)\n(.*?)^```$", FORKING,
                    re.MULTILINE | re.DOTALL)  # (file, code)
ADVANTAGES = python_blocks(section("docs/forking.md", "Another advantage"))
BETA = python_blocks(section("docs/forking.md", "A schedule of beta"))
WANDB = python_blocks(section("docs/forking.md", "Where metrics go"))
REWARDS = torch.tensor([[2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])            # (B, G)
MASK = torch.arange(4) < torch.tensor([[4, 2, 3, 1], [4, 4, 4, 4]])[:, :, None]  # (B, G, C)
PARTS = {"format": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).double(),
         "accuracy": torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).double()}


def replaced(source, old, new):
    assert source.count(old) == 1, old
    return source.replace(old, new)


def with_lines_at_the_end(source, class_name, method_name, code):
    """The source with code at the end of a method."""
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    methods = {node.name: node for node in classes[class_name].body
               if isinstance(node, ast.FunctionDef)}
    lines = source.splitlines(keepends=True)
    lines.insert(methods[method_name].end_lineno, code)
    return "".join(lines)


@pytest.fixture
def load(tmp_path):
    """(name, source) -> a module of the project as changed, loaded beside the project's own."""
    def load(name, source):
        file = tmp_path / "changed.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(f"changed_{name}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


@pytest.fixture
def pasted(load):
    """name -> the module with the page's blocks for it at its end."""
    def paste(name):
        code = "".join(f"\n\n{code}" for file, code in PASTED if file == name)
        return load(name, read(name) + code)
    return paste


@pytest.fixture
def estimate(load):
    """(number, ..) -> (advantages, groups to keep) by the estimator of this number on the page."""
    def estimate(number, rewards=REWARDS, parts=PARTS, mask=MASK, all_reduce_sum=lambda x: x):
        current, *others = ADVANTAGES
        grpo = load("grpo.py", replaced(read("grpo.py"), current, others[number]))
        advantages, keep = grpo.compute_advantages(rewards, parts, mask, False, all_reduce_sum)
        assert advantages.dtype == torch.float32 and keep.dtype == torch.bool
        return advantages, keep
    return estimate


def test_rloo_compares_with_the_mean_of_the_others(estimate):
    advantages, keep = estimate(0)
    others = torch.stack([REWARDS[:, [j for j in range(4) if j != i]].mean(1) for i in range(4)], 1)
    torch.testing.assert_close(advantages, (REWARDS - others)[:, :, None])
    assert keep.tolist() == [True, False]


def test_batch_baseline_is_the_same_on_two_ranks(estimate):
    advantages, keep = estimate(1)
    torch.testing.assert_close(advantages, (REWARDS - 1)[:, :, None])  # 8 rewards, their sum is 8
    assert keep.tolist() == [True, True]
    for b in range(2):  # the rank that has prompt b alone
        totals = iter([REWARDS.sum(), torch.tensor(REWARDS.numel())])
        local, _ = estimate(1, REWARDS[[b]], {}, MASK[[b]], lambda _, totals=totals: next(totals))
        torch.testing.assert_close(local, advantages[[b]])


def test_decay_is_whole_at_the_start_and_falls_by_the_completions_length(estimate):
    advantages, keep = estimate(2)
    torch.testing.assert_close(advantages[0, 0], torch.tensor([1, .75, .5, .25]))
    torch.testing.assert_close(advantages[0, 3, :1], torch.tensor([-1.0]))
    assert keep.tolist() == [True, False] and advantages.shape == MASK.shape


def test_accuracy_counts_for_the_second_half_of_the_tokens(estimate):
    advantages, _ = estimate(3)
    torch.testing.assert_close(advantages[0, 0], torch.tensor([.5, .5, 1, 1]))
    torch.testing.assert_close(advantages[0, 1, :2], torch.tensor([.5, 0]))


@pytest.mark.parametrize("number", range(len(ADVANTAGES) - 1))
def test_an_estimator_is_short_and_goes_into_the_loss(number, estimate):
    assert len(ADVANTAGES[1 + number].splitlines()) <= 10
    advantages, keep = estimate(number)
    mask = MASK & keep[:, None, None]
    logprobs = torch.zeros(MASK.shape, requires_grad=True)
    loss, _ = policy_loss(logprobs, logprobs.detach(), None, advantages, mask,
                          token_weights(mask, "grpo", 4), loss="grpo", clip_low=0.2, clip_high=0.2,
                          beta=0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all() and logprobs.grad.any()


def test_the_example_reward_part_reads_the_reasoning(pasted):
    rewards = pasted("rewards.py")
    sample = Sample("x", "det", (), "", "none", 112, category="ship")
    for think, expected in (("A white Ship.", 1), ("Water.", 0), ("", 0)):
        text = f"<think>{think}</think><answer>none</answer>"
        assert rewards.score_completion(text, sample)["evidence"] == expected
    assert rewards.score_completion("", sample)["evidence"] == 0
    assert "evidence" not in rewards.score_completion("", Sample("x", "cls", (), "", "sea", 112))


def test_the_example_accuracy_reward_counts_targets_that_are_hit(pasted):
    choices = pasted("metrics/reward_choices.py")
    sample = Sample("x", "det", (), "", "", 112, gt_boxes=((0, 0, 10, 10, 0), (50, 50, 60, 60, 0)))
    (reward,) = choices.parse_rewards(["det=hit_reward"], ["det"]).values()
    for answer, expected in (("[0,0,10,9],[0,0,10,3]", .5), ("[0,0,10,4]", 0), ("none", 0)):
        assert reward(answer, sample) == expected
    assert reward(",".join(["[0,0,10,9],[50,50,60,60]"] * 10), sample) == .1  # boxes do not multiply
    assert reward("[0,0,10,10,0]", replace(sample, oriented=True)) == .5


def test_the_example_reward_tells_near_from_far(pasted):
    rewards = pasted("rewards.py")
    sample = Sample("x", "where", (), "", "top left", 112)
    for answer, expected in (("top left", 1), ("top", .5), ("center", .5), ("right", 0), ("?", 0)):
        assert rewards.place_reward(answer, sample) == expected


def test_the_example_format_is_read(tmp_path, pasted):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "labels.jsonl").write_text('{"file": "a.png", "label": "ship"}\n')
    json_records = pasted("readers/json_records.py")
    request = json_records.Request("cls", 112, None, Counter())
    found = json_records.read_records(tmp_path / "labels.jsonl", {"cls": request})
    (sample,) = found["cls"]
    assert (sample.gt_answer, sample.category) == ("ship", "ship")
    assert sample.images == (tmp_path / "a.png",)


def test_all_examples_together_train(tmp_path):
    """A copy of the project with the new task, the further reward, per-token advantages, the
    schedule of beta and wandb. The commands of the new task run, with fewer steps."""
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__")
    shutil.copytree(ROOT, project, ignore=ignored)

    def edit(name, old, new):
        (project / name).write_text(replaced((project / name).read_text(), old, new))

    assert sum(len(code.splitlines()) for file, code in PASTED if "readers" not in file) < 45
    for name, code in PASTED:
        with open(project / name, "a") as file:
            file.write(f"\n\n{code}")
    edit("rewards.py", 'evidence_reward, tasks={"det"}', 'evidence_reward, tasks={"where"}')
    edit("grpo.py", ADVANTAGES[0], ADVANTAGES[-1])
    (schedule,) = BETA
    current = re.search(r"^ *beta = args\.beta\b.*\n", read("train_grpo.py"), re.MULTILINE)[0]
    edit("train_grpo.py", current, schedule)
    edit("train_grpo.py", '"lr": lr', '"lr": lr, "beta": beta')
    edit("readers/splits.py", "HELD_OUT_SAMPLES = 256", "HELD_OUT_SAMPLES = 8")  # 256 take a minute
    at_the_top, end_of_init, end_of_write = WANDB
    edit("runtime/logging.py", "import json\n", f"import json\n{at_the_top}")
    log = project / "runtime/logging.py"
    log.write_text(with_lines_at_the_end(log.read_text(), "MetricsLog", "__init__", end_of_init))
    log.write_text(with_lines_at_the_end(log.read_text(), "MetricsLog", "write_scalars", end_of_write))
    (project / "wandb.py").write_text(
        "import json\n\n"
        "def init(**settings):\n    pass\n\n"
        "def log(row, step):\n"
        "    print(json.dumps({'logged': step, 'row': row}), file=open('wandb.jsonl', 'a'))\n")

    small = {"train_sft.py": "--steps 2 --batch 4 --max-new-tokens 8",
             "train_grpo.py": "--steps 2 --prompts 4 --group 4 --max-new-tokens 12 --lr 1e-3 "
                              "--evidence-weight 0.5 --beta 0.1",
             "evaluate.py": "--limit 4 --max-new-tokens 8"}
    text = section("docs/forking.md", "A new task")
    lines = re.findall(r"^    (?:python|torchrun) (\S+\.py) (--task where .*)$", text, re.MULTILINE)
    assert [name for name, _ in lines] == list(small)
    for name, args in lines:
        command = [sys.executable, name, *shlex.split(args), *shlex.split(small[name])]
        subprocess.run(command, cwd=project, check=True)

    rows = [json.loads(line) for line in (project / "runs/where/metrics.jsonl").open()]
    assert [row["beta"] for row in rows] == [0.1, 0.05]
    assert set(rows[0]["parts"]) == {"format", "accuracy", "evidence"}
    assert any(row["grad_norm"] > 0 for row in rows)
    assert set(rows[-1]["heldout"]) == {"sampled", "greedy", "format", "evidence"}
    names = {name for row in rows for name in row} - {"beta", "heldout_evidence"}
    assert names == documented_metrics()
    logged = [json.loads(line) for line in (project / "wandb.jsonl").open()]
    assert [entry["row"] for entry in logged][-2:] == rows
    assert "evidence_reward" in json.loads((project / "runs/where-eval/scores.json").read_text())
