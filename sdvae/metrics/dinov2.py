"""DINOv2's image encoder: Oquab et al. 2023, «DINOv2: Learning Robust Visual Features without Supervision».

A vision transformer (Dosovitskiy et al. 2021) with a factor for each channel of each branch (LayerScale, Touvron et al.
2021), whose patches have 14x14 pixels. The names of the weights are those of the published files
dinov2_vits14_pretrain.pth, dinov2_vitb14_pretrain.pth and dinov2_vitl14_pretrain.pth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 224  # pixels, to which images are resized; torch-fidelity's dinov2-vit-l-14
PATCH = 14  # pixels
HEAD = 64  # channels of an attention head, in all sizes
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, in [0, 1]
OFFSET = 0.1  # added to the number of patches before the positions are resized, as in the published code


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention: (B, tokens, width) -> the same."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)  # (B, heads, tokens, HEAD) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and a perceptron, each on normalised input and added to it."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, eps=1e-6), Attention(width), LayerScale(width)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, eps=1e-6), Perceptron(width), LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoV2(nn.Module):
    """The class token of an image.

    Args:
        weights: the tensors of a published file. They say how many layers and channels there are.

    Attributes:
        width: number of channels, 384, 768 or 1024.

    Raises:
        RuntimeError: for tensors that are missing, unknown or of another shape.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        positions = weights.get("pos_embed")
        if positions is None or positions.ndim != 3:
            raise RuntimeError("no pos_embed of three dimensions")
        self.width = positions.shape[2]
        depth = 1 + max((int(name.split(".")[1]) for name in weights if re.match(r"blocks\.\d+\.", name)), default=-1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.mask_token = nn.Parameter(torch.zeros(1, self.width))  # of its training; in the file, but not used here
        self.pos_embed = nn.Parameter(torch.zeros(1, positions.shape[1], self.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, self.width, PATCH, stride=PATCH)})
        self.blocks = nn.Sequential(*[Block(self.width) for _ in range(depth)])
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.load_state_dict(dict(weights))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 of any size -> (B, width) fp32."""
        # imported here, since it comes with an extra
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIDE, SIDE), align_corners=False) / 255
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
        return self.class_token((x - mean) / std)

    def class_token(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) with normalised colours, H and W multiples of PATCH -> (B, width)."""
        patches = self.patch_embed["proj"](x)  # (B, width, H / 14, W / 14)
        height, width = patches.shape[2:]
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return self.norm(self.blocks(tokens + self._positions(height, width)))[:, 0]

    def _positions(self, height: int, width: int) -> Tensor:
        """The embedding of the class token and of each position, (1, 1 + height · width, width), resized to fit."""
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        side = math.isqrt(rest.shape[1])
        if (height, width) == (side, side):
            return self.pos_embed
        grid = rest.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        factors = ((height + OFFSET) / side, (width + OFFSET) / side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)
