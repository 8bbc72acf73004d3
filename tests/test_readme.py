"""The README is true: links lead somewhere, code links stand on their line, commands parse (those of the scripts' docstrings
too), the example task trains.

    python tests/test_readme.py        # after lines have moved: writes the right line numbers into the code links
"""

import argparse
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import sizing
from conftest import ROOT

README = ROOT / "README.md"
PAGES = (README, ROOT / "tiny/README.md")
SCRIPTS = [ROOT / f"{name}.py" for name in ("train_sft", "train_grpo", "evaluate", "tests/bench", "tests/kill", "tests/sizing")]
CODE_LINK = re.compile(r"\[`([^`]+)`\]\(([\w/]+\.py)(?:#L\d+)?\)")


def anchored(text):
    """The page with each code link [`some code`](file.py#L7) on the one line of the file that holds that code."""
    def anchor(link):
        lines = (ROOT / link[2]).read_text().splitlines()
        found = [n for n, line in enumerate(lines, 1) if link[1] in line]
        assert len(found) == 1, f"`{link[1]}` stands in {len(found)} lines of {link[2]}"
        return f"[`{link[1]}`]({link[2]}#L{found[0]})"
    return CODE_LINK.sub(anchor, text)


def commands(page):
    """The command lines of the page's indented blocks that start a script of this project, without shell around them."""
    text = re.sub(r"\\+\n\s*", " ", page.read_text())                                   # continued lines
    for line in re.findall(r"^    (.+)$", text, re.MULTILINE):
        for command in re.findall(r"(?:^|&& |do |srun )((?:python (?!-c|-m pytest)|torchrun )[^;&#]+)", line):
            command = re.sub(r"\$\([^)]*\)|\$\w+| \.\.\.", "1", command).replace(".py1", ".py")
            yield pytest.param(shlex.split(command), id=command[:70])


def flags_of(script):
    """All flags of a script."""
    return set(re.findall(r'"(--[\w-]+)"', script.read_text()))


def test_code_links_stand_on_their_lines():
    assert len(CODE_LINK.findall(README.read_text())) > 10
    assert anchored(README.read_text()) == README.read_text(), "run: python tests/test_readme.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#L\d+)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_every_file_and_task_is_named():
    from rewards import TASKS
    text = README.read_text()
    files = [*ROOT.glob("*.py"), *ROOT.glob("formats/[a-z]*.py"), *ROOT.glob("scoring/[a-z]*.py")]
    assert not [file for file in files if f"]({file.relative_to(ROOT)})" not in text]
    assert not [task for task in TASKS if f"| `{task}` |" not in text]


@pytest.mark.parametrize("command", [command for page in (*PAGES, *SCRIPTS) for command in commands(page)])
def test_commands_parse(command, monkeypatch):
    """By the scripts' own parsers, and torchrun's by torchrun's."""
    from rewards import TASKS

    class Parsed(BaseException):
        pass

    def parse_and_stop(parser, args=None):
        real(parser, args)
        raise Parsed

    real = argparse.ArgumentParser.parse_args
    if command[0] == "torchrun":
        from torch.distributed.run import get_args_parser
        args = get_args_parser().parse_args(command[1:])
        command = ["python", args.training_script, *args.training_script_args]
    if command[1] == "-m":
        command[1:3] = [command[2].replace(".", "/") + ".py"]
    monkeypatch.setitem(TASKS, "where", TASKS["cls"])  # the example's
    monkeypatch.setattr(sys, "argv", command[1:])
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ROOT / "tests"), *sys.path])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / command[1]), run_name="__main__")


def test_flags_in_the_text_exist():
    from rewards import PARTS
    known = set().union(*map(flags_of, [*ROOT.glob("*.py"), *ROOT.glob("scoring/*.py"), *ROOT.glob("tests/*.py")]))
    known |= {f"--{part}-weight" for part in PARTS}
    elsewhere = {"--nproc-per-node", "--shutdown-timeout", "--no-build-isolation", "--help"}  # torchrun's, pip's
    prose = re.sub(r"^    .*$", "", README.read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) <= known | elsewhere


def test_sizing_table_is_what_its_command_prints():
    for row in sizing.table():
        assert row in README.read_text()


def test_own_data_and_own_images_are_read_as_the_text_says(tmp_path, monkeypatch, capsys):
    """The example record in a file, the line of Python that looks at it, and the lines that ask the model about an image."""
    text = README.read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "images/a.png")
    Image.new("RGB", (200, 100)).save(tmp_path / "image.png")
    record = json.loads(re.search(r'^    (\{"image": "a.png".*?\]\})$', text, re.MULTILINE | re.DOTALL)[1])
    record["conversations"][1]["value"] = "[50,10,100,50]"
    (tmp_path / "my.json").write_text(json.dumps([record]))
    (tmp_path / "look.py").write_text(re.search(r'^    python -c "(.*)"$', text, re.MULTILINE)[1])
    runpy.run_path(str(tmp_path / "look.py"))
    assert capsys.readouterr().out.endswith("<answer>[112,45,224,224]</answer><|im_end|>\n")  # 448 / 200, 448 / 100
    ask = re.search(r"```python\n(import model.*?)```", text, re.DOTALL)[1]
    (tmp_path / "ask.py").write_text(ask.replace("runs/grpo/model", "tiny"))
    runpy.run_path(str(tmp_path / "ask.py"))
    assert "<answer>" in capsys.readouterr().out


def test_the_example_task_is_short_and_trains(tmp_path):
    """Its code goes to the end of the files that the text names, and its own commands run, with fewer steps."""
    section = README.read_text().split("\n## Adding a task\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n# at the end of (\S+)\n(.*?)```", section, re.DOTALL)
    assert [name for name, _ in blocks] == ["rewards.py", "tiny/scenes.py"]
    assert sum(len(code.splitlines()) for _, code in blocks) < 30
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
    for name, code in blocks:
        with open(project / name, "a") as file:
            file.write("\n\n" + code)
    small = {"train_sft.py": "--steps 2 --batch 4 --max-new-tokens 8", "evaluate.py": "--limit 4 --max-new-tokens 8",
             "train_grpo.py": "--steps 2 --prompts 2 --group 2 --max-new-tokens 8"}
    lines = re.findall(r"^    (?:python|torchrun) (\S+\.py) (--task where .*)$", section, re.MULTILINE)
    assert {name for name, _ in lines} == set(small)
    for name, args in lines:
        subprocess.run([sys.executable, name, *shlex.split(args), *small[name].split()], cwd=project, check=True)
    assert (project / "runs/where-eval/scores.json").exists()


if __name__ == "__main__":
    README.write_text(anchored(README.read_text()))
