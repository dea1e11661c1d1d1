"""The plan of the small scale, on Imagenette, for a laptop.

Figures that show Imagenette's photographs stay in `output`; the collected results have none.
"""

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from plans.steps import TABLE, Plan, Step

SHIPPED = "imagenette-small"
LITE0, RESNET, CONVNEXT, XCIT = "efficientnet_lite0", "resnet10t", "convnext_atto", "xcit_nano"
CLASSIFIERS = {  # trained from scratch: name -> timm's
    RESNET: "resnet10t",
    CONVNEXT: "convnext_atto",
    # A vision transformer that learns from few images: an accuracy of 0.47 on held-out images after
    # 300 steps. ViT-Tiny has 0.28, with a convolutional stem 0.38, and ConViT-Tiny 0.22.
    XCIT: "xcit_nano_12_p16_224",
}
TRUTHS = ("luminance", "low_pass", "blind", "mirror", "linear")
PLANTED_STEPS = {"spatial": 5000, "pooled": 5000, "decoder": 1500}  # an hour of one thread each
PERCEPTUAL_STEPS = {"last": 1250, "all": 1150}  # as long as 1,500 without the loss
DROPOUTS = (0, 0.3)  # beside the recipe's 0.1
HELD_OUT = {"data.val_shards": "imagenette-train-0007.tar"}  # of the train split, to choose by
PHOTOS = {"data": "photos", "data.crops_per_photo": 1, "num_pictures": 3, "num_images": 3}

PRIORS = {  # what was tried for the prior, each for the same time; the rest as in its recipe
    "chosen": {},
    "without_perceptual_loss": {"model.perceptual": None},
    "predicts_images": {"model.diffusion.prediction_type": "sample"},
    "predicts_noise": {"model.diffusion.prediction_type": "epsilon"},
    "linear_schedule": {"model.diffusion.beta_schedule": "scaled_linear"},
    "24_components": {"model.codec.num_components": 24},
    "narrow": {
        "model.unet.block_out_channels": [64, 128, 192],
        "model.unet.down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "model.unet.up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    },
    "batches_of_16": {"data.batch_size": 16},
    "batches_of_64": {"data.batch_size": 64},
    "lr_3e-4": {"model.optimizer.lr": 3e-4},
}
INGREDIENTS = {  # of the shipped sampler: each row adds its values to those above
    "plain": {
        "scheduler": "dpm_solver",
        "num_steps": 20,
        "eta": 0,
        "epsilon_scaling": 0,
        "guidance_scale": 1.5,
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
    add_tables(plan, config)
    add_meanings(plan, config)
    add_adaptation(plan, config)
    add_trust(plan)
    add_photographs(plan, config)
    return plan


def add_models(plan: Plan, config: DictConfig) -> None:
    """Add all trainings."""
    classifiers = {}
    for name, architecture in CLASSIFIERS.items():
        overrides = {"name": architecture, "data.root": config.root, "epochs": config.epochs}
        if plan.max_steps is not None:
            overrides |= {"trainer.max_steps": plan.max_steps}
        classifiers[name] = plan.add(
            f"backbone_{name}",
            "a small classifier, trained from scratch",
            "train_backbone",
            overrides,
            folder=Path("outputs/small/backbones") / architecture,  # where its config looks
            results=("table.md",),
        )

    def train(name: str, about: str, **own: object) -> None:
        backbone = own.pop("backbone", LITE0)
        overrides = {"experiment": "small", **choose(backbone), **own}
        overrides |= {"evaluation.num_images": plan.images(24), "evaluation.num_samples": 1}
        after = (classifiers[backbone],) if backbone in classifiers else ()
        plan.train(name, about, overrides, after=after)

    for backbone in (LITE0, *CLASSIFIERS):
        for conditioning in ("spatial", "pooled"):
            name, own = f"{backbone}_{conditioning}", {"conditioning": conditioning}
            train(name, "a ControlNet on the frozen prior", backbone=backbone, **own)
    decoder = "the feed-forward decoder of Dosovitskiy and Brox (2016)"
    train(f"{LITE0}_decoder", decoder, model="decoder")
    pixels = "the optimisation of pixels of Mahendran and Vedaldi (2015), without training"
    train(f"{LITE0}_pixels", pixels, model="pixels")
    about = "the ablation: the prior is trained too"
    train(f"{LITE0}_unfrozen", about, **{"model.train_unet": True})
    for layers, steps in PERCEPTUAL_STEPS.items():
        own = {"model/perceptual": "layers", "model.perceptual.weight": 3}
        own |= {"trainer.max_steps": steps}
        if layers == "last":
            own["model.perceptual.layers"] = ["blocks.6"]
        about = f"the ablation with a perceptual loss of {layers} layer(s), in the same time"
        train(f"{LITE0}_perceptual_{layers}", about, **own)
    for dropout in DROPOUTS:
        about = f"trained with a dropout of {dropout:g}"
        train(f"{LITE0}_dropout_{dropout:g}", about, **{"model.cond_drop_prob": dropout})


def add_priors(plan: Plan, config: DictConfig) -> None:
    """Add what was tried for the prior, in runs of equal time."""
    for name, own in PRIORS.items():
        overrides = {"experiment": "prior", **own, "+trainer.max_time": config.prior_time}
        overrides |= {"callbacks.ema.decay": 0.99}  # of the recipe's 0.9995 too little would be new
        plan.train(f"prior_{name}", "a prior, trained for a short time", overrides)
    trained = {"checkpoints": models(plan, *(f"prior_{name}" for name in PRIORS)), **HELD_OUT}
    about = "what was tried for the prior: samples after equal time"
    plan.run("priors", about, "prior", trained, config.images)


def choose(backbone: str) -> dict[str, object]:
    """Return the overrides that choose a backbone."""
    if backbone in CLASSIFIERS:
        return {"backbone": "imagenette", "backbone.name": CLASSIFIERS[backbone]}
    return {"backbone": backbone}


def models(plan: Plan, *names: str) -> list[Step]:
    """Return the trainings of some models."""
    return [plan[f"train_{name}"] for name in names]


def table_models(plan: Plan) -> list[Step]:
    """Return the trainings of the models of Table 1."""
    pairs = [f"{b}_{c}" for b in (LITE0, *CLASSIFIERS) for c in ("spatial", "pooled")]
    return models(plan, *pairs, f"{LITE0}_decoder")


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
    methods = {
        "spatial": {"conditioning": "spatial"},
        "pooled": {"conditioning": "pooled"},
        "decoder": {"model": "decoder"},
    }
    for method, own in methods.items():  # spatial models first, which the others compare with
        for truth in TRUTHS:
            overrides = {"experiment": "small", "backbone": "planted", "backbone.name": truth}
            overrides |= {"trainer.max_steps": PLANTED_STEPS[method], **own}
            overrides |= {"evaluation.num_images": plan.images(24), "evaluation.num_samples": 1}
            about = f"a model of the planted truth {truth}, {method}"
            plan.train(f"{truth}_{method}", about, overrides)
    planted = models(plan, *(f"{truth}_{method}" for truth in TRUTHS for method in methods))
    overrides = {"checkpoints": planted, "num_samples": 8}
    plan.run(
        "planted",
        "what inverters keep and invent, where the right answer is known",
        "planted",
        overrides,
        32,
    )
    overrides = {"checkpoint": SHIPPED, "num_samples": 9}
    about = "whether samples differ as much as they should"
    results = (*TABLE, "calibration.png", "calibrated.yaml")
    plan.run("calibration", about, "calibration", overrides, 64, results)
    known = [f"{LITE0}_pooled", *(f"{truth}_spatial" for truth in TRUTHS)]
    overrides = {"checkpoints": [SHIPPED, *models(plan, *known)]}
    overrides |= {"num_samples": 4, "num_levels": 128}
    overrides |= sampler({"feature_guidance_scale": 0, "polish_steps": 0, "guidance_scale": 1})
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
