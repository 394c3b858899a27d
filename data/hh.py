"""Anthropic's HH-RLHF (Bai et al. 2022, arXiv:2204.05862): comparisons of dialogues, as published.

Looks for DATA_DIR/hh-rlhf/SUBSET/{train,test}.jsonl.gz and downloads the file if it is missing. Each line is
{"chosen": dialogue, "rejected": dialogue}. The prompt is what the two dialogues share, up to and including
the last "\\n\\nAssistant:"; the responses are what follows. One in a hundred training comparisons is kept for
validation. The test split is the published test file.
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
    """--data=hh uses all four subsets, --data=hh/SUBSET only one."""

    def __init__(self, data_dir, subsets=SUBSETS):
        super().__init__(data_dir)  # self.path is the data folder here, not one file
        self.subsets = subsets

    def records(self, split):
        """Returns [(prompt, [chosen, rejected], [0, 1]), …]. Leaves out pairs with an empty response."""
        file = "test" if split == "test" else "train"
        examples = []
        n_empty = 0
        for subset in self.subsets:
            path = os.path.join(self.path, "hh-rlhf", subset, file + ".jsonl.gz")
            fetch(path, URL.format(subset, file), SHA256.get((subset, file)))
            for i, (where, record) in enumerate(read_lines(path)):
                # Every hundredth line of the training file belongs to the validation split.
                if split == "train" and i % 100 == 0:
                    continue
                if split == "validation" and i % 100 != 0:
                    continue
                if "chosen" not in record or "rejected" not in record:
                    raise SystemExit(f"{where}: needs 'chosen' and 'rejected', found {keys(record)}")
                chosen = text(record, "chosen", where)
                rejected = text(record, "rejected", where)
                prompt, chosen, rejected = common_prompt(chosen, rejected)
                check_text(where, prompt, chosen, rejected)
                if chosen and rejected:
                    examples.append((prompt, [chosen, rejected], [0, 1]))
                else:
                    n_empty += 1
        if n_empty:
            log.info(f"hh: left out {n_empty} comparisons of the {split} split with an empty response")
        return examples
