"""The type that every dataset uses for comparisons."""
from typing import NamedTuple


class Comparison(NamedTuple):
    prompt: str
    responses: list  # of str
    ranks: list      # of int, one per response: 0 is the best, equal ranks are a tie
