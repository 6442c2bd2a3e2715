"""Train the VAE of the usual tutorials on MNIST: an MLP, binary cross-entropy + KL, Adam at 1e-3, 20 epochs.

    python scripts/mnist_baseline.py --train ylecun/mnist --test ylecun/mnist [--labels]

The layers are 784-400-20-400-784. Takes two to three minutes of one CPU core. With `--labels`, encoder and decoder also
get the digit, one-hot. The model has the methods of `sdvae.AutoencoderKL` that sdvae/tutorial/likelihood.py calls, so
that scripts/mnist.py measures both in the same way.
"""

from __future__ import annotations

import argparse
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from sdvae.data import EvaluationImages, ReadOptions, evaluation_loader, open_source
from sdvae.data.dataset import read_labels
from sdvae.errors import exit_code
from sdvae.model import DiagonalGaussian
from sdvae.tutorial.likelihood import bernoulli_nll, elbo, probabilities

SIDE, PIXELS, HIDDEN, LATENTS, CLASSES = 28, 784, 400, 20, 10
BATCH, LEARNING_RATE = 64, 1e-3


class TutorialVAE(nn.Module):
    """x (784), y (10) -> 400, relu -> mean and log-variance (20 each); z (20), y (10) -> 400, relu -> logits (784)."""

    spatial_compression_ratio = SIDE  # an image has one position of latents
    config = SimpleNamespace(latent_channels=LATENTS)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, conditional: bool):
        super().__init__()
        self.classes = CLASSES if conditional else 0
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS + self.classes, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENTS)
        )
        self.decoder = nn.Sequential(nn.Linear(LATENTS + self.classes, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))

    def encode(self, images: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        x = self._with_label(probabilities(images).flatten(1), labels)
        return SimpleNamespace(latent_dist=DiagonalGaussian(self.encoder(x)[:, :, None, None]))

    def decode(self, z: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.decoder(self._with_label(z.flatten(1), labels))
        return SimpleNamespace(sample=logits.view(-1, 1, SIDE, SIDE))

    def _with_label(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return x if labels is None else torch.cat([x, F.one_hot(labels, CLASSES).to(x)], dim=1)


def train_baseline(images: Tensor, labels: Tensor | None, epochs: int, seed: int = 0) -> TutorialVAE:
    """Train a new model and print the mean loss of each epoch.

    Args:
        images: (N, 1, 28, 28) in [-1, 1].
        labels: (N,), or None for the VAE without labels.
        epochs: passes over the images.
        seed: of the weights, the order and the noise.
    """
    torch.manual_seed(seed)
    vae = TutorialVAE(labels is not None)
    optimizer = torch.optim.Adam(vae.parameters(), LEARNING_RATE)
    for epoch in range(1, epochs + 1):
        start, total = time.perf_counter(), 0.0
        for batch in torch.randperm(len(images)).split(BATCH):
            x, y = images[batch], None if labels is None else labels[batch]
            posterior = vae.encode(x, y).latent_dist
            loss = (bernoulli_nll(x, vae.decode(posterior.sample(), y).sample) + posterior.kl()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch}: {total / len(images):.2f} nats, {time.perf_counter() - start:.0f} s", flush=True)
    return vae.eval()


@torch.no_grad()
def mean_nelbo(vae: TutorialVAE, images: Tensor, labels: Tensor | None) -> float:
    """Mean of -ELBO in nats per image, with one posterior sample each."""
    parts = range(0, len(images), 1000)
    pairs = [(images[i : i + 1000], None if labels is None else labels[i : i + 1000]) for i in parts]
    return float(torch.cat([elbo(vae, x, y).nelbo for x, y in pairs]).mean())


def load_digits(source: str, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Read digits.

    Args:
        source: a data set, as `data.source` takes it.
        split: of the data set, all of which is used if it has no splits.
        limit: read at most this many; None reads all.

    Returns:
        (N, 1, 28, 28) images in [-1, 1], and (N,) labels.
    """
    opened = open_source(source, split=split, or_all=True)
    count = min(limit or len(opened), len(opened))
    labels = torch.from_numpy(read_labels(opened, "label", CLASSES))[:count]
    dataset = EvaluationImages(opened, SIDE, ReadOptions(channels=1, min_side=1))
    batches = evaluation_loader(dataset, range(count), batch_size=1000, num_workers=0)
    return torch.cat([batch["image"] for batch in batches]), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", default="ylecun/mnist", help="training images, as data.source takes them")
    parser.add_argument("--test", default="ylecun/mnist", help="test images, as data.source takes them")
    parser.add_argument("--epochs", type=PositiveInt, default=20)
    parser.add_argument("--labels", action="store_true", help="give the digit to encoder and decoder")
    arguments = parser.parse_args()
    images, labels = load_digits(arguments.train, "train")
    vae = train_baseline(images, labels if arguments.labels else None, arguments.epochs)
    images, labels = load_digits(arguments.test, "test")
    print(f"test: {mean_nelbo(vae, images, labels if arguments.labels else None):.2f} nats")


if __name__ == "__main__":
    sys.exit(exit_code("mnist_baseline", main))
