"""No image is trained on and held out: sources are compared by the bytes of their images."""

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from readers.files import map_files
from runtime.errors import UserError, warn
from sample import Sample


def check_shared_images(train: Sequence[tuple[str, Sequence[Sample]]],
                        held_out: Sequence[tuple[str, Sequence[Sample]]]) -> None:
    """Raises UserError if a source trains on an image that another one holds out: the same file, or
    equal bytes. Within a source it is a warning: published splits share images, and who compares
    with a paper needs them as they are. Both sides: (source, samples)."""
    trained, held = image_files(train), image_files(held_out)
    images = list({image for _, image in trained | held})
    size_of = dict(zip(images, map_files(num_bytes, images)))
    shared_sizes = {size_of[image] for _, image in trained} & {size_of[image] for _, image in held}
    # Only files of equal size can have equal bytes, so only those are read.
    to_read = [image for image in images if size_of[image] in shared_sizes]
    checksum_of = dict(zip(to_read, map_files(checksum, to_read)))

    def contents(images: dict[tuple[str, object], Sample]) -> dict[tuple, list]:
        found = defaultdict(list)
        for source, image in images:
            if image in checksum_of:
                found[size_of[image], checksum_of[image]].append((source, image))
        return found

    trained_contents, held_contents = contents(trained), contents(held)
    on_both_sides = sorted(trained_contents.keys() & held_contents.keys())
    shared = Counter()
    for content in on_both_sides:
        one_of_source = {one[0]: one for one in trained_contents[content]}
        for one, other in product(one_of_source.values(), held_contents[content]):
            if one[0] != other[0]:
                raise UserError(f"{trained[one].id} trains on {one[1]}, and {held[other].id} holds "
                                f"it out as {other[1]}; remove one of the records (images on both "
                                f"sides: {len(on_both_sides)})")
            shared[other[0]] += 1
    for source, n in shared.items():
        warn(f"{source}: {n} of its held-out images are trained on too (equal bytes), so held-out "
             "scores are too good; give all records of an image the same `split` and remove "
             "copies, unless the splits are published ones")


def image_files(parts: Sequence[tuple[str, Sequence[Sample]]]) -> dict[tuple, Sample]:
    """{(source, image): a sample that uses it} for paths and images of tables."""
    found = {}
    for source, samples in parts:
        users = {image: sample for sample in samples for image in sample.images}
        found |= {(source, image): sample for image, sample in users.items()
                  if hasattr(image, "read_bytes")}
    return found


def num_bytes(image: object) -> int:
    return image.stat().st_size if isinstance(image, Path) else image.num_bytes


def checksum(image: object) -> int:
    return zlib.crc32(image.read_bytes())
