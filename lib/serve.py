"""A local page: a photo that is dropped in gets its classes, and a map of where the network saw the first of them.

It is started by `python -m lib.predict RUN --serve`. The server is Starlette, which comes with fastai. It answers this
machine alone, under its own name alone, and takes photos from its own page alone.
"""

import socket
from pathlib import Path

import numpy as np
from PIL import Image

from lib.cli import BadInput, refused
from lib.runs import data_uri

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_BYTES = 50_000_000  # of a photo
SHOWN = 10  # classes of each photo


def answer(predict, content):
    """What the page shows of the file `content` (bytes): classes with probabilities, the image, the map over it."""
    from matplotlib import colormaps

    from lib import models
    from lib.explain import maps

    ((_, pixels, x, p),) = predict.batches([content])
    best = p[0].argsort()[::-1]
    cam = maps(predict.model, models.cam_layer(predict.model, predict.size), x, best[:1])[0]
    over = 0.45 * pixels[0] + 0.55 * 255 * colormaps["inferno"](cam)[..., :3]
    return {
        "classes": [[predict.classes[k], float(p[0, k])] for k in best[:SHOWN]],
        "image": data_uri(Image.fromarray(pixels[0])),
        "map": data_uri(Image.fromarray(over.round().astype(np.uint8))),
        "empty": bool(cam.max() <= 0),
    }


def app(predict, name):
    """The Starlette application that shows the `Predictor` `predict` of the run `name`."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    async def page(request):
        return HTMLResponse(TEMPLATE.read_text(encoding="utf-8"))

    async def look(request):
        host = request.headers["host"]
        if request.headers.get("origin", f"http://{host}").partition("://")[2] != host:
            return JSONResponse({"error": f"the request comes from another page; open http://{host}"}, 403)
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MOST_BYTES:
                return JSONResponse({"error": f"the file has more than {MOST_BYTES // 10**6} MB"}, 413)
        try:
            return JSONResponse(answer(predict, bytes(content)))  # one photo at a time: the others wait
        except BadInput as e:
            return JSONResponse({"error": str(e)}, 400)

    async def about(request):
        return JSONResponse({"name": name, "classes": predict.classes, "size": predict.size})

    routes = [Route("/", page), Route("/about", about), Route("/predict", look, methods=["POST"])]
    only_here = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False)
    return Starlette(routes=routes, middleware=[only_here])


def serve(predict, name, port):
    """Shows the page on `port` of this machine until Ctrl-C. Raises BadInput where the port is taken."""
    import uvicorn

    with refused(f"--serve {port}: cannot be used", "pass another port", (OSError, OverflowError)):
        listener = socket.create_server(("127.0.0.1", port))
    with listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]} shows {name}; Ctrl-C ends it", flush=True)
        uvicorn.Server(uvicorn.Config(app(predict, name), log_level="warning")).run(sockets=[listener])
