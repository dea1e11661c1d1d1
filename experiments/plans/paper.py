"""The plan of the paper's scale, on ImageNet-1k: Fig. 1, Table 1 and the later experiments.

Neukirch, Vielhaben and Strodthoff (2025), "FeatInv", TMLR, arXiv 2505.21032. The paper has
ResNet50, ConvNeXt-B and SwinV2-B; ViT-B, the baselines and the earlier layers are ours.
"""

from omegaconf import DictConfig

from featinv.utils.errors import InputError, unknown
from plans.steps import TABLE, Plan, Step

EPOCH = 1_281_167  # images
OURS = ("vit_base",)  # backbones that the paper does not have
# Name of the recipe -> denoising steps and precision.
RECIPES = {
    "paper": (50, "32-true"),
    "fast": (20, "bf16-mixed"),
}
GUIDED = 4  # cost of a draw with feature guidance, in draws without


def paper_plan(config: DictConfig) -> Plan:
    """Return the plan; `config` is that of experiments/reproduce.py with scale=paper.

    Raises:
        InputError: Unknown recipe, or the backbone of the single studies is not among the others.
    """
    if config.recipe not in RECIPES:
        raise unknown("recipe", config.recipe, RECIPES)
    if config.backbone not in config.backbones:
        raise InputError(
            f"backbone is '{config.backbone}', expected one of backbones={config.backbones}."
        )
    views = {"paper": "bilinear", "fast": "bicubic"}[config.recipe]
    data = {"data": config.dataset, "data.root": config.root, "data.interpolation": views}
    plan = Plan(config, data)
    add_models(plan, config)
    add_tables(plan, config)
    add_meanings(plan, config)
    return plan


def backbones(config: DictConfig) -> list[str]:
    """Return the backbones of the paper."""
    return [name for name in config.backbones if name not in OURS]


def spatial(plan: Plan, backbone: str) -> Step:
    """Return the training of a backbone's spatial model."""
    return plan[f"train_{backbone}_spatial"]


def draws(config: DictConfig) -> dict[str, object]:
    """Return the overrides for drawing, the same in all experiments."""
    return {"precision": RECIPES[config.recipe][1]}


def add_models(plan: Plan, config: DictConfig) -> None:
    """Add all trainings."""
    recipe, own = config.recipe, dict(config.train or {})
    after = {"evaluation.num_images": plan.images(100), "evaluation.num_samples": 1}
    size = {"model.image_size": config.image_size}

    def train(name: str, about: str, backbone: str, epochs: float, **more: object) -> None:
        overrides = {"experiment": recipe, "backbone": backbone, **size, **own, **after, **more}
        images = {"trained_images": epochs * EPOCH, "drawn_images": 100}
        plan.train(name, about, overrides | {"epochs": epochs}, **images)

    for backbone in config.backbones:
        for conditioning in ("spatial", "pooled"):
            name = f"{backbone}_{conditioning}"
            about = f"Table 1: {backbone}, {conditioning} features"
            about += " (ours, not the paper's)" if backbone in OURS else ""
            train(name, about, backbone, config.epochs, conditioning=conditioning)
    main = config.backbone
    for layer in config.layers:
        about = f"ours: a ControlNet for an earlier layer, {layer}"
        train(f"{main}_{layer}", about, main, 1, **{"backbone.layer": layer})
    # With a learning rate of 0 the ControlNet's outputs stay zero, so only the frozen prior draws.
    still = {"trainer.max_steps": 1, "epochs": None, "model.optimizer.lr": 0}
    about = "a baseline: Stable Diffusion alone, to be guided without training"
    overrides = {"experiment": recipe, "backbone": main, **size, **own, **after, **still}
    plan.train("prior", about, overrides)
    baseline = {"backbone": main, **size, **after}
    about = "a baseline: the feed-forward decoder of Dosovitskiy and Brox (2016)"
    overrides = {"model": "decoder", **baseline, "data.batch_size": 64, "epochs": config.epochs}
    plan.train("decoder", about, overrides)
    about = "a baseline: the optimisation of pixels of Mahendran and Vedaldi (2015)"
    plan.train("pixels", about, {"model": "pixels", **baseline})


def add_tables(plan: Plan, config: DictConfig) -> None:
    """Add Table 1 with the baselines, the frontier, the depth of layers, and Fig. 1."""
    main, how = spatial(plan, config.backbone), draws(config)
    number, guided = plan.images(config.images), plan.images(config.guided_images)
    models = [plan[f"train_{b}_{c}"] for b in config.backbones for c in ("spatial", "pooled")]
    baselines = [plan["train_decoder"], plan["train_pixels"]]
    free = {"checkpoint": plan["train_prior"], "sampler": dict(config.training_free)}

    about = "Table 1: every backbone, spatial and pooled, and the baselines"
    own = {"checkpoints": [*models, *baselines], "methods": {"training-free": free}, **how}
    own |= {"num_samples": config.samples, "extractors": list(config.extractors)}
    cost = (len(models) + GUIDED) * number * config.samples
    plan.run("reconstruction", about, "reconstruction", own, number, drawn_images=cost)

    about = "ours: feature cosine against realism against seconds"
    own = {"checkpoint": main, "prior": plan["train_prior"], "checkpoints": baselines, **how}
    plan.run("frontier", about, "frontier", own, guided, drawn_images=8 * GUIDED * guided)

    about, several = "ours: what is lost with depth", plan.images(1000)
    layers = [*(plan[f"train_{config.backbone}_{layer}"] for layer in config.layers), main]
    own, results = {"checkpoints": layers, "num_samples": 4, **how}, (*TABLE, "curves.png")
    cost = 4 * len(layers) * several
    plan.run("depth", about, "depth", own, several, results, drawn_images=cost)

    about = "Fig. 1: three photographs, reconstructed from each backbone"
    columns = [spatial(plan, backbone) for backbone in backbones(config)]
    own = {"data": "photos", "checkpoints": columns, "num_pictures": 3, **how}
    results = ("table.md", "gallery.png")
    plan.add("gallery", about, "gallery", own, results=results, drawn_images=3 * len(columns))


def add_meanings(plan: Plan, config: DictConfig) -> None:
    """Add robustness, mixtures, concepts and their steering, and invariances."""
    how, many = draws(config), plan.images(1000)
    altered = {"altered": plan.folder / "altered"}
    altered |= {"out_of_distribution": config.out_of_distribution}
    for backbone in backbones(config):
        own = {"checkpoint": spatial(plan, backbone), **how}
        about = f"corrupted, adversarial and out-of-distribution images, {backbone}"
        name, told = f"robustness_{backbone}", own | altered
        plan.run(name, about, "robustness", told, many, drawn_images=85 * many)
        about, cost = f"the composite nature of feature space, {backbone}", 23 * plan.images(200)
        plan.run(f"mixtures_{backbone}", about, "mixtures", own, 200, drawn_images=cost)

    main = {"checkpoint": spatial(plan, config.backbone)}
    own = main | {"method": "dictionary", "num_concepts": config.num_concepts}
    found = plan.run("concepts", "concepts of the last layer", "concepts", own, 10_000)
    for label in config.labels:
        about = f"concept steering: the concept that class {label} needs most"
        own = {**main, **how, "concepts": f"{found.folder}/concepts.safetensors"}
        own |= {"label": label, "among": plan.images(10_000)}
        more = {"after": (found,), "drawn_images": 5 * plan.images(100)}
        results = (*TABLE, "sweep.png")
        plan.run(f"steering_{label}", about, "steering", own, 100, results, **more)

    about = "what the samples of one feature map share"
    models = [plan[f"train_{b}_{c}"] for b in config.backbones for c in ("spatial", "pooled")]
    cost = 8 * len(models) * plan.images(200)
    own = {"checkpoints": models, **how}
    plan.run("invariances", about, "invariances", own, 200, drawn_images=cost)
