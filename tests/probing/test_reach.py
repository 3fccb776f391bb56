"""A Hub that cannot be reached costs one short look, not minutes of retries for every model."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_unreachable_hub_is_told_once_and_the_cache_is_asked(tmp_path):
    # A port that nothing listens on refuses at once, as a machine without network fails to find the name.
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    asked = online | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "probing", "inspect", "org/name"], capture_output=True, text=True, cwd=ROOT, env=asked
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert lines[0] == "http://127.0.0.1:9 cannot be reached (ConnectError); models are looked for in the cache alone"
    assert len(lines) == 2 and lines[1].startswith(
        "probing: checkpoint org/name cannot be read: there is no such folder"
    )
    assert time.monotonic() - start < 60
