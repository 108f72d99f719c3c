"""Pure torch: backbones, heads, losses, optimisers, schedules. No Trainer, no command line."""
