"""Reports about a failure that Orbax raises too are hidden, however late; all others pass."""

import sys
from types import SimpleNamespace

import pytest

from vla_jax.training import orbax_errors

LATE = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
OTHER = SimpleNamespace(exc_value=ValueError("another one"))


@pytest.fixture
def reports(monkeypatch):
    """What Python would print."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    return found


@pytest.mark.parametrize("hidden", [orbax_errors.quiet, orbax_errors.collected])
def test_reports_are_hidden_inside_and_the_hook_is_restored(reports, hidden):
    before = sys.unraisablehook
    with hidden():
        sys.unraisablehook(LATE)
        sys.unraisablehook(OTHER)
    assert reports == [OTHER]
    assert sys.unraisablehook is before


def test_another_error_inside_restores_the_hook(reports):
    before = sys.unraisablehook
    with pytest.raises(FileNotFoundError), orbax_errors.quiet():
        raise FileNotFoundError("no such config")
    assert sys.unraisablehook is before


def test_after_a_failed_save_late_reports_stay_hidden(reports):
    """The slowest of the other writes may end after the program has reported the failure."""
    with orbax_errors.quiet():
        for _ in range(2):
            with pytest.raises(OSError, match="full"), orbax_errors.collected():
                raise OSError("full")
    hook = sys.unraisablehook
    hook(LATE)
    hook(OTHER)
    assert reports == [OTHER]
    assert hook.before == reports.append  # not wrapped once more by every failure
