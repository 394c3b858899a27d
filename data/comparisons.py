"""The pairs of responses that preference losses learn from."""
import logging
from itertools import combinations

from data.tokenizers import encode_groups

log = logging.getLogger(__name__)


def encode_pairs(tokenizer, comparisons, max_len, name):
    """Every pair of responses of which one is ranked better, as token ids: list of (prompt_ids, [chosen_ids, rejected_ids]).

    name: of the data, for messages. Exits with a one-line message if there is nothing to learn (check_pairs).
    """
    pairs = []
    for prompt, responses, ranks in comparisons:
        for i, j in combinations(range(len(responses)), 2):
            if ranks[i] != ranks[j]:
                chosen, rejected = (i, j) if ranks[i] < ranks[j] else (j, i)
                pairs.append((prompt, [responses[chosen], responses[rejected]]))
    groups = encode_groups(tokenizer, pairs, max_len)
    check_pairs(groups, [[0, 1]] * len(groups), max_len, name)
    return groups


def check_pairs(groups, ranks, max_len, name):
    """Logs how many pairs of ranked responses are identical, token by token. Exits if all are, or if all responses tie.

    groups: list of (prompt_ids, [response_ids, …]), cut to max_len; ranks: those of each group's responses.
    """
    n_pairs = 0
    n_identical = 0
    for (_, responses), its_ranks in zip(groups, ranks):
        ids = [response.tobytes() for response in responses]
        for i, j in combinations(range(len(ids)), 2):
            if its_ranks[i] != its_ranks[j]:
                n_pairs += 1
                n_identical += ids[i] == ids[j]
    if n_pairs == 0:
        raise SystemExit(f"--data={name}: all responses tie: there is nothing to learn from them")
    if n_identical == n_pairs:
        raise SystemExit(f"--data={name}: all {n_pairs} pairs are identical, as cut to --max_len={max_len}: "
                         "there is nothing to learn from them")
    if n_identical:
        log.info(f"{n_identical} of {n_pairs} pairs are identical, as cut to max_len={max_len}: no loss can order them")
