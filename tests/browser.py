"""A headless Chromium, driven over a pipe in its own protocol (DevTools): no driver, no package."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a headless Chromium. `console` lists errors and warnings, `requests` the addresses asked for."""

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self.to = os.pipe()
        self.back, back_write = os.pipe()
        plumbing = f'exec "$0" "$@" 3<&{to_read} 4>&{back_write}'  # Chromium reads on 3 and writes on 4
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
        ]
        command = ["/bin/bash", "-c", plumbing, CHROMIUM, *flags, f"--user-data-dir={self.profile.name}", "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, pass_fds=(to_read, back_write), stdout=quiet, stderr=quiet)
        os.close(to_read), os.close(back_write)
        self.rest, self.number, self.session, self.console, self.requests = b"", 0, None, [], []
        page = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.close(self.to), os.close(self.back)
        self.process.terminate()
        self.process.wait(20)
        self.profile.cleanup()

    def read(self):
        """The next message: an answer, or an event, which is written down."""
        while b"\0" not in self.rest:
            assert select.select([self.back], [], [], 60)[0], "the browser says nothing"
            got = os.read(self.back, 1 << 20)
            assert got, "the browser is gone"
            self.rest += got
        text, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(text)
        what, told = message.get("method"), message.get("params", {})
        if what == "Runtime.exceptionThrown":
            self.console.append(str(told["exceptionDetails"]))
        if what == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.console.append(told["entry"]["text"])
        if what == "Runtime.consoleAPICalled":
            self.console.append(str(told["args"]))
        if what == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        return message

    def __call__(self, method, **params):
        """Sends a command and returns its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            pass
        assert "result" in answer, answer
        return answer["result"]

    def wait(self, event):
        while self.read().get("method") != event:
            pass

    def open(self, path, width=1280, height=900, dark=False):
        """Shows a file at a width, as a phone below 600 pixels, in light or dark."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", media="", features=[scheme])
        self("Page.navigate", url=path.resolve().as_uri())
        self.wait("Page.loadEventFired")
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def js(self, code):
        """The value of a JavaScript expression."""
        answer = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            more = {"text": key} if len(key) == 1 else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, code="Space" if key == " " else key, **more)

    def mouse(self, selector, x=0.5, y=0.5, click=False):
        """Moves to a place in an element, as shares of its sides, and clicks."""
        place = f"document.querySelector({json.dumps(selector)})"
        box = self.js(f"({place}.scrollIntoView({{block: 'center'}}), {place}.getBoundingClientRect().toJSON())")
        at = dict(x=box["x"] + x * box["width"], y=box["y"] + y * box["height"])
        self("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def screenshot(self, path):
        """The whole page as PNG."""
        png = self("Page.captureScreenshot", captureBeyondViewport=True, format="png")["data"]
        path.write_bytes(base64.b64decode(png))
