"""A trained run, in other formats.

python -m lib.export runs/x --to onnx        runs/x/model.onnx: uint8 images (n, size, size, 3) to probabilities
python -m lib.export runs/x --to fastai      runs/x/export.pkl, for fastai's load_learner
"""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from fastcore.basics import noop

from lib.cli import BadInput, Parser, command
from lib.config import Config, read_args
from lib.data.decode import centre, read
from lib.data.folders import find_images
from lib.data.sources import root_folder
from lib.predict import load
from lib.runs import write

TOLERANCE = 1e-4  # between torch's probabilities and onnxruntime's
PICKLE = "warning: loading a pickle runs the code in it; load none that you do not trust, and pass on weights/ instead"


def examples(predict, run, most=64):
    """Valid images of `run` as the network takes them, (n, size, size, 3) uint8; None where its data is gone."""
    try:
        config = Config(**read_args(run / "args.yaml"))
        split = config.valid_pct, config.split_seed, config.folds, config.fold
        with redirect_stdout(None):
            paths = [path for path, _ in find_images(root_folder(config), *split)[1]]
        return next(predict.decoded(paths[:: -(-len(paths) // most)], noop), (None, None))[1]
    except (BadInput, OSError):
        return None


def onnx(predict, run=None):
    """(content of model.onnx, what was checked): the network, with all that follows the crop.

    It is checked on valid images of the folder `run`; on noise where there are none.
    Raises BadInput without the packages that it takes, or where onnxruntime does not agree with torch.
    """
    import torch

    try:
        import onnxscript  # noqa: F401  (torch.onnx works on it)
    except ImportError:
        raise BadInput("--to onnx: needs onnxscript and onnxruntime; uv run --extra onnx … installs the two") from None

    class FromPixels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.mean, self.std = predict.model, predict.mean, predict.std

        def forward(self, images):
            x = images.permute(0, 3, 1, 2).float() / 255
            return self.model((x - self.mean) / self.std).softmax(1)

    model = FromPixels().eval()
    images = torch.randint(256, (5, predict.size, predict.size, 3), dtype=torch.uint8)
    named = dict(input_names=["images"], output_names=["probabilities"], dynamic_shapes=({0: torch.export.Dim("n")},))
    program = torch.onnx.export(model, (images[:2],), dynamo=True, verbose=False, **named)
    program.model.metadata_props.update(
        {k: json.dumps(predict.card[k]) for k in ("classes", "resize", "levels") if k in predict.card}
    )
    content = program.model_proto.SerializeToString()
    seen = examples(predict, run) if run else None
    images, what = (images, "noise, as its data is gone") if seen is None else (torch.from_numpy(seen), "valid images")
    try:
        import onnxruntime
    except ImportError:
        return content, "not checked: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        apart = float(np.abs(session.run(None, {"images": images.numpy()})[0] - model(images).numpy()).max())
    if not apart < TOLERANCE:
        raise BadInput(f"--to onnx: onnxruntime's probabilities are {apart:.1g} from torch's; nothing is written")
    return content, f"onnxruntime's probabilities are within {apart:.1g} of torch's on {len(images)} {what}"


def fastai(predict, run=None):
    """(content of export.pkl, a warning): a Learner whose `predict` and `test_dl` prepare images as evaluation does."""
    import cloudpickle
    import torch
    from fastai.data.core import Datasets
    from fastai.data.transforms import Categorize, IntToFloatTensor, Normalize
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.torch_core import TensorImage

    import lib

    size, classes, levels = predict.size, predict.classes, predict.card.get("levels")
    prepare = lambda image: TensorImage(torch.tensor(centre(read(image, size, levels), size)).permute(2, 0, 1))
    unknown = lambda image: classes[0]
    blank = [np.zeros((size, size, 3), np.uint8)]  # an item from which fastai learns what its pipelines take …
    sets = Datasets(blank, [[prepare], [unknown, Categorize(vocab=classes, sort=False)]], splits=[[0], [0]])
    sets.tls[0].types = [object]  # … but paths and Pillow's images are welcome as well
    after_batch = [IntToFloatTensor(), Normalize(predict.mean, predict.std)]
    dls = sets.dataloaders(bs=64, after_batch=after_batch, num_workers=0, device=predict.device)
    learn, content = Learner(dls.new_empty(), predict.model, CrossEntropyLossFlat()), io.BytesIO()
    cloudpickle.register_pickle_by_value(lib)  # so that it loads where this project is not at hand
    try:
        torch.save(learn, content, pickle_module=cloudpickle)
    finally:
        cloudpickle.unregister_pickle_by_value(lib)
    return content.getvalue(), PICKLE


FORMATS = {"onnx": (onnx, "model.onnx"), "fastai": (fastai, "export.pkl")}  # name -> function(predictor, run), file


@command
def main(argv):
    p = Parser(prog="python -m lib.export", description="Write a trained run in another format, into its folder.")
    p.add_argument("run", help="run folder, such as runs/digits-plateau-s0")
    p.add_argument("--to", required=True, choices=FORMATS, help="onnx: model.onnx; fastai: export.pkl for load_learner")
    args = p.parse_args(argv)
    convert, name = FORMATS[args.to]
    content, note = convert(load(args.run, "cpu"), Path(args.run).expanduser())
    write(Path(args.run).expanduser() / name, content)
    print(f"{Path(args.run) / name}: {len(content):,} bytes; {note}")


if __name__ == "__main__":
    sys.exit(main())
