"""`sdvae report`: the page in a real browser, and the numbers in it against their definitions."""

from __future__ import annotations

import base64
import errno
import io
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
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1

from sdvae import load_vae, save_vae
from sdvae.cli import main, parse_train_config
from sdvae.data import center_crop, open_source, split_off, to_tensor
from sdvae.errors import InputError
from sdvae.metrics.image import image_metrics
from sdvae.metrics.perceptual import load_perceptual, perceptual_if_any
from sdvae.metrics.spectrum import radial_power
from sdvae.model import AutoencoderKL, DiagonalGaussian
from sdvae.pictures import AMPLIFICATION, CAPTION_HEIGHT, GAP, reconstruction_grid
from sdvae.statistics import HISTOGRAM_BINS, HISTOGRAM_RANGE, LatentHealth, LatentMaps
from sdvae.studio.report.gallery import Gallery, webp
from sdvae.studio.report.robustness import HALVES, Rounded, deltas, drift
from sdvae.training.run_folder import to_yaml
from tests.conftest import draw_photographs, tiny_arguments

HOSTILE = "<script>alert(1)</script>.png"
SIDE = 64  # pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Seven small pictures, one of them with a name that is a script."""
    folder = draw_photographs(tmp_path_factory.mktemp("report") / "photographs")
    for i in (7, 8, 9):
        (folder / f"{i:02}.png").unlink()
    # a file's name has no slash, so the closing tag is that of a folder
    (folder / HOSTILE).parent.mkdir()
    (folder / "06.png").rename(folder / HOSTILE)
    return folder


@pytest.fixture(scope="module")
def report(folder) -> Path:
    """The packaged VAE on those pictures."""
    output = folder.parent / "report.html"
    arguments = ["--data", str(folder), "--resolution", str(SIDE), "--lpips", "none", "--output", str(output)]
    assert main(["report", *arguments]) == 0
    return output


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return load_vae(dtype=torch.float32)


@pytest.fixture(scope="module")
def images(folder) -> torch.Tensor:
    """(7, 3, SIDE, SIDE): the pictures as the report sees them."""
    files = sorted(folder.rglob("*.png"), key=lambda path: path.relative_to(folder).as_posix())
    pictures = []
    for file in files:
        with Image.open(file) as image:
            pictures.append(to_tensor(center_crop(image.convert("RGB"), SIDE)))
    return torch.stack(pictures)


@pytest.fixture
def opened(browser_page, report):
    browser_page.page.goto(report.as_uri())
    return browser_page


def overflow(page) -> int:
    """Pixels by which the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def until(page, fact: str) -> None:
    """Wait for a JavaScript fact; Playwright's own waiting needs `eval`, which the page's policy forbids."""
    for _ in range(100):
        if page.evaluate(fact):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not within 5 s: {fact}")


def shown_at(page, wipe) -> str:
    return wipe.evaluate("element => getComputedStyle(element.parentElement.querySelector('img + img')).clipPath")


# ---- the page


@pytest.mark.slow
def test_the_page_opens_from_disk_with_every_image_and_asks_for_nothing_else(opened, report):
    page = opened.page
    until(page, "[...document.images].every(image => image.complete && (image.naturalWidth || !image.alt))")
    counts = page.evaluate(
        "[document.querySelectorAll('#gallery img').length, document.querySelectorAll('.row').length]"
    )
    assert counts == [14, 6], "seven pairs; the three worst and the three best"
    assert opened.errors == []
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:)?//""", text)
    assert "http://" not in text
    assert "https://" not in text


@pytest.mark.slow
def test_a_hostile_file_name_is_text(opened, report):
    dialogs = []
    opened.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    opened.page.reload()
    names = opened.page.locator("#gallery .name").all_inner_texts()
    assert HOSTILE in names
    assert dialogs == []
    assert HOSTILE not in report.read_text(encoding="utf-8")
    assert opened.errors == []


@pytest.mark.slow
def test_the_wipe_moves_by_mouse_and_by_keyboard(opened):
    page = opened.page
    wipe = page.locator(".wipe input").first
    wipe.scroll_into_view_if_needed()
    assert shown_at(page, wipe) == "inset(0px 0px 0px 50%)"
    box = page.locator(".wipe").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], middle, steps=4)
    page.mouse.up()
    assert float(re.search(r"([\d.]+)%", shown_at(page, wipe))[1]) == pytest.approx(25, abs=1)
    wipe.press("ArrowRight")
    moved = float(wipe.input_value())
    wipe.press("ArrowRight")
    assert float(wipe.input_value()) == moved + 0.5
    wipe.press("End")
    assert shown_at(page, wipe) == "inset(0px 0px 0px 100%)"
    assert opened.errors == []


@pytest.mark.slow
def test_on_a_phone_nothing_is_wider_than_the_screen_and_a_finger_moves_the_wipe(browser_page, report):
    context = browser_page.page.context.browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(report.as_uri())
    assert page.evaluate("innerWidth") == 390
    assert overflow(page) == 0
    page.locator("details summary").first.click()
    assert overflow(page) == 0
    wipe = page.locator(".wipe input").first
    wipe.scroll_into_view_if_needed()
    box = page.locator(".wipe").first.bounding_box()
    session = context.new_cdp_session(page)
    y = box["y"] + box["height"] / 2
    for kind, share in (("touchStart", 0.5), ("touchMove", 0.6), ("touchMove", 0.8), ("touchEnd", None)):
        points = [] if share is None else [{"x": box["x"] + share * box["width"], "y": y}]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    assert float(wipe.input_value()) == pytest.approx(80, abs=2)
    page.locator("[data-zoom]").first.tap()
    stage = page.locator("#stage").bounding_box()
    assert stage["width"] == 390
    assert overflow(page) == 0
    page.touchscreen.tap(stage["x"] + 39, stage["y"] + 100)
    assert float(page.locator("#wipe").input_value()) == pytest.approx(10, abs=1)
    assert errors == []
    context.close()


@pytest.mark.slow
def test_an_image_can_be_enlarged_moved_and_left(opened):
    page = opened.page
    page.locator("#gallery [data-zoom]").nth(2).click()
    assert page.locator("#zoom").is_visible()
    assert page.locator("#zoom-name").inner_text() == page.locator("#gallery .name").nth(2).inner_text()
    scale = "() => new DOMMatrix(getComputedStyle(document.querySelector('#under')).transform).a"
    assert page.evaluate(scale) == 1
    stage = page.locator("#stage").bounding_box()
    page.mouse.move(stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2)
    page.mouse.wheel(0, -800)
    until(page, f"({scale})() > 2")
    wiped = page.locator("#wipe").input_value()
    moved = "() => new DOMMatrix(getComputedStyle(document.querySelector('#under')).transform).e"
    before = page.evaluate(moved)
    page.mouse.down()
    page.mouse.move(stage["x"] + stage["width"] / 2 + 60, stage["y"] + stage["height"] / 2, steps=3)
    page.mouse.up()
    assert page.evaluate(moved) == pytest.approx(before + 60, abs=1)
    assert page.locator("#wipe").input_value() == wiped, "an enlarged image is moved, not wiped"
    page.locator("#fit").click()
    assert page.evaluate(scale) == 1
    page.locator("#next").click()
    assert page.locator("#zoom-name").inner_text() == page.locator("#gallery .name").nth(3).text_content()
    until(page, "document.querySelector('#under').complete")
    page.keyboard.press("+")
    assert page.evaluate(scale) == 1.5
    page.keyboard.press("Escape")
    assert not page.locator("#zoom").is_visible()
    page.locator("#gallery [data-zoom]").first.click()
    page.locator("#close").click()
    assert not page.locator("#zoom").is_visible()
    assert opened.errors == []


@pytest.mark.slow
def test_the_gallery_is_filtered_and_ordered(opened):
    page = opened.page
    page.locator("#filter").fill("SCRIPT")
    assert page.locator("#gallery figure:visible").count() == 1
    assert page.locator("#found").inner_text() == "1 shown"
    page.locator("#filter").fill("")
    page.locator("#order").select_option("psnr")
    psnr = page.evaluate("[...document.querySelectorAll('#gallery figure')].map(card => +card.dataset.psnr)")
    assert psnr == sorted(psnr)
    assert len(psnr) == 7


@pytest.mark.slow
def test_the_difference_is_that_of_the_reconstruction_grid(opened, vae, images):
    page = opened.page
    place = page.locator(".row").first.locator("[data-zoom]").first.get_attribute("data-zoom")
    original, reconstruction = (
        to_tensor(Image.open(io.BytesIO(_embedded(page, f"{kind}-{place}")))) for kind in ("original", "reconstruction")
    )
    row = reconstruction_grid(original[None], reconstruction[None])
    left = 2 * (SIDE + GAP)
    wanted = row.crop((left, CAPTION_HEIGHT, left + SIDE, CAPTION_HEIGHT + SIDE))
    pane = page.locator(".row").first.locator(".difference")
    style = f"position: fixed; left: 0; top: 0; z-index: 9; width: {SIDE}px; height: {SIDE}px; border-radius: 0"
    pane.evaluate("(pane, style) => { pane.style = style }", style)  # on whole pixels
    error = np.inf
    for _ in range(20):  # the browser draws when it can
        drawn = Image.open(io.BytesIO(pane.screenshot())).convert("RGB")
        assert drawn.size == wanted.size
        error = np.abs(np.asarray(drawn, dtype=float) - np.asarray(wanted, dtype=float)).max()
        if error <= AMPLIFICATION:
            break
        page.wait_for_timeout(200)
    assert error <= AMPLIFICATION, "a level of 8 bits, amplified"
    assert np.asarray(wanted).mean() > 5, "and there is a difference to see"


def _embedded(page, name: str) -> bytes:
    return base64.b64decode(page.locator(f"#{name}").get_attribute("src").partition("base64,")[2])


# ---- the numbers


def test_numbers_in_the_page_are_those_computed_directly(report, vae, images):
    text = report.read_text(encoding="utf-8")
    with torch.inference_mode():
        output = vae(images)
    y = output.sample.clamp(-1, 1)
    rows = image_metrics(images, y, output.posterior, None)
    nats = output.posterior.kl()
    wanted = {
        "psnr": sum(row["psnr"] for row in rows) / 7,
        "ssim": sum(row["ssim"] for row in rows) / 7,
        "kl_nats": float(nats.mean()),
        "bits_per_pixel": float(nats.mean()) / math.log(2) / SIDE**2,
        "active_channels": 4,
        **{f"bias_{c}": float((y - images)[:, c].mean()) * 127.5 for c in range(3)},
    }
    for key, value in wanted.items():
        (number,) = re.findall(f'data-figure="{key}">([^<]*)<', text)
        decimals = len(number.partition(".")[2])
        assert _float(number) == pytest.approx(value, abs=0.51 * 10**-decimals), key
    assert _psnr(text) == pytest.approx([row["psnr"] for row in rows], abs=1e-3)
    covariance = re.findall("<td>(.*?)</td>", text.partition('id="covariance"')[2].partition("</table>")[0])
    samples = output.posterior.mean.transpose(0, 1).flatten(1).double()
    wanted_covariance = torch.cov(samples, correction=0) + torch.diag(output.posterior.var.double().mean((0, 2, 3)))
    assert list(map(_float, covariance)) == pytest.approx(wanted_covariance.flatten().tolist(), abs=0.02)


def _float(number: str) -> float:
    return float(number.replace("−", "-").replace(",", ""))


def _psnr(text: str) -> list[float]:
    """Of each image, in the order of the data."""
    return list(map(float, re.findall(r'data-psnr="([^"]*)"', text)))


def test_embedded_images_are_the_pixels_themselves(report, images):
    text = report.read_text(encoding="utf-8")
    (data,) = re.findall('id="original-0" src="data:image/webp;base64,([^"]*)"', text)
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert np.array_equal(np.asarray(picture), ((images[0] + 1) * 127.5).round().permute(1, 2, 0).byte().numpy())


def test_webp_loses_nothing():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8))
    with Image.open(io.BytesIO(webp(noise))) as back:
        assert np.array_equal(np.asarray(back), np.asarray(noise))


def test_the_spectrum_is_that_of_a_slow_transform():
    side = 8
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    grey = image[0].double().mean(0).numpy()
    window = np.array(
        [
            [math.sin(math.pi * i / side) ** 2 * math.sin(math.pi * j / side) ** 2 for j in range(side)]
            for i in range(side)
        ]
    )
    grey = (grey - (grey * window).sum() / window.sum()) * window
    rings: dict[int, list[float]] = {}
    for u in range(-side // 2, side // 2):
        for v in range(-side // 2, side // 2):
            wave = sum(
                grey[i, j] * np.exp(-2j * math.pi * (u * i + v * j) / side) for i in range(side) for j in range(side)
            )
            rings.setdefault(round(math.hypot(u, v)), []).append(abs(wave) ** 2 / (window**2).sum())
    wanted = [np.mean(rings[k]) for k in range(1, side // 2 + 1)]
    assert radial_power(image)[0].tolist() == pytest.approx(wanted, rel=1e-9)


def test_the_spectrum_of_white_noise_is_its_variance_and_a_wave_is_found_in_its_ring():
    noise = 0.3 * torch.randn(64, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert radial_power(noise).mean(0)[4:].numpy() == pytest.approx(0.09, rel=0.1)
    wave = torch.cos(2 * math.pi * 9 * torch.arange(64) / 64).expand(1, 1, 64, 64)
    assert int(radial_power(wave)[0].argmax()) + 1 == 9


def scaling(number: float) -> torch.Tensor:
    return torch.full((1, 1, 1), number)


def test_maps_covariance_and_histogram_are_those_of_all_elements_at_once():
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(6, 6, 4, 5, generator=generator)
    parameters[:, 0] += 2.0
    parameters[4:, 3:] = -30.0  # without noise
    posterior = DiagonalGaussian(parameters.double())
    health, maps = LatentHealth(3), LatentMaps((3, 4, 5), lambda z: (z - 0.25) * 0.5)
    for part in parameters.split(4):
        health.update(DiagonalGaussian(part))
        maps.update(DiagonalGaussian(part), generator)
    moments = health.moments
    mean, var = posterior.mean, posterior.var
    torch.testing.assert_close(maps.kl(), posterior.kl_map().sum(1).mean(0))
    covariance = maps.covariance(moments)
    flat = mean.transpose(0, 1).flatten(1)
    torch.testing.assert_close(covariance, torch.cov(flat, correction=0) + torch.diag(var.mean((0, 2, 3))))
    torch.testing.assert_close(covariance.diagonal(), moments.channel_std.square())
    torch.testing.assert_close(maps.correlation(moments).diagonal(), torch.ones(3, dtype=torch.float64))
    centred = mean - mean.mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(maps.std(moments), 0.5 * (centred.square() + var).mean((0, 1)).sqrt())
    torch.testing.assert_close(maps.scaled_moments.channel_mean, 0.5 * (moments.channel_mean - 0.25))
    torch.testing.assert_close(maps.scaled_moments.channel_std, 0.5 * moments.channel_std)
    assert (maps.histogram.sum(1) + maps.outside).tolist() == [6 * 4 * 5] * 3
    exact = LatentMaps((3, 4, 5), lambda z: (z - 0.25) * 2.0)
    exact.update(DiagonalGaussian(parameters[4:]), generator)
    scaled = 2.0 * (mean[4:].transpose(0, 1).flatten(1).numpy() - 0.25)
    wanted = [np.histogram(channel, HISTOGRAM_BINS, HISTOGRAM_RANGE)[0] for channel in scaled]
    assert np.array_equal(exact.histogram.numpy(), wanted)
    assert exact.outside.tolist() == (np.abs(scaled) > 5).sum(1).tolist()
    assert exact.outside.sum() > 0


def test_the_first_round_trip_is_the_reconstruction_and_the_others_follow_a_loop(report, vae, images):
    found = drift(vae, images[:2])
    with torch.inference_mode():
        x = images[:2]
        for trip in range(3):
            output = vae(x)
            y = output.sample.clamp(-1, 1)
            for given, values in ((images[:2], found.to_original), (x, found.to_previous)):
                error = np.square(given.double().numpy() - y.double().numpy()).mean((1, 2, 3)) / 4
                assert values[trip].numpy() == pytest.approx(-10 * np.log10(error), abs=1e-3)
            if trip == 0:
                figures = image_metrics(x, y, output.posterior, None)
                assert found.to_original[0].tolist() == pytest.approx([row["psnr"] for row in figures], abs=1e-4)
            x = y
    assert len(found.to_original) == 10
    text = report.read_text(encoding="utf-8")
    cells = re.findall(r"<td>([\d.]+)</td>", text.partition('id="trips"')[2].partition("</table>")[0])
    assert len(cells) == 20
    assert float(cells[0]) == float(cells[1]) == pytest.approx(sum(_psnr(text)[:4]) / 4, abs=0.0051)


def test_rounded_operations_are_as_far_from_fp32_as_the_real_half_precision():
    """Against the CPU's own, slow half precision: the same distance from fp32, and near to it."""
    vae = load_vae(dtype=torch.float32)
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        exact = vae(x).sample
        for dtype in HALVES.values():
            real = load_vae(dtype=dtype)(x.to(dtype)).sample.float()
            weights = load_vae(dtype=dtype).float()
            given = x.to(dtype).float()
            before = given.clone()
            with Rounded(dtype):
                emulated = weights(given).sample
            assert torch.equal(given, before)
            assert torch.equal(emulated, emulated.to(dtype).float())
            ratio = float((emulated - exact).square().mean() / (real - exact).square().mean())
            assert 0.3 < ratio < 3, dtype


def test_what_overflows_in_fp16_is_said_and_strips_and_bf16_are_not(vae, images):
    plain = {delta.name: delta for delta in deltas(vae, images[:1])}
    assert plain["fp16"].not_finite == plain["bf16"].not_finite == plain["strips"].not_finite == 0
    assert plain["strips"].psnr > 90
    assert plain["fp16"].psnr > plain["bf16"].psnr + 6
    assert not vae.use_tiling
    loud = _overflowing()
    found = {delta.name: delta for delta in deltas(loud, images[:1])}
    assert found["fp16"].not_finite == found["fp16"].values == 3 * SIDE**2
    assert found["fp16"].psnr is None
    assert found["bf16"].not_finite == 0
    assert found["strips"].psnr > 60


def _overflowing() -> AutoencoderKL:
    """The packaged VAE with a residual stream in the decoder that goes beyond fp16, where group norm takes it back."""
    vae = load_vae(dtype=torch.float32)
    with torch.no_grad():
        vae.decoder.conv_in.weight *= 1e6
        vae.decoder.conv_in.bias *= 1e6
    return vae


# ---- runs, grey, and bad input


@pytest.fixture(scope="module")
def run_report(folder, tmp_path_factory) -> Path:
    """A run that is still training, of a VAE that overflows in fp16 and has a channel that no image moves."""
    run = tmp_path_factory.mktemp("run") / "run"
    config = parse_train_config([*tiny_arguments(folder, run), "--data.validation_count", "2", "--seed", "3"])
    vae = _overflowing()
    with torch.no_grad():
        vae.quant_conv.weight[0] = 0
    save_vae(vae, run / "model")
    (run / "config.yaml").write_text(to_yaml(config))
    records = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0, "validation/psnr": 20.0, "progress": 1}]
    lines = [json.dumps(record) + "\n" for record in records]
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 3, "train/lo')
    output = run.parent / "report.html"
    assert main(["report", str(run), "--lpips", "none", "--output", str(output)]) == 0
    return output


@pytest.mark.slow
def test_a_run_folder_shows_its_curves_its_recipe_and_its_held_out_images(browser_page, run_report, folder):
    page = browser_page.page
    page.goto(run_report.as_uri())
    assert page.locator("#training figcaption").all_inner_texts() == ["train/loss", "validation/psnr"]
    widths = page.evaluate("[...document.querySelectorAll('#training img')].map(image => image.naturalWidth)")
    assert len(widths) == 2
    assert all(widths)
    assert page.locator("h1").inner_text() == "run"
    assert "block_out_channels" in page.locator("#training pre").text_content()
    _, held_out = split_off(open_source(str(folder)), count=2, seed=3)
    names = page.locator("#gallery .name").all_inner_texts()
    assert names == [held_out.name(i) for i in range(2)]
    assert "32 × 32" in page.locator(".lead").inner_text(), "the run's own size"
    assert browser_page.errors == []


def test_values_that_are_not_finite_and_complaints_stand_in_the_page(run_report):
    text = run_report.read_text(encoding="utf-8")
    rows = dict(re.findall(r'data-delta="(\w+)">(.*?)</tr>', text, re.DOTALL))
    assert "not finite" in rows["fp16"]
    assert rows["fp16"].endswith(f"<td>{2 * 3 * 32**2:,}</td>")
    assert "not finite" not in rows["bf16"] + rows["strips"]
    assert "partial collapse: 1 of 4 channels (0)" in text


def test_a_grey_vae_lpips_and_an_image_that_cannot_be_read(folder, tmp_path):
    torch.manual_seed(0)
    grey = AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.1,
    )  # fmt: skip
    save_vae(grey, tmp_path / "grey")
    trunk = tmp_path / "trunk.safetensors"
    save_file(squeezenet1_1(weights=None).state_dict(), trunk)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "good.png").write_bytes((folder / "00.png").read_bytes())
    (mixed / "broken & bad.png").write_bytes(b"no image")
    output = tmp_path / "new" / "report.html"
    arguments = [str(tmp_path / "grey"), "--data", str(mixed), "--resolution", "32", "--output", str(output)]
    lpips = ["--lpips", "squeeze", "--lpips_weights", str(trunk), "--lpips_heads", "uniform"]
    assert main(["report", *arguments, *lpips]) == 0
    text = output.read_text(encoding="utf-8")
    assert "broken &amp; bad.png" in text
    assert "broken & bad.png" not in text
    assert 'data-figure="bias_0"' in text
    assert 'data-figure="bias_1"' not in text
    assert text.count('<article class="row">') == 1, "of one image there is a worst, and no other best"
    with Image.open(mixed / "good.png") as image, torch.inference_mode():
        x = to_tensor(center_crop(image.convert("L"), 32))[None]
        wanted = load_perceptual("squeeze", trunk, "uniform")(grey(x).sample.clamp(-1, 1), x)
    (found,) = re.findall('data-figure="lpips">([^<]*)<', text)
    assert float(found) == pytest.approx(float(wanted), abs=0.0006)
    assert "lpips_squeeze_uniform" in text


def test_lpips_is_left_out_with_a_word_where_nothing_can_be_downloaded(monkeypatch, caplog):
    def no_network(net: str, weights: str | None, heads: str) -> None:
        raise InputError("no ImageNet weights: the download failed; give a local file")

    monkeypatch.setattr("sdvae.metrics.perceptual.load_perceptual", no_network)
    assert perceptual_if_any("vgg", None, "lpips") is None
    assert "LPIPS is left out: no ImageNet weights" in caplog.text
    with pytest.raises(InputError):
        perceptual_if_any("vgg", "of_ones_own.pth", "lpips")


def test_a_page_of_many_images_shows_the_first_and_the_worst_and_best_and_keeps_no_others(monkeypatch):
    monkeypatch.setattr("sdvae.studio.report.gallery.webp", lambda image: bytes(50))  # a picture has 100 bytes
    image = torch.zeros(1, 2, 2)
    for key, budget, count, seed in itertools.product(
        ("psnr", "lpips"), (0, 150, 1000, 10_000), (1, 2, 5, 6, 7, 40), (0, 1)
    ):
        monkeypatch.setattr("sdvae.studio.report.gallery.PICTURE_BYTES", budget)
        values = np.random.default_rng(seed).integers(0, 20, count).tolist()  # with equal ones
        gallery = Gallery(key)
        for place, value in enumerate(values):
            gallery.add(str(place), image, image, {key: value})
            assert len(gallery.pictures) <= budget // 100 + 6
        best_first = sorted(range(count), key=lambda i: -values[i] if key == "psnr" else values[i])
        some = min(3, (count + 1) // 2)
        worst = best_first[::-1][:some]
        best = [i for i in best_first[:some] if i not in worst]
        assert gallery.extremes() == (worst, best)
        others = [i for i in range(count) if i not in worst + best]
        room = max(0, budget // 100 - len(worst + best))
        assert list(gallery.shown()) == sorted(worst + best + others[:room]), (key, budget, count)
        assert [picture.name for picture in gallery.shown().values()] == [str(i) for i in gallery.shown()]
        assert gallery.images == count


@pytest.mark.slow
def test_means_are_over_all_images_and_not_those_shown(folder, tmp_path, monkeypatch, report):
    monkeypatch.setattr("sdvae.studio.report.gallery.PICTURE_BYTES", 0)
    output = tmp_path / "small.html"
    arguments = ["--data", str(folder), "--resolution", str(SIDE), "--lpips", "none", "--output", str(output)]
    monkeypatch.setattr("sdvae.studio.report.gallery.EXTREMES", 1)
    assert main(["report", *arguments]) == 0
    text, whole = (path.read_text(encoding="utf-8") for path in (output, report))
    assert "2 of 7 images" in text
    assert sorted(_psnr(text)) == [min(_psnr(whole)), max(_psnr(whole))]
    for key in ("psnr", "ssim", "kl_nats", "bias_1"):
        found = [re.findall(f'data-figure="{key}">([^<]*)<', page) for page in (text, whole)]
        assert found[0] == found[1], key


def test_a_file_name_that_is_no_utf8_stands_in_the_page(folder, tmp_path):
    names = tmp_path / "names"
    names.mkdir()
    (names / os.fsdecode(b"caf\xe9.png")).write_bytes((folder / "00.png").read_bytes())
    (names / os.fsdecode(b"b\xe4d.png")).write_bytes(b"no image")
    arguments = ["--data", str(names), "--resolution", "32", "--lpips", "none"]
    assert main(["report", *arguments, "--output", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'data-name="caf\\xe9.png"' in text
    assert "b\\xe4d.png" in text


def test_a_file_in_place_of_the_folder_is_said_before_the_first_image(folder, tmp_path, capsys, monkeypatch):
    def forbidden(*args: object) -> None:
        raise AssertionError("it computes")

    monkeypatch.setattr("sdvae.studio.report.run.measure", forbidden)
    (tmp_path / "file").write_text("")
    data = ["--data", str(folder), "--resolution", "32", "--lpips", "none"]
    for output in (tmp_path / "file" / "r.html", tmp_path / "file" / "below" / "r.html"):
        assert main(["report", *data, "--output", str(output)]) == 2
        assert "is a file or below one; need a folder" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["report", *data, "--output", str(tmp_path / "r.html")]) == 2
    assert "is not writable" in capsys.readouterr().err


def test_a_vae_that_makes_rgb_of_grey_is_refused(folder, tmp_path, capsys):
    odd = AutoencoderKL(
        in_channels=1, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    save_vae(odd, tmp_path / "odd")
    output = tmp_path / "out" / "report.html"
    arguments = ["--data", str(folder), "--lpips", "none", "--resolution", "32", "--output", str(output)]
    assert main(["report", str(tmp_path / "odd"), *arguments]) == 2
    assert "odd with (1, 3) image channels; need 1 (grey), 3 (RGB) or 4 (RGBA) in and out" in capsys.readouterr().err
    assert not output.parent.exists()


def test_bad_input_leaves_nothing_behind(folder, tmp_path, capsys):
    empty_run = tmp_path / "run"
    empty_run.mkdir()
    (empty_run / "metrics.jsonl").write_text("")
    (empty_run / "config.yaml").write_text("steps: 1\n")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"no image")
    output = tmp_path / "out" / "report.html"
    data = ["--data", str(folder), "--lpips", "none", "--resolution", "32"]
    cases = {
        "at least 16": [*data, "--resolution", "0"],
        "got count=0": [*data, "--count", "0"],
        "ends in .html": [*data, "--output", str(tmp_path / "out" / "report.pdf")],
        "has no model/ yet": [str(empty_run), *data],
        "no such folder": ["--data", str(tmp_path / "missing"), "--lpips", "none"],
        "can be read": [*data, "--data", str(bad)],
        "there is no file": [*data, "--lpips", "vgg", "--lpips_weights", str(tmp_path / "missing.pth")],
        "no file or folder": [str(tmp_path / "no_vae"), *data],
    }
    for message, arguments in cases.items():
        assert main(["report", "--output", str(output), *arguments]) == 2, message
        assert message in capsys.readouterr().err
    assert list(tmp_path.rglob("*.html")) == []


def test_a_report_that_cannot_be_written_leaves_the_one_before(folder, tmp_path, monkeypatch, capsys):
    def half(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "report.html"
    output.write_text("before")
    monkeypatch.setattr(Path, "write_bytes", half)
    data = ["--data", str(folder), "--count", "1", "--resolution", "32", "--lpips", "none"]
    assert main(["report", *data, "--output", str(output)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert output.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
