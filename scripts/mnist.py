"""Train the VAEs of the usual tutorials on MNIST beside those of this package, and show what beta does.

    python scripts/mnist.py [--output runs/mnist] [--train ylecun/mnist] [--test ylecun/mnist] [--parts table sweep …]

docs/vae.md explains the results. --parts chooses among:

- table: the tutorials' MLP (scripts/mnist_baseline.py), configs/mnist_vae.yaml and configs/mnist_cvae.yaml, each
  trained for 20 epochs with a batch of 64 and measured on the whole test set. Writes table.md.
- digits: the conditional VAE draws each digit from the prior with three strengths of guidance. Measures how many of
  them a classifier of real digits recognises, and how much digits of one class differ. Writes digits.png, which shows
  those without guidance.
- sweep: rate and distortion of short runs with different betas. Writes rate_distortion.png.
- collapse: a recipe whose posterior collapses, alone, with KL warm-up and with free bits. Writes collapse.png.

All numbers are also written to OUTPUT/figures.json. The same command continues an interrupted run and does not repeat
what is finished. Further options are passed to `sdvae train` in every run: --steps 1000, --data.num_workers 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mnist_baseline import BATCH, CLASSES, SIDE, TutorialVAE, load_digits, train_baseline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdvae import AutoencoderKL
from sdvae.cli import parse_train_config
from sdvae.errors import exit_code
from sdvae.io import replacing
from sdvae.pictures import tile_grid
from sdvae.training.loop import train
from sdvae.tutorial.conditional import ConditionalAutoencoderKL
from sdvae.tutorial.likelihood import draw_from_prior, elbo, log_likelihood

ROOT = Path(__file__).parents[1]
PARTS = ("table", "digits", "sweep", "collapse")
MODELS = {
    "mlp": "tutorials' MLP",
    "mlp_labels": "tutorials' MLP, given the label",
    "vae": "`mnist_vae.yaml`",
    "cvae": "`mnist_cvae.yaml`, given the label",
    "cvae_null": "the same model without label",
}
GUIDANCE = (1.0, 1.5, 2.0)
BETAS = (0.1, 0.3, 1.0, 3.0, 10.0)
# A narrow network: with its initial weights, the KL term acts before any signal of the image reaches the decoder.
COLLAPSING = {
    "loss.kl_weight": 3,
    "model.initialisation": "torch",
    "model.block_out_channels": [4, 8, 16],
    "model.latent_channels": 4,
}
WARM_UP = 0.75  # share of the run's steps
FREE_NATS = 0.5  # per latent channel


def trained(recipe: str, output: Path, options: Sequence[str], **changes: object) -> tuple[AutoencoderKL, list[dict]]:
    """Train a recipe, continue its training, or read the finished VAE; with the lines of its log."""
    given = [f"--{key}={value}" for key, value in changes.items()]
    config = parse_train_config(
        ["--config", str(ROOT / "configs" / f"{recipe}.yaml"), f"--output_dir={output}", *options, *given]
    )
    model = train(config)
    kind = ConditionalAutoencoderKL if config.model.num_classes else AutoencoderKL
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return kind.from_pretrained(model).eval(), lines


def baseline(conditional: bool, arguments: argparse.Namespace) -> TutorialVAE:
    """The tutorials' MLP: read from OUTPUT if it was trained before, else trained."""
    path = arguments.output / ("mlp_labels.safetensors" if conditional else "mlp.safetensors")
    if path.is_file():
        vae = TutorialVAE(conditional)
        vae.load_state_dict(load_file(path))
        return vae.eval()
    images, labels = load_digits(arguments.train, "train")
    vae = train_baseline(images, labels if conditional else None, arguments.baseline_epochs)
    with replacing(path) as temporary:
        save_file(vae.state_dict(), temporary)
    return vae


def parts(images: Tensor, labels: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(images), size):
        yield images[start : start + size], None if labels is None else labels[start : start + size]


@torch.no_grad()
def measure(vae: Any, images: Tensor, labels: Tensor | None, weighted: int, samples: int) -> dict[str, float]:
    """Means over images, in nats per image, and the number of parameters.

    `minus_log_p` is estimated on the first `weighted` images, with `samples` samples each. `at_mean` is the test loss
    of the tutorials, which decodes the posterior's mean (see `sample_posterior` of `elbo`).
    """
    generator = torch.Generator().manual_seed(0)
    terms = [elbo(vae, x, y, generator) for x, y in parts(images, labels, 500)]
    at_mean = [elbo(vae, x, y, sample_posterior=False).nelbo for x, y in parts(images, labels, 500)]
    first = parts(images[:weighted], None if labels is None else labels[:weighted], 500)
    likelihood = [log_likelihood(vae, x, y, samples=samples, generator=generator) for x, y in first]
    return {
        "distortion": float(torch.cat([term.distortion for term in terms]).mean()),
        "rate": float(torch.cat([term.rate for term in terms]).mean()),
        "nelbo": float(torch.cat([term.nelbo for term in terms]).mean()),
        "minus_log_p": -float(torch.cat(likelihood).mean()),
        "at_mean": float(torch.cat(at_mean).mean()),
        "parameters": sum(p.numel() for p in vae.parameters()),
    }


def model_of(name: str, arguments: argparse.Namespace) -> tuple[Any, bool]:
    """A model of the table, and whether it is given the label."""
    if name.startswith("mlp"):
        return baseline(name == "mlp_labels", arguments), name == "mlp_labels"
    recipe = name.removesuffix("_null")
    return trained(f"mnist_{recipe}", arguments.output / recipe, arguments.options)[0], name == "cvae"


def table(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure the chosen models on the test set, one row each."""
    x, y = load_digits(arguments.test, "test", arguments.test_images)
    rows = {}
    for name in arguments.models:
        vae, labelled = model_of(name, arguments)
        rows[name] = measure(vae, x, y if labelled else None, arguments.iw_images, arguments.iw_samples)
    columns = ["", "parameters", "distortion", "rate", "-ELBO", f"-log p, {arguments.iw_samples} samples", "at z = μ"]
    head = f"| {' | '.join(columns)} |\n{len(columns) * '|---'}|\n"
    lines = [
        f"| {MODELS[name]} | {row['parameters']:,} | {row['distortion']:.2f} | {row['rate']:.2f} | "
        f"{row['nelbo']:.2f} | {row['minus_log_p']:.2f} | {row['at_mean']:.2f} |\n"
        for name, row in rows.items()
    ]
    (arguments.output / "table.md").write_text(head + "".join(lines), encoding="utf-8")
    print(head + "".join(lines))
    return rows


def new_classifier() -> nn.Sequential:
    """(B, 1, 28, 28) -> (B, 10) logits."""
    layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, CLASSES))


def train_classifier(images: Tensor, labels: Tensor, epochs: int) -> nn.Sequential:
    torch.manual_seed(0)
    classifier = new_classifier()
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(classifier(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval()


def diversity(images: Tensor, labels: Tensor) -> float:
    """Mean Euclidean distance of two pictures of a class, with values in [0, 1]: over pairs, then over classes."""
    flat = images.flatten(1) / 2
    return float(torch.stack([torch.pdist(flat[labels == c]).mean() for c in range(CLASSES)]).mean())


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    hits = [classifier(x).argmax(1) == y for x, y in parts(images, labels, 1000)]
    return float(torch.cat(hits).float().mean())


def digits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw digits from the prior, and measure how many are recognised and how much they differ."""
    vae, _ = trained("mnist_cvae", arguments.output / "cvae", arguments.options)
    classifier = train_classifier(*load_digits(arguments.train, "train"), epochs=arguments.classifier_epochs)
    x, y = load_digits(arguments.test, "test", arguments.test_images)
    found: dict[str, Any] = {"test": {"recognised": accuracy(classifier, x, y), "diversity": diversity(x, y)}}
    found["drawn"] = {}
    labels = torch.arange(CLASSES).repeat(arguments.drawn)
    for guidance in GUIDANCE:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            batches = [draw_from_prior(vae, len(y), SIDE, y, generator, guidance) for y in labels.split(500)]
        drawn = torch.cat(batches)
        found["drawn"][f"{guidance:g}"] = {
            "recognised": accuracy(classifier, drawn, labels),
            "diversity": diversity(drawn, labels),
        }
        if guidance == 1:
            large = drawn[: 10 * CLASSES].repeat_interleave(2, 2).repeat_interleave(2, 3)
            rows = [list(row) for row in large.split(CLASSES)]
            tile_grid(rows, [str(c) for c in range(CLASSES)]).save(arguments.output / "digits.png")
    print(found)
    return found


def short(
    arguments: argparse.Namespace, name: str, steps: int, **changes: object
) -> tuple[dict[str, float], list[dict]]:
    """A short run of the VAE without labels: its measurements on test images, and its log."""
    changes |= {"steps": steps, "validate_every": steps, "checkpoint.every_steps": steps}
    changes |= {"data.validation_count": arguments.iw_images}
    vae, lines = trained("mnist_vae", arguments.output / name, arguments.options, log_every=10, **changes)
    x, _ = load_digits(arguments.test, "test", arguments.iw_images)
    return measure(vae, x, None, 1, 1), lines


def sweep(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    steps = arguments.short_steps
    found = {f"{beta:g}": short(arguments, f"beta-{beta:g}", steps, **{"loss.kl_weight": beta})[0] for beta in BETAS}
    draw_rate_distortion(found, arguments.output / "rate_distortion.png", arguments.short_steps)
    print({beta: {key: round(row[key], 2) for key in ("rate", "distortion", "nelbo")} for beta, row in found.items()})
    return found


def draw_rate_distortion(found: dict[str, dict[str, float]], png: Path, steps: int) -> None:
    """Plot distortion over rate, one point per beta. All points on the dashed line have the best ELBO found."""
    figure = Figure(figsize=(5.2, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates, distortions = ([row[key] for row in found.values()] for key in ("rate", "distortion"))
    best = min(row["nelbo"] for row in found.values())
    ends = [0.0, 1.05 * max(rates)]
    axes.plot(
        ends, [best - rate for rate in ends], "--", color="grey", linewidth=1, label=f"rate + distortion = {best:.1f}"
    )
    axes.plot(rates, distortions, "o-", markersize=5)
    for beta, rate, distortion in zip(found, rates, distortions, strict=True):
        axes.annotate(f"β = {beta}", (rate, distortion), xytext=(6, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="rate: KL(q(z|x) || p(z)), nats an image", ylabel="distortion: -log p(x|z), nats an image")
    axes.set_title(f"{steps} steps each, test digits", fontsize=10)
    axes.margins(x=0.12, y=0.1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(png)


def collapse(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    cures: dict[str, dict[str, object]] = {
        "no cure": {},
        "KL warm-up": {"loss.kl_warmup_steps": round(WARM_UP * arguments.collapse_steps)},
        "free bits": {"loss.free_bits": FREE_NATS},
    }
    found, logs = {}, {}
    for name, cure in cures.items():
        folder = f"collapse-{name.replace(' ', '-')}"
        found[name], logs[name] = short(arguments, folder, arguments.collapse_steps, **COLLAPSING, **cure)
    draw_collapse(logs, arguments.output / "collapse.png")
    print({name: {key: round(row[key], 2) for key in ("rate", "distortion", "nelbo")} for name, row in found.items()})
    return found


def draw_collapse(logs: dict[str, list[dict]], png: Path) -> None:
    """Plot the KL of the training batches over the steps."""
    figure = Figure(figsize=(5.2, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, lines in logs.items():
        training = [line for line in lines if "train/kl" in line]
        axes.plot([line["step"] for line in training], [line["train/kl"] * SIDE**2 for line in training], label=name)
    axes.set(xlabel="step", ylabel="KL, nats an image", title="β = 3, torch's initial weights")
    axes.set_ylim(bottom=-0.3)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(png)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/mnist"), help="folder for everything")
    parser.add_argument("--train", default="ylecun/mnist", help="training images, as data.source takes them")
    parser.add_argument("--test", default="ylecun/mnist", help="test images, as data.source takes them")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS), help="rows of the table")
    parser.add_argument("--baseline_epochs", type=PositiveInt, default=20)
    parser.add_argument("--classifier_epochs", type=PositiveInt, default=3)
    parser.add_argument("--short_steps", type=PositiveInt, default=500, help="steps of each run of the sweep")
    parser.add_argument("--collapse_steps", type=PositiveInt, default=300, help="steps of each run of the collapse")
    parser.add_argument("--test_images", type=PositiveInt, default=10_000)
    parser.add_argument(
        "--iw_images", type=PositiveInt, default=1000, help="test images for log p(x) and the short runs"
    )
    parser.add_argument("--iw_samples", type=PositiveInt, default=200, help="K of the importance-weighted estimate")
    parser.add_argument("--drawn", type=PositiveInt, default=200, help="digits of each class to draw")
    arguments, options = parser.parse_known_args(argv)
    sources = [f"--data.source={arguments.train}", f"--data.validation_source={arguments.test}", "--trackers=[]"]
    arguments.options = [*sources, *options]
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "figures.json"
    figures = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    run: dict[str, Callable[[argparse.Namespace], Any]] = {
        "table": table,
        "digits": digits,
        "sweep": sweep,
        "collapse": collapse,
    }
    for part in arguments.parts:
        figures[part] = run[part](arguments)
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code("mnist", main))
