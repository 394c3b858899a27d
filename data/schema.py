"""The shape of a comparison."""
from typing import NamedTuple


class Comparison(NamedTuple):
    prompt: str
    responses: list  # texts
    ranks: list      # of each response: 0 is the best, and equal ranks are a tie
