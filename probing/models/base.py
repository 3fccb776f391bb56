"""A loaded checkpoint with the one interface that all other code uses.

Layer 0 is the embedded input sequence (projector output in place), layer k the state after decoder block k before any
final norm, layer L the state after the last block; ``final`` is the state after the final norm.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from probing.models.token_map import TokenMap
from probing.recipe import BackboneRecipe
from probing.utils.errors import UserError
from probing.utils.notebook import table
from probing.utils.units import si

Layer = int | str
FINAL = "final"
Callback = Callable[[Layer, Tensor], None]


def layer_name(layer: Layer) -> str:
    """Returns `0` … `L`, or `final`, as results and files write it."""
    return str(layer)


def layer_ranges(layers: Collection[Layer]) -> str:
    """Returns layers, or their names, as `parse_layers` reads them, e.g. `2-4,final`."""
    ranges: list[list[int]] = []
    for number in sorted(int(layer) for layer in layers if layer != FINAL):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    names = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in ranges]
    return ",".join(names + [FINAL] * (FINAL in layers))


def parse_layers(text: str, count: int) -> list[Layer]:
    """Reads a layer selection such as `all`, `0,4,8-12`, `all,final`, of L = `count` decoder blocks.

    Returns:
        Distinct layers in ascending order, `final` last.

    Raises:
        UserError: a part is not a layer, or out of range.
    """
    chosen: set[int] = set()
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        first, dash, last = part.partition("-")
        if part == "all":
            chosen.update(range(count + 1))
        elif len(part) < 20 and first.isdecimal() and (last.isdecimal() if dash else True):
            start, stop = int(first), int(last or first)
            if start > stop:
                raise UserError(f"layers {part!r} run backwards; write {stop}-{start}")
            if stop > count:
                raise UserError(f"layer {stop} is out of range: this checkpoint has layers 0 to {count}, and 'final'")
            chosen.update(range(start, stop + 1))
        elif part != FINAL:
            raise UserError(
                f"cannot read layers {part[:40]!r}; write 'all', '0,4,8-12' or 'final' (range 0 to {count})"
            )
    return [*sorted(chosen), *([FINAL] if FINAL in parts else [])]


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    Attributes:
        inputs: the model's arguments.
        tokens: what each position of the sequences is.
    """

    inputs: dict[str, Tensor]
    tokens: TokenMap

    def to(self, device: torch.device) -> "Batch":
        """Returns a copy with its inputs on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Returns a copy in page-locked memory, for the data loader."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch({name: move(tensor) for name, tensor in self.inputs.items()}, self.tokens)


class InputProcessor(Protocol):
    """Turns images into a `Batch` on the CPU, with the checkpoint's own processor and chat template.

    It holds no weights, so data-loader workers can carry it.
    """

    @property
    def processor(self) -> Any:
        """The checkpoint's processor of transformers."""

    @property
    def text(self) -> str:
        """The rendered prompt that every sequence carries."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens of a square image."""

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str] | None = None, /) -> Batch:
        """Prepares a batch of RGB images; `texts` replace the prompt, one for each."""

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the model's arguments for images at their own size and one rendered prompt each."""


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
        prepare: see `Backbone.prepare`; a multi-encoder's may be the inner LLaVA's.
    """

    name: str
    path: str
    family: str
    sha256: str
    layers: int
    hidden_size: int
    prompt: str
    prepare: Any = field(default=None, repr=False, compare=False)


class _DeepestLayerReached(Exception):
    pass


@dataclass
class Backbone:
    """A checkpoint that gives hidden states.

    Attributes:
        name: short name for tables and legends.
        source: folder or Hub id.
        family: model type, e.g. `llava`.
        core: the model without its `lm_head`.
        blocks: the LLM's decoder blocks.
        norm: the LLM's final norm.
        hidden_size: width H of the LLM.
        prepare: images (RGB) → `Batch`.
        sha256: identifies the weights.
        words: input embeddings of the LLM.
        projector: between vision tower and LLM; None if the family's is not known.
        head: the LLM's output embeddings, final state → logits; None unless loaded `with_head`.
        writer: the whole model, whose `generate` answers questions; None unless loaded `with_head`.
    """

    name: str
    source: str
    family: str
    core: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module
    hidden_size: int
    prepare: InputProcessor
    sha256: str
    words: nn.Module | None = None
    projector: nn.Module | None = None
    head: nn.Module | None = None
    writer: Any = None

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {size}" for name, _, size, _ in self._parts())
        return f"Backbone({self.name}: {self.family}, layers 0-{self.layers},final; {parts})"

    def _repr_html_(self) -> str:
        title = f"{self.name}: {self.family}, layers 0 to {self.layers} and final, width {self.hidden_size}"
        return table(title, self._parts(), ("part", "class", "parameters", "memory"))

    def _parts(self) -> list[tuple[str, str, str, str]]:
        """Returns name, class, number of parameters and bytes of each part."""
        modules = {**dict(self.core.named_children()), **({"lm_head": self.head} if self.head else {})}
        rows = []
        for name, module in modules.items():
            parameters = list(module.parameters())
            size = sum(one.numel() * one.element_size() for one in parameters)
            count = si(sum(one.numel() for one in parameters), "").strip()
            rows.append((name, type(module).__name__, count, si(size, "B")))
        return rows

    @property
    def layers(self) -> int:
        """Number L of decoder blocks."""
        return len(self.blocks)

    @property
    def identity(self) -> Identity:
        """Which checkpoint this is."""
        names = (self.name, self.source, self.family, self.sha256)
        return Identity(*names, self.layers, self.hidden_size, self.prepare.text, self.prepare)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next(self.core.parameters()).device

    def stream(self, batch: Batch, layers: Sequence[Layer], callback: Callback) -> None:
        """Runs one forward pass and hands over each chosen layer's state as soon as it exists.

        `callback(layer, state)` gets the state (B, T, H) in the backbone's dtype, with gradients enabled, and must not
        store it: that way memory does not grow with the number of layers. The pass ends after the deepest chosen
        layer; no logits are computed.

        Args:
            batch: from `prepare`, on the backbone's device.
            layers: chosen layers, each at most once.
            callback: called once per layer, in ascending order.

        Raises:
            RuntimeError: a layer was not reached exactly once, or its state is not (B, T, H).
        """
        expected, pending = (*batch.tokens.kinds.shape, self.hidden_size), set(layers)

        def emit(layer: Layer, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if not isinstance(state, Tensor) or tuple(state.shape) != expected:
                got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
                raise RuntimeError(f"layer {layer} of {self.name} gave {got}, expected {expected}")
            if layer not in pending:
                raise RuntimeError(f"layer {layer} of {self.name} ran twice in one forward pass")
            pending.remove(layer)
            with torch.enable_grad():
                callback(layer, state.detach())
            if not pending:
                raise _DeepestLayerReached

        def emit_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            emit(0, args[0] if args else kwargs["hidden_states"])

        def emit_output(layer: Layer) -> Callable[..., None]:
            return lambda module, args, output: emit(layer, output)

        handles = []
        try:
            for layer in layers:
                if layer == 0:
                    handles.append(self.blocks[0].register_forward_pre_hook(emit_input, with_kwargs=True))
                else:
                    module = self.norm if layer == FINAL else self.blocks[int(layer) - 1]
                    handles.append(module.register_forward_hook(emit_output(layer)))
            with torch.no_grad():
                self.core(**batch.inputs, use_cache=False)
        except _DeepestLayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if pending:
            raise RuntimeError(f"{self.name}: layers {sorted(map(str, pending))} were never reached")

    def hidden_states(self, images: Sequence[Any], layers: str = "all") -> tuple[dict[Layer, Tensor], TokenMap]:
        """Returns hidden states {layer: (B, T, H)} of a few RGB images, and their token map; for notebooks.

        A notebook shows the token map over the first image.

        `layers` is a selection as in `parse_layers`. For data sets, use `stream`.
        """
        batch = self.prepare(images).to(self.device)
        states: dict[Layer, Tensor] = {}
        self.stream(batch, parse_layers(layers, self.layers), states.__setitem__)
        return states, replace(batch.tokens, picture=images[0])


class Family(Protocol):
    """What a file of a checkpoint family defines at its top level; `read_config(source, recipe)` is optional."""

    MODEL_TYPE: str  # in config.json

    def make_inputs(self, source: str, config: Any, recipe: BackboneRecipe) -> InputProcessor:
        """Builds the input side from the checkpoint's processor, without weights."""

    def load(
        self, source: str, config: Any, recipe: BackboneRecipe, device: torch.device, random_seed: int | None
    ) -> Backbone:
        """Loads the checkpoint; see `load_backbone`."""

    def describe(self, config: Any, inputs: Any) -> dict[str, Any]:
        """Describes the checkpoint for `probing inspect`, without weights."""
