"""Noise on the bottleneck of the network, or elsewhere, for diversity. The draw is an argument: the same draw, the same result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from medaug.diffusion.parameterisation import Prediction
from medaug.diffusion.schedule import NoiseSchedule
from medaug.diffusion.steps import NoiseSource, Step
from medaug.errors import ConfigError

MODES = ("relative", "absolute")
NETWORK_LOCATIONS = ("bottleneck", "encoder", "decoder")  # inside the network: a second prediction of the same x_t
STATE_LOCATIONS = ("xt", "xT", "x0")  # on the image itself, while it is noisy or after
LOCATIONS = (*NETWORK_LOCATIONS, *STATE_LOCATIONS)
CFG_NOISES = ("shared", "independent")


def bottleneck_noise(h: Tensor, draw: Tensor, scale: float, mode: str = "relative") -> Tensor:
    """h + sigma * draw, with sigma = scale * std(h) per image ("relative") or sigma = scale ("absolute").

    Args:
        h: activation of the middle block, shape (B, C, *spatial).
        draw: standard normal, shape of `h`.
        scale: strength, at least 0; 0 leaves h as it is.
        mode: "relative" has a meaning for any network, "absolute" only for the network it was tuned on.

    Raises:
        ConfigError: on an unknown mode, a negative scale or a draw of another shape.
    """
    if mode not in MODES:
        raise ConfigError("perturbation-mode", f"the mode of bottleneck noise must be one of {', '.join(MODES)}, got {mode!r}.")
    if not scale >= 0:
        raise ConfigError("perturbation-scale", f"the scale of bottleneck noise must be at least 0, got {scale}.")
    if draw.shape != h.shape:
        raise ConfigError("perturbation-draw", f"draw must have the shape {tuple(h.shape)} of h, got {tuple(draw.shape)}.")
    if mode == "absolute":
        return h + scale * draw
    per_sample = tuple(range(1, h.ndim))
    return h + scale * h.std(dim=per_sample, correction=0, keepdim=True) * draw


def _x0_only(plain: Prediction, perturbed: Prediction) -> Prediction:
    """S from the perturbed prediction, D from the plain one (Fu et al. 2024, eq. 6)."""
    return Prediction(perturbed.x_0, plain.noise)


def _both(plain: Prediction, perturbed: Prediction) -> Prediction:
    """S and D from the perturbed prediction; their responses have opposite signs and nearly cancel."""
    return perturbed


PERTURBED_TERMS: dict[str, Callable[[Prediction, Prediction], Prediction]] = {"x0_only": _x0_only, "both": _both}


@dataclass(frozen=True)
class Perturbation:
    """Where, when and how strongly a reverse run is perturbed (DreamDA, Fu et al. 2024, arXiv 2403.12803, section 3.2).

    Args:
        scale: rho, times the std of what is perturbed per image and step ("relative"), or the std itself ("absolute"); 0 is off.
        mode: "relative" or "absolute".
        location: "bottleneck" (output of the middle block, skips untouched), "encoder" or "decoder" (output of every down or up
            block; the encoder's noise enters the skips), "xt" (the state after every perturbed step), "xT" (the start), "x0" (the result).
        terms: of the step that see a perturbation inside the network, a name of `PERTURBED_TERMS`.
        cfg_noise: "shared" gives both passes of classifier-free guidance the same draw, "independent" one each.
        skip_last: leave the last pair, p = -1, alone: there the perturbation would land undenoised in the image.
        window: (t_high, t_low): only steps that leave a t inside it, ends included; None is every step.

    Raises:
        ConfigError: an unknown name, a negative scale or an empty window.
    """

    scale: float = 0.25
    mode: str = "relative"
    location: str = "bottleneck"
    terms: str = "x0_only"
    cfg_noise: str = "shared"
    skip_last: bool = True
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        choices = (
            ("mode", self.mode, MODES),
            ("location", self.location, LOCATIONS),
            ("terms", self.terms, tuple(PERTURBED_TERMS)),
            ("cfg-noise", self.cfg_noise, CFG_NOISES),
        )
        for name, value, known in choices:
            if value not in known:
                raise ConfigError(
                    f"perturbation-{name}", f"the {name} of a perturbation must be one of {', '.join(known)}, got {value!r}."
                )
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not 0 <= self.scale < float("inf"):
            raise ConfigError(
                "perturbation-scale", f"the scale of a perturbation must be a number of at least 0, got {self.scale!r}."
            )
        if self.window is not None and not (len(self.window) == 2 and self.window[0] >= self.window[1] >= 0):
            raise ConfigError(
                "perturbation-window", f"the window must be (t_high, t_low) with t_high >= t_low >= 0, got {self.window}."
            )

    def acts(self, t: int, p: int) -> bool:
        """Whether the step t -> p is perturbed, wherever the location lies along the steps."""
        inside = self.window is None or self.window[1] <= t <= self.window[0]
        return self.scale > 0 and inside and not (self.skip_last and p < 0)

    def sigma(self, value: Tensor) -> Tensor:
        """Std of the noise for `value` (B, ...), ready to multiply a draw of its shape."""
        if self.mode == "absolute":
            return value.new_full([1] * value.ndim, self.scale)
        return self.scale * value.std(dim=tuple(range(1, value.ndim)), correction=0, keepdim=True)

    def add(self, value: Tensor, draw: Tensor) -> Tensor:
        """`value` (B, ...) with noise of this scale and mode; see `bottleneck_noise`."""
        return bottleneck_noise(value, draw, self.scale, self.mode)

    def combine(self, plain: Prediction, perturbed: Prediction) -> Prediction:
        """What the step gets of the two predictions."""
        return PERTURBED_TERMS[self.terms](plain, perturbed)


@dataclass(frozen=True, eq=False)
class PerturbedState:
    """A step whose result is perturbed: location "xt".

    Args:
        step: the step itself.
        perturbation: says which steps, and how strongly.
        draw: t -> standard normal of the shape of x, for the step that leaves t.
    """

    step: Step
    perturbation: Perturbation
    draw: NoiseSource

    def __call__(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        p: int,
        *,
        schedule: NoiseSchedule,
        noise: NoiseSource,
        previous: tuple[int, Prediction] | None,
    ) -> Tensor:
        """See `medaug.diffusion.steps.Step`."""
        x_p = self.step(prediction, x_t, t, p, schedule=schedule, noise=noise, previous=previous)
        return self.perturbation.add(x_p, self.draw(t)) if self.perturbation.acts(t, p) else x_p
