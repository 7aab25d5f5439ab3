"""``rlhf slurm``: a readable sbatch script from a recipe and a cluster profile, printed or submitted."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from launch.commands.arguments import Subparsers, add_parallel, add_recipes, add_settings, command, group
from launch.stages import STAGES, training
from rlhf.core.errors import ConfigError
from rlhf.core.paths import home_path

if TYPE_CHECKING:
    from launch.runs import Pipeline
    from launch.slurm.profile import ClusterProfile
    from launch.slurm.script import Job

PIPELINE = "pipeline"
_RENDER = """\
Print the sbatch script of a stage, or of a pipeline, for the cluster that the profile describes; with --write, put it
where "submit" would, and print the command that submits it. Needs no SLURM.
"""
_SUBMIT = """\
Write the sbatch script into the run folder (slurm/job.sh there, logs beside it) and submit it. A job that reaches its
time limit, or is sent SIGUSR1, saves, goes back into the queue and goes on from there; so does one that lost a node.
"""
_STATUS = """\
Where the jobs of a run stand. Their state, nodes and time as SLURM has them, the stage and step that they say
themselves, and why one waits.
"""
_LOGS = """\
Print the log of a run's job. Of a job that went back into the queue, what its last start has said; of several jobs, the
one that spoke last.
"""
_CANCEL = """\
End the jobs of a run. One that runs saves at its next step and ends, those that wait are taken out of the queue; the
submit command goes on from there.
"""


def add_parser(subparsers: Subparsers) -> None:
    actions = group(subparsers, "slurm", help="run a stage or a pipeline on a SLURM cluster")
    for name, description, action in (("render", _RENDER, render_jobs), ("submit", _SUBMIT, submit_jobs)):
        about = description.partition("\n")[0].rstrip(".").lower()
        parser = command(actions, name, action, help=about, description=description)
        parser.add_argument("stage", choices=[*training(), PIPELINE], help="what to run")
        add_recipes(parser, "its recipe; may be given again for a stage, later ones win")
        profile = "the cluster (launch/clusters/example.yaml shows one); may be given again, later ones win"
        parser.add_argument(
            "--profile", metavar="CLUSTER", type=home_path, action="append", required=True, help=profile
        )
        sweep = "the settings with several values (key=a,b) are the runs of a sweep, which is kept in this folder"
        parser.add_argument("--sweep", metavar="FOLDER", type=home_path, help=sweep)
        jobs = "of a pipeline or sweep: one job for all (default), or one a stage, each after those that it needs"
        parser.add_argument("--jobs", choices=["one", "dependent"], default="one", help=jobs)
        add_parallel(parser)
        add_settings(parser, "settings as the stage or pipeline takes them; profile.key=value changes the profile")
        if action is render_jobs:
            writing = "write into the run folder, where submit would, instead of printing"
            parser.add_argument("--write", action="store_true", help=writing)

    which = "run folder, or the number of a job; without it, what was submitted below runs/"
    now = "leave no time to save"
    for name, description, action in (("status", _STATUS, show), ("logs", _LOGS, logs), ("cancel", _CANCEL, cancel)):
        about = description.partition(".")[0].replace("\n", " ").lower()
        parser = command(actions, name, action, help=about, description=description)
        parser.add_argument("run_folder", metavar="RUN", nargs="?", help=which)
        if action is logs:
            parser.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
            parser.add_argument("--stage", metavar="NAME", help="what this stage of a pipeline says, not the job")
        if action is cancel:
            parser.add_argument("--now", action="store_true", help=now)


def show(options: argparse.Namespace) -> int:
    """Print where the jobs of a run, or of all, stand."""
    from launch.screen import console, titled_table
    from launch.slurm.watch import cells, submitted

    table = titled_table("", "run", "job", "id", "state", "nodes", "elapsed", "where it stands")
    for job in submitted(options.run_folder):
        table.add_row(*cells(job))
    console().print(table)
    return 0


def logs(options: argparse.Namespace) -> int:
    """Print what the last start of the job that spoke last has said, or a stage of a pipeline."""
    from launch.slurm.watch import follow, last_attempt, latest, of_one_run, stage_log

    job = latest(of_one_run(options.run_folder))
    path = job.log if options.stage is None else stage_log(job.run, options.stage)
    text = path.read_bytes()
    print(f"==> {path} <==")
    print(last_attempt(text.decode(errors="replace"), job.number), end="", flush=True)
    if options.follow:
        try:
            for more in follow(path, len(text), job.number):
                print(more, end="", flush=True)
        except KeyboardInterrupt:
            return 130
    return 0


def cancel(options: argparse.Namespace) -> int:
    """End the jobs of a run."""
    from launch.slurm.watch import cancel, of_one_run

    try:
        for line in cancel(of_one_run(options.run_folder), now=options.now):
            print(line, flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


def render_jobs(options: argparse.Namespace) -> int:
    from launch.slurm.script import render, write_script

    jobs = _read(options)
    if options.write:
        for job, profile in jobs:
            write_script(job, profile)
            print(f"written: {job.script}")
        print("submit with:", *_by_hand([job for job, _ in jobs], options.parallel), sep="\n  ")
        return 0
    for number, (job, profile) in enumerate(jobs, start=1):
        if len(jobs) > 1:
            place = job.script.absolute()
            print(f"# {'=' * 20} {place} ({number} of {len(jobs)}; --write writes all of them)")
        print(render(job, profile), end="" if number == len(jobs) else "\n\n")
    return 0


def _by_hand(jobs: Sequence["Job"], parallel: int | None) -> Iterator[str]:
    """Lines of shell that do what :func:`submit_jobs` does."""
    from launch.slurm.submit import waiting

    if len(jobs) == 1:
        yield shlex.join(["sbatch", str(jobs[0].script)])
        return
    numbers: dict[str, str] = {}
    for count, job in enumerate(jobs, start=1):
        waits = waiting([numbers[need] for need in job.needs], _behind([*numbers.values()], parallel))
        yield f"job{count}=$({' '.join(['sbatch --parsable', *waits, shlex.quote(str(job.script))])})"
        numbers[job.label] = f"$job{count}"


def submit_jobs(options: argparse.Namespace) -> int:
    from launch.slurm.submit import check_cluster, check_no_other, submit

    jobs = _read(options)
    first = jobs[0][0]
    for place, (_, profile) in enumerate(jobs):
        if profile not in [other for _, other in jobs[:place]]:
            check_cluster(profile)
    check_no_other(first)  # all have one folder
    numbers: dict[str, str] = {}
    for job, profile in jobs:
        after, behind = [numbers[need] for need in job.needs], _behind([*numbers.values()], options.parallel)
        numbers[job.label] = submit(job, profile, after=after, behind=behind)
        first_of_all = ", ".join(dict.fromkeys([*after, *behind]))
        waits = f", after {first_of_all}" if first_of_all else ""
        print(f"submitted job {numbers[job.label]}{waits}: {job.title}")
    print(_what_now(first, list(numbers.values())))
    return 0


def _behind(numbers: Sequence[str], parallel: int | None) -> list[str]:
    """The job that must have ended, in whatever way, before the next one begins: so that no more run at a time."""
    return [numbers[-parallel]] if parallel is not None and len(numbers) >= parallel else []


def _what_now(job: "Job", numbers: list[str]) -> str:
    """How to watch, stop and continue."""
    again = shlex.join(["rlhf", *sys.argv[1:]]) if sys.argv[1:2] == ["slurm"] else "the same command"
    run = shlex.quote(str(job.output))
    return (
        f"  script    {job.script}\n"
        f"  watch     rlhf slurm status {run}; rlhf slurm logs -f {run}\n"
        f"  pause     scancel --signal=USR1 --full {numbers[0]}  (saves, goes back into the queue, and on from there)\n"
        f"  stop      rlhf slurm cancel {run}  (saves, and ends the job)\n"
        f"  continue  {again}"
    )


def _read(options: argparse.Namespace) -> list[tuple["Job", "ClusterProfile"]]:
    """The jobs, each with what it asks for.

    Raises:
        ConfigError: if profile or recipes do not describe a valid run.
    """
    from launch.slurm.profile import PREFIX, load_profile

    mine = [text for text in options.overrides if text.startswith(PREFIX)]
    options.written_by = _written_by(options)
    options.overrides = [text for text in options.overrides if text not in mine]
    profile = load_profile(options.profile, [text.removeprefix(PREFIX) for text in mine])
    if options.stage == PIPELINE and options.sweep:
        raise ConfigError(f"--sweep {options.sweep}: a sweep is of one stage; name it instead of pipeline")
    if options.stage == PIPELINE or options.sweep:
        return list(_pipeline_jobs(options, profile))
    if options.parallel is not None:
        raise ConfigError(f"--parallel {options.parallel}: {options.stage} is one stage; leave --parallel out")
    if options.jobs != "one":
        raise ConfigError(f"--jobs {options.jobs}: {options.stage} is one stage, hence one job; leave --jobs out")
    return [(_stage_job(options, profile), profile)]


def _stage_job(options: argparse.Namespace, profile: "ClusterProfile") -> "Job":
    from launch.slurm.script import Job
    from rlhf.config import load_config

    stage = STAGES[options.stage]
    config = load_config(stage.config_class(), options.config, options.overrides, program=stage.name)
    return Job(
        name=f"{config.output.name}-{stage.name}" if config.output.name != stage.name else stage.name,
        title=f"{stage.name} in {config.output}, on {_shape(profile)}",
        output=config.output,
        arguments=(stage.module, *_recipe_words(options)),
        written_by=options.written_by,
    )


def _pipeline_jobs(options: argparse.Namespace, profile: "ClusterProfile") -> Iterator[tuple["Job", "ClusterProfile"]]:
    from launch.slurm.profile import stage_profile
    from launch.slurm.script import Job

    pipeline, command = _sweep(options) if options.sweep else _recipe(options)
    common = {"output": pipeline.output, "pipeline": True, "written_by": options.written_by}
    name = pipeline.name.replace(" ", "-")
    if options.jobs == "one":
        nodes = {f"node {place}": profile.devices for place in range(1, profile.nodes + 1)}
        for stage in pipeline.stages:
            stage.share(nodes)  # it may ask for more than there is
        timed = [each.name for each in pipeline.stages if each.time is not None]
        if timed:
            print(
                f"note: time of {', '.join(timed)} is that of jobs of their own (--jobs dependent); this one job has "
                f"profile.time = {profile.time}, and goes on in the next where that ends",
                file=sys.stderr,
            )
        stages = ", ".join(each.name for each in pipeline.stages)
        title = f"pipeline {pipeline.name} ({stages}) in {pipeline.output}, on {_shape(profile)}"
        if options.parallel is not None:
            command = (*command, "--parallel", str(options.parallel))
        yield Job(name=name, title=title, arguments=command, stages=pipeline.stages, **common), profile
        return
    for stage in pipeline.stages:
        own = stage_profile(profile, stage)
        job = Job(
            name=f"{name}-{stage.name}",
            title=f"stage {stage.name} of pipeline {pipeline.name} in {pipeline.output}, on {_shape(own)}",
            arguments=(*command, "--only", stage.name),
            stages=(stage,),
            label=stage.name,
            needs=stage.needs,
            **common,
        )
        yield job, own


def _recipe(options: argparse.Namespace) -> tuple["Pipeline", tuple[str, ...]]:
    """The pipeline, and the command that runs it."""
    from launch.pipeline.recipe import load_pipeline

    if len(options.config) > 1:
        raise ConfigError("--config: a pipeline has one recipe")
    (recipe,) = options.config
    return load_pipeline(recipe, options.overrides), ("rlhf", "pipeline", "run", str(recipe), *options.overrides)


def _sweep(options: argparse.Namespace) -> tuple["Pipeline", tuple[str, ...]]:
    """The runs of a sweep, and the command that trains them."""
    from launch.pipeline.sweep import plan_sweep

    sweep = plan_sweep(STAGES[options.stage], options.config, options.overrides, options.sweep)
    words = ("rlhf", "sweep", options.stage, "--output", str(options.sweep), *_recipe_words(options))
    return sweep.pipeline, words


def _recipe_words(options: argparse.Namespace) -> list[str]:
    return [*(word for path in options.config for word in ("--config", str(path))), *options.overrides]


def _shape(profile: "ClusterProfile") -> str:
    kind = {"gpu": "GPU", "cpu": "CPU rank"}[profile.device_kind]
    nodes = f"{profile.nodes} node" + ("s" if profile.nodes > 1 else "")
    return f"{nodes} x {profile.devices} {kind}" + ("s" if profile.devices > 1 else "")


def _written_by(options: argparse.Namespace) -> str:
    from launch.slurm.script import quote

    profiles = [word for path in options.profile for word in ("--profile", str(path))]
    sweep = ["--sweep", str(options.sweep)] if options.sweep else []
    words = ["rlhf", "slurm", "render", options.stage, *_recipe_words(options), *profiles, *sweep]
    jobs = ["--jobs", options.jobs] if options.jobs != "one" else []
    parallel = ["--parallel", str(options.parallel)] if options.parallel is not None else []
    return " ".join(map(quote, [*words, *jobs, *parallel]))
