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
# Of each truth; an hour of one thread for a FeatInv, at about a second a step. Spatial first: the
# others are compared with them.
PLANTED = {
    "spatial": {"conditioning": "spatial", "trainer.max_steps": 4000},
    "pooled": {"conditioning": "pooled", "trainer.max_steps": 4000},
    "decoder": {"model": "decoder", "trainer.max_steps": 1500},
}
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
    for name, values in PRIORS.items():
        overrides = {"experiment": "prior", **values, "+trainer.max_time": config.prior_time}
        # The recipe's 0.9995 averages over more steps than such a run has.
        overrides |= {"callbacks.ema.decay": 0.99}
        plan.train(f"prior_{name}", overrides)


def add_models(plan: Plan, config: DictConfig) -> None:
    """Add the classifiers, and the models that invert them."""
    classifiers = {}
    for name, architecture in CLASSIFIERS.items():
        overrides = {"name": architecture, "data.root": config.root, "epochs": config.epochs}
        if plan.max_steps is not None:
            overrides |= {"trainer.max_steps": plan.max_steps}
        folder = Path("outputs/small/backbones") / architecture  # where its config looks
        classifiers[name] = plan.add(
            f"backbone_{name}", "train_backbone", overrides, "trained from scratch", folder=folder
        )

    def train(name: str, values: dict, about: str = "", backbone: str = LITE0) -> None:
        overrides = {"experiment": "small", **choose(backbone), **values}
        overrides |= {"evaluation.num_images": plan.images(24), "evaluation.num_samples": 1}
        after = (classifiers[backbone],) if backbone in classifiers else ()
        plan.train(f"{backbone}_{name}", overrides, about, after=after)

    for backbone in (LITE0, *CLASSIFIERS):
        for conditioning in ("spatial", "pooled"):
            train(conditioning, {"conditioning": conditioning}, backbone=backbone)
    train("decoder", {"model": "decoder"}, "Dosovitskiy and Brox (2016)")
    train("pixels", {"model": "pixels"}, "Mahendran and Vedaldi (2015), without training")
    train("unfrozen", {"model.train_unet": True}, "ablation: the prior is trained too")
    values = {"model/perceptual": "layers", "model.perceptual.weight": 3}
    values |= {"model.perceptual.min_signal": 0.5, "trainer.max_steps": PERCEPTUAL_STEPS}
    train("perceptual_all", values, "ablation: a perceptual loss of five layers, in the same time")
    last = values | {"model.perceptual.layers": ["blocks.6"]}
    train("perceptual_last", last, "ablation: that of the last layer")
    for dropout in DROPOUTS:
        train(f"dropout_{dropout:g}", {"model.cond_drop_prob": dropout})


def add_planted(plan: Plan) -> None:
    """Add models of the planted truths."""
    for method, values in PLANTED.items():
        for truth in TRUTHS:
            overrides = {"experiment": "small", "backbone": "planted", "backbone.name": truth}
            overrides |= {"evaluation.num_images": plan.images(24), "evaluation.num_samples": 1}
            plan.train(f"{truth}_{method}", overrides | values)


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
