"""What is refused before a net is built."""

from __future__ import annotations

from typing import Any

import pytest

from recipes.parts.peft import Peft


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "lore"}, "peft.method must be one of lora, dora, ia3, adapter, prompt, prefix; received 'lore'"),
        ({"method": "lora", "rank": 0}, "must be 1 or more; received 0 and 20"),
        ({"method": "prompt", "tokens": 0}, "must be 1 or more; received 8 and 0"),
        ({"method": "lora", "dropout": 1.0}, "at least 0 and below 1; received 1"),
        ({"method": "ia3", "start": "pissa"}, "are of lora and dora, not of ia3"),
        ({"method": "adapter", "rank_stabilised": True}, "are of lora and dora, not of adapter"),
        ({"method": "ia3", "dropout": 0.1}, "peft.dropout is of lora, dora and adapter, not of ia3"),
        ({"method": "prefix", "targets": "all"}, "prefix adapts no layers; leave it out"),
        ({"method": "dora", "start": "pissa"}, "peft.start pissa is of lora"),
    ],
)
def test_a_value_that_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Peft(**options)
