"""Vectors of words: rows of an LLM's input embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probing.utils.errors import UserError


def word_ids(tokenizer: Any, word: str) -> list[int]:
    """Returns the token ids of one or several words within a sentence.

    They are tokenized after another word, because tokenizers treat the start of a text differently.

    Raises:
        UserError: there are none.
    """
    before = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer(f"a {word}", add_special_tokens=False).input_ids[len(before) :]
    ids = [number for number in ids if tokenizer.decode([number]).strip()]  # the space may be a token by itself
    if not ids:
        raise UserError(f"the tokenizer makes no tokens of {word!r}; give another word")
    return ids


def word_vectors(tokenizer: Any, embeddings: Tensor, words: Sequence[str]) -> Tensor:
    """Returns the mean embedding of each word's tokens (as in arXiv:2410.02762's released code).

    Args:
        tokenizer: of the LLM.
        embeddings: its input embeddings, (vocabulary, H).
        words: words or phrases.

    Returns:
        (words, H), float32.
    """
    return torch.stack([embeddings[word_ids(tokenizer, word)].float().mean(dim=0) for word in words])
