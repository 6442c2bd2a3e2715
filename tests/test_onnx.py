"""`sdvae export --onnx true`: ONNX Runtime computes what torch does, at any size, in optimum's layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from sdvae import AutoencoderTiny, InputError, save_vae
from sdvae.cli import main
from sdvae.weights import onnx as module
from sdvae.weights.onnx import save_onnx
from tests.conftest import tiny_vae

SMALL = {
    "num_encoder_blocks": (0, 1),
    "num_decoder_blocks": (1, 0),
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "use_midblock_gn": True,
}
STATISTICS = {"latents_mean": (0.5, -1.0, 0.25, 0.0), "latents_std": (1.0, 2.0, 3.0, 0.5), "scaling_factor": 1.0}


def make_vae() -> Any:
    vae = tiny_vae(layers_per_block=1, **STATISTICS).eval()
    vae.set_likelihood("bernoulli")
    return vae


def make_student() -> Any:
    torch.manual_seed(0)
    return AutoencoderTiny(**SMALL).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("onnx")
    save_vae(make_vae(), root / "vae")
    assert main(["export", str(root / "vae"), str(root / "out"), "--onnx", "true"]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    save_onnx(make_student(), folder)
    return folder


def run(folder: Path, part: str, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(folder / f"vae_{part}" / "model.onnx", providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    assert name == {"encoder": "sample", "decoder": "latent_sample"}[part]
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 22, 34)])
@torch.no_grad()
def test_the_encoder_gives_the_posterior_at_any_size(shape, exported):
    batch, height, width = shape
    x = noise(batch, 3, height, width)
    torch.testing.assert_close(
        run(exported, "encoder", x), make_vae().encode(x).latent_dist.parameters, atol=1e-5, rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 14)])
@torch.no_grad()
def test_the_decoder_gives_images_at_any_size_also_for_logits(shape, exported):
    batch, height, width = shape
    z = noise(batch, 4, height, width)
    wanted = torch.tanh(make_vae().decode(z).sample / 2)  # the mean of a Bernoulli
    torch.testing.assert_close(run(exported, "decoder", z), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 7)])
@torch.no_grad()
def test_a_student_gives_latents_and_images_at_any_size(shape, student):
    batch, height, width = shape
    x, z = noise(batch, 3, 2 * height, 2 * width), noise(batch, 4, height, width)
    torch.testing.assert_close(run(student, "encoder", x), make_student().encode(x).latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(student, "decoder", z), make_student().decode(z).sample, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_names_metadata_and_configs_are_those_that_optimum_reads(exported):
    wanted = {"encoder": ("sample", "latent_parameters"), "decoder": ("latent_sample", "sample")}
    for part, (before, after) in wanted.items():
        session = onnxruntime.InferenceSession(exported / f"vae_{part}" / "model.onnx")
        assert [given.name for given in session.get_inputs()] == [before]
        assert [given.name for given in session.get_outputs()] == [after]
        assert isinstance(session.get_inputs()[0].shape[0], str), "the batch is dynamic"
        found = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        assert found["scaling_factor"] == 1.0
        assert found["latents_mean"] == list(STATISTICS["latents_mean"])  # type: ignore[call-overload]
        assert found["latents_std"] == list(STATISTICS["latents_std"])  # type: ignore[call-overload]
        assert (found["latent_channels"], found["spatial_compression_ratio"]) == (4, 2)
        assert "shift_factor" not in found
        config = json.loads((exported / f"vae_{part}" / "config.json").read_text())
        assert (config["_class_name"], config["scaling_factor"]) == ("AutoencoderKL", 1.0)


def test_the_output_of_a_students_encoder_is_called_a_sample_since_it_has_no_posterior(student):
    session = onnxruntime.InferenceSession(student / "vae_encoder" / "model.onnx")
    assert [given.name for given in session.get_outputs()] == ["latent_sample"]


@pytest.mark.slow
@torch.no_grad()
def test_fp16_weights_give_models_in_fp16_and_replace_those_that_were_there(student, tmp_path):
    root = tmp_path / "pipeline"
    (root / "unet").mkdir(parents=True)
    (root / "vae_decoder").mkdir()
    (root / "vae_decoder" / "model.onnx").write_bytes(b"old")
    written = save_onnx(make_student().half(), root)
    assert [path.relative_to(root).as_posix() for path in written] == [f"vae_{p}/model.onnx" for p in module.PARTS]
    assert sorted(path.name for path in root.iterdir()) == ["unet", "vae_decoder", "vae_encoder"]
    z = noise(1, 4, 3, 3).half()
    found = run(root, "decoder", z)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), make_student().decode(z.float()).sample, atol=0.01, rtol=0.05)
    sizes = [(folder / "vae_decoder" / "model.onnx").stat().st_size for folder in (root, student)]
    assert sizes[0] < sizes[1]


def test_a_model_that_computes_something_else_is_not_written(student, tmp_path, monkeypatch):
    """The models are those of other weights, which stands for an exporter that makes an error."""

    def write(wrapper: object, vae: object, part: str, file: Path) -> None:
        shutil.copy2(student / f"vae_{part}" / "model.onnx", file)

    monkeypatch.setattr(module, "_write", write)
    assert len(save_onnx(make_student(), tmp_path / "same")) == 2
    vae = make_student()
    vae.encoder.layers[0].weight.data *= 1.01
    with pytest.raises(InputError, match="the ONNX encoder differs from the VAE"):
        save_onnx(vae, tmp_path / "changed")
    assert list((tmp_path / "changed").iterdir()) == []


def test_without_onnxruntime_it_is_said_that_nothing_was_compared(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "_write", lambda wrapper, vae, part, file: file.write_bytes(b""))
    save_onnx(make_student(), tmp_path)
    assert "the models are not compared with the VAE" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vae.onnx"], "need the name of a folder, and --onnx true"),
        (["vae.safetensors", "--onnx", "true"], "need the name of a folder"),
        (["out", "--onnx", "true", "--data", "skimage"], "got data with onnx"),
        (["out", "--onnx", "true", "--dtype", "bf16"], "need fp32 or fp16"),
        (["used", "--onnx", "true"], "holds other things (notes.txt)"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_vae(make_student(), tmp_path / "student")
    (tmp_path / "used" / "vae_decoder").mkdir(parents=True)
    (tmp_path / "used" / "vae_decoder" / "notes.txt").write_text("mine")
    assert main(["export", "student", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert [path.name for path in (tmp_path / "used").rglob("*") if path.is_file()] == ["notes.txt"]


def test_metadata_hold_numbers_as_json():
    found = module.metadata_of(make_vae())
    assert np.allclose(json.loads(found["latents_std"]), STATISTICS["latents_std"])
