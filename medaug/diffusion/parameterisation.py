"""What the network predicts, and how it becomes an estimate of x_0 and of the noise.

The noisy image is always variance preserving, x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps (Ho et al. 2020, eq. 4), so
every sampler, guide, inversion and perturbation works with each parameterisation. EDM rescales inside.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medaug.diffusion.objective import Weighting
from medaug.diffusion.schedule import NoiseSchedule, coefficient, noise_to_signal, signal_to_noise
from medaug.errors import ConfigError

Network = Callable[[Tensor, Tensor], Tensor]  # (images (B, C, *spatial), time (B,)) -> output like the images


class Prediction(NamedTuple):
    """The two estimates made from one x_t, each of its shape; a sampler takes S from `x_0` and D from `noise`."""

    x_0: Tensor
    noise: Tensor


class Level(NamedTuple):
    """Noise level of every image in a batch."""

    abar: Tensor  # (B,), float64 on the CPU: some devices have no float64
    time: Tensor  # (B,), float32: what the network is told


def add_noise(x_0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps (Ho et al. 2020, eq. 4); `abar` is a scalar or (B,)."""
    return coefficient(abar.sqrt(), x_0) * x_0 + coefficient((1 - abar).sqrt(), x_0) * noise


def x_0_from_noise(x_t: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar) (Ho et al. 2020, eq. 15)."""
    return coefficient(1 / abar.sqrt(), x_t) * x_t - coefficient(noise_to_signal(abar), x_t) * noise


def noise_from_x_0(x_t: Tensor, x_0: Tensor, abar: Tensor) -> Tensor:
    """eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)."""
    return (x_t - coefficient(abar.sqrt(), x_t) * x_0) / coefficient((1 - abar).sqrt(), x_t)


def velocity(x_0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022, arXiv 2202.00512, section 4)."""
    return coefficient(abar.sqrt(), x_0) * noise - coefficient((1 - abar).sqrt(), x_0) * x_0


def with_noise(prediction: Prediction, noise: Tensor, abar: Tensor) -> Prediction:
    """The prediction after a guide changed its noise: x_0 moves by -sigma times the change, so x_t stays explained."""
    shift = coefficient(noise_to_signal(abar), noise) * (noise - prediction.noise)
    return Prediction(prediction.x_0 - shift, noise)


def with_x_0(prediction: Prediction, x_0: Tensor, abar: Tensor) -> Prediction:
    """The prediction after its x_0 changed (by clipping): the noise moves by -1/sigma times the change."""
    shift = (x_0 - prediction.x_0) / coefficient(noise_to_signal(abar), x_0)
    return Prediction(x_0, prediction.noise - shift)


class Parameterisation(ABC):
    """One kind of network output. Subclasses give the target, its reading, and the scale of its error."""

    @abstractmethod
    def target(self, x_0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
        """What the perfect network returns, shape of `x_0`; `abar` is (B,)."""

    @abstractmethod
    def predict(self, model_output: Tensor, x_t: Tensor, abar: Tensor) -> Prediction:
        """Read the network's output at x_t; `abar` is (B,)."""

    @abstractmethod
    def noise_error_ratio(self, abar: Tensor) -> Tensor:
        """|eps error|^2 / |output error|^2 at fixed x_t, shape of `abar`."""

    def network_input(self, x_t: Tensor, abar: Tensor) -> Tensor:
        """What the network sees of x_t."""
        return x_t

    def time(self, t: int, abar: float) -> float:
        """What the network is told of the noise level: the timestep."""
        return float(t)

    def draw_level(self, schedule: NoiseSchedule, generator: torch.Generator) -> tuple[float, float]:
        """Draw (abar, time) for ONE training image: t uniform over {0, ..., T-1} (Ho et al. 2020, algorithm 1)."""
        t = int(torch.randint(schedule.num_train_timesteps, (), generator=generator))
        abar = float(schedule.abar(t))
        return abar, self.time(t, abar)

    def level(self, schedule: NoiseSchedule, t: int, batch: int, device: torch.device | str = "cpu") -> Level:
        """The level of timestep `t` for a batch of `batch` images."""
        abar = float(schedule.abar(t))
        return make_level([(abar, self.time(t, abar))] * batch, device)

    def denoise(self, network: Network, x_t: Tensor, level: Level) -> Prediction:
        """Estimate x_0 and the noise in x_t.

        Args:
            network: (images (B, C, *spatial), time (B,)) -> output of the same shape.
            x_t: variance-preserving noisy images, shape (B, C, *spatial).
            level: their noise levels.

        Raises:
            ConfigError: if the network's output has another shape than x_t.
        """
        return self.predict(self._call(network, x_t, level), x_t, level.abar)

    def training_loss(
        self, network: Network, x_0: Tensor, noise: Tensor, level: Level, weighting: Weighting | None = None
    ) -> Tensor:
        """Weighted mean squared error per image, shape (B,) (Ho et al. 2020, eq. 14).

        Args:
            network: as for `denoise`.
            x_0: clean images in [-1, 1], shape (B, C, *spatial).
            noise: standard normal, shape of `x_0`.
            level: one noise level per image.
            weighting: weight on the noise error as a function of SNR (see `objective`), converted to this network's
                own error. None is the plain error of the network's own output, as its paper trains it: for v Salimans
                & Ho 2022, for EDM exactly lambda = (sigma^2 + sd^2)/(sigma sd)^2 on |D - x_0|^2, since lambda c_out^2 = 1.
        """
        model_output = self._call(network, add_noise(x_0, noise, level.abar), level)
        error = (model_output - self.target(x_0, noise, level.abar)).square().flatten(1).mean(dim=1)
        if weighting is None:
            return error
        weight = weighting(signal_to_noise(level.abar)) * self.noise_error_ratio(level.abar)
        return weight.to(error.dtype).to(error.device) * error

    def _call(self, network: Network, x_t: Tensor, level: Level) -> Tensor:
        model_output = network(self.network_input(x_t, level.abar), level.time)
        if model_output.shape != x_t.shape:
            raise ConfigError(
                "network-output",
                f"the network must return the shape of its input, {tuple(x_t.shape)}, got {tuple(model_output.shape)}; "
                "set out_channels to in_channels (learned variances are not offered).",
            )
        return model_output


def make_level(levels: list[tuple[float, float]], device: torch.device | str = "cpu") -> Level:
    """Stack (abar, time) of single images, as `draw_level` gives them, to the level of a batch."""
    abar, time = zip(*levels, strict=True)
    return Level(torch.tensor(abar, dtype=torch.float64), torch.tensor(time, dtype=torch.float32, device=device))


@dataclass(frozen=True)
class Epsilon(Parameterisation):
    """The network predicts the noise eps (Ho et al. 2020)."""

    def target(self, x_0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
        """The noise."""
        return noise

    def predict(self, model_output: Tensor, x_t: Tensor, abar: Tensor) -> Prediction:
        """The output is the noise."""
        return Prediction(x_0_from_noise(x_t, model_output, abar), model_output)

    def noise_error_ratio(self, abar: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(abar)


@dataclass(frozen=True)
class Sample(Parameterisation):
    """The network predicts the clean image x_0."""

    def target(self, x_0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
        """The clean image."""
        return x_0

    def predict(self, model_output: Tensor, x_t: Tensor, abar: Tensor) -> Prediction:
        """The output is x_0."""
        return Prediction(model_output, noise_from_x_0(x_t, model_output, abar))

    def noise_error_ratio(self, abar: Tensor) -> Tensor:
        """SNR."""
        return signal_to_noise(abar)


@dataclass(frozen=True)
class Velocity(Parameterisation):
    """The network predicts v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022)."""

    def target(self, x_0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
        """The velocity."""
        return velocity(x_0, noise, abar)

    def predict(self, model_output: Tensor, x_t: Tensor, abar: Tensor) -> Prediction:
        """x_0 = sqrt(abar) x_t - sqrt(1 - abar) v; eps = sqrt(abar) v + sqrt(1 - abar) x_t."""
        alpha, sigma = coefficient(abar.sqrt(), x_t), coefficient((1 - abar).sqrt(), x_t)
        return Prediction(alpha * x_t - sigma * model_output, alpha * model_output + sigma * x_t)

    def noise_error_ratio(self, abar: Tensor) -> Tensor:
        """abar."""
        return abar


@dataclass(frozen=True)
class EDM(Parameterisation):
    """Preconditioned network of Karras et al. 2022, eq. 7-8 and table 1, behind a variance-preserving x_t.

    With s = sqrt(1/abar - 1), x_t / sqrt(abar) = x_0 + s eps is the paper's noisy image, and
    D = c_skip x + c_out F(c_in x, 1000 c_noise) the estimate of x_0.

    Args:
        sigma_data: std of the clean images.
        p_mean: mean of ln(s) in training.
        p_std: std of ln(s) in training.
    """

    sigma_data: float = 0.5
    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        if not (0 < self.sigma_data < math.inf and 0 < self.p_std < math.inf and math.isfinite(self.p_mean)):
            raise ConfigError(
                "edm-option",
                "sigma_data and p_std must be positive and p_mean finite, "
                f"got {self.sigma_data}, {self.p_std} and {self.p_mean}.",
            )

    def scalings(self, abar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in) of table 1, shape of `abar`."""
        s, sd = noise_to_signal(abar), self.sigma_data
        c_in = 1 / (s**2 + sd**2).sqrt()
        return sd**2 * c_in**2, s * sd * c_in, c_in

    def target(self, x_0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
        """(x_0 - c_skip x) / c_out with x = x_0 + s eps, eq. 8; written without a division by s.

        1 - c_skip = s^2 c_in^2, hence (s/sd) c_in x_0 - sd c_in eps: bounded at every noise level.
        """
        s, (_, _, c_in) = noise_to_signal(abar), self.scalings(abar)
        return coefficient(s / self.sigma_data * c_in, x_0) * x_0 - coefficient(self.sigma_data * c_in, x_0) * noise

    def predict(self, model_output: Tensor, x_t: Tensor, abar: Tensor) -> Prediction:
        """x_0 = D, eq. 7; eps = (x - D) / s = s c_in^2 x - sd c_in F, written without a division by s."""
        s, (c_skip, c_out, c_in) = noise_to_signal(abar), self.scalings(abar)
        x = x_t / coefficient(abar.sqrt(), x_t)
        x_0 = coefficient(c_skip, x) * x + coefficient(c_out, x) * model_output
        noise = coefficient(s * c_in**2, x) * x - coefficient(self.sigma_data * c_in, x) * model_output
        return Prediction(x_0, noise)

    def noise_error_ratio(self, abar: Tensor) -> Tensor:
        """SNR c_out^2: the error of D is c_out times that of F."""
        return signal_to_noise(abar) * self.scalings(abar)[1] ** 2

    def network_input(self, x_t: Tensor, abar: Tensor) -> Tensor:
        """c_in x."""
        return coefficient(self.scalings(abar)[2] / abar.sqrt(), x_t) * x_t

    def time(self, t: int, abar: float) -> float:
        """1000 c_noise = 250 ln(s): c_noise on the scale of timesteps, for which time embeddings are made."""
        return 250 * math.log(math.sqrt((1 - abar) / abar))

    def draw_level(self, schedule: NoiseSchedule, generator: torch.Generator) -> tuple[float, float]:
        """Draw (abar, time) for ONE training image: ln(s) ~ N(p_mean, p_std^2), whatever the schedule."""
        log_s = self.p_mean + self.p_std * float(torch.randn((), generator=generator, dtype=torch.float64))
        return 1 / (1 + math.exp(2 * log_s)), 250 * log_s


PARAMETERISATIONS: dict[str, type[Epsilon] | type[Sample] | type[Velocity] | type[EDM]] = {
    "epsilon": Epsilon,
    "sample": Sample,
    "v_prediction": Velocity,
    "edm": EDM,
}
