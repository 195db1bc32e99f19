"""The one exception for what a user can fix."""

from __future__ import annotations

import pickle

from megatron_moe2dense.common.errors import UserError


def test_a_user_error_reaches_other_processes_as_it_is():
    sent = pickle.loads(pickle.dumps(UserError("this", "that", "mend it")))
    assert (sent.found, sent.expected, sent.do) == ("this", "that", "mend it")
    assert str(sent) == str(UserError("this", "that", "mend it"))
