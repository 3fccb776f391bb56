"""Features of whole images: the networks, and a cache of the features of real images."""

import contextlib
import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import Tensor

from probing.data.coco import ImageList
from probing.recipe import TeacherRecipe
from probing.teachers.base import Pixels, TeacherSource, load_model
from probing.utils.cache_dir import VARIABLE, cache_folder
from probing.utils.errors import UserError, first_line
from probing.utils.files import atomic_file, disk_errors, reading
from probing.utils.images import square
from probing.utils.pretrained import identity, load_config, locate
from probing.utils.progress import Progress

INCEPTION_SIDE = 256
"""Side of images for Inception, which resizes them to 299 pixels."""
BATCH = 32


@dataclass(frozen=True)
class Extractor:
    """A frozen network with its preprocessing.

    Attributes:
        name: of the network, in folders and files.
        side: side in pixels of its input images.
        encode: images (B, side, side, 3), uint8 → features (B, D).
        identity: hash of the weights.
        metrics: names of the Fréchet and of the kernel distance between its features.
    """

    name: str
    side: int
    encode: Callable[[NDArray[np.uint8]], Tensor]
    identity: str
    metrics: tuple[str, str]

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Computes features (B, D) of square images of any size, resized with Lanczos' filter."""
        size = (self.side, self.side)
        small = [np.asarray(i if i.size == size else i.resize(size, Image.Resampling.LANCZOS)) for i in images]
        return self.encode(np.stack(small)).float().cpu().numpy()


def inception(weights: Path | None, device: torch.device) -> Extractor:
    """Loads pytorch-fid's Inception, which defines FID (arXiv:1706.08500).

    Args:
        weights: its file `pt_inception-2015-12-05-6726825d.pth`; by default torch.hub downloads it once.
        device: for the network.

    Raises:
        UserError: pytorch-fid is not installed, or the weights are missing or broken.
    """
    try:
        from pytorch_fid import inception as reference
    except ImportError:
        raise UserError("fid needs pytorch-fid; install it with: pip install 'mllm-probing[decode]'") from None
    try:
        with contextlib.ExitStack() as stack:
            if weights is not None:  # for which pytorch-fid has no option
                state = torch.load(weights, map_location="cpu", weights_only=True)
                stack.enter_context(mock.patch.object(reference, "load_state_dict_from_url", return_value=state))
            model = reference.InceptionV3().eval().to(device)
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        where = f"be read from {weights}" if weights else "be downloaded"
        raise UserError(
            f"Inception's weights cannot {where} ({first_line(error)}); give --inception-weights FILE, a copy of "
            f"{reference.FID_WEIGHTS_URL}"
        ) from None

    def encode(images: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 255
        return model(pixels)[0].flatten(1)

    return Extractor("inception", INCEPTION_SIDE, encode, _identity(model), ("fid", "kid"))


def inception_file() -> Path | None:
    """Returns the weights that torch.hub has downloaded; None if it has not."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    return file if file.is_file() else None


def _identity(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def classifier(source: str, device: torch.device) -> Extractor:
    """Loads an image classifier of transformers for its pooled features; the metrics are named after its folder.

    Args:
        source: folder or Hub id.
        device: for the network.

    Raises:
        UserError: the model does not exist, or has no pooled features.
    """
    from transformers import AutoImageProcessor, AutoModel

    place = locate(source, "feature extractor")
    config = load_config(place, "feature extractor")
    try:
        processor = AutoImageProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(f"feature extractor {source} has no preprocessing: {first_line(error)}") from None
    model = load_model(AutoModel, TeacherSource("feature extractor", TeacherRecipe(id=source), place, config), device)
    prepare = Pixels(processor)
    side = prepare([Image.new("RGB", (512, 512))]).shape[-1]

    def encode(images: NDArray[np.uint8]) -> Tensor:
        return model(prepare(list(images)).to(device)).pooler_output.flatten(1)

    try:
        with torch.no_grad():
            encode(np.zeros((1, side, side, 3), dtype=np.uint8))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        raise UserError(
            f"{source} ({type(model).__name__}) gives no pooled features of images; give an image classifier"
        ) from None
    name = "".join(c if c.isalnum() else "_" for c in Path(source).name.lower())
    return Extractor(name, side, encode, identity(place, None), (f"frechet_{name}", f"kernel_{name}"))


def reference_features(extractor: Extractor, images: ImageList) -> tuple[NDArray[np.float32], bool]:
    """Computes features (n, D) of real images squashed to squares, or reads them from the cache folder.

    Returns:
        The features, and whether they come from the cache.

    Raises:
        UserError: an image cannot be read.
    """
    file = reference_file(extractor, images)
    if file.exists():
        with reading(file, "remove it"):
            return load_file(file)["features"], True
    parts = []
    steps = range(0, len(images), BATCH)
    with Progress(f"{extractor.name} features of {images.split}", len(steps), unit="batches") as bar:
        for first in steps:
            indices = range(first, min(first + BATCH, len(images)))
            parts.append(extractor.features([square(images.read(index)) for index in indices]))
            bar.advance()
    features = np.concatenate(parts)
    with disk_errors(file, f"set {VARIABLE} to another folder"), atomic_file(file) as temporary:
        save_file({"features": features}, temporary)
    return features, False


def reference_file(extractor: Extractor, images: ImageList) -> Path:
    """Returns the cache file: a hash of the network and of the images' paths, sizes and dates."""
    digest = hashlib.sha256(f"{extractor.identity} {extractor.side}".encode())
    for name in images.names:
        path = (images.folder / name).resolve()
        state = path.stat()
        digest.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode())
    return cache_folder() / "references" / f"{digest.hexdigest()[:32]}.safetensors"
