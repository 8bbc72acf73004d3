"""The header of an image: its size, and whether the file is whole. It is read before a run, which a
bad image would end at the step that draws it."""

from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from runtime.errors import UserError

END_OF_FILE = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # format -> how a complete file ends
TAIL = 2**10  # bytes at the end of a file that are searched for it
BITS, PART = 258, 254  # tags of a TIFF: bits of each band; whether a page is an overview or a mask
OFFSETS_AND_SIZES = ((273, 279), (324, 325))  # tags of a TIFF: where its strips or its tiles are


def read_image_size(path: Path, source: str) -> tuple[int, int]:
    """(width, height) from the file's header. Raises UserError if it is missing, or no image for
    size_of. `source` names the record."""
    try:
        return header_size(path)
    except FileNotFoundError:
        hint = "write / in place of \\ in names" if "\\" in str(path) else (
            "name the folder of the images by --images, or --data SOURCE@FOLDER")
        raise UserError(f"{source}: image {path} does not exist; {hint}")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{source}: image {path} cannot be read ({error}); replace it, or "
                        "leave it out")


@lru_cache(maxsize=2**18)  # many samples share an image; emptied before a source is read
def header_size(path: Path) -> tuple[int, int]:
    with open(path, "rb") as file:
        return size_of(file)


def size_of(file: BinaryIO) -> tuple[int, int]:
    """(width, height) of an image. One that looks cut off, as half a download is, is decoded: its
    error would end the run when its turn comes. Raises ValueError or OSError for what the model
    would not see as its user does."""
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        if file.read(9).lower().startswith((b"version", b"<")):  # a page of HTML
            raise ValueError("it is a Git LFS pointer or a failed download") from None
        raise ValueError("Pillow knows no such image; write RGB with 8 bits per band") from None
    with image:
        size = image.size
        if min(size) < 2:
            raise ValueError(f"it is {size[0]} x {size[1]} pixels, too thin to show anything")
        if has_16_bits(image):
            raise ValueError("it has more than 8 bits per band; convert it to 8 first")
        if looks_cut_off(file, image):
            file.seek(0)
            image.load()
        if image.format == "TIFF" and image.n_frames > 1:
            image.seek(1)
            if image.size == size and not image.tag_v2.get(PART):
                raise ValueError(f"it has {image.n_frames} pages, of which the first alone would "
                                 "be seen; write its bands as RGB, or each page as a file")
    return size


def has_16_bits(image: Image.Image) -> bool:
    """Whether the bands of an image, as opened from a PNG, TIFF or JPEG 2000, have more than 8 bits
    in the file. Of colours PIL keeps 8: the reflectances of Sentinel-2, up to some 3,000, would be
    nearly black or noise."""
    if image.mode[0] in "IF":  # of one band; convert("RGB") would clip it to white
        return True
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS, (8,))) > 8
    if image.format == "JPEG2000":
        position = image.fp.tell()
        image.fp.seek(0)
        _, found, size_marker = image.fp.read(2**16).partition(b"\xff\x4f\xff\x51")
        image.fp.seek(position)
        return bool(found) and size_marker[38] % 128 > 7  # bits of the first band - 1, and a sign
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
