"""Export forms."""

from fasthpm.exchange.forms import HuggingFaceMAE
from tests.helpers.fast_modes import doubled


def test_a_cross_decoder_is_not_exported_as_one_of_another_kind() -> None:
    form = HuggingFaceMAE()
    assert "self attention in the decoder" in form.refusal(doubled(decoder_attention="cross"))
    assert not form.refusal(doubled())
