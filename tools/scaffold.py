"""Pairs of ground and satellite images -> exemplars of reasoning for SFT, the scaffolding stage of
Geo-R1 cross-view: cue, inference, check and decision, written from the table's metadata.

    python tools/scaffold.py --data CV-Cities --choices 5 --out runs/scaffold.jsonl
    python train_sft.py --task pair --data runs/scaffold.jsonl --out runs/scaffold

An exemplar says where the ground image was taken, its hemisphere and climate zone, where the noon
sun is there, and how far from it each candidate is. It says nothing that does not follow from the
table: one without positions (CVUSA) leaves cue and inference out. Each record has the `split` that
it has in training on --data, so GRPO on --data holds out what SFT held out.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import parse_sources, read_sources, split_sources
from flags import HelpFormatter, add_candidate_flags
from readers.cross_view import read_places
from runtime.command_line import run_main
from runtime.errors import UserError
from sample import Sample
from texts import great_circle_km

TROPIC, POLAR_CIRCLE = 23.44, 66.56  # degrees of latitude


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True, help="a table or folder of CVUSA or CV-Cities")
    parser.add_argument("--images", help="folder that image names are relative to")
    add_candidate_flags(parser)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    args = parser.parse_args()
    sources = parse_sources([args.data], args.images, args.choices, args.negatives)
    found = read_sources(sources, ["pair"], 448)["pair"]
    samples = found[0][1]
    if not samples[0].place:
        raise UserError(f"--data {args.data}: no table of places, as CVUSA or CV-Cities have it")
    images = sources[0].images
    places = read_places(Path(sources[0].path), images and Path(images))
    positions_of = defaultdict(list)  # satellite image -> positions of its ground images
    for place in places:
        positions_of[place.satellite].append(place.position)
    train_ids = {sample.id for sample in split_sources(found)[0][0]}
    lines = []
    for sample, place in zip(samples, places, strict=True):
        distances = [] if place.position is None else [
            0.0 if image == place.satellite
            else min(distance_km(place.position, other) for other in positions_of[image])
            for image in sample.images[1:]]
        texts = [format_distance(distance) for distance in distances]
        if texts.count("0 m") <= 1:  # else a wrong candidate is right as well
            think = write_think(sample, place.position, place.city, texts)
            split = "train" if sample.id in train_ids else "test"
            lines.append(json.dumps(to_record(sample, think, split, args.out.parent)) + "\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(lines))
    print(f"{args.out}: {len(lines)} exemplars")
    if len(lines) < len(samples):
        print(f"{len(samples) - len(lines)} left out: a wrong candidate is less than 0.5 m away")


def distance_km(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Of two positions (longitude, latitude) in degrees."""
    return great_circle_km(a[::-1], b[::-1])


def format_distance(km: float) -> str:
    return f"{km:.1f} km" if km >= 1 else f"{1000 * km:.0f} m"


def write_think(sample: Sample, position: tuple[float, float] | None, city: str,
                distances: list[str]) -> str:
    """The reasoning of a question of pair. `distances`: from the ground image to each candidate."""
    letter = sample.gt_answer
    decision = f"Decision: {letter} shows the same place."
    if position is None:
        others = ", ".join(other for other in sample.choices if other != letter)
        return f"Check: other places are shown by {others}. {decision}"
    longitude, latitude = position
    hemisphere, sun = ("northern", "south") if latitude >= 0 else ("southern", "north")
    zone = "temperate" if abs(latitude) < POLAR_CIRCLE else "polar"
    noon = f"in the {sun}"
    if abs(latitude) < TROPIC:
        zone, noon = "tropical", "high"
    where = f"in {city}, " if city else ""
    candidates = ", ".join(f"{letter} {text}" for letter, text in zip(sample.choices, distances))
    return (f"Cue: the ground image was taken {where}at {latitude:.3f}, {longitude:.3f}. "
            f"Inference: that is the {hemisphere} hemisphere and the {zone} zone, where the noon "
            f"sun is {noon}. Check: the distances to the candidates are {candidates}. {decision}")


def to_record(sample: Sample, think: str, split: str, folder: Path) -> dict:
    """The exemplar in the form of docs/data.md, with image names relative to `folder`."""
    names = [os.path.relpath(image, os.path.realpath(folder)) for image in sample.images]
    return {"id": sample.id, "task": "pair", "image": names, "split": split,
            "category": sample.category, "conversations": [
                {"from": "human", "value": "<image>" * len(names) + sample.question},
                {"from": "gpt", "value": f"<think>{think}</think>"
                                         f"<answer>{sample.gt_answer}</answer>"}]}


if __name__ == "__main__":
    run_main(main, "nothing was written")
