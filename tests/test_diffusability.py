"""Figures of latents against closed forms and brute force, and `sdvae evaluate --diffusability`."""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae import InputError, load_vae, save_vae
from sdvae.cli import main
from sdvae.evaluation.diffusability import SMALLEST_SET, LatentImage, check_size, collect, fault_of, halfway, measure
from sdvae.latents.scaling import scaling_of
from sdvae.metrics import fid
from sdvae.metrics.equivariance import SCALES, TURNS, Transformation, Transformed, encoder_errors, transform
from sdvae.metrics.geometry import nearest_neighbours, negentropy, slerp, two_nn
from sdvae.metrics.image import psnr
from sdvae.metrics.spectrum import Spectra, channel_power, radial_power
from sdvae.model import AutoencoderKL, AutoencoderTiny
from sdvae.weights.load import PACKAGED_VAE
from tests.test_evaluate import Features, frechet_distance
from tests.test_flux2 import flux2_vae

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


def photographs_like(count: int, side: int = 64) -> Tensor:
    """Smooth images in [-1, 1]."""
    return F.interpolate(normal(count, 3, 8, 8).clamp(-1, 1), size=side, mode="bicubic", antialias=True).clamp(-1, 1)


# --- spectra


def test_the_spectrum_of_white_noise_is_flat_and_that_of_a_power_law_has_its_slope():
    noise = Spectra(radial_power(normal(100, 1, 64, 64)))
    assert noise.mean.mean().item() == pytest.approx(1, rel=0.02)
    assert noise.slope == pytest.approx(0, abs=0.05)
    counts = 33**2 - 1, 17**2 - 1  # frequencies within a square would be 4 to 1; within a disc they are too
    assert noise.high_share.mean().item() == pytest.approx(1 - counts[1] / counts[0], abs=0.02)
    frequency = torch.fft.fftfreq(64, dtype=torch.float64)
    radius = torch.hypot(frequency[:, None], frequency).clamp(min=1 / 64)
    for slope in (-1.0, -2.0):
        coloured = torch.fft.ifft2(torch.fft.fft2(normal(200, 1, 64, 64).double()) * radius ** (slope / 2)).real
        assert Spectra(radial_power(coloured)).slope == pytest.approx(slope, abs=0.1)


def test_shares_of_the_energy_fall_from_one_to_nothing_and_belong_to_images():
    power = radial_power(normal(10, 1, 16, 16)) * torch.arange(1, 11)[:, None]
    spectra = Spectra(power)
    assert spectra.energy.sum(dim=1).mean().item() == pytest.approx(1)
    assert (spectra.share_above.diff() <= 0).all()
    assert spectra.share_above[-1].item() == pytest.approx(0, abs=1e-12)
    half = spectra.share_above[spectra.frequency == 0.5].item()
    assert spectra.high_share.mean().item() == pytest.approx(half)
    assert torch.allclose(Spectra(7 * power).share_above, spectra.share_above), "whatever the scale of the latents"
    z = normal(2, 3, 16, 16)
    by_hand = torch.stack([radial_power(z[:, c : c + 1]) for c in range(3)]).mean(dim=0)
    torch.testing.assert_close(channel_power(z), by_hand)


# --- equivariance


class Pooling(torch.nn.Module):
    """An autoencoder that follows every transformation: means of 8 x 8 pixels, and back."""

    spatial_compression_ratio, dtype, likelihood = 8, torch.float32, "gaussian"
    offset = 0.0

    def encode(self, x):
        z = F.avg_pool2d(x, 8)
        ramp = self.offset * torch.arange(z.shape[-1]) / z.shape[-1]
        return type("Output", (), {"latents": z + ramp})

    def decode(self, z):
        return type("Output", (), {"sample": z.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)})


def test_an_autoencoder_that_follows_turns_has_no_error_and_one_that_does_not_has_that_of_a_loop():
    images, vae = photographs_like(5), Pooling()
    perfect = transform(vae, images, F.avg_pool2d(images, 8))
    for name in TURNS:
        assert encoder_errors([row[name] for row in perfect]).max().item() == pytest.approx(0, abs=1e-9)
        assert [row[name].decoder_loss for row in perfect] == pytest.approx([0] * 5, abs=1e-4)
    vae.offset = 0.5  # a ramp from left to right, whatever the image
    z = vae.encode(images).latents
    rows = transform(vae, images, z)
    wanted, found = z.flip(3), vae.encode(images.flip(3)).latents
    variance = np.mean([found[:, c].numpy().var() for c in range(3)])
    by_hand = [float((found[i] - wanted[i]).square().mean()) / variance for i in range(5)]
    assert encoder_errors([row["mirrored"] for row in rows]).tolist() == pytest.approx(by_hand, rel=1e-4)
    x = images.flip(3)
    losses = psnr(x, vae.decode(found).sample) - psnr(x, vae.decode(wanted).sample)
    assert [row["mirrored"].decoder_loss for row in rows] == pytest.approx(losses.tolist(), abs=1e-4)
    quarter = Transformation(scale=0.25)(images, (16, 16))
    apart = vae.encode(quarter).latents - Transformation(scale=0.25)(z, (2, 2))
    assert rows[3]["quarter"].error == pytest.approx(float(apart[3].square().sum()), rel=1e-4)
    assert rows[3]["quarter"].positions == 4


def test_independent_latents_have_an_encoder_error_of_two_and_constants_one():
    def error(found: Tensor, wanted: Tensor) -> float:
        transformed = [
            Transformed(
                float((a - b).double().square().sum()),
                float(a.double().square().sum()),
                a.double().sum((1, 2)),
                64,
                0.0,
            )
            for a, b in zip(found, wanted, strict=True)
        ]
        return encoder_errors(transformed).mean().item()

    a, b = 3 * normal(200, 2, 8, 8) + 5, 3 * normal(200, 2, 8, 8, seed=1) + 5
    assert error(a, b) == pytest.approx(2, rel=0.05)
    assert error(a, torch.full_like(a, 5)) == pytest.approx(1, rel=0.05)
    assert error(100 * a, 100 * b) == pytest.approx(error(a, b))


# --- geometry


@pytest.mark.parametrize("dimension", [1, 2, 5, 9])
def test_two_nn_finds_the_dimension_of_a_curved_manifold(dimension):
    """Uniform points of a cube, bent into 30 dimensions by a smooth map with a small curvature."""
    flat = torch.rand(1500, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    embedding = torch.linalg.qr(normal(30, dimension).double()).Q
    points = flat @ embedding.T + 0.1 * torch.sin(2 * flat @ normal(dimension, 30, seed=1).double())
    assert two_nn(points) == pytest.approx(dimension, rel=0.2)
    assert two_nn(torch.cat([points, points[:500]])) == pytest.approx(two_nn(points)), "copies count once"
    assert two_nn(100 * points + 7) == pytest.approx(two_nn(points), rel=1e-6)


def test_two_nn_is_the_fit_of_the_paper_computed_pair_by_pair():
    points = normal(40, 3)
    ratios = []
    for i in range(40):
        first, second = sorted(math.dist(points[i].tolist(), points[j].tolist()) for j in range(40) if j != i)[:2]
        ratios.append(math.log(second / first))
    x = np.array(sorted(ratios)[:36])
    y = np.array([-math.log(1 - i / 40) for i in range(1, 37)])
    assert two_nn(points) == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("Gaussian", normal(200_000), 0.0),
        ("wide Gaussian off zero", 30 * normal(200_000) - 4, 0.0),
        (
            "uniform",
            torch.rand(200_000, generator=torch.Generator().manual_seed(0)),
            0.5 * math.log(math.pi * math.e / 6),
        ),
        (
            "Laplace",
            torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(200_000, generator=torch.Generator().manual_seed(0))),
            0.5 * math.log(4 * math.pi * math.e) - 1 - math.log(2),
        ),
    ],
)
def test_negentropy_is_that_of_the_closed_form(name, values, wanted):
    assert negentropy(values) == pytest.approx(wanted, abs=0.01), name


def test_the_nearest_neighbour_is_another_image_and_that_of_a_loop():
    z = normal(20, 2, 4, 4)
    z[7] = 3 * z[2]  # the same direction
    similarity = F.cosine_similarity(z.flatten(1)[:, None], z.flatten(1)[None], dim=2).fill_diagonal_(-2)
    assert nearest_neighbours(z).tolist() == similarity.argmax(dim=1).tolist()
    assert nearest_neighbours(z)[7] == 2
    with pytest.raises(InputError, match="need at least 2"):
        nearest_neighbours(z[:1])


def test_slerp_keeps_the_norm_of_two_of_one_norm_and_is_linear_where_the_arc_is_flat():
    a, b = F.normalize(normal(3, 8), dim=1)[..., None, None], F.normalize(normal(3, 8, seed=1), dim=1)[..., None, None]
    for t in (0.0, 0.25, 0.5, 1.0):
        middle = slerp(a, b, t)
        assert middle.flatten(1).norm(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-5)
        angle = F.cosine_similarity(a.flatten(1), b.flatten(1)).acos()
        assert F.cosine_similarity(a.flatten(1), middle.flatten(1)).clamp(max=1).acos().tolist() == pytest.approx(
            (t * angle).tolist(), abs=1e-3
        )
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)


# --- distances between features


class Embedding(torch.nn.Module):
    """In place of CLIP: eight features that can be computed by hand."""

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        return (Features()(pixels),)


def test_cmmd_is_the_mean_of_kernels_pair_by_pair(monkeypatch):
    monkeypatch.setattr("torch_fidelity.feature_extractor_clip.FeatureExtractorCLIP", lambda *_, **__: Embedding())
    monkeypatch.setattr(fid, "CHUNK", 3)
    measured = fid.ReconstructionMMD(None, CPU)
    x, y = (normal(10, 3, 16, 16, seed=seed).clamp(-1, 1) for seed in (0, 1))
    for part in x.split(4):
        measured.add(part, real=True)
    for images in (y, x):
        measured.add(images, real=False)
        vectors = []
        for batch in (x, images):
            features = Features()(((batch + 1) * 127.5).round().to(torch.uint8)).double().tolist()
            vectors.append([np.array(v) / np.linalg.norm(v) for v in features])

        def kernel(p: list[np.ndarray], q: list[np.ndarray]) -> float:
            return float(np.mean([math.exp(-((a - b) ** 2).sum() / 200) for a in p for b in q]))

        p, q = vectors
        wanted = 1000 * (kernel(p, p) + kernel(q, q) - 2 * kernel(p, q))
        assert measured.compute() == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert wanted == pytest.approx(0, abs=1e-9), "of the originals themselves"


def test_clip_comes_from_a_local_archive_and_other_files_are_refused(tmp_path, monkeypatch):
    """A tiny CLIP in the form of OpenAI's files: a TorchScript archive of which the tensors count."""
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_clip.load_state_dict_from_url", lambda *_, **__: pytest.fail("no download")
    )
    torch.manual_seed(0)

    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = CLIPVisual(8, 28, 1, 64, 14).visual
            self.text_projection = torch.nn.Parameter(torch.zeros(4, 8))  # tells the width of the embedding

    archive = Archive()
    torch.jit.script(Holder(archive.state_dict())).save(str(tmp_path / "clip.pt"))
    measured = fid.ReconstructionMMD(str(tmp_path / "clip.pt"), CPU)
    x = normal(4, 3, 28, 28).clamp(-1, 1)
    measured.add(x, real=True)
    pixels = ((x + 1) * 127.5).round()
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    with torch.inference_mode():
        wanted = F.normalize(archive.visual.eval()((pixels / 255 - mean) / std), dim=1)
    torch.testing.assert_close(measured._real[0].float(), wanted, atol=5e-3, rtol=0)  # OpenAI's weights are in fp16
    (tmp_path / "clip.pt").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="does not hold CLIP's weights"):
        fid.ReconstructionMMD(str(tmp_path / "clip.pt"), CPU)


class Holder(torch.nn.Module):
    """Tensors under given names, some of them with dots."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            place: torch.nn.Module = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, Empty())
                place = getattr(place, part)
            place.register_buffer(last, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Empty(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_dinov2_is_transformers_own_with_the_published_names(tmp_path):
    transformers = pytest.importorskip("transformers")
    from sdvae.metrics.dinov2 import DinoV2

    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14, layerscale_value=0.5
    )
    torch.manual_seed(0)
    theirs = transformers.Dinov2Model(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ours = DinoV2(published(theirs.state_dict(), layers=2))
    x = normal(2, 3, 42, 42)
    with torch.inference_mode():
        torch.testing.assert_close(ours.class_token(x), theirs(x).last_hidden_state[:, 0], atol=1e-4, rtol=1e-4)
        pixels = torch.randint(0, 256, (2, 3, 30, 50), dtype=torch.uint8)
        assert ours(pixels).shape == (2, 128), "of any size, with resized positions"
    torch.save(ours.state_dict(), tmp_path / "dino.pth")
    measured = fid.ReconstructionFDD(str(tmp_path / "dino.pth"), CPU)
    images = normal(6, 3, 32, 32).clamp(-1, 1), normal(6, 3, 32, 32, seed=1).clamp(-1, 1)
    for batch, real in zip(images, (True, False), strict=True):
        measured.add(batch, real=real)
    with torch.inference_mode():
        features = [ours(((batch + 1) * 127.5).round().to(torch.uint8)).double().numpy() for batch in images]
    assert measured.compute() == pytest.approx(frechet_distance(*features), rel=1e-2, abs=1e-4)
    torch.save({"pos_embed": torch.zeros(1, 10, 128)}, tmp_path / "dino.pth")
    with pytest.raises(InputError, match="does not hold DINOv2's weights"):
        fid.ReconstructionFDD(str(tmp_path / "dino.pth"), CPU)


def published(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """transformers' tensors under the names of the published files."""
    named = {
        "cls_token": state["embeddings.cls_token"],
        "mask_token": state["embeddings.mask_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    for i in range(layers):
        theirs, ours = f"encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            of_attention = [key for key in state if key.startswith(f"{theirs}attention.") and key.endswith(kind)]
            *parts, out = of_attention  # query, key, value and output, whose names depend on transformers' version
            named[f"{ours}attn.qkv.{kind}"] = torch.cat([state[part] for part in parts])
            named[f"{ours}attn.proj.{kind}"] = state[out]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                named[f"{ours}{name}.{kind}"] = state[f"{theirs}{name}.{kind}"]
        named[f"{ours}ls1.gamma"] = state[f"{theirs}layer_scale1.lambda1"]
        named[f"{ours}ls2.gamma"] = state[f"{theirs}layer_scale2.lambda1"]
    return named


# --- the command


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def images_of(latents: Tensor) -> list[LatentImage]:
    transformed = {
        name: Transformed(1.0, 2.0, torch.zeros(latents.shape[1]).double(), 16, 0.5) for name in SCALES | TURNS
    }
    power = radial_power(normal(len(latents), 1, 16, 16))
    return [LatentImage(i, z, power[i], transformed) for i, z in enumerate(latents)]


def test_latents_are_those_a_diffusion_model_gets_and_samples_depend_on_image_and_seed():
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=0.5, shift_factor=2.0)
    x = photographs_like(4, 16)
    together = collect(vae, [{"image": x, "index": [0, 1, 2, 3]}], seed=0)
    alone = collect(vae, [{"image": x[2:3], "index": [2]}], seed=0)
    torch.testing.assert_close(together[2].latents, alone[0].latents, atol=1e-5, rtol=1e-5)
    other = collect(vae, [{"image": x[2:3], "index": [2]}], seed=1)
    assert not torch.allclose(other[0].latents, alone[0].latents, atol=1e-3)
    with torch.no_grad():
        posterior = vae.encode(x[2:3]).latent_dist
    unscaled = scaling_of(vae).denormalize(alone[0].latents)
    assert ((unscaled - posterior.mean) / posterior.std).abs().max() < 6
    assert unscaled.mean().item() == pytest.approx(posterior.mean.mean().item(), abs=0.5)


def test_latents_of_flux2_are_measured_in_patches_and_decode_again():
    vae, x = flux2_vae(), photographs_like(SMALLEST_SET, 32)
    factor, channels = vae.spatial_compression_ratio, vae.config.latent_channels
    with pytest.raises(InputError, match=f"which has one latent for {2 * factor} x {2 * factor} pixels"):
        check_size(vae, "a", 12 * factor)
    check_size(vae, "a", 16 * factor)
    x = F.interpolate(x, size=16 * factor)
    found = collect(vae, [{"image": x, "index": list(range(SMALLEST_SET))}], seed=0)
    assert found[0].latents.shape == (4 * channels, 8, 8)
    assert scaling_of(vae).denormalize(halfway(found)).shape == (SMALLEST_SET, channels, 16, 16)
    result = measure(found, probe_steps=1, seed=0, device=CPU, name="a")
    assert len(result.entropy) == 4 * channels
    assert result.probe is not None
    assert math.isfinite(result.probe.ratio.mean().item())


def test_a_factor_and_a_constant_on_the_latents_change_no_figure():
    z = normal(SMALLEST_SET + 2, 2, 8, 8)
    first = measure(images_of(z), probe_steps=2, seed=0, device=CPU, name="a")
    second = measure(images_of(9 * z + 5), probe_steps=2, seed=0, device=CPU, name="b")
    assert second.figures == pytest.approx(first.figures, rel=1e-3)
    for index, row in first.per_image.items():
        assert second.per_image[index] == pytest.approx(row, rel=1e-3)
    assert sum("probe_ratio" in row for row in first.per_image.values()) == 2
    without = measure(images_of(z), probe_steps=0, seed=0, device=CPU, name="c")
    assert without.probe is None
    assert without.details()["probe_levels"] is None
    json.dumps(first.details())


def test_what_has_no_figures_is_said():
    z = normal(12, 2, 8, 8)
    assert fault_of(images_of(z)) is None
    z[:, 1] = 3.0
    assert fault_of(images_of(z)) == "channel 1 of its latents is the same everywhere"
    z[3, 0, 0, 0] = math.nan
    assert fault_of(images_of(z)) == "its latents are not finite"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """Two tiny VAEs and a student on 12 images, with iFID by features that can be computed by hand."""
    folder = tmp_path_factory.mktemp("diffusability")
    for name, vae in (("a", tiny_vae(0)), ("b", tiny_vae(1))):
        save_vae(vae, folder / name)
    (folder / "images").mkdir()
    from sdvae.data import to_image

    for i, x in enumerate(photographs_like(12, 32)):
        to_image(x).save(folder / "images" / f"{i:02}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "NoTrainInceptionV3", lambda *_, **__: Features())
        patch.setattr(fid, "FEATURES", 8)
        arguments = [str(folder / "a"), str(folder / "b"), f"--data={folder / 'images'}", "--resolution=32"]
        arguments += ["--diffusability=true", "--probe_steps=2", "--fid=true", "--lpips=none", "--num_workers=0"]
        assert main(["evaluate", *arguments, "--images=0", f"--output={folder / 'out'}"]) == 0
    return folder


def test_the_command_gives_a_second_table_the_figures_of_images_and_paired_differences(evaluated):
    table = (evaluated / "out" / "table.md").read_text()
    _, second = table.split("\n\n|")
    titles = [cell.strip() for cell in second.splitlines()[0].split("|")[:-1]]
    assert titles[:4] == ["VAE", "probe ÷ linear", "probe error", "iFID"]
    assert "- iFID: " in second
    assert "lower is better" in second
    results = json.loads((evaluated / "out" / "results.json").read_text())
    for vae in results["vaes"]:
        assert vae["ifid"] > 0
        assert vae["means"]["probe_ratio"]["mean"] == pytest.approx(1, abs=0.2)
        assert len(vae["diffusability"]["probe_levels"]) == 5
        assert vae["diffusability"]["spectra"]["images"]["frequency"][-1] == 1
    paired = results["differences"][str(evaluated / "b")]
    with (evaluated / "out" / "per_image.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for key in ("probe_ratio", "encoder_scale_error", "decoder_turn_loss", "high_share"):
        a, b = ([float(row[key]) for row in rows if row["vae"].endswith(f"/{name}") and row[key]] for name in "ab")
        assert len(a) == len(b) == (2 if key.startswith("probe") else 12)
        assert paired[key]["mean"] == pytest.approx(np.mean(np.array(b) - np.array(a)), abs=1e-9)


def test_ifid_is_the_fid_of_the_halfway_points_decoded_by_hand(evaluated):
    vae = load_vae(evaluated / "a", dtype=torch.float32)
    from sdvae.data import read_image, to_tensor

    files = sorted((evaluated / "images").iterdir())
    x = torch.stack([to_tensor(read_image(file.read_bytes())) for file in files])
    with torch.no_grad():
        images = collect(vae, [{"image": x, "index": list(range(12))}], seed=0)
        z = halfway(images) / vae.config.scaling_factor
        y = vae.decode(z).sample.clamp(-1, 1)
    features = [Features()(((batch + 1) * 127.5).round().to(torch.uint8)).numpy().astype(float) for batch in (x, y)]
    results = json.loads((evaluated / "out" / "results.json").read_text())
    assert results["vaes"][0]["ifid"] == pytest.approx(frechet_distance(*features), rel=1e-2)
    latents = torch.stack([image.latents for image in images])
    nearest = latents[nearest_neighbours(latents)]
    torch.testing.assert_close(halfway(images), slerp(latents, nearest, 0.5))


def test_a_student_has_a_diffusability_and_a_vae_that_overflows_is_left_out(evaluated, tmp_path, caplog):
    torch.manual_seed(0)
    student = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=2,
    )
    save_vae(student, tmp_path / "student")
    broken = tiny_vae()
    with torch.no_grad():
        broken.encoder.conv_out.weight.mul_(1e20)  # finite, what they make of an image is not
        broken.quant_conv.weight.mul_(1e20)
    save_vae(broken, tmp_path / "broken")
    arguments = [f"--data={evaluated / 'images'}", "--resolution=32", "--diffusability=true", "--probe_steps=1"]
    arguments += ["--lpips=none", "--num_workers=0", f"--output={tmp_path / 'out'}"]
    with caplog.at_level(logging.WARNING):
        assert main(["evaluate", str(tmp_path / "student"), str(tmp_path / "broken"), *arguments]) == 0
    assert "has no diffusability: its latents are not finite" in caplog.text
    assert "diffusability of 12 images: the probe learns little from so few" in caplog.text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["vaes"][0]["means"]["probe_ratio"]["mean"] > 0
    assert "probe_ratio" not in results["vaes"][1]["means"]


def test_the_report_has_a_section_with_the_figures_and_both_plots(evaluated, tmp_path, capsys):
    arguments = [str(evaluated / "a"), f"--data={evaluated / 'images'}", "--resolution=32", "--lpips=none"]
    page = tmp_path / "report.html"
    assert main(["report", *arguments, "--diffusability=true", "--probe_steps=2", f"--output={page}"]) == 0
    section = page.read_text().split('<section id="diffusability">')[1].split("</section>")[0]
    results = json.loads((evaluated / "out" / "results.json").read_text())["vaes"][0]
    means = results["means"]
    for figure in (f"{means['encoder_scale_error']['mean']:.3f} ±", f"{results['intrinsic_dimension']:.1f}<"):
        assert figure in section
    assert section.count("<img") == 2
    assert "the images and measured on those" in section
    for message, wrong in (
        ("need diffusability=true", ["--probe_steps=3"]),
        ("diffusability needs at least 10", ["--diffusability=true", "--count=9"]),
    ):
        assert main(["report", *arguments, *wrong, f"--output={tmp_path / 'no.html'}"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no.html").exists()


def test_bad_input_is_one_line_before_the_first_image(evaluated, tmp_path, capsys):
    data = f"--data={evaluated / 'images'}"
    cases = {
        "need diffusability=true": [data, "--probe_steps=5"],
        "without fdd": [data, "--dinov2=x.pth"],
        "without cmmd": [data, "--clip=x.pt"],
        "got clip=x.pt, which is no file": [data, "--cmmd=true", "--clip=x.pt"],
        "needs a multiple of 32 and at least 64": [str(PACKAGED_VAE), data, "--resolution=32", "--diffusability=true"],
        "got 5 images; diffusability needs at least 10": [data, "--count=5", "--resolution=64", "--diffusability=true"],
        "need 0 or more": [data, "--diffusability=true", "--probe_steps=-1"],
    }
    for message, arguments in cases.items():
        assert main(["evaluate", *arguments, "--lpips=none", f"--output={tmp_path / 'out'}"]) == 2, message
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="needs a multiple of 32 and at least 64"):
        check_size(load_vae(), "packaged", 72)
    check_size(load_vae(), "packaged", 96)
