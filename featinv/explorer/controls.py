"""Controls of the page: its input components, and the settings that their values stand for."""

from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr

from featinv.analysis.concepts import Concepts
from featinv.analysis.edits import PATHS
from featinv.data.photographs import HELD_OUT, load
from featinv.explorer.inputs import MAX_FACTOR, MAX_SAMPLES, Settings
from featinv.models.featinv import FeatInv
from featinv.utils.errors import InputError

Components = dict[str, gr.components.Component]

PRIVATE = {"api_visibility": "private"}  # no public API
# Sliders for values of the sampler: minimum, maximum, step, label, explanation.
PLAIN = {
    "num_steps": (1, 100, 1, "Denoising steps", None),
    "guidance_scale": (0, 10, 0.05, "Guidance scale", "classifier-free; 1: off"),
}
GUIDANCE = {
    "feature_guidance_scale": (
        *(0, 20, 0.5, "Feature guidance scale"),
        "pulls every denoising step towards the features; 0: off, 10: strong",
    ),
    "polish_steps": (
        *(0, 20, 1, "Polish steps"),
        "towards the features, on the final image; 0: off",
    ),
}
TRANSFORMS = {
    "transform_noise": (0, 0.5, 0.01, "Noise", "standard deviation at full noise"),
    "transform_shift": (0, 8, 0.5, "Shift", "pixels, at most"),
    "transform_zoom": (0, 0.2, 0.01, "Zoom", "fraction, at most"),
}
SAMPLER = (*PLAIN, *GUIDANCE, *TRANSFORMS)
INTEGERS = ("seed", "num_samples", "num_steps", "polish_steps")


def choose_images(limits: str) -> Components:
    """Add the components for an image and for a second one to mix it with.

    Args:
        limits: What an upload may be, in words.
    """
    image = _upload(f"Image ({limits})", "image")
    with TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in HELD_OUT]
        for path, name in zip(paths, HELD_OUT, strict=True):
            load(name).save(path, "PNG")
        gr.Examples(paths, image, label="or one of these photographs")
    with gr.Accordion("Mix with a second image", open=False):
        second = _upload(f"Second image ({limits})", "second")
        weight = gr.Slider(
            0, 1, 0.5, step=0.05, label="Weight of the second image", elem_id="weight"
        )
        path = gr.Radio(PATHS, value=PATHS[0], label="Path from the first to the second")
    return {"image": image, "second": second, "weight": weight, "path": path}


def choose_drawing(model: FeatInv) -> Components:
    """Add the components for layer, noise and sampler, set to the model's own values."""
    backbone = model.backbone
    layers = [(describe_layer(model, layer), layer) for layer in backbone.layers]
    several = len(layers) > 1
    controls: Components = {
        "layer": gr.Radio(
            layers, value=backbone.layer, label="Layer", visible=several, elem_id="layer"
        ),
        "seed": gr.Number(0, precision=0, minimum=0, label="Seed of the noise", elem_id="seed"),
        "num_samples": gr.Slider(
            1, MAX_SAMPLES, 4, step=1, label="Reconstructions", elem_id="num_samples"
        ),
    }

    def add_sliders(table: dict[str, tuple]) -> None:
        for name, (low, high, step, label, info) in table.items():
            value = getattr(model.sampler, name)
            controls[name] = gr.Slider(
                low, max(high, value), value, step=step, label=label, info=info, elem_id=name
            )

    add_sliders(PLAIN)
    with gr.Accordion("Feature guidance", open=False):
        add_sliders(GUIDANCE)
        gr.Markdown("Random transformations through which guidance sees the image (0: off)")
        add_sliders(TRANSFORMS)
    return controls


def choose_concepts(concepts: Concepts) -> Components:
    """Add a check box per concept, which shows a slider for its factor when ticked."""
    number = len(concepts)
    names = [(f"concept {k}", k) for k in range(number)]
    with gr.Accordion(f"Concepts of {concepts.layer or 'the features'}", open=True):
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
    return {"concepts": ticked} | {f"factor {k}": slider for k, slider in enumerate(sliders)}


def read_controls(values: dict, precision: str) -> Settings:
    """Turn the controls' values into settings.

    Args:
        values: Name of a component -> its value.
        precision: Precision to draw in.

    Raises:
        InputError: A value out of range, or an empty control.
    """
    concepts = values.get("concepts", [])
    for name in ("seed", "num_samples", "weight", *SAMPLER, *(f"factor {k}" for k in concepts)):
        if values[name] is None:
            raise InputError(f"The value of {name} is missing: expected a number.")
    values = values | {name: int(values[name]) for name in INTEGERS}
    return Settings(
        sampler={name: values[name] for name in SAMPLER},
        factors={k: values[f"factor {k}"] for k in concepts},
        precision=precision,
        **{name: values[name] for name in ("seed", "num_samples", "weight", "path", "layer")},
    )


def describe_layer(model: FeatInv, layer: str) -> str:
    """Return the name of a layer and the shape of its features, e.g. `layer4 (512 x 7 x 7)`."""
    return f"{layer} ({' x '.join(map(str, model.backbone.feature_shapes[layer]))})"


def _upload(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label,
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        height=260,
        elem_id=name,
    )
