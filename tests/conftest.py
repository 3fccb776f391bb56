import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in several processes, and so do the commands they start

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub import close_session, constants

import probing.utils.torchvision_shim  # noqa: F401
from tests.helpers import tiny
from tests.helpers.hub_server import TOKEN, HubServer, serve_hub

torch.set_num_threads(1)  # tests run in several processes


@pytest.fixture(scope="module", autouse=True)
def fast_garbage_collection() -> None:
    """Lets garbage collection skip what is imported so far: Trainer and evaluation collect often, 0.3 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Tiny random checkpoint and teachers, by name: llava, depth, seg, gen."""
    root = tmp_path_factory.mktemp("models")
    return {
        "llava": tiny.llava(root / "llava"),
        "depth": tiny.depth_teacher(root / "depth"),
        "seg": tiny.seg_teacher(root / "seg"),
        "gen": tiny.gen_teacher(root / "gen"),
    }


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Iterator[Path]:
    """A separate cache folder for the tests."""
    folder = tmp_path_factory.mktemp("cache")
    with mock.patch.dict(os.environ, {"MLLM_PROBING_CACHE": str(folder)}):
        yield folder


@pytest.fixture(scope="session")
def unclip(tmp_path_factory) -> Path:
    """A tiny random unCLIP pipeline."""
    return tiny.unclip(tmp_path_factory.mktemp("unclip") / "pipeline")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Random weights for pytorch-fid's Inception."""
    return tiny.inception_weights(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """A small COCO folder; do not write into it."""
    return tiny.coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[HubServer]:
    """An empty Hub on this machine, to which this process is logged in, and an empty cache of downloads."""
    with serve_hub() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made once, with an endpoint
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files by LFS
        close_session()
        yield server
        close_session()


@pytest.fixture
def recipe_values(models, coco):
    """Plain values of a small whole run, to be changed by a test."""
    return {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{coco}"},
        "teachers": {name: {"id": str(models[name])} for name in ("depth", "seg", "gen")},
        "layers": "all",
        "fit": {"epochs": 2, "batch_size": 6, "micro_batch": 3, "workers": 0},
    }
