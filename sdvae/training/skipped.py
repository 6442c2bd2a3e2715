"""Steps that are skipped because a loss or gradient is not finite: what caused them, and when to give up."""

from __future__ import annotations

import logging
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from sdvae.data import ImageSource
from sdvae.errors import InputError
from sdvae.training.checkpoint import checkpoint_name
from sdvae.training.log import Meter
from sdvae.training.state import Progress
from sdvae.training.step import StepResult

logger = logging.getLogger(__name__)

# Averaged over processes, or a sum of other terms: not finite on every process as soon as one has a fault, so these do
# not tell which process that is.
DERIVED = ("grad_norm", "discriminator_grad_norm", "gan_weight", "loss")


class SkippedSteps:
    """Counts steps that were skipped one after another, and remembers the state before the first of them.

    Args:
        source: training images, whose names are reported.
        progress: `skipped_in_a_row` in it is the count.
        meter: is restored together with `progress`.
        accelerator: the run's Accelerator.
    """

    def __init__(self, source: ImageSource, progress: Progress, meter: Meter, accelerator: Accelerator):
        self.source = source
        self.progress = progress
        self.meter = meter
        self.accelerator = accelerator
        self._reason = ""
        self._before: tuple[dict[str, Any], dict[str, list[float]]] | None = None

    def take_note(self, result: StepResult) -> None:
        """Log why a step was skipped. Every process must call it, before the step is counted."""
        if self.progress.skipped_in_a_row == 0:
            self._before = self.progress.state_dict(), self.meter.sums()
        self._reason = self._reason_of(result)
        # with fp16, gradients overflow now and then until the loss scale is found
        overflow = all("grad_norm" in culprit for culprit in result.culprits)
        expected = self.accelerator.scaler is not None and overflow
        log = logger.info if expected else logger.warning
        log("step %d is skipped: %s", self.progress.step + 1, self._reason)

    def roll_back(self) -> None:
        """Return to the state before the last steps if these were skipped: they changed only the counters."""
        if self.progress.skipped_in_a_row > 0 and self._before is not None:
            progress, sums = self._before
            self.progress.load_state_dict(progress)
            self.meter.restore(sums)

    def too_many(self, count: int) -> InputError:
        """What ends the run after `count` skipped steps, when it was rolled back."""
        return InputError(
            f"{count} steps in a row had no finite loss and gradient, the last with {self._reason}; the checkpoint of "
            f"before, {checkpoint_name(self.progress.step)}, is kept; lower optimizer.learning_rate, take "
            "mixed_precision=no, or look at those images"
        )

    def _reason_of(self, result: StepResult) -> str:
        """«process 1: lpips_vgg nan on a.png, b.png», for every process where a term was not finite."""
        names = ", ".join(self.source.name(index) for index in result.indices)
        own = [culprit for culprit in result.culprits if not culprit.startswith(DERIVED)]
        where = f"process {self.accelerator.process_index}: "
        found = gather_object([f"{where}{', '.join(own)} on {names}"] if own else [])
        return "; ".join(found or gather_object([f"{where}{', '.join(result.culprits)} on {names}"]))
