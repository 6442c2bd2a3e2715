"""The pictures that the page shows: the worst, the best and the first images. No others are kept in memory."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from sdvae.data import to_image

EXTREMES = 3  # how many of the worst images, and of the best, are shown large
PICTURE_BYTES = 9_000_000  # size of all pictures in the page, which in base64 is 12 MB


@dataclass(frozen=True)
class Picture:
    """An image and its reconstruction, in 8 bits, compressed without loss.

    Attributes:
        name: the image's name.
        original: a WebP file.
        reconstruction: a WebP file.
        figures: the figures of `image_figures`.
    """

    name: str
    original: bytes
    reconstruction: bytes
    figures: dict[str, float]

    @property
    def size(self) -> int:
        """The size of both files together, in bytes."""
        return len(self.original) + len(self.reconstruction)


class Gallery:
    """The images that the page may show. They are added one by one, and memory does not grow with their number.

    It keeps the first images, up to PICTURE_BYTES, and the EXTREMES worst and best images so far.

    Args:
        ranked_by: the figure that says how good a reconstruction is: «psnr», or the name of a distance.

    Attributes:
        images: the number of images that were added.
        pictures: place in the data -> picture, of the images that are kept.
    """

    def __init__(self, ranked_by: str):
        self.ranked_by = ranked_by
        self.images = 0
        self.pictures: dict[int, Picture] = {}
        self._badness: dict[int, float] = {}  # of the extremes, by place; larger is worse
        self._first = 0  # pictures before this place are kept because they came early
        self._room = PICTURE_BYTES

    def add(self, name: str, original: Tensor, reconstruction: Tensor, figures: dict[str, float]) -> None:
        """Add the next image.

        Args:
            name: the image's name.
            original: (C, H, W) in [-1, 1]; it is compressed only if it is kept.
            reconstruction: the same shape.
            figures: the figures of `image_figures`.
        """
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
        """Places of the extremes, the best first. If two are equal, the earlier comes first."""
        return sorted(self._badness, key=self._badness.__getitem__)

    def extremes(self) -> tuple[list[int], list[int]]:
        """Places of the worst, worst first, and places of the best, best first. No image is in both."""
        best_first = self.best_first()
        some = min(EXTREMES, (len(best_first) + 1) // 2)
        worst = best_first[::-1][:some]
        return worst, [place for place in best_first[:some] if place not in worst]

    def shown(self) -> dict[int, Picture]:
        """The pictures on the page, in the order of the data: all extremes, and first images up to PICTURE_BYTES."""
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
    """A lossless WebP file, a third smaller than PNG. A lossy file would add artefacts to those of the VAE."""
    buffer = io.BytesIO()
    # measured: quality 100 and method 6 take 60 times as long for files 4 % smaller
    image.save(buffer, format="WEBP", lossless=True, quality=50, method=3)
    return buffer.getvalue()
