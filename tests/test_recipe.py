"""The recipe that a run folder holds is read back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdvae.cli import parse_train_config
from sdvae.errors import InputError
from sdvae.training.recipe import read_recipe
from sdvae.training.run_folder import to_yaml

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_recipe_that_a_run_wrote_is_read_as_the_command_line_read_it(file, tmp_path):
    config = parse_train_config(["--config", str(file), "--seed", "7"])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert read_recipe(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["wide: 1", "steps: many", "steps: [", "- 1", "steps: -1"])
def test_a_file_that_holds_no_recipe_is_one_line_with_its_name(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_recipe(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)
