"""The probes of a run: build, save, load."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from probing.backbones.base import FINAL, Layer, layer_name
from probing.errors import UserError
from probing.resampler import Resampler, ResamplerConfig


@dataclass(frozen=True, order=True)
class ProbeKey:
    """Which probe: a teacher, a layer, a seed."""

    teacher: str
    layer: Layer
    seed: int

    @property
    def prefix(self) -> str:
        """Prefix of its tensors in a file."""
        return f"seed_{self.seed}.layer_{layer_name(self.layer)}."


def _initial_seed(key: ProbeKey) -> int:
    """A seed of its own for every probe, so that training more probes changes none of them."""
    text = f"{key.seed}/{key.teacher}/{layer_name(key.layer)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


@dataclass
class ProbeBank:
    """Probes of all (teacher, layer, seed) of one arm of a run."""

    probes: dict[ProbeKey, Resampler]

    @classmethod
    def build(
        cls, configs: dict[str, ResamplerConfig], layers: Iterable[Layer], seeds: Iterable[int], device: torch.device
    ) -> "ProbeBank":
        """Fresh probes, one resampler per teacher, layer and seed."""
        layers, seeds, probes = list(layers), list(seeds), {}
        for teacher, config in configs.items():
            for layer in layers:
                for seed in seeds:
                    key = ProbeKey(teacher, layer, seed)
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(_initial_seed(key))
                        probes[key] = Resampler(config).to(device)
        return cls(probes)

    def at(self, layer: Layer) -> Iterator[tuple[ProbeKey, Resampler]]:
        """The probes of one layer."""
        return ((key, probe) for key, probe in self.probes.items() if key.layer == layer)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of all probes, in a fixed order."""
        for probe in self.probes.values():
            yield from probe.parameters()

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes `<teacher>/config.json` and `<teacher>/model.safetensors` below a folder."""
        for teacher in dict.fromkeys(key.teacher for key in self.probes):
            chosen = {key: probe for key, probe in self.probes.items() if key.teacher == teacher}
            config = {
                "probe": "perceiver-resampler",
                "resampler": next(iter(chosen.values())).config.to_dict(),
                "layers": list(dict.fromkeys(layer_name(key.layer) for key in chosen)),
                "seeds": list(dict.fromkeys(key.seed for key in chosen)),
                "tensor_prefix": "seed_{seed}.layer_{layer}.",
                "layer_convention": "0 = embedded input sequence; k = after decoder block k, before any final norm; "
                "final = after the final norm",
                **provenance,
                "teacher": provenance.get("teachers", {}).get(teacher, teacher),
            }
            config.pop("teachers", None)
            (folder / teacher).mkdir(parents=True, exist_ok=True)
            tensors = {
                key.prefix + name: tensor.detach().cpu().contiguous()
                for key, probe in chosen.items()
                for name, tensor in probe.state_dict().items()
            }
            save_file(tensors, folder / teacher / "model.safetensors", metadata={"format": "pt"})
            (folder / teacher / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, folder: Path, device: torch.device, teachers: Iterable[str] | None = None, layers: str | None = None
    ) -> "ProbeBank":
        """Reads probes, only those asked for.

        Args:
            folder: written by `save`.
            device: where to put them.
            teachers: names; by default every sub-folder.
            layers: comma-separated layer names; by default all.

        Raises:
            UserError: a teacher or layer is not in the folder.
        """
        names = list(teachers) if teachers is not None else sorted(p.name for p in folder.iterdir() if p.is_dir())
        probes: dict[ProbeKey, Resampler] = {}
        for teacher in names:
            try:
                config = json.loads((folder / teacher / "config.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise UserError(f"no probes for {teacher!r} in {folder}; train them with: probing train") from None
            chosen = config["layers"] if layers is None else layers.split(",")
            with safe_open(folder / teacher / "model.safetensors", framework="pt") as file:
                for text in chosen:
                    if text not in config["layers"]:
                        raise UserError(f"{folder / teacher} has no layer {text}; it has {', '.join(config['layers'])}")
                    for seed in config["seeds"]:
                        key = ProbeKey(teacher, text if text == FINAL else int(text), seed)
                        probe = Resampler(ResamplerConfig(**config["resampler"]))
                        state = {name: file.get_tensor(key.prefix + name) for name in probe.state_dict()}
                        probe.load_state_dict(state)
                        probes[key] = probe.to(device).eval().requires_grad_(False)
        return cls(probes)
