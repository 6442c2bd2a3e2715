"""`sdvae distil`: the student's objective, and that the trainer keeps its promises for a student."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny as StockAutoencoderTiny
from torch import Tensor

from sdvae import AutoencoderKL, InputError, save_vae
from sdvae.cli import main, parse_train_config
from sdvae.data.dataset import EvaluationImages
from sdvae.errors import Stopped
from sdvae.metrics.image import psnr
from sdvae.model.tiny import TinyBlock
from sdvae.noise import posterior_generators
from sdvae.training import loop, save
from sdvae.training.build import build_accelerator, starting_student
from sdvae.training.checkpoint import checkpoints, read_checkpoint
from sdvae.training.config import DiscriminatorConfig, DistilConfig, LossConfig, TrainConfig, check_used
from sdvae.training.data import open_sources, reading_of
from sdvae.training.distil import Teacher
from sdvae.training.objective import Judges
from sdvae.training.players import Players
from sdvae.training.preflight import probe_teacher
from sdvae.training.step import TrainStep
from sdvae.weights import load_vae
from tests.conftest import draw_photographs, tiny_vae
from tests.faults import Crash, blank, fault
from tests.processes import launch, run_main
from tests.test_processes import train_in_own_folder
from tests.test_resume import differences

SEEDS = torch.tensor([3, 4])
RECIPE = {
    "steps": "5",
    "batch_size": "4",
    "log_every": "2",
    "validate_every": "3",
    "grid_images": "2",
    "checkpoint.every_steps": "2",
    "mixed_precision": "no",
    "distil.encoder_width": "4",
    "distil.encoder_blocks": "[1, 1]",
    "distil.decoder_width": "4",
    "distil.decoder_blocks": "[1, 1]",
    "data.resolution": "32",
    "data.min_side": "16",
    "data.validation_count": "3",
    "data.num_workers": "0",
    "loss.lpips_weight": "0",
    "loss.discriminator.weight": "0.5",
    "loss.discriminator.start_step": "1",
    "loss.discriminator.layers": "1",
    "loss.discriminator.width": "8",
    "optimizer.learning_rate": "0.001",
}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "vae"
    save_vae(tiny_vae(scaling_factor=0.4, shift_factor=0.1), folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return draw_photographs(tmp_path_factory.mktemp("images") / "photographs")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(save, "draw", blank)


def arguments(teacher: Path, source: Path, output: Path, **changes: str) -> list[str]:
    settings = {**RECIPE, "data.source": str(source), "output_dir": str(output)}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--distil.teacher={teacher}", *(f"--{key}={value}" for key, value in settings.items())]


def run(teacher: Path, source: Path, output: Path, **changes: str) -> Path:
    return loop.train(parse_train_config(arguments(teacher, source, output, **changes)))


def records(output: Path) -> list[dict]:
    clock = ("train/images_per_second", "train/data_wait_fraction")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def result(output: Path) -> dict[str, Any]:
    newest = read_checkpoint(checkpoints(output / "checkpoints")[0])
    return {
        "metrics": records(output),
        "weights": newest.weights,
        "optimizers": newest.optimizers,
        "state": {key: value for key, value in newest.state.items() if key not in ("config", "files")},
        "model": StockAutoencoderTiny.from_pretrained(output / "model").state_dict(),
        "best": StockAutoencoderTiny.from_pretrained(output / "best_model").state_dict(),
    }


def recipe(teacher: Path, **settings: Any) -> TrainConfig:
    shape = {"encoder_width": 4, "encoder_blocks": (1, 1), "decoder_width": 4, "decoder_blocks": (1, 1)}
    return TrainConfig(
        channels_last=False,
        fast_convolutions=False,
        mixed_precision="no",
        loss=LossConfig(lpips_weight=0, discriminator=DiscriminatorConfig(weight=0.0, start_step=0, layers=1, width=8)),
        distil=DistilConfig(**{"teacher": str(teacher), **shape, **settings}),
    )


def step_of(config: TrainConfig) -> TrainStep:
    accelerator = build_accelerator(config)
    torch.manual_seed(0)
    student, vae, config = starting_student(config)
    return TrainStep(config, Players(student, config, accelerator), Judges(), accelerator, Teacher(vae, accelerator))


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize("latents", ["sample", "mode"])
@pytest.mark.parametrize("teacher_weight", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_those_of_the_formula(teacher_folder, teacher_weight, latents):
    config = recipe(teacher_folder, teacher_weight=teacher_weight, latents=latents, latent_weight=0.7)
    step = step_of(config)
    values, *_ = step.generator_pass(0, images(), SEEDS)

    student, vae = step.players.vae, load_vae(teacher_folder)
    plain = StockAutoencoderTiny.from_config(student.config)
    plain.load_state_dict(student.state_dict())
    with torch.no_grad():
        posterior = vae.encode(images()).latent_dist
        z = posterior.sample(posterior_generators(SEEDS)) if latents == "sample" else posterior.mode()
        picture = vae.decode(z).sample
    decoded = plain.decode((z - 0.1) * 0.4).sample  # as a diffusion pipeline would hand the latents to it
    error = (plain.encode(images()).latents - (posterior.mode() - 0.1) * 0.4).square().mean()
    to_image, to_teacher = ((decoded - target).abs().mean() for target in (images(), picture))
    loss = (1 - teacher_weight) * to_image + teacher_weight * to_teacher + 0.7 * error
    loss.backward()

    logged = {"latents": error}
    logged |= {"reconstruction": to_image} if teacher_weight < 1 else {}
    logged |= {"reconstruction_to_teacher": to_teacher} if teacher_weight > 0 else {}
    assert values.keys() == {"loss", *logged}
    for name, value in {"loss": loss, **logged}.items():
        torch.testing.assert_close(values[name], value)
    for (name, ours), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_latents_are_scaled_as_a_pipeline_scales_them_by_channel(tmp_path):
    vae = tiny_vae(scaling_factor=0.4, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 3.0, 4.0])
    save_vae(vae, tmp_path / "vae")
    lesson = step_of(recipe(tmp_path / "vae"))._outcome.teacher.lesson(images())
    mode = vae.encode(images()).latent_dist.mode()
    numbers = torch.arange(1.0, 5.0).reshape(4, 1, 1)
    torch.testing.assert_close(lesson.mode, (mode - numbers) * 0.4 / numbers)
    torch.testing.assert_close(lesson.picture, vae.decode(mode).sample)


def test_the_adaptive_gan_weight_is_the_ratio_of_gradients_at_the_last_layer(teacher_folder):
    config = recipe(teacher_folder, latent_weight=3.0)
    config = replace(config, loss=replace(config.loss, discriminator=replace(config.loss.discriminator, weight=0.5)))
    step = step_of(config)
    values, real, fake = step.generator_pass(0, images(), SEEDS)
    assert torch.equal(real, images())
    assert not fake.requires_grad

    player, outcome = step.players.discriminator, step._outcome(0, images(), SEEDS)
    last = list(step.players.vae.decoder.layers)[-1].weight
    g = -player.network(outcome.fake).mean()
    norms = [torch.autograd.grad(scalar, last, retain_graph=True)[0].norm() for scalar in (outcome.nll, g)]
    values_of_image = images()[0].numel()
    wanted = 0.5 * (values_of_image * norms[0] / (norms[1] + 1e-4)).clamp(max=1e4) / values_of_image
    torch.testing.assert_close(values["gan_weight"], wanted)


def test_the_teachers_pictures_are_real_to_the_discriminator_if_they_alone_count(teacher_folder):
    step = step_of(recipe(teacher_folder, teacher_weight=1.0, latents="mode"))
    _, real, _ = step.generator_pass(0, images(), SEEDS)
    torch.testing.assert_close(real, load_vae(teacher_folder)(images()).sample)


def test_the_teacher_does_not_learn(teacher_folder):
    step = step_of(recipe(teacher_folder))
    teacher = step._outcome.teacher
    before = {name: weight.clone() for name, weight in teacher.vae.state_dict().items()}
    batch = {"index": torch.arange(2), "image": images(), "noise_seed": SEEDS, "bad": []}
    student = {name: weight.clone() for name, weight in step.players.vae.state_dict().items()}
    for number in range(2):  # at first the blocks end in zero, which hides what is before
        step(number, iter([batch]))
    assert all(torch.equal(before[name], weight) for name, weight in teacher.vae.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.vae.parameters())
    learned = step.players.vae.state_dict()
    assert not any(torch.equal(student[name], weight) for name, weight in learned.items()), "every weight learns"
    assert len(step.players.generator.trained) == len(list(step.players.vae.parameters()))


# ---------------------------------------------------------------- refusals and findings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__kl_weight": "0.1", "loss__free_bits": "1"}, "got loss.free_bits, loss.kl_weight with distil.teacher"),
        ({"model__latent_channels": "8"}, "got model.latent_channels with"),
        ({"fine_tune__source": "elsewhere"}, "got fine_tune.source with"),
        ({"loss__equivariance__weight": "0.5"}, "got loss.equivariance.weight with"),
        ({"loss__learn_logvar": "true"}, "got loss.learn_logvar with"),
        ({"loss__discriminator__sees": "latents"}, "got loss.discriminator.sees with"),
        ({"compile": "true"}, "got compile with"),
        ({"scale_images": "7"}, "got scale_images with"),
        ({"distil__encoder_blocks": "[1, 1, 1]"}, "need the same number of levels in both"),
        (
            {"distil__encoder_blocks": "[1, 1, 1]", "distil__decoder_blocks": "[1, 1, 1]"},
            "with 3 levels, which compress by 4; need 2 levels, since .* compresses by 2",
        ),
        ({"distil__teacher_weight": "1.5"}, "distil.teacher_weight=1.5; need a number from 0 to 1"),
        ({"checkpoint__best_metric": "kl"}, "need one of psnr, ssim, psnr_to_teacher, psnr_round_trip"),
        ({"data__resolution": "31"}, "need a positive multiple of 2, the compression ratio of 2 levels"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    teacher_folder, photographs, tmp_path, changes, message, capsys
):
    given = arguments(teacher_folder, photographs, tmp_path / "run", **changes)
    assert main(["train", *given]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    with pytest.raises(InputError, match=message):
        loop.train(parse_train_config(given))
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_settings_of_a_student_without_a_teacher_are_refused():
    with pytest.raises(InputError, match=r"got distil.latents without a teacher"):
        parse_train_config(["--distil.latents=mode"])
    check_used(parse_train_config(["--loss.kl_weight=0.1"]))


def test_distil_takes_the_vae_as_its_first_argument(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(loop, "train", seen.append)
    assert main(["distil", "some/vae", "--distil.decoder_width", "16"]) == 0
    assert seen == [parse_train_config(["--distil.teacher=some/vae", "--distil.decoder_width=16"])]
    assert main(["distil", "--steps", "3"]) == 2
    assert "got no VAE; need the one to learn from; sdvae distil VAE" in capsys.readouterr().err


def test_latents_that_are_not_scaled_to_one_are_found(teacher_folder, tmp_path):
    config = recipe(teacher_folder)
    accelerator = build_accelerator(config)
    with torch.no_grad():
        std = float(tiny_vae().encode(images()).latent_dist.mode().std())
    for factor, right in ((1 / std, True), (4 / std, False)):
        found = probe_teacher(Teacher(tiny_vae(scaling_factor=factor), accelerator), images(), config)
        assert [line for line in found if "scaling_factor" in line] == [] if right else any("std 4" in x for x in found)
        assert any("is it the right VAE?" in line for line in found), "whose weights are random"


def test_a_student_to_start_from_keeps_its_weights_and_shape(teacher_folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="sdvae")
    shape = {"encoder_block_out_channels": (8, 8), "num_encoder_blocks": (0, 1)}
    shape |= {"decoder_block_out_channels": (4, 4), "num_decoder_blocks": (1, 0)}
    first = StockAutoencoderTiny(**shape)
    first.save_pretrained(tmp_path / "student")
    student, *_ = starting_student(recipe(teacher_folder, student=str(tmp_path / "student")))
    assert not differences(dict(student.state_dict()), dict(first.state_dict()))
    assert student.training
    assert "widths and blocks in the recipe are not used" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 16}, r"with 16 latent_channels; need 4, those of"),
        ({"encoder_block_out_channels": (8,) * 3, "num_encoder_blocks": (1, 1, 1)}, r"compresses by 4; need 2, as"),
    ],
)
def test_a_student_that_does_not_fit_the_teacher_is_refused(teacher_folder, tmp_path, change, message):
    shape = {"encoder_block_out_channels": (8, 8), "num_encoder_blocks": (0, 1)}
    shape |= {"decoder_block_out_channels": (4, 4), "num_decoder_blocks": (1, 0)}
    StockAutoencoderTiny(**{**shape, **change}).save_pretrained(tmp_path / "student")
    with pytest.raises(InputError, match=message):
        starting_student(recipe(teacher_folder, student=str(tmp_path / "student")))
    with pytest.raises(InputError, match="is no AutoencoderTiny; need a student"):
        starting_student(recipe(teacher_folder, student=str(teacher_folder)))


@pytest.mark.parametrize("with_norms", [False, True])
def test_blocks_of_a_new_student_are_relus_and_its_output_follows_the_latents(teacher_folder, with_norms):
    student, *_ = starting_student(recipe(teacher_folder, decoder_width=32, use_midblock_gn=with_norms))
    assert (student.decoder.layers[2].pool is not None) == with_norms
    x = torch.randn(1, 32, 8, 8)
    for layer in student.decoder.layers:
        if isinstance(layer, TinyBlock):
            assert torch.equal(layer(x), x.relu())
    with torch.no_grad():
        first, other = (student.decode(torch.randn(1, 4, 8, 8)).sample for _ in range(2))
    assert float((first - other).std()) > 0.1


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole(teacher_folder, photographs, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "draw", blank)
        run(teacher_folder, photographs, output)
    return output


@pytest.mark.slow
def test_figures_of_a_validation_are_those_of_the_saved_student(whole, teacher_folder, photographs):
    config = parse_train_config(arguments(teacher_folder, photographs, whole))
    _, validation = open_sources(config.data, config.seed)
    crops = EvaluationImages(validation, resolution=32, reading=reading_of(config))
    x = torch.stack([crops[i]["image"] for i in range(len(crops))])
    student, vae = StockAutoencoderTiny.from_pretrained(whole / "model"), load_vae(teacher_folder)
    with torch.no_grad():
        mode = vae.encode(x).latent_dist.mode()
        scaled = (mode - 0.1) * 0.4
        latents = student.encode(x).latents
        decoded, round_trip, picture = student.decode(scaled).sample, student.decode(latents).sample, vae.decode(mode)
    wanted = {
        "psnr": psnr(x, decoded).mean(),
        "psnr_to_teacher": psnr(picture.sample.clamp(-1, 1), decoded).mean(),
        "teacher_psnr": psnr(x, picture.sample).mean(),
        "psnr_round_trip": psnr(x, round_trip).mean(),
        "latents": (latents - scaled).square().mean(),
    }
    last = records(whole)[-1]
    assert last["step"] == 5
    for name, value in wanted.items():
        assert last[f"validation/{name}"] == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.slow
def test_only_the_student_is_saved_and_every_class_loads_it(whole, photographs):
    kept = result(whole)
    assert kept["weights"].keys() == {"generator", "discriminator", "ema"}
    assert not differences(kept["weights"]["ema"], dict(kept["model"])), "the moving average is saved"
    assert {key.removeprefix("vae.") for key in kept["weights"]["generator"]} == kept["model"].keys()
    config = json.loads((whole / "model" / "config.json").read_text())
    assert (config["_class_name"], config["scaling_factor"], config["shift_factor"]) == ("AutoencoderTiny", 1.0, 0.0)
    card = (whole / "model" / "README.md").read_text()
    assert "AutoencoderTiny.from_pretrained" in card
    assert "| teacher_psnr |" in card
    assert "## Previews" in card
    assert not any("kl" in name for line in kept["metrics"] for name in line)


@pytest.mark.slow
def test_a_student_with_norms_learns_them_and_its_card_says_how_to_load_it(teacher_folder, photographs, tmp_path):
    run(teacher_folder, photographs, tmp_path / "run", distil__use_midblock_gn="true")
    student = load_vae(tmp_path / "run" / "model")
    last = student.get_parameter("decoder.layers.2.pool.3.weight")
    assert float(last.abs().max()) > 0, "it starts from zero"
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "AutoencoderTiny.from_pretrained" not in card
    assert 'pipe.vae = load_vae("path/to/this/folder")' in card


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "step"), [("sigterm", 2), ("crash", 3)])
def test_interrupted_and_continued_is_uninterrupted(whole, teacher_folder, photographs, tmp_path, kind, step):
    with fault(kind, step), pytest.raises((Stopped, Crash)):
        run(teacher_folder, photographs, tmp_path / "run")
    run(teacher_folder, photographs, tmp_path / "run")
    assert not differences(result(tmp_path / "run"), result(whole))


@pytest.mark.slow
def test_a_teacher_that_changed_is_refused(teacher_folder, photographs, tmp_path):
    vae: AutoencoderKL = load_vae(teacher_folder)
    save_vae(vae, tmp_path / "vae")
    with fault("sigterm", 2), pytest.raises(Stopped):
        run(tmp_path / "vae", photographs, tmp_path / "run")
    vae.register_to_config(scaling_factor=0.5)
    save_vae(vae, tmp_path / "other")
    (tmp_path / "other" / "config.json").replace(tmp_path / "vae" / "config.json")
    with pytest.raises(InputError, match=r"distil.teacher has other weights or other factors"):
        run(tmp_path / "vae", photographs, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_and_accumulation_learn_what_one_batch_learns(teacher_folder, photographs, tmp_path):
    """Without a discriminator, whose adaptive weight is that of a forward pass."""
    alone = {"loss__discriminator__weight": "0", "validate_every": "5"}
    run(teacher_folder, photographs, tmp_path / "one", **alone)
    run(
        *(teacher_folder, photographs, tmp_path / "accumulated"),
        **alone,
        batch_size="2",
        gradient_accumulation_steps="2",
    )
    given = arguments(teacher_folder, photographs, tmp_path / "two", **alone, batch_size="2")
    finished = launch(run_main, ["train", *given], tmp_path, world_size=2)
    assert finished.codes == [0, 0], finished.stderr[-3000:]
    one = result(tmp_path / "one")
    for name in ("accumulated", "two"):
        other = result(tmp_path / name)
        for key, weight in one["weights"]["generator"].items():
            torch.testing.assert_close(other["weights"]["generator"][key], weight, rtol=1e-4, atol=1e-5, msg=key)
        for a, b in zip(one["metrics"], other["metrics"], strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_machines_whose_teachers_scale_latents_differently_are_refused(tmp_path):
    given = []
    for name, factor in (("first", 0.4), ("second", 0.5)):
        (tmp_path / name).mkdir()
        save_vae(tiny_vae(scaling_factor=factor), tmp_path / name / "vae")
        draw_photographs(tmp_path / name / "photographs")
        given.append(json.dumps([str(tmp_path / name), *arguments(Path("vae"), Path("photographs"), Path("run"))]))
    finished = launch(train_in_own_folder, given, tmp_path, world_size=2)
    assert finished.codes == [2, 2], finished.stderr[-3000:]
    assert "would not train the same VAE (scaling of latents" in finished.stderr
    assert not (tmp_path / "first" / "run").exists()


@pytest.mark.slow
def test_a_step_with_nan_is_skipped_and_a_bad_image_left_out(teacher_folder, photographs, tmp_path, caplog):
    source = draw_photographs(tmp_path / "photographs")
    (source / "bad.png").write_bytes(b"not a picture")
    with fault("nan", 2):
        run(teacher_folder, source, tmp_path / "run", data__max_bad_fraction="0.5")
    assert "step 3 is skipped: process 0: discriminator nan" in caplog.text
    state = read_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[0]).state
    assert state["ema_updates"] == 4
    assert [name for name, _ in state["bad_images"]] == ["bad.png"]


@pytest.mark.slow
def test_the_benchmark_prints_the_figures_of_the_run(whole, monkeypatch, capsys):
    script = Path(__file__).parents[1] / "scripts" / "benchmark_student.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(whole), "--rounds", "1", "--side", "32"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    printed = capsys.readouterr().out
    last = records(whole)[-1]
    psnr_row = next(line for line in printed.splitlines() if line.startswith("| psnr |"))
    shown = [float(cell) for cell in psnr_row.split("|")[2:5]]
    wanted = [last[f"validation/{name}"] for name in ("teacher_psnr", "psnr", "psnr_to_teacher")]
    assert shown == pytest.approx(wanted, abs=0.006)
    student = StockAutoencoderTiny.from_pretrained(whole / "model")
    assert f"| {sum(p.numel() for p in student.decoder.parameters()):,} |" in printed
    assert len([line for line in printed.splitlines() if " ms |" in line]) == 4
