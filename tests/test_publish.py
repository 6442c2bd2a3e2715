"""`sdvae push`: what the hub has afterwards loads elsewhere, and its card says the truth."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL as StockAutoencoderKL
from huggingface_hub import ModelCard
from PIL import Image

from sdvae import AutoencoderKL, load_vae, save_vae
from sdvae.cli import main
from sdvae.data import center_crop, open_source, read_image, to_tensor
from sdvae.io import with_section
from sdvae.metrics.image import image_metrics
from sdvae.previews import read_preview
from sdvae.studio import push as publish_module
from sdvae.studio.push import hub_card, push_to_hub, without_local_paths
from sdvae.training.model_card import base_model
from tests.conftest import draw_photographs, tiny_arguments, tiny_vae
from tests.hub import TOKEN, FakeHub

FILES = {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    """Where huggingface_hub goes."""
    with FakeHub() as fake:
        point_to(fake.url, monkeypatch)
        yield fake


def point_to(url: str, monkeypatch) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol too long for a fake
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run's folder."""
    folder = tmp_path_factory.mktemp("trained")
    source = draw_photographs(folder / "photographs")
    assert main(["train", *tiny_arguments(source, folder / "run", steps="1", validate_every="1")]) == 0
    return folder / "run"


@pytest.fixture
def vae() -> AutoencoderKL:
    return tiny_vae(scaling_factor=0.5)


def test_a_run_arrives_in_one_commit_and_loads_with_diffusers(hub, trained, tmp_path, capsys):
    arguments = ["push", str(trained), "me/vae", "--license", "apache-2.0", "--private", "true", "--message", "the run"]
    assert main(arguments) == 0
    assert f"{hub.url}/me/vae/commit/" in capsys.readouterr().out
    assert hub.commits == [("me/vae", "main", "the run")]
    assert hub.created == [("me/vae", True)]
    folder = hub.download("me/vae", tmp_path / "clone")
    assert {path.name for path in folder.iterdir()} == FILES | {"reconstructions.png", "latent_rgb_factors.json"}

    stock = StockAutoencoderKL.from_pretrained(folder)
    ours = load_vae(trained / "model")
    assert stock.config.scaling_factor == ours.config.scaling_factor
    weights = ours.state_dict()
    assert stock.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in stock.state_dict().items())
    Image.open(folder / "reconstructions.png").load()

    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "diffusers"
    assert card.data.tags == ["vae", "autoencoder-kl", "sdvae"]
    assert 'from_pretrained("me/vae")' in card.text
    assert "path/to/this/folder" not in card.text
    assert "| psnr |" in card.text
    assert "kl_weight: 1.0e-06" in card.text
    assert card.text.count("## How to load it") == 1
    assert "vae.safetensors" not in card.text, "no program but diffusers loads this shape"


def test_the_card_tells_no_path_of_this_machine(hub, trained, tmp_path):
    push_to_hub(trained, "me/vae")
    own = (trained / "model" / "README.md").read_text()
    card = hub.repositories["me/vae"]["main"]["README.md"].decode()
    assert str(trained.parent) in own
    assert str(trained.parent) not in card
    assert "Trained on `photographs`" in card


def test_no_way_to_write_a_path_gets_it_published():
    recipe = {  # as it is, and as it may be told
        "source": ("/data", "data"),
        "unicode": ("/home/jürgen/my fotos", "my fotos"),
        "names": (["/home/me/secret/a.png", "b.png"], ["a.png", "b.png"]),
        "apostrophe": ("/home/John's/x", "x"),
        "folded": ("/home/" + "word " * 30 + "/last", "last"),
        "prefixed": ("data:/home/me/y", "y"),
        "windows": ("C:\\home\\me\\z", "z"),
        "address": ("https://x.org/data/paper", "https://x.org/data/paper"),
        "hub": ("my/data", "my/data"),
    }
    for unicode in (True, False):
        dumped = yaml.safe_dump({key: value for key, (value, _) in recipe.items()}, allow_unicode=unicode)
        words = "`/home/me/x/*.png`, https://x.org/data/paper, /in/words"
        told = without_local_paths(f"## Data\n\n{words}\n\n## Recipe\n\n```yaml\n{dumped}```\n")
        assert "home" not in told
        assert "`*.png`, https://x.org/data/paper, /in/words" in told
        cut = yaml.safe_load(told.split("```yaml\n")[1].split("```")[0])
        assert cut == {key: value for key, (_, value) in recipe.items()}


def test_a_second_push_goes_to_its_branch_and_leaves_the_rest(hub, vae, tmp_path):
    push_to_hub(vae, "me/vae")
    assert hub.created == [("me/vae", None)]
    hub.repositories["me/vae"]["main"]["notes.txt"] = b"mine"
    before = dict(hub.repositories["me/vae"]["main"])
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    push_to_hub(vae, "me/vae", revision="v2")
    assert hub.repositories["me/vae"]["main"] == before
    branch = hub.download("me/vae", tmp_path / "v2", "v2")
    assert torch.equal(load_vae(branch).decoder.conv_out.bias, vae.decoder.conv_out.bias)
    assert (branch / "notes.txt").exists()


def test_figures_and_grid_are_measured_on_data(hub, vae, tmp_path):
    save_vae(vae.half(), tmp_path / "vae")
    arguments = ["push", str(tmp_path / "vae"), "me/vae", "--data", "skimage", "--count", "3", "--resolution", "64"]
    assert main(arguments) == 0
    folder = hub.download("me/vae", tmp_path / "clone")
    source = open_source("skimage")
    model = load_vae(tmp_path / "vae", dtype=torch.float32)
    rows = []
    with torch.no_grad():
        for i in range(3):
            x = to_tensor(center_crop(read_image(source.read(i)), 64))[None]
            posterior = model.encode(x).latent_dist
            rows += image_metrics(x, model.decode(posterior.mode()).sample, posterior, None)
    card = (folder / "README.md").read_text()
    for name in ("psnr", "ssim"):
        assert f"| {name} | {sum(row[name] for row in rows) / 3:#.4g} |" in card
    assert "Means over 3 images of `skimage` at 64x64 pixels" in card
    assert load_vae(folder, dtype="file").dtype == torch.float16, (
        "measuring in fp32 changes nothing of what is uploaded"
    )
    assert Image.open(folder / "reconstructions.png").height > 3 * 64
    factors = read_preview(folder / "latent_rgb_factors.json")
    first = " | ".join(f"{value:.4f}" for value in factors.factors[0].tolist())
    assert "## Previews\n\nThe linear map from latents to RGB" in card
    assert f"| channel 0 | {first} |" in card
    assert f"over 3 images at 64x64 pixels: {factors.psnr:.1f} dB" in card

    again = tmp_path / "again"  # a push without data keeps the card's sections and the files beside it
    assert main(["push", str(folder), "me/again", "--dry_run", str(again)]) == 0
    assert "## Previews" in (again / "README.md").read_text()
    assert read_preview(again / "latent_rgb_factors.json").psnr == factors.psnr


def test_figures_are_of_fp32_after_a_training_in_bf16(vae, monkeypatch):
    wanted = publish_module.measure_on(vae, "skimage", 2, 64)
    half = lambda self: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(Accelerator, "autocast", half)  # accelerate shares its precision over a process
    assert publish_module.measure_on(vae, "skimage", 2, 64).metrics == wanted.metrics


def test_what_programs_load_is_written_for_them_and_named(hub, vae, tmp_path, monkeypatch):
    with torch.device("meta"):  # the shape is enough
        sd = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    text = hub_card(sd, "me/vae", None, base=None, license=None, sections={}).text
    for words in ("models/vae`", "models/VAE`", "--vae vae.safetensors", "LDM's layout"):
        assert words in text
    monkeypatch.setattr(publish_module, "ldm_programs", lambda vae: ["comfyui"])
    push_to_hub(vae, "me/vae")
    folder = hub.download("me/vae", tmp_path / "clone")
    single = load_vae(folder / "vae.safetensors", config=folder / "config.json")
    assert all(torch.equal(weight, vae.state_dict()[name]) for name, weight in single.state_dict().items())
    card = (folder / "README.md").read_text()
    assert "ComfyUI" in card
    assert "A1111" not in card


def test_a_dry_run_writes_the_same_files_and_asks_nobody(hub, vae, tmp_path, monkeypatch):
    push_to_hub(vae, "me/vae")
    monkeypatch.delenv("HF_TOKEN")
    point_to("http://127.0.0.1:9", monkeypatch)
    assert push_to_hub(vae, "me/vae", dry_run=tmp_path / "dry") == str(tmp_path / "dry")
    assert {path.name: path.read_bytes() for path in (tmp_path / "dry").iterdir()} == hub.repositories["me/vae"]["main"]


def test_a_card_of_ones_own_is_kept_with_what_it_shows(hub, vae, tmp_path):
    save_vae(vae, tmp_path / "vae")
    head = "---\nlicense: mit\ntags:\n- mine\n---\n"
    own = f"{head}# Mine\n\n![curves](curves.png)\n\n## How to load it\n\nno idea\n\n## Thanks\n\nto all\n"
    (tmp_path / "vae" / "README.md").write_text(own)
    for name in ("curves.png", "private.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "vae" / name)
    push_to_hub(tmp_path / "vae", "me/vae")
    files = hub.repositories["me/vae"]["main"]
    assert set(files) == FILES | {"curves.png"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.tags == ["mine", "vae", "autoencoder-kl", "sdvae"]
    assert card.text.startswith("# Mine\n")
    assert "no idea" not in card.text
    assert card.text.rstrip().endswith("## Thanks\n\nto all")
    (tmp_path / "vae" / "README.md").write_text("---\n- a list\n---\n# Mine\n")
    assert main(["push", str(tmp_path / "vae"), "me/vae"]) == 2


def test_sections_are_replaced_whole_and_added_once():
    text = "# T\n\n## A\n\nold \\1\n\n## B\n\nkept\n"
    once = with_section(text, "A", "new \\1\n")
    assert once == "# T\n\n## A\n\nnew \\1\n\n## B\n\nkept\n"
    assert with_section(once, "A", "new \\1\n") == once
    added = with_section(text, "C", "more\n")
    assert added == text + "\n## C\n\nmore\n"
    assert with_section(added, "C", "more\n") == added


def test_a_fine_tuned_vae_names_its_base_on_the_hub_only(tmp_path):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "vae").mkdir()
    assert base_model("stabilityai/sd-vae-ft-mse") == "stabilityai/sd-vae-ft-mse"
    assert base_model(str(tmp_path / "owner" / "vae")) is None
    assert base_model("vae.safetensors") is None
    assert base_model(None) is None


def test_diffusers_own_push_works_with_our_class(hub, vae, tmp_path):
    vae.push_to_hub("me/vae")
    stock = StockAutoencoderKL.from_pretrained(hub.download("me/vae", tmp_path / "clone"))
    assert all(torch.equal(weight, vae.state_dict()[name]) for name, weight in stock.state_dict().items())


@pytest.mark.parametrize(
    ("place", "status", "code", "message"),
    [
        ("/repos/create", 401, 2, "a token that the hub does not know (401); need one that may write"),
        ("/repos/create", 403, 2, "may not write to me's me/vae (403: No. Ask the owner.)"),
        ("/preupload/", 404, 2, "the hub has no me/vae that this token may see"),
        ("/validate-yaml", 400, 2, "the hub refuses this card or name: Invalid metadata in README.md."),
        ("/commit/", 403, 2, "may not write"),
        ("/repos/create", 500, 1, "the hub failed (500: No. Ask the owner.); try again later"),
    ],
)
def test_what_the_hub_refuses_is_one_line(place, status, code, message, hub, vae, tmp_path, capsys):
    save_vae(vae, tmp_path / "vae")
    hub.refuse = {place: (status, "No.\nAsk the owner.")}
    assert main(["push", str(tmp_path / "vae"), "me/vae", "--license", "nonsense"]) == code
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error
    assert hub.commits == []


def test_no_network_is_one_line_and_exit_code_1(vae, tmp_path, monkeypatch, capsys):
    save_vae(vae, tmp_path / "vae")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        assert main(["push", str(tmp_path / "vae"), "me/vae"]) == 1
    error = capsys.readouterr().err
    assert "the hub cannot be reached" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["VAE", "vae"], "got repo_id 'vae'; need owner/name"),
        (["VAE", "me/vae", "--dry_run", "VAE"], "which exists already; need a new or empty folder"),
        (["VAE", "me/vae", "--data", "skimage", "--resolution", "7"], "need at least 1 image, and 16 pixels"),
        (["NOTHING", "me/vae"], "there is no file or folder"),
        (["VAE", "me/vae"], "got no token for the hub"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_uploaded(
    arguments, message, hub, vae, tmp_path, monkeypatch, capsys
):
    if "token" in message:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(publish_module, "get_token", lambda: None)  # one may be on this machine's disk
    save_vae(vae, tmp_path / "vae")
    before = {path.name: path.read_bytes() for path in (tmp_path / "vae").iterdir()}
    places = {"VAE": str(tmp_path / "vae"), "NOTHING": str(tmp_path / "nothing" / "at" / "all")}
    assert main(["push", *(places.get(argument, argument) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert hub.created == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "vae").iterdir()} == before
