"""Colours become those of sRGB: compared with published matrices in float64, and with libvips' conversion."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import pyvips
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from PIL import Image, ImageCms
from safetensors.torch import load_file

from sdvae.cli import main, parse_train_config
from sdvae.data import ImageError, ReadOptions, color, open_source, read_image
from sdvae.studio.demo.page import Handlers
from sdvae.studio.demo.view import open_photograph
from sdvae.studio.report.run import _photographs
from sdvae.studio.settings import ReportOptions
from sdvae.training.recipe import read_recipe
from sdvae.training.run_folder import RunFolder, to_yaml
from sdvae.weights import save_vae
from tests.conftest import tiny_arguments, tiny_vae

RAW = ReadOptions(color="raw")
# To XYZ of D65: Adobe RGB (1998) color image encoding, 4.3.5.3; SMPTE EG 432-1 with that white. From it: IEC 61966-2-1
ADOBE_TO_XYZ = [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
P3_TO_XYZ = [[0.48657, 0.26567, 0.19822], [0.22897, 0.69174, 0.07929], [0.00000, 0.04511, 1.04394]]
XYZ_TO_SRGB = [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]


def noise(mode: str = "RGB", size: int = 64, seed: int = 0) -> Image.Image:
    """All kinds of colours: random pixels."""
    shape = (size, size, len(mode)) if len(mode) > 1 else (size, size)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes, options: ReadOptions = ReadOptions()) -> np.ndarray:
    return np.asarray(read_image(data, options)).astype(int)


def photograph(name: str) -> bytes:
    source = open_source("skimage")
    return next(source.read(i) for i in range(len(source)) if source.name(i) == name)


def profile_in(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).info["icc_profile"]


def vips_profile(name: str) -> bytes:
    return bytes(pyvips.Image.profile_load(name))


def vips_srgb(data: bytes) -> np.ndarray:
    """What libvips makes of the file."""
    image = pyvips.Image.new_from_buffer(data, "")
    image = image.icc_transform("srgb", embedded=True, intent="relative", black_point_compensation=True)
    return image.numpy().astype(int)


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of grey with a gamma."""
    curve = struct.pack(">4s4xIH2x", b"curv", 1, round(gamma * 256))
    white = struct.pack(">4s4x3i", b"XYZ ", *(round(v * 65536) for v in color.D50))
    tags = {b"wtpt": white, b"kTRC": curve}
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", 132 + 12 * len(tags) + len(body), b"", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    header = (header + bytes(12) + b"acsp").ljust(68, b"\0") + white[8:]
    return header.ljust(128, b"\0") + table + body


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """The PNG with one more chunk behind its header."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + chunk + png[33:]


def srgb_of(linear: np.ndarray) -> np.ndarray:
    """Light in [0, 1] -> levels of sRGB, not rounded."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def adobe_to_srgb(values: np.ndarray) -> np.ndarray:
    return srgb_of(np.clip((values / 255.0) ** (563 / 256) @ np.array(ADOBE_TO_XYZ).T @ np.array(XYZ_TO_SRGB).T, 0, 1))


def p3_to_srgb(values: np.ndarray) -> np.ndarray:
    x = values / 255.0
    light = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return srgb_of(np.clip(light @ np.array(P3_TO_XYZ).T @ np.array(XYZ_TO_SRGB).T, 0, 1))


def exif_r03(**tags: int) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA001: 0xFFFF, 0xA005: {1: "R03"}} | {int(key[1:], 16): v for key, v in tags.items()})
    return exif.tobytes()


# ---- profiles ----


@pytest.mark.parametrize("which", ["littlecms", "libvips", "astronaut"])
def test_the_variants_of_the_srgb_profile_change_no_pixel(which):
    profile = {
        "littlecms": lambda: ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "libvips": lambda: vips_profile("srgb"),
        "astronaut": lambda: profile_in(photograph("astronaut")),  # HP's, the most frequent one
    }[which]()
    for mode in ("RGB", "RGBA", "L", "LA"):
        data = encode(noise(mode), icc_profile=profile)
        np.testing.assert_array_equal(pixels(data), pixels(data, RAW))


@pytest.mark.parametrize("by", ["profile", "EXIF"])
def test_adobe_rgb_becomes_srgb_as_its_definition_says(by):
    image = noise()
    told = {"icc_profile": profile_in(photograph("rocket"))} if by == "profile" else {"exif": exif_r03()}
    data = encode(image, "PNG" if by == "profile" else "JPEG", **told, **({} if by == "profile" else {"quality": 100}))
    error = pixels(data) - adobe_to_srgb(pixels(data, RAW))
    assert np.abs(error).max() < 1.6  # half a level of rounding, and one of lcms' 8-bit path at the dark end
    assert abs(error.mean()) < 0.05


def test_without_conversion_the_rocket_is_too_red():
    data = photograph("rocket")
    error = (pixels(data, RAW) - pixels(data)).mean(axis=(0, 1))
    np.testing.assert_allclose(error, [10.8, 3.0, 0.7], atol=0.1)


@pytest.mark.parametrize("exif", [{}, {"xA001": 1}])
def test_r03_counts_only_where_exif_does_not_say_srgb_and_there_is_no_profile(exif):
    profile = {"icc_profile": vips_profile("srgb")} if not exif else {}
    data = encode(noise(), "JPEG", exif=exif_r03(**exif), **profile)
    np.testing.assert_array_equal(pixels(data), pixels(data, RAW))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_display_p3_agrees_with_libvips_in_every_format(kind):
    data = encode(noise().resize((128, 128), Image.Resampling.BICUBIC), kind, icc_profile=vips_profile("p3"))
    # libvips decodes JPEG with other rounding, and so it gets the pixels that Pillow decoded
    same = encode(Image.open(io.BytesIO(data)), "PNG", icc_profile=vips_profile("p3"))
    assert np.abs(pixels(data) - vips_srgb(same)).max() <= 1
    assert np.abs(pixels(data) - pixels(data, RAW)).max() > 20


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_goes_through_its_profile(kind):
    data = encode(noise("CMYK"), kind, icc_profile=vips_profile("cmyk"))
    expected = vips_srgb(encode(Image.open(io.BytesIO(data)), "TIFF", icc_profile=vips_profile("cmyk")))
    assert np.abs(pixels(data) - expected).max() <= 2
    assert np.abs(pixels(data) - pixels(data, RAW)).mean() > 10, "the naive conversion is far from it"


def test_bare_paper_is_white_and_full_ink_nearly_black():
    ink = Image.merge("CMYK", [Image.fromarray(np.array([[0, 255]], np.uint8).repeat(8, 1))] * 4)
    got = pixels(encode(ink, "TIFF", icc_profile=vips_profile("cmyk")))[0]
    assert got[0].min() >= 254
    assert got[-1].mean() < 10


@pytest.mark.parametrize(("mode", "channels"), list(itertools.product(["L", "LA"], [1, 3])))
def test_grey_follows_its_curve(mode, channels):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    image = ramp if mode == "L" else Image.merge("LA", (ramp, Image.new("L", ramp.size, 255)))
    got = pixels(encode(image, icc_profile=grey_profile(1.0)), ReadOptions(channels=channels)).reshape(256, -1)
    assert np.abs(got - srgb_of(np.arange(256)[:, None] / 255)).max() < 0.6


def test_16_bit_grey_follows_its_curve():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    images = (Image.fromarray(ramp.astype(np.uint16) * 257), Image.fromarray(ramp))
    deep, plain = (encode(image, icc_profile=grey_profile(1.0)) for image in images)
    np.testing.assert_array_equal(pixels(deep), pixels(plain))


def test_alpha_is_kept_and_composited_after_the_conversion():
    profile = vips_profile("p3")
    image = noise("RGBA")
    got = pixels(encode(image, icc_profile=profile), ReadOptions(background=(0, 255, 0)))
    front = vips_srgb(encode(image.convert("RGB"), icc_profile=profile))
    alpha = np.asarray(image).astype(int)[..., 3:]
    assert np.abs(got - (front * alpha + np.array([0, 255, 0]) * (255 - alpha)) / 255).max() <= 1.6


def test_a_palette_and_a_transparent_colour_are_converted():
    image = noise().quantize(32)
    profile = vips_profile("p3")
    data = encode(image, icc_profile=profile)
    np.testing.assert_array_equal(pixels(data), pixels(encode(image.convert("RGB"), icc_profile=profile)))
    red = encode(Image.new("RGB", (8, 8), (255, 0, 0)), icc_profile=profile, transparency=(255, 0, 0))
    assert (pixels(red, ReadOptions(background=(1, 2, 3))) == [1, 2, 3]).all(), "the file's red, not the converted one"


def test_grey_images_get_the_luma_of_the_converted_colours():
    data = encode(noise(), icc_profile=vips_profile("p3"))
    expected = read_image(data).convert("L")
    np.testing.assert_array_equal(pixels(data, ReadOptions(channels=1)), np.asarray(expected))


# ---- colour spaces that are only named ----


def test_cicp_names_display_p3_and_stands_above_the_profile():
    plain = encode(noise())
    coded = with_chunk(plain, b"cICP", bytes([12, 13, 0, 1]))
    assert np.abs(pixels(coded) - p3_to_srgb(pixels(plain))).max() < 1.1
    profiled = with_chunk(encode(noise(), icc_profile=grey_profile(1.0)), b"cICP", bytes([1, 13, 0, 1]))
    np.testing.assert_array_equal(pixels(profiled), pixels(plain))


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_unless_colours_are_taken_raw(transfer, name):
    data = with_chunk(encode(noise()), b"cICP", bytes([9, transfer, 0, 1]))
    with pytest.raises(ImageError, match=rf"^not supported: HDR \({name}\), which sRGB cannot show; convert it"):
        read_image(data)
    np.testing.assert_array_equal(pixels(data, RAW), np.asarray(noise()))


def test_gamma_and_chromaticities_of_a_png_are_ignored():
    plain = encode(noise())
    told = with_chunk(with_chunk(plain, b"gAMA", struct.pack(">I", 100_000)), b"cHRM", bytes(32))
    np.testing.assert_array_equal(pixels(told), pixels(plain))


def test_nclx_of_an_avif_names_display_p3():
    data = encode(noise().resize((96, 96)), "AVIF", quality=90)
    at = data.index(b"colrnclx") + 8
    assert struct.unpack_from(">HH", data, at) == (1, 13)
    coded = data[:at] + struct.pack(">HH", 12, 13) + data[at + 4 :]
    assert np.abs(pixels(coded) - p3_to_srgb(pixels(data))).max() < 1.1


def test_the_profile_of_a_jpeg_2000_is_used():
    data = encode(noise(), "JPEG2000", irreversible=False)
    profile = vips_profile("p3")
    header, old = data.index(b"jp2h") - 4, data.index(b"colr") - 4
    box = struct.pack(">I4s3B", 11 + len(profile), b"colr", 2, 0, 0) + profile
    (size,), (old_size,) = struct.unpack_from(">I", data, header), struct.unpack_from(">I", data, old)
    grown = struct.pack(">I", size + len(box) - old_size) + data[header + 4 : old] + box + data[old + old_size :]
    np.testing.assert_array_equal(pixels(data[:header] + grown), pixels(encode(noise(), icc_profile=profile)))


# ---- what cannot be used ----


@pytest.mark.parametrize(
    ("mode", "profile", "reason"),
    [
        ("RGB", b"\0" * 400, "damaged or not supported"),
        ("RGB", vips_profile("p3")[:200], "damaged or not supported"),
        ("RGB", grey_profile(1.0), "it is one of GRAY, and the image is RGB"),
        ("CMYK", vips_profile("p3"), "it is one of RGB, and the image is CMYK"),
    ],
)
def test_a_profile_that_cannot_be_used_is_ignored_and_said_with_the_count(mode, profile, reason, caplog, monkeypatch):
    monkeypatch.setattr(color, "_unusable", itertools.count(1))
    data = encode(noise(mode), "JPEG", icc_profile=profile)
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            np.testing.assert_array_equal(pixels(data), pixels(data, RAW))
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("the colour profile of an image is ignored")
    assert caplog.messages[1].startswith("the colour profile of 10 images so far is ignored")
    assert reason in caplog.messages[0]


def test_threads_get_the_same_colours():
    files = [encode(noise(seed=seed), icc_profile=vips_profile("p3")) for seed in range(8)]
    expected = [pixels(data) for data in files]
    color._conversion.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(pixels, files * 8), expected * 8, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["PNG", "AVIF", "JPEG2000"])
def test_files_that_are_cut_off_end_the_search_for_colours(kind):
    data = encode(noise(), kind)
    image = Image.open(io.BytesIO(data))
    for end in range(0, len(data), 7):
        color.profile_of(image, data[:end])


# ---- the option, in every command ----


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> Path:
    """Photographs in Display P3, and the same numbers without a profile."""
    root = tmp_path_factory.mktemp("profiled")
    for folder, told in (("p3", {"icc_profile": vips_profile("p3")}), ("plain", {})):
        (root / folder).mkdir()
        for seed in range(6):
            image = noise(size=6, seed=seed).resize((64, 64), Image.Resampling.BICUBIC)
            image.save(root / folder / f"{seed}.png", **told)
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    save_vae(tiny_vae(block_out_channels=(8, 8, 8, 16)), folder)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        *("train", "encode", "evaluate", "reconstruct", "explore", "fp16", "push"),
        pytest.param("report", marks=pytest.mark.slow),
    ],
)
def test_every_command_converts_colours_unless_it_is_told_not_to(command, profiled, vae, tmp_path, capsys):
    """What it makes of images in Display P3 with «raw» is what it makes of the same numbers without a profile."""

    def outcome(folder: str, name: str, *color: str):
        images, out = profiled / folder, tmp_path / name
        arguments = {
            "train": tiny_arguments(images, out, steps="1", data__validation_count="2"),
            "encode": [f"--source={images}", f"--output={out}", f"--vae={vae}", "--resolution=32"],
            "evaluate": [str(vae), f"--data={images}", f"--output={out}", "--resolution=32", "--lpips=none"],
            "reconstruct": [*map(str, sorted(images.iterdir())), f"--vae={vae}", f"--output={out}"],
            "explore": ["interpolate", f"--data={images}", f"--vae={vae}", f"--output={out}", "--resolution=32"],
            "fp16": ["audit", str(vae), f"--images={images}", "--resolution=64"],
            "push": [str(vae), "me/vae", f"--data={images}", f"--dry_run={out}", "--resolution=64"],
            "report": [str(vae), f"--data={images}", f"--output={out}.html", "--resolution=64", "--lpips=none"],
        }[command]
        key = "data.color" if command == "train" else "color"
        capsys.readouterr()
        assert main([command, *arguments, *(f"--{key}={value}" for value in color)]) == 0
        made = {
            "train": lambda: json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["validation/psnr"],
            "encode": lambda: json.loads((out / "manifest.json").read_text())["statistics"],
            "evaluate": lambda: (out / "per_image.csv").read_text(),
            "reconstruct": lambda: [pixels(path.read_bytes()).tolist() for path in sorted(out.iterdir())],
            "explore": lambda: pixels((out / "interpolate.png").read_bytes()).tolist(),
            "fp16": lambda: capsys.readouterr().out,
            "push": lambda: (out / "README.md").read_text().replace("plain", "p3"),
            "report": lambda: re.findall(r"data:image/\w+;base64,[^\"]*", (tmp_path / f"{name}.html").read_text()),
        }[command]()
        assert made
        return made

    raw, plain, converted = outcome("p3", "raw", "raw"), outcome("plain", "plain"), outcome("p3", "srgb")
    assert raw == plain
    assert raw != converted


def test_the_demo_converts_colours_unless_it_is_told_not_to(profiled):
    p3, plain = profiled / "p3" / "0.png", profiled / "plain" / "0.png"
    assert open_photograph(p3, 64, "raw")[0].tobytes() == open_photograph(plain, 64)[0].tobytes()
    assert open_photograph(p3, 64)[0].tobytes() != open_photograph(plain, 64)[0].tobytes()
    assert Handlers([], 64, "raw", Path()).color == "raw"


def test_latents_that_were_made_before_the_option_are_continued_only_as_raw(profiled, vae, tmp_path, capsys):
    arguments = ["encode", f"--source={profiled / 'p3'}", f"--output={tmp_path}", f"--vae={vae}", "--resolution=32"]
    assert main([*arguments, "--color=raw"]) == 0
    manifest = tmp_path / "manifest.json"
    before = json.loads(manifest.read_text())
    del before["fingerprint"]["images"]["color"], before["fingerprint"]["images"]["max_pixels"]
    shards = [json.loads(line) for line in (tmp_path / "shards.jsonl").read_text().splitlines()]
    for entry in shards:
        del entry["data_bytes"]
        entry["sha256"] = hashlib.sha256((tmp_path / entry["file"]).read_bytes()).hexdigest()
    manifest.write_text(json.dumps({**before, "version": 1, "shards": shards}))
    assert main([*arguments, "--color=raw", "--verify=true"]) == 0
    assert main([*arguments, "--color=raw", "--repair=true"]) == 0
    assert main(arguments) == 2
    assert "holds latents made in another way (images.color: raw -> srgb)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_was_begun_before_the_option_is_continued_only_as_raw(profiled, tmp_path, capsys):
    def run(output: Path, *more: str) -> int:
        arguments = tiny_arguments(profiled / "p3", output, data__validation_count="2", checkpoint__every_steps="2")
        return main(["train", *arguments, *more])

    assert run(tmp_path / "whole", "--data.color=raw") == 0
    assert run(tmp_path / "run", "--data.color=raw", "--steps=2") == 0
    state = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    before = json.loads(state.read_text())
    before["config"]["steps"] = 4
    del before["config"]["data"]["color"], before["config"]["data"]["max_pixels"]
    state.write_text(json.dumps(before))
    assert run(tmp_path / "run") == 2
    assert "holds the run of another recipe (data.color: raw -> srgb)" in capsys.readouterr().err
    assert run(tmp_path / "run", "--data.color=raw") == 0
    whole, continued = (load_file(tmp_path / name / "model" / WEIGHTS) for name in ("whole", "run"))
    assert all(torch.equal(whole[key], continued[key]) for key in whole)


@pytest.mark.parametrize(("lines", "color"), [("", "raw"), ("\n  color: srgb", "srgb"), ("\n  color: raw", "raw")])
def test_the_recipe_of_a_run_that_lacks_the_option_means_raw(lines, color, tmp_path):
    (tmp_path / "config.yaml").write_text(f"seed: 3\ndata:\n  source: photographs{lines}\n")
    recipe = read_recipe(tmp_path / "config.yaml")
    assert (recipe.seed, recipe.data.source, recipe.data.color) == (3, "photographs", color)


@pytest.mark.parametrize(("given", "expected"), [(None, "raw"), ("srgb", "srgb")])
def test_a_report_on_a_run_reads_its_images_as_the_run_did(given, expected, profiled, tmp_path):
    changes = {"data__color": "raw", "data__background": "[1,2,3]", "data__max_pixels": "9999"}
    recipe = parse_train_config(tiny_arguments(profiled / "p3", tmp_path, **changes))
    (tmp_path / "config.yaml").write_text(to_yaml(recipe))
    images, _ = _photographs(RunFolder(tmp_path), ReportOptions(color=given), channels=3)
    assert images.reading == ReadOptions(background=(1, 2, 3), min_side=16, max_pixels=9999, color=expected)
