"""Reading latents back for training: which rows, how they are drawn, and in what scale."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdvae import InputError, LatentDataset, save_vae
from sdvae.data import SampleKey
from sdvae.latents import dataset as dataset_module
from sdvae.latents import reader as reader_module
from sdvae.latents.dataset import LatentBatches
from sdvae.latents.encode import encode
from sdvae.latents.rows import is_value
from sdvae.latents.scaling import LatentScaling, config_scaling
from sdvae.model import DiagonalGaussian
from sdvae.noise import sample_seed, sample_seeds
from tests.latents_tools import draw, options, rows_of, tiny_vae

SIZES = ((40, 40), (60, 36), (36, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """29 rows in shards of 5, in three sizes, with mirror images and labels."""
    root = tmp_path_factory.mktemp("latents")
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    save_vae(vae, root / "vae")
    for kind in ("cats", "dogs"):
        draw(root / "photos" / kind, 14 + (kind == "dogs"), sizes=SIZES, seed=len(kind))
    buckets = {"buckets": "area", "bucket_step": 8, "max_aspect": 1.7, "mirror": True, "dtype": "fp32"}
    encode(options(root / "photos", root / "out", root / "vae", **buckets))
    return root / "out"


def test_a_row_has_what_was_encoded_scaled_as_pipelines_do(folder):
    rows = list(rows_of(folder).values())
    latents = LatentDataset(folder, sample=False, mirror=0)
    assert len(latents) == len(rows) == 29
    for place, wanted in enumerate(rows):
        row = latents[place]
        assert torch.allclose(row["latents"], (wanted["mean"] - 0.25) * 0.5)
        assert {name: row[name] for name in ("index", "name", "label", "original_size", "target_size")} == {
            name: wanted[name] for name in ("index", "name", "label", "original_size", "target_size")
        }
        assert torch.allclose(latents.scaling.denormalize(row["latents"]), wanted["mean"], atol=1e-6)
    assert torch.equal(latents[-1]["latents"], latents[28]["latents"])
    with pytest.raises(IndexError):
        latents[29]


def test_mirrored_rows_are_the_latents_of_the_mirror_images(folder):
    rows = list(rows_of(folder).values())
    latents = LatentDataset(folder, sample=False, mirror=1, scaling="none")
    for place, wanted in enumerate(rows):
        assert latents[place]["mirrored"]
        assert torch.equal(latents[place]["latents"], wanted["mean_mirrored"])
    coins = Counter(LatentDataset(folder)[SampleKey(epoch, 3)]["mirrored"] for epoch in range(400))
    assert 150 < coins[True] < 250


def test_samples_are_fresh_and_have_the_posteriors_mean_and_variance(folder):
    wanted = next(iter(rows_of(folder).values()))
    latents = LatentDataset(folder, mirror=0, scaling="none")
    assert not torch.equal(latents[0]["latents"], latents[0]["latents"]), "a frozen draw"
    draws = torch.stack([latents[SampleKey(epoch, 0)]["latents"] for epoch in range(600)])
    std = (0.5 * wanted["logvar"]).exp()
    z_mean = (draws.mean(0) - wanted["mean"]) / (std / 600**0.5)
    assert float(z_mean.abs().max()) < 4.5
    assert float((draws.std(0) / std - 1).abs().max()) < 0.16  # of 600, a std has 3 % of error


def test_a_sample_key_decides_the_draw_and_the_seed_changes_it(folder):
    key = SampleKey(2, 7)
    one, same, other = (LatentDataset(folder, seed=seed)[key]["latents"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, LatentDataset(folder)[SampleKey(3, 7)]["latents"])


@pytest.mark.parametrize(("scaling", "mean", "std"), [("measured", False, False), ("channels", True, True)])
def test_measured_scalings_bring_the_latents_to_mean_zero_and_std_one(folder, scaling, mean, std):
    latents = LatentDataset(folder, scaling=scaling, mirror=0)
    values = torch.cat([latents[SampleKey(0, i)]["latents"].flatten(1) for i in range(len(latents))], dim=1)  # (C, all)
    assert float(values.mean()) == pytest.approx(0, abs=0.02)
    assert float(values.std()) == pytest.approx(1, abs=0.02)
    assert bool((values.mean(1).abs() < 0.05).all()) is mean
    assert bool(((values.std(1) - 1).abs() < 0.05).all()) is std


def test_sdxls_per_channel_factors_are_undone_as_its_pipeline_does():
    import inspect

    config = {"scaling_factor": 0.5, "latents_mean": [1.0, 2, 3, 4], "latents_std": [2.0, 4, 6, 8]}
    z = torch.randn(2, 4, 3, 3)
    scaling = config_scaling(config)
    mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    seen = scaling.normalize(z)
    assert torch.allclose(seen * std / 0.5 + mean, z, atol=1e-5)
    assert "latents * latents_std / self.vae.config.scaling_factor + latents_mean" in inspect.getsource(
        StableDiffusionXLPipeline.__call__
    )
    assert torch.allclose(scaling.denormalize(seen), z, atol=1e-5)
    plain = LatentScaling(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    assert torch.equal(plain.normalize(z), z)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_without_dropping_has_every_row_once_whatever_the_number_of_processes(folder, world_size):
    latents = LatentDataset(folder)
    seen: list[int] = []
    for rank in range(world_size):
        batches = LatentBatches(latents, 4, drop_last=False, rank=rank, world_size=world_size)
        keys = list(batches)
        assert len(keys) == len(batches)
        seen += [key.index for batch in keys for key in batch]
    assert sorted(seen) == list(range(29))


def test_a_batch_has_one_size_and_the_order_depends_on_seed_and_epoch_only(folder, monkeypatch):
    monkeypatch.setattr(dataset_module, "WINDOW", 2)  # of six row groups: batches must run across windows
    latents = LatentDataset(folder)
    sizes = [tuple(latents[place]["target_size"]) for place in range(len(latents))]
    one = list(LatentBatches(latents, 3, world_size=1, rank=0))
    assert len(one) == sum(n // 3 for n in Counter(sizes).values())
    for batch in one:
        assert len({sizes[key.index] for key in batch}) == 1
    shares = [list(LatentBatches(latents, 3, rank=rank, world_size=2)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1])
    together = [batch for pair in zip(*shares, strict=True) for batch in pair]
    assert together == one[: len(together)]
    assert list(LatentBatches(latents, 3)) == one
    assert [[k.index for k in b] for b in LatentBatches(latents, 3, epoch=1)] != [[k.index for k in b] for b in one]
    assert list(LatentBatches(latents, 3, rank=0, world_size=1, done=2)) == one[2:]


@pytest.fixture(scope="module")
def other_folders(tmp_path_factory) -> dict[str, Path]:
    """Rows stored in the other ways, with columns of many types beside the latents."""
    root = tmp_path_factory.mktemp("others")
    save_vae(tiny_vae(), root / "vae")
    pictures = sorted(draw(root / "photos", 9, sizes=SIZES).iterdir())
    columns = {
        "image": (datasets.Image(), [str(path) for path in pictures]),
        "caption": (datasets.Value("string"), [None if i == 4 else f"picture {i} é" for i in range(9)]),
        "score": (datasets.Value("float64"), [i / 7 for i in range(9)]),
        "good": (datasets.Value("bool"), [i % 2 == 0 for i in range(9)]),
        "embedding": (datasets.Sequence(datasets.Value("float32")), [[i / 2] * i for i in range(9)]),
        "pair": (datasets.Sequence(datasets.Value("int32"), length=2), [None if i == 3 else [i, -i] for i in range(9)]),
        "about": ({"author": datasets.Value("string")}, [{"author": f"a{i}"} for i in range(9)]),
        "blob": (datasets.Value("binary"), [bytes(range(i)) for i in range(9)]),
    }
    data = {name: values for name, (_, values) in columns.items()}
    features = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    datasets.Dataset.from_dict(data, features=features).save_to_disk(root / "data")
    ways = {
        "samples": {"store": "sample", "mirror": True},
        "bf16": {"dtype": "bf16", "buckets": "area", "bucket_step": 8, "max_aspect": 1.7},
        "square": {"dtype": "fp16", "mirror": True},
    }
    for name, way in ways.items():
        encode(options(root / "data", root / name, root / "vae", shard_rows=4, **way))
    return {name: root / name for name in ways}


@pytest.mark.parametrize("kind", ["buckets", "samples", "bf16", "square"])
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("mirror", [None, 0.0])
def test_a_batch_is_to_the_bit_what_torchs_generators_give_row_by_row(folder, other_folders, kind, sample, mirror):
    """A plain loop over the file's rows is the reference: one generator for each row, in fp32."""
    where = folder if kind == "buckets" else other_folders[kind]
    stored = list(rows_of(where).values())
    latents = LatentDataset(where, sample=sample, mirror=mirror, seed=5)
    has_mirrors = any(name.endswith("_mirrored") for name in stored[0])
    keys = [SampleKey(epoch, index) for epoch in (0, 3) for index in (7, 0, 8, 3, 3, 5)]  # sizes mixed, one row twice
    together = latents.__getitems__(keys)
    mirrors = 0
    for key, row in zip(keys, together, strict=True):
        wanted = stored[key.index]
        generator = torch.Generator().manual_seed(sample_seed(5, key.epoch, key.index, "latents"))
        mirrored = has_mirrors and mirror is None and float(torch.rand((), generator=generator)) < 0.5
        suffix = "_mirrored" if mirrored else ""
        if kind == "samples":
            z = wanted[f"sample{suffix}"]
        else:
            posterior = DiagonalGaussian(torch.cat([wanted[f"mean{suffix}"], wanted[f"logvar{suffix}"]])[None])
            z = (posterior.sample(generator) if sample else posterior.mode())[0]
        assert torch.equal(row["latents"], latents.scaling.normalize(z))
        others = {name: value for name, value in wanted.items() if name != "shape" and not is_value(name)}
        assert {name: value for name, value in row.items() if name != "latents"} == {"mirrored": mirrored, **others}
        mirrors += mirrored
        alone = latents[key]
        assert torch.equal(alone.pop("latents"), row.pop("latents"))
        assert alone == row
    assert (0 < mirrors < len(keys)) is (has_mirrors and mirror is None)


def test_a_batch_of_plain_places_draws_from_torchs_default_generator_in_order(folder):
    latents = LatentDataset(folder)
    places = [3, 0, 11, -1, 4]
    torch.manual_seed(1)
    one_by_one = [latents[place] for place in places]
    torch.manual_seed(1)
    together = latents.__getitems__(places)
    for a, b in zip(one_by_one, together, strict=True):
        assert torch.equal(a["latents"], b["latents"])
        assert a["mirrored"] == b["mirrored"]
    with pytest.raises(IndexError, match="row 29 of 29"):
        latents.__getitems__([0, 29])


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**40])
def test_seeds_of_many_samples_are_those_of_one_by_one(seed):
    epochs = [0, 1, 2**31, 2**32 - 1, 5, 0]
    indices = [0, 2**32 - 1, 12345, 7, 7, 1]
    wanted = [sample_seed(seed, epoch, index, "latents") for epoch, index in zip(epochs, indices, strict=True)]
    assert sample_seeds(seed, epochs, indices, "latents") == wanted
    assert sample_seeds(seed, [0], [2**35], "latents") == [sample_seed(seed, 0, 2**35, "latents")]
    assert sample_seeds(seed, epochs, indices, "augment") != wanted


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_the_same_batches_with_any_number_of_workers(folder, num_workers):
    latents = LatentDataset(folder)
    wanted = [[latents[key] for key in batch] for batch in LatentBatches(latents, 4)]
    batches = list(latents.loader(4, num_workers=num_workers))
    assert len(batches) == len(wanted)
    for batch, rows in zip(batches, wanted, strict=True):
        assert torch.equal(batch["latents"], torch.stack([row["latents"] for row in rows]))
        assert batch["label"].tolist() == [row["label"] for row in rows]
        assert batch["name"] == [row["name"] for row in rows]
        assert batch["original_size"].tolist() == [row["original_size"] for row in rows]


def equal_batches(a: dict, b: dict) -> bool:
    same = {name: value for name, value in a.items() if not torch.is_tensor(value)}
    tensors = [name for name in a if name not in same]
    assert same == {name: b[name] for name in same}
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in tensors)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_interrupted_epoch_goes_on_with_the_same_batches(folder, drop_last, num_workers):
    def loader():
        return LatentDataset(folder, seed=3).loader(4, epoch=2, drop_last=drop_last, num_workers=num_workers)

    whole = list(loader())
    interrupted = loader()
    for number, _ in enumerate(interrupted, 1):
        if number == 2:  # workers have read further
            break
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = LatentDataset(folder, seed=3).loader(4, drop_last=drop_last, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert len(resumed) == len(whole) - 2
    rest = list(resumed)
    assert len(rest) == len(whole) - 2
    assert all(equal_batches(a, b) for a, b in zip(rest, whole[2:], strict=True))
    at_the_end = resumed.state_dict()
    assert [batch["index"].tolist() for batch in resumed] == [batch["index"].tolist() for batch in whole]
    resumed.load_state_dict(at_the_end)
    assert list(resumed) == [], "the state after the last batch has no batches left"


@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_goes_on_with_two_and_then_three_processes(folder, drop_last):
    latents = LatentDataset(folder)
    whole = list(latents.loader(2, drop_last=drop_last))
    state, seen = None, []
    for processes, batches in ((1, 3), (2, 2), (3, None)):
        shares, states = [], []
        for rank in range(processes):
            loader = latents.loader(2, drop_last=drop_last, rank=rank, world_size=processes)
            if state is not None:
                loader.load_state_dict(state)
            shares.append(list(islice(loader, batches)))
            states.append(loader.state_dict())
        if batches is not None:
            assert all(other == states[0] for other in states)
        state = states[0]
        seen += [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]
    # of the last rows, three processes get only as many batches as each can have
    left_out = len(whole) - len(seen)
    assert left_out == ((len(whole) - 7) % 3 if drop_last else 0)
    assert all(equal_batches(a, b) for a, b in zip(seen, whole[: len(seen)], strict=True))


def test_the_state_of_another_epoch_is_refused_in_one_line(folder, other_folders):
    state = LatentDataset(folder).loader(2).state_dict()
    changed = {
        "batch_size: 2 -> 3": LatentDataset(folder).loader(3),
        "seed: 0 -> 1": LatentDataset(folder, seed=1).loader(2),
        "mirror: 0.5 -> 0": LatentDataset(folder, mirror=0).loader(2),
        "rows: 29 -> 9": LatentDataset(other_folders["square"]).loader(2),
        "data: ": LatentDataset(other_folders["square"]).loader(2),
        "drop_last: True -> False": LatentDataset(folder).loader(2, drop_last=False),
    }
    for reason, loader in changed.items():
        with pytest.raises(InputError, match=reason) as refused:
            loader.load_state_dict(state)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="version: 0 -> 1"):
        LatentDataset(folder).loader(2).load_state_dict({**state, "version": 0})


def test_rank_and_world_size_come_from_the_launcher(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    latents = LatentDataset(folder)
    assert list(LatentBatches(latents, 3)) == list(LatentBatches(latents, 3, rank=1, world_size=2))


def test_a_pickled_dataset_reads_the_same(folder):
    latents = LatentDataset(folder)
    latents[4]
    again = pickle.loads(pickle.dumps(latents))
    assert torch.equal(again[SampleKey(0, 4)]["latents"], latents[SampleKey(0, 4)]["latents"])


def test_memory_holds_no_more_row_groups_than_a_window(folder, monkeypatch):
    monkeypatch.setattr(reader_module, "WINDOW", 2)
    latents = LatentDataset(folder)
    for place in range(len(latents)):
        latents[place]
    assert len(latents._reader._groups) <= 2
    assert len(latents._reader._files) <= 2


def test_two_lines_with_datasets_alone_give_the_same_values(folder, tmp_path):
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    mean = np.frombuffer(rows[3]["mean"], np.float32).reshape(rows[3]["shape"])
    assert torch.equal(
        torch.from_numpy(mean.copy()), LatentDataset(folder, sample=False, mirror=0, scaling="none")[3]["latents"]
    )


def test_what_cannot_be_read_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        LatentDataset(tmp_path)
    with pytest.raises(InputError, match="need vae, measured, channels or none"):
        LatentDataset(folder, scaling="vea")
    with pytest.raises(InputError, match="need a probability"):
        LatentDataset(folder, mirror=1.5)
    with pytest.raises(InputError, match="29 rows make less than 1 batches of 30"):
        LatentDataset(folder).loader(30)
    shutil.copytree(folder, tmp_path / "begun")
    manifest = (tmp_path / "begun" / "manifest.json").read_text()
    (tmp_path / "begun" / "manifest.json").write_text(manifest.replace('"complete": true', '"complete": false'))
    with pytest.raises(InputError, match="is not complete; run `sdvae encode`"):
        LatentDataset(tmp_path / "begun")
    (tmp_path / "begun" / "manifest.json").write_text(manifest.replace('"version": 2', '"version": 3'))
    with pytest.raises(InputError, match="version 3; need"):
        LatentDataset(tmp_path / "begun")
