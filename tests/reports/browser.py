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
  const place = document.createElement("pre");
  place.id = "outcome";
  place.textContent = JSON.stringify({ found, errors, copied, width: document.documentElement.clientWidth });
  document.body.append(place);
});
</script>"""


def executable():
    """Where Chromium is; the test is skipped where it is not."""
    found = os.environ.get("CHROME") or next((path for path in map(shutil.which, NAMES) if path), None)
    if not found:
        pytest.skip("no Chromium or Chrome here; set CHROME to its path")
    return found


def arguments(folder, width, *more):
    return [
        *(executable(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        *(f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", *more),
    ]


def visit(page, folder, script, width=1280, hash=""):
    """What the script returned; raises AssertionError where the page or the script met an error.

    Args:
        page: its text.
        folder: an empty one.
        script: the body of an asynchronous function; `all`, `seen` and `wait` are there.
        width: of the window, in pixels.
    """
    text = page.replace("<head>", f"<head>{BEFORE}", 1)
    # A frame is as narrow as it is told to be; a window has a least width.
    inner = folder / "inner.html"
    inner.write_text(text.replace("</body>", f"{AFTER % script}</body>", 1))
    done = subprocess.run(
        arguments(folder, width, "--virtual-time-budget=20000", "--dump-dom", f"file://{inner}{hash}"),
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    outcome = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.DOTALL)
    assert outcome, f"the page did not finish: {done.stderr[-2000:]}"
    result = json.loads(html.unescape(outcome[1]))
    assert result["errors"] == []
    return result
