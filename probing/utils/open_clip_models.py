"""Builds image towers of open_clip: `open_clip:ARCHITECTURE/TAG`, `hf-hub:ORG/REPO`, or a folder."""

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from torch import nn

from probing.utils.checkpoint_files import loading
from probing.utils.errors import UserError
from probing.utils.paths import local_path

PREFIX = "open_clip:"
HUB = "hf-hub:"
CONFIG = "open_clip_config.json"
DEFAULT_STATISTICS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
}
"""OpenAI's, which open_clip assumes if a configuration states none."""


@dataclass(frozen=True)
class OpenClipModel:
    """An image tower with its preprocessing.

    Attributes:
        name: `ARCHITECTURE/TAG`, Hub id or folder.
        visual: `forward_intermediates` gives maps of patches, `forward` the embedding of an image.
        preprocessing: mean, std, interpolation; images are `side` pixels wide and high.
        side: pixels.
        licence: of the weights, if the configuration states it.
    """

    name: str
    visual: Any
    preprocessing: dict[str, Any]
    side: int
    licence: str = ""


def is_open_clip(source: str) -> bool:
    """Returns whether an id or folder names a model of open_clip and none of transformers."""
    if source.startswith((PREFIX, HUB)):
        return True
    folder = local_path(source)
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def load_open_clip(source: str, device: torch.device) -> OpenClipModel:
    """Loads an image tower in float32; on the meta device only its configuration is read.

    Args:
        source: `open_clip:ARCHITECTURE`, with `/TAG` or `/FILE` for its weights; `hf-hub:ORG/REPO`; or a folder with
            `open_clip_config.json`.
        device: `meta`, or where to put the tower.

    Raises:
        UserError: there is no such architecture, tag or folder, or the weights cannot be read.
    """
    import open_clip

    name, tag = _parse(source)
    with loading(source):
        config = _configuration(name)
        _require_known(name, tag, config)
        if device.type == "meta":
            visual = _build(config["model"])
        elif not tag and ":" not in name:
            raise UserError(f"{source} names no weights; add /TAG, one of {_tags(name)}")
        else:
            whole: Any = open_clip.create_model(name, tag or None, pretrained_text=False, require_pretrained=True)
            visual = whole.visual
    side = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    stated = config["preprocessing"] | (open_clip.get_pretrained_cfg(name, tag) or {} if tag else {})
    statistics = {key: stated.get(key) or default for key, default in DEFAULT_STATISTICS.items()}
    frozen = visual.float().eval().requires_grad_(False).to(device)
    return OpenClipModel(source, frozen, statistics, int(side), config["licence"])


def tensors_hash(module: nn.Module) -> str:
    """Hashes names and values of a module's tensors; `no weights` on the meta device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta:
            return "no weights"
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return f"tensors:{digest.hexdigest()}"


def _parse(source: str) -> tuple[str, str]:
    """Returns open_clip's name of a model, and the tag or file of its weights."""
    if source.startswith(PREFIX + HUB):
        source = source.removeprefix(PREFIX)
    if source.startswith(HUB):
        return source, ""
    if source.startswith(PREFIX):
        name, _, tag = source.removeprefix(PREFIX).partition("/")
        return name, tag
    return f"local-dir:{local_path(source)}", ""


def _configuration(name: str) -> dict[str, Any]:
    """Reads configuration, preprocessing and licence of a model; the configuration is None for an unknown name."""
    import open_clip

    stated: dict[str, Any] = {}
    if name.startswith("local-dir:"):
        stated = json.loads((Path(name.removeprefix("local-dir:")) / CONFIG).read_text(encoding="utf-8"))
    elif name.startswith(HUB):
        file = open_clip.download_pretrained_from_hf(name.removeprefix(HUB), filename=CONFIG)
        stated = json.loads(Path(file).read_text(encoding="utf-8"))
    return {
        "model": stated.get("model_cfg") or open_clip.get_model_config(name),
        "preprocessing": stated.get("preprocess_cfg", {}),
        "licence": stated.get("license", ""),
    }


def _require_known(name: str, tag: str, config: dict[str, Any]) -> None:
    import open_clip

    if config["model"] is None:
        near = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), 3, 0)) or "none"
        raise UserError(f"open_clip has no architecture {name!r}; nearest: {near}")
    if tag and not open_clip.get_pretrained_cfg(name, tag) and not local_path(tag).is_file():
        raise UserError(f"open_clip has no weights {tag!r} of {name}; choose one of {_tags(name)}, or give a file")


def _tags(name: str) -> str:
    import open_clip

    return ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"


def _build(config: dict[str, Any]) -> Any:
    """Builds an image tower without weights; `create_model` would download those of Hub ids, and a text model's."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    values = dict(config["vision_cfg"])
    if "timm_model_name" in values:
        values["timm_model_pretrained"] = False
    with torch.device("meta"):
        return _build_vision_tower(config["embed_dim"], CLIPVisionCfg(**values), config.get("quick_gelu", False))
