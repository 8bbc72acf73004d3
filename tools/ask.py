"""Ask a model about one image: prints its reasoning and answer, and draws the answer's boxes.

    python tools/ask.py --task det --image a.png "Locate every ship." --out answer.png
    python tools/ask.py --task change --image before.png --image after.png "What has changed?"

The completion is greedy, as in evaluate.py. Its boxes are in pixels of the resized image; they are
drawn on the image as it is.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image, ImageDraw

from boxes import obb_corners, parse_boxes
from flags import HelpFormatter, add_prompt_flags, check_oriented, positive_int
from metrics.report import PREDICTED_COLOUR
from processing import encode
from readers.box_formats import RESERVED
from rewards import TASKS, extract_answer
from rollout import load_sampler, predict
from runtime.command_line import run_main
from runtime.errors import UserError
from sample import Sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("question", help="in the words of the training data; the task's instruction is added")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--image", type=Path, action="append", required=True,
                        help="again for each further image, in their order")
    parser.add_argument("--model", default="tiny",
                        help="`tiny`, a folder in Hugging Face format, or a hub id")
    add_prompt_flags(parser)
    parser.add_argument("--max-new-tokens", type=positive_int, default=96,
                        help="longest completion")
    parser.add_argument("--out", type=Path, help="a .png file, for the first image with the boxes")
    args = parser.parse_args()
    check_oriented(args.oriented, [args.task])
    if args.task == "change" and len(args.image) < 2:
        raise UserError("--task change compares two dates: give --image for each")
    if args.out and args.out.resolve() in [image.resolve() for image in args.image]:
        raise UserError(f"--out {args.out} is the --image, which it would replace")
    if args.out and args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: it has to end in .png")
    reserved = RESERVED.search(args.question)
    if reserved:
        raise UserError(f"the question holds {reserved[0]!r}, a part of the chat's layout; "
                        "remove it")
    missing = [str(image) for image in args.image if not image.is_file()]
    if missing:
        raise UserError(f"--image {', '.join(missing)}: no such file")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    sampler = load_sampler(args.model)
    processor = sampler.processor
    sample = Sample(id="--image", task=args.task, images=tuple(args.image), question=args.question,
                    gt_answer="", image_size=processor.image_size, oriented=args.oriented,
                    thinking=not args.no_think, system=args.system)
    [[text]] = predict(sampler, [encode(processor, sample)], args.max_new_tokens)
    print(text)
    if args.out:
        image = Image.open(args.image[0]).convert("RGB")
        n_boxes = draw_boxes(image, extract_answer(text) or "none", processor.image_size)
        image.save(args.out)
        print(f"{args.out}: {n_boxes} boxes")


def draw_boxes(image: Image.Image, answer: str, image_size: int) -> int:
    """Draw an answer's boxes, in pixels of the resized image, on the original. Returns how many."""
    boxes = parse_boxes(answer, oriented=True)                                      # (n, 5)
    if boxes is None:  # the answer is no boxes
        return 0
    boxes = boxes[boxes[:, 2] > boxes[:, 0]]  # a malformed box has no area
    for corners in obb_corners(boxes) * np.divide(image.size, image_size):          # (4, 2)
        ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners],
                                      outline=PREDICTED_COLOUR, width=max(2, min(image.size) // 200))
    return len(boxes)


if __name__ == "__main__":
    run_main(main, "nothing was written")
