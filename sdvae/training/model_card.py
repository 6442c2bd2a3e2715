"""The README.md beside the weights: what the VAE is, its figures, and how to load it.

The Hugging Face hub reads the YAML at the head of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdvae.io import HUB_ID, printable, version
from sdvae.model import AutoencoderKLFlux2, AutoencoderTiny, ConvolutionalVAE
from sdvae.pictures import AMPLIFICATION
from sdvae.training.config import TrainConfig
from sdvae.training.run_folder import to_yaml
from sdvae.training.validation import ValidationResult
from sdvae.weights import export_targets

GRID_NAME = "reconstructions.png"
LDM_NAME = "vae.safetensors"
LOADING, FIGURES, RECIPE = "How to load it", "Figures", "Recipe"  # headings of sections

CARD = """---
library_name: diffusers
{base_model}tags:
- vae
- autoencoder-kl
- sdvae
---

# {title}

An image VAE that compresses {factor}x{factor} pixels to one position of {latent_channels} latent channels
({parameters:.2f} M parameters){maker}. {scaling}.

"""

STUDENT_CARD = """---
library_name: diffusers
{base_model}tags:
- vae
- taesd
- sdvae
---

# {title}

A small, fast encoder and decoder for the latents of `{teacher}` ({parameters:.2f} M parameters together), trained with
sdvae {version}. Its latents are those of a diffusion model: `scaling_factor` is 1, and nothing has to be scaled.

"""

STUDENT_LOADING_TEXT = """Any program that takes diffusers' `AutoencoderTiny` loads this folder:

```python
from diffusers import AutoencoderTiny

student = AutoencoderTiny.from_pretrained("{place}")
pipe.vae = student  # in the pipeline of a diffusion model for the teacher's latents
```
"""

STUDENT_WITH_NORMS_TEXT = """Its blocks have a group norm (`use_midblock_gn`). diffusers' `AutoencoderTiny` says
that it ignores that, and computes other images. sdvae's class, a subclass of it, computes them:

```python
from sdvae import load_vae

pipe.vae = load_vae("{place}")  # in the pipeline of a diffusion model for the teacher's latents
```
"""

STUDENT_OF_BATCH_NORM_TEXT = """The teacher's pipelines read the batch norm of their VAE, which a student has not. So it
serves for previews. Its latents are the normalised ones, with the patches of 2x2 positions undone:

```python
from sdvae import Previews, load_vae

pipe(…, callback_on_step_end=Previews(load_vae("{place}"), show, size=(height, width)))
```
"""

STUDENT_NOTE = """
`psnr` and the like compare the images with what the student decodes from the teacher's latents; `…_to_teacher` compares
the teacher's pictures with it, and `teacher_…` the images with the teacher's pictures. `psnr_round_trip` takes the
latents from the student's own encoder. `latents` is that encoder's mean squared error.
"""

LOADING_TEXT = """Any program that takes diffusers' `{name}` loads {what}:

```python
from diffusers import {name}

vae = {name}.from_pretrained("{place}")
```
"""

CONDITIONAL_TEXT = """It takes class labels, 0 to {last}, which diffusers' `AutoencoderKL` does not:

```python
from sdvae.tutorial.conditional import ConditionalAutoencoderKL

vae = ConditionalAutoencoderKL.from_pretrained("{place}")
posterior = vae.encode(images, labels=labels).latent_dist
```
"""

PADDING_TEXT = """
It was trained with `padding_mode: {mode}`, as its `config.json` says, and sdvae's `load_vae` reads that. diffusers says
that it ignores it, pads with zeros, and gives wrong values at the edges, unless this follows:

```python
import torch

for module in vae.modules():
    if isinstance(module, torch.nn.Conv2d) and any(module.padding):
        module.padding_mode = "{mode}"
```
"""

LOGITS_TEXT = """
Its decoder gives the logits of each pixel's brightness; `sdvae.roundtrip.decode_images` gives images in [-1, 1].
"""

LDM_TEXT = """
`{name}` has the same weights in LDM's layout:

{ways}

These programs take the scaling factor from the diffusion model, which must have been trained on latents of this VAE.
"""

# The name of a program in export_targets -> how its user loads LDM_NAME
LDM_PROGRAMS = {
    "comfyui": "ComfyUI: put it into `models/vae`, and choose it in a «Load VAE» node",
    "a1111": "A1111: put it into `models/VAE`, and choose it as «SD VAE» in the settings",
    "kohya": f"kohya's scripts: `--vae {LDM_NAME}`",
}

FIGURES_TEXT = """![{drawing}]({grid})

{conditions} {count} images of `{source}` at {resolution}x{resolution} pixels (resize, centre crop), reconstructed from
the posterior's mode{with_weights}.

| metric | value |
|---|---|
{table}
{perceptual_note}"""

RANDOM_NOTE = """
`{name}` was computed with a randomly initialised trunk, because the ImageNet weights could not be loaded. It cannot be
compared with published LPIPS values.
"""


def model_card(
    config: TrainConfig, vae: ConvolutionalVAE, result: ValidationResult, *, step: int, images_seen: int
) -> str:
    """Markdown with the figures, the data and the whole recipe.

    Args:
        config: the recipe.
        vae: the VAE with its final scaling.
        result: the validation that is reported.
        step: the number of steps done.
        images_seen: the number of crops that all processes together have trained on.
    """
    figures = figures_text(
        result,
        f"After {step} steps over {images_seen} image crops; means over",
        config.data.validation_source or config.data.source,
        config.data.evaluation_resolution,
        with_weights=", with the EMA weights",
    )
    head = card_head(
        vae,
        title(printable(Path(config.output_dir).resolve().name), vae),
        base_model=base_model(config.fine_tune.source),
        maker=f", trained with sdvae {version()}",
        scaling=scaling_text(vae, is_kept=config.fine_tune.freeze_encoder),
    )
    return head + "\n".join(
        [
            section(LOADING, loading_text(vae, "path/to/this/folder")),
            section(FIGURES, figures),
            section("Data", f"Trained on `{printable(config.data.source)}`{describe_start(config)}.\n"),
            section(RECIPE, f"```yaml\n{to_yaml(config)}```\n"),
        ]
    )


def student_card(
    config: TrainConfig, student: AutoencoderTiny, result: ValidationResult, *, step: int, images_seen: int
) -> str:
    """The card of a student: the figures beside its teacher's, the data and the whole recipe.

    Arguments are those of `model_card`.
    """
    assert config.distil.teacher is not None
    teacher = printable(config.distil.teacher)
    data = config.data
    figures = figures_text(
        result,
        f"After {step} steps over {images_seen} image crops; means over",
        data.validation_source or data.source,
        data.evaluation_resolution,
        drawing=f"original, teacher, student, {AMPLIFICATION} times the difference of the last two",
        with_weights=", with the EMA weights",
    )
    base = base_model(config.distil.teacher)
    head = STUDENT_CARD.format(
        base_model="" if base is None else f"base_model: {base}\n",
        title=f"{printable(Path(config.output_dir).resolve().name)}: a small student of {teacher}",
        teacher=teacher,
        parameters=sum(p.numel() for p in student.parameters()) / 1e6,
        version=version(),
    )
    with_norms = student.config.get("use_midblock_gn", False)
    text = STUDENT_WITH_NORMS_TEXT if with_norms else STUDENT_LOADING_TEXT
    loading = (STUDENT_OF_BATCH_NORM_TEXT if config.model.batch_norm else text).format(place="path/to/this/folder")
    return head + "\n".join(
        [
            section(LOADING, loading),
            section(FIGURES, figures + STUDENT_NOTE),
            section("Data", f"Trained on `{printable(data.source)}`.\n"),
            section(RECIPE, f"```yaml\n{to_yaml(config)}```\n"),
        ]
    )


def card_head(
    vae: ConvolutionalVAE, heading: str, *, base_model: str | None = None, maker: str = "", scaling: str | None = None
) -> str:
    """Everything above the first section."""
    return CARD.format(
        base_model="" if base_model is None else f"base_model: {base_model}\n",
        title=heading,
        factor=vae.spatial_compression_ratio,
        latent_channels=vae.config.latent_channels,
        parameters=sum(p.numel() for p in vae.parameters()) / 1e6,
        maker=maker,
        scaling=scaling or scaling_text(vae),
    )


def scaling_text(vae: ConvolutionalVAE, *, is_kept: bool | None = None) -> str:
    """How a diffusion model has to scale the latents.

    Args:
        vae: the VAE.
        is_kept: whether the scaling is that of a VAE whose encoder it keeps, or was measured in training; None if that
            is not known.
    """
    if isinstance(vae, AutoencoderKLFlux2):
        (p, q), channels = vae.patch_size, vae.bn.num_features
        origin = {
            None: "",
            True: ", whose statistics are those of the VAE it started from",
            False: ", whose statistics are those of the training images",
        }[is_kept]
        return (
            f"Diffusion models take each {p}x{q} positions as one, of {channels} channels, normalised by the batch "
            f"norm `bn`{origin}"
        )
    shift = vae.config.shift_factor
    factor = f"`scaling_factor` {vae.config.scaling_factor:.5f}"
    if vae.config.latents_std is not None:
        return (
            f"{factor}: `latents_mean` and `latents_std` scale each channel to mean 0 and standard deviation 1, in "
            "SDXL's pipelines; others do not read them"
        )
    if is_kept is None:
        return factor
    origin = (
        "that of the VAE it started from, whose latents it keeps"
        if is_kept
        else "1/std of the latents of the training images"
    )
    return f"{factor} is {origin}" + ("" if shift is None else f"; `shift_factor` {shift:.5f} is their mean")


def section(heading: str, text: str) -> str:
    return f"## {heading}\n\n{text}"


def ldm_programs(vae: ConvolutionalVAE) -> list[str]:
    """The programs that can load this VAE from LDM_NAME."""
    targets = export_targets(vae)
    return [program for program in LDM_PROGRAMS if targets[program] is None]


def loading_text(vae: ConvolutionalVAE, place: str, *, what: str = "this folder", programs: Sequence[str] = ()) -> str:
    """How to load the VAE, and what its output means where that is not an image.

    Args:
        vae: the VAE.
        place: its folder, or its id on the hub.
        what: words that say what is loaded.
        programs: keys of LDM_PROGRAMS; only given if the file LDM_NAME lies beside the card.
    """
    classes = vae.config.get("num_classes")
    if classes:
        text = CONDITIONAL_TEXT.format(last=classes - 1, place=place)
    else:
        text = LOADING_TEXT.format(name=type(vae).__name__, what=what, place=place)
    if not classes and vae.padding_mode != "zeros":
        text += PADDING_TEXT.format(mode=vae.padding_mode)
    if vae.likelihood == "bernoulli":
        text += LOGITS_TEXT
    if programs:
        text += LDM_TEXT.format(name=LDM_NAME, ways="\n".join(f"- {LDM_PROGRAMS[program]}" for program in programs))
    return text


def figures_text(
    result: ValidationResult,
    conditions: str,
    source: str,
    resolution: int,
    *,
    drawing: str = f"original, reconstruction, {AMPLIFICATION} times their difference",
    with_weights: str = "",
) -> str:
    """The section with the grid of images and the table of figures.

    Args:
        result: the validation with the figures.
        conditions: the beginning of the sentence below the grid, up to «means over».
        source: where the images come from.
        resolution: side of the images, in pixels.
        drawing: the columns of the grid, in words.
        with_weights: the end of that sentence.
    """
    random_names = [name for name in result.metrics if name.endswith("_random")]
    return FIGURES_TEXT.format(
        drawing=drawing,
        grid=GRID_NAME,
        conditions=conditions,
        count=len(result.per_image),
        source=printable(source),
        resolution=resolution,
        with_weights=with_weights,
        table="\n".join(
            f"| {name} | {value if isinstance(value, int) else format(value, '#.4g')} |"
            for name, value in result.metrics.items()
            if not name.startswith("channel_kl")
        ),
        perceptual_note="".join(RANDOM_NOTE.format(name=name) for name in random_names),
    )


def base_model(source: str | None) -> str | None:
    """The hub id in `source`, which the hub shows as the model's origin; None for a file, a folder or no source."""
    if source is None or Path(source).expanduser().exists() or not HUB_ID.fullmatch(source):
        return None
    return source


def describe_start(config: TrainConfig) -> str:
    """Text such as «, starting from `stabilityai/sd-vae-ft-mse` with its encoder frozen», or an empty string."""
    if config.fine_tune.source is None:
        return ""
    frozen = " with its encoder frozen" if config.fine_tune.freeze_encoder else ""
    return f", starting from `{config.fine_tune.source}`{frozen}"


def title(name: str, vae: ConvolutionalVAE) -> str:
    """A title such as «quickstart: an f8, 4-channel image VAE»."""
    return f"{name}: an f{vae.spatial_compression_ratio}, {vae.config.latent_channels}-channel image VAE"
