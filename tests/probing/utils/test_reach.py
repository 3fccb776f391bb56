"""A Hub that does not answer costs one short look and one line, and changes nothing for what comes after."""

import os
import time

import pytest
from huggingface_hub import constants

from probing.utils import reach
from probing.utils.errors import UserError
from probing.utils.pretrained import locate


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reach, "PATIENCE", 0.2)
    reach.require_hub.cache_clear()
    yield
    reach.require_hub.cache_clear()


def refused(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # a port that nothing listens on


def silent(monkeypatch):
    monkeypatch.setattr(reach, "ask_hub", lambda seconds: time.sleep(20) or "answers")


def broken(monkeypatch):
    monkeypatch.setattr(reach, "ask_hub", lambda seconds: "answers with status 503")


@pytest.mark.parametrize("fault", [refused, silent, broken])
def test_one_failure_is_one_line_and_does_not_last(monkeypatch, online, fault):
    before = dict(os.environ)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="set HF_HUB_OFFLINE=1 to use") as caught:
        fault(patch)
        locate("org/name", "checkpoint")
    assert len(str(caught.value).splitlines()) == 1
    assert not constants.HF_HUB_OFFLINE and dict(os.environ) == before
    monkeypatch.setattr(reach, "ask_hub", lambda seconds: "answers")
    assert locate("org/name", "checkpoint") == "org/name"


def test_offline_asks_nobody(monkeypatch, online):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(reach, "ask_hub", lambda seconds: pytest.fail("asked"))
    assert locate("org/name", "checkpoint") == "org/name"
