"""``rlhf score``: rewards of texts or pairs from a published reward model."""

import argparse

from launch.commands.arguments import positive_int
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "score",
        help="score prompts with responses, or pairs, with a published reward model",
        description="Write one JSON line per row: reward, or chosen_reward and rejected_reward. Started again with "
        "the same output, it goes on where it stopped.",
    )
    parser.add_argument("--model", type=home_path, required=True, help="final/ folder of a reward run")
    parser.add_argument("--data", required=True, help="jsonl, json, csv, parquet, arrow, or a hub name")
    parser.add_argument("--output", type=home_path, required=True, help="jsonl file to write")
    at_once = "padded tokens at once (default %(default)s)"
    parser.add_argument("--batch-tokens", type=positive_int, default=8192, help=at_once)
    parser.add_argument("--max-tokens", type=positive_int, help="rows longer than this are reported, not scored")
    parser.add_argument("--split", help="split of a hub dataset or of a folder (train)")
    for name in ("prompt", "response", "chosen", "rejected"):
        parser.add_argument(f"--{name}-column", help=f"column of the {name} (default: {name})")
    for name in ("system", "input", "group"):
        parser.add_argument(f"--{name}-column", help=f"as data.columns.{name} in a recipe")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from reward.score import ScoreOptions, score_file
    from rlhf.data.options import ColumnConfig

    if not options.model.is_dir():
        raise UserError(f"--model {options.model}: no such folder; give the final/ folder of a reward run")
    columns = ColumnConfig(
        prompt=options.prompt_column,
        response=options.response_column,
        chosen=options.chosen_column,
        rejected=options.rejected_column,
        system=options.system_column,
        input=options.input_column,
        group=options.group_column,
    )
    faults = score_file(
        ScoreOptions(
            model=options.model,
            data=options.data,
            output=options.output,
            columns=columns,
            batch_tokens=options.batch_tokens,
            max_tokens=options.max_tokens,
            split=options.split,
        )
    )
    print(f"{options.output}: done" + (f"; {faults} rows could not be scored, see their 'error'" if faults else ""))
    return 1 if faults else 0
