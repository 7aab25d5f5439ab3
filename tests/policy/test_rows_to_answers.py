"""From rows to a published folder whose plain ``generate`` stops: SFT, then DPO and PPO of what it published.

The models are small ones of well-known families, with the chat templates that these were published with.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from policy.ppo.__main__ import main as ppo
from policy.preference.__main__ import main as preference
from policy.sft.__main__ import main as sft
from tests.lacking import imported

QUESTIONS = [f"write one sentence about {word}" for word in ("rain", "tax", "the sun", "a day", "forms", "a dentist")]
ANSWER, ROOM = "it is good", 24
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8, "initializer_range": 0.1}  # fmt: skip
COMMON = ("engine.kind=local", "train.global_batch_size=6", "train.tensorboard=false", "data.eval_share=0",
          "data.cache_dir={run}/tokens")  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A tokenizer, a template and a model as a family has them."""

    kind: str
    special: tuple[str, ...]
    eos: str
    chat: str | None
    """File of TRL's copy of the family's template; ``None`` for a tokenizer without one."""
    stops: tuple[str, ...] = ()
    """What the generation config names besides EOS."""
    settings: tuple[str, ...] = ()
    opens_next: bool = False
    """The template writes the header of another answer whether it is asked to or not."""
    sizes: dict = field(default_factory=lambda: SIZES)
    """Of the model."""


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES = {
    "qwen3": Family("qwen3", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "qwen3",
                    stops=("<|endoftext|>",)),
    "phi3": Family("phi3", ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
                   "<|endoftext|>", "phi3", stops=("<|end|>", "<|assistant|>")),
    "llama3_first": Family("llama", LLAMA3, "<|eot_id|>", "llama3", stops=("<|end_of_text|>",), opens_next=True),
    "gemma2": Family("gemma2", ("<bos>", "<pad>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "gemma"),
    "r1": Family("llama", ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
                 "<｜end▁of▁sentence｜>", "deepseek_r1_distill", settings=("data.template=r1-distill",)),
    "gpt2": Family("gpt2", ("<|endoftext|>",), "<|endoftext|>", None,
                   sizes={"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1}),
}  # fmt: skip


def small_model(family: Family, folder: Path) -> Path:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*family.special], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*QUESTIONS, ANSWER] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.special[0],
        eos_token=family.eos,
        additional_special_tokens=[*family.special],
    )
    if family.chat is not None:
        trl = imported("trl")
        text = (Path(trl.__file__).parent / "chat_templates" / f"{family.chat}.jinja").read_text()
        if family.opens_next:
            text = re.sub(r"\{% if add_generation_prompt %\}(.*)\{% endif %\}\s*$", r"\1", text, flags=re.DOTALL)
            assert "add_generation_prompt" not in text
        tokenizer.chat_template = text
    ids = tokenizer.convert_tokens_to_ids([family.eos, *family.stops])
    torch.manual_seed(0)
    settings = {"vocab_size": len(tokenizer), "eos_token_id": ids[0], "bos_token_id": 0, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.kind, **settings, **family.sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_plain_generate_stops(final: Path) -> None:
    """As any user of the folder would ask it, with nothing of the toolkit."""
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final).eval()
    for question in (QUESTIONS[0], QUESTIONS[3]):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**asked, max_new_tokens=ROOM, do_sample=False)[0, asked["input_ids"].shape[1] :]
        text = tokenizer.decode(written)
        assert len(written) < ROOM, f"{final}: goes on: {text!r}"
        assert ANSWER in text, f"{final}: {text!r}"
        assert int(written[-1]) in model.generation_config.eos_token_id


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_sft_preference_and_ppo_publish_models_whose_answers_end(name, tmp_path):
    family = FAMILIES[name]
    base = small_model(family, tmp_path / "base")
    given = [*(part.format(run=tmp_path) for part in COMMON), *family.settings]
    answers = [{"prompt": question, "completion": ANSWER} for question in QUESTIONS]
    pairs = [{"prompt": question, "chosen": ANSWER, "rejected": "no"} for question in QUESTIONS]
    code = sft(
        [f"output={tmp_path}/sft", f"model.path={base}", f"data.train={write(tmp_path / 'sft.jsonl', answers)}",
         "train.epochs=60", "optim.learning_rate=3e-3", *given]
    )  # fmt: skip
    assert code == 0
    learned = tmp_path / "sft" / "final"
    assert_plain_generate_stops(learned)
    given.append("train.max_steps=2")
    code = preference(
        [
            f"output={tmp_path}/dpo",
            f"model.path={learned}",
            f"data.train={write(tmp_path / 'dpo.jsonl', pairs)}",
            *given,
        ]
    )
    assert code == 0
    assert_plain_generate_stops(tmp_path / "dpo" / "final")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": question} for question in QUESTIONS])
    code = ppo(
        [f"output={tmp_path}/ppo", f"policy.path={learned}", f"data.train={prompts}", "optim.learning_rate=1e-6",
         "reward.function=launch.quickstart.gold:gold_reward", "advantage.estimator=rloo", "rollout.prompts=6",
         "rollout.samples=2", f"rollout.max_new_tokens={ROOM}", *given]
    )  # fmt: skip
    assert code == 0
    rollouts = [json.loads(line) for line in (tmp_path / "ppo" / "rollouts.jsonl").read_text().splitlines()]
    ended = [row["ended"] for row in rollouts if row["step"] == 1]
    assert any(ended), rollouts  # drawn at temperature 1, some go on
    assert_plain_generate_stops(tmp_path / "ppo" / "final")
