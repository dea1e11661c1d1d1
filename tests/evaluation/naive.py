"""The scores of an evaluation, written out with one image and one position at a time."""

import torch

from featinv.utils.pixels import from_uint8, resize

NUM_SAMPLES = 2
OTHERS = (1, 0, 0)  # of three images, the only one of another class that each can have
WITNESS = "test_efficientnet"


def eight_bits(image: torch.Tensor) -> torch.Tensor:
    return ((image.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def naive_scores(backbone, original: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Compare two images (3, H, W) in [-1, 1]."""
    a, b = (backbone.features(image[None])[0] for image in (original, other))
    logits_a, logits_b = (backbone.classify(image[None])[0] for image in (original, other))
    height, width = a.shape[1:]
    best, ranking = int(logits_a.argmax()), logits_b.argsort(descending=True).tolist()
    return {
        "spatial_cosine": sum(
            cosine(a[:, y, x], b[:, y, x]) for y in range(height) for x in range(width)
        )
        / (height * width),
        "pooled_cosine": cosine(a.mean((1, 2)), b.mean((1, 2))),
        "relative_l2": float((a - b).square().sum().sqrt() / a.square().sum().sqrt()),
        "top1_agreement": float(best == ranking[0]),
        "top5_agreement": float(best in ranking[:5]),
    }


def naive_pixels(small: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    a, b = ((eight_bits(image).double() + 1) / 2 for image in (small, other))
    return {
        "psnr": float(10 * (1 / (a - b).square().mean()).log10()),
        "contrast": float(b.std() / a.std()),
        "saturated": float(((b * 255).round() % 255 == 0).double().mean()),
    }


def naive_evaluation(model, witness, items: list[dict]) -> dict[str, list[dict[str, float]]]:
    """Return row -> one dict of scores for each image."""
    images = [from_uint8(item["image"]) for item in items]
    samples = []
    for image, item in zip(images, items, strict=True):
        features = model.backbone.features(image[None])
        drawn = model.invert(features, NUM_SAMPLES, seed=5, indices=[item["index"]])
        samples.append([eight_bits(sample) for sample in drawn[0]])
    small = [resize(image[None], model.image_size)[0] for image in images]
    low = [eight_bits(image) for image in small]
    coded = [model.codec.decode(model.codec.encode(image[None]))[0] for image in small]

    def features(i: int, other: torch.Tensor, other_whole: torch.Tensor | None = None) -> dict:
        """By both classifiers; the inverted one saw the original whole, the witness small."""
        whole = other if other_whole is None else other_whole
        seen = naive_scores(witness, low[i], other)
        said = {"cosine": seen["spatial_cosine"], "top1": seen["top1_agreement"]}
        return naive_scores(model.backbone, images[i], whole) | {
            f"{WITNESS}_{name}": value for name, value in said.items()
        }

    def own(i: int, other: torch.Tensor) -> dict[str, float]:
        return features(i, other) | naive_pixels(small[i], other)

    def mean(found: list[dict[str, float]]) -> dict[str, float]:
        return {name: sum(s[name] for s in found) / len(found) for name in found[0]}

    def ceiling(i: int) -> dict[str, float]:
        saturated = {"saturated": naive_pixels(low[i], low[i])["saturated"]}
        return naive_scores(model.backbone, images[i], low[i]) | saturated

    def best(i: int) -> dict[str, float]:
        found = [own(i, sample) for sample in samples[i]]
        return max(found, key=lambda score: score["spatial_cosine"])

    def diversity(i: int) -> dict[str, float]:
        one, two = (sample / 2 for sample in samples[i])
        to_original = [float((x - low[i] / 2).square().mean().sqrt()) for x in (one, two)]
        return {
            "diversity": float(((one - two).abs() / 2**0.5).mean()),
            "between_samples": float((one - two).square().mean().sqrt()),
            "to_original": sum(to_original) / 2,
        }

    numbers = range(len(images))
    return {
        "ceiling": [ceiling(i) for i in numbers],
        "codec": [own(i, eight_bits(coded[i])) for i in numbers],
        "reconstruction": [
            mean([own(i, sample) for sample in samples[i]]) | diversity(i) for i in numbers
        ],
        "best": [best(i) for i in numbers],
        "shuffled": [mean([features(i, s) for s in samples[OTHERS[i]]]) for i in numbers],
        "floor": [features(i, low[OTHERS[i]], images[OTHERS[i]]) for i in numbers],
    }
