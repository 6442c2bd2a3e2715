"""The most GPU memory that SD's VAE takes to decode and to encode, found without a GPU.

    python scripts/device_memory.py                                  # 512² to 4096² in fp32 and bf16
    python scripts/device_memory.py --sizes 8192 --dtypes bf16 --budgets 2 4 8

The passes run on torch's fake tensors, which have a device and a size but no values, and the memory of the tensors that
are alive is added up. The table has diffusers' class («stock»), this package's, and `enable_tiling` with some budgets.
Weights and the input are left out, and so is the result.

A GPU needs a little more. Not counted are the workspaces that cuDNN chooses for convolutions, what is lost between the
allocator's blocks, and CUDA's own memory. Counted are the copies that torch makes of operands that are not contiguous.
Attention is assumed to run in torch's memory-efficient kernel, which GPUs use for heads as wide as SD's.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from diffusers import AutoencoderKL as StockAutoencoderKL
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sdvae import AutoencoderKL, InputError
from sdvae.errors import exit_code
from sdvae.runtime import DTYPES

aten = torch.ops.aten
BLOCK_BYTES = 512  # the CUDA allocator rounds each size up to a multiple of it
WIDE_HEAD = 128  # for wider heads in half precision, the kernel has a second result in fp32 to add to
SD: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


class AllocatedMemory(TorchDispatchMode):
    """A context that adds up the memory of the tensors that are made in it, while they are alive.

    Args:
        device_type: the kind of device whose memory is counted.
        block_bytes: sizes are rounded up to a multiple of it.

    Attributes:
        now: bytes of the tensors that are alive.
        peak: the most that `now` and the temporary memory of one operation have been.
    """

    def __init__(self, device_type: str = "cuda", block_bytes: int = BLOCK_BYTES):
        super().__init__()
        self.now = self.peak = 0
        self._device_type = device_type
        self._block_bytes = block_bytes
        self._known: dict[int, int] = {}  # storage -> its bytes; 0 for one that was there before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in self._tensors((args, kwargs)):
            self._count(x, new=False)
        result = function(*args, **(kwargs or {}))
        for x in self._tensors(result):
            self._count(x, new=True)
        self.peak = max(self.peak, self.now + self._temporary(function, args))
        return result

    def _tensors(self, tree: Any) -> list[Tensor]:
        leaves = pytree.tree_leaves(tree)
        return [x for x in leaves if isinstance(x, Tensor) and x.device.type == self._device_type]

    def _count(self, x: Tensor, new: bool) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = self._rounded(storage.nbytes()) if new else 0
            self.now += self._known[key]
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def _temporary(self, function: Any, args: Any) -> int:
        """What the kernel of an operation allocates and frees: only CUDA's convolutions and attention are known."""
        if self._device_type != "cuda":
            return 0
        x = args[0] if args else None
        if function is aten.convolution.default and not _is_dense(x):
            return self._rounded(x.nbytes)
        if function is aten._scaled_dot_product_efficient_attention.default:
            wide = x.dtype != torch.float32 and x.shape[-1] > WIDE_HEAD
            return self._rounded(4 * x.numel()) if wide else 0
        return 0

    def _rounded(self, size: int) -> int:
        return -(-size // self._block_bytes) * self._block_bytes


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


class EfficientAttention(TorchFunctionMode):
    """A context in which attention takes the memory-efficient kernel, which torch chooses only where there is a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return aten._scaled_dot_product_efficient_attention(*args[:3], None, False)[0]
        return function(*args, **(kwargs or {}))


@contextmanager
def fake_gpu() -> Iterator[None]:
    """A context in which tensors on «cuda» have no values, and attention is that of a GPU."""
    can_use = mock.patch.object(torch.backends.cuda, "can_use_efficient_attention", return_value=True)
    with FakeTensorMode(), torch.no_grad(), EfficientAttention(), can_use:
        yield


def build(kind: type, dtype: torch.dtype, shape: dict[str, Any]) -> Any:
    """A VAE with weights of a dtype on the GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # conversion afterwards does not work for fake weights
    try:
        with torch.device("cuda"):
            return kind(**shape).eval()
    finally:
        torch.set_default_dtype(before)


def peak_bytes(vae: Any, part: str, batch: int, height: int, width: int) -> int:
    """The peak of a pass in addition to weights, input and output.

    Args:
        vae: a VAE that was built in `fake_gpu`, in which this function must be called too.
        part: «decode» or «encode».
        batch: number of images.
        height: height of the images in pixels.
        width: width of the images in pixels.
    """
    f = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = (batch, vae.config.latent_channels, height // f, width // f)
    shape = latents if part == "decode" else (batch, vae.config.in_channels, height, width)
    x = torch.empty(shape, dtype=vae.dtype, device="cuda")
    with AllocatedMemory() as memory:
        result = vae.decode(x).sample if part == "decode" else vae.encode(x).latent_dist.parameters
        return memory.peak - memory._rounded(result.untyped_storage().nbytes())


def cell(kind: type, part: str, side: int, dtype: torch.dtype, budget: float | None) -> str:
    """The peak in GiB as text; «-» where the budget is refused as too small.

    Args:
        kind: the class.
        part: «decode» or «encode».
        side: side of the image in pixels.
        dtype: of weights and images.
        budget: in GiB; None computes the whole image at once.
    """
    with fake_gpu():
        vae = build(kind, dtype, SD)
        if budget is not None:
            vae.enable_tiling(memory_bytes=int(budget * 2**30))
        try:
            return f"{peak_bytes(vae, part, 1, side, side) / 2**30:.2f}"
        except InputError:
            return "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=PositiveInt, nargs="+", default=[512, 1024, 2048, 4096], help="sides in pixels")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--budgets", type=PositiveFloat, nargs="*", default=[1.0, 2.0, 4.0], help="of tiling, in GiB")
    arguments = parser.parse_args()
    if odd := [side for side in arguments.sizes if side % 8]:
        raise InputError(f"--sizes: got {odd[0]}; need multiples of 8")
    columns = ["stock", "whole", *(f"{budget:g} GiB" for budget in arguments.budgets)]
    print(f"| | side | dtype | {' | '.join(columns)} |\n|---|---|---|{'---|' * len(columns)}")
    for part, side, name in itertools.product(("decode", "encode"), arguments.sizes, arguments.dtypes):
        ways = [(StockAutoencoderKL, None), *((AutoencoderKL, budget) for budget in (None, *arguments.budgets))]
        cells = [cell(kind, part, side, DTYPES[name], budget) for kind, budget in ways]
        print(f"| {part} | {side} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code("device_memory", main))
