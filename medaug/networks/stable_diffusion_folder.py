"""A folder with Stable Diffusion, checked as data before anything of it is loaded: nothing missing, nothing pickled, no code of its own.

The layout is that of diffusers: ``model_index.json`` and one folder per part. Which class reads a part is decided here, never by the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.errors import ConfigError, DataError
from medaug.networks.weights import read_metadata

INDEX = "model_index.json"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
# Part -> what model_index.json may say of it. Parts that are read carry weights or settings, see `PART_FILES`.
CLASSES: dict[str, tuple[tuple[str, str], ...]] = {
    "unet": (("diffusers", "UNet2DConditionModel"),),
    "vae": (("diffusers", "AutoencoderKL"),),
    "text_encoder": (("transformers", "CLIPTextModel"),),
    "tokenizer": (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")),
    "scheduler": tuple(
        ("diffusers", f"{name}Scheduler")
        for name in (
            "PNDM",
            "DDIM",
            "DDPM",
            "DEISMultistep",
            "DPMSolverMultistep",
            "DPMSolverSinglestep",
            "EulerDiscrete",
            "EulerAncestralDiscrete",
            "HeunDiscrete",
            "LMSDiscrete",
            "UniPCMultistep",
        )
    ),
}
# Named by published folders and never loaded: a filter of photographs knows nothing of medical images.
UNUSED: dict[str, tuple[tuple[str | None, str | None], ...]] = {
    "safety_checker": (("stable_diffusion", "StableDiffusionSafetyChecker"), (None, None)),
    "feature_extractor": (("transformers", "CLIPImageProcessor"), ("transformers", "CLIPFeatureExtractor"), (None, None)),
    "image_encoder": ((None, None),),
}
PLAIN_ENTRIES = ("_class_name", "_diffusers_version", "_name_or_path", "requires_safety_checker")
CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "quantization_config")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")


@dataclass(frozen=True)
class ModelFolder:
    """A folder that passed `check_folder`.

    Attributes:
        root: its path.
        scheduler: class name of its scheduler in diffusers.
        weights: part -> its safetensors files.
    """

    root: Path
    scheduler: str
    weights: Mapping[str, tuple[Path, ...]]

    def weights_sha256(self, *more: Path) -> str:
        """sha256 over the sorted sha256 of all safetensors that are loaded, and of `more` (fine-tuned weights)."""
        files = [path for paths in self.weights.values() for path in paths] + list(more)
        return storage.sha256_json(sorted(storage.sha256_file(path) for path in files))

    def part_sha256(self, part: str) -> str:
        """sha256 over the weights and the settings of one part."""
        files = [*self.weights.get(part, ()), self.root / part / CONFIGS[part]]
        return storage.sha256_json([storage.sha256_file(path) for path in files])

    def settings_sha256(self) -> str:
        """sha256 over the settings of all parts and the vocabulary: they decide an image besides the weights."""
        files = [self.root / part / name for part, name in CONFIGS.items()]
        files += [path for names in VOCABULARIES for name in names if (path := self.root / "tokenizer" / name).is_file()]
        return storage.sha256_json([storage.sha256_file(path) for path in files])


def check_folder(folder: str | Path | None, option: str = "model_dir") -> ModelFolder:
    """Check a local Stable Diffusion folder; nothing is loaded and nothing is fetched.

    Args:
        folder: as `StableDiffusionPipeline.save_pretrained` writes it. Pickled copies beside the safetensors are left alone.
        option: the setting that names the folder, for messages.

    Raises:
        ConfigError: `model-missing`, `model-incomplete`, `model-pickled`, `model-class`, `model-code`, `model-malformed`;
            `weights-unreadable`, `weights-pickle` or `weights-lfs-pointer` for a file that is no whole safetensors file.
    """
    if folder is None or not Path(folder).is_dir():
        what = "none is named" if folder is None else f"{Path(folder).name} is not a folder"
        raise ConfigError(
            "model-missing",
            f"Stable Diffusion is read from a local folder and {what}; set {option} to a folder with {INDEX}. Nothing is downloaded.",
        )
    root = Path(folder)
    index = _json(root, INDEX, option)
    _refuse_code(root)
    if index.get("_class_name") not in PIPELINES:
        raise ConfigError(
            "model-class",
            f"{INDEX} of {option} names the pipeline {_shown(index.get('_class_name'))}; {' or '.join(PIPELINES)} is needed.",
        )
    for name, entry in index.items():
        _check_entry(name, entry)
    scheduler = _pair(index.get("scheduler"))[1]
    for part, name in CONFIGS.items():
        _check_config(part, name, _json(root / part, name, option), index)
    if not any(all((root / "tokenizer" / name).is_file() for name in names) for names in VOCABULARIES):
        raise _incomplete("tokenizer/vocab.json with merges.txt (or tokenizer.json)", option)
    weights = {part: tuple(_weights(root / part, stem, option)) for part, stem in WEIGHTS.items()}
    for paths in weights.values():
        for path in paths:
            read_metadata(path)  # refuses what is truncated, pickled or a pointer
    return ModelFolder(root, str(scheduler), weights)


def _json(folder: Path, name: str, option: str) -> dict[str, Any]:
    shown = name if name == INDEX else f"{folder.name}/{name}"
    if not (folder / name).is_file():
        raise _incomplete(shown, option)
    try:
        content = storage.read_json(folder / name)
    except DataError as error:
        raise ConfigError("model-malformed", f"{shown} of {option} is not readable JSON; copy the folder again.") from error
    if not isinstance(content, dict):
        raise ConfigError("model-malformed", f"{shown} of {option} must hold named settings, got {type(content).__name__}.")
    found = sorted(set(CODE_KEYS) & content.keys())
    if found:
        raise ConfigError(
            "model-code",
            f"{shown} of {option} asks for code or readers beyond diffusers ({', '.join(found)}); such a folder is not loaded.",
        )
    return content


def _refuse_code(root: Path) -> None:
    found = sorted(path.name for path in _files(root) if path.suffix in (".py", ".pyc", ".so"))
    if found:
        raise ConfigError(
            "model-code", f"{root.name} holds program code ({found[0]}); such a folder is not loaded, remove the code first."
        )


def _files(root: Path) -> Iterator[Path]:
    """Files of the folder and of the folders of its parts."""
    for path in sorted(root.iterdir()):
        yield from (sorted(path.iterdir()) if path.is_dir() and not path.name.startswith(".") else [path])


def _pair(entry: Any) -> tuple[Any, Any]:
    return tuple(entry) if isinstance(entry, list) and len(entry) == 2 else (entry, None)  # type: ignore[return-value]


def _check_entry(name: str, entry: Any) -> None:
    if name in PLAIN_ENTRIES:
        return
    allowed: tuple[tuple[Any, Any], ...] = (CLASSES | UNUSED).get(name, ())  # type: ignore[operator]
    if _pair(entry) not in allowed:
        known = ", ".join(str(cls) for _, cls in allowed if cls) or "no such part"
        raise ConfigError(
            "model-class",
            f"{INDEX} gives {_shown(name)} as {_shown(entry)}; Stable Diffusion has {known} there, and nothing else is loaded.",
        )


def _check_config(part: str, name: str, config: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    if part not in index:
        raise ConfigError("model-class", f"{INDEX} names no {part}; a folder of Stable Diffusion is needed.")
    own = config.get("_class_name", _pair(index[part])[1])
    if own != _pair(index[part])[1]:
        raise ConfigError("model-class", f"{part}/{name} is of {_shown(own)}, {INDEX} says {_shown(_pair(index[part])[1])}.")


def _weights(folder: Path, stem: str, option: str) -> list[Path]:
    """The safetensors of a part: one file, or the shards that its index names."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file() and index.is_file():
        raise ConfigError(
            "model-malformed",
            f"{folder.name} of {option} holds {whole.name} and an index of shards, which may be other weights; remove one of them.",
        )
    if whole.is_file():
        return [whole]
    if index.is_file():
        shards = _json(folder, index.name, option).get("weight_map")
        names = sorted(set(shards.values())) if isinstance(shards, dict) and shards else []
        if not names or not all(isinstance(name, str) and PLAIN_NAME.fullmatch(name) for name in names):
            raise ConfigError("model-malformed", f"{folder.name}/{index.name} of {option} does not list files of its own folder.")
        for name in names:
            if not (folder / name).is_file():
                raise _incomplete(f"{folder.name}/{name}", option)
        return [folder / name for name in names]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        raise ConfigError(
            "model-pickled",
            f"{folder.name}/{pickled[0]} of {option} is a pickle, which could run code; save the model with safe_serialization=True, "
            f"so that {folder.name}/{whole.name} is there.",
        )
    raise _incomplete(f"{folder.name}/{whole.name}", option)


def _incomplete(name: str, option: str) -> ConfigError:
    return ConfigError("model-incomplete", f"{name} is missing from the folder that {option} names; copy the whole model there.")


def _shown(value: Any) -> str:
    return repr(value)[:60]
