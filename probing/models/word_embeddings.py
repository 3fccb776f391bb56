"""Words as an LLM takes them in: rows of its input embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probing.utils.errors import UserError


def word_ids(tokenizer: Any, word: str) -> list[int]:
    """Token ids of a word, or several, as they stand inside a sentence.

    Tokenizers write a word at the start of a text and after a space differently, and not all in the same way; so it is
    put behind another.

    Raises:
        UserError: the tokenizer makes nothing of it.
    """
    before = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer(f"a {word}", add_special_tokens=False).input_ids[len(before) :]
    ids = [number for number in ids if tokenizer.decode([number]).strip()]  # some give the space a token of its own
    if not ids:
        raise UserError(f"the tokenizer makes no tokens of {word!r}")
    return ids


def word_vectors(tokenizer: Any, embeddings: Tensor, words: Sequence[str]) -> Tensor:
    """A vector for every word: the mean of the rows of its tokens (as in arXiv:2410.02762's released code).

    Args:
        tokenizer: of the LLM.
        embeddings: its input embeddings, (vocabulary, H).
        words: words, or phrases.

    Returns:
        (words, H), float32.
    """
    return torch.stack([embeddings[word_ids(tokenizer, word)].float().mean(dim=0) for word in words])
