"""The fresh process: does a published folder, opened with plain Transformers, give the values of training?

    python -m rlhf.train.reloading

It reads questions as lines of JSON, each with the "module" whose ``check(folder, request)`` answers it, and prints the
"differences" that this finds or the "fault" that it meets. Every row of a request has its tokens and what the model in
training said of it as "value"; every text has its messages, and how the run shows and splits them.
"""

import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.core.importing import import_all_of

THREADS = torch.get_num_threads()
TOLERANCE = 1e-4
"""How far a value in float32 may be from the expected one, in its own unit."""


def main() -> int:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print
    import_all_of("transformers.generation")  # takes seconds: not while somebody waits for the answer
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)
    return 0


def answer(module: str, folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """The differences that ``module`` finds, or in words what is wrong.

    A request says how many "threads" may be taken while others compute; else there are as many as at the start.
    """
    torch.set_num_threads(request.get("threads", THREADS))
    try:
        differences = importlib.import_module(module).check(Path(folder), request)
    except SystemExit as fault:
        return {"fault": str(fault)}
    except Exception as error:  # whatever a model's own code raises
        return {"fault": f"{type(error).__name__}: {str(error)[-2000:]}"}
    finally:
        if request.get("on_all_ranks"):
            from rlhf.engine.ranks import stop_ranks

            stop_ranks()
    # Not "> TOLERANCE": no difference to a value that is not a number is small.
    large = [f"{name} {value:.3g}" for name, value in differences.items() if not value <= TOLERANCE]
    if large:
        return {"fault": f"the saved model does not reproduce the live values ({', '.join(large)} off)"}
    return {"differences": differences}


def placed(model: Any, request: Mapping[str, Any]) -> tuple[Any, torch.device]:
    """The opened model in float32, and where its inputs go; "on_all_ranks" it is shared out among their processes."""
    if not request.get("on_all_ranks"):
        return model.float().eval(), torch.device("cpu")
    from rlhf.engine.frozen import share_in_float32
    from rlhf.engine.ranks import start_ranks

    ranks = start_ranks()
    width = getattr(model, "hf", model).config.hidden_size
    return share_in_float32(model, ranks=ranks, hidden_size=width).module, ranks.device


def opening_type(folder: Path, request: Mapping[str, Any]) -> torch.dtype:
    """What to open a model with: what is going to be shared out stays as it is in its files."""
    if not request.get("on_all_ranks"):
        return torch.float32
    from rlhf.models.weight_files import stored_type

    return stored_type(str(folder)) or torch.float32


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


if __name__ == "__main__":
    sys.exit(main())
