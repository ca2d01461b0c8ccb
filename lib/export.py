"""A trained run as ONNX.

python -m lib.export runs/x      runs/x/model.onnx: uint8 images (n, size, size, 3) to probabilities
"""

import json
import sys
from pathlib import Path

import numpy as np

from lib.cli import BadInput, Parser, command, refused
from lib.predict import load
from lib.runs import write

TOLERANCE = 1e-4  # between torch's probabilities and onnxruntime's


def onnx(predict):
    """(content of model.onnx, sentence on how far it is from torch). It is the network with all that follows the crop.

    Raises BadInput if a package is missing, or if onnxruntime does not agree with torch on images of noise.
    """
    import torch

    needed = "ONNX needs onnxscript and onnxruntime", "uv run --extra onnx … installs the two"
    with refused(*needed, ImportError):
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx works on it)

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
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        apart = float(np.abs(session.run(None, {"images": images.numpy()})[0] - model(images).numpy()).max())
    if not apart < TOLERANCE:
        raise BadInput(f"ONNX: onnxruntime's probabilities are {apart:.1g} from torch's; nothing is written")
    return content, f"onnxruntime's probabilities are within {apart:.1g} of torch's"


@command
def main(argv):
    p = Parser(prog="python -m lib.export", description="Write a trained run as ONNX, into its folder.")
    p.add_argument("run", help="run folder, such as runs/digits-plateau-s0")
    args = p.parse_args(argv)
    content, note = onnx(load(args.run, "cpu"))
    file = Path(args.run).expanduser() / "model.onnx"
    write(file, content)
    print(f"{file}: {len(content):,} bytes; {note}")


if __name__ == "__main__":
    sys.exit(main())
