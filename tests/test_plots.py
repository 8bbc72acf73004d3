"""The curves: what is drawn in which panel, and what its axes say."""

import json

import numpy as np
import pytest

from metrics.plots import METRICS, plot_curves, plot_metric

figure = pytest.importorskip("matplotlib.figure", reason="curves are plotted by matplotlib")


def row(step, accuracy, stage=0, **fields):
    return {"step": step, "stage": stage, "accuracy": accuracy, "kl": step / 10} | fields


def drawn(rows, name):
    axis = figure.Figure().add_subplot()
    plot_metric(axis, rows, name, "C0")
    return axis, {line.get_label(): line for line in axis.lines}


def test_each_step_and_the_mean_of_the_last_ten_over_steps_counted_from_1():
    values = [*range(1, 20), None]  # a step that was not finite is null in metrics.jsonl
    _, lines = drawn([row(step, value) for step, value in enumerate(values, 1)], "accuracy")
    assert set(lines) == {"each step", "mean of the last 10"}
    assert np.array_equal(lines["each step"].get_xdata(), range(1, 21))
    assert np.array_equal(lines["each step"].get_ydata(), [*range(1, 20), np.nan], equal_nan=True)
    assert lines["mean of the last 10"].get_ydata()[[0, 9, 18, 19]].tolist() == [1, 5.5, 14.5, 15]


def test_the_mean_begins_anew_with_each_stage():
    """It went on across the border: after an easy task, ten steps of a hard one looked better than they were."""
    _, lines = drawn([row(step, value, stage) for step, (value, stage) in enumerate([(1, 0), (1, 0), (0, 1), (.5, 1)], 1)], "accuracy")
    assert lines["mean of the last 10"].get_ydata().tolist() == [1, 1, 0, .25]


def test_held_out_scores_are_dots_beside_the_accuracy_reward():
    scores = {"sampled": .25, "greedy": .5, "format": 1}
    rows = [row(1, 0), row(2, 0, heldout=scores), row(3, 0, heldout={})]  # {}: the source holds none out
    _, lines = drawn(rows, "accuracy")
    for kind in ("sampled", "greedy"):
        line = lines[f"held out, {kind}"]
        assert line.get_xydata().tolist() == [[2, scores[kind]]]
        assert line.get_marker() == "o" and line.get_linestyle() == "None"
    assert set(drawn(rows, "kl")[1]) == {"each step", "mean of the last 10"}


def test_a_held_out_metric_is_dots_alone_the_last_step_included():
    """Most steps have none: as a line of single points it was invisible, and its mean hid the last score."""
    rows = [row(1, 0), row(2, 0, heldout_greedy=.25), row(3, 0), row(4, 0, heldout_greedy=.5)]
    _, lines = drawn(rows, "heldout_greedy")
    assert {label: line.get_xydata().tolist() for label, line in lines.items()} == {"held out, greedy": [[2, .25], [4, .5]]}


def test_held_out_scores_before_a_stage_are_dots_where_it_begins():
    """With one dot at the end a reader could not see what a run had gained."""
    first, last, other = ({"sampled": value, "greedy": value} for value in (.25, .5, .75))
    rows = [row(1, 0, heldout_before=first), row(2, 0, heldout=last), row(3, 0, 1, heldout_before=other), row(4, 0, 1)]
    _, lines = drawn(rows, "accuracy")
    for kind in ("sampled", "greedy"):
        assert lines[f"held out, {kind}"].get_xydata().tolist() == [[.5, .25], [2, .5], [2.5, .75]]


def test_axes_say_what_they_show_in_which_unit_and_where_the_next_task_begins():
    axis, lines = drawn([row(1, 0), row(2, 0), row(3, 0, stage=1)], "kl")
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("step", "KL to reference (nats/token)")
    assert lines["next task"].get_xdata()[0] == 2.5


def test_picture_of_several_runs(tmp_path):
    for name in ("seed0", "seed1"):
        (tmp_path / name).mkdir()
        rows = [dict.fromkeys(METRICS, step) | {"parts": {}} for step in range(3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plot_curves([tmp_path / "seed0", tmp_path / "seed1"], METRICS, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="parts is no number in each step"):
        plot_curves([tmp_path / "seed0"], ["parts"], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="no metric speed; it has reward"):
        plot_curves([tmp_path / "seed0"], ["speed"], tmp_path / "curves.png")
