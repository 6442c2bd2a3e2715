"""Other autoencoders of diffusers: loading, measuring and encoding, against the stock class run by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdvae import InputError, LatentDataset, LatentEncoder, encode, load_autoencoder, load_vae, round_trip
from sdvae.cli import main
from sdvae.data import center_crop, read_image, to_tensor
from sdvae.latents.folder import LatentFolder
from sdvae.latents.scaling import scaling_of
from sdvae.model.kinds import class_name, has_posterior
from sdvae.model.stock import USES, StockAutoencoder
from sdvae.roundtrip import encode_images
from tests.latents_tools import draw, options

MEAN, STD = [0.1, -0.2, 0.3, 0.4], [0.5, 1.0, 2.0, 0.25]
KL_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
THREE_LEVELS: dict[str, Any] = {
    "block_out_channels": (8,) * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
WAN: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False],
    "latents_mean": MEAN,
    "latents_std": STD,
}
# name -> (class, its arguments, compression ratio)
TINY: dict[str, tuple[str, dict[str, Any], int]] = {
    "dc": (
        "AutoencoderDC",
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            **{f"{part}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock") for part in ("encoder", "decoder")},
            **{f"{part}_block_out_channels": (8,) * 3 for part in ("encoder", "decoder")},
            **{f"{part}_layers_per_block": (1,) * 3 for part in ("encoder", "decoder")},
            **{f"{part}_qkv_multiscales": ((), (), (5,)) for part in ("encoder", "decoder")},
            "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
            "scaling_factor": 0.41407,
        },
        4,
    ),
    "asymmetric": (
        "AsymmetricAutoencoderKL",
        {**KL_BLOCKS, "down_block_out_channels": (8, 8), "up_block_out_channels": (8, 16)},
        2,
    ),
    "vq": ("VQModel", {**KL_BLOCKS, "block_out_channels": (8, 8), "num_vq_embeddings": 16, "vq_embed_dim": 5}, 2),
    "movq": (
        "VQModel",
        {**KL_BLOCKS, "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), "block_out_channels": (32, 32)}
        | {"num_vq_embeddings": 16, "norm_type": "spatial"},
        2,
    ),
    "hunyuan_image": (
        "AutoencoderKLHunyuanImage",
        {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32)}
        | {"layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 64, "scaling_factor": 0.75289},
        2,
    ),
    "wan": ("AutoencoderKLWan", {**WAN, "scale_factor_spatial": 2}, 2),
    "wan2.2": (
        "AutoencoderKLWan",
        {**WAN, "temperal_downsample": [True], "is_residual": True, "decoder_base_dim": 16}
        | {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 4},
        4,
    ),
    "qwen": ("AutoencoderKLQwenImage", WAN, 2),
    "hunyuan_video": (
        "AutoencoderKLHunyuanVideo",
        {**THREE_LEVELS, "down_block_types": ("HunyuanVideoDownBlock3D",) * 3}
        | {"up_block_types": ("HunyuanVideoUpBlock3D",) * 3, "spatial_compression_ratio": 4},
        4,
    ),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        {**THREE_LEVELS, "down_block_types": ("CogVideoXDownBlock3D",) * 3}
        | {"up_block_types": ("CogVideoXUpBlock3D",) * 3, "latents_mean": MEAN, "latents_std": STD},
        4,
    ),
}
POINTS = ("dc", "vq", "movq")
VIDEOS = ("wan", "wan2.2", "qwen", "hunyuan_video", "cogvideox")


def network(name: str) -> Any:
    """diffusers' class with random weights."""
    torch.manual_seed(0)
    kind, arguments, _ = TINY[name]
    built = getattr(diffusers, kind)(**arguments).eval()
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after some training
            module.running_mean.normal_()
            module.num_batches_tracked.fill_(7)
    return built


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stock")
    for name in TINY:
        network(name).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("pictures") / "pictures", 5)


def by_hand(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mode of the latents, (B, c, h, w), and the reconstruction, by diffusers' class as its pipelines use it."""
    stock, ratio = network(name), TINY[name][2]
    right, bottom = -x.shape[3] % ratio, -x.shape[2] % ratio
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, bottom), (0, right)), mode="edge"))
    if name in VIDEOS:
        z = stock.encode(padded[:, :, None]).latent_dist.mode()
        decoded = stock.decode(z).sample
        return z[:, :, 0], decoded[:, :, 0, : x.shape[2], : x.shape[3]]
    encoded = stock.encode(padded)
    z = {"dc": lambda: encoded.latent, "vq": lambda: encoded.latents, "movq": lambda: encoded.latents}.get(
        name, lambda: encoded.latent_dist.mode()
    )()
    decoded = stock.decode(z, **({"force_not_quantize": True} if name == "movq" else {})).sample
    return z, decoded[:, :, : x.shape[2], : x.shape[3]]


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def image_of(file: Path) -> Tensor:
    """A picture as `encode` and `report` take it at a resolution of 32."""
    return to_tensor(center_crop(read_image(file), 32))


@pytest.mark.parametrize("size", [(24, 32), (17, 23)])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_round_trips_are_those_of_the_stock_class_by_hand_for_any_size(name, size, folders):
    vae = load_autoencoder(folders / name)
    assert isinstance(vae, StockAutoencoder)
    assert not vae.training
    assert class_name(vae) == TINY[name][0]
    assert has_posterior(vae) == (name not in POINTS)
    x = images(*size)
    trip, (z, reconstruction) = round_trip(vae, x), by_hand(name, x)
    assert torch.equal(trip.latents, z)
    assert torch.equal(trip.reconstruction, reconstruction)
    assert trip.reconstruction.std() > 0
    assert trip.posterior.deterministic == (name in POINTS)
    assert z.shape[1] == vae.config.latent_channels
    assert vae.spatial_compression_ratio == TINY[name][2]


def test_every_class_is_tested():
    assert {kind for kind, _, _ in TINY.values()} == set(USES)


@pytest.mark.parametrize("name", ["hunyuan_image", "wan", "qwen"])
@torch.no_grad()
def test_a_sample_is_that_of_the_stock_posterior(name, folders):
    x = images(16, 16)
    stock = network(name).encode(x[:, :, None] if name in VIDEOS else x).latent_dist
    found = encode_images(load_autoencoder(folders / name), x).sample(torch.Generator().manual_seed(3))
    assert torch.equal(found, stock.sample(torch.Generator().manual_seed(3)).reshape(found.shape))
    assert not torch.equal(found, stock.mode().reshape(found.shape))


# ---- scaling ----


def scaled_by_pipeline(name: str, x: Tensor) -> Tensor:
    """Images to scaled latents by the code of a pipeline that takes this class, without the rest of the pipeline."""
    stock, ratio = network(name), TINY[name][2]
    common = {
        "vae": stock,
        "vae_scale_factor": ratio,
        "vae_scale_factor_spatial": ratio,
        "vae_scale_factor_temporal": 4,
    }
    size = {"height": x.shape[2], "width": x.shape[3], "dtype": torch.float32, "device": torch.device("cpu")}
    generator = torch.Generator().manual_seed(0)
    if name == "dc":
        scheduler = SimpleNamespace(config=SimpleNamespace(sigma_data=1.0))
        zero = torch.zeros(())  # the time at which nothing is noise
        return diffusers.SanaSprintImg2ImgPipeline.prepare_latents(
            SimpleNamespace(**common, scheduler=scheduler), x, zero, len(x), 4, **size, generator=generator
        )
    if name.startswith("wan"):
        scheduler = SimpleNamespace(add_noise=lambda latents, noise, timestep: latents)
        return diffusers.WanVideoToVideoPipeline.prepare_latents(
            SimpleNamespace(**common, scheduler=scheduler), x[:, :, None], len(x), 4, **size, generator=generator
        )[:, :, 0]
    if name == "hunyuan_video":
        factor = stock.config.scaling_factor
        _, latents = diffusers.HunyuanVideoImageToVideoPipeline.prepare_latents(
            SimpleNamespace(**common, vae_scaling_factor=factor),
            x[:1],
            1,
            num_channels_latents=4,
            num_frames=1,
            **size,
            generator=generator,
        )
        return latents[:, :, 0]
    if name == "qwen":
        pipeline, x = diffusers.QwenImageImg2ImgPipeline, x[:, :, None]
    else:
        pipeline = diffusers.StableDiffusionInpaintPipeline
    scaled = pipeline._encode_vae_image(SimpleNamespace(**common), x, torch.Generator().manual_seed(0))
    return scaled[:, :, 0] if name == "qwen" else scaled


@pytest.mark.parametrize("name", ["dc", "asymmetric", "wan", "wan2.2", "qwen", "hunyuan_video"])
@torch.no_grad()
def test_latents_are_scaled_as_a_pipeline_of_that_class_scales_them(name, folders):
    x = images(16, 16)
    vae = load_autoencoder(folders / name)
    posterior, scaling = encode_images(vae, x), scaling_of(vae)
    drawn = posterior.sample(torch.Generator().manual_seed(0)) if name in ("asymmetric", "qwen") else posterior.mode()
    wanted = scaled_by_pipeline(name, x)
    torch.testing.assert_close(scaling.normalize(drawn)[: len(wanted)], wanted)
    torch.testing.assert_close(scaling.denormalize(scaling.normalize(drawn)), drawn)


@torch.no_grad()
def test_scaled_latents_of_cogvideox_decode_as_its_pipeline_decodes_them(folders):
    vae = load_autoencoder(folders / "cogvideox")
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    stub = SimpleNamespace(
        vae=network("cogvideox"), vae_scaling_factor_image=network("cogvideox").config.scaling_factor
    )
    wanted = diffusers.CogVideoXPipeline.decode_latents(stub, z[:, None])[:, :, 0]
    torch.testing.assert_close(vae.decode(scaling_of(vae).denormalize(z)).sample, wanted)


def test_kandinsky_does_not_scale_latents_and_ldm_does(folders):
    x = torch.ones(1, 3, 2, 2)
    assert torch.equal(scaling_of(load_autoencoder(folders / "movq")).normalize(x), x)
    torch.testing.assert_close(scaling_of(load_autoencoder(folders / "vq")).normalize(x), 0.18215 * x)
    torch.testing.assert_close(scaling_of(load_autoencoder(folders / "hunyuan_image")).normalize(x), 0.75289 * x)


# ---- encoding ----


@pytest.mark.parametrize("name", ["wan2.2", "dc", "asymmetric"])
@torch.no_grad()
def test_encoded_latents_are_those_of_the_stock_class_and_come_back_scaled(name, folders, pictures, tmp_path):
    encode(options(pictures, tmp_path / "latents", folders / name, dtype="fp32"))
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert manifest["vae_config"]["_class_name"] == TINY[name][0]
    assert manifest["fingerprint"]["vae"]["class"] == TINY[name][0]
    assert manifest["fingerprint"]["stored"]["what"] == ("mean" if name in POINTS else "moments")
    vae = load_autoencoder(folders / name)
    dataset = LatentDataset(tmp_path / "latents", sample=False)
    rows = [dataset[i] for i in range(5)]
    x = torch.stack([image_of(pictures / row["name"]) for row in rows])
    wanted = scaling_of(vae).normalize(by_hand(name, x)[0])
    torch.testing.assert_close(torch.stack([row["latents"] for row in rows]), wanted, atol=1e-4, rtol=1e-4)
    z = dataset.scaling.denormalize(torch.stack([row["latents"] for row in rows]))
    np.testing.assert_allclose(manifest["statistics"]["latents_mean"], z.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    card = (tmp_path / "latents" / "README.md").read_text()
    assert f"- {TINY[name][0]}: encoder" in card
    assert ("with latents_mean and latents_std" in card) == (name == "wan2.2")


def test_latents_of_another_class_with_the_same_folder_are_refused(folders, pictures, tmp_path):
    encode(options(pictures, tmp_path / "latents", folders / "wan"))
    with pytest.raises(InputError, match="made in another way"):
        encode(options(pictures, tmp_path / "latents", folders / "qwen"))


@torch.no_grad()
def test_the_callable_encoder_takes_another_class_in_bf16(folders):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    batch = LatentEncoder(str(folders / "hunyuan_image"), precision="bf16", dtype="fp32")({"image": pixels})
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    wanted, _ = by_hand("hunyuan_image", x)
    torch.testing.assert_close(torch.from_numpy(batch["mean"]), wanted, atol=0.05, rtol=0.05)
    assert not np.array_equal(batch["mean"], wanted.numpy())  # it was rounded to bf16
    assert set(LatentEncoder(str(folders / "dc"))({"image": pixels})) == {"mean"}


def test_kohya_gets_no_latents_of_another_class(folders, pictures, tmp_path, capsys):
    encode(options(pictures, tmp_path / "latents", folders / "wan"))
    assert main(["convert", str(tmp_path / "latents"), str(tmp_path / "out"), "--to", "kohya"]) == 2
    assert "got latents of an AutoencoderKLWan" in capsys.readouterr().err


# ---- commands ----


def test_evaluate_and_reconstruct_take_other_classes_side_by_side(folders, pictures, vae, tmp_path):
    names = [str(folders / name) for name in ("dc", "qwen", "movq")]
    common = ["--data", str(pictures), "--resolution", "30", "--lpips", "none", "--num_workers", "0"]
    assert main(["evaluate", str(vae), *names, *common, "--output", str(tmp_path / "found")]) == 0
    results = json.loads((tmp_path / "found" / "results.json").read_text())["vaes"]
    assert [result["class"] for result in results][1:] == ["AutoencoderDC", "AutoencoderKLQwenImage", "VQModel"]
    assert [result["compression_ratio"] for result in results][1:] == [4, 2, 2]
    assert ["kl_nats" in result["means"] for result in results] == [True, False, True, False]
    file = next(iter(sorted(pictures.iterdir())))
    assert main(["reconstruct", str(file), "--vae", names[1], "--output", str(tmp_path / "out")]) == 0
    x = to_tensor(read_image(file))[None]
    with torch.no_grad():
        wanted = by_hand("qwen", x)[1].clamp(-1, 1)
    found = to_tensor(read_image(tmp_path / "out" / file.name))[None]
    assert (found - wanted).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.slow
def test_report_states_class_and_scaling_and_has_no_strips(folders, pictures, tmp_path):
    page = tmp_path / "report.html"
    command = ["report", str(folders / "wan"), "--data", str(pictures), "--output", str(page), "--lpips", "none"]
    assert main([*command, "--resolution", "32"]) == 0
    html = page.read_text()
    assert "<td>AutoencoderKLWan</td>" in html
    assert 'data-delta="fp16"' in html
    assert 'data-delta="strips"' not in html
    x = torch.stack([image_of(file) for file in sorted(pictures.iterdir())])
    with torch.no_grad():
        posterior = network("wan").encode(x[:, :, None]).latent_dist
    mean, std = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in (MEAN, STD))
    scaled, variance = (posterior.mean - mean) / std, posterior.var / std**2
    wanted = float((scaled.square() + variance).mean() - scaled.mean().square()) ** 0.5
    assert "by <code>latents_mean</code>" in html
    found = re.search(r"the std of scaled latents on these images is ([0-9.]+)", html)
    assert found is not None
    assert float(found[1]) == pytest.approx(wanted, abs=6e-4)


TRAINING = ["--output_dir", "{out}", "--data.source", "{pictures}", "--data.validation_count", "1"]


@pytest.mark.parametrize(
    "command",
    [
        ["export", "{vae}", "{out}"],
        ["fp16", "audit", "{vae}"],
        ["explore", "pca", "--vae", "{vae}", "--output", "{out}"],
        ["push", "{vae}", "a/b", "--dry_run", "{out}"],
        ["distil", "{vae}", "--config", "configs/tiny.yaml", *TRAINING],
        ["train", "--fine_tune.source", "{vae}", *TRAINING],
    ],
)
def test_other_commands_refuse_other_classes_in_one_line(command, folders, pictures, tmp_path, capsys):
    places = {"vae": folders / "wan", "out": tmp_path / "out", "pictures": pictures}
    assert main([word.format(**places) for word in command]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is for AutoencoderKLWan, which evaluate, report, reconstruct and encode take" in said
    assert not (tmp_path / "out" / "config.json").exists()


# ---- faults ----


def test_strips_of_another_class_are_refused(folders, pictures, tmp_path, capsys):
    command = ["evaluate", str(folders / "wan"), "--data", str(pictures), "--tiling", "true", "--lpips", "none"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "there are no strips" in capsys.readouterr().err


def changed(folders: Path, name: str, target: Path, weights: Any = None, **config: Any) -> Path:
    """A copy of a folder with other weights, or other keys in its config.json; a key that is None is removed."""
    network(name).save_pretrained(target)
    content = {**json.loads((target / "config.json").read_text()), **config}
    content = {key: value for key, value in content.items() if value is not None}
    (target / "config.json").write_text(json.dumps(content))
    if weights is not None:
        file = target / "diffusion_pytorch_model.safetensors"
        save_file(weights(load_file(file)), file)
    return target


def test_missing_extra_and_broken_weights_are_refused(folders, tmp_path):
    def without(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(list(weights.items())[1:])

    with pytest.raises(InputError, match="1 missing"):
        load_autoencoder(changed(folders, "wan", tmp_path / "a", without))
    with pytest.raises(InputError, match="1 unexpected"):
        load_autoencoder(changed(folders, "wan", tmp_path / "b", lambda w: {**w, "encoder.more": torch.ones(1)}))
    with pytest.raises(InputError, match="NaN or infinite"):
        load_autoencoder(
            changed(folders, "wan", tmp_path / "c", lambda w: {key: value / 0 for key, value in w.items()})
        )


def test_a_config_that_does_not_fit_is_refused(folders, tmp_path):
    wrong_ratio = load_autoencoder(changed(folders, "wan", tmp_path / "a", scale_factor_spatial=4))
    with pytest.raises(
        InputError, match=r"gives latents of shape \(4, 8, 8\), and by its config they have \(4, 4, 4\)"
    ):
        wrong_ratio.encode(images(16, 16))
    with pytest.raises(InputError, match="unknown key 'z_dims'; need keys of AutoencoderKLWan; did you mean 'z_dim'"):
        load_autoencoder(changed(folders, "wan", tmp_path / "b", z_dims=4))
    with pytest.raises(InputError, match="diffusers cannot build an AutoencoderDC"):
        load_autoencoder(changed(folders, "dc", tmp_path / "c", encoder_block_types=["Block"] * 3))
    with pytest.raises(InputError, match="scaling_factor None; need the number"):
        load_autoencoder(changed(folders, "hunyuan_image", tmp_path / "d", scaling_factor=None))
    given = load_autoencoder(tmp_path / "d", config={"scaling_factor": 2.0})
    assert given.config.scaling_factor == 2.0
    with pytest.raises(InputError, match="without block_out_channels"):
        load_autoencoder(changed(folders, "hunyuan_image", tmp_path / "e", block_out_channels=None))


def test_a_class_without_a_use_for_images_is_refused_by_its_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderOobleck"}))
    for load in (load_vae, load_autoencoder):
        with pytest.raises(InputError, match="is for AutoencoderOobleck"):
            load(tmp_path)
    with pytest.raises(InputError, match="got an Linear; need one of AutoencoderDC"):
        StockAutoencoder(nn.Linear(1, 1))


@torch.no_grad()
def test_old_names_of_attention_load_and_the_files_dtype_is_kept(folders, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        for new, name in old.items():
            weights = {key.replace(f".{new}.", f".{name}."): value.half() for key, value in weights.items()}
        return weights

    folder = changed(folders, "vq", tmp_path / "vq", renamed)
    assert any("proj_attn" in key for key in load_file(folder / "diffusion_pytorch_model.safetensors"))
    assert load_autoencoder(folder, dtype="file").dtype == torch.float16
    x = images(16, 16)
    torch.testing.assert_close(
        round_trip(load_autoencoder(folder), x).latents, by_hand("vq", x)[0], atol=5e-3, rtol=0.05
    )


def test_the_manifest_is_read_by_latent_folders(folders, pictures, tmp_path):
    encode(options(pictures, tmp_path / "latents", folders / "qwen"))
    folder = LatentFolder(tmp_path / "latents")
    folder.open(finished=True)
    torch.testing.assert_close(folder.scaling.shift.flatten(), torch.tensor(MEAN))
    torch.testing.assert_close(folder.scaling.scale.flatten(), 1 / torch.tensor(STD))
