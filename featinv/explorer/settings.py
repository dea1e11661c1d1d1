"""Settings of a run of the explorer, besides its model and its images."""

from dataclasses import dataclass, field

from featinv.utils.errors import InputError, at_least

MAX_SAMPLES = 16
MAX_FACTOR = 2.0


@dataclass(frozen=True)
class Settings:
    """All that a run depends on besides its model, concepts and images.

    Args:
        seed: Seed of the noise.
        num_samples: Number of reconstructions, 1 to `MAX_SAMPLES`.
        sampler: Values that replace those of the model's sampler, by name.
        factors: Steered concept -> factor in [0, `MAX_FACTOR`]; 0 removes it, 1 changes nothing.
        weight: Weight of the second image in a mixture, in [0, 1].
        path: Path of a mixture, see `featinv.analysis.edits.mix`.
        layer: Layer of the backbone to invert; `None`: the model's default.
        precision: Precision to draw in: `"32-true"` or `"bf16-mixed"`.

    Raises:
        InputError: A value out of range.
    """

    seed: int = 0
    num_samples: int = 4
    sampler: dict[str, object] = field(default_factory=dict)
    factors: dict[int, float] = field(default_factory=dict)
    weight: float = 0.5
    path: str = "linear"
    layer: str | None = None
    precision: str = "32-true"

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)
        if at_least("num_samples", self.num_samples, 1) > MAX_SAMPLES:
            raise InputError(
                f"num_samples is {self.num_samples}, expected 1 to {MAX_SAMPLES}, the nearest "
                f"valid choice is {MAX_SAMPLES}."
            )
        if not 0 <= self.weight <= 1:
            raise InputError(f"The weight of the second image is {self.weight}, expected 0 to 1.")
        for concept, factor in self.factors.items():
            if not 0 <= factor <= MAX_FACTOR:
                raise InputError(
                    f"The factor of concept {concept} is {factor}, expected 0 to {MAX_FACTOR:g}."
                )
