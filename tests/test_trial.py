"""Many short runs: tools/ablate.py and what it shares with tools/every_task.py."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="curves are plotted by matplotlib")

from rewards import TASKS
from tools import ablate, every_task, trial


def runs(*gains):
    """One run for each list of gains of its scenes."""
    return [{"before": {"sampled": [0.5] * len(g)}, "after": {"sampled": [0.5 + x for x in g]}} for g in gains]


def test_error_is_over_seeds_and_of_one_seed_over_its_scenes():
    several = [[.1, .3], [.2, .4], [.6, .2]]
    means = np.mean(several, 1)
    assert trial.gain_and_error(runs(*several), "sampled") == pytest.approx((means.mean(), means.std(ddof=1) / 3**.5))
    one = np.array([.1, .3, -.1, .5])
    assert trial.gain_and_error(runs(one), "sampled") == pytest.approx((one.mean(), one.std(ddof=1) / 2))
    assert trial.gain(runs([.1, .1]), "sampled") == "0.500 -> 0.600 (+0.100 ± 0.000)"


def test_variants_of_the_group_have_equally_many_completions_and_stages_share_the_steps():
    flags = {v.name: ablate.to_trial(v, 60, 128).grpo for v in ablate.VARIANTS}
    assert "--prompts 64 --group 2" in flags["group-2"] and "--prompts 8 --group 16" in flags["group-16"]
    assert "--prompts 16 " in flags["default"] and "--steps 30 " in flags["staged"] and "--steps 60 " in flags["mixed"]
    assert len(flags) == len(ablate.VARIANTS)  # a name is a folder
    assert set(every_task.RECIPES) <= set(TASKS)


def test_minutes_are_those_of_the_last_run(tmp_path):
    """A run that had been moved aside, grpo.1, once counted too."""
    for name in ("0/sft", "0/grpo", "0/grpo.1", "1/grpo"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text('{"update_s": 60}\n' * 2)
    assert trial.minutes([tmp_path / "0", tmp_path / "1"]) == 3


def test_what_was_done_is_kept_and_other_settings_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "GRPO", "--heldout 2 --max-new-tokens 8")
    monkeypatch.setattr(trial, "ProcessPoolExecutor", lambda jobs, _: ThreadPoolExecutor(jobs))  # a process imports torch first
    monkeypatch.setattr(sys, "argv", ["ablate.py", "beta-0", "--steps", "1", "--completions", "8", "--scenes", "2",
                                      "--seeds", "0", "--out", str(tmp_path)])
    ablate.main()
    table = (tmp_path / "table.md").read_text()
    assert "| beta | beta-0 | `--beta 0` | 1 |" in table
    assert (tmp_path / "curves.png").stat().st_size > 1000
    folder = tmp_path / "beta-0/0"
    log, scores = (folder / "grpo/log.txt").read_text(), (folder / "scores.json").read_text()
    (folder / "scores.json").unlink()
    again = ablate.to_trial(next(v for v in ablate.VARIANTS if v.name == "beta-0"), 1, 8)
    trial.run_trial(again, 0, tmp_path, 2)
    assert (folder / "scores.json").read_text() == scores
    assert (folder / "grpo/log.txt").read_text() == log  # it was not trained again
    with pytest.raises(ValueError, match="other settings; choose another --out"):
        trial.run_trial(again, 0, tmp_path, 3)
