"""The page of `sdvae demo`, in gradio: its components, its events, and the server."""

from __future__ import annotations

import html
import ipaddress
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gradio as gr

from sdvae.data.reading import Color
from sdvae.errors import InputError
from sdvae.pictures import AMPLIFICATION
from sdvae.studio.demo.view import (
    Edits,
    Encoded,
    Model,
    encode,
    open_photograph,
    save_latents,
    show,
    show_latents,
    show_preview,
)
from sdvae.studio.settings import DemoOptions

KEPT_SECONDS = 3600  # uploads, pictures and latents are deleted this long after their last use
CLEANING_SECONDS = 600  # time between two searches for files to delete
GRADIO_FOLDER = "GRADIO_TEMP_DIR"
QUEUE_SIZE = 16  # waiting requests; more are refused
STYLE = Path(__file__).with_name("style.css")

ALL = -1  # value of the channel menu that shows all channels


class Handlers:
    """The functions that the page's events call. Each returns new values for components, in the order of `page`.

    Args:
        models: one or two.
        max_side: a number of pixels; photographs with a longer side are shrunk to it.
        color: as in `ReadOptions`.
        folder: where the files of latents are written that can be downloaded.
    """

    def __init__(self, models: Sequence[Model], max_side: int, color: Color, folder: Path):
        self.models = models
        self.max_side = max_side
        self.color = color
        self.folder = folder

    def photograph(self, first: str | None, second: str | None, *settings: Any) -> list[Any]:
        """Encode the photographs and show them. If a file cannot be read, the status line says why."""
        words, errors = [], []
        images = []
        for path in (first, second):
            image = None
            if path is not None:
                try:
                    image, word = open_photograph(path, self.max_side, self.color)
                    words.append(word)
                except InputError as error:
                    errors.append(str(error))
            images.append(image)
        photograph, other = images
        status = _status(words, errors)
        if first is None or photograph is None:
            no_files = [gr.DownloadButton(value=None, interactive=False)] * len(self.models)
            return [None, status, *no_files, *self._nothing()]
        with _said_on_page():
            encoded = [encode(model, photograph, other) for model in self.models]
        shown = self.settings(
            encoded, *settings
        )  # This may fail, so files are written after it: gradio deletes only files that it was given.
        files = [self._file(model, one, Path(first).stem) for model, one in zip(self.models, encoded, strict=True)]
        return [encoded, status, *files, *shown]

    def settings(self, encoded: list[Encoded] | None, *settings: Any) -> list[Any]:
        """Decode again after a change of settings."""
        if encoded is None:
            return self._nothing()
        edits = _edits(*settings[:-1])
        shown: list[Any] = []
        for model, one, latents in zip(self.models, encoded, self.channel(encoded, *settings), strict=True):
            with _said_on_page():
                view = show(model, one, edits)
            shown += [(view.original, view.reconstruction), view.difference, latents, _table(view.figures)]
        return shown

    def preview(self, encoded: list[Encoded] | None, *settings: Any) -> Any:
        """The first model's pair of pictures with its student's in place of its own, which takes longer."""
        if encoded is None:
            return None
        with _said_on_page():
            return show_preview(self.models[0], encoded[0], _edits(*settings[:-1]))

    def channel(self, encoded: list[Encoded] | None, *settings: Any) -> list[Any]:
        """Draw only the latents, without decoding them."""
        if encoded is None:
            return [None] * len(self.models)
        *edited, channel = settings
        edits, wanted = _edits(*edited), None if channel == ALL else channel
        with _said_on_page():
            return [show_latents(model, one, edits, wanted) for model, one in zip(self.models, encoded, strict=True)]

    def _nothing(self) -> list[Any]:
        return [None, None, None, ""] * len(self.models)

    def _file(self, model: Model, encoded: Encoded, stem: str) -> gr.DownloadButton:
        folder = Path(tempfile.mkdtemp(dir=self.folder))  # a new one, since two photographs may have the same name
        path = folder / f"{stem}.safetensors"
        save_latents(model, encoded, path)
        return gr.DownloadButton(value=path, interactive=True)


@contextmanager
def _said_on_page() -> Iterator[None]:
    """Show an InputError in the corner of the page, such as one about latents that overflow."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _edits(blend: float, path: str, noise: float, seed: float | None, zeroed: list[int]) -> Edits:
    """The edits, from all settings of the page except the last. An empty number field gives a seed of None."""
    return Edits(blend, path == "spherical", noise, int(seed or 0), tuple(zeroed))


def page(handlers: Handlers) -> gr.Blocks:
    """The page's components and events. The models handle one request at a time, for all visitors together."""
    models = handlers.models
    with gr.Blocks(
        title="sdvae demo", analytics_enabled=False, delete_cache=(CLEANING_SECONDS, KEPT_SECONDS)
    ) as blocks:
        named = "".join(f"<br><b>{html.escape(model.name)}</b>: {model.summary}" for model in models)
        gr.HTML(f"<h1>What a VAE does to a photograph</h1>{named.removeprefix('<br>')}", padding=True)
        encoded = gr.State(time_to_live=KEPT_SECONDS)
        with gr.Row():
            with gr.Column(scale=1, min_width=300, elem_id="left"):
                with gr.Column(elem_id="photograph"):
                    first = gr.File(label="Photograph", file_types=["image"], height=140, elem_id="first")
                    status = gr.HTML(_status(["Drop a photograph above."], []), elem_id="status", padding=True)
                with gr.Column(elem_id="settings"):
                    second, settings = _settings(max(model.vae.config.latent_channels for model in models))
            with gr.Column(scale=3, elem_id="results"), gr.Row():
                shown, files = [], []
                for model in models:
                    with gr.Column(min_width=340):
                        components, file = _results(model, alone=len(models) == 1)
                        shown += components
                        files.append(file)

        *edited, channel = settings
        pairs = shown[::4]
        model_use: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
        gr.on(
            [first.change, second.change],
            handlers.photograph,
            [first, second, *settings],
            [encoded, status, *files, *shown],
            show_progress_on=pairs,
            trigger_mode="always_last",
            **model_use,
        )
        changed = [
            component.change for component in edited
        ]  # not `input`, which a slider's reset button does not trigger
        decoding: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": pairs, **model_use}
        if models[0].student is None:
            gr.on(changed, handlers.settings, [encoded, *settings], shown, trigger_mode="always_last", **decoding)
        else:  # the student has its own turn, so that it follows a slider while the VAE decodes
            quick: dict[str, Any] = {"concurrency_id": "student", "concurrency_limit": 1, "api_visibility": "private"}
            gr.on(
                changed,
                handlers.preview,
                [encoded, *settings],
                pairs[0],
                show_progress="hidden",
                trigger_mode="always_last",
                **quick,
            ).then(handlers.settings, [encoded, *settings], shown, trigger_mode="always_last", **decoding)
        drawn = shown[2::4]

        def draw(*values: Any) -> Any:
            pictures = handlers.channel(*values)
            return pictures if len(drawn) > 1 else pictures[0]  # gradio expects a single output without a list

        gr.on([channel.change], draw, [encoded, *settings], drawn, show_progress="hidden", **model_use)
    return blocks.queue(max_size=QUEUE_SIZE)


def _settings(channels: int) -> tuple[gr.File, list[Any]]:
    """The field for the second photograph, and the settings in the order of `Handlers.settings`."""
    gr.HTML("<h3>Edit the latents before they are decoded</h3>", padding=True)
    noise = gr.Slider(
        0, 3, 0, step=0.05, label="Noise", elem_id="noise", info="in standard deviations of the latents of photographs"
    )
    seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0, maximum=2**31 - 1)
    names = [(str(channel), channel) for channel in range(channels)]
    zeroed = gr.CheckboxGroup(names, value=[], label="Channels set to zero", elem_id="zeroed")
    channel = gr.Dropdown([("all", ALL), *names], value=ALL, label="Channel to show", elem_id="channel")
    second = gr.File(label="Second photograph", file_types=["image"], height=140, elem_id="second")
    blend = gr.Slider(0, 1, 0, step=0.05, label="Towards the second photograph", elem_id="blend")
    path = gr.Radio(["linear", "spherical"], value="linear", label="Along", show_label=True, elem_id="path")
    return second, [blend, path, noise, seed, zeroed, channel]


def _results(model: Model, *, alone: bool) -> tuple[list[gr.components.Component], gr.DownloadButton]:
    buttons: Any = ["download", "fullscreen"]
    title = "original | reconstruction" if alone else f"{model.name}: original | reconstruction"
    pair = gr.ImageSlider(
        label=title,
        format="png",
        interactive=False,
        max_height=640,
        elem_classes=["picture", "pair"],
        buttons=buttons,
    )
    with gr.Row():
        difference, latents = (
            gr.Image(
                label=label,
                format="png",
                interactive=False,
                buttons=buttons,
                min_width=220,
                elem_classes=["picture", name],
            )
            for label, name in (
                (f"{AMPLIFICATION} x |difference|", "difference"),
                ("latents, channel by channel", "channels"),
            )
        )
    figures = gr.HTML(elem_classes="figures")
    file = gr.DownloadButton("Download the latents (.safetensors)", size="md", interactive=False)
    return [pair, difference, latents, figures], file


def _status(words: Sequence[str], errors: Sequence[str]) -> str:
    lines = [f'<p class="error" role="alert">{html.escape(error)}</p>' for error in errors]
    return "".join([*lines, *(f"<p>{html.escape(word)}</p>" for word in words)])


def _table(figures: dict[str, str]) -> str:
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{value}</td></tr>" for name, value in figures.items())
    return f"<table>{rows}</table>"


@contextmanager
def running(models: Sequence[Model], options: DemoOptions) -> Iterator[gr.Blocks]:
    """Serve the page from a thread. When the block ends, all uploaded files are deleted.

    Args:
        models: one or two.
        options: the options of `sdvae demo`.

    Raises:
        InputError: when the server cannot listen at that host and port.
    """
    with _gradio_folder() as folder:
        blocks = page(Handlers(models, options.max_side, options.color, folder))
        try:
            blocks.launch(
                server_name=options.host,
                server_port=options.port,
                max_file_size=int(options.max_megabytes * 2**20),
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css_paths=STYLE,
                prevent_thread_lock=True,
                share=False,
                quiet=True,
                footer_links=[],
                run_history=False,  # it would store pictures in the browser
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
            )
        except OSError as error:
            raise InputError(
                f"got --host {options.host} --port {options.port}, where no server can listen: the port is in use, "
                "or the host is not this machine's; need a free port; choose another with --port"
            ) from error
        try:
            yield blocks
        finally:
            blocks.close(verbose=False)


@contextmanager
def _gradio_folder() -> Iterator[Path]:
    """A temporary folder for gradio's uploads and pictures.

    gradio has no argument for it: it reads an environment variable at every request. So this sets the variable for the
    whole process until the block ends.
    """
    before = os.environ.get(GRADIO_FOLDER)
    with tempfile.TemporaryDirectory(prefix="sdvae-demo-", ignore_cleanup_errors=True) as folder:
        os.environ[GRADIO_FOLDER] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ[GRADIO_FOLDER]
            else:
                os.environ[GRADIO_FOLDER] = before


def serve(options: DemoOptions) -> None:
    """Serve the page until Ctrl-C.

    Args:
        options: the options of `sdvae demo`.

    Raises:
        InputError: for a VAE that cannot be read, or an option out of range.
    """
    host, port, side, megabytes = options.host, options.port, options.max_side, options.max_megabytes
    if not 0 < port < 2**16 or side < 64 or not 0 < megabytes <= 1024:
        raise InputError(
            f"got port {port}, max_side {side}, max_megabytes {megabytes}; need a port from 1 to 65535, "
            "at least 64 pixels and up to 1024 megabytes"
        )
    models = [
        Model.load(options.vae, options.student),
        *([] if options.compare is None else [Model.load(options.compare)]),
    ]
    with running(models, options) as blocks:
        if not _is_loopback(host):
            print(f"listening on {host}: anybody who can reach this machine can use the page; there is no password")
        print(f"open {blocks.local_url} in a browser; Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            wait(blocks)
    print("\nended")


def wait(blocks: gr.Blocks) -> None:
    """Return when the server ends; Ctrl-C raises KeyboardInterrupt."""
    while blocks.is_running:
        time.sleep(0.2)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # not an address but a name
        return False
