"""The path of a feature, and its statistics."""

import pytest
import torch

from lightning_semgen.model.compressor import Compressor, FeatureDecoder


@pytest.fixture
def features():
    torch.manual_seed(0)
    return 5 + 3 * torch.randn(16, 2, 3, 3, 24)


@pytest.mark.parametrize("dim", [8, None])
def test_standardised_semantics_have_mean_0_and_deviation_1(features, dim):
    compressor = Compressor(24, dim)
    noise = torch.randn(*features.shape[:-1], compressor.channels)
    z = compressor.posterior(compressor.moments(features), noise).z
    compressor.standardise.observe(z[:5])
    compressor.standardise.observe(z[5:])  # two micro-batches of one step
    compressor.standardise.update()
    z_sem = compressor.standardise(z).flatten(0, -2)
    torch.testing.assert_close(z_sem.mean(0), torch.zeros(compressor.channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(z_sem.std(0, correction=0), torch.ones(compressor.channels), atol=1e-3, rtol=0)


def test_statistics_are_a_mean_over_steps_and_are_saved(features):
    compressor = Compressor(24, None)
    for step in range(4):
        compressor.standardise.observe(features[4 * step : 4 * step + 4])
        compressor.standardise.update()
    torch.testing.assert_close(compressor.standardise.mean, features.flatten(0, -2).mean(0), atol=1e-4, rtol=1e-4)
    copy = Compressor(24, None)
    copy.load_state_dict(compressor.state_dict())
    assert torch.equal(copy.standardise(features), compressor.standardise(features))


@pytest.mark.parametrize("clips", [1, 2, 8])
def test_the_running_variance_holds_what_lies_between_steps(clips):
    """Clips that differ more than the tokens of a clip do: variance 1, of which 0.64 lies between clips."""
    generator = torch.Generator().manual_seed(0)
    standardise = Compressor(4, None).standardise
    for _ in range(2000):
        of_clip, of_token = (torch.randn(clips, n, 4, generator=generator) for n in (1, 20))
        standardise.observe(0.8 * of_clip + 0.6 * of_token)
        standardise.update()
    torch.testing.assert_close(standardise.var, torch.ones(4), rtol=0.2, atol=0)


def test_without_compression_the_feature_is_only_normalised(features):
    compressor = Compressor(24, None)
    posterior = compressor.posterior(compressor.moments(features), torch.randn_like(features))
    assert torch.equal(posterior.z, torch.nn.functional.layer_norm(features, (24,)))
    assert posterior.kl.abs().max() == 0


def test_kl_is_that_of_torch_summed_over_channels(features):
    compressor = Compressor(24, 8)
    x = torch.nn.functional.layer_norm(features, (24,))
    mean, log_var = compressor.mlp(x).chunk(2, dim=-1)
    normal = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum(-1)
    posterior = compressor.posterior(compressor.moments(features), torch.randn_like(mean))
    torch.testing.assert_close(posterior.kl.sum(-1), expected)


def test_variance_is_clamped(features):
    compressor = Compressor(24, 8)
    torch.nn.init.constant_(compressor.mlp[2].bias, 1e4)
    noise = torch.ones(*features.shape[:-1], 8)
    posterior = compressor.posterior(compressor.moments(features), noise)
    mean = compressor.mlp(torch.nn.functional.layer_norm(features, (24,)))[..., :8]
    torch.testing.assert_close(
        posterior.z - mean, torch.full_like(mean, torch.tensor(2.0).exp().item()), rtol=1e-3, atol=0
    )


def test_a_perfect_reconstruction_costs_nothing(features):
    decoder = FeatureDecoder(24, 24)
    decoder.mlp = torch.nn.Identity()
    assert decoder(torch.nn.functional.layer_norm(features, (24,)), features).abs() < 1e-5
