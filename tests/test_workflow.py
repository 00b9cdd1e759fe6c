from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medaug import assets
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.workflow import load_config, load_yaml, own_error, parse_overrides, read_yaml, run_setting, run_stage, split_overrides


def test_overrides_are_yaml() -> None:
    parsed = parse_overrides(["a=4", "b::c=true", "d#e=[8, 8]", "f={x: null}", "g=x=y", "h="])
    assert parsed == {"a": 4, "b#c": True, "d#e": [8, 8], "f": {"x": None}, "g": "x=y", "h": None}


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("-2E3", -2000.0), ("1.5e+2", 150.0), ("1e", "1e"), ("e4", "e4")])
def test_exponents_need_no_point(text: str, value: object) -> None:
    assert parse_overrides([f"a={text}"]) == {"a": value}  # YAML 1.1 would read 1e-4 as a word


@pytest.mark.parametrize("pair", ["a", "=1", "a={", "a: 1"])
def test_malformed_override_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match="override-malformed"):
        parse_overrides([pair])


@pytest.mark.parametrize("profile", [None, *assets.list_profiles()])
@pytest.mark.parametrize("stage", ["training", "generating"])
def test_every_profile_fits_every_stage(profile: str | None, stage: str) -> None:
    config = load_config("guided_ddpm", stage, profile)
    assert config["run"] == f"%{stage}"
    assert "augment" not in config


def test_profile_overlays_the_bundle() -> None:
    assert load_config("guided_ddpm", "training")["batch_size"] == 8
    assert load_config("guided_ddpm", "training", "tiny")["batch_size"] == 16
    assert "batch_size" not in load_config("guided_ddpm", "generating", "tiny")


def test_plus_merges_into_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("+network_settings: {class_conditional: true}\n")
    settings = load_config("guided_ddpm", "training", str(tmp_path / "p.yaml"))["network_settings"]
    assert settings["class_conditional"] is True
    assert settings["backbone"] == "monai"


def test_unknown_profile_key_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("batchsize: 4\n")
    with pytest.raises(ConfigError, match="config-key-unknown.*batchsize.*batch_size"):
        load_config("guided_ddpm", "training", str(tmp_path / "p.yaml"))


def test_profile_key_of_another_shipped_bundle_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("condition_dropout: 0.3\n+weighting_settings: {a: 1}\n")
    guided, sdedit = (load_config(bundle, "training", str(tmp_path / "p.yaml")) for bundle in ("guided_ddpm", "sdedit"))
    assert guided == load_config("guided_ddpm", "training") | {"condition_dropout": 0.3}
    assert "condition_dropout" not in sdedit and sdedit["weighting_settings"]["a"] == 1


@pytest.mark.parametrize("bundle", assets.list_bundles())
def test_profile_key_that_no_bundle_knows_is_refused_by_each(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("weighting_setting: null\n")
    with pytest.raises(ConfigError, match="config-key-unknown.*weighting_setting"):
        load_config(bundle, "training", str(tmp_path / "p.yaml"))


def test_a_copied_bundle_takes_the_shipped_profiles(tmp_path: Path) -> None:
    for bundle in assets.list_bundles():
        copy = assets.copy_bundle(bundle, tmp_path / bundle)
        assert load_config(str(copy), "training", "cpu32") == load_config(bundle, "training", "cpu32")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: 1\na: 2\n", "key given twice: a"),
        ("a: {b: 1, b: 2}\n", "key given twice: b"),
        ("- 1\n", "must hold named keys"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=code):
        read_yaml(tmp_path / "p.yaml")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes("title: Größe".encode("latin-1"))
    for name, words in (("p.yaml", "config-malformed.*p.yaml is not UTF-8"), ("nowhere.yaml", "config-missing.*No such file")):
        with pytest.raises(ConfigError, match=words):
            read_yaml(tmp_path / name)


def test_yaml_objects_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="config-malformed"):
        read_yaml(tmp_path / "p.yaml")


@pytest.mark.parametrize(("bundle", "profile"), [("nowhere", None), ("guided_ddpm", "nowhere")])
def test_unknown_names_are_refused(bundle: str, profile: str | None) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        load_config(bundle, "training", profile)


def test_overrides_are_sorted_by_stage() -> None:
    defaults = {"seeds": 3, "networks": ["a"]}
    given: dict[str, Any] = {"seed": 1, "batch_size": 2, "counts": [1], "augment#seeds": 1, "network_settings#backbone": "lean"}
    settings, stages = split_overrides("guided_ddpm", None, given, defaults)
    assert settings == {"seeds": 1, "networks": ["a"]}
    assert stages == {
        "training": {"seed": 1, "batch_size": 2, "network_settings#backbone": "lean"},
        "generating": {"seed": 1, "counts": [1]},
    }


def test_only_a_bundle_that_generates_from_a_run_asks_for_one() -> None:
    assert run_setting(Path("runs/r"), "guided_ddpm") == {"run_dir": "runs/r"}
    assert run_setting(Path("runs/r"), "text_to_image", "stable_diffusion") == {"run_dir": "runs/r"}
    assert run_setting(None, "text_to_image", "stable_diffusion") == {}
    for bundle in assets.list_bundles():
        with pytest.raises(ConfigError, match="run-not-given.*--run"):
            run_setting(None, bundle)


@pytest.mark.parametrize("key", ["augment#seed", "batchsize", "nothing#at_all"])
def test_override_that_no_stage_knows_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="config-key-unknown"):
        split_overrides("guided_ddpm", None, {key: 1}, {"seeds": 3})


def test_profile_section_overrides_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("augment: {seeds: 2}\n")
    assert split_overrides("guided_ddpm", str(tmp_path / "p.yaml"), {}, {"seeds": 3})[0] == {"seeds": 2}
    assert split_overrides("guided_ddpm", str(tmp_path / "p.yaml"), {"augment#seeds": 5}, {"seeds": 3})[0] == {"seeds": 5}


def test_own_error_is_found_in_a_chain() -> None:
    own = LeakageError("x", "y")
    try:
        try:
            raise own
        except LeakageError as error:
            raise RuntimeError("wrapped") from error
    except RuntimeError as error:
        assert own_error(error) is own
    assert own_error(ValueError("no")) is None
    assert own_error(None) is None


def test_stage_refuses_unknown_keys_and_unwraps_errors(tmp_path: Path) -> None:
    from medaug.workflow import run_stage

    with pytest.raises(ConfigError, match="config-key-unknown.*batchsize"):
        run_stage("guided_ddpm", "training", "tiny", {"batchsize": 1})
    with pytest.raises(ConfigError, match="config-key-unknown.*network_settings#backbon"):
        run_stage("guided_ddpm", "training", "tiny", {"network_settings#backbon": "lean"})
    with pytest.raises(ConfigError, match="config-value.*batch_size"):
        run_stage("guided_ddpm", "training", "tiny", {"batch_size": "four"})
    with pytest.raises(DataError, match="cohort-missing"):
        run_stage("guided_ddpm", "training", "tiny", {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value",
    [
        "[&a [x,x,x,x,x,x],&b [*a,*a,*a,*a,*a,*a],&c [*b,*b,*b,*b,*b,*b],&d [*c,*c,*c,*c,*c,*c],&e [*d,*d,*d,*d,*d,*d]]",
        "&a [*a]",
        "2024-13-45",
        "[" * 3000,
    ],
)
def test_bombs_and_impossible_values_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="override-malformed"):
        parse_overrides([f"batch_size={value}"])


def test_profile_values_have_the_kind_of_the_default(tmp_path: Path) -> None:
    (tmp_path / "word.yaml").write_text("batch_size: four\n")
    with pytest.raises(ConfigError, match="config-value"):
        load_config("guided_ddpm", "training", str(tmp_path / "word.yaml"))
    (tmp_path / "number.yaml").write_text("3: 4\n")
    with pytest.raises(ConfigError, match="config-malformed"):
        load_config("guided_ddpm", "training", str(tmp_path / "number.yaml"))


def test_only_true_and_false_are_switches(tmp_path: Path) -> None:
    assert load_yaml("{on: no, y: [Off, yes], t: true, f: False}") == {"on": "no", "y": ["Off", "yes"], "t": True, "f": False}
    with pytest.raises(ConfigError, match="config-value.*tracking#enabled"):
        run_stage("uncertainty_guidance", "training", None, parse_overrides(["tracking={enabled: no}"]))
    (tmp_path / "own.yaml").write_text("+tracking: {enabled: off}\n")
    with pytest.raises(ConfigError, match="config-value.*enabled"):
        load_config("uncertainty_guidance", "training", str(tmp_path / "own.yaml"))
