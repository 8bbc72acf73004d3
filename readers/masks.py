"""Masks of a target -> the Samples of seg, whose answers are boxes and points."""

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from boxes import format_json
from readers.box_formats import Request, make_sample, plain_text
from readers.files import first_image_size, images_of
from runtime.errors import UserError
from sample import Sample, load_gt_mask, open_image


def read_mask(source: str, row: dict, request: Request) -> Iterator[Sample]:
    """EarthReason in Geo-R1's form: `problem` (one or several) and `mask`, non-zero on the target.
    gt_answer has a box and two points for each connected piece of at least 1% of the mask."""
    folder, image_size = request.image_folder, request.image_size
    images, mask = images_of(source, row, folder), row["mask"]
    mask = folder / mask if isinstance(mask, str) else mask
    size = first_image_size(images, source)
    sample = Sample(source, "seg", images, "", "", image_size, gt_mask=mask)
    gt_mask = load_gt_mask(sample)
    with open_image(mask) as stored:  # not first_image_size: a mask may have 16 bits
        width, height = stored.size
    if abs(width / height * size[1] / size[0] - 1) > 0.02:  # a scaled mask is rounded
        raise UserError(f"{source}: its mask has {width} x {height} pixels and its image {size[0]} "
                        f"x {size[1]}; they must have the same shape")
    if not gt_mask.any() and load_gt_mask(sample, resized=False).any():
        request.notes["masks too small to be seen at this size left out"] += 1
        return
    pieces, _ = ndimage.label(gt_mask)  # (image_size, image_size): 0, or the number of the piece
    gt_boxes, instances = [], []
    for i, (rows, columns) in enumerate(ndimage.find_objects(pieces), 1):
        piece = pieces[rows, columns] == i
        if piece.sum() < gt_mask.sum() / 100:
            continue
        box = (columns.start, rows.start, columns.stop, rows.stop)
        point1, point2 = ([columns.start + x, rows.start + y] for x, y in inner_points(piece))
        gt_boxes.append((*box, 0))
        instances.append({"bbox_2d": list(box), "keypoint1": point1, "keypoint2": point2})
    if gt_mask.any() and not instances:
        request.notes["masks of nothing but specks left out"] += 1
        return
    problems = row["problem"] if isinstance(row["problem"], list) else [row["problem"]]
    for i, problem in enumerate(problems):
        problem_source = f"{source}, question {i}" if len(problems) > 1 else source
        yield make_sample(problem_source, request, images, plain_text(problem),
                          format_json(instances), gt_boxes, gt_mask=mask,
                          category=row.get("category"), split=row.get("split", ""))


def inner_points(piece: np.ndarray) -> list[tuple[int, int]]:
    """Two points (x, y) of a mask (H, W): its innermost pixel, and the innermost of the pixels that
    are at least as far from it as its edge is (the same pixel if there are none)."""
    depth = ndimage.distance_transform_edt(np.pad(piece, 1))  # distance to the edge
    y1, x1 = y2, x2 = np.unravel_index(depth.argmax(), depth.shape)
    y, x = np.indices(depth.shape)
    outer_depth = np.where(np.hypot(y - y1, x - x1) >= depth.max(), depth, 0)
    if outer_depth.any():
        y2, x2 = np.unravel_index(outer_depth.argmax(), depth.shape)
    return [(int(x1 - 1), int(y1 - 1)), (int(x2 - 1), int(y2 - 1))]  # without the padding
