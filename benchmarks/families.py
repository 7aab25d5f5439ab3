"""Which families of models can be trained: each one that Transformers can build small, from rows to ``final/``.

    python -m benchmarks.families [FAMILY ...] [--output FOLDER]

Nothing is downloaded. For each family a model of two to four layers with random weights is made, and by the commands
that users have: a policy is trained (one step of DPO), published, reloaded and sampled from, and a reward model is
trained (one step), published and reloaded. Writes families.json and families.md (the table of docs/models.md). Every
try is a fork, so that none can end or change the others.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # before torch reads it

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto

import policy.preference.stage
import reward.stage
from policy.evaluation.compare import open_policy
from policy.evaluation.options import SamplingSettings
from policy.evaluation.sampling import sample_responses
from policy.preference.__main__ import main as preference
from reward.__main__ import main as reward_main
from rlhf.core.errors import UserError
from rlhf.core.files import write_json, write_text
from rlhf.train import fresh
from rlhf.train.chat import load_chat

assert policy.preference.stage and reward.stage  # imported for the forks, which start with them

DECODERS = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
CLASSIFIERS = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
MASKED = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES

VOCABULARY = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32,
    "intermediate_size": 64, "ffn_dim": 64, "hidden_dim": 64, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2,
    "num_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "n_positions": 512, "head_dim": 8, "initializer_range": 0.1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "decoder_layers": 2,
    "encoder_layers": 2, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "state_size": 8, "time_step_rank": 4, "expand": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Settings of a small model; each family takes those that it has."""
NO_GROUPS = {"num_key_value_heads": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SEES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "esmc", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash",
         "minicpm3", "mistral4", "youtu"), NO_GROUPS),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), LINEAR | HYBRID),
    "axk1": NO_GROUPS | {"head_dim": 16},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"hidden_size": 32,
             "ffn_hidden_size": 64}},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 3.0},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8,
                     "hidden_size_per_layer_input": 8, "altup_num_inputs": 2},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 7.0},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "hyperclovax": {"logits_scaling": 7.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 64, "attention_chunk_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "nemotron_h": {"num_hidden_layers": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
    "phi3": {"sliding_window": 128},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "xlstm": {"hidden_size": 128, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2,
              "mamba_dt_rank": 4},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8,
               "mamba_d_state": 8, "chunk_size": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What a family needs besides, or in place of the usual sizes."""
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", SEES | {"mm_tokens_per_image": 4}),
    "llama4": ("llama4_text", SEES | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}),
    "mistral3": ("mistral", SEES | {"model_type": "pixtral", "head_dim": 16}),
    "gemma4": ("gemma4_text", SEES | {"head_dim": 16, "global_head_dim": 16}),
    "qwen3_5": ("qwen3_5_text", {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32}),
}
"""Families that also see: the type of their text model, and settings of the part that sees."""
LARGEST = 5_000_000
SECONDS = 900
WORDS = "the sun rain is was a good bad happy sad day dentist tax form write one sentence about it and so on"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHORT = ("engine.kind=local", "train.max_steps=1", "train.global_batch_size=4", "train.tensorboard=false",
         "train.evaluate_every=0", "data.max_tokens=128")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What became of one family."""

    family: str
    model: str
    """The class that was trained, or why there is no small model."""
    policy: str
    """Empty if it was trained, published and reloaded; else why not."""
    sampled: str
    """The same of sampling from what was published."""
    reward: str
    """The same of a reward model."""
    seconds: float

    @property
    def raw(self) -> bool:
        """Whether something ended in a traceback."""
        return any(said.startswith(RAW) for said in (self.policy, self.sampled, self.reward))


RAW, NOT_BUILT, NO_CLASS = "traceback: ", "not built", "Transformers has no such class"


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pieces, with the special tokens of decoders and of encoders."""
    special = ["<|pad|>", "<|begin|>", "<|end|>", "[CLS]", "[SEP]", "[MASK]", "<|user|>", "<|assistant|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [WORDS] * 3,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", core.token_to_id("<|begin|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", chat_template=TEMPLATE,
    )  # fmt: skip


def small_config(family: str) -> PretrainedConfig:
    """The family's configuration, small."""
    kind = CONFIG_MAPPING[family]
    if family in WHOLE:
        text, sees = WHOLE[family]
        inner = small_config(text).to_dict() | {"model_type": text}
        return kind(text_config=inner, vision_config=sees, image_token_index=VOCABULARY - 1)
    known = {field.name for field in fields(kind)} | set(kind.attribute_map)
    settings = {name: value for name, value in SIZES.items() if name in known}
    layers = OWN.get(family, {})
    return kind(**settings | layers)


def small_model(family: str) -> PreTrainedModel:
    """A model of the family with random weights; of an encoder that which its checkpoints hold."""
    config = small_config(family)
    loader: Any = AutoModel
    if family in WHOLE:
        loader = getattr(transformers, config.architectures[0]) if config.architectures else None
        loader = loader or transformers.AutoModelForImageTextToText
    elif family in DECODERS:
        loader = AutoModelForCausalLM
    elif family in MASKED:
        loader = AutoModelForMaskedLM
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in loader.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} million parameters at the sizes given here")
    torch.manual_seed(0)
    return loader.from_config(config)


def families() -> list[str]:
    """Every family that has a class for text."""
    return sorted({*DECODERS, *CLASSIFIERS, *WHOLE})


def _fork(call: Callable[[], Any], folder: Path, seconds: float) -> int | None:
    """Run ``call`` in a fork whose output goes to the files out and err; its exit code, ``None`` beyond the time."""

    def child() -> None:
        for number, name in ((1, "out"), (2, "err")):
            with (folder / name).open("wb") as file:
                os.dup2(file.fileno(), number)
        call()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def attempt(call: Callable[[], int], folder: Path) -> str:
    """Run a command of the toolkit in a fork, one line of what went wrong; empty if nothing did."""
    folder.mkdir(parents=True)
    answer = folder / "answer"

    def child() -> None:
        # The process that reloads is the parent's: one for all tries, which has imported Transformers and nothing else.
        fresh._FreshProcess.lives = property(lambda self: True)  # type: ignore[method-assign,assignment]
        fresh.end_fresh_process = lambda: fresh._living().settle()  # the parent knows of no question
        try:
            answer.write_text("done" if call() == 0 else "refused")
        except Exception as error:
            traceback.print_exc()
            answer.write_text(f"{RAW}{type(error).__name__}: {error}")

    fresh.start_fresh_process()  # anew only where it has died
    code = _fork(child, folder, SECONDS)
    if code is None:
        fresh.end_fresh_process()  # its answer to this try would be taken for one to the next
        return f"{RAW}still running after {SECONDS} s"
    said = answer.read_text() if answer.is_file() else f"{RAW}the process ended with code {code}"
    if said == "done":
        return ""
    if said == "refused":
        lines = [line for line in (folder / "err").read_text(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if not line.startswith((" ", "WARNING"))), "no message")
    return " ".join(said.split())


def try_family(family: str, folder: Path) -> Tried:
    """All that is tried of one family; ``folder`` is filled."""
    started = time.monotonic()
    base = folder / "base"

    def save() -> int:
        model = small_model(family).eval()
        if family in DECODERS:
            model(input_ids=torch.arange(8, 14)[None])  # small sizes do not fit every code
        model.save_pretrained(base)
        small_tokenizer().save_pretrained(base)
        (folder / "class").write_text(type(model).__name__)
        return 0

    def finished(model: str, **steps: str) -> Tried:
        answers = {"policy": NO_CLASS, "sampled": NO_CLASS, "reward": NO_CLASS} | steps
        return Tried(family=family, model=model, **answers, seconds=round(time.monotonic() - started, 1))

    broken = attempt(save, folder / "build")
    if broken:
        why = f"{NOT_BUILT}: {broken.removeprefix(RAW)}"
        return finished(why, policy=why, sampled=why, reward=why)
    pairs = folder / "pairs.jsonl"
    rows = [
        {"prompt": f"write about {word}", "chosen": f"it is {word} and good", "rejected": "no"}
        for word in WORDS.split()
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (f"model.path={base}", f"data.train={pairs}", *SHORT)
    steps = {}
    if family in DECODERS or family in WHOLE:
        run = folder / "policy"
        steps["policy"] = attempt(lambda: preference([f"output={run}/run", *given]), run)
        steps["sampled"] = "not published"
        if not steps["policy"]:
            steps["sampled"] = attempt(lambda: _sample(run / "run" / "final"), folder / "sample")
    if family in CLASSIFIERS or family in WHOLE or family in DECODERS:
        run = folder / "reward"
        steps["reward"] = attempt(lambda: reward_main([f"output={run}/run", *given]), run)
    return finished((folder / "class").read_text(), **steps)


def _sample(final: Path) -> int:
    settings = SamplingSettings(samples=2, max_new_tokens=4)
    try:
        sample_responses(open_policy(final), load_chat(final, None), ["write about rain", "tax"], settings)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def markdown(found: Sequence[Tried]) -> str:
    """The table of docs/models.md."""
    both = [each.family for each in found if not (each.policy or each.sampled or each.reward)]
    policies = [each.family for each in found if not (each.policy or each.sampled) and each.reward]
    rewards = [each.family for each in found if not each.reward and (each.policy or each.sampled)]
    lines = ["| trained, published, reloaded | families |", "|---|---|"]
    lines += [
        f"| {name} ({len(names)}) | {', '.join(names)} |"
        for name, names in (
            ("policies, sampled too, and reward models", both),
            ("policies, sampled too", policies),
            ("reward models", rewards),
        )
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in found:
        for what, said in (("policy", each.policy), ("sampling", each.sampled), ("reward model", each.reward)):
            if said and said not in ("not published", NO_CLASS):
                kinds = "model" if said.startswith(NOT_BUILT) else what
                names = reasons.setdefault((kinds, _short(said)), [])
                names += [each.family] if each.family not in names else []
    lines += ["", "| not | of | why |", "|---|---|---|"]
    lines += [f"| {what} | {', '.join(names)} | {why} |" for (what, why), names in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def _short(said: str) -> str:
    """A message without what differs from family to family, fit for a cell."""
    if said.startswith(NOT_BUILT):
        return "no small model could be made, with the sizes of the script and the packages here"
    if "has no AutoModelForSequenceClassification" in said:
        return "Transformers has no sequence classifier for them"
    said = said.removeprefix("what this run would publish was tried before the first step, and cannot be published: ")
    said = re.sub(r"(\S+ = )?/\S+?/(base|final)\b( is not published)?( \(\w+\))?:? ?", "", said)
    said = re.sub(r"\w+DecoderWrapper", "their decoder", said)
    said = re.sub(r";? ?(the checkpoints are intact|[Tt]ake a|or try model\.).*", "", said)
    said = re.sub(r"^\w+For\w+ ", "the model ", re.sub(r"(up to|by up to|at most) [\d.e+-]+", r"\1 ...", said))
    said = re.sub(r" [\d.e+-]+(,|\)| off\))", r" ...\1", said)
    return said.replace("|", "\\|")[:300].rstrip(" .")


def main(argv: Sequence[str] | None = None) -> int:
    """Try the families named, or all; 1 if any of them ends in a traceback."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model_type of Transformers; all by default")
    parser.add_argument("--output", type=Path, default=Path("families"), help="folder for families.json and .md")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    unknown = sorted(set(arguments.families) - set(families()))
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such family in Transformers {transformers.__version__}")
    found = []
    for family in arguments.families or families():
        with tempfile.TemporaryDirectory() as scratch:
            tried = try_family(family, Path(scratch))
            if tried.raw:
                _keep_errors(Path(scratch), arguments.output / "tracebacks" / family)
        found.append(tried)
        print(f"{family} ({tried.seconds} s): {_line(tried)}", flush=True)
        write_json(arguments.output / "families.json", [asdict(each) for each in found])
    fresh.end_fresh_process()
    write_text(arguments.output / "families.md", markdown(found))
    print(markdown(found))
    return int(any(each.raw for each in found))


def _keep_errors(scratch: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in scratch.glob("*/err"):
        with contextlib.suppress(OSError):
            (target / file.parent.name).write_bytes(file.read_bytes())


def _line(tried: Tried) -> str:
    if tried.model.startswith(NOT_BUILT):
        return tried.model
    steps = (("policy", tried.policy), ("sampled", tried.sampled), ("reward", tried.reward))
    return "; ".join(f"{name}: {said or 'yes'}" for name, said in steps)


if __name__ == "__main__":
    sys.exit(main())
