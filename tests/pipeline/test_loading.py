"""What is told before networks are loaded."""

import pytest

from turbojax.models.wan import WanConfig
from turbojax.pipeline.loading import warn_of_no_effect
from turbojax.pipeline.options import LoadOptions


@pytest.mark.parametrize(
    ("attention_type", "options", "told"),
    [
        ("original", {"sla_topk": 0.3, "sage_values": None}, ["sla_topk=0.3"]),
        ("original", {"sla_topk": 0.3, "sage_values": "exact"}, ["sla_topk=0.3", "sage_values=exact"]),
        ("sla", {"sla_topk": 0.3, "sage_values": "exact"}, ["sage_values=exact"]),
        ("sagesla", {"sla_topk": 0.3, "sage_values": "exact"}, []),
        ("original", {}, []),
    ],
)
def test_options_without_effect_are_told(caplog, attention_type, options, told):
    warn_of_no_effect(WanConfig.t2v_1_3b(attention_type=attention_type), LoadOptions(weights="any", **options))
    starts = [f"{option} has no effect with attention_type={attention_type}, only with " for option in told]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(starts)
    assert all(map(str.startswith, messages, starts))
