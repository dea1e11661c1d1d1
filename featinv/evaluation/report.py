"""Turn the metrics of an evaluation into the text of a table and its caption."""

from featinv.evaluation.set_metrics import IMAGES_PER_FEATURE, distance_name
from featinv.evaluation.tables import format_interval, markdown_table

ROWS = {
    "ceiling": "ceiling: the original at the model's resolution",
    "codec": "codec: the original through the codec",
    "reconstruction": "reconstruction",
    "best": "best sample of an image, by its cosine",
    "shuffled": "shuffled: reconstruction of another image",
    "floor": "floor: another image",
}


def headline(metrics: dict, row: str = "reconstruction") -> dict[str, str]:
    """Return the main numbers of a row: title -> text, empty for a missing number.

    Distances between sets are those of the first witness and of each extractor.

    Args:
        metrics: From `featinv.evaluation.evaluator.Evaluator.metrics`.
        row: A key of `ROWS`.
    """
    witness = {}
    for name in metrics["witnesses"][:1]:
        witness = {f"{name}_cosine": (f"{name} cosine", 3), f"{name}_top1": (f"{name} top-1", 2)}
    columns = {  # metric -> title and decimals
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
    measured = {metric for scores in metrics["rows"].values() for metric in scores}
    scores = metrics["rows"].get(row, {})
    cells = {
        title: format_interval(**scores[metric], digits=digits) if metric in scores else ""
        for metric, (title, digits) in columns.items()
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
    """Return the rows of the table as text, from ceiling to floor."""
    single = metrics["num_samples"] == 1  # then the row `best` repeats `reconstruction`
    return [
        {"compared with the original": title} | headline(metrics, row)
        for row, title in ROWS.items()
        if row in metrics["rows"] and not (single and row == "best")
    ]


def caption(metrics: dict) -> str:
    """Return a few sentences that explain the numbers."""
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
    sentences += notes(metrics)
    if metrics["num_samples"] > 1:
        sentences.append(
            "Diversity is the standard deviation of a pixel over the samples; calibration is the "
            "mean pixel distance between two samples over that between a sample and the original: "
            "1 is calibrated, below 1 overconfident, above 1 underconfident."
        )
    if any("fd" not in found for sets in metrics["sets"].values() for found in sets.values()):
        sentences.append(
            "Sets are compared by the kernel distance alone, since the Frechet distance of fewer "
            f"than {IMAGES_PER_FEATURE} images per feature is mostly bias."
        )
    if metrics["same_class"]:
        sentences.append(
            f"{metrics['same_class']} of the images are compared with another image of their own "
            "class in the rows floor and shuffled, because no other class was at hand."
        )
    return " ".join(sentences)


def notes(metrics: dict) -> list[str]:
    """Return the sentences that explain the columns of any table of scores."""
    sentences = []
    if "floor" in metrics["rows"]:
        sentences.append("Normalised is (cosine - floor) / (ceiling - floor).")
    for name in metrics["witnesses"][:1]:
        sentences.append(
            f"The columns of {name}, an independent classifier, compare reconstructions with the "
            "original at the model's resolution."
        )
    return sentences


def page(metrics: dict) -> str:
    """Return the table with its caption, as Markdown."""
    return f"{markdown_table(table_rows(metrics))}\n{caption(metrics)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
