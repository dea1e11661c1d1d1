"""The plan of the small scale, on Imagenette, for a laptop.

Figures that show Imagenette's photographs stay in `output`; the collected results have none.
"""

from collections.abc import Mapping

from omegaconf import DictConfig

from plans.small_models import (
    CLASSIFIERS,
    LITE0,
    PLANTED_STEPS,
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
from plans.steps import TABLE, Plan

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
    shipped = {"checkpoint": SHIPPED, "num_samples": 1}
    scores = ("table.md", "metrics.json")
    number, guided = config.images, config.guided_images
    about = "the shipped model as it is, with feature guidance"
    plan.run("hybrid", about, "evaluate", shipped, number, scores)
    about, plain = "the shipped model without feature guidance", sampler(config.plain)
    plan.run("plain", about, "evaluate", shipped | plain, number, scores)
    trained = {"checkpoints": models(plan, *(f"prior_{name}" for name in PRIORS)), **HELD_OUT}
    about = "what was tried for the prior: samples after equal time"
    plan.run("priors", about, "prior", trained, number)
    prior = {"checkpoints": [f"{SHIPPED}-prior"]}
    plan.run("prior", "the shipped prior alone", "prior", prior, number, scores)
    every = {"checkpoints": table_models(plan)}
    about = "Table 1: every backbone, spatial and pooled"
    samples = {"num_samples": config.samples}
    plan.run("reconstruction", about, "reconstruction", every | samples, number)
    names = ("spatial", "perceptual_last", "perceptual_all", "unfrozen")
    compared = {"checkpoints": models(plan, *(f"{LITE0}_{name}" for name in names))}
    about = "a perceptual loss, or the prior trained too"
    plan.run("ablation", about, "reconstruction", compared | samples, number)
    baselines = {"checkpoints": models(plan, f"{LITE0}_pixels", f"{LITE0}_decoder")}
    about = "cosine against realism against seconds: plain, hybrid, training-free, baselines"
    figures = ("frontier_lite2.png", "frontier_lite1.png")
    plan.run("frontier", about, "frontier", baselines, guided, TABLE + figures)
    about = "feature guidance, an ingredient added in each row, on held-out images"
    own = {"methods": ingredients(), "num_samples": 1} | HELD_OUT
    plan.run("ingredients", about, "reconstruction", own, guided)
    about = "conditioning dropout and guidance scale, on held-out images of the train split"
    names = ("dropout_0", "spatial", "dropout_0.3")
    own = {"checkpoints": models(plan, *(f"{LITE0}_{name}" for name in names)), **HELD_OUT}
    own |= {"grid": {"guidance_scale": [1, 1.75, 3]}}
    plan.run("guidance", about, "sampler_grid", own, guided, (*TABLE, "cosine.png"))
    own, results = {"checkpoints": [SHIPPED], "num_samples": 4}, (*TABLE, "curves.png")
    about = "what is lost with depth, without feature guidance"
    plan.run("depth", about, "depth", own | plain, guided, results)


def add_meanings(plan: Plan, config: DictConfig) -> None:
    """Add what the features mean: robustness, concepts, mixtures, invariances, single features."""
    shipped = {"checkpoint": SHIPPED}
    own = {"severities": [1, 3, 5], "eps": [1, 4], "altered": plan.folder / "altered"}
    own |= {"out_of_distribution": config.out_of_distribution}
    about, number = "corrupted, adversarial and out-of-distribution images", config.guided_images
    plan.run("robustness", about, "robustness", shipped | own, number)
    found = plan.run(
        "concepts",
        "concepts of the last layer, by a sparse dictionary",
        "concepts",
        {"checkpoint": SHIPPED, "method": "dictionary"},
        500,
        results=(),
    )
    own = {"concepts": f"{found.folder}/concepts.safetensors", "factors": [0, 1, 2]}
    own |= {"label": config.label, "among": plan.images(1000)}
    about = "the concept that a class needs most, attenuated and amplified"
    plan.run("steering", about, "steering", shipped | own, 100, after=(found,))
    about = "interpolations, splices and swaps of two images' features"
    plan.run("mixtures", about, "mixtures", shipped | {"weights": [0.25, 0.5, 0.75]}, 50)
    overrides = {"checkpoints": [SHIPPED]} | sampler(config.plain)
    plan.run("invariances", "what samples share", "invariances", overrides, 32)
    plan.run("units", "single features set to zero", "units", shipped, config.guided_images)


def add_adaptation(plan: Plan, config: DictConfig) -> None:
    """Add the inversion of each backbone by a model of another, beside a model trained for it."""
    for backbone in (LITE0, *CLASSIFIERS):
        other = RESNET if backbone == LITE0 else LITE0
        run, trained = models(plan, f"{other}_spatial", f"{backbone}_spatial")
        own = {"checkpoint": run, "trained": trained, **choose(backbone)}
        about = f"{backbone} inverted by a model of {other}, through a fitted map"
        plan.run(f"adapt_{backbone}", about, "adapt", own, config.guided_images)


def add_trust(plan: Plan) -> None:
    """Add tests of trustworthiness: planted truths, calibration, information, a shortcut."""
    bits = {"num_samples": 4, "num_levels": 128}
    bits |= sampler({"feature_guidance_scale": 0, "polish_steps": 0, "guidance_scale": 1})
    for truth in TRUTHS:  # a table for each: its models take three hours of one thread
        planted = models(plan, *(f"{truth}_{method}" for method in PLANTED_STEPS))
        own = {"checkpoints": planted, "truths": [truth], "num_samples": 8}
        about = f"what inverters keep and invent of the planted truth {truth}"
        plan.run(f"planted_{truth}", about, "planted", own, 32)
        about, results = f"samples of the planted truth {truth}", ("table.md", "planted.png")
        plan.add(f"photos_planted_{truth}", about, "planted", own | PHOTOS, results=results)
        own = {"checkpoints": models(plan, f"{truth}_spatial"), **bits}
        about, results = f"bits that the planted truth {truth} keeps", (*TABLE, "bits.png")
        plan.run(f"information_{truth}", about, "information", own, 64, results)
    overrides = {"checkpoint": SHIPPED, "num_samples": 9}
    about = "whether samples differ as much as they should"
    results = (*TABLE, "calibration.png", "calibrated.yaml")
    plan.run("calibration", about, "calibration", overrides, 64, results)
    overrides = {"checkpoints": [SHIPPED, *models(plan, f"{LITE0}_pooled")], **bits}
    about = "bits that a layer keeps, by depth"
    plan.run("information", about, "information", overrides, 64, (*TABLE, "bits.png"))
    overrides = {"checkpoint": f"{SHIPPED}-prior"}
    plan.run("difference", "a shortcut against its clean copy", "difference", overrides, 32)


def add_photographs(plan: Plan, config: DictConfig) -> None:
    """Add the figures of the bundled photographs, which may be shown."""
    shipped = {"checkpoint": SHIPPED}
    every = [SHIPPED, *table_models(plan), *models(plan, f"{LITE0}_pixels")]
    overrides = {"data": "photos", "num_pictures": 3, "checkpoints": every}
    results = ("table.md", "gallery.png")
    plan.add("gallery", "the qualitative comparison", "gallery", overrides, results=results)
    overrides = {"data": "photos", "num_pictures": 3, "methods": ingredients()}
    about, results = "feature guidance, an ingredient added in each column", ("gallery.png",)
    plan.add("photos_ingredients", about, "gallery", overrides, results=results)
    results = ("table.md", "linear.png", "splices.png")
    plan.add("photos_mixtures", "mixtures", "mixtures", PHOTOS | shipped, results=results)
    results = ("table.md", "units.png")
    plan.add("photos_units", "single features", "units", PHOTOS | shipped, results=results)
    overrides = {"checkpoints": [SHIPPED]} | sampler(config.plain)
    results = ("table.md", "invariances.png")
    about = "samples of the photographs' features"
    script = "invariances"
    plan.add("photos_invariances", about, script, PHOTOS | overrides, results=results)
