"""A suite: a file that names several benchmarks (see evaluate.py), and the table of them all."""

import re
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data import check_task, parse_sources
from metrics.benchmarks import in_percent
from metrics.published import BENCHMARKS
from readers.files import iter_json_records
from runtime.errors import UserError


class Benchmark(NamedTuple):
    benchmark: str  # its name, and that of its folder
    task: str
    data: str
    images: str | None = None


def read_suite(path: Path) -> list[Benchmark]:
    """The benchmarks of a file. Raises UserError, which names file and line, for one that cannot
    be evaluated."""
    suite = {}
    for source, row in iter_json_records(path):
        benchmark = parse_benchmark(source, row)
        if benchmark.benchmark in suite:
            raise UserError(f"{source}: there is a benchmark {benchmark.benchmark} before; give "
                            "each line another name")
        suite[benchmark.benchmark] = benchmark
    if not suite:
        raise UserError(f"{path}: no benchmarks; write a line of JSON for each")
    return list(suite.values())


def parse_benchmark(source: str, row: object) -> Benchmark:
    """One line of a suite; `source` says which. Raises UserError."""
    keys = ", ".join(Benchmark._fields)
    if not isinstance(row, dict):
        raise UserError(f"{source}: not an object with the keys {keys}")
    for key, value in row.items():
        if key not in Benchmark._fields:
            raise UserError(f"{source}: unknown key {key!r}; the keys are {keys}")
        if not isinstance(value, str):
            raise UserError(f"{source}: {key} is not a text")
    for key in ("benchmark", "task", "data"):
        if key not in row:
            raise UserError(f"{source}: the key {key!r} is missing")
    benchmark = Benchmark(**row)
    if not re.fullmatch(r"\w[\w.-]*", benchmark.benchmark):
        raise UserError(f"{source}: benchmark {benchmark.benchmark!r} names a folder; use letters, "
                        "digits, dots, - and _")
    try:
        check_task(benchmark.task)
    except UserError as error:
        raise UserError(f"{source}: {error}")
    task = BENCHMARKS.get(benchmark.benchmark, (benchmark.task,))[0]
    if task != benchmark.task:
        raise UserError(f"{source}: benchmark {benchmark.benchmark} is a table of task {task}, not "
                        f"{benchmark.task}")
    for data in parse_sources([benchmark.data]):
        if data.task not in (None, benchmark.task):
            raise UserError(f"{source}: data is of task {data.task}, not {benchmark.task}")
        if data.path != "synthetic" and not Path(data.path).exists():
            raise UserError(f"{source}: data {data.path}: no such file or folder")
    return benchmark


def suite_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """{benchmark: its scores} -> a Markdown table, a row for each score that was published, a
    column for each model that has one. Shares are in percent. Of a benchmark that nobody has
    published it shows the mean rewards."""
    own = None, ("format", "accuracy_reward"), {}
    tables = {name: BENCHMARKS.get(name, own) for name in scores}
    counts = Counter(chain.from_iterable(rows for _, _, rows in tables.values()))
    models = [model for model, _ in counts.most_common()]
    lines = [("benchmark", "samples", "score", "this run", *models)]
    for name, (_, columns, rows) in tables.items():
        for i, column in enumerate(columns):
            ours = scores[name].get(column)
            values = [ours if ours is None else in_percent(column, ours),
                      *(rows[model][i] if model in rows else None for model in models)]
            cells = ("-" if value is None else f"{value:.2f}" for value in values)
            lines.append((name, str(scores[name]["n"]), column, *cells))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines) + "\n"
