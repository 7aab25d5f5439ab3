"""The recipe of a PPO run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from policy.generation.options import SamplingConfig
from policy.options import PolicyConfig
from policy.ppo.estimators import ESTIMATORS
from policy.ppo.presets import preset_values
from policy.ppo.reward_options import RewardSourceConfig, scorer_roles
from policy.roles import policy_role, reference_role
from rlhf.core.annotations import NoResult
from rlhf.core.epochs import steps_per_epoch
from rlhf.data.options import ExampleDataConfig, PromptDataConfig
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.models.options import BackboneConfig, LoraOptions
from rlhf.models.roles import ModelRole
from rlhf.train.options import TrainConfig
from rlhf.train.workload import RolloutLoad, Workload


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The model of the expected return, for estimators that need one."""

    path: str | None = None
    """Where it starts: a reward model, or any backbone (with a new head). Null: the first reward model if it reads the
    policy's tokens, else the policy."""
    share_trunk: bool = False
    """Make the critic a second adapter and a head on the policy's own frozen base; needs policy.lora."""
    freeze_layers: Annotated[int, Ge(0)] = 0
    """Freeze the embeddings and this many lower layers."""
    lora: LoraOptions | None = None
    """Train adapters instead of the weights; the head is always trained."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    deepspeed: str | None = None
    """DeepSpeed configuration of the critic; null: that of the policy (engine.deepspeed)."""
    optim: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    warmup_steps: Annotated[int, Ge(0)] = 0
    """PPO steps in which only the critic learns."""
    value_clip: Annotated[float, Gt(0)] | None = 0.2
    """How far a value may move from the one at rollout before its loss is cut; null for no bound."""


@dataclass(frozen=True, kw_only=True)
class ReferenceModelConfig:
    """What KL is counted from. With policy.lora and no path, it is the base with its adapters off."""

    path: str | None = None
    """Null: the policy as the run starts from it."""
    placement: str = "replicated"
    """Placement of a model that is only asked; see reward.placement."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(SamplingConfig):
    """The responses of one step."""

    prompts: Annotated[int, Gt(0)] = 64
    """Prompts of a step, over all ranks."""
    samples: Annotated[int, Gt(0)] = 1
    """Responses to each; rloo, grpo and reinforce_pp_baseline compare them and need at least 2."""
    extra_rounds: Annotated[int, Ge(0)] = 0
    """Dynamic sampling: a prompt whose responses all have one score teaches nothing to estimators that compare them.
    Sample up to this many times as many prompts again, and take those with scores that differ in their place."""
    ahead: Literal[0, 1] = 0
    """1: engines write the responses of the next step while this one is learned from (backend = vllm). They are then
    those of weights one step old, which loss.importance corrects; a run that is resumed is not exactly the same."""
    stop_token_ids: tuple[Annotated[int, Ge(0)], ...] = ()
    """Tokens that end a response besides the tokenizer's EOS, the token behind an answer in the chat template and those
    of the model's generation config. The published model stops at all of them."""
    logprobs: Literal["auto", "sampler", "training"] = "auto"
    """Whose log-probabilities the ratios and the KL start from: the sampler's own, or those of a forward of the policy
    over the finished responses. auto: the sampler's in float32, where both agree to rounding and a forward is saved."""
    gather: Literal["auto", "once", "never"] = "auto"
    """Gathering of weights under ZeRO-3: once per rollout (auto: if they fit), or layer by layer in every token."""
    written: Annotated[int, Ge(0), NoResult()] = 8
    """Rollouts of each step that go to rollouts.jsonl, for reading."""

    def __post_init__(self) -> None:
        if self.backend != "vllm":
            if self.ahead:
                raise ValueError(
                    f"ahead = {self.ahead}: the model in training writes no responses while it learns; "
                    "take backend = vllm"
                )
            return
        if self.ahead and self.vllm.transport != "folder":
            raise ValueError(
                f"ahead = {self.ahead} with vllm.transport = {self.vllm.transport}: an engine that is lost would need "
                "weights which training has left behind by then; take vllm.transport = folder"
            )
        if self.logprobs == "sampler":
            raise ValueError("logprobs = sampler needs entropies, which backend = vllm does not tell: take training")
        if self.temperature != 1.0 and (self.top_k or self.top_p != 1.0):
            raise ValueError(
                f"temperature = {self.temperature} with top_k = {self.top_k} and top_p = {self.top_p}: backend = vllm "
                "tells log-probabilities before top_k and top_p at temperature 1 only"
            )


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How much better a token was than expected."""

    estimator: str = "gae"
    """gae (with the critic), rloo, grpo, grpo_unscaled (Dr. GRPO), reinforce_pp, reinforce_pp_baseline."""
    gamma: Annotated[float, Gt(0), Le(1)] = 1.0
    """Discount per token."""
    lam: Annotated[float, Ge(0), Le(1)] = 0.95
    """Lambda of gae: 0 trusts the critic, 1 the rewards."""
    whiten: bool | None = None
    """Mean 0 and deviation 1 over all response tokens of the step; null: as is usual for the estimator."""

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator = {self.estimator}: there are {', '.join(ESTIMATORS)}")

    @property
    def whitened(self) -> bool:
        return ESTIMATORS[self.estimator].whitened if self.whiten is None else self.whiten

    @property
    def needs_values(self) -> bool:
        return ESTIMATORS[self.estimator].needs_values


@dataclass(frozen=True, kw_only=True)
class KlConfig:
    """The pull towards the reference."""

    coefficient: Annotated[float, Ge(0)] = 0.05
    """Nats of KL against one unit of standardized reward; at 0 the KL is only measured."""
    place: Literal["reward", "loss"] = "reward"
    """reward: taken off the reward of each token. loss: a term of the policy's loss."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the KL per token; null: k1 in the reward, k3 in the loss."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: steers the coefficient so that the KL of a response stays near `target`."""
    target: Annotated[float, Gt(0)] = 6.0
    """Nats per response."""
    horizon: Annotated[float, Gt(0)] | None = None
    """Responses over which an error of 0.2 or more changes the adaptive coefficient by about a fifth. Null: a fiftieth
    of those of the run, at least those of one step."""

    def __post_init__(self) -> None:
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError("estimator = k1 in the loss has an expected gradient of zero; take k2 or k3")
        if self.controller == "adaptive" and self.coefficient == 0:
            raise ValueError("controller = adaptive multiplies the coefficient: from 0 it can never rise")

    @property
    def kind(self) -> str:
        return self.estimator or ("k1" if self.place == "reward" else "k3")


@dataclass(frozen=True, kw_only=True)
class SurrogateConfig:
    """The policy's loss."""

    epochs: Annotated[int, Gt(0)] = 2
    """Passes over the rollouts of a step, in minibatches of train.global_batch_size rollouts."""
    objective: Literal["clip", "cispo"] = "clip"
    """clip: PPO's surrogate, in which tokens beyond the bounds are learned no further. cispo: the likelihood of every
    token, its weight being the ratio within the bounds."""
    clip_low: Annotated[float, Gt(0)] = 0.2
    """Lower bound of the ratio to the old policy: 1 - clip_low; from 1 on there is none."""
    clip_high: Annotated[float, Gt(0)] | None = None
    """Upper bound of the ratio: 1 + clip_high (clip-higher); null: as clip_low."""
    dual_clip: Annotated[float, Gt(1)] | None = None
    """Bound on the loss of bad tokens, in units of their advantage (3 is usual)."""
    ratio: Literal["token", "sequence"] = "token"
    """Ratio of single tokens, or one for a whole response (GSPO; clip_low about 3e-4)."""
    normalize: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens of a minibatch; over responses of their token means; or sum over responses, each divided
    by rollout.max_new_tokens (Dr. GRPO)."""
    entropy: Annotated[float, Ge(0)] = 0.0
    """Weight of an entropy bonus."""
    importance: Literal["none", "token", "sequence"] = "none"
    """Truncated importance sampling: weigh tokens, or whole responses, by how much likelier the policy in training
    makes them than the sampler that wrote them, which may round otherwise or have older weights (backend = vllm)."""
    importance_cap: Annotated[float, Gt(0)] = 2.0
    """Upper bound of these weights."""
    stop_epoch_kl: Annotated[float, Gt(0)] | None = None
    """End the epochs of a step once the policy is this far from the one that wrote the rollouts (nats per token)."""

    def __post_init__(self) -> None:
        if self.objective == "cispo" and self.dual_clip is not None:
            raise ValueError(f"dual_clip = {self.dual_clip} bounds the surrogate of objective = clip; cispo has none")

    @property
    def upper(self) -> float:
        return self.clip_low if self.clip_high is None else self.clip_high


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """A language-modeling term beside the policy's loss (PPO-ptx), against forgetting."""

    data: ExampleDataConfig
    """Conversations; their assistant turns are learned. Without a template of their own they have that of the run."""
    weight: Annotated[float, Gt(0)] = 0.1
    """Weight of the mean loss per response token."""
    batch_size: Annotated[int, Gt(0)] = 16
    """Conversations beside each minibatch, over all ranks."""


Action = Literal["warn", "stop", "best", "none"]


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Tripwires: what a run that goes wrong looks like."""

    action: Action = "warn"
    """warn once for each symptom; stop with an error; or best: end the run and publish the best checkpoint, which may
    be the start."""
    kl_budget: Annotated[float, Gt(0)] = 20.0
    """Nats per response from the reference; a checkpoint beyond it is not the best one."""
    sampler_gap: Annotated[float, Gt(0)] = 0.1
    """Nats per token, on average, that the sampler's log-probabilities may be off those of training; rounding to
    bfloat16 makes about .01."""
    length_factor: Annotated[float, Gt(1)] = 2.0
    """Mean response length may grow or shrink by this factor since the start."""
    ended_drop: Annotated[float, Gt(0), Le(1)] = 0.4
    """Share of responses that end by themselves may fall by this much since the start."""
    min_deviation: Annotated[float, Ge(0)] = 1e-3
    """Standard deviation of the scores of a step below which there is nothing to learn from."""
    length_correlation: Annotated[float, Gt(0), Le(1)] = 0.8
    """Correlation of score and response length."""
    repetition: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of a response's 4-grams that have been there before."""
    second: RewardSourceConfig | None = None
    """A scorer that the policy is not trained on; it should not fall while the reward rises."""
    second_drop: Annotated[float, Gt(0)] = 0.5
    """Fall of the second scorer since its peak, in its standard deviations at the start."""


@dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """A PPO run."""

    output: Annotated[Path, NoResult()]
    """Run folder: config, logs, rollouts, checkpoints, and final/ when done."""
    preset: Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo", "reinforce_pp"] | None = None
    """Settings of a method as its paper has them, in the place of defaults; what the recipe sets itself wins, and the
    log says where that differs from the paper. Null: PPO, or what the recipe makes of it."""
    policy: PolicyConfig
    reward: RewardSourceConfig
    data: PromptDataConfig
    """Prompts."""
    reference: ReferenceModelConfig = field(default_factory=ReferenceModelConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    loss: SurrogateConfig = field(default_factory=SurrogateConfig)
    pretraining: PretrainingConfig | None = None
    ema: Annotated[float, Ge(0), Le(1)] = 0.0
    """Decay per step of a moving average of the policy's weights, which is then what is published; 0 for none."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    optim: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-6, schedule="constant"))
    """Optimizer of the policy; a schedule runs over all optimizer steps."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            global_batch_size=32,
            last_batch="merge",
            best_metric="eval/selection",
            evaluate_every=10,
            evaluate_first=True,
            checkpoint_every=10,
        )
    )
    """Steps are PPO steps: one rollout each."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        kind, rollout = self.advantage.estimator, self.rollout
        if ESTIMATORS[kind].needs_groups and rollout.samples < 2:
            raise ValueError(
                f"advantage.estimator = {kind} compares the responses to one prompt: rollout.samples must be 2 or more"
            )
        if rollout.extra_rounds and not ESTIMATORS[kind].needs_groups:
            raise ValueError(
                f"rollout.extra_rounds = {rollout.extra_rounds} looks for prompts whose responses differ in score, but "
                f"advantage.estimator = {kind} does not compare them"
            )
        if rollout.ahead and self.loss.importance == "none":
            raise ValueError(
                f"rollout.ahead = {rollout.ahead} learns from responses of weights one step old: set "
                "loss.importance to token or sequence"
            )
        if self.loss.importance != "none" and rollout.logprobs == "sampler":
            raise ValueError(
                f"loss.importance = {self.loss.importance} compares the policy in training with the sampler, and with "
                "rollout.logprobs = sampler they are taken for the same: every weight would be 1; take training"
            )
        if self.train.global_batch_size > self.rollouts:
            raise ValueError(
                f"train.global_batch_size = {self.train.global_batch_size} rollouts of a minibatch, but a step has "
                f"only rollout.prompts x rollout.samples = {self.rollouts}"
            )
        horizon = self.kl.horizon
        if self.kl.controller == "adaptive" and horizon is not None and self.rollouts >= 5 * horizon:
            raise ValueError(f"kl.horizon = {horizon} must be above a fifth of {self.rollouts} rollouts")
        if self.watch.action == "best" and (self.train.publish == "last" or not self.train.evaluate_first):
            raise ValueError(
                "watch.action = best takes the best step, the start included: it needs train.publish=best and "
                "train.evaluate_first=true"
            )
        if self.critic.share_trunk and (self.policy.lora is None or self.critic.lora is not None or self.critic.path):
            raise ValueError("critic.share_trunk needs policy.lora, and then has neither critic.lora nor critic.path")
        if self.critic.share_trunk and (self.policy.gradient_checkpointing or self.critic.gradient_checkpointing):
            raise ValueError("critic.share_trunk does not go with gradient_checkpointing: adapters switch in between")
        adapters = (self.policy.lora, self.critic.lora)
        if self.policy.dropout or any(lora is not None and lora.dropout for lora in adapters):
            raise ValueError(
                "policy.dropout, policy.lora.dropout and critic.lora.dropout must be off (false, 0, 0): PPO compares "
                "probabilities and values in training with those of the rollout, and dropout would be noise in that"
            )
        if self.reward.length_penalty and self.reward.length_free_tokens >= rollout.max_new_tokens:
            raise ValueError(
                f"reward.length_free_tokens = {self.reward.length_free_tokens} must be below rollout.max_new_tokens = "
                f"{rollout.max_new_tokens}"
            )

    @staticmethod
    def defaults_given(values: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that depend on what a recipe says; see :func:`rlhf.config.load_config`."""
        return preset_values(values)

    @property
    def model(self) -> PolicyConfig:
        """The model in training, by the name that every stage has for it."""
        return self.policy

    @property
    def models(self) -> tuple[ModelRole, ...]:
        """The models of the run. Scorers come first: what cannot work should say so before large ones are loaded."""
        policy = policy_role(self.policy, "policy", self.optim, self.engine)
        reference = self.reference
        inside = reference.path is None and self.policy.lora is not None
        return (
            *scorer_roles("reward model", "reward", self.reward),
            *(scorer_roles("second scorer", "watch.second", self.watch.second) if self.watch.second else ()),
            policy,
            *((self._critic_role(policy),) if self.advantage.needs_values else ()),
            reference_role(policy, reference.path, reference.placement, inside=inside),
        )

    def _critic_role(self, policy: ModelRole) -> ModelRole:
        """It starts from its own path, else from the first reward model if that reads the policy's tokens, else from
        the policy; or it lives in the policy."""
        section, rewards = self.critic, self.reward
        readable = bool(rewards.paths) and not rewards.retokenize
        if section.share_trunk:
            setting, path = "critic.share_trunk", policy.backbone.path
        elif section.path is not None:
            setting, path = "critic.path", section.path
        elif readable:
            setting, path = f"reward.{rewards.model_settings[0]}", rewards.paths[0]
        else:
            setting, path = policy.setting, policy.backbone.path
        own = BackboneConfig(
            path=path,
            freeze_layers=section.freeze_layers,
            lora=section.lora,
            gradient_checkpointing=section.gradient_checkpointing,
        )
        return ModelRole(
            name="critic",
            section="critic",
            setting=setting,
            backbone=policy.backbone if section.share_trunk else own,
            kind="reward model",
            optimizer=section.optim,
            placement=section.deepspeed or self.engine.deepspeed,
            placed_by="critic.deepspeed" if section.deepspeed else "engine.deepspeed",
            inside=policy.name if section.share_trunk else "",
        )

    @property
    def workload(self) -> Workload:
        """What a step computes."""
        rollout = self.rollout
        load = RolloutLoad(
            prompts=rollout.prompts,
            samples=rollout.samples,
            max_new_tokens=rollout.max_new_tokens,
            batch_rows=rollout.batch_rows,
            gather=rollout.gather,
            epochs=self.loss.epochs,
        )
        return Workload(rows=self.data, kind="prompts", rollout=load)

    @property
    def pretraining_train(self) -> TrainConfig:
        """How the conversations of the language-modeling term are batched."""
        assert self.pretraining is not None
        return replace(self.train, global_batch_size=self.pretraining.batch_size)

    @property
    def rollouts(self) -> int:
        """Responses of a step."""
        return self.rollout.prompts * self.rollout.samples

    @property
    def updates(self) -> int:
        """Optimizer steps of a whole PPO step."""
        train = self.train
        return self.loss.epochs * steps_per_epoch(self.rollouts, train.global_batch_size, train.last_batch)
