import json
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from helpers import ROOT, mistake, run
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from featinv.analysis.concepts import Concepts
from featinv.analysis.edits import mix
from featinv.checkpoints import save_model
from featinv.cli.app import CONFIGS
from featinv.data.images import decode, eval_view
from featinv.explorer.session import Exploration, Settings, find_photo, read_photo
from featinv.metrics import spatial_cosine
from featinv.utils.errors import InputError
from featinv.utils.pixels import eight_bit, from_uint8, to_uint8

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'featinv[explorer]'")
from featinv.cli import explore  # noqa: E402
from featinv.explorer import page as explorer  # noqa: E402

CPU = torch.device("cpu")
PLAIN = Settings(seed=5, num_samples=3)


def write_picture(path: Path, seed: int, size: tuple[int, int] = (96, 64)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def files(awake_model, tmp_path) -> dict[str, Path]:
    """Two pictures, a tiny model's checkpoint, and concepts of its features."""
    save_model(awake_model, tmp_path / "model.safetensors")
    directions = torch.nn.functional.normalize(torch.rand(3, 512), dim=1)
    layer = f"{awake_model.backbone.name} {awake_model.backbone.layer}"
    Concepts(directions, torch.zeros(512), "nmf", layer).save(tmp_path / "concepts.safetensors")
    return {
        "checkpoint": tmp_path / "model.safetensors",
        "concepts": tmp_path / "concepts.safetensors",
        "image": write_picture(tmp_path / "a photo (1).jpg", 0),
        "second": write_picture(tmp_path / "other.png", 1),
    }


@pytest.fixture
def exploration(files) -> Exploration:
    return Exploration.load(str(files["checkpoint"]), str(files["concepts"]), CPU)


def read(path: Path):
    return read_photo(path, path.name, max_megapixels=50)


# What is computed


@torch.no_grad()
def test_samples_are_those_of_the_library(exploration, files):
    photo, steps = read(files["image"]), []
    drawn = list(exploration.draw(exploration.ask([photo], PLAIN), PLAIN, steps.append))
    model = exploration.model
    view = eval_view(decode(files["image"]), 64)
    features = model.backbone.features(from_uint8(view)[None])
    expected = model.invert(features, 3, seed=5, batch_size=1)
    assert torch.stack([sample.image for sample in drawn]).equal(to_uint8(expected[0]))
    assert steps == list(range(1, 13))  # three samples of four steps
    seen, logits = model.backbone.features_and_logits(eight_bit(expected[0]))
    assert [s.cosine for s in drawn] == pytest.approx(spatial_cosine(features, seen).tolist())
    top = logits.softmax(1).max(1)
    assert [s.probability for s in drawn] == pytest.approx(top.values.tolist(), rel=1e-4)
    assert [s.label for s in drawn] == [f"class {label}" for label in top.indices.tolist()]


def test_samples_come_as_they_are_drawn(exploration, files):
    steps = []
    samples = exploration.draw(exploration.ask([read(files["image"])], PLAIN), PLAIN, steps.append)
    next(samples)
    assert steps == [1, 2, 3, 4]
    samples.close()
    assert not exploration.model.unet._forward_hooks


def test_features_are_mixed_and_then_steered(exploration, files):
    photos = [read(files["image"]), read(files["second"])]
    first, second = (exploration.ask([photo], PLAIN) for photo in photos)
    mixed = exploration.ask(photos, Settings(weight=0.3, path="spherical"))
    torch.testing.assert_close(mixed, mix(first, second, 0.3, "spherical"))
    concepts = exploration.concepts
    one = exploration.ask(photos[:1], Settings(factors={1: 0.0}))
    torch.testing.assert_close(one, concepts.steer(first, 1, 0.0))
    two = exploration.ask(photos[:1], Settings(factors={1: 0.0, 2: 2.0}))
    torch.testing.assert_close(two - one, concepts.steer(first, 2, 2.0) - first, atol=1e-5, rtol=0)
    unchanged = exploration.ask(photos[:1], Settings(factors={0: 1.0}))
    torch.testing.assert_close(unchanged, first)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"seed": -1}, "seed is -1: expected an integer of at least 0"),
        ({"num_samples": 17}, "num_samples is 17, expected 1 to 16"),
        ({"weight": 1.5}, "weight of the second image is 1.5, expected 0 to 1"),
        ({"factors": {0: 3.0}}, "factor of concept 0 is 3.0, expected 0 to 2"),
        ({"factors": {3: 0.0}}, "There is no concept 3: expected 0 to 2"),
        ({"sampler": {"num_step": 3}}, "did you mean num_steps"),
        ({"sampler": {"num_steps": 0}}, "num_steps is 0, expected 1 to 1000"),
    ],
)
def test_values_out_of_range(exploration, files, values, sentence):
    with pytest.raises(InputError, match=sentence):
        settings = Settings(**values)
        list(exploration.draw(exploration.ask([read(files["image"])], settings), settings))


def test_a_model_that_would_not_see_the_image(exploration, files, monkeypatch):
    monkeypatch.setattr(exploration.model, "controlnet", None)
    with pytest.raises(InputError, match="expected a feature guidance scale above 0"):
        next(exploration.draw(exploration.ask([read(files["image"])], PLAIN), PLAIN))


# What is read


def test_unusable_pictures(tmp_path):
    (tmp_path / "noise.png").write_bytes(os.urandom(2000))
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    for name in ("noise.png", "empty.jpg", "page.eps"):
        with pytest.raises(InputError, match=f"'{name}' is not a picture that can be read"):
            read(tmp_path / name)
    whole = write_picture(tmp_path / "whole.png", 0).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="Cannot decode picture 'cut.png'"):
        read(tmp_path / "cut.png")


def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (4000, 3000)).save(tmp_path / "large.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr("featinv.explorer.session.decode", None)
    with pytest.raises(InputError, match=r"\(4000 x 3000 pixels\): expected at most 10 megapix"):
        read_photo(tmp_path / "large.png", "large.png", 10)
    with pytest.raises(InputError, match="'bomb.png' is too large: expected at most 50 megapix"):
        read(tmp_path / "bomb.png")


def test_bundled_photographs_are_found_by_name():
    assert find_photo("chelsea.png", 50).picture.size == (451, 300)
    with pytest.raises(InputError, match="There is no image 'chelsae.png': expected a file, or"):
        find_photo("chelsae.png", 50)


# The command line


def test_settings_and_command_give_the_same_pixels(exploration, files, tmp_path):
    photos = [read(files["image"]), read(files["second"])]
    settings = Settings(7, 2, {"num_steps": 3, "guidance_scale": 2.0}, {2: 0.5}, 0.25, "spherical")
    drawn = list(exploration.draw(exploration.ask(photos, settings), settings))
    (tmp_path / "settings.json").write_text(exploration.record(settings, photos))
    arguments = {key: files[key].name for key in ("checkpoint", "concepts", "image", "second")}
    line = explore.repeat_command(arguments | {"repeat": "settings.json", "output": "again"})
    assert line.startswith("python -m featinv.cli.explore checkpoint=model.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *shlex.split(line)[1:]]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number, sample in enumerate(drawn, 1):
        with Image.open(tmp_path / "again" / f"sample_{number}.png") as picture:
            assert np.array_equal(np.asarray(picture), sample.image.permute(1, 2, 0))
        assert f"sample {number}: {sample.caption}" in done.stdout
    assert (tmp_path / "again" / "reconstructions.png").is_file()


@pytest.mark.parametrize(
    "name", ["a.jpg", "a b.jpg", "IMG (1).jpg", "x=y,{z}.png", "\"q\" 's'.png"]
)
@pytest.mark.parametrize("more", ["", "${x}", "1", "null"])
def test_any_name_survives_shell_and_hydra(name, more):
    for value in (name, more + name, more or name):
        (word,) = shlex.split(explore.repeat_command({"image": value}))[3:]
        read = OverridesParser.create().parse_override(word).value()
        assert str(read).replace("\\${", "${") == value


def repeat(capsys, files, *overrides: str) -> str:
    arguments = [f"checkpoint={files['checkpoint']}", f'image="{files["image"]}"']
    arguments += [f"output={files['image'].parent / 'out'}", *overrides]
    return mistake(capsys, "explorer", *arguments, task=explore.main)


def test_another_source_is_refused(exploration, files, tmp_path, capsys):
    (tmp_path / "s.json").write_text(exploration.record(PLAIN, [read(files["image"])]))
    settings, concepts = f"repeat={tmp_path / 's.json'}", f"concepts={files['concepts']}"
    said = repeat(capsys, files, settings, concepts, f"image={files['second']}")
    assert said.startswith("The image is another than that of") and "SHA-256" in said
    assert repeat(capsys, files, settings).startswith("The concepts is another than that of")
    more = f"second={files['second']}"
    assert repeat(capsys, files, settings, concepts, more).startswith("The second is another")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "There is no file"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"seed": 0}', "cannot be read"),
        ('{"seed": "x", "factors": {}, "sha256": {}}', "seed is 'x': expected an integer"),
        ('{"sed": 0, "factors": {}, "sha256": {}}', "cannot be read"),
    ],
)
def test_unusable_settings(files, tmp_path, capsys, content, sentence):
    if content is not None:
        (tmp_path / "s.json").write_text(content)
    assert sentence in repeat(capsys, files, f"repeat={tmp_path / 's.json'}")


def test_bad_arguments(files, tmp_path, capsys):
    def says(*overrides: str) -> str:
        output = f"output={tmp_path / 'out'}"
        return mistake(capsys, "explorer", output, *overrides, task=explore.main)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert says(f"port={port}").startswith(f"port is {port}, which is in use: expected a free")
    assert says("port=70000") == "port is 70000, expected 1 to 65535, for example 7860."
    assert says("host=nowhere.invalid").startswith("host is 'nowhere.invalid', which is no address")
    assert says("checkpoint=nothing").startswith("There is no checkpoint 'nothing'")
    assert says("max_upload_mb=0").startswith("max_upload_mb is 0: expected an integer of at least")
    assert says("max_megapixels=0").startswith("max_megapixels is 0, expected more than 0")
    assert says("prot=1").startswith("Unknown config key 'prot': did you mean port")
    assert says("repeat=x.json") == "The value of image is missing: set it with image=PHOTO.jpg."
    tiny = f"checkpoint={files['checkpoint']}"
    assert "cannot be read" in says(tiny, "concepts=nothing")
    Concepts(torch.ones(1, 512), torch.zeros(512), "nmf", "another one").save(tmp_path / "c")
    assert "are of another one, expected those of resnet10t" in says(tiny, f"concepts={tmp_path}/c")


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(explorer.__file__)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("Error: The explorer needs gradio: pip install")


def test_this_machine_only_unless_told(tmp_path):
    configs = []
    run("explorer", f"output={tmp_path}", task=configs.append)
    assert configs[0].host == "127.0.0.1" and configs[0].checkpoint == "imagenette-small"
    assert (CONFIGS / "explorer.yaml").is_file()


# In a browser

BROWSER = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
BROWSER += " --disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=BROWSER.split())
        yield chromium
        chromium.close()


@pytest.fixture
def served(exploration, files, tmp_path, monkeypatch):
    """The address of the page for the tiny model, which takes files of up to a megabyte."""
    asked, connect = [], socket.socket.connect

    def noted(self, address: tuple) -> None:
        asked.append(address[0])
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    sources = {key: str(files[key]) for key in ("checkpoint", "concepts")}
    page = explorer.Page(
        exploration, sources, explore.repeat_command, max_upload_mb=1, max_megapixels=1
    )
    yield explorer.launch(page, "127.0.0.1", explorer.free_port("127.0.0.1"))
    page.blocks.close()
    assert set(asked) <= {"127.0.0.1"}  # the server needs no network either


def visit(context, address: str):
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(address)
    page.wait_for_selector("#invert")
    return page


def put(page, path: Path, where: str = "#image") -> None:
    page.locator(f"{where} input[type=file]").set_input_files(path)
    page.wait_for_selector(f"{where} img")


def fill(page, name: str, value: object) -> None:
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def finished(page) -> str:
    """Wait for a result; return the command that the page shows."""
    page.wait_for_selector("#picture:not([disabled]):not(.disabled)")
    page.wait_for_function("document.querySelector('#command textarea').value != ''")
    return page.locator("#command textarea").input_value()


def pixels(page) -> list[np.ndarray]:
    """Return the reconstructions that the page shows."""
    pictures = page.locator("#gallery .grid-container img")
    found = []
    for i in range(pictures.count()):
        answer = page.request.get(pictures.nth(i).get_attribute("src"))
        found.append(np.asarray(decode(answer.body())))
    return found


def download(page, button: str, folder: Path) -> Path:
    with page.expect_download() as waited:
        page.click(button)
    path = folder / waited.value.suggested_filename
    waited.value.save_as(path)
    return path


def expected(exploration, settings: Settings, *paths: Path) -> list[np.ndarray]:
    asked = exploration.ask([read(path) for path in paths], settings)
    return [s.image.permute(1, 2, 0).numpy() for s in exploration.draw(asked, settings)]


def test_page_draws_steers_mixes_and_is_repeated(browser, served, exploration, files, tmp_path):
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    urls = []
    context.on("request", lambda request: urls.append(request.url))
    page = visit(context, served)
    put(page, files["image"])
    page.get_by_text("Mix with a second image").click()
    put(page, files["second"], "#second")
    fill(page, "weight", 0.25)
    page.get_by_label("concept 1", exact=True).check()
    page.wait_for_selector("#factor-1", state="visible")
    assert page.locator("#factor-0").count() == 0 or page.locator("#factor-0").is_hidden()
    fill(page, "factor-1", 0.5)
    fill(page, "seed", 3)
    fill(page, "num_samples", 2)
    fill(page, "num_steps", 3)
    page.click("#invert")
    line = finished(page)
    assert "2 of 2 reconstructions; dpm_solver, 3 steps" in page.locator("#status").inner_text()
    assert page.locator("#table tbody tr").count() == 2
    settings = Settings(3, 2, {"num_steps": 3}, {1: 0.5}, 0.25)
    drawn = expected(exploration, settings, files["image"], files["second"])
    assert np.array_equal(pixels(page), drawn)
    record, picture = (download(page, button, tmp_path) for button in ("#settings", "#picture"))
    values = json.loads(record.read_text())
    assert values["seed"] == 3 and values["factors"] == {"1": 0.5} and values["weight"] == 0.25
    assert values["sampler"]["scheduler"] == "dpm_solver"
    # the command that the page shows, with the two downloads in the folder of the photographs
    words = [word.split("=", 1) for word in shlex.split(line)[3:]]
    given = {key: value.strip('"') for key, value in words}
    assert given["image"] == files["image"].name and given["repeat"] == record.name
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run("explorer", *shlex.split(line)[3:], task=explore.main)
    again = tmp_path / given["output"]
    for number, pixel in enumerate(drawn, 1):
        assert np.array_equal(np.asarray(decode(again / f"sample_{number}.png")), pixel)
    assert (again / "reconstructions.png").read_bytes() == picture.read_bytes()
    assert urls and all(url.startswith((served, "data:", "blob:")) for url in urls)
    context.close()


def test_page_refuses_what_it_cannot_read(browser, served, tmp_path):
    context = browser.new_context()
    page = visit(context, served)

    def refused(name: str, sentence: str) -> None:
        page.locator("#image input[type=file]").set_input_files(tmp_path / name)
        page.locator(".toast-body", has_text=sentence).wait_for()
        page.wait_for_selector("#image input[type=file]", state="attached")

    (tmp_path / "noise.png").write_bytes(os.urandom(2000))
    (tmp_path / "heavy.png").write_bytes(os.urandom(1_200_000))
    Image.new("1", (2000, 1000)).save(tmp_path / "large.png")
    refused("noise.png", "'noise.png' is not a picture that can be read")
    refused("large.png", "(2000 x 1000 pixels): expected at most 1 megapixels")
    refused("heavy.png", "exceed the maximum allowed size of 1")
    page.click("#invert")
    page.locator(".toast-body", has_text="There is no image: expected one").wait_for()
    context.close()


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
def test_paths_of_the_server_are_no_uploads(served, files, meta):
    (files["image"].parent / "secret.png").write_text("not for everybody")
    file = {"path": str(files["image"].parent / "secret.png"), "orig_name": "x.png", **meta}
    config = requests.get(f"{served}config", timeout=20).json()
    (number, *_) = [f["id"] for f in config["dependencies"] if f["api_name"] == "check"]
    question = {"data": [file], "fn_index": number, "session_hash": "somebody"}
    requests.post(f"{served}gradio_api/queue/join", json=question, timeout=20).raise_for_status()
    about = {"session_hash": "somebody"}
    answer = requests.get(f"{served}gradio_api/queue/data", about, timeout=20).text
    assert '"success":false' in answer.replace(" ", "")
    assert "picture" not in answer  # it was not even opened
    assert bool(meta) or "'x.png' was not uploaded" in answer


def test_two_users_do_not_mix(browser, served, exploration, files):
    pages = []
    for key, seed in (("image", 1), ("second", 2)):
        page = visit(browser.new_context(), served)
        put(page, files[key])
        fill(page, "seed", seed)
        fill(page, "num_samples", 3)
        pages.append(page)
    for page in pages:  # the second while the first is drawing
        page.click("#invert")
    for page, key, seed in zip(pages, ("image", "second"), (1, 2), strict=True):
        finished(page)
        assert np.array_equal(pixels(page), expected(exploration, Settings(seed, 3), files[key]))
        page.context.close()
