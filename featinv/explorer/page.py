"""The explorer's page: its layout, and what happens when its buttons are pressed."""

import hashlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
import numpy as np

from featinv.evaluation.figures import save_figure
from featinv.evaluation.tables import markdown_table
from featinv.explorer.controls import (
    PRIVATE,
    choose_concepts,
    choose_drawing,
    choose_images,
    describe_layer,
    read_controls,
)
from featinv.explorer.inputs import Photo, Settings, read_photo
from featinv.explorer.session import Exploration, Reconstruction
from featinv.utils.errors import InputError

# Gradio would fetch its default fonts from the network.
THEME = gr.themes.Default(
    primary_hue="indigo",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
#bar {min-height: 56px}
#bar .wrap {flex-direction: column}
#bar .progress-text {position: static; transform: none; order: 1; padding: 0; text-align: center}
#gallery .grid-wrap {min-height: 0; max-height: none; padding-top: 32px}
#gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(140px, 1fr))}
#table table {width: 100%}
#table td, #table th {border-color: var(--border-color-primary); padding: 6px 8px}
#table th {white-space: nowrap}
"""


class Page:
    """The page of the explorer, which keeps no user's state.

    Args:
        exploration: The model and concepts, shared by all users.
        sources: Arguments `checkpoint`, `concepts` and `probe` of the command line.
        command: Turns arguments into the shell command that repeats a run.
        precision: Precision to draw in: `"32-true"` or `"bf16-mixed"`.
        max_upload_mb: Maximal size of a file, in megabytes.
        max_megapixels: Maximal number of pixels of a picture, in millions.
    """

    def __init__(
        self,
        exploration: Exploration,
        sources: dict[str, str],
        command: Callable[[dict[str, str]], str],
        precision: str,
        max_upload_mb: int,
        max_megapixels: float,
    ) -> None:
        self.exploration, self.sources = exploration, sources
        self.repeat_command, self.precision = command, precision
        self.max_upload_mb, self.max_megapixels = max_upload_mb, max_megapixels
        model = exploration.model
        with gr.Blocks(
            title="FeatInv explorer", analytics_enabled=False, delete_cache=(3600, 3600)
        ) as self.blocks:
            layers = " or ".join(describe_layer(model, layer) for layer in model.backbone.layers)
            gr.Markdown(
                f"# FeatInv explorer\nWhat does **{model.backbone.name}** keep of an image at "
                f"**{layers}**? `{sources['checkpoint']}` draws images whose features should match "
                "those of yours. The cosine measures how well they do; 1 is a perfect match. Where "
                "samples differ, the classifier did not care, provided that their calibration is "
                "near 1: they are then as far from each other as from your image (below 1: too "
                "alike)."
            )
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self.controls = choose_images(
                        f"at most {max_upload_mb} MB, {max_megapixels:g} megapixels"
                    )
                    self.controls |= choose_drawing(model)
                    if exploration.concepts is not None:
                        self.controls |= choose_concepts(exploration.concepts)
                with gr.Column(scale=3, min_width=320):
                    self._show_results()
            for image in (self.controls["image"], self.controls["second"]):
                check = image.upload(self.check, image, preprocess=False, **PRIVATE)
                check.failure(lambda: None, None, image, **PRIVATE)  # remove a bad upload

    def launch(self, host: str, port: int) -> str:
        """Start serving in threads of this process; return the page's address.

        Raises:
            InputError: Nothing can be served there.
        """
        try:
            socket.create_server((host, port)).close()
        except (OSError, OverflowError) as error:
            raise InputError(
                f"The page cannot be served at host={host} port={port} ({error}): expected an "
                "address of this machine, for example 127.0.0.1, and a free port up to 65535."
            ) from error
        logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio pings its own server
        self.blocks.queue(max_size=32).launch(
            server_name=host,
            server_port=port,
            max_file_size=f"{self.max_upload_mb}mb",
            theme=THEME,
            css=CSS,
            footer_links=[],
            share=False,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            prevent_thread_lock=True,
            quiet=True,
        )
        return self.blocks.local_url

    def _show_results(self) -> None:
        """Add the buttons and the components for results."""
        with gr.Row():
            start = gr.Button("Invert", variant="primary", scale=3, elem_id="invert")
            stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
        bar = gr.HTML(elem_id="bar")  # empty: gradio overlays the progress
        self.status = gr.Markdown("Nothing drawn yet.", elem_id="status")
        self.gallery = gr.Gallery(
            label="Reconstructions, and where they differ",
            columns=4,
            fit_columns=False,
            object_fit="contain",
            format="png",
            height="auto",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="gallery",
        )
        self.table = gr.Markdown(elem_id="table")
        with gr.Row():
            self.picture = gr.DownloadButton(
                "Download picture (PNG)", interactive=False, elem_id="picture"
            )
            self.settings = gr.DownloadButton(
                "Download settings (JSON)", interactive=False, elem_id="settings"
            )
        self.command = gr.Textbox(
            label="Command that repeats this, in a folder with the image and the settings",
            lines=2,
            buttons=["copy"],
            interactive=False,
            elem_id="command",
        )
        drawing = start.click(
            self.draw,
            set(self.controls.values()),
            [self.status, self.gallery, self.table, self.picture, self.settings, self.command],
            show_progress_on=bar,
            concurrency_limit=1,
            preprocess=False,  # gr.Image would decode anything
            **PRIVATE,
        )
        stop.click(None, cancels=[drawing], **PRIVATE)

    # Event handlers

    def check(self, file: dict | None) -> None:
        """Raise a `gr.Error` if an upload cannot be used."""
        with _show_errors():
            self._photos([file])

    def draw(self, inputs: dict, progress: gr.Progress = gr.Progress()) -> Iterator[dict]:  # noqa: B008
        """Draw what the controls ask for; yield updates of the page, sample by sample.

        Args:
            inputs: Component -> value, as the browser sends it.
            progress: Gradio's progress bar, for the denoising steps.

        Raises:
            gr.Error: Bad input.
        """
        values = {name: inputs[control] for name, control in self.controls.items()}
        with _show_errors():
            settings = read_controls(values, self.precision)
            if values["image"] is None:
                raise InputError("There is no image: expected one, dropped or chosen on the left.")
            photos = self._photos([values["image"], values["second"]])
            condition = self.exploration.condition(photos, settings)
            steps = settings.num_samples * settings.sampler["num_steps"]
            yield self._results(photos, settings, [])
            drawn: list[Reconstruction] = []
            for reconstruction in self.exploration.draw(
                condition, settings, lambda step: progress((step, steps), unit="denoising steps")
            ):
                drawn.append(reconstruction)
                yield self._results(photos, settings, drawn)
        with TemporaryDirectory() as folder:
            downloads = self._downloads(photos, settings, drawn, folder)
            yield self._results(photos, settings, drawn) | downloads

    def _photos(self, files: Sequence[dict | None]) -> list[Photo]:
        """Read uploads, but no other file of this machine, whatever path the browser sends."""
        uploads = Path(self.blocks.GRADIO_CACHE).resolve()
        photos = []
        for file in files:
            if file is None:
                continue
            name, path = file.get("orig_name") or "image", Path(file["path"]).resolve()
            if not path.is_relative_to(uploads):
                raise InputError(f"'{name}' was not uploaded: expected a file from this page.")
            photos.append(read_photo(path, name, self.max_megapixels))
        return photos

    def _results(
        self, photos: Sequence[Photo], settings: Settings, drawn: Sequence[Reconstruction]
    ) -> dict:
        """Return component -> update for the samples drawn so far, without downloads."""
        pictures = [
            (sample.image.permute(1, 2, 0).numpy(), f"sample {number}")
            for number, sample in enumerate(drawn, 1)
        ]
        if spread := self.exploration.spread(photos, settings, drawn):
            pictures.append((np.moveaxis(spread.image, 0, -1), spread.caption))
        sampler = self.exploration.model.settings(**settings.sampler).describe()
        return {
            self.status: f"{len(drawn)} of {settings.num_samples} reconstructions of "
            f"{settings.layer}; {sampler}; in {settings.precision}",
            self.gallery: pictures,
            self.table: markdown_table(table_rows(drawn)) if drawn else "",
            self.picture: gr.update(interactive=False),
            self.settings: gr.update(interactive=False),
            self.command: "",
        }

    def _downloads(
        self,
        photos: Sequence[Photo],
        settings: Settings,
        drawn: Sequence[Reconstruction],
        folder: str,
    ) -> dict:
        """Write picture and settings; return component -> update for their downloads."""
        record = self.exploration.record(settings, photos)
        name = f"featinv-{hashlib.sha256(record.encode()).hexdigest()[:8]}"
        file = Path(folder) / f"{name}.json"
        file.write_text(record)
        picture = file.with_suffix(".png")
        save_figure(self.exploration.figure(photos, settings, drawn), picture)
        arguments = self.sources | {"repeat": file.name}
        arguments |= {key: p.name for key, p in zip(("image", "second"), photos, strict=False)}
        return {
            self.picture: gr.update(value=str(picture), interactive=True),
            self.settings: gr.update(value=str(file), interactive=True),
            self.command: self.repeat_command(arguments | {"output": name}),
        }


def table_rows(drawn: Sequence[Reconstruction]) -> list[dict[str, str]]:
    """Return one row of the table per sample, with its class if the encoder has classes."""
    rows = []
    for number, sample in enumerate(drawn, 1):
        row = {"sample": str(number), "cosine": f"{sample.cosine:.3f}"}
        if sample.label is not None:
            row |= {"class seen": sample.label, "probability": f"{sample.probability:.1%}"}
        rows.append(row)
    return rows


@contextmanager
def _show_errors() -> Iterator[None]:
    """Show the message of an `InputError` on the page."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error
