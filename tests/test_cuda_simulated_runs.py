"""Whole commands on a simulated GPU: their results are those of the CPU, and only the lines named here wait."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch import Tensor

from sdvae import save_vae
from sdvae.cli import parse_train_config
from sdvae.evaluation.config import EvaluateConfig
from sdvae.evaluation.evaluate import evaluate
from sdvae.latents.encode import encode
from sdvae.latents.encoder import LatentEncoder
from sdvae.model.fp16 import audit, fix
from sdvae.training.checkpoint import checkpoints, read_state
from sdvae.training.loop import train
from tests.conftest import tiny_arguments
from tests.faults import Crash, blank, fault
from tests.latents_tools import options, rows_of
from tests.simulated_cuda import simulated_cuda
from tests.test_half import overflowing_vae
from tests.test_mnist import arguments as digits_arguments

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")

# Where a training run waits: the functions, and how often for each. docs/speed.md gives the reasons.
EACH_STEP = {"training/step.py:_agree": 1}
EACH_VALIDATED_BATCH = {"metrics/image.py:image_metrics": 1, "metrics/image.py:psnr": 2}
AT_THE_START = {"training/build.py:lay_out", "training/build.py:build_perceptual", "training/players.py:__init__"}
AT_THE_START |= {"training/loop.py:_probe", "training/preflight.py:probe", "training/state.py:load"}
AT_THE_START |= {"training/players.py:load_optimizer"}
AT_A_VALIDATION = {
    "training/validation.py:validate",
    "training/validation.py:measure_latents",
    "statistics.py:_in_float64",
}
AT_A_VALIDATION |= {"weights/read.py:<listcomp>", "model/convolutional.py:save_pretrained"}
AT_A_VALIDATION |= {"tutorial/conditional.py:_embedded", "statistics.py:update", "training/save.py:<dictcomp>"}
AT_A_CHECKPOINT = {"training/checkpoint.py:<dictcomp>", "training/state.py:state_dict"}
SOMETIMES = AT_THE_START | AT_A_VALIDATION | AT_A_CHECKPOINT

SPEEDS = ("train/images_per_second", "train/data_wait_fraction")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch) -> None:
    monkeypatch.setattr("sdvae.training.save.draw", blank)


def on(device: str, action: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """Do something on the CPU or on a simulated GPU. Returns its result, and how often each line waited."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    try:
        if device == "cpu":
            return action(), Counter()
        with simulated_cuda() as simulation:
            result = action()
            return result, Counter(wait.where for wait in simulation.waits)
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()


def lines_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines]


def files_of(run: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of the last checkpoint and of the saved VAE."""
    newest = checkpoints(run / "checkpoints")[0]
    files = [*newest.glob("*.safetensors"), *(run / "model").glob("*.safetensors")]
    return {path.name: load_file(path) for path in files}


def optimizer_state_of(run: Path, step: int) -> dict[str, Any]:
    path = run / "checkpoints" / f"step-{step:08d}" / "generator_optimizer.pt"
    return torch.load(path, weights_only=True)["state"]


RUNS: dict[str, dict[str, Any]] = {
    "everything": {
        "loss__lpips_weight": "0.3",
        "loss__learn_logvar": "true",
        "loss__equivariance__weight": "0.5",
        "loss__equivariance__scales": "[0.75]",
        "loss__discriminator__weight": "0.5",
        "loss__discriminator__start_step": "1",
        "loss__discriminator__layers": "1",
        "loss__discriminator__width": "8",
        "loss__discriminator__r1_weight": "0.1",
        "loss__discriminator__lecam_weight": "0.1",
        "data__resolution": "64",
        "gradient_accumulation_steps": "2",
        "validate_raw": "true",
        "gradient_checkpointing": "true",
    },
    "bf16, fused": {"mixed_precision": "bf16", "optimizer__kind": "adamw_fused", "batch_size": "3"},
    "muon": {"optimizer__kind": "muon"},
    "fp16": {
        "mixed_precision": "fp16",
        "loss__discriminator__weight": "0.5",
        "loss__discriminator__start_step": "0",
        "loss__discriminator__layers": "1",
        "loss__discriminator__width": "8",
    },
}


def run_of(name: str, source: Path, output: Path, trunk: Path) -> Path:
    changes = {"loss__perceptual__net": "squeeze", "loss__perceptual__weights": str(trunk)}
    changes |= {"loss__perceptual__heads": "uniform", "log_every": "1", "validate_every": "4"}
    changes |= {"checkpoint__every_steps": "2", "fast_convolutions": "false", **RUNS[name]}
    train(parse_train_config(tiny_arguments(source, output, **changes)))
    return output


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_the_cpu_continues_to_the_same_bits_and_waits_once_a_step(name, photographs, tmp_path, trunk):
    whole, waits = on("cuda", lambda: run_of(name, photographs, tmp_path / "gpu", trunk))
    batches = {"everything": 4, "bf16, fused": 1, "muon": 2, "fp16": 2}[name]  # of the validation
    for where, count in EACH_STEP.items():
        assert waits.pop(where) == 4 * count
    for where, count in EACH_VALIDATED_BATCH.items():
        assert waits.pop(where) == batches * count
    assert waits.keys() <= SOMETIMES
    assert {x.device.type for state in optimizer_state_of(whole, 4).values() for x in state.values()} == {"cpu"}

    cut = tmp_path / "cut"
    with fault("crash", 3), pytest.raises(Crash):
        on("cuda", lambda: run_of(name, photographs, cut, trunk))
    on("cuda", lambda: run_of(name, photographs, cut, trunk))
    assert lines_of(cut) == lines_of(whole)
    for file, weights in files_of(whole).items():
        assert all(torch.equal(weights[key], found) for key, found in files_of(cut)[file].items()), file

    if name == "fp16":  # which a CPU refuses
        scalers = [read_state(checkpoints(run / "checkpoints")[0])["loss_scaler"] for run in (whole, cut)]
        assert scalers[0] == scalers[1]
        assert scalers[0]["scale"] > 1
        return
    shutil.rmtree(cut)
    on("cpu", lambda: run_of(name, photographs, cut, trunk))
    tolerance = 0.1 if "bf16" in name else 2e-3
    for found, wanted in zip(lines_of(whole), lines_of(cut), strict=True):
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    if "bf16" in name:
        return
    wanted = load_file(checkpoints(cut / "checkpoints")[0] / "ema.safetensors")
    found = load_file(checkpoints(whole / "checkpoints")[0] / "ema.safetensors")
    difference = torch.cat([(found[key] - wanted[key]).abs().flatten() for key in wanted]).mean()
    assert float(difference) < 3e-6  # a step moves each weight by 1e-4, and rounding turns some around


@pytest.mark.slow
def test_a_run_with_labels_a_bernoulli_likelihood_and_an_adversary_of_latents(digits, tmp_path):
    adversary = {"sees": "latents", "weight": 0.02, "start_step": 1, "width": 8}
    changes = {f"loss__discriminator__{key}": value for key, value in adversary.items()}
    changes |= {"data__label_dropout": 0.3, "loss__free_bits": 0.1, "mixed_precision": "no"}

    def run(device: str) -> Path:
        return train(parse_train_config(digits_arguments("mnist_cvae", digits, tmp_path / device, **changes)))

    _, waits = on("cuda", lambda: run("cuda"))
    on("cpu", lambda: run("cpu"))
    assert waits["training/step.py:_agree"] == 4
    assert waits.keys() <= SOMETIMES | EACH_STEP.keys() | EACH_VALIDATED_BATCH.keys()
    for found, wanted in zip(lines_of(tmp_path / "cuda"), lines_of(tmp_path / "cpu"), strict=True):
        assert found == pytest.approx(wanted, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("how", [{"latents": "sample"}, {"precision": "bf16"}, {"precision": "fp16", "tiling": True}])
def test_evaluate_gives_the_figures_of_the_cpu(how, vae, photographs, tmp_path):
    def measured() -> dict[str, Any]:
        shape = {"data": str(photographs), "resolution": 32, "count": 5, "batch_size": 2, "num_workers": 0}
        config = EvaluateConfig(vaes=(str(vae),), lpips="none", output=str(tmp_path / "out"), **shape, **how)
        (result,) = evaluate(config)
        return result

    found, waits = on("cuda", measured)
    wanted, _ = on("cpu", measured)
    waits.pop("evaluation/evaluate.py:result")  # the weights, to the device and back
    batches = 3
    assert waits == {
        "roundtrip.py:_now": 3 * batches + 6,  # to measure time; the first batch is a warm-up and a probe too
        "metrics/memory.py:with_peak_memory": 2,
        "evaluation/evaluate.py:_measure": 3 * batches,  # images to the device, and both kinds back for the pictures
        "statistics.py:_in_float64": batches,
        "metrics/image.py:psnr": 2 * batches,
        "metrics/image.py:image_metrics": batches,
        "metrics/image.py:image_figures": batches,
    }
    tolerance = 1e-4 if "precision" not in how else 0.02
    for name, estimate in wanted["means"].items():
        assert found["means"][name].mean == pytest.approx(estimate.mean, rel=tolerance, abs=tolerance), name


def test_encode_writes_the_latents_of_the_cpu_and_waits_once_a_batch(vae, photographs, tmp_path):
    def encoded(device: str) -> dict[str, dict]:
        encode(options(photographs, tmp_path / device, vae, device=device, mirror=True))
        return rows_of(tmp_path / device)

    found, waits = on("cuda", lambda: encoded("cuda"))
    wanted, _ = on("cpu", lambda: encoded("cpu"))
    waits.pop("latents/encoder.py:_copied")  # the weights
    assert waits == {"latents/encoder.py:moments": 4}  # two shards of a batch of four and one
    assert found.keys() == wanted.keys()
    for name, row in wanted.items():
        for column in ("mean", "logvar", "mean_mirrored", "logvar_mirrored"):
            torch.testing.assert_close(found[name][column], row[column], atol=2e-3, rtol=2e-3)  # stored in fp16


def test_latents_that_overflow_in_fp16_are_computed_again_in_fp32(tmp_path):
    save_vae(overflowing_vae(), tmp_path / "vae")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)

    def encoded(precision: str, device: str) -> dict[str, np.ndarray]:
        encoder = LatentEncoder(str(tmp_path / "vae"), dtype="fp32", precision=precision, device=device)
        return encoder({"image": images})

    found, waits = on("cuda", lambda: encoded("fp16", "cuda"))
    wanted, _ = on("cpu", lambda: encoded("fp32", "cpu"))
    assert waits["latents/encoder.py:again"] == 1
    for column in ("mean", "logvar"):
        np.testing.assert_allclose(found[column], wanted[column], atol=1e-4)


def test_the_fp16_audit_and_the_rescaling_work_on_the_device():
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def rescaled(device: str) -> tuple[dict[str, float], dict[str, float]]:
        vae = overflowing_vae().to(device)
        return audit(vae, [x.to(device)]), fix(vae, [x.to(device)]).scales

    (largest, scales), _ = on("cuda", lambda: rescaled("cuda"))
    on_cpu, _ = on("cpu", lambda: rescaled("cpu"))
    assert largest == pytest.approx(on_cpu[0], rel=1e-4)
    assert scales == on_cpu[1]
