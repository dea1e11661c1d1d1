import pytest
import torch

from featinv.evaluation.draws import draw, extract
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit, to_uint8


@torch.no_grad()
def test_samples_are_compared_with_their_own_condition(awake_model, images):
    model = awake_model.eval()
    condition, logits = model.backbone.features_and_logits(images)
    classes = logits.argmin(1)
    draws = draw(model, condition, [7, 8, 9], num_samples=2, seed=5)
    expected = eight_bit(model.invert(condition, 2, seed=5, indices=[7, 8, 9]))  # (3, 2, ...)
    assert torch.equal(draws.images.view_as(expected), expected)
    assert torch.equal(draws.first(), to_uint8(expected[:, 0]))
    measured = draws.cosine(condition), draws.agreement(classes), draws.probability(classes)
    for i, measures in enumerate(zip(*measured, strict=True)):
        seen, said = extract(model.backbone, to_uint8(expected[i]))
        cosine = spatial_cosine(condition[i].expand_as(seen), seen).mean()
        agreement = (said.argmax(1) == classes[i]).float().mean()
        probability = said.softmax(1)[:, classes[i]].mean()
        naive = [float(value) for value in (cosine, agreement, probability)]
        assert list(map(float, measures)) == pytest.approx(naive, rel=1e-4)
