"""`probing doctor`: what this machine has, what is missing for which verb, and what is broken.

Nothing is changed, and nothing takes longer than a few seconds: the Hub has three of them to answer.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from probing.utils.cache_dir import cache_folder
from probing.utils.reach import ask_hub, within

PACKAGE = "mllm-probing"
SHOWN = ("torch", "torchvision", "transformers", "accelerate", "timm", "safetensors", "numpy")
OPTIONAL = {
    "diffusers": ("images generated from probes: probing evaluate --metric fid|frechet", "mllm-probing[decode]"),
    "pytorch_fid": ("the usual network for FID: probing evaluate --metric fid", "mllm-probing[decode]"),
    "bitsandbytes": ("checkpoints in 8 or 4 bits: backbone.quantization_config", "bitsandbytes"),
    "deepspeed": ("probing distill on several GPUs with trainer.deepspeed (FSDP needs nothing more)", "deepspeed"),
}
"""Modules that some verbs need: what for, and what pip installs them."""
HUB_SECONDS = 3.0
ROOM = 5e9
"""Bytes below which a cache folder is called short of room."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        about: what was looked at.
        text: what was found.
        level: `ok`; `note` for what is worth knowing; `broken` for what the user must mend before the toolkit works.
    """

    about: str
    text: str
    level: Literal["ok", "note", "broken"] = "ok"


def examine() -> list[Finding]:
    """Looks at everything, the cheapest things first."""
    return [
        *_packages(),
        *_requirements(),
        *_imports(),
        *_devices(),
        *_optional(),
        *_hub(),
        *_folders(),
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    yield Finding("Python", f"{platform.python_version()} ({sys.executable}), {platform.platform(terse=True)}")
    found = {name: _version(name) for name in (PACKAGE, *SHOWN)}
    yield Finding("packages", ", ".join(f"{name} {version}" for name, version in found.items() if version))


def _requirements() -> Iterator[Finding]:
    """Versions that the package asks for, and that what it installs asks for in turn, as `pip check` looks at them."""
    todo, seen = [PACKAGE], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, asked):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            there, other = _version(requirement.name), requirement.name.lower().replace("_", "-")
            if there is None:
                yield _misfit(name, requirement, "not installed")
            elif not requirement.specifier.contains(there, prereleases=True):
                yield _misfit(name, requirement, f"{there} is installed")
            elif other not in seen and other not in todo:
                todo.append(other)


def _misfit(package: str, requirement: Requirement, there: str) -> Finding:
    """A requirement that is not met; torch and torchvision are upgraded together or not at all."""
    wanted = f"{requirement.name}{requirement.specifier}"
    if {package, requirement.name} == {"torchvision", "torch"}:
        pair = Version(_version("torch") or "0")
        mend = (
            f"type: pip install 'torch=={pair.public}' torchvision (in one command, so that pip chooses the one of "
            "that torch), or pip install -c constraints.txt -e . for the tested pair"
        )
    else:
        mend = f"type: pip install '{wanted}'"
    return Finding("packages", f"{package} needs {wanted}, {there}; {mend}", "broken")


def _imports() -> Iterator[Finding]:
    """Imports what every run imports: a torchvision that does not fit torch shows itself here, and nowhere else."""
    for module, names in (
        ("torch", ()),
        ("probing.utils.torchvision_shim", ()),
        ("torchvision", ()),
        ("timm", ()),
        ("transformers", ("LlavaForConditionalGeneration", "OneFormerForUniversalSegmentation", "CLIPImageProcessor")),
    ):
        try:
            loaded = importlib.import_module(module)
            for name in names:
                getattr(loaded, name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            yield Finding(
                "imports",
                f"{module} cannot be imported ({said}); type: pip install --force-reinstall -c constraints.txt -e .",
                "broken",
            )
            return
    from probing.utils.torchvision_shim import native_torchvision

    if not native_torchvision():
        yield Finding("torchvision", "its native operators do not fit this torch; nothing here needs them", "note")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError):
        return  # told by _imports
    memory = _memory()
    free = f", {memory[0] / 1e9:.0f} of {memory[1] / 1e9:.0f} GB of memory free" if memory else ""
    yield Finding("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads{free}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            try:
                left, whole = torch.cuda.mem_get_info(index)
            except RuntimeError as error:
                yield Finding(f"GPU {index}", f"cannot be used: {str(error).splitlines()[0]}", "broken")
                continue
            bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
            name = torch.cuda.get_device_name(index)
            yield Finding(f"GPU {index}", f"{name}, {left / 1e9:.0f} of {whole / 1e9:.0f} GB free, {bf16} bfloat16")
    elif torch.accelerator.is_available():
        yield Finding("accelerator", str(torch.accelerator.current_accelerator()))
    elif shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        build = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else (
            f"torch {torch.__version__} is built without CUDA"
        )  # fmt: skip
        yield Finding(
            "GPU", f"there is one, which torch cannot use ({build}); look at the driver, or install another", "note"
        )
    else:
        yield Finding("GPU", "none: fine for probing demo and tiny checkpoints; a 7B checkpoint wants one", "note")


def _memory() -> tuple[int, int] | None:
    """Free and whole memory in bytes, where the system tells it as Linux does."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return values["MemAvailable"], values["MemTotal"]
    except (OSError, ValueError, LookupError):
        return None


def _optional() -> Iterator[Finding]:
    for module, (purpose, package) in OPTIONAL.items():
        if importlib.util.find_spec(module):
            yield Finding("optional", f"{module} is there, for {purpose}")
        else:
            yield Finding("optional", f"{module} is missing, for {purpose}; type: pip install '{package}'", "note")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("Hub", "HF_HUB_OFFLINE is set: only folders, and what is in the cache")
        return
    answer = within(HUB_SECONDS, lambda: ask_hub(HUB_SECONDS)) or f"does not answer within {HUB_SECONDS:.0f} s"
    if answer == "answers":
        yield Finding("Hub", f"{constants.ENDPOINT} {answer}")
        return
    advice = "folders and what is in the cache can be used; set HF_HUB_OFFLINE=1, so that nothing waits for it"
    yield Finding("Hub", f"{constants.ENDPOINT} {answer}; {advice}", "note")


def _folders() -> Iterator[Finding]:
    from huggingface_hub import constants

    for about, folder, variable in (
        ("cache", cache_folder(), "MLLM_PROBING_CACHE"),
        ("Hub's cache", Path(constants.HF_HUB_CACHE), "HF_HOME"),
    ):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        left = shutil.disk_usage(there).free
        text = f"{folder}, {left / 1e9:.0f} GB free"
        if not _writable(there):
            yield Finding(about, f"{text}, cannot be written; set {variable} to a folder that can", "broken")
        elif left < ROOM:
            yield Finding(
                about, f"{text}: little; set {variable} to a folder with more before using large checkpoints", "note"
            )
        else:
            yield Finding(about, text)


def _writable(folder: Path) -> bool:
    """By trying: permissions say nothing of a disk that is mounted read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
