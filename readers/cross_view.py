"""Pairs of ground and satellite images -> questions of `pair` (Geo-R1), and of `geo` where the
table has positions."""

import csv
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from readers.box_formats import Request, make_sample
from readers.files import first_image_size, held_out_tenth, user_error_on
from runtime.errors import NotServedError, UserError
from sample import Sample

PAIR_CANDIDATES = 4  # satellite images to choose from


def read_pairs(path: Path, request: Request) -> Iterator[Sample]:
    """Questions with a ground image and PAIR_CANDIDATES satellite images, one of them right; for
    geo, those of ask_position. The right letters follow the rank of a hash, so that their counts
    differ by at most 1. data.split_samples holds out a tenth of the places. Wrong
    candidates are on the side of their place, as long as it has enough: training shows no image of
    a held-out one."""
    places = read_places(path, request.image_folder)
    if request.task == "geo":
        yield from ask_position(places, request)
        return
    positions = [place[3] for place in places]
    k = min(PAIR_CANDIDATES, len(places))
    letters = tuple("ABCDEFGHIJ"[:k])
    hashes = [zlib.crc32(os.fsencode(ground.name)) for _, ground, *_ in places]
    by_hash = sorted(range(len(places)), key=hashes.__getitem__)
    right_of = {i: rank % k for rank, i in enumerate(by_hash)}
    held_out = held_out_tenth(ground.name for _, ground, *_ in places)
    everyone = range(len(places))
    sides = [[i for i in everyone if (places[i][1].name in held_out) == side]
             for side in (True, False)]
    others_of = defaultdict(list)
    for members in (*sides, everyone):
        for i, others in zip(members, other_places([positions[i] for i in members])):
            others_of[i] += [members[j] for j in others]
    for i, (source, ground, satellite, _, city) in enumerate(places):
        others = dict.fromkeys(places[j][2] for j in others_of[i])
        wrong = [other for other in others if other != satellite][: k - 1]
        if len(wrong) < max(k - 1, 1):
            raise UserError(f"{source}: {len(wrong)} other places to choose from, expected "
                            f"{max(k - 1, 1)}; add pairs")
        question = (f"The first image is taken on the ground, the others, A to {letters[-1]}, from "
                    "above. Which of them shows the same place?")
        right = right_of[i]
        candidates = (*wrong[:right], satellite, *wrong[right:])
        yield make_sample(source, request, (ground, *candidates), question, letters[right],
                          choices=letters, category=city)


def ask_position(places: list[tuple], request: Request) -> Iterator[Sample]:
    """Where each ground image was taken, in degrees with three decimals: to 0.1 km."""
    for source, ground, _, position, city in places:
        if position is None:
            raise NotServedError(f"{source}: `aerial,ground` has no position, so it serves pair, "
                                 "not geo")
        longitude, latitude = position
        longitude = (longitude + 180) % 360 - 180
        yield make_sample(source, request, (ground,), "Where on Earth was this image taken?",
                          f"{latitude:.3f}, {longitude:.3f}", category=city)


def read_places(path: Path, image_folder: Path | None) -> list[tuple]:
    """(source, ground image, satellite image, (longitude, latitude) or None, city) of the lines of
    tables without a header: `aerial,ground[,annotation]` (CVUSA) or
    `name,longitude,latitude,city,aerial,ground` (CV-Cities, <city>/img_info.csv)."""
    places, files = [], [path]
    if path.is_dir():
        files = sorted([*path.glob("*.csv"), *path.glob("*/img_info.csv")])
    for file in files:
        with user_error_on("a table of text", str(file)):
            lines = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines()))
        for i, line in enumerate(lines, 1):
            source = f"{file}: line {i}"
            with user_error_on("`aerial,ground` or `name,lon,lat,city,aerial,ground`", source):
                if len(line) > 5:
                    _, lon, lat, city, aerial, ground = line[:6]
                    position, root = (float(lon), float(lat)), image_folder or file.parent.parent
                    if not (abs(position[0]) <= 360 and abs(position[1]) <= 90):  # or NaN
                        raise ValueError(f"no longitude and latitude: {lon}, {lat}")
                else:
                    aerial, ground = line[:2]
                    position, city, root = None, "", image_folder or file.parent
                first_image_size((root / ground, root / aerial), source)
                places.append((source, root / ground, root / aerial, position, city))
    return places


def other_places(positions: list) -> list[np.ndarray]:
    """For each place the indices of other places, whose images are wrong candidates. If all places
    have a position, the nearest come first, without those at the same position, which would be
    right too. Otherwise they are drawn at random, with the place's index as the seed."""
    n = len(positions)
    few = min(n, 4 * PAIR_CANDIDATES)
    if not positions or None in positions:
        return [np.random.default_rng(i).choice(n, few, replace=False) for i in range(n)]
    lon, lat = np.radians(np.reshape(positions, (-1, 2))).T
    x, y, z = np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)
    points = np.stack([x, y, z], 1)  # (n, 3) on the unit sphere
    distances, indices = cKDTree(points).query(points, few)
    distances, indices = distances.reshape(n, few), indices.reshape(n, few)
    return [indices[i][distances[i] > 0] for i in range(n)]
