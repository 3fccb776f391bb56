"""Opens a page in headless Chromium, runs a script in it, and hands back what the script found."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BEFORE = """<script>
window.errors = []; window.copied = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
console.error = (...all) => errors.push(all.join(" "));
Object.defineProperty(navigator, "clipboard", { value: { writeText: async (text) => { copied.push(text); } } });
</script>"""
AFTER = """<script>
addEventListener("load", async () => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const wait = () => new Promise((done) => setTimeout(done, 50));
  const seen = (element) => element.checkVisibility();
  let found = null;
  try { found = await (async () => { %s })(); } catch (error) { errors.push(String(error.stack)); }
  parent.postMessage(JSON.stringify({ found, errors, copied, width: innerWidth }), "*");
});
</script>"""
FRAME = """<!doctype html><meta charset="utf-8"><pre id="outcome"></pre><script>
addEventListener("message", (event) => { document.getElementById("outcome").textContent = event.data; });
</script><iframe src="inner.html" style="width:%dpx;height:900px;border:0"></iframe>"""
"""A frame is as narrow as it is told to be; a window is not."""


def executable():
    """Where Chromium is; the test is skipped where it is not."""
    found = os.environ.get("CHROME") or next((path for path in map(shutil.which, NAMES) if path), None)
    if not found:
        pytest.skip("no Chromium or Chrome here; set CHROME to its path")
    return found


def visit(page, folder, script, width=1280):
    """What the script returned; raises AssertionError where the page or the script met an error.

    Args:
        page: its text.
        folder: an empty one.
        script: the body of an asynchronous function; `all`, `seen` and `wait` are there.
        width: of the view, in pixels.
    """
    start, _, end = page.replace("<head>", f"<head>{BEFORE}", 1).rpartition("</body>")  # scripts may contain it too
    (folder / "inner.html").write_text(f"{start}{AFTER % script}</body>{end}", encoding="utf-8")
    (folder / "outer.html").write_text(FRAME % width, encoding="utf-8")
    settings = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    settings += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=20000"]
    command = [executable(), *settings, "--dump-dom", (folder / "outer.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    outcome = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.DOTALL)
    assert outcome and outcome[1], f"the page did not finish: {done.stderr[-2000:]}"
    result = json.loads(html.unescape(outcome[1]))
    assert result["errors"] == [], result["errors"]
    return result
