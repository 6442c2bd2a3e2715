"""Which pictures the page can show: the worst, the best and the first ones, and no more than those in memory."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from sdvae.data import to_image

EXTREMES = 3  # worst images, and best, that are shown large
PICTURE_BYTES = 9_000_000  # of all images in the page; base64 makes 12 MB of them


@dataclass(frozen=True)
class Picture:
    """One image, with its figures, and itself as it is shown: 8 bits, compressed without loss."""

    name: str
    original: bytes  # WebP
    reconstruction: bytes  # WebP
    figures: dict[str, float]
    """Those of `image_figures`."""

    @property
    def size(self) -> int:
        return len(self.original) + len(self.reconstruction)


class Gallery:
    """Takes images one by one and keeps those that can be on the page, so that memory does not grow with their number.

    These are the first ones while PICTURE_BYTES last, and up to EXTREMES of the worst and of the best so far.

    Args: ranked_by: the figure by which images are good or bad: «psnr», or that of a distance.

    Attributes: pictures: those kept, by their place in the data.
    """

    def __init__(self, ranked_by: str):
        self.ranked_by = ranked_by
        self.images = 0
        self.pictures: dict[int, Picture] = {}
        self._badness: dict[int, float] = {}  # of the extremes, by place
        self._first = 0  # pictures that are kept for being early
        self._room = PICTURE_BYTES

    def add(self, name: str, original: Tensor, reconstruction: Tensor, figures: dict[str, float]) -> None:
        """Args: original, reconstruction: (C, H, W) in [-1, 1]; they are compressed only where they are kept."""
        place, self.images = self.images, self.images + 1
        figure = figures[self.ranked_by]
        self._badness[place] = -figure if self.ranked_by == "psnr" else figure
        gone = [place, *self.best_first()[EXTREMES:-EXTREMES]]
        for middling in gone[1:]:
            del self._badness[middling]
        if self._room >= 0 or place in self._badness:
            picture = Picture(name, webp(to_image(original)), webp(to_image(reconstruction)), figures)
            self.pictures[place] = picture
            self._room -= picture.size
            if self._room >= 0:
                self._first = place + 1
        for other in gone:
            if other >= self._first and other not in self._badness:
                self.pictures.pop(other, None)

    def best_first(self) -> list[int]:
        """Places of the extremes; of equals the earlier one is the better."""
        return sorted(self._badness, key=self._badness.__getitem__)

    def extremes(self) -> tuple[list[int], list[int]]:
        """Places of the worst, worst first, and of the best, best first; none is in both."""
        best_first = self.best_first()
        some = min(EXTREMES, (len(best_first) + 1) // 2)
        worst = best_first[::-1][:some]
        return worst, [place for place in best_first[:some] if place not in worst]

    def shown(self) -> dict[int, Picture]:
        """In the order of the data: the extremes in any case, the first others while PICTURE_BYTES last."""
        chosen: list[int] = []
        room = PICTURE_BYTES
        extremes = [place for places in self.extremes() for place in places]
        for place in [*extremes, *(place for place in sorted(self.pictures) if place not in extremes)]:
            room -= self.pictures[place].size
            if room < 0 and place not in extremes:
                break
            chosen.append(place)
        return {place: self.pictures[place] for place in sorted(chosen)}


def webp(image: Image.Image) -> bytes:
    """Without loss: artefacts of the VAE are what is looked for, and none may be added. A third below PNG's size."""
    buffer = io.BytesIO()
    # measured: quality 100 and method 6 take 60 times as long for 4 % less
    image.save(buffer, format="WEBP", lossless=True, quality=50, method=3)
    return buffer.getvalue()
