"""What scripts/ holds, run for real at a small size."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from sdvae import load_vae, save_vae
from sdvae.cli import parse_train_config
from sdvae.training.build import build_vae
from tests.conftest import tiny_arguments
from tests.processes import launch, run_script

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
# of scripts/benchmark.py
LAYOUTS = ("against as loaded", "against channels_last")
LAYOUTS += ("both in bf16, channels_last", "bf16, channels_last, against as loaded")
REWRITES = {  # of a narrow VAE
    "channels_last": ("encode", "decode"),
    "four-tap upsampling": ("decode",),
    "activations and sums in place": ("encode", "decode"),
    "freed memory kept": ("encode", "decode"),
}


@pytest.fixture(scope="module")
def quickstart_folder(tmp_path_factory) -> Path:
    """runs/quickstart as the quickstart leaves it, its VAE untrained."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    folder.mkdir()
    vae = build_vae(parse_train_config(["--config", str(ROOT / "configs" / "quickstart.yaml")]).model)
    save_vae(vae, folder / "model")
    return folder


@pytest.fixture
def script(tmp_path) -> Callable[..., str]:
    """Runs scripts/NAME with arguments in a process of its own, and returns what it prints."""

    def run(name: str, *arguments: object) -> str:
        finished = launch(run_script, [ROOT / "scripts" / name, *arguments], tmp_path)
        assert finished.codes == [0], finished.stderr[-3000:]
        return finished.stdout

    return run


@pytest.mark.parametrize(
    ("line", "said"),
    [
        *[("benchmark.py --device cuda", "benchmark: error: got --device cuda; need a GPU")] * (not CUDA),
        ("streaming.py --sizes 256 70", "streaming: error: --sizes: got 70; need positive multiples of 8"),
        ("plain_baseline.py --output {output} --data.source ./nowhere", "plain_baseline: error: "),
    ],
)
def test_a_script_answers_bad_input_in_one_line(tmp_path, line, said):
    """One of its own checks, and one of the package."""
    name, *arguments = line.format(output=tmp_path / "output").split()
    finished = launch(run_script, [ROOT / "scripts" / name, *arguments], tmp_path)
    assert finished.codes == [2], finished.stderr[-2000:]
    assert said in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr


def test_every_script_answers_by_exit_code():
    """Which turns bad input into one line; tests of `sdvae` cover it."""
    for script in (ROOT / "scripts").glob("*.py"):
        ending = f'if __name__ == "__main__":\n    sys.exit(exit_code("{script.stem}", main))\n'
        assert script.read_text(encoding="utf-8").endswith(ending), script.name


def test_the_pipeline_demo_draws_the_photograph_beside_its_decoding(quickstart_folder, tmp_path, script):
    output = tmp_path / "pipeline.png"
    printed = script("pipeline_demo.py", quickstart_folder / "model", output, "--size", 64)
    assert "StableDiffusionImg2ImgPipeline" in printed
    with Image.open(output) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (64, 132, 3)
    assert pixels[:, :64].std() > 30, "the photograph"
    assert pixels[:, 68:].std() > 1, "what the pipeline decoded"


def test_the_benchmark_prints_a_ratio_for_each_row(script):
    size = ["--config", "configs/quickstart.yaml", "--size", 32, "--repeats", 1, "--dtype", "bf16", "--gemm", 64]
    printed = script("benchmark.py", *size)
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ") and "| |" not in line]
    assert [row[0].strip() for row in rows] == [
        *(f"{what}, {label}" for label in LAYOUTS for what in ("encode", "decode")),
        *(f"training step, {losses}, fp32 against fp32" for losses in ("L1 + LPIPS + KL", "with the PatchGAN")),
        *(f"{what}, {label}" for label, passes in REWRITES.items() for what in passes),
        *("encode, calibrated", "decode, calibrated"),
    ]
    assert int(re.search(r"; share (\d+)%", printed)[1]) > 0
    for row in rows:
        ours, theirs, ratio = (float(cell) for cell in row[1:4])
        assert ours > 0
        assert theirs > 0
        assert 0.01 < ratio < 100


def test_the_benchmark_of_a_gpu_prints_every_row_of_its_table(tmp_path, script):
    """On the CPU: that each row runs, and that the two sides compute the same."""
    recipe = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    recipe["model"] |= {"block_out_channels": [8, 8], "norm_num_groups": 4}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    small = ["--device", "cpu", "--small", "true", "--config", tmp_path / "tiny.yaml", "--repeats", 1]
    of_each_kind = ["--only", "decode_1024", "tiled_4096", "training_gan", "parity"]
    printed = script("benchmark.py", *small, *of_each_kind)
    tables = [[line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
              for table in printed.split("\n\n")[1:]]  # fmt: skip
    sides = ["", ", channels_last", ", compiled", ", channels_last, compiled"]
    passes = [f"stock{side}" for side in sides] + ["ours", "ours, channels_last", "ours, calibrated"]
    passes += ["ours, compiled", "ours, channels_last, compiled"]
    steps = [f"{name}{side}" for name in ("loop on stock", "ours") for side in sides]
    tiles = ["stock, tiled", "ours, whole", "ours, strips", "ours, strips, calibrated"]
    models = ("stock", "ours", "ours, calibrated", "ours, calibrated, strips")
    parity = [f"{name}, {dtype}" for dtype in ("float32", "bfloat16", "float16") for name in models]
    wanted = [passes, tiles, steps, parity]
    assert [[row[0].strip() for row in table[2:]] for table in tables] == wanted
    for table in tables[:-1]:
        for row in table[2:]:
            assert float(row[1]) > 0
            assert float(row[3]) > 0
            assert row[6].strip() == "" or float(row[6]) < 0.3, "bf16"
    for row in tables[-1][2:]:
        assert max(float(error) for error in row[1:3]) < (1e-4 if "float32" in row[0] else 0.3), row


def test_the_encoding_benchmark_prints_both_tables(photographs, script):
    images = ["--images", photographs, "--size", 32, "--count", 4, "--batch", 2, "--repeats", 1]
    printed = script("benchmark_encode.py", *images)
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[1:]] == ["sdvae encode", "bare encoder", "plain loop"]
    assert all(float(row[1]) > 0 for row in rows[1:])
    printed = script("benchmark_encode.py", "--memory_rows", 300)
    assert re.search(r"^\| 300 \| \d+ \| \d+ \|$", printed, re.MULTILINE)
    printed = script("benchmark_encode.py", "--shards", 20)
    assert re.findall(r"^\| (\w+).* \| \d+\.\d+ \|$", printed, re.MULTILINE) == ["continue", "finish", "open"]


def test_the_streaming_script_measures_and_draws(tmp_path):
    spec = importlib.util.spec_from_file_location("streaming_script", ROOT / "scripts" / "streaming.py")
    streaming = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(streaming)
    z = streaming.photograph_latents(load_vae(dtype=torch.float32), 256)
    save_file({"z": z.contiguous()}, tmp_path / "256.safetensors")
    rows = []
    for name in streaming.SIDES:
        arguments = argparse.Namespace(vae="", config=None, side=256, measure=name, memory_bytes=None)
        rows.append({"name": name, "side": 256, **streaming.measure(arguments, tmp_path)})
    errors = {row["name"]: row["error"] for row in rows}
    assert errors["whole image"] == 0
    assert errors["strips"] <= 1e-4
    assert max(errors["strips after speed_up"], errors["whole after speed_up"]) <= 1e-3
    assert all(row["seconds"] > 0 for row in rows)
    streaming.draw(rows, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_the_plain_baseline_trains_and_writes_its_figures(photographs, tmp_path, script):
    recipe = tiny_arguments(photographs, tmp_path / "run", steps="3")
    script("plain_baseline.py", "--output", tmp_path / "figures.json", "--learning_rate", "1e-3", *recipe)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["images"] == 3
    assert figures["steps"] == 3
    assert 3 < figures["psnr"] < 40


def test_the_packaged_vaes_training_runs_as_one_command_and_ships_only_what_is_good(photographs, tmp_path, script):
    changes = [argument for argument in tiny_arguments(photographs, tmp_path) if "source" not in argument]
    changes = [argument for argument in changes if not argument.startswith("--output_dir")]
    small = ["--steps=2", "--optimizer.warmup_steps=0", "--loss.discriminator.start_step=0"]
    random_trunk = "--loss.perceptual.allow_random=true"
    printed = script("train_embedded.py", photographs, "--output", tmp_path / "out", *changes, *small, random_trunk)
    figures = json.loads(printed[printed.index("{") :])
    shipped = tmp_path / "out" / "shipped"
    assert load_vae(shipped, dtype="file").dtype == torch.float16
    assert figures["images"] == 3
    card = (shipped / "README.md").read_text()
    assert f"| psnr | {figures['psnr']:#.4g} |" in card
    assert "`configs/small_f8c4_gan.yaml`: 2 steps" in card
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.width > 3 * 256
