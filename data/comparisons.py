"""The pairs of responses that preference losses learn from."""
import logging
from itertools import combinations

from data.tokenizers import encode_groups

log = logging.getLogger(__name__)


def encode_pairs(tokenizer, comparisons, max_len, source):
    """Encodes all pairs that do not tie. Returns [(prompt_ids, [chosen_ids, rejected_ids]), …].

    Exits with a one-line message, which contains `source` (the value of --data), if there is nothing to learn.
    """
    pairs = []
    for prompt, responses, ranks in comparisons:
        for i, j in combinations(range(len(responses)), 2):
            if ranks[i] < ranks[j]:
                pairs.append((prompt, [responses[i], responses[j]]))
            elif ranks[i] > ranks[j]:
                pairs.append((prompt, [responses[j], responses[i]]))
    groups = encode_groups(tokenizer, pairs, max_len)
    check_pairs(groups, [[0, 1]] * len(groups), max_len, source)
    return groups


def check_pairs(groups, ranks, max_len, source):
    """Logs how many pairs consist of identical tokens. Exits if all of them do, or if all responses tie.

    `groups` is [(prompt_ids, [response_ids, …]), …], cut to max_len; `ranks` is [[rank, …], …].
    """
    n_pairs = 0
    n_identical = 0
    for (_, responses), group_ranks in zip(groups, ranks):
        ids = [response.tobytes() for response in responses]
        for i, j in combinations(range(len(ids)), 2):
            if group_ranks[i] != group_ranks[j]:
                n_pairs += 1
                if ids[i] == ids[j]:
                    n_identical += 1
    if n_pairs == 0:
        raise SystemExit(f"--data={source}: all responses tie: there is nothing to learn from them")
    if n_identical == n_pairs:
        raise SystemExit(f"--data={source}: all {n_pairs} pairs are identical, as cut to --max_len={max_len}: "
                         "there is nothing to learn from them")
    if n_identical:
        log.info(f"{n_identical} of {n_pairs} pairs are identical, as cut to max_len={max_len}: "
                 "no loss can order them")
