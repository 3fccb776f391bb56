"""Finds an LLM's decoder blocks and final norm, whatever its classes call them."""

from typing import Any

from torch import nn

from probing.utils.errors import UserError


def decoder_parts(model: Any) -> tuple[nn.ModuleList, nn.Module]:
    """Returns decoder blocks and final norm of the decoder that a model names itself.

    The blocks are the outermost list with as many modules as the LLM's configuration has layers; the final norm is
    `norm`, or else the last norm next to them: `ln_f`, `final_layernorm`, ….

    Raises:
        UserError: there is no such list, or no norm.
    """
    decoder, count = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    lists = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    llm = f"{type(decoder).__name__}, the LLM of {type(model).__name__},"
    if not lists:
        raise UserError(f"{llm} has no list of {count} decoder blocks; give a checkpoint with another LLM")
    name = min(lists, key=lambda name: name.count("."))
    parent = decoder.get_submodule(name.rpartition(".")[0])
    norms = [module for module in parent.children() if "norm" in type(module).__name__.lower()]
    norm = getattr(parent, "norm", None)
    if not isinstance(norm, nn.Module):
        if not norms:
            raise UserError(f"{llm} has no final norm next to its blocks; give a checkpoint with another LLM")
        norm = norms[-1]
    return lists[name], norm
