import torch

from linear_readout import held_out_r2


def test_a_linear_map_explains_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    weights = torch.randn(3, 1, generator=generator)
    y = torch.cat([x @ weights + 2, torch.randn(200, 1, generator=generator)], dim=1)
    r2 = held_out_r2((x[:150], y[:150]), (x[150:], y[150:]), penalty=1e-3)
    assert r2[0] > 0.999 and r2[1] < 0.2


def test_each_layer_is_read_with_each_penalty(experiment, tmp_path):
    own = ["backbone=resnet10t_random", "layers=[layer3,layer4]", "num_crops=20"]
    rows = experiment("linear_readout", *own, "penalties=[10,1e3]", output=tmp_path)
    assert [(row["layer"], row["penalty"]) for row in rows] == [
        ("layer3", "1e+01"),
        ("layer3", "1e+03"),
        ("layer4", "1e+01"),
        ("layer4", "1e+03"),
    ]
