"""Steps of a plan: commands with their products and dependencies."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from featinv.cli.values import quoted
from featinv.utils.errors import at_least

ENTRY_POINTS = ("train", "evaluate")  # in the repository's root; all others are experiments
# Figures without photographs, which may be shown whatever the data.
PLOTS = ("curves.png", "bits.png", "cosine.png", "calibration.png", "frontier_*.png")


@dataclass(frozen=True)
class Step:
    """One command of a plan.

    Args:
        name: Of the step, and of its folder among the results.
        script: `train`, `evaluate`, or the name of an experiment.
        overrides: Key -> value. A step as a value, also in a list or a dict, stands for its folder
            and is a dependency.
        folder: Of its output.
        about: Its result in a few words, where the name does not tell.
        after: Further dependencies.
        trained_images: Images that its training sees.
        drawn_images: Images that it draws; expensive ones count several times.
    """

    name: str
    script: str
    overrides: Mapping[str, object]
    folder: Path
    about: str = ""
    after: tuple["Step", ...] = ()
    trained_images: float = 0
    drawn_images: float = 0

    @property
    def file(self) -> str:
        """The script's file, from the repository's root."""
        folder = "" if self.script in ENTRY_POINTS else "experiments/"
        return f"{folder}{self.script}.py"

    @property
    def product(self) -> Path:
        """The file that marks the step as done."""
        makes_weights = self.script in ("train", "train_backbone")
        return self.folder / ("model.safetensors" if makes_weights else "table.md")

    @property
    def results(self) -> tuple[str, ...]:
        """Patterns of the collected files in its folder; photographs of data sets stay there."""
        if self.script == "train":
            return ()
        figures = ("*.png",) if self.overrides.get("data") == "photos" else PLOTS
        return ("table.*", "metrics.json", "calibrated.yaml", *figures)

    @property
    def needs(self) -> list["Step"]:
        """The steps that it depends on."""
        return [*_steps_in(list(self.overrides.values())), *self.after]

    @property
    def arguments(self) -> list[str]:
        """The overrides for the command line."""
        overrides = {**self.overrides, "output": self.folder}
        return [f"{key}={_text(value)}" for key, value in overrides.items()]


class Plan(dict[str, Step]):
    """Name -> step, in order.

    Args:
        config: Of experiments/reproduce.py.
        data: Overrides that choose the images.
    """

    def __init__(self, config: DictConfig, data: Mapping[str, object]) -> None:
        super().__init__()
        self.folder, self.data = Path(config.output), data
        self.seed, self.max_steps, self.max_images = config.seed, config.max_steps, None
        if config.max_images is not None:
            self.max_images = at_least("max_images", config.max_images, 4)

    def images(self, number: int) -> int:
        """Return a number of images, or `max_images` where that is less."""
        return number if self.max_images is None else min(number, self.max_images)

    def add(
        self, name: str, script: str, overrides: Mapping, about: str = "", **more: object
    ) -> Step:
        """Add a step, with the seed; its folder has its name unless another is given."""
        folder = more.pop("folder", self.folder / name)
        self[name] = Step(name, script, {**overrides, "seed": self.seed}, folder, about, **more)
        return self[name]

    def train(self, name: str, overrides: Mapping, about: str = "", **more: object) -> Step:
        """Add the training of a model, which resumes if interrupted."""
        overrides = {**overrides, **self.data, "resume": "auto"}
        if self.max_steps is not None:
            overrides |= {"trainer.max_steps": self.max_steps, "epochs": None}
        folder = self.folder / "models" / name
        return self.add(f"train_{name}", "train", overrides, about, folder=folder, **more)

    def run(
        self,
        name: str,
        script: str,
        overrides: Mapping,
        num_images: int,
        about: str = "",
        **more: object,
    ) -> Step:
        """Add an experiment on a number of images of the data."""
        overrides = {**self.data, **overrides, "num_images": self.images(num_images)}
        return self.add(name, script, overrides, about, **more)


def _steps_in(value: object) -> Iterator[Step]:
    """Yield the steps in a value."""
    if isinstance(value, Step):
        yield value
    elif isinstance(value, list | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _steps_in(part)


def _text(value: object) -> str:
    """Return a value in the syntax of Hydra's command line."""
    if isinstance(value, Step):
        return _text(value.folder)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return quoted(value) if isinstance(value, str | Path) else str(value)
