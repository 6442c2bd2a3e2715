"""What each layout of files means, compared with `datasets` and `webdataset`: images, splits, classes, words."""

from __future__ import annotations

import io
import logging
import os
import socket
import tarfile
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import data_files
from PIL import Image

from sdvae.data import ImageError, open_source, open_stream
from sdvae.data.folders import SPLIT_WORDS
from sdvae.errors import InputError


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


PNG = png(0)


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, logger="sdvae")


def make(folder: Path, *files: str, **texts: bytes | str) -> Path:
    """Write images, and other files with their content; `__` stands for a dot in the name of an argument."""
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG if file.lower().endswith((".png", ".jpg")) else b"")
    for name, text in texts.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def names(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def column(source, name: str) -> list:
    return source.columns(range(len(source))).column(name).to_pylist()


def words_of(source) -> list[tuple]:
    """(name, label as text) of each image, in the order of the names."""
    labels = [None] * len(source)
    if "label" in source.features:
        feature = source.features["label"]
        labels = [feature.int2str(number) for number in column(source, "label")]
    return sorted(zip(names(source), labels, strict=True))


def words_of_imagefolder(folder: Path) -> dict[str, list[tuple]]:
    """The same for each split as `datasets` reads the folder."""
    found = datasets.load_dataset("imagefolder", data_dir=str(folder))
    splits = {}
    for split, data in found.items():
        data = data.cast_column("image", datasets.Image(decode=False))
        labels = [None] * len(data)
        if "label" in data.features:
            labels = [None if n is None else data.features["label"].int2str(n) for n in data["label"]]
        paths = [os.path.relpath(row["path"], folder) for row in data["image"]]
        splits[str(split)] = sorted(zip(paths, labels, strict=True))
    return splits


# ---- splits and classes ----

LAYOUTS = {
    "flat": ["0.png", "1.png"],
    "classes": ["cat/0.png", "dog/0.png", "dog/1.png"],
    "one class": ["cat/0.png", "cat/1.png"],
    "a stray image beside classes": ["stray.png", "cat/0.png", "dog/0.png"],
    "classes of two depths": ["cat/0.png", "more/dog/0.png"],
    "nested classes": ["pets/cat/0.png", "wild/fox/0.png"],
    "splits of classes": ["train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/0.png"],
    "three splits": ["train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/0.png", "test/a/0.png", "test/b/0.png"],
    "other words": ["training/a/0.png", "training/b/0.png", "dev/a/1.png", "evaluation/b/2.png"],
    "words with more": ["my_train-2020/a/0.png", "training/b/2.png", "old.test/b/1.png"],
    "words within words": ["trainer/0.png", "contest/1.png"],
    "splits below": ["data/train/0.png", "data/test/1.png", "data/test/deep/er/2.png"],
    "splits within classes": ["cat/train/0.png", "dog/train/1.png"],
    "folders in no split": ["train/0.png", "extra/1.png"],
    "a class with a split's name": ["car/0.png", "plane/1.png", "train/2.png"],
    "splits in file names": ["train_0.png", "train-1.png", "a test 2.png"],
    "splits in file names of folders": ["x/train_0.png", "y/train_1.png", "x/val_0.png", "y/val_1.png"],
    "shards": ["data/train-00000-of-00002.png", "data/odd-00000-of-00001.png", "data/other.png"],
    "hidden": ["a.png", ".b.png", ".git/c.png", "__MACOSX/d.png", "__e.png"],
    "capital letters": ["Train/0.png", "Test/1.PNG"],
}


@pytest.mark.parametrize("files", LAYOUTS.values(), ids=list(LAYOUTS))
def test_splits_names_and_classes_are_those_of_imagefolder(tmp_path, files):
    folder = make(tmp_path / "d", *files)
    expected = words_of_imagefolder(folder)
    assert {split: words_of(open_source(str(folder), split=split)) for split in expected} == expected
    for split in {"train", "validation", "test", "nonsense"} - expected.keys():
        with pytest.raises(InputError, match=rf"has no split '{split}'; need .*'{sorted(expected)[0]}'"):
            open_source(str(folder), split=split)


def test_split_words_are_those_of_datasets():
    assert {str(split): tuple(words) for split, words in data_files.SPLIT_KEYWORDS.items()} == SPLIT_WORDS
    assert data_files.NON_WORDS_CHARS == "-._ 0-9"
    assert data_files.SPLIT_PATTERN_SHARDED == "data/{split}-" + "[0-9]" * 5 + "-of-" + "[0-9]" * 5 + "*.*"


# ---- where we differ from imagefolder, on purpose (docs/data.md) ----


def test_folder_of_a_split_is_no_class(tmp_path):
    folder = make(tmp_path / "d", "train/0.png", "test/1.png")
    assert words_of_imagefolder(folder)["test"] == [("test/1.png", "test")]
    assert "label" not in open_source(str(folder), split="test").features


def test_class_has_one_number_in_all_splits_even_if_a_split_lacks_classes(tmp_path):
    folder = make(tmp_path / "d", "train/cat/0.png", "test/dog/1.png")
    for split, number in (("train", 0), ("test", 1)):
        source = open_source(str(folder), split=split)
        assert source.features["label"].names == ["cat", "dog"]
        assert column(source, "label") == [number]


def test_image_is_in_the_split_of_the_topmost_folder_only(tmp_path):
    folder = make(tmp_path / "d", "val/training_room/0.png", "train/kitchen/1.png")
    assert ("val/training_room/0.png", "training_room") in words_of_imagefolder(folder)["train"]
    assert names(open_source(str(folder))) == ["train/kitchen/1.png"]
    assert words_of(open_source(str(folder), split="validation")) == [("val/training_room/0.png", "training_room")]


def test_one_image_named_like_a_split_divides_nothing(tmp_path):
    folder = make(tmp_path / "d", "a.png", "my test 1.png", "c.png")
    assert words_of_imagefolder(folder) == {"test": [("my test 1.png", None)]}
    assert len(open_source(str(folder))) == 3


def test_lists_of_splits_beside_images_divide_nothing(tmp_path):
    assert len(open_source(str(make(tmp_path / "d", "images/a.png", "images/b.png", "train.txt", "val.txt")))) == 2


# ---- splits in training, encoding and evaluation ----


def test_source_without_splits_is_train_and_or_all_takes_it_under_any_name(tmp_path):
    folder = make(tmp_path / "d", "a.png", "b.png")
    for spec in (folder, folder / "*.png", folder / "a.png"):
        with pytest.raises(InputError, match="no split 'validation'; need 'train', which is all of a source without"):
            open_source(str(spec), split="validation")
        assert len(open_source(str(spec), split="validation", or_all=True)) == len(open_source(str(spec)))
    divided = make(tmp_path / "e", "train/a.png", "test/b.png")
    with pytest.raises(InputError, match=r"no split 'validation'; need one of \['test', 'train'\]"):
        open_source(str(divided), split="validation", or_all=True)
    only = make(tmp_path / "f", "train/a.png")
    with pytest.raises(InputError, match=r"no split 'validation'; need one of \['train'\]"):
        open_source(str(only), split="validation", or_all=True)  # all of it would be the training images


def test_archives_and_tables_have_the_splits_of_their_names(tmp_path):
    for name in ("train-000", "train-001", "test-000"):
        write_tar(tmp_path / "tars" / f"{name}.tar", {f"{name}.png": PNG})
        write_table(tmp_path / "tables" / f"{name}.parquet", [f"{name}.png"])
    for folder, prefix in ((tmp_path / "tars", "train-000.tar/"), (tmp_path / "tables", "")):
        assert names(open_source(str(folder)))[0] == f"{prefix}train-000.png"
        assert len(open_source(str(folder))) == 2
        assert len(open_source(str(folder), split="test")) == 1
        with pytest.raises(InputError, match=r"no split 'validation'; need one of \['test', 'train'\]"):
            open_source(str(folder), split="validation")


def test_splits_of_archives_are_those_of_datasets(tmp_path):
    for layout in (["train-0", "test-0"], ["00000", "test"], ["train/0", "val/0", "extra/0"], ["0", "1"]):
        folder = tmp_path / layout[0].replace("/", "-")
        for name in layout:
            write_tar(folder / f"{name}.tar", {"a.png": PNG})
        expected = {
            str(split): sorted(os.path.relpath(file, folder) for file in files)
            for split, files in datasets.load_dataset_builder(str(folder)).config.data_files.items()
        }
        found = {
            split: sorted(n.rpartition("/")[0] for n in names(open_source(str(folder), split=split)))
            for split in expected
        }
        assert found == expected


def test_card_of_a_folder_tells_the_splits_of_its_tables(tmp_path):
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: odd\n    path: one.parquet\n---\n"
    folder = make(tmp_path / "d", README__md=card)
    write_table(folder / "one.parquet", ["1.png"])
    write_table(folder / "two.parquet", ["2.png"])
    assert names(open_source(str(folder), split="odd")) == ["1.png"]
    with pytest.raises(InputError, match=r"no split 'train'; need one of \['odd'\]"):
        open_source(str(folder))


# ---- what is not used is said ----


def test_what_is_not_used_is_counted_by_kind_and_said_once(tmp_path, caplog):
    folder = make(tmp_path / "d", "a.png", "b.heic", "c.HEIC", "notes.md", "x.zip", ".hidden.png", "more/e.json")
    open_source(str(folder))
    warning, info = caplog.records
    assert (warning.levelname, info.levelname) == ("WARNING", "INFO")
    assert warning.getMessage() == f"{folder}: not used: .heic: 2, such as b.heic; .zip: 1, such as x.zip"
    assert info.getMessage() == (
        f"{folder}: not used: hidden files or folders: 1, such as .hidden.png; .json: 1, such as more/e.json; "
        ".md: 1, such as notes.md"
    )


def test_images_in_no_split_are_warned_of_and_a_pattern_reads_them(tmp_path, caplog):
    folder = make(tmp_path / "d", "car/0.png", "plane/1.png", "train/2.png")
    assert names(open_source(str(folder))) == ["train/2.png"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "files in no split, which only a pattern reads: 2, such as car/0.png" in record.getMessage()
    assert len(open_source(f"{folder}/**/*.png")) == 3


def test_stray_image_beside_classes_is_named_when_it_prevents_labels(tmp_path, caplog):
    folder = make(tmp_path / "d", "stray.png", "cat/0.png", "dog/0.png", "dog/1.png")
    assert "label" not in open_source(str(folder)).features
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert (
        "no labels, because 1 of 4 images (such as stray.png) do not lie in folders of the same" in record.getMessage()
    )


def test_folder_of_unsupported_files_says_what_it_holds(tmp_path):
    with pytest.raises(InputError, match=r"holds no images; need .*; it holds \.heic: 2, such as a.heic"):
        open_source(str(make(tmp_path / "d", "a.heic", "b.heic")))


# ---- only regular files ----


def test_only_regular_files_are_images_and_nothing_waits_for_them(tmp_path, caplog, monkeypatch):
    folder = make(tmp_path / "d", "a.png", "e.png/inside.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "linked.png").symlink_to(folder / "a.png")
    monkeypatch.chdir(folder)  # the name of a socket has at most about 100 bytes
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket.png")
        for spec in (folder, f"{folder}/*.png", f"{folder}/**/*.png"):
            source = open_source(str(spec))
            nested = ["e.png/inside.png"] if "**" in str(spec) or spec == folder else []
            assert names(source) == ["a.png", *nested, "linked.png"]
            assert all(source.read(index) == PNG for index in range(len(source)))
    assert "broken links or files that are not regular: 4, such as" in caplog.text
    with pytest.raises(InputError, match="not a regular file"):
        open_source(str(folder / "pipe.png"))


def test_paths_in_a_table_to_a_pipe_are_bad_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    write_table(tmp_path / "t.parquet", ["pipe.png"], store="path")
    with pytest.raises(ImageError, match="not a regular file"):
        open_source(str(tmp_path / "t.parquet"), image_column="path").read(0)


def test_loops_of_links_end_for_folders_and_patterns(tmp_path):
    root = make(tmp_path / "d", "a/0.png", "b/1.png")
    for number in range(6):  # glob would try 6 ** 40 paths
        (root / "a" / f"loop{number}").symlink_to(root, target_is_directory=True)
    assert names(open_source(str(root))) == ["a/0.png", "b/1.png"]
    assert names(open_source(f"{root}/**/*.png")) == ["a/0.png", "b/1.png"]


@pytest.mark.parametrize(
    "pattern", ["**/*.png", "*/*.png", "a/**", "**/a/*", "a/**/c/*.png", "*.png", "**/[ab]?/*", "**"]
)
def test_patterns_match_what_glob_matches(tmp_path, monkeypatch, pattern):
    import glob

    root = make(tmp_path / "d[1]", "0.png", "a/1.png", "a/b/c/2.png", "a/c/3.png", "ax/4.png", "b/a/5.png")
    expected = sorted(p for p in glob.glob(pattern, root_dir=root, recursive=True) if (root / p).is_file())
    monkeypatch.chdir(root)
    for spec in (pattern, f"./{pattern}", f"{glob.escape(str(root))}/{pattern}"):
        folder = os.path.commonpath([os.path.dirname(p) for p in expected])
        assert names(open_source(spec)) == [os.path.relpath(p, folder or ".") for p in expected]


# ---- paths and hub ids ----


@pytest.mark.parametrize(
    "spec", ["big", "imagenet-1k", "photos_2024", "a/b/c", "./a/b", "../x", "/x/y", "x.tar", "a b/c"]
)
def test_name_that_is_no_hub_id_is_no_such_folder_at_once(tmp_path, monkeypatch, spec):
    make(tmp_path, "bigger/a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    for function in (open_source, open_stream):
        with pytest.raises(InputError, match="no such folder or file") as error:
            function(spec)
    if spec == "big":
        assert "or a data set on the hub as owner/name, such as 'ylecun/mnist'; perhaps 'bigger'" in str(error.value)


# ---- words beside images ----


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_table(path: Path, paths: list[str], store: str = "image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if store == "image":
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        values = pa.array([{"bytes": PNG, "path": name} for name in paths], kind)
    else:
        values = pa.array(paths, pa.string())
    pq.write_table(pa.table({store: values, "n": list(range(len(paths)))}), path)
    return path


WEBDATASET = {
    "a.jpg": PNG,
    "a.txt": "first",
    "a.cls": "3",
    "a.json": '{"width": 8}',
    "dir.v1/b.png": PNG,
    "dir.v1/b.txt": "second",
    "c.d.e.PNG": PNG,
    "._c.txt": "hidden",
}


def test_samples_are_those_of_webdataset_and_datasets(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = write_tar(tmp_path / "x.tar", WEBDATASET)
    source = open_source(str(path))
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    found = [name.removeprefix("x.tar/").split("/") for name in names(source)]
    assert [n[-1].partition(".")[0] for n in found] == [s["__key__"].rpartition("/")[2] for s in samples]
    assert column(source, "caption") == [s["txt"].decode() if "txt" in s else None for s in samples]
    assert column(source, "label") == [int(s["cls"]) if "cls" in s else None for s in samples]
    assert column(source, "json") == [s["json"].decode() if "json" in s else None for s in samples]
    two = {name: content for name, content in WEBDATASET.items() if name.split(".")[0] in ("a",)}
    two |= {name.replace("a.", "z."): content for name, content in two.items()}
    path = write_tar(tmp_path / "two.tar", two)
    rows = datasets.load_dataset("webdataset", data_files=str(path), split="train")
    source = open_source(str(path))
    assert column(source, "caption") == rows["txt"]
    assert column(source, "label") == rows["cls"]
    assert [name.removeprefix("two.tar/").partition(".")[0] for name in names(source)] == rows["__key__"]


def test_caption_of_an_image_with_two_extensions_is_found(tmp_path):
    source = open_source(str(write_tar(tmp_path / "x.tar", {"0.input.jpg": PNG, "0.txt": "words"})))
    assert column(source, "caption") == ["words"]


def test_several_images_in_a_sample_are_chosen_from(tmp_path, caplog):
    members = {"0.input.jpg": png(1), "0.output.jpg": png(2), "0.txt": "words", "1.output.jpg": png(3)}
    path = str(write_tar(tmp_path / "x.tar", members))
    with pytest.raises(InputError, match=r"sample 'x.tar/0' has the images input.jpg, output.jpg; name one with image"):
        open_source(path)
    source = open_source(path, image_column="input.jpg")
    assert names(source) == ["x.tar/0.input.jpg"]
    assert source.read(0) == png(1)
    assert "not used: .jpg: 2, such as x.tar/0.output.jpg" in caplog.text
    assert names(open_source(path, image_column="output.jpg")) == ["x.tar/0.output.jpg", "x.tar/1.output.jpg"]
    with pytest.raises(InputError, match=r"no images 'mask.png' in its archives"):
        open_source(path, image_column="mask.png")


def test_member_that_is_there_twice_is_the_last_one_as_when_unpacked(tmp_path, caplog):
    path = write_tar(tmp_path / "x.tar", {"0.png": png(1)})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = len(png(2))
        tar.addfile(info, io.BytesIO(png(2)))
    source = open_source(str(path))
    assert [source.read(index) for index in range(len(source))] == [png(2)]
    assert "members that later ones of the same name replace: 1" in caplog.text


def test_caption_in_json_is_the_caption_where_no_text_has_it(tmp_path):
    members = {"0.png": PNG, "0.json": '{"caption": "words", "n": 1}', "1.png": PNG, "1.json": "[]", "2.png": PNG}
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    assert column(source, "caption") == ["words", None, None]
    assert column(source, "json") == [members["0.json"], "[]", None]
    source = open_source(str(write_tar(tmp_path / "y.tar", {**members, "0.txt": "other"})))
    assert column(source, "caption") == ["other", None, None]


def test_label_that_is_no_number_is_said(tmp_path, caplog):
    source = open_source(str(write_tar(tmp_path / "x.tar", {"0.png": PNG, "0.cls": "cat", "1.png": PNG, "1.cls": "1"})))
    assert column(source, "label") == [None, 1]
    assert "the label of x.tar/0.png is 'cat' and not an integer" in caplog.text


def test_captions_of_kohya_are_read_and_txt_comes_first(tmp_path, caplog):
    folder = make(tmp_path / "d", "a.png", "b.png", "c.png", a__caption="A", b__txt="B", b__caption="other", d__txt="?")
    assert column(open_source(str(folder)), "caption") == ["A", "B", None]
    assert ".caption beside a .txt of the same image: 1, such as b.caption" in caplog.text
    assert "texts without an image of that name: 1, such as d.txt" in caplog.text
    assert column(open_source(f"{folder}/[ab].png"), "caption") == ["A", "B"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        (b" two\r\nlines\r\n", "two\nlines"),
        ("\u00e9t\u00e9".encode("utf-16"), "\u00e9t\u00e9"),
        ("caf\u00e9".encode("latin-1"), "caf\ufffd"),
        (b"", ""),
    ],
)
def test_captions_lose_marks_and_line_ends_and_other_encodings_are_said(tmp_path, caplog, data, text):
    for source in (
        open_source(str(make(tmp_path / "d", "a.png", a__txt=data))),
        open_source(str(write_tar(tmp_path / "x.tar", {"a.png": PNG, "a.txt": data}))),
    ):
        assert column(source, "caption") == [text]
        assert ("is not UTF-8" in caplog.text) == ("\ufffd" in text)
        caplog.clear()


def test_masks_beside_images_are_not_images(tmp_path, caplog):
    masks = ["a_mask.png", "b-masklabel.png", "masks/c.png", "img/mask/d.png"]
    images = ["a.png", "b.jpg", "face_mask.png", "img/d.png", "img/unmasked.png", "photos/c.png"]
    folder = make(tmp_path / "d", *masks, *images)
    assert names(open_source(str(folder))) == sorted(images)
    assert "masks of other images, which only a pattern reads: 4, such as a_mask.png" in caplog.text
    assert len(open_source(f"{folder}/**/*.*g")) == 10
    classes = make(tmp_path / "e", "mask/1.png", "hat/2.png")
    assert words_of(open_source(str(classes))) == [("hat/2.png", "hat"), ("mask/1.png", "mask")]


# ---- metadata of imagefolder ----

METADATA = {
    "csv": 'file_name,text,n\n0.png,"a, b",1\nsub/1.png,None,2\n',
    "jsonl": '{"file_name": "0.png", "text": "a, b", "n": 1}\n{"file_name": "sub/1.png", "text": "None", "n": 2}\n',
}


def test_metadata_is_that_of_imagefolder(tmp_path):
    for extension in ("csv", "jsonl", "parquet"):
        folder = make(tmp_path / extension, "0.png", "sub/1.png", "unlisted.png")
        if extension == "parquet":
            table = pa.table({"file_name": ["0.png", "sub/1.png"], "text": ["a, b", "None"], "n": [1, 2]})
            pq.write_table(table, folder / "metadata.parquet")
        else:
            make(folder, **{f"metadata__{extension}": METADATA[extension]})
        data = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
        source = open_source(str(folder))
        paths = [row["path"] for row in data.cast_column("image", datasets.Image(decode=False))["image"]]
        assert [str(folder / name) for name in names(source)] == paths
        assert column(source, "n") == data["n"]
        assert column(source, "text") == ["a, b", "None"]  # pandas reads the word None of a .csv as null
        assert data["text"] == (["a, b", None] if extension == "csv" else ["a, b", "None"])


def test_metadata_of_nested_folders_splits_and_other_columns(tmp_path):
    folder = make(tmp_path / "d", "train/a/0.png", "train/b/1.png", "test/2.png")
    make(folder / "train/a", metadata__csv="file_name,text\n0.png,A\n")
    make(folder / "train/b", metadata__csv="file_name,text\n1.png,B\n")
    make(folder / "test", metadata__csv="file_name,text\n2.png,C\n")
    for split, expected in (("train", ["A", "B"]), ("test", ["C"])):
        source = open_source(str(folder), split=split)
        data = datasets.load_dataset("imagefolder", data_dir=str(folder), split=split)
        assert column(source, "text") == sorted(data["text"]) == expected
        assert list(source.features) == ["text"]  # and no label, as in imagefolder


def test_metadata_above_the_splits_is_divided_among_them(tmp_path):
    folder = make(tmp_path / "d", "train/0.png", "test/1.png")
    make(folder, metadata__csv="file_name,text\ntrain/0.png,A\ntest/1.png,B\ntest/gone.png,C\n")
    assert column(open_source(str(folder)), "text") == ["A"]
    assert column(open_source(str(folder), split="test"), "text") == ["B", "C"]


def test_rows_without_files_are_bad_images_and_images_without_rows_are_said(tmp_path, caplog):
    folder = make(tmp_path / "d", "0.png", "1.png", metadata__csv="file_name,caption\n0.png,A\ngone.png,B\n,C\n")
    source = open_source(str(folder))
    assert names(source) == ["0.png", "gone.png"]
    with pytest.raises(ImageError, match="named in the metadata and is not there"):
        source.read(1)
    assert "images that the metadata does not list: 1, such as 1.png" in caplog.text


def test_several_images_in_a_row_of_metadata_are_chosen_from(tmp_path):
    content = "file_name,edit_file_name,text\na.png,b.png,x\n"
    folder = make(tmp_path / "d", "a.png", "b.png", metadata__csv=content)
    with pytest.raises(InputError, match=r"several images in a row: \['image', 'edit'\]; choose one"):
        open_source(str(folder))
    data = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    assert {"image", "edit", "text"} == set(data.column_names)
    assert names(open_source(str(folder), image_column="edit")) == ["b.png"]
    assert column(open_source(str(folder), image_column="image"), "text") == ["x"]


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "file:///etc/passwd", "x/../../a.png", "..\\a.png"])
def test_metadata_does_not_lead_out_of_its_folder(tmp_path, name):
    folder = make(tmp_path / "d", "a.png", metadata__csv=f"file_name\n{name}\n")
    with pytest.raises(InputError, match="need a path inside the folder of the metadata"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"metadata__csv": "name,text\na.png,x\n"}, "need one named 'file_name'"),
        ({"metadata__csv": b"\xff\xfefile_name\n"}, "cannot be read"),
        ({"metadata__jsonl": '{"file_name": 1'}, "cannot be read"),
        ({"metadata__jsonl": ""}, "cannot be read"),
        ({"metadata__parquet": b"no parquet"}, "cannot be read"),
        ({"metadata__csv": "file_name\nb.png\n", "b__png": b"", "image_column": "other"}, "be one of"),
    ],
)
def test_metadata_that_is_wrong_is_refused_in_one_line(tmp_path, files, reason):
    image_column = files.pop("image_column", None)
    with pytest.raises(InputError, match=reason) as error:
        open_source(str(make(tmp_path / "d", "a.png", **files)), image_column=image_column)
    assert "\n" not in str(error.value)


# ---- img2dataset, paths in tables, pointers, archives ----


def test_folders_of_img2dataset_are_read(tmp_path, caplog):
    """It writes archives or folders of images, a table of facts for each, and a file of statistics."""
    members = {
        f"{key:09}.{field}": data
        for key in range(2)
        for field, data in (("jpg", PNG), ("txt", f"t{key}"), ("json", "{}"))
    }
    write_tar(tmp_path / "tars/00000.tar", members)
    make(tmp_path / "files", *(f"00000/{key:09}.jpg" for key in range(2)))
    make(tmp_path / "files/00000", **{f"{key:09}__txt": f"t{key}" for key in range(2)})
    for folder in (tmp_path / "tars", tmp_path / "files"):
        write_table(folder / "00000.parquet", ["http://x/0", "http://x/1", "failed"], store="url")
        make(folder, **{"00000_stats__json": "{}"})
        caplog.clear()
        source = open_source(str(folder))
        assert column(source, "caption") == ["t0", "t1"]
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert "tables about the images beside them: 1, such as 00000.parquet" in caplog.text


def test_patterns_that_a_refusal_offers_open_what_they_name(tmp_path):
    folder = make(tmp_path / "[d]", "x/a.png", "x/y/b.png")
    write_table(folder / "t/one.parquet", ["1.png"])
    write_tar(folder / "s/two.tar", {"2.png": PNG})
    with pytest.raises(InputError, match="holds 2 images and 1 tables and 1 tars; need one kind") as error:
        open_source(str(folder))
    patterns = str(error.value).rpartition("such as ")[2].split(" or ")
    assert [len(open_source(pattern.strip("'"))) for pattern in patterns] == [2, 1, 1]


def test_paths_in_a_table_begin_in_its_folder(tmp_path, monkeypatch):
    make(tmp_path / "d/images", "a.png")
    path = write_table(tmp_path / "d/t.parquet", ["images/a.png", str(tmp_path / "d/images/a.png"), "gone.png"], "path")
    with pytest.raises(InputError, match=r"no image column among .* \(it may hold paths of images\)"):
        open_source(str(path))
    monkeypatch.chdir(tmp_path)
    for spec in (str(path), str(tmp_path / "d/*.parquet"), "d/t.parquet"):
        source = open_source(spec, image_column="path")
        assert names(source)[0] == "images/a.png"
        assert source.read(0) == source.read(1) == PNG
        with pytest.raises(ImageError, match="No such file"):
            source.read(2)
    rows = list(open_stream(str(path), image_column="path").part(0))
    assert [row[0] for row in rows] == names(source)
    assert rows[0][1]() == PNG


def test_pointers_of_git_lfs_are_called_that(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name in ("a.tar", "a.parquet"):
        with pytest.raises(InputError, match=r"is a Git LFS pointer.*git lfs pull"):
            open_source(str(make(tmp_path / name, **{name.replace(".", "__"): pointer})))
    source = open_source(str(make(tmp_path / "d", a__png=pointer)))
    with pytest.raises(ImageError, match=r"^a Git LFS pointer: run"):
        source.read(0)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.zip", "x.tar.zst", "x.7z"])
def test_compressed_archives_are_refused_by_name(tmp_path, name):
    folder = make(tmp_path / "d", name)
    for spec in (folder, folder / name, f"{folder}/*"):
        with pytest.raises(InputError, match=rf"holds no images; .*such as {name}; unpack the archives"):
            open_source(str(spec))


# ---- strange names ----

STRANGE = [
    b"caf\xe9.png",
    b"line\nbreak.png",
    b"bell\x07\x1b[31m.png",
    b'<b>&amp;".png',
    "caf\u00e9.png".encode(),
    unicodedata.normalize("NFD", "caf\u00e9.png").encode(),
    b"n" * 250 + b".png",
    "\u202egnp.exe.png".encode(),
]


def test_strange_names_are_names_and_their_captions_and_classes_are_found(tmp_path):
    folder = os.fsencode(make(tmp_path / "d", "plain/a.png"))
    for number, name in enumerate(STRANGE):
        os.makedirs(folder + b"/c\xe9\n", exist_ok=True)
        for path, data in (
            (folder + b"/c\xe9\n/" + name, png(number)),
            (folder + b"/c\xe9\n/" + name[:-4] + b".txt", b"%d" % number),
        ):
            with open(path, "wb") as file:
                file.write(data)
    source = open_source(os.fsdecode(folder))
    found = {os.fsencode(source.name(index)).rpartition(b"/")[2]: index for index in range(len(source))}
    assert set(found) == {*STRANGE, b"a.png"}
    assert [source.read(found[name]) for name in STRANGE] == [png(number) for number in range(len(STRANGE))]
    assert [column(source, "caption")[found[name]] for name in STRANGE] == [str(n) for n in range(len(STRANGE))]
    assert source.features["label"].names == ["c\\xe9\n", "plain"]


def test_messages_stay_on_one_line_whatever_the_names(tmp_path, caplog):
    make(tmp_path / "d", "a.png", "line\nbreak.heic", "stray\n/deep\x1b/0.png", "more/1.png")
    open_source(str(tmp_path / "d"))
    assert caplog.records
    assert not any(set(record.getMessage()) & set("\n\x1b") for record in caplog.records)
