from pathlib import Path

import pytest

from rlhf.data.loading import default_cache_dir


def test_tokens_are_kept_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_cache_dir() == tmp_path / "cache" / "margin-rlhf" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "margin-rlhf" / "tokens"


@pytest.mark.parametrize("home", ["/proc/1", "/dev/null", "/sys/none"])
def test_without_a_home_that_can_be_written_they_go_to_temporary_files(home, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    found = default_cache_dir()
    assert found.parent.parent == tmp_path
    assert not Path(home, ".cache").exists()


def test_without_any_home_no_folder_of_that_name_is_made(tmp_path, monkeypatch):
    """As in a container that knows nothing of its user."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    assert default_cache_dir().is_relative_to(tmp_path / "temporary")
    assert not (tmp_path / "~").exists()
