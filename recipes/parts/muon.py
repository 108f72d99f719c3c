"""Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """Muon for the hidden layers' matrices and AdamW for all the rest, in one optimiser.

    Groups that hold both are divided: `layer3` keeps the matrices, `layer3/adamw` has the rest. Convolutions count
    as the rest. Muon's steps are scaled to the size of AdamW's, so that one learning rate and weight decay serve both:
    Liu et al. 2025, https://arxiv.org/abs/2502.16982

    Args:
        params: From `param_groups`, which tells hidden matrices from embeddings and the head; or parameters, of
            which all of two dimensions then count as matrices.
        lr: Rate of both.
        weight_decay: Decoupled, of both.
        momentum: Of Muon, with Nesterov's correction.
        betas: Of AdamW.
        eps: Of AdamW.

    Raises:
        ValueError: There is no hidden matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        given = list(params)
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        for_muon = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
        for_adamw = {"betas": betas, "eps": eps}
        divided = []
        for group in groups:
            kinds = group.get("kinds") or ["matrix" if p.ndim == 2 else "other" for p in group["params"]]
            for muon in (True, False):
                chosen = [i for i, kind in enumerate(kinds) if (kind == "matrix") is muon]
                if not chosen:
                    continue
                part = {**group, "muon": muon, "params": [group["params"][i] for i in chosen]}
                if "name" in group and not muon and len(chosen) < len(kinds):
                    part["name"] = f"{group['name']}/adamw"
                divided.append((for_muon if muon else for_adamw) | part)
        if not any(group["muon"] for group in divided):
            raise ValueError(
                "Muon found no hidden matrix, but only convolutions, vectors, embeddings or a head; take AdamW"
            )
        super().__init__(divided, {"lr": lr, "weight_decay": weight_decay})
        self._bind()

    def _bind(self) -> None:
        """Two optimisers that work on this one's groups and state."""
        self._parts: list[Optimizer] = []
        for cls, muon in ((Muon, True), (AdamW, False)):
            groups = [group for group in self.param_groups if group["muon"] is muon]
            if groups:
                self._parts.append(cls(groups))
                self._parts[-1].state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()  # a restored checkpoint, and a pickle, bring new groups and new state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; with a closure, after calling it once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss
