"""Reward functions that recipes of tests name as ``rules:function``, with this folder on the path."""

import math

A_NUMBER = 3.0


def share_of_abc(prompts, responses):
    """Share of a response's characters that are a, b or c: a rule that any policy can learn."""
    return [sum(letter in "abc" for letter in text) / max(len(text), 1) for text in responses]


def has_an_a(prompts, responses):
    return [float("a" in text) for text in responses]


def length(prompts, responses):
    return [len(text) / 10 for text in responses]


def minus_length(prompts, responses):
    return [-len(text) / 10 for text in responses]


def raises(prompts, responses):
    raise RuntimeError("the scoring service is down")


def one_too_few(prompts, responses):
    return [0.0] * (len(responses) - 1)


def one_not_a_number(prompts, responses):
    return [math.nan] + [0.0] * (len(responses) - 1)


def always_not_a_number(prompts, responses):
    return [math.nan] * len(responses)


def no_numbers(prompts, responses):
    return ["good"] * len(responses)


def nothing(prompts, responses):
    return None


def needs_a_response(prompts, responses):
    """Length, from a function that cannot be asked about no response at all."""
    longest = max(map(len, responses))
    return [len(text) / 10 for text in responses if longest >= 0]


def nearness(prompts, responses, *, wanted):
    """How near the length of a response is to that which its row asks for; ``None`` where it asks for none."""
    return [None if each is None else -abs(len(text) - each) for text, each in zip(responses, wanted, strict=True)]


def fails_on_odd_lengths(prompts, responses):
    if any(len(text) % 2 for text in responses):
        raise ValueError("odd")
    return [1.0] * len(responses)


def tells_columns(prompts, responses, *, wanted, level=None):
    return [2.0 - (level is None)] * len(wanted)


def asks_for_what_is_absent(prompts, responses, *, absent):
    return absent
