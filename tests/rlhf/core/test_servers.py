"""Addresses and keys of servers as people give them."""

import pytest

from rlhf.core.errors import ConfigError
from rlhf.core.servers import check_address, checked_key, key_in, retry_after


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "https://api.openai.com/v1", "http://[::1]:80/v1/", "http://a"]
)
def test_addresses_of_servers(url):
    check_address("url", url)


@pytest.mark.parametrize(
    "url", ["", "x", "host:80", "ftp://host", "http://", "http:/x", "http://h:99999999", "http://a\nb"]
)
def test_what_is_no_address_is_refused_with_its_value(url):
    with pytest.raises(ValueError, match=r"^here\.url = .*: expected the address of a server, such as http://there"):
        check_address("here.url", url, example="http://there")


@pytest.mark.parametrize(
    "url",
    ["http://me:pw@host", "https://pw@host/v1", "ftp://me:pw@host", "me:pw@host", "http://host?key=pw", "http://h#pw"],
)
def test_what_may_hold_a_secret_is_refused_without_it(url):
    with pytest.raises(ValueError, match=r"^url: expected the address of a server") as refused:
        check_address("url", url)
    assert "pw" not in str(refused.value)


def test_a_key_is_stripped_and_none_is_none(monkeypatch):
    monkeypatch.setenv("MY_KEY", "  sk-1\n")
    assert key_in("MY_KEY") == "sk-1"
    monkeypatch.setenv("MY_KEY", " \n")
    assert key_in("MY_KEY") is None
    monkeypatch.delenv("MY_KEY")
    assert key_in("MY_KEY") is None


@pytest.mark.parametrize("key", ["", "one two", "one\ntwo", "\u00fc", "a\x7f"])
def test_a_key_that_no_header_can_hold_is_refused(key):
    with pytest.raises(ConfigError, match=rf"^file: expected a key .*found {len(key)} characters$"):
        checked_key(key, "file")


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, 0), ("2.5", 2.5), ("-1", 0), ("nan", 0), ("inf", 0), ("soon", 0)]
)
def test_how_long_to_wait(header, seconds):
    assert retry_after(header) == seconds
