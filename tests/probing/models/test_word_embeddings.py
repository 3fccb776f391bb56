"""Words as rows of the input embeddings."""

import pytest
import torch

from probing.models.word_embeddings import word_ids, word_vectors
from probing.utils.errors import UserError
from tests.helpers import tiny


def test_word_is_the_mean_of_its_token_embeddings():
    tokenizer = tiny.tokenizer()
    embeddings = torch.randn(len(tokenizer), 6)
    whole = tokenizer("a red cube", add_special_tokens=False).input_ids
    cube = word_ids(tokenizer, "cube")
    assert cube and cube == whole[-len(cube) :]
    both = word_vectors(tokenizer, embeddings, ["cube", "red cube"])
    torch.testing.assert_close(both[0], embeddings[cube].mean(dim=0))
    assert both.shape == (2, 6) and not torch.equal(both[0], both[1])


def test_an_empty_word_is_refused():
    with pytest.raises(UserError, match="makes no tokens of ''"):
        word_ids(tiny.tokenizer(), "")
