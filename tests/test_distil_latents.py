"""`sdvae distil` from a data set of latents: the same lesson without the teacher's encoder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdvae import InputError, save_vae
from sdvae.cli import parse_train_config
from sdvae.data import ReadOptions, SampleKey, center_crop, open_source, read_image, to_tensor
from sdvae.data.dataset import collate_training
from sdvae.errors import Stopped
from sdvae.latents.config import EncodeConfig
from sdvae.latents.dataset import LatentDataset
from sdvae.latents.encode import encode
from sdvae.model import AutoencoderKLFlux2
from sdvae.noise import posterior_generators
from sdvae.training import loop, save
from sdvae.training.checkpoint import checkpoints, read_checkpoint
from sdvae.training.data import training_images
from sdvae.training.encoded import EncodedImages, encoded_findings
from sdvae.weights import load_vae
from tests.conftest import draw_photographs, tiny_vae
from tests.faults import blank, fault
from tests.processes import launch, run_main
from tests.test_distil import arguments, result, run, step_of
from tests.test_resume import differences


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(save, "draw", blank)


def encoded(source: Path, vae: Path, output: Path, **options) -> Path:
    options = {"resolution": 32, "mirror": True, "dtype": "fp32", "precision": "fp32", "device": "cpu", **options}
    encode(EncodeConfig(source=str(source), output=str(output), vae=str(vae), **options))
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A teacher, photographs, and their latents at 32 pixels, with mirror images."""
    folder = tmp_path_factory.mktemp("made")
    save_vae(tiny_vae(scaling_factor=0.4, shift_factor=0.1), folder / "vae")
    photographs = draw_photographs(folder / "photographs")
    return folder / "vae", photographs, encoded(photographs, folder / "vae", folder / "latents")


def recipe(made, output: Path, **changes: str) -> list[str]:
    vae, photographs, latents = made
    return arguments(vae, photographs, output, **{"distil__latents_folder": str(latents), **changes})


def crops(made, **changes: str) -> EncodedImages:
    images = training_images(open_source(str(made[1])), parse_train_config(recipe(made, Path("unused"), **changes)))
    assert isinstance(images, EncodedImages)
    return images


# ---------------------------------------------------------------- what is learned from


@pytest.mark.parametrize("resolution", [16, 32])
def test_latents_are_those_of_the_whole_image_and_cut_where_its_pixels_are(made, resolution):
    images, teacher = crops(made, data__resolution=str(resolution)), load_vae(made[0])
    source = open_source(str(made[1]))
    flips, places = set(), set()
    for epoch in range(3):
        for index in range(len(images)):
            sample = images[SampleKey(epoch, index)]
            whole = to_tensor(center_crop(read_image(source.read(index), ReadOptions()), 32))[None]
            views = {False: whole, True: whole.flip(3)}
            found = [
                (mirrored, top, left)
                for mirrored, view in views.items()
                for top in range(33 - resolution)
                for left in range(33 - resolution)
                if torch.equal(view[0, :, top : top + resolution, left : left + resolution], sample["image"])
            ]
            ((mirrored, top, left),) = found
            assert top % 2 == left % 2 == 0, "places are multiples of the compression ratio"
            with torch.no_grad():
                moments = teacher.encode(views[mirrored]).latent_dist.parameters[0]
            side = resolution // 2
            wanted = moments[:, top // 2 : top // 2 + side, left // 2 : left // 2 + side]
            torch.testing.assert_close(sample["moments"], wanted, rtol=1e-4, atol=1e-5)
            flips.add(mirrored)
            places.add((top, left))
    assert flips == {False, True}
    assert len(places) > 20 if resolution < 32 else places == {(0, 0)}


def test_a_lesson_is_that_of_the_encoder_with_the_same_noise(made):
    images = crops(made)
    batch = collate_training([images[SampleKey(0, index)] for index in range(4)])
    config = parse_train_config(recipe(made, Path("unused")))
    teacher = step_of(config)._outcome.teacher
    for seeds in (None, batch["noise_seed"]):
        generators = [None if seeds is None else posterior_generators(seeds) for _ in range(2)]
        wanted = teacher.lesson(batch["image"], generators[0])
        lesson = teacher.lesson(batch["image"], generators[1], batch["moments"])
        for ours, theirs in zip(lesson, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_step_runs_the_teachers_encoder(made, monkeypatch):
    images = crops(made)
    batch = collate_training([images[SampleKey(0, index)] for index in range(2)])
    config = parse_train_config(recipe(made, Path("unused"), distil__teacher_weight="0.5"))
    step = step_of(config)

    def encoder(*_):
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(step._outcome.teacher.vae, "encode", encoder)
    assert not step(0, iter([batch])).skipped
    del batch["moments"]
    with pytest.raises(AssertionError, match="the encoder ran"):
        step(0, iter([batch]))


def test_images_of_several_shapes_are_cut_to_one(made, tmp_path):
    vae, photographs, _ = made
    source = shutil.copytree(photographs, tmp_path / "photographs")
    Image.open(source / "00.png").resize((40, 80)).save(source / "00.png")
    latents = encoded(source, vae, tmp_path / "latents", buckets="area", bucket_step=8, mirror=False)
    shapes = {tuple(LatentDataset(latents).posterior(row).mean.shape[2:]) for row in range(10)}
    assert len(shapes) > 1
    images = crops((vae, source, latents), data__resolution="16")
    assert {images[SampleKey(0, index)]["moments"].shape for index in range(10)} == {(8, 8, 8)}
    assert not any(images[SampleKey(epoch, 3)]["image"].isnan().any() for epoch in range(3))


def test_crops_of_latents_that_a_batch_norm_scales_by_patches_have_whole_ones(made, tmp_path):
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    flux = AutoencoderKLFlux2(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **levels).eval()
    flux.set_statistics(torch.randn(16), torch.rand(16) + 0.5)
    save_vae(flux, tmp_path / "vae")
    latents = encoded(made[1], tmp_path / "vae", tmp_path / "latents")
    images = crops((tmp_path / "vae", made[1], latents), data__resolution="16")
    rows = LatentDataset(latents, sample=False)
    places = [(y, x) for y in range(0, 9, 2) for x in range(0, 9, 2)]
    for index in range(10):
        moments = images[SampleKey(0, index)]["moments"]
        whole = [rows.posterior(index, mirrored=mirrored).parameters[0] for mirrored in (False, True)]
        assert any(torch.equal(moments, z[:, y : y + 8, x : x + 8]) for z in whole for y, x in places)


def test_a_data_set_of_means_serves_the_mode(made, tmp_path):
    vae, photographs, _ = made
    latents = encoded(photographs, vae, tmp_path / "latents", store="mean", mirror=False)
    images = crops((vae, photographs, latents), distil__latents="mode", data__flip="0")
    whole = crops(made, data__flip="0")
    for index in range(3):
        means, moments = (of[SampleKey(0, index)]["moments"] for of in (images, whole))
        assert torch.equal(means[:4], moments[:4])


# ---------------------------------------------------------------- refusals, bad images, findings


def refused(given: list[str], output: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        loop.train(parse_train_config(given))
    assert len(str(error.value).splitlines()) == 1
    assert not output.exists() or not any(output.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__resolution": "64"}, "whose images have sides from 32 pixels on, and training crops of 64"),
        ({"data__resolution": "31", "data__pad": "true"}, "need a multiple of 2, at most 32"),
        ({"data__background": "[0, 0, 0]"}, r"made with background=\[255, 255, 255\], and data.background=\(0, 0, 0\)"),
        ({"data__color": "raw"}, "made with color=srgb, and data.color=raw"),
        ({"data__color_jitter": "0.1"}, "got data.color_jitter=0.1 with distil.latents_folder"),
        ({"distil__latents_folder": "nowhere"}, "nowhere holds no manifest.json; need a folder that"),
    ],
)
def test_latents_of_something_else_are_refused_before_anything_is_written(made, tmp_path, changes, message):
    refused(recipe(made, tmp_path / "run", **changes), tmp_path / "run", message)


def test_latents_of_another_vae_are_refused_and_those_of_its_half_precision_file_are_its_own(made, tmp_path):
    vae, photographs, latents = made
    other = tiny_vae(scaling_factor=0.4)
    with torch.no_grad():
        other.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    save_vae(other, tmp_path / "other")
    given = recipe((tmp_path / "other", photographs, latents), tmp_path / "run")
    refused(given, tmp_path / "run", r"made by another VAE \(encoder \w{12}…\); need the latents of .*other")

    save_vae(load_vae(vae, dtype="fp16"), tmp_path / "half")
    of_half = encoded(photographs, tmp_path / "half", tmp_path / "latents")
    assert run(tmp_path / "half", photographs, tmp_path / "run", steps="1", distil__latents_folder=str(of_half))


def test_unfinished_latents_and_those_that_cannot_be_sampled_are_refused(made, tmp_path):
    vae, photographs, latents = made
    unfinished = shutil.copytree(latents, tmp_path / "unfinished")
    manifest = json.loads((unfinished / "manifest.json").read_text())
    (unfinished / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    refused(recipe((vae, photographs, unfinished), tmp_path / "run"), tmp_path / "run", "unfinished is not complete")
    means = encoded(photographs, vae, tmp_path / "means", store="mean")
    refused(
        *(recipe((vae, photographs, means), tmp_path / "run"), tmp_path / "run"),
        r"with store=mean; distil.latents=sample needs moments; encode again",
    )


def test_latents_of_other_images_are_refused(made, tmp_path):
    vae, photographs, latents = made
    more = shutil.copytree(photographs, tmp_path / "more")
    shutil.copy(more / "00.png", more / "new.png")
    given = recipe((vae, more, latents), tmp_path / "run", data__validation_names="[00.png]")
    refused(given, tmp_path / "run", r"without 1 of the 10 training images, such as new.png; need the latents")


def test_images_without_latents_and_changed_ones_are_bad_and_replaced(made, tmp_path):
    vae, photographs, _ = made
    source = shutil.copytree(photographs, tmp_path / "photographs")
    (source / "00.png").write_bytes(b"not a picture")
    latents = encoded(source, vae, tmp_path / "latents", max_bad_fraction=0.5)
    shutil.copy(photographs / "00.png", source / "00.png")  # mended, but it has no latents
    shutil.copy(photographs / "02.png", source / "01.png")
    images = crops((vae, source, latents))
    first, second = images[SampleKey(0, 0)], images[SampleKey(0, 1)]
    assert first["bad"][0] == ("00.png", "has no latents: " + next(iter(LatentDataset(latents).skipped().values())))
    assert second["bad"][0] == ("01.png", "changed since its latents were made")
    assert first["image"].shape == second["image"].shape == (3, 32, 32)


def test_what_encoded_images_cannot_have_is_said(made, tmp_path):
    vae, photographs, _ = made
    plain = encoded(photographs, vae, tmp_path / "latents", mirror=False)
    config = parse_train_config(recipe(made, tmp_path, data__crop_scale="[0.4, 0.7]", data__flip="0.5"))
    assert [line.split(" is ")[0] for line in encoded_findings(config, crops(made))] == ["data.crop_scale=[0.4, 0.7]"]
    config = replace(config, data=replace(config.data, crop_scale=(0.5, 1.0)))
    (line,) = encoded_findings(config, crops((vae, photographs, plain)))
    assert "has no mirror images, so no image is flipped (data.flip=0.5)" in line
    samples = [crops((vae, photographs, plain))[SampleKey(epoch, 0)]["image"] for epoch in range(8)]
    assert all(torch.equal(sample, samples[0]) for sample in samples)


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_interrupted_and_continued_is_uninterrupted_and_other_latents_are_refused(made, tmp_path):
    given = recipe(made, tmp_path / "whole", data__resolution="16", data__validation_resolution="32")
    loop.train(parse_train_config(given))
    vae, photographs, latents = made
    copied = shutil.copytree(latents, tmp_path / "latents")
    changes = {"distil__latents_folder": str(copied), "data__resolution": "16", "data__validation_resolution": "32"}
    with fault("sigterm", 2), pytest.raises(Stopped):
        run(vae, photographs, tmp_path / "run", **changes)
    shutil.move(copied, tmp_path / "kept")
    encoded(photographs, vae, copied, dtype="fp16")
    with pytest.raises(InputError, match=r"distil.latents_folder holds other latents than when the run began"):
        run(vae, photographs, tmp_path / "run", **changes)
    shutil.rmtree(copied)
    shutil.move(tmp_path / "kept", copied)
    run(vae, photographs, tmp_path / "run", **changes)
    assert not differences(result(tmp_path / "run"), result(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_also_with_loader_workers(made, tmp_path):
    alone = {"loss__discriminator__weight": "0", "validate_every": "5", "steps": "2"}
    loop.train(parse_train_config(recipe(made, tmp_path / "one", **alone, data__num_workers="1")))
    given = recipe(made, tmp_path / "two", **alone, batch_size="2")
    finished = launch(run_main, ["train", *given], tmp_path, world_size=2)
    assert finished.codes == [0, 0], finished.stderr[-3000:]
    one, two = (read_checkpoint(checkpoints(tmp_path / name / "checkpoints")[0]) for name in ("one", "two"))
    for key, weight in one.weights["generator"].items():
        torch.testing.assert_close(two.weights["generator"][key], weight, rtol=1e-4, atol=1e-5, msg=key)
