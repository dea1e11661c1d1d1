import warnings

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from featinv.metrics import (
    FeatureFidelity,
    bootstrap_interval,
    pixel_spread,
    pooled_cosine,
    relative_l2,
    spatial_cosine,
    top_k_agreement,
)
from featinv.utils.errors import InputError


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 5, 2, 4, generator=generator)
    return a, b


def test_spatial_cosine_is_the_loop_over_positions(maps):
    a, b = maps
    for i, value in enumerate(spatial_cosine(a, b)):
        positions = [
            cosine(a[i, :, y, x].numpy(), b[i, :, y, x].numpy()) for y in range(2) for x in range(4)
        ]
        assert value.item() == pytest.approx(np.mean(positions), abs=1e-6)


def test_pooled_cosine_averages_first_and_ignores_positions(maps):
    a, b = maps
    for i, value in enumerate(pooled_cosine(a, b)):
        expected = cosine(a[i].numpy().mean(axis=(1, 2)), b[i].numpy().mean(axis=(1, 2)))
        assert value.item() == pytest.approx(expected, abs=1e-6)
    moved = a.roll(1, dims=3)
    assert torch.allclose(pooled_cosine(a, moved), torch.ones(3))
    assert (spatial_cosine(a, moved) < 0.9).all()


def test_relative_l2_divides_by_the_reference(maps):
    a, b = maps
    expected = [np.linalg.norm((b - a)[i]) / np.linalg.norm(a[i]) for i in range(3)]
    assert relative_l2(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(relative_l2(a, 3 * a), torch.full((3,), 2.0))


def test_zero_features_are_no_nan(maps):
    a, _ = maps
    zero = torch.zeros_like(a)
    for metric in (spatial_cosine, pooled_cosine):
        assert torch.equal(metric(a, zero), torch.zeros(3))
        assert torch.equal(metric(zero, zero), torch.zeros(3))
    assert torch.equal(relative_l2(zero, zero), torch.zeros(3))
    assert torch.allclose(relative_l2(a, zero), torch.ones(3))


def test_half_precision_is_computed_in_float32(maps):
    a, b = (x.bfloat16() for x in maps)
    for metric in (spatial_cosine, pooled_cosine, relative_l2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = metric(a, b)
        assert torch.equal(value, metric(a.float(), b.float()))
        assert value.dtype == torch.float32


def test_top_k_agreement_is_the_ranking():
    a = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    b = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 3.0]])
    assert top_k_agreement(a, b, 1).tolist() == [0, 0]
    assert top_k_agreement(a, b, 2).tolist() == [1, 0]
    assert top_k_agreement(a, b, 5).tolist() == [1, 1]


def test_pixel_spread_is_the_unbiased_deviation_in_pixel_units():
    samples = torch.rand(2, 4, 3, 5, 6) * 2 - 1
    pixels = (samples.numpy() + 1) / 2
    expected = pixels.std(axis=1, ddof=1).mean(axis=1)
    assert np.allclose(pixel_spread(samples), expected, atol=1e-6)
    assert torch.equal(pixel_spread(samples[:, :1]), torch.zeros(2, 5, 6))


def test_bootstrap_interval_is_the_loop_over_resamples():
    rng = np.random.default_rng(1)
    values = rng.normal(3, 2, size=40)
    means = [rng.choice(values, size=40).mean() for _ in range(4000)]
    low, high = bootstrap_interval(values, confidence=0.9)
    assert (low, high) == pytest.approx(np.quantile(means, [0.05, 0.95]), abs=0.05)
    assert (low, high) == bootstrap_interval(torch.from_numpy(values), confidence=0.9)


def test_bootstrap_interval_of_degenerate_values():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap_interval([0.5]) == (0.5, 0.5)
        assert bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25)
    with pytest.raises(InputError, match="at least one image"):
        bootstrap_interval([])


def test_fidelity_orders_rows_and_drops_duplicates():
    fidelity = FeatureFidelity(["cosine", "distance/l2"])
    fidelity.update(
        torch.tensor([4, 0]), {"distance/l2": torch.arange(2.0), "cosine": -torch.ones(2)}
    )
    fidelity.update(
        torch.tensor([2, 4]), {"cosine": torch.ones(2), "distance/l2": torch.ones(2) * 7}
    )
    result = fidelity.compute()
    assert list(result) == ["cosine", "distance/l2"]
    assert result["cosine"].tolist() == [-1, 1, -1]
    assert result["distance/l2"].tolist() == [1, 7, 0]

    fidelity.reset()
    fidelity.update(torch.tensor([9]), {"cosine": torch.ones(1), "distance/l2": torch.ones(1)})
    assert fidelity.compute()["cosine"].tolist() == [1]


def test_fidelity_refuses_other_names():
    with pytest.raises(ValueError, match="'cosine'"):
        FeatureFidelity(["cosine"]).update(torch.tensor([0]), {"cosin": torch.ones(1)})


def test_fidelity_leaves_no_trace_in_a_state_dict():
    module = torch.nn.Module()
    module.fidelity = FeatureFidelity(["cosine"])
    module.fidelity.update(torch.tensor([0]), {"cosine": torch.ones(1)})
    assert not module.state_dict()
    assert not list(module.parameters())


def gather(rank: int, folder: str) -> None:
    """Rank 0 of 2 saves what both gathered: unequal shares first, then one rank without any."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = []
    for shares in ([[0, 2, 4], [1, 0]], [[], [3, 1]]):
        fidelity = FeatureFidelity(["a", "b"])
        index = torch.tensor(shares[rank], dtype=torch.int64)
        if len(index):
            fidelity.update(index, {"a": index * 10.0, "b": -index})
        results.append(fidelity.compute())
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_fidelity_gathers_over_two_ranks(tmp_path):
    mp.start_processes(gather, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    for rank in range(2):
        both, only_rank_1 = torch.load(tmp_path / f"{rank}.pt")
        assert both["a"].tolist() == [0, 10, 20, 40]
        assert both["b"].tolist() == [0, -1, -2, -4]
        assert only_rank_1["a"].tolist() == [10, 30]
