"""Features of whole images: the networks, their files and the cache."""

import os
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, ResNetConfig, ResNetForImageClassification

from analysis.evaluation.generated_images.features import classifier, inception, reference_features
from probing.data.coco import ImageList
from probing.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return ImageList(folder, "val", [f"{index}.png" for index in range(6)])


def test_inceptions_features_are_pytorch_fids(inception_file, images, tmp_path):
    """The reference reads images from files, at the network's size, so that both get the same pixels."""
    extractor = inception(inception_file, CPU)
    pictures = [images.read(index).resize((256, 256)) for index in range(3)]
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    from pytorch_fid import fid_score
    from pytorch_fid import inception as reference

    weights = torch.load(inception_file, weights_only=True)
    with mock.patch.object(reference, "load_state_dict_from_url", return_value=weights):
        model = reference.InceptionV3([3]).eval()
    expected = fid_score.get_activations([str(p) for p in paths], model, batch_size=3, num_workers=0)
    found = extractor.features(pictures)
    assert found.shape == (3, 2048) and np.ptp(found, axis=0).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert extractor.metrics == ("fid", "kid")


def test_any_classifier_names_its_metric(images, models, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "my-net")
    with pytest.raises(UserError, match="has no preprocessing"):
        classifier(str(tmp_path / "my-net"), CPU)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "my-net"
    )
    extractor = classifier(str(tmp_path / "my-net"), CPU)
    assert extractor.metrics == ("frechet_my_net", "kernel_my_net") and extractor.side == 32
    assert extractor.features([images.read(0)]).shape == (1, 12)
    (tmp_path / "my-net").rename(tmp_path / "Inception")  # its distances are no FID
    assert classifier(str(tmp_path / "Inception"), CPU).metrics == ("frechet_inception", "kernel_inception")
    with pytest.raises(UserError, match="no such feature extractor"):
        classifier(str(tmp_path / "nowhere"), CPU)
    with pytest.raises(UserError, match="gives no pooled features of images"):
        classifier(str(models["llava"]), CPU)


def test_reference_features_are_cached_until_an_image_changes(inception_file, images, caplog):
    extractor = inception(inception_file, CPU)
    first, cached = reference_features(extractor, images)
    again, cached_again = reference_features(extractor, images)
    assert not cached and cached_again and np.array_equal(first, again) and first.shape == (6, 2048)
    other, cached = reference_features(extractor, ImageList(images.folder, "val", images.names[:4]))
    assert not cached
    np.testing.assert_allclose(other, first[:4], rtol=1e-4, atol=1e-6)
    path = images.folder / images.names[0]
    os.utime(path, (1, 1))
    assert not reference_features(extractor, images)[1]


class _Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_weights_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"some": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(_Trap()))
    for name in ("text.pth", "other.pth", "trap.pth"):
        with pytest.raises(UserError, match="give --inception-weights FILE"):
            inception(tmp_path / name, CPU)
    assert not (tmp_path / "trapped").exists()
