"""Short runs on little data."""

from __future__ import annotations

QUICK = ["fit", "--config", "vision/quickstart", "--trainer.accelerator=cpu", "--trainer.max_epochs=3"]
SPY = ["--trainer.callbacks+=tests.spies.Interrupt", "--trainer.callbacks.step=40"]
