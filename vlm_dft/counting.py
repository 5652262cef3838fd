"""``python -m vlm_dft.counting``: text tokens of every row of a dataset, as one model's tokenizer counts them.

A CountingConfig on stdin, a CountingReport on stdout; exit code 1: stdout is an ErrorRecord. For datasets that were
validated with another tokenizer; where validation counted with the same one, its counts stand in the rows. Torch-free.
"""

from __future__ import annotations

import sys

from vlm_dft.counting_report import CountingConfig, CountingReport
from vlm_dft.data.canonical import CanonicalDataset
from vlm_dft.data.problems import RowError
from vlm_dft.tokenizing import answer_on_stdout, open_template

_NAMED = 20


def count(config: CountingConfig) -> CountingReport:
    """Raises DatasetError, ModelError."""
    dataset = CanonicalDataset.open(config.dataset)
    template = open_template(config.model, config.revision)
    text: list[int | None] = []
    supervised: list[int | None] = []
    refused: list[str] = []
    for row in dataset:
        try:
            rendered = template.render(row)
        except RowError as error:
            text.append(None)
            supervised.append(None)
            if len(refused) < _NAMED:
                refused.append(f"{row.id}: {error.reason}")
        else:
            text.append(rendered.text_tokens)
            supervised.append(rendered.supervised_tokens)
    return CountingReport(text_tokens=tuple(text), supervised_tokens=tuple(supervised), refused=tuple(refused))


if __name__ == "__main__":
    sys.exit(answer_on_stdout(CountingConfig, count))
