"""Runs docs/notebook.ipynb in an empty folder, and keeps its outputs in it, small.

uv run --with nbclient --with ipykernel .ci/notebook.py             writes it
uv run .ci/notebook.py --check                                      exits with 1 where cells have changed since
"""

import base64
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs/notebook.ipynb"
WIDTH, COLOURS = 800, 48  # of a picture, at most: pixels, and different colours


def code_of(notebook):
    """A hash of what its cells run; a notebook that was run has it in its metadata."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def small(png):
    """A picture in base64, narrow and of few colours."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image, file = image.convert("RGB"), io.BytesIO()
    image.thumbnail((WIDTH, 10 * WIDTH))
    image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def kept(outputs):
    """The outputs of a cell that a reader wants: printed lines as one, tables, small pictures; no bars, no warnings."""
    found = []
    for output in outputs:
        data = output.get("data", {})
        data.pop("text/markdown", None)  # a table is there as HTML
        if "image/png" in data:
            data["image/png"] = small(data["image/png"])
        if found and output.get("name") == found[-1].get("name") == "stdout":
            found[-1].text += output.text
        elif output.get("name") != "stderr" and data.get("text/html", "table").find("table") >= 0:
            found.append(output)
    return found


def run(notebook):
    """The notebook (of nbformat) with its outputs, as one of no kernel by name."""
    from nbclient import NotebookClient

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    notebook.metadata.pop("kernelspec", None)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # times
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    notebook.metadata = {"executed": code_of(notebook), "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    if "--check" in sys.argv:
        found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
        same = found["metadata"].get("executed") == code_of(found)
        print(f"docs/notebook.ipynb: its outputs are {'' if same else 'not '}those of its cells")
        sys.exit(0 if same else 1)
    import nbformat

    nbformat.write(run(nbformat.read(NOTEBOOK, 4)), NOTEBOOK)
    print(f"docs/notebook.ipynb: {NOTEBOOK.stat().st_size:,} bytes")
