"""Every command that reconstructs images agrees with diffusers' class, padding, mapping to images and cropping by hand.

Two VAEs go through all of them: a grey one whose decoder gives logits (a Bernoulli likelihood), on images of 28 pixels
as MNIST's, and an RGB one; neither size is a multiple of the compression ratio.
"""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from PIL import Image
from torch import Tensor

from sdvae import load_vae, save_vae
from sdvae.cli import main
from sdvae.data import ReadOptions, center_crop, read_image, to_tensor
from sdvae.errors import InputError
from sdvae.roundtrip import round_trip
from sdvae.studio.demo.view import Edits, Model, encode, open_photograph, show
from sdvae.studio.report.robustness import deltas
from tests.conftest import tiny_vae

COUNT = 3


@dataclass(frozen=True)
class Case:
    """A VAE's folder, a folder of images that are 9 pixels wider than high, and the side of square crops of them."""

    vae: Path
    data: Path
    side: int
    channels: int
    likelihood: str

    def files(self) -> list[Path]:
        return sorted(self.data.iterdir())

    def crops(self) -> Tensor:
        """(COUNT, C, side, side) in [-1, 1], as the commands cut them."""
        images = [read_image(file, ReadOptions(channels=self.channels)) for file in self.files()]
        return torch.stack([to_tensor(center_crop(image, self.side)) for image in images])

    @torch.no_grad()
    def padded(self, images: Tensor) -> Tensor:
        ratio = 2 ** (len(self.stock().config.block_out_channels) - 1)
        height, width = images.shape[2:]
        assert height % ratio, "the case is about padding"
        edges = ((0, 0), (0, 0), (0, -height % ratio), (0, -width % ratio))
        return torch.from_numpy(np.pad(images.numpy(), edges, mode="edge"))

    def stock(self) -> StockAutoencoderKL:
        return StockAutoencoderKL.from_pretrained(self.vae)

    @torch.no_grad()
    def reconstructed(self, images: Tensor) -> np.ndarray:
        """(N, C, H, W) -> the same, in [-1, 1], float64, by diffusers' class and NumPy."""
        stock = self.stock()
        output = stock.decode(stock.encode(self.padded(images)).latent_dist.mode()).sample
        output = output[:, :, : images.shape[2], : images.shape[3]].double().numpy()
        return np.tanh(output / 2) if self.likelihood == "bernoulli" else output.clip(-1, 1)

    def psnr(self, images: Tensor | None = None, levels: bool = False) -> list[float]:
        """Of each crop in dB; with `levels`, after rounding to 8 bits."""
        x = self.crops() if images is None else images
        y = self.reconstructed(x)
        y = ((y + 1) * 127.5).round() / 127.5 - 1 if levels else y
        return [10 * math.log10(4 / np.square(a.double().numpy() - b).mean()) for a, b in zip(x, y, strict=True)]

    def arguments(self, output: Path) -> list[str]:
        return [f"--data={self.data}", f"--resolution={self.side}", f"--count={COUNT}", f"--output={output}"]


@pytest.fixture(scope="module", params=["bernoulli", "rgb"])
def case(request, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    grey = request.param == "bernoulli"
    case = Case(folder / "vae", folder / "data", 28 if grey else 36, 1 if grey else 3, "bernoulli" if grey else "")
    widths = (8, 8, 8, 8, 8) if grey else (8, 8, 8, 8)
    vae = tiny_vae(block_out_channels=widths, in_channels=case.channels, out_channels=case.channels)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 8 if grey else 2  # logits for which the tanh matters
    if grey:
        vae.set_likelihood("bernoulli")
    save_vae(vae, case.vae)
    case.data.mkdir()
    generator = np.random.default_rng(0)
    for i in range(COUNT):
        coarse = generator.integers(0, 256, (6, 6, case.channels), dtype=np.uint8)
        image = Image.fromarray(coarse.squeeze())
        image.resize((case.side + 9, case.side), Image.Resampling.BICUBIC).save(case.data / f"{i}.png")
    return case


def test_the_likelihood_makes_a_difference_that_the_tests_below_would_see(case):
    x = case.crops()
    stock = case.stock()
    with torch.no_grad():
        output = stock.decode(stock.encode(case.padded(x)).latent_dist.mode()).sample[..., : case.side, : case.side]
    plain = 10 * np.log10(4 / np.square(x.numpy() - output.clamp(-1, 1).numpy()).mean((1, 2, 3)))
    apart = np.abs(plain - case.psnr()).min()
    assert apart > 0.5 if case.likelihood == "bernoulli" else apart < 1e-4


def test_a_round_trip_is_diffusers_own_and_a_sample_is_each_images(case):
    vae, x = load_vae(case.vae, dtype=torch.float32), case.crops()
    trip = round_trip(vae, x)
    np.testing.assert_allclose(trip.reconstruction.clamp(-1, 1), case.reconstructed(x), atol=2e-5)
    assert torch.equal(trip.latents, trip.posterior.mode())
    assert trip.encode_seconds > 0
    assert trip.decode_seconds > 0

    seeds = [torch.Generator().manual_seed(i) for i in range(COUNT)]
    sampled = round_trip(vae, x, latents="sample", generator=seeds)
    noise = (sampled.latents - trip.posterior.mean) / trip.posterior.std
    alone = round_trip(vae, x[2:], latents="sample", generator=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(alone.latents, sampled.latents[2:])
    wanted = torch.randn(noise[2:].shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(noise[2:], wanted, atol=1e-3, rtol=0)
    assert not torch.allclose(sampled.reconstruction, trip.reconstruction)


def test_evaluate(case, tmp_path):
    assert main(["evaluate", str(case.vae), *case.arguments(tmp_path), "--lpips=none", "--num_workers=0"]) == 0
    with (tmp_path / "per_image.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["psnr"]) for row in rows] == pytest.approx(case.psnr(levels=True), abs=1e-3)


def test_reconstruct(case, tmp_path, capsys):
    files = case.files()
    assert main(["reconstruct", *map(str, files), f"--vae={case.vae}", f"--output={tmp_path}"]) == 0
    said = capsys.readouterr().out.splitlines()
    for file, line in zip(files, said, strict=True):
        x = to_tensor(read_image(file, ReadOptions(channels=case.channels)))[None]
        with Image.open(tmp_path / file.name) as picture:
            assert picture.size == (case.side + 9, case.side)
            assert picture.mode == ("L" if case.channels == 1 else "RGB")
            pixels = np.asarray(picture, dtype=float).reshape(case.side, case.side + 9, -1)
        wanted = (case.reconstructed(x)[0].transpose(1, 2, 0) + 1) * 127.5
        assert np.abs(pixels - wanted).max() <= 0.51
        assert float(re.search(r"([\d.]+) dB", line)[1]) == pytest.approx(case.psnr(x)[0], abs=0.006)


def test_explore(case, tmp_path):
    arguments = [f"--vae={case.vae}", *case.arguments(tmp_path), "--sigmas", "25"]
    assert main(["explore", "all", *arguments]) == 0
    mean = np.mean(case.psnr())
    figures = {path.stem: json.loads(path.read_text())["figures"] for path in tmp_path.glob("*.json")}
    assert len(figures) == 7
    assert figures["denoise"]["clean"] == pytest.approx(mean, abs=0.006)
    assert figures["pca"]["psnr_with_components"]["4"] == pytest.approx(mean, abs=0.006)
    ends = [127.5 * y.std() for y in case.reconstructed(case.crops())[:2]]
    assert [figures["interpolate"]["linear"]["contrast"][i] for i in (0, -1)] == pytest.approx(ends, abs=0.006)


def test_the_demos_view(case):
    file = case.files()[1]
    image, _ = open_photograph(file, max_side=256)
    model = Model.load(str(case.vae))
    view = show(model, encode(model, image), Edits())
    x = to_tensor(read_image(file, ReadOptions(channels=case.channels)))[None]
    wanted = (case.reconstructed(x)[0].transpose(1, 2, 0) + 1) * 127.5
    assert np.abs(np.asarray(view.reconstruction, dtype=float).reshape(wanted.shape) - wanted).max() <= 0.51
    assert float(view.figures["PSNR"].removesuffix(" dB")) == pytest.approx(case.psnr(x)[0], abs=0.006)


def test_report(case, tmp_path):
    arguments = [*case.arguments(tmp_path / "report.html"), "--lpips=none"]
    assert main(["report", str(case.vae), *arguments]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = [float(number) for number in re.findall(r'data-psnr="([^"]*)"', text)]
    assert found == pytest.approx(case.psnr(), abs=1e-3)
    trips = re.findall(r"<td>([\d.]+)</td>", text.partition('id="trips"')[2].partition("</table>")[0])
    x, drift = case.crops(), []
    for _ in range(2):
        x = torch.from_numpy(case.reconstructed(x)).float()
        drift.append(np.mean([-10 * math.log10(e / 4) for e in (case.crops() - x).square().mean((1, 2, 3)).tolist()]))
    assert [float(trips[0]), float(trips[2])] == pytest.approx(drift, abs=0.02), "each trip pads and crops anew"


def test_strips_and_half_precision_are_compared_as_images(case):
    vae, x = load_vae(case.vae, dtype=torch.float32), case.crops()
    found = {delta.name: delta for delta in deltas(vae, x)}
    assert found["strips"].psnr > 80
    half = case.stock().half().float()  # rounded weights explain most of the difference
    with torch.no_grad():
        output = half.decode(half.encode(case.padded(x)).latent_dist.mode()).sample[..., : case.side, : case.side]
    y = output.double().numpy()
    y = np.tanh(y / 2) if case.likelihood == "bernoulli" else y.clip(-1, 1)
    largest = np.abs(y - case.reconstructed(x)).max() * 127.5
    assert 0.2 * largest < found["fp16"].largest < 30 * largest


def test_push_measures(case, tmp_path):
    arguments = [f"--data={case.data}", f"--resolution={case.side}", f"--count={COUNT}"]
    assert main(["push", str(case.vae), "me/vae", *arguments, f"--dry_run={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    psnr = float(re.search(r"\| psnr \| ([\d.]+) \|", card)[1])
    assert psnr == pytest.approx(np.mean(case.psnr()), rel=1e-3)
    assert load_vae(tmp_path / "out").likelihood == load_vae(case.vae).likelihood
    assert ("gives the logits" in card) == (case.likelihood == "bernoulli")


def test_fp16_audit_and_fix(case, tmp_path, capsys):
    images = [f"--images={case.data}", f"--resolution={case.side}", f"--count={COUNT}"]
    assert main(["fp16", "audit", str(case.vae), *images, "--layers=1000"]) == 0
    said = dict(re.findall(r"^  (\S+) +(\S+)", capsys.readouterr().out, re.MULTILINE))
    stock, x = case.stock(), case.padded(case.crops())
    with torch.no_grad():
        first = stock.encoder.conv_in(x)
        last = stock.decode(stock.encode(x).latent_dist.mode()).sample
    assert float(said["encoder.conv_in"]) == pytest.approx(float(first.abs().max()), rel=1e-3)
    assert float(said["decoder.conv_out"]) == pytest.approx(float(last.abs().max()), rel=1e-3)

    assert main(["fp16", "fix", str(case.vae), str(tmp_path / "fixed"), *images]) == 0
    assert "the same to the bit" in capsys.readouterr().out
    assert load_vae(tmp_path / "fixed").likelihood == load_vae(case.vae).likelihood


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("sdvae.statistics", {"torchmetrics", "matplotlib", "lpips", "torch_fidelity"}),
        ("sdvae.roundtrip", {"torchmetrics", "matplotlib", "lpips", "torch_fidelity"}),
        ("sdvae.metrics.image", {"lpips", "sdvae.metrics.perceptual", "sdvae.metrics.fid"}),
        ("sdvae.evaluation.evaluate", {"gradio", "sdvae.metrics.fid", "sdvae.studio", "sdvae.cli", "sdvae.training"}),
        ("sdvae.studio.report", {"gradio", "sdvae.cli"}),
        ("sdvae.evaluation.config", {"torch"}),
    ],
)
def test_a_module_imports_only_what_it_needs(module, unwanted):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not unwanted & set(done.stdout.split())


def test_rfid_without_torch_fidelity_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    arguments = ["evaluate", "--data=skimage", "--resolution=32", "--count=2", "--lpips=none"]
    assert main([*arguments, "--fid=true", f"--output={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert 'pip install "sdvae[fid]"' in said
    assert said.count("\n") == 1
    assert main([*arguments, "--images=0", f"--output={tmp_path / 'out'}"]) == 0


def test_images_of_other_channels_are_refused():
    with pytest.raises(InputError, match="need"):
        round_trip(tiny_vae(), torch.zeros(1, 1, 16, 16))


def test_images_of_integers_are_refused():
    with pytest.raises(InputError, match=r"got images of torch\.uint8; need floats"):
        round_trip(tiny_vae(), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
