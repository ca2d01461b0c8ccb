import base64
import io
import threading
import time

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from lib import models, predict, serve
from lib.explain import maps
from tests.browser import CHROMIUM, Browser
from train_fastai import main


@pytest.fixture(scope="module")
def run(bands, cache, tmp_path_factory):
    """A short run on generated images."""
    out = tmp_path_factory.mktemp("runs")
    options = ["--size", "32", "--model", "small", "-b", "16", "--epochs", "2", "--lr", "0.05", "--cache", str(cache)]
    assert main(["--data", str(bands), *options, "--out", str(out), "--name", "bands <b>"]) == 0
    return out / "bands <b>"


@pytest.fixture(scope="module")
def predictor(run):
    return predict.load(run)


def pixels(uri):
    """The pixels of a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_the_answer_is_the_predictors_and_its_map(predictor, bands):
    file = bands / "class 2/03.png"
    client = TestClient(serve.app(predictor, "bands"), base_url="http://127.0.0.1")
    reply = client.post("/predict", content=file.read_bytes()).json()
    (name,), p = predictor(file)
    assert reply["classes"][0] == [name, p.max()] and [q for _, q in reply["classes"]] == sorted(p[0])[::-1]
    ((_, image, x, _),) = predictor.batches([file])
    assert (pixels(reply["image"]) == image[0]).all()
    cam = maps(predictor.model, models.cam_layer(predictor.model, 32), x, [int(p.argmax())])[0]
    shown = pixels(reply["map"]).astype(int)
    brightest, darkest = np.unravel_index(cam.argmax(), cam.shape), np.unravel_index(cam.argmin(), cam.shape)
    light = lambda place: shown[place].sum() - 0.45 * image[0][place].sum()  # what the map adds
    assert light(brightest) > light(darkest) + 100


def test_an_empty_map_is_called_empty(predictor, bands, monkeypatch):
    client = TestClient(serve.app(predictor, "bands"), base_url="http://127.0.0.1")
    content = (bands / "class 2/03.png").read_bytes()
    assert client.post("/predict", content=content).json()["empty"] is False
    monkeypatch.setattr("lib.explain.maps", lambda *args: np.zeros((1, 32, 32)))
    assert client.post("/predict", content=content).json()["empty"] is True


@pytest.mark.parametrize("content, status, words", [
    (b"no image", 400, "is no whole JPEG"), (b"", 400, "is no whole JPEG"), (b"x" * 2000, 413, "has more than"),
])  # fmt: skip
def test_what_is_no_photo_is_one_line(predictor, monkeypatch, content, status, words):
    monkeypatch.setattr(serve, "MOST_BYTES", 1000)
    reply = TestClient(serve.app(predictor, "x"), base_url="http://localhost").post("/predict", content=content)
    assert reply.status_code == status and words in reply.json()["error"]


def test_it_answers_under_no_other_name(predictor):
    """A page of another site that has its name point at this machine gets nothing."""
    client = TestClient(serve.app(predictor, "x"), base_url="http://evil.example")
    assert client.get("/about").status_code == 400


def test_it_takes_no_photo_from_another_page(predictor):
    client = TestClient(serve.app(predictor, "x"), base_url="http://localhost:8000")
    for origin in ("http://evil.example", "http://localhost:9000", "null"):
        reply = client.post("/predict", content=b"", headers={"origin": origin})
        assert reply.status_code == 403 and "comes from another page; open http://loc" in reply.json()["error"]
    for origin in ("http://localhost:8000", "https://localhost:8000"):  # the second: behind a proxy
        assert client.post("/predict", content=b"", headers={"origin": origin}).status_code == 400


def test_the_command_wants_images_or_a_port_that_is_free(run, capsys, monkeypatch):
    assert predict.main([str(run)]) == 2 and "or --serve alone" in capsys.readouterr().err
    assert predict.main([str(run), "--serve", "99999"]) == 2 and "pass another port" in capsys.readouterr().err
    bound = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: bound.append(sockets[0].getsockname()[0]))
    assert predict.main([str(run), "--serve", "0"]) == 0 and bound == ["127.0.0.1"]
    assert "shows bands <b>; Ctrl-C ends it" in capsys.readouterr().out


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_photo_that_is_chosen_is_shown_with_its_classes_and_its_map(predictor, bands, run, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    server = uvicorn.Server(uvicorn.Config(serve.app(predictor, run.name), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with Browser() as b:
            b("Page.navigate", url=f"http://127.0.0.1:{port}/")
            wait(b, "document.title === 'bands <b>'")
            node = b("DOM.querySelector", nodeId=b("DOM.getDocument")["root"]["nodeId"], selector="input")["nodeId"]
            b("DOM.setFileInputFiles", nodeId=node, files=[str(bands / "class 1/00.png"), str(bad)])
            wait(b, "document.querySelectorAll('article li').length === 4")
            wait(b, "!!document.querySelector('[role=alert]')")
            (name,), p = predictor(bands / "class 1/00.png")
            assert b.js("document.querySelector('article:has(li) li span').textContent") == name
            assert b.js("document.querySelectorAll('article img').length") == 2
            assert b.js("document.querySelector('h1').textContent") == "bands <b>"  # a name is text
            assert "is no whole JPEG" in b.js("document.querySelector('[role=alert]').textContent")
            failed = [text for text in b.console if "400" not in text]  # the browser tells of the bad file
            assert not failed and all(f":{port}/" in url or url.startswith("data:") for url in b.requests)
    finally:
        server.should_exit = True
        thread.join(10)


def wait(b, code, seconds=30):
    """Waits until `code` is true in the page."""
    end = time.monotonic() + seconds
    while b.js(code) is not True:
        assert time.monotonic() < end, code
        time.sleep(0.1)
