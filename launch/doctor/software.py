"""Versions, build tools, and the ops that DeepSpeed compiles."""

import importlib.metadata
import importlib.resources
import platform
from collections.abc import Iterator
from typing import Any

from launch.doctor.finding import Finding, Status
from launch.doctor.subject import Subject
from rlhf.core.errors import ConfigError

DISTRIBUTION = "margin-rlhf"
SOME_WIDTH = 1024
"""Width of a model that is not known: what follows from it is no fault of a configuration."""
NAMED = ("torch", "transformers", "deepspeed", "peft", "pot")
"""Packages whose versions are worth naming when all is well."""


def tested_versions() -> dict[str, str]:
    """Versions that the tests ran with, by package. The file is constraints.txt of the sources."""
    lines = _constraints().read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip().lower(): version.strip() for name, version in pairs}


def versions(subject: Subject) -> Iterator[Finding]:
    """Installed packages against the oldest that work and against the tested set."""
    tested, differing, known = tested_versions(), [], {}
    for requirement in _requirements():
        name = requirement.name.lower()
        found = _installed(name)
        if found is None:
            yield Finding("failure", f"{name} is not installed", f"pip install '{requirement}'")
            continue
        known[name] = found
        if not requirement.specifier.contains(found, prereleases=True):
            remedy = f"pip install -c {_constraints()} {name}"
            yield Finding("failure", f"{name} {found}: expected {requirement.specifier}", remedy)
        elif name in tested and found.partition("+")[0] != tested[name]:
            differing.append((name, found))
    if differing:
        listed = ", ".join(f"{name} {found} ({tested[name]})" for name, found in differing)
        remedy = f"if anything behaves oddly: pip install -c {_constraints()} {' '.join(name for name, _ in differing)}"
        yield Finding("warning", f"other than the tested versions (in brackets): {listed}", remedy)
        return
    named = ", ".join(f"{name} {known[name]}" for name in NAMED if name in known)
    text = f"Python {platform.python_version()}, {named}: all {len(known)} packages as tested"
    yield Finding("ok", text, values=known)


def tools(subject: Subject) -> Iterator[Finding]:
    """What compiles ops at their first use."""
    from rlhf.engine.deepspeed_ops import build_tools

    missing = build_tools()
    if not missing:
        yield Finding("ok", "C++ compiler, ninja and Python headers are there")
    for each in missing:
        tool, _, remedy = each.partition(" (")
        text = f"{tool} is missing: DeepSpeed cannot compile its ops"
        yield Finding("warning", text, remedy.removesuffix(")"))


def ops(subject: Subject) -> Iterator[Finding]:
    """The DeepSpeed configurations of all stages, and the ops that offload needs."""
    from rlhf.engine.deepspeed_ops import ASYNC_IO, KILLED_AFTER, PIN_MEMORY, PURPOSES, find_op

    needed, refused = _configurations(subject)
    for fault, refusing in refused.items():
        way_out = "rlhf ds show --config RECIPE (--critic, --frozen) resolves them; rlhf ds lint looks at a file"
        yield Finding("failure", f"{', '.join(refusing)}: {fault}", way_out)
    for lock in [lock for name in (*PURPOSES, PIN_MEMORY) for lock in find_op(name).locks]:
        text = f"{lock} is there: a build runs, or was killed, and runs wait up to {KILLED_AFTER:.0f} s to be sure"
        yield Finding("warning", text, f"if no build runs: rm {lock}")
    for name, purpose in PURPOSES.items():
        if refused and name not in needed:
            continue  # what is refused does not say what it needs
        op, settings = find_op(name), ", ".join(needed.get(name, ()))
        if op.usable:
            state = "is compiled" if op.built else "can be compiled at its first use"
            yield Finding("ok", f"{name} ({purpose}) {state}")
            continue
        text = f"{name} ({purpose}) cannot be compiled: missing {' and '.join(op.missing)}"
        if subject.stages and not settings:
            yield Finding("ok", f"{text}; not needed by this recipe")
            continue
        status: Status = "failure" if name == ASYNC_IO and settings else "warning"
        without = "take zero3_offload" if name == ASYNC_IO else "go on with torch's AdamW, which is slower"
        text += f"; {settings} needs it" if settings else ""
        yield Finding(status, text, f"install what is missing, or {without}")


def vllm(subject: Subject) -> Iterator[Finding]:
    """The vLLM of those stages whose responses it writes; without such a stage, that of this Python if it has one."""
    from policy.generation.options import SamplingConfig
    from policy.generation.vllm.process import check_vllm, vllm_version

    asked: dict[str | None, str] = {}
    for stage in subject.stages:
        for section in ("rollout", "sampling"):
            sampling = getattr(stage.config, section, None)
            if isinstance(sampling, SamplingConfig) and sampling.backend == "vllm":
                try:
                    check_vllm(sampling.vllm, stage.setting(section))
                except ConfigError as error:
                    text, _, remedy = str(error).partition("; ")
                    yield Finding("failure", text, remedy or "see docs/vllm.md")
                    continue
                if not sampling.vllm.urls:
                    asked[sampling.vllm.python] = stage.setting(section)
    for python, setting in asked.items():
        yield Finding("ok", f"vLLM {vllm_version(python)} for {setting}.backend = vllm")
    here = None if subject.stages else vllm_version(None)
    if here is not None:
        yield Finding("ok", f"vLLM {here} for rollout.backend = vllm")


def _configurations(subject: Subject) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The settings that need an op, by op; and the settings that are refused, by fault."""
    from rlhf.engine.deepspeed_ops import needed_ops
    from rlhf.train.roles import deepspeed_settings

    needed: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for stage in subject.trained:
        ranks, local = subject.world(stage)
        sizes = {"world_size": ranks, "local_size": local, "hidden_size": SOME_WIDTH}
        for role in stage.models:
            setting = stage.setting(role.placed_by)
            try:
                names = needed_ops(deepspeed_settings(role, stage.models, stage.config.engine, **sizes))
            except ConfigError as error:
                _note(refused, _in_one_line(error), setting)
                continue
            for name in names:
                _note(needed, name, setting)
    return needed, refused


def _note(found: dict[str, list[str]], key: str, setting: str) -> None:
    settings = found.setdefault(key, [])
    if setting not in settings:
        settings.append(setting)


def _in_one_line(error: Exception) -> str:
    head, *problems = (line.strip() for line in str(error).splitlines())
    return ": ".join(filter(None, [head, "; ".join(problems)]))


def _requirements() -> list[Any]:
    from packaging.requirements import Requirement

    try:
        listed = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path: nothing says which versions are too old
        return [Requirement(name) for name in NAMED]
    needed = map(Requirement, listed)
    return [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _constraints() -> Any:
    return importlib.resources.files("launch.doctor") / "constraints.txt"
