"""rFID and rFDD in the validations of a training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from sdvae import InputError, load_vae
from sdvae.errors import Stopped
from sdvae.metrics import fid
from sdvae.training.data import evaluation_batches, open_sources
from sdvae.training.recipe import parse_train_config
from tests.conftest import draw_photographs, tiny_arguments
from tests.faults import fault
from tests.test_evaluate import frechet_distance
from tests.test_resume import differences, records, result, run, undrawn  # noqa: F401

PLAIN = {"data__num_workers": "0", "loss__equivariance__weight": "0", "loss__discriminator__weight": "0"}
PLAIN |= {"data__validation_count": "6", "validation__fid": "true", "validate_every": "2"}


class Colours(torch.nn.Module):
    """(B, 3, H, W) uint8 -> the mean colour of each image and of its left half."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float()
        return torch.cat([x.mean(dim=(2, 3)), x[..., : x.shape[3] // 2].mean(dim=(2, 3))], dim=1)


@pytest.fixture(autouse=True)
def small_inception(monkeypatch):
    monkeypatch.setattr(fid, "NoTrainInceptionV3", lambda *_, **__: Colours())
    monkeypatch.setattr(fid, "FEATURES", 6)


@pytest.mark.slow
def test_each_validation_reports_rfid_and_an_interrupted_run_reports_the_same(tmp_path):
    source = draw_photographs(tmp_path / "photographs")
    run(source, tmp_path / "whole", **PLAIN)
    reports = [line for line in records(tmp_path / "whole") if "validation/rfid" in line]
    assert [line["step"] for line in reports] == [2, 4, 6, 7]
    raw = [line for line in records(tmp_path / "whole") if "validation_raw/rfid" in line]
    assert len(raw) == 4, "the weights themselves, for which originals are not counted twice"

    with fault("sigterm", 3), pytest.raises(Stopped):
        run(source, tmp_path / "run", **PLAIN)
    run(source, tmp_path / "run", **PLAIN)
    assert not differences(result(tmp_path / "run"), result(tmp_path / "whole"))

    config = parse_train_config(tiny_arguments(source, tmp_path / "whole", **PLAIN))
    _, held_out = open_sources(config.data, config.seed)
    vae = load_vae(tmp_path / "whole" / "model").eval()
    features: list[list[np.ndarray]] = [[], []]
    with torch.no_grad():
        for batch in evaluation_batches(held_out, config, Accelerator(cpu=True)):
            for which, x in enumerate((batch["image"], vae(batch["image"]).sample)):
                pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
                features[which].append(Colours()(pixels).double().numpy())
    wanted = frechet_distance(*(np.concatenate(parts) for parts in features))
    assert reports[-1]["validation/rfid"] == pytest.approx(wanted, rel=1e-2)


@pytest.mark.slow
def test_the_best_model_can_be_that_of_the_lowest_rfid(tmp_path):
    source = draw_photographs(tmp_path / "photographs")
    run(source, tmp_path / "run", **PLAIN, checkpoint__best_metric="rfid")
    values = {line["step"]: line["validation/rfid"] for line in records(tmp_path / "run") if "validation/rfid" in line}
    assert result(tmp_path / "run")["state"]["best"]["value"] == min(values.values())


def test_what_cannot_be_measured_is_refused_before_the_first_step(tmp_path):
    source = draw_photographs(tmp_path / "photographs")
    with pytest.raises(InputError, match=r"got validation.dinov2 without validation.fdd"):
        parse_train_config(tiny_arguments(source, tmp_path / "run", validation__dinov2="x"))
    with pytest.raises(InputError, match=r"got validation.fid=true with 1 validation image"):
        run(source, tmp_path / "run", **{**PLAIN, "data__validation_count": "1"})
    with pytest.raises(InputError, match=r"best_metric='rfdd'; need one of psnr, ssim, rfid"):
        run(source, tmp_path / "run", **PLAIN, checkpoint__best_metric="rfdd")
    assert not (tmp_path / "run").exists()
