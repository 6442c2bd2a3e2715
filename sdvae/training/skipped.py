"""Steps that are skipped because a loss or gradient is not finite: their cause, and the end of a run with too many."""

from __future__ import annotations

import logging
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from sdvae.data import ImageSource
from sdvae.errors import InputError
from sdvae.io import printable
from sdvae.training.checkpoint import checkpoint_name
from sdvae.training.log import Meter
from sdvae.training.state import Progress
from sdvae.training.step import StepResult

logger = logging.getLogger(__name__)

# These are averaged over processes or are sums of other terms. If one process has a fault, they are not finite on any
# process, so they do not show which process it is.
DERIVED = ("grad_norm", "discriminator_grad_norm", "gan_weight", "loss")


class SkippedSteps:
    """Keeps the reason of the last skipped step, and the state before the first of the last skipped steps in a row.

    Args:
        source: training images, whose names are reported.
        progress: the run's progress, whose `skipped_in_a_row` is the count.
        meter: the run's meter, which is restored together with `progress`.
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
        # with fp16, gradients overflow now and then until the loss scale is right
        overflow = all("grad_norm" in culprit for culprit in result.culprits)
        expected = self.accelerator.scaler is not None and overflow
        log = logger.info if expected else logger.warning
        log("step %d is skipped: %s", self.progress.step + 1, self._reason)

    def roll_back(self) -> None:
        """If the last steps were skipped, return to the state before them. They changed only counters."""
        if self.progress.skipped_in_a_row > 0 and self._before is not None:
            progress, sums = self._before
            self.progress.load_state_dict(progress)
            self.meter.restore(sums)

    def too_many(self, count: int) -> InputError:
        """The exception that ends the run after `count` skipped steps, once the run was rolled back."""
        return InputError(
            f"{count} steps in a row had no finite loss and gradient, the last with {self._reason}; the checkpoint "
            f"before them, {checkpoint_name(self.progress.step)}, is kept; lower optimizer.learning_rate, set "
            "mixed_precision=no, or look at those images"
        )

    def _reason_of(self, result: StepResult) -> str:
        """Text such as «process 1: lpips_vgg nan on a.png, b.png», for each process with a term that is not finite."""
        names = ", ".join(printable(self.source.name(index)) for index in result.indices)
        own = [culprit for culprit in result.culprits if not culprit.startswith(DERIVED)]
        where = f"process {self.accelerator.process_index}: "
        found = gather_object([f"{where}{', '.join(own)} on {names}"] if own else [])
        return "; ".join(found or gather_object([f"{where}{', '.join(result.culprits)} on {names}"]))
