"""The command line: recipes, overrides, exit codes."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from docstring_parser import parse_from_object

from sdvae import AutoencoderKL, load_vae, save_vae
from sdvae.cli import main, parse_train_config
from sdvae.cli.commands import COMMANDS
from sdvae.errors import InputError
from sdvae.options import parse_options
from sdvae.training.config import TrainConfig
from sdvae.training.run_folder import RunFolder, to_yaml

ROOT = Path(__file__).parents[1]


def test_yaml_is_overridden_by_dotted_keys_and_later_files(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("steps: 5\nloss: {kl_weight: 1e-3, lpips_weight: 2}\n")
    second.write_text("steps: 6\n")
    config = parse_train_config(["--config", str(first), "--config", str(second), "--loss.kl_weight=2e-6"])
    assert (config.steps, config.loss.kl_weight, config.loss.lpips_weight) == (6, 2e-6, 2.0)
    assert config.model == TrainConfig().model


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_saved_recipe_reads_back_the_same(recipe, tmp_path):
    config = parse_train_config(["--config", str(recipe)])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert parse_train_config(["--config", str(saved)]) == config
    five_levels = recipe.stem.startswith(("mnist", "va_vae"))
    assert len(config.model.block_out_channels) == (5 if five_levels else 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss.kl_wieght=1"], r"unknown key 'loss.kl_wieght' in the command line; did you mean 'loss.kl_weight'\?"),
        (["--kl_weight=1"], r"unknown key 'kl_weight' .* did you mean 'loss.kl_weight'\?"),
        (["--xyzzy=1"], r"unknown key 'xyzzy'"),
        (["--batch_size=many"], r"^got batch_size=many; need a whole number \("),
        (["--data.max_pixels=many"], r"^got data.max_pixels=many; need a whole number or null \("),
        (["--data.background=[1,2]"], r"^got data.background=\[1, 2\]; need a list with 3 elements \("),
        (["--loss.reconstruction=l3"], r"^got loss.reconstruction='l3', of which 'l3' is no term; need l1, l2"),
        (["--config=nowhere.yaml"], r"nowhere.yaml"),
        (["--steps=0"], r"got steps=0; need a number above 0"),
        (["--data.resolution=100"], r"data.resolution=100; need a positive multiple of 8"),
        (["--data.crop_scale=[0.9,0.1]"], r"crop_scale=\[0.9, 0.1\]; need 0 < low <= high <= 1"),
        (["--model.block_out_channels=[]"], r"need a width for each level"),
        (["--model.act_fn=foo"], r"act_fn='foo'; need one of silu"),
        (["--model.in_channels=2"], r"in_channels=2; need 3 for RGB, 1 for grey or 4"),
        (["--model.latent_channels=0"], r"need 1 or more"),
        (["--data.resolution=8"], r"data.resolution=8; need at least 16"),
        (["--loss.kl_weight=-1"], r"loss.kl_weight=-1.0; need 0 or more"),
        (["--optimizer.ema_decay=1.5"], r"ema_decay=1.5; need a number from 0 to 1"),
        (["--optimizer.betas=[0.9,1.0]"], r"betas=\[0.9, 1.0\]; need numbers from 0 to below 1"),
        (["--steps=5", "--optimizer.warmup_steps=9"], r"warmup_steps=9 in steps=5; need fewer"),
        (["--data.background=[0,0,300]"], r"need three numbers from 0 to 255"),
        (["--model.use_quant_conv=false"], r"set model.force_upcast=false"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_says_what_to_do(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_train_config(arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_yaml_names_the_file(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("loss:\n  kl_wieght: 1\n")
    with pytest.raises(InputError, match=r"'loss.kl_wieght' in .*recipe.yaml; did you mean 'loss.kl_weight'"):
        parse_train_config(["--config", str(recipe)])
    recipe.write_text("loss: 5\n")
    with pytest.raises(InputError, match=r"recipe.yaml: loss is a section; need .* got 5"):
        parse_train_config(["--config", str(recipe)])
    recipe.write_text("- a\n- b\n")
    with pytest.raises(InputError, match=r"recipe.yaml holds a list; need"):
        parse_train_config(["--config", str(recipe)])
    recipe.write_text("a: [1\n")
    with pytest.raises(InputError, match=r"recipe.yaml is not YAML"):
        parse_train_config(["--config", str(recipe)])


@pytest.mark.parametrize("program", [["-m", "sdvae", "train"], [str(ROOT / "train_sdvae.py")]], ids=lambda p: p[-1])
def test_training_prints_its_whole_recipe_without_importing_torch(program):
    command = [sys.executable, "-X", "importtime", *program, "--steps=7", "--print_config"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    options = yaml.safe_load(printed.stdout)
    assert options["steps"] == 7
    assert len(options) > 10
    imported = re.findall(r"\| +(\S+)$", printed.stderr, re.MULTILINE)
    assert "sdvae.cli" in imported
    assert "torch" not in imported


def test_no_help_and_no_misspelt_option_imports_torch():
    program = """
import sys
from sdvae.cli import main
from sdvae.cli.commands import COMMANDS

main(["--help"])
for name in COMMANDS:
    assert main([name, "--no_such_option=1"]) == 2
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert end.code == 0
assert "torch" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stderr.count("unknown key 'no_such_option' in the command line") == len(COMMANDS)
    assert run.stdout.count("usage: sdvae ") == 1 + len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described(name):
    """By the docstring below its field, in the help of the command."""
    options = get_type_hints(COMMANDS[name].run)["options"]
    described = {entry.arg_name for cls in options.__mro__[:-1] for entry in parse_from_object(cls).params}
    assert {field.name for field in dataclasses.fields(options)} <= described


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("evaluate a b --data=x", {"vaes": ["a", "b"], "data": "x"}),
        ("evaluate --vaes=[a,b]", {"vaes": ["a", "b"]}),
        ("evaluate --config={folder}/vaes.yaml --count=3", {"vaes": ["c", "d"], "count": 3}),
        ("evaluate e --config {folder}/vaes.yaml", {"vaes": ["e"]}),
        (
            "explore --vae=v pca --images A B --sigmas 1 2.5",
            {"what": "pca", "images": ["A", "B"], "sigmas": [1.0, 2.5]},
        ),
        ("report --count=3 v", {"vae": "v", "count": 3}),
        ("report --vae=v", {"vae": "v"}),
        ("report", {"vae": None, "output": "report.html"}),
        ("fp16 fix v out --count=2", {"action": "fix", "vae": "v", "target": "out", "count": 2}),
        ("push v owner/name --private=false", {"vae": "v", "repo_id": "owner/name", "private": False}),
        ("reconstruct --output=o a.png b.png", {"files": ["a.png", "b.png"], "output": "o"}),
    ],
)
def test_options_are_read_from_names_places_and_files(tmp_path, capsys, arguments, expected):
    (tmp_path / "vaes.yaml").write_text("vaes: [c, d]\n")
    name, *rest = arguments.format(folder=tmp_path).split()
    with pytest.raises(SystemExit):
        main([name, *rest, "--print_config"])
    options = yaml.safe_load(capsys.readouterr().out)
    assert {key: options[key] for key in expected} == expected


def test_exit_codes(capsys, tmp_path):
    assert main(["train", "--loss.kl_wieght=1"]) == 2
    assert capsys.readouterr().err.startswith("sdvae: error: unknown key 'loss.kl_wieght'")
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "sdvae: error:" in capsys.readouterr().err
    assert main(["train", "--data.source=./no/such/folder", f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["train", f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "data.source is not set" in capsys.readouterr().err
    assert main(["train", "--trackers=[wandbb]", "--data.source=skimage", f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "tracker 'wandbb' is not installed (installed: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    tiny = ["--steps=1", "--model.block_out_channels=[32,32]", "--trackers=[]", "--loss.lpips_weight=0"]
    source = ["--data.source=skimage", "--data.validation_count=2"]
    assert main(["train", *tiny, *source, f"--output_dir={tmp_path / 'file' / 'below'}"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("sdvae: error: ")


def test_export_writes_both_formats(tmp_path, capsys):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
    )
    save_vae(vae, tmp_path / "vae")
    assert main(["export", str(tmp_path / "vae"), str(tmp_path / "vae.safetensors")]) == 0
    assert "a1111" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "vae.safetensors"), str(tmp_path / "back"), "--dtype=fp16"]) == 0
    assert main(["export", str(tmp_path / "vae"), str(tmp_path / "vae.ckpt")]) == 2
    config = str(tmp_path / "vae" / "config.json")
    assert main(["export", str(tmp_path / "vae.safetensors"), str(tmp_path / "exact"), f"--config={config}"]) == 0
    assert load_vae(tmp_path / "exact").config.sample_size == vae.config.sample_size
    back = load_vae(tmp_path / "back", dtype="file").state_dict()
    for name, weight in vae.state_dict().items():
        assert torch.equal(back[name], weight.half()), name


def text_options(options: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every field that takes any string or path, in nested sections too."""
    for name, hint in get_type_hints(options).items():
        kinds = {hint, *get_args(hint)}
        if dataclasses.is_dataclass(hint):
            yield from text_options(hint, f"{prefix}{name}.")
        elif kinds & {str, Path}:
            yield f"{prefix}{name}", hint


def arguments_with(name: str, key: str, hint: Any, text: str) -> list[str]:
    """A command's arguments with `text` for one option, and something for those that must be given."""
    positional = COMMANDS[name].positional
    options = get_type_hints(COMMANDS[name].run)["options"]
    hints = get_type_hints(options)
    missing = [
        f.name
        for f in dataclasses.fields(options)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    given = {other: str(get_args(hints[other])[0]) if get_origin(hints[other]) is Literal else "x" for other in missing}
    given[key] = text
    unnamed = [given.pop(other) for other in positional if other in missing]
    named = [part for other, value in given.items() for part in (f"--{other}", value)]
    return [*unnamed, *named]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("train", "distil") else []) for name in COMMANDS]
)
def test_every_option_refuses_a_url_in_one_line_and_makes_no_folder(name, tmp_path, monkeypatch, capsys):
    """Options are found by introspection, so that a new one is covered."""
    monkeypatch.chdir(tmp_path)
    options = get_type_hints(COMMANDS[name].run)["options"]
    found = list(text_options(options))
    assert found
    for number, (key, hint) in enumerate(found):
        if key in COMMANDS[name].urls:
            continue
        scheme = ("s3", "gs", "az", "hf", "https", "memory", "file", "abfss+x")[number % 8]
        assert main([name, *arguments_with(name, key, hint, f"{scheme}://bucket/folder")]) == 2
        error = capsys.readouterr().err
        assert re.search(rf"error: got {re.escape(key)}={re.escape(scheme)}:/+bucket/folder; need a local path", error)
        assert len(error.splitlines()) == 1
    for folder in ("data", "output"):
        assert main([name, f"--config=s3://bucket/{folder}.yaml"]) == 2
    assert not list(tmp_path.iterdir())


def test_a_message_may_hold_a_url_and_a_drive_is_no_scheme(tmp_path):
    options = get_type_hints(COMMANDS["push"].run)["options"]
    arguments = ["x", "a/b", "--message", "https://example.org has the data"]
    parsed = parse_options(options, arguments, "sdvae push", positional=("vae", "repo_id"), urls=COMMANDS["push"].urls)
    assert parsed.message == "https://example.org has the data"
    assert parse_train_config(["--output_dir", "C:/runs"]).output_dir == "C:/runs"


def test_a_url_given_in_python_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"folder=s3:/+bucket/vae; need a local path"):
        save_vae(load_vae(), "s3://bucket/vae")
    with pytest.raises(InputError, match=r"output_dir=s3:/+bucket/run; need a local path"):
        RunFolder("s3://bucket/run").check_ours()
    assert not list(tmp_path.iterdir())
