"""What a recipe says about sampling."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from rlhf.core.annotations import NoResult
from rlhf.core.servers import check_address


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """The vLLM engines of backend = vllm, and what is done when one of them dies or hangs."""

    python: str | None = None
    """Python of an environment that has vLLM 0.28 or later; null: the one that runs the trainer."""
    urls: tuple[str, ...] = ()
    """Engines that run elsewhere, in place of those that the run starts itself (docs/vllm.md)."""
    engines: Annotated[int, Gt(0)] = 1
    """Engines to start on this machine; responses are spread over them by length."""
    tensor_parallel: Annotated[int, Gt(0)] = 1
    """Devices that share the weights of an engine."""
    devices: tuple[Annotated[int, Ge(0)], ...] = ()
    """GPUs of the engines, tensor_parallel for each in turn; empty: those that the trainer sees, which they share."""
    sleep: bool = False
    """Have engines give their device memory back between rollouts: for devices that they share with the trainer."""
    cache_gib: Annotated[float, Gt(0)] | None = None
    """Memory of an engine for keys and values; null: what vLLM takes on a GPU, and 1 on a CPU."""
    max_model_tokens: Annotated[int, Gt(0)] | None = None
    """Longest prompt and response together; null: what the model's config says."""
    transport: Literal["folder", "gloo", "nccl"] = "folder"
    """How weights go to the engines: by a folder, over the network (gloo), or between GPUs of which trainer and engines
    have their own (nccl). Without a folder, an engine that is lost gets them by another pass over all weights."""
    folder: str | None = None
    """Folder of transport = folder, on a disk that the engines see; null: in the output folder."""
    start_seconds: Annotated[float, Gt(0)] = 900.0
    """What an engine may take until it is there."""
    timeout_seconds: Annotated[float, Gt(0)] = 300.0
    """An engine that gives no sign of life for so long hangs: it is ended and started again."""
    restarts: Annotated[int, Ge(0)] = 3
    """How often engines are started again before the run gives up."""

    def __post_init__(self) -> None:
        if self.devices and len(self.devices) != self.engines * self.tensor_parallel:
            raise ValueError(
                f"devices = {list(self.devices)}: expected engines x tensor_parallel = "
                f"{self.engines * self.tensor_parallel} numbers"
            )
        if self.folder is not None and self.transport != "folder":
            raise ValueError(
                f"folder = {self.folder}: transport = {self.transport} sends weights without one: leave it out"
            )
        if self.transport == "nccl" and not (self.devices or self.urls):
            raise ValueError(
                "transport = nccl: connects GPUs that differ, and without devices the engines share those of the "
                "trainer; give devices, or take gloo or folder"
            )
        for url in self.urls:
            check_address("urls", url)
        fixed = ("python", "engines", "tensor_parallel", "devices", "cache_gib", "max_model_tokens")
        asked = [name for name in fixed if getattr(self, name) != getattr(VllmConfig, name)]
        if self.urls and asked:
            raise ValueError(
                f"urls names engines that run already, as they were started: leave {' and '.join(asked)} out"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are drawn."""

    max_new_tokens: Annotated[int, Gt(0)] = 128
    """A response that has not ended by then is cut there."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Divides the logits: below 1 the likely tokens are drawn more often."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Draw only from the likeliest tokens that together have this probability; 1 draws from all."""
    top_k: Annotated[int, Ge(0)] = 0
    """Draw only from so many likeliest tokens, before top_p is looked at; 0 draws from all, 1 is greedy."""
    stop: tuple[str, ...] = ()
    """A response ends with the first token after which its text contains one of these."""
    batch_rows: Annotated[int, Gt(0)] = 64
    """Responses decoded together. Lower it when memory runs out: results do not change."""
    cuda_graphs: bool = True
    """Record the forward of a token on a GPU and replay it (backend = hf), where the model's kernels allow that."""
    backend: Literal["hf", "vllm"] = "hf"
    """hf: the model in training writes the responses itself. vllm: engines of vLLM do (docs/vllm.md)."""
    vllm: Annotated[VllmConfig, NoResult()] = field(default_factory=VllmConfig)
