"""A model of a large shape from its files to ``final/``, in one run under ZeRO-3, with the memory of each process.

    python -m benchmarks.large_run --shape llama-3-70b --layers 4 --ranks 2

writes a random model of a known shape (with a vocabulary of bytes, and what else is narrowed by options), trains it for
two steps of DPO with adapters on so many CPU ranks, publishes it with the adapters merged, and says what every rank
took at its peak: private memory, as in benchmarks/sharded_start.py, beside its share of the weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.sharded_start import MIB, add_shape, write_model

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ROOT / "launch" / "quickstart" / "sentiment_pairs_train.jsonl"
LETTERS = 24
"""What is kept of each text: the vocabulary has no words, so that a text has as many tokens as bytes."""
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def tokenizer_of_bytes():
    """One token for each byte, and the marks of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={each: place for place, each in enumerate([*marks, *alphabet])}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(marks)
    ends = {"bos_token": marks[0], "eos_token": marks[2], "pad_token": marks[0]}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **ends)


def write_pairs(path: Path) -> None:
    """The first pairs of the quickstart, cut short."""
    lines = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()[:16]]
    names = ("prompt", "chosen", "rejected")
    rows = ({name: line[name][:LETTERS] for name in names} for line in lines)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def private_by_process(root: int) -> dict[int, int]:
    """Bytes of private memory of a process and all that it has started."""
    found, parents = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        except (OSError, ValueError):  # it has ended since the folder was listed
            continue
        parents[int(folder.name)] = int(fields["PPid"])
        found[int(folder.name)] = int(fields.get("RssAnon", "0").split()[0]) * 1024
    inside = {root}
    while True:
        more = {child for child, parent in parents.items() if parent in inside} - inside
        if not more:
            return {each: found[each] for each in inside if each in found}
        inside |= more


def run(options: argparse.Namespace, folder: Path) -> None:
    from rlhf.core.ports import free_port

    write_pairs(folder / "pairs.jsonl")
    settings = [f"model.path={folder / 'model'}", f"data.train={folder / 'pairs.jsonl'}", f"output={folder / 'run'}"]
    settings += [f"data.cache_dir={folder / 'cache'}", "data.eval_share=0", "data.max_tokens=128"]
    settings += ["model.lora={rank: 8}", "model.gradient_checkpointing=true", "reference.kind=live"]
    settings += ["engine.deepspeed=zero3", "engine.precision=bfloat16", "train.tensorboard=false"]
    settings += ["train.global_batch_size=2", "train.micro_batch_tokens=256", "train.max_steps=2"]
    shared = {"WORLD_SIZE": str(options.ranks), "LOCAL_WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "policy.preference", *settings]
    logs = [folder / f"rank{rank}.log" for rank in range(options.ranks)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("wb") as output:
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    peaks, together = [0] * options.ranks, 0
    while any(process.poll() is None for process in ranks):
        taken = [private_by_process(process.pid) for process in ranks]
        peaks = [max(peak, of.get(process.pid, 0)) for peak, of, process in zip(peaks, taken, ranks, strict=True)]
        together = max(together, sum(sum(of.values()) for of in taken))
        if any(process.poll() for process in ranks):
            for process in ranks:
                process.kill()
        time.sleep(0.1)
    print("\n".join(logs[0].read_text().splitlines()[-12:]))
    for rank, (process, peak) in enumerate(zip(ranks, peaks, strict=True)):
        print(f"rank {rank}: exit code {process.returncode}, private memory {peak / MIB:.0f} MiB at the peak")
    print(f"all processes together: {together / MIB:.0f} MiB")
    files = sorted((folder / "run" / "final").glob("*.safetensors"))
    print(f"final/: {len(files)} files of weights, {sum(file.stat().st_size for file in files) / MIB:.0f} MiB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser, "llama-3-70b")
    parser.add_argument("--layers", type=int, default=4, help="only so many of its layers (default %(default)s)")
    parser.add_argument("--intermediate", type=int, help="width of the MLPs (default: that of the shape)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where all is written (default: a folder that is removed)")
    return parser


def main() -> None:
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        tokenizer = tokenizer_of_bytes()
        narrowed = {"vocab_size": len(tokenizer) + 8, "num_hidden_layers": options.layers}
        if options.intermediate:
            narrowed["intermediate_size"] = options.intermediate
        if not (folder / "model").is_dir():
            write_model(folder / "model", options.shape, "bfloat16", **narrowed)
            tokenizer.save_pretrained(folder / "model")
        began = time.perf_counter()
        run(options, folder)
        print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
