"""Photographs that come with scikit-image and scikit-learn: nothing to download."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.transforms import functional

from featinv.data.images import decode, random_box
from featinv.data.pictures import Picture, PictureDataModule
from featinv.utils.errors import InputError, at_least
from featinv.utils.seeding import Draw, make_generator

TRAIN = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "china.jpg",
    "clock_motion.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
HELD_OUT = ("chelsea.png", "coffee.png", "flower.jpg")


class PhotosDataModule(PictureDataModule):
    """Random crops of bundled photographs; three other photographs are held out for evaluation.

    For demonstrations and tests: an epoch is thirteen crops, one of each photograph. Labels are -1.
    The files come from the installed packages, under these licences:

    | photograph | what | source | licence |
    |---|---|---|---|
    | astronaut | Eileen Collins | NASA, Great Images | public domain |
    | brick | wall, grey | CC0Textures, Bricks25 | CC0 |
    | camera | photographer, grey | Lav Varshney | CC0 |
    | china | Summer Palace (scikit-learn) | danielbuechele, Flickr | CC BY 2.0 |
    | clock_motion | blurred wall clock, grey | Stefan van der Walt | public domain |
    | coins | Greek coins, grey | Brooklyn Museum | no known restrictions |
    | grass | lawn, grey | linolafett, DeviantArt | CC0 |
    | gravel | pebbles, grey | CC0Textures, Gravel04 | CC0 |
    | hubble_deep_field | galaxies | NASA, HubbleSite | public domain |
    | ihc | stained tissue | CMMI | no known restrictions |
    | motorcycle_left | motorcycle | Middlebury Stereo 2014 | none stated |
    | retina | fundus of an eye | Mikael Häggström, Wikimedia | CC0 |
    | rocket | Falcon 9 | SpaceX Photos | public domain |
    | **chelsea** (held out) | cat | Stefan van der Walt | CC0 |
    | **coffee** (held out) | cup of espresso | Rachel Michetti | CC0 |
    | **flower** (held out, scikit-learn) | dahlia | vultilion, Flickr | CC BY 2.0 |

    The evaluation set is the same for every seed: `chelsea/0`, `coffee/0`, `flower/0` are central
    squares; `chelsea/1`, `coffee/1`, ... are the centres of fixed random crops (0.3 to 1 of the
    area). The batch's `photograph` is the part before the slash: crops of one photograph are not
    independent samples.

    Args:
        crops_per_photo: Evaluation crops of every held-out photograph.
        min_scale: Minimal share of a photograph's area in a training crop, in (0, 1].
        **options: See `ImageDataModule`.
    """

    def __init__(self, *, crops_per_photo: int = 8, min_scale: float = 0.1, **options: Any) -> None:
        super().__init__(min_scale=min_scale, **options)
        self.crops_per_photo = at_least("crops_per_photo", crops_per_photo, 1)

    def train_pictures(self) -> list[Picture]:
        """Return the training photographs."""
        return [Picture(Path(name).stem, -1, load(name)) for name in TRAIN]

    def eval_pictures(self) -> list[Picture]:
        """Return the crops of the held-out photographs, first crop of each first."""
        photos = {Path(name).stem: load(name) for name in HELD_OUT}
        return [
            Picture(f"{stem}/{number}", -1, crop(photo, number), photograph=stem)
            for number in range(self.crops_per_photo)
            for stem, photo in photos.items()
        ]

    def limit_positions(self, total: int, number: int) -> list[int]:
        """Return the first positions, since the photographs take turns."""
        return list(range(number))


def crop(photo: Image.Image, number: int) -> Image.Image:
    """Return a fixed evaluation crop of a photograph; number 0 is the whole."""
    if number == 0:
        return photo
    generator = make_generator(0, Draw.CROP, number)
    return functional.crop(photo, *random_box(photo, generator, min_scale=0.3))


def load(name: str) -> Image.Image:
    """Return a photograph of scikit-image or scikit-learn by its file name.

    Raises:
        InputError: The package is not installed, or no longer has the photograph.
    """
    package, folder = "scikit-image", "skimage/data"
    if name in ("china.jpg", "flower.jpg"):
        package, folder = "scikit-learn", "sklearn/datasets/images"
    with suppress(PackageNotFoundError):
        path = Path(distribution(package).locate_file(f"{folder}/{name}"))
        if path.is_file():
            return decode(path)
    raise InputError(
        f"Photograph '{name}' was not found: it comes with {package}, which is not installed or no "
        "longer ships it; install scikit-image 0.26 and scikit-learn 1.7."
    )
