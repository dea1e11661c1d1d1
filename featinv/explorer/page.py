"""The explorer: a local page on which to invert photographs, mix them and steer concepts.

python -m featinv.cli.explore checkpoint=RUN
python -m featinv.cli.explore checkpoint=RUN repeat=SETTINGS.json image=PHOTO.jpg output=FOLDER
"""

import errno
import hashlib
import logging
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from featinv.analysis.edits import PATHS
from featinv.data.photographs import HELD_OUT, load
from featinv.evaluation.figures import save_figure
from featinv.evaluation.tables import markdown_table
from featinv.explorer.session import (
    MAX_FACTOR,
    MAX_SAMPLES,
    Exploration,
    Photo,
    Reconstruction,
    Settings,
    read_photo,
)
from featinv.utils.errors import InputError

try:
    import gradio as gr
except ModuleNotFoundError:
    print("Error: The explorer needs gradio: pip install 'featinv[explorer]'", file=sys.stderr)
    sys.exit(2)

# The page's own choice of fonts would be fetched from the network.
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
SAMPLER = (  # what the page asks of the sampler's values
    "num_steps",
    "guidance_scale",
    "feature_guidance_scale",
    "feature_guidance_iterations",
    "forward_guidance_scale",
    "feature_guidance_steps",
)
PRIVATE = {"api_visibility": "private"}  # the page is for people
WHOLE = (  # whose values are whole numbers
    "seed",
    "num_samples",
    "num_steps",
    "feature_guidance_iterations",
    "feature_guidance_steps",
)


def upload(label: str, name: str) -> gr.Image:
    """Return a component to drop a picture on."""
    return gr.Image(
        label=label,
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        height=260,
        elem_id=name,
    )


def value_slider(
    label: str,
    own: float,
    usual: tuple[float, float],
    step: float,
    info: str | None = None,
    name: str | None = None,
) -> gr.Slider:
    """Return a slider that starts at the model's own value, which its range always holds."""
    low, high = usual
    return gr.Slider(low, max(high, own), own, step=step, label=label, info=info, elem_id=name)


class Page:
    """The page: builds its components and answers its button.

    It holds nothing that belongs to a user, so that sessions cannot mix.

    Args:
        exploration: What all users explore.
        sources: The arguments `checkpoint` and `concepts` of the command line, to be repeated.
        command: Returns the shell command that draws again, from its arguments.
        max_upload_mb: Size of a file at most, in megabytes.
        max_megapixels: Width times height of a picture at most, in millions.
    """

    def __init__(
        self,
        exploration: Exploration,
        sources: dict[str, str],
        command: Callable[[dict[str, str]], str],
        max_upload_mb: int,
        max_megapixels: float,
    ) -> None:
        self.exploration, self.sources, self.command_line = exploration, sources, command
        self.max_upload_mb, self.max_megapixels = max_upload_mb, max_megapixels
        self.controls: dict[str, gr.components.Component] = {}
        with gr.Blocks(
            title="FeatInv explorer", analytics_enabled=False, delete_cache=(3600, 3600)
        ) as self.blocks:
            backbone = exploration.model.backbone
            shape = " x ".join(map(str, backbone.feature_shape))
            gr.Markdown(
                f"# FeatInv explorer\nWhat does **{backbone.name}** keep of an image at layer "
                f"`{backbone.layer}` ({shape})? `{sources['checkpoint']}` draws images whose "
                "features should be those of yours; their cosine says how near they come (1: the "
                "same)."
            )
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._choose_images()
                    self._choose_drawing()
                    if exploration.concepts is not None:
                        self._choose_concepts(len(exploration.concepts))
                with gr.Column(scale=3, min_width=320):
                    self._show_results()

    # Components

    def _choose_images(self) -> None:
        limits = f"at most {self.max_upload_mb} MB, {self.max_megapixels:g} megapixels"
        image = upload(f"Image ({limits})", "image")
        with TemporaryDirectory() as folder:
            paths = [str(Path(folder) / name) for name in HELD_OUT]
            for path, name in zip(paths, HELD_OUT, strict=True):
                load(name).save(path, "PNG")
            gr.Examples(paths, image, label="or one of these photographs")
        with gr.Accordion("Mix with a second image", open=False):
            second = upload(f"Second image ({limits})", "second")
            weight = gr.Slider(
                0, 1, 0.5, step=0.05, label="Weight of the second image", elem_id="weight"
            )
            path = gr.Radio(PATHS, value=PATHS[0], label="Path from the first to the second")
        for component in (image, second):
            checked = component.upload(self.check, component, preprocess=False, **PRIVATE)
            checked.failure(lambda: None, None, component, **PRIVATE)  # takes it off again
        self.controls |= {"image": image, "second": second, "weight": weight, "path": path}

    def _choose_drawing(self) -> None:
        own = self.exploration.model.sampler
        seed = gr.Number(0, precision=0, minimum=0, label="Seed of the noise", elem_id="seed")
        samples = gr.Slider(
            1, MAX_SAMPLES, 4, step=1, label="Reconstructions", elem_id="num_samples"
        )
        steps = value_slider("Denoising steps", own.num_steps, (1, 100), 1, name="num_steps")
        guidance = value_slider(
            "Guidance scale",
            own.guidance_scale,
            (0, 10),
            0.05,
            "away from what is drawn without features; 1: off",
        )
        with gr.Accordion("Feature guidance", open=False):
            scale = value_slider(
                "Length of a gradient step",
                own.feature_guidance_scale,
                (0, 0.5),
                0.005,
                "towards the features; root mean square, in the latents' units; 0: off",
            )
            iterations = value_slider(
                "Gradient steps in a denoising step", own.feature_guidance_iterations, (1, 20), 1
            )
            forward = value_slider(
                "Strength of forward guidance",
                own.forward_guidance_scale,
                (0, 10),
                0.05,
                "by the gradient through the network; 0: off",
            )
            guided = value_slider(
                "Guided denoising steps",
                own.feature_guidance_steps or own.num_steps,
                (1, 100),
                1,
                "the last ones; more than there are: all",
            )
        self.controls |= {"seed": seed, "num_samples": samples}
        values = (steps, guidance, scale, iterations, forward, guided)
        self.controls |= dict(zip(SAMPLER, values, strict=True))

    def _choose_concepts(self, number: int) -> None:
        with gr.Accordion("Concepts", open=True):
            names = [(f"concept {k}", k) for k in range(number)]
            ticked = gr.CheckboxGroup(names, value=[], label="Steer", elem_id="concepts")
            sliders = [
                gr.Slider(
                    0,
                    MAX_FACTOR,
                    1,
                    step=0.05,
                    visible=False,
                    label=f"Factor of {name}",
                    info="0: removed, 1: unchanged, 2: doubled",
                    elem_id=f"factor-{k}",
                )
                for name, k in names
            ]
        ticked.change(
            lambda chosen: [gr.update(visible=k in chosen) for k in range(number)],
            ticked,
            sliders,
            queue=False,
            show_progress="hidden",
            **PRIVATE,
        )
        self.controls["concepts"] = ticked
        self.controls |= {f"factor {k}": slider for k, slider in enumerate(sliders)}

    def _show_results(self) -> None:
        with gr.Row():
            start = gr.Button("Invert", variant="primary", scale=3, elem_id="invert")
            stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
        bar = gr.HTML(elem_id="bar")  # empty, the progress is laid over it
        self.status = gr.Markdown("Nothing drawn yet.", elem_id="status")
        self.gallery = gr.Gallery(
            label="Reconstructions",
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
            label="The command that draws this again, beside the image and the settings",
            lines=2,
            buttons=["copy"],
            interactive=False,
            elem_id="command",
        )
        outputs = [
            self.status,
            self.gallery,
            self.table,
            self.picture,
            self.settings,
            self.command,
        ]
        drawing = start.click(
            self.draw,
            set(self.controls.values()),
            outputs,
            show_progress_on=bar,
            concurrency_limit=1,
            preprocess=False,  # gr.Image's would decode whatever came
            **PRIVATE,
        )
        stop.click(None, cancels=[drawing], **PRIVATE)

    # Answers

    def check(self, file: dict | None) -> None:
        """Raise a `gr.Error` if an upload cannot be used."""
        with _told_on_the_page():
            self._photos([file])

    def draw(self, given: dict, progress: gr.Progress = gr.Progress()) -> Iterator[dict]:  # noqa: B008
        """Draw what the controls say; yield what the page is to show, sample by sample.

        Args:
            given: The controls' values, as the browser sends them.
            progress: Gradio's, shows the denoising steps.

        Raises:
            gr.Error: Something that cannot be used, told in a sentence.
        """
        values = {name: given[control] for name, control in self.controls.items()}
        with _told_on_the_page():
            settings = read_controls(values)
            if values["image"] is None:
                raise InputError("There is no image: expected one, dropped or chosen above.")
            photos = self._photos([values["image"], values["second"]])
            asked = self.exploration.ask(photos, settings)
            steps = settings.num_samples * settings.sampler["num_steps"]
            yield self._shown([], settings)
            drawn: list[Reconstruction] = []
            for reconstruction in self.exploration.draw(
                asked, settings, lambda step: progress((step, steps), unit="denoising steps")
            ):
                drawn.append(reconstruction)
                yield self._shown(drawn, settings)
        with TemporaryDirectory() as folder:
            yield self._shown(drawn, settings) | self._files(photos, settings, drawn, folder)

    def _photos(self, files: Sequence[dict | None]) -> list[Photo]:
        """Read uploads, and no other file of this machine, whatever the browser sends."""
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

    def _shown(self, drawn: Sequence[Reconstruction], settings: Settings) -> dict:
        rows = [
            {
                "sample": str(number),
                "cosine": f"{sample.cosine:.3f}",
                "class seen": sample.label,
                "probability": f"{sample.probability:.1%}",
            }
            for number, sample in enumerate(drawn, 1)
        ]
        about = self.exploration.model.settings(**settings.sampler).describe()
        return {
            self.status: f"{len(drawn)} of {settings.num_samples} reconstructions; {about}",
            self.gallery: [
                (sample.image.permute(1, 2, 0).numpy(), f"sample {number}")
                for number, sample in enumerate(drawn, 1)
            ],
            self.table: markdown_table(rows) if rows else "",
            self.picture: gr.update(interactive=False),
            self.settings: gr.update(interactive=False),
            self.command: "",
        }

    def _files(
        self,
        photos: Sequence[Photo],
        settings: Settings,
        drawn: Sequence[Reconstruction],
        folder: str,
    ) -> dict:
        """Write picture and settings; return the components that offer them."""
        record = self.exploration.record(settings, photos)
        name = f"featinv-{hashlib.sha256(record.encode()).hexdigest()[:8]}"
        file = Path(folder) / f"{name}.json"
        file.write_text(record)
        picture = file.with_suffix(".png")
        save_figure(self.exploration.figure(photos, drawn), picture)
        arguments = self.sources | {"repeat": file.name}
        arguments |= {key: p.name for key, p in zip(("image", "second"), photos, strict=False)}
        return {
            self.picture: gr.update(value=str(picture), interactive=True),
            self.settings: gr.update(value=str(file), interactive=True),
            self.command: self.command_line(arguments | {"output": name}),
        }


def read_controls(values: dict) -> Settings:
    """Return the settings that the page's controls say.

    Raises:
        InputError: A value out of its range, or an empty control.
    """
    if empty := [name for name in (*WHOLE, *SAMPLER) if values[name] is None]:
        raise InputError(f"The value of {empty[0]} is missing: expected a number.")
    values = values | {name: int(values[name]) for name in WHOLE}
    return Settings(
        seed=values["seed"],
        num_samples=values["num_samples"],
        sampler={name: values[name] for name in SAMPLER},
        factors={k: values[f"factor {k}"] for k in values.get("concepts", [])},
        weight=values["weight"],
        path=values["path"],
    )


@contextmanager
def _told_on_the_page() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def check_address(host: str, port: int) -> None:
    """Raise an `InputError` if nothing can be served there."""
    if not 1 <= port <= 65535:
        raise InputError(f"port is {port}, expected 1 to 65535, for example 7860.")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            what = "in use" if error.errno == errno.EADDRINUSE else "not for everybody to serve"
            raise InputError(
                f"port is {port}, which is {what}: expected a free one, for example "
                f"{free_port(host)}."
            ) from error
        raise InputError(
            f"host is '{host}', which is no address of this machine: expected 127.0.0.1 for this "
            "machine only, or 0.0.0.0 for everybody who reaches it."
        ) from error


def free_port(host: str) -> int:
    """Return a port that nobody uses at the moment."""
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


def launch(page: Page, host: str, port: int) -> str:
    """Start serving, in threads of this process; return the page's address."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is there
    page.blocks.queue(max_size=32).launch(
        server_name=host,
        server_port=port,
        max_file_size=f"{page.max_upload_mb}mb",
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
    return page.blocks.local_url
