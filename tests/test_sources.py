"""Where images come from: what each kind of source lists, names and reads, and what it refuses."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdvae.data import SKIMAGE_PHOTOGRAPHS, ImageError, open_source, read_image, split_off, subset
from sdvae.errors import InputError


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def names(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def contents(source) -> list[bytes]:
    return [source.read(index) for index in range(len(source))]


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture(autouse=True)
def _every_source_that_is_opened_pickles(monkeypatch):
    """Workers that are spawned get a pickled copy."""
    import sdvae.data.sources as module

    opened = module.open_source

    def open_and_copy(*arguments, **options):
        source = opened(*arguments, **options)
        copy = pickle.loads(pickle.dumps(source))
        assert names(copy) == names(source)
        assert copy.name(0) == source.name(0)
        return copy

    monkeypatch.setitem(globals(), "open_source", open_and_copy)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# ---- folders ----


def test_folder_lists_nested_images_by_path(tmp_path):
    files = {"b.JPG": png(0), "a/z.png": png(1), "a/deep/er/c.webp": png(2), "é ü.tiff": png(3), "a.png": png(4)}
    others = {"notes.txt": b"x", ".hidden.png": b"x", ".git/d.png": b"x", "a/.DS_Store": b"x"}
    source = open_source(str(write(tmp_path, {**files, **others})))
    assert names(source) == sorted(files)
    assert contents(source) == [files[name] for name in sorted(files)]


def test_folder_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    write(tmp_path, {f"{letter}/{number}.png": png(0) for letter in "cab" for number in (10, 9, 1)})
    listed = names(open_source(str(tmp_path)))
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = iter(sorted(scandir(path), key=lambda entry: entry.name, reverse=True))

        __enter__ = __iter__ = lambda self: self

        def __next__(self):
            return next(self.entries)

        def __exit__(self, *_):
            self.close()

        def close(self):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert names(open_source(str(tmp_path))) == listed


def test_link_to_a_parent_does_not_loop_and_link_elsewhere_is_followed(tmp_path):
    root = write(tmp_path / "root", {"a/x.png": png(0)})
    elsewhere = write(tmp_path / "elsewhere", {"y.png": png(1)})
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    (root / "more").symlink_to(elsewhere, target_is_directory=True)
    assert names(open_source(str(root))) == ["a/x.png", "more/y.png"]


def test_file_that_vanishes_is_one_bad_image(tmp_path):
    source = open_source(str(write(tmp_path, {"a.png": png(0), "b.png": png(1)})))
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        source.read(0)
    assert source.read(1) == png(1)


def test_single_file_and_glob_of_images(tmp_path):
    write(tmp_path, {"a/x.png": png(0), "b/y.png": png(1), "b/z.txt": b""})
    assert names(open_source(str(tmp_path / "a" / "x.png"))) == ["x.png"]
    source = open_source(str(tmp_path / "**" / "*.png"))
    assert names(source) == ["a/x.png", "b/y.png"]
    assert contents(source) == [png(0), png(1)]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(write(tmp_path, {"pictures/a.png": png(0)})))
    assert names(open_source("~/pictures")) == ["a.png"]


@pytest.mark.parametrize(
    "spec", ["./missing", "../missing", "/missing/folder", "~/missing", "a/b/c", "here/missing", "x.tar", "my photos"]
)
def test_missing_path_is_said_to_be_missing_and_not_looked_up_on_the_hub(tmp_path, monkeypatch, spec):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no such folder"):
        open_source(spec)


def test_pattern_without_files_is_refused(tmp_path):
    with pytest.raises(InputError, match="no file matches"):
        open_source(str(tmp_path / "*.png"))


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"x"}, {".hidden.png": b"x"}])
def test_folder_without_images_is_refused(tmp_path, files):
    with pytest.raises(InputError, match=r"holds no images; need \.png, .*"):
        open_source(str(write(tmp_path, files)))


def test_folder_of_two_kinds_is_refused(tmp_path):
    write(tmp_path, {"a.png": png(0), "b.png": png(0), "captions.parquet": b"x"})
    with pytest.raises(InputError, match="holds 2 images and 1 tables; need one kind"):
        open_source(str(tmp_path))
    assert names(open_source(str(tmp_path / "*.png"))) == ["a.png", "b.png"]


def test_file_that_is_no_source_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no images; need .*it holds .txt: 1, such as notes.txt"):
        open_source(str(write(tmp_path, {"notes.txt": b"x"}) / "notes.txt"))


def test_unknown_hub_id_is_refused_in_one_line():
    with pytest.raises(InputError, match="data set 'nobody/nothing', split 'train' cannot be opened") as error:
        open_source("nobody/nothing")
    assert "\n" not in str(error.value)


# ---- tables ----

IMAGES = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})


def table_of(files: list[dict | None], features: datasets.Features = IMAGES) -> datasets.Dataset:
    column = next(name for name in features if name != "label")
    return datasets.Dataset.from_dict({"label": list(range(len(files))), column: files}, features=features)


def test_parquet_file_and_folder(tmp_path):
    rows = [{"bytes": png(seed), "path": f"{seed}.png"} for seed in range(3)]
    table_of(rows).to_parquet(tmp_path / "data" / "train-00000.parquet")
    table_of(rows[:1]).to_parquet(tmp_path / "data" / "test-00000.parquet")
    source = open_source(str(tmp_path))
    assert names(source) == ["0.png", "1.png", "2.png"]
    assert contents(source) == [png(0), png(1), png(2)]
    assert len(open_source(str(tmp_path), split="test")) == 1
    assert len(open_source(str(tmp_path / "data" / "test-00000.parquet"))) == 1
    assert len(open_source(str(tmp_path / "data" / "*.parquet"))) == 4


def test_saved_data_set_with_and_without_splits(tmp_path):
    data = table_of([{"bytes": png(seed), "path": None} for seed in range(3)])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([2])).save_to_disk(tmp_path / "two")
    assert names(open_source(str(tmp_path / "one"))) == ["row-00000000", "row-00000001", "row-00000002"]
    assert contents(open_source(str(tmp_path / "two"), split="test")) == [png(2)]
    with pytest.raises(InputError, match=r"no split 'validation'; need one of \['test', 'train'\]"):
        open_source(str(tmp_path / "two"), split="validation")
    with pytest.raises(InputError, match="saved as one split"):
        open_source(str(tmp_path / "one"), split="test")


def test_saved_data_set_keeps_its_order(tmp_path):
    """A data set that was shuffled is saved with a table of indices."""
    rows = [{"bytes": png(seed), "path": f"{seed}.png"} for seed in range(5)]
    table_of(rows).select([3, 0, 4]).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    assert names(source) == ["3.png", "0.png", "4.png"]
    assert contents(source) == [png(3), png(0), png(4)]


def test_arrow_file(tmp_path):
    table_of([{"bytes": png(0), "path": None}]).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.rename(tmp_path / "plain.arrow")
    assert contents(open_source(str(tmp_path / "plain.arrow"))) == [png(0)]


def test_parquet_of_raw_bytes_without_metadata(tmp_path):
    pq.write_table(pa.table({"n": [0, 1], "jpg": [png(0), png(1)]}), tmp_path / "a.parquet")
    pair = pa.array([{"bytes": png(2), "path": "p.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"n": [0], "image": pair}), tmp_path / "b.parquet")
    assert contents(open_source(str(tmp_path / "a.parquet"))) == [png(0), png(1)]
    source = open_source(str(tmp_path / "b.parquet"))
    assert contents(source) == [png(2)]
    assert names(source) == ["p.png"]


def test_bad_rows_are_bad_images_and_end_nothing(tmp_path):
    rows = [None, {"bytes": b"no image", "path": None}, {"bytes": b"", "path": None}, {"bytes": png(0), "path": None}]
    table_of(rows).to_parquet(tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    with pytest.raises(ImageError, match="the row holds no image"):
        source.read(0)
    for index, reason in [(1, "not an image"), (2, "empty")]:
        with pytest.raises(ImageError, match=reason):
            read_image(source.read(index))
    assert read_image(source.read(3)).size == (8, 8)


def test_row_that_only_has_a_path_is_read_from_there(tmp_path):
    write(tmp_path, {"x.png": png(7)})
    rows = [{"bytes": None, "path": str(tmp_path / name)} for name in ("x.png", "gone.png")]
    column = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.read(0) == png(7)
    with pytest.raises(ImageError, match="cannot be read"):
        source.read(1)


def test_paths_that_name_many_rows_name_none(tmp_path):
    table_of([{"bytes": png(seed), "path": "image.png"} for seed in range(2)]).to_parquet(tmp_path / "a.parquet")
    assert names(open_source(str(tmp_path / "a.parquet"))) == ["row-00000000", "row-00000001"]


def test_image_column_is_chosen_and_checked(tmp_path):
    features = datasets.Features(
        {"label": datasets.Value("int64"), "left": datasets.Image(), "right": datasets.Image()}
    )
    data = datasets.Dataset.from_dict(
        {"label": [0], "left": [{"bytes": png(0), "path": None}], "right": [{"bytes": png(1), "path": None}]},
        features=features,
    )
    spec = str(tmp_path / "a.parquet")
    data.to_parquet(spec)
    assert contents(open_source(spec, image_column="right")) == [png(1)]
    with pytest.raises(InputError, match=r"image columns \['left', 'right'\]; need exactly one"):
        open_source(spec)
    with pytest.raises(InputError, match=r"no column 'rigth'; need one of .* perhaps 'right'"):
        open_source(spec, image_column="rigth")
    with pytest.raises(InputError, match=r"column 'label' .* need images, raw bytes or paths"):
        open_source(spec, image_column="label")


def test_tables_without_rows_or_images_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(InputError, match=r"no image column among \['text'\]"):
        open_source(str(tmp_path / "text.parquet"))
    table_of([{"bytes": png(0), "path": None}]).select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(InputError, match="cannot be opened; need what save_to_disk wrote, with rows"):
        open_source(str(tmp_path / "empty"))
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    with pytest.raises(InputError, match=r"has no rows|cannot be opened"):
        open_source(str(tmp_path / "empty.parquet"))


def test_missing_split_and_broken_parquet_are_refused_in_one_line(tmp_path):
    table_of([{"bytes": png(0), "path": None}]).to_parquet(tmp_path / "good" / "train.parquet")
    write(tmp_path / "broken", {"train.parquet": b"PAR1 this is not"})
    for spec, split in [("good", "validation"), ("broken", "train")]:
        with pytest.raises(InputError, match=rf"(has no )?split '{split}'(; need| cannot be opened)") as error:
            open_source(str(tmp_path / spec), split=split)
        assert "\n" not in str(error.value)


# ---- tar archives ----


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_tar_folder_file_and_glob(tmp_path):
    first = write_tar(tmp_path / "00000.tar", {"b.png": png(0), "b.txt": b"caption", "a.jpg": png(1), "._c.png": b"x"})
    write_tar(tmp_path / "00001.tar", {"b.png": png(2), "n" * 150 + ".png": png(3)})
    for spec in (tmp_path, tmp_path / "*.tar"):
        source = open_source(str(spec))
        assert names(source) == [
            "00000.tar/b.png",
            "00000.tar/a.jpg",
            "00001.tar/b.png",
            "00001.tar/" + "n" * 150 + ".png",
        ]
        assert contents(source) == [png(0), png(1), png(2), png(3)]
    assert contents(open_source(str(first))) == [png(0), png(1)]


def test_archive_written_by_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for seed in range(3):
            writer.write({"__key__": f"sample{seed}", "png": png(seed), "json": b"{}"})
    source = open_source(str(tmp_path / "x.tar"))
    assert names(source) == [f"x.tar/sample{seed}.png" for seed in range(3)]
    assert contents(source) == [png(seed) for seed in range(3)]


def test_truncated_tar_is_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {"a.png": png(0) * 9, "b.png": png(1) * 9}).read_bytes()
    last = whole.rindex(png(1)) - 20
    for length in (last, len(png(0)) * 9 + 512 + 600, 700, 100):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        with pytest.raises(InputError, match="whole"):
            open_source(str(tmp_path / "a.tar"))


@pytest.mark.parametrize(("content", "reason"), [(b"junk" * 500, "not a whole"), (None, "holds no images")])
def test_tar_without_images_is_refused(tmp_path, content, reason):
    path = write_tar(tmp_path / "a.tar", {"a.txt": b"x"})
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        open_source(str(path))


# ---- photographs of scikit-image ----


def test_photographs_of_scikit_image_are_all_there():
    pytest.importorskip("skimage")
    source = open_source("skimage")
    assert names(source) == list(SKIMAGE_PHOTOGRAPHS)
    for index, (_, width, height) in enumerate(SKIMAGE_PHOTOGRAPHS.values()):
        image = read_image(source.read(index))
        assert image.size == (width, height)
        assert np.asarray(image).std() > 10, "a photograph and not an empty frame"


def test_missing_scikit_image_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "sdvae\[quickstart\]"'):
        open_source("skimage")


# ---- parts of a source ----


@pytest.fixture
def thirty(tmp_path):
    return open_source(str(write(tmp_path, {f"{number:02}.png": png(number) for number in range(30)})))


def test_subset_names_and_reads_its_images(thirty):
    part = subset(subset(thirty, [5, 9, 2]), [2, 0])
    assert names(part) == ["02.png", "05.png"]
    assert contents(part) == [png(2), png(5)]
    assert len(subset(thirty, [])) == 0


def test_split_by_name(thirty):
    train, held_out = split_off(thirty, names=["07.png", "03.png"], count=30)
    assert names(held_out) == ["03.png", "07.png"]
    assert names(train) == [name for name in names(thirty) if name not in ("03.png", "07.png")]
    assert contents(held_out) == [png(3), png(7)]


def test_split_by_unknown_name_suggests_the_nearest(thirty):
    with pytest.raises(InputError, match=r"validation_names with 7.png, which no image has.*perhaps .*07.png"):
        split_off(thirty, names=["03.png", "7.png"])


def test_split_by_count_is_whole_disjoint_and_keyed_on_the_seed(thirty):
    parts = [split_off(thirty, count=8, seed=seed) for seed in (0, 0, 1)]
    for train, held_out in parts:
        assert len(held_out) == 8
        assert sorted(names(train) + names(held_out)) == names(thirty)
    assert names(parts[0][1]) == names(parts[1][1]) != names(parts[2][1])
    assert names(parts[0][1]) != names(thirty)[:8]


def test_adding_images_moves_no_image_back_into_training(thirty):
    """An image held out stays so, but for those that a newcomer displaces, one each."""
    before = set(names(split_off(subset(thirty, range(0, 30, 2)), count=5, seed=0)[1]))
    for extra in range(1, 30, 2):
        more = subset(thirty, [*range(0, 30, 2), extra])
        after = set(names(split_off(more, count=5, seed=0)[1]))
        assert len(before - after) <= 1
        assert after - before <= {thirty.name(extra)}


def test_split_that_leaves_nothing_to_train_on_is_refused(thirty):
    for options in ({"count": 30}, {"count": 31}, {"names": names(thirty)}):
        with pytest.raises(InputError, match="of 30 images to hold out"):
            split_off(thirty, **options)
    with pytest.raises(InputError, match="-1 images"):
        split_off(thirty, count=-1)


def test_split_of_nothing_holds_out_nothing(thirty):
    train, held_out = split_off(thirty, count=0)
    assert (len(train), len(held_out)) == (30, 0)
