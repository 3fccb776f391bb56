"""A loaded checkpoint behind the one interface that the rest of the code sees.

Layer convention: layer 0 is the embedded input sequence (projector output in place), layer k the state after decoder
block k before any final norm, layer L the state after the last block; ``final`` is the state after the final norm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from probing.models.token_map import IMAGE_KINDS, TokenMap
from probing.utils.errors import UserError

Layer = int | str
FINAL = "final"
PIXELS = ("pixel_", "teacher_pixels.")
"""How inputs begin that hold the image itself."""
Visit = Callable[[Layer, Tensor], None]


def layer_name(layer: Layer) -> str:
    """`0` … `L`, or `final`, as results and files write it."""
    return str(layer)


def parse_layers(text: str, count: int) -> list[Layer]:
    """Reads a layer selection such as `all`, `0,4,8-12`, `all,final`.

    Args:
        text: the selection.
        count: number L of decoder blocks.

    Returns:
        Distinct layers in ascending order, `final` last.

    Raises:
        UserError: a part is not a layer, or out of range.
    """
    chosen: set[int] = set()
    final = False
    for part in (p.strip() for p in text.split(",")):
        first, dash, last = part.partition("-")
        if part == "all":
            chosen.update(range(count + 1))
        elif part == FINAL:
            final = True
        elif len(part) < 20 and first.isdecimal() and (last.isdecimal() if dash else True):
            start, stop = int(first), int(last or first)
            if start > stop:
                raise UserError(f"layers {part!r} run backwards; write {stop}-{start}")
            if stop > count:
                raise UserError(f"layer {stop} is out of range: this checkpoint has layers 0 to {count}, and 'final'")
            chosen.update(range(start, stop + 1))
        else:
            raise UserError(
                f"cannot read layers {part[:40]!r}; write 'all', '0,4,8-12' or 'final' (range 0 to {count})"
            )
    return [*sorted(chosen), *([FINAL] if final else [])]


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    Attributes:
        inputs: the checkpoint's own.
        tokens: where everything is in the sequence.
        embedded: (B, N, H), inputs of the LLM at the image's tokens, where they are known and no tower has to run.
    """

    inputs: dict[str, Tensor]
    tokens: TokenMap
    embedded: Tensor | None = None

    def with_embedded(self, features: Tensor) -> "Batch":
        """The same images, of which the LLM's inputs (B, N, H) are known; the pixels are left out."""
        inputs = {name: tensor for name, tensor in self.inputs.items() if not name.startswith(PIXELS)}
        return Batch(inputs, self.tokens, features)

    def to(self, device: torch.device) -> "Batch":
        """A copy on a device."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, for the data loader."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        inputs = {name: move(tensor) for name, tensor in self.inputs.items()}
        tokens = replace(self.tokens, kinds=move(self.tokens.kinds))
        return Batch(inputs, tokens, None if self.embedded is None else move(self.embedded))


class _DeepestLayerReached(Exception):
    pass


@dataclass(frozen=True)
class Identity:
    """Which checkpoint it is.

    Attributes:
        name: short name for tables and legends.
        path: folder or Hub id.
        family: model type, e.g. `llava`.
        sha256: identifies the weights.
        layers: number L of decoder blocks.
        hidden_size: width H of the LLM.
        prompt: the text that every sequence carries.
        prepare: the input side, see `Backbone.prepare`; of several encoders it may be the LLaVA's own.
    """

    name: str
    path: str
    family: str
    sha256: str
    layers: int
    hidden_size: int
    prompt: str
    prepare: Any = field(default=None, repr=False, compare=False)


@dataclass
class Backbone:
    """A checkpoint ready to be asked for hidden states.

    Attributes:
        name: short name for tables and legends.
        source: folder or Hub id.
        family: model type, e.g. `llava`.
        core: the model without its `lm_head`.
        blocks: the LLM's decoder blocks.
        norm: the LLM's final norm.
        hidden_size: width H of the LLM.
        prepare: images (RGB) → `Batch` on the CPU, through the checkpoint's own processor and chat template. Holds no
            weights, so data-loader workers can carry it.
        sha256: identifies the weights.
        words: input embeddings of the LLM.
        projector: between vision tower and LLM; None where the family's is not known.
        head: the LLM's output embeddings, state after the final norm → logits; None unless it was asked for.
        writer: the whole model, whose `generate` answers questions; None unless the head was asked for.
    """

    name: str
    source: str
    family: str
    core: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module
    hidden_size: int
    prepare: Callable[[Sequence[Any]], Batch]
    sha256: str
    words: nn.Module | None = None
    projector: nn.Module | None = None
    head: nn.Module | None = None
    writer: Any = None

    @property
    def layers(self) -> int:
        """Number L of decoder blocks."""
        return len(self.blocks)

    @property
    def identity(self) -> Identity:
        """Which checkpoint this is."""
        text = getattr(self.prepare, "text", "")
        names = (self.name, self.source, self.family, self.sha256)
        return Identity(*names, self.layers, self.hidden_size, text, self.prepare)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next(self.core.parameters()).device

    def stream(self, batch: Batch, layers: Sequence[Layer], visit: Visit) -> None:
        """Runs one forward pass and hands over each chosen layer's state as soon as it exists.

        `visit(layer, state)` gets the state (B, T, H) in the backbone's dtype, with gradients enabled, and must not
        keep it: that way memory does not grow with the number of layers. The pass ends after the deepest chosen
        layer; no logits are computed.

        Args:
            batch: from `prepare`, on the backbone's device.
            layers: chosen layers, each at most once.
            visit: called once per layer, in ascending order.

        Raises:
            RuntimeError: a layer was not reached exactly once, or its state is not (B, T, H).
        """
        expected = (*batch.tokens.kinds.shape, self.hidden_size)
        pending = set(layers)
        visited: list[Layer] = []

        def deliver(layer: Layer, value: Any) -> None:
            state = value[0] if isinstance(value, tuple) else value
            if not isinstance(state, Tensor) or tuple(state.shape) != expected:
                got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
                raise RuntimeError(f"layer {layer} of {self.name} gave {got}, expected {expected}")
            if layer not in pending:
                raise RuntimeError(f"layer {layer} of {self.name} ran twice in one forward pass")
            pending.remove(layer)
            visited.append(layer)
            with torch.enable_grad():
                visit(layer, state.detach())
            if not pending:
                raise _DeepestLayerReached

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            deliver(0, args[0] if args else kwargs["hidden_states"])

        def on_output(layer: Layer) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                deliver(layer, output)

            return hook

        def put_image(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            assert batch.embedded is not None
            states = (args[0] if args else kwargs["hidden_states"]).clone()
            states[batch.tokens.mask(*IMAGE_KINDS)] = batch.embedded.to(states).flatten(0, 1)
            return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

        handles = []
        try:
            if batch.embedded is not None:
                handles.append(self.blocks[0].register_forward_pre_hook(put_image, with_kwargs=True))
            for layer in layers:
                if layer == 0:
                    handles.append(self.blocks[0].register_forward_pre_hook(on_input, with_kwargs=True))
                elif layer == FINAL:
                    handles.append(self.norm.register_forward_hook(on_output(FINAL)))
                else:
                    handles.append(self.blocks[int(layer) - 1].register_forward_hook(on_output(layer)))
            with torch.no_grad():
                self.core(**batch.inputs, use_cache=False)
        except _DeepestLayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if pending:
            raise RuntimeError(f"{self.name}: layers {sorted(map(str, pending))} were never reached")

    def embed_images(self, batch: Batch) -> Tensor:
        """What vision tower and projector make of images: the LLM's inputs (B, N, H) at the image's tokens.

        Args:
            batch: as for `stream`; images with as many tokens each.
        """
        found: list[Tensor] = []
        self.stream(batch, [0], lambda _, state: found.append(state))
        return found[0][batch.tokens.mask(*IMAGE_KINDS)].view(len(found[0]), -1, self.hidden_size)

    def hidden_states(self, images: Sequence[Any], layers: str = "all") -> tuple[dict[Layer, Tensor], TokenMap]:
        """Hidden states of a few images, all kept: for notebooks; `stream` is for data sets.

        Args:
            images: RGB images.
            layers: selection as in `parse_layers`.

        Returns:
            {layer: (B, T, H)} on the backbone's device, and the token map.
        """
        batch = self.prepare(images).to(self.device)
        states: dict[Layer, Tensor] = {}
        self.stream(batch, parse_layers(layers, self.layers), states.__setitem__)
        return states, batch.tokens
