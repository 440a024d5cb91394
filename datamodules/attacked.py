"""Loaders of held-out prompts under attack, one for the harmful ones and one for the look-alikes of each attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from nspo_lightning import ranks
from nspo_lightning.attacks import ATTACK, LOOKALIKES, Attack, AttackError, Victim
from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.sources.attacked import Show, attacked_rows
from nspo_lightning.datamodules.sources.rows import PromptRow, take_ranked
from nspo_lightning.datamodules.text.collate import collate_prompts
from nspo_lightning.datamodules.text.render import ChatRenderer
from nspo_lightning.rewards import RewardError
from nspo_lightning.terminal import counted

MakeLoader = Callable[[Sequence[PromptRow], Callable[[list[PromptRow]], dict[str, Any]]], PromptLoader]


class AttackedPolicy(Victim, Protocol):
    """A victim that also says on which prompts over-refusal is measured, and how long prompts may be."""

    over_refusal_skills: Sequence[str]
    """Skills of look-alikes; where there is no such row, all harmless prompts are."""

    @property
    def prompt_room(self) -> int | None:
        """Tokens that a prompt with the beginning of its answer may have; None = no limit is known."""


@runtime_checkable
class HasVictim(Protocol):
    """A LightningModule whose policy can be attacked."""

    @property
    def victim(self) -> AttackedPolicy:
        """The policy."""


def attack_loaders(
    attacks: Sequence[Attack],
    harmful: Sequence[PromptRow],
    benign: Sequence[PromptRow],
    *,
    victim: AttackedPolicy | None,
    renderer: ChatRenderer,
    make_loader: MakeLoader,
    limit: int | None,
) -> list[PromptLoader]:
    """Return the loaders of some attacks, in their order: harmful prompts, then look-alikes where they are attacked.

    Args:
        attacks: The attacks to try.
        harmful: Held-out harmful rows.
        benign: Held-out harmless rows, the look-alikes among them.
        victim: The policy, if there is one.
        renderer: Applies the chat template.
        make_loader: Makes a loader of rows and a function that makes batches.
        limit: Rows of each kind at most; None = all.

    Returns:
        One or two loaders an attack; none where no prompt fits into the policy's context, or fewer than processes.
    """
    skills = victim.over_refusal_skills if victim is not None else ()
    alike = [row for row in benign if row.skill in skills] or list(benign)
    loaders = []
    for attack in attacks:
        for rows, lookalikes in ((harmful, False), (alike if attack.on_lookalikes else [], True)):
            most = min([len(rows), *(size for size in (limit, attack.limit) if size is not None)])
            some = [rows[i] for i in take_ranked(rows, most, "attack")]
            fitting = _that_fit(_attacked(some, attack, victim, renderer.as_shown), attack, renderer, victim)
            if 0 < len(fitting) < ranks.world_size():
                rank_zero_warn(
                    f"Attack {attack.name}: {counted(len(fitting), 'prompt')} can't be shared by {ranks.world_size()} "
                    "processes, so none is measured. Use fewer devices, or give more held-out rows."
                )
            elif fitting:
                loaders.append(make_loader(fitting, _collate(attack, lookalikes, renderer)))
    return loaders


def _attacked(rows: list[PromptRow], attack: Attack, victim: AttackedPolicy | None, show: Show) -> list[PromptRow]:
    """Attack rows; what is searched for is searched once, for all ranks."""
    if not attack.searches:
        return attacked_rows(rows, attack, victim, show)
    found, problem = list[PromptRow](), ""
    if ranks.rank() == 0:
        try:
            rank_zero_info(f"Attack {attack.name} searches on {counted(len(rows), 'prompt')}. This takes a while.")
            found = attacked_rows(rows, attack, victim, show) if rows else []
        except (AttackError, RewardError) as error:
            problem = str(error)
    found, problem = ranks.broadcast_object((found, problem), 0)
    if problem:
        raise AttackError(problem)
    return found


def _that_fit(
    rows: list[PromptRow], attack: Attack, renderer: ChatRenderer, victim: AttackedPolicy | None
) -> list[PromptRow]:
    room = None if victim is None else victim.prompt_room
    if room is None or not rows:
        return rows
    prompts, begun = renderer.encode_prompts(rows), renderer.encode([row.prefix_text for row in rows])
    lengths = [
        len(prompt) + (len(own) if row.prefix_text else row.prefix_tokens)
        for row, prompt, own in zip(rows, prompts, begun, strict=True)
    ]
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= room]
    if len(kept) < len(rows):
        rank_zero_info(
            f"Attack {attack.name}: {len(rows) - len(kept)} of {len(rows)} prompts are left out. With what answers "
            f"begin with they have more than {room} tokens, so the policy's context has no room for the answer."
        )
    return kept


def _collate(attack: Attack, lookalikes: bool, renderer: ChatRenderer) -> Callable[[list[PromptRow]], dict[str, Any]]:
    return lambda rows: {**collate_prompts(rows, renderer), ATTACK: attack, LOOKALIKES: lookalikes}
