"""metadata.json of every bundle holds what MONAI's schema of 2024-07-25 and the MONAI bundle specification require."""

from __future__ import annotations

import configparser
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path.parents[1] for path in REPOSITORY.glob("bundles/*/configs/metadata.json"))
REQUIRED = {
    "schema",
    "version",
    "changelog",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "required_packages_version",
    "task",
    "description",
    "authors",
    "copyright",
    "intended_use",
    "eval_metrics",
    "network_data_format",
}
TENSOR = {
    "type": str,
    "format": str,
    "modality": str,
    "num_channels": int,
    "spatial_shape": list,
    "dtype": str,
    "value_range": list,
    "is_patch_data": bool,
    "channel_def": dict,
}
README_HEADINGS = (
    "Authors",
    "Tags",
    "Model Description",
    "Data",
    "Performance",
    "Additional Usage Steps",
    "System Configuration",
    "Limitations",
    "Citation Info",
    "References",
)
FILES = ("LICENSE", "configs/logging.conf", "docs/README.md", "docs/data_license.txt")

pytestmark = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)


def metadata(bundle: Path) -> dict:
    return json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))


def test_required_keys_are_there(bundle: Path) -> None:
    assert set(metadata(bundle)) >= REQUIRED
    assert metadata(bundle)["schema"].startswith("https://")


def test_the_version_is_in_the_changelog(bundle: Path) -> None:
    content = metadata(bundle)
    assert content["version"] in content["changelog"]


def test_every_tensor_is_described_in_full(bundle: Path) -> None:
    network = metadata(bundle)["network_data_format"]
    assert network["inputs"].keys() >= {"image"}
    assert network["outputs"].keys() >= {"pred"}
    for tensor in [*network["inputs"].values(), *network["outputs"].values()]:
        assert {key: type(tensor[key]) for key in TENSOR} == TENSOR
        assert all(isinstance(side, (int, str)) for side in tensor["spatial_shape"])
        assert all(isinstance(bound, (int, float)) for bound in tensor["value_range"])


def test_evaluation_metrics_are_numbers(bundle: Path) -> None:
    assert all(isinstance(value, (int, float)) for value in metadata(bundle)["eval_metrics"].values())


def test_stated_versions_satisfy_setup_cfg(bundle: Path) -> None:
    packaging = pytest.importorskip("packaging.requirements")
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    lines = (line.strip() for line in parser["options"]["install_requires"].splitlines())
    ranges = {item.name: item.specifier for item in (packaging.Requirement(line) for line in lines if line)}
    content = metadata(bundle)
    stated = {"monai": content["monai_version"], "torch": content["pytorch_version"], "numpy": content["numpy_version"]}
    stated |= {name: version for name, version in content["required_packages_version"].items() if name != "medaug"}
    for name, version in stated.items():
        assert ranges[name].contains(version), f"{name} {version} is outside {ranges[name]}"


def test_the_files_of_the_specification_are_there(bundle: Path) -> None:
    assert [name for name in FILES if not (bundle / name).is_file()] == []
    readme = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    assert [heading for heading in README_HEADINGS if f"# {heading}" not in readme] == []
