"""Parse and compare what an answer says in words, counts and coordinates. Boxes: boxes.py.

A model under optimisation wrote these texts, so no text makes anything here raise.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

MAX_TEXT = 10_000  # characters, more than any target has; the bound keeps text comparison fast
EARTH_RADIUS = 6371.0088  # km, the mean


# --------------------------------------------------------------------------------------------------
# Words and labels

def tokenize(text: str) -> list[str]:
    """Lower-case words without punctuation; `_` separates words, as in the package rouge_score."""
    return re.findall(r"[^\W_]+", text.lower())


def lcs_length(a: Sequence, b: Sequence) -> int:
    """Length of the longest common subsequence of two sequences of words or characters.

    Bit-parallel (Hyyro 2004, "Bit-parallel LCS-length computation revisited"): bit i of `row` is 0
    where the LCS with a[: i + 1] is one longer than with a[:i], and one addition advances a whole
    row of the usual table.
    """
    positions: dict = {}
    for i, item in enumerate(a):
        positions[item] = positions.get(item, 0) | 1 << i
    all_ones = row = (1 << len(a)) - 1
    for item in b:
        match = row & positions.get(item, 0)
        row = (row + match | row - match) & all_ones
    return len(a) - row.bit_count()


def overlap_f1(hits: int, a: Sequence, b: Sequence) -> float:
    """F1 of precision hits / |a| and recall hits / |b|."""
    return 2 * hits / max(len(a) + len(b), 1)


def lexical_similarity(a: str, b: str) -> float:
    """Mean of ROUGE-1 F1 (shared words) and ROUGE-L F1 (longest common subsequence), Lin 2004.
    Words are not stemmed."""
    a, b = tokenize(a), tokenize(b)
    unigrams = (Counter(a) & Counter(b)).total()
    return (overlap_f1(unigrams, a, b) + overlap_f1(lcs_length(a, b), a, b)) / 2


def strip_boxes(text: str) -> str:
    """A description without its boxes and its <ref>, <p> and <box> tags."""
    return re.sub(r"\[[^\[\]]*\]|[\[\]]|</?(?:ref|box|p)>", " ", text)


def normalize_label(text: str) -> str:
    """A class name without case, blanks, `_`, `-` and a full stop at the end."""
    return re.sub(r"[\s_-]", "", text).casefold().removesuffix(".")


def parse_labels(text: str, vocabulary: Sequence[str]) -> set[str]:
    """The labels that a text lists, without blanks.

    BigEarthNet's labels contain commas, so a list cannot be split at commas alone. At each position
    the longest label of the vocabulary that fits is taken, made of whole words (no "sea" in
    "seaport"); whatever else lies between commas is a label as well.
    """
    def words_and_commas(text: str) -> str:
        return " ".join(re.findall(r"[^\W_]+|[,;]", text.casefold()))

    text = words_and_commas(text[:MAX_TEXT])
    names = [words_and_commas(label).replace(" ", "") for label in vocabulary]
    names.sort(key=len, reverse=True)
    pattern = "|".join(" ?".join(name) for name in names)  # blanks do not matter: SeaLake, sea lake
    pieces = re.split(rf"(?<!\S)({pattern})(?!\S)|[,;]", text)
    labels = {piece.replace(" ", "") for piece in pieces if piece} - {""}
    return labels - {"and"} or labels  # `a, b and c`, or a label that is called so


# --------------------------------------------------------------------------------------------------
# Counts and positions

MINUS = re.compile("\N{MINUS SIGN}|(?<![\\w°])\N{EN DASH}")  # what texts write for the sign `-`
POINT = r"(?<![\w.])\."  # that begins a number: not the one of `No.7` or `...7`


def parse_count(text: str) -> int | None:
    """The whole number >= 0 that a text names in digits, as `1,200` or `1200`. None if it names
    none, several, a negative one, a decimal fraction, or has more than 9 digits."""
    if len(text) > MAX_TEXT:
        return None
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", MINUS.sub("-", text))
    numbers = set(re.findall(rf"(?:-|{POINT})?[0-9]+(?:[.,][0-9]+)?", text))
    number = numbers.pop() if len(numbers) == 1 else ""
    return int(number) if re.fullmatch(r"[0-9]{1,9}", number) else None


def parse_coordinates(text: str) -> tuple[float, float] | None:
    """(latitude, longitude) in degrees of `-33.9, 151.2` or `33.9° S, 151.2° East`. None for
    fewer or more numbers, for longitude first, for a hemisphere that does not follow its number,
    and for what is not on Earth."""
    if len(text) > MAX_TEXT:
        return None
    text = MINUS.sub("-", text.lower())
    longitude = re.search(r"point ?z? ?\(|\blo?ng?", text)  # `POINT (longitude latitude)`
    if longitude and ("(" in longitude[0] or re.search(r"\blat", text[longitude.end():])):
        return None
    hemisphere = r"(north|south|east|west|[nsew])\b"
    number = rf"((?:- ?|{POINT})?[0-9]+(?:\.[0-9]+)?)[° ]{{0,2}}(?:{hemisphere})?"
    found = re.findall(number, text)
    rest = re.sub(number, " ", text)
    if any(number.startswith(("- ", ".")) for number, _ in found):  # a sign, or a dash?
        return None
    if len(found) != 2 or found[0][1][:1] in ("e", "w") or found[1][1][:1] in ("n", "s"):
        return None
    if re.search(rf"\b{hemisphere}", rest):
        return None
    latitude, longitude = (-abs(float(number)) if letter[:1] in ("s", "w") else float(number)
                           for number, letter in found)
    on_earth = abs(latitude) <= 90 and abs(longitude) <= 180
    return (latitude, longitude) if on_earth else None


def great_circle_km(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The distance of two positions (latitude, longitude) in degrees on a sphere, by the haversine
    formula, in km."""
    (lat_a, lon_a), (lat_b, lon_b) = np.radians(a), np.radians(b)
    h = (np.sin((lat_b - lat_a) / 2) ** 2
         + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2)
    return float(2 * EARTH_RADIUS * np.arcsin(np.sqrt(min(h, 1.0))))
