"""`sdvae widen`: the wider VAE computes what the old one does, and its new channels learn."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from torch import Tensor

from sdvae import AutoencoderKL, InputError, load_vae, save_vae
from sdvae.cli import main
from sdvae.model.config import block_types
from sdvae.noise import posterior_generators
from sdvae.training.initialise import INITIAL_LOGVAR
from sdvae.training.widen import widened
from sdvae.tutorial.conditional import ConditionalAutoencoderKL


def make(**changes) -> AutoencoderKL:
    """A VAE of f4 with attention in the middle and in a level, and all weights random."""
    torch.manual_seed(0)
    levels = block_types((False, True, False), (True, False, False))
    shape = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1, **levels, **changes}
    vae = AutoencoderKL(**shape).eval()
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return vae


def photographs(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def both(vae: AutoencoderKL, wide: AutoencoderKL, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """What the old VAE computes, and the wide one's values for the same channels: mean, log-variance, images.

    What the wide VAE gets in its new channels is random.
    """
    x, generator = photographs().to(vae.dtype), torch.Generator().manual_seed(seed)
    alpha = torch.rand(2, wide.config.in_channels - 3, 32, 24, generator=generator).to(x)
    old, new = vae.encode(x).latent_dist, wide.encode(torch.cat([x, alpha], 1)).latent_dist
    c = vae.config.latent_channels
    z = old.mean.contiguous()
    more = 7 * torch.randn(2, wide.config.latent_channels - c, *z.shape[2:], generator=generator).to(x)
    return [
        (old.mean, new.mean[:, :c]),
        (old.logvar, new.logvar[:, :c]),
        (vae.decode(z).sample, wide.decode(torch.cat([z, more], 1)).sample[:, :3]),
    ]


# ---------------------------------------------------------------- it starts as the old one

CHANGES = (
    {"latent_channels": 16},
    {"image_channels": 4},
    {"block_out_channels": (10, 20, 20)},
    {"latent_channels": 32, "image_channels": 4, "block_out_channels": (16, 32, 32)},
)


@pytest.mark.parametrize("quant", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_the_old_channels_are_those_of_the_old_vae(change, quant):
    vae = make(use_quant_conv=quant, use_post_quant_conv=quant, force_upcast=quant)
    wide = widened(vae, **change)
    for old, new in both(vae, wide):
        torch.testing.assert_close(new, old, rtol=0, atol=3e-6)  # sums of fp32 in another order
    attention = 1e-6 if "block_out_channels" in change else 1e-13  # queries are scaled, and rounded to fp32
    for old, new in both(vae.double(), wide.double()):
        torch.testing.assert_close(new, old, rtol=0, atol=attention)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_in_the_new_channels_does_not_change_a_bit_of_the_old_ones(change):
    vae = make()
    wide = widened(vae, **change)
    for (_, first), (_, second) in zip(both(vae, wide, seed=2), both(vae, wide, seed=3), strict=True):
        assert torch.equal(first, second)


@torch.no_grad()
def test_new_channels_start_with_sensible_values():
    wide = widened(make(), latent_channels=16, image_channels=4)
    x = torch.cat([photographs(), photographs(1)], 1)
    posterior = wide.encode(x).latent_dist
    std = posterior.mean[:, 4:].std(dim=(0, 2, 3))
    assert (std > 0.05).all()
    assert (std < 5).all()
    assert torch.equal(posterior.logvar[:, 4:], torch.full_like(posterior.logvar[:, 4:], INITIAL_LOGVAR))
    assert (wide.decode(posterior.mean).sample[:, 3] == 1).all(), "opaque"
    correlation = torch.corrcoef(posterior.mean.transpose(0, 1).flatten(1))
    assert (correlation - torch.eye(16)).abs().max() < 0.999, "no channel is a copy of another"


def test_the_old_vae_is_not_changed_and_a_seed_gives_the_same_weights():
    vae = make()
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    state = torch.get_rng_state()
    first, same, other = (widened(vae, latent_channels=8, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], weight) for name, weight in vae.state_dict().items())
    assert all(torch.equal(first[name], weight) for name, weight in same.items())
    assert not all(torch.equal(first[name], weight) for name, weight in other.items())


# ---------------------------------------------------------------- it learns


def learned(wide: AutoencoderKL, steps: int) -> dict[str, Tensor]:
    """Train on transparent images for some steps, and return each weight's change."""
    before = {name: weight.clone() for name, weight in wide.named_parameters()}
    optimizer = torch.optim.Adam(wide.parameters(), lr=1e-3)
    x = photographs(wide.config.in_channels)
    for step in range(steps):
        posterior = wide.encode(x).latent_dist
        y = wide.decode(posterior.sample(posterior_generators(torch.tensor([step, step + 1])))).sample
        loss = (y - x).abs().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: (weight.detach() - before[name]) for name, weight in wide.named_parameters()}


def test_what_leads_from_new_channels_to_the_old_ones_gets_gradients_in_the_first_step():
    wide = widened(make(), latent_channels=8, image_channels=4, block_out_channels=(16, 32, 32)).train()
    changed = learned(wide, 1)
    encoder, decoder = changed["encoder.conv_in.weight"], changed["decoder.conv_in.weight"]
    assert (encoder[:8, 3] != 0).all(), "alpha reaches the old features"
    assert (decoder[:16, 4:] != 0).all(), "new latents reach the old features"
    assert (changed["decoder.conv_out.weight"] != 0).all(), "alpha is drawn from all features, colours from new ones"
    assert (changed["decoder.up_blocks.0.resnets.0.conv1.weight"][:16, 16:] != 0).any(dim=(2, 3)).float().mean() > 0.9


def test_no_new_weight_is_dead_after_a_few_steps():
    wide = widened(make(), latent_channels=8, image_channels=4, block_out_channels=(16, 32, 32)).train()
    for name, change in learned(wide, 6).items():
        unmoved = float((change == 0).float().mean())
        assert unmoved < 0.02 or name.endswith("to_k.bias"), f"{name}: {unmoved:.0%} has not moved"


# ---------------------------------------------------------------- the command


def test_the_command_writes_a_folder_that_every_class_loads(tmp_path, capsys):
    vae = make(latents_mean=(0.1, 0.2, 0.3, 0.4), latents_std=(1.0, 2.0, 3.0, 4.0), scaling_factor=0.7)
    save_vae(vae, tmp_path / "vae")
    given = ["widen", str(tmp_path / "vae"), str(tmp_path / "wide"), "--latent_channels", "6", "--image_channels=4"]
    assert main([*given, "--block_out_channels", "[12, 24, 24]"]) == 0
    assert "M parameters of" in capsys.readouterr().out
    stock, ours = StockAutoencoderKL.from_pretrained(tmp_path / "wide"), load_vae(tmp_path / "wide")
    assert stock.config.latents_mean == [0.1, 0.2, 0.3, 0.4, 0.0, 0.0]
    assert stock.config.latents_std == [1.0, 2.0, 3.0, 4.0, 1.0, 1.0]
    assert (stock.config.scaling_factor, stock.config.in_channels, stock.config.out_channels) == (0.7, 4, 4)
    x = photographs(4)
    with torch.no_grad():
        assert torch.equal(stock(x).sample, ours(x).sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "nothing that is wider than it is"),
        ({"latent_channels": 4}, "nothing that is wider than it is"),
        ({"latent_channels": 3}, "got latent_channels=3; need 4 or more"),
        ({"image_channels": 5}, r"got image_channels=5 for a VAE with \(3, 3\) image channels"),
        ({"image_channels": 1}, r"got image_channels=1 for a VAE with \(3, 3\) image channels"),
        ({"block_out_channels": (16, 16, 32)}, r"need 2n, 4n, 4n with one n of 4 or more.* such as \[16, 32, 32\]"),
        ({"block_out_channels": (16, 32)}, r"got block_out_channels=\[16, 32\]; need 2n, 4n, 4n"),
        ({"block_out_channels": (4, 8, 8)}, r"such as \[10, 20, 20\]"),
    ],
)
def test_what_cannot_be_had_by_adding_channels_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        widened(make(), **change)


def test_other_kinds_of_vae_are_refused(tmp_path):
    conditional = ConditionalAutoencoderKL(num_classes=3, block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(InputError, match="got an ConditionalAutoencoderKL; need an AutoencoderKL"):
        widened(conditional, latent_channels=8)
