"""The weights of a VAE under the names of its class, whatever was put around its parts or into its layers."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from sdvae.errors import InputError, first_few
from sdvae.model.blocks import set_padding

NETWORK = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
COUNTER = "bn.num_batches_tracked"  # an integer, which nothing here reads
BATCH_NORM = ("bn.running_mean", "bn.running_var", COUNTER)  # FLUX.2's
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_WRAPPER = re.compile(r"(?<![^.])(module|_orig_mod)\.")
# Marks in the names of weights that a layer has beside or instead of its own -> what put them there, and the remedy.
_ADDITIONS = [
    (re.compile(r"\.base_layer\."), "an adapter that is not merged", "vae.fuse_lora() or vae.unload_lora()"),
    (
        re.compile(r"\.parametrizations\."),
        "parametrized weights",
        "torch.nn.utils.parametrize.remove_parametrizations(layer, name) for each",
    ),
    (
        re.compile(r"\.weight_(g|v|orig|u)$"),
        "weights under weight_norm or spectral_norm",
        "torch.nn.utils.remove_weight_norm(layer) or remove_spectral_norm(layer)",
    ),
]


def unwrapped_name(key: str) -> str:
    """The key without the parts `module.` and `_orig_mod.`, which DDP and torch.compile insert at any place in it."""
    return _WRAPPER.sub("", key)


def is_network(key: str) -> bool:
    """Whether a key, without prefix, names a weight of the network, its batch norm, or the codebook of a VQ model.

    A key of this kind that a VAE has no place for means that the weights are those of another network. Any other key
    is something that was stored beside the VAE.
    """
    return key.startswith((*NETWORK, "quantize.")) or key in BATCH_NORM


def plain_weights(vae: Any) -> dict[str, Tensor]:
    """The weights that a newly built VAE of the same class and configuration takes, and that compute the same.

    torch.compile and DDP change the names of weights, also where only parts are wrapped: their prefixes are removed.
    A merged adapter leaves the layer's own weights, which contain it. Weights that diffusers' layerwise casting stores
    in 8 bits come in the dtype that the layers compute in, which holds the same values.

    Args:
        vae: the model, which is not changed.

    Returns:
        name -> contiguous tensor. No two share memory, as safetensors demands; otherwise they may be the model's own.

    Raises:
        InputError: when a layer was replaced, or an adapter or parametrization adds to it, or when the weights are
            quantized, or offloaded and so without data.
    """
    if getattr(vae, "hf_quantizer", None) is not None:
        raise InputError("the VAE is quantized; need floating-point weights; call vae.dequantize() first")
    merged = [f"{name}." for name, module in vae.named_modules() if _is_merged(module)]
    weights: dict[str, Tensor] = {}
    for key, weight in vae.state_dict().items():
        layer = next((name for name in merged if key.startswith(name)), None)
        if layer is not None and not key.startswith(f"{layer}base_layer."):
            continue  # an adapter's own weights, which are already part of the layer's
        plain = key if layer is None else layer + key.removeprefix(f"{layer}base_layer.")
        weights[unwrapped_name(plain)] = weight.detach()
    _check_names(weights, vae)
    _check_padding(weights, vae)
    _check_data(weights, vae)
    computed_in = torch.bfloat16 if vae.dtype in FLOAT8 else vae.dtype
    return _separate({key: widened(weight, computed_in) for key, weight in weights.items()})


def rebuilt(vae: Any, kind: type[Any]) -> Any:
    """A newly built model of class `kind`, with the configuration, the `plain_weights` and the mode of `vae`."""
    return built(vae, kind, plain_weights(vae), declared_padding(vae))


def built(vae: Any, kind: type[Any], weights: Mapping[str, Tensor], padding_mode: str) -> Any:
    """A newly built model of class `kind`, with the configuration and the mode of `vae`, around these weights.

    Args:
        vae: the model whose configuration and mode it gets.
        kind: its class.
        weights: name -> tensor, which is not copied. A parameter stays the same object.
        padding_mode: how its 3x3 convs pad; diffusers' class does not take it as an argument.
    """
    with torch.device("meta"):  # only shapes: no memory, no random initialisation
        model = kind(**_arguments(vae, kind))
    model.register_to_config(**{key: value for key, value in vae.config.items() if key != "_class_name"})
    set_padding(model, padding_mode)
    for name, parameter in model.named_parameters():
        if isinstance(weights[name], nn.Parameter):  # assigning would hand this on to it
            parameter.requires_grad_(weights[name].requires_grad)
    model.load_state_dict(weights, assign=True)
    return model.train(vae.training)


def shared_weights(vae: Any) -> dict[str, Tensor]:
    """The parameters and buffers of `vae` themselves, by the names that a newly built VAE of its class has.

    Raises:
        InputError: when these are not all that computes, or weights have no data; as `plain_weights`.
    """
    weights: dict[str, Tensor] = vae.state_dict(keep_vars=True)
    _check_names(weights, vae)
    _check_data(weights, vae)
    return weights


def without_default(config: Mapping[str, Any], key: str, default: Any) -> FrozenDict:
    """A model's configuration, without a key that diffusers' class does not know if it has its default."""
    return FrozenDict({k: v for k, v in config.items() if (k, v) != (key, default)})


def declared_padding(vae: Any) -> str:
    """The padding of a model's 3x3 convs by its configuration, which says nothing if they pad with zeros."""
    return vae.config.get("padding_mode", "zeros")


def _arguments(vae: Any, kind: type[Any]) -> dict[str, Any]:
    """The keys of a model's config that a class takes: not notes, nor what AutoencoderTiny adds by itself."""
    return {key: vae.config[key] for key in inspect.signature(kind.__init__).parameters if key in vae.config}


def _is_merged(module: nn.Module) -> bool:
    """Whether it is one of peft's layers, and computes just what the layer inside it does, with the merged weights."""
    inside = isinstance(getattr(module, "base_layer", None), nn.Module)
    return inside and bool(getattr(module, "merged", False)) and not getattr(module, "disable_adapters", False)


def _check_names(weights: dict[str, Tensor], vae: Any) -> None:
    with torch.device("meta"):
        expected = type(vae)(**_arguments(vae, type(vae)))
    shapes = {key: weight.shape for key, weight in expected.state_dict().items()}
    if (odd := sorted(weights.keys() - shapes.keys())) or shapes.keys() - weights.keys():
        for pattern, addition, remedy in _ADDITIONS:
            if found := [key for key in odd if pattern.search(key)]:
                raise InputError(
                    f"the VAE has {addition} ({first_few(found)}); need its plain layers; first call {remedy}"
                )
        lost = sorted(shapes.keys() - weights.keys())
        raise InputError(
            f"the VAE has {len(odd)} weights that {type(vae).__name__} has not ({first_few(odd) or 'none'}) and lacks "
            f"{len(lost)} ({first_few(lost) or 'none'}); need the layers of its configuration; put them back"
        )
    wrong = [f"{key} {tuple(weights[key].shape)}" for key in shapes if weights[key].shape != shapes[key]]
    if wrong:
        raise InputError(
            f"the VAE has weights of another shape than its configuration says ({first_few(wrong)}); need equal ones; "
            "set vae.config with vae.register_to_config(…), or put the layers back"
        )


def _check_padding(weights: dict[str, Tensor], vae: Any) -> None:
    """Refuse convs whose padding was changed, but not in the configuration, from which a loaded VAE takes it."""
    declared, layers = declared_padding(vae), {key.rpartition(".")[0] for key in weights}
    for name, module in vae.named_modules():
        own = unwrapped_name(f"{name}.").removesuffix(".").removesuffix(".base_layer") in layers
        if own and isinstance(module, nn.Conv2d) and any(module.padding) and module.padding_mode != declared:
            setter = "set_padding_mode(" if hasattr(vae, "set_padding_mode") else "register_to_config(padding_mode="
            raise InputError(
                f"the VAE's layer {name} pads with {module.padding_mode}, and its configuration says {declared}; need "
                f"the same in both; call vae.{setter}{module.padding_mode!r}), or change the layers back"
            )


def _check_data(weights: dict[str, Tensor], vae: Any) -> None:
    away = [key for key, weight in weights.items() if weight.is_meta]
    if away:
        raise InputError(
            f"the VAE has {len(away)} weights without data (offloaded: {first_few(away)}); need them in memory; first "
            "call accelerate.hooks.remove_hook_from_module(vae, recurse=True), or load the VAE again"
        )
    on_disk = [name for name, module in vae.named_modules() if _is_on_disk(module)]
    if on_disk:
        raise InputError(
            f"the VAE has {len(on_disk)} layers whose weights are on disk ({first_few(on_disk)}); need them in memory; "
            "save the VAE before vae.enable_group_offload(…, offload_to_disk_path=…)"
        )


def _is_on_disk(module: nn.Module) -> bool:
    """Whether diffusers' group offloading moves the module's weights to disk, which leaves tensors of any content."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) for hook in hooks.values())


def widened(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A weight of 8 bits in `dtype`, with the same value; any other weight as it is."""
    return weight.to(dtype) if weight.dtype in FLOAT8 else weight


def _separate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    for key, weight in weights.items():
        weight = weight.contiguous()
        if (memory := weight.untyped_storage().data_ptr()) in seen:
            weight = weight.clone()
        seen.add(memory)
        weights[key] = weight
    return weights


def initialise(model: nn.Module, keys: list[str]) -> None:
    """Give the weights `keys` the values of a new layer, and leave the others of that layer as they are."""
    for name in dict.fromkeys(key.rpartition(".")[0] for key in keys):
        layer: Any = model.get_submodule(name)
        kept = {part: w.detach().clone() for part, w in layer.named_parameters() if f"{name}.{part}" not in keys}
        layer.reset_parameters()
        layer.load_state_dict(kept, strict=False)


def sha256_of_weights(weights: Mapping[str, Tensor]) -> str:
    """A hash of name, dtype, shape and bytes of every weight."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
