"""What is shown of the log of a stage."""

from launch.jobs import log as joblog

LOG = """\
[2026-01-01 00:00:00,000] [INFO] [launch.py:152:main] WORLD INFO DICT
step 3/9  ETA 0:00:08  loss 0.5  accuracy 0.75
evaluating at step 3
reference: sample 5/9  ETA 0:00:02
reward: recipe.yaml: 2 problems
  margin.epsilon = 0: Input should be greater than 0
  learning_rte = 1.0: unknown key
[rank0]:[W101 00:00:00.0 ProcessGroup.cpp:1] Warning
[2026-01-01 00:00:01,000] [ERROR] [launch.py:360:sigkill_handler] exits with return code = 2
"""


def test_the_last_message_is_whole_and_none_of_the_launcher(tmp_path):
    log = tmp_path / "rank0.log"
    log.write_text(LOG)
    said = joblog.last_line(log)
    assert said.startswith("reward: recipe.yaml: 2 problems") and said.endswith("learning_rte = 1.0: unknown key")


def test_what_an_earlier_start_wrote_does_not_count(tmp_path):
    log = tmp_path / "rank0.log"
    log.write_text("old fault\n")
    start = joblog.size(log)
    assert joblog.last_line(log, start) == ""
    assert joblog.last_line(tmp_path / "none.log") == "" and joblog.size(tmp_path / "none.log") == 0
