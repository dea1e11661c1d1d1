"""The report of an evaluation: the cells of its table and the caption below, as text."""

from featinv.evaluation.set_metrics import IMAGES_PER_FEATURE, distance_name
from featinv.evaluation.tables import format_interval

ROWS = {
    "ceiling": "ceiling: the original at the model's resolution",
    "codec": "codec: the original through the codec",
    "reconstruction": "reconstruction",
    "best": "best sample of an image, by its cosine",
    "shuffled": "shuffled: reconstruction of another image",
    "floor": "floor: another image",
}


def columns(metrics: dict) -> dict[str, tuple[str, int]]:
    """Return metric -> title and decimals of the columns that a table shows of an evaluation."""
    witness = {}
    for name in metrics["witnesses"][:1]:
        witness[f"{name}_cosine"] = (f"{name} cosine", 3)
        witness[f"{name}_top1"] = (f"{name} top-1", 2)
    return {
        "spatial_cosine": ("cosine", 3),
        "normalised_cosine": ("normalised", 3),
        **witness,
        "top1_agreement": ("top-1", 2),
        "psnr": ("PSNR (dB)", 1),
        "lpips": ("LPIPS", 3),
        "saturated": ("saturated", 3),
        "contrast": ("contrast", 2),
        "diversity": ("diversity", 3),
        "calibration_ratio": ("calibration", 2),
    }


def headline(metrics: dict, row: str = "reconstruction") -> dict[str, str]:
    """Return the main numbers of a row, as text: title -> cell, empty where there is no number.

    That is the cosine, raw and normalised; by the first witness the cosine, the top-1 agreement
    and the kernel distance; top-1 agreement, PSNR, saturated share and contrast; of several samples
    diversity and calibration ratio; the distances by extractors that were asked for.

    Args:
        metrics: See `featinv.evaluation.evaluator.Evaluator`.
        row: One of `ROWS`.
    """
    measured = {metric for scores in metrics["rows"].values() for metric in scores}
    scores = metrics["rows"].get(row, {})
    cells = {
        title: format_interval(**scores[metric], digits=digits) if metric in scores else ""
        for metric, (title, digits) in columns(metrics).items()
        if metric in measured
    }
    for extractor, sets in metrics["sets"].items():
        if extractor in metrics["witnesses"][1:]:
            continue
        for kind in ("kid", "fd"):
            if any(kind in distances for distances in sets.values()):
                distance = sets.get(row, {}).get(kind)
                title = distance_name(kind, extractor)
                cells[title] = "" if distance is None else f"{distance:.3g}"
    return cells


def table_rows(metrics: dict) -> list[dict[str, str]]:
    """Return the rows of an evaluation's table, as text, what should score best first."""
    single = metrics["num_samples"] == 1  # which is the best one too
    return [
        {"compared with the original": title} | headline(metrics, row)
        for row, title in ROWS.items()
        if row in metrics["rows"] and not (single and row == "best")
    ]


def caption(metrics: dict) -> str:
    """Return what the numbers of an evaluation are, in a few sentences."""
    images, photographs = metrics["num_images"], metrics["num_photographs"]
    crops = f" of {_count(photographs, 'photograph')}" if photographs < images else ""
    sentences = [
        f"{_count(images, 'image')}{crops}, {_count(metrics['num_samples'], 'sample')} each, "
        f"seed {metrics['seed']}; "
        f"{metrics['sampling']}; {metrics['seconds_per_reconstruction']:.3f} s per reconstruction "
        f"on {metrics['device'].split(':')[0]} in {metrics['precision']}; mean over images with "
        f"95% bootstrap interval{' over photographs' if crops else ''}.",
        f"Backbone {metrics['backbone']}, layer {metrics['layer']}, conditioning "
        f"{metrics['conditioning']}.",
    ]
    if "floor" in metrics["rows"]:
        sentences.append("Normalised is (cosine - floor) / (ceiling - floor).")
    for name in metrics["witnesses"][:1]:
        sentences.append(
            f"The witness {name}, a classifier that took no part, compares with the original at "
            "the model's resolution."
        )
    if metrics["num_samples"] > 1:
        sentences.append(
            "Diversity is the standard deviation of a pixel over the samples; calibration the mean "
            "distance of two samples over that of a sample to the original, in pixels: 1 is right, "
            "below 1 the samples are overconfident, above 1 too wild."
        )
    if any("fd" not in found for sets in metrics["sets"].values() for found in sets.values()):
        sentences.append(
            "Sets are compared by the kernel distance alone, since a Frechet distance of fewer "
            f"than {IMAGES_PER_FEATURE} images per feature is mostly bias."
        )
    if metrics["same_class"]:
        sentences.append(
            f"For want of a second class, {metrics['same_class']} of the images are compared with "
            "another one of their own in the rows floor and shuffled."
        )
    return " ".join(sentences)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
