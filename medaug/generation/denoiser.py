"""A network with its conditions as a denoiser: classifier-free guidance in one batch, encoder and decoder apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medaug.diffusion.guidance import classifier_free
from medaug.diffusion.parameterisation import Level, Prediction
from medaug.networks.guided_unet import AfterBlock, Encoded, GuidedUNet
from medaug.training.diffusion import NoiseObjective


class Query(NamedTuple):
    """A noisy batch as the network has taken it in; with guidance 2B entries, the second half without conditions."""

    x: Tensor
    level: Level
    encoded: Encoded


@dataclass(frozen=True, eq=False)
class ConditionalDenoiser:
    """A `medaug.diffusion.sampler.Denoiser` for images of known class, reference, prompt or several of them.

    Args:
        network: in evaluation mode.
        objective: parameterisation and schedule it was trained with.
        labels: (B,) classes; None for a network without.
        features: of the references, (B, C_r, h, w); None for a network without.
        guidance_scale: classifier-free scale on all conditions together, one number or one per image (B,); at 1 the pass without them is
            left out.
        context: of the prompts, (B, L, D); None for a network without.
        negative_context: takes the place of the null context in the pass without conditions, (B, L, D); None leaves it.
    """

    network: GuidedUNet
    objective: NoiseObjective
    labels: Tensor | None = None
    features: Tensor | None = None
    guidance_scale: float | Tensor = 1.0
    context: Tensor | None = None
    negative_context: Tensor | None = None

    @property
    def passes(self) -> int:
        """Passes in one batch: 2 with guidance."""
        return 1 if bool((torch.as_tensor(self.guidance_scale) == 1).all()) else 2

    def ask(self, x_t: Tensor, t: int, after_block: AfterBlock | None = None) -> Query:
        """Run encoder and middle block on x_t (B, C, H, W); `after_block` as for `GuidedUNet.encode`."""
        parameterisation, batch = self.objective.parameterisation, len(x_t)
        level = parameterisation.level(self.objective.schedule, t, self.passes * batch, x_t.device)
        x, labels, features, keep, context = x_t, self.labels, self.features, None, self.context
        if self.passes == 2:  # first with the conditions, then with the null label and null features
            x = x_t.repeat(2, 1, 1, 1)
            labels = None if labels is None else torch.cat([labels, torch.full_like(labels, int(self.network.num_classes or 0))])
            features = None if features is None else features.repeat(2, 1, 1, 1)
            keep = torch.arange(2 * batch, device=x_t.device) < batch
            if context is not None:
                without = self.network.null_context(batch) if self.negative_context is None else self.negative_context
                context = torch.cat([context, without])
        seen = parameterisation.network_input(x, level.abar)
        return Query(x, level, self.network.encode(seen, level.time, labels, features, keep, after_block, context))

    def answer(self, query: Query, model_output: Tensor) -> Prediction:
        """Read the decoder's output (B or 2B, C, H, W) and guide: the estimates for B images."""
        both = self.objective.parameterisation.predict(model_output, query.x, query.level.abar)
        if self.passes == 1:
            return both
        batch = len(query.x) // 2
        cond, uncond = (Prediction(*(value[part] for value in both)) for part in (slice(None, batch), slice(batch, None)))
        return classifier_free(cond, uncond, self.guidance_scale)

    def __call__(self, x_t: Tensor, t: int) -> Prediction:
        """The unperturbed estimates, (B, C, H, W) each."""
        query = self.ask(x_t, t)
        return self.answer(query, self.network.decode(query.encoded))
