"""What several tests share: a tiny tokenizer and model, tiny pairs, and a way to start ranks."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

# Before torch reads them, here and in all that tests start: two tests at once would fight for the cores otherwise.
os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

# A shell that starts its tests in the background has them ignore it, and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.train import fresh
from tests.forked import ForkedProcess, Zygote
from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("MARGIN_RLHF_DATA", ROOT.parent / "shared" / "data"))

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "the sun rain is was a good bad happy sad day dentist tax form write one sentence about it and so on"
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE of a few hundred tokens in which, as in SmolLM2, padding falls back to the end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random Llama of 3 layers and width 32, saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory) -> Path:
    """90 pairs over 30 prompts of differing lengths: the happy answer wins."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    generator = torch.Generator().manual_seed(0)

    def sentence(mood: str) -> str:
        count = int(torch.randint(2, 24, (1,), generator=generator))
        picks = torch.randint(len(WORDS), (count,), generator=generator).tolist()
        return " ".join([WORDS[pick] for pick in picks] + [mood])

    rows = [
        {
            "prompt": f"write one sentence about {WORDS[number % 20]} {number % 30}",
            "chosen": sentence("good happy"),
            "rejected": sentence("bad sad"),
            "chosen_score": 0.9,
            "rejected_score": round(0.1 + 0.005 * number, 3),
        }
        for number in range(90)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


pytest_plugins = ["tests.cost", "tests.served"]

Rank = ForkedProcess | subprocess.Popen


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """What forks ranks; it starts when the first one is wanted."""
    found = Zygote()
    yield found
    found.stop()


@pytest.fixture(scope="session", autouse=True)
def one_fresh_process() -> Iterator[None]:
    """All that publish in the process of the tests ask the same fresh process; ranks have their own, as users have."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fresh, "end_fresh_process", lambda: None)
        yield
    fresh.end_fresh_process()


def _start_ranks(zygote: Zygote, arguments: list[str], ranks: int, cold: bool, environment: dict) -> list[Rank]:
    common = os.environ | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    if not cold and not torch.cuda.is_available():  # CUDA does not survive a fork
        return [zygote.start(arguments, each, ROOT) for each in environments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen([sys.executable, *arguments], env=each, cwd=ROOT, **pipes) for each in environments]


@pytest.fixture
def start_ranks(zygote) -> Iterator[Callable[..., list[Rank]]]:
    """``start_ranks(arguments, ranks)`` starts ``python arguments`` as the ranks of one run, one thread each.

    They are forks of a process that has imported every stage; with ``cold=True`` they start as users start them.
    """
    started: list[Rank] = []

    def start(arguments: list[str], ranks: int, *, cold: bool = False, **environment: str) -> list[Rank]:
        processes = _start_ranks(zygote, arguments, ranks, cold, environment)
        started.extend(processes)
        return processes

    yield start
    _kill(started)


@pytest.fixture(scope="session")
def run_ranks(zygote) -> Callable[..., list[str]]:
    """``run_ranks(arguments, ranks=2)`` waits for all and returns their outputs; a failure shows them."""

    def run(
        arguments: list[str],
        ranks: int = 2,
        *,
        expect: int = 0,
        timeout: float = 600,
        cold: bool = False,
        **environment: str,
    ) -> list[str]:
        processes = _start_ranks(zygote, arguments, ranks, cold, environment)
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            _kill(processes)
        assert [process.returncode for process in processes] == [expect] * ranks, "\n".join(outputs)
        return outputs

    return run


def _kill(processes: list[Rank]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()


NOTHING = 1e-6
CHANCE = ("accuracy", "margin/gap_correlation", "margin/misranked_share")
"""What the sign of a gap decides, where it is rounding: a policy that still is its reference."""
NOT_COMPARED = ("time/", "memory/", "padding_share", "shared_share", "margin/residual", "margin/transport_cost")


def metric_rows(folder: Path, kind: str = "train") -> list[dict]:
    """Rows of metrics.jsonl ("train" or "eval"), without what may differ between equal runs."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = [row for row in found if any(name.startswith("eval/") for name in row) == (kind == "eval")]
    for row in wanted:
        if abs(row.get("gap", 1.0)) < NOTHING:
            for name in CHANCE:
                row.pop(name, None)
    return [{k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)} for row in wanted]


def assert_rows_close(found: list[dict], expected: list[dict], tolerance: float) -> None:
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.keys() == right.keys()
        for name, value in right.items():
            assert math.isclose(left[name], value, rel_tol=tolerance, abs_tol=tolerance), (right["step"], name)


def kill_when(processes: list[Rank], condition, timeout: float = 200) -> None:
    """Kill -9 all ranks once ``condition()`` holds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and not condition():
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.02)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def step_is_saved(folder: Path, step: int) -> bool:
    """Whether the checkpoint of ``step`` is there and a later step is logged."""
    metrics = folder / "metrics.jsonl"
    logged = metrics.exists() and f'"step": {step + 1},' in metrics.read_text()
    return logged and (folder / "checkpoints" / f"step-{step:08d}").is_dir()


@pytest.fixture(scope="session")
def runs() -> SimpleNamespace:
    """What tests of whole runs share."""
    return SimpleNamespace(
        rows=metric_rows, assert_close=assert_rows_close, kill_when=kill_when, step_is_saved=step_is_saved
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real preference data, where it is at hand (MARGIN_RLHF_DATA, or ../shared/data)."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data in {SHARED_DATA}; set MARGIN_RLHF_DATA to run this test")
    return SHARED_DATA
