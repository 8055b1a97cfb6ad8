"""Features as colours."""

import torch

from lightning_semgen.video.principal_components import pca_colours, principal_directions


def test_directions_are_those_of_an_exact_decomposition():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=generator) * torch.linspace(3, 0.1, 32)
    x = x - x.mean(0)
    exact = torch.linalg.svd(x, full_matrices=False).Vh[:3].T
    assert (exact.T @ principal_directions(x)).abs().diag().min() > 0.99


def test_what_differs_in_features_differs_in_colour_and_clips_share_one_projection():
    features = torch.randn(2, 3, 4, 5, 16, generator=torch.Generator().manual_seed(1)) * 0.1
    features[..., 0] += torch.arange(5.0)  # columns differ most
    colours = pca_colours(features)
    assert colours.shape == (2, 3, 3, 4, 5) and colours.dtype == torch.uint8
    ramp = colours[:, :, 0].float().mean((0, 1, 2)).diff()
    assert (ramp > 20).all() or (ramp < -20).all()
    features[1] = features[0]
    colours = pca_colours(features)
    assert torch.equal(colours[0], colours[1])


def test_colours_do_not_depend_on_the_sign_of_a_direction_nor_need_three_channels():
    features = torch.rand(1, 4, 4, 6, generator=torch.Generator().manual_seed(2)).square()
    assert torch.equal(pca_colours(features), pca_colours(features.flip(-1)))
    assert pca_colours(features[..., :1]).shape == (1, 3, 4, 4)
    assert pca_colours(torch.ones(1, 2, 2, 8)).shape == (1, 3, 2, 2)
