"""The header of an image file: its size, and whether the file is whole. It is read before a run,
which a bad image would end at the step that draws it."""

from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from runtime.errors import UserError

END_OF_FILE = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # format -> how a complete file ends
TAIL = 2**10  # bytes at the end of a file that are searched for it
BITS = 258  # tag of a TIFF: bits of each band
OFFSETS_AND_SIZES = ((273, 279), (324, 325))  # tags of a TIFF: where its strips or its tiles are


def read_image_size(path: Path, source: str) -> tuple[int, int]:
    """(width, height) from the file's header. Raises UserError if it is missing, no image, or one
    pixel thin. `source` names the record."""
    try:
        size = header_size(path)
    except FileNotFoundError:
        raise UserError(f"{source}: image {path} does not exist; name the folder of the images by "
                        "--images, or --data SOURCE@FOLDER")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{source}: image {path} cannot be read ({error}); replace it, or "
                        "leave it out")
    if min(size) < 2:
        raise UserError(f"{source}: image {path} is {size[0]} x {size[1]} pixels, too thin to show "
                        "anything; replace it, or leave it out")
    return size


@lru_cache(maxsize=2**18)  # many samples share an image; emptied before a source is read
def header_size(path: Path) -> tuple[int, int]:
    """(width, height). A file that looks cut off, as half a download is, is decoded: its error
    would end the run when its turn comes. Raises ValueError for colours of 16 bits, of which PIL
    keeps 8: the reflectances of Sentinel-2, up to some 3,000, would be nearly black or noise."""
    with open(path, "rb") as file, Image.open(file) as image:
        if image.mode[0] not in "IF" and has_16_bits(image):
            raise ValueError("it has 16 bits per band; convert it to 8 first")
        if looks_cut_off(file, image):
            file.seek(0)
            image.load()
        return image.size


def has_16_bits(image: Image.Image) -> bool:
    """Whether the bands of a PNG or TIFF, as opened, have more than 8 bits in the file."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS, (8,))) > 8
    return image.format == "PNG" and ";16" in str(image.tile)


def looks_cut_off(file: BinaryIO, image: Image.Image) -> bool:
    """Whether the file ends before a JPEG, PNG or TIFF does, by its end or its offsets."""
    num_bytes = file.seek(0, 2)
    if image.format == "TIFF":
        tags = image.tag_v2
        return any(offset + size > num_bytes for offsets, sizes in OFFSETS_AND_SIZES
                   for offset, size in zip(tags.get(offsets, ()), tags.get(sizes, ())))
    file.seek(max(num_bytes - TAIL, 0))
    return END_OF_FILE.get(image.format, b"") not in file.read()
