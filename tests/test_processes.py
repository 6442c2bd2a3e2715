"""What processes do together: on two machines that share no disk, a run is the one that one machine would train."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from accelerate import Accelerator
from filelock import FileLock

from sdvae import InputError, save_vae
from sdvae.cli import main, parse_train_config
from sdvae.training.build import build_accelerator
from sdvae.training.loop import Training
from sdvae.training.processes import check_same, everywhere, from_main, on_main
from tests.conftest import draw_photographs, tiny_arguments, tiny_vae
from tests.faults import run_with_fault
from tests.processes import Finished, launch
from tests.test_resume import EVERYTHING, ROOT, differences, result, two_processes

pytestmark = pytest.mark.slow

SHORT = {"steps": "3", "log_every": "2", "validate_every": "3", "checkpoint__every_steps": "2"}


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Path, Path]:
    """The working directories of two machines, each with the same photographs."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        draw_photographs(tmp_path / name / "photographs")
    return tmp_path / "first", tmp_path / "second"


def train_in_own_folder(argv: list[str]) -> None:
    """`sdvae train` in this process's working directory. The arguments are a JSON list for each rank: [FOLDER, …]."""
    folder, *arguments = json.loads(argv[int(os.environ["RANK"])])
    os.chdir(folder)
    sys.exit(main(["train", *arguments]))


def train(machines: tuple[Path, Path], *changes: dict[str, str]) -> Finished:
    """A run of two processes, each in its own working directory, with `changes` of its own in the recipe."""
    arguments = [
        json.dumps([str(machine), *tiny_arguments(Path("photographs"), Path("run"), steps="1", **own)])
        for machine, own in zip(machines, changes, strict=True)
    ]
    return launch(train_in_own_folder, arguments, machines[0].parent, world_size=2)


def assert_refused(finished: Finished, *expected: str) -> None:
    """Every process says it in one line and ends."""
    assert finished.codes == [2, 2], finished.stderr[-3000:]
    lines = [line for line in finished.stderr.splitlines() if line.startswith("sdvae: error:")]
    assert len(lines) == 2, finished.stderr[-3000:]
    for line, pattern in zip(lines, expected * (2 // len(expected)), strict=True):
        assert re.search(pattern, line), line
    assert "Traceback" not in finished.stderr


def test_a_recipe_that_differs_is_refused_with_its_fields(machines):
    finished = train(machines, {}, {"log_every": "1", "optimizer__learning_rate": "0.01"})
    assert_refused(
        finished, r"process 0 on \S+ and process 1 on .*\(log_every: 2 -> 1; optimizer.learning_rate: 0.0001 -> 0.01\)"
    )
    assert not (machines[0] / "run").exists()


def test_images_that_differ_are_refused(machines):
    (machines[1] / "photographs" / "00.png").rename(machines[1] / "photographs" / "aa.png")
    assert_refused(train(machines, {}, {}), r"(training|validation) images\.digest of names: \w{8} -> \w{8}")
    assert not (machines[0] / "run").exists()


def test_images_that_are_missing_on_one_machine_stop_all(machines):
    finished = train(machines, {}, {"data__source": "elsewhere"})
    assert_refused(finished, r"error: process 1 on .*elsewhere", r"error: .*elsewhere")
    assert not (machines[0] / "run").exists()


def test_a_folder_that_no_run_wrote_is_refused_on_all_machines(machines):
    (machines[0] / "run").mkdir()
    (machines[0] / "run" / "thesis.txt").write_text("years of work")
    finished = train(machines, {}, {})
    assert_refused(
        finished, "error: output_dir=run holds files", r"error: process 0 on \S+: output_dir=run holds files"
    )


def test_a_folder_in_use_is_refused_on_all_machines(machines):
    (machines[0] / "run").mkdir()
    with FileLock(machines[0] / "run" / ".lock"):
        finished = train(machines, {}, {})
    assert_refused(finished, "another run is training into output_dir=run")


def test_another_recipe_in_the_folder_is_refused_on_all_machines(machines):
    (machines[0] / "run").mkdir()
    (machines[0] / "run" / "metrics.jsonl").touch()
    (machines[0] / "run" / "config.yaml").write_text("seed: 7\n")
    assert_refused(train(machines, {}, {}), r"holds the run of another recipe \(.*seed: 7 -> 0")


def test_a_run_does_not_start_anew_where_another_machine_has_its_checkpoint(machines):
    (machines[1] / "run" / "checkpoints" / "step-00000100").mkdir(parents=True)
    finished = train(machines, {}, {})
    assert_refused(finished, r"process 1 on \S+ has step-00000100 .*process 0 on \S+, .* has none; .*--node_rank 0")
    assert not (machines[0] / "run" / "config.yaml").exists()


def begin(argv: list[str]) -> None:
    """Prepare the first step, and save the weights of this process: FOLDER, then as `train_in_own_folder`."""
    rank = int(os.environ["RANK"])
    folder, *arguments = json.loads(argv[1 + rank])
    os.chdir(folder)
    config = parse_train_config(arguments)
    training = Training(config, build_accelerator(config))
    with training.signals:
        training.begin()
    networks = {**training.state.networks, "perceptual": training.perceptual}
    weights = {name: network.state_dict() for name, network in networks.items()}
    torch.save(weights, Path(argv[0]) / f"weights-{rank}.pt")


def test_all_machines_start_from_the_weights_of_the_first(machines, tmp_path):
    """Of the VAE, its moving average and LPIPS's trunk."""
    for seed, machine in enumerate(machines):
        vae = tiny_vae()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.normal_(std=0.1)
        save_vae(vae, machine / "vae")
        trunk = torchvision.models.squeezenet1_1(weights=None).state_dict()
        torch.save(trunk, machine / "trunk.pth")
    settings = {"loss__lpips_weight": "1", "loss__perceptual__net": "squeeze", "loss__perceptual__heads": "uniform"}
    settings |= {"loss__perceptual__weights": "trunk.pth", "fine_tune__source": "vae"}
    arguments = tiny_arguments(Path("photographs"), Path("run"), **settings)
    given = [json.dumps([str(machine), *arguments]) for machine in machines]
    finished = launch(begin, [tmp_path, *given], tmp_path, world_size=2)
    assert finished.codes == [0, 0], finished.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1))
    assert first.keys() == {"generator", "ema", "perceptual"}
    assert not differences(first, second)
    trunks = [torch.load(machine / "trunk.pth") for machine in machines]
    assert differences(*trunks)


def share(argv: list[str]) -> None:
    """What `processes.py` does, in one of two processes; prints «done» at the end."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    rank = accelerator.process_index

    strided = torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last)
    value = {
        "tensors": [strided, torch.tensor(3), torch.tensor([], dtype=torch.uint8), torch.tensor([1.5]).bfloat16()],
        "rest": ("text", None, {7: 1e-300}, Path("folder")),
    }
    got = from_main(accelerator, value if rank == 0 else "not used")
    assert not differences(got, value)
    assert got["tensors"][0].stride() == strided.stride()
    assert [t.dtype for t in got["tensors"]] == [t.dtype for t in value["tensors"]]

    called = []
    assert on_main(accelerator, lambda: called.append(rank) or "result") == "result"
    assert called == [0] * (rank == 0)
    assert everywhere(accelerator, lambda: rank) == rank

    def fail() -> None:
        if rank == 1:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as raised:
        everywhere(accelerator, fail)
    assert ("process 1 on" in str(raised.value)) == (rank == 0)

    check_same(accelerator, {"a": {"b": 1, "c": rank}}, frozenset({"a.c"}))
    with pytest.raises(InputError, match=r"\(a.c: 0 -> 1\)"):
        check_same(accelerator, {"a": {"b": 1, "c": rank}})
    print("done")


def test_values_tensors_and_errors_reach_the_other_process(tmp_path):
    finished = launch(share, [], tmp_path, world_size=2)
    assert finished.codes == [0, 0], finished.stderr[-3000:]
    assert finished.stdout.split() == ["done", "done"]


def torchrun_on_two_machines(machines: tuple[Path, Path], *arguments: object) -> list[tuple[int, str]]:
    """Run tests/faults.py under two torchruns of one process each. Returns exit code and standard error of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1")
    address = ("--master_addr=127.0.0.1", f"--master_port={port}")
    command = (ROOT / "tests" / "faults.py", *map(str, arguments))
    nodes = [
        subprocess.Popen(
            [*torchrun, *address, f"--node_rank={rank}", *command],
            cwd=machine,
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, machine in enumerate(machines)
    ]
    try:
        errors = [node.communicate(timeout=240)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, error) for node, error in zip(nodes, errors, strict=True)]


def test_two_machines_without_a_shared_disk_train_and_continue_like_one_machine(machines, tmp_path):
    changes = {**SHORT, "trackers": "[tensorboard]"}
    settings = {**EVERYTHING, "data__num_workers": "0", "gradient_accumulation_steps": "1", **changes}
    one = two_processes(run_with_fault, machines[0] / "photographs", tmp_path / "one", "none", 0, 0, **changes)
    assert one.codes == [0, 0], one.stderr[-3000:]

    arguments = tiny_arguments(Path("photographs"), Path("run"), **settings)
    stopped = torchrun_on_two_machines(machines, "sigterm", 1, 1, *arguments)
    assert "stopped after step 2; the same command continues from step-00000002" in stopped[0][1], stopped
    continued = torchrun_on_two_machines(machines, "none", 0, 0, *arguments)
    assert [code for code, _ in continued] == [0, 0], continued
    assert "continuing from run/checkpoints/step-00000002" in continued[0][1]
    assert "steps 3 to 3, each of 4 images; 2 process(es) on cpu in fp32" in continued[0][1]

    on_two = result(machines[0] / "run")
    assert len(on_two["state"]["meters"]) == 2
    assert not differences(on_two, result(tmp_path / "one"))
    assert [path.name for path in machines[1].iterdir()] == ["photographs"], "only the first machine has a run folder"
