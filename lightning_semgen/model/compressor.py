"""The compressor: features to low-dimensional Gaussian semantics (SemanticGen §3.2), and the way back for its training.

The path of a feature: LayerNorm without affine → MLP → μ, log σ² → z = μ + σ·n → standardised per channel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Sequential):
    """One hidden layer."""

    def __init__(self, wide_in: int, hidden: int, wide_out: int):
        super().__init__(nn.Linear(wide_in, hidden), nn.GELU(), nn.Linear(hidden, wide_out))


@dataclass
class Posterior:
    """A sample z (…, d) of the Gaussian N(μ, σ²) of a feature, and the KL to N(0, 1) of each channel (…, d)."""

    z: Tensor
    kl: Tensor


class Standardiser(nn.Module):
    """Per-channel standardisation with running statistics, saved with the module that holds it.

    `observe` gathers what a step has seen, on every rank; `update` folds it in once per step.
    """

    momentum = 0.01

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(3, dim, dtype=torch.float64), persistent=False)  # n, Σz, Σz²

    def forward(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.var.sqrt().clamp(min=1e-6)

    @torch.no_grad()
    def observe(self, z: Tensor) -> None:
        z = z.detach().flatten(0, -2).double()
        self.seen += torch.stack([torch.full_like(z[0], len(z)), z.sum(0), z.square().sum(0)])

    @torch.no_grad()
    def update(self) -> None:
        """Running E[z] and E[z²]: plain means over the first steps, then exponential ones.

        Their variance holds what lies between steps too. A mean of the steps' own variances would miss it: half of all,
        where a step has one clip and clips differ as much as the tokens of a clip do.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.seen)
        count, total, squares = self.seen
        self.updates += 1
        weight = (1 / self.updates.double()).clamp(min=self.momentum)
        mean, second = self.mean.double(), self.var.double() + self.mean.double().square()
        mean, second = torch.lerp(mean, total / count, weight), torch.lerp(second, squares / count, weight)
        self.mean.copy_(mean)
        self.var.copy_((second - mean.square()).clamp(min=0))
        self.seen.zero_()

    def reset(self) -> None:
        """Forgets all statistics, to be measured anew."""
        self.updates.zero_()
        self.seen.zero_()


class Compressor(nn.Module):
    """Features (…, D) to standardised semantics (…, d); d None keeps the features, standardised all the same."""

    def __init__(self, features: int, dim: int | None, hidden: int = 512):
        super().__init__()
        self.features, self.dim = features, dim
        self.channels = features if dim is None else dim
        self.mlp = None if dim is None else MLP(features, hidden, 2 * dim)
        self.standardise = Standardiser(self.channels)

    def moments(self, features: Tensor) -> Tensor:
        """μ and log σ² of each feature (…, 2d); without compression the normalised feature (…, D)."""
        x = F.layer_norm(features.float(), features.shape[-1:])
        return x if self.mlp is None else self.mlp(x)

    def posterior(self, moments: Tensor, noise: Tensor) -> Posterior:
        """One sample per feature; `noise` (…, d) is the n of z = μ + σ·n."""
        if self.mlp is None:
            return Posterior(moments, moments.new_zeros(()).expand_as(moments))
        mean, log_var = moments.chunk(2, dim=-1)
        log_var = log_var.clamp(-10, 4)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var)
        return Posterior(mean + (0.5 * log_var).exp() * noise, kl)


class FeatureDecoder(nn.Module):
    """Semantics back to features, only to teach the compressor: MSE + (1 − cosine) against the normalised features."""

    def __init__(self, dim: int, features: int, hidden: int = 512):
        super().__init__()
        self.mlp = MLP(dim, hidden, features)

    def forward(self, z: Tensor, features: Tensor) -> Tensor:
        """The reconstruction loss, a scalar."""
        target = F.layer_norm(features.float(), features.shape[-1:])
        guess = self.mlp(z)
        return F.mse_loss(guess, target) + (1 - F.cosine_similarity(guess, target, dim=-1)).mean()
