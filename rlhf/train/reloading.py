"""Check by a fresh process: does a published folder give the values of training?

    python -m MODULE FOLDER REQUEST.json

Every row of the request has its tokens and what the model in training said of it as "value"; every text has its
messages, and how the run shows and splits them.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""How far a value in float32 may be from the expected one, in its own unit."""


def reload_main(check: Callable[[Path, dict[str, Any]], dict[str, float]]) -> int:
    """The command: print what ``check(folder, request)`` finds as one JSON object; 1 if a difference is too large."""
    folder, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    differences = check(folder, request)
    print(json.dumps(differences))
    return 0 if all(value <= TOLERANCE for value in differences.values()) else 1


def check_texts(tokenizer: Any, cases: Sequence[dict[str, Any]]) -> None:
    """Show and split conversations as a plain user would.

    Raises:
        SystemExit: if the saved tokenizer or its template does it in another way than the run.
    """
    for case in cases:
        messages = case["messages"]
        begun = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        for found, expected in ((begun, case["begun"]), (whole, case["text"])):
            if found != expected:
                raise SystemExit(f"the saved chat template shows {found[-300:]!r}, expected {expected[-300:]!r}")
        if tokenizer(whole, add_special_tokens=False)["input_ids"] != case["tokens"]:
            raise SystemExit(f"the saved tokenizer splits the text differently: {whole[:200]!r}")


def padded(rows: Sequence[list[int]], pad: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and positions of the rows as one block, padded on the "right" or the "left"."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[place, span] = torch.tensor(row)
        mask[place, span] = 1
    return tokens, mask, (mask.cumsum(dim=1) - 1).clamp_min(0)
