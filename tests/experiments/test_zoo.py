import json

import pytest
import yaml
from cli.test_configs import composed
from omegaconf import OmegaConf

from featinv.checkpoints import build_model, save_model

SHARE = {"mean": 0.75, "low": 0.7, "high": 0.8}


@pytest.fixture
def runs(tiny_config, tmp_path):
    """A classifier's run, and that of a model which inverts it; and one that is not finished."""
    folder = tmp_path / "runs"
    for name in ("classifier", "inverter", "unfinished"):
        (folder / name).mkdir(parents=True)
    weights = folder / "classifier" / "model.safetensors"
    config = OmegaConf.to_container(composed("train_backbone"))
    write(folder / "classifier", config, {"accuracy": SHARE})
    weights.write_bytes(b"\0" * 2_500_000)
    write(folder / "unfinished", config, {})

    model = build_model(tiny_config)
    save_model(model, folder / "inverter" / "model.safetensors")
    tiny_config["backbone"] |= {"weights": str(weights), "layer": ["layer2", "layer4"]}
    scores = {"spatial_cosine": SHARE, "lite2_cosine": SHARE | {"mean": 0.625}}
    training = {"model": tiny_config, "trainer": config["trainer"], "data": {"batch_size": 32}}
    metrics = {"rows": {"reconstruction": scores}, "witnesses": ["lite2"], "sets": {}}
    write(folder / "inverter", training, metrics)
    return folder


def write(folder, config, metrics):
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics["command"] = (
        f"python train.py data.root=/home/somebody/data output=outputs/{folder.name}"
    )
    (folder / "metrics.json").write_text(json.dumps(metrics))
    logged = [{"step": 49, "seconds": 1800, "train/loss": 2}]
    logged.append({"step": 99, "seconds": 3600, "train/loss": 1})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in logged))


def test_the_page_tells_each_run_with_its_numbers(runs, experiment, tmp_path):
    experiment("zoo", f"runs=[{runs}]", output=tmp_path / "docs")
    (page,) = (tmp_path / "docs").iterdir()
    text = page.read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = {row[0]: row[1:] for row in cells if len(row) > 1}
    shown = ["0.750 [0.700, 0.800]", "0.625 [0.700, 0.800]"]
    size = f"{(runs / 'inverter' / 'model.safetensors').stat().st_size / 1e6:.1f}"
    inverter = ["resnet10t", "layer2, layer4", "spatial", shown[0], *shown, "1.00", "3,200", size]
    assert rows["inverter"] == inverter
    assert rows["classifier"] == ["resnet10t", "128", shown[0], "1.00", "3,200", "2.5"]
    assert "unfinished" not in text and "/home" not in text
    assert "- `inverter`: `python train.py data.root=data output=outputs/inverter`" in text


def test_nothing_is_finished(runs, refusal):
    assert "expected model.safetensors" in refusal("zoo", f"runs={runs / 'unfinished'}")
