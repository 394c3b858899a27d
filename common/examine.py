"""Looks at encoded examples as a model will: prints one, and warns of what is probably wrong with them."""
from data import decode
from data.turns import HUMAN

N_EXAMINED = 1000  # groups that `warnings` reads; a mistake in the columns of a file shows in any of them
SHOWN = 160        # characters of a text


def first_example(tokenizer, group, labels, loss_tokens=None):
    """A group (prompt_ids, [response_ids, …]) as text: a line for the prompt, and one for each response.

    A | ends each token that carries loss. labels: the name of each response. loss_tokens: for each response
    the indices of the tokens that carry loss; None: all do.
    """
    prompt, responses = group
    width = max(map(len, ["prompt", *labels]))
    lines = [f"  {'prompt'.ljust(width)}  {show(tokenizer.decode(list(prompt)), from_end=True)}"]
    for i, (label, response) in enumerate(zip(labels, responses)):
        text = ""
        for t, token in enumerate(response):
            text += tokenizer.decode([token])
            if loss_tokens is None or t in loss_tokens[i]:
                text += "|"
        lines.append(f"  {label.ljust(width)}  {show(text)}")
    return "\n".join(lines)


def show(text, from_end=False):
    """A text on one line, with its spaces; of a long one only the beginning, or the end."""
    text = text.replace("\n", "⏎")
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    if len(text) <= SHOWN:
        return text
    return "… " + text[-SHOWN:] if from_end else text[:SHOWN] + " …"


def warnings(tokenizer, groups):
    """What is probably wrong with groups (prompt_ids, [response_ids, …]): a list of lines."""
    pairs = []  # (prompt, response), as text
    n_unfinished = 0
    for prompt_ids, responses in groups[:N_EXAMINED]:
        prompt = decode(tokenizer, prompt_ids)
        for ids in responses:
            pairs.append((prompt, decode(tokenizer, ids)))
            if ids[-1] != tokenizer.eot_token:
                n_unfinished += 1

    n = len(pairs)
    n_user_turns = sum(HUMAN in response for _, response in pairs)
    n_response_asks = sum(response.rstrip().endswith("?") for _, response in pairs)
    n_prompt_asks = sum(prompt.rstrip().endswith("?") for prompt, _ in pairs)
    joined = [(prompt, response) for prompt, response in pairs if is_joined(prompt, response)]

    lines = []
    if n_user_turns:
        lines.append(f"{n_user_turns} of {n} responses contain a user's turn ({HUMAN.strip()}), which is "
                     "learned like the rest of the response")
    if len(joined) > n / 2:
        prompt, response = joined[0]
        lines.append(f"{len(joined)} of {n} responses follow their prompt without a space: "
                     f"{show(prompt[-20:] + response[:20])!r}; begin them with one")
    if n_unfinished > n / 2:
        lines.append(f"{n_unfinished} of {n} responses are cut to --max_len and have lost their end, so the "
                     "model will hardly learn to stop")
    if n_response_asks > n / 2 and n_prompt_asks < n / 10:
        lines.append(f"{n_response_asks} of {n} responses end with a question mark, and {n_prompt_asks} of the "
                     "prompts do: are they in the wrong fields?")
    return lines


def is_joined(prompt, response):
    """Whether two words run together where the response follows the prompt."""
    if not prompt or not response:
        return False
    before, after = prompt[-1], response[0]
    has_spaces = before.isascii() and after.isascii()  # some scripts are written without
    return has_spaces and not before.isspace() and after.isalnum()
