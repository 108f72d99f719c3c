"""Parameter-efficient tuning: a frozen net, a few parameters beside it, and the way back to plain weights.

    adapt(net, Peft("lora", rank=8), blocks, run=lambda: net(images))
    ...                                          # train: all but the adapters and the head is frozen
    merge(net)                                   # plain weights again, with what was learnt

LoRA, DoRA, PiSSA and IA3 are those of the library peft, put into the net in place, so that its blocks keep their
names. Bottleneck adapters, prompts and prefixes are ours: no kept library has them for encoders of transformers 5.
"""

from .adapt import adapt, adapters, channels_last, describe, follow_start, is_mergeable, merge
from .options import Peft

__all__ = ["Peft", "adapt", "adapters", "channels_last", "describe", "follow_start", "is_mergeable", "merge"]
