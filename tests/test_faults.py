"""What goes wrong on real machines, each done for real: nothing is lost, everybody stops, the reason is named."""

from __future__ import annotations

import io
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from PIL import Image

from sdvae import InputError
from sdvae.cli import main
from sdvae.data.dataset import TrainingImages
from sdvae.errors import Stopped
from sdvae.training import loop
from sdvae.training.checkpoint import checkpoints, newest_whole, read_checkpoint
from sdvae.training.state import RunState
from sdvae.training.step import TrainStep
from sdvae.weights import load_vae
from tests.conftest import draw_photographs, tiny_arguments
from tests.faults import fault, run_with_fault
from tests.kill_at_boundaries import save_and_be_killed
from tests.processes import launch
from tests.test_resume import EVERYTHING, ROOT, differences, records, result, run, two_processes, undrawn  # noqa: F401

pytestmark = pytest.mark.slow


def everything(source: Path, output: Path, **changes: str) -> list[str]:
    return tiny_arguments(source, output, **{**EVERYTHING, "data__num_workers": "0", **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """(photographs, what an uninterrupted run leaves)."""
    root = tmp_path_factory.mktemp("whole")
    source = draw_photographs(root / "photographs")
    run(source, root / "run", data__num_workers="0")
    return source, result(root / "run")


def test_killed_at_every_file_operation_of_a_save_a_whole_checkpoint_is_left(tmp_path):
    done = launch(save_and_be_killed, [tmp_path / "checkpoints"], tmp_path)
    assert done.codes == [0], done.stderr[-2000:]
    operations, old, new = map(int, re.findall(r"\d+", done.stdout))
    assert operations > 15
    assert old > 5
    assert new > 2


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_process_that_is_signalled_continues_with_the_same_command(whole, tmp_path, name):
    source, wanted = whole
    arguments = everything(source, tmp_path / "run", data__num_workers="1")
    killed = launch(run_with_fault, [name.lower(), 4, 0, *arguments], tmp_path)
    number = int(getattr(signal, name))
    assert killed.codes == [-number if name == "SIGKILL" else 128 + number], killed.stderr[-2000:]
    if name != "SIGKILL":
        assert "sdvae: stopped after step 5; the same command continues from step-00000005" in killed.stderr
        assert "Traceback" not in killed.stderr
    run(source, tmp_path / "run", data__num_workers="0")
    assert not differences(result(tmp_path / "run"), wanted)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(whole, tmp_path, monkeypatch, capsys):
    source, wanted = whole
    real = RunState.save

    def save_on_a_full_disk(self, *args):
        if self.progress.step > 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        real(self, *args)

    monkeypatch.setattr(RunState, "save", save_on_a_full_disk)
    try:
        code = main(["train", *everything(source, tmp_path / "run")])
    finally:
        ceiling = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (ceiling, ceiling))
    assert code == 1
    assert re.search(r"sdvae: error: .*(File too large|os error 27)", capsys.readouterr().err)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    run(source, tmp_path / "run", data__num_workers="0")
    assert not differences(result(tmp_path / "run"), wanted)


def test_nan_on_one_process_is_skipped_by_all_and_named(whole, tmp_path):
    source, _ = whole
    launched = two_processes(run_with_fault, source, tmp_path / "run", "nan", 2, 1)
    assert launched.codes == [0, 0], launched.stderr[-3000:]
    (line,) = [line for line in launched.stderr.splitlines() if "is skipped" in line]
    culprit = line.split("step 3 is skipped: process 1: ")[1]
    assert "reconstruction nan" in culprit
    assert len(re.findall(r"\d\d\.png", culprit)) == 2, "the images of process 1"
    checkpoint = read_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert checkpoint.state["ema_updates"] == checkpoint.state["step"] - 1
    for weights in checkpoint.weights.values():
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_nan_that_stays_ends_the_run_with_its_term_its_images_and_a_checkpoint_of_before(whole, tmp_path):
    source, wanted = whole
    changes = {"data__num_workers": "0", "max_skipped_steps": "3"}
    with fault("nan", 2, until=99), pytest.raises(InputError) as stopped:
        run(source, tmp_path / "run", **changes)
    message = str(stopped.value)
    assert message.startswith("3 steps in a row had no finite loss and gradient")
    assert "reconstruction nan" in message
    assert len(re.findall(r"\d\d\.png", message)) == 4
    assert "step-00000002, is kept" in message
    run(source, tmp_path / "run", **changes)  # the cause is gone: as if it had never been
    assert not differences(result(tmp_path / "run"), wanted)


def test_when_a_process_dies_all_stop_soon_and_nothing_is_half_written(whole, tmp_path):
    source, _ = whole
    arguments = everything(source, tmp_path / "run", gradient_accumulation_steps="1")
    launched = subprocess.run(  # by torchrun, whose part it is to end the other process
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(ROOT / "tests" / "faults.py", "sigkill", "4", "1", *arguments),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=240,
    )
    assert launched.returncode != 0
    (folder, _), damaged = newest_whole(tmp_path / "run" / "checkpoints")
    assert folder.name == "step-00000003"
    assert not damaged
    continued = two_processes(run_with_fault, source, tmp_path / "run", "none", 0, 0)
    assert continued.codes == [0, 0], continued.stderr[-3000:]


def test_when_a_data_worker_dies_the_run_says_so_and_can_be_continued(whole, tmp_path, monkeypatch, capsys):
    source, wanted = whole
    real = TrainingImages.__getitem__

    def deadly(self, key):
        if torch.utils.data.get_worker_info() is not None and key.epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, key)

    monkeypatch.setattr(TrainingImages, "__getitem__", deadly)
    assert main(["train", *everything(source, tmp_path / "run", data__num_workers="1")]) == 1
    error = capsys.readouterr().err
    assert re.search(r"sdvae: error: DataLoader worker \(pid.* the same command continues", error)
    monkeypatch.undo()
    run(source, tmp_path / "run", data__num_workers="0")
    assert not differences(result(tmp_path / "run"), wanted)


def test_an_exception_at_the_worst_moment_does_not_leave_gradients_off(whole, tmp_path, monkeypatch):
    # torch raises a worker's death wherever the main thread is: in a `no_grad`'s exit, say, before it has undone it
    def struck(*args, **kwargs):
        torch._C._set_grad_enabled(False)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(TrainStep, "__call__", struck)
    with pytest.raises(OSError, match="the same command continues"):
        run(whole[0], tmp_path / "run", data__num_workers="0")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", ["log", "log_images", "start", "finish"])
def test_a_tracker_that_fails_costs_its_curves_only(whole, tmp_path, monkeypatch, caplog, method):
    source, wanted = whole

    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(TensorBoardTracker, method, fail)
    run(source, tmp_path / "run", trackers="[tensorboard]", data__num_workers="0")
    reports = [record.message for record in caplog.records if "no route to host" in record.message]
    assert len(reports) == 1
    assert not differences(result(tmp_path / "run"), wanted)


def png(array: np.ndarray, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def corpus(folder: Path) -> dict[str, bytes]:
    """Files that call themselves images and cannot be trained on."""
    noise = np.random.default_rng(1).integers(0, 256, (48, 56, 3), dtype=np.uint8)
    whole_png, whole_jpeg = png(noise), png(noise, format="JPEG")
    header = bytearray(whole_png)
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height of a bomb
    broken_crc = bytearray(whole_png)
    broken_crc[len(broken_crc) // 2] ^= 0xFF
    files = {
        "empty.png": b"",
        "one-byte.jpg": b"\xff",
        "text.jpg": b"not an image",
        "html.png": b"<!DOCTYPE html><html>404</html>",
        "lfs.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "truncated.png": whole_png[: len(whole_png) // 2],
        "truncated.jpg": whole_jpeg[: len(whole_jpeg) // 2],
        "header-only.png": whole_png[:33],
        "header-only.jpg": whole_jpeg[:20],
        "zeros.png": bytes(1000),
        "bomb.png": bytes(header),
        "broken-data.png": bytes(broken_crc),
        "tiny.png": png(noise[:1, :1]),
        "narrow.png": png(noise[:, :8]),
        "flat.png": png(noise[:8, :]),
        "truncated.gif": png(noise, format="GIF")[:60],
        "truncated.webp": png(noise, format="WEBP")[:40],
        "truncated.bmp": png(noise, format="BMP")[:500],
        "truncated.tiff": png(noise, format="TIFF")[:100],
        "json.webp": b'{"error": "forbidden"}',
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    return files


def test_a_corpus_of_bad_images_is_named_and_trained_around(tmp_path, caplog):
    source = draw_photographs(tmp_path / "photographs")
    bad = corpus(source)
    assert len(bad) >= 18
    changes = {"steps": "24", "data__max_bad_fraction": "1", "validate_every": "24", "data__num_workers": "1"}
    output = loop.train(_config(source, tmp_path / "run", **changes))
    named = {m[1]: m[2] for r in caplog.records if (m := re.match(r"bad image (\S+): (.+)", r.message))}
    assert set(bad) <= set(named), set(bad) - set(named)
    assert all(len(reason) > 5 for reason in named.values())
    assert all(torch.isfinite(tensor).all() for tensor in load_vae(output).state_dict().values())
    assert all(np.isfinite(v) for line in records(tmp_path / "run") for v in line.values() if isinstance(v, float))


def test_too_many_bad_images_stop_the_run_with_some_of_them(tmp_path):
    source = draw_photographs(tmp_path / "photographs")
    corpus(source)
    with pytest.raises(InputError, match=r"images are bad.*data.max_bad_fraction"):
        loop.train(_config(source, tmp_path / "run", steps="24"))


def _config(source: Path, output: Path, **changes: str):
    from sdvae.cli import parse_train_config

    return parse_train_config(tiny_arguments(source, output, **changes))


def test_a_second_signal_ends_the_run_at_once(whole, tmp_path, request):
    source, _ = whole
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, former))
    before = signal.getsignal(signal.SIGINT)
    with fault("sigint", 1, until=5), pytest.raises(Stopped):
        run(source, tmp_path / "run", data__num_workers="0")
    assert signal.getsignal(signal.SIGINT) is before, "handlers are given back"
    with loop.StopSignal() as stopping:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.was_received()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
