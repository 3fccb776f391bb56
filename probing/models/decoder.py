"""Where an LLM's decoder blocks and final norm are, whatever its classes call them."""

from typing import Any

from torch import nn

from probing.utils.errors import UserError


def decoder_parts(model: Any) -> tuple[nn.ModuleList, nn.Module]:
    """Finds decoder blocks and final norm in the decoder that a model names itself.

    The blocks are the outermost list of as many modules as the LLM is configured to have layers; the final norm is
    `norm`, or else the last norm next to them: `ln_f`, `final_layernorm`, ….

    Raises:
        UserError: there is no such list, or no norm.
    """
    decoder, count = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    what = f"{type(decoder).__name__}, the LLM of {type(model).__name__},"
    if not lists:
        raise UserError(f"{what} has no list of {count} decoder blocks; its layers cannot be read")
    name, blocks = min(lists, key=lambda one: one[0].count("."))
    around = decoder.get_submodule(name.rpartition(".")[0])
    norms = [module for module in around.children() if "norm" in type(module).__name__.lower()]
    norm = getattr(around, "norm", None)
    if not isinstance(norm, nn.Module):
        if not norms:
            raise UserError(f"{what} has no final norm next to its decoder blocks; its layers cannot be read")
        norm = norms[-1]
    return blocks, norm
