"""A Hub that does not answer, and a model that is not downloaded, are one line with the advice."""

import pytest
from huggingface_hub import constants

from probing.utils.errors import UserError
from probing.utils.pretrained import load_config, locate


def test_unreachable_hub_is_one_line(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts
    hub.stop()
    for look in (lambda: locate("org/name", "checkpoint"), lambda: load_config("org/name", "checkpoint")):
        with pytest.raises(UserError, match="org/name is not downloaded; check the network, or give a folder"):
            look()


def test_offline_looks_for_no_hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("org/name", "checkpoint") == "org/name"
    with pytest.raises(UserError, match="org/name is no folder and not downloaded; unset HF_HUB_OFFLINE"):
        load_config("org/name", "checkpoint")
