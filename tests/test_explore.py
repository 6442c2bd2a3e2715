"""`sdvae explore`: each formula against an oracle or a loop, each experiment through the command line."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA

from sdvae import load_vae, save_vae
from sdvae.cli import main
from sdvae.data import center_crop, open_source, read_image, to_tensor
from sdvae.errors import InputError
from sdvae.model import AutoencoderKL, DiagonalGaussian
from sdvae.noise import sample_seed
from sdvae.pictures import CAPTION_HEIGHT, GAP, tile_grid
from sdvae.statistics import LatentCovariance, LatentMoments
from sdvae.studio.explore.anomaly import DEFECTS, add_defect, anomaly_scores, auroc, auroc_of_counts, count_errors
from sdvae.studio.explore.denoise import BLURS, add_noise, blur
from sdvae.studio.explore.experiments import EXPERIMENTS, explore_interpolation
from sdvae.studio.explore.moves import analogy, lerp, mean_analogy, slerp, traverse
from sdvae.studio.explore.prior import LatentSpectrum, gaussian_kl, neighbour_correlation, sample_moments
from sdvae.studio.explore.study import Study
from sdvae.studio.settings import Settings

DOCS = Path(__file__).parents[1] / "docs"
SIZE = 64  # pixels


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photograph(name: str, size: int = SIZE) -> torch.Tensor:
    source = open_source("skimage")
    names = [source.name(i) for i in range(len(source))]
    return to_tensor(center_crop(read_image(source.read(names.index(name))), size))


def smooth_posterior(
    count: int = 200, offset: float = 3.0, size: tuple[int, int] = (6, 10), scale: int = 2
) -> DiagonalGaussian:
    """Three channels that vary together and slowly, each with its own noise."""
    coarse = torch.randn(count, 3, size[0] // scale, size[1] // scale, generator=generator(1), dtype=torch.float64)
    z = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    mix = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [-0.5, 0.3, 0.2]], dtype=torch.float64)
    mean = torch.einsum("cd,ndhw->nchw", mix, z) + torch.tensor([offset, -1.0, 0.0]).double()[:, None, None]
    logvar = torch.tensor([0.0, -1.0, -2.0]).double().view(1, 3, 1, 1).expand_as(mean)
    return DiagonalGaussian(torch.cat([mean, logvar], dim=1))


# moves


def test_slerp_of_unit_vectors_turns_evenly_in_their_plane():
    a, b = torch.randn(2, 4, 5, 6, generator=generator(), dtype=torch.float64)
    a, b = a / a.norm(), b / b.norm()
    theta = math.acos(float((a * b).sum()))
    across = b - float((a * b).sum()) * a
    across /= across.norm()
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    expected = torch.stack([math.cos(s * theta) * a + math.sin(s * theta) * across for s in t.tolist()])
    torch.testing.assert_close(slerp(a, b, t), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(slerp(a.float(), b.float(), t), expected.float(), rtol=0, atol=1e-6)


def test_slerp_keeps_the_length_of_noise_and_lerp_loses_a_factor_of_root_two():
    a, b = torch.randn(2, 4, 32, 32, generator=generator())
    half = torch.tensor([0.5])
    assert float(slerp(a, b, half).norm() / a.norm()) == pytest.approx(1.0, abs=0.02)
    assert float(lerp(a, b, half).norm() / a.norm()) == pytest.approx(math.sqrt(0.5), abs=0.02)


@pytest.mark.parametrize("way", [lerp, slerp])
def test_ways_begin_and_end_at_their_ends(way):
    a, b = torch.randn(2, 4, 5, 6, generator=generator())
    torch.testing.assert_close(way(a, 7 * b, torch.tensor([0.0, 1.0])), torch.stack([a, 7 * b]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("turn", [0.0, 1e-9, 1e-4])
def test_slerp_of_nearly_parallel_vectors_is_the_straight_line(turn):
    a, other = torch.randn(2, 4, 5, 6, generator=generator(), dtype=torch.float64)
    b = 2 * (a + turn * other)
    t = torch.linspace(0, 1, 5)
    torch.testing.assert_close(slerp(a, b, t), lerp(a, b, t), rtol=0, atol=3 * turn**2 + 1e-12)


def test_vectors_without_one_arc_between_them_are_refused():
    a = torch.randn(4, 5, 6, generator=generator())
    half = torch.tensor([0.5])
    for b in (-a, -3.7 * a):
        with pytest.raises(InputError, match=r"got opposite vectors; need .*; use lerp"):
            slerp(a, b, half)
    for b in (torch.zeros_like(a), a / 0):
        with pytest.raises(InputError, match=r"got vectors of lengths .*; need finite ones, not 0; use lerp"):
            slerp(a, b, half)
    almost = -a + 1e-3 * torch.randn(a.shape, generator=generator(1))
    assert slerp(a, almost, half).norm() == pytest.approx(float(a.norm()), rel=0.01), "this far, there is one"


def test_a_traversal_moves_one_channel_at_every_position_alike():
    z, std, reach = torch.randn(3, 2, 4, generator=generator()), torch.tensor([1.0, 20.0, 0.5]), torch.tensor([-3.0, 2])
    moved = traverse(z, std, reach)
    assert moved.shape == (3, 2, 3, 2, 4)
    for c, k in itertools.product(range(3), range(2)):
        expected = z.clone()
        expected[c] += reach[k] * std[c]
        torch.testing.assert_close(moved[c, k], expected)


def test_mean_analogy_moves_the_means_and_nothing_else():
    a, b, c = torch.randn(3, 2, 4, 6, 6, generator=generator())
    moved = mean_analogy(a, b, c)
    over = (2, 3)
    torch.testing.assert_close(moved.mean(over), analogy(a, b, c).mean(over))
    torch.testing.assert_close(moved - moved.mean(over, keepdim=True), c - c.mean(over, keepdim=True))


# statistics


def test_principal_components_are_sklearns():
    posterior = smooth_posterior(offset=1e4)  # far from zero, where E[zzᵀ] - E[z]E[z]ᵀ loses digits
    covariance = LatentCovariance(3)
    for part in posterior.parameters.split(70):
        covariance.update(DiagonalGaussian(part))
    rows = posterior.mean.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    oracle = PCA().fit(rows)
    found = covariance.principal_components()
    np.testing.assert_allclose(found.mean, rows.mean(axis=0))
    np.testing.assert_allclose(found.explained, oracle.explained_variance_ratio_, atol=1e-6)
    np.testing.assert_allclose(found.axes.abs(), np.abs(oracle.components_), atol=1e-5)
    assert (found.axes.gather(1, found.axes.abs().argmax(1, keepdim=True)) > 0).all()
    np.testing.assert_allclose(covariance.covariance, np.cov(rows.T, bias=True), atol=1e-6)

    two = PCA(2).fit(rows)
    kept = found.keep(posterior.mean, 2).permute(0, 2, 3, 1).reshape(-1, 3)
    np.testing.assert_allclose(kept, two.inverse_transform(two.transform(rows)), atol=1e-3)
    torch.testing.assert_close(found.keep(posterior.mean, 3), posterior.mean)


def test_latents_that_do_not_vary_have_no_components():
    covariance = LatentCovariance(2)
    covariance.update(DiagonalGaussian(torch.ones(3, 4, 5, 5)))
    with pytest.raises(InputError, match="do not vary"):
        covariance.principal_components()


def test_samples_of_the_moments_have_these_moments_and_no_neighbours():
    moments = LatentMoments(3)
    moments.update(smooth_posterior())
    z = sample_moments(moments, (400, 8, 8), generator()).double()
    torch.testing.assert_close(z.mean((0, 2, 3)), moments.channel_mean, rtol=0, atol=0.05)
    torch.testing.assert_close(z.std((0, 2, 3)), moments.channel_std, rtol=0.02, atol=0)
    assert abs(neighbour_correlation(z)) < 0.02
    prior = torch.distributions.Normal(torch.zeros(3).double(), torch.ones(3).double())
    gaussians = torch.distributions.Normal(moments.channel_mean, moments.channel_std)
    torch.testing.assert_close(gaussian_kl(moments), torch.distributions.kl_divergence(gaussians, prior))


def test_the_spectrum_holds_the_covariance_and_its_samples_have_it_at_every_distance():
    height, width = 24, 40
    posterior = smooth_posterior(100, size=(height, width), scale=4)
    spectrum = LatentSpectrum(3, height, width)
    for part in posterior.parameters.split(70):
        spectrum.update(DiagonalGaussian(part))
    columns = posterior.mean.transpose(0, 1).flatten(1)
    covariance = torch.cov(columns, correction=0) + torch.diag(posterior.var.mean((0, 2, 3)))
    weight = torch.tensor([1.0] + [2.0] * (width - 1) + [1.0]).double()  # rfft2 leaves out the conjugate half
    total = torch.einsum("xycd,y->cd", spectrum.density, weight) / (4 * height * width)
    torch.testing.assert_close(total, covariance)

    data = posterior.sample(generator()).double()
    z = spectrum.sample(400, generator()).double()
    assert z.shape == (400, 3, height, width)
    torch.testing.assert_close(z.mean((0, 2, 3)), columns.mean(1), rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(z.transpose(0, 1).flatten(1)), covariance, rtol=0.03, atol=0.03)
    data, z = (x - x.mean((0, 2, 3), keepdim=True) for x in (data, z))
    for distance in (1, 2, 5):
        of_data, of_samples = (
            torch.einsum("nchw,ndhw->cd", x[..., distance:], x[..., :-distance]) / x[:, 0, :, distance:].numel()
            for x in (data, z)
        )
        torch.testing.assert_close(of_samples, of_data, rtol=0, atol=0.15)
    assert neighbour_correlation(z) == pytest.approx(neighbour_correlation(data), abs=0.03)
    with pytest.raises(InputError, match="crop all images to one size"):
        spectrum.update(DiagonalGaussian(torch.zeros(1, 6, width, height)))


def test_neighbour_correlation_equals_a_loop():
    z = smooth_posterior(8).mean
    expected = []
    for c in range(3):
        x = z[:, c].numpy() - z[:, c].numpy().mean()
        right = [x[i, r, k] * x[i, r, k + 1] for i in range(8) for r in range(6) for k in range(9)]
        below = [x[i, r, k] * x[i, r + 1, k] for i in range(8) for r in range(5) for k in range(10)]
        expected.append((np.mean(right) + np.mean(below)) / 2 / x.var())
    assert neighbour_correlation(z) == pytest.approx(np.mean(expected), rel=1e-9)
    with pytest.raises(InputError, match="raise the resolution"):
        neighbour_correlation(torch.zeros(2, 3, 1, 1))


# anomalies


def test_auroc_is_the_share_of_pairs_in_the_right_order_at_any_scale():
    low, high = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 9.0])
    for scale in (1e-9, 1.0, 1e9):  # 1e9: where a sigmoid makes all of them 1
        assert auroc(scale * low, scale * high) == 1.0
        assert auroc(scale * high, scale * low) == 0.0
        assert auroc(scale * low, scale * low) == 0.5
    a = torch.randint(0, 8, (40,), generator=generator()).double() * 1e4
    b = torch.randint(2, 10, (30,), generator=generator()).double() * 1e4
    pairs = [(x < y) + 0.5 * (x == y) for x in a.tolist() for y in b.tolist()]
    assert auroc(a, b) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert auroc(torch.zeros(3), torch.zeros(3)) == 0.5
    for bad in (torch.tensor([]), torch.tensor([math.nan])):
        with pytest.raises(InputError, match="need one of each, all finite"):
            auroc(a, bad)


def test_auroc_from_counts_is_the_exact_one_to_a_thousandth():
    for seed, scale in itertools.product(range(5), (1e-6, 1e-3, 0.1)):
        low, high = scale * torch.randn(2, 20_000, generator=generator(seed)).square()
        high = (high * (1 + seed)).clamp(max=4)
        low[:100] = high[:300] = 0.0  # pixels without an error
        counts = sum(count_errors(part) for part in low.split(7_000)), count_errors(high)
        assert [int(count.sum()) for count in counts] == [20_000, 20_000]
        assert auroc_of_counts(*counts) == pytest.approx(auroc(low, high), abs=1e-3)
    same = count_errors(torch.zeros(7))
    assert auroc_of_counts(same, same) == 0.5


def test_anomaly_scores_equal_loops():
    x, y = torch.rand(2, 2, 3, 20, 24, generator=generator()) * 2 - 1
    posterior = DiagonalGaussian(torch.randn(2, 8, 3, 3, generator=generator()))
    scores = anomaly_scores(x, y, posterior)
    for i in range(2):
        errors = ((x[i] - y[i]) ** 2).mean(0).numpy()
        assert float(scores["mse"][i]) == pytest.approx(errors.mean(), rel=1e-5)
        windows = [errors[r : r + 8, c : c + 8].mean() for r in range(13) for c in range(17)]
        assert float(scores["local"][i]) == pytest.approx(max(windows), rel=1e-5)
        q = torch.distributions.Normal(posterior.mean[i], posterior.std[i])
        p = torch.distributions.Normal(torch.zeros(4, 3, 3), torch.ones(4, 3, 3))
        kl = float(torch.distributions.kl_divergence(q, p).sum()) / (3 * 20 * 24)
        assert float(scores["kl"][i]) == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_is_where_it_says_and_the_same_for_a_seed(kind):
    image = photograph("chelsea")
    image[:, : SIZE // 2] = -1.0  # a black sky
    before = image.clone()
    for seed in range(40):
        damaged, where = add_defect(image, kind, generator(seed))
        assert torch.equal(image, before)
        assert torch.equal(where, (damaged != image).any(dim=0))
        assert 20 <= int(where.sum()) <= (SIZE // 4) ** 2 + SIZE
        assert damaged.abs().max() <= 1
        again, _ = add_defect(image, kind, generator(seed))
        assert torch.equal(again, damaged)
    with pytest.raises(InputError, match=r"need one of scratch, speckle, patch"):
        add_defect(image, "dent", generator())


def test_a_scratch_is_one_line_of_a_third_of_the_side():
    grey = torch.full((3, 96, 96), -0.1)
    for seed in range(20):
        damaged, where = add_defect(grey, "scratch", generator(seed))
        assert (damaged[:, where] == 1.0).all(), "white on what is darker than grey"
        y, x = where.nonzero().double().T
        extent = math.hypot(float(y.max() - y.min()), float(x.max() - x.min()))
        assert extent == pytest.approx(32, abs=3)
        longer = max(len(y.unique()), len(x.unique()))
        assert longer == max(int(y.max() - y.min()), int(x.max() - x.min())) + 1, "no gap"


# denoising


def test_noise_has_its_sigma_in_levels_and_stays_in_range():
    grey = torch.zeros(1, 3, 128, 128)
    assert float((127.5 * add_noise(grey, 15.0, generator())).std()) == pytest.approx(15.0, rel=0.02)
    white = add_noise(torch.ones(1, 3, 32, 32), 50.0, generator())
    assert float(white.max()) == 1.0
    assert float(white.min()) < 0.5


@pytest.mark.parametrize("sigma", [BLURS[0], 1.0, BLURS[-1]])
def test_blur_is_scipys(sigma):
    image = photograph("coffee", 32)
    expected = gaussian_filter(
        image.double().numpy(), sigma, axes=(1, 2), mode="mirror", radius=(math.ceil(3.5 * sigma),) * 2
    )
    np.testing.assert_allclose(blur(image[None], sigma)[0], expected, atol=1e-5)


# pictures


def test_a_grid_of_tiles_has_each_tile_in_its_place_and_words_around_it():
    colours = ((255, 0, 51), (0, 255, 51), (51, 0, 255))  # words are grey
    red, green, blue = (torch.tensor(c)[:, None, None].expand(3, 64, 80) / 127.5 - 1 for c in colours)
    words = {"rows": ["upper", "a lower row with a name that is much too long for one line"], "note": "n" * 400}
    grid = tile_grid([[red, green], [None, blue]], ["left", "right"], captions=[["a", "b"], ["", "d"]], **words)
    pixels = np.asarray(grid)
    boxes = []
    for colour in colours:
        mask = (pixels == colour).all(axis=2)
        y, x = mask.nonzero()
        top, left = int(y.min()), int(x.min())
        assert mask.sum() == mask[top : top + 64, left : left + 80].sum() == 64 * 80, "no word over a tile"
        boxes.append((top, left))
    (top, left), (_, right), (below, _) = boxes
    assert boxes == [(CAPTION_HEIGHT, left), (top, left + 80 + GAP), (below, right)]
    assert below > top + 64 + GAP, "room for the captions"
    assert right + 80 == grid.width
    for name, words_at in {
        "headings": pixels[:top, left:],
        "row names": pixels[top:, : left - 2],
        "captions": pixels[top + 64 : below, left:],
        "note": pixels[below + 64 + GAP :, :-2],
    }.items():
        assert (words_at < 128).any(), name
    assert (pixels[:, -1][below + 64 :] == 255).all(), "the note ends before the border"


# the command


@pytest.fixture(scope="module")
def explored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("explored")
    assert main(["explore", "all", *_small(folder)]) == 0
    return folder


def _small(output: Path) -> list[str]:
    images = ["--images", "astronaut", "chelsea", "coffee"]
    return [*images, "--count", "4", "--resolution", str(SIZE), "--steps", "3", "--output", str(output)]


def figures(folder: Path, what: str) -> dict:
    return json.loads((folder / f"{what}.json").read_text())["figures"]


def test_every_experiment_writes_a_picture_and_its_figures(explored):
    assert {path.name for path in explored.iterdir()} == {f"{w}.{end}" for w in EXPERIMENTS for end in ("png", "json")}
    for what in EXPERIMENTS:
        with Image.open(explored / f"{what}.png") as picture:
            assert min(picture.size) > SIZE
        record = json.loads((explored / f"{what}.json").read_text())
        assert record["experiment"] == what
        assert record["vae"] == "packaged"
        assert record["settings"]["resolution"] == SIZE
        assert record["figures"]


@pytest.mark.parametrize("what", ["prior", "anomaly", "denoise"])
def test_what_is_random_comes_back_with_its_seed_and_alone(explored, tmp_path, what, capsys):
    assert main(["explore", what, *_small(tmp_path / "again")]) == 0
    assert f"wrote {tmp_path / 'again' / what}.png" in capsys.readouterr().out
    assert main(["explore", what, *_small(tmp_path / "other"), "--seed", "1"]) == 0
    for end in ("png", "json"):
        again, other = ((tmp_path / run / f"{what}.{end}").read_bytes() for run in ("again", "other"))
        assert again == (explored / f"{what}.{end}").read_bytes()
        assert again != other


def test_denoising_figures_equal_a_loop_over_images(explored):
    vae = load_vae(dtype=torch.float32)
    source = open_source("skimage")
    study = Study(vae, Settings(count=4, resolution=SIZE))
    assert [name for name, _ in study.measured()] == [source.name(i) for i in range(4)]
    row = next(row for row in figures(explored, "denoise")["table"] if row["sigma"] == 25)
    levels: dict[str, list[float]] = {"noisy": [], "vae": [], "blur": [], "clean": []}
    for i in range(4):
        x = to_tensor(center_crop(read_image(source.read(i)), SIZE))[None]
        noise = torch.randn(x.shape, generator=generator(sample_seed(0, 0, i, "noise")))
        noisy = (x + 25 / 127.5 * noise).clamp(-1, 1)
        with torch.no_grad():
            drawn = {"noisy": noisy, "vae": vae(noisy).sample, "clean": vae(x).sample}
        smooth = gaussian_filter(noisy.double(), row["blur_pixels"], axes=(2, 3), mode="mirror", truncate=3.5)
        drawn["blur"] = torch.from_numpy(smooth)
        for kind, y in drawn.items():
            levels[kind].append(-10 * math.log10(float(((x - y.clamp(-1, 1)) / 2).double().square().mean())))
    for kind in ("noisy", "vae", "blur"):
        assert row[kind] == pytest.approx(np.mean(levels[kind]), abs=0.02), kind
    assert figures(explored, "denoise")["clean"] == pytest.approx(np.mean(levels["clean"]), abs=0.02)


def test_an_interpolation_begins_and_ends_with_the_reconstructions(explored):
    names = ("astronaut", "chelsea")
    x = torch.stack([photograph(name) for name in names])
    vae = load_vae(dtype=torch.float32)
    finding = explore_interpolation(Study(vae, Settings(images=names, resolution=SIZE, steps=3)))
    assert finding.figures["images"] == list(names)
    with torch.no_grad():
        y = vae(x).sample.clamp(-1, 1)
        z = vae.encode(x).latent_dist.mode().flatten(1).double()
    contrast = [float(127.5 * image.std(correction=0)) for image in y]
    for way in ("linear", "spherical", "cross_fade"):
        ends = [finding.figures[way]["contrast"][i] for i in (0, -1)]
        assert ends == pytest.approx(contrast, abs=0.05), way
    angle = math.degrees(math.acos(float((z[0] * z[1]).sum() / z[0].norm() / z[1].norm())))
    assert finding.figures["angle_degrees"] == pytest.approx(angle, abs=0.06)
    assert finding.figures == figures(explored, "interpolate")


def test_all_principal_components_decode_to_the_plain_reconstruction(explored):
    found = figures(explored, "pca")
    x = torch.stack([photograph(name) for name in ("astronaut", "chelsea", "coffee")])
    with torch.no_grad():
        y = load_vae(dtype=torch.float32)(x).sample.clamp(-1, 1)
    psnr = -10 * torch.log10(((x - y) / 2).square().mean((1, 2, 3)))
    assert found["psnr_with_components"]["4"] == pytest.approx(float(psnr.mean()), abs=0.02)
    assert sum(found["explained"]) == pytest.approx(1.0, abs=1e-3)
    assert found["measured_on"] == 4


def test_two_folders_are_told_apart_when_they_differ_and_not_when_they_are_the_same(tmp_path):
    folders = {"calm": (0.1, 6), "noise": (1.0, 4)}
    for name, (contrast, count) in folders.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            noise = 255 * np.random.default_rng(i).random((32, 32, 3))
            Image.fromarray((127.5 + contrast * (noise - 127.5)).astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    for name, area in {"noise": 1.0, "calm": 0.5}.items():
        output = tmp_path / f"{name} against calm"
        arguments = ["--data", str(tmp_path / "calm"), "--anomalies", str(tmp_path / name), "--resolution", "32"]
        assert main(["explore", "anomaly", *arguments, "--output", str(output)]) == 0
        found = figures(output, "anomaly")
        assert (found["normal"], found["anomalous"]) == (6, folders[name][1])
        assert (found["auroc"]["mse"], found["auroc"]["local"]) == (area, area)


def test_a_defect_that_changes_nothing_is_left_out_and_said(tmp_path, capsys):
    """A patch of a green image covers green with green."""
    folder = tmp_path / "constant"
    folder.mkdir()
    for i, colour in enumerate(
        ("black", "black", "lime", "black")
    ):  # lime: a larger error than of black with a scratch
        Image.new("RGB", (32, 32), colour).save(folder / f"{i}.png")
    arguments = ["--data", str(folder), "--resolution", "32", "--output", str(tmp_path / "out")]
    assert main(["explore", "anomaly", *arguments]) == 0
    found = figures(tmp_path / "out", "anomaly")
    assert (found["normal"], found["anomalous"]) == (4, 3)
    assert found["images_unchanged_by_defect"] == {"patch": 1}
    assert set(found["pixel_auroc"]) == {"scratch", "speckle"}
    assert found["raised_by_defect"]["mse"] == 1.0, "each against its own image"
    assert "images left out because the defect changed nothing: patch 1" in capsys.readouterr().out


def test_pixels_in_a_defect_are_told_apart_as_by_all_errors_at_once(explored):
    study = Study(load_vae(dtype=torch.float32), Settings(count=4, resolution=SIZE))
    inside: dict[str, list[torch.Tensor]] = {kind: [] for kind in DEFECTS}
    outside = []
    for i, (_, image) in enumerate(study.measured()):
        kind = DEFECTS[i % len(DEFECTS)]
        damaged, where = add_defect(image, kind, generator(sample_seed(0, 0, i, "defect")))
        errors = (damaged - study.decode(study.encode(damaged[None]).mode())[0]).square().mean(0)
        inside[kind].append(errors[where])
        outside.append(errors[~where])
    for kind, found in figures(explored, "anomaly")["pixel_auroc"].items():
        assert found == pytest.approx(auroc(torch.cat(outside), torch.cat(inside[kind])), abs=1e-3), kind


def test_what_is_wrong_is_said_before_anything_is_computed_and_what_is_done_stays(tmp_path, capsys, monkeypatch):
    def forbidden(study: Study) -> None:
        raise AssertionError("it computes")

    first = EXPERIMENTS["interpolate"]
    monkeypatch.setitem(EXPERIMENTS, "interpolate", forbidden)
    (tmp_path / "file").write_text("")
    small = ["--images", "astronaut", "chelsea", "--resolution", "32", "--steps", "3", "--output"]
    out = str(tmp_path / "out")
    for message, arguments in {
        "got 2 images to draw; need 3": ["all", *small, out],
        "no such folder or file": ["interpolate", *small, out, "--anomalies", str(tmp_path / "missing")],
        "is a file or below one; need a folder": ["interpolate", *small, str(tmp_path / "file" / "below")],
    }.items():
        assert main(["explore", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"file"}

    def failing(study: Study) -> None:
        raise InputError("got nothing; need something")

    monkeypatch.setitem(EXPERIMENTS, "interpolate", first)
    monkeypatch.setitem(EXPERIMENTS, "traverse", failing)
    assert main(["explore", "all", *small, out, "--images", "astronaut", "chelsea", "coffee"]) == 2
    assert capsys.readouterr().err == "sdvae: error: got nothing; need something\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"interpolate.png", "interpolate.json"}


def test_a_file_name_that_is_no_utf8_can_be_drawn(tmp_path, photographs):
    folder = tmp_path / "names"
    folder.mkdir()
    for i, name in enumerate((b"caf\xe9.png", b"other.png")):
        (folder / os.fsdecode(name)).write_bytes((photographs / f"0{i}.png").read_bytes())
    arguments = ["--data", str(folder), "--resolution", "32", "--output", str(tmp_path / "out")]
    for what in ("pca", "anomaly"):
        assert main(["explore", what, *arguments]) == 0
    assert figures(tmp_path / "out", "pca")["images"] == ["caf\\xe9.png", "other.png"]


def test_a_grey_vae_with_one_latent_channel_and_files_of_ones_own(photographs, tmp_path):
    torch.manual_seed(0)
    widths = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2}
    vae = AutoencoderKL(1, 1, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=1, norm_num_groups=4, **widths)
    save_vae(vae, tmp_path / "grey")
    files = [str(photographs / f"0{i}.png") for i in range(3)]
    (photographs / "05.png").write_bytes(b"no image")
    arguments = ["--vae", str(tmp_path / "grey"), "--data", str(photographs), "--resolution", "32", "--images", *files]
    assert main(["explore", "all", *arguments, "--output", str(tmp_path / "out")]) == 0
    assert figures(tmp_path / "out", "pca")["explained"] == [1.0]
    assert figures(tmp_path / "out", "pca")["measured_on"] == 9, "without the one that cannot be read"


def test_the_page_names_pictures_functions_and_experiments_that_exist():
    page = (DOCS / "explore.md").read_text(encoding="utf-8")
    assert set(EXPERIMENTS) == set(re.findall(r"^sdvae explore (\w+)", page, flags=re.MULTILINE)) - {"all"}
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert {Path(name).name for name in pictures} == {f"explore_{what}.png" for what in EXPERIMENTS}
    assert sum((DOCS / name).stat().st_size for name in pictures) < 1_500_000
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./(sdvae/[\w/]+)\.py\)", page)
    assert len(links) >= 10
    for name, module in links:
        assert hasattr(importlib.import_module(module.replace("/", ".")), name.split(".")[0]), name


def test_bad_input_is_one_line_and_leaves_nothing_behind(photographs, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    out = ["--output", str(tmp_path / "out")]
    cases = {
        "need one of ['interpolate', ": ["dream", *out],
        "got 1 image to draw; need 2; name more with --images": ["interpolate", "--images", "astronaut", *out],
        "got 2 images to draw; need 3": ["arithmetic", "--images", "astronaut", "chelsea", *out],
        "got 'astronot' in --images; need an image file, or the name of": ["traverse", "--images", "astronot", *out],
        "broken.png: not an image of a known format": ["traverse", "--images", str(tmp_path / "broken.png"), *out],
        "got resolution 15; need 16 or more": ["pca", "--resolution", "15", *out],
        "got count 0 and steps 7; need at least": ["pca", "--count", "0", *out],
        "got count 16 and steps 2; need at least": ["interpolate", "--steps", "2", *out],
        "got sigmas [0.0]; need numbers in (0, 255]": ["denoise", "--sigmas", "0", *out],
        "got seed -1; need": ["prior", "--seed", "-1", *out],
        "holds no images": ["prior", "--data", str(tmp_path / "empty"), *out],
        "is a file or below one; need a folder": ["prior", *_small(tmp_path / "file")],
        "no such folder or file": ["all", *_small(tmp_path / "out"), "--anomalies", str(tmp_path / "missing")],
    }
    for message, arguments in cases.items():
        assert main(["explore", *arguments]) == 2, message
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_vae_that_overflows_is_refused_and_not_drawn(tmp_path, capsys):
    vae = load_vae(dtype=torch.float32)
    vae.decoder.conv_norm_out.weight.data.fill_(1e30)
    vae.decoder.conv_out.weight.data.fill_(1e30)
    save_vae(vae, tmp_path / "huge")
    arguments = ["--vae", str(tmp_path / "huge"), *_small(tmp_path / "out")]
    assert main(["explore", "traverse", *arguments]) == 2
    assert "the VAE decodes to NaN or infinite values" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_vae_that_makes_rgb_of_grey_is_refused(tmp_path, capsys):
    widths = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2}
    vae = AutoencoderKL(1, 3, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=1, norm_num_groups=4, **widths)
    save_vae(vae, tmp_path / "odd")
    assert main(["explore", "denoise", "--vae", str(tmp_path / "odd"), *_small(tmp_path / "out")]) == 2
    assert "odd with (1, 3) image channels; need 1 (grey) or 3 (RGB) in and out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_knows_every_experiment(capsys):
    with pytest.raises(SystemExit):
        main(["explore", "--help"])
    assert "{" + ",".join([*EXPERIMENTS, "all"]) + "}" in capsys.readouterr().out
