"""Loading a Stable Diffusion VAE, a student of one, or another autoencoder, from any form in which it is published."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from sdvae.errors import InputError, first_few, one_line
from sdvae.io import HUB_ID, read_json
from sdvae.model import (
    AnyAutoencoder,
    Autoencoder,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderTiny,
    ConvolutionalVAE,
    StockAutoencoder,
)
from sdvae.model.kinds import KINDS
from sdvae.model.state import COUNTER, is_network, unwrapped_name, widened
from sdvae.model.stock import STOCK_KINDS
from sdvae.runtime import DTYPES, dtype_named
from sdvae.weights.config import checked_config, config_in, infer_config, kind_of, read_config
from sdvae.weights.family import REFLECTING
from sdvae.weights.names import from_ldm, has_batch_norm, is_diffusers_layout, modern_names
from sdvae.weights.read import (
    WEIGHT_DTYPES,
    WEIGHT_SUFFIXES,
    check_tensors,
    is_weight_file,
    misfits,
    read_metadata,
    read_weights,
)
from sdvae.weights.tiny import from_taesd, infer_tiny_config, is_half, is_tiny, pair_of

log = logging.getLogger(__name__)

# Prefixes of the VAE's keys: in full SD checkpoints, in some repacked ones, and in files that hold only a VAE.
PREFIXES = ("first_stage_model.", "vae.", "")
FIRST_KEYS = ("encoder.conv_in.weight", "decoder.conv_in.weight")  # show the prefixes that other programs give
# What LDM's training stores beside the VAE: discriminator, LPIPS and logvar; the EMA copy; the step.
NO_WEIGHTS = ("loss.", "model_ema.", "global_step")
STEM = "diffusion_pytorch_model"  # diffusers' name for the file of weights, without its ending
PACKAGED_VAE = Path(__file__).parents[1] / "pretrained" / "small_f8c4"
PACKAGED_STUDENT = PACKAGED_VAE.with_name("small_f8c4_student")


def load_vae(
    source: str | Path | None = None,
    *,
    subfolder: str | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    dtype: torch.dtype | str = "fp32",
    variant: str | None = None,
) -> Autoencoder:
    """Load a VAE or a student of one, in evaluation mode, on the CPU.

    A student is an `AutoencoderTiny`: `encode(x).latents` are its latents, already scaled. `load_kl` loads only VAEs
    with a posterior.

    Args:
        source: one of
            - a folder: a VAE in diffusers' format, a whole pipeline (its vae/ is used) or a training run (its model/);
            - a single file (.safetensors, .sft, .ckpt, .pt, .pth, .bin) in LDM's or diffusers' layout: the VAE
              alone or a full checkpoint, also one of a model that was compiled or wrapped for DDP;
            - for a student, either file of a pair such as taesd_encoder.pth and taesd_decoder.pth in one folder;
            - the id of a repository on the Hugging Face hub;
            - None: the small VAE that comes with this package (f8, 4 channels), which needs no download.
        subfolder: the folder inside the source that holds the VAE.
        config: keys that replace those of config.json, or those inferred from the shapes in a single file; a dict or
            the path of a config.json. A single file may not tell SDXL's scaling factor (0.13025) from SD's, or SD3's
            from Flux's; then a warning says what was assumed. It does not give the number of groups when a width is
            not a multiple of 32. Only sdvae's own files say that a VAE pads by reflection; for others give
            `padding_mode`.
        dtype: the dtype of the weights: a torch.dtype, its name ("fp16" or "float16"), or "file" to keep the file's own
            (the widest, if it has several; bfloat16 for weights of 8 bits, which it holds exactly). Half precision
            halves the memory, but a CPU lacks it for many operations.
        variant: which weights of a folder to read, such as "fp16" for diffusion_pytorch_model.fp16.safetensors. By
            default those without a variant, or the only one there is.

    Returns:
        The model.

    Raises:
        InputError: when the source is missing, damaged, holds code, or its weights are not exactly those of its
            configuration, all of them floating and finite in `dtype`. Nothing is loaded in part.
    """
    vae = _load(source, KINDS, subfolder, config, dtype, variant)
    assert not isinstance(vae, StockAutoencoder)
    return vae


def load_autoencoder(
    source: str | Path | None = None,
    *,
    subfolder: str | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    dtype: torch.dtype | str = "fp32",
    variant: str | None = None,
) -> AnyAutoencoder:
    """`load_vae`, also for other classes of diffusers, for measuring, reconstructing and encoding.

    Those classes are the keys of `sdvae.model.stock.USES`. They are read from folders and hub ids alone, and come in a
    `StockAutoencoder`. The arguments and errors are those of `load_vae`.
    """
    return _load(source, {**KINDS, **STOCK_KINDS}, subfolder, config, dtype, variant)


def _load(
    source: str | Path | None,
    kinds: Mapping[str, type[Any]],
    subfolder: str | None,
    config: Mapping[str, Any] | str | Path | None,
    dtype: torch.dtype | str,
    variant: str | None,
) -> AnyAutoencoder:
    """`load_vae`, for classes of `kinds`."""
    wanted = None if dtype == "file" else dtype_named(dtype) if isinstance(dtype, str) else dtype
    if dtype != "file" and wanted not in WEIGHT_DTYPES:
        raise InputError(f"got dtype={dtype!r}; need one of {', '.join(DTYPES)}, file, or their torch.dtype")
    path = PACKAGED_VAE if source is None else Path(source).expanduser()
    if not path.exists() and not is_weight_file(path):
        path = _download(str(source), subfolder, variant)
    if path.is_dir():
        folder = _model_folder(path, subfolder)
        # read before the weights, so that the folder of another class is refused because of its class, not its keys
        content, where = read_json(folder / "config.json"), str(folder / "config.json")
        kind = kind_of(content, where, kinds)
        settings = {**checked_config(content, where, kind), **read_config(config, kind)}
        origin = str(folder)
        weights = _read_folder(folder, variant)
        if kind.__name__ not in KINDS:
            return StockAutoencoder(_build_stock(kind, settings, modern_names(weights), origin, wanted)).eval()
        extra = _extra(weights, origin)
        weights = _standard_names({key: weight for key, weight in weights.items() if key not in extra}, origin)
    else:
        if subfolder is not None:
            raise InputError(f"got subfolder={subfolder!r} with the single file {path}; need a folder; leave it out")
        if variant is not None:
            raise InputError(f"got variant={variant!r} with the single file {path}; need a folder; leave it out")
        origin = str(path)
        keys: list[str] = []

        def pick(names: list[str]) -> dict[str, str]:
            keys.extend(map(unwrapped_name, names))
            return _unwrapped(names) if is_half(keys) else _pick_vae(names, origin)

        weights = read_weights(path, pick)
        if is_half(weights):
            pair = {
                part: weights if file == path else read_weights(file, _unwrapped)
                for part, file in pair_of(path).items()
            }
            weights = {key: weight for part in pair for key, weight in from_taesd(pair[part], part).items()}
        weights = _standard_names(weights, origin)
        kind = AutoencoderTiny if is_tiny(weights) else AutoencoderKLFlux2 if has_batch_norm(weights) else AutoencoderKL
        given = read_config(config, kind)
        if kind is AutoencoderTiny:
            settings = infer_tiny_config(weights, given, origin)
        else:
            metadata = read_metadata(path)
            given = {**config_in(metadata, origin, kind), **given}
            settings = infer_config(weights, given, origin, keys=keys, metadata=metadata)
    if kind is AutoencoderKL and "padding_mode" not in settings and REFLECTING.search(f"{source} {origin}"):
        log.warning(
            "%s: VAEs of this name were trained with reflect padding, and nothing here says so. Zeros are assumed; for "
            "reflection give {'padding_mode': 'reflect'} as config= (sdvae export: --config FILE.json)",
            origin,
        )
    return _build(kind, settings, weights, origin, wanted)


def load_kl(*args: Any, **kwargs: Any) -> ConvolutionalVAE:
    """`load_vae`, with the same arguments, for what needs a posterior: training, fp16, exploring the latent space.

    Raises:
        InputError: as `load_vae` does, and for a student.
    """
    vae = load_vae(*args, **kwargs)
    if not isinstance(vae, ConvolutionalVAE):
        name = args[0] if args else kwargs.get("source")
        raise InputError(f"{name} is a student ({type(vae).__name__}), without a posterior; need an AutoencoderKL")
    return vae


def _build(
    kind: type[Autoencoder],
    settings: Mapping[str, Any],
    weights: dict[str, Tensor],
    origin: str,
    dtype: torch.dtype | None,
) -> Autoencoder:
    shape = {key: value for key, value in settings.items() if not key.startswith("_")}
    with torch.device("meta"):  # only shapes: no memory, no random initialisation
        vae = kind(**shape)
    if isinstance(vae, ConvolutionalVAE):
        vae.set_likelihood(settings.get("_likelihood", "gaussian"))
    _give(vae, weights, origin, dtype)
    return vae.eval()


def _build_stock(
    kind: type[nn.Module],
    settings: Mapping[str, Any],
    weights: dict[str, Tensor],
    origin: str,
    dtype: torch.dtype | None,
) -> nn.Module:
    """An instance of diffusers' own class."""
    parameters = inspect.signature(kind.__init__).parameters
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in ("self", *settings)]
    if missing:
        raise InputError(f"{origin} has a config.json without {', '.join(missing)}; get a whole copy")
    try:
        with torch.device("meta"):
            network = kind(**settings)
    except (TypeError, ValueError, KeyError, IndexError) as error:  # diffusers checks little of a config by itself
        raise InputError(
            f"diffusers cannot build an {kind.__name__} of {origin}'s config.json ({one_line(error)[:200]}); correct it"
        ) from error
    _give(network, weights, origin, dtype)
    return network


def _give(vae: nn.Module, weights: dict[str, Tensor], origin: str, dtype: torch.dtype | None) -> None:
    """Give a model without data its weights, in `dtype` or the widest that they have.

    Raises:
        InputError: when they are not those of the model, or not finite.
    """
    expected = vae.state_dict()
    if COUNTER in expected:  # some files lack it, and others have it in the dtype of the weights
        weights[COUNTER] = weights.get(COUNTER, torch.zeros(())).long()
    for key, weight in weights.items():
        weights[key] = _reshaped(widened(weight), expected.get(key))
    check_fit(expected, weights, origin)
    counters = {key: weights.pop(key) for key in expected if key.endswith(".num_batches_tracked")}  # of batch norms
    check_tensors(weights, origin)
    widest = reduce(torch.promote_types, {weight.dtype for weight in weights.values()})
    for key in weights:  # one at a time: each is freed before the next is converted
        weights[key] = weights[key].to(dtype or widest).contiguous()
    if dtype not in (None, widest):
        check_tensors(weights, f"{origin} as {dtype}")  # float16 ends at 65504
    vae.load_state_dict({**weights, **counters}, assign=True)


def _reshaped(weight: Tensor, expected: Tensor | None) -> Tensor:
    """The weight in the expected shape if only sides of 1 differ, as in a 1x1 conv of shape (C, C)."""
    if expected is None or _sides(weight) != _sides(expected):
        return weight
    return weight.reshape(expected.shape)


def _sides(weight: Tensor) -> list[int]:
    return [side for side in weight.shape if side != 1]


def check_fit(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: str) -> None:
    """Refuse weights whose names or shapes are not the expected ones.

    Args:
        expected: the state dict of the model, whose values do not count.
        weights: name -> tensor.
        origin: where the weights come from, for the message.

    Raises:
        InputError: with the names of the first few.
    """
    faults = [f"{len(keys)} {fault} ({first_few(keys)})" for fault, keys in misfits(expected, weights).items()]
    if faults:
        raise InputError(
            f"the weights in {origin} do not fit their configuration: keys {'; '.join(faults)}; "
            "get a whole copy, or give the configuration it was trained with as config="
        )


def _pick_vae(keys: list[str], origin: str) -> dict[str, str]:
    """The keys of a checkpoint that belong to the VAE: {key in the file: the key without prefix and wrappers}."""
    names = _unwrapped(keys)
    prefix = _prefix(list(names.values()), origin)
    picked = {key: name.removeprefix(prefix) for key, name in names.items() if name.startswith(prefix)}
    if any(name.startswith("model_ema.") for name in picked.values()):
        log.info("%s: loading the trained weights, not their moving average under model_ema.", origin)
    extra = _extra([name for name in picked.values() if not name.startswith(NO_WEIGHTS)], origin)
    return {key: name for key, name in picked.items() if name not in extra and not name.startswith(NO_WEIGHTS)}


def _prefix(names: list[str], origin: str) -> str:
    """What the VAE's keys begin with: one of `PREFIXES`, or whatever is before an encoder's or decoder's first key."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix) and is_network(name.removeprefix(prefix)) for name in names):
            return prefix
    others = sorted({name.removesuffix(first) for name in names for first in FIRST_KEYS if name.endswith(f".{first}")})
    if len(others) > 1:
        raise InputError(
            f"{origin} has several VAEs, under {first_few(others)}; need one; save the one you want by itself"
        )
    if not others:
        raise InputError(
            f"{origin} has no VAE among its {len(names)} keys ({first_few(sorted(names))}); "
            "need encoder.* and decoder.*, alone or after a prefix such as first_stage_model. or vae."
        )
    return others[0]


def _extra(names: Iterable[str], origin: str) -> set[str]:
    """The names that are of no layer of a VAE, said once."""
    extra = sorted(name for name in names if not is_network(name))
    if extra:
        log.warning("%s: left out %d keys that no VAE has (%s)", origin, len(extra), first_few(extra))
    return set(extra)


def _unwrapped(keys: Iterable[str]) -> dict[str, str]:
    return {key: unwrapped_name(key) for key in keys}


def _standard_names(weights: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    if is_tiny(weights):
        return weights
    try:
        return modern_names(weights) if is_diffusers_layout(list(weights)) else from_ldm(weights)
    except InputError as error:  # its message lacks the file's name
        raise InputError(f"{origin}: {error}") from error


def _model_folder(folder: Path, subfolder: str | None) -> Path:
    if subfolder is not None:
        folder = folder / subfolder
    elif (folder / "model_index.json").is_file() or not (folder / "config.json").is_file():
        inside = [folder / name for name in ("vae", "model") if (folder / name / "config.json").is_file()]
        folder = inside[0] if inside else folder
    if not (folder / "config.json").is_file():
        raise InputError(f"there is no config.json in {folder}; need a diffusers folder; check the path or subfolder=")
    return folder


def _read_folder(folder: Path, variant: str | None) -> dict[str, Tensor]:
    """All weights of a diffusers folder, under the names in its files: safetensors if there are any, else .bin.

    Without `variant`, the weights of one, such as diffusion_pytorch_model.fp16.safetensors, are read only if they are
    the only ones.
    """
    for suffix in (".safetensors", ".bin"):
        singles = {_variant(path, suffix): path for path in folder.glob(f"{STEM}*{suffix}") if "-of-" not in path.name}
        indices = {_variant(path, suffix): path for path in folder.glob(f"{STEM}*{suffix}.index*.json")}
        both = {name: [kind[name] for kind in (singles, indices) if name in kind] for name in {*singles, *indices}}
        if variant is not None:
            found = both.get(variant, [])
        else:
            found = both[""] if "" in both else [path for paths in both.values() for path in paths]
        names = ", ".join(sorted(path.name for path in found))
        if len(found) > 1 and (variant is not None or "" in both):
            raise InputError(f"{folder} has both {names}; need one; remove the stale one")
        if len(found) > 1:
            raise InputError(f"{folder} has several variants ({names}); need one; say which: variant=")
        if found:
            return _read_shards(found[0]) if found[0].suffix == ".json" else read_weights(found[0], _unwrapped)
    wanted = STEM if variant is None else f"{STEM}.{variant}"
    raise InputError(f"there are no weights in {folder}; need {wanted}.safetensors or {wanted}.bin; get a whole copy")


def _variant(path: Path, suffix: str) -> str:
    """The variant in the name of a file of weights, or of an index: "fp16", or "" for none."""
    return path.name.removeprefix(STEM).replace(suffix, "", 1).replace(".index", "").removesuffix(".json").strip(".")


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map; need diffusers' index of shards; get a whole copy")
    weights: dict[str, Tensor] = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name:
            raise InputError(f"{index} points outside its folder ({name!r}); need plain file names; get a clean copy")
        listed = sorted(unwrapped_name(key) for key, file in weight_map.items() if file == name)
        shard = read_weights(index.parent / name, _unwrapped)
        if listed != sorted(shard):
            odd = sorted(set(listed) ^ set(shard))
            raise InputError(f"{name} and {index} disagree on {len(odd)} keys ({first_few(odd)}); get a whole copy")
        weights.update(shard)
    return weights


def _download(repo: str, subfolder: str | None, variant: str | None) -> Path:
    """Download config and weights from the hub: safetensors if there are any, else .bin.

    Returns:
        The folder of the downloaded files.
    """
    if not HUB_ID.fullmatch(repo):
        raise InputError(
            f"there is no file or folder {repo}, and it is not a hub id (owner/name); check the path "
            f"(single files end in {', '.join(WEIGHT_SUFFIXES)})"
        )
    places = [f"{subfolder.strip('/')}/"] if subfolder else ["", "vae/"]
    # the plain name is tried before its variants, so that only one copy of the weights is downloaded
    endings = [f".{variant}"] if variant is not None else ["", "*"]
    for form in (f"{STEM}{ending}{suffix}" for suffix in (".safetensors", ".bin") for ending in endings):
        suffix, dot = Path(form).suffix, "" if variant is None else f".{variant}"
        shards = [f"{STEM}-*{dot}{suffix}", f"{STEM}{dot}-*{suffix}", f"{STEM}{suffix}.index{dot}.json"]
        patterns = ["model_index.json", *(p + name for p in places for name in ("config.json", form, *shards))]
        try:
            snapshot = Path(snapshot_download(repo, allow_patterns=patterns))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise InputError(
                f"there is no file or folder {repo}, and the hub gave {type(error).__name__} "
                f"({one_line(error)[:200]}); "
                "check the name, the network and your access"
            ) from error
        if any(list((snapshot / place).glob(f"{STEM}*{Path(form).suffix}")) for place in places):
            break
    return snapshot
