from copy import deepcopy

import torch
from torch import nn

from featinv.utils.timm_models import keep_slow_convolutions_in_float32


def test_strided_depthwise_convolutions_ignore_autocast_where_gradients_flow():
    torch.manual_seed(0)
    strided = nn.Conv2d(4, 4, 3, stride=2, groups=4)
    other = nn.Conv2d(4, 4, 3, groups=4)
    model = nn.Sequential(other, strided)
    x = torch.rand(1, 4, 12, 12)
    before, keys = model(x), list(model.state_dict())
    keep_slow_convolutions_in_float32(model)
    assert torch.equal(model(x), before) and list(model.state_dict()) == keys

    with torch.autocast("cpu", torch.bfloat16):
        assert strided(x.requires_grad_()).dtype == torch.float32
        assert other(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert strided(x.detach()).dtype == torch.bfloat16

    copy = deepcopy(model)
    nn.init.zeros_(copy[1].weight)
    assert torch.equal(model(x), before)  # a copy computes with its own weights
