"""Ranking one's own candidates with a trained model: ``Ranker`` and ``Request``."""

from trsr_dist.predict.ranker import Ranked, Ranker, Ranking, Request

__all__ = ["Ranked", "Ranker", "Ranking", "Request"]
