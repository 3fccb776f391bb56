"""Vision towers of open_clip and timm inside transformers' LLaVA: ConvNeXt, ViT, EVA, DINOv2 and others.

The tower is open_clip's `visual` (its `trunk` where timm made it), or a model of timm, with the same tensor names. It
is registered with transformers, so that an ordinary `LlavaForConditionalGeneration` holds it once this is imported.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from probing.models.image_tokens import height_and_width
from probing.utils.checkpoint_files import loading, read_json_or_empty
from probing.utils.errors import BROKEN, UserError, first_line
from probing.utils.open_clip_models import (
    HUB,
    OpenClipSource,
    build_visual,
    complete_preprocessing,
    find_open_clip,
)
from probing.utils.paths import local_path

MODEL_TYPE_OF_TOWER = "open_clip_tower"


class OpenClipTowerConfig(PreTrainedConfig):
    """What builds a tower.

    Attributes:
        library: `open_clip` or `timm`.
        architecture: name in the library, or of its folder.
        settings: open_clip's `embed_dim`, `vision_cfg` and others; arguments of timm's `create_model`.
        image_size: side in pixels.
        patch_size: side in pixels of what one feature of the last map covers.
        hidden_size: width of the last map.
    """

    model_type = MODEL_TYPE_OF_TOWER
    library: str = "open_clip"
    architecture: str = ""
    settings: dict[str, Any] | None = None
    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 768


class OpenClipTower(PreTrainedModel):
    """A tower with the interface of LLaVA's CLIP, without class tokens.

    Attributes:
        trunk: the model of open_clip or timm, without its head.
    """

    config_class = OpenClipTowerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True  # its own

    def __init__(self, config: Any, trunk: nn.Module | None = None) -> None:
        super().__init__(config)
        self.trunk: Any = _without_head(trunk or _build_trunk(config))
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Pixels (B, 3, S, S) → hidden states (B, N, C) of all blocks; of the last stage alone where stages differ."""
        pixel_values = pixel_values.to(next(self.parameters()).dtype)
        # stages of a hierarchy have other grids and widths, so that only the last one can be read
        wanted = None if _is_uniform(self.trunk) else 1
        output = self.trunk.forward_intermediates(pixel_values, indices=wanted, intermediates_only=True)
        maps = output["image_intermediates"] if isinstance(output, dict) else output
        states = tuple(one.flatten(2).transpose(1, 2) for one in maps)
        return BaseModelOutputWithPooling(last_hidden_state=states[-1], hidden_states=states)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # the libraries initialise their weights as they build a model
        if hasattr(module, "init_non_persistent_buffers"):  # timm's, which no file holds
            cast(Any, module).init_non_persistent_buffers()


AutoConfig.register(MODEL_TYPE_OF_TOWER, OpenClipTowerConfig, exist_ok=True)
AutoModel.register(OpenClipTowerConfig, OpenClipTower, exist_ok=True)


def _build_trunk(config: Any) -> nn.Module:
    """Builds a trunk without loading weights, at the configured size of images."""
    if config.library == "timm":
        import timm

        trunk: Any = timm.create_model(config.architecture, pretrained=False, num_classes=0, **config.settings)
    else:
        visual = build_visual(config.settings)
        trunk = getattr(visual, "trunk", visual)
    _resize(trunk, config.image_size)
    return cast(nn.Module, trunk)


def _resize(trunk: Any, side: int) -> None:
    """Makes a model of timm take images of another size; open_clip's own models are built for it."""
    if hasattr(trunk, "set_input_size"):
        trunk.set_input_size(img_size=(side, side))


def _without_head(trunk: Any) -> Any:
    if hasattr(trunk, "prune_intermediate_layers"):  # open_clip's ResNets lack it
        trunk.prune_intermediate_layers(None)
    return trunk


def _is_uniform(trunk: Any) -> bool:
    """Returns whether all feature maps have the same width and grid."""
    stages = getattr(trunk, "feature_info", None)
    if stages is None:  # open_clip's own: a ViT, or a ResNet of stages
        return hasattr(trunk, "transformer")
    stages = [(stage["num_chs"], stage["reduction"]) for stage in stages]
    return len(set(stages)) == 1


@dataclass(frozen=True)
class TowerSource:
    """A tower that was found and not loaded.

    Attributes:
        id: as the library loads it.
        open_clip: the model of open_clip that it is part of; None for one of timm.
        config: what builds it.
        feature_layer: of its hidden states that a LLaVA reads: the last but one, or the last stage.
        preprocessing: of its images: `mean`, `std`, `interpolation` and `resize_mode`.
    """

    id: str
    open_clip: OpenClipSource | None
    config: OpenClipTowerConfig
    feature_layer: int
    preprocessing: dict[str, Any]

    def load(self) -> OpenClipTower:
        """Loads the weights; raises UserError if there are none."""
        import timm

        config, side = self.config, self.config.image_size
        with loading(f"vision tower {self.id}"):
            if self.open_clip is None:
                trunk: Any = timm.create_model(self.id, pretrained=True, num_classes=0)
            else:
                # open_clip resizes the position embeddings of its ViT as it reads them
                visual = self.open_clip.load(force_image_size=side)
                trunk = getattr(visual, "trunk", visual)
            _resize(trunk, side)
            return OpenClipTower(config, trunk)


def find_tower(source: str, image_size: int | None = None) -> TowerSource | None:
    """Finds a tower of open_clip or timm, from its configuration alone.

    Args:
        source: `open_clip:NAME/TAG`, `hf-hub:ID`, a folder of open_clip or timm, or a Hub id of timm.
        image_size: side in pixels; by default the tower's.

    Returns:
        The tower; None for a folder or Hub id of another library.

    Raises:
        UserError: there is no such architecture, or its features form no grid.
    """
    if found := find_open_clip(source):
        found.require_weights()
        tower = open_clip_config(found.name.rsplit("/", 1)[-1], found.model, image_size)
        return TowerSource(found.name, found, tower, examine(tower, found.name), found.preprocessing)
    name = source.removeprefix(HUB)
    folder = local_path(name)
    config = read_json_or_empty(str(folder) if folder.is_dir() else name, "config.json")
    if "architecture" in config and "model_type" not in config:
        return _of_timm(f"local-dir:{folder}" if folder.is_dir() else f"{HUB}{name}", config, image_size)
    if source.startswith(HUB):
        raise UserError(f"{name} has no open_clip_config.json; give a repository of open_clip")
    return None


def open_clip_config(name: str, model: dict[str, Any], image_size: int | None) -> OpenClipTowerConfig:
    """Makes the configuration of a tower from open_clip's of a whole model; its grid is still to be examined.

    Args:
        name: of the architecture, for display.
        model: `model_cfg` of open_clip.
        image_size: side in pixels; None for that of `model`.
    """
    vision = dict(model["vision_cfg"])
    side = image_size or int(vision.setdefault("image_size", 224))
    timm_made = "timm_model_name" in vision
    settings = {
        "embed_dim": model["embed_dim"],
        "quick_gelu": bool(model.get("quick_gelu", False)),
        "vision_cfg": vision | {"timm_model_pretrained": False} if timm_made else vision | {"image_size": side},
    }
    return OpenClipTowerConfig(library="open_clip", architecture=name, settings=settings, image_size=side)


def _of_timm(address: str, config: dict[str, Any], image_size: int | None) -> TowerSource:
    values = timm_config(config, image_size)
    weights = {"interpolation": "bicubic"} | dict(config.get("pretrained_cfg", {}))
    return TowerSource(address, None, values, examine(values, address), complete_preprocessing(weights))


def timm_config(config: dict[str, Any], image_size: int | None) -> OpenClipTowerConfig:
    """Makes the configuration of a tower from timm's `config.json`; its grid is still to be examined."""
    arguments = {key: value for key, value in (config.get("model_args") or {}).items() if key != "num_classes"}
    stated = arguments.get("img_size") or config.get("pretrained_cfg", {}).get("input_size", [3, 224, 224])[-1]
    side = image_size or height_and_width(stated)[0]
    return OpenClipTowerConfig(library="timm", architecture=config["architecture"], settings=arguments, image_size=side)


def convnext_config(name: str, config: dict[str, Any]) -> OpenClipTowerConfig | None:
    """Makes the configuration of a ConvNeXt tower that a checkpoint of LLaVA's original format names.

    Args:
        name: last part of the tower's path, with the name of open_clip's architecture; `-res768` is the resolution.
        config: `config.json` of its folder, in timm's format; may be empty.

    Returns:
        The configuration; None for another tower.

    Raises:
        UserError: its features form no grid.
    """
    import open_clip

    base, _, resolution = name.partition("-res")
    side = int(resolution) if resolution.isdecimal() else None
    if "convnext" in str(config.get("architecture")):
        tower = timm_config(config, side)
    elif known := [one for one in open_clip.list_models() if one.startswith("convnext") and one in base]:
        architecture = max(known, key=len)
        tower = open_clip_config(architecture, open_clip.get_model_config(architecture), side)
    else:
        return None
    examine(tower, name)
    return tower


def examine(config: OpenClipTowerConfig, name: str) -> int:
    """Sets width and patch size of a configuration, in place, from the shapes of its features.

    Args:
        config: without them.
        name: of the tower, for messages.

    Returns:
        The hidden state that a LLaVA reads: the last but one, as of CLIP, or the last stage of a hierarchy.

    Raises:
        UserError: the tower cannot be built, or its features form no grid.
    """
    side = config.image_size
    try:
        with torch.device("meta"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            tower = OpenClipTower(config).eval()
            states = tower(torch.zeros(1, 3, side, side)).hidden_states
    except (*BROKEN, RuntimeError, AssertionError) as error:
        raise UserError(
            f"vision tower {name} has no grid at {side} pixels ({first_line(error)[:60]}); give another size or tower"
        ) from None
    tokens = states[-1].shape[1]
    rows = round(tokens**0.5)
    if rows * rows != tokens or rows < 2:
        raise UserError(f"vision tower {name} gives {tokens} features, which are no grid; give another size or tower")
    config.hidden_size, config.patch_size = int(states[-1].shape[2]), side // rows
    return -2 if len(states) > 1 else -1
