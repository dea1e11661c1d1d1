import json

import pytest
import torch
from cli.test_configs import composed

from featinv import InputError
from featinv.analysis.concepts import Concepts, importance
from featinv.utils.pixels import eight_bit
from steering import choose

PHOTOS = ["data.crops_per_photo=1", "num_images=3"]


@pytest.fixture(scope="module")
def found(tiny, experiment, tmp_path_factory):
    """The folder of concepts of the tiny model's backbone, and their table."""
    folder = tmp_path_factory.mktemp("concepts")
    own = [f"checkpoint={tiny('spatial')}", *PHOTOS, "method=nmf", "num_concepts=3"]
    return folder, experiment("concepts", *own, "num_pictures=2", output=folder)


@pytest.fixture
def command(found, tiny) -> list[str]:
    file = f"concepts={found[0] / 'concepts.safetensors'}"
    return ["steering", f"checkpoint={tiny('spatial')}", file, *PHOTOS]


def numbers(folder) -> dict[str, dict[str, list[float]]]:
    return json.loads((folder / "results.json").read_text())


@torch.no_grad()
def test_each_concept_has_a_sheet(found, model, photographs):
    folder, rows = found
    assert (folder / "sheets.md").read_text().count("## Concept") == 3
    assert (folder / "concept_2.png").is_file()
    concepts = Concepts.load(folder / "concepts.safetensors")
    features, logits = model.backbone.features_and_logits(photographs)
    # the class with the most of concept 0, and what removing it does to that class
    strength, classes = concepts.presence(features)[:, 0].mean((1, 2)), logits.argmax(1)
    means = {int(c): strength[classes == c].mean().item() for c in classes.unique()}
    best = max(means, key=means.get)
    without = model.backbone.logits(concepts.steer(features, {0: 0.0}))
    drop = (logits[:, best] - without[:, best])[classes == best].mean().item()
    assert rows[0]["class"] == str(best) and rows[0]["mean presence"] == f"{means[best]:.3f}"
    shown = float(rows[0]["drop of its logit without the concept"])
    assert shown == pytest.approx(drop, abs=1e-3)


@torch.no_grad()
def test_what_is_measured_is_what_the_reconstruction_has(
    found, command, model, photographs, experiment, tmp_path
):
    rows = experiment(*command, "concept=1", "factors=[0,2]", "num_pictures=2", output=tmp_path)
    results = numbers(tmp_path)
    assert list(results) == ["0", "1", "2"]  # 1 is what the others are compared with
    assert rows[1]["change against factor 1"] == "0.000 [0.000, 0.000]"
    concepts = Concepts.load(found[0] / "concepts.safetensors")
    features, logits = model.backbone.features_and_logits(photographs)
    for factor, values in results.items():
        drawn = eight_bit(model.invert(concepts.steer(features, {1: float(factor)}))[:, 0])
        seen, seen_logits = model.backbone.features_and_logits(drawn)
        presence = concepts.presence(seen)[:, 1].mean((1, 2))
        assert values["presence"] == pytest.approx(presence.tolist(), rel=1e-2, abs=1e-3)
        probability = seen_logits.softmax(1)[range(3), logits.argmax(1)]
        assert values["probability"] == pytest.approx(probability.tolist(), rel=1e-2, abs=1e-4)
    wanted = [sum(results[factor]["wanted"]) for factor in ("0", "1", "2")]
    assert wanted[0] == pytest.approx(0, abs=0.15 * wanted[1]) and wanted[2] > 1.5 * wanted[1]
    page = (tmp_path / "table.md").read_text()
    assert "Concept 1 (nmf); 3 images, 1 sample(s) each, seed 0" in page
    assert (tmp_path / "sweep.png").is_file()


@torch.no_grad()
def test_half_of_the_image(found, command, model, photographs, experiment, tmp_path):
    experiment(*command, "factors=[0]", "side=left", output=tmp_path)
    concepts = Concepts.load(found[0] / "concepts.safetensors")
    features = model.backbone.features(photographs)  # 2 x 2 positions
    steered = features.clone()
    steered[..., :1] = concepts.steer(features[..., :1], {0: 0.0})
    wanted = concepts.presence(steered)[:, 0].mean((1, 2))
    assert numbers(tmp_path)["0"]["wanted"] == pytest.approx(wanted.tolist(), rel=1e-3)
    assert "in the left half" in (tmp_path / "table.md").read_text()


@torch.no_grad()
def test_concept_and_images_are_chosen_by_what_they_mean(
    found, command, model, photographs, experiment, tmp_path
):
    concepts = Concepts.load(found[0] / "concepts.safetensors")
    features, logits = model.backbone.features_and_logits(photographs)
    classes = logits.argmax(1)
    own = classes == classes[0]
    presence = concepts.presence(features)
    drops = importance(model.backbone, concepts, features, presence, classes)
    concept = int(drops[own].mean(0).argmax())
    label = [f"label={int(classes[0])}", "among=3", "num_images=2", "factors=[1]"]
    experiment(*command, *label, output=tmp_path)
    page = (tmp_path / "table.md").read_text()
    assert f"Concept {concept} (nmf), the one that class {int(classes[0])} needs most" in page
    assert "those with most of it among 3; 2 images" in page
    most = presence[:, concept].mean((1, 2)).sort(descending=True).values[:2].tolist()
    assert numbers(tmp_path)["1"]["wanted"] == pytest.approx(most, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["among=2"], "among is 2 with num_images=3: expected to choose from more images"),
        (["label=77"], "label is 77, but none of 3 images is classified as that"),
        (["label=3", "concept=1"], "concept is 1 with label=3, which picks one itself"),
        (["concept=3"], "There is no concept 3: expected 0 to 2"),
    ],
)
def test_bad_choices(overrides, sentence, found, command, model):
    concepts = Concepts.load(found[0] / "concepts.safetensors")
    with pytest.raises(InputError, match=sentence):
        choose(model, concepts, composed(*command, *overrides))
