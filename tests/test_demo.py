"""`sdvae demo`: what the page shows is what the VAE computes, and what it is given wrongly is said on the page."""

from __future__ import annotations

import io
import math
import os
import re
import socket
import threading
import time
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Page
from safetensors import safe_open
from safetensors.torch import load_file

from sdvae import AutoencoderTiny, InputError, crop_to, load_vae, pad_to_multiple, save_vae
from sdvae.cli import main
from sdvae.data import center_crop, open_source, read_image, to_image, to_tensor
from sdvae.pictures import GAP
from sdvae.studio.demo import page as demo_page
from sdvae.studio.demo import view as view_module
from sdvae.studio.demo.page import running
from sdvae.studio.demo.view import (
    Edits,
    Model,
    draw_channels,
    edit,
    encode,
    open_photograph,
    save_latents,
    show,
    show_latents,
    show_preview,
)
from sdvae.studio.settings import DemoOptions

MAX_SIDE = 96
SIZE = (61, 51)  # sides that are no multiples of 8


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(None)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    source = open_source("skimage")
    paths = [folder / "first.png", folder / "second.png"]
    for i, path in enumerate(paths):
        center_crop(read_image(source.read(i)), 64).resize(SIZE, Image.Resampling.LANCZOS).save(path)
    return paths


def direct(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, reconstruction), with nothing of the demo."""
    vae = load_vae(dtype=torch.float32)
    with torch.no_grad():
        x = to_tensor(read_image(path))[None]
        posterior = vae.encode(pad_to_multiple(x, 8)).latent_dist
        return posterior.parameters, crop_to(vae.decode(posterior.mode()).sample, SIZE[1], SIZE[0])


def test_an_unedited_view_is_the_reconstruction_with_its_figures(model, photographs):
    parameters, y = direct(photographs[0])
    image, word = open_photograph(photographs[0], MAX_SIDE)
    assert word == "first.png: 61 x 51 pixels"
    view = show(model, encode(model, image), Edits())
    assert view.original.size == view.reconstruction.size == view.difference.size == SIZE
    assert levels(view.reconstruction, to_image(y[0])) <= 1

    x = to_tensor(image)[None]
    psnr = 10 * math.log10(4 / float((x - y.clamp(-1, 1)).square().mean()))
    assert float(view.figures["PSNR"].removesuffix(" dB")) == pytest.approx(psnr, abs=0.01)
    mean, logvar = parameters.double().chunk(2, dim=1)
    nats = 0.5 * float((mean**2 + logvar.exp() - 1 - logvar).sum())
    shown = re.fullmatch(r"([\d,]+) nats = ([\d.]+) bits per pixel", view.figures["KL"])
    assert float(shown[1].replace(",", "")) == pytest.approx(nats, abs=1)
    assert float(shown[2]) == pytest.approx(nats / math.log(2) / (61 * 51), abs=1e-3)
    assert view.figures["latents"] == "4 x 7 x 8"
    wanted = 4 * np.abs(np.asarray(view.original, float) - np.asarray(view.reconstruction, float))
    assert np.abs(np.asarray(view.difference, float) - wanted.clip(0, 255)).max() <= 4  # each rounds by half a level


def test_noise_is_in_units_of_the_latents_and_belongs_to_its_seed():
    z = torch.zeros(1, 4, 64, 64)
    noisy = edit(z, None, Edits(noise=0.5, seed=3), std=5.0)
    assert float(noisy.std()) == pytest.approx(2.5, rel=0.03)
    assert torch.equal(noisy, edit(z, None, Edits(noise=0.5, seed=3), std=5.0))
    assert torch.allclose(2 * noisy, edit(z, None, Edits(noise=1.0, seed=3), std=5.0))
    assert not torch.equal(noisy, edit(z, None, Edits(noise=0.5, seed=4), std=5.0))
    assert not z.any(), "the encoded latents stay as they are"


def test_blending_ends_at_both_photographs_and_the_arc_keeps_the_norm():
    a, b = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    b *= a.norm() / b.norm()
    for spherical_path in (False, True):
        for blend, end in ((0.0, a), (1.0, b)):
            torch.testing.assert_close(edit(a, b, Edits(blend, spherical_path), std=1.0), end)
    middle = edit(a, b, Edits(0.5), std=1.0)
    torch.testing.assert_close(middle, (a + b) / 2)
    on_arc = edit(a, b, Edits(0.5, spherical=True), std=1.0)
    assert float(on_arc.norm()) == pytest.approx(float(a.norm()), rel=1e-5)


def test_zeroed_channels_are_zero_under_noise_and_others_are_not_touched():
    z = torch.ones(1, 4, 8, 8)
    edited = edit(z, None, Edits(noise=1.0, zeroed=(1, 3, 9)), std=1.0)  # 9 is a channel of the other VAE
    assert not edited[:, [1, 3]].any()
    assert edited[:, [0, 2]].all()


def test_the_second_photograph_is_cut_to_the_first_ones_size(model, photographs):
    first = open_photograph(photographs[0], MAX_SIDE)[0]
    second = open_photograph(photographs[1], MAX_SIDE)[0].resize((200, 90))
    encoded = encode(model, first, second)
    assert encoded.second.shape == encoded.posterior.mean.shape
    view = show(model, encoded, Edits(blend=1.0))
    left = (200 - round(90 * 61 / 51)) // 2
    cut = second.crop((left, 0, left + round(90 * 61 / 51), 90)).resize(SIZE, Image.Resampling.BICUBIC)
    alone = show(model, encode(model, cut), Edits())
    assert levels(view.reconstruction, alone.reconstruction) <= 2


def test_channels_are_drawn_as_squares_with_their_range():
    z = torch.zeros(4, 2, 3)
    z[2, 0, 0] = 1.0  # the only channel with contrast
    sheet = np.asarray(draw_channels(z, None))
    alone = np.asarray(draw_channels(z, 2))
    assert set(np.unique(alone[300:500, -100:])) == {0}
    assert alone[200, 100].tolist() == [255, 255, 255]
    assert sheet.shape[1] == 2 * 384 + GAP
    assert sheet[200, 100].tolist() == [128, 128, 128], "a constant channel is neither black nor white"


def test_large_images_are_computed_in_strips_with_the_same_result(model, photographs, monkeypatch):
    image, _ = open_photograph(photographs[0], MAX_SIDE)
    whole = show(model, encode(model, image), Edits())
    assert not model.vae.use_tiling
    monkeypatch.setattr(view_module, "WHOLE_BYTES", 0)
    strips = show(model, encode(model, image), Edits())
    assert model.vae.use_tiling
    assert levels(whole.reconstruction, strips.reconstruction) <= 1


def test_a_grey_vae_sees_grey(photographs, model):
    grey = Model("grey", load_vae(config={}, dtype=torch.float32))
    with torch.no_grad():
        grey.vae.encoder.conv_in.weight = torch.nn.Parameter(grey.vae.encoder.conv_in.weight.sum(1, keepdim=True))
        grey.vae.decoder.conv_out.weight = torch.nn.Parameter(grey.vae.decoder.conv_out.weight[:1])
        grey.vae.decoder.conv_out.bias = torch.nn.Parameter(grey.vae.decoder.conv_out.bias[:1])
    grey.vae.register_to_config(in_channels=1, out_channels=1)
    view = show(grey, encode(grey, open_photograph(photographs[0], MAX_SIDE)[0]), Edits())
    assert view.original.mode == view.reconstruction.mode == "L"


def test_saved_latents_decode_to_what_was_shown(model, photographs, tmp_path):
    encoded = encode(model, open_photograph(photographs[0], MAX_SIDE)[0])
    save_latents(model, encoded, tmp_path / "latents.safetensors")
    parameters, y = direct(photographs[0])
    tensors = load_file(tmp_path / "latents.safetensors")
    torch.testing.assert_close(torch.cat([tensors["mean"], tensors["logvar"]], 1), parameters, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        decoded = crop_to(load_vae(dtype=torch.float32).decode(tensors["mean"]).sample, SIZE[1], SIZE[0])
    torch.testing.assert_close(decoded, y, rtol=1e-3, atol=1e-3)
    with safe_open(tmp_path / "latents.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "vae": "packaged VAE",
        "scaling_factor": repr(model.vae.config.scaling_factor),
        "image_width": "61",
        "image_height": "51",
    }


def test_large_photographs_are_shrunk_and_it_is_said(tmp_path):
    Image.new("RGB", (400, 200)).save(tmp_path / "large.png")
    image, word = open_photograph(tmp_path / "large.png", MAX_SIDE)
    assert image.size == (96, 48)
    assert word == "large.png: 400 x 200 pixels, shrunk to 96 x 48"
    Image.new("RGB", (2000, 20)).save(tmp_path / "long.png")
    with pytest.raises(InputError, match=r"long\.png: 2000 x 20 pixels, 96 x 1 after shrinking to 96; .* needs 16"):
        open_photograph(tmp_path / "long.png", MAX_SIDE)


# The page itself


@pytest.fixture(scope="module")
def with_student(tmp_path_factory) -> Model:
    """The packaged VAE with a student of random weights, whose pictures are others."""
    torch.manual_seed(0)
    small = {f"{part}_block_out_channels": (8,) * 4 for part in ("encoder", "decoder")}
    folder = tmp_path_factory.mktemp("student") / "student"
    save_vae(AutoencoderTiny(**small), folder)
    return Model.load(None, str(folder))


def test_a_student_shows_the_same_edited_latents_as_a_diffusion_model_gets_them(with_student, photographs):
    image, _ = open_photograph(photographs[0], MAX_SIDE)
    encoded, edits = encode(with_student, image), Edits(noise=0.3, seed=1)
    original, preview = show_preview(with_student, encoded, edits)
    assert original.size == preview.size == SIZE
    vae = load_vae()
    z = edit(encoded.posterior.mode(), None, edits, 1 / vae.config.scaling_factor)
    with torch.no_grad():
        y = with_student.student.decode(z * vae.config.scaling_factor).sample[0, :, : SIZE[1], : SIZE[0]]
    assert levels(preview, to_image(y)) <= 1


def test_a_student_of_another_latent_space_is_refused(tmp_path):
    save_vae(AutoencoderTiny(latent_channels=16), tmp_path / "other")
    with pytest.raises(InputError, match=r"\(3, 16, 8\); need the VAE's, \(3, 4, 8\)"):
        Model.load(None, str(tmp_path / "other"))


@pytest.mark.slow
def test_a_student_follows_the_slider_until_the_vae_has_decoded(with_student, photographs, browser_page):
    image = Image.open(photographs[0])
    encoded = encode(with_student, image)
    slow = with_student.vae.decoder.register_forward_pre_hook(lambda *_: time.sleep(1.5))
    try:
        with serving(with_student) as url:
            page = opened(browser_page, url, photographs[0])
            for noise in ("0.5", "0.6", "0.7"):  # the VAE is still decoding the first
                page.fill("#noise input[type=range]", noise)
                wait_for_picture(page, show_preview(with_student, encoded, Edits(noise=float(noise)))[1])
            slow.remove()
            wait_for_picture(page, show(with_student, encoded, Edits(noise=0.7)).reconstruction)
            page.wait_for_timeout(500)
            assert levels(pictures(page)[1], show(with_student, encoded, Edits(noise=0.7)).reconstruction) <= 1, (
                "it stays"
            )
    finally:
        slow.remove()
    assert faults(browser_page) == []


@pytest.mark.slow
def test_the_page_shows_the_reconstruction_and_follows_its_sliders(model, photographs, tmp_path, browser_page):
    hosts = []
    look_up = socket.getaddrinfo

    def recording(host, *args, **kwargs):
        hosts.append(host)
        return look_up(host, *args, **kwargs)

    socket.getaddrinfo = recording
    try:
        with serving(model) as url:
            page = opened(browser_page, url, photographs[0])
            _, y = direct(photographs[0])
            shown = pictures(page)
            assert levels(shown[0], Image.open(photographs[0])) == 0
            assert levels(shown[1], to_image(y[0])) <= 1
            x = to_tensor(Image.open(photographs[0]))[None]
            psnr = 10 * math.log10(4 / float((x - y.clamp(-1, 1)).square().mean()))
            assert f"{psnr:.2f} dB" in page.inner_text(".figures")
            assert "first.png: 61 x 51 pixels" in page.inner_text("#status")

            encoded = encode(model, Image.open(photographs[0]))
            page.fill("#noise input[type=range]", "0.5")
            wait_for_picture(page, show(model, encoded, Edits(noise=0.5)).reconstruction)
            page.click("#noise button[aria-label*=Reset]")
            wait_for_picture(page, to_image(y[0]))
            page.check("#zeroed label:has-text('0') input")
            wait_for_picture(page, show(model, encoded, Edits(zeroed=(0,))).reconstruction)
            page.uncheck("#zeroed label:has-text('0') input")
            page.click("#channel input")
            page.click("[role=option]:has-text('2')")
            wait_for_picture(page, show_latents(model, encoded, Edits(), 2), ".channels")

            page.set_input_files("#second input[type=file]", photographs[1])
            page.wait_for_function("document.querySelector('#status').innerText.includes('second.png')")
            page.fill("#blend input[type=range]", "1")
            wait_for_picture(page, to_image(direct(photographs[1])[1][0]))

            with page.expect_download() as download:
                page.click("text=Download the latents")
            assert download.value.suggested_filename == "first.safetensors"
            tensors = load_file(download.value.path())
            parameters, _ = direct(photographs[0])
            got = torch.cat([tensors["mean"], tensors["logvar"]], 1)
            torch.testing.assert_close(got, parameters, rtol=1e-4, atol=1e-4)
            page.screenshot(path=tmp_path / "page.png")
    finally:
        socket.getaddrinfo = look_up
    assert faults(browser_page) == []
    assert set(hosts) <= {"127.0.0.1", "localhost", None}, "the server asks nobody either"


@pytest.mark.slow
def test_what_cannot_be_read_is_said_on_the_page(model, photographs, tmp_path, browser_page):
    (tmp_path / "text.png").write_text("no image <b>at all</b>")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")  # 200 million pixels in 25 kB
    (tmp_path / "heavy.png").write_bytes(photographs[0].read_bytes() + bytes(2**20))
    (tmp_path / "photo.txt").write_bytes(photographs[0].read_bytes())
    with serving(model) as url:
        page = browser_page.page
        page.goto(url)
        for name, message in (
            ("text.png", "text.png: not an image of a known format"),
            ("huge.png", "huge.png: too large: 20000 x 10000 pixels"),
        ):
            page.set_input_files("#first input[type=file]", tmp_path / name)
            page.wait_for_selector(f"#status .error:has-text('{message}')")
            assert "Traceback" not in page.inner_text("body")
            page.click("#first button[aria-label=Clear]")
            page.wait_for_selector("#status .error", state="detached")
        page.set_input_files("#first input[type=file]", tmp_path / "heavy.png")
        page.wait_for_selector("text=exceed the maximum allowed size of 1.0 Mb")
        page.set_input_files("#first input[type=file]", tmp_path / "photo.txt")
        page.wait_for_selector("text=Invalid file type")
        page.reload()
        page.set_input_files("#first input[type=file]", photographs[0])  # and after all that it still works
        page.wait_for_selector(".figures table")
        page.set_input_files("#second input[type=file]", tmp_path / "text.png")
        page.wait_for_selector("#status .error:has-text('text.png: not an image')")
        assert page.locator(".figures table").count() == 1, "the first photograph stays"
    assert faults(browser_page) == []


def test_a_vae_that_overflows_is_said_and_no_traceback(photographs, tmp_path):
    broken = Model("broken", load_vae(dtype=torch.float32))
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias += float("nan")
    handlers = demo_page.Handlers([broken], MAX_SIDE, "srgb", tmp_path)
    with pytest.raises(gr.Error, match="holds NaN"):
        handlers.photograph(str(photographs[0]), None, 0.0, "linear", 0.0, None, [], demo_page.ALL)
    assert list(tmp_path.iterdir()) == [], "files that gradio is not given would not expire"


@pytest.mark.slow
def test_latents_of_a_page_expire(model, photographs, monkeypatch, browser_page):
    monkeypatch.setattr(demo_page, "CLEANING_SECONDS", 1)
    monkeypatch.setattr(demo_page, "KEPT_SECONDS", 2)
    with serving(model, Model("other", model.vae)) as url:
        page = browser_page.page
        page.goto(url)
        folder = Path(os.environ[demo_page.GRADIO_FOLDER])
        for photograph in photographs:
            page.set_input_files("#first input[type=file]", photograph)
            page.wait_for_selector(f"#status:has-text('{photograph.name}')")
            page.wait_for_selector(".figures table")
            assert len(list(folder.rglob(f"{photograph.stem}.safetensors"))) == 2
            page.click("#first button[aria-label=Clear]")
            page.wait_for_selector("#status:not(:has-text('png'))")
        for _ in range(100):
            if not list(folder.rglob("*.safetensors")):
                break
            page.wait_for_timeout(100)
        assert list(folder.rglob("*.safetensors")) == []


@pytest.mark.slow
def test_two_vaes_stand_side_by_side_and_a_telephone_can_show_them(model, photographs, tmp_path, browser_page):
    other = Model("other <VAE>", load_vae(dtype=torch.float32))
    with torch.no_grad():
        other.vae.decoder.conv_out.bias += 0.3
    with serving(model, other) as url:
        page = browser_page.page
        page.goto(url)
        page.set_input_files("#first input[type=file]", photographs[0])
        page.wait_for_function("document.querySelectorAll('.figures table').length == 2")
        encoded = encode(other, Image.open(photographs[0]))
        assert levels(pictures(page, 1)[1], show(other, encoded, Edits()).reconstruction) <= 1
        tables = page.locator(".figures table").all_inner_texts()
        assert tables[0].splitlines()[0] != tables[1].splitlines()[0]
        assert page.locator("b:has-text('other <VAE>')").count() == 1
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        tops = [page.locator(name).first.bounding_box()["y"] for name in ("#first", ".pair", "#noise")]
        assert tops == sorted(tops), "results before settings"
    assert faults(browser_page) == []


# The command


def test_a_port_in_use_is_one_line(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"got --host 127.0.0.1 --port {port}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "need a port from 1 to 65535"),
        (["--max_side", "4"], "at least 64 pixels"),
        (["no/such/folder/at/all"], "there is no file or folder"),
        (["--share", "true"], "share"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_open_host_is_said_and_ctrl_c_ends_with_nothing_left(monkeypatch, capsys):
    seen = []

    def interrupted(blocks):
        seen.append(blocks.local_url)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_page, "wait", interrupted)
    before = threading.active_count()
    assert main(["demo", "--host", "0.0.0.0", "--port", str(free_port())]) == 0
    said = capsys.readouterr()
    assert "anybody who can reach this machine can use the page" in said.out
    assert seen[0] in said.out
    assert "Traceback" not in said.err
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", int(seen[0].rstrip("/").split(":")[-1]))):
        pass
    assert threading.active_count() <= before + 1


class serving:
    """The page on a free port."""

    def __init__(self, *models: Model):
        self.models = models

    def __enter__(self) -> str:
        self.context = running(self.models, DemoOptions(port=free_port(), max_side=MAX_SIDE, max_megabytes=1))
        return self.context.__enter__().local_url

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(*error)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def pictures(page: Page, which: int = 0, place: str = ".pair") -> list[Image.Image]:
    """Both sides of a slider, or one picture, as the server gives them."""
    page.wait_for_function(f"document.querySelectorAll('{place}')[{which}].querySelectorAll('img').length >= 1")
    sources = [image.get_attribute("src") for image in page.locator(place).nth(which).locator("img").all()]
    return [Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB") for source in sources]


def opened(browser_page, url: str, photograph: Path) -> Page:
    """The page with a photograph, when the VAE has decoded it."""
    page = browser_page.page
    page.goto(url)
    page.set_input_files("#first input[type=file]", photograph)
    page.wait_for_selector(".figures table")
    return page


def wait_for_picture(page: Page, wanted: Image.Image, place: str = ".pair") -> None:
    """Until the slider's right side, or the picture at that place, is this one."""
    for _ in range(100):
        try:
            shown = pictures(page, place=place)[-1]
        except (
            PlaywrightError,
            UnidentifiedImageError,
        ):  # gradio writes an image that comes a second time anew, under a reader's eyes
            page.wait_for_timeout(100)
            continue
        if shown.size == wanted.size and levels(shown, wanted) <= 2:
            return
        page.wait_for_timeout(100)
    pytest.fail(f"the picture at {place} has another size, or is off by more than 2 levels")


def levels(a: Image.Image, b: Image.Image) -> int:
    """The greatest difference of two pictures."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def faults(browser_page) -> list[str]:
    """Without the ends of the streams by which the page hears from the server, which it closes itself."""
    return [error for error in browser_page.errors if "net::ERR_ABORTED" not in error]
