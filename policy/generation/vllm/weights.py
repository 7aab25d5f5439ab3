"""The weights of a policy on their way from training to engines: one after the other, never all on one rank."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from policy.generation.vllm.client import Weights
from policy.generation.vllm.engine.margin_engine import add_sum, as_text, tensor_sum
from policy.generation.vllm.pool import EnginePool
from policy.model import PolicyModel, policy_of
from rlhf.core.errors import ModelError
from rlhf.core.files import permit_as_new
from rlhf.engine.frozen import Frozen
from rlhf.models.adapters import adapted_layers

FILE_BYTES = 512 * 2**20
"""Tensors are gathered in main memory until there are so many bytes, and then written."""


class WeightSource:
    """The weights of a policy under the names of a checkpoint, whole and with adapters merged.

    A fresh pass gives them as they are then. Under ZeRO-3 each is gathered from all ranks by itself, so every rank must
    make the pass, in step.
    """

    def __init__(self, engine: Frozen) -> None:
        self._engine = engine
        self._policy = policy_of(engine)

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        hf = self._policy.hf
        adapted = _adapted(self._policy)
        kept = hf.state_dict().keys()
        buffers = [(name, buffer) for name, buffer in hf.named_buffers() if name in kept]
        for name, weight in (*hf.named_parameters(), *buffers):
            layer = adapted.get(name.removesuffix(".base_layer.weight"))
            if ".lora_" in name:
                continue
            if layer is None or not name.endswith(".base_layer.weight"):
                with self._engine.whole([weight]):
                    yield name.replace(".base_layer.", "."), weight.detach()
                continue
            down, up, scale = layer
            with self._engine.whole([weight, down, up]):
                # As merge_adapters() does it: computed in float32, and rounded once.
                merged = weight.float() + (up.float() @ down.float()) * scale
                yield name.replace(".base_layer.", "."), merged.to(weight.dtype)


def _adapted(policy: PolicyModel) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Down and up projection of the policy's own adapter, and its scale, by the name of the layer."""
    if not policy.has_adapters:
        return {}
    (wrapped,) = policy.adapters
    adapter, layers = wrapped.active_adapter, set(map(id, adapted_layers(wrapped)))
    found = {}
    for name, layer in policy.hf.named_modules():
        if id(layer) not in layers:
            continue
        if adapter not in layer.lora_A or getattr(layer, "fan_in_fan_out", False):
            raise ModelError(
                f"rollout.backend = vllm: the adapter of {name} ({type(layer).__name__}) is not one of a linear layer, "
                "and cannot be merged on the way; leave it out of model.lora.targets, or take rollout.backend=hf"
            )
        found[name] = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, float(layer.scaling[adapter])
    return found


Carry = Callable[[str, Tensor], contextlib.AbstractContextManager[None]]
"""What brings one tensor on its way; it may still be read inside."""


class WeightPush:
    """Brings the weights of a policy to the engines of a pool, and counts their versions.

    Args:
        engine: the policy. Every rank makes one of these and calls :meth:`push`.
        pool: on the main rank; ``None`` on the others.
        folder: on a disk that all engines see; ``None``: weights are sent as a stream, without a folder.
    """

    def __init__(self, engine: Frozen, pool: EnginePool | None, folder: Path | None) -> None:
        self._engine, self._ranks = engine, engine.ranks
        self._source, self._pool, self._folder = WeightSource(engine), pool, folder
        self._now: Weights | None = None
        self.version = 0
        """Version of the weights that the engines have; 0 before the first push."""
        self.pushes = 0
        """How often other weights went to the engines than those that they had."""

    def push(self) -> bool:
        """Have the engines sample from the weights as they are now; whether they were other ones until now.

        Raises:
            ModelError: if an engine has other weights afterwards.
        """
        number = self._ranks.on_main(self._next)
        if self._folder is None:
            new, self.version = self._stream(number), number
        else:
            before, self.version = self.version, self._by_folder(self._folder / f"version-{number:08d}", number)
            new = before != self.version
        self.pushes += new
        return new

    def renew(self) -> None:
        """Bring the weights that were pushed last to engines that have lost them. Every rank must call it.

        Raises:
            ModelError: if the weights are others by now.
        """
        if self._stream(self.version):
            raise ModelError("the weights of the policy changed while engines wrote by them")

    def clear(self) -> None:
        """Take the last folder away."""
        if self._now is not None and self._now.folder is not None:
            shutil.rmtree(self._now.folder, ignore_errors=True)

    def _next(self) -> int:
        """Number of a version above all that the engines have, some of which may have served another run."""
        assert self._pool is not None
        return 1 + (self._pool.newest_version() if self._now is None else self._now.version)

    def _gather(self, carry: Carry | None) -> dict[str, str]:
        """One pass over all weights, carried off on the main rank; their checksums."""
        fault: Exception | None = None
        totals: dict[str, int] = {}
        for name, weight in self._source:
            if carry is None or fault is not None:
                continue  # the others need this rank's share all the same
            try:
                with carry(name, weight):
                    add_sum(totals, name, tensor_sum(weight))
            except Exception as error:
                fault = error

        def tell() -> None:
            if fault is not None:
                raise fault

        self._ranks.together(tell)
        return as_text(totals)

    def _by_folder(self, folder: Path, number: int) -> int:
        """Write the weights, and have the engines load them if they are new; the version that they have then."""
        writer = self._ranks.together(lambda: _Writer(folder) if self._ranks.is_main else None)
        sums = self._gather(None if writer is None else writer.adding)
        return self._ranks.on_main(lambda: self._hand_over(writer, number, sums))

    def _hand_over(self, writer: "_Writer | None", number: int, sums: dict[str, str]) -> int:
        assert writer is not None and self._pool is not None
        if self._now is not None and self._now.sums == sums:
            writer.drop()
            return self._now.version
        writer.finish(policy_of(self._engine))
        before, self._now = self._now, Weights(writer.folder, number, sums)
        self._pool.set_weights(self._now)
        if before is not None and before.folder is not None:
            shutil.rmtree(before.folder, ignore_errors=True)
        return number

    def _stream(self, number: int) -> bool:
        """Send the weights as those of version ``number`` until all engines have them; whether they are other ones than
        those that were sent before."""
        pool, before = self._pool, self._now
        sums: dict[str, str] = {}

        def listen() -> None:
            assert pool is not None
            pool.listen(number)

        def take() -> bool:
            assert pool is not None
            self._now = Weights(None, number, sums)
            return pool.take(self._now)

        complete = False
        while not complete:  # an engine that is lost on the way wants another pass; the pool counts
            self._ranks.on_main(listen)
            sums = self._gather(None if pool is None else pool.sending)
            complete = self._ranks.on_main(take)
        return self._ranks.on_main(lambda: before is None or before.sums != sums)


class _Writer:
    """A model folder in the making."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._held: dict[str, Tensor] = {}
        self._bytes = 0
        self._places: dict[str, str] = {}
        self._files = 0

    @contextlib.contextmanager
    def adding(self, name: str, weight: Tensor) -> Iterator[None]:
        self.add(name, weight)
        yield

    def add(self, name: str, weight: Tensor) -> None:
        self._held[name] = weight.to("cpu", copy=True).contiguous()
        self._bytes += weight.numel() * weight.element_size()
        if self._bytes >= FILE_BYTES:
            self._write()

    def _write(self) -> None:
        self._files += 1
        file = f"model-{self._files:05d}.safetensors"
        save_file(self._held, self.folder / file, metadata={"format": "pt"})
        self._places |= dict.fromkeys(self._held, file)
        self._held, self._bytes = {}, 0

    def finish(self, policy: PolicyModel) -> None:
        if self._held:
            self._write()
        index: dict[str, Any] = {"metadata": {}, "weight_map": self._places}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        write_config(policy, self.folder)
        permit_as_new(self.folder)

    def drop(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def write_config(policy: PolicyModel, folder: Path) -> None:
    """Write what vLLM reads of a model's shape into ``folder``."""
    settings = policy.hf.config.to_dict() | {"architectures": [type(policy.hf).__name__]}
    (folder / "config.json").write_text(json.dumps(settings, indent=2, default=str), encoding="utf-8")
