"""Finds and builds image towers of open_clip: `open_clip:ARCHITECTURE/TAG`, `hf-hub:ORG/REPO`, or a folder."""

import difflib
from dataclasses import dataclass
from typing import Any, cast

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip

from probing.utils.checkpoint_files import loading, read_json_or_empty
from probing.utils.errors import UserError
from probing.utils.paths import local_path

SCHEME = "open_clip:"
HUB = "hf-hub:"
CONFIG = "open_clip_config.json"
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
"""The smallest text tower, because open_clip builds both towers."""


@dataclass(frozen=True)
class OpenClipSource:
    """A model of open_clip that was found and not loaded.

    Attributes:
        name: as `open_clip.create_model` takes it.
        tag: weights of a built-in architecture, by name or file; empty for other sources.
        model: its configuration, `model_cfg`.
        preprocessing: of its images: `mean`, `std`, `interpolation` and `resize_mode`.
        licence: of the weights, if its configuration states it.
    """

    name: str
    tag: str
    model: dict[str, Any]
    preprocessing: dict[str, Any]
    licence: str = ""

    @property
    def image_size(self) -> int:
        """Side in pixels of its square images."""
        return int(self.model["vision_cfg"].get("image_size", 224))

    def load(self, **options: Any) -> Any:
        """Loads the image tower in float32; `options` are those of `open_clip.create_model`.

        Raises:
            UserError: the weights are missing or cannot be read.
        """
        import open_clip

        self.require_weights()
        with loading(self.name):
            whole: Any = open_clip.create_model(
                self.name, self.tag or None, require_pretrained=True, pretrained_text=False, **options
            )
        return whole.visual

    def require_weights(self) -> None:
        """Raises UserError if a built-in architecture comes without its weights."""
        if not self.tag and ":" not in self.name:
            raise UserError(f"open_clip:{self.name} needs its weights: open_clip:{self.name}/TAG, one of {self._tags}")

    @property
    def _tags(self) -> str:
        import open_clip

        tags = open_clip.list_pretrained_tags_by_model(self.name)
        return ", ".join(tags[:6]) or "or a file of weights; it has no published ones"


def build_visual(model: dict[str, Any]) -> Any:
    """Builds an image tower without loading weights, from `embed_dim`, `vision_cfg` and `quick_gelu`."""
    import open_clip

    vision = dict(model["vision_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    quick_gelu = bool(model.get("quick_gelu", False))
    return open_clip.CLIP(model["embed_dim"], cast(Any, vision), cast(Any, NO_TEXT), quick_gelu).visual


def find_open_clip(source: str) -> OpenClipSource | None:
    """Finds a model of open_clip, from its configuration alone.

    Args:
        source: `open_clip:ARCHITECTURE`, with `/TAG` or `/FILE` for its weights; `hf-hub:ORG/REPO`; or a folder.

    Returns:
        The model; None for a folder or repository of another library.

    Raises:
        UserError: there is no such architecture or tag.
    """
    if source.startswith(SCHEME):
        return _built_in(*source.removeprefix(SCHEME).partition("/")[::2])
    name = source.removeprefix(HUB)
    folder = local_path(name)
    if not folder.is_dir() and not source.startswith(HUB):
        return None
    location = str(folder) if folder.is_dir() else name
    raw = read_json_or_empty(location, CONFIG)
    if "model_cfg" not in raw or (source == name and "model_type" in read_json_or_empty(location, "config.json")):
        return None
    address = f"local-dir:{folder}" if folder.is_dir() else f"{HUB}{name}"
    return _merged(address, "", raw["model_cfg"], raw.get("preprocess_cfg", {}), str(raw.get("license", "")))


def is_open_clip(source: str) -> bool:
    """Returns whether a name or folder is one that `find_open_clip` reads, without looking at the Hub."""
    return source.startswith((SCHEME, HUB)) or (local_path(source) / CONFIG).is_file()


def _built_in(name: str, tag: str) -> OpenClipSource:
    import open_clip

    if name not in open_clip.list_models():
        near = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), 3, 0.3)) or "none"
        raise UserError(f"open_clip has no architecture {name!r}; nearest: {near}")
    config: Any = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    found = _merged(name, tag, open_clip.get_model_config(name), config or {})
    if tag and not config and not local_path(tag).is_file():
        raise UserError(f"open_clip has no weights {tag!r} of {name}; give one of {found._tags}")
    return found


def _merged(
    name: str, tag: str, model: dict[str, Any], preprocessing: dict[str, Any], licence: str = ""
) -> OpenClipSource:
    return OpenClipSource(name, tag, model, complete_preprocessing(preprocessing), licence)


def complete_preprocessing(values: dict[str, Any]) -> dict[str, Any]:
    """Adds open_clip's defaults to what a configuration states of mean, std, interpolation and resizing."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    return dict(merge_preprocess_dict(PreprocessCfg(), values))
