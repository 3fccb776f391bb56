"""The random-weights control: the same network with its LLM and projector re-initialised."""

from typing import Any

import torch
from accelerate import dispatch_model

from probing.utils.errors import UserError


def with_random_weights(model: Any, seed: int) -> Any:
    """Re-initialises a model's weights, except those of the vision tower that the model names itself.

    A model that `device_map` has placed, or spread over devices, is placed likewise again.

    Raises:
        UserError: it names no tower, or parts of it are on disk.
    """
    tower, places = model.get_encoder("image"), getattr(model, "hf_device_map", None)
    if tower is model:
        raise UserError(f"{type(model).__name__} names no vision tower to preserve; leave out the control `random`")
    if places and "disk" in places.values():
        raise UserError("random weights cannot be offloaded to disk; free memory, or leave out the control `random`")
    model.set_encoder(torch.nn.Identity(), "image")
    if not getattr(model, "is_quantized", False):  # those cannot be moved
        torch.nn.Module.to(model, "meta")  # frees its memory before the second model is made
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)._from_config(model.config, dtype=model.dtype)
    fresh.set_encoder(tower, "image")
    return dispatch_model(fresh, places) if places else fresh.to(next(tower.parameters()).device)
