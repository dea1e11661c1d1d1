import torch

from featinv.edits import pool


def test_pool_is_the_average_at_every_position():
    features = torch.randn(2, 3, 4, 5)
    pooled = pool(features)
    assert pooled.shape == features.shape
    for b in range(2):
        for c in range(3):
            expected = sum(features[b, c].flatten().tolist()) / 20
            torch.testing.assert_close(pooled[b, c], torch.full((4, 5), expected))


def test_pool_forgets_positions_and_changes_nothing_more():
    features = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(pool(features.flip(2).transpose(2, 3)), pool(features))
    torch.testing.assert_close(pool(pool(features)), pool(features))
    constant = torch.randn(2, 3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(pool(constant), constant)


def test_pool_leaves_its_input_alone_and_passes_gradients_on():
    features = torch.randn(1, 2, 2, 2, requires_grad=True)
    before = features.detach().clone()
    pool(features)[0, 0, 0, 0].backward()
    assert torch.equal(features.detach(), before)
    expected = torch.tensor([0.25, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    torch.testing.assert_close(features.grad, expected)
