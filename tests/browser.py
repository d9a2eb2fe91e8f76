"""Headless Chromium, driven by its own protocol over a pipe (--remote-debugging-pipe)."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find():
    """The path of a Chromium; None: there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page of a browser; a context manager."""

    def __init__(self, width=1200, height=900, dark=False, timeout=90):
        self.timeout, self._answers, self._number, self.errors = timeout, b"", 0, []
        self._profile = tempfile.mkdtemp(prefix="browser")
        command_read, self._to = os.pipe()
        self._from, answer_write = os.pipe()

        def place():  # the browser reads descriptor 3 and writes 4
            os.dup2(command_read, 103), os.dup2(answer_write, 104)
            os.dup2(103, 3), os.dup2(104, 4)

        flags = (
            "--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --hide-scrollbars"
        )
        flags += f" --no-first-run --disable-dev-shm-usage --user-data-dir={self._profile}"
        self._process = subprocess.Popen(
            [find(), *flags.split(), "about:blank"],
            preexec_fn=place,
            pass_fds=(3, 4, command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read), os.close(answer_write)
        os.set_blocking(self._from, False)
        targets = self._ask("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        attach = {"targetId": target, "flatten": True}
        self._session = self._ask("Target.attachToTarget", **attach)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.ask(f"{domain}.enable")
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.requests = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._process.kill()
        self._process.wait()
        os.close(self._to), os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def ask(self, method, **parameters):
        return self._ask(method, sessionId=self._session, **parameters)

    def _ask(self, method, sessionId=None, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if sessionId:
            message["sessionId"] = sessionId
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self.timeout
        while time.monotonic() < until:
            for answer in self._read():
                if answer.get("id") == self._number:
                    if "error" in answer:
                        raise RuntimeError(answer["error"])
                    return answer["result"]
                self._note(answer)
            time.sleep(0.005)
        raise TimeoutError(method)

    def _read(self):
        try:
            self._answers += os.read(self._from, 1 << 20)
        except BlockingIOError:
            return
        *whole, self._answers = self._answers.split(b"\0")
        yield from map(json.loads, whole)

    def _note(self, event):
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(event["params"]["exceptionDetails"])
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])

    def resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)

    def open(self, path):
        self.ask("Page.navigate", url=f"file://{path}")
        self.until("document.readyState === 'complete'")

    def value(self, expression):
        """What JavaScript gives."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, expression):
        until = time.monotonic() + self.timeout
        while not self.value(expression):
            if time.monotonic() > until:
                raise TimeoutError(expression)
            time.sleep(0.02)

    def middle(self, selector):
        """Where the middle of an element is, scrolled to."""
        return self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )

    def move(self, selector):
        x, y = self.middle(selector)
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector):
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self.ask("Input.dispatchMouseEvent", **event)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            code = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38, "Tab": 9}
            event = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code[key]}
            self.ask("Input.dispatchKeyEvent", **event)

    def pdf(self, path):
        found = self.ask("Page.printToPDF", printBackground=True)
        path.write_bytes(base64.b64decode(found["data"]))
