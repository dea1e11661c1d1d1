"""The trainings of the small plan: priors, classifiers, and the models that invert them."""

from pathlib import Path

from omegaconf import DictConfig

from plans.steps import Plan, Step

LITE0, RESNET, CONVNEXT, XCIT = "efficientnet_lite0", "resnet10t", "convnext_atto", "xcit_nano"
CLASSIFIERS = {  # trained from scratch: name -> timm's
    RESNET: "resnet10t",
    CONVNEXT: "convnext_atto",
    # A vision transformer that learns from few images: an accuracy of 0.47 on held-out images after
    # 300 steps. ViT-Tiny has 0.28, with a convolutional stem 0.38, and ConViT-Tiny 0.22.
    XCIT: "xcit_nano_12_p16_224",
}
TRUTHS = ("luminance", "low_pass", "blind", "mirror", "linear")
# An hour of one thread for a FeatInv, at about a second a step.
PLANTED_STEPS = {"spatial": 4000, "pooled": 4000, "decoder": 1500}
PERCEPTUAL_STEPS = 1270  # take as long as 1,500 without the loss: 1.69 s against 1.43 s each
DROPOUTS = (0, 0.3)  # beside the recipe's 0.1
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


def add_priors(plan: Plan, config: DictConfig) -> None:
    """Add what was tried for the prior, in runs of equal time."""
    for name, own in PRIORS.items():
        overrides = {"experiment": "prior", **own, "+trainer.max_time": config.prior_time}
        overrides |= {"callbacks.ema.decay": 0.99}  # of the recipe's 0.9995 too little would be new
        plan.train(f"prior_{name}", "a prior, trained for a short time", overrides)


def add_models(plan: Plan, config: DictConfig) -> None:
    """Add the classifiers, and the models that invert them."""
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
    own = {"model/perceptual": "layers", "model.perceptual.weight": 3}
    own |= {"model.perceptual.min_signal": 0.5, "trainer.max_steps": PERCEPTUAL_STEPS}
    about = "the ablation with a perceptual loss of five layers, in the same time"
    train(f"{LITE0}_perceptual_all", about, **own)
    about = "the ablation with a perceptual loss of the last layer, in the same time"
    own |= {"model.perceptual.layers": ["blocks.6"]}
    train(f"{LITE0}_perceptual_last", about, **own)
    for dropout in DROPOUTS:
        about = f"trained with a dropout of {dropout:g}"
        train(f"{LITE0}_dropout_{dropout:g}", about, **{"model.cond_drop_prob": dropout})


def add_planted(plan: Plan) -> None:
    """Add models of the planted truths."""
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
