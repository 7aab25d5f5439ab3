"""One rank, states large enough to go to disk: python swap_to_disk.py FOLDER; writes losses and bytes on disk."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from rlhf.engine.build import build_engine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import start_ranks, stop_ranks

WIDTH, STEPS = 1024, 4


def losses(kind: str, ranks, folder: Path) -> list[float]:
    torch.manual_seed(0)
    engine = build_engine(
        nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, 1, bias=False)),
        ranks=ranks,
        config=EngineConfig(deepspeed=kind, precision="float32", nvme_path=str(folder / "nvme")),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_share=0.0),
        total_steps=STEPS,
        hidden_size=16,
    )
    found = []
    for rows in torch.randn(STEPS, 8, WIDTH, generator=torch.Generator().manual_seed(1)):
        loss = (engine.forward(rows) ** 2).mean()
        engine.backward(loss, last=True)
        engine.step()
        found.append(loss.item())
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = start_ranks()
    report = {kind: losses(kind, ranks, folder) for kind in ("zero2", "zero3_nvme")}
    files = {str(file.relative_to(folder / "nvme")): file.stat().st_size for file in folder.rglob("*.swp")}
    (folder / "report.json").write_text(json.dumps(report | {"files": files, "parameters": WIDTH * (WIDTH + 1)}))
    stop_ranks()


if __name__ == "__main__":
    main()
