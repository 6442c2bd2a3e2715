"""`sdvae evaluate`: figures against independent computations, on one process and two."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import NoTrainInceptionV3

from sdvae import load_vae, save_vae
from sdvae.cli import main
from sdvae.data import adm_center_crop, open_source, read_image
from sdvae.data.crops import RESAMPLING
from sdvae.evaluation.config import EvaluateConfig
from sdvae.evaluation.evaluate import evaluate
from sdvae.metrics import fid
from sdvae.metrics.table import COLUMNS, differences, estimate_mean, markdown_table, means
from sdvae.weights.load import PACKAGED_VAE
from tests.processes import launch, run_main

COUNT, SIDE = 5, 64


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A VAE of one's own: the packaged one with a decoder that is too dark."""
    vae = load_vae(dtype=torch.float32)
    with torch.no_grad():
        vae.decoder.conv_out.bias -= 0.1
    folder = tmp_path_factory.mktemp("vaes") / "dark"
    save_vae(vae, folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(other, tmp_path_factory) -> Path:
    """The packaged VAE and the dark one, on COUNT photographs."""
    output = tmp_path_factory.mktemp("evaluated") / "out"
    arguments = ["--data=skimage", f"--resolution={SIDE}", f"--count={COUNT}", "--batch_size=2", "--lpips=none"]
    assert main(["evaluate", str(PACKAGED_VAE), str(other), *arguments, f"--output={output}"]) == 0
    return output


def originals() -> np.ndarray:
    """(COUNT, SIDE, SIDE, 3) uint8, cut by hand."""
    source = open_source("skimage")
    cut = []
    for i in range(COUNT):
        image = read_image(source.read(i))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        cut.append(np.asarray(image.resize((SIDE, SIDE), RESAMPLING, box=box)))
    return np.stack(cut)


def rows_of(folder: Path, vae: Path) -> list[dict[str, str]]:
    with (folder / "per_image.csv").open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["vae"] == str(vae)]


def test_the_figures_of_each_image_are_those_of_diffusers_reconstructions(evaluated, other):
    pixels = originals()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    for folder in (PACKAGED_VAE, other):
        stock = StockAutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
        with torch.no_grad():
            posterior = stock.encode(x).latent_dist
            decoded = stock.decode(posterior.mode()).sample
        y = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        rows = rows_of(evaluated, folder)
        assert [int(row["index"]) for row in rows] == list(range(COUNT))
        for i, row in enumerate(rows):
            a, b = pixels[i] / 255.0, y[i] / 255.0
            assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=0.01)
            ssim = structural_similarity(
                a, b, channel_axis=2, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            assert float(row["ssim"]) == pytest.approx(ssim, abs=2e-3)
            nats = float(posterior.kl()[i])
            assert float(row["kl_nats"]) == pytest.approx(nats, rel=1e-4)
            assert float(row["bits_per_pixel"]) == pytest.approx(nats / math.log(2) / SIDE**2, rel=1e-4)
            bias = (y[i].astype(float) - pixels[i]).mean(axis=(0, 1))
            assert [float(row[f"bias_{c}"]) for c in range(3)] == pytest.approx(bias, abs=0.02)


def test_means_intervals_and_paired_differences_are_in_the_json(evaluated, other):
    results = json.loads((evaluated / "results.json").read_text())
    psnr = {name: np.array([float(row["psnr"]) for row in rows_of(evaluated, name)]) for name in (PACKAGED_VAE, other)}
    for result, name in zip(results["vaes"], (PACKAGED_VAE, other), strict=True):
        assert result["vae"] == str(name)
        assert result["images"] == COUNT
        half = 2.776445 * psnr[name].std(ddof=1) / math.sqrt(COUNT)  # Student's t, 4 degrees of freedom
        mean = psnr[name].mean()
        wanted = {"mean": mean, "std": psnr[name].std(ddof=1), "low": mean - half, "high": mean + half}
        assert result["means"]["psnr"] == pytest.approx(wanted)
        assert result["encode_ms"] > 0
        assert result["memory_mib"] is None or result["memory_mib"] > 0
    apart = psnr[other] - psnr[PACKAGED_VAE]
    assert apart.mean() < -0.1, "a VAE that is too dark is worse"
    difference = results["differences"][str(other)]["psnr"]
    assert difference["mean"] == pytest.approx(apart.mean())
    half = 2.776445 * apart.std(ddof=1) / math.sqrt(COUNT)
    assert difference["high"] - difference["low"] == pytest.approx(2 * half)
    assert results["vaes"][1]["means"]["bias_1"]["mean"] < results["vaes"][0]["means"]["bias_1"]["mean"] - 5


def test_the_table_marks_the_best_and_the_picture_shows_every_vae(evaluated, other):
    lines = (evaluated / "table.md").read_text().splitlines()
    assert len(lines) == 6
    assert lines[5].startswith(f"Means over {COUNT} images ± 95 % confidence; {SIDE} x {SIDE} pixels")
    packaged, dark = (line.split("|")[1:-1] for line in lines[2:4])
    titles = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    at = titles.index("PSNR, dB")
    assert packaged[at].strip().startswith("**")
    assert not dark[at].strip().startswith("**")
    assert "rFID" not in titles, "what was not measured has no column"
    with Image.open(evaluated / "reconstructions.png") as picture:
        assert picture.width >= 3 * SIDE
        assert picture.height >= 4 * SIDE


@pytest.mark.slow
def test_two_processes_give_the_same_figures_of_each_image(evaluated, other, tmp_path):
    output = tmp_path / "two"
    arguments = ["--data=skimage", f"--resolution={SIDE}", f"--count={COUNT}", "--batch_size=2", "--lpips=none"]
    command = ["evaluate", PACKAGED_VAE, other, *arguments, "--num_workers=0", f"--output={output}"]
    done = launch(run_main, command, tmp_path, world_size=2)
    assert done.codes == [0, 0], done.stderr[-3000:]
    assert json.loads((output / "results.json").read_text())["processes"] == 2
    assert (output / "per_image.csv").read_bytes() == (evaluated / "per_image.csv").read_bytes()


def test_samples_depend_on_the_image_and_the_seed_alone(tmp_path):
    def psnr(**changes) -> list[float]:
        settings = {"data": "skimage", "resolution": SIDE, "count": 3, "lpips": "none", "latents": "sample"}
        (result,) = evaluate(EvaluateConfig(**{**settings, "output": str(tmp_path), "images": 0, **changes}))
        return [row["psnr"] for row in result["per_image"]]

    first = psnr()
    assert psnr() == first
    assert psnr(batch_size=1) == pytest.approx(first, abs=1e-3), "not on the batch"
    assert psnr(seed=1) != pytest.approx(first, abs=1e-4)
    assert psnr(latents="mode") != pytest.approx(first, abs=1e-4)
    assert not (tmp_path / "reconstructions.png").exists()


@pytest.mark.parametrize("overflow", ["nan", "inf"])
def test_what_overflows_is_counted_has_no_rfid_and_is_never_the_best(overflow, tmp_path, caplog):
    vae = load_vae(dtype=torch.float32)
    with torch.no_grad():  # weights within fp16, what they make of an image is not
        if overflow == "nan":
            vae.decoder.conv_in.weight *= 6e4 / vae.decoder.conv_in.weight.abs().max()
        else:
            vae.decoder.conv_out.weight *= 6e4 / vae.decoder.conv_out.weight.abs().max()
    save_vae(vae, tmp_path / "wide")
    arguments = [str(tmp_path / "wide"), str(PACKAGED_VAE), "--precision=fp16", "--resolution=32", "--count=2"]
    with caplog.at_level(logging.WARNING):
        assert main(["evaluate", *arguments, "--lpips=none", f"--output={tmp_path / 'out'}"]) == 0
    assert "of 2 reconstructions are not finite in fp16" in caplog.text
    wide, packaged = json.loads((tmp_path / "out" / "results.json").read_text())["vaes"]
    assert wide["not_finite"] >= 1
    assert packaged["not_finite"] == 0
    assert wide["rfid"] is None
    assert wide["means"]["psnr"]["mean"] is None
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert "**" not in table[2]
    assert "**" in table[3]


def test_bad_images_are_named_and_the_others_measured(photographs, tmp_path):
    (photographs / "05.png").write_bytes(b"no image")
    (result,) = evaluate(
        EvaluateConfig(data=str(photographs), resolution=32, lpips="none", output=str(tmp_path / "out"), images=10)
    )
    assert result["images"] == 9
    assert [row["index"] for row in result["per_image"]] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    skipped = json.loads((tmp_path / "out" / "results.json").read_text())["skipped"]
    assert list(skipped) == ["05.png"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["images"] == 10
    said = "Means over 9 of 10 images (not an image of a known format: 1) ± 95 %"
    assert said in (tmp_path / "out" / "table.md").read_text()


def test_a_name_that_is_no_text_and_a_picture_of_before_are_no_trouble(photographs, tmp_path):
    os.rename(photographs / "00.png", os.fsencode(photographs) + b"/caf\xe9.png")
    output = tmp_path / "out"
    output.mkdir()
    (output / "reconstructions.png").write_bytes(b"of another run")
    settings = {"data": str(photographs), "resolution": 32, "lpips": "none", "images": 0}
    evaluate(EvaluateConfig(output=str(output), **settings))
    assert r"caf\xe9.png" in (output / "per_image.csv").read_text()
    assert not (output / "reconstructions.png").exists()


def test_adms_crop_halves_by_boxes_then_resizes_then_crops():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    halved = pixels.reshape(48, 2, 80, 2, 3).astype(float).mean(axis=(1, 3))
    cropped = np.asarray(adm_center_crop(Image.fromarray(pixels), 48))
    assert cropped.shape == (48, 48, 3)
    assert np.abs(cropped - halved[:, 16:64]).max() <= 1, "once: half of 96 is what was asked for"
    small = adm_center_crop(Image.fromarray(pixels), 64)
    wanted = Image.fromarray(pixels).resize((107, 64), Image.Resampling.BICUBIC).crop((21, 0, 85, 64))
    assert np.array_equal(np.asarray(small), np.asarray(wanted))


class Features(torch.nn.Module):
    """In place of Inception: eight features of an image that can be computed by hand."""

    num_features = 8

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1] == 3
        return pixels.float().flatten(1)[:, ::97][:, :8]


def evaluate_with_features(argv: list[str]) -> None:
    """`sdvae evaluate`, in a process of its own, with `Features` in the place of Inception."""
    fid.NoTrainInceptionV3, fid.FEATURES = lambda *_, **__: Features(), 8
    sys.exit(main(["evaluate", *argv]))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3], ids=["images on both", "all images on one"])
def test_rfid_of_two_processes_is_that_of_one(other, tmp_path, batch_size):
    found = []
    for world_size in (1, 2):
        output = tmp_path / f"{world_size}"
        arguments = [
            PACKAGED_VAE,
            other,
            "--data=skimage",
            "--resolution=32",
            "--count=3",
            "--lpips=none",
            "--fid=true",
        ]
        arguments += [f"--batch_size={batch_size}", "--images=0", "--num_workers=0", f"--output={output}"]
        done = launch(evaluate_with_features, arguments, tmp_path, world_size=world_size)
        assert done.codes == [0] * world_size, done.stderr[-3000:]
        found.append([vae["rfid"] for vae in json.loads((output / "results.json").read_text())["vaes"]])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][0] > 0
    assert found[0][1] != pytest.approx(found[0][0], rel=1e-3)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, with scipy's matrix root."""
    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    covariances = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + covariances)


def test_rfid_is_the_frechet_distance_of_8_bit_images_and_the_originals_count_once(monkeypatch):
    monkeypatch.setattr(fid, "NoTrainInceptionV3", lambda *_, **__: Features())
    monkeypatch.setattr(fid, "FEATURES", 8)
    x = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    measured = fid.ReconstructionFID(None, torch.device("cpu"))
    for part in x.split(15):
        measured.add(part, real=True)
    distances = []
    for noise in (0.1, 0.3):
        y = (x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
        measured.add(y, real=False)
        features = [Features()(((z + 1) * 127.5).round().to(torch.uint8)).numpy().astype(float) for z in (x, y)]
        distances.append(measured.compute())
        assert distances[-1] == pytest.approx(frechet_distance(*features), rel=1e-3)
    assert distances[1] > distances[0] > 0


def test_inception_weights_come_from_a_local_file_and_are_torch_fidelitys(monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "FEATURES", 64)  # of the first pooling: quick
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("no download"))
    torch.manual_seed(0)
    weights = tmp_path / "inception.pth"
    skeleton = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    with monkeypatch.context() as patch:  # its constructor wants weights to load: take its own random ones
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        torch.save({}, weights)
        skeleton.__init__("inception-v3-compat", ["64"], str(weights))
    torch.save(skeleton.state_dict(), weights)
    measured = fid.ReconstructionFID(str(weights), torch.device("cpu"))
    network = measured._metric.inception
    assert isinstance(network, NoTrainInceptionV3)
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    pixels = ((x + 1) * 127.5).round().to(torch.uint8)
    (theirs,) = skeleton.eval()(pixels)
    torch.testing.assert_close(network(pixels), theirs)
    torch.save({"a": torch.zeros(1)}, weights)
    with pytest.raises(fid.InputError, match="does not hold Inception's weights"):
        fid.ReconstructionFID(str(weights), torch.device("cpu"))
    weights.write_bytes(b"rubbish")
    with pytest.raises(fid.InputError, match=r"inception\.pth"):
        fid.ReconstructionFID(str(weights), torch.device("cpu"))


def test_without_a_network_rfid_is_refused_and_lpips_left_out(monkeypatch, tmp_path, capsys, caplog):
    def unreachable(*_, **__):
        raise fid.URLError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    arguments = ["evaluate", "--data=skimage", "--resolution=32", "--count=2", f"--output={tmp_path / 'out'}"]
    assert main([*arguments, "--fid=true"]) == 2
    assert "no Inception weights for rFID: the download failed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with caplog.at_level(logging.WARNING):
        assert main([*arguments, "--images=0"]) == 0
    assert "LPIPS is left out" in caplog.text
    assert "lpips" not in (tmp_path / "out" / "per_image.csv").read_text()
    assert main([*arguments, "--lpips_weights=nowhere.pth"]) == 2, "what was asked for by name is not left out"


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, photographs, monkeypatch):
    wide = load_vae(dtype=torch.float32)
    out = wide.decoder.conv_out
    out.weight, out.bias = (torch.nn.Parameter(weight.data[:1]) for weight in (out.weight, out.bias))
    wide.register_to_config(out_channels=1)
    save_vae(wide, tmp_path / "wide")
    wide.encoder.conv_in.weight = torch.nn.Parameter(wide.encoder.conv_in.weight.data.sum(1, keepdim=True))
    wide.register_to_config(in_channels=1)
    save_vae(wide, tmp_path / "grey")
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "a.png").write_bytes((photographs / "00.png").read_bytes())
    (tmp_path / "single" / "b.png").write_bytes(b"no image")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(fid, "NoTrainInceptionV3", lambda *_, **__: Features())
    monkeypatch.setattr(fid, "FEATURES", 8)
    cases = {
        "with (3, 1) image channels": [str(tmp_path / "wide")],
        "got seed=-1": ["--seed=-1"],
        "whose trunk needs 32": ["--lpips=alex", "--resolution=16"],
        "without fid": ["--inception=x.pth"],
        "need each VAE once": ["a", "a"],
        "need at least 16": ["--resolution=8"],
        "got batch_size=0": ["--batch_size=0"],
        "unknown key 'resolutoin'": ["--resolutoin=8"],
        "need one kind": [str(PACKAGED_VAE), str(tmp_path / "grey"), "--data=skimage", "--lpips=none"],
        "none of the 10 images": [f"--data={photographs}", "--resolution=256", "--lpips=none"],
        "no such": ["--data=./nowhere"],
    }
    for message, arguments in cases.items():
        assert main(["evaluate", *arguments, f"--output={tmp_path / 'out'}"]) == 2, message
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("out/*"))
    single = [f"--data={tmp_path / 'single'}", "--resolution=32", "--min_side=1", "--lpips=none", "--fid=true"]
    assert main(["evaluate", *single, f"--output={tmp_path / 'out'}"]) == 2
    assert "rFID needs at least two" in capsys.readouterr().err
    assert main(["evaluate", "--count=1", "--lpips=none", f"--output={tmp_path / 'file'}"]) == 2
    assert "reconstruct" not in capsys.readouterr().err, "before the first image"


def test_vaes_may_stand_in_yaml_and_before_the_options_win(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("sdvae.evaluation.evaluate.evaluate", lambda config: seen.append(config.vaes))
    (tmp_path / "c.yaml").write_text("vaes: [a, b]\nlpips: none\n")
    assert main(["evaluate", "--config", str(tmp_path / "c.yaml")]) == 0
    assert main(["evaluate", "c", "d", "--config", str(tmp_path / "c.yaml")]) == 0
    assert main(["evaluate"]) == 0
    assert seen == [("a", "b"), ("c", "d"), ()]


def test_a_preset_sets_the_convention_and_says_when_the_images_are_others(caplog, tmp_path, monkeypatch):
    config = EvaluateConfig(preset="imagenet_val_50k_256", resolution=64, crop="resize").with_preset()
    assert (config.resolution, config.crop, config.quantize, config.min_side) == (256, "adm", True, 1)
    monkeypatch.setattr(EvaluateConfig, "with_preset", lambda self: dataclasses.replace(self, resolution=32))
    with caplog.at_level(logging.WARNING):
        evaluate(EvaluateConfig(preset="coco_val_5k_256", count=2, lpips="none", output=str(tmp_path / "out")))
    assert "published rows are of 5000 images, these are of 2" in caplog.text


def test_a_mean_of_one_image_has_no_interval_and_pairs_go_by_index():
    assert estimate_mean([3.0]).mean == 3.0
    assert math.isnan(estimate_mean([3.0]).low)
    collapsed = [{"vae": "a", "means": {}, "active_channels": 0}]
    assert "active channels" in markdown_table(collapsed, None), "nought is a figure"
    a = [{"index": 0, "name": "x", "psnr": 1.0}, {"index": 2, "name": "y", "psnr": 5.0}]
    b = [{"index": 2, "name": "y", "psnr": 4.0}, {"index": 0, "name": "x", "psnr": 1.5}]
    assert differences(a, b)["psnr"].mean == pytest.approx((-0.5 + 1.0) / 2)
    results = [{"vae": "a|b", "means": means(a), "rfid": 1.0}, {"vae": "c", "means": means(b), "rfid": 2.0}]
    table = markdown_table(results, None).splitlines()
    assert table[0].split("|")[1:-1] == [" VAE ", " PSNR, dB ", " rFID "]
    assert table[2].startswith("| a\\|b | **3.00")
    assert "**1.00**" in table[2]
    assert {column.key for column in COLUMNS} >= {"psnr", "ssim", "lpips", "rfid", "kl_nats"}
