"""What is shown of the runs of stages that train: a function of its runs and the number of the first in the page.

launch.stages.STAGES says which stage has which; one without is shown by :func:`other`.
"""

from collections.abc import Iterator, Sequence

from launch.report import frontier, pairs
from launch.report.contents import Advice, Section, Table, cell, curves, named, run_cell, share
from launch.report.figures import Figure
from launch.report.reading import Run
from launch.report.samples import rollout_readings

REWARD_NOTE = (
    "Reward: as its scorer gives it. Score: the same on the scale that training sees. Second scorer: one that only "
    "watches (watch.second)."
)
RESTING = 0.5
FALLEN = -0.5
"""Nats per token that chosen responses may have lost."""


def sft(runs: Sequence[Run], first: int) -> Section:
    lead = []
    for run in runs:
        loss, perplexity = run.evaluation.get("loss"), run.evaluation.get("perplexity")
        if loss is not None and perplexity is not None:
            count = run.evaluation.get("conversations")
            lead.append(named(run, runs, f"perplexity {perplexity:.3f} on {count} held-out conversations."))
    rows = tuple(
        (
            run_cell(run, first + place),
            cell(run.evaluation.get("perplexity")),
            cell(run.evaluation.get("loss")),
            cell(run.evaluation.get("conversations")),
        )
        for place, run in enumerate(runs)
        if run.evaluation
    )
    headings = ("run", "perplexity", "loss, nats per token", "conversations")
    return Section(
        key="sft",
        title="Supervised fine-tuning",
        lead=tuple(lead),
        figures=(
            curves("loss", "Loss", runs, {"training": "loss"}, "nats per token", held_out="eval/loss"),
            *_optimizer(runs),
        ),
        tables=(Table(title="Held-out conversations", headings=headings, rows=rows),) if rows else (),
    )


def reward(runs: Sequence[Run], first: int) -> Section:
    return Section(
        key="reward",
        title="Reward model",
        lead=pairs.lead(runs, "ranks"),
        figures=(
            curves(
                "loss",
                "Loss",
                runs,
                {"training": "loss"},
                "nats",
                held_out="eval/loss",
                note="Of training with the margin, on held-out pairs without it.",
            ),
            _accuracy(runs),
            _sides("reward/{}", "Rewards", "logits", runs),
            *pairs.margin_figures(runs),
            *pairs.figures(runs),
            *_optimizer(runs),
        ),
        tables=(*pairs.tables(runs, first),),
        readings=(*pairs.readings(runs),),
        advice=(*pairs.advice(runs),),
    )


def preference(runs: Sequence[Run], first: int) -> Section:
    resting = curves(
        "resting",
        "Resting pairs",
        runs,
        {"training": "zero_gradient_share"},
        "share of pairs",
        percent=True,
        note="Pairs whose loss has no gradient any more: they teach nothing.",
    )
    drift = _sides(
        "logprobs/{}_drift_per_token",
        "Drift of log-probabilities",
        "nats per token",
        runs,
        levels=(0.0,),
        note="Against the model that training started from. Both falling while their gap grows is usual for DPO; "
        "chosen far below 0 means that good answers become unlikely, too.",
    )
    return Section(
        key="preference",
        title="Preference policy",
        lead=(*pairs.lead(runs, "by its implicit reward it ranks"), *_drift_sentences(runs)),
        figures=(
            curves("loss", "Loss", runs, {"training": "loss"}, "as the objective defines it"),
            _accuracy(runs),
            drift,
            resting,
            curves("kl", "Distance from the reference", runs, {"KL of the data": "kl"}, "nats per response"),
            _sides("reward/{}", "Implicit rewards", "beta times log-ratio", runs),
            *pairs.margin_figures(runs),
            *pairs.figures(runs),
            *_optimizer(runs),
        ),
        tables=(*pairs.tables(runs, first),),
        readings=(*pairs.readings(runs),),
        advice=(*pairs.advice(runs), *_preference_advice(runs)),
    )


def _drift_sentences(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        chosen, rejected = (run.last(f"eval/{side}_drift_per_token") for side in ("chosen", "rejected"))
        if chosen is not None and rejected is not None:
            text = f"held-out log-probabilities moved by {chosen:+.3f} (chosen) and {rejected:+.3f} (rejected) nats per"
            yield named(run, runs, f"{text} token.")


def _preference_advice(runs: Sequence[Run]) -> Iterator[Advice]:
    for run in runs:
        resting, drift = run.last("zero_gradient_share"), run.last("eval/chosen_drift_per_token")
        if resting is not None and resting > RESTING:
            yield Advice(
                run=run.name,
                text=f"{resting:.0%} of the pairs of the last step rest, for their loss is flat: the run could have "
                "ended earlier; a larger margin or beta would keep them at work.",
            )
        if drift is not None and drift < FALLEN:
            yield Advice(
                run=run.name,
                text=f"Chosen responses have lost {-drift:.2f} nats per token: the policy moves away from good "
                "answers, too. Set loss.nll_weight, lower optim.learning_rate, or take an objective such as apo_zero.",
            )


def ppo(runs: Sequence[Run], first: int) -> Section:
    lead = []
    for run in runs:
        found = run.evaluation
        if found.get("reward"):
            reward = found["reward"]
            interval = f"95 % interval {reward['low']:.3f} to {reward['high']:.3f}"
            text = f"reward {reward['value']:.3f} ({interval}) for {found['prompts']} held-out prompts, at a KL of"
            lead.append(named(run, runs, f"{text} {found['kl']:.2f} nats per response."))
        lead += [named(run, runs, text) for text in frontier.sentences(run)]
    names = {"reward": "reward", "score (trained on)": "score", "second scorer": "second"}
    known = {label: name for label, name in names.items() if any(name in run.columns for run in runs)}
    return Section(
        key="ppo",
        title="PPO",
        lead=tuple(lead),
        figures=(
            curves(
                "reward",
                "Reward",
                runs,
                known,
                "logits, or the scorer's unit",
                held_out="eval/reward",
                note=REWARD_NOTE,
            ),
            curves("kl", "KL from the reference", runs, {"training": "kl"}, "nats per response", held_out="eval/kl"),
            *frontier.figures(runs),
            curves("entropy", "Entropy", runs, {"entropy": "entropy"}, "nats per token"),
            curves("length", "Length", runs, {"mean": "tokens_per_response"}, "tokens", held_out="eval/tokens"),
            curves(
                "ended",
                "Ended by themselves",
                runs,
                {"training": "ended_share"},
                "share of responses",
                percent=True,
                held_out="eval/ended_share",
            ),
            curves("explained", "Critic: explained variance", runs, {"critic": "explained_variance"}, "1 is perfect"),
            curves("clip", "Clipped updates", runs, {"tokens": "policy/clip_share"}, "share of tokens", percent=True),
            _phases(runs),
        ),
        tables=_ppo_tables(runs, first),
        readings=(*rollout_readings(runs),),
        advice=(*(each for run in runs for each in frontier.advice(run)),),
    )


def _ppo_tables(runs: Sequence[Run], first: int) -> tuple[Table, ...]:
    rows = []
    for place, run in enumerate(runs):
        found = run.evaluation
        if not found.get("reward"):
            continue
        second = found.get("second") or {}
        rows.append(
            (
                run_cell(run, first + place),
                cell(found["reward"]["value"], f"{found['reward']['value']:.3f}"),
                cell(found["reward"]["low"], f"{found['reward']['low']:.3f} to {found['reward']['high']:.3f}"),
                cell(found["score"]["value"]),
                cell(second.get("value")),
                cell(found["kl"]),
                cell(found["tokens"]),
                cell(found["ended_share"], share(found["ended_share"], 0)),
            )
        )
    headings = ("run", "reward", "95 % interval", "score", "second scorer", "KL, nats", "tokens", "ended")
    note = f"{REWARD_NOTE} Ended: responses that the policy ends by itself, before the limit."
    return (Table(title="Held-out prompts", headings=headings, rows=tuple(rows), note=note),) if rows else ()


def _accuracy(runs: Sequence[Run]) -> Figure:
    return curves(
        "accuracy",
        "Accuracy",
        runs,
        {"training": "accuracy"},
        "share of pairs ranked right",
        held_out="eval/accuracy",
        percent=True,
        levels=(0.5,),
        note="A guess is right in 50 % (dotted line).",
    )


def _sides(metric: str, title: str, y: str, runs: Sequence[Run], **more: object) -> Figure:
    names = {side: metric.format(side) for side in ("chosen", "rejected")}
    return curves(title.lower().replace(" ", "-"), title, runs, names, y, **more)  # type: ignore[arg-type]


def _optimizer(runs: Sequence[Run]) -> Iterator[Figure]:
    yield curves("gradient", "Gradient norm", runs, {"norm": "grad_norm"}, "before clipping")
    yield curves("learning-rate", "Learning rate", runs, {"rate": "learning_rate"}, "", noisy=False)


def _phases(runs: Sequence[Run]) -> Figure:
    phases = ("generate", "score", "measure", "update")
    names = {phase: f"time/{phase}_seconds" for phase in phases} if len(runs) == 1 else {"step": "time/step_seconds"}
    return curves("phases", "Time of a step", runs, names, "seconds")


def other(runs: Sequence[Run], first: int) -> Section:
    """Any other stage: all that it logged."""
    names = dict.fromkeys(name for run in runs for name in run.columns if not name.startswith(("time/", "memory/")))
    figures = tuple(curves(name.replace("/", "-"), name, runs, {name: name}, "") for name in names)
    return Section(key=runs[0].stage, title=runs[0].stage.capitalize(), figures=figures)
