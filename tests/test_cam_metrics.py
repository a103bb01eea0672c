"""Faithfulness metrics against values worked out by hand."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from sklearn.datasets import load_digits
from torch import Tensor, nn

from probe import cam
from probe.cam import fill, metrics, sanity


class Corner(nn.Module):
    """Its score for class 1 is the sum of the pixels in the upper left quarter: the faithful map is known."""

    def forward(self, x: Tensor) -> Tensor:
        score = x[:, :, : x.shape[2] // 2, : x.shape[3] // 2].sum((1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], 1)


def corner_maps(batch: int, size: int = 8) -> Tensor:
    maps = torch.zeros(batch, size, size)
    maps[:, : size // 2, : size // 2] = 1 + torch.arange(16).view(4, 4) / 99
    return maps


RAW = lambda output: output[:, 1]  # noqa: E731  the score itself in place of a probability


def test_deletion_and_insertion_curves_of_a_model_that_is_known() -> None:
    model, x = Corner().eval(), torch.ones(2, 1, 8, 8)
    maps = torch.cat([corner_maps(1), 1 - corner_maps(1).clamp(0, 1)])
    deleted = cam.deletion(model, x, maps, RAW, steps=4, batch_size=3)
    torch.testing.assert_close(deleted.share, torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    # the good map deletes the 16 pixels that count in the first quarter, the bad one in the last
    torch.testing.assert_close(deleted.score, torch.tensor([[16.0, 0, 0, 0, 0], [16, 16, 16, 16, 0]]))
    torch.testing.assert_close(deleted.area, torch.tensor([2.0, 14.0]))
    inserted = cam.insertion(model, x, maps, RAW, steps=4, baseline=0.0)
    torch.testing.assert_close(inserted.score, torch.tensor([[0.0, 16, 16, 16, 16], [0, 0, 0, 0, 16]]))
    half = cam.deletion(model, x, maps, RAW, steps=1, baseline=torch.full((1, 1, 8, 8), 0.5))
    torch.testing.assert_close(half.score, torch.tensor([[16.0, 8], [16, 8]]))
    blurred = cam.insertion(model, torch.rand(2, 1, 8, 8), maps, RAW, steps=2)
    assert blurred.score.shape == (2, 3)


def test_curves_are_of_probabilities_for_classes() -> None:
    x = torch.rand(2, 1, 8, 8) / 10
    curve = cam.deletion(Corner().eval(), x, corner_maps(2), [1, 0], steps=2)
    torch.testing.assert_close(curve.score[:, 0], Corner()(x).softmax(1)[[0, 1], [1, 0]])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_ranks_are_an_order_of_all_pixels(height: int, width: int, seed: int) -> None:
    maps = torch.randn(2, height, width, generator=torch.Generator().manual_seed(seed))
    ranks = metrics.ranks(maps, torch.zeros(2, 1, height, width))
    for i in range(2):
        assert sorted(ranks[i].flatten().tolist()) == list(range(height * width))
        assert torch.equal(
            maps[i].flatten()[ranks[i].flatten().argsort()], maps[i].flatten().sort(descending=True).values
        )


def test_average_drop_and_increase_in_confidence() -> None:
    model = Corner().eval()
    x = torch.ones(3, 1, 8, 8)
    x[2] = -1
    maps = torch.cat([corner_maps(1) > 0, corner_maps(1) == 0, corner_maps(1) == 0]).float()
    drop = cam.average_drop(model, x, maps, RAW)
    torch.testing.assert_close(drop[:2], torch.tensor([0.0, 1.0]))
    assert cam.increase_in_confidence(model, x, maps, RAW).tolist() == [False, False, True]


def test_imputed_pixels_are_the_weighted_mean_of_their_neighbours() -> None:
    images = torch.rand(2, 3, 9, 11)
    hole = torch.rand(2, 9, 11) < 0.6
    filled = fill.impute(images, hole)
    assert torch.equal(filled.movedim(1, -1)[~hole], images.movedim(1, -1)[~hole])
    padded, ones = (nn.functional.pad(each, (1, 1, 1, 1)) for each in (filled, torch.ones(1, 1, 9, 11)))
    mean, weight = torch.zeros_like(filled), torch.zeros(1, 1, 9, 11)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            share = 0 if i == j == 0 else (1 / 12 if i and j else 1 / 6)
            mean += share * padded[:, :, 1 + i : 10 + i, 1 + j : 12 + j]
            weight += share * ones[:, :, 1 + i : 10 + i, 1 + j : 12 + j]
    error = (filled - mean / weight).abs().amax(1)[hole]
    assert float(error.max()) < 1e-4
    constant = fill.impute(torch.full((1, 1, 6, 6), 0.7), torch.rand(1, 6, 6) < 0.8)
    torch.testing.assert_close(constant, torch.full((1, 1, 6, 6), 0.7))


def test_road_prefers_the_map_that_is_right() -> None:
    model = Corner().eval()
    x = torch.zeros(2, 1, 8, 8)
    x[:, :, :4, :4] = 1
    maps = torch.cat([corner_maps(1), 1 - corner_maps(1).clamp(0, 1)])
    before = torch.get_rng_state()
    found = cam.road(model, x, maps, RAW, shares=(0.25, 0.5), batch_size=3)
    assert torch.equal(before, torch.get_rng_state())
    assert found.most.shape == found.least.shape == (2, 2)
    assert float(found.score[0]) > 0 > float(found.score[1])
    assert float(found.most[0].max()) < float(found.least[0].min())


def test_pointing_games() -> None:
    maps = torch.zeros(2, 8, 8)
    maps[0, 2, 3], maps[0, 6, 6], maps[0, 5, 5], maps[1, 7, 7] = 3.0, 1.0, -5.0, 2.0
    boxes = torch.tensor([[3, 2, 5, 4], [0, 0, 6, 6]])
    assert cam.pointing_game(maps, boxes, size=(8, 8)).tolist() == [True, False]
    assert cam.pointing_game(maps, boxes, size=(8, 8), tolerance=2).tolist() == [True, True]
    torch.testing.assert_close(cam.energy_pointing_game(maps, boxes, size=(8, 8)), torch.tensor([0.75, 0.0]))
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[:, :8] = True
    assert cam.pointing_game(maps, masks).tolist() == [True, False]
    assert cam.energy_pointing_game(-maps[1:], masks[1:]).tolist() == [0.0]
    with pytest.raises(ValueError, match=r"together with size"):
        cam.pointing_game(maps, boxes)


def test_infidelity_of_the_true_map_is_zero() -> None:
    model, x = Corner().eval(), torch.rand(2, 1, 8, 8)
    maps = x[:, 0].clone()
    maps[:, 4:], maps[:, :, 4:] = 0, 0
    right = cam.infidelity(model, x, maps, RAW, samples=32, scale=False)
    torch.testing.assert_close(right, torch.zeros(2), rtol=0, atol=1e-9)
    torch.testing.assert_close(cam.infidelity(model, x, 7 * maps, RAW), torch.zeros(2), rtol=0, atol=1e-9)
    wrong = cam.infidelity(model, x, maps.flip(1, 2), RAW)
    nothing = cam.infidelity(model, x, torch.zeros_like(maps), RAW)
    assert bool((wrong > 0.01).all())
    assert bool((wrong <= nothing + 1e-6).all())


def test_sensitivity_is_how_much_maps_move() -> None:
    x = torch.rand(2, 1, 4, 4) + 1
    assert cam.sensitivity(lambda images: torch.ones(2, 4, 4), x).tolist() == [0.0, 0.0]
    moved = cam.sensitivity(lambda images: images[:, 0], x, radius=0.1, samples=50)
    generator = torch.Generator().manual_seed(0)
    shifts = [(2 * torch.rand(x.shape, generator=generator) - 1) * 0.1 for _ in range(50)]
    norms = torch.stack([shift.flatten(1).norm(dim=1) for shift in shifts])
    torch.testing.assert_close(moved, norms.amax(0) / x.flatten(1).norm(dim=1))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(0, 99))
def test_rank_correlation_is_scipys(count: int, seed: int) -> None:
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 4, (1, count), generator=generator).double() for _ in range(2))
    found = float(sanity.rank_correlation(a, b))
    if a.unique().numel() > 1 and b.unique().numel() > 1:
        assert found == pytest.approx(spearmanr(a[0], b[0]).statistic, abs=1e-6)
    else:
        assert found == 0


@pytest.fixture(scope="module")
def reader() -> tuple[nn.Module, Tensor, Tensor]:
    """A CNN that has learned scikit-learn's digits."""
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.images).float()[:, None] / 16, torch.tensor(data.target)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2, bias=False), nn.ReLU(True), nn.Conv2d(12, 32, 3, padding=1, bias=False),
        nn.ReLU(True), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        for rows in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), x[1400:1500], y[1400:1500]


@pytest.mark.filterwarnings("ignore:.*nowhere positive.*:UserWarning")
def test_on_a_trained_network_the_heat_lies_on_the_stroke(reader: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Grad-CAM beats chance by far, and its negative is worse than chance, by every metric."""
    model, x, y = reader
    maps = cam.explain(model, x, layer="3", target=y)
    ink = x[:, 0] > 0
    assert float(cam.pointing_game(maps, ink).float().mean()) > 0.75 > float(ink.float().mean()) + 0.2
    assert float(cam.energy_pointing_game(maps, ink).mean()) > float(ink.float().mean()) + 0.1
    good, bad = (cam.deletion(model, x, sign * maps, y, steps=8).area.mean() for sign in (1, -1))
    assert float(good) < float(bad) - 0.1
    good, bad = (cam.insertion(model, x, sign * maps, y, steps=8, baseline=0.0).area.mean() for sign in (1, -1))
    assert float(good) > float(bad) + 0.1


@pytest.mark.filterwarnings("ignore:layer=None.*:UserWarning")
def test_the_sanity_check_randomises_from_the_top_in_a_copy(reader: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Grad-CAM changes with the weights; a map of the image alone does not, and is found out."""
    model, x, _ = reader
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = cam.sanity_check(model, x[:20], layer="3")
    assert [name for name, _ in rows] == ["6", "2", "0"]
    assert rows[-1][1] < 0.7
    assert "6" in str(rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for layer in (model[3], None):
        assert cam.sanity_check(model, x[:20], layer=layer) == rows
    fake = cam.sanity_check(model, x[:20], layer="3", method=lambda activation: x[:20, 0])
    assert [value for _, value in fake] == pytest.approx([1.0, 1.0, 1.0])


def test_metrics_leave_model_and_random_numbers_alone_and_say_what_is_wrong() -> None:
    model, x, maps = Corner().train(), torch.rand(2, 1, 8, 8), corner_maps(2)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="train mode"):
        cam.infidelity(model, x, maps, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    model.eval()
    with pytest.raises(ValueError, match="don't belong to images"):
        cam.deletion(model, x, maps[:1])
    with pytest.raises(ValueError, match="'grey'"):
        cam.deletion(model, x, maps, baseline="grey")
    with pytest.raises(ValueError, match="at least one step"):
        cam.deletion(model, x, maps, steps=0)
    with pytest.raises(IndexError, match="out of range"):
        cam.average_drop(model, x, maps, 2)
