"""Freed memory: given back once where a run has gained more than it needs, and left alone
otherwise."""

from __future__ import annotations

import mmap
import sys

import pytest

from rqtool.train import heap

GIB = 1 << 30


@pytest.fixture
def watched(monkeypatch):
    """A function that plays steps after which the process holds so many GiB, and says after which
    of them memory was given back."""
    given = []
    monkeypatch.setattr(heap, "give_back", lambda: given.append(True))

    def play(*held: float) -> list[int]:
        process, at = heap.Watched(), []
        for step, gib in enumerate(held):
            monkeypatch.setattr(heap, "resident", lambda gib=gib: int(gib * GIB))
            given.clear()
            process.step_done()
            at += [step] * len(given)
        return at

    return play


def test_memory_is_given_back_when_it_has_grown(watched):
    assert watched(1, 1.5, 1.9, 2.1, 1.2, 1.9, 2.1, 2.3) == [3, 7]
    assert watched(3, 3.5, 4.0) == watched(1) == []


def test_memory_that_is_needed_is_not_asked_for_again(watched):
    assert watched(1, 2.5, 2.5, 2.5, 2.5) == [1]


def test_a_system_that_does_not_say_is_left_alone(watched):
    assert watched(0, 0, 0, 0) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_resident_memory_counts_what_is_touched():
    """Pages from the system: an array could get memory that an earlier one gave up."""
    before = heap.resident()
    with mmap.mmap(-1, 1 << 26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.write(b"1" * len(pages))
        assert heap.resident() - before > len(pages) // 2
        heap.give_back()
        assert heap.resident() > len(pages)
