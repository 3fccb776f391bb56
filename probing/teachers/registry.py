"""The teachers at hand, readable without loading anything heavy; `probing/teachers/<name>.py` loads each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One kind of teacher.

    Attributes:
        default_id: Hub id of the paper's teacher (OLA-VLM, sec. 3).
        class_name: class that must be found there.
        target: which feature the probes predict.
        licences: licences of the weights, by Hub id.
    """

    default_id: str
    class_name: str
    target: str
    licences: dict[str, str]


CATALOGUE = {
    "depth": Entry(
        "depth-anything/Depth-Anything-V2-Large-hf",
        "DepthAnythingForDepthEstimation",
        "last backbone feature without class token; grid x grid tokens, at most 24 x 24",
        {
            "depth-anything/Depth-Anything-V2-Large-hf": "CC-BY-NC-4.0 (no commercial use)",
            "depth-anything/Depth-Anything-V2-Base-hf": "CC-BY-NC-4.0 (no commercial use)",
            "depth-anything/Depth-Anything-V2-Small-hf": "Apache-2.0",
        },
    ),
    "seg": Entry(
        "shi-labs/oneformer_coco_swin_large",
        "OneFormerForUniversalSegmentation",
        "last stage of the backbone, resized to the grid; at most 24 x 24",
        {"shi-labs/oneformer_coco_swin_large": "MIT"},
    ),
    "gen": Entry(
        "stabilityai/stable-diffusion-2-1-unclip",
        "CLIPVisionModelWithProjection",
        "projected image embedding, one token, not normalised",
        {"stabilityai/stable-diffusion-2-1-unclip": "CreativeML Open RAIL++-M"},
    ),
}

ENCODERS = {
    "dino": ("facebook/dinov2-large", "Apache-2.0"),
    "siglip": ("google/siglip2-so400m-patch14-384", "Apache-2.0"),
    "internvit": ("OpenGVLab/InternVL3-1B-hf", "of the publisher; only the encoder is read"),
    "sam": ("facebook/sam-vit-large", "Apache-2.0"),
    "vit": ("timm/vit_base_patch16_224.augreg_in21k", "Apache-2.0"),
}
"""Plain encoders to show how it is written; any name and any encoder will do."""
