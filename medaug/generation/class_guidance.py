"""What guidance by a classifier needs of the keyed draws and of the network: drop-out votes and class embeddings under noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medaug.diffusion.guidance import ConditionAnnealing
from medaug.diffusion.parameterisation import Prediction
from medaug.diffusion.uncertainty import DropoutVotes
from medaug.draws import torch_generator
from medaug.errors import ConfigError
from medaug.generation.denoiser import ConditionalDenoiser
from medaug.networks.time_classifier import TimeClassifier


def dropout_votes(classifier: TimeClassifier, ids: Sequence[str], seed: int, votes: int = 8) -> DropoutVotes:
    """Votes of `votes` sub-networks for each image, the same ones at every step; keyed by (seed, id), not by the batch.

    Args:
        classifier: of noisy images, with a dropout above 0.
        ids: of the images.
        seed: of the sampler.
        votes: M, at least 2.

    Raises:
        ConfigError: no drop-out, or fewer than 2 votes (code `measure-votes`).
    """
    if not classifier.dropout > 0 or votes < 2:
        raise ConfigError(
            "measure-votes",
            f"Drop-out votes need a classifier with a dropout above 0 and at least 2 votes, got {classifier.dropout} and {votes}.",
        )
    shape = (votes, classifier.feature_dimension)
    draws = [torch.rand(shape, generator=torch_generator(seed, "guidance-dropout", name)) for name in ids]
    weight = classifier.classifier.weight
    kept = (torch.stack(draws, dim=1) >= classifier.dropout).to(weight)
    return DropoutVotes(classifier.vote_logits, lambda t: kept, classifier.num_classes)


@dataclass(frozen=True, eq=False)
class AnnealedDenoiser:
    """A conditional denoiser whose class embeddings are noised by CADS; the pass without conditions keeps its null embedding.

    Args:
        conditional: of a network with classes.
        annealing: when and how strongly.
        draw: t -> standard normal (B, D), D the width of the embedding; key it per image.

    Raises:
        ConfigError: a network without classes.
    """

    conditional: ConditionalDenoiser
    annealing: ConditionAnnealing
    draw: Callable[[int], Tensor]

    def __post_init__(self) -> None:
        if self.conditional.network.num_classes is None:
            raise ConfigError("annealing-option", "Condition annealing needs a network with classes; leave it out or train one.")

    @property
    def width(self) -> int:
        """D."""
        return int(self._embedding.embedding_dim)

    @property
    def _embedding(self) -> nn.Embedding:
        embedding: Any = self.conditional.network.unet.class_embedding
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def __call__(self, x_t: Tensor, t: int) -> Prediction:
        """The estimates, (B, C, H, W) each."""

        def noised(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            own, null = output[: len(x_t)], output[len(x_t) :]
            return torch.cat([self.annealing(own, self.draw(t).to(own), t, self.conditional.objective.schedule), null])

        handle = self._embedding.register_forward_hook(noised)  # both U-Nets look their classes up there
        try:
            return self.conditional(x_t, t)
        finally:
            handle.remove()
