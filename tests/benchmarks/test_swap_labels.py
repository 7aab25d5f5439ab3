import json

import pytest

from benchmarks import swap_labels

PAIRS = [
    {
        "prompt": f"p{n}",
        "chosen": f"good {n}",
        "rejected": f"bad {n}",
        "chosen_score": n,
        "rejected_score": -n,
        "by": "x",
    }
    for n in range(1, 11)
]


@pytest.mark.parametrize(("share", "seed"), [(0.3, 0), (0.0, 1), (1.0, 2)])
def test_a_share_of_the_pairs_change_their_answers_and_what_is_said_of_them(tmp_path, monkeypatch, share, seed):
    pairs, swapped = tmp_path / "pairs.jsonl", tmp_path / "swapped.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    arguments = ["swap_labels", str(pairs), "--share", str(share), "--seed", str(seed), "-o", str(swapped)]
    monkeypatch.setattr("sys.argv", arguments)
    swap_labels.main()
    found = [json.loads(line) for line in swapped.read_text().splitlines()]
    others = [
        pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
        | {"chosen_score": pair["rejected_score"], "rejected_score": pair["chosen_score"]}
        for pair in PAIRS
    ]  # fmt: skip
    assert all(row in (pair, other) for row, pair, other in zip(found, PAIRS, others, strict=True))
    assert sum(row == other for row, other in zip(found, others, strict=True)) == round(share * len(PAIRS))
