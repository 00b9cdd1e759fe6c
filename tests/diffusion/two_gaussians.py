"""Two classes N(-m, s^2) and N(m, s^2), equally likely: the network, the classifier of noisy images and the boundary are formulas."""

from __future__ import annotations

import torch
from gaussian_toy import gaussian_denoiser, posterior_mean

from medaug.diffusion import ClassMeasure, EnsembleVotes, GradientGuidance, Prediction, make_measure, noise_from_x_0
from medaug.diffusion.schedule import coefficient

MEAN, STD = 0.6, 0.4


def logit(x, abar):
    """log p(1 | x_t) - log p(0 | x_t): class 1 lies at +m, and the noise widens both alike."""
    variance = abar * STD**2 + 1 - abar
    return 2 * coefficient(abar.sqrt() * MEAN / variance, x) * x


def class_means(labels):
    return torch.tensor([-MEAN, MEAN], dtype=torch.float64)[labels][:, None]


def conditional(schedule, labels):
    """eps(x_t | y)."""
    return gaussian_denoiser(schedule, mean=class_means(labels), std=STD)


def unconditional(schedule):
    """eps(x_t) of both classes together: the class means weighted by the posterior of the class."""

    def denoise(x_t, t):
        abar = schedule.abar(t)
        share = torch.sigmoid(logit(x_t, abar))
        x_0 = share * posterior_mean(x_t, abar, MEAN, STD) + (1 - share) * posterior_mean(x_t, abar, -MEAN, STD)
        return Prediction(x_0, noise_from_x_0(x_t, x_0, abar))

    return denoise


def classifier(schedule):
    """(x_t, t) -> exact logits (B, 2), differentiable."""

    def logits(x, time):
        z = logit(x, schedule.abar(time.long()))
        return torch.cat([torch.zeros_like(z), z], dim=1)

    return logits


def guide(schedule, measure, scale, labels=None, **options):
    votes = EnsembleVotes([classifier(schedule)], 2)
    return GradientGuidance(ClassMeasure(make_measure(measure), votes, labels), scale, schedule, **options)


def clean_entropy(x):
    """Mean entropy in nats that the exact classifier of clean images has on x (B, 1)."""
    p = torch.sigmoid(2 * MEAN / STD**2 * x).clamp(1e-300, 1 - 1e-16)
    return float(-(p * p.log() + (1 - p) * (1 - p).log()).mean())
