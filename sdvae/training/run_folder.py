"""The run folder: the places of its files, and whether a command may continue the run in it."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from sdvae.errors import InputError
from sdvae.io import TEMPORARY, changed_fields, left_beside, refuse_url, replacing
from sdvae.training.checkpoint import Checkpoint, newest_whole
from sdvae.training.config import TrainConfig
from sdvae.training.recipe import BEFORE

logger = logging.getLogger(__name__)

# Fields that may change when a run is continued, because they do not change what is learned. BATCH_FIELDS, which divide
# the images of a step into batches, may change too, except with an adaptive GAN weight: it is computed for each batch.
FREE_FIELDS = frozenset(
    {"output_dir", "overwrite", "checkpoint", "trackers", "log_every", "grid_images", "max_skipped_steps"}
    | {"data.num_workers", "data.cache_mib", "data.max_bad_fraction"}
)
BATCH_FIELDS = frozenset({"batch_size", "gradient_accumulation_steps"})
# Fields that may differ between the machines of a run: paths, and the use of memory. Images are compared by their
# names, and all processes get the weights of the main process.
FREE_ON_A_MACHINE = frozenset(
    {"output_dir", "data.source", "data.validation_source", "data.num_workers", "data.cache_mib"}
    | {
        "fine_tune.source",
        "fine_tune.config",
        "distil.teacher",
        "distil.config",
        "distil.student",
        "distil.latents_folder",
        "loss.perceptual.weights",
        "loss.discriminator.source",
        "loss.discriminator.features_weights",
    }
)


class RunFolder:
    """config.yaml, metrics.jsonl, curves.png, images/, checkpoints/, model/, best_model/ and tracker logs.

    With a discriminator also discriminator.safetensors.

    Only the main process reads and writes here. The others may be on machines that do not see the folder.
    """

    TRACKER = "sdvae"  # the trackers' name for the project, and the folder of trackers that write files

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.curves = self.root / "curves.png"
        self.images = self.root / "images"
        self.checkpoints = self.root / "checkpoints"
        self.model = self.root / "model"
        self.best_model = self.root / "best_model"
        self.discriminator = self.root / "discriminator.safetensors"
        self.lock = self.root / ".lock"
        self.damaged: list[tuple[Path, str]] = []  # checkpoints that `find` could not read, and why

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which no other process can train into this folder.

        The operating system releases the lock when the process ends, even if it is killed.

        Raises:
            InputError: when another process is training into the folder.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.lock, timeout=0, fallback_to_soft=False):
                yield
        except Timeout as error:
            raise InputError(
                f"another run is training into output_dir={self.root}; wait for it, or choose another folder"
            ) from error

    def find(self, config: TrainConfig, images_per_step: int) -> tuple[Path, Checkpoint] | None:
        """The checkpoint to continue from, or None to start from step 0. The results in the folder are not changed.

        Args:
            config: the recipe, as the user wrote it.
            images_per_step: images in a step of all processes together.

        Returns:
            The checkpoint's folder and its content.

        Raises:
            InputError: when the folder holds something other than a run, or a run of another recipe, or when none of
                its checkpoints can be read.
        """
        self.check_ours()
        if config.overwrite or not self.config.is_file():
            return None
        self._sweep()
        found, self.damaged = newest_whole(self.checkpoints)
        for path, reason in self.damaged:
            logger.warning("checkpoint %s is damaged and left out: %s", path.name, reason)
        if found is None and self.damaged:
            raise InputError(
                f"none of the {len(self.damaged)} checkpoints in {self.checkpoints} can be read "
                f"({self.damaged[0][1]}); start anew with --overwrite=true, or put an undamaged checkpoint there"
            )
        if found is None:
            before = {"config": yaml.safe_load(self.config.read_text(encoding="utf-8"))}
        else:
            _, checkpoint = found
            before = checkpoint.state
        self._check_same(before, config, images_per_step)
        return found

    def open(self, config: TrainConfig, step: int) -> None:
        """Make the folder ready for a run that has done `step` steps: later lines of the log are removed."""
        if config.overwrite:
            self._sweep()
            self._remove(self.curves, self.images, self.root / self.TRACKER)
            self._remove(self.checkpoints, self.model, self.best_model)
            self.metrics.write_bytes(b"")  # if the process is killed here, `check_ours` still accepts the folder
            self._remove(self.config)
        for path, _ in self.damaged:  # renamed, so that a new checkpoint can take the name and `prune` skips this one
            path.rename(path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:8]}"))
        self._forget_after(step)
        with replacing(self.config) as temporary:
            temporary.write_text(to_yaml(config), encoding="utf-8")
        self.images.mkdir(exist_ok=True)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def check_ours(self) -> None:
        """Refuse a folder that is neither empty nor the folder of a run, which has a recipe and a log.

        A run that was killed in its first moments may have left only an empty log, which is accepted.

        Raises:
            InputError: when the folder holds other files, is a file, or is a URL.
        """
        refuse_url(self.root, "output_dir")
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"output_dir={self.root} is a file; need the path of a folder")
        if not self.root.exists() or (self.config.is_file() and self.metrics.is_file()):
            return
        ours = {self.lock, *left_beside(self.config)}
        for path in self.root.iterdir():
            begun = path == self.metrics and path.stat().st_size == 0
            if not begun and path not in ours:
                raise InputError(
                    f"output_dir={self.root} holds files that no run wrote; need a new or empty folder; choose another"
                )

    def _check_same(self, before: dict[str, Any], config: TrainConfig, images_per_step: int) -> None:
        free = FREE_FIELDS
        gan = config.loss.discriminator
        if before.get("images_per_step") == images_per_step and not (gan.weight > 0 and gan.adaptive):
            free = FREE_FIELDS | BATCH_FIELDS
        changes = changed_fields(before["config"], plain(config), free, defaults=plain(BEFORE))
        if not changes:
            if before.get("images_per_step", images_per_step) != images_per_step:
                logger.warning(
                    "a step now takes %d images instead of %d, because the number of processes changed; "
                    "no image is repeated or missed",
                    images_per_step,
                    before["images_per_step"],
                )
            return
        listed = "; ".join(changes)
        if config.checkpoint.accept_changed_config:
            logger.warning("continuing with a changed recipe: %s", listed)
            return
        raise InputError(
            f"output_dir={self.root} holds the run of another recipe ({listed}); choose another folder, or continue "
            "with --checkpoint.accept_changed_config=true, or start anew with --overwrite=true"
        )

    def _forget_after(self, step: int) -> None:
        """Remove the lines of metrics.jsonl that the run will write again, and an incomplete last line."""
        kept = []
        text = self.metrics.read_text(encoding="utf-8") if self.metrics.is_file() else ""
        for line in text.splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                logger.warning("a damaged line of %s is left out", self.metrics)
        with replacing(self.metrics) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def _sweep(self) -> None:
        """Finish or undo the replacements of files and folders in which a process was killed."""
        for folder in (self.root, self.checkpoints):
            for retired in folder.glob(".*.old-*"):
                target = folder / retired.name[1:].partition(".old-")[0]
                if not target.exists():  # killed between the two renames that replace a folder
                    retired.rename(target)
            for pattern in (TEMPORARY, ".*.old", ".*.old-*"):
                self._remove(*folder.glob(pattern))

    @staticmethod
    def _remove(*paths: Path) -> None:
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def plain(config: TrainConfig) -> dict[str, Any]:
    """The recipe as a dict of what JSON and YAML can hold: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: TrainConfig) -> str:
    """The recipe as `sdvae train --config` reads it."""
    return yaml.safe_dump(plain(config), sort_keys=False)
