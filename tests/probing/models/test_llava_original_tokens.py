"""How prompts of LLaVA's original format become ids, with the tokenizer that Vicuna and Phi-3 have."""

import json

import pytest
import sentencepiece
from PIL import Image

from probing.models import llava_original as family
from probing.models.chat_templates import SYSTEM
from probing.recipe import BackboneRecipe
from tests.helpers.original import original

QUESTION = "Which colour?"
BEFORE, AFTER = f"{SYSTEM} USER: ", "\nWhich colour? ASSISTANT:"


def use_sentencepiece(path, legacy, bos=True):
    """Replaces the tokenizer of a checkpoint by a sentencepiece model, without tokenizer.json."""
    for file in path.glob("tokenizer*"):
        file.unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([BEFORE, AFTER.strip(), "The image shows a red cube."] * 20),
        model_prefix=str(path / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        bos_id=1, eos_id=2, unk_id=0, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": bos, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))


def inputs_of(path, **fields):
    recipe = BackboneRecipe(checkpoint=str(path), prompt=QUESTION, template="vicuna_v1", **fields)
    raw = json.loads((path / "config.json").read_text())
    return family.make_inputs(str(path), family.read_config(raw, recipe), recipe)


@pytest.mark.parametrize(
    ("options", "bos", "legacy"),
    [
        ({}, True, False),
        ({}, False, True),
        ({}, True, True),
        ({"special": 16}, True, False),
        ({"anyres": True}, True, False),
    ],
    ids=["plain", "no-bos-legacy", "legacy", "special", "tiles"],
)
def test_text_around_an_image_is_tokenized_apart(tmp_path, legacy, bos, options):
    """Against sentencepiece itself on each piece; the line feed after the image follows a separate blank."""
    path = tmp_path / "model"
    original(path, **options)
    pieces = use_sentencepiece(path, legacy, bos)
    inputs = inputs_of(path)
    ids = inputs([Image.new("RGB", (48, 20))]).inputs["input_ids"][0].tolist()
    start = [1] * bos + pieces.encode(BEFORE)
    end = pieces.encode(AFTER)
    assert [pieces.id_to_piece(number) for number in end[:3]] == ["▁", "<0x0A>", "W"]
    assert ids[: len(start)] == start
    assert ids[-len(end) :] == end
    special = [inputs.processor.tokenizer.convert_tokens_to_ids(f"<{task}_{k}>")
               for task in ("gen", "depth", "seg") if options.get("special") for k in range(4)]  # fmt: skip
    between = ids[len(start) : -len(end)]
    assert between[len(between) - len(special) :] == special
    assert set(between) - set(special) == {inputs.image_token_id}
    assert len(between) - len(special) == 16 or "anyres" in options


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_prompts_is_padded_like_each_alone(tmp_path, side):
    path = tmp_path / "model"
    original(path, special=16)
    use_sentencepiece(path, legacy=False)
    inputs = inputs_of(path)
    texts = [inputs.text, inputs.text.replace(QUESTION, "What does the image show?")]
    inputs.processor.tokenizer.padding_side = side
    images = [Image.new("RGB", (32, 32))] * 2
    both = inputs.encode(images, texts)
    assert both["attention_mask"][0].sum() < both["attention_mask"][1].sum()
    for row, text in enumerate(texts):
        alone = inputs.encode(images[:1], [text])["input_ids"][0]
        mask = both["attention_mask"][row].bool()
        assert both["input_ids"][row][mask].tolist() == alone.tolist()
        assert mask[-1 if side == "left" else 0]


def test_several_images_keep_their_own_tokens(tmp_path):
    """Two adjacent images, then one after text: every piece of text is tokenized by itself, with one BOS in all."""
    path = tmp_path / "model"
    original(path)
    pieces = use_sentencepiece(path, legacy=False)
    inputs = inputs_of(path)
    tokenizer, text = inputs.processor.tokenizer, "USER: <image><image>\nand <image>\nshow"
    image = inputs.image_token_id
    whole = inputs.processor(images=[Image.new("RGB", (8, 8))] * 3, text=[text], return_tensors="pt")["input_ids"][0]
    expected = [1, *pieces.encode("USER: "), *[image] * 32, *pieces.encode("\nand "), *[image] * 16,
                *pieces.encode("\nshow")]  # fmt: skip
    assert family.tokenize_pieces(tokenizer, text, whole) == expected


@pytest.mark.parametrize(
    ("kind", "form", "counts"),
    [
        ("ola_llama", "emb", (4, 4, 4)),
        ("ola_llama", "expand_emb", (4, 4, 4)),
        ("ola_llama", None, (4, 4, 4)),
        ("llava_llama", "emb", (4, 16, 16)),
        ("llava_llama", "expand_emb", (4, 4, 4)),
        ("llava_llama", None, (4, 16, 16)),
        ("llava_phi3", None, (4, 16, 16)),
        ("probe_dsg_llava_llama", "emb", (4, 4, 4)),
    ],
)
def test_the_class_decides_how_special_tokens_are_pooled(tmp_path, kind, form, counts):
    """The pre-training and probe classes always pool; the fine-tuned one inserts whole rows unless set to pool."""
    path = tmp_path / "model"
    original(path, kind, special=16, token_format=form)
    if form is None:
        raw = json.loads((path / "config.json").read_text())
        del raw["task_token_format"]
        (path / "config.json").write_text(json.dumps(raw))
    found = inputs_of(path)([Image.new("RGB", (32, 32))]).tokens.counts()
    assert tuple(found[task] for task in ("gen", "depth", "seg")) == counts
