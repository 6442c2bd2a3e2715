"""Training runs, small but whole."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL as StockAutoencoderKL
from PIL import Image

from sdvae import AutoencoderKLFlux2, InputError
from sdvae.cli import main, parse_train_config
from sdvae.data import center_crop, open_source, read_image, to_tensor
from sdvae.runtime import resolve_precision
from sdvae.training.build import build_vae
from sdvae.training.checkpoint import checkpoints, read_checkpoint
from sdvae.training.ema import WeightAverage, ema_decay_at
from sdvae.training.loop import train
from sdvae.training.players import Players
from sdvae.weights import load_vae, save_ldm
from tests.conftest import draw_photographs, tiny_arguments
from tests.faults import fault
from tests.processes import launch, run_script
from tests.recorder import record

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def run(source: Path, output: Path, **changes: str) -> Path:
    return train(parse_train_config(tiny_arguments(source, output, **changes)))


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def deterministic(output: Path) -> list[dict]:
    """The log without what the clock decides."""
    clock = ("train/images_per_second", "train/data_wait_fraction")
    return [{k: v for k, v in record.items() if k not in clock} for record in records(output)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_vae(folder).state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """(photographs, run folder) of one run with everything on: LPIPS, accumulation, warm-ups, TensorBoard."""
    root = tmp_path_factory.mktemp("finished")
    source = draw_photographs(root / "photographs")
    changes = {
        "loss__lpips_weight": "0.1",
        "loss__perceptual__net": "squeeze",
        "loss__perceptual__allow_random": "true",
        "loss__kl_warmup_steps": "2",
        "gradient_accumulation_steps": "2",
        "optimizer__warmup_steps": "2",
        "optimizer__schedule": "cosine",
        "optimizer__learning_rate": "0.001",
        "trackers": "[tensorboard]",
        "data__num_workers": "1",
    }
    run(source, root / "run", **changes)
    return source, root / "run"


def test_a_run_leaves_its_recipe_log_pictures_and_model(finished):
    _, output = finished
    assert yaml.safe_load((output / "config.yaml").read_text())["loss"]["lpips_weight"] == 0.1
    lines = records(output)
    training = [line for line in lines if "train/loss" in line]
    validation = [line for line in lines if "validation/psnr" in line]
    assert [line["step"] for line in training] == [2, 4]
    assert [line["step"] for line in validation] == [2, 4]
    for name in ("reconstruction", "lpips_squeeze_random", "kl", "grad_norm", "learning_rate", "images_per_second"):
        assert all(np.isfinite(line[f"train/{name}"]) for line in training), name
    for name in ("psnr", "ssim", "lpips_squeeze_random", "kl", "active_channels", "latent_std"):
        assert all(np.isfinite(line[f"validation/{name}"]) for line in validation), name
    steps = ("00000002", "00000004")
    drawn = [f"{kind}-{step}.png" for kind in ("latents", "step") for step in steps]
    assert sorted(path.name for path in (output / "images").iterdir()) == drawn
    for picture in (output / "curves.png", *(output / "images").iterdir()):
        with Image.open(picture) as image:
            image.load()
    assert list((output / "sdvae").glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (output / "model").iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "latent_rgb_factors.json",
        "reconstructions.png",
    ]


def test_learning_rate_and_kl_weight_follow_their_schedules(finished):
    training = [line for line in records(finished[1]) if "train/loss" in line]
    # 1/3, 2/3 of 1e-3 in the two warm-up steps, then half a cosine over the other two; a line has its last step's value
    assert [line["train/learning_rate"] for line in training] == pytest.approx([2 / 3 * 1e-3, 0.5e-3])
    assert [line["train/kl_weight"] for line in training] == pytest.approx([2 / 3 * 1e-6, 1e-6])


def test_what_is_validated_and_saved_is_the_average_of_the_weights(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(WeightAverage, "update", lambda self, model: None)
    arguments = tiny_arguments(photographs, tmp_path / "run", optimizer__learning_rate="0.01")
    config = parse_train_config(arguments)
    saved = weights(train(config))
    torch.manual_seed(config.seed)
    initial = build_vae(config.model).state_dict()
    assert all(torch.equal(saved[name], initial[name]) for name in initial), "an average that never moved"
    validation = [line["validation/psnr"] for line in records(tmp_path / "run") if "validation/psnr" in line]
    assert validation[0] == validation[1]
    losses = [line["train/loss"] for line in records(tmp_path / "run") if "train/loss" in line]
    assert losses[0] != losses[1]


def test_gradients_are_clipped_and_logged_before(photographs, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def recording_step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording_step)
    run(photographs, tmp_path / "run", optimizer__grad_clip_norm="0.01", steps="2")
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert records(tmp_path / "run")[0]["train/grad_norm"] > 0.05


def test_the_launchers_accumulation_option_does_not_scale_the_loss_again(photographs, tmp_path, monkeypatch):
    run(photographs, tmp_path / "a", steps="1", validate_every="1")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run(photographs, tmp_path / "b", steps="1", validate_every="1")
    assert deterministic(tmp_path / "a") == deterministic(tmp_path / "b")


def test_the_model_is_saved_at_every_validation(photographs, tmp_path):
    """A run that fails later leaves what it had."""
    with fault("nan", 2, until=99), pytest.raises(InputError, match="no finite loss"):
        run(photographs, tmp_path / "run", validate_every="1", steps="8", max_skipped_steps="3")
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run" / "model").values())


def test_the_loss_is_the_weighed_sum_of_the_logged_terms(finished):
    line = next(line for line in records(finished[1]) if line["step"] == 2)
    total = line["train/reconstruction"] + 0.1 * line["train/lpips_squeeze_random"]
    assert line["train/loss"] == pytest.approx(total, rel=1e-4)  # the KL term is below that


def test_the_saved_model_is_the_stock_class_with_its_measured_factor(finished):
    source, output = finished
    stock = StockAutoencoderKL.from_pretrained(output / "model").eval()
    images = open_source(str(source))
    lines = records(output)
    held_out = [line for line in lines if "validation/psnr" in line][-1]

    # by hand: the same seven training images, and the std of the latents over all of them
    from sdvae.training.data import open_sources

    config = parse_train_config(tiny_arguments(source, output))
    train_source, validation_source = open_sources(config.data, config.seed)
    assert len(train_source) + len(validation_source) == len(images)

    def tensors(of):
        return torch.stack([to_tensor(center_crop(read_image(of.read(i)), 32)) for i in range(len(of))])

    with torch.no_grad():
        posterior = stock.encode(tensors(train_source)).latent_dist
        x = tensors(validation_source)
        reconstruction = stock(x).sample.clamp(-1, 1)
    variance = posterior.mean.double().var(correction=0) + posterior.var.double().mean()
    assert stock.config.scaling_factor == pytest.approx(float(variance**-0.5), rel=1e-4)
    assert stock.config.shift_factor is None
    assert stock.config.sample_size == 512
    psnr = -10 * torch.log10(((reconstruction - x) / 2).square().mean((1, 2, 3))).mean()
    assert held_out["validation/psnr"] == pytest.approx(float(psnr), abs=1e-2)

    # and the latent RGB factors, by least squares over the validation images; four positions in each of the images
    with torch.no_grad():
        z = stock.encode(x).latent_dist.mean * stock.config.scaling_factor
    small = torch.nn.functional.avg_pool2d(x, 8).movedim(1, -1).reshape(-1, 3).double()
    a = z.movedim(1, -1).reshape(-1, 4).double()
    a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
    wanted = torch.linalg.lstsq(a, small).solution
    written = json.loads((output / "model" / "latent_rgb_factors.json").read_text())
    found = torch.tensor([*written["latent_rgb_factors"], written["latent_rgb_factors_bias"]], dtype=torch.float64)
    torch.testing.assert_close(a @ found, a @ wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=1e-2)
    assert (written["images"], written["scaling_factor"]) == (len(x), stock.config.scaling_factor)
    card = (output / "model" / "README.md").read_text()
    bias = " | ".join(f"{value:.4f}" for value in written["latent_rgb_factors_bias"])
    assert "## Previews\n\nThe linear map from latents to RGB that comes nearest to images shrunk by 8" in card
    assert f"| bias | {bias} |" in card


def test_the_card_names_data_recipe_and_a_random_trunk(finished):
    card = (finished[1] / "model" / "README.md").read_text()
    assert str(finished[0]) in card
    assert "randomly initialised trunk" in card
    assert "kl_weight: 1.0e-06" in card
    assert "8x8 pixels" in card


def test_the_same_recipe_gives_the_same_bits_with_and_without_workers(photographs, tmp_path):
    for name, workers in (("a", "0"), ("b", "2")):
        run(photographs, tmp_path / name, data__num_workers=workers)
    assert deterministic(tmp_path / "a") == deterministic(tmp_path / "b")
    first, second = weights(tmp_path / "a" / "model"), weights(tmp_path / "b" / "model")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_another_model(photographs, tmp_path):
    first = weights(run(photographs, tmp_path / "a", steps="1", validate_every="1"))
    second = weights(run(photographs, tmp_path / "b", steps="1", validate_every="1", seed="1"))
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_see_the_same_samples_and_gradients_as_one(photographs, tmp_path):
    """Batch 4 on one process, 2 + 2 on two, and 2 twice accumulated: the same ids and gradients in each step."""
    same = {"steps": "3", "validate_every": "3", "optimizer__learning_rate": "1e-9", "loss__lpips_weight": "0"}
    cases = {
        "one": (1, {"batch_size": "4"}),
        "two": (2, {"batch_size": "2"}),
        "accumulated": (1, {"batch_size": "2", "gradient_accumulation_steps": "2"}),
    }
    recorded = {}
    for name, (world_size, changes) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        arguments = tiny_arguments(photographs, folder / "run", **same, **changes)
        launched = launch(record, [world_size, folder, *arguments], folder, world_size=world_size)
        assert launched.codes == [0] * world_size, launched.stderr[-3000:]
        files = sorted(folder.glob("rank-*.pt"))
        assert len(files) == world_size
        recorded[name] = [torch.load(file) for file in files]

    (one,) = recorded["one"]
    assert len({key for step in one for key in step["samples"]}) == 12, "three steps of four different samples"
    for name in ("two", "accumulated"):
        for i, step in enumerate(one):
            assert [key for rank in recorded[name] for key in rank[i]["samples"]] == step["samples"]
            for rank in recorded[name]:
                got, want = (torch.cat([g.flatten() for g in s["gradients"]]) for s in (rank[i], step))
                error = float((got - want).norm() / want.norm())
                assert error <= 1e-5, (name, i, error)


def test_grey_images_train(photographs, tmp_path):
    vae = load_vae(run(photographs, tmp_path / "run", model__in_channels="1", steps="1", validate_every="1"))
    assert vae.config.in_channels == vae.config.out_channels == 1


def test_a_run_has_its_own_precision_whatever_this_process_ran_before(photographs, tmp_path):
    logs = {}
    for name, precision in (("first", "no"), ("second", "bf16"), ("third", "no")):
        run(photographs, tmp_path / name, mixed_precision=precision)
        logs[name] = deterministic(tmp_path / name)
    assert logs["third"] == logs["first"]
    first, second = (
        next(line["train/loss"] for line in logs[name] if "train/loss" in line) for name in logs if name != "third"
    )
    assert first != second
    assert first == pytest.approx(second, rel=0.1)


def test_bf16_autocast_keeps_fp32_weights(photographs, tmp_path):
    arguments = tiny_arguments(photographs, tmp_path / "run", mixed_precision="bf16", steps="2")
    # as a user starts it: the log names the precision
    launched = launch(run_script, [ROOT / "train_sdvae.py", *arguments], tmp_path)
    assert launched.codes == [0], launched.stderr[-3000:]
    assert "cpu in bf16" in launched.stderr
    assert {tensor.dtype for tensor in weights(tmp_path / "run" / "model").values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(photographs, tmp_path, monkeypatch):
    first = weights(run(photographs, tmp_path / "a", steps="2"))
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs)
    )
    second = weights(run(photographs, tmp_path / "b", steps="2", gradient_checkpointing="true"))
    assert len(calls) == 2 * 2 * 5, "two steps of an encoder and a decoder, each of four levels and a middle"
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ema_equals_its_recursion_in_float64():
    config = parse_train_config(["--model.block_out_channels=[8]", "--model.norm_num_groups=4"])
    vae = build_vae(config.model)
    average = WeightAverage(vae, decay=0.9)
    want = vae.encoder.conv_in.weight.detach().double()
    for n in range(30):
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        average.update(vae)
        decay = min(0.9, (1 + n) / (10 + n))
        want = decay * want + (1 - decay) * vae.encoder.conv_in.weight.detach().double()
    torch.testing.assert_close(average.model.encoder.conv_in.weight.double(), want, rtol=1e-5, atol=1e-6)
    assert ema_decay_at(0, 0.999) == 0.1
    assert ema_decay_at(10**6, 0.999) == 0.999
    assert not any(p.requires_grad for p in average.model.parameters())


@pytest.mark.parametrize("batch_size", [1, 16, 250])
def test_the_half_life_of_the_moving_average_is_in_images_whatever_the_batch(batch_size):
    config = parse_train_config(
        [
            *("--model.block_out_channels=[8]", "--model.norm_num_groups=4", "--optimizer.ema_half_life=4000"),
            *(f"--batch_size={batch_size}", "--gradient_accumulation_steps=2", "--loss.lpips_weight=0"),
        ]
    )
    decay = Players(build_vae(config.model), config, Accelerator(cpu=True)).ema.decay
    assert decay ** (4000 / (2 * batch_size)) == pytest.approx(0.5)


def test_bad_images_are_named_and_skipped(photographs, tmp_path, caplog):
    (photographs / "broken.png").write_bytes(b"")
    (photographs / "words.jpg").write_text("not a picture")
    with caplog.at_level("WARNING"):
        run(photographs, tmp_path / "run", data__max_bad_fraction="0.5", steps="8")
    for name in ("broken.png", "words.jpg"):
        assert caplog.text.count(name) == 1, name


@pytest.mark.parametrize("workers", ["0", "1"])
def test_too_many_bad_images_stop_the_run_with_one_line(photographs, tmp_path, capfd, workers):
    for i in range(10, 30):
        (photographs / f"{i}.png").write_bytes(b"")
    code = main(["train", *tiny_arguments(photographs, tmp_path / "run", data__num_workers=workers)])
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("sdvae: error:")]
    assert code == 2
    assert len(error) == 1
    assert "bad" in error[0]
    assert "empty" in error[0]
    assert "Traceback" not in error[0]
    assert not (tmp_path / "run" / "model").exists()


def test_overwriting_starts_anew(photographs, tmp_path):
    output = tmp_path / "run"
    run(photographs, output, steps="2")
    run(photographs, output, steps="1", overwrite="true")
    assert [line["step"] for line in records(output)] == [1, 1], "a line of training and one of validation"


def test_a_folder_that_no_run_wrote_is_never_removed(photographs, tmp_path):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter.txt").write_text("years of work")
    (output / "config.yaml").write_text("of another program")
    with pytest.raises(InputError, match="holds files that no run wrote"):
        run(photographs, output, overwrite="true")
    assert (output / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize("key", ["data__source", "data__validation_source"])
@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_a_run_folder_among_the_images_is_refused_and_nothing_is_written(photographs, tmp_path, key, overwrite):
    other = draw_photographs(tmp_path / "other")
    with pytest.raises(InputError, match=f"inside data.{key.removeprefix('data__')}="):
        run(other, photographs / "runs" / "first", **{key: str(photographs)}, overwrite=overwrite)
    assert sorted(path.name for path in photographs.iterdir()) == [f"{i:02}.png" for i in range(10)]


def test_a_name_that_is_not_utf8_reaches_the_checkpoint(photographs, tmp_path):
    os.rename(os.fsencode(photographs / "00.png"), os.fsencode(photographs) + b"/caf\xe9.png")
    run(photographs, tmp_path / "run", steps="2")
    (newest,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert read_checkpoint(newest).state["train_names"]


def test_overwriting_a_run_removes_only_what_a_run_writes(photographs, tmp_path):
    output = tmp_path / "run"
    run(photographs, output, steps="2", validate_every="1")
    (output / "notes.txt").write_text("mine")
    run(photographs, output, steps="1", overwrite="true")
    assert (output / "notes.txt").read_text() == "mine"
    assert {path.name for path in (output / "images").iterdir()} == {"step-00000001.png", "latents-00000001.png"}


def test_a_first_validation_image_that_is_bad_is_left_out(photographs, tmp_path):
    validation = tmp_path / "validation"
    validation.mkdir()
    for name in ("00.png", "01.png"):
        (validation / f"b{name}").write_bytes((photographs / name).read_bytes())
    (validation / "a.png").write_bytes(b"")
    changes = {"data__validation_source": str(validation), "grid_images": "1", "data__max_bad_fraction": "0.5"}
    run(photographs, tmp_path / "run", steps="1", **changes)
    assert np.isfinite(records(tmp_path / "run")[-1]["validation/psnr"])


@pytest.mark.parametrize(
    ("requested", "features", "want"),
    [("auto", {}, "no"), ("auto", {"avx512_bf16": True}, "bf16"), ("no", {"amx_bf16": True}, "no")],
)
def test_precision_is_bf16_where_the_cpu_computes_in_it(monkeypatch, requested, features, want):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert resolve_precision(requested, "cpu") == want


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(InputError, match="need a GPU for fp16"):
        resolve_precision("fp16", "cpu")


@pytest.mark.parametrize("name", ["finetune_decoder", "sd3_f8c16", "flux2_f8c32"])
def test_a_recipe_starts(name, finished, photographs, tmp_path, monkeypatch):
    """For real, at a tiny size; where a published trunk or VAE is asked for, a random or a tiny one stands in."""
    recipe = ROOT / "configs" / f"{name}.yaml"
    published = parse_train_config(["--config", str(recipe)])
    changes = {
        "loss__perceptual__net": "squeeze",
        "loss__perceptual__allow_random": "true",
        "loss__lpips_weight": "0.1",
        "steps": "1",
        "gradient_accumulation_steps": "1",
        "data__validation_names": "[]",
        "data__validation_source": "null",
        "optimizer__warmup_steps": "0",
        "model__num_classes": "0",  # the photographs have no labels
    }
    if published.fine_tune.source is not None:
        changes |= {"fine_tune__source": str(finished[1] / "model"), "fine_tune__subfolder": "null"}
    narrow = tiny_arguments(photographs, tmp_path / "run", **changes)
    model = load_vae(train(parse_train_config(["--config", str(recipe), *narrow])))
    assert len(model.config.block_out_channels) == 4
    if published.fine_tune.source is None:
        assert model.config.latent_channels == published.model.latent_channels
        assert isinstance(model, AutoencoderKLFlux2) == published.model.batch_norm
        if not published.model.batch_norm:
            assert (model.config.shift_factor is not None) == published.model.measure_shift
            assert model.config.force_upcast == published.model.force_upcast


def explained_variance(vae) -> float:
    """How much of 8x8-pixel colours a linear map can tell from the untrained reconstruction."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(16, 3, 8, 8, generator=generator) * 2 - 1, scale_factor=8)
    with torch.no_grad():
        output = vae(x, sample_posterior=True, generator=generator).sample
    a, b = (torch.nn.functional.avg_pool2d(t, 8).permute(0, 2, 3, 1).reshape(-1, 3) for t in (output, x))
    a = torch.cat([a, torch.ones(len(a), 1)], dim=1)
    residual = b - a @ torch.linalg.lstsq(a, b).solution
    return 1 - float(residual.var() / b.var())


@pytest.mark.parametrize("quant", ["true", "false"])
def test_a_new_vae_passes_colours_through_where_torchs_default_passes_none(quant):
    config = parse_train_config([f"--model.use_quant_conv={quant}", "--model.force_upcast=false"]).model
    config = replace(config, block_out_channels=(16, 32, 64, 64), norm_num_groups=8, layers_per_block=1)
    torch.manual_seed(0)
    vae = build_vae(config)
    default = build_vae(replace(config, initialisation="torch"))
    assert explained_variance(default) < 0.02
    assert explained_variance(vae) > 0.1
    with torch.no_grad():
        posterior = vae.encode(torch.rand(2, 3, 64, 64) * 2 - 1).latent_dist
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, np.exp(-3)))
    assert posterior.mean.std() > 4 * posterior.std.mean(), "latents stand well above their noise"


def test_initial_residual_branches_are_zero():
    vae = build_vae(replace(parse_train_config([]).model, block_out_channels=(32, 32), layers_per_block=1))
    x = torch.randn(1, 32, 8, 8)
    for block in (vae.encoder.mid_block, vae.decoder.mid_block, vae.encoder.down_blocks[0].resnets[0]):
        assert torch.equal(block(x), x)
    assert all(torch.isfinite(p).all() for p in vae.parameters())


def test_a_decoder_fine_tuned_from_a_single_file_keeps_encoder_bits_and_scaling_factor(finished, photographs, tmp_path):
    """From LDM's layout, through training, to a folder: latents are what they were, pictures are not."""
    before = load_vae(finished[1] / "model")
    save_ldm(before, tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text((finished[1] / "model" / "config.json").read_text())
    after = load_vae(
        run(
            photographs,
            tmp_path / "run",
            fine_tune__source=str(tmp_path / "vae.safetensors"),
            fine_tune__config=str(tmp_path / "config.json"),
            fine_tune__freeze_encoder="true",
            optimizer__learning_rate="0.01",
            model__block_out_channels="[32, 64]",  # not read: the file's shape counts
        )
    )
    assert after.config.scaling_factor == before.config.scaling_factor
    changed = {name for name, w in after.state_dict().items() if not torch.equal(w, before.state_dict()[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "with its encoder frozen" in card
    assert "that of the VAE it started from" in card


def test_fine_tuning_everything_measures_the_factor_anew(finished, photographs, tmp_path):
    source = finished[1] / "model"
    changes = {"fine_tune__source": str(source), "optimizer__learning_rate": "0.01", "optimizer__ema_decay": "0"}
    after, before = load_vae(run(photographs, tmp_path / "run", **changes)), load_vae(source)
    assert after.config.scaling_factor != before.config.scaling_factor
    assert not torch.equal(after.encoder.conv_in.weight, before.encoder.conv_in.weight)


def test_an_unknown_best_metric_is_refused_with_the_known_ones(photographs, tmp_path):
    with pytest.raises(InputError, match="need one of psnr, ssim"):
        run(photographs, tmp_path / "run", checkpoint__best_metric="fid")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_eight_bit_moments_without_bitsandbytes_are_refused(photographs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r'adamw_8bit; pip install "sdvae\[bitsandbytes\]"'):
        run(photographs, tmp_path / "run", optimizer__kind="adamw_8bit")


def test_the_fused_optimizer_takes_the_same_steps(photographs, tmp_path):
    plain = weights(run(photographs, tmp_path / "a"))
    fused = weights(run(photographs, tmp_path / "b", optimizer__kind="adamw_fused"))
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], atol=1e-5, rtol=1e-4)
