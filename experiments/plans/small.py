"""The plan of the small scale, on Imagenette, for a laptop.

Figures that show Imagenette's photographs stay in `output`; the collected results have none.
"""

from collections.abc import Mapping

from omegaconf import DictConfig

from plans.small_models import (
    CLASSIFIERS,
    LITE0,
    PLANTED,
    PRIORS,
    RESNET,
    TRUTHS,
    add_models,
    add_planted,
    add_priors,
    choose,
    models,
    table_models,
)
from plans.steps import Plan

SHIPPED = "imagenette-small"
HELD_OUT = {"data.val_shards": "imagenette-train-0007.tar"}  # of the train split, to choose by
PHOTOS = {"data": "photos", "data.crops_per_photo": 1, "num_pictures": 3, "num_images": 3}

INGREDIENTS = {  # of the shipped sampler: each row adds its values to those above
    "plain": {
        "scheduler": "dpm_solver",
        "num_steps": 20,
        "eta": 0,
        "epsilon_scaling": 0,
        "guidance_scale": 2.0,
        "feature_guidance_scale": 0,
        "polish_steps": 0,
        "transform_noise": 0,
        "transform_shift": 0,
        "transform_zoom": 0,
        "transform_views": 1,
    },
    "45 stochastic steps": {"scheduler": "ddim", "num_steps": 45, "eta": 1},
    "epsilon scaling": {"epsilon_scaling": 0.01},
    "feature guidance": {"feature_guidance_scale": 10},
    "polish": {"polish_steps": 8},
    "transformations": {
        "transform_noise": 0.15,
        "transform_shift": 2.25,
        "transform_zoom": 0.045,
    },
    "three views": {"transform_views": 3},
}


def small_plan(config: DictConfig) -> Plan:
    """Return the plan; `config` is that of experiments/reproduce.py with scale=small."""
    plan = Plan(config, {"data": "imagenette", "data.root": config.root})
    add_priors(plan, config)
    add_models(plan, config)
    add_planted(plan)
    add_tables(plan, config)
    add_meanings(plan, config)
    add_adaptation(plan, config)
    add_trust(plan)
    add_photographs(plan, config)
    return plan


def sampler(values: Mapping[str, object]) -> dict[str, object]:
    """Return values of the sampler as overrides."""
    return {f"sampler.{name}": value for name, value in values.items()}


def ingredients() -> dict[str, dict]:
    """Return the rows that add one ingredient of feature guidance at a time."""
    values: dict[str, object] = {}
    rows = {}
    for name, added in INGREDIENTS.items():
        values |= added
        rows[name] = {"checkpoint": SHIPPED, "sampler": dict(values)}
    return rows


def add_tables(plan: Plan, config: DictConfig) -> None:
    """Add the scores of models: the shipped one, Table 1, ablations, frontier, guidance, depth."""
    number, guided = config.images, config.guided_images
    shipped, plain = {"checkpoint": SHIPPED, "num_samples": 1}, sampler(config.plain)
    plan.run("hybrid", "evaluate", shipped, number, "the shipped model, with feature guidance")
    about = "the shipped model without feature guidance"
    plan.run("plain", "evaluate", shipped | plain, number, about)
    priors = {"checkpoints": models(plan, *(f"prior_{name}" for name in PRIORS)), **HELD_OUT}
    plan.run("priors", "prior", priors, number, "tried for the prior, for equal time")
    plan.run("prior", "prior", {"checkpoints": [f"{SHIPPED}-prior"]}, number, "the shipped prior")
    overrides = {"checkpoints": table_models(plan), "num_samples": config.samples}
    about = "Table 1: every backbone, spatial and pooled"
    plan.run("reconstruction", "reconstruction", overrides, number, about)
    names = ("spatial", "perceptual_last", "perceptual_all", "unfrozen")
    overrides |= {"checkpoints": models(plan, *(f"{LITE0}_{name}" for name in names))}
    about = "a perceptual loss, or the prior trained too"
    plan.run("ablation", "reconstruction", overrides, number, about)
    baselines = {"checkpoints": models(plan, f"{LITE0}_pixels", f"{LITE0}_decoder")}
    about = "cosine against realism against seconds: plain, hybrid, training-free, baselines"
    plan.run("frontier", "frontier", baselines, guided, about)
    overrides = {"methods": ingredients(), "num_samples": 1} | HELD_OUT
    about = "feature guidance, an ingredient added in each row, on held-out images"
    plan.run("ingredients", "reconstruction", overrides, guided, about)
    names = ("dropout_0", "spatial", "dropout_0.3")
    overrides = {"checkpoints": models(plan, *(f"{LITE0}_{name}" for name in names)), **HELD_OUT}
    overrides |= {"grid": {"guidance_scale": [1, 1.75, 3]}}
    about = "conditioning dropout and guidance scale, on held-out images of the train split"
    plan.run("guidance", "sampler_grid", overrides, guided, about)
    overrides = {"checkpoints": [SHIPPED], "num_samples": 4} | plain
    plan.run("depth", "depth", overrides, guided, "what is lost, without feature guidance")


def add_meanings(plan: Plan, config: DictConfig) -> None:
    """Add what the features mean: robustness, concepts, mixtures, invariances, single features."""
    shipped = {"checkpoint": SHIPPED}
    overrides = {"severities": [1, 3, 5], "eps": [1, 4], "altered": plan.folder / "altered"}
    overrides |= {"out_of_distribution": config.out_of_distribution}
    about = "corrupted, adversarial and out-of-distribution images"
    plan.run("robustness", "robustness", shipped | overrides, config.guided_images, about)
    found = plan.run("concepts", "concepts", shipped | {"method": "dictionary"}, 500)
    overrides = {"concepts": f"{found.folder}/concepts.safetensors", "factors": [0, 1, 2]}
    overrides |= {"label": config.label, "among": plan.images(1000)}
    about = "the concept that a class needs most, attenuated and amplified"
    plan.run("steering", "steering", shipped | overrides, 100, about, after=(found,))
    about = "interpolations, splices and swaps of two images' features"
    plan.run("mixtures", "mixtures", shipped | {"weights": [0.25, 0.5, 0.75]}, 50, about)
    overrides = {"checkpoints": [SHIPPED]} | sampler(config.plain)
    plan.run("invariances", "invariances", overrides, 32, "what samples share")
    plan.run("units", "units", shipped, config.guided_images, "single features set to zero")


def add_adaptation(plan: Plan, config: DictConfig) -> None:
    """Add the inversion of each backbone by a model of another, beside a model trained for it."""
    for backbone in (LITE0, *CLASSIFIERS):
        other = RESNET if backbone == LITE0 else LITE0
        run, trained = models(plan, f"{other}_spatial", f"{backbone}_spatial")
        overrides = {"checkpoint": run, "trained": trained, **choose(backbone)}
        about = f"inverted by a model of {other}, through a fitted map"
        plan.run(f"adapt_{backbone}", "adapt", overrides, config.guided_images, about)


def add_trust(plan: Plan) -> None:
    """Add tests of trustworthiness: planted truths, calibration, information, a shortcut."""
    bits = {"num_samples": 4, "num_levels": 128}
    bits |= sampler({"feature_guidance_scale": 0, "polish_steps": 0, "guidance_scale": 1})
    for truth in TRUTHS:  # a table for each: its models take three hours of one thread
        planted = models(plan, *(f"{truth}_{method}" for method in PLANTED))
        overrides = {"checkpoints": planted, "truths": [truth], "num_samples": 8}
        plan.run(f"planted_{truth}", "planted", overrides, 32, "what inverters keep and invent")
        plan.add(f"photos_planted_{truth}", "planted", overrides | PHOTOS)
        overrides = {"checkpoints": models(plan, f"{truth}_spatial"), **bits}
        plan.run(f"information_{truth}", "information", overrides, 64, "bits kept")
    overrides = {"checkpoint": SHIPPED, "num_samples": 9}
    about = "whether samples differ as much as they should"
    plan.run("calibration", "calibration", overrides, 64, about)
    overrides = {"checkpoints": [SHIPPED, *models(plan, f"{LITE0}_pooled")], **bits}
    plan.run("information", "information", overrides, 64, "bits that a layer keeps, by depth")
    overrides = {"checkpoint": f"{SHIPPED}-prior"}
    plan.run("difference", "difference", overrides, 32, "a shortcut against its clean copy")


def add_photographs(plan: Plan, config: DictConfig) -> None:
    """Add the figures of the bundled photographs, which may be shown."""
    gallery = {"data": "photos", "num_pictures": 3}
    every = [SHIPPED, *table_models(plan), *models(plan, f"{LITE0}_pixels")]
    plan.add("gallery", "gallery", gallery | {"checkpoints": every}, "the qualitative comparison")
    about = "feature guidance, an ingredient added in each column"
    plan.add("photos_ingredients", "gallery", gallery | {"methods": ingredients()}, about)
    for script, overrides in {
        "mixtures": {"checkpoint": SHIPPED},
        "units": {"checkpoint": SHIPPED},
        "invariances": {"checkpoints": [SHIPPED]} | sampler(config.plain),
    }.items():
        plan.add(f"photos_{script}", script, PHOTOS | overrides)
