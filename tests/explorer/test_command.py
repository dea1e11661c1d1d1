import shlex
import sys

import numpy as np
from helpers import mistake, run
from hydra.core.override_parser.overrides_parser import OverridesParser

from featinv.cli import explore
from featinv.data.images import decode
from featinv.explorer.inputs import Settings


def test_settings_and_command_repeat_the_pixels(
    exploration, files, photos, tmp_path, monkeypatch, capsys
):
    sampler = {"num_steps": 3, "guidance_scale": 2.0, "feature_guidance_scale": 5.0}
    settings = Settings(7, 2, sampler, {2: 0.5}, 0.25, "spherical", "layer4", "bf16-mixed")
    drawn = list(exploration.draw(exploration.condition(photos, settings), settings))
    record = tmp_path / "settings.json"
    record.write_text(exploration.record(settings, photos))
    monkeypatch.chdir(files["image"].parent)
    monkeypatch.setitem(sys.modules, "gradio", None)  # only the page needs it
    arguments = {key: path.name for key, path in files.items()}
    arguments |= {"repeat": str(record), "output": str(tmp_path / "again")}
    program, *words = shlex.split(explore.repeat_command(arguments))
    assert program == "featinv-explore"
    run("explorer", *words, task=explore.main)
    said = capsys.readouterr().out
    for number, sample in enumerate(drawn, 1):
        pixels = np.asarray(decode(tmp_path / "again" / f"sample_{number}.png"))
        assert np.array_equal(pixels, sample.image.permute(1, 2, 0))
        assert f"sample {number}: {sample.caption}" in said
    assert (tmp_path / "again" / "reconstructions.png").is_file()


def test_any_name_survives_shell_and_hydra():
    names = ["a.jpg", "a b.jpg", "IMG (1).jpg", "x=y,{z}.png", "\"q\" 's'.png", "1", "null"]
    for name in [*names, *(f"${{x}}{name}" for name in names), *(f"1{name}" for name in names)]:
        (word,) = shlex.split(explore.repeat_command({"image": name}))[1:]
        value = OverridesParser.create().parse_override(word).value()
        assert str(value).replace("\\${", "${") == name


def test_mistakes_are_reported_in_a_sentence(files, tmp_path, monkeypatch, capsys):
    def sentence(*overrides: str) -> str:
        output = f"output={tmp_path / 'out'}"
        return mistake(capsys, "explorer", output, *overrides, task=explore.main)

    checkpoint = f"checkpoint={files['checkpoint']}"
    assert (
        sentence("repeat=x.json") == "The value of image is missing: set it with image=PHOTO.jpg."
    )
    said = sentence(checkpoint, "image=chelsea.png", "repeat=x.json")
    assert said.startswith("The settings 'x.json' cannot be read (FileNotFoundError")
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("page", "controls"):
        monkeypatch.delitem(sys.modules, f"featinv.explorer.{name}", raising=False)
    assert sentence() == "The explorer needs gradio: pip install 'featinv[explorer]'"
