import os

from policy.sft.__main__ import main as sft


def test_a_closed_pipe_ends_a_stage_in_one_line(monkeypatch, capfd, tmp_path):
    def nobody_reads(*_):
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"a line")

    monkeypatch.setattr("rlhf.train.command._run_on_all_ranks", nobody_reads)
    kept = os.dup(1)
    try:
        code = sft([f"output={tmp_path}/run", "model.path=m", "data.train=d"])
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert code == 1
    assert capfd.readouterr().err == "policy.sft: stopped, for nobody reads its output any more (a closed pipe)\n"
