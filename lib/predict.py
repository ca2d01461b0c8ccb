"""A trained run, used: CSV on the command line, or three lines of Python.

python -m lib.predict runs/x image-or-folder …      file,prediction,probability: a row an image
python -m lib.predict runs/x --serve                a local page where photos are dropped in

from lib.predict import load
predict = load("runs/x")                            # or load("runs/x", tta=True)
classes, probabilities = predict(["cat.jpg", "dog.jpg"])
"""

import mimetypes
import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from lib.cli import BadInput, Parser, command, printable, refused
from lib.data.decode import EXTENSIONS, centre, evaluation_batch, read
from lib.data.folders import LINKS, OTHERS, UNREAD, images_in
from lib.runs import as_csv, write_table

COLUMNS = ("file", "prediction", "probability")
HOW = "; with uv run --extra heif … HEIC too"


def load(run, device="auto", tta=False):
    """The `Predictor` of the run folder `run`, with its kept weights. Raises BadInput (one line) where there are none.

    With `tta` it looks at each image's mirror image too. Raises BadInput where training flipped no images.
    """
    from safetensors.torch import load_file

    from lib import machine, models, runs

    run = Path(run).expanduser()
    if not run.is_dir():
        raise BadInput(f"{run}: no such run folder")
    weights, card_file = run / "weights/best.safetensors", run / "weights/model.json"
    for path in (card_file, weights):
        if not path.is_file():
            raise BadInput(f"{path}: not found; a run writes it at the end of its first epoch")
    card = runs.read_card(card_file)
    with refused(f"{run}: its weights cannot be loaded"):  # safetensors and torch each raise their own
        model = models.rebuild(card)
        model.load_state_dict(load_file(weights))
    if tta and card.get("flip") is not True:
        raise BadInput(f"--tta: {card_file} does not say that the images of training were flipped; leave it out")
    device = machine.pick_device(SimpleNamespace(device=device)) if isinstance(device, str) else device
    return Predictor(model, card, device, tta)


class Predictor:
    """A network that is fed as evaluation feeds it: in float32, without augmentation. `classes` names the columns."""

    def __init__(
        self,
        model,  # maps normalised images to logits
        card,  # content of the run's model.json: classes, size, mean, std
        device,  # torch.device
        tta=False,  # whether logits are the mean of those of the image and of its mirror image
    ):
        import torch

        self.model = model.to(device, memory_format=torch.channels_last).eval()
        self.card, self.classes, self.size, self.device = card, card["classes"], card["size"], device
        self.mean, self.std = (torch.tensor(card[k], device=device).view(1, 3, 1, 1) for k in ("mean", "std"))
        self.tta = tta

    def __call__(self, images):
        """(n class names, probabilities (n, classes) float64) of an image or an iterable of images, in its order.

        An image is a path, a PIL image, or a uint8 array (h, w), (h, w, 3) or (h, w, 4), of any size; an array
        (n, h, w, 3) is n images. Raises BadInput naming a file that cannot be read.
        """
        is_one = isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) < 4
        batches = [p for *_, p in self.batches([images] if is_one else images)]
        p = np.concatenate([np.zeros((0, len(self.classes))), *batches])
        return [self.classes[k] for k in p.argmax(1)], p

    def prepared(self, image):
        """What the network sees of an image: (size, size, 3) uint8."""
        return centre(read(image, self.size, self.card.get("levels")), self.size)

    def batches(self, images, complain=None):
        """Yields (images, pixels (n, size, size, 3) uint8, network's input (n, 3, size, size), probabilities) a batch.

        An image that cannot be read raises BadInput; with `complain`, a function of the error, it is left out.
        """
        import torch

        for good, pixels in self.decoded(images, complain):
            x = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
            x = x.float().div_(255).sub_(self.mean).div_(self.std)
            with torch.inference_mode():
                logits = (self.model(x) + self.model(x.flip(3))) / 2 if self.tta else self.model(x)
            yield good, pixels, x, logits.cpu().double().log_softmax(1).exp().numpy()

    def decoded(self, images, complain):
        """Yields the images of one batch after the other, and their pixels, which threads decode."""
        images = iter(images)
        with ThreadPoolExecutor() as pool:
            while batch := list(islice(images, evaluation_batch(self.size))):
                good = []
                for image, task in [(image, pool.submit(self.prepared, image)) for image in batch]:
                    try:
                        good.append((image, task.result()))
                    except BadInput as e:
                        if not complain:
                            pool.shutdown(cancel_futures=True)
                            raise
                        complain(e)
                if good:
                    yield [image for image, _ in good], np.stack([pixels for _, pixels in good])


def find(arguments, complain=print):
    """The files that the arguments name: files as they are; of folders all images in them, by name.

    `complain` is called with a line for each file of a folder that is an image, but of a kind that is not read.
    """
    files = []
    for path in map(Path, arguments):
        try:
            files += sorted(inside(path, complain), key=Path.as_posix) if path.is_dir() else [path]
            path.stat()  # raises for a file that is not there
        except OSError as e:
            raise BadInput(f"{e.filename or path}: {e.strerror.lower()}") from None
    return files


def inside(folder, complain):
    """The images in a folder, as `find` takes them."""
    passed = defaultdict(list)
    found = images_in(folder, passed) + [Path(p) for p in passed[LINKS] if os.path.isfile(p)]
    for p in sorted(p for p in passed[LINKS] if not os.path.isfile(p)):
        complain(f"{p}: is passed over; links to folders, broken links and devices are not read")
    for p in sorted(passed[UNREAD] + passed[OTHERS]):
        is_image = p in passed[UNREAD] or os.path.splitext(p)[1].lower() in Image.registered_extensions()
        if is_image or (mimetypes.guess_type(p)[0] or "").startswith("image/"):  # some systems have no list of types
            complain(f"{p}: is passed over; read are {' '.join(EXTENSIONS)}{HOW * (p in passed[UNREAD])}")
    if not found:
        raise BadInput(f"{folder}: no images ({' '.join(EXTENSIONS)})")
    return found


def explain(predict, folder, first, files, pixels, x, p):
    """Writes a GradCAM picture of each image of a batch: <row>-<name>.png, rows counted from `first`."""
    from lib import models, runs
    from lib.explain import maps, plots

    cams = maps(predict.model, models.cam_layer(predict.model, predict.size), x, p.argmax(1))
    for row, (file, image, cam, p_image) in enumerate(zip(files, pixels, cams, p), first):
        prediction = plots.short(predict.classes[p_image.argmax()], 30)
        title = f"{plots.short(file.name, 40)}\n{prediction} {p_image.max():.1%}"
        name = re.sub(r"[^\w.-]", "_", file.stem).encode()[:80].decode(errors="ignore")
        runs.write_figure(folder / f"{row:05}-{name}.png", plots.explanation(image, cam, title))


def rows(predict, files, complain, folder=None):
    """Yields (file, prediction, probability) of each file that can be read; with a `folder` explains each image too."""
    done = 0
    for batch, pixels, x, p in predict.batches(files, complain):
        if folder:
            explain(predict, folder, done + 1, batch, pixels, x, p)
        done += len(p)
        for file, p_image in zip(batch, p):
            yield file, predict.classes[p_image.argmax()], f"{p_image.max():.6f}"


def to_file(run, files, device):
    """Writes predictions.csv of `files` into the run folder `run`; prints what could not be read."""
    table = list(rows(load(run, device), files, lambda e: print(f"warning: {e}", file=sys.stderr)))
    write_table(run / "predictions.csv", COLUMNS, table)
    print(f"{len(table):,} images without classes are predicted: {printable(run / 'predictions.csv')}", flush=True)


@command
def main(argv):
    p = Parser(prog="python -m lib.predict", description="Predict the class of images: CSV with a row an image.")
    p.add_argument("run", help="run folder, such as runs/digits-plateau-s0")
    p.add_argument("images", nargs="*", help="image files, and folders of them (with what is in their folders)")
    p.add_argument("--explain", metavar="DIR", help="also write a GradCAM picture an image: DIR/<row>-<name>.png")
    p.add_argument("--tta", action="store_true", help="look at each image's mirror image too; as a rule more accurate")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    text = "show a page on this machine where photos are dropped in (PORT 8000)"
    p.add_argument("--serve", metavar="PORT", nargs="?", const=8000, type=int, help=text)
    args = p.parse_args(argv)
    if (args.serve is None) == (not args.images) or (args.serve is not None and args.explain):
        raise BadInput("pass image files or folders of them, or --serve alone; see --help")
    predict = load(args.run, args.device, args.tta)
    if args.serve is not None:
        from lib.serve import serve

        return serve(predict, Path(args.run).resolve().name, args.serve)
    faults = []

    def complain(error):
        faults.append(error)
        sys.stdout.flush()  # where the two go to one terminal
        print(f"error: {printable(error)}", file=sys.stderr)

    files = find(args.images, complain)
    folder = args.explain and Path(args.explain).expanduser()
    if folder:
        with refused(f"--explain {folder}: cannot be made", errors=OSError):
            folder.mkdir(parents=True, exist_ok=True)
    shown = printable if sys.stdout.isatty() else str
    for row in chain([COLUMNS], rows(predict, files, complain, folder)):
        sys.stdout.write(as_csv([[*map(shown, row)]]))
        sys.stdout.flush()
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
