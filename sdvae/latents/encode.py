"""`sdvae encode`: encode a data set of images to latents, or verify and repair existing latents."""

from __future__ import annotations

import logging
import os

from sdvae.errors import InputError, require
from sdvae.latents.config import EncodeConfig
from sdvae.latents.folder import LatentFolder
from sdvae.latents.pipeline import Pipeline
from sdvae.latents.task import EncodeTask
from sdvae.latents.verify import verify

logger = logging.getLogger(__name__)


def encode(config: EncodeConfig) -> list[LatentFolder]:
    """Encode a data set, continue one that was begun, or verify one, as the options say.

    Args:
        config: the options.

    Returns:
        The folders of the latents, one for each resolution.

    Raises:
        InputError: for bad options, another data set in the folder, or faults that a verification found; and when
            more than `max_bad_fraction` of the images was skipped. That is known, and said, when the last shard is
            done: by the process that finished it, and by every later run. All rows are kept.
        OSError: when a shard cannot be written. Finished shards stay.
    """
    folders = _encode_on_ray(config) if config.engine == "ray" else _encode_here(config)
    for folder in folders:
        if not folder.is_complete:
            continue
        rows, skipped = folder.manifest["rows"], folder.manifest["skipped"]
        if skipped > config.max_bad_fraction * (rows + skipped):
            raise InputError(
                f"{folder.storage} is complete, but {folder.counts()}; need at most {config.max_bad_fraction:.2%} "
                "skipped; raise max_bad_fraction, or mend the images and encode into another folder"
            )
    return folders


def _encode_on_ray(config: EncodeConfig) -> list[LatentFolder]:
    require("ray", "engine=ray", "ray")
    from sdvae.latents.engine import encode_on_ray

    return encode_on_ray(config)


def _encode_here(config: EncodeConfig) -> list[LatentFolder]:
    task = EncodeTask(config)
    rereading = config.verify or config.repair
    if rereading:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("got verify or repair in several processes; need one process; start it without a launcher")
        for target in task.targets:
            target.folder.open()  # which raises when there is no data set
    task.begin()
    if rereading:
        verify(task)
    folders: list[LatentFolder] = [target.folder for target in task.targets]
    for folder in folders:
        if folder.is_complete:
            logger.info("%s is complete: %s", folder.storage, folder.counts())
    if not all(folder.is_complete for folder in folders) and (config.repair or not config.verify):
        Pipeline(task).run()
    return folders
