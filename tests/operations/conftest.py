"""As of the tests of the trainer."""

from tests.trainer.conftest import _groups_of_refused_runs_end  # noqa: F401
