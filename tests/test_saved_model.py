"""A saved model in other programs: transformers gives the completions of evaluate.py, and vLLM would get its prompt
and its pixels. And one question about one image, from the command line."""

import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from conftest import succeed
from metrics.report import PREDICTED_COLOUR
from model import STOP_TOKENS
from pretrained import load_model, save_model
from processing import encode
from rollout import Sampler, predict
from runtime.errors import UserError
from sample import INSTRUCTIONS, Sample, chat_template, format_prompt, load_images
from test_docs import python_blocks, section
from tiny.scenes import Scenes
from tools import ask, export

IN_TRANSFORMERS, IN_VLLM = python_blocks(section("docs/forking.md", "The model in other programs"))


@pytest.fixture(scope="module")
def shipped():
    """(model, processor) of `tiny`, which answers; with what a hub model has of its own."""
    model, processor = load_model("tiny")
    processor.tokenizer.chat_template = "{{ messages }}"
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.1, repetition_penalty=1.05, eos_token_id=0)
    return model, processor


@pytest.fixture(scope="module")
def folder(shipped, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "model"
    save_model(*shipped, path)
    return path


@pytest.fixture(autouse=True)
def auto_processor(monkeypatch):
    """AutoProcessor loads a video processor too, and that wants torchvision. Where it is missing: without one."""
    if not is_torchvision_available():
        monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", lambda *args, **more: None)
        monkeypatch.setattr(AutoImageProcessor, "from_pretrained", Qwen2VLImageProcessorPil.from_pretrained)
        monkeypatch.setattr(Qwen2_5_VLProcessor, "check_argument_for_proper_class", lambda *args: None)


@pytest.fixture
def question(shipped, tmp_path, monkeypatch):
    """(width and height, mode) -> the page's question about such an image.png of ships, as a sample."""
    def question(size=(112, 112), mode="RGB"):
        monkeypatch.chdir(tmp_path)
        ships = next(s for s in Scenes("det", 112, seed=1) if s.question == "Locate every ship.")
        ships.images[0].convert(mode).resize(size).save("image.png")
        return Sample("image.png", "det", ("image.png",), "Locate every ship.", "", shipped[1].image_size)
    return question


def run_block(code, folder, names=None):
    """What a block of the page defines, in the folder with image.png."""
    Path("block.py").write_text(code.replace("runs/grpo/model", str(folder)))
    return runpy.run_path("block.py", names)


# ----------------------------------------------------------------------------------------------------------------------
# Other programs

@pytest.mark.parametrize("size, mode", [
    ((112, 112), "RGB"), ((150, 150), "P"), ((600, 336), "RGB"), ((97, 310), "RGBA")])
def test_transformers_gives_the_completion_of_evaluate(shipped, folder, question, capsys, size, mode):
    """Qwen's image processor makes 84 x 84 of 150 x 150. Without the system prompt, or with the generation config of
    Qwen, the model answers something else."""
    sample, sampler = question(size, mode), Sampler(*shipped)
    plain, printed = run_block(IN_TRANSFORMERS, folder), capsys.readouterr().out
    ours = sampler.generate(encode(shipped[1], sample), 96)
    assert plain["tokens"].tolist() == ours.tokens[ours.mask].tolist()
    assert "<answer>[" in printed and printed == predict(sampler, [encode(shipped[1], sample)], 96)[0][0] + "\n"


def test_vllm_gets_the_same_prompt_and_pixels(folder, question, monkeypatch):
    """vLLM's documented input: text with one <|image_pad|> for each image, and PIL images."""
    sample, calls = question((600, 336)), []
    vllm = ModuleType("vllm")
    vllm.SamplingParams = dict
    vllm.LLM = lambda *args, **more: SimpleNamespace(
        generate=lambda *args: calls.append(args) or [SimpleNamespace(outputs=[SimpleNamespace(text="")])])
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    run_block(IN_VLLM, folder, run_block(IN_TRANSFORMERS, folder))
    [(request, params)] = calls
    assert request["prompt"] == format_prompt(sample) and params["temperature"] == 0
    assert np.array_equal(request["multi_modal_data"]["image"], load_images(sample)[0])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("system", [None, 'Be "brief",\n\nin {{ words }} {% raw %} {# or é 海 😀 \\n.'])
def test_template_is_the_prompt_of_training(shipped, tmp_path, thinking, system):
    """The system prompt and the request at the end of the user's turn are in the template."""
    save_model(*shipped, tmp_path / "model", system, thinking)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    sample = Sample("x", "change", ("a.png", "b.png"), "What?", "", 112, thinking=thinking, system=system)
    text = {"type": "text", "text": f"What? {INSTRUCTIONS['change']}"}
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, text]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == format_prompt(sample)
    prompt += "a</think>"
    messages.append({"role": "assistant", "content": "a</think>"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "<|im_end|>\n"
    messages.insert(0, {"role": "system", "content": "Be brief."})
    prompt = prompt.replace(format_prompt(sample), format_prompt(replace(sample, system="Be brief.")))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "<|im_end|>\n"


def test_what_a_hub_model_had_of_its_own_is_replaced(folder):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    assert tokenizer.chat_template == chat_template()
    assert not config.do_sample and config.repetition_penalty in (None, 1.0)
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    vision_tokens = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    assert config.suppress_tokens == tokenizer.convert_tokens_to_ids(vision_tokens)


def test_an_image_that_is_not_resized_is_refused(folder):
    """An answer about 84 x 84 pixels, with boxes of 112 x 112, would look right."""
    with pytest.raises(ValueError, match="reshape"):
        Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[Image.new("RGB", (150, 150))])


def test_a_runs_folder_points_to_its_model(folder):
    with pytest.raises(UserError, match=f"its model is {folder}$"):
        load_model(str(folder.parent))


def test_a_saved_model_is_as_readable_as_other_files(tmp_path, shipped):
    """safetensors makes private files, so a colleague on a shared disk could not load the model."""
    save_model(*shipped, tmp_path / "model")
    (tmp_path / "other").touch()
    assert {file.stat().st_mode for file in (tmp_path / "model").iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_a_run_that_is_not_complete_points_to_its_checkpoint(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for name in (tmp_path, tmp_path / "model"):
        with pytest.raises(UserError, match="not complete.*--resume.*tools/export.py"):
            load_model(str(name))


def test_export_writes_the_model_of_the_last_checkpoint(staged, tmp_path, monkeypatch):
    """The last one of a complete run is its model."""
    monkeypatch.setattr(sys, "argv", ["export.py", str(staged), str(tmp_path / "model")])
    export.main()
    for name in ("model.safetensors", "config.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (staged / "model" / name).read_bytes(), name
    with pytest.raises(UserError, match="exists; choose another folder"):
        export.main()


def test_export_refuses_a_damaged_checkpoint(staged, tmp_path, monkeypatch):
    shutil.copytree(staged / "checkpoint", tmp_path / "checkpoint")
    file = next((tmp_path / "checkpoint").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path), str(tmp_path / "exported")])
    with pytest.raises(UserError, match="distcp is damaged"):
        export.main()
    assert not (tmp_path / "exported").exists()


def test_export_refuses_another_model_than_the_one_that_the_run_adapts(tmp_path, monkeypatch):
    """A checkpoint of LoRA holds adapters alone: merged into another model, they made one that nobody trained."""
    base, exported = tmp_path / "base", tmp_path / "exported"
    save_model(*load_model("tiny"), base)
    succeed("train_sft.py", "--task", "cls", "--model", base, "--lora", 2, "--steps", 1, "--batch", 2, "--heldout", 0,
            "--out", tmp_path / "run")
    shutil.rmtree(base)
    model, processor = load_model("tiny")
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[0] += 1
    save_model(model, processor, base)
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "run"), str(exported)])
    with pytest.raises(UserError, match="its weights are not those that .*run began with"):
        export.main()
    assert not exported.exists()


# ----------------------------------------------------------------------------------------------------------------------
# tools/ask.py

def run_ask(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["ask.py", "Locate every ship.", "--task", "det", "--image", "image.png",
                                      *map(str, args)])
    ask.main()


def test_ask_prints_the_completion_of_evaluate(shipped, folder, question, monkeypatch, capsys):
    sample = question((600, 336))
    run_ask(monkeypatch, "--model", folder)
    assert capsys.readouterr().out == predict(Sampler(*shipped), [encode(shipped[1], sample)], 96)[0][0] + "\n"


def test_ask_does_not_draw_over_the_image_it_is_asked_about(monkeypatch, tmp_path):
    """It once replaced the user's picture by the drawing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the --image"):
        run_ask(monkeypatch, "--out", tmp_path / "image.png")


def test_ask_refuses_a_picture_of_no_known_kind_before_the_model_answers(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="answer: it has to end in .png"):
        run_ask(monkeypatch, "--out", tmp_path / "answer")


def test_ask_refuses_tokens_of_the_chat(monkeypatch):
    """One more <|image_pad|> than images ended in a traceback; <|im_end|> ended the user's turn."""
    monkeypatch.setattr(sys, "argv", ["ask.py", "Locate <|image_pad|> ship.", "--task", "det", "--image", "image.png"])
    with pytest.raises(UserError, match="a part of the chat's layout"):
        ask.main()


@pytest.mark.parametrize("answer, lines", [
    ("[28,14,84,56]", [(100, 30, 300, 30), (100, 120, 300, 120), (100, 30, 100, 120), (300, 30, 300, 120)]),
    ('[{"bbox_2d": [28, 14, 84, 56], "label": "ship"}]', [(100, 30, 300, 30)]),
    ("[42,28,70,42,90]", [(175, 45, 225, 45), (175, 45, 175, 105)]),  # 28 x 14, turned: 14 x 28 about (56, 35)
    ("none", []), ("[1,2,3]", []), ("I see none.", []), ("[50,1,50,9]", [])], ids=str)
def test_ask_draws_the_boxes_in_pixels_of_the_original(question, monkeypatch, tmp_path, capsys, answer, lines):
    question((400, 240))
    Image.new("RGB", (400, 240)).save("image.png")
    monkeypatch.setattr(ask, "predict", lambda *args: [[f"<think>a</think><answer>{answer}</answer>"]])
    run_ask(monkeypatch, "--out", "answer.png")
    picture = np.asarray(Image.open("answer.png"))
    assert picture.shape == (240, 400, 3) and f"answer.png: {int(bool(lines))} boxes" in capsys.readouterr().out
    colour = tuple(int(PREDICTED_COLOUR[i : i + 2], 16) for i in (1, 3, 5))
    drawn = (picture == colour).all(2)
    assert drawn.any() == bool(lines)
    for x1, y1, x2, y2 in lines:
        for t in (0.25, 0.5, 0.75):
            x, y = round(x1 + t * (x2 - x1)), round(y1 + t * (y2 - y1))
            assert drawn[y - 2 : y + 3, x - 2 : x + 3].any(), (x, y)
