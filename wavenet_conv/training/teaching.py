"""What teachers expect after each position of a list, and the names that they add to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, ModeError
from ..model import ConvWaveNet
from ..recipe import Recipe
from ..sampling import sample
from ..vocabulary import Vocabulary
from .corpus import Corpus
from .loss import predictions
from .ngrams import cross_fitted, predicted
from .ranks import from_first_rank


class Teaching:
    """The teachers of a training: networks (in evaluation mode, of the same vocabulary and any shape) and n-grams.

    What they expect is the mean of the networks' probabilities; n-grams have the share `Recipe.ngram_share` of it, and
    all of it where there are no networks. On the list itself they are cross-fitted (`cross_fitted`).

    Args:
        names: The list.
        vocab: Its vocabulary.
        recipe: `ngram_share`, `drawn` and `seed` are read.
        teachers: The networks.
        student: The model that is taught.

    Raises:
        ModeError: A teacher is in training mode.
        ConfigError: Names are to be drawn, and there is no network.

    Attributes:
        corpus: The list, with what teachers expect as its soft targets.
    """

    def __init__(
        self,
        names: Sequence[str],
        vocab: Vocabulary,
        recipe: Recipe,
        teachers: Sequence[ConvWaveNet],
        student: ConvWaveNet,
    ):
        if any(teacher.training for teacher in teachers):
            raise ModeError("a teacher is in training mode; call .eval() first")
        if recipe.drawn and not teachers:
            raise ConfigError("drawn names need a network to draw them; give teachers, or set drawn to 0")
        self.names, self.vocab, self.recipe, self.teachers, self.student = names, vocab, recipe, teachers, student
        self.corpus = Corpus(names, vocab, student)
        if recipe.distill_weight and (teachers or recipe.ngram_share):
            self.corpus.soft_targets = self._expected(names, cross_fitted)

    def corpus_of(self, epoch: int) -> Corpus:
        """The list, and behind it `Recipe.drawn` new names per name of the list, as many from each network."""
        count, networks, drawn = self.recipe.drawn * len(self.names), len(self.teachers), list[str]()
        if not count:
            return self.corpus
        for index, teacher in enumerate(self.teachers):
            part = (index + 1) * count // networks - index * count // networks
            drawn += sample(teacher, self.vocab, part, seed=(self.recipe.seed * 1_000_003 + epoch) * networks + index)
        drawn = from_first_rank(drawn)  # another machine may round otherwise
        corpus = Corpus([*self.names, *drawn], self.vocab, self.student)
        ngrams = lambda names, vocab: predicted(names, self.names, vocab)
        if self.corpus.soft_targets is not None:
            corpus.soft_targets = torch.cat([self.corpus.soft_targets, self._expected(drawn, ngrams)])
        return corpus

    def _expected(self, names: Sequence[str], ngrams: Callable[[Sequence[str], Vocabulary], Tensor]) -> Tensor:
        """What all teachers expect at each position of some names, `(positions, vocab)`; in the student's dtype."""
        share, weight = self.recipe.ngram_share if self.teachers else 1.0, self.student.embedding.weight
        expected = ngrams(names, self.vocab).mul_(share).to(weight) if share else torch.zeros_like(weight[:1, :1])
        for teacher in self.teachers if share < 1 else ():
            probs = predictions(teacher, Corpus(names, self.vocab, teacher))
            expected = expected + probs.to(weight) * ((1 - share) / len(self.teachers))
        return expected
