"""The state of a run: what a checkpoint holds, and how a run is continued from one.

It consists of objects with `state_dict` and `load_state_dict`, as in torch. Networks and optimizers have a file each.
The others share state.json, in which each has its own keys.
"""

from __future__ import annotations

import logging
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from sdvae.data import BadImages, ImageSource
from sdvae.errors import InputError
from sdvae.training.checkpoint import Checkpoint, check_fit, checkpoint_name, prune, write_checkpoint
from sdvae.training.config import TrainConfig
from sdvae.training.log import Meter
from sdvae.training.players import Players
from sdvae.training.processes import on_main

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: steps done, skipped ones included.
        position: samples used by all processes together.
        skipped_in_a_row: how many of the last steps were skipped.
        validated: whether the validation due at this step is done.
        best: metric, value and step of the best validation, and what it was measured on.
    """

    step: int = 0
    position: int = 0
    skipped_in_a_row: int = 0
    validated: bool = True
    best: dict[str, Any] = field(default_factory=dict)

    def advance(self, images: int, *, skipped: bool, validation_due: bool) -> None:
        """Count a step of `images` samples."""
        self.step += 1
        self.position += images
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.validated = not validation_due

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in asdict(self):
            setattr(self, key, state[key])


@dataclass(frozen=True)
class Origin:
    """The recipe and data with which a run began. A checkpoint of a run that began with others is refused.

    Attributes:
        config: the recipe.
        images_per_step: images in a step of all processes together.
        train_images: number of training images, which with the seed gives their order.
        train_names: digest of the names of the training images.
        perceptual: LPIPS's name, which says its trunk; None without LPIPS.
        teacher: digest of the VAE that a student learns from; None when a VAE learns.
        latents: digest of the data set of its latents that a student learns from; None without one.
        anchor: digest of the encoder near which the latents are kept; None without such a penalty.
    """

    config: dict[str, Any]
    images_per_step: int
    train_images: int
    train_names: str
    perceptual: str | None
    teacher: str | None = None
    latents: str | None = None
    anchor: str | None = None

    def check(self, state: dict[str, Any], accept_changed_config: bool) -> None:
        """Compare with the state.json of a checkpoint. The recipe is left out: `RunFolder.find` has compared it.

        Raises:
            InputError: when images, trunk, teacher or its latents differ.
        """
        if state["train_images"] != self.train_images:
            raise InputError(
                f"data.source has {self.train_images} training images and had {state['train_images']} when the "
                "run began, so their order would change; restore them, or start anew with --overwrite=true"
            )
        if accept_changed_config:
            return
        if state["train_names"] != self.train_names:
            raise InputError(
                "data.source has images with other names than when the run began; restore them, start anew "
                "with --overwrite=true, or continue with --checkpoint.accept_changed_config=true"
            )
        if state["perceptual"] != self.perceptual:
            raise InputError(
                f"the run began with {state['perceptual']} and would go on with {self.perceptual}; give the same trunk "
                "with loss.perceptual.weights, or continue with --checkpoint.accept_changed_config=true"
            )
        if state.get("teacher") != self.teacher:  # earlier versions had no students
            raise InputError(
                "distil.teacher has other weights or other factors of its latents than when the run began; restore it, "
                "start anew with --overwrite=true, or continue with --checkpoint.accept_changed_config=true"
            )
        if state.get("latents") != self.latents:  # earlier versions had none
            raise InputError(
                "distil.latents_folder holds other latents than when the run began; restore them, start anew with "
                "--overwrite=true, or continue with --checkpoint.accept_changed_config=true"
            )
        if state.get("anchor") != self.anchor:  # earlier versions had none
            raise InputError(
                "fine_tune.source, which anchors the latents, has other weights than when the run began; restore it, "
                "start anew with --overwrite=true, or continue with --checkpoint.accept_changed_config=true"
            )


class RunState:
    """All state from which a run is continued."""

    def __init__(
        self,
        origin: Origin,
        players: Players,
        progress: Progress,
        meter: Meter,
        bad_images: BadImages,
        accelerator: Accelerator,
    ):
        self.origin = origin
        self.accelerator = accelerator
        self.players = dict(players)
        self.networks: dict[str, nn.Module] = {name: player.network for name, player in players}
        self.networks["ema"] = players.ema.model
        self.progress = progress
        # `state_dict` gives an object's own keys, and every process must call it. `load_state_dict` gets all keys.
        self.in_json: list[Stateful] = [
            progress,
            players.ema,
            players.lecam,
            _LossScaler(accelerator.scaler),
            meter,
            _BadImages(bad_images),
        ]

    def save(self, root: Path, keep_last: int) -> None:
        """Write a checkpoint into `root`, and remove old ones when it is complete.

        Every process must call it. Only the main process writes.

        Raises:
            OSError: on every process, when writing fails.
        """
        state = asdict(self.origin)
        for part in self.in_json:
            state |= part.state_dict()

        def write() -> None:
            weights = {name: network.state_dict() for name, network in self.networks.items()}
            optimizers = {name: player.optimizer.state_dict() for name, player in self.players.items()}
            folder = root / checkpoint_name(self.progress.step)
            write_checkpoint(folder, Checkpoint(weights, optimizers, state))
            prune(root, keep_last)

        on_main(self.accelerator, write)

    def load(self, folder: Path, checkpoint: Checkpoint, config: TrainConfig) -> None:
        """Continue from a checkpoint.

        Args:
            folder: where the main process found it, for messages.
            checkpoint: its content.
            config: the recipe.

        Raises:
            InputError: when the checkpoint does not fit. Nothing is loaded then.
        """
        for name, network in self.networks.items():
            if name in checkpoint.weights:
                check_fit(network.state_dict(), checkpoint.weights[name], f"{folder}/{name}.safetensors")
            elif name != "discriminator":  # a changed recipe may add a discriminator
                raise InputError(f"{folder} lacks {name}.safetensors")
        self.origin.check(checkpoint.state, config.checkpoint.accept_changed_config)
        optimizers = self._optimizers_that_fit(checkpoint, config.optimizer.kind)

        for name, network in self.networks.items():
            if name in checkpoint.weights:
                network.load_state_dict(checkpoint.weights[name])
        for name, player in self.players.items():
            if name in optimizers:
                player.load_optimizer(optimizers[name])
        for part in self.in_json:
            part.load_state_dict(checkpoint.state)
        logger.info("continuing from %s", folder)

    def _optimizers_that_fit(self, checkpoint: Checkpoint, kind: str) -> dict[str, dict[str, Any]]:
        """The optimizers' states, or an empty dict if the recipe now has an optimizer that cannot load them.

        Raises:
            InputError: when the number of trained parameters has changed.
        """
        kinds = {kind, checkpoint.state["config"]["optimizer"]["kind"]}
        if len(kinds) > 1 and kinds & {"adamw_8bit", "muon"}:
            logger.warning("optimizer.kind has changed: the optimizer's moments start anew")
            return {}
        for name, player in self.players.items():
            if name in checkpoint.optimizers:
                groups = checkpoint.optimizers[name]["param_groups"]
                before, now = sum(len(group["params"]) for group in groups), len(player.trained)
                if before != now:
                    raise InputError(
                        f"{now} parameters of the {name} train and {before} did when the run began; start a new run "
                        "from its model with fine_tune.source"
                    )
        return checkpoint.optimizers


class _LossScaler:
    """The loss scale of fp16 training."""

    def __init__(self, scaler: Any):
        self._scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        return {"loss_scaler": self._scaler.state_dict() if self._scaler is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._scaler is not None and state["loss_scaler"] is not None:
            self._scaler.load_state_dict(state["loss_scaler"])


class _BadImages:
    """The bad images that all processes have found, so that each is reported and counted once in a run."""

    def __init__(self, bad_images: BadImages):
        self._bad_images = bad_images

    def state_dict(self) -> dict[str, Any]:
        return {"bad_images": sorted(set(gather_object(self._bad_images.items())))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._bad_images.add([(name, reason) for name, reason in state["bad_images"]])


def digest_of_names(source: ImageSource) -> str:
    """A digest of up to 10,000 names spread over the source, which changes when images are added or removed."""
    step = max(1, len(source) // 10_000)
    return f"{zlib.crc32(os.fsencode(chr(10).join(source.name(i) for i in range(0, len(source), step)))):08x}"
