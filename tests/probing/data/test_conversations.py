import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from probing.data.conversations import (
    IGNORED,
    ConversationDataset,
    CutInsideImageError,
    Encoder,
    collate,
    read_conversations,
    require_some_image,
)
from probing.utils.errors import UserError

LLAMA3 = (
    "{% for message in messages %}<|start|>{{ message['role'] }}<|end|>\n\n"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
VICUNA = (  # no marker after an answer: the encoder must add one
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TWO_TURNS = {
    "id": "a",
    "image": "x.jpg",
    "conversations": [
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "a cube"},
        {"from": "human", "value": "Its colour?"},
        {"from": "gpt", "value": "red"},
    ],
}


def write(tmp_path, *entries):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(list(entries)))
    return path


@pytest.mark.parametrize(
    ("template", "supervised"), [(LLAMA3, ["a cube</s>", "red</s>"]), (VICUNA, [" a cube</s> ", " red</s> "])]
)
def test_exactly_the_answers_are_supervised(models, tmp_path, template, supervised):
    processor = AutoProcessor.from_pretrained(models["llava"])
    processor.chat_template = template
    (conversation,) = read_conversations(write(tmp_path, TWO_TURNS))
    sample = Encoder(processor, 3, 4096)(conversation, [Image.new("RGB", (40, 30))])
    ids, labels = sample["input_ids"], sample["labels"]
    assert int((ids == 3).sum()) == 16 and sample["pixel_values"].shape == (1, 3, 32, 32)
    runs, current = [], []
    for position in range(len(labels)):
        if labels[position] != IGNORED:
            assert labels[position] == ids[position]
            current.append(int(ids[position]))
        elif current:
            runs.append(current)
            current = []
    runs += [current] if current else []
    assert [processor.tokenizer.decode(run) for run in runs] == supervised
    text = processor.tokenizer.decode(ids)
    assert text.index("<image>") < text.index("What is it?")  # the tag moves to the front of its turn


def test_text_only_samples_and_padding(models, tmp_path):
    entry = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]}
    encoder = Encoder(AutoProcessor.from_pretrained(models["llava"]), 3, 4096)
    with_image, text_only = read_conversations(write(tmp_path, TWO_TURNS, entry))
    samples = [encoder(with_image, [Image.new("RGB", (8, 8))]), encoder(text_only, []), {"skipped": "y.jpg: corrupt"}]
    batch = collate(samples, pad_id=2)
    assert batch["input_ids"].shape[0] == 2 and batch["pixel_values"].shape[0] == 1
    length = len(samples[1]["input_ids"])
    assert (batch["labels"][1, length:] == IGNORED).all() and (batch["attention_mask"][1, length:] == 0).all()
    assert batch["skipped"] == ["y.jpg: corrupt"]


def test_cutting_never_splits_an_image(models, tmp_path):
    processor = AutoProcessor.from_pretrained(models["llava"])
    (conversation,) = read_conversations(write(tmp_path, TWO_TURNS))
    whole = Encoder(processor, 3, 4096)(conversation, [Image.new("RGB", (8, 8))])
    cut = Encoder(processor, 3, len(whole["input_ids"]) - 3)(conversation, [Image.new("RGB", (8, 8))])
    assert torch.equal(cut["labels"], whole["labels"][:-3]) and cut["cut"] and "cut" not in whole
    with pytest.raises(CutInsideImageError, match=r"at 10 of \d+ tokens"):
        Encoder(processor, 3, 10)(conversation, [Image.new("RGB", (8, 8))])


def test_second_image_that_does_not_fit_is_dropped_with_its_turn(models, tmp_path):
    second = [{"from": "human", "value": "<image>And this?"}, {"from": "gpt", "value": "blue"}]
    entry = TWO_TURNS | {"image": ["x.jpg", "y.jpg"], "conversations": TWO_TURNS["conversations"] + second}
    (conversation,) = read_conversations(write(tmp_path, entry))
    processor, images = AutoProcessor.from_pretrained(models["llava"]), [Image.new("RGB", (8, 8))] * 2
    whole = Encoder(processor, 3, 4096)(conversation, images)
    starts = [k for k in range(1, len(whole["input_ids"])) if (whole["input_ids"][k - 1 : k + 1] == 3).tolist()[0] == 0]
    second_image = [k for k in starts if whole["input_ids"][k] == 3][1]
    cut = Encoder(processor, 3, second_image)(conversation, images)
    assert whole["pixel_values"].shape[0] == 2 and cut["pixel_values"].shape[0] == 1


def test_unusable_samples_are_named_and_empty_batch_has_no_loss(models, tmp_path):
    text = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]}
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    conversations = read_conversations(write(tmp_path, TWO_TURNS, TWO_TURNS | {"image": "no.jpg"}, text))
    encoder = Encoder(AutoProcessor.from_pretrained(models["llava"]), 3, 12)
    samples = [ConversationDataset(conversations, tmp_path, encoder)[k] for k in range(3)]
    assert samples[0]["skipped"].startswith("conversation 0 (id a): cut inside an image")
    assert samples[1] == {"skipped": "no.jpg: missing"}
    assert samples[2]["cut"] == "conversation 2 (id t)" and len(samples[2]["labels"]) == 12
    batch = collate(samples[:2], pad_id=2)
    assert (batch["labels"] == IGNORED).all() and len(batch["skipped"]) == 2 and "pixel_values" not in batch


def test_a_wrong_image_root_is_noticed_at_once(tmp_path):
    conversations = read_conversations(write(tmp_path, TWO_TURNS))
    with pytest.raises(UserError, match="none of 1 images"):
        require_some_image(conversations, tmp_path)
    with pytest.raises(UserError, match="no such image folder"):
        require_some_image(conversations, tmp_path / "nope")
    (tmp_path / "x.jpg").touch()
    require_some_image(conversations, tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for", "cannot be used"),
        ("{{ raise_exception('roles must alternate') }}", "cannot be used .roles must alternate"),
        ("{{ messages | length }}", "writes 0 images instead of 1"),
        ("{{ '<image><image>' }}", "writes 2 images instead of 1"),
    ],
)
def test_unsuitable_templates_are_refused_before_training(models, template, message):
    processor = AutoProcessor.from_pretrained(models["llava"])
    processor.chat_template = template
    with pytest.raises(UserError, match=message):
        Encoder(processor, 3, 4096).require_usable()


def test_a_template_that_rewrites_earlier_turns_is_refused(models, tmp_path):
    processor = AutoProcessor.from_pretrained(models["llava"])
    processor.chat_template = "{{ messages | length }}" + LLAMA3
    (conversation,) = read_conversations(write(tmp_path, TWO_TURNS))
    with pytest.raises(UserError, match="changes earlier turns"):
        Encoder(processor, 3, 4096)(conversation, [Image.new("RGB", (8, 8))])


ANSWER = {"from": "gpt", "value": "x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "../x.jpg"}, "not a plain path"),
        ({"image": "/etc/x.jpg"}, "not a plain path"),
        ({"image": [7]}, "not a plain path"),
        ({"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "x"}]}, "not text"),
        ({"image": None}, "0 images and 1 <image> tags"),
        ({"image": ["x.jpg", "y.jpg"]}, "2 images and 1 <image> tags"),
        ({"conversations": [{"from": "human", "value": "<image><image>?"}, ANSWER]}, "1 images and 2 <image> tags"),
        ({"conversations": [{"from": "human", "value": "?"}, ANSWER]}, "1 images and 0 <image> tags"),
        ({"conversations": TWO_TURNS["conversations"][:1]}, "end with gpt"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "KeyError: 'system'"),
        ({"conversations": None}, "TypeError"),
    ],
)
def test_odd_conversations_are_left_out_and_named(tmp_path, caplog, change, message):
    found = read_conversations(write(tmp_path, TWO_TURNS, TWO_TURNS | change, TWO_TURNS))
    assert [one.number for one in found] == [0, 2]
    assert "data.json: 1 of 3 conversations are skipped, first entry 1" in caplog.text and message in caplog.text
    with pytest.raises(UserError, match="has no usable conversation, first entry 0"):
        read_conversations(write(tmp_path, TWO_TURNS | change))


def test_windows_paths_are_read(tmp_path):
    (found,) = read_conversations(write(tmp_path, TWO_TURNS | {"image": "train2017\\x.jpg"}))
    assert found.images == ("train2017/x.jpg",)


def test_json_lines(tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    odd = TWO_TURNS | {"id": "a\u2028b"}  # a line separator to Python, an ordinary character to JSON
    path.write_text(json.dumps(TWO_TURNS) + "\n\n" + json.dumps(odd, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(read_conversations(path)) == 2 and len(read_conversations(path, limit=1)) == 1
    path.write_text("{\n" + json.dumps(TWO_TURNS) + "\n")
    assert len(read_conversations(path)) == 1 and "entry 0: JSONDecodeError" in caplog.text
    path.write_text("{\n")
    with pytest.raises(UserError, match="entry 0: JSONDecodeError"):
        read_conversations(path)
    with pytest.raises(UserError, match="no conversation file"):
        read_conversations(tmp_path / "nope.json")
