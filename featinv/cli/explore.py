"""`featinv-explore`: serve the explorer's page, or repeat what was drawn there.

featinv-explore checkpoint=RUN
featinv-explore checkpoint=RUN repeat=SETTINGS.json image=PHOTO.jpg output=FOLDER
"""

import shlex
from pathlib import Path

from omegaconf import DictConfig

from featinv.cli.app import run_entry_point
from featinv.cli.values import quoted
from featinv.evaluation.figures import save_figure, save_png
from featinv.explorer.inputs import find_photo
from featinv.explorer.session import Exploration
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least
from featinv.utils.precision import resolve_precision


def serve(config: DictConfig) -> None:
    """Serve the page until it is interrupted."""
    try:  # gradio is optional: `repeat` does not need it
        from featinv.explorer.page import Page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise InputError("The explorer needs gradio: pip install 'featinv[explorer]'") from error
    at_least("max_upload_mb", config.max_upload_mb, 1)
    if not config.max_megapixels > 0:
        raise InputError(f"max_megapixels is {config.max_megapixels}, expected more than 0.")
    at_least("port", config.port, 1)
    device = pick_device(config.device)
    page = Page(
        Exploration.load(config.checkpoint, config.concepts, device, config.probe),
        {
            key: config[key]
            for key in ("checkpoint", "concepts", "probe")
            if config[key] is not None
        },
        repeat_command,
        resolve_precision(config.precision, device),
        config.max_upload_mb,
        config.max_megapixels,
    )
    address = page.launch(config.host, config.port)
    print(f"The explorer is at {address} - Ctrl-C ends it.", flush=True)
    page.blocks.block_thread()


def repeat_command(arguments: dict[str, str]) -> str:
    """Return the explorer's command with these arguments, quoted for the shell and for Hydra."""
    words = [f"{key}={quoted(value)}" for key, value in arguments.items()]
    return shlex.join(["featinv-explore", *words])


def repeat(config: DictConfig) -> None:
    """Repeat what the page drew, and save the pictures."""
    if config.image is None:
        raise InputError("The value of image is missing: set it with image=PHOTO.jpg.")
    device = pick_device(config.device)
    exploration = Exploration.load(config.checkpoint, config.concepts, device, config.probe)
    names = [name for name in (config.image, config.second) if name is not None]
    photos = [find_photo(str(name), config.max_megapixels) for name in names]
    settings = exploration.read(str(config.repeat), photos)
    drawn = []
    for sample in exploration.draw(exploration.condition(photos, settings), settings):
        drawn.append(sample)
        save_png(sample.image, Path(config.output) / f"sample_{len(drawn)}.png")
        print(f"sample {len(drawn)}: {sample.caption}", flush=True)
    save_figure(
        exploration.figure(photos, settings, drawn), Path(config.output) / "reconstructions.png"
    )
    print(f"The pictures are in {config.output}.")


def main(config: DictConfig) -> None:
    """Serve the page, or draw with the settings in `repeat`."""
    serve(config) if config.repeat is None else repeat(config)


def run() -> None:
    """Run the command line."""
    run_entry_point(main, "explorer")


if __name__ == "__main__":
    run()
