"""Patch-aligned training: the loss, the labels of patches, and a stage from end to end."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor, LlavaImageProcessor

from probing.data.conversations import ConversationDataset, Encoder, collate, read_conversations
from probing.data.panoptic import UNLABELED, Panoptic
from probing.data.patch_words import Annotations, PatchWords, as_seen, read_annotations
from probing.distillation.model import DistillationModel
from probing.distillation.patch_alignment import (
    PatchAlignmentLoss,
    contrastive_loss,
    cosine_loss,
    count_pairs,
    pool_patches,
)
from probing.distillation.recipe import DistillRecipe, PatchAlignmentRecipe
from probing.distillation.trainer import run_stage
from probing.models.word_embeddings import word_vectors
from probing.recipe import dump_recipe
from probing.toyworld.layout import write_world
from probing.utils.errors import UserError
from probing.utils.images import square
from tests.helpers import tiny, warm

CPU = torch.device("cpu")
LOSSES = ("cosine", "contrastive")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve scenes; to their captions are added a text, one on two scenes, and one on a scene without annotations."""
    root = write_world(tmp_path_factory.mktemp("patches") / "world", 12, 2, seed=0)
    entries = json.loads((root / "pt.json").read_text())
    first, second = (entry["image"] for entry in entries[:2])
    shutil.copy(root / first, root / "train2017" / "other.png")

    def entry(question, *images):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
        return {"id": question, "image": list(images), "conversations": turns}

    entries += [
        entry("Well?"),
        entry("<image><image>Both?", second, first),
        entry("<image>This?", "train2017/other.png"),
    ]
    (root / "mixed.json").write_text(json.dumps(entries))
    return root


@pytest.fixture
def recipe(models, world):
    def make(patches=None, **changes):
        values = {"checkpoint": str(models["llava"]), "stage": "pt", "batch_size": 5, "micro_batch": 5, "workers": 0}
        values["data"] = {"conversations": str(world / "mixed.json"), "image_root": str(world)}
        values["trainer"] = {"report_to": "none", "use_cpu": True, "logging_steps": 1}
        section = {"annotations": f"coco:{world}"} | (patches or {})
        return DistillRecipe.model_validate(values | {"patches": section, "lr": 1e-3} | changes)

    return make


@pytest.fixture
def parts(models, world):
    """Makes the model of a stage, its patch labels, and its micro-batches."""

    def make(stage="pt", loss="cosine", root=world, **settings):
        processor = AutoProcessor.from_pretrained(models["llava"])
        model = AutoModelForImageTextToText.from_pretrained(models["llava"])
        conversations = read_conversations(root / "mixed.json")
        names = [name for conversation in conversations for name in conversation.images]
        words = PatchWords(read_annotations(root, root, names), processor.image_processor, (4, 4), 0.5, False)
        recipe = PatchAlignmentRecipe(annotations=f"coco:{root}", loss=loss, **settings)
        alignment = PatchAlignmentLoss(recipe, processor.tokenizer, words.words, model.get_input_embeddings)
        trained = DistillationModel(model, stage, [alignment]).train()
        encoder = Encoder(processor, model.config.image_token_id, 4096)
        samples = ConversationDataset(conversations, root, encoder, patches=words)

        def batches(*cuts):
            made = [collate([samples[index] for index in cut], 2) for cut in cuts]
            alignment.prepare(made, CPU, world=1)
            return [{k: v for k, v in batch.items() if k != "names"} for batch in made]

        return trained, words, batches

    return make


def by_hand(features, labels, vectors, temperature):
    """The loss in plain numbers, one patch after another."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    terms = []
    for image, row in zip(features.tolist(), labels.tolist(), strict=True):
        there = sorted({label for label in row if label >= 0})
        for word in there:
            own = [patch for patch, label in zip(image, row, strict=True) if label == word]
            mean = [sum(values) / len(own) for values in zip(*own, strict=True)]
            if temperature is None:
                terms.append(1 - cosine(mean, vectors[word].tolist()))
            elif len(there) > 1:
                powers = {other: math.exp(cosine(mean, vectors[other].tolist()) / temperature) for other in there}
                terms.append(-math.log(powers[word] / sum(powers.values())))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_plain_loop_for_any_micro_batches(models, loss):
    generator = torch.Generator().manual_seed(0)
    tokenizer = AutoProcessor.from_pretrained(models["llava"]).tokenizer
    embed = AutoModelForImageTextToText.from_pretrained(models["llava"]).get_input_embeddings()
    names = ["red cube", "sky", "a", "two lines", "floor wood"]
    recipe = PatchAlignmentRecipe(annotations="coco:x", loss=loss)
    alignment = PatchAlignmentLoss(recipe, tokenizer, names, lambda: embed)
    vectors = word_vectors(tokenizer, embed.weight.detach(), names)
    torch.testing.assert_close(alignment.word_vectors(torch.arange(5)), vectors)
    features = torch.randn(6, 9, 32, generator=generator)
    labels = torch.randint(-1, 5, (6, 9), generator=generator)
    labels[2], labels[3] = -1, torch.tensor([-1, 4, 4, 4, -1, -1, -1, -1, 4])  # none, and one word alone
    expected = by_hand(features.double(), labels, vectors.double(), alignment.temperature)
    for cuts in ([slice(0, 6)], [slice(0, 1), slice(1, 3), slice(3, 6)], [slice(2, 3), slice(0, 2), slice(3, 6)]):
        batches = [{"patch_labels": labels[cut]} for cut in cuts]
        alignment.prepare([*batches, {}], CPU, world=1)
        parts = [
            alignment.loss({0: features[cut]}, batch)[f"patches.{loss}"]
            for cut, batch in zip(cuts, batches, strict=True)
        ]
        assert float(sum(parts)) == pytest.approx(expected, rel=1e-5)
    assert count_pairs(labels, 1) - count_pairs(labels, 2) == 1
    assert count_pairs(labels[2:3], 1) == 0


def test_losses_of_aligned_patches_are_known():
    """Patches that average to their word, at any length; the contrast of words at right angles is known too."""
    labels = torch.tensor([[0, 0, 2, -1], [2, -1, -1, -1]])
    vectors = torch.eye(4)[:3]
    aside = torch.tensor([0.0, 0, 0, 5])
    features = torch.stack([vectors[0] + aside, vectors[0] - aside, 3 * vectors[2], aside])
    features = torch.stack([features, features[[2, 3, 3, 3]]]).requires_grad_()
    pooled = pool_patches(features, labels)
    assert pooled.words.tolist() == [0, 2] and len(pooled.vectors) == 3
    assert cosine_loss(pooled, vectors[pooled.words]).item() == pytest.approx(0, abs=1e-6)
    assert contrastive_loss(pooled, vectors[pooled.words], 0.5).item() == pytest.approx(2 * math.log1p(math.exp(-2)))
    assert cosine_loss(pooled, -vectors[pooled.words]).item() == pytest.approx(2 * 3)
    for function in (cosine_loss, lambda *given: contrastive_loss(*given, 0.5)):
        loss = function(pool_patches(features, torch.full_like(labels, -1)), vectors[:0])
        loss.backward()
        assert loss == 0 and not features.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_reach_projector_and_add_up(parts, loss):
    trained, _, batches = parts("pt", loss, weight=2.0)
    grads = []
    for cuts in ([range(15)], [range(4), [12], range(4, 12), [13, 14]]):
        trained.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches(*cuts):
            output = trained(**batch, num_items_in_batch=torch.tensor(10**12))  # next-token loss is negligible
            output["loss"].backward()
            total += output["losses"][f"patches.{loss}"].item()
        grads.append({name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None})
        grads[-1]["loss"] = torch.tensor(total)
    assert {name.split(".")[2] for name in grads[0] if name != "loss"} == {"multi_modal_projector"}
    for name, gradient in grads[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_word_vectors_have_no_gradient(parts):
    trained, _, batches = parts("ift")
    (batch,) = batches(range(4))
    seen = []
    hook = trained.model.model.multi_modal_projector.register_forward_hook(lambda m, a, output: seen.append(output))
    trained(**batch)
    hook.remove()
    embed = trained.model.get_input_embeddings()
    trained.zero_grad()
    trained.auxiliary[0].loss({0: seen[0]}, batch)["patches.cosine"].backward()
    assert len(seen) == 1 and embed.weight.requires_grad
    assert embed.weight.grad is None and trained.model.model.multi_modal_projector.linear_1.weight.grad.any()


def test_labels_follow_the_images_of_a_batch(parts, world):
    """Texts have none, an image without annotations has none that count, and several of a sample keep their order."""
    _, words, batches = parts()
    (batch,) = batches([12, 0, 13, 14])
    labels = batch["patches"]["labels"]
    size = Image.open(world / "train2017" / "000000000001.png").size
    first, second = (words(f"train2017/00000000000{k}.png", size) for k in (1, 2))
    assert len(batch["pixel_values"]) == len(labels) == 4 and (first >= 0).any()
    assert torch.equal(labels, torch.stack([first, second, first, torch.full((16,), -1)]))
    assert not (torch.equal(first, second) or "unlabelled" in batch)
    (text,) = batches([12])
    assert "patches" not in text


def quarters(height, width):
    """Classes 0 to 3 in the four quarters."""
    rows, columns = np.arange(height) >= height / 2, np.arange(width) >= width / 2
    return (2 * rows[:, None] + columns).astype(np.uint8)


def seen(white, processor, squared):
    """What a vision tower gets of a picture that is white at some places, from 0 to 255."""
    picture = Image.fromarray(np.repeat(white[:, :, None], 3, axis=2).astype(np.uint8) * 255)
    options = {"do_normalize": False, "do_rescale": False, "return_tensors": "pt"}
    return processor(images=square(picture) if squared else picture, **options)["pixel_values"][0, 0]


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (64, 64)])
def test_label_maps_follow_image_processing(size):
    """Pictures that are white where one class is, through all that the processor does to an image."""
    labels = quarters(*size)
    labels[: size[0] // 5] = UNLABELED
    side = {"height": 32, "width": 32}
    cropping = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side)
    padding = LlavaImageProcessor(do_pad=True, size={"shortest_edge": 32}, crop_size=side, image_mean=[0.5, 0.4, 0.3])
    black = CLIPImageProcessor(size={"shortest_edge": 20}, crop_size=side)  # cut to more than there is
    for processor, squared in itertools.product((cropping, padding, black), (False, True)):
        found = torch.from_numpy(as_seen(labels, processor, squared))
        surely = torch.zeros(32, 32, dtype=torch.bool)
        for number in (0, 1, 2, 3, UNLABELED):
            white = seen(labels == number, processor, squared)
            assert (found[white > 250] == number).all()
            assert number == UNLABELED or (white[found == number] > 5).all()
            surely |= white > 250
        outside = seen(np.ones(size, dtype=bool), processor, squared) == seen(np.zeros(size), processor, squared)
        assert (found[outside] == UNLABELED).all() and (surely | outside).float().mean() > 0.75
        assert bool(outside.any()) == (
            processor is black or (processor is padding and size != (64, 64) and not squared)
        )


def test_patch_words_merge_synonymous_classes(tmp_path):
    one = Panoptic(tmp_path / "one", ["wall-other-merged", "sky", "wall-stuff"], {"a.png": ("a.png", {1: 0, 2: 2})})
    two = Panoptic(tmp_path / "two", ["sky", "dog"], {"b.png": ("b.png", {1: 0, 2: 1})})
    for maps, name in ((one, "a.png"), (two, "b.png")):
        maps.folder.mkdir()
        ids = np.zeros((4, 4, 3), dtype=np.uint8)
        ids[:2, :, 0], ids[2, :, 0] = 1, 2
        Image.fromarray(ids).save(maps.folder / name)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    words = PatchWords(Annotations(tmp_path, tmp_path, {"one": one, "two": two}, []), processor, (2, 1), 0.5, True)
    assert words.words == ["wall", "sky", "dog"]
    assert words("one/a.png", (4, 4)).tolist() == [0, 0] and words("two/b.png", (4, 4)).tolist() == [1, 2]
    whole = PatchWords(words.annotations, processor, (1, 1), 0.7, True)
    assert whole("one/a.png", (4, 4)).tolist() == [0]  # walls of both kinds together


def mean_cosine(folder, world):
    """Of pooled patches with their words, by a checkpoint's own forward pass."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    names = [f"train2017/{k:012d}.png" for k in range(1, 13)]
    words = PatchWords(read_annotations(world, world, names), processor.image_processor, (4, 4), 0.5, False)
    vectors = word_vectors(processor.tokenizer, model.get_input_embeddings().weight.detach(), words.words)
    cosines = []
    for name in names:
        image = Image.open(world / name).convert("RGB")
        pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = model.get_image_features(pixel_values=pixels).pooler_output[0]
        labels = words(name, image.size)
        for label in set(labels.tolist()) - {-1}:
            cosines.append(torch.cosine_similarity(features[labels == label].mean(0), vectors[label], dim=0))
    return float(torch.stack(cosines).mean())


def test_stage_aligns_patches_with_words(recipe, world, tmp_path, caplog):
    fast = {"epochs": 10, "lr": 1e-2}
    for name, patches in (("with", {"weight": 2.0}), ("contrast", {"loss": "contrastive"})):
        run_stage(recipe(patches, **fast), tmp_path / name)
    assert "1 images have no annotations for patches, first: train2017/other.png" in caplog.text
    run_stage(recipe(**fast).model_copy(update={"patches": None}), tmp_path / "without")
    found = {name: mean_cosine(tmp_path / name, world) for name in ("with", "contrast", "without")}
    assert found["with"] > 0.5 and found["with"] > found["without"] + 0.3, found
    record = json.loads((tmp_path / "with" / "training.json").read_text())
    assert record["not_annotated"] == 1 and record["unlabelled"] == []
    logged = [row["loss/patches.cosine"] for row in record["log"] if "loss/patches.cosine" in row]
    assert len(logged) == 30 and logged[-1] < logged[0] - 0.3
    contrast = json.loads((tmp_path / "contrast" / "training.json").read_text())["log"]
    logged = [row["loss/patches.contrastive"] for row in contrast if "loss/patches.contrastive" in row]
    assert logged[-1] < 0.7 * logged[0]


@pytest.mark.slow
def test_two_processes_equal_one(recipe, models, world, tmp_path):
    """Every loss, the gradient's norm (Adam would hide a common factor), and the names of skipped samples.

    All steps are full: of an uneven last batch, the sampler repeats samples so that every process has as many.
    """
    copy = shutil.copytree(world, tmp_path / "world")
    for number in (3, 8):
        (copy / "train2017" / f"{number:012d}.png").write_bytes(b"broken")
    teachers = {"gen": {"id": str(models["gen"])}}
    same = recipe(
        {"loss": "contrastive", "annotations": f"coco:{copy}"}, batch_size=6, micro_batch=3, max_steps=2,
        data={"conversations": str(copy / "mixed.json"), "image_root": str(copy)},
        embedding={"teachers": teachers, "layers": {"gen": "2"}, "seek": 2, "heads": 2, "dim_head": 8},
    )  # fmt: skip
    run_stage(same, tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(same))
    log = tmp_path / "log"
    processes = warm.launch(["distill", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two")], log)
    codes, said = warm.finish(processes, log)
    assert codes == [0, 0], said[-3000:]
    one, two = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two"))
    assert one["skipped"] == two["skipped"] and one["skipped"]
    for first, second in zip(one["log"], two["log"], strict=True):
        for name in (name for name in first if name.startswith("loss/") or name == "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)


@pytest.mark.parametrize("other", ["embedding", "feature"])
def test_loss_starts_the_same_next_to_other_losses(recipe, models, world, tmp_path, other):
    teachers = {"depth": {"id": str(models["depth"])}, "gen": {"id": str(models["gen"])}}
    embedding = {"teachers": teachers, "layers": {"depth": "1", "gen": "2"}, "seek": 2, "heads": 2, "dim_head": 8}
    section = {"embedding": embedding}
    if other != "embedding":
        section = {"encoders": {"mode": other, "teachers": teachers, "tokens": 2}}
    data = {"conversations": str(world / "pt.json"), "image_root": str(world)}
    starts = []
    for name, changes in (("alone", {}), ("other", section)):
        run_stage(recipe(data=data, batch_size=12, micro_batch=4, max_steps=1, **changes), tmp_path / name)
        log = json.loads((tmp_path / name / "training.json").read_text())["log"]
        starts.append(log[0]["loss/patches.cosine"])
    if other == "feature":  # with a separate projector
        assert 0.5 < starts[1] < 1.5 and starts[1] != starts[0]
    else:
        assert starts[1] == pytest.approx(starts[0], abs=1e-5)


def test_broken_label_maps_are_named_and_skipped(recipe, models, world, tmp_path, caplog):
    copy = shutil.copytree(world, tmp_path / "world")
    maps = copy / "annotations" / "panoptic_train2017"
    (maps / "000000000003.png").unlink()
    Image.open(maps / "000000000004.png").crop((0, 0, 20, 48)).save(maps / "000000000004.png")
    data = {"conversations": str(copy / "mixed.json"), "image_root": str(copy)}
    run_stage(recipe({"annotations": f"coco:{copy}"}, data=data), tmp_path / "out")
    noted = json.loads((tmp_path / "out" / "training.json").read_text())["unlabelled"]
    assert [note.split(": ")[0] for note in noted] == [f"train2017/00000000000{k}.png" for k in (3, 4)]
    assert "No such file" in noted[0] and "20 x 48 pixels are annotated, the image has 48 x 48" in noted[1]
    assert "2 annotations of images could not be used" in caplog.text
    for file in maps.iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"none of 12 annotated .* first train2017/0{11}1\.png: cannot identify image"):
        run_stage(recipe({"annotations": f"coco:{copy}"}, data=data), tmp_path / "next")


def test_missing_annotations_are_refused(recipe, world, tmp_path):
    with pytest.raises(UserError, match=r"no such folder: /nowhere/annotations; set patches\.annotations"):
        run_stage(recipe({"annotations": "coco:/nowhere"}), tmp_path / "out")
    images = tiny.conversations(tmp_path / "images", 3)
    data = {"conversations": str(images / "data.json"), "image_root": str(images)}
    with pytest.raises(UserError, match="none of the 2 images of the conversations has annotations"):
        run_stage(recipe(data=data), tmp_path / "out")
    data = {"conversations": str(world / "text.json"), "image_root": str(world)}
    with pytest.raises(UserError, match="none of the 0 images"):
        run_stage(recipe(data=data), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_token_without_patch_is_refused(recipe, models, tmp_path):
    shutil.copytree(models["llava"], tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_feature_select_strategy": "full"}))
    with pytest.raises(
        UserError,
        match=r"17 image tokens where the model has 16 features.*select_strategy=default",
    ):
        run_stage(recipe(checkpoint=str(tmp_path / "model")), tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value"),
    [("weight", 0), ("weight", -1), ("coverage", 0), ("coverage", 1.01), ("temperature", 0), ("loss", "dice"),
     ("annotations", "/data/coco")],
)  # fmt: skip
def test_invalid_recipe_is_refused(recipe, field, value):
    with pytest.raises(ValidationError, match=f"patches.{field}"):
        recipe({field: value})
