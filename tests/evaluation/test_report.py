from featinv.evaluation.report import caption, table_rows


def cell(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


METRICS = {
    "rows": {
        "ceiling": {"spatial_cosine": cell(0.9), "saturated": cell(0.2)},
        "reconstruction": {
            "spatial_cosine": cell(0.7),
            "normalised_cosine": cell(0.75),
            "pooled_cosine": cell(0.8),
            "lite2_cosine": cell(0.5),
            "lite2_top1": cell(0.4),
            "lite1_cosine": cell(0.6),
            "psnr": cell(12.34),
            "saturated": cell(0.3),
        },
        "best": {"spatial_cosine": cell(0.72)},
        "floor": {"spatial_cosine": cell(0.1)},
    },
    "sets": {
        "lite2": {"ceiling": {"kid": 0.5}, "reconstruction": {"kid": 1.5}},
        "lite1": {"reconstruction": {"kid": 1.0}},
        "inception": {"reconstruction": {"kid": 0.01234, "fd": 45.678}},
    },
    "witnesses": ["lite2", "lite1"],
    "num_images": 24,
    "num_photographs": 3,
    "num_samples": 2,
    "seed": 5,
    "sampling": "ddim, 4 steps",
    "precision": "bf16-mixed",
    "device": "cuda:0",
    "seconds_per_reconstruction": 0.5,
    "backbone": "resnet50",
    "layer": "layer4",
    "conditioning": "spatial",
    "same_class": 0,
}


def test_the_table_shows_the_first_witness_and_all_extractors():
    ceiling, reconstruction, *_ = table_rows(METRICS)
    assert reconstruction == {
        "compared with the original": "reconstruction",
        "cosine": "0.700 [0.600, 0.800]",
        "normalised": "0.750 [0.650, 0.850]",
        "lite2 cosine": "0.500 [0.400, 0.600]",
        "lite2 top-1": "0.40 [0.30, 0.50]",
        "PSNR (dB)": "12.3 [12.2, 12.4]",
        "saturated": "0.300 [0.200, 0.400]",
        "kid_lite2": "1.5",
        "kid": "0.0123",
        "fid": "45.7",
    }
    assert list(ceiling) == list(reconstruction) and ceiling["PSNR (dB)"] == ""
    assert len(table_rows(METRICS)) == 4 and len(table_rows(METRICS | {"num_samples": 1})) == 3


def test_the_caption_states_the_limits_of_the_numbers():
    text = caption(METRICS)
    assert text.startswith(
        "24 images of 3 photographs, 2 samples each, seed 5; ddim, 4 steps; 0.500 s per "
        "reconstruction on cuda in bf16-mixed; mean over images with 95% bootstrap interval over "
        "photographs."
    )
    frechet, one_class = (
        "Frechet distance of fewer than 10 images per feature",
        "8 of the images are compared",
    )
    assert frechet in text and one_class not in text
    enough = {"inception": METRICS["sets"]["inception"]}
    text = caption(METRICS | {"sets": enough, "same_class": 8, "num_photographs": 24})
    assert frechet not in text and one_class in text and text.startswith("24 images, 2 samples")
