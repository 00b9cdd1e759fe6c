"""Fine-tuning through the bundle's overlays: the loss falls, the images change, a killed run ends with the same bytes."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_diffusion import SIZE, TwoTemplates, no_network, save_model

from medaug import assets
from medaug.cohort import Cohort, fit_sha256, read_cohort
from medaug.draws import randn, randn_batch
from medaug.errors import ConfigError, LeakageError
from medaug.generation.stable_diffusion import load_model, make_pipeline, make_stable_diffusion_sampler
from medaug.networks.stable_diffusion import StableDiffusionParts, TextContexts, load_parts
from medaug.networks.stable_diffusion_folder import check_folder
from medaug.networks.tuned_unet import TunedUNet
from medaug.networks.weights import save_weights
from medaug.training.checkpoint import save_checkpoint
from medaug.training.data import KeyedBatches, read_case
from medaug.training.diffusion import NoiseObjective
from medaug.training.run_folder import RunRecord, read_run
from medaug.training.stable_diffusion import LatentCases, LatentTextIteration, latent_objective
from medaug.transforms.rgb import to_rgb
from medaug.workflow import STAGES, read_yaml, run_stage

OVERLAYS = ("finetune.yaml", "stable_diffusion.yaml")
PROMPTS = {"_target_": "tiny_diffusion.TwoTemplates", "classes": "$@cohort.classes"}
SMALL: dict[str, Any] = {
    "weights_trusted": True,
    "prompts": PROMPTS,
    "device_name": "cpu",
    "tracking": {"enabled": False},
}
TRAINING = SMALL | {"image_side": SIZE, "batch_size": 4, "max_epochs": 2, "epoch_length": 7}
TRAINING |= {"learning_rate": 2e-2, "ema_decay": 0.5}  # far with few steps


@pytest.fixture(autouse=True)
def offline() -> Iterator[None]:
    with no_network() as tried:
        yield
    assert not tried


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_model(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def parts(folder: Path) -> StableDiffusionParts:
    return load_parts(check_folder(folder))


@pytest.fixture(scope="module")
def cohort(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return make_cohort(tmp_path_factory.mktemp("real") / "cohort", size=12, per_class=6, num_classes=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlays over the bundle's own files, or over those of another bundle with the same parts."""
    own = assets.bundles_root() / "text_to_image"
    base = own if (own / "configs" / "train.yaml").is_file() else assets.bundles_root() / "sdedit"
    made = Path(shutil.copytree(base, tmp_path_factory.mktemp("bundle") / "text_to_image"))
    for name in OVERLAYS:
        shutil.copy(own / "configs" / name, made / "configs" / name)
    return made


def tune(bundle: Path, folder: Path, cohort: Cohort, out: Path, **more: Any) -> RunRecord:
    paths = {"dataset_dir": str(cohort.root), "output_dir": str(out), "model_dir": str(folder)}
    record: RunRecord = run_stage(str(bundle), "training", None, TRAINING | paths | more, "finetune")
    return record


@pytest.fixture(scope="module")
def run(bundle: Path, folder: Path, cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    tune(bundle, folder, cohort, out, lora_rank=4)
    return out


def mean_loss(network: Any, parts: StableDiffusionParts, cohort: Cohort, tmp: Path) -> float:
    """Over all training images at 16 levels each, the same draws whatever the network."""
    cases, objective, contexts = LatentCases(cohort, parts, SIZE, tmp), latent_objective(parts), TextContexts(parts)
    losses = []
    for index, case in enumerate(cases.cases):
        keys = [(index, level) for level in range(16)]
        latents = cases.latents(case)["mean"].repeat(16, 1, 1, 1) * parts.vae.config.scaling_factor  # type: ignore[union-attr, operator]
        context = contexts([cohort.classes[case.label]] * 16)
        noise, level = randn_batch((4, 8, 8), keys, "held"), objective.draw(9, "held", keys, "cpu")
        with torch.no_grad():
            losses.append(objective(latents, lambda x, t, c=context: network(x, t, c), noise=noise, level=level).mean())
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("rank", [4, None])
def test_fine_tuning_lowers_the_loss(
    bundle: Path, folder: Path, parts: StableDiffusionParts, cohort: Cohort, run: Path, tmp_path: Path, rank: int | None
) -> None:
    out = run
    if rank is None:
        out = tmp_path / "full"
        tune(bundle, folder, cohort, out, lora_rank=None, learning_rate=2e-3)
    tuned = load_model(folder, cohort, out, weights_trusted=True)
    before, after = (
        mean_loss(lambda x, t, c, unet=unet: unet(x, t, encoder_hidden_states=c).sample, parts, cohort, tmp_path / "latents")
        for unet in (parts.unet, tuned.unet)
    )
    assert after < 0.95 * before


def test_run_says_what_was_tuned_and_on_whom(folder: Path, cohort: Cohort, run: Path) -> None:
    record = read_run(run)
    facts = record.settings["stable_diffusion"]
    assert facts["lora_rank"] == 4 and facts["base_sha256"] == check_folder(folder).weights_sha256()
    assert facts["base_origin"].startswith("Nothing shows which images")
    assert record.fit_groups == tuple(sorted(cohort.groups("training"))) and record.fit_on == fit_sha256(record.fit_groups)
    tensors = load_file(run / "model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)


def test_images_of_a_tuned_model_change_and_carry_its_groups(
    bundle: Path, folder: Path, cohort: Cohort, run: Path, tmp_path: Path
) -> None:
    settings = {"size": SIZE, "num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "", "strength": None}
    made = {}
    for name, tuned in (("plain", None), ("tuned", str(run))):
        paths = {"dataset_dir": str(cohort.root), "run_dir": tuned, "output_dir": str(tmp_path / name), "model_dir": str(folder)}
        more = {"stable_diffusion_settings": settings, "counts": [2, 1]}
        made[name] = run_stage(str(bundle), "generating", None, SMALL | paths | more, "stable_diffusion")
    assert made["plain"].content_sha256 != made["tuned"].content_sha256
    fits = {name: (result.training[0].lineage or {})["fit_on"] for name, result in made.items()}
    assert fits == {"plain": fit_sha256(()), "tuned": fit_sha256(cohort.groups("training"))}
    lineage = made["tuned"].training[0].lineage or {}
    assert lineage["generator_trusted"] is True and lineage["bundle"] == read_run(run).bundle
    assert lineage["weights_sha256"] == check_folder(folder).weights_sha256(run / "model.safetensors")
    assert read_cohort(tmp_path / "tuned", verify=True).notes["generator"]


def test_diffusers_reads_the_low_rank_file_and_makes_the_same_images(folder: Path, cohort: Cohort, run: Path) -> None:
    settings = {"size": SIZE, "num_inference_steps": 3}
    tuned = load_model(folder, cohort, run, weights_trusted=True)
    sampler = make_stable_diffusion_sampler(settings, tuned, TwoTemplates(cohort.classes), cohort)
    batch = {"id": ["a"], "label": torch.tensor([1]), "shape": (SIZE, SIZE)}
    pipeline = make_pipeline(load_parts(check_folder(folder)), from_images=False)
    options = {"latents": randn((4, 8, 8), 0, "start", "a")[None], "height": SIZE, "width": SIZE, "output_type": "pt"}

    def theirs() -> torch.Tensor:
        images = pipeline(sampler.prompt(1, "a"), num_inference_steps=3, **options).images
        return images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)

    untuned = theirs().sum(1, keepdim=True) * 2 - 1
    pipeline.load_lora_weights(str(run), weight_name="model.safetensors")
    ours = sampler(batch)
    assert torch.allclose(ours, theirs().sum(1, keepdim=True) * 2 - 1, atol=1e-4)  # ours are merged into the weights
    assert not torch.allclose(ours, untuned, atol=1e-2)


def test_a_killed_run_ends_with_the_same_bytes(
    bundle: Path, folder: Path, cohort: Cohort, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = 0

    def dies(*args: Any, **named: Any) -> None:
        nonlocal saved
        save_checkpoint(*args, **named)
        saved += 1
        if saved == 1:  # after the first of two epochs
            raise KeyboardInterrupt

    monkeypatch.setattr("medaug.training.session.save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(bundle, folder, cohort, tmp_path / "killed", lora_rank=4)
    again = tune(bundle, folder, cohort, tmp_path / "killed", lora_rank=4)
    assert saved == 2 and again.weights_sha256 == read_run(run).weights_sha256


def test_each_image_is_encoded_once_as_the_autoencoder_does(
    parts: StableDiffusionParts, cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae: Any = parts.vae
    encode, calls = vae.encode, []
    monkeypatch.setattr(vae, "encode", lambda image: calls.append(1) or encode(image))
    first, batches = LatentCases(cohort, parts, SIZE, tmp_path), KeyedBatches(len(cohort.training), 3)
    items = [first[key] for iteration in range(1, 9) for key in batches.batch(iteration)]
    LatentCases(cohort, parts, SIZE, tmp_path)[(1, 0, 0)]
    assert len(calls) == len(cohort.training) < len(items)
    case = first.cases[0]
    with torch.no_grad():
        expected = encode(to_rgb(read_case(cohort, case)[None], SIZE)).latent_dist
    assert torch.equal(first.latents(case)["mean"], expected.mean[0]) and torch.equal(first.latents(case)["std"], expected.std[0])


def test_the_objective_is_the_schedulers_with_p2_over_it(parts: StableDiffusionParts) -> None:
    plain = latent_objective(parts)
    weighted = latent_objective(parts, {"weighting": "p2", "weighting_options": {"k": 1.0, "gamma": 0.5}})
    assert torch.allclose(plain.schedule.alphas_cumprod.float(), parts.scheduler.alphas_cumprod)
    assert float(plain.schedule.abar(999)) == pytest.approx(0.00466, abs=1e-5)  # of Stable Diffusion 1
    keys = [(0, j) for j in range(4)]
    x_0, noise, level = randn((4, 4, 8, 8), "x"), randn((4, 4, 8, 8), "n"), plain.draw(0, "p2", keys, "cpu")

    def loss(objective: NoiseObjective) -> torch.Tensor:
        return objective(x_0, lambda x, t: torch.zeros_like(x), noise=noise, level=level)

    assert torch.allclose(loss(plain), noise.square().flatten(1).mean(1))
    assert torch.allclose(loss(weighted), loss(plain) * (1 - level.abar).sqrt().float(), rtol=1e-5)


def test_prompts_are_dropped_per_image_at_their_rate(parts: StableDiffusionParts, cohort: Cohort) -> None:
    def texts(dropout: float) -> list[str]:
        step = LatentTextIteration(None, None, TextContexts(parts), TwoTemplates(cohort.classes), 1.0, 0, dropout)  # type: ignore[arg-type]
        return step.texts({"iteration": [1] * 2000, "position": range(2000), "label": [0, 1] * 1000})

    assert texts(0.1).count("") == pytest.approx(200, abs=40)  # three standard deviations
    assert set(texts(0.0)) == {"class0", "a class0", "class1", "a class1"} and set(texts(1.0)) == {""}
    with pytest.raises(ConfigError, match=r"prompt_dropout must lie in \[0, 1\], got 1.5"):
        texts(1.5)


def test_a_copy_shares_what_is_not_trained(parts: StableDiffusionParts) -> None:
    unet = copy.deepcopy(parts.unet)
    inputs = (randn((2, 4, 8, 8), "x"), torch.tensor([3.0, 500.0]), randn((2, 20, 16), "c"))
    with torch.no_grad():
        before = unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample
        network = TunedUNet(unet, 2, seed=1)
        assert torch.equal(network(*inputs), before)  # B starts at 0
        twin = copy.deepcopy(network)
        for weight in network.parameters():
            weight += 0.3
        changed = network(*inputs)
        assert torch.equal(twin(*inputs), before) and not torch.allclose(changed, before, atol=1e-3)
        twin.load_state_dict(network.state_dict())
        assert torch.equal(twin(*inputs), changed)
        merged = twin.merged()
        assert torch.allclose(merged(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample, changed, atol=1e-4)
    share = sum(p.numel() for p in network.parameters()) / sum(p.numel() for p in merged.parameters())
    assert share < 0.1


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "8"])
def test_a_rank_that_is_none_is_refused(parts: StableDiffusionParts, rank: Any) -> None:
    with pytest.raises(ConfigError, match="lora_rank must be a whole number"):
        TunedUNet(parts.unet, rank)


def test_another_model_than_the_tuned_one_is_refused(cohort: Cohort, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another model than the one in model_dir") as caught:
        load_model(save_model(tmp_path / "other", seed=1), cohort, run, weights_trusted=True)
    assert caught.value.code == "model-other"


def test_weights_that_are_not_the_runs_are_refused(folder: Path, cohort: Cohort, run: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(run, tmp_path / "run"))
    tensors = {name: value + 1 for name, value in load_file(run / "model.safetensors").items()}
    save_weights(changed / "model.safetensors", tensors, {"num_classes": "2"})
    with pytest.raises(ConfigError, match="sha256 differs"):
        load_model(folder, cohort, changed, weights_trusted=True)


def test_a_run_of_another_bundle_is_refused(
    folder: Path, cohort: Cohort, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    record = json.loads((run / "run.json").read_text())
    record["settings"].pop("stable_diffusion")
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="did not fine-tune Stable Diffusion") as caught:
        load_model(folder, cohort, tmp_path, weights_trusted=True)
    assert caught.value.code == "run-malformed"


def test_a_run_that_saw_a_held_out_group_is_refused(folder: Path, cohort: Cohort, run: Path) -> None:
    moved = cohort.with_cases(training=cohort.training[1:], test=(*cohort.test, cohort.training[0]))
    with pytest.raises(LeakageError) as caught:
        load_model(folder, moved, run, weights_trusted=True)
    assert caught.value.code == "fit-on-held-out"


@pytest.mark.parametrize(("stage", "overlay"), [("training", "finetune"), ("generating", "stable_diffusion")])
def test_overlays_ask_for_the_folder_and_for_the_users_word(
    bundle: Path, folder: Path, cohort: Cohort, tmp_path: Path, stage: str, overlay: str
) -> None:
    paths = {"dataset_dir": str(cohort.root), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="none is named; set model_dir"):
        run_stage(str(bundle), stage, None, SMALL | paths, overlay)
    with pytest.raises(LeakageError, match="weights_trusted"):
        run_stage(str(bundle), stage, None, SMALL | paths | {"model_dir": str(folder), "weights_trusted": False}, overlay)


@pytest.mark.parametrize(("stage", "overlay"), [("training", "finetune"), ("generating", "stable_diffusion")])
def test_monai_lays_the_files_over_each_other_as_medaug_does(
    bundle: Path, folder: Path, cohort: Cohort, tmp_path: Path, stage: str, overlay: str
) -> None:
    from monai.bundle import ConfigWorkflow

    paths = {"dataset_dir": str(cohort.root), "output_dir": str(tmp_path / "out"), "model_dir": str(folder)}
    small = {"image_side": SIZE} if stage == "training" else {"stable_diffusion_settings#size": SIZE}
    workflow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / name) for name in (STAGES[stage], f"{overlay}.yaml")],
        meta_file=None,
        workflow_type="train" if stage == "training" else "infer",
        run_id=stage,
        init_id=None,
        final_id=None,
        logging_file=str(bundle / "configs" / "logging.conf"),
        **{name: value for name, value in SMALL.items() if name != "tracking"},  # an argument of its own
        **paths,
        **small,
    )
    workflow.initialize()
    assert not workflow.check_properties()
    session = workflow.parser.get_parsed_content("session")
    assert session.notes if stage == "generating" else session.settings["stable_diffusion"]["size"] == SIZE


@pytest.mark.parametrize("name", OVERLAYS)
def test_prompts_are_asked_for_as_they_are_offered(name: str) -> None:
    prompts = pytest.importorskip("medaug.prompts")
    asked = read_yaml(assets.bundles_root() / "text_to_image" / "configs" / name)["prompt_settings"]
    inspect.signature(prompts.make_prompts).bind(["normal"], **asked)
