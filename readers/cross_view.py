"""Pairs of ground and satellite images -> questions of `pair` (Geo-R1), and of `geo` where the
table has positions."""

import csv
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from readers.box_formats import Request, make_sample
from readers.files import first_image_size, held_out_tenth, user_error_on
from runtime.errors import NotServedError, UserError
from sample import Sample

PAIR_CANDIDATES = 4  # satellite images to choose from, without --choices


class Place(NamedTuple):
    """A line of a table."""
    source: str
    ground: Path                          # image
    satellite: Path                       # image
    position: tuple[float, float] | None  # longitude, latitude in degrees
    city: str


def read_pairs(path: Path, request: Request) -> Iterator[Sample]:
    """Questions with a ground image and satellite images, one of them right; for geo, those of
    ask_position. The right letters follow the rank of a hash, so that their counts differ by at
    most 1. split_samples holds out a tenth of the places. Wrong candidates of a training place
    are of training places (unless there is one alone), so training shows no image of a held-out
    one. Those of a held-out place are of held-out places, as long as there are enough."""
    places = read_places(path, request.image_folder)
    names = connected_names(places)
    if request.task == "geo":
        yield from ask_position(places, names, request)
        return
    positions = [place.position for place in places]
    near = request.negatives != "random" and None not in positions
    if request.negatives == "near" and not near:
        raise UserError(f"{path}: has places without a position; leave out --negatives near")
    everyone, held_out_names = range(len(places)), held_out_tenth(names)
    train = [i for i in everyone if names[i] not in held_out_names]
    held_out = [i for i in everyone if names[i] in held_out_names]
    num_train_images = len({places[i].satellite for i in train})
    k = min(request.choices or PAIR_CANDIDATES, max(num_train_images, 2), len(places))
    letters = tuple("ABCDEFGHIJ"[:k])
    hashes = [zlib.crc32(os.fsencode(place.ground.name)) for place in places]
    by_hash = sorted(everyone, key=hashes.__getitem__)
    right_of = {i: rank % k for rank, i in enumerate(by_hash)}
    others_of = defaultdict(list)
    for members, pool in ((train, train if num_train_images > 1 else everyone),
                          (held_out, held_out), (held_out, everyone)):
        images = {places[j].satellite: positions[j] for j in pool}
        others = other_images([positions[i] for i in members], images, 4 * k, near)
        for i, found in zip(members, others):
            others_of[i] += found
    for i, place in enumerate(places):
        others = dict.fromkeys(others_of[i])
        wrong = [other for other in others if other != place.satellite][: k - 1]
        if len(wrong) < max(k - 1, 1):
            raise UserError(f"{place.source}: {len(wrong)} other places to choose from, expected "
                            f"{max(k - 1, 1)}; add pairs")
        question = (f"The first image is taken on the ground, the others, A to {letters[-1]}, from "
                    "above. Which of them shows the same place?")
        right = right_of[i]
        images = (place.ground, *wrong[:right], place.satellite, *wrong[right:])
        yield make_sample(place.source, request, images, question, letters[right],
                          choices=letters, category=place.city, place=names[i])


def check_candidates(source: str, samples: Sequence[Sample], choices: int | None,
                     negatives: str | None) -> None:
    """Raises UserError if --choices or --negatives has no effect on the questions of pair."""
    k, from_table = len(samples[0].choices), bool(samples[0].place)
    if choices not in (None, k):
        raise UserError(f"--choices {choices}: the questions of {source} have {k} candidates"
                        f"{', as it has too few places' if from_table else ''}; leave --choices out"
                        f"{' or add pairs' if from_table else ''}")
    if negatives and not from_table:
        raise UserError(f"--negatives {negatives}: the questions of {source} have their candidates "
                        "already; leave --negatives out")


def connected_names(places: list[Place]) -> list[str]:
    """For each place the name by which it is held out: that of the first ground image, in the order
    of names, among the places that share an image with it, directly or through others."""
    ids = {}
    edges = np.array([[ids.setdefault(image, len(ids)) for image in (place.ground, place.satellite)]
                      for place in places], int).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), edges.T), (len(ids), len(ids)))
    component_of = connected_components(graph, directed=False)[1][edges[:, 0]]
    name_of = {}
    for component, place in zip(component_of, places):
        name = place.ground.name
        name_of[component] = min(name, name_of.get(component, name))
    return [name_of[component] for component in component_of]


def ask_position(places: list[Place], names: list[str], request: Request) -> Iterator[Sample]:
    """Where each ground image was taken, in degrees with three decimals: to 0.1 km."""
    for place, name in zip(places, names):
        if place.position is None:
            raise NotServedError(f"{place.source}: `aerial,ground` has no position, so it serves "
                                 "pair, not geo")
        longitude, latitude = place.position
        question = "Where on Earth was this image taken?"
        yield make_sample(place.source, request, (place.ground,), question,
                          f"{latitude:.3f}, {longitude:.3f}", category=place.city, place=name)


def read_places(path: Path, image_folder: Path | None) -> list[Place]:
    """The lines of tables without a header: `aerial,ground[,annotation]` (CVUSA) or
    `name,longitude,latitude,city,aerial,ground` (CV-Cities, <city>/img_info.csv)."""
    places, files = [], [path]
    if path.is_dir():
        files = sorted([*path.glob("*.csv"), *path.glob("*/img_info.csv")])
    for file in files:
        with user_error_on("a table of text", str(file)):
            lines = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines()))
        for i, line in enumerate(lines, 1):
            if not line:
                continue
            source = f"{file}: line {i}"
            with user_error_on("`aerial,ground` or `name,lon,lat,city,aerial,ground`", source):
                if len(line) > 5:
                    _, lon, lat, city, aerial, ground = line[:6]
                    if not (abs(float(lon)) <= 360 and abs(float(lat)) <= 90):  # or NaN
                        raise ValueError(f"no longitude and latitude: {lon}, {lat}")
                    position = ((float(lon) + 180) % 360 - 180, float(lat))
                    root = image_folder or file.parent.parent
                else:
                    aerial, ground = line[:2]
                    position, city, root = None, "", image_folder or file.parent
                first_image_size((root / ground, root / aerial), source)
                places.append(Place(source, root / ground, root / aerial, position, city))
    return places


def other_images(positions: list, images: dict[Path, tuple | None], few: int,
                 near: bool) -> list[list[Path]]:
    """For each position satellite images of others, the wrong candidates, from {image: position}.
    With `near` the nearest come first. Otherwise they are drawn at random, with the index as the
    seed. One at the position itself, which would be right too, is left out."""
    paths, few = list(images), min(few, len(images))
    if near and positions:
        tree = cKDTree(to_unit_sphere(list(images.values())))
        drawn = tree.query(to_unit_sphere(positions), few)[1].reshape(-1, few)
    else:
        drawn = [np.random.default_rng(i).choice(len(images), few, replace=False)
                 for i in range(len(positions))]
    others = [[paths[j] for j in row] for row in drawn]
    return [[path for path in row if position is None or images[path] != position]
            for position, row in zip(positions, others)]


def to_unit_sphere(positions: list) -> np.ndarray:
    """(longitude, latitude) in degrees -> points (n, 3)."""
    lon, lat = np.radians(positions).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)
