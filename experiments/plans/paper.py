"""The plan of the paper's scale, on ImageNet-1k: Fig. 1, Table 1 and the later experiments.

Neukirch, Vielhaben and Strodthoff (2025), "FeatInv", TMLR, arXiv 2505.21032. The paper has
ResNet50, ConvNeXt-B and SwinV2-B; ViT-B, the baselines and the earlier layers are ours.
"""

from omegaconf import DictConfig

from featinv.utils.errors import InputError, unknown
from plans.steps import Plan

EPOCH = 1_281_167  # images
OURS = ("vit_base",)  # backbones that the paper does not have
# Name of the recipe -> denoising steps and precision.
RECIPES = {
    "paper": (50, "32-true"),
    "fast": (20, "bf16-mixed"),
}
GUIDED = 4  # relative cost of a draw with feature guidance


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


def add_models(plan: Plan, config: DictConfig) -> None:
    """Add all trainings."""
    evaluation = {"evaluation.num_images": plan.images(100), "evaluation.num_samples": 1}
    shared = {"model.image_size": config.image_size, **evaluation}
    recipe = {"experiment": config.recipe, **shared, **dict(config.train or {})}

    def train(name: str, about: str, backbone: str, epochs: float, **values: object) -> None:
        overrides = recipe | {"backbone": backbone, **values, "epochs": epochs}
        images = {"trained_images": epochs * EPOCH, "drawn_images": 100}
        plan.train(name, overrides, about, **images)

    for backbone in config.backbones:
        about = "Table 1" + (", ours, not the paper's" if backbone in OURS else "")
        for conditioning in ("spatial", "pooled"):
            name = f"{backbone}_{conditioning}"
            train(name, about, backbone, config.epochs, conditioning=conditioning)
    main = config.backbone
    for layer in config.layers:
        about = "ours: a ControlNet for an earlier layer"
        train(f"{main}_{layer}", about, main, 1, **{"backbone.layer": layer})
    # With a learning rate of 0 the ControlNet's outputs stay zero, so only the frozen prior draws.
    still = {"trainer.max_steps": 1, "epochs": None, "model.optimizer.lr": 0}
    about = "a baseline: Stable Diffusion alone, to be guided without training"
    plan.train("prior", recipe | {"backbone": main, **still}, about)
    baseline = {"backbone": main, **shared}
    about = "a baseline: the feed-forward decoder of Dosovitskiy and Brox (2016)"
    decoder = {"model": "decoder", "data.batch_size": 64, "epochs": config.epochs}
    plan.train("decoder", baseline | decoder, about)
    about = "a baseline: the optimisation of pixels of Mahendran and Vedaldi (2015)"
    plan.train("pixels", baseline | {"model": "pixels"}, about)


def add_tables(plan: Plan, config: DictConfig) -> None:
    """Add Table 1 with the baselines, the frontier, the depth of layers, and Fig. 1."""
    precision = {"precision": RECIPES[config.recipe][1]}
    number, guided = plan.images(config.images), plan.images(config.guided_images)
    models = [plan[f"train_{b}_{c}"] for b in config.backbones for c in ("spatial", "pooled")]
    baselines = [plan["train_decoder"], plan["train_pixels"]]
    free = {"checkpoint": plan["train_prior"], "sampler": dict(config.training_free)}
    main = plan[f"train_{config.backbone}_spatial"]

    about = "Table 1: every backbone, spatial and pooled, and the baselines"
    overrides = {"checkpoints": [*models, *baselines], "methods": {"training-free": free}}
    overrides |= {"num_samples": config.samples, "extractors": list(config.extractors)}
    cost = (len(models) + GUIDED) * number * config.samples
    overrides |= precision
    plan.run("reconstruction", "reconstruction", overrides, number, about, drawn_images=cost)

    about, cost = "ours: feature cosine against realism against seconds", 8 * GUIDED * guided
    overrides = {"checkpoint": main, "prior": plan["train_prior"], "checkpoints": baselines}
    plan.run("frontier", "frontier", overrides | precision, guided, about, drawn_images=cost)

    layers = [*(plan[f"train_{config.backbone}_{layer}"] for layer in config.layers), main]
    overrides = {"checkpoints": layers, "num_samples": 4, **precision}
    cost = 4 * len(layers) * plan.images(1000)
    plan.run("depth", "depth", overrides, 1000, "ours: what is lost with depth", drawn_images=cost)

    about = "Fig. 1: three photographs, reconstructed from each backbone"
    columns = [plan[f"train_{backbone}_spatial"] for backbone in backbones(config)]
    overrides = {"data": "photos", "checkpoints": columns, "num_pictures": 3, **precision}
    plan.add("gallery", "gallery", overrides, about, drawn_images=3 * len(columns))


def add_meanings(plan: Plan, config: DictConfig) -> None:
    """Add robustness, mixtures, concepts and their steering, and invariances."""
    precision, many = {"precision": RECIPES[config.recipe][1]}, plan.images(1000)
    altered = {"altered": plan.folder / "altered"}
    altered |= {"out_of_distribution": config.out_of_distribution}
    for backbone in backbones(config):
        overrides = {"checkpoint": plan[f"train_{backbone}_spatial"], **precision}
        name, about = f"robustness_{backbone}", "corrupted, adversarial, out-of-distribution images"
        cost = 85 * many
        plan.run(name, "robustness", overrides | altered, many, about, drawn_images=cost)
        name, about = f"mixtures_{backbone}", "the composite nature of feature space"
        cost = 23 * plan.images(200)
        plan.run(name, "mixtures", overrides, 200, about, drawn_images=cost)

    main = {"checkpoint": plan[f"train_{config.backbone}_spatial"]}
    overrides = main | {"method": "dictionary", "num_concepts": config.num_concepts}
    found = plan.run("concepts", "concepts", overrides, 10_000)
    for label in config.labels:
        overrides = {**main, **precision, "concepts": f"{found.folder}/concepts.safetensors"}
        overrides |= {"label": label, "among": plan.images(10_000)}
        more = {"after": (found,), "drawn_images": 5 * plan.images(100)}
        about = "the concept that the class needs most"
        plan.run(f"steering_{label}", "steering", overrides, 100, about, **more)

    models = [plan[f"train_{b}_{c}"] for b in config.backbones for c in ("spatial", "pooled")]
    overrides, cost = {"checkpoints": models, **precision}, 8 * len(models) * plan.images(200)
    about = "what the samples of one feature map share"
    plan.run("invariances", "invariances", overrides, 200, about, drawn_images=cost)
