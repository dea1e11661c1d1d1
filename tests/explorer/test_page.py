import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from helpers import run
from PIL import Image

from featinv.cli import explore
from featinv.data.images import decode
from featinv.explorer.inputs import Settings
from featinv.explorer.session import Reconstruction
from featinv.utils.errors import InputError

gradio = pytest.importorskip("gradio", reason="pip install 'featinv[explorer]'")
from featinv.explorer.page import Page, table_rows  # noqa: E402


@pytest.fixture(scope="module")
def served(files, tmp_path_factory):
    """The page as the command serves it, for the tiny model and files of up to a megabyte.

    `page` is the page, `address` where it is, and `hosts` those that this process connected to.
    """
    folder, pages, hosts = tmp_path_factory.mktemp("page"), [], set()
    launch, connect = Page.launch, socket.socket.connect
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        patch.setattr(Page, "launch", lambda page, *at: (pages.append(page), launch(page, *at))[1])
        patch.setattr(gradio.Blocks, "block_thread", lambda blocks: None)
        patch.setattr(socket.socket, "connect", lambda s, at: (hosts.add(at[0]), connect(s, at))[1])
        arguments = [f"{key}={files[key]}" for key in ("checkpoint", "concepts")]
        arguments += ["max_upload_mb=1", "max_megapixels=1", f"port={port}"]
        run("explorer", *arguments, f"output={folder}", task=explore.main)
        page = pages[0]
        yield SimpleNamespace(page=page, address=page.blocks.local_url, hosts=hosts)
        page.blocks.close()


def expected(exploration, photos, settings: Settings) -> list[np.ndarray]:
    samples = exploration.draw(exploration.condition(photos, settings), settings)
    return [sample.image.permute(1, 2, 0).numpy() for sample in samples]


def fill_in(page, picture: Path, **values: object) -> dict:
    """Upload a picture; return the controls' values as the browser would send them."""
    upload = Path(page.blocks.GRADIO_CACHE) / picture.name
    upload.parent.mkdir(exist_ok=True)
    shutil.copy(picture, upload)
    values["image"] = {"path": str(upload), "orig_name": upload.name}
    inputs = {control: control.value for control in page.controls.values()}
    return inputs | {page.controls[name]: value for name, value in values.items()}


def test_a_draw_and_its_downloads(served, exploration, files, photos, tmp_path):
    page, steps, shown = served.page, [], []
    sampler = {"num_steps": 3, "feature_guidance_scale": 5, "polish_steps": 1}
    inputs = fill_in(page, files["image"], layer="layer3", num_samples=2, **sampler)
    for results in page.draw(inputs, lambda step, unit: steps.append(step)):
        shown.append(results)
        for button in (page.settings, page.picture):
            if file := results[button].get("value"):
                shutil.copy(file, tmp_path)
    assert [len(results[page.gallery]) for results in shown] == [0, 1, 3, 3]  # with the spread
    assert steps == [(step, 6) for step in range(1, 7)]
    settings = Settings(0, 2, sampler, layer="layer3", precision=page.precision)
    *samples, (_, spread) = shown[-1][page.gallery]
    drawn = [pixels for pixels, _ in samples]
    assert np.array_equal(drawn, expected(exploration, photos[:1], settings))
    assert spread.startswith("spread 0.") and ", calibration " in spread
    assert "2 of 2 reconstructions of layer3; dpm_solver, 3 steps" in shown[-1][page.status]
    (record,) = tmp_path.glob("featinv-*.json")
    assert exploration.read(record, photos[:1]).sampler.items() >= sampler.items()
    assert decode(record.with_suffix(".png")).size > (500, 500)
    arguments = {key: str(files[key]) for key in ("checkpoint", "concepts")}
    arguments |= {"repeat": record.name, "image": files["image"].name, "output": record.stem}
    assert shown[-1][page.command] == explore.repeat_command(arguments)


def test_two_users_do_not_mix(served, exploration, files, photos):
    page = served.page
    users = [
        page.draw(fill_in(page, files[key], seed=seed, num_samples=2), lambda step, unit: None)
        for key, seed in (("image", 1), ("second", 2))
    ]
    *_, last = zip(*users, strict=True)  # by turns
    for shown, photo, seed in zip(last, photos, (1, 2), strict=True):
        settings = Settings(seed, 2, precision=page.precision)
        drawn = [pixels for pixels, _ in shown[page.gallery][:2]]
        assert np.array_equal(drawn, expected(exploration, [photo], settings))


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
def test_files_of_the_server_cannot_be_read(served, tmp_path, meta):
    (tmp_path / "secret.png").write_text("not for everybody")
    file = {"path": str(tmp_path / "secret.png"), "orig_name": "x.png", **meta}
    config = requests.get(f"{served.address}config", timeout=20).json()
    (number, *_) = [f["id"] for f in config["dependencies"] if f["api_name"] == "check"]
    question = {"data": [file], "fn_index": number, "session_hash": "somebody"}
    join = f"{served.address}gradio_api/queue/join"
    requests.post(join, json=question, timeout=20).raise_for_status()
    about = {"session_hash": "somebody"}
    answer = requests.get(f"{served.address}gradio_api/queue/data", about, timeout=20).text
    assert '"success":false' in answer.replace(" ", "")
    assert "picture" not in answer  # it was not even opened
    assert bool(meta) or "'x.png' was not uploaded" in answer


def test_this_machine_only(served):
    assert served.address.startswith("http://127.0.0.1:")
    requests.get(served.address, timeout=20).raise_for_status()
    assert served.hosts == {"127.0.0.1"}


def test_addresses_that_cannot_be_served(served):
    port = served.page.blocks.server_port
    for host, number in (("127.0.0.1", port), ("127.0.0.1", 70000), ("nowhere.invalid", 7860)):
        with pytest.raises(InputError, match=f"served at host={host} port={number} .*: expected"):
            served.page.launch(host, number)


def test_a_table_without_classes():
    assert table_rows([Reconstruction(None, 0.5, None, None)]) == [
        {"sample": "1", "cosine": "0.500"}
    ]


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


def visit(context, address: str):
    page = context.new_page()
    page.set_default_timeout(60_000)
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


def drawn(page) -> list[np.ndarray]:
    """Return the reconstructions that the page shows before their spread, once all are there."""
    page.wait_for_selector("#picture:not([disabled]):not(.disabled)")
    page.wait_for_function("document.querySelector('#command textarea').value != ''")
    pictures = page.locator("#gallery .grid-container img")
    addresses = [pictures.nth(i).get_attribute("src") for i in range(pictures.count() - 1)]
    return [np.asarray(decode(page.request.get(address).body())) for address in addresses]


def test_every_control_reaches_the_draw(browser, served, exploration, files, photos, tmp_path):
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    urls = []
    context.on("request", lambda request: urls.append(request.url))
    page = visit(context, served.address)
    put(page, files["image"])
    page.get_by_text("Mix with a second image").click()
    put(page, files["second"], "#second")
    page.get_by_label("layer4 (512 x 2 x 2)").check()
    page.get_by_label("concept 1", exact=True).check()
    page.wait_for_selector("#factor-1", state="visible")
    assert page.locator("#factor-0").count() == 0 or page.locator("#factor-0").is_hidden()
    page.get_by_text("Feature guidance", exact=True).click()
    sampler = {"num_steps": 2, "guidance_scale": 2.0, "feature_guidance_scale": 5}
    sampler |= {"polish_steps": 1, "transform_noise": 0.1, "transform_shift": 2}
    sampler |= {"transform_zoom": 0.05}
    settings = Settings(3, 2, sampler, {1: 0.5}, 0.25, "linear", "layer4", served.page.precision)
    for name, value in (
        *sampler.items(),
        *{"seed": 3, "num_samples": 2, "weight": 0.25, "factor-1": 0.5}.items(),
    ):
        fill(page, name, value)
    page.click("#invert")
    assert np.array_equal(drawn(page), expected(exploration, photos, settings))
    assert page.locator("#table tbody tr").count() == 2
    with page.expect_download() as download:
        page.click("#settings")
    download.value.save_as(tmp_path / "s.json")
    assert download.value.suggested_filename in page.locator("#command textarea").input_value()
    record = json.loads(exploration.record(settings, photos))
    assert json.loads((tmp_path / "s.json").read_text()) == record
    assert urls and all(url.startswith((served.address, "data:", "blob:")) for url in urls)
    assert served.hosts == {"127.0.0.1"}
    context.close()


def test_the_page_rejects_bad_uploads(browser, served, tmp_path):
    context = browser.new_context()
    page = visit(context, served.address)
    (tmp_path / "noise.png").write_bytes(os.urandom(2000))
    (tmp_path / "heavy.png").write_bytes(os.urandom(1_200_000))
    Image.new("1", (2000, 1000)).save(tmp_path / "large.png")
    for name, sentence in (
        ("noise.png", "'noise.png': it is not a picture in JPEG"),
        ("large.png", "it has 2000 x 1000 pixels: expected at most 1 megapixels"),
        ("heavy.png", "exceed the maximum allowed size of 1"),
    ):
        page.locator("#image input[type=file]").set_input_files(tmp_path / name)
        page.locator(".toast-body", has_text=sentence).wait_for()
        page.wait_for_selector("#image img", state="detached")  # it is taken off again
    page.click("#invert")
    page.locator(".toast-body", has_text="There is no image: expected one").wait_for()
    context.close()
