"""The model against diffusers' AutoencoderKL with the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL

from sdvae import AutoencoderKL, InputError, crop_to, pad_to_multiple
from sdvae.model import DiagonalGaussian


def config(widths=(32, 64, 64, 64), **changes) -> dict:
    levels = len(widths)
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": widths,
        "layers_per_block": 2,
        **changes,
    }


SD_WIDTHS = (128, 256, 512, 512)
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": False, "shift_factor": 0.1159}
ATTENTION_IN_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
}
CASES = {
    "sd_f8c4": (config(SD_WIDTHS), (1, 3, 32, 32)),
    "sdxl": (config(SD_WIDTHS, sample_size=1024, scaling_factor=0.13025), (1, 3, 16, 24)),
    "sd3_16_channels_no_quant_convs": (config(SD_WIDTHS, latent_channels=16, **NO_QUANT), (1, 3, 16, 16)),
    "no_middle_attention": (config(mid_block_add_attention=False), (2, 3, 64, 64)),
    "f4": (config((32, 64, 64)), (2, 3, 64, 64)),
    "grey": (config(in_channels=1, out_channels=1), (2, 1, 64, 64)),
    "not_square": (config(), (2, 3, 40, 104)),
    "attention_in_levels_as_kl_f16": (config((32, 32, 64), **ATTENTION_IN_LEVELS), (1, 3, 32, 32)),
    "only_post_quant_conv_and_relu": (config(use_quant_conv=False, act_fn="relu", layers_per_block=1), (1, 3, 32, 32)),
}


def pair(kwargs: dict) -> tuple[AutoencoderKL, StockAutoencoderKL]:
    """Ours and a stock model with the stock model's random weights; its norms' scales are made uneven."""
    torch.manual_seed(0)
    stock = StockAutoencoderKL(**kwargs)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ours = AutoencoderKL(**kwargs)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours.eval(), stock.eval()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).detach().abs().max() / want.detach().abs().max().clamp(min=1e-12))


@pytest.mark.parametrize("name", CASES)
def test_moments_reconstruction_and_gradients_equal_diffusers(name):
    kwargs, shape = CASES[name]
    ours, stock = pair(kwargs)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    target = torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1

    def loss_of(model):
        posterior = model.encode(x).latent_dist
        z = posterior.sample(torch.Generator().manual_seed(3))
        image = model.decode(z).sample
        (torch.nn.functional.mse_loss(image, target) + 1e-3 * posterior.kl().mean()).backward()
        return posterior.parameters, image

    (moments, image), (want_moments, want_image) = loss_of(ours), loss_of(stock)
    assert relative_error(moments, want_moments) <= 1e-5
    assert relative_error(image, want_image) <= 1e-5
    wanted = {parameter_name: p.grad for parameter_name, p in stock.named_parameters()}
    for parameter_name, parameter in ours.named_parameters():
        want = wanted.pop(parameter_name)
        assert relative_error(parameter.grad, want) <= 1e-5, parameter_name
    assert not wanted, "parameters that only diffusers has"


def test_sd_has_its_published_number_of_parameters():
    with torch.device("meta"):
        vae = AutoencoderKL(**CASES["sd_f8c4"][0])
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_diffusers_is(dtype):
    kwargs, shape = CASES["not_square"]
    ours, stock = pair(kwargs)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        exact = ours(x).sample
        half = ours.to(dtype)(x.to(dtype)).sample
        stock_half = stock.to(dtype)(x.to(dtype)).sample
    assert half.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    assert relative_error(half.float(), exact) <= 16 * epsilon  # some fifty layers deep
    assert relative_error(half.float(), exact) <= 1.25 * relative_error(stock_half.float(), exact)


def test_forward_hands_out_the_posterior_and_honours_generators():
    vae, stock = pair(config())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        output = vae(x, sample_posterior=True, generator=torch.Generator().manual_seed(5))
        want = stock(x, sample_posterior=True, generator=torch.Generator().manual_seed(5)).sample
        torch.testing.assert_close(output.sample, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.posterior.mean, stock.encode(x).latent_dist.mean, rtol=1e-5, atol=1e-5)
        assert torch.equal(output["sample"], output[0])
        (only,) = vae(x, return_dict=False)
        torch.testing.assert_close(only, stock(x, return_dict=False)[0], rtol=1e-5, atol=1e-5)
        assert not torch.equal(only, output.sample)


def test_a_generator_for_each_image_makes_its_noise_independent_of_the_batch():
    posterior = DiagonalGaussian(torch.randn(3, 8, 4, 4))
    noise = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    together = posterior.sample(noise)
    alone = DiagonalGaussian(posterior.parameters[1:2]).sample([torch.Generator().manual_seed(8)])
    assert torch.equal(together[1:2], alone)


def test_posterior_equals_diffusers_and_its_sums_are_fp32():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    parameters = torch.randn(2, 8, 16, 16) * 4
    parameters[0, 4, 0, 0], parameters[0, 5, 0, 0] = -50, 50  # both ends of the clamp
    other = torch.randn(2, 8, 16, 16)
    sample = torch.randn(2, 4, 16, 16)
    ours, stock = DiagonalGaussian(parameters), DiagonalGaussianDistribution(parameters)
    for name in ("mean", "logvar", "std", "var"):
        assert torch.equal(getattr(ours, name), getattr(stock, name)), name
    torch.testing.assert_close(ours.kl(), stock.kl())
    torch.testing.assert_close(ours.nll(sample), stock.nll(sample))
    torch.testing.assert_close(
        ours.kl(DiagonalGaussian(other)), stock.kl(DiagonalGaussianDistribution(other)), rtol=1e-5, atol=1e-3
    )
    half = DiagonalGaussian(torch.randn(2, 8, 64, 64).bfloat16())
    assert half.kl().dtype == torch.float32
    assert half.sample().dtype == torch.bfloat16
    exact = DiagonalGaussian(half.parameters.double()).kl()
    torch.testing.assert_close(half.kl().double(), exact, rtol=1e-5, atol=0)


def test_kl_is_the_integral_it_claims_to_be():
    """Monte Carlo: KL(q||p) = E_q[log q(z) - log p(z)]."""
    posterior = DiagonalGaussian(torch.tensor([0.7, -0.3, 0.4, -1.2]).reshape(1, 4, 1, 1).double())
    standard = DiagonalGaussian(torch.zeros(1, 4, 1, 1).double())
    many = DiagonalGaussian(posterior.parameters.expand(200_000, -1, -1, -1))
    z = many.sample(torch.Generator().manual_seed(0))
    estimate = (standard.nll(z) - many.nll(z)).mean()
    assert abs(float(estimate) - float(posterior.kl())) < 0.01


def test_slicing_changes_nothing():
    vae, _ = pair(config())
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        whole = vae(x).sample
        vae.enable_slicing()
        sliced = vae(x).sample
    torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=5e-5)


def test_slices_are_for_inference_only():
    vae, _ = pair(config())
    batches: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0].shape[0]))
    vae.enable_slicing()
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    vae.encode(x)
    with torch.no_grad():
        vae.encode(x)
    assert batches == [3, 1, 1, 1]


def test_to_diffusers_is_the_stock_class_with_equal_independent_weights():
    vae, _ = pair(config(scaling_factor=0.5, shift_factor=0.1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
    vae = vae.to(torch.bfloat16)
    stock = vae.to_diffusers()
    assert type(stock) is StockAutoencoderKL
    assert stock.dtype == torch.bfloat16
    assert stock.training == vae.training
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "block_out_channels"):
        assert stock.config[key] == vae.config[key], key
    before = {name: weight.clone() for name, weight in stock.state_dict().items()}
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in stock.state_dict().items())


def test_to_diffusers_keeps_what_the_decoder_gives(tmp_path):
    """A pipeline saved with diffusers' class would otherwise come back as a VAE whose logits are taken for images."""
    vae = AutoencoderKL(**config())
    assert "_likelihood" not in vae.to_diffusers().config
    vae.set_likelihood("bernoulli")
    vae.to_diffusers().save_pretrained(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path).likelihood == "bernoulli"
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("bernoulli", "poisson"))
    with pytest.raises(InputError, match="likelihood 'poisson'"):
        AutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 71), (1, 9), (250, 8)])
def test_padding_then_cropping_returns_the_original(height, width):
    x = torch.rand(2, 3, height, width)
    padded = pad_to_multiple(x, 8)
    assert padded.shape[2] % 8 == 0
    assert padded.shape[3] % 8 == 0
    assert padded.shape[2] - height < 8
    assert padded.shape[3] - width < 8
    assert torch.equal(crop_to(padded, height, width), x)
    assert torch.equal(padded[:, :, -1, -1], x[:, :, -1, -1])


def test_odd_sizes_are_refused_with_the_fix():
    vae, _ = pair(config())
    with pytest.raises(InputError, match=r"height 250 is not a positive multiple of 8; crop to 248 or pad to 256"):
        vae.encode(torch.zeros(1, 3, 250, 256))
    with pytest.raises(InputError, match=r"width 0 is not a positive multiple of 8; pad to 8"):
        vae.encode(torch.zeros(1, 3, 8, 0))
    with pytest.raises(InputError, match=r"got images of shape \(1, 4, 8, 8\); need \(batch, 3, "):
        vae.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(InputError, match=r"got latents of shape \(4, 8, 8\); need \(batch, 4, "):
        vae.decode(torch.zeros(4, 8, 8))


def test_integers_are_refused_with_the_fix():
    vae, _ = pair(config())
    with pytest.raises(InputError, match=r"got images of torch\.uint8; need floats in \[-1, 1\]; .* x / 127\.5 - 1"):
        vae.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"got images of torch\.int64"):
        vae(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(InputError, match=r"got latents of torch\.int32; need unscaled floats; convert them"):
        vae.decode(torch.zeros(1, 4, 2, 2, dtype=torch.int32))


def test_configurations_that_do_not_fit_together_are_refused():
    with pytest.raises(InputError, match=r"block_out_channels has 48, which norm_num_groups=32 does not divide"):
        AutoencoderKL(**config((32, 48)))
    with pytest.raises(InputError, match=r"down_block_types names 1 blocks and block_out_channels has 2"):
        AutoencoderKL(block_out_channels=(32, 64))
    with pytest.raises(InputError, match=r"'DownBlock2D'; need one of DownEncoderBlock2D, AttnDownEncoderBlock2D"):
        AutoencoderKL(down_block_types=("DownBlock2D",))


def test_the_whole_forward_pass_exports():
    vae, _ = pair(config((32, 32)))
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    exported = torch.export.export(vae, (x,)).module()(x)
    with torch.no_grad():
        torch.testing.assert_close(exported.sample, vae(x).sample)
        torch.testing.assert_close(exported.posterior.mean, vae(x).posterior.mean)
