"""Anthropic's HH-RLHF (Bai et al. 2022, arXiv:2204.05862): comparisons of dialogues, helpful and harmless, as published.

A file is looked for at DATA_DIR/hh-rlhf/SUBSET/{train,test}.jsonl.gz before it is fetched. One line is
{"chosen": dialogue, "rejected": dialogue}; the prompt is all that the two share up to an "\\n\\nAssistant:", the responses what
follows. One training comparison in a hundred is kept for validation; "test" is the published test file.
"""
import logging
import os

from data.files import check_text, read_lines
from data.jsonl import Jsonl, common_prompt, keys, text
from engine.files import fetch

log = logging.getLogger(__name__)
SUBSETS = ["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{}/{}.jsonl.gz"
SHA256 = {("harmless-base", "test"): "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03"}


class HH(Jsonl):
    """--data=hh takes the four subsets together, --data=hh/SUBSET one of them."""

    def __init__(self, data_dir, subsets=SUBSETS):
        super().__init__(data_dir)
        self.subsets = subsets

    def records(self, split):
        """[(prompt, [chosen, rejected]), …]; what has an empty response is left out, and counted."""
        examples, empty = [], 0
        for subset in self.subsets:
            file = "test" if split == "test" else "train"
            path = os.path.join(self.path, "hh-rlhf", subset, file + ".jsonl.gz")
            for i, (where, record) in enumerate(read_lines(fetch(path, URL.format(subset, file), SHA256.get((subset, file))))):
                if split != "test" and (i % 100 == 0) != (split == "validation"):
                    continue
                if not {"chosen", "rejected"} <= record.keys():
                    raise SystemExit(f"{where}: needs 'chosen' and 'rejected', found {keys(record)}")
                prompt, chosen, rejected = common_prompt(text(record, "chosen", where), text(record, "rejected", where))
                check_text(where, prompt, chosen, rejected)
                if chosen and rejected:
                    examples.append((prompt, [chosen, rejected]))
                else:
                    empty += 1
        if empty:
            log.info(f"hh: left out {empty} comparisons of the {split} split with an empty response")
        return examples
