"""Probe banks: build, save, load."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import save_file

from probing.models.base import FINAL, Layer, layer_name, layer_ranges
from probing.probes.resampler import Resampler, ResamplerConfig
from probing.recipe import ProbeRecipe
from probing.utils.errors import UserError, require_probes
from probing.utils.files import reading
from probing.utils.hub import download, hub_errors
from probing.utils.notebook import table
from probing.utils.paths import local_path
from probing.utils.units import si

if TYPE_CHECKING:
    from probing.teachers import Teacher

RETRAIN_ADVICE = "put it back, or train the probes again"
LAYER_CONVENTION = (
    "0 = embedded input sequence; k = after decoder block k, before any final norm; final = after the final norm"
)
"""Meaning of layer numbers; banks with another convention are refused."""


@dataclass(frozen=True, order=True)
class ProbeKey:
    """Identifies a probe by teacher, layer and seed."""

    teacher: str
    layer: Layer
    seed: int

    @property
    def prefix(self) -> str:
        """Prefix of its tensor names in files."""
        return f"seed_{self.seed}.layer_{layer_name(self.layer)}."


def _initial_seed(key: ProbeKey) -> int:
    """Returns a separate seed per probe, so that training more probes changes none of them."""
    text = f"{key.seed}/{key.teacher}/{layer_name(key.layer)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def probe_configs(probe: ProbeRecipe, key_width: int, teachers: Mapping[str, "Teacher"]) -> dict[str, ResamplerConfig]:
    """Returns the sizes of one layer's probes by teacher; `key_width` is the width of the hidden states."""
    return {
        name: ResamplerConfig(
            key_width=key_width,
            queries=teacher.shape[0],
            width=teacher.shape[1],
            output_width=teacher.shape[1],
            heads=probe.heads,
            dim_head=probe.dim_head,
            ff_mult=probe.ff_mult,
        )
        for name, teacher in teachers.items()
    }


@dataclass
class ProbeBank:
    """The probes of all teachers, layers and seeds of one control.

    Attributes:
        probes: by teacher, layer and seed.
        keys: kinds of tokens that a teacher's probes attend to.
    """

    probes: dict[ProbeKey, Resampler]
    keys: dict[str, list[str]]

    def __repr__(self) -> str:
        teachers = {teacher: layer_ranges(layers) for teacher, layers in self._seeds().items()}
        count = si(sum(parameter.numel() for parameter in self.parameters()), "").strip()
        listed = ", ".join(f"{teacher} at {layers}" for teacher, layers in teachers.items())
        return f"ProbeBank({len(self.probes)} probes, {count} parameters: {listed})"

    def _repr_html_(self) -> str:
        seeds = self._seeds()
        layers = list(dict.fromkeys(layer for of_teacher in seeds.values() for layer in of_teacher))
        layers.sort(key=lambda layer: (layer == FINAL, layer))
        rows = [(name, *(of_teacher.get(layer, "") for layer in layers)) for name, of_teacher in seeds.items()]
        return table("number of probes by teacher and layer", rows, ("teacher", *map(layer_name, layers)))

    def _seeds(self) -> dict[str, dict[Layer, int]]:
        """Returns the number of probes of each teacher and layer."""
        counts: dict[str, dict[Layer, int]] = {}
        for key in self.probes:
            of_teacher = counts.setdefault(key.teacher, {})
            of_teacher[key.layer] = of_teacher.get(key.layer, 0) + 1
        return counts

    @classmethod
    def build(
        cls,
        configs: dict[str, ResamplerConfig],
        layers: Iterable[Layer],
        seeds: Iterable[int],
        keys: Sequence[str],
        device: torch.device,
    ) -> "ProbeBank":
        """Initialises one resampler per teacher, layer and seed; all attend to the same kinds of tokens."""
        layers, seeds, probes = list(layers), list(seeds), {}
        for teacher, config in configs.items():
            for layer in layers:
                for seed in seeds:
                    key = ProbeKey(teacher, layer, seed)
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(_initial_seed(key))
                        probes[key] = Resampler(config).to(device)
        return cls(probes, {teacher: list(keys) for teacher in configs})

    def at(self, layer: Layer) -> Iterator[tuple[ProbeKey, Resampler]]:
        """Yields the probes of one layer."""
        return ((key, probe) for key, probe in self.probes.items() if key.layer == layer)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yields the parameters of all probes, in a fixed order."""
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
                "keys": self.keys[teacher],
                "tensor_prefix": "seed_{seed}.layer_{layer}.",
                "layer_convention": LAYER_CONVENTION,
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
        """Reads the requested probes.

        Args:
            folder: written by `save`.
            device: device of the probes.
            teachers: names; by default all.
            layers: comma-separated layer names; by default all.

        Raises:
            UserError: a teacher is not in the folder, or has none of the layers.
        """
        probes: dict[ProbeKey, Resampler] = {}
        keys: dict[str, list[str]] = {}
        for teacher in teachers if teachers is not None else bank_teachers(folder):
            config = bank_config(folder, teacher)
            keys[teacher] = config["keys"]
            requested = config["layers"] if layers is None else layers.split(",")
            chosen = [layer for layer in requested if layer in config["layers"]]
            if not chosen:
                raise UserError(f"{folder / teacher} has no layer {layers}; it has {', '.join(config['layers'])}")
            weights = folder / teacher / "model.safetensors"
            with reading(weights, RETRAIN_ADVICE), safe_open(weights, framework="pt") as file:
                for text in chosen:
                    for seed in config["seeds"]:
                        key = ProbeKey(teacher, text if text == FINAL else int(text), seed)
                        probe = Resampler(ResamplerConfig(**config["resampler"]))
                        state = {name: file.get_tensor(key.prefix + name) for name in probe.state_dict()}
                        probe.load_state_dict(state)
                        probes[key] = probe.to(device).eval().requires_grad_(False)
        return cls(probes, keys)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `probes/<teacher>/config.json` and `probes/<teacher>/model.safetensors` below a folder."""
        self.save(Path(folder) / "probes", {})

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        layer: Layer | Sequence[Layer] | None = None,
        teacher: str | Sequence[str] | None = None,
        device: str = "cpu",
    ) -> "ProbeBank":
        """Reads probes from a run, a folder of `save_pretrained`, or a Hub repository of either.

        Args:
            source: folder or Hub id; of a repository, only the files of these teachers are downloaded.
            layer: one or several, such as `12` or `[0, "final"]`; by default all. Teachers without them are left out.
            teacher: one or several names; by default all.
            device: device of the probes.

        Raises:
            UserError: there are no probes, or none of such a layer or teacher; the Hub is out of reach.
        """
        path = local_path(str(source))
        local = path.is_dir()
        folder = path if local else download(str(source), ["probes/*/config.json"])
        configs = {name: bank_config(folder / "probes", name) for name in bank_teachers(folder / "probes")}
        if not configs:
            raise UserError(f"{source} has no folder probes/; give a run or a folder of save_pretrained")
        names = [*configs] if teacher is None else [teacher] if isinstance(teacher, str) else list(teacher)
        require_probes(source, "teacher", names, configs)
        known = {name: configs[name]["layers"] for name in names}
        layers = None
        if layer is not None:
            chosen = [layer_name(one) for one in ([layer] if isinstance(layer, Layer) else layer)]
            require_probes(source, "layer", chosen, dict.fromkeys(chain(*known.values())))
            names = [name for name in names if not {*chosen}.isdisjoint(known[name])]
            layers = ",".join(chosen)
        if not local:
            download(str(source), [f"probes/{name}/model.safetensors" for name in names], folder.name)
        return cls.load(folder / "probes", torch.device(device), names, layers)

    def push_to_hub(self, repo: str, private: bool = False) -> str:
        """Uploads what `save_pretrained` writes to a Hub repository, created if missing; returns its URL.

        Raises:
            UserError: the Hub is out of reach or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            with hub_errors(repo):
                url = HfApi().create_repo(repo, private=private, exist_ok=True)
                HfApi().upload_folder(repo_id=repo, folder_path=folder)
        return str(url)


def bank_teachers(folder: Path) -> list[str]:
    """Lists the teachers whose probes a folder holds."""
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


def bank_layers(folder: Path) -> dict[str, list[str]]:
    """Returns the layer names of each teacher's probes, which may differ."""
    return {teacher: bank_config(folder, teacher)["layers"] for teacher in bank_teachers(folder)}


def bank_config(folder: Path, teacher: str) -> dict[str, Any]:
    """Reads the configuration of one teacher's probes.

    Raises:
        UserError: there is none, it is not a bank's, or it has another layer convention.
    """
    file = folder / teacher / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        missing = {"resampler", "layers", "seeds", "keys", "layer_convention"} - config.keys()
    except FileNotFoundError:
        raise UserError(f"no probes for {teacher!r} in {folder}; train them with: probing train") from None
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{file} is no JSON object; {RETRAIN_ADVICE}") from None
    if missing:
        raise UserError(f"{file} is no probe bank's: {', '.join(sorted(missing))} is missing; {RETRAIN_ADVICE}")
    if config["layer_convention"] != LAYER_CONVENTION:
        raise UserError(
            f"{file} has the layer convention {config['layer_convention']!r}; only this can be read: {LAYER_CONVENTION}"
        )
    for name, kind in (("resampler", dict), ("layers", list), ("seeds", list), ("keys", list)):
        if not isinstance(config[name], kind):
            raise UserError(f"{file} is no probe bank's: {name} is {config[name]!r}; {RETRAIN_ADVICE}")
    return dict(config)
