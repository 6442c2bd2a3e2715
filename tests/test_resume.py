"""A run that was interrupted and continued is the run that was not, to the bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from sdvae import InputError
from sdvae.cli import parse_train_config
from sdvae.data import SampleOrder
from sdvae.errors import Stopped
from sdvae.training import loop, save
from sdvae.training.checkpoint import Checkpoint, checkpoints, read_checkpoint, write_checkpoint
from sdvae.training.config import LossConfig, TrainConfig
from sdvae.training.run_folder import RunFolder, plain
from sdvae.weights import load_vae
from tests.conftest import draw_photographs, tiny_arguments
from tests.faults import Crash, blank, fault, run_with_fault
from tests.processes import Finished, launch
from tests.recorder import record

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEPS = 7
EVERYTHING = {
    "steps": str(STEPS),
    "log_every": "3",
    "validate_every": "4",
    "validate_raw": "true",
    "checkpoint__every_steps": "3",
    "gradient_accumulation_steps": "2",
    "data__num_workers": "1",
    "data__mixed_resolutions": "[24,32]",
    "data__final_resolution": "40",
    "data__final_part": "0.3",
    "data__native_crop": "0.5",
    "loss__reconstruction": "l1 + 0.2 l2",
    "loss__kl_warmup_steps": "3",
    "loss__learn_logvar": "true",
    "loss__discriminator__weight": "0.5",
    "loss__discriminator__start_step": "1",
    "loss__discriminator__ramp_steps": "2",
    "loss__discriminator__layers": "1",
    "loss__discriminator__width": "8",
    "loss__discriminator__r1_weight": "0.1",
    "loss__discriminator__lecam_weight": "0.1",
    "loss__discriminator__augment": "[color,translation,cutout]",
    "loss__discriminator__consistency_weight": "0.1",
    "loss__equivariance__weight": "0.25",
    "optimizer__warmup_steps": "2",
    "optimizer__schedule": "cosine",
    "optimizer__learning_rate": "0.001",
}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(save, "draw", blank)


def run(source: Path, output: Path, **changes: str) -> Path:
    return loop.train(parse_train_config(tiny_arguments(source, output, **{**EVERYTHING, **changes})))


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def result(output: Path) -> dict:
    """All that a run leaves, but for what the clock decides and where it lies."""
    clock = ("train/images_per_second", "train/data_wait_fraction")
    lines = records(output)
    checkpoint = read_checkpoint(checkpoints(output / "checkpoints")[0])
    state = {k: v for k, v in checkpoint.state.items() if k not in ("config", "files")}
    return {
        "metrics": [{k: v for k, v in line.items() if k not in clock} for line in lines],
        "weights": checkpoint.weights,
        "optimizers": checkpoint.optimizers,
        "state": state,
        "model": load_vae(output / "model").state_dict(),
        "best": load_vae(output / "best_model").state_dict(),
    }


def differences(a, b, where: str = "") -> list[str]:
    """Paths at which two nested results are not the same, tensors compared bit by bit."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [f"{where}: keys"]
        return [path for key in a for path in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} entries"]
        return [path for i, pair in enumerate(zip(a, b, strict=True)) for path in differences(*pair, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a} and {b}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """(photographs, what an uninterrupted run leaves)."""
    root = tmp_path_factory.mktemp("whole")
    source = draw_photographs(root / "photographs")
    run(source, root / "run")
    return source, result(root / "run")


def test_the_whole_run_has_everything_on(whole):
    kept = whole[1]
    assert kept["weights"].keys() == {"generator", "discriminator", "ema"}
    assert kept["optimizers"].keys() == {"generator", "discriminator"}
    assert "logvar" in kept["weights"]["generator"]
    assert kept["state"]["lecam"] is not None
    assert kept["state"]["position"] == STEPS * 4
    named = {name for line in kept["metrics"] for name in line}
    assert {"train/equivariance", "train/r1", "train/gan_weight", "validation/psnr", "validation_raw/psnr"} <= named


def test_a_checkpoint_has_the_files_and_keys_that_earlier_versions_wrote(whole, tmp_path):
    """So that either version continues the other's runs."""
    source, wanted = whole
    with fault("sigterm", 3), pytest.raises(Stopped):
        run(source, tmp_path / "run", data__num_workers="0")
    (newest, _) = checkpoints(tmp_path / "run" / "checkpoints")
    written = read_checkpoint(newest)
    networks, state = ("generator", "discriminator"), written.state
    assert {path.name for path in newest.iterdir()} == {
        "state.json",
        "ema.safetensors",
        *(f"{name}.safetensors" for name in networks),
        *(f"{name}_optimizer.pt" for name in networks),
    }
    by_hand = {
        "step": 4,
        "position": 16,
        "skipped_in_a_row": 0,
        "validated": False,
        "best": {},
        "config": plain(parse_train_config(tiny_arguments(source, tmp_path / "run", **EVERYTHING))),
        "images_per_step": 4,
        "train_images": 7,
        "train_names": state["train_names"],
        "perceptual": None,
        "ema_updates": 4,
        "lecam": [float(score) for score in state["lecam"]],
        "loss_scaler": None,
        "meters": [{name: [float(total), count] for name, (total, count) in state["meters"][0].items()}],
        "bad_images": [],
    }
    assert by_hand.keys() == state.keys() - {"format", "files", "teacher", "latents", "anchor"}, (
        "of students and anchors"
    )
    assert by_hand["meters"][0]["loss"] == [pytest.approx(state["meters"][0]["loss"][0]), 2]
    write_checkpoint(newest, Checkpoint(written.weights, written.optimizers, by_hand))
    run(source, tmp_path / "run", data__num_workers="0")
    assert not differences(result(tmp_path / "run"), wanted)


@pytest.mark.parametrize("step", [0, 3], ids=lambda step: f"step-{step}")
def test_stopped_by_sigterm_and_continued_is_uninterrupted(whole, tmp_path, step):
    source, wanted = whole
    with fault("sigterm", step), pytest.raises(Stopped, match=rf"stopped after step {step + 1}") as stopped:
        run(source, tmp_path / "run")
    assert stopped.value.exit_code == 143
    run(source, tmp_path / "run")
    assert not differences(result(tmp_path / "run"), wanted)


def uninterrupted(source: Path, root: Path, **changes: str) -> dict:
    """What a run leaves, having checked that one that was stopped and continued leaves the same."""
    run(source, root / "whole", **changes)
    with fault("sigterm", 3), pytest.raises(Stopped):
        run(source, root / "run", **changes)
    run(source, root / "run", **changes)
    wanted = result(root / "whole")
    assert not differences(result(root / "run"), wanted)
    return wanted


def test_in_bf16_stopped_and_continued_is_uninterrupted(whole, tmp_path):
    """With everything on, as a CPU that computes in bf16 trains by itself."""
    source, in_fp32 = whole
    wanted = uninterrupted(source, tmp_path, mixed_precision="bf16")
    assert differences(wanted["weights"], in_fp32["weights"]), "was not computed in bf16"


def test_with_muon_stopped_and_continued_is_uninterrupted(whole, tmp_path):
    source, with_adamw = whole
    wanted = uninterrupted(source, tmp_path, optimizer__kind="muon")
    states = wanted["optimizers"]["generator"]["state"].values()
    assert {frozenset(state) for state in states} == {
        frozenset({"momentum"}),
        frozenset({"step", "exp_avg", "exp_avg_sq"}),
    }
    assert wanted["optimizers"]["discriminator"].keys() == with_adamw["optimizers"]["discriminator"].keys()


def test_a_run_that_changes_to_muon_starts_its_moments_anew(whole, tmp_path, caplog):
    source, _ = whole
    with fault("sigterm", 3), pytest.raises(Stopped):
        run(source, tmp_path / "run")
    run(source, tmp_path / "run", optimizer__kind="muon", checkpoint__accept_changed_config="true")
    assert "optimizer.kind has changed: the optimizer's moments start anew" in caplog.text
    assert {"momentum"} in [
        set(state) for state in result(tmp_path / "run")["optimizers"]["generator"]["state"].values()
    ]


@pytest.mark.parametrize("step", [1, 5])
def test_crashed_between_checkpoints_and_continued_is_uninterrupted(whole, tmp_path, step):
    source, wanted = whole
    with fault("crash", step), pytest.raises(Crash):
        run(source, tmp_path / "run")
    run(source, tmp_path / "run", data__num_workers="0")
    assert not differences(result(tmp_path / "run"), wanted)


def test_interrupted_often_is_uninterrupted(whole, tmp_path):
    source, wanted = whole
    for step in range(STEPS):
        with fault("sigint", step), pytest.raises(Stopped) as stopped:
            run(source, tmp_path / "run", data__num_workers="0")
        assert stopped.value.exit_code == 130
    run(source, tmp_path / "run", data__num_workers="0")
    assert not differences(result(tmp_path / "run"), wanted)


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed", "state", "hostile"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, tmp_path, damage, caplog):
    caplog.set_level("INFO", logger="sdvae")
    source, wanted = whole
    with fault("crash", 6), pytest.raises(Crash):
        run(source, tmp_path / "run", data__num_workers="0")
    newest, before = checkpoints(tmp_path / "run" / "checkpoints")
    assert (newest.name, before.name) == ("step-00000006", "step-00000003")
    spoil(newest, damage, tmp_path / "executed")
    run(source, tmp_path / "run", data__num_workers="0")
    assert "step-00000006 is damaged and left out" in caplog.text
    assert f"continuing from {before}" in caplog.text
    assert not (tmp_path / "executed").exists()
    assert not differences(result(tmp_path / "run"), wanted)


class Hostile:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


def spoil(folder: Path, damage: str, target: Path) -> None:
    optimizer = folder / "generator_optimizer.pt"
    weights = folder / "ema.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        optimizer.unlink()
    elif damage == "changed":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "state":
        (folder / "state.json").write_text((folder / "state.json").read_text()[:200])
    else:  # with a manifest that fits, as an attacker would write it
        torch.save({"state": Hostile(target)}, optimizer)
        import hashlib

        state = json.loads((folder / "state.json").read_text())
        data = optimizer.read_bytes()
        state["files"][optimizer.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "state.json").write_text(json.dumps(state))


def test_when_no_checkpoint_can_be_read_nothing_is_lost(whole, tmp_path):
    source, _ = whole
    with fault("crash", 4), pytest.raises(Crash):
        run(source, tmp_path / "run", data__num_workers="0")
    (only,) = checkpoints(tmp_path / "run" / "checkpoints")
    (only / "ema.safetensors").write_bytes(b"")
    before = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())
    with pytest.raises(InputError, match=r"none of the 1 checkpoints .* can be read .*--overwrite=true"):
        run(source, tmp_path / "run")
    assert sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file()) == before


def test_a_changed_recipe_is_refused_with_the_fields_that_differ(whole, tmp_path, caplog):
    source, _ = whole
    with fault("sigterm", 3), pytest.raises(Stopped):
        run(source, tmp_path / "run", data__num_workers="0")
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    changes = {"loss__kl_weight": "1e-5", "optimizer__betas": "[0.5, 0.99]"}
    with pytest.raises(
        InputError, match=r"loss.kl_weight: 1e-06 -> 1e-05; optimizer.betas: \[0.5, 0.9\] -> \[0.5, 0.99\]"
    ):
        run(source, tmp_path / "run", **changes)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log
    run(source, tmp_path / "run", **changes, checkpoint__accept_changed_config="true", data__num_workers="0")
    assert "continuing with a changed recipe: loss.kl_weight" in caplog.text
    checkpoint = read_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert checkpoint.optimizers["generator"]["param_groups"][0]["betas"] == (0.5, 0.99), "and really so"


def test_a_field_that_an_older_version_did_not_know_counts_as_its_default(tmp_path):
    recipe = plain(TrainConfig())
    del recipe["loss"]["free_bits"], recipe["loss"]["discriminator"]["sees"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "metrics.jsonl").touch()
    folder = RunFolder(tmp_path)
    assert folder.find(TrainConfig(), images_per_step=12) is None, "from step 0, as the run that was begun"
    changed = TrainConfig(loss=LossConfig(free_bits=0.5))
    with pytest.raises(InputError, match=r"loss\.free_bits: 0\.0 -> 0\.5"):
        folder.find(changed, images_per_step=12)


def test_the_batch_may_be_divided_otherwise_when_a_step_takes_as_many_images(whole, tmp_path):
    source, wanted = whole
    with fault("sigterm", 2), pytest.raises(Stopped):
        run(source, tmp_path / "run", data__num_workers="0")
    changes = {"batch_size": "4", "gradient_accumulation_steps": "1"}
    with pytest.raises(InputError, match="batch_size: 2 -> 4"):  # the adaptive weight is that of a forward pass
        run(source, tmp_path / "run", **changes)
    fixed = {"loss__discriminator__adaptive": "false", "data__num_workers": "0"}
    with fault("sigterm", 2), pytest.raises(Stopped):
        run(source, tmp_path / "run", **fixed, overwrite="true")
    run(source, tmp_path / "run", **changes, **fixed, log_every="1")
    assert result(tmp_path / "run")["state"]["position"] == wanted["state"]["position"]
    with pytest.raises(InputError, match="batch_size: 4 -> 2"):
        run(source, tmp_path / "run", gradient_accumulation_steps="1", **fixed)


def test_a_finished_run_is_left_alone(whole, tmp_path, caplog):
    caplog.set_level("INFO", logger="sdvae")
    source, _ = whole
    once = {"steps": "1", "optimizer__warmup_steps": "0", "loss__discriminator__weight": "0", "data__num_workers": "0"}
    run(source, tmp_path / "run", **once)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.suffix not in (".lock", "")}
    run(source, tmp_path / "run", **once)
    assert "is finished: 1 steps" in caplog.text
    assert all(path.read_bytes() == content for path, content in files.items())


def test_more_steps_continue_a_finished_run(whole, tmp_path):
    source, _ = whole
    constant = {"optimizer__schedule": "constant", "data__num_workers": "0"}
    constant |= {"data__final_part": "0"}  # which would begin later in a longer run
    run(source, tmp_path / "long", **constant)
    run(source, tmp_path / "run", steps="4", **constant)
    run(source, tmp_path / "run", **constant, checkpoint__accept_changed_config="true")
    long, continued = (read_checkpoint(checkpoints(tmp_path / name / "checkpoints")[0]) for name in ("long", "run"))
    assert not differences(continued.weights, long.weights)
    assert not differences(continued.optimizers, long.optimizers)


def test_a_run_starts_from_the_discriminator_that_another_run_kept(whole, tmp_path):
    source, kept = whole
    file = source.parent / "run" / "discriminator.safetensors"
    wait = {"steps": "1", "optimizer__warmup_steps": "0", "loss__discriminator__start_step": "5"}
    given = {"loss__discriminator__source": str(file), "data__num_workers": "0"}
    run(source, tmp_path / "run", **wait, **given)
    (checkpoint,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert not differences(read_checkpoint(checkpoint).weights["discriminator"], kept["weights"]["discriminator"])
    assert not (tmp_path / "run" / "discriminator.safetensors").exists(), "it has learned nothing"
    with pytest.raises(InputError, match="does not fit the recipe's network: 6 weights differ, such as"):
        run(source, tmp_path / "other", **wait, **given, loss__discriminator__width="16")


def test_another_number_of_images_is_refused(tmp_path):
    source = draw_photographs(tmp_path / "photographs")
    with fault("sigterm", 1), pytest.raises(Stopped):
        run(source, tmp_path / "run", data__num_workers="0")
    (source / "00.png").unlink()
    with pytest.raises(InputError, match="has 6 training images and had 7"):
        run(source, tmp_path / "run", data__num_workers="0")


def test_an_image_exchanged_for_another_is_refused(tmp_path):
    source = draw_photographs(tmp_path / "photographs")
    validation = draw_photographs(tmp_path / "validation")
    apart = {"data__validation_source": str(validation), "data__num_workers": "0"}
    with fault("sigterm", 1), pytest.raises(Stopped):
        run(source, tmp_path / "run", **apart)
    before = (tmp_path / "run" / "config.yaml").read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (source / "00.png").rename(source / "99.png")
    with pytest.raises(InputError, match="has images with other names than when the run began"):
        run(source, tmp_path / "run", **apart)
    assert (
        (tmp_path / "run" / "config.yaml").read_bytes(),
        (tmp_path / "run" / "metrics.jsonl").read_bytes(),
    ) == before


def test_another_best_metric_begins_its_own_comparison(whole, tmp_path):
    source, _ = whole
    changes = {"validate_every": "1", "data__num_workers": "0"}
    with fault("sigterm", 3), pytest.raises(Stopped):
        run(source, tmp_path / "run", **changes)
    run(source, tmp_path / "run", **changes, checkpoint__best_metric="ssim")
    best = result(tmp_path / "run")["state"]["best"]
    lines = [line for line in records(tmp_path / "run") if "validation/ssim" in line and line["step"] >= 4]
    assert best["metric"] == "ssim"
    assert best["value"] == max(line["validation/ssim"] for line in lines)


def test_the_best_model_is_chosen_anew_when_it_is_measured_on_other_images(whole, tmp_path):
    """A figure of larger crops says nothing about one of smaller crops."""
    source, _ = whole
    changes = {"validate_every": "1", "data__num_workers": "0"}
    with fault("sigterm", 3), pytest.raises(Stopped):
        run(source, tmp_path / "run", **changes)
    anew = {"data__validation_resolution": "48", "checkpoint__accept_changed_config": "true"}
    run(source, tmp_path / "run", **changes, **anew)
    best = result(tmp_path / "run")["state"]["best"]
    lines = [line for line in records(tmp_path / "run") if "validation/psnr" in line and line["step"] >= 4]
    assert "48 pixels" in best["on"]
    assert best["step"] >= 4
    assert best["value"] == max(line["validation/psnr"] for line in lines)


def test_an_overwriting_run_that_is_killed_can_be_overwritten_again(whole, tmp_path, monkeypatch):
    source, _ = whole
    once = {"steps": "1", "optimizer__warmup_steps": "0", "loss__discriminator__weight": "0", "data__num_workers": "0"}
    for victim in ("checkpoints", "config.yaml"):
        run(source, tmp_path / "run", **once, overwrite="true")
        real = RunFolder._remove

        def kill(*paths, real=real, victim=victim):
            real(*paths)
            if any(path.name == victim for path in paths):
                raise Crash

        monkeypatch.setattr(RunFolder, "_remove", staticmethod(kill))
        with pytest.raises(Crash):
            run(source, tmp_path / "run", **once, overwrite="true")
        monkeypatch.setattr(RunFolder, "_remove", staticmethod(real))
        run(source, tmp_path / "run", **once, overwrite="true")


def test_two_runs_cannot_train_into_one_folder(whole, tmp_path):
    source, _ = whole
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(InputError, match="another run is training into"):
        run(source, tmp_path / "run")


def test_the_newest_checkpoints_are_kept_and_the_best_model_is_by_its_metric(whole, tmp_path):
    source, _ = whole
    changes = {"checkpoint__every_steps": "1", "checkpoint__keep_last": "3", "validate_every": "1", "steps": "5"}
    # ever larger steps: the reconstruction gets worse, so an early model is the best one
    run(source, tmp_path / "run", **changes, optimizer__learning_rate="0.3", optimizer__ema_decay="0")
    kept = [folder.name for folder in checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-00000005", "step-00000004", "step-00000003"]
    lines = [line for line in result(tmp_path / "run")["metrics"] if "validation/psnr" in line]
    best = max(lines, key=lambda line: line["validation/psnr"])
    chosen = result(tmp_path / "run")["state"]["best"]
    assert (chosen["metric"], chosen["value"], chosen["step"]) == ("psnr", best["validation/psnr"], best["step"])
    assert chosen["on"].startswith("3 images at 32 pixels, ")
    card = (tmp_path / "run" / "best_model" / "README.md").read_text()
    assert f"After {best['step']} steps" in card


def two_processes(target, source: Path, output: Path, *before: object, **changes: str) -> Finished:
    output.parent.mkdir(exist_ok=True)
    settings = {**EVERYTHING, "data__num_workers": "0", "gradient_accumulation_steps": "1", **changes}
    return launch(target, [*before, *tiny_arguments(source, output, **settings)], output.parent, world_size=2)


def test_two_processes_stopped_by_a_signal_to_one_and_continued_are_uninterrupted(whole, tmp_path):
    source, _ = whole
    straight = two_processes(run_with_fault, source, tmp_path / "straight", "none", 0, 0)
    assert straight.codes == [0, 0], straight.stderr[-3000:]
    stopped = two_processes(run_with_fault, source, tmp_path / "run", "sigterm", 3, 1)
    assert stopped.codes == [143, 143], stopped.stderr[-3000:]
    assert "stopped after step 4; the same command continues" in stopped.stderr
    continued = two_processes(run_with_fault, source, tmp_path / "run", "none", 0, 0)
    assert continued.codes == [0, 0], continued.stderr[-3000:]
    assert not differences(result(tmp_path / "run"), result(tmp_path / "straight"))


def test_with_another_number_of_processes_no_sample_is_repeated_or_missed(whole, tmp_path):
    source, _ = whole
    fixed = {"loss__discriminator__adaptive": "false"}  # an adaptive weight binds the division of a step's images
    with fault("sigterm", 2), pytest.raises(Stopped):
        run(source, tmp_path / "run", data__num_workers="0", **fixed)
    records = tmp_path / "records"
    records.mkdir()
    launched = two_processes(record, source, tmp_path / "run", 2, records, **fixed)
    assert launched.codes == [0, 0], launched.stderr[-3000:]
    ranks = [torch.load(file) for file in sorted(records.glob("rank-*.pt"))]
    assert len(ranks) == 2
    seen = [key for steps in zip(*ranks, strict=True) for rank in steps for key in rank["samples"]]
    order = SampleOrder(7, seed=0)
    assert seen == [tuple(order.at(position))[:2] for position in range(3 * 4, STEPS * 4)]
