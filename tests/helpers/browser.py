"""Opens pages in one headless Chromium, runs scripts in them and presses keys, by the DevTools protocol over a pipe."""

import json
import os
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BEFORE = """
window.errors = []; window.copied = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
console.error = (...all) => errors.push(all.join(" "));
Object.defineProperty(navigator, "clipboard", { value: { writeText: async (text) => { copied.push(text); } } });
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const wait = () => new Promise((done) => setTimeout(done, 50));
const seen = (element) => element.checkVisibility();
const load = (image) => { image.loading = "eager"; return image.decode(); };
const loaded = (selector) => Promise.all(all(selector).filter(seen).map(load));
"""
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Tab": 9, "Enter": 13}


def executable():
    """Returns the path of Chromium; skips the test without one."""
    found = os.environ.get("CHROME") or next((path for path in map(shutil.which, NAMES) if path), None)
    if not found:
        pytest.skip("no Chromium or Chrome here; set CHROME to its path")
    return found


class Browser:
    """A running Chromium with one page; close it in the end."""

    def __init__(self, folder):
        (read, self.write), (self.read, write) = os.pipe(), os.pipe()
        settings = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        settings += [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"]
        shell = f'exec "$0" "$@" 3<&{read} 4>&{write}'  # it reads from 3 and writes to 4
        command = ["bash", "-c", shell, executable(), *settings]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(read, write), **quiet)
        os.close(read)
        os.close(write)
        self.count, self.rest, self.session = 0, b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.call("Page.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=BEFORE)

    def call(self, method, **values):
        """The result of a method of the protocol."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": values} | self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                received = os.read(self.read, 1 << 16)
                assert received, "the browser has ended"
                self.rest += received
            one, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(one)
            if answer.get("id") == self.count:
                assert "result" in answer, answer
                return answer["result"]

    def run(self, script):
        """What a script returns, the body of an asynchronous function; `all`, `seen`, `wait` and `loaded` are there."""
        values = {"expression": f"(async () => {{ {script} }})()", "awaitPromise": True, "returnByValue": True}
        result = self.call("Runtime.evaluate", **values)
        assert "exceptionDetails" not in result, result["exceptionDetails"]["exception"].get("description")
        return result["result"].get("value")

    def press(self, key):
        """Presses a key, as a user does."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if (kind, key) == ("keyDown", "Enter") else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key], **text)

    def open(self, page, folder, width=1280):
        """Opens the text of a page, in a view of a width in pixels."""
        (folder / "page.html").write_text(page, encoding="utf-8")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=(folder / "page.html").as_uri())
        while self.run("return location.href !== 'about:blank' && document.readyState") != "complete":
            time.sleep(0.05)
        self.run("localStorage.clear();")

    def visit(self, page, folder, script, width=1280):
        """Opens a page and runs a script; raises AssertionError where the page or the script met an error."""
        self.open(page, folder, width)
        found = self.run(script)
        result = self.run("return { errors, copied, width: innerWidth };") | {"found": found}
        assert result["errors"] == [], result["errors"]
        return result

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)
