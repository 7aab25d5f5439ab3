"""Rollouts since the last checkpoint, on disk: a run that was killed in an update need not draw them again."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from policy.generation.api import Response
from policy.ppo.rollouts import Rollouts
from rlhf.core.files import write_bytes
from rlhf.data.prompts import Prompt
from rlhf.engine.ranks import Ranks


class Replay:
    """One file a step and round of sampling: ``<folder>/step-00000012-0.pt``.

    The main rank writes and reads; every rank must call.
    """

    def __init__(self, folder: Path, ranks: Ranks, identity: str) -> None:
        """``identity``: files of another run are passed over."""
        self._folder, self._ranks, self._identity = folder, ranks, identity

    def put(self, step: int, round_: int, rollouts: Rollouts, oldest: int) -> None:
        """Keep those of a round of ``step``, and drop those of steps before ``oldest``."""
        self._ranks.on_main(lambda: self._write(self._path(step, round_), rollouts, oldest))

    def get(self, step: int, round_: int, prompts: Sequence[Prompt]) -> Rollouts | None:
        """What was put for a round of ``step``, whose prompts are these; ``None`` where there is nothing usable."""
        found = self._ranks.on_main(lambda: self._read(self._path(step, round_)))
        if found is None:
            return None
        responses = [
            Response(tokens=np.asarray(t), logprobs=np.asarray(p), entropies=np.asarray(h), ended=bool(e))
            for t, p, h, e in found["responses"]
        ]
        groups = torch.tensor(found["groups"])
        return Rollouts(
            [prompts[place] for place in found["groups"]], responses, found["texts"], groups, found["staleness"]
        )

    def _path(self, step: int, round_: int) -> Path:
        return self._folder / f"step-{step:08d}-{round_}.pt"

    def _write(self, path: Path, rollouts: Rollouts, oldest: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        state = {
            "identity": self._identity,
            "staleness": rollouts.staleness,
            "groups": rollouts.groups.tolist(),
            "texts": list(rollouts.texts),
            "responses": [
                (*map(torch.from_numpy, (each.tokens, each.logprobs, each.entropies)), each.ended)
                for each in rollouts.responses
            ],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(path, buffer.getbuffer())
        for each in self._folder.glob("step-????????-*.pt"):
            if int(each.stem.split("-")[1]) < oldest:
                each.unlink()

    def _read(self, path: Path) -> dict | None:
        try:
            state = torch.load(path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return None
        same = state.get("identity") == self._identity and "staleness" in state  # earlier versions did not tell it
        return state if same else None
