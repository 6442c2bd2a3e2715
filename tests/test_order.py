"""The order of samples and what a training loader makes of it: the same for any number of processes and workers."""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.data import (
    BadImages,
    EvaluationImages,
    ImageError,
    ReadOptions,
    SampleKey,
    SampleOrder,
    ShardedBatches,
    TrainingImages,
    center_crop,
    collate_evaluation,
    evaluation_loader,
    read_image,
    subset,
    to_tensor,
    training_loader,
)
from sdvae.errors import InputError, exit_code
from sdvae.noise import sample_seed
from sdvae.training.data import resolution_at, training_batches, training_images
from sdvae.training.recipe import parse_train_config


class Memory:
    """A source in memory that counts its reads."""

    def __init__(self, files: list[bytes]):
        self.files = files
        self.reads: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return f"image-{index}"

    def read(self, index: int) -> bytes:
        self.reads[index] += 1
        return self.files[index]


def png(seed: int, width: int = 40, height: int = 36) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def good(count: int) -> Memory:
    return Memory([png(seed) for seed in range(count)])


def bad_at(count: int, bad: set[int]) -> Memory:
    return Memory([b"no image" if index in bad else png(index) for index in range(count)])


def images_of(source: Memory, **options) -> TrainingImages:
    return TrainingImages(source, **{"resolution": 16, "seed": 5, "color_jitter": 0.2, **options})


def flat(batches: Iterable[list[SampleKey]]) -> list[SampleKey]:
    return [key for batch in batches for key in batch]


# ---- the order ----


def test_every_epoch_holds_every_sample_once():
    order = SampleOrder(13, seed=0)
    keys = [order.at(position) for position in range(13 * 4)]
    for epoch in range(4):
        of_epoch = keys[13 * epoch : 13 * (epoch + 1)]
        assert {key.epoch for key in of_epoch} == {epoch}
        assert sorted(key.index for key in of_epoch) == list(range(13))


def test_the_crops_of_a_batch_have_the_size_that_its_step_draws_on_every_process():
    given = ["--data.source", "x", "--steps", "40", "--gradient_accumulation_steps", "2", "--batch_size", "3"]
    given += [
        "--data.mixed_resolutions",
        "16",
        "32",
        "48",
        "--data.final_resolution",
        "64",
        "--data.final_part",
        "0.25",
    ]
    config = parse_train_config(given)
    sides = [resolution_at(step, config) for step in range(40)]
    assert set(sides[:30]) == {16, 32, 48}
    assert set(sides[30:]) == {64}
    source = Memory([png(seed, 70, 90) for seed in range(12)])
    images = training_images(source, config)
    for rank in range(2):
        accelerator = SimpleNamespace(process_index=rank, num_processes=2, device=torch.device("cpu"))
        config = replace(config, data=replace(config.data, num_workers=0))
        whole = [batch["image"].shape for batch in training_batches(images, config, accelerator)]
        assert [tuple(shape) for shape in whole] == [(3, 3, sides[m // 2], sides[m // 2]) for m in range(80)]
        rest = training_batches(images, config, accelerator, start=25 * 12, first_step=25)
        assert [batch["image"].shape for batch in rest] == whole[50:], "as it goes on after an interruption"


def test_epochs_and_seeds_have_orders_of_their_own():
    def indices(seed: int, epoch: int) -> tuple[int, ...]:
        order = SampleOrder(30, seed)
        return tuple(order.at(30 * epoch + offset).index for offset in range(30))

    orders = [indices(seed, epoch) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    assert tuple(range(30)) not in orders


def test_first_places_are_uniform():
    firsts = Counter(SampleOrder(5, seed).at(0).index for seed in range(1000))
    assert all(150 < firsts[index] < 250 for index in range(5))


def test_order_does_not_depend_on_what_was_asked_before():
    """Jumps back and forth, past the epochs that are cached."""
    positions = [0, 95, 3, 41, 40, 39, 95, 0, 61]
    order = SampleOrder(20, seed=9)
    assert [order.at(position) for position in positions] == [SampleOrder(20, 9).at(position) for position in positions]


def test_order_is_the_same_on_every_machine():
    """A change here breaks the continuation of runs that are under way."""
    order = SampleOrder(8, seed=42)
    assert [order.at(position).index for position in range(16)] == [1, 3, 5, 7, 4, 6, 0, 2, 6, 7, 2, 1, 0, 3, 4, 5]
    assert sample_seed(42, 3, 7, "augment") == 5173203425832228543


@pytest.mark.parametrize(("num_samples", "seed"), [(0, 0), (5, -1), (5, 2**32)])
def test_order_refuses_what_has_none(num_samples, seed):
    with pytest.raises(InputError, match="need"):
        SampleOrder(num_samples, seed)


def test_sample_seeds_differ_in_each_part_and_fit_63_bits():
    seeds = {
        sample_seed(seed, epoch, index, purpose)
        for seed in range(3)
        for epoch in range(3)
        for index in range(3)
        for purpose in ("augment", "posterior", "substitute-0", "substitute-1")
    }
    assert len(seeds) == 3 * 3 * 3 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60
    torch.Generator().manual_seed(max(seeds))


# ---- batches ----


def test_any_number_of_processes_sees_the_same_samples_in_each_batch():
    order = SampleOrder(10, seed=1)
    whole = list(ShardedBatches(order, 8, num_batches=7))
    for world_size in (2, 4):
        ranks = [
            list(ShardedBatches(order, 8 // world_size, rank, world_size, num_batches=7)) for rank in range(world_size)
        ]
        assert [flat(parts) for parts in zip(*ranks, strict=True)] == whole


def test_batches_run_across_epochs_without_loss_or_repetition():
    keys = flat(ShardedBatches(SampleOrder(10, seed=1), 4, num_batches=10))
    assert Counter(key.index for key in keys) == dict.fromkeys(range(10), 4)
    assert Counter(key.epoch for key in keys) == dict.fromkeys(range(4), 10)
    assert any(len({key.epoch for key in keys[start : start + 4]}) == 2 for start in range(0, 40, 4))


@pytest.mark.parametrize("start_batch", [0, 1, 4, 9])
def test_continued_run_goes_on_where_it_stopped(start_batch):
    whole = list(ShardedBatches(SampleOrder(10, seed=1), 4, 1, 2, num_batches=10))
    rest = ShardedBatches(SampleOrder(10, seed=1), 4, 1, 2, start_batch * 8, num_batches=10 - start_batch)
    assert list(rest) == whole[start_batch:]
    assert len(rest) == 10 - start_batch


def test_number_of_processes_may_change_when_a_run_is_continued():
    order = SampleOrder(11, seed=2)
    before = flat(ShardedBatches(order, 6, num_batches=3))
    parts = [ShardedBatches(order, 2, rank, 3, start=18, num_batches=8) for rank in range(3)]
    after = flat(flat(batches) for batches in zip(*parts, strict=True))
    assert before + after == [order.at(position) for position in range(66)]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"rank": 2}, {"rank": -1}, {"start": -1}])
def test_impossible_batches_are_refused(wrong):
    arguments = {"batch_size": 2, "rank": 0, "world_size": 2, "start": 0, "num_batches": 1, **wrong}
    with pytest.raises(InputError, match="need batch_size"):
        ShardedBatches(SampleOrder(4, 0), **arguments)


# ---- the training data set ----


def test_sample_has_its_shape_range_and_key():
    sample = images_of(good(3))[SampleKey(2, 1)]
    assert sample["image"].shape == (3, 16, 16)
    assert sample["image"].dtype == torch.float32
    assert sample["image"].abs().max() <= 1
    assert sample["image"].std() > 0.05
    assert (sample["index"], sample["epoch"], sample["bad"]) == (1, 2, [])
    assert sample["noise_seed"] == sample_seed(5, 2, 1, "posterior")
    assert images_of(good(1), reading=ReadOptions(channels=1))[SampleKey(0, 0)]["image"].shape == (1, 16, 16)


def test_epochs_crop_the_same_image_differently():
    images = images_of(good(1), color_jitter=0.0)
    assert not torch.equal(images[SampleKey(0, 0)]["image"], images[SampleKey(1, 0)]["image"])


def test_sample_depends_on_nothing_that_came_before():
    history = images_of(good(4))
    for key in [SampleKey(0, 3), SampleKey(7, 1), SampleKey(0, 0)]:
        history[key]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert torch.equal(history[SampleKey(1, 2)]["image"], images_of(good(4))[SampleKey(1, 2)]["image"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loader_gives_the_same_bits_for_any_number_of_workers():
    """Also with bad images among them, and with a cache, whose contents differ from worker to worker."""
    results = []
    for num_workers, cache_mib in [(0, 0), (1, 1), (3, 0.02)]:
        images = images_of(bad_at(9, {2, 5}), cache_mib=cache_mib)
        batches = ShardedBatches(SampleOrder(9, 5), 4, 1, 2, start=16, num_batches=5)
        loaded = list(training_loader(images, batches, num_workers=num_workers))
        keys = [
            SampleKey(*pair)
            for batch in loaded
            for pair in zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
        ]
        assert keys == flat(batches)
        results.append(loaded)
    assert any(batch["bad"] for batch in results[0])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours["image"], theirs["image"])
            assert torch.equal(ours["noise_seed"], theirs["noise_seed"])
            assert ours["bad"] == theirs["bad"]


def test_noise_seeds_reach_the_batch_unrounded():
    """63 bits do not fit a float64, through which a careless collate would send them."""
    batches = ShardedBatches(SampleOrder(4, 5), 4, num_batches=1)
    batch = next(iter(training_loader(images_of(good(4)), batches, num_workers=0)))
    expected = [sample_seed(5, key.epoch, key.index, "posterior") for key in next(iter(batches))]
    assert batch["noise_seed"].tolist() == expected
    assert batch["image"].shape == (4, 3, 16, 16)


def test_bad_image_is_replaced_by_a_good_one_and_named():
    images = images_of(bad_at(6, {0, 1, 2}))
    sample = images[SampleKey(0, 1)]
    assert sample["index"] == 1
    assert sample["bad"][0] == ("image-1", "not an image of a known format: starts with b'no image'")
    assert sample["noise_seed"] == sample_seed(5, 0, 1, "posterior")
    again = images_of(bad_at(6, {0, 1, 2}))[SampleKey(0, 1)]
    assert torch.equal(sample["image"], again["image"])
    assert sample["bad"] == again["bad"]


def test_substitutes_differ_from_epoch_to_epoch():
    """Else one image would be seen twice as often in all the run."""
    images = images_of(bad_at(40, {0}), flip=0.0, color_jitter=0.0, crop_scale=(1.0, 1.0))
    sums = {round(images[SampleKey(epoch, 0)]["image"].sum().item(), 2) for epoch in range(12)}
    assert len(sums) > 6


@pytest.mark.parametrize("error_class", [InputError, ImageError])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_input_in_a_worker_is_the_same_one_line(error_class, num_workers, capsys):
    class Refused(Memory):
        def read(self, index: int) -> bytes:
            raise error_class("got this: need that; do so")

    class Images(EvaluationImages):
        def __getitem__(self, index: int):
            self.source.read(index)

    images = Images(Refused([b"", b""]), 16)
    loader = evaluation_loader(images, [0, 1], batch_size=2, num_workers=num_workers)
    assert exit_code("program", lambda: next(iter(loader))) == 2
    assert capsys.readouterr().err == "program: error: got this: need that; do so\n"


def test_workers_start_where_there_are_no_process_groups(monkeypatch):
    monkeypatch.delattr(os, "setpgrp")  # as on Windows
    images = images_of(good(2))
    batches = ShardedBatches(SampleOrder(2, 5), 2, num_batches=1)
    (batch,) = training_loader(images, batches, num_workers=1)
    assert len(batch["image"]) == 2


def test_bad_image_is_read_once():
    source = bad_at(4, {2})
    images = images_of(source)
    samples = [images[SampleKey(epoch, 2)] for epoch in range(5)]
    assert source.reads[2] == 1
    assert all(sample["bad"][0][0] == "image-2" for sample in samples), "and named each time"


def test_only_bad_images_end_the_run():
    with pytest.raises(InputError, match=r"32 substitutes are all bad \(image-.*not an image") as error:
        images_of(bad_at(3, {0, 1, 2}))[SampleKey(0, 0)]
    assert not isinstance(error.value, ImageError)
    assert "\n" not in str(error.value)


def test_images_below_half_the_resolution_are_bad_unless_allowed():
    source = Memory([png(0, 40, 15), png(1, 40, 16)])
    assert images_of(source, resolution=32)[SampleKey(0, 0)]["bad"] == [
        ("image-0", "too small: 40 x 15 pixels, the shorter side needs 16")
    ]
    assert images_of(source, resolution=32, reading=ReadOptions(min_side=1))[SampleKey(0, 0)]["bad"] == []


def test_cache_keeps_what_fits_and_changes_no_bit():
    size = 40 * 36 * 3
    source = good(3)
    cached = images_of(source, cache_mib=(2 * size + 10) / 2**20)
    for epoch in range(3):
        for index in range(3):
            key = SampleKey(epoch, index)
            assert torch.equal(cached[key]["image"], images_of(good(3))[key]["image"])
    assert source.reads == {0: 1, 1: 1, 2: 3}


def test_data_set_pickles_for_workers_that_are_spawned():
    images = images_of(subset(good(4), [3, 1]), cache_mib=1)
    images[SampleKey(0, 0)]
    copy = pickle.loads(pickle.dumps(images))
    assert torch.equal(copy[SampleKey(1, 1)]["image"], images[SampleKey(1, 1)]["image"])


@pytest.mark.parametrize(
    "wrong", [{"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.9, 0.5)}, {"flip": 1.5}, {"resolution": 0}]
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(InputError, match="need"):
        images_of(good(1), **wrong)


def test_empty_source_is_refused():
    with pytest.raises(InputError, match="no images"):
        images_of(good(0))


# ---- evaluation ----


def test_evaluation_sees_the_centre_and_reports_the_bad():
    source = bad_at(5, {1, 4})
    images = EvaluationImages(source, 16)
    batch = collate_evaluation([images[index] for index in range(5)])
    assert batch["name"] == ["image-0", "image-2", "image-3"]
    assert batch["index"] == [0, 2, 3]
    assert [name for name, _ in batch["bad"]] == ["image-1", "image-4"]
    assert torch.equal(batch["image"][1], to_tensor(center_crop(read_image(png(2)), 16)))


def test_evaluation_batch_may_be_all_bad():
    images = EvaluationImages(bad_at(2, {0, 1}), 16)
    batch = collate_evaluation([images[0], images[1]])
    assert len(batch["image"]) == len(batch["name"]) == len(batch["index"]) == 0
    assert len(batch["bad"]) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_loader_gives_its_share_once_and_in_order(num_workers):
    share = [1, 3, 5, 6, 0]
    loader = evaluation_loader(EvaluationImages(good(7), 16), share, batch_size=2, num_workers=num_workers)
    assert len(loader) == 3
    assert [batch["index"] for batch in loader] == [[1, 3], [5, 6], [0]]


def test_iteration_over_evaluation_images_ends():
    assert len(list(EvaluationImages(good(3), 16))) == 3


# ---- bad images ----


def test_bad_images_are_logged_once(caplog):
    bad = BadImages()
    with caplog.at_level(logging.WARNING):
        bad.add([("a.png", "empty"), ("b.png", "truncated")])
        bad.add([("a.png", "empty")])
    assert [record.getMessage() for record in caplog.records] == [
        "bad image a.png: empty",
        "bad image b.png: truncated",
    ]
    assert bad.items() == [("a.png", "empty"), ("b.png", "truncated")]


def test_too_many_bad_images_end_the_run():
    bad = BadImages()
    bad.check(100, 0.0)
    bad.add([("a.png", "empty"), ("b.png", "truncated")])
    bad.check(100, 0.02)
    with pytest.raises(InputError, match=r"2 of 100 images are bad, 2.00% \(a.png: empty; b.png: trunc.*max_bad_frac"):
        bad.check(100, 0.019)
