"""Students (AutoencoderTiny) where a VAE is taken: loading, saving, and the commands, without a posterior."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny as StockAutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import nn

from sdvae import AutoencoderTiny, EncodeConfig, InputError, LatentDataset, LatentEncoder, encode, load_vae, save_vae
from sdvae.cli import main
from sdvae.data import open_source, read_image
from sdvae.model import DiagonalGaussian
from sdvae.roundtrip import encode_images, round_trip
from sdvae.statistics import LatentHealth, LatentMoments
from sdvae.studio.demo import view
from sdvae.weights import export_targets, load_kl, save_taesd
from sdvae.weights.load import PACKAGED_VAE
from tests.latents_tools import tiny_vae

SMALL = {
    "num_encoder_blocks": (0, 1, 1, 0),
    "num_decoder_blocks": (1, 1, 1, 0),
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
}


# ---- TAESD's networks, from their published layout: github.com/madebyollin/taesd and ComfyUI's comfy/taesd ----


class Bound(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(x / 3)


class Residual(nn.Module):
    def __init__(self, of_taef2: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))
        if of_taef2:
            before, after = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
            self.pool = nn.Sequential(before, nn.GroupNorm(4, 256), nn.ReLU(), after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def conv(before: int, after: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, **options)


def published(part: str, channels: int, of_taef2: bool) -> nn.Sequential:
    """The network whose state dict NAME_encoder or NAME_decoder holds: images in [0, 1], scaled latents."""
    if part == "encoder":
        layers: list[nn.Module] = [conv(3, 64), Residual()]
        for level in range(3):
            layers.append(conv(64, 64, stride=2, bias=False))
            layers += [Residual(of_taef2 and level == 2) for _ in range(3)]
        return nn.Sequential(*layers, conv(64, channels))
    layers = [Bound(), conv(channels, 64), nn.ReLU()]
    for level in range(3):
        layers += [Residual(of_taef2 and level == 0) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), conv(64, 64, bias=False)]
    return nn.Sequential(*layers, Residual(), conv(64, 3))


def published_pair(channels: int, of_taef2: bool = False) -> dict[str, nn.Sequential]:
    torch.manual_seed(0)
    return {part: published(part, channels, of_taef2) for part in ("encoder", "decoder")}


def student(seed: int = 0, **changes: Any) -> AutoencoderTiny:
    torch.manual_seed(seed)
    return AutoencoderTiny(**{**SMALL, **changes}).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A student's folder, written by diffusers' class."""
    path = tmp_path_factory.mktemp("student") / "student"
    stock = StockAutoencoderTiny(**SMALL)
    stock.load_state_dict(student().state_dict())
    stock.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three photographs of 64 x 64 pixels."""
    path, source = tmp_path_factory.mktemp("pictures"), open_source("skimage")
    for i in range(3):
        read_image(source.read(i)).resize((64, 64)).save(path / f"{i}.png")
    return path


# ---- loading and saving ----


def test_the_folder_of_diffusers_class_loads_with_its_values(folder, x):
    ours, stock = load_vae(folder), StockAutoencoderTiny.from_pretrained(folder)
    assert type(ours) is AutoencoderTiny
    assert not ours.training
    assert torch.equal(ours.encode(x).latents, stock.encode(x).latents)
    assert torch.equal(ours(x).sample, stock(x).sample)


def test_our_folder_loads_in_diffusers_class_and_replaces_a_vae(folder, x, tmp_path):
    save_vae(tiny_vae(), tmp_path / "model")
    save_vae(load_vae(folder), tmp_path / "model")
    stock = StockAutoencoderTiny.from_pretrained(tmp_path / "model")
    assert torch.equal(stock.encode(x).latents, student().encode(x).latents)
    assert keys(load_vae(tmp_path / "model").config) == keys(stock.config)


def keys(config: Any) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key[0] != "_"}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("channels", [4, 16])
def test_published_pairs_load_with_their_values(channels, suffix, x, tmp_path):
    pair = published_pair(channels)
    for part, network in pair.items():
        file = tmp_path / f"taesd_{part}{suffix}"
        torch.save(network.state_dict(), file) if suffix == ".pth" else save_file(network.state_dict(), file)
    for part in pair:  # by the path of either
        vae = load_vae(tmp_path / f"taesd_{part}{suffix}")
        z = vae.encode(x).latents
        torch.testing.assert_close(z, pair["encoder"](x / 2 + 0.5))
        torch.testing.assert_close(vae.decode(4 * z).sample, 2 * pair["decoder"](4 * z) - 1)
    stock = StockAutoencoderTiny(latent_channels=channels)
    assert keys(vae.config) == keys(stock.config)


def test_taef2s_pair_loads_with_its_values_and_gradients_and_comes_back(x, tmp_path):
    pair = published_pair(32, of_taef2=True)
    for part, network in pair.items():
        for name, weight in network.named_parameters():
            if "pool.1" in name:  # a norm that does something
                nn.init.normal_(weight)
        save_file(network.state_dict(), tmp_path / f"taef2_{part}.safetensors")
    vae = load_vae(tmp_path / "taef2_encoder.safetensors").train()
    assert vae.config.use_midblock_gn
    gradients = []
    for encoder, decoder in ((vae.encoder, vae.decoder), (pair["encoder"], pair["decoder"])):
        ours = encoder is vae.encoder
        z = encoder(x if ours else x / 2 + 0.5)
        image = decoder(4 * z)
        (z.sum() + (image if ours else 2 * image - 1).square().mean()).backward()
        gradients.append([z, image if ours else 2 * image - 1, *(p.grad for p in encoder.parameters())])
        gradients[-1] += [p.grad for p in decoder.parameters()]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)
    save_taesd(vae, tmp_path / "again_decoder.safetensors")
    for part, network in pair.items():
        again = load_file(tmp_path / f"again_{part}.safetensors")
        assert again.keys() == network.state_dict().keys()
        assert all(torch.equal(weight, again[key]) for key, weight in network.state_dict().items())
    assert export_targets(vae)["comfyui"] is None
    for program in ("diffusers", "a1111"):
        assert "takes no group norm in the blocks" in export_targets(vae)[program]


@pytest.mark.parametrize("name", ["taesd_decoder.safetensors", "taesd_encoder.pth"])
def test_exported_pairs_fit_the_published_networks_and_come_back(name, x, tmp_path, capsys):
    torch.manual_seed(0)
    vae = AutoencoderTiny()
    save_vae(vae, tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), str(tmp_path / name), "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "taesd_encoder" in said
    assert "taesd_decoder" in said
    for program in ("comfyui", "a1111"):
        assert f"{program:10} loads it" in said
    pair = published_pair(4)
    for part, network in pair.items():
        file = tmp_path / f"taesd_{part}{Path(name).suffix}"
        weights = torch.load(file, weights_only=True) if file.suffix == ".pth" else load_file(file)
        network.load_state_dict(weights, strict=True)
    z = pair["encoder"](x / 2 + 0.5)
    torch.testing.assert_close(z, vae.encode(x).latents)
    torch.testing.assert_close(2 * pair["decoder"](z) - 1, vae.decode(z).sample)
    again = load_vae(tmp_path / name).state_dict()
    assert all(torch.equal(weight, again[key]) for key, weight in vae.state_dict().items())


def test_export_targets_of_a_student_name_what_previewers_cannot_take():
    assert export_targets(AutoencoderTiny())["comfyui"] is None
    assert export_targets(AutoencoderTiny(latent_channels=16))["a1111"] is None
    assert "needs use_midblock_gn True for 32" in export_targets(AutoencoderTiny(latent_channels=32))["comfyui"]
    assert "needs use_midblock_gn False for 4" in export_targets(AutoencoderTiny(use_midblock_gn=True))["comfyui"]
    assert "4 latent channels" in export_targets(AutoencoderTiny(latent_channels=8))["a1111"]
    assert "num_decoder_blocks (3, 3, 3, 1), got (1, 1, 1, 0)" in export_targets(student())["comfyui"]


def test_half_a_student_is_refused_by_the_name_of_what_is_missing(tmp_path, capsys):
    pair = published_pair(4)
    save_file(pair["decoder"].state_dict(), tmp_path / "taesd_decoder.safetensors")
    with pytest.raises(InputError, match=r"need the other, taesd_encoder\.safetensors"):
        load_vae(tmp_path / "taesd_decoder.safetensors")
    wide = {"1.weight": torch.zeros(256, 32, 3, 3), "3.weight": torch.zeros(128, 256, 3, 3)}
    save_file(wide | {"5.weight": torch.zeros(3, 128, 3, 3)}, tmp_path / "taesana_decoder.safetensors")
    save_file(pair["encoder"].state_dict(), tmp_path / "taesana_encoder.safetensors")
    with pytest.raises(InputError, match="several widths in its decoder"):
        load_vae(tmp_path / "taesana_decoder.safetensors")
    save_file(pair["decoder"].state_dict(), tmp_path / "mine.safetensors")
    with pytest.raises(InputError, match="ends in _encoder or _decoder"):
        load_vae(tmp_path / "mine.safetensors")
    save_file(pair["decoder"].state_dict(), tmp_path / "taesd_encoder.safetensors")  # twice the same half
    with pytest.raises(InputError, match="do not fit"):
        load_vae(tmp_path / "taesd_decoder.safetensors")
    with pytest.raises(InputError, match="ends in _encoder or _decoder"):
        save_taesd(student(), tmp_path / "student.safetensors")
    with pytest.raises(InputError, match="need a student"):
        save_taesd(tiny_vae(), tmp_path / "vae_decoder.safetensors")
    assert not (tmp_path / "vae_decoder.safetensors").exists()


def test_a_pair_that_would_come_back_as_another_student_is_not_written(tmp_path):
    for change in ({"act_fn": "silu"}, {"upsample_fn": "bilinear"}, {"scaling_factor": 0.5}):
        with pytest.raises(InputError, match=f"{next(iter(change))} .*cannot hold"):
            save_taesd(student(**change), tmp_path / "taesd_decoder.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_needs_a_posterior_refuses_a_student_in_one_line(folder, tmp_path, capfd):
    with pytest.raises(InputError, match="without a posterior; need an AutoencoderKL"):
        load_kl(folder)
    assert main(["fp16", "audit", str(folder)]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(InputError, match="unknown key 'norm_num_groups'; need keys of AutoencoderTiny"):
        load_vae(folder, config={"norm_num_groups": 8})


# ---- round trips and statistics ----


def test_a_round_trip_has_a_posterior_that_is_a_point(x):
    vae = student()
    cut = x[:, :, :30, :45]  # no multiples of 8
    trips = [round_trip(vae, cut, latents=kind, generator=torch.Generator()) for kind in ("mode", "sample")]
    assert torch.equal(trips[0].latents, trips[1].latents)
    assert trips[0].posterior.deterministic
    assert torch.equal(encode_images(vae, x).mean, vae.encode(x).latents)
    torch.testing.assert_close(trips[0].reconstruction, vae.decode(trips[0].latents).sample[:, :, :30, :45])


def test_statistics_of_points_have_their_variance_and_no_kl():
    z = 2 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    health, moments = LatentHealth(3), LatentMoments(3)
    health.update(DiagonalGaussian.point(z))
    moments.update(DiagonalGaussian.point(z))
    assert moments.std == pytest.approx(float(z.double().std(correction=0)), rel=1e-12)
    assert torch.equal(health.moments.sums, moments.sums)
    assert health.metrics() == {"active_channels": 3, "latent_std": moments.std}
    assert health.complaints() == []


# ---- commands ----


def test_evaluate_compares_a_vae_and_its_student_in_either_order(folder, vae, pictures, tmp_path, caplog):
    figures = {}
    for names in ([str(vae), str(folder)], [str(folder), str(vae)]):
        out = tmp_path / str(len(figures))
        options = ["--data", str(pictures), "--resolution", "32", "--lpips", "none", "--output", str(out)]
        assert main(["evaluate", *names, *options]) == 0
        results = json.loads((out / "results.json").read_text())
        for result in results["vaes"]:
            kl = "kl_nats" in result["means"]
            assert kl == (result["vae"] == str(vae))
            assert kl == ("kl_per_element" in result["health"])
            figures.setdefault(result["vae"], []).append(result["means"]["psnr"]["mean"])
        assert "psnr" in results["differences"][names[1]]
        rows = list(csv.DictReader((out / "per_image.csv").open()))
        assert {row["kl_nats"] != "" for row in rows if row["vae"] == str(vae)} == {True}
        assert {row["kl_nats"] for row in rows if row["vae"] == str(folder)} == {""}
    assert all(first == second for first, second in figures.values())
    assert sum("predicts no variance" in line for line in caplog.messages) == 2


def test_reconstruct_writes_what_the_student_gives(folder, pictures, tmp_path, capsys):
    assert main(["reconstruct", str(pictures / "0.png"), "--vae", str(folder), "--output", str(tmp_path)]) == 0
    image = torch.from_numpy(np.array(read_image(pictures / "0.png"))).permute(2, 0, 1)
    wanted = round_trip(student(), image[None].float() / 127.5 - 1).reconstruction.clamp(-1, 1)
    got = torch.from_numpy(np.array(read_image(tmp_path / "0.png"))).permute(2, 0, 1)
    assert float((got - (wanted[0] + 1) * 127.5).abs().max()) <= 0.5001


@pytest.mark.slow
def test_report_has_no_kl_and_says_why(folder, pictures, tmp_path):
    options = ["--data", str(pictures), "--resolution", "32", "--lpips", "none"]
    assert main(["report", str(folder), *options, "--output", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "predicts no variance" in page
    assert "the latents are scaled already" in page
    assert "make black or broken pictures. " in page
    for absent in (
        "off by more than a tenth",
        "data-kl",
        "kl_nats",
        "nats",
        "Log-variances",
        "log-variance sits",
        ">nan<",
    ):
        assert absent not in page, absent


def test_encode_stores_the_means_alone_and_the_data_set_says_so(folder, pictures, tmp_path, caplog, capfd):
    config = EncodeConfig(str(pictures), str(tmp_path / "z"), vae=str(folder), resolution=32, mirror=True, dtype="fp32")
    (found,) = encode(config)
    assert found.manifest["fingerprint"]["stored"]["what"] == "mean"
    assert [line for line in caplog.messages if "predicts no variance" in line]
    table = found.parquet(0).read()
    assert {"mean", "mean_mirrored"} <= set(table.column_names)
    assert not {"logvar", "logvar_mirrored", "sample"} & set(table.column_names)

    caplog.clear()
    latents = LatentDataset(tmp_path / "z", mirror=0.0)
    assert [line for line in caplog.messages if "not sampled" in line]
    caplog.clear()
    assert torch.equal(LatentDataset(tmp_path / "z", mirror=0.0, sample=False)[0]["latents"], latents[0]["latents"])
    assert caplog.messages == []
    batch = torch.stack([row["latents"] for row in latents])
    assert batch.shape == (3, 4, 4, 4)
    statistics = found.manifest["statistics"]
    assert statistics["latents_std"] == pytest.approx(batch.double().std((0, 2, 3), correction=0).tolist(), rel=1e-6)

    encode(EncodeConfig(**{**vars(config), "verify": True}))  # encodes rows again and compares
    with pytest.raises(InputError, match="need store=mean"):
        encode(EncodeConfig(**{**vars(config), "output": str(tmp_path / "s"), "store": "sample"}))
    capfd.readouterr()
    assert main(["export", str(folder), str(tmp_path / "out"), "--latents", str(tmp_path / "z")]) == 2
    assert "a student" in capfd.readouterr().err


def test_a_vae_may_store_means_alone_too(vae, pictures, tmp_path):
    rows = {}
    for store in ("moments", "mean"):
        config = EncodeConfig(str(pictures), str(tmp_path / store), vae=str(vae), resolution=32, store=store)
        encode(config)
        rows[store] = LatentDataset(tmp_path / store, sample=False)[1]["latents"]
    assert torch.equal(rows["moments"], rows["mean"])


def test_latent_encoder_gives_a_students_means(folder, x):
    images = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    got = LatentEncoder(str(folder), dtype="fp32", precision="fp32", device="cpu")(
        {"image": images, "name": ["a", "b"]}
    )
    assert set(got) == {"name", "mean"}
    wanted = student().encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latents
    torch.testing.assert_close(torch.from_numpy(got["mean"]), wanted, rtol=1e-4, atol=1e-5)


def test_the_demo_shows_a_student(folder, pictures, tmp_path):
    model = view.Model.load(str(folder))
    image, _ = view.open_photograph(pictures / "0.png", 1024)
    encoded = view.encode(model, image)
    shown = view.show(model, encoded, view.Edits())
    assert "KL" not in shown.figures
    assert shown.figures["latents"] == "4 x 8 x 8"
    view.save_latents(model, encoded, tmp_path / "z.safetensors")
    saved = load_file(tmp_path / "z.safetensors")
    assert list(saved) == ["mean"]
    torch.testing.assert_close(saved["mean"], student().encode(encoded.x).latents, rtol=1e-4, atol=1e-5)


def test_the_latents_of_a_student_are_called_scaled_and_not_written_for_a_trainer_that_scales(
    folder, pictures, tmp_path, capsys
):
    config = EncodeConfig(str(pictures), str(tmp_path / "z"), vae=str(folder), resolution=32, min_side=1)
    encode(config)
    card = (tmp_path / "z" / "README.md").read_text()
    assert "Scaled latents of a student" in card
    assert "sample=False" in card
    assert "Measured here" not in card
    assert main(["convert", str(tmp_path / "z"), str(tmp_path / "k"), "--to=kohya"]) == 2
    assert "got latents of a student, which are scaled already" in capsys.readouterr().err
    assert not (tmp_path / "k").exists()


def test_rgb_factors_of_an_overwritten_file_do_not_stay(tmp_path, capsys):
    target = str(tmp_path / "vae.safetensors")
    images = ["--data=skimage", "--count=2", "--resolution=64"]
    assert main(["export", str(PACKAGED_VAE), target, *images]) == 0
    assert (tmp_path / "vae.latent_rgb_factors.json").is_file()
    assert main(["export", str(PACKAGED_VAE), target]) == 0
    assert not (tmp_path / "vae.latent_rgb_factors.json").exists()
    assert main(["export", str(PACKAGED_VAE), target, "--count=2"]) == 2
    assert "got count or resolution without data" in capsys.readouterr().err


def test_a_command_with_two_teachers_is_refused(capsys):
    assert main(["distil", "one", "--distil.teacher", "two"]) == 2
    assert "got one and --distil.teacher; need one of them" in capsys.readouterr().err
