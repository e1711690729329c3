"""What all ranks agree on."""

import pytest
import torch.distributed as dist

from fasthpm.errors import UserError
from fasthpm.ranks import agreement


def test_agreeing_on_nothing_goes_on_and_on_something_raises_it() -> None:
    agreement.agree(None)
    with pytest.raises(UserError, match="wrong"), agreement.in_agreement():
        raise UserError("wrong")


def test_a_lost_rank_is_named_before_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        lost = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711"
        with pytest.raises(RuntimeError), agreement.naming_lost_ranks(lambda: "after update 7"):
            raise RuntimeError(lost)
        expected = "error: rank 0 lost another rank after update 7 (Connection closed by peer [10.0.0.2]:4711); see"
        assert expected in capsys.readouterr().err
        with pytest.raises(RuntimeError), agreement.naming_lost_ranks(lambda: "after update 7"):
            raise RuntimeError("a size mismatch")
        assert capsys.readouterr().err == ""
    finally:
        dist.destroy_process_group()
